"""Named arrays and a little metadata in one file, written completely or not at all.

The file is .npz (NumPy's own) or .safetensors (an extra). It is written beside its final path,
synced and renamed, so that an interruption at any point leaves the old file. Reading never
unpickles.

The next save to the same path removes what a killed save left: a temporary file whose lock no
process holds. Thousands of small arrays share one member for each dtype, because opening a member
takes longer than reading it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from fusedopt import _core
from fusedopt._check import Array
from fusedopt._disk import Disk
from fusedopt.formats import FORMATS, Stored, in_order, is_bfloat16, memory_order

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_META = "fusedopt"  # the key of the metadata; no array has it
_EXTRA = ":extra"  # ends the key of `Stored.extra`, the second array of a narrow format
_VERSION = 1  # of the layout and the meaning of codes, not of the rounding in steps
_SUFFIXES = (".npz", ".safetensors")
_TEMPORARY = ".tmp"  # ends the name of a file that is being written
_PIECE = 1 << 24  # bytes written, or checked, at a time
_SMALL, _FEW = 4096, 1000  # arrays of up to 4096 bytes share members if there are over 1000

StrPath = str | os.PathLike[str]


def pack(
    state_dict: Mapping[str, Any], params: Mapping[str, Array] | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Split a state dict into arrays, ``<leaf>.<name>``, and metadata that JSON can hold.

    Parameters, by leaf name, are arrays ``<leaf>``.
    """
    arrays: dict[str, Array] = {}
    steps: dict[str, int] = {}
    formats: dict[str, str] = {}
    orders: dict[str, list[int]] = {}  # of axes in memory, which 8-bit blocks follow
    for leaf, state in state_dict["state"].items():
        steps[leaf] = state["step"]
        for name, a in state.items():
            key = f"{leaf}.{name}"
            if isinstance(a, Stored):
                formats[key] = a.format
                arrays[key] = a.data
                if FORMATS[a.format][2] > 1 and not a.data.flags.c_contiguous:
                    orders[key] = memory_order(a.data)
                    arrays[key] = a.data.transpose(orders[key])
                if a.extra is not None:
                    arrays[f"{key}{_EXTRA}"] = a.extra
            elif name != "step":
                arrays[key] = a
    groups = [
        {name: None if callable(value) else value for name, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    dtypes: dict[str, str] = {}  # of the parameters
    for leaf, a in (params or {}).items():
        dtypes[leaf] = a.dtype.name
        arrays[leaf] = a.view(np.uint16) if is_bfloat16(a.dtype) else a
        if a.dtype == np.uint8 and not a.flags.c_contiguous:  # codes, whose blocks follow it
            orders[leaf] = memory_order(a)
            arrays[leaf] = arrays[leaf].transpose(orders[leaf])
    about = {} if params is None else {"params": dtypes}
    return arrays, about | {
        "optimizer": state_dict["optimizer"],
        "step": state_dict["step"],
        "steps": steps,
        "formats": formats,
        "orders": orders,
        "param_groups": groups,
    }


def unpack(arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuild the state dict that `pack` split; ValueError if these are not its parts."""
    try:
        state: dict[str, dict[str, Any]] = {
            leaf: {"step": step} for leaf, step in meta["steps"].items()
        }
        formats, orders = meta.get("formats", {}), meta.get("orders", {})
        about = {key: meta[key] for key in ("optimizer", "step", "param_groups")}
        if "params" in meta:
            about["params"] = {
                leaf: _param(arrays[leaf], dtype, orders.get(leaf))
                for leaf, dtype in meta["params"].items()
            }
            arrays = {key: a for key, a in arrays.items() if key not in meta["params"]}
        for key, array in arrays.items():
            if key.endswith(_EXTRA) and key.removesuffix(_EXTRA) in formats:
                continue
            leaf, _, name = key.rpartition(".")
            state[leaf][name] = array
            if key in formats:
                order = orders.get(key, range(array.ndim))
                extra = arrays.get(f"{key}{_EXTRA}")
                state[leaf][name] = in_order(formats[key], array, extra, order)
        return {**about, "state": state}
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ValueError("not the state of an optimizer") from exc


def _param(array: Array, dtype: str, order: list[int] | None) -> Array:
    if dtype == "bfloat16":
        import ml_dtypes  # which made the parameter

        array = array.view(ml_dtypes.bfloat16)
    if array.dtype.name != dtype:
        raise ValueError(f"{array.dtype.name} where {dtype} is expected")
    return array if order is None else array.transpose(np.argsort(order))


def write(
    path: StrPath,
    arrays: Mapping[str, Array],
    meta: Mapping[str, Any],
    settle: Callable[[], object] | None = None,
) -> None:
    """Write a file, atomically; with `settle`, which is called before it appears, unless it raises.

    Raises
    ------
    ValueError
        If the name ends in neither .npz nor .safetensors, or an array has a name that no file can
        hold.
    OSError
        Naming the file, if it cannot be written; an old file is unchanged.
    """
    target = known(path)
    for name in arrays:
        if "\0" in name or len(name.encode(errors="replace")) > 2**15 or not _is_text(name):
            raise ValueError(f"{name[:60]!r}: cannot name an array in a file; use other dict keys")
    arrays, small = _join(arrays)
    text = json.dumps({"version": _VERSION, "small": small, **meta})
    try:
        with _replacing(target, settle) as file:
            _WRITERS[target.suffix](file, arrays, text)
    except OSError as exc:  # a write to a full disk raises one that names no file
        raise OSError(exc.errno, exc.strerror, str(target)) from exc


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


class _Archive(zipfile.ZipFile):
    # a C function: in a Python one the exception of a signal could be raised and lost
    __del__ = object.__hash__  # type: ignore[assignment]


def _write_npz(file: IO[bytes], arrays: Mapping[str, Array], text: str) -> None:
    """Write as numpy.savez does, which would hide Ctrl-C behind an error of its archive."""
    archive = _Archive(file, "w")
    try:
        for name, array in {_META: np.array(text), **arrays}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                about = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(member, about)
                _write_bytes(member, array.T if about["fortran_order"] else array)
        archive.close()
    except BaseException:
        archive.fp = None  # abandoned: close() would raise for a member that is still open
        raise


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, Array], text: str) -> None:
    """Write the format of safetensors 0.4 in one pass, to a file that we can lock and sync.

    The writer of safetensors makes a temporary file, which a killed process would leave behind.
    """
    header: dict[str, Any] = {"__metadata__": {_META: text}}
    # readers map the file, so wide elements come first and all are aligned
    ordered = sorted(arrays.items(), key=lambda row: -row[1].itemsize)
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        dtype = f"{_KINDS[array.dtype.kind]}{8 * array.itemsize}"
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for _, array in ordered:
        _write_bytes(file, array)


def _write_bytes(file: Any, array: Array) -> None:
    """Write an array in row-major order, in pieces: one on disk is not to fill the memory."""
    if array.size == 0:
        return
    count = max(1, _PIECE // array.itemsize)
    if not array.flags.c_contiguous:
        flags: Any = ["external_loop", "buffered"]
        pieces: Any = np.nditer(array, flags, buffersize=count, order="C")
        for part in pieces:
            file.write(np.ascontiguousarray(part).view(np.uint8).data)
        return
    flat = array.reshape(-1)
    for start in range(0, flat.size, count):
        piece = flat[start : start + count]
        file.write(piece.view(np.uint8).data)
        _core.relieve(piece)


_WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors}
_KINDS = {"f": "F", "i": "I", "u": "U"}  # NumPy's kind of a dtype -> safetensors' name


def _join(arrays: Mapping[str, Array]) -> tuple[Mapping[str, Array], dict[str, list[Any]]]:
    """Return the arrays, small ones joined if there are many, and the contents of each join."""
    rows: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, a in arrays.items():
        if a.nbytes <= _SMALL:
            rows.setdefault(f"small:{a.dtype.str}", []).append((name, a.shape))
    if sum(map(len, rows.values())) <= _FEW:
        return arrays, {}
    joined = {
        member: np.concatenate([arrays[name].reshape(-1) for name, _ in its])
        for member, its in rows.items()
    }
    return joined | {name: a for name, a in arrays.items() if a.nbytes > _SMALL}, dict(rows)


def _split(arrays: dict[str, Array], small: Mapping[str, Any]) -> None:
    """Undo `_join`, with views; ValueError if the lengths do not add up."""
    for member, rows in small.items():
        values, end = arrays.pop(member), 0
        for name, shape in rows:
            begin, end = end, end + prod(shape)
            arrays[name] = values[begin:end].reshape(shape)
        if values.shape != (end,):
            raise ValueError(f"{member} has {values.size} elements, expected {end}")


def read(path: StrPath, disk: Disk | None = None) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a file that `write` made; with `disk` the arrays are read as they are used.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is damaged, or not such a file.
    """
    source = known(path)
    reader = _READERS[source.suffix, disk is not None]
    mode = source.stat().st_mode  # if missing, an OSError that names it
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe would wait for a writer
        raise ValueError(f"{source}: not a regular file")
    source.open("rb").close()  # unreadable, or a folder: the same
    try:
        arrays, text = reader(source, disk)
        meta = json.loads(text)
        if not isinstance(meta, dict) or meta.pop("version") != _VERSION:
            raise ValueError(f"written by another version of the format than {_VERSION}")
        _split(arrays, meta.pop("small", {}))
    except ModuleNotFoundError:
        raise
    except MemoryError as exc:
        raise ValueError(f"{source}: claims more data than memory can hold") from exc
    except Exception as exc:  # third-party parsers may raise anything on hostile bytes
        raise ValueError(f"{source}: not a checkpoint of fusedopt, or damaged ({exc})") from exc
    return arrays, meta


def _read_npz(path: Path, _: Any) -> tuple[dict[str, Array], str]:
    with open(path, "rb") as raw:
        if not zipfile.is_zipfile(raw):
            raise ValueError("no archive of arrays")
        raw.seek(0)
        return _read_archive(raw, np.load(raw, allow_pickle=False))


def _read_archive(raw: IO[bytes], loaded: Any) -> tuple[dict[str, Array], str]:
    with loaded as file:
        size = os.fstat(raw.fileno()).st_size
        # `write` does not compress; refusing compression keeps a small file from filling the memory
        if sum(member.file_size for member in file.zip.infolist()) > size:
            raise ValueError("its arrays are larger than the file")
        arrays = {name: file[name] for name in file.files}
    if not all(isinstance(a, np.ndarray) for a in arrays.values()):  # NumPy returns others as bytes
        raise ValueError("a member is not an array")
    return _without_meta(arrays)


def _without_meta(arrays: dict[str, Array]) -> tuple[dict[str, Array], str]:
    """Return the arrays of an archive, and its metadata, which is one of them."""
    if _META not in arrays:
        raise ValueError("it has no metadata of fusedopt")
    return arrays, str(arrays.pop(_META)[()])


def _read_safetensors(path: Path, _: Any) -> tuple[dict[str, Array], str]:
    with _safetensors_open(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return arrays, str((file.metadata() or {})[_META])


def _map_npz(path: Path, disk: Disk) -> tuple[dict[str, Array], str]:
    data, arrays = disk.map_file(path), {}
    with open(path, "rb") as raw, zipfile.ZipFile(raw) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError("a member is compressed")
            at = member.header_offset
            lengths = data[at + 26 : at + 30].tobytes()  # of the name and of what follows it
            start = at + 30 + sum(int.from_bytes(lengths[k : k + 2], "little") for k in (0, 2))
            body = data[start : start + member.file_size]
            if body.size != member.file_size or _crc(body) != member.CRC:
                raise ValueError(f"{member.filename}: its sum is wrong")
            arrays[member.filename.removesuffix(".npy")] = _map_npy(body)
    return _without_meta(arrays)


def _crc(data: Array) -> int:
    found = 0
    for start in range(0, data.size, _PIECE):
        piece = data[start : start + _PIECE]
        found = zlib.crc32(piece.data, found)
        _core.relieve(piece)
    return found


def _map_npy(data: Array) -> Array:
    header = io.BytesIO(data[: 1 << 16].tobytes())
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError("an array in another version of the format than 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype.hasobject:
        raise ValueError("an array of objects")
    body = data[header.tell() :]
    if is_fortran:
        return _view(body, shape[::-1], dtype).T
    return _view(body, shape, dtype)


def _view(data: Array, shape: Any, dtype: Any) -> Array:
    """Return bytes as an array, which they must fill."""
    if data.size != prod(shape) * dtype.itemsize:
        raise ValueError("an array does not fill its place")
    return np.ndarray(shape, dtype, data.data)


def _map_safetensors(path: Path, disk: Disk) -> tuple[dict[str, Array], str]:
    with _safetensors_open(path) as file:  # which checks the header
        text = str((file.metadata() or {})[_META])
    data = disk.map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    kinds = {name: kind for kind, name in _KINDS.items()}
    arrays = {
        name: _view(
            data[start + about["data_offsets"][0] : start + about["data_offsets"][1]],
            tuple(about["shape"]),
            np.dtype(f"{kinds[about['dtype'][0]]}{int(about['dtype'][1:]) // 8}"),
        )
        for name, about in header.items()
        if name != "__metadata__"
    }
    return arrays, text


_READERS: dict[tuple[str, bool], Any] = {  # by ending, and whether arrays stay in the file
    (".npz", False): _read_npz,
    (".npz", True): _map_npz,
    (".safetensors", False): _read_safetensors,
    (".safetensors", True): _map_safetensors,
}


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            'a .safetensors file needs: pip install "fusedopt[safetensors]"; .npz needs nothing'
        ) from exc
    return safetensors.numpy


def _safetensors_open(path: Path) -> Any:
    _safetensors()
    import safetensors

    return safetensors.safe_open(path, framework="numpy")


def known(path: StrPath) -> Path:
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"{target}: the name must end in {' or '.join(_SUFFIXES)}")
    return target


@contextmanager
def _replacing(path: Path, settle: Callable[[], object] | None = None) -> Iterator[IO[bytes]]:
    """Yield a temporary file; on success sync it and rename it to `path`, else remove it.

    What `settle` raises, when it is complete and before the rename, counts as a failure.

    Symbolic links stay. A file that is read-only, or not a regular one, is refused.
    """
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    _remove_leftovers(target)
    temporary, file = _create(target, mode)
    try:
        with file:
            yield file
            file.flush()
            if mode is not None:
                temporary.chmod(mode)
            os.fsync(file.fileno())
            if os.name == "nt":  # Windows cannot rename an open file
                file.close()
            if settle is not None:
                settle()
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _create(target: Path, mode: int | None) -> tuple[Path, IO[bytes]]:
    """Return a temporary file beside a target, locked: an unlocked one counts as a leftover."""
    # a new file gets the system's permissions; those of an old file are copied at the end
    create = partial(os.open, mode=0o666 if mode is None else 0o600)
    while True:
        temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}{_TEMPORARY}")
        try:
            file = open(temporary, "xb", opener=create)
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink == 0:  # removed as a leftover before the lock
                    file.close()
                    continue
            return temporary, file
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _mode(target: Path) -> int | None:
    """Return a file's permissions, None if it is missing; OSError if it must not be replaced."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if not (mode & 0o222 and os.access(target, os.W_OK)):
        raise PermissionError(errno.EACCES, "a read-only file: remove it, or save elsewhere")
    return stat.S_IMODE(mode)


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary files of killed saves to this path."""
    if fcntl is None:
        return
    ours = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{16}" + re.escape(_TEMPORARY))
    with suppress(OSError):
        for path in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
            with suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: a process is writing it
                path.unlink()


def _sync(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot sync a folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
