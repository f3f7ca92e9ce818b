"""LAMB in plain NumPy: the order of roundings that every fast path must reproduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.formats import Stored
from fusedopt.optim import lamb as _fast
from fusedopt.reference._plain import Plain, leaves, penalized, squares


def _update(
    p: Array,
    grad: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    g = penalized(p, grad, 0.0, 0.0, maximize)
    m[...] = m + c(1 - beta1) * (g - m)
    v[...] = v * c(beta2) + (c(1 - beta2) * g) * g
    d = np.sqrt(v) / c(sqrt(1 - beta2**step)) + c(eps)
    u = (c(1 / (1 - beta1**step)) * m) / d + c(weight_decay) * p
    size, way = sqrt(squares(p)), sqrt(squares(u))
    trust = size / way if size > 0 and way > 0 else 1.0
    p[...] = p - c(lr * trust) * u


def lamb(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    exp_avgs: Sequence[Array | Stored],
    exp_avg_sqs: Sequence[Array | Stored],
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one LAMB step in plain NumPy; arguments as for `fusedopt.functional.lamb`."""
    update = partial(
        _update, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
        maximize=maximize,
    )  # fmt: skip
    leaves(update, params, grads, exp_avgs, exp_avg_sqs, step=step, seed=seed)


class LAMB(Plain, _fast.LAMB):
    """`fusedopt.LAMB` with the arithmetic in plain NumPy."""

    def _update(self, step: int, options: dict[str, Any]) -> Callable[..., None]:
        names = ("lr", "betas", "eps", "weight_decay", "maximize")
        return partial(_update, step=step, **{name: options[name] for name in names})
