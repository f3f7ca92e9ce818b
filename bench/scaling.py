"""What a step costs by size, format, threads and ranks, beside what a simple model predicts.

    python bench/scaling.py [--most 6e9] [--rounds 9] [--only sizes formats ranks hosts]

Prints the tables of docs/scaling.md. The model has three numbers of this machine: what a step takes
on a handful of elements, what an element takes in cache, and how fast the memory streams the bytes
of a step (`fo_stream`). Each is measured once, and all else predicted; of ranks also what an
element takes to travel. All times are of the fastest of some turns. Ranks are started by mpiexec,
and need mpi4py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fusedopt
from fusedopt import _core
from fusedopt.bench import machine

TURN = 0.02  # seconds, or one call
MOST_LEAF = 1 << 26  # elements: larger models have several leaves
ALONE = 30_000  # below, steps run on one thread (threads.c)


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the time of a call in the fastest of some turns: others only make turns slower."""
    call()
    found = []
    for _ in range(rounds):
        count, begin = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - begin < TURN:
            call()
            count += 1
        found.append((time.perf_counter() - begin) / count)
    return min(found)


class Model:
    """An optimizer of n elements, with gradients."""

    def __init__(self, n: int, cls: str = "AdamW", threads: int = 1, **options: Any) -> None:
        """Make the arrays."""
        bits = options.pop("bits", None)
        sizes = [MOST_LEAF] * (n // MOST_LEAF) + [n % MOST_LEAF] * (n % MOST_LEAF > 0)
        dtype: Any = np.float32
        if bits is not None:
            import ml_dtypes

            dtype, options["master_bits"] = ml_dtypes.bfloat16, bits
        self.params = [np.full(size, 0.5, dtype) for size in sizes]
        self.grads = [np.full(size, 0.25, dtype) for size in sizes]
        self.n, self.threads = n, threads
        self.opt = getattr(fusedopt, cls)(self.params, threads=threads, **options)
        moved = self.opt.memory(self.grads[0].itemsize)["total"]
        self.bytes, self.resident = moved["moved"], moved["resident"]
        self.held = self.resident + self.grads[0].itemsize

    def step(self) -> None:
        """Take a step."""
        self.opt.step(self.grads)

    def stream_rate(self, rounds: int) -> float:
        """Return the bytes a second of the fastest stream of what a step reads and writes."""
        stream = self.opt._work.stream
        times = [
            seconds(lambda how=how: stream(self.grads, how, self.threads), rounds)  # type: ignore[misc]
            for how in range(_core.STREAMS)
        ]
        return self.n * self.bytes / min(times)


class Machine:
    """The three numbers, of AdamW in float32."""

    def __init__(self, threads: list[int], large: int, rounds: int) -> None:
        """Measure them."""
        self.overhead = seconds(Model(8).step, rounds)
        self.cache = machine.last_level_cache()
        in_cache = Model(1 << 14)  # 448 KiB: in the second level
        self.element = (seconds(in_cache.step, rounds) - self.overhead) / in_cache.n
        self.rates = {count: Model(large, threads=count).stream_rate(rounds) for count in threads}

    def predicted(
        self, n: int, per: float, held: float, threads: int, element: float | None = None
    ) -> float:
        """Return the seconds of a step of n elements, by the bytes that it moves and holds."""
        element = self.element if element is None else element
        compute = n * element / (threads if n >= ALONE else 1)
        from_memory = n * per / self.rates[threads] if n * held > self.cache else 0.0
        return self.overhead + max(compute, from_memory)


def row(*cells: object) -> None:
    """Print a row of a table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*cells: str) -> None:
    """Print the head of a table."""
    print()
    row(*cells)
    print("|---" * len(cells) + "|")


def shown(value: float) -> str:
    """Return a time with its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError


def compare(measured: float, predicted: float) -> list[str]:
    """Return the cells of both."""
    return [shown(measured), shown(predicted), f"{measured / predicted:.2f}"]


def by_size(about: Machine, threads: list[int], most: float, rounds: int) -> None:
    """Print the cost from a thousand elements to the memory's end."""
    head("elements", *(f"{t} thread{'s' * (t > 1)}, predicted, ratio" for t in threads), "ns each")
    n = 1000
    sizes = []
    while 16 * n <= most:
        sizes.append(n)
        n *= 4
    for n in [*sizes, int(most / 16)]:
        cells, last = [], 0.0
        for count in threads:
            model = Model(n, threads=count)
            last = seconds(model.step, rounds if n < 10**8 else 3)
            cells.append(
                ", ".join(compare(last, about.predicted(n, model.bytes, model.held, count)))
            )
            del model
        row(f"{n:,}", *cells, f"{1e9 * last / n:.3g}")


FORMATS: list[tuple[str, str, dict[str, Any]]] = [
    ("SGD", "float32, no momentum", {"lr": 0.1}),
    ("SGD", "float32", {"lr": 0.1, "momentum": 0.9}),
    ("Lion", "float32", {}),
    ("AdamW", "float32", {}),
    ("AdamW", "float32 parameters, bfloat16 moments", {"state_dtype": "bfloat16"}),
    ("AdamW", "float32 parameters, 8-bit moments", {"state_dtype": "int8"}),
    ("AdamW", "bfloat16 parameters and 16 bits, float32 moments", {"bits": 32}),
    ("AdamW", "bfloat16 parameters and 8 bits, 8-bit moments", {"bits": 24, "state_dtype": "int8"}),
    ("AdamW", "float32 and an average (ema)", {"ema": 0.999}),
]


def by_format(about: Machine, threads: int, large: int, rounds: int) -> None:
    """Print the cost by rule and format."""
    head("rule", "kept in", "bytes kept", "bytes moved", "measured", "predicted", "ratio")
    for cls, name, options in FORMATS:
        small = Model(1 << 14, cls, **options)
        element = (seconds(small.step, rounds) - about.overhead) / small.n
        model = Model(large, cls, threads, **options)
        measured = 1e9 * seconds(model.step, rounds) / large
        took = about.predicted(large, model.bytes, model.held, threads, element)
        predicted = 1e9 * took / large
        kept = f"{model.resident:.2f}", f"{model.bytes:.2f}"
        times = f"{measured:.3f} ns", f"{predicted:.3f} ns", f"{measured / predicted:.2f}"
        row(cls, name, *kept, *times)
        del model


# ------------------------------------------------------------------ ranks


def rank_turn(sizes: list[int], rounds: int) -> None:
    """Be a rank: measure steps of several sizes, and what travel alone takes."""
    from mpi4py import MPI

    from fusedopt.mpi import Sharded

    comm = MPI.COMM_WORLD
    for n in sizes:
        params = [np.full(n, 0.5, np.float32)]
        grads = [np.full(n, 0.25, np.float32)]
        opt = Sharded(fusedopt.AdamW, params, comm)
        times: dict[str, list[float]] = {"step": [], "travel": []}
        total = opt._spread.sums(list(grads))
        own = [opt._part(0, params[0])]
        for turn in range(rounds + 1):
            for name in times:
                comm.Barrier()
                begin = time.perf_counter()
                if name == "step":
                    opt.step(grads)
                elif comm.size > 1:
                    opt._spread.mover.add([grads[0]], total, "")
                    opt._spread.mover.gather([own[0]], [params[0]])
                comm.Barrier()
                if turn:
                    times[name].append(time.perf_counter() - begin)
        if comm.rank == 0:
            found: dict[str, float] = {name: min(its) for name, its in times.items()}
            print(json.dumps(found | {"n": n}), flush=True)


def by_ranks(about: Machine, threads: list[int], large: int, rounds: int) -> None:
    """Print the cost on some ranks of this machine, which share its memory."""
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        print("\nno mpiexec: pip install mpi4py mpich")
        return
    head("ranks", "elements", "step", "predicted", "ratio", "its travel")
    sizes = [large // 16, large // 4, large]
    for count in threads:
        command = [mpiexec, "-n", str(count), sys.executable, __file__, "--rank", *map(str, sizes)]
        done = subprocess.run(
            [*command, "--rounds", str(rounds)],
            env=os.environ | {"FUSEDOPT_NUM_THREADS": "1"},
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found = [json.loads(line) for line in done.stdout.splitlines()]
        travel = found[-1]["travel"] / found[-1]["n"]  # of an element; all else follows from it
        for its in found:
            n = its["n"]
            step = about.predicted(n, 28, 16, count)
            predicted = step + n * travel
            row(count, f"{n:,}", *compare(its["step"], predicted), shown(its["travel"]))


# ------------------------------------------------------------------ computed, not measured


def computed(memory: float, network: float) -> None:
    """Print what 70e9 parameters would take on hosts of a memory and a network, in bytes/s."""
    n = 70e9
    head("kept in", "hosts", "GB on each host", "step alone", "travel", "together")
    for name, param, grad, state, moved in (
        ("float32", 4, 4, 8.0, 28.0),
        ("bfloat16 and 8 bits, 8-bit moments", 2, 2, 1 + 2 * (1 + 1 / 64), 12.0625),
    ):
        for hosts in (1, 8, 64):
            kept = n * (param + grad + state / hosts) / 1e9
            step = n * moved / hosts / memory
            travel = n * (grad + param) * (hosts - 1) / hosts / network
            row(name, hosts, f"{kept:,.0f}", shown(step), shown(travel), shown(step + travel))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--most", type=float, default=6e9, help="bytes of the largest model")
    parser.add_argument("--large", type=int, default=1 << 25, help="elements where memory limits")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", type=float, default=300e9, help="computed hosts, bytes/s")
    parser.add_argument("--network", type=float, default=25e9, help="computed hosts, bytes/s")
    tables = ["sizes", "formats", "ranks", "hosts"]
    parser.add_argument("--only", nargs="+", choices=tables, default=tables)
    parser.add_argument("--rank", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_turn(options.rank, options.rounds)
        return
    about = machine.describe()
    threads = sorted({1, fusedopt.get_num_threads()})
    print(f"{about['processor']}, {_core.isa()}, last cache {about['last cache']}")
    known = Machine(threads, options.large, options.rounds)
    rates = ", ".join(f"{rate / 1e9:.1f} ({t})" for t, rate in known.rates.items())
    print(f"a step {1e6 * known.overhead:.2f} us, an element {1e9 * known.element:.3f} ns, "
          f"GB/s (threads) {rates}")  # fmt: skip
    if "sizes" in options.only:
        most = min(options.most, 0.5 * (machine.available_memory() or 4e9))
        by_size(known, threads, most, options.rounds)
    if "formats" in options.only:
        by_format(known, threads[-1], options.large, options.rounds)
    if "ranks" in options.only:
        by_ranks(known, threads, options.large, options.rounds)
    if "hosts" in options.only:
        computed(options.memory, options.network)


if __name__ == "__main__":
    main()
