"""Arithmetic in IEEE 754's default mode: rounding to nearest, subnormal numbers kept.

The thread that calls may be in another, which another library has set: csrc/ieee.h says more. Steps
enter it by themselves; this is for what is computed beside them, in NumPy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fusedopt._core import Ieee

P = ParamSpec("P")
T = TypeVar("T")


def ieee(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function run in that mode, and give the thread its own back."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with Ieee():
            return function(*args, **kwargs)

    return inside
