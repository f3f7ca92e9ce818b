"""What the references share: the terms before a rule, and the class that runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from fusedopt._check import Array
from fusedopt.optimizer import Optimizer

F = TypeVar("F", bound=Callable[..., None])

# Infinities and NaNs go through as IEEE says, without a word, as in C.
quiet: Callable[[F], F] = np.errstate(all="ignore")


def penalized(p: Array, grad: Array, l2: float, l1: float, maximize: bool) -> Array:
    """Return the gradient as a rule sees it: in the parameter's dtype, signed, with L2 and L1."""
    c, g = p.dtype.type, grad.astype(p.dtype, copy=False)
    if maximize:
        g = -g
    if l2 != 0:
        g = g + c(l2) * p
    if l1 != 0:
        g = g + c(l1) * np.sign(p)
    return g


class Plain(Optimizer):
    """An optimizer that makes all checks of the fast one, then updates leaf by leaf in NumPy."""

    def _update(self, arrays: list[list[Array] | None], step: int, options: dict[str, Any]) -> None:
        raise NotImplementedError

    def _plain_step(self, leaf: int, grad: Array, step: int) -> None:
        options = dict(self._options[self._group_of[leaf]])
        used = self.uses(options)
        states = [
            [a] if use and a is not None else None
            for use, a in zip(used, self._work.states[leaf], strict=True)
        ]
        self._update([[self._work.params[leaf]], [grad], *states], step, options)
