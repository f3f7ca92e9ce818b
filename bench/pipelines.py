"""Step options as passes of torch and inside our step: `python bench/pipelines.py`.

Each pipeline is timed against torch's own sequence on the same shapes, in turns, round by round.
Prints the median of the ratios, and the bytes that each moves for a parameter, by count. With
--markdown FILE the table is written too.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

import fusedopt
import fusedopt.torch as fo
from fusedopt.bench import machine
from fusedopt.bench.cases import CASES, Problem, own_case

DECAY = 0.999
# step: read p g m v, write p m v; clip: read g, read and write g; unscale: read g twice (once for
# the finite check), write g; EMA: read p and e, write e; add: read g in 2 bytes, read and write sum
BYTES = {
    "step": (28, 28), "clip + step": (32, 40), "all": (40, 64), "stats": (28, 28),
    "micro-batches": (4 * 10 + 32, 4 * 10 + 44),
}  # fmt: skip


class Torch:
    """torch.optim.Adam(fused=True) with foreach clip, GradScaler's unscale and foreach EMA."""

    def __init__(self, problem: Problem) -> None:
        self.params = [torch.nn.Parameter(torch.tensor(p)) for p in problem.params()]
        for p, g in zip(self.params, problem.grads(), strict=True):
            p.grad = torch.tensor(g)
        self.grads = [p.grad for p in self.params]
        self.data = [p.data for p in self.params]
        self.averages = [p.clone() for p in self.data]
        self.optimizer = torch.optim.Adam(self.params, fused=True)
        self.found, self.one = torch.zeros(()), torch.ones(())
        self.narrow = [g.bfloat16() for g in self.grads]

    def step(self) -> None:
        """Step without options."""
        self.optimizer.step()

    def clip_step(self) -> None:
        """Clip by the global norm, and step."""
        torch.nn.utils.clip_grad_norm_(self.params, 1e6, foreach=True)
        self.optimizer.step()

    def everything(self) -> None:
        """Unscale, check for non-finite elements, clip, step, average."""
        torch._amp_foreach_non_finite_check_and_unscale_(self.grads, self.found, self.one)
        if not self.found.item():
            torch.nn.utils.clip_grad_norm_(self.params, 1e6, foreach=True)
            self.optimizer.step()
            torch._foreach_lerp_(self.averages, self.data, 1 - DECAY)

    def micro_batches(self) -> None:
        """Add four times to ``.grad``, in float32; clip, step, and set it to zero."""
        for _ in range(4):
            torch._foreach_add_(self.grads, self.narrow)
        self.clip_step()
        torch._foreach_zero_(self.grads)


class OurSums:
    """The same with fusedopt.torch.Adam and its GradAccumulator."""

    def __init__(self, problem: Problem) -> None:
        params = [torch.nn.Parameter(torch.tensor(p)) for p in problem.params()]
        self.narrow = [torch.tensor(g).bfloat16() for g in problem.grads()]
        self.optimizer = fo.Adam(params, max_grad_norm=1e6)
        self.sums = fo.GradAccumulator(params)

    def micro_batches(self) -> None:
        """Add four times, and step with a clip."""
        for _ in range(4):
            self.sums.add(self.narrow)
        self.optimizer.step(grads=self.sums)


class Ours:
    """The others with fusedopt.Adam, on NumPy's arrays."""

    def __init__(self, problem: Problem, **options: float) -> None:
        self.grads = problem.grads()
        self.optimizer = fusedopt.Adam(problem.params(), **options)

    def step(self) -> None:
        """Step without options."""
        self.optimizer.step(self.grads)

    def clip_step(self) -> None:
        """Clip by the global norm, and step."""
        self.optimizer.step(self.grads, max_grad_norm=1e6)

    def everything(self) -> None:
        """Unscale, check for non-finite elements, clip, step, average."""
        self.optimizer.step(self.grads, grad_scale=1.0, max_grad_norm=1e6, nonfinite="skip")

    def stats(self) -> None:
        """Step, and measure every leaf."""
        self.optimizer.step(self.grads, stats=True)


def clock(act: Callable[[], None]) -> float:
    start = perf_counter()
    act()
    return perf_counter() - start


def ratio(ours: Callable[[], None], theirs: Callable[[], None], rounds: int, each: int) -> str:
    """Median of ours / theirs over rounds of `each` steps, with the quartiles."""

    def turn(act: Callable[[], None]) -> float:
        act()
        return min(clock(act) for _ in range(each))

    ratios = []
    for _ in range(rounds):
        turns = [ours, theirs]
        random.shuffle(turns)
        times = {act: turn(act) for act in turns}
        ratios.append(times[ours] / times[theirs])
    low, high = np.quantile(ratios, [0.25, 0.75])
    return f"{median(ratios):.2f} ({low:.2f} to {high:.2f})"


def rows(case: str, rounds: int, threads: int) -> list[tuple[str, str, str, str]]:
    known = CASES.get(case) or own_case(case)
    if known is None:
        raise SystemExit(f"{case}: expected one of {', '.join(CASES)}, or a shape such as 256x256")
    problem = Problem(known, "adam", "float32", threads)
    each = 1 if problem.held > 1 << 27 else 5
    theirs, ours, averaged = Torch(problem), Ours(problem), Ours(problem, ema=DECAY)
    pairs = {
        "step": (ours.step, theirs.step),
        "clip + step": (ours.clip_step, theirs.clip_step),
        "unscale + finite check + clip + step + EMA": (averaged.everything, theirs.everything),
        "step with stats, against our own without": (ours.stats, ours.step),
        "4 micro-batches in bfloat16 + clip + step": (
            OurSums(problem).micro_batches,
            Torch(problem).micro_batches,
        ),
    }
    return [
        (case, name, ratio(*acts, rounds, each), "{} / {}".format(*moved))
        for (name, acts), moved in zip(pairs.items(), BYTES.values(), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="resnet50,400x250")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=fusedopt.get_num_threads())
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    o = parser.parse_args()
    fusedopt.set_num_threads(o.threads)
    torch.set_num_threads(o.threads)
    lines = ["| case | pipeline | ours / torch's | bytes for each parameter |", "|---|---|---|---|"]
    for case in o.cases.split(","):
        lines += [f"| {' | '.join(row)} |" for row in rows(case, o.rounds, o.threads)]
    table = "\n".join(lines)
    print(table)
    if o.markdown:
        about = machine.describe()
        o.markdown.write_text(
            f"# Step options\n\n`python bench/pipelines.py`: {o.threads} threads of "
            f"{about['processor']}, torch {torch.__version__}, medians and quartiles of "
            f"{o.rounds} rounds.\n\n{table}\n"
        )


if __name__ == "__main__":
    main()
