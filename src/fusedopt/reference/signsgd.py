"""SignSGD in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

from fusedopt._check import Array
from fusedopt.optim import signsgd as _fast
from fusedopt.reference._plain import reference, sign
from fusedopt.rule import kept


def _signsgd(
    p: Array, g: Array, b: Array | None, *, lr: float, momentum: float, **options: Any
) -> None:
    c = p.dtype.type  # round a constant once
    if b is not None:
        b[...] = b + c(1 - momentum) * (g - b)
        g = b
    p[...] = p * c(kept(options | {"lr": lr})) - c(lr) * sign(g)


SignSGD, signsgd = reference(_fast.SignSGD, _signsgd)
