"""How many threads a step may use, and the reason.

The default is the smallest limit on this process: the CPUs of its affinity mask, the CPU quota of
its control groups (a container's ``--cpus``), rounded up, and ``OMP_NUM_THREADS``. Ranks that a
launcher starts on one host share the first two equally (see `_RANKS`). Where each is bound to some
of the CPUs, as by Open MPI, ``numactl`` or torchrun's ``--numa-binding``, the launcher's own mask
is what they share, and a rank's mask its limit. An ``OMP_NUM_THREADS`` of 1 that a launcher sets by
default is no limit.
``FUSEDOPT_NUM_THREADS`` overrides it, `set_num_threads` both, and an optimizer's ``threads=`` all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusedopt import _check, _core

MOST = 256
# how many ranks are on this host, as said by: MPICH, DeepSpeed, verl's workers of Ray, torchrun
_RANKS = ("MPI_LOCALNRANKS", "LOCAL_SIZE", "RAY_LOCAL_WORLD_SIZE", "LOCAL_WORLD_SIZE")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of all above it (v2, or v1 with a controller)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
            inside = Path(path.lstrip("/"))
            yield from (top / folder for folder in (inside, *inside.parents))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the quota of control groups v1 and v2 in CPUs, or None if there is no limit."""
    quotas = []
    for folder in _group_folders(root, ""):  # v2: "<quota or max> <period>"
        match _read(folder / "cpu.max").split():
            case [quota, period] if quota != "max":
                quotas.append(int(quota) / int(period))
    for folder in _group_folders(root, "cpu"):  # v1: microseconds, quota -1 for none
        quota = _read(folder / "cpu.cfs_quota_us").strip()
        period = _read(folder / "cpu.cfs_period_us").strip()
        if period and int(quota or -1) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _affinity(pid: int = 0) -> int:
    """Return the number of CPUs that a process may run on; 0 if it cannot be known of another."""
    if hasattr(os, "sched_getaffinity"):
        try:
            return len(os.sched_getaffinity(pid))
        except OSError:
            return 0
    return 0 if pid else os.cpu_count() or 1


def default_threads(
    environ: Mapping[str, str] = os.environ, root: Path = Path("/")
) -> tuple[int, str]:
    """Return the number of threads and what decided it.

    Raises
    ------
    ValueError
        If ``FUSEDOPT_NUM_THREADS`` is not a whole number from 1 to 256.
    """
    wish = environ.get("FUSEDOPT_NUM_THREADS")
    if wish is not None:
        if not (wish.isascii() and wish.isdigit() and 1 <= int(wish) <= MOST):
            raise ValueError(
                f"FUSEDOPT_NUM_THREADS={wish!r}: expected a whole number from 1 to {MOST}"
            )
        return int(wish), "FUSEDOPT_NUM_THREADS"
    limits = [(_affinity(), "CPU affinity")]
    quota = cpu_quota(root)
    if quota is not None:
        limits.append((max(1, math.ceil(quota)), "CPU quota of the control group"))
    shared = ""
    for name in _RANKS:
        ranks = environ.get(name, "")
        if name == "LOCAL_SIZE" and "LOCAL_RANK" not in environ:
            continue  # a name that others may use too
        if ranks.isascii() and ranks.isdigit() and int(ranks) > 1:
            shared = name
    if shared:
        (own, why), *others = limits
        whole = [(max(own, _affinity(os.getppid())), why), *others]
        count, why = min(whole, key=lambda limit: limit[0])
        limits.append((max(1, count // int(environ[shared])), f"{why}, divided by {shared}"))
    openmp = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # may list one per level
    # Where it is not set, torchrun sets it to 1 for more than one rank, and accelerate and Ray for
    # any number. That cannot be told from a user's own 1; any other number is a user's.
    ignored = openmp == "1" and (
        shared == "LOCAL_WORLD_SIZE"
        or not {"ACCELERATE_MIXED_PRECISION", "RAY_LOCAL_WORLD_SIZE"}.isdisjoint(environ)
    )
    if openmp.isascii() and openmp.isdigit() and int(openmp) > 0 and not ignored:
        limits.append((int(openmp), "OMP_NUM_THREADS"))
    count, why = min(limits, key=lambda limit: limit[0])
    return min(count, MOST), why + "; not the launcher's OMP_NUM_THREADS=1" * ignored


_LIMIT = "threadpoolctl"
_count, _why = _unlimited = default_threads()


def set_num_threads(n: int) -> None:
    """Use at most `n` threads for each step from now on, in the whole process.

    Parameters
    ----------
    n : int
        From 1 to 256. The results do not depend on it, bit for bit.

    Raises
    ------
    TypeError, ValueError
        If `n` is not such a number.
    """
    use(check("n", n), "set_num_threads")


def check(name: str, value: Any) -> int:
    """Return `value` as a number of threads."""
    n = _check.count(name, value, least=1)
    if n > MOST:
        raise ValueError(f"{name}: must be at most {MOST}, got {n}")
    return n


def of(own: int | None) -> int:
    """Return the most threads of an optimizer with `threads=own`; threadpoolctl may lower it."""
    if own is None:
        return _count
    return min(own, _count) if _why == _LIMIT else own


def use(count: int, why: str) -> None:
    """Set the number of threads of the process, and the reason that `info` gives."""
    global _count, _why
    _count, _why = count, why


def limit(count: int) -> None:
    """Apply a limit of threadpoolctl; setting the number from before it ends the limit."""
    global _unlimited
    if _why != _LIMIT:
        _unlimited = _count, _why
    if count == _unlimited[0]:
        use(*_unlimited)
    else:
        use(max(1, min(count, MOST)), _LIMIT)


def get_num_threads() -> int:
    """Return the most threads that a step uses; small steps use one."""
    return _count


def why() -> str:
    """Return what decided the number of threads."""
    return "built without threads" if _core.backend() == "serial" else _why


def lateness() -> str:
    """Return how often threads came late, and what steps do about it."""
    late, alone, is_alone = _core.lateness()
    if late == 0:
        return "no thread"
    now = "one thread" if is_alone else "all threads"
    return f"threads, {late} times; so {alone} passes ran on one thread; now on {now}"
