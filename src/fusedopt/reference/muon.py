"""Muon in plain NumPy: the order of roundings of all but the matrix products."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import muon as _fast
from fusedopt.reference._plain import reference


def _muon(
    p: Array, g: Array, m: Array, *, lr: float, weight_decay: float, momentum: float,
    nesterov: bool, **options: Any,
) -> None:  # fmt: skip
    c = p.dtype.type  # round a constant once
    beta, w, u = c(momentum), c(1 - momentum), np.empty_like(p)  # u in the parameter's order
    m[...] = m + w * (g - m) if w < 0.5 else g - beta * (g - m)  # as torch's lerp
    u[...] = m
    if nesterov:
        u[...] = g + beta * (m - g) if beta < 0.5 else m - w * (m - g)
    if u.size:
        _fast.make_orthogonal(u, options)
    p[...] = p * c(1 - lr * weight_decay) - c(lr) * u


Muon, muon = reference(_fast.Muon, _muon)
