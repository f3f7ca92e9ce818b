"""Adagrad in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import adagrad as _fast
from fusedopt.reference._plain import reference, row_means


def _adagrad(
    p: Array, g: Array, s: Array, *, step: int, lr: float, lr_decay: float, eps: float,
    eps_in_sqrt: bool, rowwise: bool = False, **_: Any,
) -> None:  # fmt: skip
    c = p.dtype.type  # round a constant once
    s[...] = s + (row_means(g, s.shape) if rowwise else g * g)
    d = np.sqrt(s + c(eps)) if eps_in_sqrt else np.sqrt(s) + c(eps)
    p[...] = p - (c(lr / (1 + (step - 1) * lr_decay)) * g) / d


Adagrad, adagrad = reference(_fast.Adagrad, _adagrad)
