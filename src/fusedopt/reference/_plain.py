"""What the references share: load and store of a leaf, terms before a rule, sums, the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from fusedopt import _check, _core, formats
from fusedopt._arrays import ArrayList
from fusedopt._check import Array
from fusedopt._functional import Step, function, listed, remembered
from fusedopt._ieee import ieee
from fusedopt._options import LEAF, PLAIN, Reduction, StepOptions, StepResult, StepStats
from fusedopt._rows import ALL, Ordered, Rows, compute_type, dense, in_order_plainly
from fusedopt.formats import Stored, flat
from fusedopt.optimizer import Optimizer
from fusedopt.rule import Options, Rule

# gradient: sum of squares, largest magnitude, zeros, infinite or NaN elements;
# step: sums of squares of parameter and update, largest update
GradSums = tuple[float, float, int, int]
StepSums = tuple[float, float, float]
_GRAD, _STEP = ["grad", "largest_grad", "zeros", "nonfinite"], ["param", "update", "largest_update"]

_SUMMED = ("layerwise", "counting", "factored")  # kinds of rules that need sums of a leaf

# (parameter, direction of the rule) -> their sums of squares over the leaf
Sums = Callable[[Array, Array], tuple[float, float]]

P = ParamSpec("P")
T = TypeVar("T")


def as_in_c(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function in IEEE's default mode, without warnings of infinities and NaNs."""
    return ieee(np.errstate(all="ignore")(function))


def _terms(g: Array, p: Array, hyper: dict[str, float]) -> Array:
    """Return the gradient as a rule sees it: signed, with L2 and L1."""
    c = p.dtype.type
    if hyper["grad_scale"] < 0:
        g = -g
    l2, l1 = c(hyper["l2"]), c(hyper["l1"])
    if l2 != 0:
        g = g + l2 * p
    if l1 != 0:
        g = g + l1 * np.sign(p)
    return g


@as_in_c
def leaf(
    rule: Rule,
    update: Callable[..., None],
    param: Array | Stored,
    grad: Array | Ordered,
    states: Sequence[Array | Stored | None],
    *,
    number: int,
    step: int,
    options: Options,
    scale: float = 1.0,
    how: StepOptions = PLAIN,
    ema: Array | None = None,
    copy: Array | None = None,
    sums: Sums | None = None,
) -> StepSums:
    """Decode what is stored, update in place, ``update(p, g, *states, step=, **options)``, encode.

    Applies the step options too; returns the step's sums, 0 unless they are asked for.
    """
    hyper = rule.at(options)(step)
    arrays: list[Array | Stored | None] = [_rounded(array) for array in (param, *states)]
    if isinstance(grad, Ordered):
        assert ema is copy is None
        compact = [_gathered(array, grad.rows) for array in arrays]
        gathered, *its = compact
        assert gathered is not None
        result = leaf(
            rule, update, gathered, grad.values, its, number=number, step=step,
            options=options, scale=scale, how=how,
        )  # fmt: skip
        for slot, pair in enumerate(zip(arrays, compact, strict=True)):
            _scatter(*pair, grad.rows, formats.key(options["seed"], number, step, slot))
        return result
    values = [array.decode() if isinstance(array, Stored) else array for array in arrays]
    p, *tensors = values
    assert p is not None
    before = p.copy(order="K") if how.measure else None

    c, g = p.dtype.type, _check.gradient("gradient", grad, p).astype(p.dtype, copy=False)
    if scale != 1:
        g = c(scale) * g
    if how.clip_value is not None:
        g = np.where(np.abs(g) > c(how.clip_value), np.copysign(c(how.clip_value), g), g)
    counts = None if rule.counter is None else tensors.pop(rule.counter)
    if counts is None:
        update(p, _terms(g, p, hyper), *tensors, step=step, sums=sums or _sums, **options)
    else:
        _by_count(partial(update, sums=_sums, **options), counts, _terms(g, p, hyper), p, *tensors)
    if ema is not None:
        ema[...] = ema + c(hyper["ema_weight"]) * (p - ema)
    if copy is not None:
        _write_copy(copy, p)
    for slot, (array, value) in enumerate(zip(arrays, values, strict=True)):
        if isinstance(array, Stored):
            assert value is not None
            formats.encode(array, flat(value), formats.key(options["seed"], number, step, slot))
    return (0.0, 0.0, 0.0) if before is None else step_sums(p, p - before)


def _by_count(update: Callable[..., None], counts: Array, g: Array, *arrays: Array | None) -> None:
    """Update rows with the number of their own step: those of one number as one leaf."""
    n = counts.size
    for count in np.unique(counts):
        rows = counts.reshape(n) == count
        parts = [None if array is None else array.reshape(n, -1)[rows] for array in arrays]
        update(parts[0], g.reshape(n, -1)[rows], *parts[1:], step=int(count) + 1)
        for array, part in zip(arrays, parts, strict=True):
            if array is not None:
                array.reshape(n, -1)[rows] = part
    counts += 1


def _rounded(array: Array | Stored | None) -> Array | Stored | None:
    """Return a bare 16-bit array as one that is rounded stochastically."""
    if isinstance(array, np.ndarray) and array.dtype.itemsize == 2:
        return _check.parameter("array", array)
    return array


def in_order(rule: Rule, grad: Any, param: Array, options: Options) -> Any:
    """Return the rows of a gradient in order, each once; an array where the rule steps all rows."""
    if not isinstance(grad, Rows):
        return grad
    assert rule.by_rows is not None
    ordered = in_order_plainly("gradient", grad, param)
    return ordered if rule.by_rows(options) != ALL else dense(*ordered[:2], param)


def _size(grad: Array | Ordered | None) -> int:
    """Return the number of elements of a gradient."""
    return 0 if grad is None else (grad.values if isinstance(grad, Ordered) else grad).size


def _gathered(array: Array | Stored | None, rows: Array) -> Array | None:
    """Return some rows of an array as numbers to compute with."""
    if isinstance(array, Stored):
        array = array.decode()
    return None if array is None else array[rows]


def _scatter(array: Array | Stored | None, values: Any, rows: Array, key: int) -> None:
    """Write some rows of an array, and nothing else."""
    if array is None or not len(rows):  # of which an array without rows cannot be reshaped
        return
    if not isinstance(array, Stored):
        array[rows] = values
        return
    whole, twin = array.decode(), _twin(array)
    assert isinstance(twin, Stored)
    whole[rows] = values
    formats.encode(twin, flat(whole), key)
    for part, written in zip(array.parts(), twin.parts(), strict=True):
        part.reshape(len(array.data), -1)[rows] = written.reshape(len(array.data), -1)[rows]


def _sums(p: Array, direction: Array) -> tuple[float, float]:
    """Return the sums of squares of a leaf and of a layer-wise rule's direction."""
    return squares(p), squares(direction)


def _sum_terms(first: Array, second: Array) -> tuple[float, float]:
    """Return the sums of a rule's terms over a leaf."""
    tiles = [in_lanes(_rows(x, _TILE).astype(np.float64)) for x in (first, second)]
    return float(in_lanes(tiles[0])), float(in_lanes(tiles[1]))


def _noting(table: Array, take: Sums) -> Callable[[int, Array, Array], tuple[float, float]]:
    """Return what sums a leaf's arrays, and writes the sums to its row."""

    def note(number: int, first: Array, second: Array) -> tuple[float, float]:
        table["param"][number], table["update"][number] = found = take(first, second)
        return found

    return note


def _both(table: Array) -> tuple[float, float]:
    """Return the sums of a rule's terms over all leaves."""
    return float(in_lanes(table["param"])), float(in_lanes(table["update"]))


def _known_sums(param: float, way: float, p: Array, direction: Array) -> tuple[float, float]:
    """Return them as they were summed over ranks."""
    return param, way


def masked(way: Array, g: Array, sums: Sums) -> tuple[Array, float]:
    """Return 1 for each element where both have the same sign, else 0, and what those move by."""
    c = g.dtype.type
    moves = np.where(g > 0, way > 0, (g < 0) & (way < 0)).astype(g.dtype)
    count, marked = sums(np.full_like(g, c(1)), moves)
    return moves, 1 / max(marked / count if count else 1.0, 1e-3)


def _twin(array: Array | Stored | None) -> Array | Stored | None:
    """Return a copy in the same memory order."""
    if isinstance(array, Stored):
        return Stored(array.format, *(part.copy(order="K") for part in array.parts()))
    return None if array is None else array.copy(order="K")


def _write_copy(copy: Array, p: Array) -> None:
    if copy.itemsize > 2:
        copy[...] = p
    else:
        kind = "bfloat16" if formats.is_bfloat16(copy.dtype) else "float16"
        formats.encode(Stored(kind, copy), flat(p), 0)


# ---------------------------------------------------------------- sums

_TILE, _LANES = 512, 16  # FO_TILE, FO_LANES
_PART_ROWS, _PART_COLUMNS = 128, 2048  # FO_PART_ROWS, FO_PART_COLUMNS


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
    """Return the elements in memory order, in rows padded with zeros."""
    values = flat(np.asarray(x))
    rows = np.zeros((-(-values.size // length), length), values.dtype)
    rows.reshape(-1)[: values.size] = values
    return rows


def in_lanes(x: Array) -> Array:
    """Return the sums over the last axis, in lanes."""
    return _fold(_in_lanes(x))


def row_squares(x: Array) -> Array:
    """Return the sums of squares over the last axis, by parts, in float64."""
    total = np.zeros(x.shape[:-1])
    for start in range(0, x.shape[-1], _PART_COLUMNS):
        total = total + in_lanes(x[..., start : start + _PART_COLUMNS].astype(np.float64) ** 2)
    return total


def row_means(x: Array, shape: tuple[int, ...]) -> Array:
    """Return the means of squares over all axes but the first, in `shape`."""
    length = prod(x.shape[1:])
    sums = in_lanes(x.reshape(prod(shape), length).astype(np.float64) ** 2) / max(length, 1)
    return sums.astype(x.dtype).reshape(shape)


def column_squares(x: Array) -> Array:
    """Return the sums of squares over the last axis but one, by parts of rows, in float64."""
    total = np.zeros((*x.shape[:-2], x.shape[-1]))
    for start in range(0, x.shape[-2], _PART_ROWS):
        part = np.zeros_like(total)
        for i in range(start, min(start + _PART_ROWS, x.shape[-2])):
            part = part + x[..., i, :].astype(np.float64) ** 2
        total = total + part
    return total


@as_in_c
def squares(x: Array) -> float:
    """Return the sum of squares, added up in float64."""
    tiles = _in_lanes(_rows(x, _TILE).astype(np.float64, copy=False) ** 2)
    return float(_fold(_in_lanes(_fold(tiles))))


@as_in_c
def step_squares(x: Array) -> float:
    """Return the same, added up in the dtype of `x` within a lane of a tile if in range."""
    tiles = _rows(x, _TILE)
    narrow = _in_lanes(tiles**2)
    lanes = narrow.astype(np.float64)
    if x.dtype == np.float32:
        in_range = (narrow >= 2.0**-100) & (narrow <= 2.0**120)
        again = ~in_range.all(axis=1)
        lanes[again] = _in_lanes(tiles[again].astype(np.float64) ** 2)
    return float(_fold(_in_lanes(_fold(lanes))))


def grad_sums(g: Array) -> GradSums:
    """Return what is measured of a gradient."""
    size = np.abs(g)
    zeros, nonfinite = np.count_nonzero(size == 0), np.count_nonzero(~np.isfinite(size))
    return squares(g), float(size.max(initial=0)), int(zeros), int(nonfinite)


def step_sums(p: Array, update: Array) -> StepSums:
    """Return what is measured of a parameter and of its update."""
    largest = float(np.abs(update).max(initial=0))
    return step_squares(p), step_squares(update), largest


def sign(x: Array) -> Array:
    """Return the sign, of NaN 0, as in torch."""
    return np.sign(np.where(np.isnan(x), x.dtype.type(0), x))


class Verdict(NamedTuple):
    """What a step decided before its first write; see `StepResult`."""

    skipped: bool
    grad_norm: float | None
    clip_factor: float


_GO_ON = Verdict(False, None, 1.0)


def _judge(
    how: StepOptions,
    table: Array,
    names: Sequence[str],
    sizes: Sequence[int],
    present: Sequence[bool],
) -> tuple[Verdict, list[float] | None]:
    """Decide on a step by the sums of its gradients; return the scale of each leaf too.

    `present` says which leaves have a gradient.
    """
    squares_of_all = float(_fold(_in_lanes(table["grad"])))
    norm = how.norm(squares_of_all, float(table["largest_grad"].max(initial=0)))
    if table["nonfinite"].any() and how.nonfinite == "skip":
        return Verdict(True, norm, 1.0), None
    if table["nonfinite"].any() and how.nonfinite == "raise":
        rows = zip(names, table["nonfinite"].tolist(), sizes, strict=True)
        _check.not_finite([row for row in rows if row[1] > 0])
    if how.max_grad_norm is None:
        return Verdict(False, norm, 1.0), None
    if how.per_tensor:
        columns = zip(table["grad"].tolist(), table["largest_grad"].tolist(), strict=True)
        factors = [how.factor(how.norm(*sums)) for sums in columns]
    else:
        factors = [how.factor(norm)] * len(table)
    used = [factor for factor, is_present in zip(factors, present, strict=True) if is_present]
    least = float(np.min(used if how.per_tensor else factors, initial=1.0))  # NaN if one is
    return Verdict(False, norm, least), [how.grad_scale * factor for factor in factors]


class Plain(Optimizer):
    """An optimizer with all checks of the fast one that updates leaf by leaf in NumPy."""

    _update: Callable[..., None]  # (p, g, *states, step, **options), in place

    def _take_step(
        self,
        grads: Any,
        options: StepOptions | None = None,
        copies: list[Array | None] | None = None,
        reduction: Reduction | None = None,
        source: ArrayList | None = None,
    ) -> StepResult:
        with self._work, source or nullcontext():
            return self._take_claimed(grads, options or PLAIN, copies, reduction, source)

    @as_in_c
    def _take_claimed(
        self,
        grads: Any,
        how: StepOptions,
        copies: list[Array | None] | None,
        reduction: Reduction | None,
        source: ArrayList | None,
    ) -> StepResult:
        work, (given, plans) = self._work, self._prepare(grads)
        by_group = [group.options for group in self._groups]
        by_leaf = self._by_leaf(self._advanced if self.rule.remembers else by_group)
        work.check(given, plans, how, copies)
        flat_grads = [self._in_order(i, grad, by_leaf[i]) for i, grad in enumerate(given)]
        table = np.zeros(len(work), _core.STATS)
        sizes = np.array([_size(grad) for grad in flat_grads])
        knows = source is not None and source.knows(flat_grads) and reduction is None
        measured = how.must_measure or knows
        if measured or how.measure == LEAF:
            for i, grad in enumerate(flat_grads):
                if grad is not None:
                    table[_GRAD][i] = self._grad_sums(i, grad)
            if measured and reduction is not None:
                reduction.gradients(table, sizes)
        present = [grad is not None for grad in flat_grads]
        verdict, scales = _GO_ON, None
        if measured:
            whole = sizes if reduction is None else reduction.sizes
            verdict, scales = _judge(how, table, work.grad_names, whole.tolist(), present)
        scales = scales or [how.grad_scale] * len(work)
        sums: list[Sums | None] = [None] * len(work)
        if self._kind == "summing" and not verdict.skipped:
            terms = self._direct(flat_grads, by_leaf, scales, how)
            first, second = _both(terms) if reduction is None else reduction.terms(terms)
            if self._settle(first, second) is None:
                verdict = verdict._replace(skipped=True)
            by_leaf = self._by_leaf(self._advanced)
        elif self._kind in _SUMMED and reduction is not None and not verdict.skipped:
            table_of_sums = self._direct(flat_grads, by_leaf, scales, how)
            reduction.directions(table_of_sums)
            known = zip(
                table_of_sums["param"].tolist(), table_of_sums["update"].tolist(), strict=True
            )
            sums = [partial(_known_sums, *row) for row in known]
        for i, grad in enumerate(flat_grads):
            copy = None if copies is None else copies[i]
            if grad is None or verdict.skipped:
                self._copy(i, copy)
                continue
            table[_STEP][i] = self._step_leaf(i, grad, by_leaf[i], scales[i], how, copy, sums[i])
        for grad in given if how.zero_grads else ():
            if grad is not None:
                values = grad.values if isinstance(grad, Rows) else grad
                values[...] = 0
        if source is not None:
            source.forget()
        if verdict.skipped:
            return StepResult(work.count, 0, *verdict)
        work.advance(flat_grads)
        stats = None
        if how.measure == LEAF:
            if reduction is not None:
                if not reduction.knows_gradients:
                    reduction.gradients(table, sizes)
                reduction.steps(table)
                sizes = reduction.sizes
            rows = np.flatnonzero(present)
            names = [work.names[i] for i in rows]
            stats = StepStats(names, sizes[rows], table[rows], how.grad_scale)
        return StepResult(work.count, sum(present), *verdict, stats)

    @property
    def _kind(self) -> str:
        return _core.RULES[self.rule.row(group.options for group in self._groups)][3]

    def _by_leaf(self, by_group: Sequence[Options]) -> list[Options]:
        """Return the options of each leaf, from those of the groups."""
        pairs = zip(by_group, self._groups, strict=True)
        return [options for options, group in pairs for _ in group.leaves]

    def _in_order(self, number: int, grad: Any, options: Options) -> Any:
        return in_order(self.rule, grad, self._work.params[number], options)

    def _grad_sums(self, number: int, grad: Array | Ordered) -> GradSums:
        param = self._work.params[number]
        laid = (
            grad.values if isinstance(grad, Ordered) else _check.gradient("gradient", grad, param)
        )
        return grad_sums(laid.astype(compute_type(param), copy=False))

    def _copy(self, number: int, copy: Array | None) -> None:
        if copy is not None:
            stored = self._work.stored[number]
            _write_copy(copy, stored.decode() if isinstance(stored, Stored) else stored)

    def _step_leaf(
        self,
        number: int,
        grad: Array | Ordered,
        options: Options,
        scale: float,
        how: StepOptions,
        copy: Array | None,
        sums: Sums | None,
        *,
        keep: bool = True,
    ) -> StepSums:
        """Step a leaf; unless `keep`, one like it."""
        param, (*arrays, average) = self._work.stored[number], self._work.states[number]
        states = [
            array if use else None
            for use, array in zip(self.rule.uses(options), arrays, strict=True)
        ]
        if not keep:
            twin = _twin(param)
            assert twin is not None
            param, states, average = twin, list(map(_twin, states)), None
        return leaf(
            self.rule,
            self._update,
            param,
            grad,
            states,
            number=number,
            step=self._work.get_step(number) + 1,
            options=options,
            scale=scale,
            how=how,
            ema=average,  # type: ignore[arg-type]
            copy=copy,
            sums=sums,
        )

    def _direct(
        self,
        grads: Sequence[Array | None],
        options: Sequence[Options],
        scales: Sequence[float],
        how: StepOptions,
    ) -> Array:
        """Return the sums of each leaf and of where it would go, before any is written."""
        table = np.zeros(len(grads), _core.STATS)
        note = _noting(table, _sum_terms if self._kind == "summing" else _sums)
        for i, grad in enumerate(grads):
            if grad is not None:
                self._step_leaf(
                    i, grad, options[i], scales[i], how, None, partial(note, i), keep=False
                )
        return table


def reference(fast: type[Optimizer], update: Callable[..., None]) -> tuple[type[Optimizer], Step]:
    """Return the class and the function of a rule with its arithmetic in NumPy.

    Parameters
    ----------
    fast : type
        The class that gives both their signature and checks.
    update : callable(p, g, *states, step, sums, **options)
        The formula, in place, in the order of roundings; states that are not used are None.
        ``sums(p, direction)`` returns the sums of squares that a layer-wise rule needs.
    """

    def take(rule: Rule, params: Any, grads: Any, states: Any, step: int, options: Options) -> Any:
        work = listed(rule, params, states, step, options)
        work.check(list(grads), [rule.plan(options)], PLAIN, None)
        grads = [
            in_order(rule, grad, param, options)
            for grad, param in zip(grads, work.params, strict=True)
        ]
        rows = list(enumerate(zip(params, grads, *states, strict=True)))
        if rule.share is not None:
            options = rule.share([options])[0]
        if rule.settle is not None:
            table = np.zeros(len(rows), _core.STATS)
            note = _noting(table, _sum_terms)
            for number, (param, grad, *its) in rows:
                if grad is not None:
                    twin, *its = map(_twin, (param, *its))
                    assert twin is not None
                    leaf(rule, update, twin, grad, its, number=number, step=step,
                         options=options, sums=partial(note, number))  # fmt: skip
            settled = rule.settle([options], *_both(table))
            if settled is None:
                return remembered(rule, options)
            options = settled[0]
        for number, (param, grad, *its) in rows:
            if grad is not None:
                leaf(rule, update, param, grad, its, number=number, step=step, options=options)
        return remembered(rule, options)

    doc = f"`fusedopt.{fast.__name__}` with the arithmetic in plain NumPy."
    module = {"__module__": update.__module__, "__doc__": doc, "_update": staticmethod(update)}
    cls = type(fast.__name__, (Plain, fast), module)
    step_function = function(cls, take)
    name = step_function.__name__
    step_function.__doc__ = f"Take a step in plain NumPy, as `fusedopt.functional.{name}`."
    return cls, step_function
