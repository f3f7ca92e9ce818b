"""What the references share: how a leaf is loaded and stored, and the terms before a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from fusedopt import _check, formats
from fusedopt._check import Array
from fusedopt.formats import Stored, flat
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


@quiet
def leaf(
    update: Callable[..., None],
    param: Array | Stored,
    grad: Array,
    states: Sequence[Array | Stored | None],
    *,
    number: int,
    step: int,
    seed: int,
) -> None:
    """Decode what is stored, call ``update(p, g, *states)``, which works in place, and encode."""
    arrays: list[Array | Stored | None] = [param, *states]
    for i, array in enumerate(arrays):  # a 16-bit array by itself is one with rounding
        if isinstance(array, np.ndarray) and array.dtype.itemsize == 2:
            arrays[i] = _check.parameter("array", array)
    values = [array.decode() if isinstance(array, Stored) else array for array in arrays]
    p, *tensors = values
    update(p, grad, *tensors)
    for slot, (array, value) in enumerate(zip(arrays, values, strict=True)):
        if isinstance(array, Stored):
            assert value is not None
            formats.encode(array, flat(value), formats.key(seed, number, step, slot))


def leaves(
    update: Callable[..., None],
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    *states: Sequence[Array | Stored] | None,
    step: int,
    seed: int,
) -> None:
    """Do that for lists of arrays, of which None stands for one that is not there."""
    columns: list[Sequence[Array | Stored | None]]
    columns = [column or [None] * len(params) for column in states]
    rows = zip(params, grads, *columns, strict=True)
    for number, (param, grad, *its) in enumerate(rows):
        if grad is not None:
            leaf(update, param, grad, its, number=number, step=step, seed=seed)


class Plain(Optimizer):
    """An optimizer that makes all checks of the fast one, then updates leaf by leaf in NumPy."""

    def _update(self, step: int, options: dict[str, Any]) -> Callable[..., None]:
        """Return what updates one leaf, given its arrays."""
        raise NotImplementedError

    def _plain_step(self, number: int, grad: Array, step: int) -> None:
        options = self._options[self._group_of[number]]
        states = [
            array if use else None
            for use, array in zip(self.uses(options), self._work.states[number], strict=True)
        ]
        param = self._work.stored[number]
        update = self._update(step, options)
        leaf(update, param, grad, states, number=number, step=step, seed=options["seed"])
