"""State on disk: each optimizer has one file without a name, and its arrays are views of it.

The file is deleted as soon as it is made, so that nothing of it outlives the process, however that
ends, no other process can write to it or cut it short, and two may use the same folder. Its space
is reserved when arrays are made, so that a full disk is an error at that time and not in a step.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import Any
from weakref import WeakSet

import numpy as np

from fusedopt import _core
from fusedopt._check import Array

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEAST = 1 << 20  # bytes; smaller arrays stay in memory

Spec = tuple[tuple[int, ...], Any, tuple[int, ...] | None]  # an array's shape, dtype, strides


def on_disk(spec: Spec) -> bool:
    """Whether an array is kept on disk: a large one in the memory order of its parameter."""
    shape, dtype, strides = spec
    return strides is not None and prod(shape) * np.dtype(dtype).itemsize >= LEAST


class Disk:
    """The file of an optimizer's state.

    Parameters
    ----------
    folder : path
        Where it is; made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Make the file, which is empty."""
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"state_dir: expected a path, got {type(folder).__name__}")
        if os.name != "posix":
            raise NotImplementedError("state_dir: needs Linux or another Unix; leave it out here")
        self.folder = os.path.abspath(os.fspath(folder))
        os.makedirs(self.folder, exist_ok=True)
        self._file = _open(self.folder)
        _make_direct(self._file.fileno())
        self._end, self._pid = 0, os.getpid()
        self._mapped: WeakSet[_core.Mapped] = WeakSet()
        self.lost: BaseException | None = None  # the error of a step that had written something

    def allocate(self, specs: Sequence[Spec]) -> list[Array]:
        """Return arrays, all zero, each on pages of its own.

        Raises
        ------
        OSError
            Naming the folder, if there is no space.
        """
        if not specs:
            return []
        page = mmap.PAGESIZE
        sizes = [
            -(-prod(shape) * np.dtype(dtype).itemsize // page) * page for shape, dtype, _ in specs
        ]
        memory: Any = self._reserve(sum(sizes))
        offset, arrays = 0, []
        for (shape, dtype, strides), size in zip(specs, sizes, strict=True):
            arrays.append(np.ndarray(shape, dtype, memory, offset, strides))
            offset += size
        return arrays

    def _reserve(self, size: int) -> _core.Mapped:
        self.refuse_child()
        number = self._file.fileno()
        try:
            _fill(number, self._end, size)
            memory = _core.Mapped(self._file, self._end, size, False)
        except OSError as exc:
            os.ftruncate(number, self._end)
            code = exc.errno or errno.EIO
            raise OSError(
                code, f"{os.strerror(code)}: no space for {size:,} bytes of state", self.folder
            ) from exc
        self._end += size
        self._mapped.add(memory)
        return memory

    def map_file(self, path: str | os.PathLike[str]) -> Array:
        """Return the bytes of a file, read from it as they are used."""
        file = _core.File(path, os.O_RDONLY, os.fspath(path))
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return np.zeros(0, np.uint8)
        memory = _core.Mapped(file, 0, size, True)
        self._mapped.add(memory)
        return np.frombuffer(memory, np.uint8)  # type: ignore[call-overload,no-any-return]

    def regions(self) -> list[tuple[int, int, int, int, int]]:
        """Return what is mapped now, as `fo_region`, in the order of the addresses."""
        return sorted(mapped.row() for mapped in self._mapped)

    # ------------------------------------------------------------------ faults

    def refuse_child(self) -> None:
        """Raise RuntimeError in the child of a fork, which shares the file with its parent."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"the state in {self.folder} is that of process {self._pid}, of which this one is "
                "a fork; make an optimizer here"
            )

    def refuse_lost(self) -> None:
        """Raise RuntimeError if a step has failed after it had written."""
        if self.lost is not None:
            raise RuntimeError(
                f"a step was cut off by an error of the disk ({self.lost}), so that parameters and "
                "state are of two steps; load a checkpoint of both"
            ) from self.lost

    def fault(self, code: int, has_written: bool) -> OSError | MemoryError:
        """Return an error by its number; if something was written, note that state is lost."""
        if code == errno.ENOMEM:
            return MemoryError("fusedopt: no memory for the buffers of a step with state on disk")
        error = OSError(code, os.strerror(code), self.folder)
        self.lost = error if has_written else self.lost
        return error


def _open(folder: str) -> _core.File:
    """Open a new file without a name."""
    flags = os.O_RDWR | os.O_EXCL
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # a file system without it; other errors come again below
            return _core.File(folder, flags | os.O_TMPFILE, folder)
    name = os.path.join(folder, f".{os.urandom(8).hex()}.tmp")
    try:
        try:
            return _core.File(name, flags | os.O_CREAT, folder)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
    except OSError as exc:
        code = exc.errno or errno.EIO
        raise OSError(code, os.strerror(code), folder) from exc


def _make_direct(file: int) -> None:
    """Make reads and writes of a file bypass the system's cache, if the file system can."""
    with suppress(OSError):
        if hasattr(os, "O_DIRECT"):
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
        elif hasattr(fcntl, "F_NOCACHE"):
            fcntl.fcntl(file, fcntl.F_NOCACHE, 1)


def _fill(file: int, start: int, size: int) -> None:
    """Reserve space in a file, which reads as zeros."""
    try:
        os.posix_fallocate(file, start, size)
        return
    except AttributeError:  # macOS
        pass
    except OSError as exc:  # a file system without it
        if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    zeros = mmap.mmap(-1, 1 << 24)  # which direct access can be from
    while size > 0:
        written = os.pwrite(file, memoryview(zeros)[:size], start)
        start, size = start + written, size - written
