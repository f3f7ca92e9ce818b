"""A recording in pictures: time per element against size, bars of models, scaling over threads."""

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
        return 6.5 * len(states) if any(len(n) > 1 for n, _ in states[0][1].values()) else 0
    if picture == "models":
        bars = [len(stats.summarize(e)) for e in _models(recording)]
        return math.ceil(len(bars) / 2) * (1.0 + 0.22 * max(bars)) if bars else 0
    return 5.0 if len(_scaling(recording)) else 0


def _styles(recording: Recording) -> dict[str, dict[str, Any]]:
    """Return how each contender's line looks: a colour for those that matter most, else grey."""
    styles = {}
    for i, name in enumerate(recording.titles):
        styles[name] = {
            "color": COLOURS.get(name, "0.72"), "marker": "os^Dv"[i % 5], "markersize": 3.5,
            "linewidth": 1.6 if name in COLOURS else 0.9, "zorder": 2 + (name in COLOURS),
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
            name, (x, y), (1.06, math.exp(place)), fontsize=8, va="center",
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
            ends.append((n[-1], float(y[-1]), recording.titles[name], styles[name]["color"]))
        _label_ends(ax, ends)
        ax.set(ylabel="ns per parameter and step", title=state)
        ax.grid(alpha=0.3, which="major")
    axes[-1].set_xlabel("parameters in one array")


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
    """Draw for each model a bar for each contender: its time over fusedopt's."""
    entries, styles = _models(recording), _styles(recording)
    axes = part.subplots(math.ceil(len(entries) / 2), 2, squeeze=False).ravel()
    for ax in axes[len(entries) :]:
        ax.set_axis_off()
    most = max(sum(s.name != AGAIN for s in stats.summarize(entry)) for entry in entries)
    for ax, entry in zip(axes, entries, strict=False):
        found = [s for s in stats.summarize(entry) if s.name != AGAIN][::-1]
        names = [recording.titles.get(s.name, s.name) for s in found]
        ratios = [s.ratio for s in found]
        ax.barh(names, ratios, color=[styles[s.name]["color"] for s in found], height=0.7)
        ax.errorbar(
            ratios, range(len(found)), fmt="none", ecolor="0.25", elinewidth=0.8,
            xerr=[[s.ratio - s.low for s in found], [s.high - s.ratio for s in found]],
        )  # fmt: skip
        for i, s in enumerate(found):
            ax.text(s.high * 1.06, i, f"{report.ratio_text(s.ratio)}", va="center", fontsize=7)
        ours = next(s for s in found if s.name == OURS)
        ax.set(xscale="log", xlim=(min(ratios) / 1.5, max(s.high for s in found) * 2.2))
        ax.set_ylim(len(found) - most - 0.6, len(found) - 0.4)  # bars of one thickness
        ax.axvline(1, color="0.4", linewidth=0.8, zorder=0)
        ax.set_title(
            f"{entry.title}: {entry.tensors} arrays, {entry.elements / 1e6:.3g}M\n"
            f"{entry.cache}; fusedopt {report.time_text(ours.seconds)}", fontsize=9,
        )  # fmt: skip
        ax.tick_params(axis="y", labelsize=8)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.xaxis.set_minor_formatter(lambda x, _: "")
        ax.grid(alpha=0.3, axis="x")
    part.supxlabel("time of a step over fusedopt's (1: as fast; to the right: slower)", fontsize=9)


def _scaling(recording: Recording) -> dict[tuple[str, str], list[Entry]]:
    """Return entries by case and state of the caches, if measured on several thread counts."""
    by: dict[tuple[str, str], list[Entry]] = {}
    for entry in recording.usual:
        if entry.rounds:
            by.setdefault((entry.case, entry.cache), []).append(entry)
    return {k: v for k, v in by.items() if len({e.threads for e in v}) > 1}


def _draw_scaling(recording: Recording, part: Any) -> None:
    """Draw steps per second over one thread's of fusedopt against the number of threads."""
    cases, styles = _scaling(recording), _styles(recording)
    axes = part.subplots(1, len(cases), squeeze=False)[0]
    for ax, entries in zip(axes, cases.values(), strict=True):
        points: dict[str, dict[int, float]] = {}
        for entry in entries:
            for s in stats.summarize(entry):
                points.setdefault(s.name, {})[entry.threads] = s.seconds
        one = points[OURS][min(points[OURS])]
        ends = []
        ax.set(xscale="log", yscale="log")
        for name, by_threads in points.items():
            if name != AGAIN and len(by_threads) > 1:
                threads = sorted(by_threads)
                speed = [one / by_threads[k] for k in threads]
                ax.plot(threads, speed, **styles[name])
                end = (threads[-1], speed[-1])
                ends.append((*end, recording.titles[name], styles[name]["color"]))
        counts = sorted({e.threads for e in entries})
        _label_ends(ax, ends)
        ax.set_xticks(counts, [str(k) for k in counts])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.set(xlabel="threads", title=f"{entries[0].title}, {entries[0].cache}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("speed, fusedopt on one thread is 1")


PANELS: dict[str, Callable[[Recording, Any], None]] = {
    "sizes": _draw_sizes,
    "models": _draw_models,
    "scaling": _draw_scaling,
}
