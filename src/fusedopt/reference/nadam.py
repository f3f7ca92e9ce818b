"""NAdam in plain NumPy: the order of roundings that every fast path must reproduce."""

from math import sqrt
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import nadam as _fast
from fusedopt.reference._plain import reference
from fusedopt.rule import kept


def _nadam(
    p: Array, g: Array, m: Array, v: Array, *, step: int, lr: float, betas: tuple[float, float],
    eps: float, momentum_decay: float, **options: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    mu, product = _fast.momentum, _fast.momentum_product
    g_size = lr * (1 - mu(step, beta1, momentum_decay))
    g_size /= 1 - product(step, beta1, momentum_decay)
    m_size = lr * mu(step + 1, beta1, momentum_decay)
    m_size /= 1 - product(step + 1, beta1, momentum_decay)
    m[...] = m + c(1 - beta1) * (g - m)
    v[...] = v * c(beta2) + (c(1 - beta2) * g) * g
    d = np.sqrt(v) / c(sqrt(1 - beta2**step)) + c(eps)
    p[...] = p * c(kept(options | {"lr": lr})) - (c(g_size) * g + c(m_size) * m) / d


NAdam, nadam = reference(_fast.NAdam, _nadam)
