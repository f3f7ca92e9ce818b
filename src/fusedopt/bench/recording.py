"""The measurements: a tree of data, with its JSON form. Nothing is computed here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass
class Entry:
    """One case and optimizer, on a number of threads, in one state of the caches.

    `seconds` holds for each contender the time of a step in each round, None if it did not take
    part. `left_out` says why others are missing; `skipped` why the whole case is.
    `placements` are the numbers of rounds on each set of arrays; small cases have several sets.
    `others` are the CPUs that other processes and the host kept busy in each round.
    `moved` and `held` are bytes; `own_moved` those of contenders with state in another format.
    `busy` processes kept CPUs busy on purpose.
    """

    case: str
    title: str
    kind: str
    elements: int
    tensors: int
    moved: int
    held: int
    threads: int
    cache: str
    seconds: dict[str, list[float | None]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None
    placements: list[int] = field(default_factory=list)
    own_moved: dict[str, int] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)
    optimizer: str = ""
    busy: int = 0

    @property
    def rounds(self) -> int:
        """Number of rounds measured."""
        return len(self.others)

    def add_round(self, times: dict[str, float], others: float) -> None:
        """Add the seconds of the contenders in a round, and the CPUs that others kept busy."""
        before = self.rounds
        self.others.append(round(others, 2))
        for name in times:
            self.seconds.setdefault(name, [None] * before)
        for name, column in self.seconds.items():
            # 5 digits exceed any clock's accuracy; rounded here, so that files hold the same
            column.append(float(f"{times[name]:.5g}") if name in times else None)


@dataclass
class Memory:
    """The temporary memory of one contender's step, and its state.

    Both are None for a missing contender; `why` says why.
    """

    case: str
    elements: int
    contender: str
    temporary: int | None = None
    how: str = ""
    state: int | None = None
    why: str = ""


@dataclass
class Recording:
    """A run of the benchmark.

    `settings` are those of `measure.Settings`; `titles` and `tolerances` (see `contenders.Row`) are
    by contender, `versions` by package; `absent` says why contenders are in no case.
    """

    settings: dict[str, Any]
    machine: dict[str, str]
    titles: dict[str, str]
    command: str = ""
    date: str = ""
    evicted: int = 0
    tolerances: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    complete: bool = False

    @property
    def optimizers(self) -> list[str]:
        """The names of the optimizers that were measured."""
        return str(self.settings["optimizer"]).split(",")

    @property
    def usual(self) -> list[Entry]:
        """The entries of the first optimizer, without busy processes."""
        return [e for e in self.entries if e.optimizer == self.optimizers[0] and not e.busy]

    def save(self, path: Path) -> None:
        """Write the recording as JSON."""
        tree = {"schema": SCHEMA, **asdict(self)}
        lines = json.dumps(tree, indent=1)
        path.write_text(_shortened(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what `save` wrote.

        Raises
        ------
        OSError, ValueError
            Naming the file, if it is missing or not a recording.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            alone = {"optimizer": tree["settings"]["optimizer"]}  # of files that name no others
            tree["entries"] = [Entry(**(alone | entry)) for entry in tree["entries"]]
            tree["memory"] = [Memory(**row) for row in tree["memory"]]
            return cls(**tree)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise ValueError(f"{path}: not a recording of fusedopt bench: {exc}") from exc


def _shortened(text: str) -> str:
    """Put every list of numbers on one line."""
    out: list[str] = []
    inside = False
    for line in text.split("\n"):
        if inside:
            out[-1] += line.strip() + (" " if line.endswith(",") else "")
            inside = not line.strip().startswith("]")
        else:
            out.append(line)
            inside = line.endswith("[") and not line.endswith(('"entries": [', '"memory": ['))
    return "\n".join(out)
