"""Adamax in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import adamax as _fast
from fusedopt.reference._plain import reference


def _adamax(
    p: Array, g: Array, m: Array, u: Array, *, step: int, lr: float, betas: tuple[float, float],
    eps: float, **_: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    m[...] = m + c(1 - beta1) * (g - m)
    u[...] = np.maximum(u * c(beta2), np.abs(g) + c(eps))
    p[...] = p - (c(lr / (1 - beta1**step)) * m) / u


Adamax, adamax = reference(_fast.Adamax, _adamax)
