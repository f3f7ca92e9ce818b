"""A recording in pictures: time per element against size, and ratios on models.

The contenders of `COLOURS` are named; all others are grey, and in the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedopt.bench import report, stats
from fusedopt.bench.contenders import AGAIN, LIMIT, OURS
from fusedopt.bench.recording import Entry, Recording

# of Okabe & Ito, told apart by colour-blind readers too
COLOURS = {
    LIMIT: "black",
    OURS: "#d55e00",
    "fusedopt-torch": "#e69f00",
    "fusedopt-int8": "#cc79a7",
    "torch-fused": "#0072b2",
    "torch-foreach": "#56b4e9",
    "numpy": "#009e73",
}


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(recording: Recording, path: Path, picture: str | None = None) -> bool:
    """Draw one picture, or all with data, into a file; return whether there was any."""
    wanted = [p for p in PANELS if picture in (None, p)]
    panels = [(PANELS[p], height) for p in wanted if (height := _height(recording, p))]
    if not panels:
        return False
    heights = [height for _, height in panels]
    figure = _figure(sum(heights))
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (draw, _), part in zip(panels, parts, strict=True):
        draw(recording, part)
    figure.savefig(path, dpi=110)
    return True


def _height(recording: Recording, picture: str) -> float:
    """Return the inches that a picture takes; 0 without data for it."""
    if picture == "sizes":
        states = _curves(recording)
        return 4.2 * len(states) if any(len(n) > 1 for n, _ in states[0][1].values()) else 0
    models = len(_models(recording))
    return 1.6 + 0.55 * models if models else 0


def _others(recording: Recording) -> str:
    """Return what the grey marks are, or an empty string if there are none."""
    count = len(recording.titles.keys() - COLOURS.keys() - {AGAIN})
    return f"grey: {count} others, which the tables name" if count else ""


def _styles(recording: Recording) -> dict[str, dict[str, Any]]:
    """Return how each contender looks: a colour for those that matter most, else grey."""
    styles = {}
    for i, name in enumerate(recording.titles):
        known = name in COLOURS
        styles[name] = {
            "color": COLOURS.get(name, "0.8"), "marker": "os^Dv"[i % 5] if known else "",
            "markersize": 4, "linewidth": 1.8 if known else 0.8, "zorder": 2 + known,
        }  # fmt: skip
    for name, look in ((OURS, "-"), (LIMIT, "--")):
        if name in styles:
            styles[name] |= {"linestyle": look, "linewidth": 2.6, "zorder": 4}
    return styles


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write each line's name beside log axes, without overlaps, joined to the end of the line.

    `ends` holds that end (x, y), the name and the colour.
    """
    low, high = (math.log(v) for v in axes.get_ylim())
    gap = (high - low) * min(0.033, 0.95 / len(ends))
    ends = sorted(ends, key=lambda end: end[1])
    places = [math.log(y) for _, y, _, _ in ends]
    for _ in range(3000):  # push touching labels apart, a little at a time, until none touch
        for i in range(len(places) - 1):
            short = gap - (places[i + 1] - places[i])
            if short > 1e-6:
                places[i] -= short / 2
                places[i + 1] += short / 2
        places = [min(max(p, low + gap / 2), high - gap / 2) for p in places]
    for (x, y, name, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            name, (x, y), (1.04, math.exp(place)), fontsize=8, va="center",
            textcoords=axes.get_yaxis_transform(), color="0.15",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _curves(recording: Recording) -> list[tuple[str, dict[str, tuple[list[float], list[float]]]]]:
    """Return `report.sizes` for each state of the caches, only once if they are equal."""
    states = sorted({e.cache for e in recording.usual if e.kind == "size" and e.rounds})[::-1]
    curves = [(state, report.sizes(recording, state)) for state in states]
    if len(curves) == 2 and curves[0][1] == curves[1][1]:  # no size was measured in both
        return [(" or ".join(states), curves[0][1])]
    return curves or [("", {})]


def _draw_sizes(recording: Recording, part: Any) -> None:
    """Draw the time per element against the size, warm and cold, a line for each contender."""
    states, styles = _curves(recording), _styles(recording)
    axes = part.subplots(len(states), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (state, lines) in zip(axes, states, strict=True):
        each = [t / n for ns, ts in lines.values() for n, t in zip(ns, ts, strict=True)]
        ax.set(xscale="log", yscale="log", ylim=(min(each) * 1e9 / 1.4, max(each) * 1e9 * 1.4))
        ends = []
        for name, (n, t) in lines.items():
            if name == AGAIN:
                continue
            y = np.array(t) / np.array(n) * 1e9
            ax.plot(n, y, **styles[name])
            if name in COLOURS:
                ends.append((n[-1], float(y[-1]), recording.titles[name], styles[name]["color"]))
        _label_ends(ax, ends)
        ax.set(ylabel="ns per parameter (logarithmic)", title=TITLES.get(state, state))
        ax.grid(alpha=0.3, which="major")
    axes[0].text(0.99, 0.95, _others(recording), transform=axes[0].transAxes, ha="right",
                 va="top", fontsize=8, color="0.4")  # fmt: skip
    axes[-1].set_xlabel("parameters in one array (logarithmic)")


TITLES = {
    "warm": "warm: steps are repeated", "cold": "cold: the caches hold other data before a step",
}  # fmt: skip


def _models(recording: Recording) -> list[Entry]:
    """Return an entry for each model, on most threads, the warm one if there are two."""
    entries = [e for e in recording.usual if e.kind in ("model", "many") and e.rounds]
    most = max((e.threads for e in entries), default=0)
    chosen: dict[str, Entry] = {}
    for entry in entries:
        if entry.threads == most and (entry.case not in chosen or entry.cache == "warm"):
            chosen[entry.case] = entry
    return list(chosen.values())


def _draw_models(recording: Recording, part: Any) -> None:
    """Draw a row for each model, and in it a mark for each contender: its time over fusedopt's."""
    entries, styles = _models(recording), _styles(recording)
    ax, names = part.subplots(), []
    for row, entry in enumerate(entries):
        found = {s.name: s for s in stats.summarize(entry) if s.name != AGAIN}
        for name, s in found.items():
            look = styles[name]
            if name not in COLOURS:
                ax.plot(s.ratio, row, "|", color="0.7", markersize=9, zorder=1)
                continue
            ax.plot([s.low, s.high], [row, row], color=look["color"], linewidth=1, zorder=2)
            ax.plot(s.ratio, row, color=look["color"], marker=look["marker"], markersize=8,
                    linestyle="", zorder=3, label=recording.titles[name])  # fmt: skip
        names.append(
            f"{entry.title}: {entry.tensors} arrays, {entry.elements / 1e6:.3g}M\n{entry.cache}; "
            f"fusedopt {report.time_text(found[OURS].seconds)}"
        )
    ax.set(xscale="log", ylim=(len(entries) - 0.5, -0.5))
    ax.set_yticks(range(len(entries)), names, fontsize=8)
    ax.axvline(1, color="0.4", linewidth=0.8, zorder=0)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.xaxis.set_minor_formatter(lambda x, _: "")
    ax.grid(alpha=0.3, axis="x")
    handles, labels = ax.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    ax.legend(shown.values(), shown, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=4,
              fontsize=8, frameon=False, title=_others(recording), title_fontsize=8)  # fmt: skip
    ax.set_xlabel("time of a step over fusedopt's (logarithmic; 1: as fast, to the right: slower)")


PANELS: dict[str, Callable[[Recording, Any], None]] = {
    "sizes": _draw_sizes,
    "models": _draw_models,
}
