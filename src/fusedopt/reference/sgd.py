"""Gradient descent in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

from fusedopt._check import Array
from fusedopt.optim import sgd as _fast
from fusedopt.reference._plain import reference


def _sgd(
    p: Array, g: Array, b: Array | None, *, step: int, lr: float, momentum: float,
    dampening: float, nesterov: bool, **_: Any,
) -> None:  # fmt: skip
    c = p.dtype.type  # round a constant once
    if b is not None:
        b[...] = g if step == 1 else c(momentum) * b + c(1 - dampening) * g
        g = g + c(momentum) * b if nesterov else b
    p[...] = p - c(lr) * g


SGD, sgd = reference(_fast.SGD, _sgd)
