"""Time an Adam step against the memory's limit, torch's fused kernel and in-place NumPy.

    python bench/steps.py [--isa avx2] [--threads 2] [--rounds 41]

All contenders run in one process, in turns of changing order, on arrays of their own; what is
printed is the median of the per-round ratios to the limit, which sees the same machine a moment
before or after. The limit moves the bytes of the step (reads p, g, m, v; writes p, m, v) with
next to no arithmetic. Data of more than the last-level cache is cold in every turn, because the
other contenders' arrays pass between.
"""

from __future__ import annotations

import argparse
import random
import tracemalloc
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np

import fusedopt
from fusedopt import _core

try:
    import torch
except ModuleNotFoundError:
    torch = None  # listed as absent


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of ResNet-50's 161 parameter tensors (He et al., CVPR 2016, table 1)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for conv in (
                (width, inputs, 1, 1),
                (width, width, 3, 3),
                (4 * width, width, 1, 1),
                *([(4 * width, inputs, 1, 1)] if block == 0 else []),
            ):
                shapes += [conv, conv[:1], conv[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


CASES: dict[str, list[tuple[int, ...]]] = {
    "50M in one array": [(50_000_000,)],
    "ResNet-50, 161 arrays": resnet50(),
    "1M in one array": [(1_000_000,)],
    "400 arrays of 250": [(250,)] * 400,
    "1,000 in one array": [(1000,)],
}


def limit(shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """Move the bytes of a step, in C, split over threads as the step is."""
    opt, grads = ours(shapes)
    return lambda: opt._work.stream(grads, fusedopt.get_num_threads())


def ours(shapes: list[tuple[int, ...]]) -> tuple[fusedopt.Adam, list[np.ndarray]]:
    """Return an optimizer and gradients, as a user has them."""
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(s, np.float32) for s in shapes]
    return fusedopt.Adam(params), [rng.standard_normal(s, np.float32) for s in shapes]


def step(shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """Step as a user does."""
    opt, grads = ours(shapes)
    return lambda: opt.step(grads)


def torch_fused(shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """torch.optim.Adam(fused=True)."""
    params = [torch.randn(s, requires_grad=True) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    return torch.optim.Adam(params, fused=True).step


def numpy_in_place(shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """Adam as one writes it in NumPy with care for temporaries: one scratch array for each leaf."""
    rng = np.random.default_rng(0)
    leaves = []
    for shape in shapes:
        p, g = (rng.standard_normal(shape, np.float32) for _ in range(2))
        leaves.append((p, g, np.zeros_like(p), np.zeros_like(p), np.empty_like(p)))
    count = 0

    def update() -> None:
        nonlocal count
        count += 1
        lr, b1, b2, eps = 1e-3, 0.9, 0.999, 1e-8
        rate, root = lr / (1 - b1**count), (1 - b2**count) ** 0.5
        for p, g, m, v, t in leaves:
            m *= b1
            np.multiply(g, 1 - b1, out=t)
            m += t
            v *= b2
            np.multiply(g, g, out=t)
            t *= 1 - b2
            v += t
            np.sqrt(v, out=t)
            t /= root
            t += eps
            np.divide(m, t, out=t)
            t *= rate
            p -= t

    return update


def contenders() -> dict[str, Callable[[list[tuple[int, ...]]], Callable[[], object]]]:
    """By name; the limit first."""
    found = {"limit": limit, "fusedopt": step}
    if torch is not None:
        found["torch fused"] = torch_fused
    return found | {"numpy in place": numpy_in_place}


def measure(shapes: list[tuple[int, ...]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; short steps are repeated within a turn."""
    calls = {name: make(shapes) for name, make in contenders().items()}
    size = sum(int(np.prod(s)) for s in shapes)
    repeats = max(1, 300_000 // max(size, 10_000))
    rounds = rounds if size > 10**6 else 5 * rounds
    if size > 10**7:
        rounds = max(5, rounds // 2)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    order = list(calls)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            calls[name]()  # back in the cache, where it fits
            start = perf_counter()
            for _ in range(repeats):
                calls[name]()
            seconds[name].append((perf_counter() - start) / repeats)
    return seconds


def allocated(shapes: list[tuple[int, ...]]) -> int:
    """Peak bytes that a step allocates through Python and NumPy."""
    opt, grads = ours(shapes)
    opt.step(grads)
    tracemalloc.start()
    opt.step(grads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--isa", default=_core.isa(), choices=_core.available_isas())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--quick", action="store_true", help="small cases only")
    options = parser.parse_args()
    _core.select_isa(options.isa)
    fusedopt.set_num_threads(options.threads)
    if torch is None:
        print("torch: absent")
    else:
        torch.set_num_threads(options.threads)
    print(f"Adam, float32, {options.isa}, {options.threads} threads, {_core.backend()} backend")
    names = list(contenders())
    print(f"{'case':24}{'us/step':>10}{'GB/s':>7}", end="")
    print("".join(f"{n + '/limit':>21}" for n in names[1:])
          + f"{'ours/torch':>12}{'alloc B':>9}")  # fmt: skip
    for case, shapes in CASES.items():
        size = sum(int(np.prod(s)) for s in shapes)
        if options.quick and size > 10**6:
            continue
        seconds = measure(shapes, options.rounds)
        mine = median(seconds["fusedopt"])
        line = f"{case:24}{mine * 1e6:10.1f}{28 * size / mine / 1e9:7.1f}"
        for name in names[1:]:
            ratios = [a / b for a, b in zip(seconds[name], seconds["limit"], strict=True)]
            low, high = np.quantile(ratios, [0.25, 0.75])
            line += f"{median(ratios):8.2f} [{low:.2f} {high:.2f}]".rjust(21)
        if torch is not None:
            pairs = zip(seconds["fusedopt"], seconds["torch fused"], strict=True)
            line += f"{median(a / b for a, b in pairs):12.3f}"
        print(line + f"{allocated(shapes):9}", flush=True)


if __name__ == "__main__":
    main()
