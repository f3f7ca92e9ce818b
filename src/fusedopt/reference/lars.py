"""LARS in plain NumPy: the order of roundings that every fast path must reproduce."""

from math import sqrt
from typing import Any

from fusedopt._check import Array
from fusedopt.optim import lars as _fast
from fusedopt.reference._plain import Sums, reference


def _lars(
    p: Array, g: Array, b: Array, *, lr: float, momentum: float, weight_decay: float,
    trust_coefficient: float, eps: float, sums: Sums, **_: Any,
) -> None:  # fmt: skip
    c = p.dtype.type  # round a constant once
    p_norm, g_norm = map(sqrt, sums(p, g))
    trust = 1.0
    if p_norm > 0 and g_norm > 0:
        trust = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + eps)
    b[...] = c(momentum) * b + c(lr * trust) * (g + c(weight_decay) * p)
    p[...] = p - b


LARS, lars = reference(_fast.LARS, _lars)
