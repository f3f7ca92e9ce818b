"""State of leaves that are cut into parts: conversion to whole state, and from any other cuts.

A source is a state dict with, for each leaf, the range of elements that its arrays are of. The
arrays of a part are flat, in the memory order of the parameter; those of a leaf that is on one rank
as a whole are as in the class itself.
"""

from __future__ import annotations

import errno
import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusedopt import _checkpoint, _core, _parts
from fusedopt._check import Array
from fusedopt._disk import Disk
from fusedopt.formats import FORMATS, Stored, flat, memory_order
from fusedopt.rule import Options, Rule

Source = tuple[Mapping[str, Any], Mapping[str, range]]


@dataclass
class Collection:
    """What to gather: for each array its part, the whole or None, and cuts; and the whole state."""

    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: list[Array | None] = field(default_factory=list)
    wholes: list[Array | None] = field(default_factory=list)
    cuts: list[list[int]] = field(default_factory=list)


def collect(
    rule: Rule,
    options: Sequence[Options],
    state: Mapping[str, Mapping[str, Any]],
    params: Sequence[Array],
    cuts: Sequence[list[int]],
    has_wholes: bool,
) -> Collection:
    """Allocate the whole state of leaves, of which `state` has this rank's parts."""
    found = Collection()
    for i, (name, arrays) in enumerate(state.items()):
        found.state[name] = {}
        for key, value in arrays.items():
            if key == "step":
                found.state[name][key] = value
                continue
            shape, per = _shape(rule, key, params[i].shape, options[i])
            whole = _collect_one(found, value, params[i], shape, per, cuts[i], has_wholes)
            found.state[name][key] = whole
    return found


def _collect_one(
    found: Collection,
    value: Array | Stored,
    param: Array,
    shape: tuple[int, ...],
    per: int,
    cuts: list[int],
    has_whole: bool,
) -> Array | Stored | None:
    """Add the arrays of one state; return the whole."""
    wholes = []
    for k, part in enumerate(value.parts() if isinstance(value, Stored) else [value]):
        its, its_shape = per, shape
        if isinstance(value, Stored) and k == 1 and FORMATS[value.format][2] > 1:
            its = FORMATS[value.format][2]
            its_shape = (-(-param.size // its),)
        total = int(np.prod(its_shape))
        places = _parts.scaled(cuts, its, total)
        whole = None
        if has_whole:
            like = param if its_shape == param.shape else np.empty(its_shape, np.uint8)
            whole = np.empty_like(like, part.dtype, subok=False)
        wholes.append(whole)
        found.parts.append(flat(part))
        found.wholes.append(None if whole is None else flat(whole))
        found.cuts.append(places)
    if not has_whole:
        return None
    data, extra = (wholes[0], wholes[1] if len(wholes) > 1 else None)
    assert data is not None
    return Stored(value.format, data, extra) if isinstance(value, Stored) else data


def _shape(
    rule: Rule, key: str, shape: tuple[int, ...], options: Options
) -> tuple[tuple[int, ...], int]:
    """Return the shape of a state of a whole leaf, and of how many elements it has one number."""
    for state in rule.states:
        if state.name == key:
            found = state.shape(shape, options)
            assert found is not None
            return found, int(options[state.every]) if state.every else 1
    return shape, 1


def whole_source(state_dict: Mapping[str, Any], params: Mapping[str, Array]) -> Source:
    """Return a state dict of the class itself as a source; leave what does not fit."""
    state: dict[str, Any] = {}
    try:
        others, known = dict(state_dict), dict(state_dict["state"])
    except (KeyError, TypeError, ValueError) as exc:
        raise ValueError("state dict: expected 'step', 'state' and 'param_groups'") from exc
    for name, arrays in known.items():
        param = params.get(name)
        if param is None or not isinstance(arrays, Mapping):
            state[name] = arrays
            continue
        state[name] = {key: _laid(value, param) for key, value in arrays.items()}
    ranges = {name: range(param.size) for name, param in params.items()}
    return others | {"state": state}, ranges


def _laid(value: Any, param: Array) -> Any:
    """Return an array of a parameter's shape in its memory order."""
    data = value.data if isinstance(value, Stored) else value
    if not isinstance(data, np.ndarray) or data.shape != param.shape:
        return value
    if _core.same_layout(data, param):
        return value
    if isinstance(value, Stored) and FORMATS[value.format][2] > 1:
        raise ValueError(
            f"state dict: blocks of {FORMATS[value.format][2]} in another memory order than the "
            "parameter's; load it into the class with convert=True, and take its state_dict"
        )
    arrays = []
    for part in value.parts() if isinstance(value, Stored) else [value]:
        laid = np.empty_like(param, part.dtype, subok=False)
        laid[...] = part
        arrays.append(laid)
    return Stored(value.format, *arrays) if isinstance(value, Stored) else arrays[0]


def part_of(
    sources: Sequence[Source],
    rule: Rule,
    ours: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, range],
    is_cut: bool,
) -> dict[str, Any]:
    """Return a state dict with the parts that this rank has, from those of the sources.

    `ours` is the state that this rank has.
    """
    first = sources[0][0]
    try:
        known = {name: arrays for name, arrays in dict(first["state"]).items()}
        options = {
            name: group for group in first["param_groups"] for name in group.get("params", [])
        }
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ValueError("state dict: expected 'step', 'state' and 'param_groups'") from exc
    state: dict[str, Any] = {}
    for name, arrays in known.items():
        own = parts.get(name)
        if own is None or not isinstance(arrays, Mapping):
            state[name] = arrays  # which the plain checks refuse
            continue
        state[name] = {}
        for key, value in arrays.items():
            where = f"state dict: {name}.{key}"
            if key == "step":
                state[name][key] = value
            elif not is_cut:
                holder = next((s["state"][name] for s, its in sources if len(its[name])), arrays)
                mine = ours[name].get(key)
                state[name][key] = holder[key] if len(own) or mine is None else mine
            else:
                per = _every(rule, key, options.get(name, {}))
                pieces = [
                    (source["state"][name].get(key, value), its[name])
                    for source, its in sources
                    if len(its[name]) or len(sources) == 1
                ]
                state[name][key] = _join(where, pieces or [(value, range(0))], own, per)
    return {**first, "state": state}


def _every(rule: Rule, key: str, options: Mapping[str, Any]) -> int:
    for state in rule.states:
        if state.name == key and state.every:
            every = options.get(state.every, 1)
            return every if isinstance(every, int) and every > 0 else 1
    return 1


def _join(where: str, pieces: Sequence[tuple[Any, range]], own: range, per: int) -> Any:
    """Return the elements `own` of a leaf from arrays of other ranges of it."""
    found: list[Any] = []
    for value, its in pieces:
        common = _common(own, its)
        if len(common) or (not len(own) and not found):
            found.append(_slice(where, value, its, common, per))
    covered = sum(len(_common(own, its)) for _, its in pieces)
    if covered != len(own):
        raise ValueError(f"{where}: the files have {covered} of the {len(own)} elements needed")
    if len(found) == 1:
        return found[0]
    if isinstance(found[0], Stored):
        columns = zip(*(value.parts() for value in found), strict=True)
        return Stored(found[0].format, *(np.concatenate(column) for column in columns))
    return np.concatenate(found)


def _slice(where: str, value: Any, its: range, wanted: range, per: int) -> Any:
    """Return what an array of the elements `its` has for the elements `wanted`."""

    def cut(array: Array, per: int) -> Array:
        if array.size != -(-len(its) // per):
            raise ValueError(f"{where}: has {array.size} elements, expected {-(-len(its) // per)}")
        low, high = wanted.start - its.start, max(wanted.start, wanted.stop) - its.start
        return flat(array)[-(-low // per) : -(-high // per)]

    if isinstance(value, Stored):
        arrays = [cut(value.data, 1)]
        if value.extra is not None:
            arrays.append(cut(value.extra, FORMATS[value.format][2]))
        return Stored(value.format, *arrays)
    if not isinstance(value, np.ndarray):
        return value  # which the plain checks refuse
    return cut(value, per)


def file_of(path: Path, rank: int, size: int) -> Path:
    """Return the name of the file of a rank."""
    return path.with_name(f"{path.stem}.{rank}-of-{size}{path.suffix}")


def read(path: Path, params: Mapping[str, Array], disk: Disk | None) -> list[Source]:
    """Read a file of the class itself; with `disk` its arrays are read as they are used."""
    return [_named(path, partial(_read_whole, path, params, disk))]


def read_by_rank(
    path: Path, parts: Mapping[str, range], params: Mapping[str, Array], disk: Disk | None
) -> list[Source]:
    """Read the files of ranks, one after the other; return those that have elements of `parts`."""
    files = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*-of-*{path.suffix}"))
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no such file of a rank", str(file_of(path, 0, 1)))
    if {file.name for file in files} != {
        file_of(path, rank, len(files)).name for rank in range(len(files))
    }:
        raise ValueError(
            f"{path}: the files of ranks are not those of one save: "
            f"{', '.join(file.name for file in files[:8])}"
        )
    kept: list[Source] = []
    for file in files:
        source, ranges = _named(file, partial(_read_part, file, params, disk))
        if kept and source["step"] != kept[0][0]["step"]:
            raise ValueError(f"{file}: of step {source['step']}, others {kept[0][0]['step']}")
        shared = (_common(parts[name], ranges[name]) for name in parts)
        if not kept or any(map(len, shared)):
            kept.append((source, ranges))
    return kept


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _named(path: Path, load: Callable[[], Source]) -> Source:
    try:
        return load()
    except (TypeError, KeyError, ValueError) as exc:
        text = str(exc)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from exc


def _read_whole(path: Path, params: Mapping[str, Array], disk: Disk | None) -> Source:
    return whole_source(_checkpoint.unpack(*_checkpoint.read(path, disk)), params)


def _read_part(path: Path, params: Mapping[str, Array], disk: Disk | None) -> Source:
    arrays, meta = _checkpoint.read(path, disk)
    about = meta.get("parts")
    if not isinstance(about, dict) or about.keys() != params.keys():
        about = about if isinstance(about, dict) else {}
        missing = [name for name in params if name not in about]
        unexpected = [name for name in about if name not in params]
        raise ValueError(
            "its parameters are not those of this optimizer; "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    ranges = {}
    for name, (start, stop, shape, order) in about.items():
        mine, own = list(params[name].shape), memory_order(params[name])
        if (shape, order) != (mine, own):
            raise ValueError(
                f"{name}: of shape {shape}, its axes in memory in the order {order}; here {mine} "
                f"and {own}"
            )
        ranges[name] = range(start, stop)
    return _checkpoint.unpack(arrays, meta), ranges
