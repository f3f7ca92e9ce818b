"""A recording in words and tables: for the terminal, for a Markdown page, for the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusedopt.bench import stats
from fusedopt.bench.contenders import LIMIT, OURS
from fusedopt.bench.recording import Entry, Memory, Recording

Table = list[list[str]]  # the first row is the head
PICTURES = ("sizes", "models", "scaling")


def time_text(seconds: float) -> str:
    """Return a time with three digits and a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns"


def ratio_text(ratio: float) -> str:
    """Return a ratio with as many digits as it deserves."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def heading(entry: Entry) -> str:
    """Return what an entry measures, in a line."""
    tensors = "1 array" if entry.tensors == 1 else f"{entry.tensors} arrays"
    return (
        f"{entry.title}: {tensors}, {entry.elements:,} parameters, "
        f"{entry.moved / 1e6:.4g} MB moved; {entry.threads} "
        f"thread{'s' * (entry.threads > 1)}; {entry.cache}"
    )


def background(entry: Entry) -> str:
    """Return what else went on while an entry was measured."""
    left, all_ = len(stats.calm(entry, OURS)), entry.rounds
    disturbed = f"; {all_ - left} of {all_} rounds disturbed" * (left < all_)
    busy = f"others on {stats.disturbance(entry):.2f} CPUs"
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
    table = [["", "temporary bytes of a step", "per parameter", "state per parameter", "found by"]]
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


def plain(table: Table) -> list[str]:
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
        elif entry.rounds:
            lines += ["", f"{heading(entry)}; {background(entry)}"]
            lines += plain(entry_table(entry, titles))
            lines += [f"  left out: {line}" for line in grouped(entry.left_out, titles)]
    for case, rows in by_case(recording.memory).items():
        lines += ["", f"memory, {case}: {rows[0].elements:,} parameters"]
        lines += plain(memory_table(rows, titles))
        lines += [
            f"  left out: {line}"
            for line in grouped({m.contender: m.why for m in rows if m.why}, titles)
        ]
    costs = cost_table(recording)
    if len(costs) > 1:
        lines += ["", "cost against size, fitted", *plain(costs)]
    if recording.absent:
        lines += ["", "absent"] + [f"  {line}" for line in grouped(recording.absent, titles)]
    lines += ["", *legend(recording)]
    return "\n".join(lines).lstrip("\n")


def legend(recording: Recording) -> list[str]:
    """Return what the columns mean."""
    moved = "p, g and state read, p and state written"
    return [
        "time: of a step, the median. bytes: for each parameter, what the step has to move"
        f" ({moved}). GB/s: all of them over the time.",
        "of limit: the limit's time over the time; the limit moves the bytes of"
        f" {recording.settings['dtype']} state in C without arithmetic, in the fastest of several"
        " ways, so who keeps narrower state may take less.",
        "/ fusedopt: time over fusedopt's of the same round; median, 95% bootstrap interval of it.",
        "noise: the middle half of the limit's own times, over their median. others: CPUs that"
        f" other processes and the host kept busy meanwhile; rounds with more than {stats.CALM:g}"
        " were repeated, and do not count unless they are over half.",
        *checked(recording),
        f"warm: the step is repeated. cold: {recording.evicted >> 20} MiB are read before a step,"
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
        "Before it is timed, a contender takes two steps and is checked against"
        f" fusedopt.reference: {usual:g} learning rates apart at most"
        + f" (narrow formats: {text})."
        * bool(text)
    ]


def sizes(
    recording: Recording, cache: str | None = None
) -> dict[str, tuple[list[float], list[float]]]:
    """Return for each contender sizes and times, of the cases in one array, on most threads.

    With `cache`, in that state alone where both were measured.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    entries = [e for e in recording.entries if e.kind == "size" and e.rounds]
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


def cost_table(recording: Recording) -> Table:
    """Return the fit of cost against size for each contender that has enough sizes."""
    head = ["", "fixed", "ns / element, near", "far", "beyond elements", "largest error"]
    table = [head]
    for name, (n, t) in sizes(recording, "warm").items():
        cost = stats.fit_cost(n, t)
        if cost is not None:
            table.append([
                recording.titles.get(name, name), time_text(cost.fixed), f"{cost.near * 1e9:.3f}",
                f"{cost.far * 1e9:.3f}", f"{cost.bend:.1g}", f"{cost.off:.0%}",
            ])  # fmt: skip
    return table


def not_won(recording: Recording) -> list[str]:
    """Return a line for each entry in which a peer is as fast as fusedopt, or a format slower."""
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
                ("not to be told apart", level),
                ("fewer bytes, but longer", slower),
            )
            if names
        ]
        if parts:
            where = f"{entry.title}, {entry.threads} thread{'s' * (entry.threads > 1)}"
            lines.append(f"{where}, {entry.cache}: {'; '.join(parts)}")
    return lines


def page(recording: Recording, pictures: Sequence[str]) -> str:
    """Return the Markdown page of a recording; `pictures` lie beside it as PNG files."""
    titles, s = recording.titles, recording.settings
    lines = [
        "# A step, measured",
        "",
        f"{s['optimizer']}, {s['dtype']}; recorded on {recording.date} by",
        "",
        f"```text\n{recording.command}\n```",
        "",
        "which writes this page. Figures are of the machine below; run the command for yours.",
        *([] if recording.complete else ["", "**The run was interrupted; this is a part of it.**"]),
        "",
    ]
    lines += [f"* {line}" for line in legend(recording)]
    lines += ["", "| machine | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in recording.machine.items()]
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in recording.versions.items()) + "."]
    if recording.absent:
        lines += ["", "Absent:", ""] + [f"* {line}" for line in grouped(recording.absent, titles)]
    lines += ["", "## Where fusedopt does not win", "", "Times over fusedopt's, in float32:", ""]
    lines += [f"* {line}" for line in not_won(recording)] or ["Nowhere in this recording."]
    names = {"sizes": "Cost against size", "models": "Models", "scaling": "Scaling over threads"}
    for picture in pictures:
        lines += ["", f"## {names[picture]}", "", f"![{names[picture]}]({picture}.png)"]
    costs = cost_table(recording)
    if len(costs) > 1:
        lines += ["", "## Cost against size, fitted", "", "Warm where both were measured.", ""]
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
