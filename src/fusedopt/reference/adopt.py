"""ADOPT in plain NumPy: the order of roundings that every fast path must reproduce."""

from math import inf
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import adopt as _fast
from fusedopt.reference._plain import reference
from fusedopt.rule import kept


def _adopt(
    p: Array, g: Array, m: Array, v: Array, *, step: int, lr: float, betas: tuple[float, float],
    clip_exp: float | None, eps: float, **options: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    keep = c(kept(options | {"lr": lr}))
    if step == 1:
        p[...] = p * keep
        v[...] = v + g * g
        return
    clip = c(inf if clip_exp is None else step**clip_exp)
    ratio = g / np.maximum(np.sqrt(v), c(eps))
    m[...] = m + c(1 - beta1) * (np.minimum(np.maximum(ratio, -clip), clip) - m)
    p[...] = p * keep - c(lr) * m
    v[...] = v * c(beta2) + (c(1 - beta2) * g) * g


ADOPT, adopt = reference(_fast.ADOPT, _adopt)
