"""Named arrays and a little metadata in one file that is there whole or not at all.

The file is .npz (NumPy's own) or .safetensors (an extra). It is written beside its final place,
synced and renamed, so that an interruption at any point leaves the old file. Reading never
unpickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.formats import Stored

_META = "fusedopt"  # the key of the metadata; no array has it
_EXTRA = ":extra"  # ends the key of the second array of one in a narrow format
_VERSION = 1
_SUFFIXES = (".npz", ".safetensors")

StrPath = str | os.PathLike[str]


def pack(state_dict: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Split a state dict into arrays, ``<leaf>.<name>``, and metadata that JSON can hold."""
    arrays: dict[str, Array] = {}
    steps: dict[str, int] = {}
    formats: dict[str, str] = {}
    for leaf, state in state_dict["state"].items():
        steps[leaf] = state["step"]
        for name, a in state.items():
            key = f"{leaf}.{name}"
            if isinstance(a, Stored):
                formats[key] = a.format
                arrays[key] = a.data
                if a.extra is not None:
                    arrays[f"{key}{_EXTRA}"] = a.extra
            elif name != "step":
                arrays[key] = a
    groups = [
        {name: None if callable(value) else value for name, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return arrays, {
        "step": state_dict["step"],
        "steps": steps,
        "formats": formats,
        "param_groups": groups,
    }


def unpack(arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Put together what `pack` took apart; ValueError if that is not what it is."""
    try:
        state: dict[str, dict[str, Any]] = {
            leaf: {"step": step} for leaf, step in meta["steps"].items()
        }
        formats = meta.get("formats", {})
        for key, array in arrays.items():
            if key.endswith(_EXTRA) and key.removesuffix(_EXTRA) in formats:
                continue
            leaf, _, name = key.rpartition(".")
            state[leaf][name] = (
                Stored(formats[key], array, arrays.get(f"{key}{_EXTRA}"))
                if key in formats
                else array
            )
        return {"step": meta["step"], "state": state, "param_groups": meta["param_groups"]}
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError("not the state of an optimizer") from exc


def write(path: StrPath, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
    """Write a file, atomically.

    Raises
    ------
    ValueError
        If the name ends in neither .npz nor .safetensors.
    OSError
        Naming the file, if it cannot be written; what was there before is still there.
    ModuleNotFoundError
        If safetensors is asked for and not installed.
    """
    target = _known(path)
    text = json.dumps({"version": _VERSION, **meta})
    try:
        _write(target, arrays, text)
    except OSError as exc:  # a full disk's, from a write, names no file
        if exc.errno is None:
            raise OSError(f"{target}: {exc}") from exc
        raise OSError(exc.errno, exc.strerror, str(target)) from exc
    except Exception as exc:
        if type(exc).__name__ == "SafetensorError":  # derives from Exception alone
            raise OSError(f"{target}: {exc}") from exc
        raise


def _write(target: Path, arrays: Mapping[str, Array], text: str) -> None:
    with _replacing(target) as temporary:
        if target.suffix == ".npz":
            with open(temporary, "wb") as file:
                np.savez(file, **{_META: np.array(text)}, **arrays)  # type: ignore[arg-type]
        else:
            # its writer stores memory as it lies, so strided and F-order arrays would come back
            # scrambled: hand it C order only
            dense = {name: np.asarray(a, order="C") for name, a in arrays.items()}
            _safetensors().save_file(dense, temporary, metadata={_META: text})


def read(path: StrPath) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a file that `write` made.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is damaged, or not such a file.
    """
    source = _known(path)
    reader = _read_npz if source.suffix == ".npz" else _read_safetensors
    source.open("rb").close()  # not there, or not ours to read: an OSError that names it
    try:
        arrays, text = reader(source)
        meta = json.loads(text)
        if not isinstance(meta, dict) or meta.pop("version") != _VERSION:
            raise ValueError(f"written by another version of the format than {_VERSION}")
    except ModuleNotFoundError:
        raise
    except MemoryError as exc:
        raise ValueError(f"{source}: claims more data than memory can hold") from exc
    except Exception as exc:  # the parsers of others meet hostile bytes here, and raise anything
        raise ValueError(f"{source}: not a checkpoint of fusedopt, or damaged ({exc})") from exc
    return arrays, meta


def _read_npz(path: Path) -> tuple[dict[str, Array], str]:
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
        size = os.fstat(raw.fileno()).st_size
        # what savez writes is not compressed: so a small file cannot fill the memory
        if sum(member.file_size for member in file.zip.infolist()) > size:
            raise ValueError("its arrays are larger than the file")
        arrays = {name: file[name] for name in file.files}
    if not all(isinstance(a, np.ndarray) for a in arrays.values()):  # NumPy's answer is bytes
        raise ValueError("a member is not an array")
    return arrays, str(arrays.pop(_META)[()])


def _read_safetensors(path: Path) -> tuple[dict[str, Array], str]:
    with _safetensors_open(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return arrays, str((file.metadata() or {})[_META])


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


def _known(path: StrPath) -> Path:
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"{target}: the name must end in {' or '.join(_SUFFIXES)}")
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path; on success sync it and rename it to `target`, else remove it."""
    temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}{target.suffix}")
    try:  # the name first: from here on whatever fails leaves nothing behind
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle to sync a folder with
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
