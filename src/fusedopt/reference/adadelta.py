"""Adadelta in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import adadelta as _fast
from fusedopt.reference._plain import reference


def _adadelta(
    p: Array, g: Array, v: Array, a: Array, *, lr: float, rho: float, eps: float, **_: Any
) -> None:
    c = p.dtype.type  # round a constant once
    v[...] = v * c(rho) + (c(1 - rho) * g) * g
    delta = np.sqrt(a + c(eps)) / np.sqrt(v + c(eps)) * g
    a[...] = a * c(rho) + (c(1 - rho) * delta) * delta
    p[...] = p - c(lr) * delta


Adadelta, adadelta = reference(_fast.Adadelta, _adadelta)
