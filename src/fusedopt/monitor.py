r"""The run of a training: statistics over steps, common problems in words, a picture.

>>> import numpy as np, fusedopt
>>> w = {"W": np.ones((3, 3), np.float32), "b": np.ones(3, np.float32)}
>>> opt, history = fusedopt.SGD(w, lr=0.001), fusedopt.monitor.History(every=1)
>>> for _ in range(30):
...     loss, grads = 0.5, {"W": np.full((3, 3), 0.5, np.float32), "b": np.zeros(3, np.float32)}
...     result = history.record(opt.step(grads, stats=history.due), loss=loss, lr=0.001)
>>> print(history.troubles()[0].partition(" in the last")[0])
params['b']: dead: the gradient was 0 everywhere
>>> history.log()["update_ratio/params['W']"] == result.stats["params['W']"]["update_ratio"]
True
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedopt import _check, _checkpoint, _picture, _troubles
from fusedopt._check import Array
from fusedopt._options import StepResult, StepStats

__all__ = ["History"]

ROWS = 512  # that are kept: a heat map shows no more, and 1,000 leaves take 28 MB
SAVED = ("index", "step", "lr", "loss", "losses")  # of a row, beside its table
COUNTS = ("window", "every", "skips", "_stride", "_taken", "_wait")
LOGGED = ("grad_norm", "update_ratio", "zero_fraction")


@dataclass(slots=True)
class _Row:
    """A record of a measured step; `index` is its number among all of them."""

    index: int
    step: int
    lr: float
    loss: float  # mean of `losses` values, those since the row before
    losses: int
    table: Array  # a row for each of StepStats.COLUMNS, a column for each known leaf


class History:
    """Statistics of steps, by leaf. Memory is bounded: of a long run it keeps 512 records.

    Parameters
    ----------
    window : int, default 20
        Number of records that `troubles` looks at, at the end and, to compare, at the beginning.
        These are all kept; of those between, every second, fourth, ... one.
    every : int, default 10
        Steps from one measured step to the next, see `due`.

    Attributes
    ----------
    skips : int
        Number of skipped steps.
    skipped : list of int
        The optimizer's step count at each of them; of thousands, at some.
    """

    def __init__(self, window: int = 20, *, every: int = 10) -> None:
        """See the class."""
        self.window = _check.count("window", window, least=1)
        self.every = _check.count("every", every, least=1)
        self.skipped: list[int] = []
        self.skips = 0
        self.names: list[str] = []  # of all recorded leaves, in the order of their first record
        # (what was infinite or NaN, leaf) -> its first step, number of records
        self._broken: dict[tuple[str, str], tuple[int, int]] = {}
        self._rows: list[_Row] = []
        self._stride = 1  # between the indices of kept rows
        self._taken = 0  # steps, without the skipped
        self._wait = 0  # steps until one is due
        self._loss, self._losses = 0.0, 0  # sum and number since the last row
        self._last: tuple[StepResult, float | None, float | None] | None = None

    @property
    def due(self) -> bool:
        """Whether the next step should be measured: ``opt.step(grads, stats=history.due)``."""
        return self._wait == 0

    @property
    def steps(self) -> list[int]:
        """The optimizer's step count at each record that is kept."""
        return [row.step for row in self._rows]

    def record(
        self, result: StepResult, *, loss: Any = None, lr: float | None = None
    ) -> StepResult:
        """Add the result of a step; return it.

        Parameters
        ----------
        result : StepResult
            Of a step that was measured (``stats=True``) if one is `due`. If no leaf was updated,
            ``StepResult(step, updated=0)``, there is nothing to measure.
        loss : float, optional
            Of the step's batch: with it `troubles` knows whether the run learns.
        lr : float, optional
            The learning rate of the step: with it updates are judged against the schedule.

        Raises
        ------
        ValueError
            If the step was due, and neither measured nor skipped.
        """
        try:
            value = None if loss is None else float(loss)
        except (TypeError, ValueError) as exc:
            raise TypeError(f"loss: expected a number, got {loss!r}") from exc
        rate = None if lr is None else _check.nonnegative("lr", lr)
        if result.stats is None and self.due and result.updated and not result.skipped:
            raise ValueError("the step has no statistics: call step(grads, stats=history.due)")
        self._last = result, value, rate
        if value is not None and math.isfinite(value):
            self._loss, self._losses = self._loss + value, self._losses + 1
        elif value is not None and not result.skipped:
            self._found("loss", "", result.step)
        if result.skipped:
            self.skips += 1
            self.skipped.append(result.step)
            if len(self.skipped) > 10 * ROWS:
                del self.skipped[1::2]
            return result
        self._taken += 1
        if result.stats is not None or self.due:
            self._wait = self.every - 1
            self._add(result.step, result.stats, math.nan if rate is None else rate)
        else:
            self._wait -= 1
        return result

    def _found(self, what: str, leaf: str, step: int) -> None:
        first, records = self._broken.get((what, leaf), (step, 0))
        self._broken[what, leaf] = first, records + 1

    def _add(self, step: int, stats: StepStats | None, lr: float) -> None:
        names = () if stats is None else stats.names
        if list(names) != self.names:
            self.names = list(dict.fromkeys((*self.names, *names)))
        table = np.full((len(StepStats.COLUMNS), len(self.names)), np.nan)
        if stats is not None:
            place = {leaf: i for i, leaf in enumerate(self.names)}
            columns = [place[leaf] for leaf in names]
            table[:, columns] = [getattr(stats, name) for name in StepStats.COLUMNS]
            for what, bad in (
                ("gradient", stats.nonfinite > 0),
                ("parameter", ~np.isfinite(stats.param_norm)),
            ):
                for leaf in np.flatnonzero(bad):
                    self._found(what, names[leaf], step)
        mean = self._loss / self._losses if self._losses else math.nan
        index = self._rows[-1].index + 1 if self._rows else 0
        self._rows.append(_Row(index, step, lr, mean, self._losses, table))
        self._loss, self._losses = 0.0, 0
        self._drop(len(self._rows) - self.window - 1)
        if len(self._rows) >= ROWS + 2 * self.window:
            self._stride *= 2
            for i in reversed(range(self.window, len(self._rows) - self.window)):
                self._drop(i)

    def _drop(self, i: int) -> None:
        """Remove a row of the middle if its index is no multiple of the stride."""
        if i < self.window or self._rows[i].index % self._stride == 0:
            return
        gone, after = self._rows.pop(i), self._rows[i]
        losses = gone.losses + after.losses
        if gone.losses:
            parts = [row.loss * row.losses for row in (gone, after) if row.losses]
            after.loss, after.losses = sum(parts) / losses, losses

    def column(self, name: str) -> dict[str, Array]:
        """Return one of `StepStats.COLUMNS` by leaf, a value for each record that is kept.

        NaN stands for a step in which the leaf had no gradient.

        Raises
        ------
        ValueError
            For an unknown column; lists the known ones.
        """
        if name not in StepStats.COLUMNS:
            raise ValueError(f"column {name!r}; known: {', '.join(StepStats.COLUMNS)}")
        return dict(zip(self.names, self._table()[StepStats.COLUMNS.index(name)].T, strict=True))

    def _table(self) -> Array:
        """Return all columns: an array of columns x records x leaves."""
        table = np.full((len(StepStats.COLUMNS), len(self._rows), len(self.names)), np.nan)
        for i, row in enumerate(self._rows):
            table[:, i, : row.table.shape[1]] = row.table
        return table

    def series(self, name: str) -> Array:
        """Return "loss" (mean since the record before) or "lr" of each record that is kept."""
        if name not in ("loss", "lr"):
            raise ValueError(f"series {name!r}; known: loss, lr")
        return np.array([getattr(row, name) for row in self._rows])

    def log(self) -> dict[str, float]:
        """Return the last recorded step as a flat dict, for a logger of metrics.

        "loss" and "lr" if they were given, "grad_norm" if it is known, "skipped", and of a measured
        step "grad_norm/LEAF", "update_ratio/LEAF" and "zero_fraction/LEAF" of every leaf.
        ``wandb.log(history.log())``; for TensorBoard ``[writer.add_scalar(name, value, step) for
        name, value in history.log().items()]``.
        """
        if self._last is None:
            return {}
        result, loss, lr = self._last
        values = {"loss": loss, "lr": lr, "grad_norm": result.grad_norm}
        found = {name: value for name, value in values.items() if value is not None}
        found["skipped"] = float(result.skipped)
        if result.stats is not None:
            for column in LOGGED:
                by_leaf = zip(result.stats.names, getattr(result.stats, column), strict=True)
                found |= {f"{column}/{leaf}": float(value) for leaf, value in by_leaf}
        return found

    def troubles(self) -> list[str]:
        """Return what looks wrong, a sentence for each cause, the most important first.

        Empty if nothing does. A sentence names the leaves, and what to try. Figures are medians of
        the last `window` records. Infinite or NaN values
        end the list, and so does a loss that rose or the wrong scale of a layer's inputs. Then come
        skipped steps, dead leaves, exploding gradients, updates above 1e-1 of a parameter's norm
        (or 1e-2 where the loss stands still), gradients that vanish while others do not, units that
        die, and updates below 1e-5 (or 5e-4 where the loss still falls). Most of these are
        reported only if the loss has not halved, or is not known. How often that is right is in
        bench/results/monitor.md.
        """
        return _troubles.troubles(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that is kept to a .npz or .safetensors file, whole or not at all."""
        rows = {name: np.array([getattr(row, name) for row in self._rows]) for name in SAVED}
        meta = {name: getattr(self, name) for name in COUNTS}
        broken = [[*key, *value] for key, value in self._broken.items()]
        meta |= {"names": self.names, "skipped": self.skipped, "broken": broken}
        sums = np.array([self._loss, self._losses])
        _checkpoint.write(path, {"table": self._table(), "sums": sums, **rows}, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Return the history that `save` wrote; new records continue it.

        Raises
        ------
        OSError, ValueError
            If the file cannot be read, or is none of `save`.
        """
        arrays, meta = _checkpoint.read(path)
        try:
            history = cls(meta["window"], every=meta["every"])
            for name in COUNTS:
                setattr(history, name, _check.count(name, meta[name]))
            history.names = list(map(str, meta["names"]))
            history.skipped = [_check.count("skipped", step) for step in meta["skipped"]]
            for what, leaf, *counts in meta["broken"]:
                first, records = (_check.count("broken", value) for value in counts)
                history._broken[str(what), str(leaf)] = first, records
            history._loss, history._losses = float(arrays["sums"][0]), int(arrays["sums"][1])
            shape = (len(StepStats.COLUMNS), len(arrays["step"]), len(history.names))
            if arrays["table"].shape != shape or len(set(history.names)) != shape[-1]:
                raise ValueError(f"a table of {arrays['table'].shape}, expected {shape}")
            columns = [arrays[name].tolist() for name in SAVED]
            for table, *row in zip(arrays["table"].transpose(1, 0, 2), *columns, strict=True):
                fields: Any = dict(zip(SAVED, row, strict=True))
                history._rows.append(_Row(table=table, **fields))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as exc:
            raise ValueError(f"{os.fspath(path)}: not a saved History: {exc!r}") from exc
        return history

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        title: str = "",
        curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {},  # noqa: B006
    ) -> Any:
        """Draw the run in one figure.

        Loss, on a logarithmic axis, and learning rate where they are known, gradient norm, update /
        parameter and zeros of each leaf over the steps: lines for up to 12 leaves, a colour for
        each layer and dashes for its bias, else heat maps of leaves x steps. Skipped steps are
        marks below the loss.

        Parameters
        ----------
        path : path, optional
            Where to save the picture.
        title : str, optional
            Above it.
        curves : mapping of name to (steps, values), optional
            What else to draw, a panel for each, as an accuracy. Curves whose name ends with "loss"
            are drawn beside the loss of the records.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ModuleNotFoundError
            Without matplotlib: ``pip install "fusedopt[demo]"``.
        ValueError
            If nothing was recorded, or the path's ending names no picture format.
        """
        if not self._rows:
            raise ValueError("nothing to draw: no step was recorded")
        return _picture.draw(self, path, title, curves)
