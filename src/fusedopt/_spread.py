"""The leaves of an optimizer that is spread over ranks: whole ones, and this rank's part of each.

Leaves are added group by group, and stay where they were cut: a group that comes later is cut so
that the ranks have about equally much of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusedopt import _arrays, _check, _parts
from fusedopt._check import Array
from fusedopt._parts import Comm
from fusedopt.formats import Stored, flat

Named = tuple[str, str, Any]  # a leaf's name, that of its gradient, and the leaf
Parts = dict[str, tuple[Array, int, int]]  # see `Optimizer._parts`


class Spread:
    """The leaves, and where they are cut.

    Parameters
    ----------
    comm : Comm
    is_cut : bool
        Whether a leaf may be on several ranks.

    Attributes
    ----------
    whole : ArrayList
        All leaves, without state: it makes the checks of a step, and is claimed for each call.
    cuts : list of list of int
        Of each leaf: see `_parts.cut`.
    mover : Mover
        For these cuts; see `plan`.
    """

    mover: _parts.Mover

    def __init__(self, comm: Comm, is_cut: bool) -> None:
        """Begin without leaves."""
        self._comm, self.is_cut = comm, is_cut
        self.whole = _arrays.ArrayList("add", ())
        self.cuts: list[list[int]] = []
        self._loads = [0] * comm.size  # bytes of the leaves that each rank has
        self._sums: list[Array] = []

    def add(self, named: Sequence[Named], unit: int, begin: Callable[[Parts], None]) -> None:
        """Cut leaves at multiples of a unit and add them: all, or none if `begin` raises.

        `begin` gets this rank's parts.
        """
        old, names = len(self.cuts), [name for name, _, _ in named]
        params = [_whole(name, param) for name, _, param in named]
        cuts, loads = _parts.cut(
            [param.size for param in params],
            [param.itemsize for param in params],
            [unit if self.is_cut else max(1, param.size) for param in params],
            self._loads,
        )
        rank, none = self._comm.rank, [None] * len(names)
        self.cuts += cuts
        try:
            parts = {
                name: (self.part(i, param), self.cuts[i][rank], param.size)
                for i, (name, param) in enumerate(zip(names, params, strict=True), old)
            }
            self.whole.add(
                names, [grad for _, grad, _ in named], params, [[]] * len(names), none, 0,
                False, 1, lambda: begin(parts),
            )  # fmt: skip
        except BaseException:
            del self.cuts[old:]
            raise
        self._loads = loads

    def plan(self) -> _parts.Mover:
        """Return what moves the parts of the leaves as they are cut now."""
        return _parts.Mover(self._comm, list(self.cuts))

    @property
    def names(self) -> list[str]:
        """Of the leaves."""
        return self.whole.names

    @property
    def params(self) -> list[Array]:
        """The whole leaves."""
        return self.whole.params

    def named(self) -> dict[str, Array]:
        """Return the whole leaves by name."""
        return dict(zip(self.names, self.params, strict=True))

    def ranges(self) -> dict[str, range]:
        """Return the elements of each leaf, in memory order, that are this rank's part."""
        rank = self._comm.rank
        return {
            name: range(*cuts[rank : rank + 2])
            for name, cuts in zip(self.names, self.cuts, strict=True)
        }

    def part(self, leaf: int, array: Array) -> Array:
        """Return this rank's part of an array that lies as a leaf does, as a view."""
        low, high = self.cuts[leaf][self._comm.rank :][:2]
        if self.is_cut:
            return flat(array)[low:high]
        return array if low < high else array.reshape(array.shape or (1,))[:0]

    def sum_bytes(self) -> int:
        """Return the bytes of what `sums` allocates in the first step."""
        if self._comm.size == 1:
            return 0
        parts = (self.part(i, param) for i, param in enumerate(self.params))
        return sum(part.size * _sum_dtype(part).itemsize for part in parts)

    def sums(self, grads: Sequence[Array | None]) -> list[Array | None]:
        """Return where this rank's part of the gradients' sums goes, None without a gradient."""
        if self._comm.size == 1:
            return [None if grad is None else self.part(i, grad) for i, grad in enumerate(grads)]
        for i in range(len(self._sums), len(grads)):
            part = self.part(i, self.params[i])
            self._sums.append(np.empty_like(part, _sum_dtype(part), subok=False))
        return [
            None if grad is None else total for total, grad in zip(self._sums, grads, strict=True)
        ]


def _whole(name: str, param: Any) -> Array:
    if isinstance(param, Stored):
        raise TypeError(f"{name}: Sharded takes arrays; pass the bfloat16 array and master_bits")
    checked = _check.parameter(name, param)
    return checked.data if isinstance(checked, Stored) else checked


def _sum_dtype(param: Array) -> np.dtype[Any]:
    return np.dtype(np.float64 if param.dtype == np.float64 else np.float32)
