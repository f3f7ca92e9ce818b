"""What the references share: how a leaf is loaded and stored, and the terms before a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np

from fusedopt import _check, formats
from fusedopt._around import Around, GradSums
from fusedopt._check import Array
from fusedopt._functional import Step, function
from fusedopt._ieee import ieee
from fusedopt.formats import BLOCK, Stored, flat
from fusedopt.optimizer import Optimizer
from fusedopt.rule import Options, Rule

StepSums = tuple[float, float, float]  # squares of parameter and update, largest update

P = ParamSpec("P")
T = TypeVar("T")


def as_in_c(function: Callable[P, T]) -> Callable[P, T]:
    """Let infinities and NaNs go through as IEEE says, without a word, in its default mode."""
    return ieee(np.errstate(all="ignore")(function))


def _terms(g: Array, p: Array, hyper: dict[str, float]) -> Array:
    """Return the gradient as a rule sees it: signed, with L2 and L1."""
    c = p.dtype.type
    if hyper["grad_scale"] < 0:
        g = -g
    if hyper["l2"] != 0:
        g = g + c(hyper["l2"]) * p
    if hyper["l1"] != 0:
        g = g + c(hyper["l1"]) * np.sign(p)
    return g


@as_in_c
def leaf(
    rule: Rule,
    update: Callable[..., None],
    param: Array | Stored,
    grad: Array,
    states: Sequence[Array | Stored | None],
    *,
    number: int,
    step: int,
    options: Options,
    scale: float = 1.0,
    around: Around | None = None,
    ema: Array | None = None,
    copy: Array | None = None,
) -> tuple[GradSums, StepSums] | None:
    """Decode what is stored, update in place, ``update(p, g, *states, step=, **options)``, encode.

    What a step does around the rule is done here too; returns the sums, where they are wanted.
    """
    hyper = rule.hyper(step, options)
    arrays: list[Array | Stored | None] = [param, *states]
    for i, array in enumerate(arrays):  # a 16-bit array by itself is one with rounding
        if isinstance(array, np.ndarray) and array.dtype.itemsize == 2:
            arrays[i] = _check.parameter("array", array)
    values = [array.decode() if isinstance(array, Stored) else array for array in arrays]
    p, *tensors = values
    assert p is not None
    before = p.copy(order="K") if around is not None and around.measure else None

    c, given = p.dtype.type, _check.gradient("gradient", grad, p).astype(p.dtype, copy=False)
    g = given
    if scale != 1:
        g = c(scale) * g
    if around is not None and around.clip_value is not None:
        g = np.clip(g, -c(around.clip_value), c(around.clip_value))
    update(p, _terms(g, p, hyper), *tensors, step=step, **options)
    if ema is not None:
        ema[...] = ema + c(hyper["ema_weight"]) * (p - ema)
    if copy is not None:
        _write_copy(copy, p)
    for slot, (array, value) in enumerate(zip(arrays, values, strict=True)):
        if isinstance(array, Stored):
            assert value is not None
            formats.encode(array, flat(value), formats.key(options["seed"], number, step, slot))
    return None if before is None else (grad_sums(given), step_sums(p, p - before))


def _write_copy(copy: Array, p: Array) -> None:
    if copy.itemsize > 2:
        copy[...] = p
    else:
        kind = "bfloat16" if formats.is_bfloat16(copy.dtype) else "float16"
        formats.encode(Stored(kind, copy), flat(p), 0)


# ---------------------------------------------------------------- sums

_TILE, _LANES = 512, 16  # FO_TILE and FO_LANES


def _fold(lanes: Array) -> Array:
    """Add up the last axis, of 16, in the order of fo_fold."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _in_lanes(x: Array) -> Array:
    """Add up the last axis in 16 lanes: element i to lane i % 16, one after the other."""
    lanes = np.zeros((*x.shape[:-1], _LANES), x.dtype)
    for start in range(0, x.shape[-1], _LANES):
        piece = x[..., start : start + _LANES]
        lanes[..., : piece.shape[-1]] += piece
    return lanes


def _rows(x: Array, length: int) -> Array:
    """Return the elements in memory order, in rows that are filled up with zeros."""
    values = flat(np.asarray(x))
    rows = np.zeros((-(-values.size // length), length), values.dtype)
    rows.reshape(-1)[: values.size] = values
    return rows


@as_in_c
def squares(x: Array) -> float:
    """Return the sum of squares, added up in float64."""
    tiles = _in_lanes(_rows(x, _TILE).astype(np.float64, copy=False) ** 2)
    return float(_fold(_in_lanes(_fold(tiles))))


@as_in_c
def step_squares(x: Array) -> float:
    """Return the same, added up in the dtype of `x` within a lane of a block where that will do."""
    blocks = _rows(x, _TILE).reshape(-1, BLOCK)
    narrow = _in_lanes(blocks**2)
    lanes = narrow.astype(np.float64)
    if x.dtype == np.float32:
        will_do = (narrow >= 2.0**-100) & (narrow <= 2.0**120)
        again = ~will_do.all(axis=1)
        lanes[again] = _in_lanes(blocks[again].astype(np.float64) ** 2)
    tiles = _in_lanes(lanes.reshape(-1, _TILE // BLOCK * _LANES))
    return float(_fold(_in_lanes(_fold(tiles))))


def grad_sums(g: Array) -> GradSums:
    """Return what is measured of a gradient."""
    size = np.abs(g)
    zeros, nonfinite = np.count_nonzero(size == 0), np.count_nonzero(~np.isfinite(size))
    return squares(g), float(size.max(initial=0)), int(zeros), int(nonfinite)


def step_sums(p: Array, update: Array) -> StepSums:
    """Return what is measured of a parameter and of its update."""
    largest = float(np.abs(update).max(initial=0))
    return step_squares(p), step_squares(update), largest


class Plain(Optimizer):
    """An optimizer that makes all checks of the fast one, then updates leaf by leaf in NumPy."""

    _update: Callable[..., None]  # (p, g, *states, step, **options), in place
    _is_plain = True

    def _plain_sums(self, number: int, grad: Array) -> GradSums:
        param = self._work.params[number]
        compute = np.float64 if param.dtype == np.float64 else np.float32
        laid = _check.gradient("gradient", grad, param)
        return grad_sums(laid.astype(compute, copy=False))

    @as_in_c
    def _plain_copy(self, number: int, copy: Array) -> None:
        stored = self._work.stored[number]
        _write_copy(copy, stored.decode() if isinstance(stored, Stored) else stored)

    def _plain_step(
        self,
        number: int,
        grad: Array,
        step: int,
        scale: float,
        around: Around | None,
        copy: Array | None,
    ) -> tuple[GradSums, StepSums] | None:
        group = next(group for group in self._groups if number in group.leaves)
        options = self.rule.advanced(group.options)
        *arrays, average = self._work.states[number]
        used = zip(self.rule.uses(options), arrays, strict=True)
        return leaf(
            self.rule,
            self._update,
            self._work.stored[number],
            grad,
            [array if use else None for use, array in used],
            number=number,
            step=step,
            options=options,
            scale=scale,
            around=around,
            ema=average,  # type: ignore[arg-type]
            copy=copy,
        )


def reference(fast: type[Optimizer], update: Callable[..., None]) -> tuple[type[Optimizer], Step]:
    """Return the class and the function of a rule with its arithmetic in NumPy.

    Parameters
    ----------
    fast : type
        The class whose signature and checks both have.
    update : callable(p, g, *states, step, **options)
        The formula, in place, in the order of roundings; states that are not in use are None.
    """

    def take(rule: Rule, params: Any, grads: Any, states: Any, step: int, options: Options) -> None:
        rows = zip(params, grads, *states, strict=True)
        for number, (param, grad, *its) in enumerate(rows):
            if grad is not None:
                leaf(rule, update, param, grad, its, number=number, step=step, options=options)

    doc = f"`fusedopt.{fast.__name__}` with the arithmetic in plain NumPy."
    module = {"__module__": update.__module__, "__doc__": doc, "_update": staticmethod(update)}
    cls = type(fast.__name__, (Plain, fast), module)
    step_function = function(cls, take)
    name = step_function.__name__
    step_function.__doc__ = f"Take a step in plain NumPy, as `fusedopt.functional.{name}`."
    return cls, step_function
