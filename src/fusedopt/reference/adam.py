"""Adam and AdamW in plain NumPy: the order of roundings that every fast path must reproduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.formats import Stored
from fusedopt.optim import adam as _fast
from fusedopt.reference._plain import Plain, leaves, penalized


def _update(
    p: Array,
    grad: Array,
    m: Array,
    v: Array,
    x: Array | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    l1: float,
    maximize: bool,
) -> None:
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    g = penalized(p, grad, 0.0 if decoupled else weight_decay, l1, maximize)
    m[...] = m + c(1 - beta1) * (g - m)
    v[...] = v * c(beta2) + (c(1 - beta2) * g) * g
    if x is not None:
        x[...] = np.where((x >= v) | np.isnan(x), x, v)
    d = np.sqrt(v if x is None else x) / c(sqrt(1 - beta2**step)) + c(eps)
    keep = c(1 - lr * weight_decay) if decoupled else c(1)
    p[...] = p * keep - (c(lr / (1 - beta1**step)) * m) / d


def adam(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    exp_avgs: Sequence[Array | Stored],
    exp_avg_sqs: Sequence[Array | Stored],
    max_exp_avg_sqs: Sequence[Array | Stored] | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one Adam step in plain NumPy; arguments as for `fusedopt.functional.adam`."""
    update = partial(
        _update, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
        decoupled=False, l1=l1, maximize=maximize,
    )  # fmt: skip
    leaves(update, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, step=step, seed=seed)


def adamw(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    exp_avgs: Sequence[Array | Stored],
    exp_avg_sqs: Sequence[Array | Stored],
    max_exp_avg_sqs: Sequence[Array | Stored] | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one AdamW step in plain NumPy; arguments as for `fusedopt.functional.adamw`."""
    update = partial(
        _update, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
        decoupled=True, l1=0.0, maximize=maximize,
    )  # fmt: skip
    leaves(update, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, step=step, seed=seed)


_OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize")


class Adam(Plain, _fast.Adam):
    """`fusedopt.Adam` with the arithmetic in plain NumPy."""

    def _update(self, step: int, options: dict[str, Any]) -> Callable[..., None]:
        its = {name: options[name] for name in (*_OPTIONS, "l1")}
        return partial(_update, step=step, decoupled=False, **its)


class AdamW(Plain, _fast.AdamW):
    """`fusedopt.AdamW` with the arithmetic in plain NumPy."""

    def _update(self, step: int, options: dict[str, Any]) -> Callable[..., None]:
        its = {name: options[name] for name in _OPTIONS}
        return partial(_update, step=step, decoupled=True, l1=0.0, **its)
