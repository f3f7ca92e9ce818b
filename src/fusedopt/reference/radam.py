"""RAdam in plain NumPy: the order of roundings that every fast path must reproduce."""

from math import sqrt
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import radam as _fast
from fusedopt.reference._plain import reference
from fusedopt.rule import kept


def _radam(
    p: Array, g: Array, m: Array, v: Array, *, step: int, lr: float, betas: tuple[float, float],
    eps: float, **options: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    rate, factor = lr / (1 - beta1**step), _fast.rectification(step, beta2)
    keep = c(kept(options | {"lr": lr}))
    m[...] = m + c(1 - beta1) * (g - m)
    v[...] = v * c(beta2) + (c(1 - beta2) * g) * g
    if factor is None:
        p[...] = p * keep - c(rate) * m
    else:
        d = np.sqrt(v) + c(eps)
        p[...] = p * keep - (c(rate * (sqrt(1 - beta2**step) * factor)) * m) / d


RAdam, radam = reference(_fast.RAdam, _radam)
