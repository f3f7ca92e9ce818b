"""RMSprop in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import rmsprop as _fast
from fusedopt.reference._plain import reference


def _rmsprop(
    p: Array, g: Array, v: Array, b: Array | None, a: Array | None, *, lr: float, alpha: float,
    eps: float, momentum: float, eps_in_sqrt: bool, **_: Any,
) -> None:  # fmt: skip
    c = p.dtype.type  # round a constant once
    v[...] = v * c(alpha) + (c(1 - alpha) * g) * g
    x = v
    if a is not None:
        a[...] = a + c(1 - alpha) * (g - a)
        x = v - a * a
        x = np.where(x < 0, c(0), x)
    d = np.sqrt(x + c(eps)) if eps_in_sqrt else np.sqrt(x) + c(eps)
    if b is None:
        p[...] = p - (c(lr) * g) / d
    elif eps_in_sqrt:
        b[...] = c(momentum) * b + (c(lr) * g) / d
        p[...] = p - b
    else:
        b[...] = c(momentum) * b + g / d
        p[...] = p - c(lr) * b


RMSprop, rmsprop = reference(_fast.RMSprop, _rmsprop)
