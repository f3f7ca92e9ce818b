"""Train small networks, healthy and sick, and compare what `History.troubles` says with the truth.

    python bench/monitor.py [--seeds 5] [--markdown FILE]

A sentence is right if it is the first with the words of the run's cause. Precision is the share of
sentences that are right, recall that of sick runs whose cause is found; healthy ones deserve none.
tests/test_monitor.py runs the table with other seeds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fusedopt
from fusedopt import schedules
from fusedopt.cli.model import softmax_loss
from fusedopt.monitor import History

Params = dict[str, dict[str, np.ndarray]]
STEPS, INPUTS, HIDDEN, CLASSES, WORDS = 300, 16, 32, 8, 400


@dataclass(frozen=True)
class Run:
    """One training: what is wrong with it, as a pattern of the sentence, and how it is made."""

    cause: str | None
    make: Callable[[Params], Any]
    depth: int = 3
    sigmoid: bool = False
    gain: float = 1.0  # of all initial weights, times those of He et al. or Glorot
    bias: float = 0.0  # of hidden layers, at first
    centred: bool = False  # hidden layers lose their mean over the batch, as in BatchNorm
    scale: float = 1.0  # of the inputs
    spread: float = 1.0  # of the noise beside the classes' means
    words: float = 0.0  # deviation of an embedding that stands for the inputs; 0: there is none
    sparse: bool = False  # inputs are counts of a few of many words
    batch: int = 32
    steps: int = STEPS
    drift: float = 0.0  # is added to the gradients of the biases of hidden layers
    frozen: str = ""  # a layer whose gradients are 0
    broken: int = 0  # the step from which on a gradient holds NaN
    trained: bool = False  # it begins with the weights of another run
    overflow: int = 0  # every so many steps the loss scale is too large
    options: tuple[tuple[str, Any], ...] = ()  # of every step


def adam(lr: Any = 3e-3, **options: Any) -> Callable[[Params], Any]:
    return lambda params: fusedopt.AdamW(params, lr=lr, **options)


def sgd(lr: Any = 0.05, momentum: float = 0.9, **options: Any) -> Callable[[Params], Any]:
    return lambda params: fusedopt.SGD(params, lr=lr, momentum=momentum, **options)


COSINE, CYCLE = schedules.cosine(1.0, STEPS), schedules.one_cycle(1.0, STEPS)
WARM = schedules.warmup(50, schedules.constant(1.0))
SKIP = (("nonfinite", "skip"),)
FAST, SLOW = "lower the learning rate", "raise the learning rate"
RUNS = {
    "sgd, momentum, to zero": Run(None, sgd(lambda t: 0.1 * COSINE(t))),
    "sgd, constant": Run(None, sgd(0.02)),
    "adamw, cosine to zero": Run(None, adam(lambda t: 3e-3 * COSINE(t), weight_decay=0.1)),
    "adam, one cycle": Run(None, adam(lambda t: 5e-3 * CYCLE(t))),
    "warmup, then constant": Run(None, adam(lambda t: 3e-3 * WARM(t))),
    "converged long ago": Run(None, adam(3e-3), spread=0.3, steps=1500),
    "converged, gd": Run(None, sgd(0.3, 0.0), spread=0.1, steps=1500, batch=64),
    "large batch": Run(None, adam(3e-3), batch=256),
    "8-bit state": Run(None, adam(3e-3, state_dtype="int8")),
    "clip in every step": Run(None, sgd(0.2), options=(("max_grad_norm", 0.2),)),
    "lion": Run(None, lambda p: fusedopt.Lion(p, lr=lambda t: 1e-3 * COSINE(t))),
    "noisy": Run(None, adam(3e-3), spread=6.0),
    "fine-tuning, a tenth of the rate": Run(None, adam(3e-4), trained=True),
    "few skipped steps": Run(None, adam(3e-3), overflow=60, options=SKIP),
    "embedding": Run(None, adam(3e-3), words=0.1),
    "counts of words": Run(None, adam(3e-3), sparse=True, steps=600),
    "deep": Run(None, adam(1e-3), depth=10),
    "biases without an effect": Run(None, adam(3e-3), centred=True),
    "the same, sgd": Run(None, sgd(0.05), centred=True, bias=0.1),
    "lamb": Run(None, lambda p: fusedopt.LAMB(p, lr=lambda t: 2e-2 * COSINE(t))),
    "schedule-free": Run(None, lambda p: fusedopt.ScheduleFreeAdamW(p, lr=5e-3)),
    "dead units": Run("dead", adam(3e-3), bias=-30.0),
    "units that die": Run("dead|dying", sgd(0.05, 0.0), drift=0.3, steps=600),
    "exploding with depth": Run("exploding|" + FAST, sgd(0.05), depth=10, gain=3.0),
    "vanishing with depth": Run("vanish", sgd(0.05), depth=8, sigmoid=True),
    "sgd, rate 10 times too high": Run(FAST, sgd(1.0, 0.9)),
    "adam, rate 10 times too high": Run(FAST, adam(1e-1)),
    "adam, rate 100 times too high": Run(FAST, adam(1.0)),
    "sgd, rate 40 times too high": Run(FAST, sgd(2.0)),
    "sigmoids, rate too high": Run(FAST, adam(0.1), sigmoid=True, spread=6.0),
    "sgd, rate 10 times too low": Run(SLOW, sgd(1e-3, 0.0)),
    "adam, rate 10 times too low": Run(SLOW, adam(1e-4)),
    "adam, rate 10,000 times too low": Run(SLOW, adam(1e-7)),
    "inputs times 1,000": Run("scale of", sgd(1e-4), scale=1e3),
    "inputs / 1,000": Run("scale of", sgd(0.05), scale=1e-3),
    "frozen layer": Run("dense2.*frozen", adam(3e-3), frozen="dense2"),
    "NaN": Run("NaN", adam(3e-3), broken=100),
    "embedding not normalised": Run("scale of", adam(3e-3), words=100.0),
    "gradient ascent": Run("sign", sgd(0.01, maximize=True)),
    "loss scale too large": Run("skipped", adam(3e-3), overflow=2, options=SKIP),
}


def initial(run: Run, rng: np.random.Generator) -> Params:
    inputs = WORDS if run.sparse else INPUTS
    sizes = [inputs, *[HIDDEN] * (run.depth - 1), CLASSES]
    params: Params = {}
    if run.words:
        table = run.words * rng.standard_normal((WORDS, INPUTS))
        params["embedding"] = {"W": table.astype(np.float32)}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
        weights = rng.standard_normal((a, b)) * run.gain * np.sqrt(2 / (a + b * run.sigmoid))
        bias = np.full(b, run.bias if b == HIDDEN else 0.0, np.float32)
        params[f"dense{i}"] = {"W": weights.astype(np.float32), "b": bias}
    return params


def gradients(run: Run, params: Params, data: Any, y: np.ndarray) -> tuple[float, Params]:
    """Return loss and gradients of a batch; `data` are inputs, or words of each row."""
    table = params.get("embedding")
    outputs = [data if table is None else table["W"][data].mean(axis=1)]
    layers = [name for name in params if name != "embedding"]
    for name in layers:
        z = outputs[-1] @ params[name]["W"] + params[name]["b"]
        if name != layers[-1]:
            z = z - z.mean(axis=0) if run.centred else z
            z = 1 / (1 + np.exp(-z)) if run.sigmoid else np.maximum(z, 0)
        outputs.append(z)
    loss, delta = softmax_loss(outputs[-1], y)
    grads: Params = {}
    for name, below in zip(reversed(layers), outputs[-2::-1], strict=True):
        if run.centred and name != layers[-1]:
            delta = delta - delta.mean(axis=0)
        grads[name] = {"W": below.T @ delta, "b": delta.sum(axis=0)}
        slope = below * (1 - below) if run.sigmoid else below > 0
        delta = (delta @ params[name]["W"].T) * (1 if name == layers[0] else slope)
    if table is not None:
        grads["embedding"] = {"W": np.zeros_like(table["W"])}
        np.add.at(grads["embedding"]["W"], data, (delta / data.shape[1])[:, None, :])
    return loss, grads


def train(run: Run, seed: int, every: int = 1) -> History:
    rng = np.random.default_rng(seed)
    params, history = initial(run, rng), History(every=every)
    means = 1.5 * rng.standard_normal((CLASSES, INPUTS))
    likely = rng.dirichlet(np.full(WORDS, 0.05), CLASSES)  # words of each class
    opt = (adam() if run.trained else run.make)(params)
    for step in range(1 - STEPS * run.trained, run.steps + 1):
        if step == 1 and run.trained:
            opt = run.make(params)
        y = rng.integers(0, CLASSES, run.batch)
        if run.words or run.sparse:
            data = np.array([rng.choice(WORDS, 8, p=likely[label]) for label in y])
            if run.sparse:
                data = np.stack([np.bincount(row, minlength=WORDS) for row in data])
                data = data.astype(np.float32)
        else:
            noise = run.spread * rng.standard_normal((run.batch, INPUTS))
            data = (run.scale * (means[y] + noise)).astype(np.float32)
        loss, grads = gradients(run, params, data, y)
        for name in list(grads)[1:] if run.drift else ():
            grads[name]["b"] += run.drift
        for grad in grads.get(run.frozen, {}).values():
            grad[...] = 0
        if run.broken and step >= run.broken:
            grads["dense2"]["W"][0, 0] = np.nan
        if run.overflow and step % run.overflow == 0:
            grads["dense3"]["b"][0] = np.inf
        if step < 1:
            opt.step(grads)
            continue
        result = opt.step(grads, stats=history.due, **dict(run.options))
        rate = opt.param_groups[0]["lr"]
        history.record(result, loss=loss, lr=rate(result.step) if callable(rate) else rate)
    return history


def judge(name: str, seed: int) -> tuple[list[str], list[str]]:
    """Return the sentences about a run that are right, and the others."""
    run = RUNS[name]
    with np.errstate(all="ignore"):
        said = train(run, seed).troubles()
    right = [text for text in said if run.cause and re.search(run.cause, text)][:1]
    return right, [text for text in said if text not in right]


def figures(seeds: range) -> tuple[float, float, str]:
    """Return precision, recall, and the table."""
    right = wrong = sick = found = 0
    lines = []
    for name, run in RUNS.items():
        verdicts = [judge(name, seed) for seed in seeds]
        right += sum(len(a) for a, _ in verdicts)
        wrong += sum(len(b) for _, b in verdicts)
        if run.cause:
            sick += len(seeds)
            found += sum(bool(a) for a, _ in verdicts)
        hits = sum(bool(a) if run.cause else not b for a, b in verdicts)
        extra = sum(len(b) for _, b in verdicts)
        sample = "; ".join(sum(verdicts[0], []))
        lines.append(f"| {name} | {hits} of {len(seeds)} | {extra} | {sample} |")
    return right / (right + wrong), found / sick, "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    precision, recall, table = figures(range(100, 100 + options.seeds))
    text = f"""\
# What `History.troubles` says

`python bench/monitor.py`: {len(RUNS)} trainings of small networks, each with {options.seeds} seeds.

* Precision {precision:.3f}: the share of sentences that name the cause, once.
* Recall {recall:.3f}: the share of sick runs whose cause is named.
* A healthy run is right without a sentence.
* The limits were chosen on the same trainings with other seeds: on other networks expect less.

| run | right | wrong sentences | with the first seed |
|---|---|---|---|
{table}
"""
    if options.markdown:
        options.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
