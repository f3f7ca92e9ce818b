"""Lion in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import lion as _fast
from fusedopt.reference._plain import Sums, masked, reference


def _lion(
    p: Array, g: Array, m: Array, *, lr: float, betas: tuple[float, float], weight_decay: float,
    cautious: bool, sums: Sums, **_: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    way = c(beta1) * m + c(1 - beta1) * g
    moves, factor = masked(way, g, sums) if cautious else (c(1), 1.0)
    p[...] = p * c(1 - lr * weight_decay) - c(lr * factor) * (np.sign(way) * moves)
    m[...] = c(beta2) * m + c(1 - beta2) * g


Lion, lion = reference(_fast.Lion, _lion)
