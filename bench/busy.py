"""Steps beside busy processes: all threads against one, in turns, on the installed backend.

    python bench/busy.py [--busy 0 1 2 4] [--elements 100_000 1_000_000] [--rounds 40]

Adam, float32, steps back to back. A turn is long enough for others to be scheduled in it. Others
that keep the machine busy, beside those started here, are measured and said.
"""

from __future__ import annotations

import argparse
import time
from statistics import median, quantiles

import numpy as np

import fusedopt
from fusedopt import _core
from fusedopt.bench import machine
from fusedopt.bench.workers import busy_processes


def turn(optimizer: fusedopt.Adam, grads: list[np.ndarray], seconds: float) -> list[float]:
    """Return the microseconds of each step of a turn."""
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        optimizer.step(grads)
        times.append(1e6 * (time.perf_counter() - start))
    return times


def measure(elements: int, busy: int, threads: int, rounds: int, seconds: float) -> list[str]:
    """Return a row of the table."""
    values = np.random.default_rng(0).standard_normal(elements).astype(np.float32)
    grads = [values]
    optimizers = {count: fusedopt.Adam([0.1 * values], threads=count) for count in (1, threads)}
    times: dict[int, list[float]] = {count: [] for count in optimizers}
    ratios = []
    for optimizer in optimizers.values():
        turn(optimizer, grads, seconds)
    late, alone, _ = _core.lateness()
    with busy_processes(busy, []) as pids:
        time.sleep(0.3)

        def used() -> float:
            return sum(map(machine.process_seconds, pids), time.process_time())

        start, all_busy, ours = time.perf_counter(), machine.busy_seconds(), used()
        for number in range(rounds):
            order = list(optimizers)[:: 1 if number % 2 else -1]
            medians = {}
            for count in order:
                steps = turn(optimizers[count], grads, seconds)
                times[count] += steps
                medians[count] = median(steps)
            ratios.append(medians[threads] / medians[1])
        took = time.perf_counter() - start
        strangers = (machine.busy_seconds() - all_busy - used() + ours) / took
    late, alone = _core.lateness()[0] - late, _core.lateness()[1] - alone
    cells = [f"{elements:,}", str(busy), f"{max(0.0, strangers):.1f}"]
    for count in (1, threads):
        cells.append(f"{median(times[count]):.0f} ({quantiles(times[count], n=10)[-1]:.0f})")
    cells.append(f"{median(times[threads]) / median(times[1]):.2f}")
    cells.append(f"{median(ratios):.2f}")
    return [*cells, str(late), f"{alone / len(times[threads]):.2f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--elements", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.05, help="of a turn")
    parser.add_argument("--threads", type=int, default=fusedopt.get_num_threads())
    options = parser.parse_args()
    about = machine.describe()
    print(f"{_core.backend()}, {options.threads} threads, {about['processor']}; us, median (p90)\n")
    header = ["elements", "busy", "CPUs of strangers", "one thread", "all threads", "ratio"]
    header += ["ratio by turn", "late", "share on one thread"]
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for elements in options.elements:
        for busy in options.busy:
            row = measure(elements, busy, options.threads, options.rounds, options.seconds)
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
