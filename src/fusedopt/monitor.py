r"""Training as an optimizer sees it: statistics over steps, and common problems in words.

>>> import numpy as np, fusedopt
>>> w = {"W": np.ones((3, 3), np.float32), "b": np.ones(3, np.float32)}
>>> opt, history = fusedopt.SGD(w, lr=0.001), fusedopt.monitor.History()
>>> for _ in range(30):
...     grads = {"W": np.full((3, 3), 0.5, np.float32), "b": np.zeros(3, np.float32)}
...     _ = history.record(opt.step(grads, stats=True))
>>> print("\n".join(history.troubles()))
params['b']: its gradient was 0 everywhere in the last 20 steps: a dead layer, or not used
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from fusedopt import _check
from fusedopt._check import Array
from fusedopt._options import StepResult, StepStats

RATIOS = (1e-5, 1e-1)  # update / parameter, within a factor of 100 of a healthy run's 1e-3
GROWTH = 100.0  # of a gradient's norm, from the first to the last steps, that is a problem


class History:
    """Statistics of steps, by leaf.

    Parameters
    ----------
    window : int, default 20
        Number of steps that `troubles` looks at, at the end and, to compare, at the beginning.

    Attributes
    ----------
    steps : list of int
        The optimizer's step count at each record.
    skipped : list of int
        The same at each skipped step.
    """

    def __init__(self, window: int = 20) -> None:
        """See the class."""
        self.window = _check.count("window", window, least=1)
        self.steps: list[int] = []
        self.skipped: list[int] = []
        self._records: list[StepStats] = []

    def record(self, result: StepResult) -> StepResult:
        """Add the result of a step with ``stats=True``; return it.

        Raises
        ------
        ValueError
            If the step was neither measured nor skipped.
        """
        if result.skipped:
            self.skipped.append(result.step)
        elif result.stats is None:
            raise ValueError("the step has no statistics: call step(grads, stats=True)")
        else:
            self.steps.append(result.step)
            self._records.append(result.stats)
        return result

    @property
    def names(self) -> list[str]:
        """Names of all recorded leaves, in the order of their first record."""
        return list(dict.fromkeys(name for stats in self._records for name in stats.names))

    def column(self, name: str) -> dict[str, Array]:
        """Return one of `StepStats.COLUMNS` by leaf, a value for each record.

        NaN stands for a step in which the leaf had no gradient.

        Raises
        ------
        ValueError
            For an unknown column; lists the known ones.
        """
        if name not in StepStats.COLUMNS:
            raise ValueError(f"column {name!r}; known: {', '.join(StepStats.COLUMNS)}")
        names = self.names
        place = {leaf: i for i, leaf in enumerate(names)}
        table = np.full((len(self._records), len(names)), np.nan)
        for row, stats in zip(table, self._records, strict=True):
            row[[place[leaf] for leaf in stats.names]] = getattr(stats, name)
        return dict(zip(names, table.T, strict=True))

    def troubles(self) -> list[str]:
        """Return what looks wrong, one sentence each; empty if nothing does.

        Checks for infinite or NaN gradients and parameters; layers whose gradient is 0, everywhere
        or nearly so; gradient norms that grew by a factor of 100, or fell by 100 and by 10 relative
        to the norm of all gradients (successful training lowers them together); updates below 1e-5
        of a parameter's norm in every part of the run (a schedule may end at 0), or above 1e-1 now
        or in most of the run; many skipped steps.
        """
        found = []
        total = len(self.steps) + len(self.skipped)
        if len(self.skipped) * 10 > total:
            found.append(
                f"{len(self.skipped)} of {total} steps were skipped because of non-finite "
                "gradients: lower the loss scale or the learning rate"
            )
        columns = {name: self.column(name) for name in StepStats.COLUMNS}
        steps = np.asarray(self.steps)
        overall = np.array([_finite_norm(stats.grad_norm) for stats in self._records])
        for leaf in self.names:
            has = ~np.isnan(columns["zero_fraction"][leaf])  # steps in which it had a gradient
            seen = {name: by_leaf[leaf][has] for name, by_leaf in columns.items()}
            found += [
                f"{leaf}: {text}" for text in _of(seen, self.window, steps[has], overall[has])
            ]
        return found

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw gradient norm, update ratio and zeros over the steps, a line for each leaf.

        Parameters
        ----------
        path : path, optional
            Where to save the picture.

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
        if not self.steps:
            raise ValueError("nothing to draw: no step was recorded")
        return _draw(self, path)


def _finite_norm(norms: Array) -> float:
    return float(np.linalg.norm(norms[np.isfinite(norms)]))


def _of(seen: dict[str, Array], window: int, steps: Array, overall: Array) -> list[str]:
    """Return what is wrong with one leaf, from its columns and the norms of all gradients."""
    broken = []
    for what, bad in (
        ("gradient", seen["nonfinite"] > 0),
        ("parameter", ~np.isfinite(seen["param_norm"])),
    ):
        where = np.flatnonzero(bad)
        if where.size:
            more = f", and in {where.size - 1} more" if where.size > 1 else ""
            broken.append(f"infinite or NaN {what} in step {steps[where[0]]}{more}")
    if broken or len(steps) < window:
        return broken  # or it is too early to tell
    last = {name: values[-window:] for name, values in seen.items()}
    zeros = float(np.median(last["zero_fraction"]))
    if last["zero_fraction"].min() == 1:
        return [
            f"its gradient was 0 everywhere in the last {window} steps: a dead layer, or not used"
        ]
    found = []
    if zeros > 0.9:
        found.append(f"{zeros:.0%} of its gradient is 0: dying units, or sparse input")
    if len(steps) >= 2 * window:
        found += _drift(seen["grad_norm"], overall, window)
    return found + _pace(seen, window)


def _drift(norms: Array, overall: Array, window: int) -> list[str]:
    first, now = (float(np.median(part)) for part in (norms[:window], norms[-window:]))
    if first > 0 and now > GROWTH * first:
        return [
            f"gradient norm grew from {first:.2g} to {now:.2g}: exploding; clip it "
            "(max_grad_norm) or lower the learning rate"
        ]
    share = np.divide(norms, overall, out=np.zeros_like(norms), where=overall > 0)
    fell = np.median(share[-window:]) * np.sqrt(GROWTH) < np.median(share[:window])
    if now < first / GROWTH and fell:
        return [f"gradient norm fell from {first:.2g} to {now:.2g}: vanishing"]
    return []


def _pace(seen: dict[str, Array], window: int) -> list[str]:
    ratios, norms = seen["update_ratio"], seen["param_norm"]
    usual = "of its norm (1e-3 is usual): too"
    # a rate may rise from 0 and fall to 0: only the window with the largest updates counts
    parts = np.array_split(ratios, len(ratios) // window)
    most = max(float(np.median(part)) for part in parts)
    if most < RATIOS[0]:
        return [f"a step moves it by {most:.1g} {usual} small; raise the learning rate"]
    # from 0 any update is large at first, and a step is 1/sqrt(n) of a random walk of n steps
    from_zero = seen["update_norm"][0] > 0.99 * norms[0]
    limit = max(RATIOS[1], 2 / np.sqrt(len(ratios))) if from_zero else RATIOS[1]
    large = max(float(np.median(part)) for part in (ratios[-window:], ratios))
    if limit < large < np.inf:
        return [f"a step moves it by {large:.1g} {usual} large; lower the learning rate"]
    return []


def _draw(history: History, path: str | os.PathLike[str] | None) -> Any:
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError('a plot needs: pip install "fusedopt[demo]"') from exc
    names = history.names
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True)
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    for ax, (column, label, scale) in zip(
        axes,
        [
            ("grad_norm", "gradient norm", "log"),
            ("update_ratio", "update norm / parameter norm", "log"),
            ("zero_fraction", "fraction of zeros in the gradient", "linear"),
        ],
        strict=True,
    ):
        for (name, values), color in zip(history.column(column).items(), colors, strict=True):
            shown = np.where(values > 0, values, np.nan) if scale == "log" else values
            ax.plot(history.steps, shown, color=color, linewidth=1, label=name)
        ax.set(ylabel=label, yscale=scale)
        ax.grid(alpha=0.3)
    axes[1].axhspan(*RATIOS, color="0.5", alpha=0.1, linewidth=0)
    axes[1].axhline(1e-3, color="0.5", linestyle=":")
    axes[2].set(xlabel="step", ylim=(-0.03, 1.03))
    for ax in axes:
        for step in history.skipped:
            ax.axvline(step, color="C3", alpha=0.4, linewidth=0.8)
    few = len(names) <= 16
    handles, labels = axes[0].get_legend_handles_labels()
    keep = range(len(names)) if few else (0, len(names) // 2, len(names) - 1)
    figure.legend(
        [handles[i] for i in keep], [labels[i] for i in keep], loc="outside right upper",
        fontsize="small", title=None if few else f"{len(names)} leaves, from first to last",
    )  # fmt: skip
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
