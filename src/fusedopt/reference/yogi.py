"""Yogi in plain NumPy: the order of roundings that every fast path must reproduce."""

from math import sqrt
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import yogi as _fast
from fusedopt.reference._plain import reference, sign
from fusedopt.rule import kept


def _yogi(
    p: Array, g: Array, m: Array, v: Array, *, step: int, lr: float, betas: tuple[float, float],
    eps: float, **options: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    m[...] = m + c(1 - beta1) * (g - m)
    square = g * g
    v[...] = v - (c(1 - beta2) * square) * sign(v - square)
    d = np.sqrt(v) / c(sqrt(1 - beta2**step)) + c(eps)
    p[...] = p * c(kept(options | {"lr": lr})) - (c(lr / (1 - beta1**step)) * m) / d


Yogi, yogi = reference(_fast.Yogi, _yogi)
