"""Schedule-Free rules in plain NumPy: the order of roundings that fast paths must reproduce."""

from math import sqrt
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import schedulefree as _fast
from fusedopt.reference._plain import reference


def _move(y: Array, z: Array, way: Array, beta1: float, options: dict[str, Any]) -> None:
    c, part, lr = y.dtype.type, _fast.part(options), _fast.rate(options)  # c: round a constant once
    y[...] = (y + c(part) * (z - y)) - c(lr * (1 - beta1 * (1 - part))) * way
    z[...] = z - c(lr) * way


def _adamw(
    y: Array, g: Array, z: Array, v: Array, *, betas: tuple[float, float], eps: float,
    weight_decay: float, k: int, **options: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = y.dtype.type, betas
    v[...] = v * c(beta2) + (c(1 - beta2) * g) * g
    d = np.sqrt(v) / c(sqrt(1 - beta2**k)) + c(eps)
    _move(y, z, g / d + c(weight_decay) * y, beta1, options | {"k": k})


def _sgd(
    y: Array, g: Array, z: Array, *, momentum: float, weight_decay: float, **options: Any
) -> None:
    _move(y, z, g + y.dtype.type(weight_decay) * y, momentum, options)


ScheduleFreeAdamW, schedulefreeadamw = reference(_fast.ScheduleFreeAdamW, _adamw)
ScheduleFreeSGD, schedulefreesgd = reference(_fast.ScheduleFreeSGD, _sgd)
