"""Lion in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.optim import lion as _fast
from fusedopt.reference._plain import reference


def _lion(
    p: Array, g: Array, m: Array, *, lr: float, betas: tuple[float, float], weight_decay: float,
    **_: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    direction = np.sign(c(beta1) * m + c(1 - beta1) * g)
    p[...] = p * c(1 - lr * weight_decay) - c(lr) * direction
    m[...] = c(beta2) * m + c(1 - beta2) * g


Lion, lion = reference(_fast.Lion, _lion)
