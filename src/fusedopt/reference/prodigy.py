"""Prodigy in plain NumPy: the order of roundings that every fast path must reproduce."""

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.formats import flat
from fusedopt.optim import prodigy as _fast
from fusedopt.reference._plain import Sums, reference


def _prodigy(
    p: Array, g: Array, m: Array, v: Array, s: Array, p0: Array, *, betas: tuple[float, float],
    eps: float, weight_decay: float, decouple: bool, slice_p: int, d: float, d_before: float,
    size: float, sums: Sums, **options: Any,
) -> None:  # fmt: skip
    c, (beta1, beta2) = p.dtype.type, betas  # c: round a constant once
    if options["lr"] > 0:
        ws, beta3 = (
            _fast.weight(options | {"d": d_before, "size": size}),
            _fast.beta3(options, betas),
        )
        part, now = flat(np.asarray(g))[::slice_p], flat(p)[::slice_p]  # in the order of memory
        start, total = (flat(x) for x in (p0, s))
        dots, sizes = np.zeros((2, p.size), p.dtype)
        total[...] = total * c(beta3) + c(ws) * part
        dots[::slice_p], sizes[::slice_p] = part * (start - now), np.abs(total)
        sums(dots, sizes)
        m[...] = m * c(beta1) + c((d_before if beta1 > 0 else d) * (1 - beta1)) * g
        v[...] = v * c(beta2) + (c(d_before * d_before * (1 - beta2)) * g) * g
    keep = 1 - size * weight_decay if decouple else 1.0
    p[...] = p * c(keep) - (c(size) * m) / (np.sqrt(v) + c(d * eps))


Prodigy, prodigy = reference(_fast.Prodigy, _prodigy)
