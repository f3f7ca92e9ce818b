"""Time the updates of the programs in docs/programs.md: the page's lines beside the library's own.

    OPENBLAS_NUM_THREADS=1 python bench/programs.py [--rounds 31]

Leaves out libraries that are not installed. Prints a table: medians of turns in alternating order,
with one thread and with two, which are fusedopt's, and Numba's for PaCMAP; NumPy's own loops and
thinc's have one. The first step of a pair must agree.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import fusedopt

PAGE = (Path(__file__).parent.parent / "docs" / "programs.md").read_text()
BLOCKS = dict(re.findall(r"^## (.*?)$.*?```python\n(.*?)```", PAGE, re.S | re.M))
SIZES = {
    "109k in 6": [(784, 128), (128,), (128, 64), (64,), (64, 10), (10,)],
    "10M in 10": [(1000, 1000)] * 10,
}
Step = Callable[[], Any]
Pair = tuple[Step, Step, Callable[[], tuple[Sequence[Any], Sequence[Any]]]]


def block(title: str) -> dict[str, Any]:
    """Return the names that a block of the page defines."""
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[title], title, "exec"), names)
    return names


class Case:
    """Two copies of the same parameters, and gradients."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        rng = np.random.default_rng(0)
        self.ours, self.grads = (
            [rng.standard_normal(shape, "f4") for shape in shapes] for _ in range(2)
        )
        self.theirs = [p.copy() for p in self.ours]

    def ends(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the parameters of both."""
        return self.ours, self.theirs


def flower(kind: str, case: Case) -> Pair:
    """Leave out what surrounds the update: the mean over clients, bytes from and to arrays."""
    lib = import_module("flwr.server.strategy")
    names, betas, eta, tau = block("Flower"), (0.9, 0.99), 0.1, 1e-3
    decay: dict[str, float] = {"beta_1": betas[0], "beta_2": betas[1]}
    if kind == "FedAdagrad":
        betas, decay = (0.0, 0.0), {}

    module = sys.modules[getattr(lib, kind).__module__]
    fedavg = import_module("flwr.server.strategy.fedavg").FedAvg
    fedavg.aggregate_fit = lambda self, server_round, results, failures: (results, {})
    empty = import_module("flwr.common").ndarrays_to_parameters([])
    server = getattr(lib, kind)(initial_parameters=empty, eta=eta, tau=tau, **decay)
    for name in ("parameters_to_ndarrays", "ndarrays_to_parameters"):
        setattr(module, name, lambda arrays: arrays)
    server.current_weights = case.theirs
    opt = names["make"](kind, case.ours, *betas, tau)
    new = [p + g for p, g in zip(case.ours, case.grads, strict=True)]
    ours, theirs = count(1), count(1)

    def step() -> None:
        t = next(ours)
        delta = [x - y for x, y in zip(new, case.ours, strict=True)]
        if kind == "FedAdam":
            names["fedadam"](opt, delta, t, eta, *betas)
        elif kind == "FedYogi":
            names["fedyogi"](opt, delta, t, eta, *betas, tau)
        else:
            names["fedadagrad"](opt, delta, t, eta, betas[0], tau)

    return (
        step,
        lambda: server.aggregate_fit(next(theirs), new, []),
        lambda: (case.ours, server.current_weights),
    )


def openfl(kind: str, case: Case) -> Pair:
    """Step all parameters in one call."""
    lib = import_module("openfl.utilities.optimizers.numpy")
    grads = {str(i): g for i, g in enumerate(case.grads)}
    ours = block("OpenFL")[f"Fused{kind}"](params={str(i): p for i, p in enumerate(case.ours)})
    theirs = getattr(lib, f"NumPy{kind}")(params={str(i): p for i, p in enumerate(case.theirs)})
    return lambda: ours.step(grads), lambda: theirs.step(grads), case.ends


def scikit_learn(case: Case) -> Pair:
    """Time `update_params` alone."""
    lib = import_module("sklearn.neural_network._stochastic_optimizers")
    options = 1e-3, 0.9, 0.999, 1e-8
    ours = block("scikit-learn")["FusedAdam"](case.ours, *options)
    theirs = lib.AdamOptimizer(case.theirs, *options)
    return (
        lambda: ours.update_params(case.ours, case.grads),
        lambda: theirs.update_params(case.theirs, case.grads),
        case.ends,
    )


def pacmap(case: Case) -> Pair:
    """Step an embedding in two dimensions that has as many elements."""
    lib, names = import_module("pacmap.pacmap"), block("PaCMAP")
    ours, theirs, grad = (
        np.concatenate([a.ravel() for a in arrays]).reshape(-1, 2)
        for arrays in (case.ours, case.theirs, case.grads)
    )
    grad = np.concatenate([grad, np.zeros((1, 2), "f4")])
    m, v = np.zeros_like(theirs), np.zeros_like(theirs)
    opt, steps = names["make"](ours, 1.0), count()
    return (
        lambda: names["update"](opt, grad),
        lambda: lib.update_embedding_adam(theirs, grad, m, v, 0.9, 0.999, 1.0, next(steps)),
        lambda: ([ours], [theirs]),
    )


def autograd(case: Case) -> Pair:
    """Four iterations with a gradient that costs nothing: flattening is part of the update."""
    lib, names = import_module("autograd.misc.optimizers"), block("autograd")
    results: dict[str, Any] = {}

    def run(whose: str, adam: Any, params: Any) -> None:
        results[whose] = adam(lambda x, i: case.grads, params, num_iters=4)

    return (
        lambda: run("ours", names["adam"], case.ours),
        lambda: run("theirs", lib.adam, case.theirs),
        lambda: (results["ours"], results["theirs"]),
    )


def evolution(case: Case) -> Pair:
    """Step a flat theta; the original is a transcription of `Optimizer.update`."""
    ours, theta, grad = (
        np.concatenate([a.ravel() for a in arrays])
        for arrays in (case.ours, case.theirs, case.grads)
    )
    opt = block("Evolution strategies")["make"](ours, 0.05)
    state: dict[str, Any] = {"theta": theta, "m": np.zeros_like(theta), "v": np.zeros_like(theta)}
    steps = count(1)

    def update() -> float:
        t = next(steps)
        a = 0.05 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        state["m"] = 0.9 * state["m"] + (1 - 0.9) * grad
        state["v"] = 0.999 * state["v"] + (1 - 0.999) * (grad * grad)
        step = -a * state["m"] / (np.sqrt(state["v"]) + 1e-8)
        ratio = np.linalg.norm(step) / np.linalg.norm(state["theta"])
        state["theta"] = (state["theta"] + step).astype("f4")
        return float(ratio)

    return lambda: opt.step(grad), update, lambda: ([ours], [state["theta"]])


def thinc(case: Case) -> Pair:
    """Call the optimizer for each parameter, as thinc does, with spaCy's options."""
    options: dict[str, Any] = {"L2": 0.01, "grad_clip": 1.0, "use_averages": False}

    def step(opt: Any, params: Any, grads: Any) -> None:
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            opt((i, "W"), p, g)  # which zeroes g: later steps see zeros, and take as long
        opt.step_schedules()

    turns = []
    for module, params in (("fusedopt.thinc", case.ours), ("thinc.optimizers", case.theirs)):
        opt = import_module(module).Adam(0.001, **options)
        turns.append(partial(step, opt, params, [g.copy() for g in case.grads]))
    return turns[0], turns[1], case.ends


UPDATES: dict[str, tuple[str, Callable[[Case], Pair]]] = {
    **{f"Flower, {k}": ("flwr", partial(flower, k)) for k in ("FedAdam", "FedYogi", "FedAdagrad")},
    **{f"OpenFL, NumPy{k}": ("openfl", partial(openfl, k)) for k in ("Adam", "Adagrad", "Yogi")},
    "scikit-learn": ("scikit-learn", scikit_learn),
    "PaCMAP": ("pacmap", pacmap),
    "autograd, 4 iterations": ("autograd", autograd),
    "evolution strategies": ("numpy", evolution),
    "thinc": ("thinc", thinc),
}


def seconds(step: Step) -> float:
    begin = perf_counter()
    step()
    return perf_counter() - begin


def measure(pair: Pair, rounds: int) -> list[str]:
    """Return the medians of the library's times, of ours, and of their ratio."""
    ours, theirs, _ = pair
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(-3, rounds):
        for k in (0, 1) if i % 2 else (1, 0):
            spent = seconds((theirs, ours)[k])
            if i >= 0:
                times[k].append(spent)
    ratio = median(b / a for a, b in zip(*times, strict=True))
    return [*(f"{median(column) * 1e6:,.0f} us" for column in times), f"{ratio:.2f}"]


def use_threads(threads: int) -> None:
    """Set the threads of fusedopt, and of Numba if PaCMAP has loaded it."""
    fusedopt.set_num_threads(threads)
    if numba := sys.modules.get("numba"):
        numba.set_num_threads(threads)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    rows, used = [], {"numpy": np.__version__}
    for title, (package, make) in UPDATES.items():
        for size, shapes in SIZES.items():
            try:
                pair = make(Case(shapes))
            except ModuleNotFoundError as exc:
                print(f"{title}: left out, {exc}", file=sys.stderr)
                break
            used[package] = version(package)
            for turn in pair[:2]:
                turn()
            for a, b in zip(*pair[2](), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * max(1, np.abs(b).max()))
            row = [title, size]
            for threads in (1, 2):
                use_threads(threads)
                row += measure(pair, rounds)
            rows.append(row)
    print(f"{', '.join(f'{name} {what}' for name, what in used.items())}; {rounds} rounds\n")
    print("| update | parameters | library | fusedopt, 1 thread | ratio "
          "| library | fusedopt, 2 threads | ratio |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
