"""A sweep over learning rates, undone at its end, for arrays and tensors: see `fusedopt.tune`."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusedopt import _check, _copies, _picture
from fusedopt._check import Array

RULES = ("steepest", "valley")
LEAST = 10  # losses that a suggestion needs
Undo = list[tuple[Any, ...]]  # see `_copies.undone`


@dataclass(frozen=True, eq=False)
class RangeTest:
    """The losses of a sweep over learning rates, and the rate that they suggest.

    Attributes
    ----------
    rates : array
        Rates that were reached, in rising order; with several groups, the largest of each step.
    losses : array
        The loss of each step's batch, before the step; the last may be infinite or NaN.
    smoothed : array
        Means of `losses` over their neighbours.
    diverged : bool
        Whether the sweep stopped because the loss grew beyond the limit, or was not finite.
    rule : {"steepest", "valley"}
        How the rate is chosen on the smoothed curve: where it falls fastest per factor of the rate,
        or in the middle, on that scale, of where it has fallen by a tenth and by nine tenths.
    suggestion : float or None
        The rate; None where the curve supports none.
    reason : str
        Why it is that rate, or why there is none.
    """

    rates: Array
    losses: Array
    smoothed: Array
    diverged: bool
    rule: str
    suggestion: float | None
    reason: str

    def by(self, rule: str) -> RangeTest:
        """Return the same curve with the suggestion of another rule."""
        suggestion, reason = _suggest(self.rates, self.losses, self.smoothed, rule, self.diverged)
        return replace(self, rule=rule, suggestion=suggestion, reason=reason)

    def __repr__(self) -> str:
        """Range, suggestion and reason."""
        end = ", where the loss diverged" if self.diverged else ""
        given = "none" if self.suggestion is None else f"{self.suggestion:.3g}"
        return (
            f"RangeTest({len(self.rates)} rates from {self.rates[0]:.3g} to {self.rates[-1]:.3g}"
            f"{end}; suggestion: {given} ({self.rule}: {self.reason}))"
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the losses over the rates, and the suggestion.

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
            If the path's ending names no picture format.
        """
        return _picture.draw_sweep(self, path)


class Sweep:
    """The checked options of a range test; runs the test for arrays and tensors."""

    def __init__(
        self,
        start: float,
        stop: float,
        steps: int,
        kind: str,
        smoothing: float,
        divergence: float,
        rule: str,
    ) -> None:
        first, last = _check.positive("start", start), _check.positive("stop", stop)
        if last <= first:
            raise ValueError(f"stop: must be above start, {first}, got {last}")
        count = _check.count("steps", steps, least=LEAST)
        _check.choice("exponential", "linear")("kind", kind)
        spaced = np.geomspace if kind == "exponential" else np.linspace
        self.rates = spaced(first, last, count)
        self.rule = _check.choice(*RULES)("rule", rule)
        self.smoothing = _check.decay_rate("smoothing", smoothing)
        self.divergence = _check.number("divergence", divergence)
        if self.divergence <= 1:
            raise ValueError(f"divergence: must be > 1, got {self.divergence}")

    def run(
        self,
        undo: Undo,
        begin: Callable[[], None],
        evaluate: Callable[[], float],
        set_rate: Callable[[float], None],
        step: Callable[[], object],
    ) -> RangeTest:
        """Run the sweep and return its result; `undo` is run however it ends."""
        losses: list[float] = []
        limit = math.inf

        def work() -> bool:
            nonlocal limit
            begin()
            mean, best = 0.0, math.inf
            for i, rate in enumerate(self.rates.tolist(), start=1):
                losses.append(evaluate())
                mean = self.smoothing * mean + (1 - self.smoothing) * losses[-1]
                level = mean / (1 - self.smoothing**i)
                best = min(best, level)
                limit = best + (self.divergence - 1) * abs(best)
                if not level <= limit:
                    return True
                set_rate(rate)
                try:
                    step()
                except FloatingPointError:  # of a step that was asked to raise it
                    return True
            return False

        diverged = _copies.undone(undo, work)
        rates, found = self.rates[: len(losses)], np.array(losses)
        capped, lowest = found.copy(), int(np.argmin(np.nan_to_num(found, nan=math.inf)))
        capped[lowest:] = np.minimum(capped[lowest:], limit)  # or they would count for all before
        smoothed = _smooth(capped, self.smoothing)
        suggestion, reason = _suggest(rates, found, smoothed, self.rule, diverged)
        return RangeTest(rates, found, smoothed, diverged, self.rule, suggestion, reason)


def number(loss: Any) -> float:
    """Return a loss as a Python number."""
    try:
        return float(loss)
    except (TypeError, ValueError) as exc:
        raise TypeError(
            f"loss: expected a number or an array of one element, got {type(loss).__name__}"
        ) from exc


def rate_setter(opt: Any, step: int) -> Callable[[float], None]:
    """Return a function that sets the rates of all groups, in the ratio of those at a step."""
    rule = getattr(opt, "rule", None) or getattr(opt, "_rule", None)  # torch's own has none
    if rule is not None and any(state.init == "lr" for state in rule.states):
        name = type(opt).__name__
        raise ValueError(f"lr: {name}'s is what its step sizes begin with; no later step reads it")
    rates = [group["lr"] for group in opt.param_groups]
    now = [float(rate(step)) if callable(rate) else float(rate) for rate in rates]
    most = max(now)
    factors = [rate / most for rate in now] if most > 0 else [1.0] * len(now)

    def set_rate(rate: float) -> None:
        for group, factor in zip(opt.param_groups, factors, strict=True):
            group["lr"] = rate * factor

    return set_rate


def keep_generators(rng: Any) -> Undo:
    """Return what sets generators to the state that they are in."""
    given: Iterable[Any] = rng if isinstance(rng, (list, tuple)) else [rng]
    undo: Undo = []
    for generator in () if rng is None else given:
        if isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            undo.append(("rng", setattr, bits, "state", copy.deepcopy(bits.state)))
            continue
        for get, put in (("get_state", "set_state"), ("getstate", "setstate")):
            if hasattr(generator, get):
                state = getattr(generator, get)()
                undo.append(("rng", getattr(generator, put), state))
                break
        else:
            raise TypeError(f"rng: expected a generator, got {type(generator).__name__}")
    return undo


def _smooth(values: Array, weight: float) -> Array:
    """Return means of the finite values over both sides, with weights ``weight ** distance``."""
    smoothed = np.full(len(values), np.nan)
    known = np.isfinite(values)
    rows = np.stack([values[known], np.ones(known.sum())])
    both = _decayed(rows, weight) + _decayed(rows[:, ::-1], weight)[:, ::-1] - rows
    smoothed[known] = both[0] / both[1]
    return smoothed


def _decayed(rows: Array, weight: float) -> Array:
    """Return running sums of rows that decay by the factor `weight` in each step."""
    sums, total = np.empty_like(rows), np.zeros(len(rows))
    for i in range(rows.shape[1]):
        total = sums[:, i] = weight * total + rows[:, i]
    return sums


def _suggest(
    rates: Array, losses: Array, smoothed: Array, rule: str, diverged: bool
) -> tuple[float | None, str]:
    """Return the rate that a rule chooses, and why; or None and why not."""
    _check.choice(*RULES)("rule", rule)
    known = np.isfinite(smoothed)
    curve, noise = smoothed[known], (losses - smoothed)[known]
    if len(curve) < LEAST:
        where = f"{rates[-1]:.3g}, after {len(curve)} steps"
        return None, f"the loss diverged at {where}: begin with a lower rate"
    end = int(curve.argmin())
    begin = int(curve[: end + 1].argmax())
    fall = curve[begin] - curve[end]
    scatter = float(np.median(np.abs(noise[: end + 1])))  # after the lowest loss it is not noise
    if end == 0 or not fall > max(2 * scatter, 1e-6 * abs(curve[begin])):  # and its rounding
        way_out = (
            "begin with a lower rate" if diverged else "go to higher rates, or take more steps"
        )
        return None, f"the loss did not fall by more than its noise: {way_out}"
    x = np.log(rates[known])
    if rule == "steepest":
        slope = np.gradient(curve, x)
        at = int(slope[begin : end + 1].argmin()) + begin
        if slope[-(len(curve) // 10) :].min() < slope[at] / 2 and not diverged:
            return None, f"the loss still falls at the last rate: sweep beyond {rates[-1]:.3g}"
        return float(rates[known][at]), "the loss falls fastest there"
    if end == len(curve) - 1 and not diverged:
        return None, f"the loss still falls at the last rate: sweep beyond {rates[-1]:.3g}"
    high, low = (
        begin + int(np.argmax(curve[begin : end + 1] <= curve[begin] - share * fall))
        for share in (0.1, 0.9)
    )
    return float(math.exp((x[high] + x[low]) / 2)), "the middle of the fall of the loss"
