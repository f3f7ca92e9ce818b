"""Arithmetic in IEEE 754's default mode: rounding to nearest, subnormal numbers kept.

Another library may have set another mode for the calling thread; see csrc/ieee.h. Steps enter the
default mode by themselves; this file is for NumPy computations outside a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fusedopt._core import Ieee

P = ParamSpec("P")
T = TypeVar("T")


def ieee(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function in the default mode, then restore the thread's own."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with Ieee():
            return function(*args, **kwargs)

    return inside
