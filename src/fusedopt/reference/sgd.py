"""Gradient descent in plain NumPy: the order of roundings that every fast path must reproduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fusedopt._check import Array
from fusedopt.formats import Stored
from fusedopt.optim import sgd as _fast
from fusedopt.reference._plain import Plain, leaves, penalized


def _update(
    p: Array,
    grad: Array,
    b: Array | None,
    *,
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    l1: float,
    maximize: bool,
) -> None:
    c = p.dtype.type  # round a constant once
    g = penalized(p, grad, weight_decay, l1, maximize)
    if b is not None:
        b[...] = g if step == 1 else c(momentum) * b + c(1 - dampening) * g
        g = g + c(momentum) * b if nesterov else b
    p[...] = p - c(lr) * g


def sgd(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    momentum_buffers: Sequence[Array | Stored] | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one SGD step in plain NumPy; arguments as for `fusedopt.functional.sgd`."""
    update = partial(
        _update, step=step, lr=lr, momentum=momentum, dampening=dampening,
        weight_decay=weight_decay, nesterov=nesterov, l1=l1, maximize=maximize,
    )  # fmt: skip
    buffers = momentum_buffers if momentum != 0 else None
    leaves(update, params, grads, buffers, step=step, seed=seed)


class SGD(Plain, _fast.SGD):
    """`fusedopt.SGD` with the arithmetic in plain NumPy."""

    def _update(self, step: int, options: dict[str, Any]) -> Callable[..., None]:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "l1", "maximize")
        return partial(_update, step=step, **{name: options[name] for name in names})
