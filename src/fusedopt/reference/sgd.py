"""Gradient descent in plain NumPy: the order of roundings that every fast path must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedopt._check import Array
from fusedopt.optim import sgd as _fast
from fusedopt.reference._plain import Plain, penalized, quiet


@quiet
def sgd(
    params: Sequence[Array],
    grads: Sequence[Array | None],
    momentum_buffers: Sequence[Array] | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
) -> None:
    """Take one SGD step in plain NumPy; arguments as for `fusedopt.functional.sgd`."""
    used = momentum_buffers if momentum != 0 else None
    buffers: Sequence[Array | None] = used or [None] * len(params)
    for p, grad, b in zip(params, grads, buffers, strict=True):
        if grad is None:
            continue
        c = p.dtype.type  # round a constant once
        g = penalized(p, grad, weight_decay, l1, maximize)
        if b is not None:
            b[...] = g if step == 1 else c(momentum) * b + c(1 - dampening) * g
            g = g + c(momentum) * b if nesterov else b
        p[...] = p - c(lr) * g


class SGD(Plain, _fast.SGD):
    """`fusedopt.SGD` with the arithmetic in plain NumPy."""

    def _update(self, arrays: list[list[Array] | None], step: int, options: dict[str, Any]) -> None:
        sgd(*arrays, step=step, **options)  # type: ignore[arg-type]
