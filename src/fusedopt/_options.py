"""What one step does around the rule: scale, clip, skip, measure, copy, zero.

The options of a step for every adapter, the few formulas that borders and references need, the sums
over ranks, and the table of statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fusedopt import _check, _core
from fusedopt._check import Array
from fusedopt._core import Ieee

# what is known of a gradient: sum of squares, largest magnitude, zeros, infinite or NaN
GradSums = tuple[float, float, int, int]
GRAD_SUMS = ["grad", "largest_grad", "zeros", "nonfinite"]  # of _core.STATS

NOTHING, LEAF, PARAM = range(3)  # fo_measures


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The options of a step, checked; `skip` says whether others found what is not finite."""

    grad_scale: float = 1.0
    max_grad_norm: float | None = None
    norm_type: float = 2.0
    per_tensor: bool = False
    clip_value: float | None = None
    nonfinite: str = "propagate"
    measure: int = NOTHING
    zero_grads: bool = False
    skip: bool | None = None  # None: not tested

    @property
    def must_measure(self) -> bool:
        """Whether the gradients must be known before the first write."""
        return self.max_grad_norm is not None or self.nonfinite != "propagate"

    @property
    def concerns_ranks(self) -> bool:
        """Whether ranks with other parts of the parameters must decide the same."""
        return self.must_measure or self.measure != NOTHING or self.skip is not None

    @property
    def norm_only(self) -> bool:
        """Whether squares, and what is not finite, are all that must be known of gradients."""
        return self.measure == NOTHING and self.norm_type == 2

    def norm(self, squares: float, largest: float) -> float:
        """Return the norm of scaled gradients from the sums of the unscaled."""
        size = math.sqrt(squares) if self.norm_type == 2 else largest
        return abs(self.grad_scale) * size

    def factor(self, norm: float) -> float:
        """Return what the clip multiplies gradients of a norm by, as torch's clip_grad_norm_."""
        assert self.max_grad_norm is not None
        if self.max_grad_norm == math.inf:  # the norm is asked for, and no clip
            return 1.0
        factor = self.max_grad_norm / (norm + 1e-6)
        return 1.0 if factor > 1 else factor  # NaN stays


PLAIN = StepOptions()  # of a step without options


def _norm_type(name: str, value: Any) -> float:
    if not isinstance(value, (int, float, str, np.number)) or (
        value != 2 and value not in (math.inf, "inf")
    ):
        raise ValueError(f"{name}: expected 2 or inf, got {value!r}")
    return float(value)


# the options of a step that every adapter has: defaults and checks
DEFAULTS: dict[str, Any] = {
    "grad_scale": 1.0,
    "max_grad_norm": None,
    "norm_type": 2.0,
    "per_tensor": False,
    "clip_value": None,
    "nonfinite": "propagate",
    "stats": False,
    "zero_grads": False,
}
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "grad_scale": _check.number,
    "max_grad_norm": _check.optional(_check.limit),
    "norm_type": _norm_type,
    "per_tensor": _check.flag,
    "clip_value": _check.optional(_check.positive),
    "nonfinite": _check.choice("propagate", "skip", "raise"),
    "stats": _check.flag,
    "zero_grads": _check.flag,
}


def step_options(given: Mapping[str, Any], *, knows_norm: bool = False) -> StepOptions:
    """Check the options of a step; `knows_norm` says that the gradients' norm costs no read.

    Raises
    ------
    TypeError, ValueError
        Naming the option.
    """
    values = {
        name: CHECKS[name](name, value)
        for name, value in given.items()
        if type(value) is not type(DEFAULTS[name]) or value != DEFAULTS[name]
    }
    how = StepOptions(measure=LEAF if values.pop("stats", False) else NOTHING, **values)
    if how.per_tensor and how.max_grad_norm is None:
        raise ValueError("per_tensor: applies to the clip; give max_grad_norm too")
    if how.norm_type != 2 and not (how.must_measure or knows_norm):
        raise ValueError("norm_type: no norm is asked for; give max_grad_norm (inf clips nothing)")
    return how


class Reduction:
    """Sums what each rank measured of its part of the leaves; one for each step.

    Tables are rows of `_core.STATS`, one for each leaf of the optimizer, and change in place.
    Values may differ from rank to rank; which sums are asked for, and the number of leaves, may
    not.

    Parameters
    ----------
    add : callable(array)
        Sums a float64 array over ranks, in place; its first axis is that of the leaves.
    most : callable(array), optional
        Does so with the maximum. Without it, largest magnitudes remain those of this rank.
    add_total, most_total : callable(array), optional
        The same for sums over all leaves, where ranks have other leaves.
    """

    def __init__(
        self,
        add: Callable[[Array], object],
        most: Callable[[Array], object] | None = None,
        add_total: Callable[[Array], object] | None = None,
        most_total: Callable[[Array], object] | None = None,
    ) -> None:
        """Begin a step."""
        self._add, self._most = add, most
        self._add_total, self._most_total = add_total, most_total
        self.knows_gradients = False  # whether their sums have been summed
        self.sizes: Array  # elements of the whole leaves, from then on

    def begin(self) -> None:
        """Run after all checks of a step of arrays, and before its first read."""

    def agree(self, n: int, fault: Exception | None, skip: bool) -> bool:
        """Return whether some rank skips the step; `n` is the number of leaves of the optimizer.

        Raises
        ------
        Exception
            The `fault` of this rank; RuntimeError if another has one. So all ranks raise, and none
            waits in a sum for a rank that has raised.
        """
        flags = np.empty((n, 2))
        flags[:] = own = [fault is not None, skip]
        self._add(flags)
        sums = flags.sum(axis=0) + own
        if self._add_total is not None:
            self._add_total(sums)
        if fault is not None:
            raise fault
        if sums[0] > 0:
            raise RuntimeError("another rank cannot take this step: see its error; nothing changed")
        return bool(sums[1] > 0)

    def gradients(
        self, table: Array, sizes: Array, largest: bool = True
    ) -> tuple[float, float, float]:
        """Sum what is known of the gradients; return squares, largest and nonfinite of all.

        Without `largest` the largest magnitudes remain those of this rank.
        """
        most, most_total = (self._most, self._most_total) if largest else (None, None)
        columns = np.column_stack(
            [
                table["grad"],
                table["zeros"],
                table["nonfinite"],
                sizes,
                np.isnan(table["largest_grad"]),
            ]
        )
        self._add(columns)
        for name, column in zip(("grad", "zeros", "nonfinite"), columns.T, strict=False):
            table[name] = column
        self.sizes, self.knows_gradients = columns[:, 3].astype(np.int64), True
        table["largest_grad"] = _largest(table["largest_grad"], columns[:, 4], most)
        total = _core.total(table)
        values = [total["grad"], total["nonfinite"], np.isnan(total["largest_grad"])]
        sums, top = np.array(values, np.float64), np.array([total["largest_grad"]])
        if self._add_total is not None:
            self._add_total(sums)
            top = _largest(top, sums[2:], most_total)
        return float(sums[0]), float(top[0]), float(sums[1])

    def directions(self, table: Array) -> None:
        """Sum the squares that trust ratios need, or the counts of a rule that counts."""
        columns = np.column_stack([table["param"], table["update"]])
        self._add(columns)
        table["param"], table["update"] = columns.T

    def terms(self, table: Array) -> tuple[float, float]:
        """Return the sums of both terms of a rule that sums, over all leaves of all ranks."""
        self.directions(table)
        total = _core.total(table)
        sums = np.array([total["param"], total["update"]], np.float64)
        if self._add_total is not None:
            self._add_total(sums)
        return float(sums[0]), float(sums[1])

    def steps(self, table: Array) -> None:
        """Sum what is known of parameters and updates."""
        columns = np.column_stack(
            [table["param"], table["update"], np.isnan(table["largest_update"])]
        )
        self._add(columns)
        table["param"], table["update"] = columns.T[:2]
        table["largest_update"] = _largest(table["largest_update"], columns[:, 2], self._most)


def _largest(values: Array, nans: Array, most: Callable[[Array], object] | None) -> Array:
    """Return the maxima over ranks, NaN where some rank has one (no library promises that)."""
    largest = np.where(np.isnan(values), 0.0, values)
    if most is not None:
        most(largest)
    return np.where(nans > 0, np.nan, largest)


_COLUMNS: dict[str, Callable[[Array, Array, float], Array]] = {
    "grad_norm": lambda table, sizes, grad_scale: abs(grad_scale) * np.sqrt(table["grad"]),
    "param_norm": lambda table, *_: np.sqrt(table["param"]),
    "update_norm": lambda table, *_: np.sqrt(table["update"]),
    "update_ratio": lambda table, *_: np.sqrt(table["update"]) / np.sqrt(table["param"]),
    "max_update": lambda table, *_: table["largest_update"].copy(),
    "zero_fraction": lambda table, sizes, _: table["zeros"] / np.maximum(sizes, 1),
    "nonfinite": lambda table, *_: table["nonfinite"].copy(),
}


class StepStats:
    """What a step measured of every leaf, in arrays with one entry for each, in order.

    Attributes
    ----------
    names : tuple of str
        Names of the leaves that had a gradient. ``stats[name]`` is a dict of what follows for one.
    grad_norm, param_norm, update_norm : array of float64
        2-norms: of the gradient (times ``grad_scale``, before any clip), of the parameter after the
        step, and of what the step added to it. Squares are float64: elements of float64 leaves
        below 1e-154 count as 0, and from 1e154 on as infinite.
    update_ratio : array of float64
        ``update_norm / param_norm``; around 1e-3 in a healthy run.
    max_update : array of float64
        Largest change of an element.
    zero_fraction : array of float64
        Fraction of the gradient's elements that are exactly 0.
    nonfinite : array of int64
        Number of the gradient's elements that are infinite or NaN.
    """

    COLUMNS = tuple(_COLUMNS)
    grad_norm: Array
    param_norm: Array
    update_norm: Array
    update_ratio: Array
    max_update: Array
    zero_fraction: Array
    nonfinite: Array

    def __init__(self, names: Sequence[str], sizes: Array, table: Array, grad_scale: float) -> None:
        """Keep a table of `_core.STATS`, a row for each name."""
        self.names = tuple(names)
        self._measured = table, sizes, grad_scale

    def __getattr__(self, name: str) -> Array:
        """Compute a column when it is first read, as many steps record none."""
        if name not in _COLUMNS:
            raise AttributeError(f"StepStats has no {name!r}; it has names, {', '.join(_COLUMNS)}")
        with Ieee(), np.errstate(all="ignore"):
            column = _COLUMNS[name](*self._measured)
        self.__dict__[name] = column
        return column

    def __dir__(self) -> list[str]:
        """List the columns too, computed or not."""
        return sorted({*super().__dir__(), *_COLUMNS})

    def __getitem__(self, name: str) -> dict[str, float]:
        """Return what was measured of one leaf."""
        if name not in self.names:
            known = ", ".join(self.names[:4]) + ", ..." * (len(self.names) > 4)
            raise KeyError(f"{name}: no such leaf with a gradient; known: {known}")
        i = self.names.index(name)
        return {column: getattr(self, column)[i].item() for column in self.COLUMNS}

    def __contains__(self, name: object) -> bool:
        """Whether a leaf of that name had a gradient."""
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.names)

    def __len__(self) -> int:
        """Return the number of leaves."""
        return len(self.names)

    def __repr__(self) -> str:
        """Say how much there is."""
        return f"<StepStats of {len(self)} leaves: {', '.join(self.COLUMNS)}>"


class StepResult(NamedTuple):
    """What a step did.

    Attributes
    ----------
    step : int
        Number of steps that the optimizer has taken, this one included.
    updated : int
        Number of leaves that were updated: those with a gradient.
    skipped : bool
        Whether nothing was changed: gradients were not finite, or gave the rule nothing to
        estimate from.
    grad_norm : float or None
        Norm of all gradients, times ``grad_scale`` and before the clip; None if no option needs it.
    clip_factor : float
        What the clip by the norm multiplied gradients by; of a clip for each tensor, the least.
    stats : StepStats or None
        What was measured of each leaf, if asked for.
    """

    step: int
    updated: int
    skipped: bool = False
    grad_norm: float | None = None
    clip_factor: float = 1.0
    stats: StepStats | None = None

    def __repr__(self) -> str:
        """Say what differs from a step without options."""
        defaults = self._field_defaults
        fields = (f"{k}={v!r}" for k, v in self._asdict().items() if defaults.get(k, ...) != v)
        return f"{type(self).__name__}({', '.join(fields)})"
