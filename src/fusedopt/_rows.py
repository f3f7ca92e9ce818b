"""Gradients of some rows, as of an embedding: the class, and what a step makes of it.

Rows may be given in any order and more than once. Before a step they are put in order, and what
belongs to one row is added up; rows that ascend are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from fusedopt import _check, _core
from fusedopt._check import Array

if TYPE_CHECKING:
    from fusedopt.rule import Plan

# what a step by rows does, see `Rule.by_rows`: steps them alone, which is exact, or differs from a
# dense step in the other rows; or steps all rows
TOUCHED, LAZY, ALL = "touched", "lazy", "all"


class Rows:
    """A gradient of some rows of a parameter, in the place of an array in `Optimizer.step`.

    The gradient of all other rows is 0. Rows are along the first axis. Nothing is checked or copied
    before the step, whose errors name the leaf.

    Parameters
    ----------
    indices : array of integers
        Which rows, each from 0 to below ``len(param)``, in any order; a row may occur again, and
        then its values are added up, in the order in which they are given and in the dtype in which
        steps compute. It costs no copy of `values` if they ascend and none occurs twice.
    values : array
        Their gradients, of shape ``(len(indices), *param.shape[1:])``, of any dtype that a gradient
        may have.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> table = np.ones((4, 2), np.float32)
    >>> opt = fusedopt.SGD(table, lr=0.5)
    >>> opt.step(fusedopt.Rows(np.array([2, 0, 2]), np.ones((3, 2), np.float32)))
    StepResult(step=1, updated=1)
    >>> table
    array([[0.5, 0.5],
           [1. , 1. ],
           [0. , 0. ],
           [1. , 1. ]], dtype=float32)
    """

    __slots__ = ("indices", "values")

    def __init__(self, indices: Array, values: Array) -> None:
        """Hold both."""
        self.indices, self.values = indices, values

    def __repr__(self) -> str:
        """Say how many there are."""
        return f"<Rows of {np.size(self.indices)}: values of shape {np.shape(self.values)}>"


class Ordered(NamedTuple):
    """Rows that ascend, and where the gradient of each is.

    Attributes
    ----------
    rows : array of int64
        Which rows have a gradient, each once.
    values : array
        In row-major order, as given.
    order, starts : array of intp, or None
        None: of each row, in this order. Else see fo_rows (csrc/fusedopt.h).
    """

    rows: Array
    values: Array
    order: Array | None = None
    starts: Array | None = None


def row_length(shape: Sequence[int]) -> int:
    """Return how many elements a row has; a block, which suits all formats, if there are none."""
    return prod(shape[1:]) or _core.BLOCK


def dense(rows: Array, values: Array, param: Array) -> Array:
    """Return the gradient of all rows, from that of some, each once."""
    whole = np.zeros(param.shape, values.dtype)
    whole[rows] = values
    return whole


def _checked(name: str, given: Rows, param: Array) -> tuple[Array, Array]:
    """Return a copy of the row numbers as int64, and the values, in row-major order.

    Raises
    ------
    TypeError, ValueError
        Naming the gradient, `name`.
    """
    if param.ndim == 0:
        raise ValueError(f"{name}: Rows of a parameter without axes; pass an array")
    if not param.flags.c_contiguous:
        raise ValueError(
            f"{name}: Rows of a parameter whose rows do not follow one another in memory (strides "
            f"{param.strides}); pass an array, or make the parameter with numpy.ascontiguousarray"
        )
    indices = given.indices
    is_plain = type(indices) in (np.ndarray, np.memmap)  # not masked, which the copy would ignore
    if not is_plain or indices.dtype.kind not in "iu":
        kind = indices.dtype if is_plain else type(indices).__name__
        raise TypeError(f"{name}.indices: expected an array of integers, got {kind}")
    if indices.ndim != 1:
        raise ValueError(f"{name}.indices: expected one axis, got shape {indices.shape}")
    values = _check.array(f"{name}.values", given.values)
    shape = (len(indices), *param.shape[1:])
    if values.shape != shape:
        raise ValueError(
            f"{name}.values: shape {values.shape}; for {len(indices)} rows of a parameter of shape "
            f"{param.shape} it is {shape}"
        )
    # a copy, which cannot change while a step writes to the rows
    return indices.astype(np.int64), values if values.flags.c_contiguous else values.copy("C")


def _refuse_index(name: str, place: int, index: int, param: Array) -> NoReturn:
    raise ValueError(
        f"{name}.indices[{place}]: there is no row {index} in a parameter of shape {param.shape}"
    )


def in_order(name: str, given: Rows, param: Array) -> Ordered:
    """Return the rows of a gradient in order, each once; raise as `_checked` does."""
    indices, values = _checked(name, given, param)
    bad, ascends = _core.look_at_rows(indices, len(param))
    if bad >= 0:
        _refuse_index(name, bad, given.indices[bad], param)
    return ordered(indices, values, len(param), ascends)


def ordered(rows: Array, values: Any, count: int, ascends: bool) -> Ordered:
    """Return rows of `count` in order, which they are in already if each is above the one before.

    `values`, an array or a tensor, stay as they are.
    """
    if ascends:
        return Ordered(rows, values)
    unique, starts, order = _core.sort_rows(rows, count)
    return Ordered(unique, values, order, starts)


def in_order_plainly(name: str, given: Rows, param: Array) -> Ordered:
    """Return such rows with sums, computed by NumPy in the order of additions that C reproduces."""
    indices, values = _checked(name, given, param)
    sums: dict[int, Any] = {}
    for index, value in zip(indices.tolist(), values.astype(compute_type(param)), strict=True):
        sums[index] = sums[index] + value if index in sums else value
    rows = sorted(sums)
    stacked = np.zeros((len(rows), *param.shape[1:]), compute_type(param))
    for place, row in enumerate(rows):
        stacked[place] = sums[row]
    return Ordered(np.array(rows, np.int64), stacked)


def way(name: str, plan: Plan, is_plain: bool, averages: bool) -> str:
    """Return what a step with this plan does with rows.

    Raises
    ------
    ValueError
        If it cannot, naming the gradient.
    """
    found = plan[3] if is_plain else ""
    if not found:
        raise ValueError(
            f"{name}: this rule, or one of its options, takes no Rows: it would have to step the "
            "other rows too; pass an array, or use a rule that does, as SGD or Adam"
        )
    if found != ALL and averages:
        raise ValueError(
            f"{name}: ema averages all rows, and a step by Rows leaves the others alone; pass an "
            "array, or keep the parameter in a group without ema"
        )
    return found


def refuse_blocks(name: str, array: str, length: int) -> NoReturn:
    """Refuse rows that are parts of blocks."""
    raise ValueError(
        f"{name}: rows of {length} elements, and {array} is kept by blocks of {_core.BLOCK}, which "
        f"would hold more than one row; make rows a multiple of {_core.BLOCK} long, or keep float32"
    )


def refuse_count(name: str, count: int) -> NoReturn:
    """Refuse what is no number of steps."""
    raise ValueError(f"{name}: has {count}, which is no number of steps from 0 to below 2**62")


def refuse_counts(name: str) -> NoReturn:
    """Refuse a step by a rule that cannot step rows."""
    raise ValueError(
        f"{name}: the rows of this parameter count their steps, which does not go with an option "
        "of another group, as cautious; give that group an optimizer of its own"
    )


def refuse_copy(name: str, copy: str) -> NoReturn:
    """Refuse a copy of all rows."""
    raise ValueError(
        f"{copy}: is of all rows, and {name} is of some; copy it after the step, or pass None"
    )


def zeroed(name: str, values: Array) -> None:
    """Raise ValueError if values cannot be set to zero."""
    if not (values.flags.writeable and values.flags.c_contiguous):
        raise ValueError(
            f"{name}.values: zero_grads writes to them; pass a writable array in row-major order, "
            "or leave zero_grads out"
        )


def compute_type(param: Array) -> type[np.floating[Any]]:
    """Return the dtype in which steps of a parameter compute."""
    return np.float64 if param.dtype == np.float64 else np.float32
