"""LARS in plain NumPy: the order of roundings that every fast path must reproduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from typing import Any

from fusedopt._check import Array
from fusedopt.formats import Stored
from fusedopt.optim import lars as _fast
from fusedopt.reference._plain import Plain, leaves, penalized, squares


def _update(
    p: Array,
    grad: Array,
    b: Array,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    maximize: bool,
) -> None:
    c = p.dtype.type  # round a constant once
    g = penalized(p, grad, 0.0, 0.0, maximize)
    size, way = sqrt(squares(p)), sqrt(squares(g))
    trust = 1.0
    if size > 0 and way > 0:
        trust = trust_coefficient * size / (way + weight_decay * size + eps)
    b[...] = c(momentum) * b + c(lr * trust) * (g + c(weight_decay) * p)
    p[...] = p - b


def lars(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    momentum_buffers: Sequence[Array | Stored],
    *,
    step: int,
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one LARS step in plain NumPy; arguments as for `fusedopt.functional.lars`."""
    update = partial(
        _update, lr=lr, momentum=momentum, weight_decay=weight_decay,
        trust_coefficient=trust_coefficient, eps=eps, maximize=maximize,
    )  # fmt: skip
    leaves(update, params, grads, momentum_buffers, step=step, seed=seed)


class LARS(Plain, _fast.LARS):
    """`fusedopt.LARS` with the arithmetic in plain NumPy."""

    def _update(self, step: int, options: dict[str, Any]) -> Callable[..., None]:
        names = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "maximize")
        return partial(_update, **{name: options[name] for name in names})
