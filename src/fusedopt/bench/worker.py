"""A process that holds contenders and steps them on request: `python -m fusedopt.bench.worker`.

Requests come over a pipe, one at a time, so no two workers run at once. Contenders that can share a
process do; each of the others has a worker of its own, under the same schedule.
"""

from __future__ import annotations

import gc
import math
import os
import random
import sys
import tracemalloc
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from fusedopt import reference
from fusedopt._check import Array
from fusedopt.bench.cases import CLASSES, LAYERWISE, Problem
from fusedopt.bench.contenders import LIMIT, Contender, Row

# Least seconds of a warm turn that are timed, and untimed before that: time for the threads of the
# previous contender to stop spinning, and for those of this one to settle on their CPUs.
TIMED, UNTIMED = 2e-3, 4e-3
LONG = 0.1  # seconds of a step for which a cold start does not matter
_MOST_SHIFT = 4 << 20  # bytes
_OF_A_SAMPLE = 0.05  # learning rates: norms are of the elements that the reference steps
_FIRST_SCALE = -0.5  # of the first step's gradients: equal gradients would hide wrong betas


class Disagreement(Exception):
    """A contender does not compute the update of the reference."""


def build(row: Row, problem: Problem) -> Contender:
    """Set a contender up and let it take two steps, checked against the reference.

    Raises
    ------
    Disagreement
        If it does not compute the same update; gives the difference.
    ValueError
        If it has no such optimizer or dtype.
    """
    if (why := row.lacks(problem)) is not None:
        raise ValueError(f"{row.name}: {why}")
    contender = row.cls(problem, problem.params(), **row.options)
    grads = problem.grads()
    for scale in (_FIRST_SCALE, 1 / _FIRST_SCALE):  # powers of two: nothing is rounded
        for g in grads:
            g *= g.dtype.type(scale)
        contender.load(grads)
        step_once(contender)
    if row.name != LIMIT:
        off = distance(contender.params(), problem)
        allowed = row.tolerance
        if LAYERWISE[problem.optimizer]:
            allowed += _OF_A_SAMPLE
        if not off <= allowed:
            raise Disagreement(
                f"computes a different update: off by {off:.3g} learning rates after two steps "
                f"(allowed: {allowed:g})"
            )
    return contender


def distance(params: list[Array], problem: Problem) -> float:
    """Return the largest difference from the reference after `build`'s steps, in learning rates.

    Compares the first, the last and some random elements of each parameter: a step treats all
    elements alike, so the reference steps only these.
    """
    rng = np.random.default_rng(0)
    ours, start, grad = [], [], []
    for i, (param, shape) in enumerate(zip(params, problem.case.shapes, strict=True)):
        n = math.prod(shape)
        if param.shape != shape or param.dtype != problem.dtype:
            raise Disagreement(f"parameter {i} became {param.dtype}{list(param.shape)}")
        where = np.unique(np.append(rng.integers(0, n, 50), [0, n - 1]))
        ours.append(param.reshape(-1)[where])
        some = problem.some(i, where)
        start.append(some[0])
        grad.append(some[1])
    p, g = np.concatenate(start), np.concatenate(grad)
    plain = getattr(reference, CLASSES[problem.optimizer])(p, **problem.options)
    plain.step(g * g.dtype.type(_FIRST_SCALE))
    plain.step(g)
    return float(np.max(np.abs(np.concatenate(ours) - p)) / plain.param_groups[0]["lr"])


def step_once(contender: Contender) -> float:
    """Take a step; return its seconds."""
    if contender.restore is not None:
        contender.restore()
    start = perf_counter()
    contender.step()
    return perf_counter() - start


def warm_turn(contender: Contender, estimate: float) -> float:
    """Take untimed steps, then timed ones; return the seconds of one.

    `estimate` is about the time of a step: the clock is not read after each short one, and a long
    one is timed without untimed ones before it.
    """
    chunk = math.ceil(TIMED / 4 / estimate)
    for least in (UNTIMED, TIMED)[estimate > LONG :]:
        steps, taken = 0, 0.0
        while taken < least:
            taken += _seconds(contender, chunk)
            steps += chunk
    return taken / steps


def warm_seconds(estimate: float) -> float:
    """Return about how many seconds a warm turn takes."""
    return max(UNTIMED, estimate) * (estimate <= LONG) + max(TIMED, estimate)


def _seconds(contender: Contender, steps: int) -> float:
    if contender.restore is not None:
        return sum(step_once(contender) for _ in range(steps))
    step = contender.step
    start = perf_counter()
    for _ in range(steps):
        step()
    return perf_counter() - start


def estimate(contender: Contender) -> float:
    """Return about how many seconds a step takes."""
    seconds = [step_once(contender)]
    while sum(seconds) < 5e-3 and len(seconds) < 100:
        seconds.append(step_once(contender))
    return float(np.median(seconds))


def temporary_bytes(contender: Contender, traced: bool) -> tuple[int, str]:
    """Return the most temporary bytes that a step holds, and how they were measured.

    By tracemalloc if all is allocated through Python and NumPy; else as the increase of the
    process's peak resident memory, which Linux can reset.
    """
    if traced:
        step_once(contender)
        tracemalloc.start()
        try:
            step_once(contender)
            return tracemalloc.get_traced_memory()[1], "tracemalloc"
        finally:
            tracemalloc.stop()
    return min(_resident_increase(lambda: step_once(contender)) for _ in range(3)), "resident peak"


def _resident_increase(act: Callable[[], object]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _resident("VmRSS")
    act()
    return max(0, _resident("VmHWM") - before)


def _resident(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status: no {entry}")


class Server:
    """Answers messages: (method, arguments) gives ("ok", result) or (kind of fault, text)."""

    def __init__(self) -> None:
        self.held: dict[str, Contender] = {}
        self.shifts: dict[str, Array] = {}
        self.estimates: dict[str, float] = {}
        self.random = random.Random(0)

    def build(self, row: Row, problem: Problem) -> tuple[float, int | None]:
        """Set up and check; return about the seconds of a step, and its `Contender.moved`.

        Before, allocates a block of random size, kept as long as the contender: otherwise one that
        is set up again could get the addresses that it had before.
        """
        size = self.random.randrange(min(problem.held, _MOST_SHIFT)) // 8
        self.shifts[row.name] = np.ones(size)
        contender = self.held[row.name] = build(row, problem)
        self.estimates[row.name] = estimate(contender)
        return self.estimates[row.name], contender.moved()

    def turn(self, name: str, warm: bool) -> float:
        """Return the seconds of a step: a single one, or as in `warm_turn`."""
        if not warm:
            return step_once(self.held[name])
        return warm_turn(self.held[name], self.estimates[name])

    def drop(self, name: str) -> None:
        """Drop a contender."""
        self.held.pop(name, None)
        self.shifts.pop(name, None)

    def collect(self) -> None:
        """Release the memory of dropped contenders."""
        gc.collect()

    def memory(self, row: Row, problem: Problem) -> tuple[int, str, int]:
        """Return the temporary bytes of a step, how they were measured, and the bytes of state."""
        contender = build(row, problem)
        peak, how = temporary_bytes(contender, row.traced)
        return peak, how, contender.state_bytes()


def serve(pipe: Connection) -> None:
    """Answer until the other end is closed."""
    sys.path[:] = pipe.recv()
    server = Server()
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            answer = "ok", getattr(server, method)(*arguments)
        except ImportError as exc:
            answer = "absent", f"{type(exc).__name__}: {exc}"
        except Disagreement as exc:
            answer = "failed", str(exc)
        except Exception as exc:  # libraries may raise anything: it is reported
            answer = "failed", f"{type(exc).__name__}: {exc}"
        pipe.send(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # some libraries hang in their atexit functions
