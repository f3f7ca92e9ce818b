"""A model of clicks with embeddings (as DLRM), trained with `fusedopt.Rows` and by dense gradients.

    python bench/embeddings.py [--tables 8] [--rows 20000] [--steps 60]
    python bench/embeddings.py --table 10000000   # one table: a step of 1% of its rows

Each sample has some categories, one of each table, and numbers. Clicks are drawn by a hidden model
of the same kind, and categories by Zipf's law. Prints, for each optimizer and kind of gradient, the
time that a step of the optimizer takes (median), and the loss on samples that nobody trained on.
The gradients are the same; with a rule that is exact by rows so are the losses, to the bit.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import numpy as np

import fusedopt

WIDTH, NUMBERS, HIDDEN, BATCH = 16, 8, 64, 512
OPTIMIZERS = {  # name: class, options
    "SGD": (fusedopt.SGD, {"lr": 2.0}),
    "Adagrad": (fusedopt.Adagrad, {"lr": 0.1}),
    "Adagrad, row-wise": (fusedopt.Adagrad, {"lr": 0.1, "rowwise": True}),
    "Adam": (fusedopt.Adam, {"lr": 0.01}),
}


class Clicks:
    """Samples, drawn by a hidden model."""

    def __init__(self, tables: int, rows: int) -> None:
        """Make the hidden model."""
        rng = np.random.default_rng(0)
        self.tables, self.rows = tables, rows
        self.effects = rng.standard_normal((tables, rows)).astype(np.float32)
        self.weights = rng.standard_normal(NUMBERS).astype(np.float32)

    def batch(self, seed: int, size: int = BATCH) -> tuple[Any, Any, Any]:
        """Return categories, numbers, and whether each was clicked."""
        rng = np.random.default_rng(seed)
        index = (rng.zipf(1.3, (size, self.tables)) - 1) % self.rows
        x = rng.standard_normal((size, NUMBERS)).astype(np.float32)
        logit = x @ self.weights * 0.3 + self.effects[np.arange(self.tables), index].sum(axis=1)
        return index, x, rng.random(size) < 1 / (1 + np.exp(-logit))


def make(tables: int, rows: int) -> dict[str, Any]:
    """Return the parameters."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    inner = tables * WIDTH + NUMBERS
    return {
        "tables": [0.1 * normal(1, rows, WIDTH)[0] for _ in range(tables)],
        "W": normal(inner, HIDDEN), "b": np.zeros(HIDDEN, np.float32), "v": normal(HIDDEN),
    }  # fmt: skip


def loss_and_grads(params: dict[str, Any], batch: tuple[Any, Any, Any]) -> tuple[float, Any]:
    """Return the mean loss, and gradients: of a table's rows as they occur in the batch."""
    index, x, clicked = batch
    size, tables = len(x), params["tables"]
    z = np.hstack([*(table[index[:, i]] for i, table in enumerate(tables)), x])
    h = np.maximum(z @ params["W"] + params["b"], 0)
    logit = h @ params["v"]
    loss = float(np.mean(np.logaddexp(0, logit) - clicked * logit))
    d = ((1 / (1 + np.exp(-logit)) - clicked) / size).astype(np.float32)
    dh = np.outer(d, params["v"]) * (h > 0)
    dz = dh @ params["W"].T
    grads = {"W": z.T @ dh, "b": dh.sum(axis=0), "v": h.T @ d}
    grads["tables"] = [
        fusedopt.Rows(index[:, i], np.ascontiguousarray(dz[:, i * WIDTH : (i + 1) * WIDTH]))
        for i in range(len(tables))
    ]
    return loss, grads


def dense(grad: fusedopt.Rows, table: Any) -> Any:
    """Return the same gradient of all rows."""
    whole = np.zeros_like(table)
    np.add.at(whole, grad.indices, grad.values)
    return whole


def train(name: str, by_rows: bool, data: Clicks, steps: int) -> tuple[float, float]:
    """Return the median time of the optimizer's step, in ms, and the loss at the end."""
    params = make(data.tables, data.rows)
    cls, options = OPTIMIZERS[name]
    opt, times = cls(params, **options), []
    for step in range(steps):
        _, grads = loss_and_grads(params, data.batch(1000 + step))
        if not by_rows:
            pairs = zip(grads["tables"], params["tables"], strict=True)
            grads["tables"] = [dense(grad, table) for grad, table in pairs]
        begin = time.perf_counter()
        opt.step(grads)
        times.append(time.perf_counter() - begin)
    return 1e3 * median(times), loss_and_grads(params, data.batch(1, 20_000))[0]


def report(name: str, times: dict[str, list[float]], base: str) -> None:
    """Print the median and the least of each kind, and what part the least is of that of `base`."""
    least = min(times[base])
    text = "; ".join(
        f"{kind} {1e3 * median(its):.2f} ms, least {1e3 * min(its):.2f} ({min(its) / least:.4f})"
        for kind, its in times.items()
    )
    print(f"{name}: {text}", flush=True)


def timed(opt: Any, grad: Any) -> float:
    """Return the seconds of a step: of one thread those that it ran, whatever else ran beside."""
    clock = time.thread_time if fusedopt.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    opt.step(grad)
    return clock() - begin


def one_table(rows: int, rounds: int) -> None:
    """Print what a step of 1% of the rows of a table takes beside one of all, in turns."""
    rng, length = np.random.default_rng(0), 64
    index = {"ascending": np.sort(rng.permutation(rows)[: rows // 100])}
    index |= {"unsorted": rng.permutation(index["ascending"])}
    index |= {"repeated": rng.integers(0, rows, rows // 100)}
    values = np.full((rows // 100, length), 1e-3, np.float32)
    print(f"a table of {rows:,} x {length}, float32, {fusedopt.get_num_threads()} threads")
    for cls in (fusedopt.SGD, fusedopt.Adagrad, fusedopt.Adam):
        table, whole = (np.ones((rows, length), np.float32) for _ in range(2))
        opt = cls(table)
        times: dict[str, list[float]] = {}
        grads = {"dense": whole} | {k: fusedopt.Rows(i, values) for k, i in index.items()}
        for _ in range(rounds):
            for kind, grad in grads.items():
                times.setdefault(kind, []).append(timed(opt, grad))
        report(cls.__name__, times, "dense")
        del opt, table, whole, grads
    grad = fusedopt.Rows(index["ascending"], values)
    opts = [fusedopt.Adam(np.ones((rows, length), np.float32), row_steps=x) for x in (False, True)]
    counts = opts[1].state["params"]["row_step"]
    drawn = {n: rng.integers(0, n, counts.shape) for n in (1, 100, 10_000)}
    times = {}
    for _ in range(rounds):
        for name, opt, before in [("of the table", opts[0], 0)] + [
            (f"{n:,} of rows", opts[1], its) for n, its in drawn.items()
        ]:
            counts[...] = before  # and what the caches held of the tables is gone
            times.setdefault(name, []).append(timed(opt, grad))
    report("Adam by different numbers of steps", times, "of the table")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", type=int, default=8)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=6, help="of --table")
    parser.add_argument("--threads", type=int, default=fusedopt.get_num_threads())
    parser.add_argument("--table", type=int, help="measure one table of so many rows alone")
    options = parser.parse_args()
    fusedopt.set_num_threads(options.threads)
    if options.table is not None:
        one_table(options.table, options.rounds)
        return
    data = Clicks(options.tables, options.rows)
    print("| optimizer | gradients | step, ms | loss |\n|---|---|---|---|")
    for name in OPTIMIZERS:
        for by_rows in (False, True):
            took, loss = train(name, by_rows, data, options.steps)
            print(f"| {name} | {'rows' if by_rows else 'dense'} | {took:.3f} | {loss:.6f} |")


if __name__ == "__main__":
    main()
