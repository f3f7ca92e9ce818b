"""AdEMAMix in plain NumPy: the order of roundings that every fast path must reproduce."""

from math import sqrt
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import ademamix as _fast
from fusedopt.reference._plain import reference


def _ademamix(
    p: Array, g: Array, m: Array, v: Array, s: Array, *, step: int, lr: float,
    betas: tuple[float, float, float], eps: float, weight_decay: float, **options: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2, _) = p.dtype.type, betas  # c: round a constant once
    alpha, beta3 = _fast.scheduled(step, options | {"betas": betas})
    m[...] = m + c(1 - beta1) * (g - m)
    v[...] = v * c(beta2) + (c(1 - beta2) * g) * g
    s[...] = s + c(1 - beta3) * (g - s)
    d = np.sqrt(v) / c(sqrt(1 - beta2**step)) + c(eps)
    change = c(lr / (1 - beta1**step)) * m + c(lr * alpha) * s
    p[...] = p * c(1 - lr * weight_decay) - change / d


AdEMAMix, ademamix = reference(_fast.AdEMAMix, _ademamix)
