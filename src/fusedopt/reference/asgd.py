"""Averaged gradient descent in plain NumPy: the order of roundings of every fast path."""

from typing import Any

from fusedopt._check import Array
from fusedopt.optim import asgd as _fast
from fusedopt.reference._plain import reference


def _asgd(p: Array, g: Array, a: Array, *, step: int, **options: Any) -> None:
    c = p.dtype.type  # round a constant once
    eta, mu = _fast.eta(step - 1, options), c(_fast.mu(step - 1, options))
    p[...] = p * c(1 - options["lambd"] * eta) - c(eta) * g
    a[...] = p if mu == 1 else a + (p - a) * mu


ASGD, asgd = reference(_fast.ASGD, _asgd)
