"""Rprop in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import rprop as _fast
from fusedopt.reference._plain import reference, sign


def _rprop(
    p: Array, g: Array, q: Array, s: Array, *, etas: tuple[float, float],
    step_sizes: tuple[float, float], **_: Any,
) -> None:  # fmt: skip
    c, (minus, plus), (least, most) = p.dtype.type, etas, step_sizes  # c: round a constant once
    way = g * q
    factor = np.where(way > 0, c(plus), np.where(way < 0, c(minus), c(1)))
    s[...] = np.minimum(np.maximum(s * factor, c(least)), c(most))
    q[...] = np.where(way < 0, c(0), g)
    p[...] = p - sign(q) * s


Rprop, rprop = reference(_fast.Rprop, _rprop)
