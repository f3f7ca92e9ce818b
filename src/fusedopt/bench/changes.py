"""What changed between two recordings: the times of contenders over fusedopt's, case by case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusedopt.bench import report, stats
from fusedopt.bench.contenders import AGAIN, OURS
from fusedopt.bench.recording import Entry, Recording

LEAST = 0.05  # smaller changes are found between two runs of the same code

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Change:
    """A contender's time over fusedopt's in two recordings of a case."""

    where: str
    title: str
    then: stats.Summary
    now: stats.Summary

    @property
    def factor(self) -> float:
        """The ratio now over the ratio then: below 1, fusedopt lost time."""
        return self.now.ratio / self.then.ratio

    @property
    def is_clear(self) -> bool:
        """Whether it is larger than `LEAST`, and the intervals do not meet."""
        apart = self.now.high < self.then.low or self.now.low > self.then.high
        return apart and not 1 / (1 + LEAST) < self.factor < 1 + LEAST


def _by_key(recording: Recording) -> dict[Key, Entry]:
    return {
        (recording.settings["dtype"], e.optimizer, e.case, e.threads, e.cache, e.busy): e
        for e in recording.entries
        if e.rounds
    }


def changes(then: Recording, now: Recording) -> list[Change]:
    """Return a change for each contender of each case that both recordings hold."""
    found, before = [], _by_key(then)
    for key, entry in _by_key(now).items():
        if key not in before:
            continue
        old = {s.name: s for s in stats.summarize(before[key])}
        for s in stats.summarize(entry):
            if s.name in old and s.name not in (OURS, AGAIN):
                title = now.titles.get(s.name, s.name)
                found.append(Change(report.place(now, entry), title, old[s.name], s))
    return found


def text(then: Recording, now: Recording, name: str) -> str:
    """Return the clear changes in a table, and what makes the recordings differ otherwise.

    `name` is that of the first recording's file.
    """
    found = changes(then, now)
    if not found:
        return f"{name} holds no case and contender that were measured now"
    clear = [change for change in found if change.is_clear]
    lines = [f"compared with {name}, recorded on {then.date}"]
    for what in ("processor", "isa", "backend", "fusedopt"):
        old, new = (r.machine.get(what, r.versions.get(what)) for r in (then, now))
        if old != new:
            lines.append(f"  {what}: {old} then, {new} now")
    if clear:
        table = [["time over fusedopt's", "then", "now", "now / then", "fusedopt, by it"]]
        for change in clear:
            pair = [report.ratio_text(s.ratio) for s in (change.then, change.now)]
            verdict = "slower" if change.factor < 1 else "faster"
            table.append([
                f"{change.where}: {change.title}", *pair, f"{change.factor:.2f}", verdict,
            ])  # fmt: skip
        lines += report.aligned(table)
    lines.append(
        f"{len(found) - len(clear)} of {len(found)} ratios did not change: by less than "
        f"{LEAST:.0%}, or their 95% intervals meet."
    )
    return "\n".join(lines)
