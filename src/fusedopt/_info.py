"""What this installation is and how it will run here."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

from fusedopt import _core, _threads
from fusedopt._version import __version__


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def info() -> dict[str, str]:
    """Return a description of the installation and the machine, label to text, for bug reports.

    Examples
    --------
    >>> sorted(fusedopt.info())[:3]
    ['available', 'backend', 'formats']
    """
    forced = " (FUSEDOPT_ISA)" if "FUSEDOPT_ISA" in os.environ else " (best available)"
    backends = {
        "openmp": "OpenMP (serial in the child of a fork)",
        "pool": "pthread pool",
        "serial": "none: built without OpenMP, steps are serial",
    }
    return {
        "version": __version__,
        "isa": _core.isa() + forced,
        "available": ", ".join(_core.available_isas()),
        "threads": f"{_threads.get_num_threads()} ({_threads.why()})",
        "late": _threads.lateness(),
        "backend": backends[_core.backend()],
        "rules": ", ".join(row[0] for row in _core.rules()),
        "formats": ", ".join(row[0] for row in _core.formats()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} CPUs",
    }
