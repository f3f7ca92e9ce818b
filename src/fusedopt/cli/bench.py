"""Time steps of fusedopt and other libraries against the memory bandwidth of this machine."""

from __future__ import annotations

import argparse
import datetime
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import fusedopt
from fusedopt.bench import changes, machine, plots, report
from fusedopt.bench.cases import CASES, DTYPES, OPTIMIZERS, Case, own_case
from fusedopt.bench.contenders import LIMIT, OURS, ROWS
from fusedopt.bench.measure import ALWAYS, Bench, Settings
from fusedopt.bench.recording import Recording
from fusedopt.cli import files

QUICK_CASES = ("1k", "30k", "1M", "mlp", "resnet50")
SCALING_CASES = ("1M", "50M")
MEMORY_CASES = ("resnet50",)
BUSY_CASES, BUSY = ("1M",), 2
RULE_CASES = ("50M", "400x250")
# beside the limit and fusedopt
PART_ROWS = ("numba", "torch-foreach", "torch-fused", "optax")
RULE_ROWS = ("fusedopt-torch", "numpy", "torch-foreach", "torch-fused")
SECONDS, QUICK_SECONDS, PART_SECONDS = 6.0, 3.0, 4.0
QUICK_PLACEMENTS = 4
USUAL = (None, False, "adam", "float32")  # values of options that a command line may leave out
PROGRAM = "python -m fusedopt bench"  # the command that a report names
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    known = ", ".join(CASES)
    add("--case", metavar="NAMES", help=f"some of {known}, or shapes: 64x256 (default: all)")
    add("--contender", metavar="NAMES", help=f"some of {', '.join(ROWS)} (default: all)")
    add(
        "--optimizer",
        metavar="NAMES",
        default="adam",
        help=f"some of {', '.join(OPTIMIZERS)}, or "
        "all; several give a table with a row for each (default: adam; sgd: with momentum 0.9)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="of parameters and gradients")
    add("--threads", type=int, help="of every contender (default: fusedopt's own default)")
    add("--busy", type=int, default=0, metavar="N", help="measure beside N busy processes")
    add("--cache", choices=("warm", "cold", "both"), help="what a step finds in them "
        "(default: both; quick: warm)")  # fmt: skip
    add("--seconds", type=float, help="for each case and state of the caches, without setup "
        f"(default: {SECONDS:g}; quick {QUICK_SECONDS:g})")  # fmt: skip
    add("--quick", action="store_true", help=f"{', '.join(QUICK_CASES)}, in 90 seconds")
    add("--scaling", action="store_true", help="time 1 to N threads instead")
    add("--memory", action="store_true", help="measure temporary memory and state instead of time")
    add("--json", type=Path, metavar="FILE", help="write all measurements")
    add("--plot", type=Path, metavar="FILE.png", help="draw the results")
    add("--report", type=Path, metavar="FOLDER", help="measure times, scaling and memory; write "
        "results.json, README.md and pictures")  # fmt: skip
    add("--load", type=Path, metavar="FILE", help="measure nothing; read what --json wrote")
    add("--compare", type=Path, metavar="FILE", help="print too what changed since --json wrote it")


def chosen(option: str, names: str | None, known: Mapping[str, T]) -> list[T]:
    """Return the values of comma-separated names; all if there are none.

    Raises
    ------
    ValueError
        If a name is unknown; lists the known ones.
    """
    if names is None:
        return list(known.values())
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{option}: unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [value for name, value in known.items() if name in wanted]


@contextmanager
def progress_bar(total: int) -> Iterator[Any]:
    """Yield a function that shows progress: by tqdm if installed, else by one line per case."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        shown = ""

        def show_case(text: str, share: float) -> None:
            nonlocal shown
            case = text.partition(":")[0].partition(",")[0]
            if case not in ("", shown):
                shown = case
                print(case, file=sys.stderr, flush=True)

        yield show_case
        return
    form = "{percentage:3.0f}%|{bar:24}| {elapsed} {desc}"
    with tqdm(total=total, bar_format=form, leave=False) as bar:

        def show(text: str, share: float) -> None:
            if text:
                bar.set_description_str(text)
            bar.update(min(share, total - bar.n))  # shares do not add up exactly

        yield show


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Check the options, and return the function that measures."""
    if options.json is not None:
        files.to_write("--json", options.json)
    if options.plot is not None:
        files.to_draw("--plot", options.plot, "bench")
    if options.report is not None:
        files.pictures("bench")
        if options.report.exists():
            files.to_write("--report", options.report / "results.json")
        else:
            files.to_write("--report", options.report)
    before = None if options.compare is None else loaded("--compare", options.compare)
    if options.load is not None:
        recording = loaded("--load", options.load)
        return lambda: publish(recording, options, before)
    bench = make_bench(options)
    jobs = plan(bench, options)
    return lambda: run(bench, jobs, options, before)


def loaded(option: str, path: Path) -> Recording:
    """Return a recording that can be printed; ValueError or OSError naming the file."""
    files.to_read(option, path)
    recording = Recording.load(path)
    try:
        report.text(recording)
    except Exception as exc:  # its parts may be of any type
        raise ValueError(f"{path}: not a recording of fusedopt bench: {exc!r}") from exc
    return recording


def run(
    bench: Bench, jobs: Sequence[Job], options: argparse.Namespace, before: Recording | None
) -> None:
    """Measure, and report the results, also after Ctrl-C."""
    try:
        with progress_bar(sum(job.amount for job in jobs)) as show:
            for job in jobs:
                job.bench.progress = show
                job.do(job.bench)
        bench.recording.complete = True
    finally:
        if any(e.rounds or e.skipped for e in bench.recording.entries) or bench.recording.memory:
            publish(bench.recording, options, before)


def make_bench(options: argparse.Namespace) -> Bench:
    """Return the run that the options ask for, checked."""
    rows = chosen("--contender", options.contender, ROWS)
    always = [ROWS[name] for name in ALWAYS]  # without them there is nothing to compare with
    rows = [row for row in ROWS.values() if row in rows or row in always]
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        raise ValueError("--seconds: must be > 0 and finite")
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    cache = options.cache or ("warm" if options.quick else "both")
    placements = QUICK_PLACEMENTS if options.quick else Settings.placements
    if options.busy < 0:
        raise ValueError("--busy: must be >= 0")
    settings = Settings(
        ",".join(optimizers(options)), options.dtype, seconds, placements=placements,
        busy=options.busy,
    )  # fmt: skip
    recording = Recording(
        settings=asdict(settings),
        machine=machine.describe(),
        titles={row.name: row.title for row in rows},
        tolerances={row.name: row.tolerance for row in rows if row.name != LIMIT},
        command=command(options),
        date=datetime.date.today().isoformat(),
        versions={
            p: v for row in rows for p in row.packages if (v := machine.installed(p)) is not None
        },
    )
    return Bench(
        recording,
        settings,
        rows,
        named=options.contender is not None,
        quick=options.quick,
        caches=("warm", "cold") if cache == "both" else (cache,),
    )


def optimizers(options: argparse.Namespace) -> list[str]:
    """Return the names that --optimizer gives, the first one first."""
    if options.optimizer == "all":
        return list(OPTIMIZERS)
    names = [name.strip() for name in options.optimizer.split(",")]
    chosen("--optimizer", options.optimizer, OPTIMIZERS)  # raises if one is unknown
    return list(dict.fromkeys(names))


def command(options: argparse.Namespace) -> str:
    """Return the command line that asks for the same measurement."""
    words = []
    for name, value in vars(options).items():
        if name not in ("command", "json", "plot", "load", "compare") and value not in USUAL:
            words += [f"--{name}"] + [str(value)] * (value is not True)
    return " ".join([PROGRAM, shlex.join(words)]).rstrip()


@dataclass
class Job:
    """A part of the run, and how many entries it measures."""

    bench: Bench
    do: Callable[[Bench], None]
    amount: int


def plan(bench: Bench, options: argparse.Namespace) -> list[Job]:
    """Return the parts of the run that the options ask for."""
    threads = fusedopt.get_num_threads() if options.threads is None else options.threads
    machine.cpus(threads)  # raises if there are fewer
    steps = not (options.scaling or options.memory)
    everything = steps and options.report is not None
    first, *others = bench.recording.optimizers
    bench = replace(bench, settings=replace(bench.settings, optimizer=first))

    def cases(default: Iterable[str]) -> list[Case]:
        names = options.case or ",".join(default)
        own = {name: own_case(name) for name in names.replace(" ", "").split(",")}
        known = {name: case for name, case in own.items() if case is not None and name not in CASES}
        return chosen("--case", names, CASES | known)

    def job(bench: Bench, few: Sequence[Case], count: int = threads) -> Job:
        amount = sum(len(bench.states(bench.problem(case, count))) for case in few)
        return Job(bench, lambda bench: bench.measure(few, count), amount)

    def part(peers: Sequence[str], **changed: Any) -> Bench:
        """Return the bench with fewer rows, warm, with some settings changed."""
        rows = [r for r in bench.rows if bench.named or r.name in (LIMIT, OURS, *peers)]
        changed["seconds"] = options.seconds or PART_SECONDS
        return replace(
            bench, rows=rows, settings=replace(bench.settings, **changed), caches=("warm",)
        )

    jobs = []
    if steps:
        usual = QUICK_CASES if options.quick else RULE_CASES if others else CASES
        jobs.append(job(bench, cases(CASES if everything else usual)))
        few = cases(RULE_CASES if everything else usual)
        jobs += [job(part(RULE_ROWS, optimizer=name), few) for name in others]
    if everything:
        jobs.append(job(part(PART_ROWS, busy=BUSY), cases(BUSY_CASES)))
    if options.scaling or everything:
        counts = [k for k in thread_counts(threads) if not (steps and k == threads)]
        jobs += [job(part(PART_ROWS), cases(SCALING_CASES), count) for count in counts]
    if options.memory or everything:
        held = cases(MEMORY_CASES)
        jobs.append(Job(bench, lambda bench: bench.measure_memory(held, threads), len(held)))
    return jobs


def thread_counts(most: int) -> list[int]:
    """Return 1, 2, 4, ... and `most`."""
    return sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})


def publish(recording: Recording, options: argparse.Namespace, before: Recording | None) -> None:
    """Print a recording and what changed, and write the files that the options name."""
    print(report.text(recording))
    if before is not None:
        print(f"\n{changes.text(before, recording, str(options.compare))}")
    if options.json is not None:
        recording.save(options.json)
        print(f"\nrecording: {options.json}")
    if options.plot is not None:
        drawn = plots.save(recording, options.plot)
        print(f"plot: {options.plot}" if drawn else "plot: nothing to draw in these cases")
    if options.report is not None:
        names = write_report(recording, options.report)
        print(f"report: {', '.join(names)} in {options.report}")


def write_report(recording: Recording, folder: Path) -> list[str]:
    """Write a recording's JSON, page and pictures into a folder; return the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    recording.save(folder / "results.json")
    pictures = [
        name for name in report.PICTURES if plots.save(recording, folder / f"{name}.png", name)
    ]
    (folder / "README.md").write_text(report.page(recording, pictures), encoding="utf-8")
    return ["results.json", *(f"{name}.png" for name in pictures), "README.md"]
