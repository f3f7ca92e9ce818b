"""Files that a command line names: checked before any work is done."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def to_read(option: str, path: Path) -> None:
    """Check that a file can be read.

    Raises
    ------
    OSError, ValueError
        Naming the file. A pipe is refused: opening it may block.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{option} {path}: {what}, not a file")
    path.open("rb").close()


def to_write(option: str, path: Path) -> None:
    """Check that a file can be written.

    Raises
    ------
    OSError, ValueError
        Naming the file.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{option} {path}: a folder, not a file")
    ours = os.access in os.supports_effective_ids
    if not os.access(path if path.exists() else folder, os.W_OK, effective_ids=ours):
        raise PermissionError(f"{option} {path}: no permission to write")


def to_draw(option: str, path: Path, extra: str) -> None:
    """Check that a picture can be drawn into a file; raises like `to_write` and `pictures`."""
    to_write(option, path)
    known = pictures(extra)
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{option} {path}: must end in one of .{', .'.join(known)}")


def pictures(extra: str) -> list[str]:
    """Return the file formats in which pictures can be drawn.

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib, naming the extra that brings it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(f'pictures need: pip install "fusedopt[{extra}]"') from exc
    return sorted(FigureCanvasAgg.get_supported_filetypes().keys() - {"pgf"})  # that needs TeX
