"""Checks that a built site has an entry for each public name: `documented.py FOLDER`."""

import importlib
import importlib.util
import sys
import zlib
from pathlib import Path

MODULES = (
    "fusedopt", "fusedopt.formats", "fusedopt.functional", "fusedopt.keras", "fusedopt.monitor",
    "fusedopt.mpi", "fusedopt.reference", "fusedopt.schedules", "fusedopt.torch", "fusedopt.tune",
    *(["fusedopt.thinc"] if importlib.util.find_spec("thinc") else []),
)  # fmt: skip


def main(folder: str) -> None:
    """Print how many names there are; exit with those that have no entry."""
    inventory = (Path(folder) / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    names = [
        f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__
    ]
    if missing := sorted(set(names) - entries):
        sys.exit(f"no page of the reference has {', '.join(missing)}")
    print(f"{len(names)} public names, all in the reference")


main(sys.argv[1])
