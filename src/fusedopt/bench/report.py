"""A recording in words and tables: for the terminal, for a Markdown page, for the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fusedopt.bench import stats
from fusedopt.bench.contenders import AGAIN, LIMIT, OURS
from fusedopt.bench.recording import Entry, Memory, Recording

Table = list[list[str]]  # the first row is the head
PICTURES = ("sizes", "models")
OF_RULES = (
    "for each parameter, bytes kept as state and moved by a step; fusedopt's time as a part of "
    "others' times."
)


def time_text(seconds: float) -> str:
    """Return a time with three digits and a suitable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns"


def ratio_text(ratio: float) -> str:
    """Return a ratio with about three digits."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def heading(entry: Entry) -> str:
    """Return one line about what an entry measures."""
    tensors = "1 array" if entry.tensors == 1 else f"{entry.tensors} arrays"
    return (
        f"{entry.title}: {entry.optimizer}, {tensors}, {entry.elements:,} parameters, "
        f"{entry.moved / 1e6:.4g} MB moved; {entry.threads} "
        f"thread{'s' * (entry.threads > 1)}; {entry.cache}{beside(entry)}"
    )


def beside(entry: Entry) -> str:
    """Return words about the busy processes of an entry; nothing if there were none."""
    return f"; beside {entry.busy} busy process{'es' * (entry.busy > 1)}" if entry.busy else ""


def background(entry: Entry) -> str:
    """Return the noise and the other load while an entry was measured."""
    left, all_ = len(stats.calm(entry, OURS)), entry.rounds
    disturbed = f"; {all_ - left} of {all_} rounds disturbed" * (left < all_)
    busy = f"other load {stats.disturbance(entry):.2f} CPUs"
    return f"noise {stats.noise(entry):.1%}, {busy}{disturbed}"


def entry_table(entry: Entry, titles: dict[str, str]) -> Table:
    """Return a line for each contender that took part."""
    table = [["", "time", "bytes", "GB/s", "of limit", "/ fusedopt", "95% interval", "rounds"]]
    for s in stats.summarize(entry):
        table.append([
            titles.get(s.name, s.name), time_text(s.seconds), f"{s.moved / entry.elements:.3g}",
            f"{s.moved / s.seconds / 1e9:.1f}",
            f"{s.of_limit:.0%}", ratio_text(s.ratio), f"{ratio_text(s.low)} - {ratio_text(s.high)}",
            str(s.rounds),
        ])  # fmt: skip
    return table


def memory_table(rows: Sequence[Memory], titles: dict[str, str]) -> Table:
    """Return a line for each contender of one case."""
    head = ["", "temporary bytes of a step", "per parameter", "state per parameter", "measured by"]
    table = [head]
    for m in rows:
        if m.temporary is not None and m.state is not None:
            table.append([
                titles.get(m.contender, m.contender), f"{m.temporary:,}",
                f"{m.temporary / m.elements:.2f}", f"{m.state / m.elements:.2f}", m.how,
            ])  # fmt: skip
    return table


def grouped(names: dict[str, str], titles: dict[str, str]) -> list[str]:
    """Return 'reason: contender, contender' for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in names.items():
        reasons.setdefault(why, []).append(titles.get(name, name))
    return [f"{', '.join(members)}: {why}" for why, members in reasons.items()]


def aligned(table: Table) -> list[str]:
    """Lay a table out for a terminal: the first column to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for first, *rest in table:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  " + "  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def markdown(table: Table) -> list[str]:
    """Lay a table out in Markdown."""
    head, *rows = table
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def by_case(memory: Iterable[Memory]) -> dict[str, list[Memory]]:
    """Return memory measurements by their case's name."""
    cases: dict[str, list[Memory]] = {}
    for m in memory:
        cases.setdefault(m.case, []).append(m)
    return cases


def text(recording: Recording) -> str:
    """Return all of a recording for the terminal."""
    titles, lines = recording.titles, []
    for entry in recording.entries:
        if entry.skipped:
            lines += ["", heading(entry), f"  skipped: {entry.skipped}"]
            continue
        if entry.rounds:
            lines += ["", f"{heading(entry)}; {background(entry)}"]
            lines += aligned(entry_table(entry, titles))
        elif entry.left_out:  # fusedopt itself
            lines += ["", heading(entry)]
        lines += [f"  left out: {line}" for line in grouped(entry.left_out, titles)]
    for case, rows in by_case(recording.memory).items():
        lines += ["", f"memory, {case}: {rows[0].elements:,} parameters"]
        lines += aligned(memory_table(rows, titles))
        lines += [
            f"  left out: {line}"
            for line in grouped({m.contender: m.why for m in rows if m.why}, titles)
        ]
    rules = rule_table(recording)
    if len(rules) > 1:
        lines += ["", f"optimizers: {OF_RULES}", *aligned(rules)]
    costs = cost_table(recording)
    if len(costs) > 1:
        lines += ["", "fit of time to size", *aligned(costs)]
    if recording.absent:
        lines += ["", "not available"] + [f"  {line}" for line in grouped(recording.absent, titles)]
    lines += ["", *legend(recording)]
    return "\n".join(lines).lstrip("\n")


def legend(recording: Recording) -> list[str]:
    """Return what the columns mean."""
    moved = "p, g and state read, p and state written"
    return [
        "time: the median of a step. bytes: what a step must move for each parameter"
        f" ({moved}). GB/s: all bytes over the time.",
        "of limit: the limit's time over the contender's. The limit moves the bytes of"
        f" {recording.settings['dtype']} state in C without arithmetic, in the fastest of several"
        " ways; contenders with narrower state may be faster.",
        "/ fusedopt: time over fusedopt's in the same round: median, and its 95% bootstrap"
        " interval.",
        "noise: the interquartile range of the limit's own times over their median. other load:"
        " CPUs that other processes and the host kept busy; rounds with more than"
        f" {stats.CALM:g} were repeated, and do not count unless they are more than half.",
        *checked(recording),
        f"warm: steps are repeated. cold: {recording.evicted >> 20} MiB are read before a step,"
        " or the arrays are larger than the caches.",
    ]


def checked(recording: Recording) -> list[str]:
    """Return how the contenders' results were checked."""
    if not recording.tolerances:
        return []
    usual = min(recording.tolerances.values())
    others = {name: f"{limit:g}" for name, limit in recording.tolerances.items() if limit != usual}
    text = "; ".join(grouped(others, recording.titles))
    return [
        "Before timing, two steps of a contender are checked against"
        f" fusedopt.reference: they may differ by {usual:g} learning rates"
        + f" (narrow formats: {text})."
        * bool(text)
    ]


def sizes(
    recording: Recording, cache: str | None = None
) -> dict[str, tuple[list[float], list[float]]]:
    """Return for each contender sizes and times, of the cases in one array, on most threads.

    With `cache`, only those of that state if both were measured.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    entries = [e for e in recording.usual if e.kind == "size" and e.rounds]
    most = max((e.threads for e in entries), default=0)
    seen: set[str] = set()
    for entry in sorted(entries, key=lambda e: (e.elements, e.cache != cache)):
        if entry.threads != most or entry.case in seen:
            continue
        seen.add(entry.case)
        for s in stats.summarize(entry):
            n, t = curves.setdefault(s.name, ([], []))
            n.append(entry.elements)
            t.append(s.seconds)
    return curves


def scaling_table(recording: Recording) -> Table:
    """Return the speed of each contender on each number of threads, of cases measured on several.

    A case and state of the caches have a column for each number of threads.
    """
    by: dict[tuple[str, str], list[Entry]] = {}
    for entry in recording.usual:
        if entry.rounds:
            by.setdefault((entry.title, entry.cache), []).append(entry)
    head, rows = [""], {name: [title] for name, title in recording.titles.items()}
    for (title, cache), entries in by.items():
        if len({entry.threads for entry in entries}) == 1:
            continue
        entries = sorted(entries, key=lambda entry: entry.threads)
        times = [{s.name: s.seconds for s in stats.summarize(entry)} for entry in entries]
        for entry, seconds in zip(entries, times, strict=True):
            head.append(f"{title}, {cache}: {entry.threads} thread{'s' * (entry.threads > 1)}")
            for name, row in rows.items():
                known = name in seconds and all(name in other for other in times)
                row.append(f"{times[0][OURS] / seconds[name]:.2f}" if known else "")
    return [head, *(row for name, row in rows.items() if any(row[1:]) and name != AGAIN)]


def cost_table(recording: Recording) -> Table:
    """Return the fit of time to size for each contender that has enough sizes."""
    large = ["large: ns / element", "large: elements >"]
    head = ["", "fixed", "ns / element", *large, "largest error"]
    table = [head]
    for name, (n, t) in sizes(recording, "warm").items():
        cost = stats.fit_cost(n, t)
        if cost is not None:
            table.append([
                recording.titles.get(name, name), time_text(cost.fixed), f"{cost.near * 1e9:.3f}",
                f"{cost.far * 1e9:.3f}", f"{cost.bend:.1g}", f"{cost.off:.0%}",
            ])  # fmt: skip
    return table


def rule_table(recording: Recording) -> Table:
    """Return a line for each optimizer and case, if there are several optimizers."""
    table = [["", "case", "state", "moved", "time", "of limit", "of torch's best", "of NumPy"]]
    if len(recording.optimizers) == 1:
        return table
    for entry in recording.entries:
        found = {s.name: s for s in stats.summarize(entry)}
        if OURS not in found:
            continue
        torch = [s.ratio for s in found.values() if s.name.startswith("torch-")]
        numpy = [s.ratio for s in found.values() if s.name == "numpy"]
        kept = entry.held / entry.elements - 2 * np.dtype(recording.settings["dtype"]).itemsize
        table.append([
            entry.optimizer, f"{entry.title}, {entry.cache}{beside(entry)}", f"{kept:.3g}",
            f"{entry.moved / entry.elements:.3g}", time_text(found[OURS].seconds),
            f"{found[OURS].of_limit:.0%}",
            *(f"{1 / min(ratios):.2f}" if ratios else "-" for ratios in (torch, numpy)),
        ])  # fmt: skip
    return table


def not_won(recording: Recording) -> list[str]:
    """Return a line for each entry in which a peer is as fast, or a narrow format is slower."""
    lines = []
    for entry in recording.entries:
        faster, level, slower = [], [], []
        for s in stats.summarize(entry):
            name = recording.titles.get(s.name, s.name)
            own = name.startswith(OURS)
            text = f"{name} {ratio_text(s.ratio)}"
            if own and s.moved < entry.moved and s.low > 1.02:
                slower.append(text)
            elif own or s.name == LIMIT:
                continue
            elif s.high < 0.98:
                faster.append(text)
            elif s.low < 1.02:
                level.append(text)
        parts = [
            f"{what}: {', '.join(names)}"
            for what, names in (
                ("faster", faster),
                ("no measurable difference", level),
                ("fewer bytes, but slower", slower),
            )
            if names
        ]
        if parts:
            lines.append(f"{place(recording, entry)}: {'; '.join(parts)}")
    return lines


def place(recording: Recording, entry: Entry) -> str:
    """Return an entry's case and circumstances, in short."""
    optimizer = f"{entry.optimizer}, " * (len(recording.optimizers) > 1)
    threads = f"{entry.threads} thread{'s' * (entry.threads > 1)}"
    return f"{optimizer}{entry.title}, {threads}, {entry.cache}{beside(entry)}"


def page(recording: Recording, pictures: Sequence[str]) -> str:
    """Return the Markdown page of a recording; `pictures` lie beside it as PNG files."""
    titles, s = recording.titles, recording.settings
    lines = [
        "# Benchmark of a step",
        "",
        f"{s['optimizer']}, {s['dtype']}; recorded on {recording.date} by",
        "",
        f"```text\n{recording.command}\n```",
        "",
        "which writes this page. The figures are for the machine below; run it on yours.",
        *([] if recording.complete else ["", "**The run was interrupted; results are partial.**"]),
        "",
    ]
    lines += [f"* {line}" for line in legend(recording)]
    lines += ["", "| machine | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in recording.machine.items()]
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in recording.versions.items()) + "."]
    if recording.absent:
        lines += ["", "Not available:", ""]
        lines += [f"* {line}" for line in grouped(recording.absent, titles)]
    lines += ["", "## Where fusedopt does not win", "", "Times over fusedopt's, in float32:", ""]
    lines += [f"* {line}" for line in not_won(recording)] or ["Nowhere in this recording."]
    names = {"sizes": "Time by size", "models": "Models"}
    for picture in pictures:
        lines += ["", f"## {names[picture]}", "", f"![{names[picture]}]({picture}.png)"]
    scaling = scaling_table(recording)
    if len(scaling) > 1:
        lines += ["", "## Scaling over threads", "", "Speed; fusedopt on the fewest threads is 1."]
        lines += ["", *markdown(scaling)]
    rules = rule_table(recording)
    if len(rules) > 1:
        lines += ["", "## Optimizers", "", f"{OF_RULES[0].upper()}{OF_RULES[1:]}", ""]
        lines += markdown(rules)
    costs = cost_table(recording)
    if len(costs) > 1:
        lines += ["", "## Fit of time to size", "", "Warm if both were measured.", ""]
        lines += markdown(costs)
    for case, rows in by_case(recording.memory).items():
        lines += ["", f"## Memory, {case}: {rows[0].elements:,} parameters", ""]
        lines += markdown(memory_table(rows, titles)) + [""]
        missing = {
            m.contender: m.why for m in rows if m.why and m.contender not in recording.absent
        }
        lines += [f"* left out: {line}" for line in grouped(missing, titles)]
    lines += ["", "## All figures"]
    for entry in recording.entries:
        lines += ["", f"### {heading(entry)}", ""]
        if entry.skipped:
            lines.append(f"Skipped: {entry.skipped}.")
        elif entry.rounds:
            lines += [
                f"Noise{background(entry).removeprefix('noise')}.",
                "",
                *markdown(entry_table(entry, titles)),
            ]
            left = [f"* left out: {line}" for line in grouped(entry.left_out, titles)]
            lines += ["", *left] * bool(left)
    return "\n".join(lines) + "\n"
