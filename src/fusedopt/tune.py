r"""Find a learning rate: by a sweep over rates, or by the distance that Prodigy estimates.

Both take real steps with your data, and undo them: parameters, state, step counts, options and
generators are the same bits afterwards, whatever happens.

>>> import numpy as np, fusedopt
>>> w, rng = np.zeros(20, np.float32), np.random.default_rng(0)
>>> target = rng.standard_normal(20).astype(np.float32)
>>> def loss_and_grads():
...     error = w - target + 0.1 * rng.standard_normal(20).astype(np.float32)
...     return float(error @ error), 2 * error
>>> opt = fusedopt.SGD(w, lr=0.1)
>>> found = fusedopt.tune.range_test(opt, loss_and_grads, start=1e-5, rng=rng)
>>> 0.01 < found.suggestion < 1, bool(w.any())
(True, False)
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fusedopt import _check, _copies, _picture
from fusedopt._check import Array
from fusedopt.optim.prodigy import Prodigy

__all__ = ["Probe", "RangeTest", "probe", "range_test"]

RULES = ("steepest", "valley")
LEAST = 10  # losses that a suggestion needs
_LOSS = "expected a number or an array of one element"
Undo = list[tuple[Any, ...]]  # see `_copies.undone`


@dataclass(frozen=True, eq=False)
class RangeTest:
    """The losses of a sweep over learning rates, and the rate that they suggest.

    Attributes
    ----------
    rates : array
        Rates that were reached, in rising order; of several groups, the largest of each step.
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


@dataclass(frozen=True, eq=False)
class Probe:
    """What short runs of Prodigy say about the rate of AdamW.

    Attributes
    ----------
    estimates : array
        Prodigy's ``d`` at the end of each run.
    curves : array
        ``d`` after each step: a row for each run.
    suggestion : float or None
        The geometric mean of the estimates, a peak rate for AdamW; None where there is none.
    spread : float
        The largest estimate over the smallest: 1 if all runs agree.
    reason : str
        Why it is that rate, or why there is none.
    """

    estimates: Array
    curves: Array
    suggestion: float | None
    spread: float
    reason: str

    def __repr__(self) -> str:
        """Suggestion, spread and reason."""
        given = "none" if self.suggestion is None else f"{self.suggestion:.3g}"
        return f"Probe(suggestion: {given} for AdamW; {self.reason})"


def range_test(
    opt: Any,
    loss_and_grads: Callable[[], tuple[Any, Any]],
    *,
    start: float = 1e-7,
    stop: float = 10.0,
    steps: int = 100,
    kind: str = "exponential",
    smoothing: float = 0.8,
    divergence: float = 4.0,
    rule: str = "steepest",
    rng: Any = (),
    **step: Any,
) -> RangeTest:
    """Take steps with rising learning rates, undo them, and suggest a rate [1]_.

    Afterwards parameters, state, step counts, options, schedules and generators are as they were,
    bit for bit: also if the callback raises, if Ctrl-C interrupts, and where the loss diverges.

    Parameters
    ----------
    opt : Optimizer
    loss_and_grads : callable()
        Returns the loss of the next batch, a number, and the gradients as `Optimizer.step` takes
        them, at the parameters as they are at that moment.
    start, stop : float
        The first and the last rate. Groups keep the ratios of their rates, those of the next step
        where `lr` is a schedule, and the largest is meant.
    steps : int, default 100
        Number of rates, at least 10.
    kind : {"exponential", "linear"}, default "exponential"
        Whether the rate grows by the same factor or by the same amount in each step.
    smoothing : float in [0, 1), default 0.8
        Weight of a loss in the mean of its next neighbour, on either side; of the one behind that
        its square, and so on.
    divergence : float > 1, default 4
        The sweep stops if the mean of the last losses is larger than this times the lowest such
        mean. (It is the distance from the lowest that counts, as for a positive loss: losses may be
        negative.)
    rule : {"steepest", "valley"}, default "steepest"
        How the rate is chosen; see `RangeTest`.
    rng : generator or sequence of them, optional
        What the callback draws from: `numpy.random.Generator`, `numpy.random.RandomState`,
        `random.Random`, `torch.Generator`. With them a second test gives the same answer.
    **step
        Options of each step, as `max_grad_norm`; see `Optimizer.step`.

    Returns
    -------
    RangeTest

    Raises
    ------
    TypeError, ValueError, MemoryError
        Before the first step, for options; and what callback and steps raise, all undone.
    RuntimeError
        Within a block of `Optimizer.swap_ema`; and naming what could not be undone.

    Notes
    -----
    It keeps a copy of parameters and state meanwhile. No other thread may use the optimizer. What
    the callback changes beside the above, as its place in a list of batches, stays changed.

    References
    ----------
    .. [1] Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, section 3.3.
    """
    sweep = Sweep(start, stop, steps, kind, smoothing, divergence, rule)
    if not callable(loss_and_grads):
        raise TypeError(f"loss_and_grads: expected a callable, got {type(loss_and_grads).__name__}")
    undo = keep_generators(rng)
    if "copy_out" in step:
        more, begin = opt._rehearsal(step["copy_out"])
    else:
        more, begin = opt._rehearsal()
    set_rate = rate_setter(opt, opt.state_dict()["step"] + 1)
    grads = None

    def evaluate() -> float:
        nonlocal grads
        loss, grads = loss_and_grads()
        return number(loss)

    return sweep.run(undo + more, begin, evaluate, set_rate, lambda: opt.step(grads, **step))


class Sweep:
    """The options of a range test, checked; and the test, for arrays and tensors."""

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
        """Return what the losses say; `undo` is done however it ends."""
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
        raise TypeError(f"loss: {_LOSS}, got {type(loss).__name__}") from exc


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
    """Return the running sums of rows in which what is past counts `weight` times in each step."""
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
    scatter = float(np.median(np.abs(noise[: end + 1])))  # behind the lowest it is not noise
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


def probe(
    params: Any,
    loss_and_grads: Callable[[], tuple[Any, Any]],
    *,
    steps: int = 100,
    seeds: int | Sequence[int] = 3,
    rng: np.random.Generator | None = None,
    **step: Any,
) -> Probe:
    """Propose a rate for AdamW by short runs of `Prodigy`, which are undone.

    Prodigy's estimate d takes the place of a learning rate in steps that are otherwise Adam's. Each
    run begins at the parameters as they are, and draws other batches.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `AdamW`.
    loss_and_grads : callable()
        As for `range_test`.
    steps : int, default 100
        Of each run, at least 10.
    seeds : int or sequence of int, default 3
        Number of runs, or the seeds that `rng` gets before each.
    rng : numpy.random.Generator, optional
        What the callback draws from; afterwards as it was. Without it a run goes on with the
        batches where the one before has ended.
    **step
        Options of each step, as `max_grad_norm`.

    Returns
    -------
    Probe

    Raises
    ------
    TypeError, ValueError, MemoryError
        Before the first step, for options; and what callback and steps raise, all undone.
    """
    count = _check.count("steps", steps, least=LEAST)
    if isinstance(seeds, Sequence):
        chosen = [_check.count(f"seeds[{i}]", seed) for i, seed in enumerate(seeds)]
    else:
        chosen = list(range(_check.count("seeds", seeds, least=1)))
    if not chosen:
        raise ValueError("seeds: is empty; a probe takes at least one run")
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: expected a numpy.random.Generator, got {type(rng).__name__}")
    generators = keep_generators(rng)
    curves = []
    for seed in chosen:
        opt = Prodigy(params)
        undo, _ = opt._rehearsal(*([step["copy_out"]] if "copy_out" in step else []))
        run = partial(_run_prodigy, opt, loss_and_grads, count, seed, rng, step)
        curves.append(_copies.undone(generators + undo, run))
    return _judge(np.array(curves))


def _run_prodigy(
    opt: Prodigy,
    loss_and_grads: Callable[[], tuple[Any, Any]],
    steps: int,
    seed: int,
    rng: np.random.Generator | None,
    step: dict[str, Any],
) -> list[float]:
    """Return d after each step; NaN from the first loss on that is not finite."""
    if rng is not None:
        rng.bit_generator.state = type(rng.bit_generator)(seed).state
    curve: list[float] = []
    for _ in range(steps):
        loss, grads = loss_and_grads()
        if not math.isfinite(number(loss)):
            return curve + [math.nan] * (steps - len(curve))
        opt.step(grads, **step)
        curve.append(opt.param_groups[0]["d"])
    return curve


def _judge(curves: Array) -> Probe:
    """Return what the estimates of several runs say."""
    estimates = curves[:, -1]
    first = Prodigy.rule.defaults["d0"]
    if not np.isfinite(estimates).all():
        return Probe(estimates, curves, None, math.nan, "a loss was infinite or NaN")
    spread = float(estimates.max() / estimates.min())
    runs = "1 run" if len(curves) == 1 else f"{len(curves)} runs"
    span = f"{estimates.min():.3g} to {estimates.max():.3g} in {runs} of {curves.shape[1]} steps"
    if (estimates <= first).any():
        reason = f"an estimate never rose above its beginning, {first:g}; take more steps"
        return Probe(estimates, curves, None, spread, f"{reason} ({span})")
    growth = float(np.exp(np.log(estimates / curves[:, curves.shape[1] // 2]).mean()))
    if growth > 2:
        reason = f"it still grows, {growth:.2g} times in the second half; take more steps"
        return Probe(estimates, curves, None, spread, f"{reason} ({span})")
    return Probe(estimates, curves, float(np.exp(np.log(estimates).mean())), spread, span)
