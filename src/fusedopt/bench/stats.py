"""Statistics of times: ratios within a round, their median and its interval, a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusedopt.bench.contenders import LIMIT, OURS
from fusedopt.bench.recording import Entry

CONFIDENCE = 0.95
CALM = 0.25  # CPUs that others may keep busy in a round; clocks of CPU time are too coarse for less
_RESAMPLES = 1000


def median_interval(
    groups: Sequence[Sequence[float]], confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float, float]:
    """Return the median, and the ends of its bootstrap percentile interval.

    Values of a group (a placement) are correlated: groups are drawn first, then values from each of
    those. With one group it is the ordinary bootstrap.
    """
    filled = [np.asarray(group, np.float64) for group in groups if len(group)]
    lengths = np.array([len(group) for group in filled])
    table = np.zeros((len(filled), lengths.max()))
    for row, group in zip(table, filled, strict=True):
        row[: len(group)] = group
    rng = np.random.default_rng(seed)
    which = rng.integers(0, len(filled), (_RESAMPLES, len(filled), 1))
    inside = (rng.random((_RESAMPLES, *table.shape)) * lengths[which]).astype(np.intp)
    medians = np.median(table[which, inside].reshape(_RESAMPLES, -1), axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(np.median(np.concatenate(filled))), float(low), float(high)


@dataclass(frozen=True)
class Summary:
    """One contender in one entry.

    `seconds` is the median time of a step; `moved` the bytes that it has to read and write;
    `of_limit` the limit's time over its own; `ratio` its time over fusedopt's, with the interval
    from `low` to `high`. Both ratios are medians of quotients within a round.
    """

    name: str
    seconds: float
    moved: int
    of_limit: float
    ratio: float
    low: float
    high: float
    rounds: int


def calm(entry: Entry, *names: str) -> list[int]:
    """Return the undisturbed rounds in which all of some contenders took part.

    If more than half of the rounds were disturbed, only the worse half is left out. The choice does
    not depend on the times.
    """
    columns = [entry.seconds.get(name, []) for name in names]
    both = [i for i, row in enumerate(zip(*columns, strict=False)) if None not in row]
    if not both:
        return []
    most = max(CALM, float(np.median([entry.others[i] for i in both])))
    return [i for i in both if not entry.others[i] > most]


def quotients(entry: Entry, above: str, below: str) -> list[list[float]]:
    """Return the quotients of two contenders' times in calm rounds, by placement."""
    ends = np.cumsum(entry.placements)
    groups: list[list[float]] = [[] for _ in ends]
    for i in calm(entry, above, below):
        a, b = entry.seconds[above][i], entry.seconds[below][i]
        groups[np.searchsorted(ends, i, side="right")].append(a / b)  # type: ignore[operator]
    return [group for group in groups if group]


def times(entry: Entry, name: str) -> list[float]:
    """Return a contender's times in calm rounds."""
    return [s for i in calm(entry, name) if (s := entry.seconds[name][i]) is not None]


def summarize(entry: Entry) -> list[Summary]:
    """Return a summary of each contender that took part: the limit first, then by speed."""
    summaries = []
    for name in entry.seconds:
        ratios = quotients(entry, name, OURS)
        if ratios:
            seconds = float(np.median(times(entry, name)))
            to_limit = quotients(entry, LIMIT, name)
            ratio, low, high = median_interval(ratios)
            summaries.append(
                Summary(
                    name,
                    seconds,
                    entry.own_moved.get(name, entry.moved),
                    float(np.median(np.concatenate(to_limit))) if to_limit else float("nan"),
                    ratio,
                    low,
                    high,
                    sum(map(len, ratios)),
                )
            )
    return sorted(summaries, key=lambda s: (s.name != LIMIT, s.ratio))


def noise(entry: Entry) -> float:
    """Return the interquartile range of the limit's own times over their median."""
    column = times(entry, LIMIT)
    if not column:
        return float("nan")
    low, middle, high = np.quantile(column, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def disturbance(entry: Entry) -> float:
    """Return the CPUs that other processes and the host kept busy in the rounds that count."""
    rounds = calm(entry, OURS)
    return float(np.mean([entry.others[i] for i in rounds])) if rounds else float("nan")


@dataclass(frozen=True)
class Cost:
    """A step's time as ``fixed + near * n`` seconds; beyond `bend` elements, `far` for each.

    `bend` is where the arrays outgrow the caches; `off` is the largest relative error of the fit.
    """

    fixed: float
    near: float
    far: float
    bend: float
    off: float

    def __call__(self, n: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the seconds of steps on n elements."""
        past = np.maximum(n - self.bend, 0)
        return self.fixed + self.near * (n - past) + self.far * past


def fit_cost(sizes: Sequence[float], seconds: Sequence[float]) -> Cost | None:
    """Fit a `Cost` by least squares of relative errors, trying bends; None for < 4 sizes."""
    n, t = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    if len(n) < 4:
        return None
    best: tuple[float, Cost] | None = None
    for bend in np.geomspace(n.min(), n.max(), 60):
        past = np.maximum(n - bend, 0)
        columns = np.stack([np.ones_like(n), n - past, past], axis=1) / t[:, None]
        solution, *_ = np.linalg.lstsq(columns, np.ones_like(t), rcond=None)
        error = columns @ solution - 1
        if (solution >= 0).all() and (best is None or error @ error < best[0]):
            fixed, near, far = map(float, solution)
            cost = Cost(fixed, near, far, bend=float(bend), off=float(np.abs(error).max()))
            best = float(error @ error), cost
    return None if best is None else best[1]
