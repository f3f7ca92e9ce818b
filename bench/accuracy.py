"""Train three small models, and compare held-out losses: of storage formats, or of optimizers.

    python bench/accuracy.py [--seeds 5] [--task embedding] [--format float32] [--markdown FILE]
                             [--json FILE]
    python bench/accuracy.py --optimizer all [--seeds 3] [--task embedding] ...

The first trains with Adam in every storage format, the second with each optimizer in float32.

A format passes a task if its mean loss over the seeds differs from float32's by less than the
standard deviation of float32's loss over the same seeds. All formats see the same initial weights
and the same batches, so the difference is a mean of pairs; its standard error is printed too.
A lower loss is a difference too: a biased second moment acts as another learning rate, and may look
like an improvement.

An optimizer's rate is the best, with seed 0, of a grid of powers of 10 ** 0.5 around its default;
the grid grows while its best rate is at an end. Its other options are the defaults. All follow the
same schedule, those that need none too.

torch computes losses and gradients; fusedopt steps NumPy arrays: pip install ".[test,peers]". The
text is Python's own (pydoc_data.topics), so losses depend on the version of Python.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, stdev
from typing import Any

import ml_dtypes  # noqa: F401 (names bfloat16 to NumPy)
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import fusedopt
from fusedopt import schedules

CLASSES = {cls.__name__.lower(): cls for cls in vars(fusedopt).values() if hasattr(cls, "rule")}
Params = dict[str, np.ndarray]
Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Job = tuple[str, str, int, float | None]


@dataclass(frozen=True)
class Task:
    """A model, its data, and how long and how fast to train it."""

    shapes: dict[str, tuple[int, ...]]  # matrices start random, vectors at zero
    logits: Callable[[Tensors, Tensor], Tensor]
    batch: Callable[[np.random.Generator], Batch]
    held_out: Batch
    steps: int
    lr: float

    def loss(self, params: Tensors, batch: Batch) -> Tensor:
        """Return the mean cross-entropy in nats."""
        x, y = batch
        return F.cross_entropy(self.logits(params, x).flatten(0, -2), y.flatten())

    def init(self, rng: np.random.Generator) -> Params:
        """Return fresh float32 parameters; tables of embeddings have "table" in their names."""
        return {
            name: rng.standard_normal(shape, np.float32)
            * np.float32(0.1 if "table" in name else shape[0] ** -0.5)
            if len(shape) > 1
            else np.zeros(shape, np.float32)
            for name, shape in self.shapes.items()
        }


@cache
def digits() -> Task:
    """Classify scans of 8 x 8 pixels with two hidden layers of 128."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = torch.from_numpy(x[order] / 16).float(), torch.from_numpy(y[order])
    train = len(x) * 3 // 4
    sizes = (64, 128, 128, 10)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        shapes |= {f"w{i}": (inputs, outputs), f"b{i}": (outputs,)}

    def logits(p: Tensors, h: Tensor) -> Tensor:
        h = F.relu(h @ p["w0"] + p["b0"])
        h = F.relu(h @ p["w1"] + p["b1"])
        return h @ p["w2"] + p["b2"]

    def batch(rng: np.random.Generator) -> Batch:
        rows = rng.integers(train, size=64)
        return x[rows], y[rows]

    return Task(shapes, logits, batch, (x[train:], y[train:]), steps=800, lr=2e-3)


def windows(codes: list[int], stretch: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a text into stretches; return those to train on and every tenth, held out."""
    rows = np.array(codes[: len(codes) // stretch * stretch]).reshape(-1, stretch)
    held_out = np.arange(len(rows)) % 10 == 9
    return rows[~held_out], rows[held_out]


def sample(rows: np.ndarray, size: int, length: int, rng: np.random.Generator) -> Tensor:
    """Return `size` runs of `length` neighbours within rows."""
    row = rng.integers(len(rows), size=(size, 1))
    start = rng.integers(rows.shape[1] - length + 1, size=(size, 1))
    return torch.from_numpy(rows[row, start + np.arange(length)])


def text() -> str:
    """Return the text of all topics of Python's help(), about 700 kB."""
    return "\n".join(topics[name] for name in sorted(topics))


@cache
def transformer() -> Task:
    """Predict the next character: two blocks of width 64, four heads, a context of 64."""
    letters = sorted(set(text()))
    number = {letter: i for i, letter in enumerate(letters)}
    train, held_out = windows([number[letter] for letter in text()], stretch=4096)
    context, width, blocks, heads = 64, 64, 2, 4
    shapes: dict[str, tuple[int, ...]] = {
        "table": (len(letters), width),
        "table of positions": (context, width),
        "out": (width, len(letters)),
    }
    for i in range(blocks):
        shapes |= {
            f"qkv{i}": (width, 3 * width),
            f"mix{i}": (width, width),
            f"up{i}": (width, 4 * width),
            f"bias{i}": (4 * width,),
            f"down{i}": (4 * width, width),
        }

    def norm(h: Tensor) -> Tensor:
        return F.layer_norm(h, (width,))

    def logits(p: Tensors, x: Tensor) -> Tensor:
        rows, length = x.shape
        h = p["table"][x] + p["table of positions"][:length]
        for i in range(blocks):
            qkv = (norm(h) @ p[f"qkv{i}"]).view(rows, length, 3, heads, -1)
            mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
            h = h + mixed.transpose(1, 2).flatten(2) @ p[f"mix{i}"]
            h = h + F.gelu(norm(h) @ p[f"up{i}"] + p[f"bias{i}"]) @ p[f"down{i}"]
        return norm(h) @ p["out"]

    def pairs(rows: np.ndarray, size: int, rng: np.random.Generator) -> Batch:
        run = sample(rows, size, context + 1, rng)
        return run[:, :-1], run[:, 1:]

    return Task(
        shapes,
        logits,
        batch=lambda rng: pairs(train, 8, rng),
        held_out=pairs(held_out, 256, np.random.default_rng(0)),
        steps=400,
        lr=4e-3,
    )


@cache
def embedding() -> Task:
    """Predict the next word from four: a step touches at most 256 of the table's 4,096 rows.

    The gradient is dense, and 0 in the other rows, so within a block of state some elements are
    thousands of steps older than others. A row has 48 elements: blocks straddle rows.
    """
    words = re.findall(r"\w+|[^\w\s]", text())
    known = Counter(words).most_common(4095)
    number = {word: i for i, (word, _) in enumerate(known, start=1)}
    train, held_out = windows([number.get(word, 0) for word in words], stretch=512)
    context, width = 4, 48
    shapes: dict[str, tuple[int, ...]] = {
        "table": (4096, width),
        "hidden": (context * width, width),
        "bias": (width,),
        "out": (width, 4096),
        "out bias": (4096,),
    }

    def logits(p: Tensors, x: Tensor) -> Tensor:
        h = torch.tanh(p["table"][x].flatten(1) @ p["hidden"] + p["bias"])
        return h @ p["out"] + p["out bias"]

    def pairs(rows: np.ndarray, size: int, rng: np.random.Generator) -> Batch:
        run = sample(rows, size, context + 1, rng)
        return run[:, :-1], run[:, -1]

    return Task(
        shapes,
        logits,
        batch=lambda rng: pairs(train, 64, rng),
        held_out=pairs(held_out, 2048, np.random.default_rng(0)),
        steps=600,
        lr=4e-3,
    )


TASKS = {f.__name__: f for f in (digits, transformer, embedding)}


@dataclass(frozen=True)
class Format:
    """The dtype of a model's parameters, and options of Adam."""

    dtype: str = "float32"  # of parameters and gradients
    options: dict[str, Any] = field(default_factory=dict)


FORMATS = {
    "float32": Format(),  # the baseline, in the first row
    "bfloat16 moments": Format(options={"state_dtype": "bfloat16"}),
    "8-bit moments": Format(options={"state_dtype": "int8"}),
    "8-bit moments of all sizes": Format(options={"state_dtype": "int8", "min_8bit_size": 0}),
    "bfloat16 weights, 16 more bits": Format("bfloat16"),
    "bfloat16 weights, 8 more bits": Format("bfloat16", {"master_bits": 24}),
    "the same, 8-bit moments": Format("bfloat16", {"master_bits": 24, "state_dtype": "int8"}),
    "bfloat16 weights alone": Format("bfloat16", {"master_bits": 16}),
    "float16 weights alone": Format("float16"),
}


def train(
    task: Task, form: Format, seed: int, cls: Any = fusedopt.Adam, lr: float | None = None
) -> float:
    """Return the held-out loss at the end of training; by default the rate is the task's."""
    rng = np.random.default_rng(seed)
    params = {name: p.astype(form.dtype) for name, p in task.init(rng).items()}
    # a rule for matrices leaves vectors, tables and the last layer to AdamW at the task's rate
    mine = set(params)
    if cls.rule.demand_shape is not None:
        mine = {n for n, p in params.items() if p.ndim == 2 and "table" not in n and "out" not in n}
    parts = [
        ({n: params[n] for n in params if n in mine}, cls, task.lr if lr is None else lr),
        ({n: params[n] for n in params if n not in mine}, fusedopt.AdamW, task.lr),
    ]
    optimizers = []
    for own, kind, peak in parts:
        rate = schedules.warmup(20, then=schedules.linear(peak, 0.0, task.steps - 20))
        if own:
            optimizers.append((own, kind(own, lr=rate, **form.options)))
    for _ in range(task.steps):
        leaves = {name: as_tensor(p).requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(task.loss(leaves, task.batch(rng)), list(leaves.values()))
        found = {n: g.numpy().astype(form.dtype) for n, g in zip(leaves, grads, strict=True)}
        for own, opt in optimizers:
            opt.step({name: found[name] for name in own})
    with torch.no_grad(), ExitStack() as stack:
        for _, opt in optimizers:
            if opt.rule.average is not None:
                stack.enter_context(opt.swap_ema())
        return task.loss({n: as_tensor(p) for n, p in params.items()}, task.held_out).item()


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a float32 tensor: the array's own memory, or a converted copy."""
    return torch.from_numpy(array.astype(np.float32, copy=False))


def run(job: Job) -> float:
    """Return the loss of (task, format or optimizer, seed, rate); called in worker processes."""
    task, name, seed, lr = job
    if name in FORMATS:
        return train(TASKS[task](), FORMATS[name], seed)
    return train(TASKS[task](), Format(), seed, CLASSES[name], lr)


def key(job: Job) -> str:
    """Return the name of a job in the file of losses."""
    return "/".join(str(part) for part in job if part is not None)


def single_thread() -> None:
    """Make a worker process compute on one thread: there are as many workers as cores."""
    torch.set_num_threads(1)
    fusedopt.set_num_threads(1)


OF_FORMATS = """\
# Accuracy of the storage formats

Held-out loss after training with Adam, mean of {} seeds. The difference is
a mean of pairs of the same initial weights and batches, the error its standard error.
"""
OF_OPTIMIZERS = """\
# Accuracy of the optimizers

Held-out loss after training in float32, mean of {} seeds. The rate is the best, with seed 0, of
powers of 10 ** 0.5 around the default; other options are the defaults.
"""


def report_formats(task: str, losses: dict[str, list[float]]) -> list[str]:
    """Return the Markdown table of one task, float32 first."""
    base = losses["float32"]
    spread = stdev(base)
    rows = [
        f"## {task}",
        "",
        f"float32: {mean(base):.4f}, standard deviation over seeds {spread:.4f}.",
        "",
        "| format | loss | minus float32 ± error | less than the spread |",
        "|---|---|---|---|",
    ]
    for name, values in losses.items():
        if name != "float32":
            pairs = [a - b for a, b in zip(values, base, strict=True)]
            error = stdev(pairs) / len(pairs) ** 0.5
            verdict = "yes" if abs(mean(pairs)) < spread else "**no**"
            cells = f"{mean(values):.4f} | {mean(pairs):+.4f} ± {error:.4f} | {verdict}"
            rows.append(f"| {name} | {cells} |")
    return [*rows, ""]


def report_optimizers(task: str, found: dict[str, tuple[float, list[float]]]) -> list[str]:
    """Return the Markdown table of one task, from (rate, losses) of each optimizer, best first."""
    rows = [f"## {task}", "", "| optimizer | rate | loss | over seeds |", "|---|---|---|---|"]
    for name, (lr, losses) in sorted(found.items(), key=lambda item: mean(item[1][1])):
        rows.append(f"| {name} | {lr:.2g} | {mean(losses):.4f} | {stdev(losses):.4f} |")
    return [*rows, ""]


class Losses:
    """The losses of jobs, run by a pool and kept in a file if there is one."""

    def __init__(self, pool: ProcessPoolExecutor, path: Path | None) -> None:
        self.pool, self.path = pool, path
        self.known: dict[str, float] = {}
        if path and path.exists():
            self.known = json.loads(path.read_text())

    def __call__(self, jobs: list[Job]) -> list[float]:
        """Return the loss of each job."""
        missing = [job for job in jobs if key(job) not in self.known]
        for job, loss in zip(missing, self.pool.map(run, missing), strict=True):
            self.known[key(job)] = loss
            if self.path:
                self.path.write_text(json.dumps(self.known, indent=1) + "\n")
        return [self.known[key(job)] for job in jobs]


def tuned(losses: Losses, task: str, name: str) -> float:
    """Return the rate of the grid with the lowest loss with seed 0; NaN counts as infinite."""
    default = CLASSES[name].rule.defaults["lr"]
    low, high = -2, 2
    while True:
        grid = [float(f"{default * 10 ** (k / 2):.3g}") for k in range(low, high + 1)]
        found = losses([(task, name, 0, lr) for lr in grid])
        best = min(
            range(len(grid)), key=lambda i: found[i] if found[i] == found[i] else float("inf")
        )
        if low > -8 and best == 0:
            low -= 1
        elif high < 8 and best == len(grid) - 1:
            high += 1
        else:
            return grid[best]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--task", choices=TASKS, action="append", help="all of them by default")
    parser.add_argument("--format", choices=FORMATS, action="append", help="float32 is always run")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--markdown", type=Path, help="also write the output to this file")
    parser.add_argument("--json", type=Path, help="keep losses here; losses in it are not rerun")
    parser.add_argument("--optimizer", help="all, or names with commas: compare these instead")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: a standard deviation needs at least 2")
    names = list(CLASSES) if options.optimizer == "all" else (options.optimizer or "").split(",")
    if options.optimizer and (unknown := [name for name in names if name not in CLASSES]):
        parser.error(f"--optimizer: unknown: {', '.join(unknown)}; known: {', '.join(CLASSES)}")
    formats = [f for f in FORMATS if f == "float32" or f in (options.format or FORMATS)]
    command = "python " + " ".join(["bench/accuracy.py", *sys.argv[1:]])
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    title = OF_OPTIMIZERS if options.optimizer else OF_FORMATS
    rows = [
        *title.format(options.seeds).splitlines(),
        f"`{command}`; fusedopt {fusedopt.__version__}, {versions}.",
        "",
    ]
    print(*rows, sep="\n")
    with ProcessPoolExecutor(options.jobs, initializer=single_thread) as pool:
        losses = Losses(pool, options.json)
        for task in options.task or TASKS:
            if options.optimizer:
                rates = {name: tuned(losses, task, name) for name in names}
                table = report_optimizers(task, {
                    name: (lr, losses([(task, name, seed, lr) for seed in range(options.seeds)]))
                    for name, lr in rates.items()
                })  # fmt: skip
            else:
                table = report_formats(task, {
                    form: losses([(task, form, seed, None) for seed in range(options.seeds)])
                    for form in formats
                })  # fmt: skip
            rows += table
            print(*table, sep="\n", flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(rows).rstrip() + "\n")


if __name__ == "__main__":
    main()
