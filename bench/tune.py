"""Train three small models with AdamW at proposed learning rates, and at a grid of rates.

    python bench/tune.py [--seeds 3] [--task digits] [--markdown FILE]

The models, batches, schedule and number of steps are those of bench/accuracy.py. A proposal is made
for each seed from its initial weights, before training: by `fusedopt.tune.range_test`, with either
rule, and by `fusedopt.tune.probe`. Both take batches that training does not see in the same order.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from accuracy import TASKS, Format, Params, Task, as_tensor, train

import fusedopt
from fusedopt import tune

GRID = [float(f"{10 ** (k / 2):.3g}") for k in range(-8, -1)]


def proposals(task: Task, seed: int) -> tuple[dict[str, tuple[float | None, str]], float]:
    """Return the rates, and what was said of each; and the spread of the probe's runs."""
    params = task.init(np.random.default_rng(seed))
    rng = np.random.default_rng(1000 + seed)

    def loss_and_grads() -> tuple[float, Params]:
        leaves = {name: as_tensor(p).requires_grad_() for name, p in params.items()}
        loss = task.loss(leaves, task.batch(rng))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return loss.item(), {n: g.numpy() for n, g in zip(leaves, grads, strict=True)}

    opt = fusedopt.AdamW(params)
    test = tune.range_test(opt, loss_and_grads, rng=rng)
    probe = tune.probe(params, loss_and_grads, rng=rng)
    found = {f"range test, {rule}": test.by(rule) for rule in tune.RULES} | {"probe": probe}
    return {name: (r.suggestion, r.reason) for name, r in found.items()}, probe.spread


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, action="append", help="all of them by default")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fusedopt.set_num_threads(1)
    seeds = range(options.seeds)
    version = fusedopt.__version__.partition("+")[0]
    lines = [
        "# Proposed learning rates",
        "",
        f"`python bench/tune.py --seeds {options.seeds}`: AdamW on the models of "
        "bench/accuracy.py, their whole training",
        f"(warmup of 20 steps, then a line to 0), {options.seeds} seeds. fusedopt "
        f"{version}, Python {platform.python_version()}, torch {torch.__version__}.",
        "",
        "A proposal is made for each seed, in 100 steps (range test, defaults) or 3 runs of 100 "
        "(probe, defaults). Loss is",
        "the held-out loss after training at the proposed rate, mean of the seeds; excess is that "
        "over the grid's best mean.",
        "",
    ]
    for task_name in options.task or TASKS:
        task = TASKS[task_name]()

        def final(lr: float, seed: int, task: Task = task) -> float:
            return train(task, Format(), seed, fusedopt.AdamW, lr)

        grid = {lr: mean(final(lr, seed) for seed in seeds) for lr in GRID}
        known = {lr: loss for lr, loss in grid.items() if loss == loss}
        best = min(known, key=lambda lr: known[lr])
        lines += [f"## {task_name}", "", "| by | rates | loss | excess |", "|---|---|---|---|"]
        lines += [f"| grid | {best:g} (best of {len(GRID)}) | {grid[best]:.4f} | |"]
        found, spreads = zip(*(proposals(task, seed) for seed in seeds), strict=True)
        for name in found[0]:
            rates = [one[name][0] for one in found]
            shown = ", ".join("none" if rate is None else f"{rate:.2g}" for rate in rates)
            losses = [final(r, s) for r, s in zip(rates, seeds, strict=True) if r is not None]
            if len(losses) < len(rates):
                said = next(reason for rate, reason in (one[name] for one in found) if not rate)
                lines.append(f"| {name} | {shown} | {said} | |")
                continue
            excess = mean(losses) / grid[best] - 1
            lines.append(f"| {name} | {shown} | {mean(losses):.4f} | {excess:+.1%} |")
        rows = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in grid.items())
        shown = ", ".join(f"{spread:.2f}" for spread in spreads)
        lines += ["", f"Grid: {rows}.", f"Largest over smallest of the probe's runs: {shown}.", ""]
        print("\n".join(lines[-10:]), flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
