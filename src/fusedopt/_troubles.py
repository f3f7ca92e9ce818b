"""What looks wrong in the statistics of a run: a sentence for each cause.

A run is judged by all of its leaves: gradients and updates that all fall, with the loss or with the
schedule, are success. A leaf is reported where it differs from the others, and all of them where
the loss shows a problem. A cause that explains others ends the list, and a leaf is in one sentence.
bench/monitor.py measures how often that is right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt._options import StepStats

History = Any  # of fusedopt.monitor, which imports this module
RATIOS = (1e-5, 1e-1)  # update / parameter, within a factor of 100 of a healthy run's 1e-3
BRISK, LAZY = 1e-2, 5e-4  # the same, where the loss stands still, or still falls
GROWTH = 100.0  # of a gradient's norm, from the first to the last records
APART = 50.0  # between the updates of one leaf and those of the faster ones
INPUTS = (0.03, 100.0)  # gradient of a matrix / of its bias, which is the norm of a layer's inputs
KIND = re.compile(r"(.*?)(\w+)\W*$")  # layer, and what the leaf is in it
BIAS = re.compile(r"(bias|\bb)\W*$")
USUAL = "of its norm (1e-3 is usual)"


@dataclass(eq=False)
class _Leaf:
    """Figures of a leaf; pairs are medians of the first and of the last `window` records."""

    name: str
    grad: tuple[float, float]
    begin: float  # the gradient's norm in the first record
    share: tuple[float, float]  # of the norm of all gradients
    zeros: tuple[float, float]
    alive: bool  # whether the last records have a gradient
    born: bool  # whether any record has
    ratio: float  # update / parameter: median of the records at half of the highest rate or more
    most: float  # 0.9 quantile of all records: a rate may rise from 0 and fall to 0
    large: float  # the larger of the medians of all records and of the last, and its limit
    limit: float
    is_bias: bool  # by its name, or because it began as 0: from there any update is large


@dataclass
class _Run:
    """A run: its leaves with enough records, and its loss."""

    history: History
    leaves: list[_Leaf]
    constant: bool  # whether the run ends with a high rate, or the rate is not known
    # of the loss; NaN, with which comparisons are false, if it is not known for long enough
    start: float = math.nan
    top: float = math.nan
    first: float = math.nan  # 0.9 quantile of the first records
    end: float = math.nan  # median of the last records
    rise: float = math.nan  # of `top` over what is usual at the start and the end, and of that
    usual: float = math.nan
    fall: float = math.nan  # how much it fell while the rate was high
    lately: float = math.nan  # in the last 3/8 of that
    noise: float = math.nan  # of both

    @property
    def learned(self) -> bool:
        """Whether the loss is known to have fallen by half."""
        return self.end < self.start - abs(self.start) / 2

    @property
    def weights(self) -> list[_Leaf]:
        """Leaves whose updates can be compared with their values."""
        return [leaf for leaf in self.leaves if not leaf.is_bias]

    @property
    def pace(self) -> float:
        """Update / parameter of the faster quarter of the leaves."""
        return float(np.quantile([leaf.ratio for leaf in self.weights] or [math.nan], 0.75))


Verdict = tuple[str, list[_Leaf]]  # a sentence and the leaves that it is about
NOTHING: Verdict = ("", [])


def troubles(history: History) -> list[str]:
    """Return what looks wrong, the most important first."""
    run, found = _run(history), []
    for rule, final in RULES.items():
        text, leaves = rule(run)
        if text:
            found.append(f"{_names(leaves, run)}{text}")
            run.leaves = [leaf for leaf in run.leaves if leaf not in leaves]
            if final:
                break
    return found


def _run(history: History) -> _Run:
    window, table = history.window, history._table()
    columns = dict(zip(StepStats.COLUMNS, table, strict=True))
    norms = columns["grad_norm"]
    overall = np.linalg.norm(np.where(np.isfinite(norms), norms, 0), axis=1)
    lr, loss = history.series("lr"), history.series("loss")
    high = np.isnan(lr) | (lr >= np.max(lr, initial=0, where=~np.isnan(lr)) / 2)
    run = _Run(history, [], bool(high[-1:].all()))
    for i, name in enumerate(history.names):
        has = ~np.isnan(columns["zero_fraction"][:, i])  # records in which it had a gradient
        if has.sum() >= window:  # or it is too early to tell
            seen = {column: values[has, i] for column, values in columns.items()}
            run.leaves.append(_leaf(name, seen, overall[has], high[has], window))
    if not run.weights:  # a model that begins as 0 is judged all the same
        for leaf in run.leaves:
            leaf.is_bias = False
    _judge_loss(run, loss, high, window)
    return run


def _leaf(name: str, seen: dict[str, Array], overall: Array, high: Array, window: int) -> _Leaf:
    def ends(values: Array) -> tuple[float, float]:
        return float(np.median(values[:window])), float(np.median(values[-window:]))

    norms, zeros, ratios = seen["grad_norm"], seen["zero_fraction"], seen["update_ratio"]
    from_zero = seen["update_norm"][0] >= 0.99 * seen["param_norm"][0]
    walk = 2 / math.sqrt(len(ratios)) if from_zero else 0  # a step is 1/sqrt(n) of a walk of n
    return _Leaf(
        name,
        grad=ends(norms),
        begin=float(norms[0]),
        share=ends(np.divide(norms, overall, out=np.zeros_like(norms), where=overall > 0)),
        zeros=ends(zeros),
        alive=bool(zeros[-window:].min() < 1),
        born=bool(zeros.min() < 1),
        ratio=float(np.median(ratios[high] if high.any() else ratios)),
        most=float(np.quantile(ratios, 0.9)),
        large=max(ends(ratios)[1], float(np.median(ratios))),
        limit=max(RATIOS[1], walk),
        is_bias=bool(from_zero) or BIAS.search(name) is not None,
    )


def _judge_loss(run: _Run, loss: Array, high: Array, window: int) -> None:
    known = loss[np.isfinite(loss)]
    if known.size:
        smooth = [np.median(known[i : i + 10]) for i in range(len(known) - 9)]
        run.start, run.top = float(known[0]), float(max(smooth or known))
    if len(known) >= window:
        run.first = float(np.quantile(known[:window], 0.9))
        run.end = float(np.median(known[-window:]))
        run.usual = max(run.start, float(np.quantile(known[-window:], 0.9)))
        run.rise = run.top - run.usual
    known = loss[np.isfinite(loss) & high]
    if len(known) >= 2 * window:
        last, middle = known[-window:], max(len(known) * 5 // 8, window)
        run.fall = run.start - float(np.median(last))
        run.lately = float(np.median(known[middle - window : middle]) - np.median(last))
        run.noise = float(np.quantile(last, 0.75) - np.quantile(last, 0.25)) / math.sqrt(window)


def _names(leaves: list[_Leaf], run: _Run) -> str:
    if not leaves:
        return ""
    if len(leaves) == len(run.history.names) > 2:
        return "all leaves: "
    more = f" and {len(leaves) - 2} more" if len(leaves) > 2 else ""
    return ", ".join(leaf.name for leaf in leaves[:2]) + more + ": "


def _broken(run: _Run) -> Verdict:
    found = run.history._broken
    if not found:
        return NOTHING
    (what, leaf), (step, records) = min(found.items(), key=lambda item: item[1][0])
    text = f"{leaf}{leaf and ': '}infinite or NaN {what} in step {step}"
    text += f", and in {records - 1} more" if records > 1 else ""
    others = len({name for _, name in found} - {leaf, ""})
    text += f"; {others} more leaves have such too" if others else ""
    loss = run.history.series("loss")[np.array(run.history.steps) <= step]
    top = float(np.max(loss, initial=-math.inf, where=np.isfinite(loss)))
    if top - run.start > abs(run.start):
        text += f". Before, the loss rose from {run.start:.2g} to {top:.2g}, exploding: "
        text += "lower the learning rate, clip (max_grad_norm), or check the gradients' sign"
    return text, []


def _skipped(run: _Run) -> Verdict:
    skipped = run.history.skips
    total = run.history._taken + skipped
    if skipped * 10 <= total:
        return NOTHING
    return (
        f"{skipped} of {total} steps were skipped because of non-finite gradients: lower the loss "
        "scale or the learning rate"
    ), []


def _diverged(run: _Run) -> Verdict:
    dead = [leaf for leaf in run.leaves if not leaf.alive and leaf.born]
    if run.end - run.first > abs(run.first):
        what = f"the loss rose from {run.start:.2g} to {run.end:.2g}"
    elif run.rise > 2 * abs(run.usual) and (dead or not run.learned):
        what = f"the loss rose from {run.start:.2g} to {run.top:.2g}"
    else:
        return NOTHING
    return what + ": lower the learning rate, or check the gradients' sign", []


def _scale(run: _Run) -> Verdict:
    layers: dict[str, dict[str, _Leaf]] = {}
    for leaf in run.leaves:
        if match := KIND.match(leaf.name.split()[-1]):
            layers.setdefault(match[1], {})[match[2]] = leaf
    pairs = [
        (layer[matrix], layer[bias])
        for matrix, bias in (("W", "b"), ("w", "b"), ("weight", "bias"), ("kernel", "bias"))
        for layer in layers.values()
        if matrix in layer and bias in layer
    ]
    usual = max((bias.begin for _, bias in pairs), default=0)  # before a BatchNorm it is nearly 0
    for matrix, bias in pairs:
        large, small = (matrix.begin / x if x else 1 for x in (usual, bias.begin))
        if large > INPUTS[1] or (0 < small < INPUTS[0] and not run.learned):
            times = large if large > INPUTS[1] else small
            return (
                f"its gradient is {times:.2g} times that of a bias, so wrong scale of the layer's "
                "inputs: bring them to deviations of about 1"
            ), [matrix]
    return NOTHING


def _dead(run: _Run) -> Verdict:
    leaves = [leaf for leaf in run.leaves if not leaf.alive]
    if not leaves or (len(leaves) == len(run.leaves) and run.learned):
        return NOTHING
    text = f"dead: the gradient was 0 everywhere in the last {run.history.window} records"
    if any(leaf.born for leaf in leaves):
        return f"{text}; lower the learning rate", leaves
    return f"{text} and in all before: is it used, is it frozen, do its units ever fire?", leaves


def _exploding(run: _Run) -> Verdict:
    leaves = [x for x in run.leaves if 0 < GROWTH * x.grad[0] < x.grad[1]]
    if not leaves or run.learned:
        return NOTHING
    first, now = max((x.grad for x in leaves), key=lambda grad: grad[1] / grad[0])
    return (
        f"exploding: the gradient's norm grew from {first:.2g} to {now:.2g}; clip it "
        "(max_grad_norm) or lower the learning rate"
    ), leaves


def _vanishing(run: _Run) -> Verdict:
    leaves = [
        x for x in run.leaves
        if x.grad[1] < x.grad[0] / GROWTH and x.share[1] * math.sqrt(GROWTH) < x.share[0]
    ]  # fmt: skip
    if leaves:
        first, now = min((x.grad for x in leaves), key=lambda grad: grad[1] / grad[0])
        return (
            f"vanishing: the gradient's norm fell from {first:.2g} to {now:.2g}, and that of other "
            "leaves did not; lower the learning rate, or normalise between layers"
        ), leaves
    leaves = [leaf for leaf in run.weights if leaf.ratio * APART < run.pace]
    if not leaves:
        return NOTHING
    text = f"at a high rate a step moves it by {min(x.ratio for x in leaves):.1g} of its norm, and "
    text += f"faster leaves by {run.pace:.1g}: "
    if len(leaves) == 1:
        return text + "its gradient vanishes, or its values are of another scale", leaves
    text += "vanishing gradients; use other initial weights or activations, residual connections, "
    return text + "or normalisation", leaves


def _dying(run: _Run) -> Verdict:
    leaves = [x for x in run.leaves if x.zeros[1] > 0.8 and 1 - x.zeros[0] > 3 * (1 - x.zeros[1])]
    if not leaves:
        return NOTHING
    first, now = max((x.zeros for x in leaves), key=lambda zeros: zeros[1])
    return (
        f"dying units: {now:.0%} of the gradient is 0, and {first:.0%} was at first; lower the "
        "learning rate"
    ), leaves


def _fast(run: _Run) -> Verdict:
    leaves = [x for x in run.weights if x.limit < x.large < math.inf]
    if leaves and not run.learned:
        large = max(x.large for x in leaves)
        text = f"every second step, of all or of the last records, moves it by {large:.1g} {USUAL} "
        return text + "or more: too large; lower the learning rate", leaves
    stands = run.lately < 0.05 * abs(run.end) and run.end > run.start * 0.1 and run.constant
    if run.pace > BRISK and stands:
        return (
            f"the loss stands still while a step moves faster leaves by {run.pace:.1g} {USUAL}: "
            "lower the learning rate, or let it decay"
        ), []
    return NOTHING


def _slow(run: _Run) -> Verdict:
    leaves = [x for x in run.weights if x.most < RATIOS[0]]
    if leaves and not run.learned:
        most = max(x.most for x in leaves)
        text = f"9 of 10 steps move it by less than {most:.1g} {USUAL}: "
        return text + "too small; raise the learning rate", leaves
    falls = run.lately > max(2 * run.noise, run.fall / 50) and (
        run.lately > run.fall / 6 or run.lately > abs(run.end) / 5
    )
    stands = run.pace < LAZY / 10 and run.fall < abs(run.start) / 5
    if run.pace < LAZY and (falls or stands):
        what = "still falls" if falls else "hardly fell"
        return (
            f"the loss {what}, and at a high rate a step moves faster leaves by {run.pace:.1g} "
            f"{USUAL}: raise the learning rate, or train for longer"
        ), []
    return NOTHING


# in the order of importance; whether it explains the others
RULES: dict[Callable[[_Run], Verdict], bool] = {
    _broken: True, _skipped: False, _diverged: True, _scale: True, _dead: False, _exploding: False,
    _fast: False, _vanishing: False, _dying: False, _slow: False,
}  # fmt: skip
