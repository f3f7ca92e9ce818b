"""Time the update of Keras's optimizers on the torch backend: fusedopt.keras beside Keras's own.

    KERAS_BACKEND=torch python bench/keras_update.py [--rounds 31] [--threads 2]

Prints a table: medians of turns in alternating order, of the update alone and of `apply`, which
Keras calls around it.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from typing import Any

import keras
import torch

import fusedopt
import fusedopt.keras

MODELS = {
    "MLP, 109k in 6": [(784, 128), (128,), (128, 64), (64,), (64, 10), (10,)],
    "400 of 250": [(250,)] * 400,
    "10M in 10": [(1000, 1000)] * 10,
}


class Turn:
    """An optimizer and its variables."""

    def __init__(self, cls: Any, shapes: list[tuple[int, ...]]) -> None:
        self.variables = [keras.Variable(torch.randn(shape)) for shape in shapes]
        self.grads = [torch.randn(shape) for shape in shapes]
        self.opt = cls(1e-3)
        self.opt.build(self.variables)

    def update(self) -> None:
        self.opt._backend_update_step(self.grads, self.variables, self.opt.learning_rate)

    def apply(self) -> None:
        self.opt.apply(self.grads, self.variables)


def seconds(what: Any) -> float:
    begin = perf_counter()
    what()
    return perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=fusedopt.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fusedopt.set_num_threads(options.threads)
    print(f"Keras {keras.__version__}, torch {torch.__version__}, {options.threads} threads\n")
    print("| optimizer | variables | update: Keras | fusedopt | ratio | apply: ratio |")
    print("|---|---|---|---|---|---|")
    for name in fusedopt.keras.__all__:
        for model, shapes in MODELS.items():
            ours = Turn(getattr(fusedopt.keras, name), shapes)
            theirs = Turn(getattr(keras.optimizers, name), shapes)
            row = [name, model]
            for method in ("update", "apply"):
                pair = [getattr(turn, method) for turn in (theirs, ours)]
                times: list[list[float]] = [[], []]
                for i in range(-3, options.rounds):
                    for k in (0, 1) if i % 2 else (1, 0):
                        spent = seconds(pair[k])
                        if i >= 0:
                            times[k].append(spent)
                ratio = median(b / a for a, b in zip(*times, strict=True))
                if method == "update":
                    row += [f"{median(column) * 1e6:,.0f} us" for column in times]
                row.append(f"{ratio:.2f}")
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
