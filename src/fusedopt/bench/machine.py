"""What this machine has: caches, free memory, CPUs to run on; and a way to empty the caches."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fusedopt._info import info
from fusedopt._threads import _group_folders, _read

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_USUAL_CACHE = 32 << 20  # where the system does not say


def last_level_cache(root: Path = Path("/")) -> int:
    """Return the bytes of the largest cache that the system reports, 32 MiB if it reports none."""
    sizes = []
    for path in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size"):
        text = _read(path).strip()
        if text[:-1].isdigit() and text[-1:] in _UNITS:
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes, default=_USUAL_CACHE)


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take, by the machine and its control groups.

    None if the system reports neither.
    """
    limits = []
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) << 10)
    for controller, most, used, file_cache in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _group_folders(root, controller):
            limit, usage = _read(folder / most).strip(), _read(folder / used).strip()
            if limit.isdigit() and usage.isdigit():
                stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                limits.append(max(0, int(limit) - int(usage) + int(stat.get(file_cache, 0))))
    return min(limits, default=None)


def cpus(count: int, root: Path = Path("/")) -> list[int]:
    """Return `count` CPUs to run on, one of each core before the second of any.

    Raises
    ------
    ValueError
        If it is below 1, or this process may not run on that many.
    """
    if count < 1:
        raise ValueError(f"--threads {count}: must be >= 1")
    known = hasattr(os, "sched_getaffinity")
    granted = sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count() or 1))
    if count > len(granted):
        raise ValueError(f"--threads {count}: this process may run on {len(granted)} CPUs")
    if not known:
        return []  # the process cannot be bound either

    def place_in_core(cpu: int) -> int:
        text = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first = text.strip().replace("-", ",").split(",")[0]
        return 0 if first in ("", str(cpu)) else 1

    return sorted(granted, key=lambda cpu: (place_in_core(cpu), cpu))[:count]


def busy_seconds(root: Path = Path("/")) -> float:
    """Return the CPU seconds that all processes of the machine have used, and the host has taken.

    NaN if the system does not report it.
    """
    for line in _read(root / "proc/stat").splitlines():
        if line.startswith("cpu "):
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
            return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return math.nan


def process_seconds(pid: int, root: Path = Path("/")) -> float:
    """Return the CPU seconds that a process has used, 0 if it is gone."""
    fields = _read(root / f"proc/{pid}/stat").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class Evictor:
    """Empties the caches of some CPUs: each reads its part of a buffer larger than all of them.

    It does not write, because writing lines back would take time from the next step. A last-level
    cache beyond `most` bytes is emptied in part; `size` is the number of bytes read.
    """

    def __init__(self, on: Sequence[int], cache: int, most: int = 1 << 30) -> None:
        self.size = int(min(max(1.25 * cache, 64 << 20), most))
        self._on = list(on) or [-1]
        self._parts = np.array_split(np.ones(self.size // 8), len(self._on))
        self._pool = ThreadPoolExecutor(len(self._on))

    def __enter__(self) -> Evictor:
        """Start nothing yet."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End the threads."""
        self._pool.shutdown()

    def __call__(self) -> None:
        """Read the buffer."""
        list(self._pool.map(self._read, self._on, self._parts))

    @staticmethod
    def _read(cpu: int, part: NDArray[np.float64]) -> None:
        if cpu >= 0:
            os.sched_setaffinity(0, [cpu])  # of this thread only
        part.max()


def describe() -> dict[str, str]:
    """Return what a reader of a report needs to know of this machine, label to text."""
    text = info()
    memory = [line for line in _read(Path("/proc/meminfo")).splitlines() if "MemTotal" in line]
    pages = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return text | {
        "last cache": f"{last_level_cache() / (1 << 20):.0f} MiB",
        "memory": f"{int(memory[0].split()[1]) / (1 << 20):.0f} GiB" if memory else "unknown",
        "huge pages": pages.partition("[")[2].partition("]")[0] or "unknown",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def installed(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
