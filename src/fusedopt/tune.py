r"""Find a learning rate: by a sweep over rates, or by the distance that Prodigy estimates.

Both take real steps with your data, and undo them: parameters, state, step counts, options and
generators have the same bits afterwards, whatever happens.

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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fusedopt import _check, _copies
from fusedopt._check import Array
from fusedopt._sweep import LEAST, RULES, RangeTest, Sweep, keep_generators, number, rate_setter
from fusedopt.optim.prodigy import Prodigy

__all__ = ["RULES", "Probe", "RangeTest", "probe", "range_test"]


@dataclass(frozen=True, eq=False)
class Probe:
    """The rate of AdamW that short runs of Prodigy suggest.

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
        The first and the last rate. Groups keep the ratios of their rates (of those of the next
        step where `lr` is a schedule); these are the largest of the groups.
    steps : int, default 100
        Number of rates, at least 10.
    kind : {"exponential", "linear"}, default "exponential"
        Whether the rate grows by the same factor or by the same amount in each step.
    smoothing : float in [0, 1), default 0.8
        Weight of a loss in the mean of its next neighbour, on either side; its square for the
        neighbour after that, and so on.
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
        Options of each step, such as `max_grad_norm`; see `Optimizer.step`.

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
    if not hasattr(opt, "_rehearsal"):
        raise TypeError(f"opt: expected an optimizer of fusedopt, got {type(opt).__name__}")
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
        The generator that the callback draws from; restored at the end. Without it each run
        continues with the batches where the previous run ended.
    **step
        Options of each step, such as `max_grad_norm`.

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
    """Return the suggestion of several runs' estimates."""
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
