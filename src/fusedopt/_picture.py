"""The picture of a run: one figure, from a History; and that of a sweep over learning rates.

Up to 12 leaves are lines, in Okabe and Ito's colours, one for each layer, whose bias is dashed;
more leaves are a heat map of leaves x steps in colours of rising lightness. Both can be read by the
colour-blind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusedopt._check import Array

History = Any  # of fusedopt.monitor, which imports this module
LINES = 12  # leaves that are lines, and names beside a heat map
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
RATIOS = (1e-6, 1.0)  # the same colours in every picture
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def draw(history: History, path: str | os.PathLike[str] | None, title: str, curves: Curves) -> Any:
    """Return the figure, see `History.plot`."""
    steps = np.array(history.steps)
    loss, lr = history.series("loss"), history.series("lr")
    many = len(history.names) > LINES
    panels: list[tuple[float, Any]] = []  # height, function that draws it
    losses = {label: curve for label, curve in curves.items() if label.endswith("loss")}
    if np.isfinite(loss).any() or losses:
        panels.append((2.0, lambda ax: _loss(ax, steps, loss, losses)))
    for label, (x, y) in curves.items():
        if label in losses:
            continue
        panels.append((1.4, lambda ax, x=x, y=y, label=label: _curve(ax, x, y, "o-", label)))
    if np.isfinite(lr).any():
        panels.append((1.4, lambda ax: _curve(ax, steps, lr, "-", "learning rate")))
    if history.names:
        leaves = _map if many else _lines
        panels += [
            (2.0, lambda ax: _norms(ax, history, steps, many)),
            (2.8, lambda ax: leaves(ax, history, steps, "update_ratio")),
            (2.8 if many else 1.8, lambda ax: leaves(ax, history, steps, "zero_fraction")),
        ]
    figure, axes = _figure([height for height, _ in panels])
    for ax, (_, panel) in zip(axes, panels, strict=True):
        panel(ax)
    if history.skipped:
        label = f"skipped step ({history.skips})"
        axes[0].plot(
            history.skipped, np.full(len(history.skipped), 0.03), "|", color=COLOURS[-1],
            transform=axes[0].get_xaxis_transform(), label=label,
        )  # fmt: skip
        _legend(axes[0])
    axes[0].set_title(title, loc="left")
    axes[-1].set(xlabel="step")
    if not many:
        figure.align_ylabels(axes)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _figure(heights: list[float]) -> tuple[Any, Any]:
    """Return a figure with axes of these heights, one below the other, and the axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError('a plot needs: pip install "fusedopt[demo]"') from exc
    figure = Figure(figsize=(10, 0.8 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    return figure, axes


def _positive(values: Array) -> Array:
    return np.where(values > 0, values, np.nan)


def _legend(ax: Any) -> None:
    ax.legend(loc="upper left", bbox_to_anchor=(1.005, 1), fontsize=8, frameon=False)


def _curve(ax: Any, x: Any, y: Any, form: str, label: str) -> None:
    ax.plot(x, y, form, color=COLOURS[0], linewidth=1.2, markersize=3)
    ax.set(ylabel=label)
    ax.grid(alpha=0.3)


def _loss(ax: Any, steps: Array, loss: Array, others: Curves) -> None:
    width = len(loss) // 50
    if width < 2:
        ax.plot(steps, loss, color=COLOURS[0], label="records")
    else:
        ax.plot(steps, loss, color="0.75", linewidth=0.6, label="records")
        parts = [loss[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(loss))]
        smooth = [np.median(part) for part in parts]  # NaN stays
        ax.plot(steps, smooth, color=COLOURS[0], label=f"median of {width // 2 * 2 + 1}")
    for i, (label, (x, y)) in enumerate(others.items(), start=1):
        ax.plot(
            x, y, "o-", color=COLOURS[-i % len(COLOURS)], linewidth=1.2, markersize=3, label=label
        )
    known = loss[np.isfinite(loss)]
    log = known.size and known.min() > 0
    ax.set(ylabel="loss" if others else "training loss", yscale="log" if log else "linear")
    ax.grid(alpha=0.3)
    _legend(ax)


def _norms(ax: Any, history: History, steps: Array, many: bool) -> None:
    norms = np.array(list(history.column("grad_norm").values()))
    if many:
        seen = np.where(np.isnan(norms).all(axis=0), 0, norms)  # records without a gradient
        low, high = np.nanquantile(seen, [0.1, 0.9], axis=0)
        ax.fill_between(steps, _positive(low), _positive(high), color="0.8", label="80% of leaves")
    else:
        _lines(ax, history, steps, "grad_norm")
    everything = np.sqrt(np.nansum(norms**2, axis=0))
    ax.plot(steps, _positive(everything), color="black", linewidth=1.2, label="all leaves")
    ax.set(ylabel="gradient norm", yscale="log")
    ax.grid(alpha=0.3)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles[-2 if many else -1 :], labels[-2 if many else -1 :], loc="upper left",
        bbox_to_anchor=(1.005, 1), fontsize=8, frameon=False,
    )  # fmt: skip


LABELS = {"update_ratio": "update / parameter", "zero_fraction": "zeros in gradient"}


def _looks(names: Sequence[str]) -> list[tuple[str, Any]]:
    """Return colour and dashes of each leaf: a colour for each layer, whose second leaf is dashed.

    Leaves whose names share all but the last part are a layer; leaves of which more than two do, as
    in a plain list, have a colour each.
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(max(name.rpartition("[")[0], name.rpartition(".")[0]), []).append(name)
    groups: list[list[str]] = []
    for inside in layers.values():
        groups += [inside] if len(inside) <= 2 else [[name] for name in inside]
    dashes = ("-", (0, (3, 1.5)), ":")
    looks = {}
    for i, group in enumerate(groups):
        for k, name in enumerate(group):
            lap = k if len(groups) <= len(COLOURS) else i // len(COLOURS)
            looks[name] = COLOURS[i % len(COLOURS)], dashes[lap % len(dashes)]
    return [looks[name] for name in names]


def _lines(ax: Any, history: History, steps: Array, column: str) -> None:
    zeros = column == "zero_fraction"
    table = history.column(column)
    looks = _looks([name.split()[-1].strip("()") for name in table])
    for (name, values), (colour, dashes) in zip(table.items(), looks, strict=True):
        ax.plot(
            steps, values if zeros else _positive(values), color=colour, linestyle=dashes,
            linewidth=1.2, label=_short(name),
        )  # fmt: skip
    if zeros:
        ax.set(ylabel=LABELS[column], ylim=(-0.03, 1.03))
    elif column == "update_ratio":
        ax.axhspan(1e-5, 1e-1, color="0.5", alpha=0.1, linewidth=0, label="usual range")
        ax.axhline(1e-3, color="0.5", linestyle=":", label="1e-3")
        ax.set(ylabel=LABELS[column], yscale="log")
        _legend(ax)
    ax.grid(alpha=0.3)


def _map(ax: Any, history: History, steps: Array, column: str) -> None:
    from matplotlib.colors import LogNorm

    values = np.array(list(history.column(column).values()))
    between = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[steps[0] - 0.5], between, [steps[-1] + 0.5]])
    ratio = column == "update_ratio"
    ax.set_facecolor("0.85")  # no gradient, or no update
    mesh = ax.pcolormesh(
        edges, np.arange(len(values) + 1), _positive(values) if ratio else values, rasterized=True,
        cmap="viridis" if ratio else "cividis",
        **({"norm": LogNorm(*RATIOS)} if ratio else {"vmin": 0, "vmax": 1}),
    )  # fmt: skip
    beside = ax.inset_axes((1.015, 0, 0.02, 1))
    ax.figure.colorbar(mesh, cax=beside, label=LABELS[column], extend="both" if ratio else None)
    shown = np.linspace(0, len(values) - 1, LINES).round().astype(int)
    ax.set_yticks(shown + 0.5, [_short(history.names[i]) for i in shown], fontsize=7)
    ax.invert_yaxis()


def _short(name: str) -> str:
    name = name.split()[-1].strip("()") if name.endswith(")") else name  # torch's names
    return name if len(name) <= 28 else f"…{name[-27:]}"


def draw_sweep(test: Any, path: str | os.PathLike[str] | None) -> Any:
    """Return the figure, see `RangeTest.plot`."""
    figure, (ax,) = _figure([3.5])
    ax.plot(test.rates, test.losses, ".", color="0.6", markersize=3, label="loss")
    ax.plot(test.rates, test.smoothed, color=COLOURS[0], label="mean of neighbours")
    if test.suggestion is not None:
        label = f"suggestion {test.suggestion:.3g} ({test.rule})"
        ax.axvline(test.suggestion, color=COLOURS[5], linestyle="--", label=label)
    else:
        ax.set_title(f"no suggestion: {test.reason}", fontsize=9)
    shown = test.smoothed[np.isfinite(test.smoothed)]
    if len(shown) and shown.max() > shown.min():
        margin = 0.1 * (shown.max() - shown.min())
        ax.set_ylim(shown.min() - margin, shown.max() + margin)
    steps = np.diff(test.rates)
    even = len(steps) > 1 and np.allclose(steps, steps[0])
    ax.set(xscale="linear" if even else "log", xlabel="learning rate", ylabel="loss")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
