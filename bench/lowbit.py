"""The gain from fewer bytes: Adam steps in the narrow formats against float32 steps, in one run.

    python bench/lowbit.py [--elements 50_000_000] [--threads 2] [--markdown FILE]

In cache the time of a step is that of its arithmetic; in memory it is that, or the time of moving
its bytes if longer. From both the last table computes the speed-up at a given memory bandwidth. All
contenders of a table take turns, and ratios are medians over the rounds. Needs ml_dtypes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import ml_dtypes  # noqa: F401 (names bfloat16 to NumPy)
import numpy as np

import fusedopt
from fusedopt import _core
from fusedopt.bench import machine
from fusedopt.bench.contenders.arrays import fastest_stream

BASE, LIMIT = "float32", "the limit"
IN_CACHE = 1 << 16
PER_CORE = (4, 6, 8, 10, 15, 20, 30, 40, 50)  # GB/s: servers have 4 to 10, small clouds 30 to 50


@dataclass(frozen=True)
class Format:
    """The dtype of parameters and gradients, and options of Adam."""

    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)


FORMATS = {
    BASE: Format(),  # the baseline
    "bfloat16 moments": Format(options={"state_dtype": "bfloat16"}),
    "8-bit moments": Format(options={"state_dtype": "int8"}),
    "bfloat16 weights, gradients; 16 more bits": Format("bfloat16", {"master_bits": 32}),
    "bfloat16 weights, gradients; 8 more bits; 8-bit moments": Format(
        "bfloat16", {"master_bits": 24, "state_dtype": "int8"}
    ),
}


class Contender:
    """One parameter of n elements, and its gradient, in a format."""

    def __init__(self, form: Format, n: int) -> None:
        values = np.random.default_rng(0).standard_normal(1 << 16, np.float32).astype(form.dtype)
        self.grads = [np.resize(values, n)]
        self.optimizer = fusedopt.Adam([self.grads[0] * values.dtype.type(0.1)], **form.options)
        self.moved = self.optimizer.memory(self.grads[0].itemsize)["total"]["moved"]

    def step(self) -> None:
        """Step once."""
        self.optimizer.step(self.grads)

    def stream(self, how: int) -> None:
        """Read and write what a step does, and hardly compute."""
        self.optimizer._work.stream(self.grads, how, fusedopt.get_num_threads())


def in_turns(acts: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each act in each round, after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(-2, rounds):
        order = list(acts)
        for name in order if number % 2 else reversed(order):
            start = perf_counter()
            acts[name]()
            if number >= 0:
                seconds[name].append(perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    """Return the median of the quotients of two contenders in a round."""
    return median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def in_cache(rounds: int) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Return the table of steps in cache, and by instruction set the ns of an element."""
    best, repeats = _core.isa(), 10
    contenders = {name: Contender(form, IN_CACHE) for name, form in FORMATS.items()}

    def hot(contender: Contender) -> Callable[[], None]:
        def act() -> None:
            for _ in range(repeats):
                contender.step()

        return act

    times = {}
    for isa in _core.available_isas():
        _core.select_isa(isa)
        times[isa] = in_turns({name: hot(c) for name, c in contenders.items()}, rounds)
    _core.select_isa(best)
    ns = {
        isa: {name: 1e9 * median(column) / repeats / IN_CACHE for name, column in t.items()}
        for isa, t in times.items()
    }
    rows = []
    for name in FORMATS:
        cells = (f"{ratio(times[isa], name, BASE):.2f} ({ns[isa][name]:.2f} ns)" for isa in times)
        rows.append([name, *cells])
    return table(["format", *times], rows), ns


def in_memory(n: int, rounds: int) -> tuple[list[str], float, dict[str, float]]:
    """Return the table of steps in memory, the limit's GB/s and the bytes that formats move."""
    contenders = {name: Contender(form, n) for name, form in FORMATS.items()}
    limit = Contender(FORMATS[BASE], n)
    steps: dict[str, Callable[[], None]] = {name: c.step for name, c in contenders.items()}
    stream = partial(limit.stream, fastest_stream(limit.stream))
    times = in_turns(steps | {LIMIT: stream}, rounds)
    moved = {name: c.moved for name, c in contenders.items()}

    def row(name: str, of: str) -> list[str]:
        rate = moved[of] * n / median(times[name]) / 1e9
        fewer = f"{moved[of] / moved[BASE]:.2f}"
        return [name, f"{moved[of]:.2f}", f"{ratio(times, name, BASE):.2f}", fewer, f"{rate:.0f}"]

    rows = [row(name, name) for name in FORMATS] + [row(LIMIT, BASE)]
    header = ["format", "bytes an element", "ratio", "ratio of bytes", "GB/s"]
    return table(header, rows), moved[BASE] * n / median(times[LIMIT]) / 1e9, moved


def expected(ns: dict[str, float], moved: dict[str, float]) -> list[str]:
    """Return the table of the speed-up over float32 by the bandwidth that a core has."""

    def seconds(name: str, rate: float) -> float:
        return max(ns[name], moved[name] / rate)

    rows = [
        [name, *(f"{seconds(BASE, rate) / seconds(name, rate):.2f}" for rate in PER_CORE)]
        for name in FORMATS
        if name != BASE
    ]
    return table(["format", *(f"{rate} GB/s" for rate in PER_CORE)], rows)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=50_000_000, help="of the steps in memory")
    parser.add_argument("--threads", type=int, default=2, help="of the steps in memory")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--markdown", type=Path, help="also write the output to this file")
    options = parser.parse_args()
    fusedopt.set_num_threads(1)
    cache, ns = in_cache(options.rounds)
    fusedopt.set_num_threads(options.threads)
    memory, rate, moved = in_memory(options.elements, options.rounds)
    about = machine.describe()
    command = " ".join(["python bench/lowbit.py", *sys.argv[1:]])
    lines = [
        "# Steps in narrow formats",
        "",
        "Adam; a ratio is the time of a step over that of a float32 step in the same round, the",
        f"median of {options.rounds} rounds. `{command}`; fusedopt {fusedopt.__version__},",
        f"{about['processor']}.",
        "",
        f"## In cache: {IN_CACHE:,} elements, one thread",
        "",
        *cache,
        f"## In memory: {options.elements:,} elements, {options.threads} threads",
        "",
        *memory,
        "The limit reads and writes the bytes of a float32 step, with hardly any arithmetic:",
        f"{rate:.0f} GB/s.",
        "",
        "## Speed-up over float32 by memory bandwidth",
        "",
        "Computed: an element takes its time in cache, above, or its bytes over the bandwidth that",
        "one core has when all compute, whichever is longer. Servers have 4 to 10 GB/s for a core,",
        "laptops 5 to 20, small cloud machines 30 to 50.",
        "",
    ]
    for isa, times in ns.items():
        lines += [f"{isa}:", "", *expected(times, moved)]
    print(*lines, sep="\n")
    if options.markdown:
        options.markdown.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
