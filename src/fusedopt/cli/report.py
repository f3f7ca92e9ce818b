"""What a training run prints at its end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from fusedopt import _tree
from fusedopt.cli import model
from fusedopt.cli.data import Data
from fusedopt.monitor import History


def layers(monitor: History) -> None:
    """Print medians of the last statistics of every layer, and what looks wrong."""
    columns = {
        name: monitor.column(name) for name in ("grad_norm", "update_ratio", "zero_fraction")
    }
    last = min(monitor.window, len(monitor.steps))
    print(f"\nlayer, medians of {last:<3} gradient norm  update / parameter  zeros in the gradient")
    for leaf in monitor.names:
        norm, ratio, zeros = (np.median(by_leaf[leaf][-last:]) for by_leaf in columns.values())
        print(f"{leaf:22}{norm:13.2e}  {ratio:18.1e}  {zeros:21.0%}")
    print("\n".join(monitor.troubles() or ["nothing looks wrong"]))


def digest(params: model.Params) -> str:
    """Return a fingerprint of all weights: equal only if they are, bit for bit."""
    sha = hashlib.sha256()
    for name, array in _tree.leaves("", params):
        sha.update(name.encode() + array.tobytes())
    return sha.hexdigest()


def result(
    params: model.Params,
    shadow: model.Params | None,
    data: Data,
    seconds: Mapping[str, float],
) -> None:
    """Print the held-out result, the errors of each class, and where the time went."""
    loss, predicted = model.evaluate(params, data.x_test, data.y_test)
    wrong = predicted != data.y_test
    print(f"\nheld out: loss {loss:.4f}, accuracy {1 - wrong.mean():.2%} "
          f"({wrong.sum()} of {len(wrong)} wrong)")  # fmt: skip
    labels = data.labels or tuple(map(str, range(data.classes)))
    width = max(5, *map(len, labels))
    print(f"\n{'class':{width}}  errors  taken for")
    for label in range(data.classes):
        mine = data.y_test == label
        taken = np.unique(predicted[mine & wrong], return_counts=True)
        confused = ", ".join(f"{labels[c]} ({n}x)" for c, n in zip(*taken, strict=True))
        counts = f"{(mine & wrong).sum():2} / {mine.sum():<3}"
        print(f"{labels[label]:>{width}}  {counts} {confused}".rstrip())
    ours = seconds["forward+backward"] + seconds["optimizer"]
    if ours > 0:
        print("\ntime")
        for name in ("forward+backward", "optimizer"):
            print(f"  {name:17} {seconds[name]:7.3f} s  {seconds[name] / ours:4.0%}")
    if shadow is not None and seconds["optimizer"] > 0:
        same = "the same bits" if digest(shadow) == digest(params) else "NOT THE SAME: a bug"
        ratio = seconds["reference"] / seconds["optimizer"]
        print(f"  {'NumPy reference':17} {seconds['reference']:7.3f} s  "
              f"for the same optimizer steps: {ratio:.1f} x, {same}")  # fmt: skip
    print(f"\nweights sha256 {digest(params)}")
