"""The schedule: contenders take turns in random order, round after round, on the same machine.

A round holds one turn of every contender that takes part in it. A contender's time is compared
with fusedopt's in the same round, so that other load on the machine affects both. Slow contenders
take part in few rounds, evenly spread, and have their turns before or after the others: large
ratios need no third digit, and small ones need turns close to one another.

Warm: a turn is some untimed steps, then some timed ones. Cold: the caches are emptied before each
turn, which is one step. Arrays much larger than the caches are always cold.

The addresses of arrays decide how they share the sets of a cache, and make the same step some
percent faster or slower as long as the arrays stay there. So small cases are measured on several
placements: contenders are dropped and set up again between rounds.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fusedopt.bench import machine, stats
from fusedopt.bench.cases import Case, Problem
from fusedopt.bench.contenders import AGAIN, LIMIT, OURS, Row
from fusedopt.bench.recording import Entry, Memory, Recording
from fusedopt.bench.worker import warm_seconds
from fusedopt.bench.workers import Failure, Workers

ALWAYS = (LIMIT, OURS, AGAIN)  # in every round, and in every group that shares the memory
_SLOW = 4  # times as long as fusedopt
_PAUSE = 3e-3  # seconds before a cold step that needs no emptying of caches
_PATIENCE = 1.5  # times the planned time, until which disturbed rounds are repeated
_SMALL, _LARGE = 64 << 20, 512 << 20  # bytes held: above the first fewer placements, then one
_QUICK_TO_BUILD = 0.25  # seconds, plus 5 ns a byte; slower ones (compilers) are set up once
_OVERHEAD = 1 << 30  # bytes that libraries and the evictor take

Progress = Callable[[str, float], None]  # the current activity; the share of an entry just done


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Contenders that are not slow get `seconds` for each case and state of the caches, without setup,
    in at least `least` and at most `most` rounds. Slow ones take part in `least` rounds. Small
    cases are measured on several `placements`, beside `busy` processes that only keep CPUs busy.
    """

    optimizer: str = "adam"
    dtype: str = "float32"
    seconds: float = 6.0
    least: int = 5
    most: int = 100
    placements: int = 10
    busy: int = 0
    seed: int = 0


def needed(row: Row, problem: Problem) -> int:
    """Return the bytes that a contender takes at its peak."""
    return int(problem.held + row.temporaries * problem.case.elements * problem.itemsize)


def teams(
    rows: Sequence[Row], problem: Problem, budget: float
) -> tuple[list[list[Row]], dict[str, str]]:
    """Divide contenders into teams that fit into `budget` bytes, each with those of `ALWAYS`.

    Returns the teams (none if not even the first fits), and why each remaining contender is in no
    team. `AGAIN` is left out if a peer would not fit beside it.
    """
    size_of = {row.name: needed(row, problem) for row in rows}
    setting_up = 2 * problem.case.elements * problem.itemsize  # initial values, during setup
    least = _OVERHEAD + setting_up + sum(size_of[name] for name in (LIMIT, OURS))
    peers = [size for name, size in size_of.items() if name not in ALWAYS]
    again = AGAIN in size_of and least + size_of[AGAIN] + min(peers, default=0) <= budget
    too_large = {} if again else {AGAIN: "leaves no memory for others"}
    rows = [row for row in rows if again or row.name != AGAIN]
    always = [row for row in rows if row.name in ALWAYS]
    base = least + again * size_of.get(AGAIN, 0)
    used, members = base, [list(always)]
    for row in rows:
        size = size_of[row.name]
        total = base + size * (row not in always)
        if total > budget:
            too_large[row.name] = (
                f"needs {total / 1e9:.1f} GB of memory, {budget / 1e9:.1f} GB are free"
            )
        elif row not in always:
            if used + size > budget:
                members.append(list(always))
                used = base
            members[-1].append(row)
            used += size
    return ([] if base > budget else members), too_large


def streams(problem: Problem) -> bool:
    """Return whether the arrays are so much larger than the caches that every step is cold."""
    return problem.held >= 2 * machine.last_level_cache()


class Session:
    """The contenders of one problem, set up in their workers."""

    def __init__(self, workers: Workers, problem: Problem, absent: dict[str, str]) -> None:
        self.workers, self.problem, self.absent = workers, problem, absent
        self.rows: dict[str, Row] = {}
        self.step_seconds: dict[str, float] = {}  # estimates, to plan with
        self.quick_to_build: set[str] = set()
        self.moved: dict[str, int] = {}  # bytes of a step, if they are not the problem's
        self.lost: dict[str, str] = {}  # contenders that failed here -> why

    def build(self, row: Row) -> None:
        """Set a contender up and check it, unless it is there or known to be absent."""
        if row.name in self.rows or row.name in self.absent:
            return
        start = time.perf_counter()
        try:
            answer = self.workers.ask(row, "build", row, self.problem)
            self.step_seconds[row.name], moved = answer
            self.rows[row.name] = row
            if moved is not None:
                self.moved[row.name] = moved
            if time.perf_counter() - start < _QUICK_TO_BUILD + 5e-9 * self.problem.held:
                self.quick_to_build.add(row.name)
        except Failure as exc:
            self.fail(row, exc)

    def turn(self, name: str, warm: bool) -> float | None:
        """Return the seconds of a step, None if the contender failed."""
        row = self.rows.get(name)
        if row is None:
            return None
        try:
            seconds: float = self.workers.ask(row, "turn", name, warm)
            return seconds
        except Failure as exc:
            self.fail(row, exc)
            return None

    def drop(self, names: Iterable[str], collect: bool = True) -> None:
        """Drop some contenders; `collect` releases their memory at once, which takes a while."""
        rows = [self.rows.pop(name) for name in names if name in self.rows]
        last = {row.process: row for row in rows}
        for row in rows:
            try:
                self.workers.ask(row, "drop", row.name)
                if collect and row is last[row.process]:
                    self.workers.ask(row, "collect")
            except Failure as exc:
                self.fail(row, exc)

    def fail(self, row: Row, exc: Failure) -> None:
        """Remove a contender that failed, and those that ended with its process."""
        self.rows.pop(row.name, None)
        self.lost[row.name] = str(exc)
        if exc.absent or exc.gone:  # it may end a process again, with others in it
            self.absent[row.name] = str(exc)
        if exc.gone:
            for other in [r for r in self.rows.values() if r.process == row.process]:
                del self.rows[other.name]
                self.lost[other.name] = f"{row.title} ended the process that it shared"


def run_rounds(
    session: Session, entry: Entry, settings: Settings, evict: Callable[[], None] | None,
    progress: Callable[[float], None],
) -> None:  # fmt: skip
    """Add rounds of all contenders that are set up to an entry; `progress` takes the share done.

    Rounds that other processes disturbed are repeated, as long as `_PATIENCE` allows.
    """
    if OURS not in session.rows:
        return
    warm = entry.cache == "warm"
    before_step = _timed(evict) if evict else _PAUSE
    turns = {
        name: warm_seconds(step) if warm else before_step + step
        for name in session.rows
        for step in [session.step_seconds[name]]
    }
    slow = [name for name, t in turns.items() if name not in ALWAYS and t > _SLOW * turns[OURS]]
    fast = [name for name in turns if name not in slow]
    of_fast, of_slow = (sum(turns[name] for name in block) for block in (fast, slow))
    rounds = int(min(max(settings.seconds / of_fast, settings.least), settings.most))
    planned = rounds * of_fast + settings.least * of_slow
    order = random.Random(settings.seed + len(entry.placements))
    before, calm, start = entry.rounds, 0, time.perf_counter()
    entry.placements.append(0)
    while calm < rounds:
        # slow contenders are in the first round and evenly spread ones: an early end drops none
        with_slow = calm * settings.least % rounds < settings.least
        times, others = _round(session, [fast[:], slow * with_slow], warm, evict, order)
        entry.add_round(times, others)
        entry.placements[-1] = entry.rounds - before
        if not others > stats.CALM:
            calm += 1
            progress(1 / rounds)
        elapsed = time.perf_counter() - start
        if OURS not in session.rows or elapsed > _PATIENCE * planned:
            break


def _round(
    session: Session, blocks: list[list[str]], warm: bool, evict: Callable[[], None] | None,
    order: random.Random,
) -> tuple[dict[str, float], float]:  # fmt: skip
    """Give all contenders a turn, in random order of blocks and within them.

    Return their times, and the CPUs that other processes kept busy meanwhile.
    """
    start, taken = time.perf_counter(), _taken_by_others(session.workers)
    order.shuffle(blocks)
    times = {}
    for block in blocks:
        order.shuffle(block)
        for name in block:
            if evict:
                evict()
            elif not warm:
                time.sleep(_PAUSE)
            seconds = session.turn(name, warm)
            if seconds is not None:
                times[name] = seconds
    others = _taken_by_others(session.workers) - taken
    return times, max(0.0, others) / (time.perf_counter() - start)


def _taken_by_others(workers: Workers) -> float:
    return machine.busy_seconds() - workers.cpu_seconds()


def _timed(act: Callable[[], None]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


@dataclass
class Bench:
    """A run: its recording, settings, contenders and progress.

    `named` says that the user chose the rows: then none is left out as too slow.
    """

    recording: Recording
    settings: Settings
    rows: Sequence[Row]
    named: bool = False
    quick: bool = False
    caches: Sequence[str] = ("warm", "cold")
    progress: Progress = lambda text, share: None

    def measure(self, cases: Sequence[Case], threads: int) -> None:
        """Measure cases, each with every contender that can take part."""
        on, cache = machine.cpus(threads), machine.last_level_cache()
        with (
            machine.Evictor(on, cache) as evict,
            Workers(threads, busy=self.settings.busy) as workers,
        ):
            self.recording.evicted = evict.size
            for case in cases:
                self._case(workers, self.problem(case, threads), evict)

    def measure_memory(self, cases: Sequence[Case], threads: int) -> None:
        """Measure the temporary memory of each contender's step, and its state."""
        for case in cases:
            problem = self.problem(case, threads)
            rows, left_out = self.able(problem, few_steps=True)
            left_out |= teams(rows, problem, _free_memory())[1]
            for row in rows:
                if row.name in (LIMIT, AGAIN, *left_out):
                    continue
                self.progress(f"{case.name}: memory of {row.title}", 0)
                result = Memory(case.name, case.elements, row.name)
                try:
                    # blocks of 64 KiB and more go back to the system when freed, so that resident
                    # memory is memory in use
                    with Workers(threads, {"MALLOC_MMAP_THRESHOLD_": "65536"}) as workers:
                        result.temporary, result.how, result.state = workers.ask(
                            row, "memory", row, problem
                        )
                except Failure as exc:
                    result.why = str(exc)
                    if exc.absent:
                        self.recording.absent[row.name] = str(exc)
                self.recording.memory.append(result)
                self.progress("", 1 / len(rows))
            for name, why in left_out.items():
                absent = Memory(case.name, case.elements, name, why=why)
                self.recording.memory.append(absent)

    def problem(self, case: Case, threads: int) -> Problem:
        """Return a case with this run's optimizer and dtype."""
        return Problem(case, self.settings.optimizer, self.settings.dtype, threads)

    def states(self, problem: Problem) -> list[str]:
        """Return the states of the caches to measure a case in."""
        return ["cold"] if streams(problem) else list(self.caches)

    def able(self, problem: Problem, few_steps: bool = False) -> tuple[list[Row], dict[str, str]]:
        """Divide the rows into those that can take part, and the others with the reason.

        `few_steps`: see `Row.too_much`.
        """
        left_out: dict[str, str] = {}
        for row in self.rows:
            why = row.lacks(problem)
            if why is None and not self.named:
                if self.quick and not row.quick:
                    why = "not in a quick run"
                elif row.too_much(problem, few_steps):
                    why = f"{row.most_why}; --contender with its name includes it"
            if why is not None:
                left_out[row.name] = why
        return [row for row in self.rows if row.name not in left_out], left_out

    def _case(self, workers: Workers, problem: Problem, evict: machine.Evictor) -> None:
        name = problem.case.name
        busy = self.settings.busy
        entries = [_new_entry(problem, state, busy) for state in self.states(problem)]
        self.recording.entries += entries  # now, so that an interrupted run keeps them
        rows, left_out = self.able(problem)
        members, too_large = teams(rows, problem, _free_memory())
        for entry in entries:
            entry.left_out = left_out | too_large
            if not members:
                entry.skipped = too_large[OURS]
                self.progress("", 1)
        if not members:
            return
        session = Session(workers, problem, self.recording.absent)
        placements = self.settings.placements
        if problem.held > _SMALL:
            placements = math.ceil(placements / 4) if problem.held < _LARGE else 1
        parts = len(members) * placements
        few = replace(
            self.settings,
            seconds=self.settings.seconds / parts,
            least=math.ceil(self.settings.least / placements),
            most=math.ceil(self.settings.most / placements),
        )
        for team in members:
            for _ in range(placements):
                session.drop(session.quick_to_build, collect=False)
                for row in team:
                    self.progress(f"{name}: setting up {row.title}", 0)
                    session.build(row)
                for entry in entries:
                    self.progress(f"{name}, {entry.cache}", 0)
                    flush = evict if entry.cache == "cold" and not streams(problem) else None
                    run_rounds(session, entry, few, flush, lambda x: self.progress("", x / parts))
            session.drop([row.name for row in team if row.name not in ALWAYS])
        session.drop(list(session.rows))
        for entry in entries:
            entry.own_moved = session.moved
            entry.left_out |= {n: why for n, why in session.lost.items() if n not in session.absent}


def _free_memory() -> float:
    return 0.9 * (machine.available_memory() or math.inf)


def _new_entry(problem: Problem, cache: str, busy: int) -> Entry:
    case = problem.case
    return Entry(
        case.name, case.title, case.kind, case.elements, len(case.shapes), problem.moved,
        problem.held, problem.threads, cache, optimizer=problem.optimizer, busy=busy,
    )  # fmt: skip
