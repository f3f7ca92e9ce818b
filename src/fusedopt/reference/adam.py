"""Adam and AdamW in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import adam as _fast
from fusedopt.reference._plain import Sums, masked, reference


def _adam(
    p: Array, g: Array, m: Array, v: Array, x: Array | None, *, step: int, lr: float,
    betas: tuple[float, float], eps: float, bias_correction: bool, eps_hat: bool, sums: Sums,
    keep: float = 1.0, cautious: bool = False, **_: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    mean, root = _fast.corrections(step, betas, bias_correction, eps_hat)
    m[...] = m + c(1 - beta1) * (g - m)
    v[...] = v * c(beta2) + (c(1 - beta2) * g) * g
    if x is not None:
        x[...] = np.where((x >= v) | np.isnan(x), x, v)
    d = np.sqrt(v if x is None else x) / c(root) + c(eps)
    moves, factor = masked(m, g, sums) if cautious else (c(1), 1.0)
    p[...] = p * c(keep) - (c(lr / mean * factor) * (m * moves)) / d


def _adamw(*arrays: Any, lr: float, weight_decay: float, **options: Any) -> None:
    _adam(*arrays, lr=lr, keep=1 - lr * weight_decay, **options)


Adam, adam = reference(_fast.Adam, _adam)
AdamW, adamw = reference(_fast.AdamW, _adamw)
