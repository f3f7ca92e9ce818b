"""LARS in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

from fusedopt._check import Array
from fusedopt.optim import lars as _fast
from fusedopt.reference._plain import Norms, reference


def _lars(
    p: Array, g: Array, b: Array, *, lr: float, momentum: float, weight_decay: float,
    trust_coefficient: float, eps: float, norms: Norms, **_: Any,
) -> None:  # fmt: skip
    c = p.dtype.type  # round a constant once
    size, way = norms(p, g)
    trust = 1.0
    if size > 0 and way > 0:
        trust = trust_coefficient * size / (way + weight_decay * size + eps)
    b[...] = c(momentum) * b + c(lr * trust) * (g + c(weight_decay) * p)
    p[...] = p - b


LARS, lars = reference(_fast.LARS, _lars)
