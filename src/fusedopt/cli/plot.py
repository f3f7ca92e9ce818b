"""A picture of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def save_plot(path: Path, history: Mapping[str, Sequence[float]], title: str) -> None:
    """Draw loss, held-out accuracy and learning rate over the steps into a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True)
    steps = range(1, len(history["loss"]) + 1)
    window = max(1, len(steps) // 100)
    smooth = [
        sum(history["loss"][max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window))
        for i in range(len(steps))
    ]
    loss.plot(steps, history["loss"], color="0.8", linewidth=0.6, label="mini-batch")
    loss.plot(steps, smooth, color="C0", label=f"mean of {window + 1}")
    loss.set(ylabel="training loss", yscale="log", title=title)
    loss.legend()
    accuracy.plot(history["epoch_step"], history["accuracy"], "o-", color="C2")
    accuracy.set(ylabel="held-out accuracy")
    rate.plot(steps, history["lr"], color="C1")
    rate.set(ylabel="learning rate", xlabel="step")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
