"""Adafactor in plain NumPy: the order of roundings that every fast path must reproduce."""

from math import sqrt
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import adafactor as _fast
from fusedopt.reference._plain import Sums, column_squares, in_lanes, reference, row_squares


def _factors(g: Array, rows: Array, columns: Array, weight: Any, eps1: float) -> Array:
    """Update the means of rows and columns of matrices; return what multiplies each element."""
    c, (height, width) = g.dtype.type, g.shape[-2:]
    row_mean = (row_squares(g) / width).astype(g.dtype)
    column_mean = (column_squares(g) / height).astype(g.dtype)
    rows[..., 0] = rows[..., 0] + weight * (row_mean - rows[..., 0])
    columns[..., 0, :] = columns[..., 0, :] + weight * (column_mean - columns[..., 0, :])
    mean = (in_lanes(rows[..., 0].astype(np.float64)) / height).astype(g.dtype)
    mean = np.where(mean < c(eps1), c(eps1), mean)
    factor = (1 / np.sqrt(rows / mean[..., None, None])) * (1 / np.sqrt(columns))
    most = c(np.float64(1) / eps1)
    limited: Array = np.where(factor > most, most, factor)
    return limited


def _adafactor(
    p: Array, g: Array, rows: Array | None, columns: Array | None, variance: Array | None, *,
    step: int, lr: float, beta2_decay: float, eps: tuple[float | None, float], d: float,
    weight_decay: float, sums: Sums, **_: Any,
) -> None:  # fmt: skip
    if not p.size:
        return
    c = p.dtype.type  # c: round a constant once
    eps1 = float(np.finfo(p.dtype).eps) if eps[0] is None else eps[0]
    weight, rate = c(step**beta2_decay), min(lr, 1 / sqrt(step))
    if variance is None:
        assert rows is not None and columns is not None
        u = g * _factors(g, rows, columns, weight, eps1)
    else:
        variance[...] = variance + weight * (g * g - variance)
        least = c(eps1 * eps1)
        u = g / np.sqrt(np.where(variance < least, least, variance))
    size, change = (sqrt(x / p.size) for x in sums(p, u))
    size = size if size > eps[1] else eps[1]
    change = change / d if change / d > 1 else 1.0
    p[...] = p * c(1 - lr * weight_decay) - c(rate * size / change) * u


Adafactor, adafactor = reference(_fast.Adafactor, _adafactor)
