"""LAMB in plain NumPy: the order of roundings that every fast path must reproduce."""

from math import sqrt
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import lamb as _fast
from fusedopt.reference._plain import Sums, reference


def _lamb(
    p: Array, g: Array, m: Array, v: Array, *, step: int, lr: float, betas: tuple[float, float],
    eps: float, weight_decay: float, sums: Sums, **_: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    m[...] = m + c(1 - beta1) * (g - m)
    v[...] = v * c(beta2) + (c(1 - beta2) * g) * g
    d = np.sqrt(v) / c(sqrt(1 - beta2**step)) + c(eps)
    u = (c(1 / (1 - beta1**step)) * m) / d + c(weight_decay) * p
    p_norm, u_norm = map(sqrt, sums(p, u))
    trust = p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0
    p[...] = p - c(lr * trust) * u


LAMB, lamb = reference(_fast.LAMB, _lamb)
