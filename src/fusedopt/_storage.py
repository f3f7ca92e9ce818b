"""In which format each array of a leaf is kept, and how state moves between formats.

The options of this file are the same for every rule: a rule computes on float32 or float64 and
does not know how its arrays are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from math import prod
from typing import Any

import numpy as np

from fusedopt import _check, _core, formats
from fusedopt._check import Array
from fusedopt._disk import Disk, Spec, on_disk
from fusedopt._ieee import ieee
from fusedopt.formats import FORMATS, Stored, extra_shape, is_bfloat16
from fusedopt.rule import Options, Rule, State

# names of the dtypes that steps read; dtype.name imports a module, which fails at exit
_KINDS = {np.dtype(name): name for name in ("float32", "float64", "float16")}

COUNTS = "int64"  # of a state that counts: no format of C
_FORMS = FORMATS | {COUNTS: (np.int64, None, 1)}

FIXED = ("state_dtype", "master_bits", "min_8bit_size")  # cannot change once the arrays are made

# the format of a bfloat16 parameter, by its master bits
MASTERS = {None: "bfloat16+int16", 32: "bfloat16+int16", 24: "bfloat16+int8",
           16: "bfloat16-stochastic"}  # fmt: skip


def refuse_fixed(where: str, rule: Rule, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ValueError if an option of the rule that determines the shapes of state has changed."""
    for name in rule.fixed:
        if new[name] != old[name]:
            raise ValueError(
                f"{where}{name}: {new[name]!r}, but the arrays were made with {old[name]!r}; make "
                "another optimizer"
            )


def refuse_change(where: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ValueError if an option that determines the arrays has changed."""
    for name in FIXED:
        if new[name] != old[name]:
            raise ValueError(
                f"{where}{name}: {new[name]!r}, but the arrays were made with {old[name]!r}; make "
                "another optimizer and load the state with convert=True"
            )
    if (new["ema"] is None) != (old["ema"] is None):
        raise ValueError(
            f"{where}ema: an average is kept from the start or not at all; "
            "set it when the optimizer is made"
        )


def refuse_master(bits: int | None, itemsizes: Iterable[int]) -> None:
    """Raise ValueError if `master_bits` is given and no parameter is 16 bits wide."""
    if bits is not None and all(size > 2 for size in itemsizes):
        raise ValueError(
            f"master_bits={bits}: no parameter is bfloat16 or float16, and only those have bits "
            "beside what they show; leave it out, or see state_dtype"
        )


def state_format(is_double: bool, size: int, state: State, options: Mapping[str, Any]) -> str:
    """Return the format in which a state of a parameter is kept."""
    if state.counts:
        return COUNTS
    if is_double:
        return "float64"
    if state.wide or state.is_by_row(options):
        return "float32"
    if options["state_dtype"] == "bfloat16":
        return "bfloat16-stochastic"
    if options["state_dtype"] == "int8" and size >= options["min_8bit_size"]:
        return "uint8" if state.squared else "int8"
    return "float32"


def check_order(rule: Rule, name: str, param: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter in an order in which a rule that keeps rows cannot step."""
    array = param.data if isinstance(param, Stored) else param
    is_array = isinstance(array, np.ndarray)
    if rule.needs_row_major(options) and is_array and not array.flags.c_contiguous:
        takes = "takes matrices" if rule.has_parts else "keeps numbers of rows"
        raise ValueError(
            f"{name}: strides {array.strides} are not those of row-major order, in which "
            f"{rule.name} {takes}; pass numpy.ascontiguousarray(...)"
        )


def narrow(array: Any) -> str | None:
    """Return the `state_dtype` that keeps numbers as such state does; None if it is wide."""
    if isinstance(array, Stored):
        residual = array.format in (MASTERS[32], MASTERS[24])
        return None if residual else {1: "int8", 2: "bfloat16"}.get(array.data.itemsize)
    return "bfloat16" if isinstance(array, np.ndarray) and array.itemsize == 2 else None


def _param_format(name: str, kind: str, options: Mapping[str, Any]) -> str | None:
    """Return the format of a 16-bit parameter, or None for any other; `kind` is its dtype."""
    bits = options["master_bits"]
    if kind == "bfloat16":
        return MASTERS[bits]
    if kind == "float16":
        if bits not in (None, 16):
            raise ValueError(
                f"{name}: master_bits={bits} needs bfloat16, which is the upper half of a float32; "
                "for a float16 parameter use master_bits=16"
            )
        return "float16-stochastic"
    return None


def plan(
    name: str,
    shape: tuple[int, ...],
    kind: str,
    rule: Rule,
    options: Options,
    size: int | None = None,
) -> tuple[str | None, list[tuple[str, tuple[int, ...]] | None]]:
    """Return how a parameter of a shape and dtype, and its state, would be kept.

    That is the format of a 16-bit parameter, and the format and shape of each state that is kept,
    of which the average is the last. `size` is, of a part of an array, the number of elements of
    the whole one.

    Raises
    ------
    ValueError
        Naming the parameter, if the rule or the options do not go with it.
    """
    own = _param_format(name, kind, options)
    if kind == "float64" and options["state_dtype"] not in (None, "float32"):
        raise ValueError(
            f"{name}: state_dtype={options['state_dtype']!r} does not go with a float64 "
            "parameter; its state is float64"
        )
    rule.check_shape(name, shape)
    size, is_double = prod(shape) if size is None else size, kind == "float64"
    forms: list[tuple[str, tuple[int, ...]] | None] = []
    for use, state in zip(rule.uses(options), rule.states, strict=True):
        inner = state.shape(shape, options)
        forms.append((state_format(is_double, size, state, options), inner)
                     if use and inner is not None else None)  # fmt: skip
    has_average = options["ema"] is not None
    return own, [*forms, (kind if is_double else "float32", shape) if has_average else None]


def nbytes(form: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of an array of a format."""
    dtype = _FORMS[form][0]
    return prod(shape) * (2 if dtype is None else np.dtype(dtype).itemsize) + extra_bytes(
        form, shape
    )


def extra_bytes(form: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of `Stored.extra` of an array of a format."""
    extra = _FORMS[form][1]
    return 0 if extra is None else prod(extra_shape(form, shape)) * np.dtype(extra).itemsize


def allocate(
    names: Sequence[str],
    params: Sequence[Any],
    rule: Rule,
    options: Options,
    sizes: Sequence[int] | None = None,
    disk: Disk | None = None,
) -> tuple[list[Array | Stored], list[list[Array | Stored | None]]]:
    """Check the parameters and allocate their states; return both, as arrays or `Stored`.

    `sizes` are, of parts of arrays, the numbers of elements of the whole ones.

    The states of a leaf are followed by its average, or None. All arrays lie in one block of
    memory, leaf by leaf, except those that belong on `disk`; only averages and residual bits are
    initialised, or, with `disk`, all.
    """
    specs: list[Spec] = []
    plans: list[tuple[Array | Stored, str | None, list[str | None]]] = []
    for i, (name, param) in enumerate(zip(names, params, strict=True)):
        checked = _check.parameter(name, param)
        array = checked.data if isinstance(checked, Stored) else checked
        kind = "bfloat16" if is_bfloat16(array.dtype) else _KINDS.get(array.dtype, "float32")
        if isinstance(param, Stored) and kind != "float64":
            kind = "float32"  # it is in a format already
        size = None if sizes is None else sizes[i]
        own, forms = plan(name, array.shape, kind, rule, options, size)
        check_order(rule, name, array, options)
        plans.append((checked, own, [None if form is None else form[0] for form in forms]))
        if own is not None and FORMATS[own][1] is not None:
            specs.append((array.shape, FORMATS[own][1], _strides(array, FORMATS[own][1])))
        for form in forms:
            if form is not None:
                specs += _specs(form[0], array, form[1])
    arrays = iter(make_arrays(specs, disk))
    stored: list[Array | Stored] = []
    states: list[list[Array | Stored | None]] = []
    for checked, own, kept in plans:
        if own is not None:
            assert isinstance(checked, Stored)
            extra = None if FORMATS[own][1] is None else next(arrays)
            if extra is not None:
                extra[...] = 0
            checked = Stored(own, checked.data, extra)
        stored.append(checked)
        states.append([None if form is None else _take(form, arrays) for form in kept])
        for state, made in zip(rule.states, states[-1], strict=False):
            if isinstance(made, np.ndarray) and (state.part or state.fixed_by):
                made[...] = 0  # as C does to all others
        average = states[-1][-1]
        if average is not None:
            assert isinstance(average, np.ndarray)  # averages are never narrow
            if disk is None:
                np.copyto(average, checked.decode() if isinstance(checked, Stored) else checked)
            else:
                _fill(average, checked)
    return stored, states


def make_arrays(specs: Sequence[Spec], disk: Disk | None) -> list[Array]:
    """Return arrays in memory, not initialised; with `disk` all zero, large ones on that."""
    if disk is None:
        return _core.allocate(specs)
    large = iter(disk.allocate([spec for spec in specs if on_disk(spec)]))
    small = _core.allocate([spec for spec in specs if not on_disk(spec)])
    for array in small:
        array[...] = 0
    rest = iter(small)
    return [next(large) if on_disk(spec) else next(rest) for spec in specs]


def _fill(array: Array, source: Array | Stored) -> None:
    """Write the numbers of `source` into an array on disk in the same memory order."""
    view, done = formats.flat(array), 0
    for (start, piece), (_, values) in zip(
        formats.pieces(array), formats.pieces(source), strict=True
    ):
        piece[...] = values.decode() if isinstance(values, Stored) else values  # type: ignore[index]
        done = _relieve_behind(view, done, start)
    _core.relieve(view[done:])


def _relieve_behind(view: Array, done: int, now: int) -> int:
    """Write a flat array to disk up to element `now`, if that is much; return where it ends."""
    if now - done < 64 * formats.PIECE:
        return done
    _core.relieve(view[done:now])
    return now


@ieee
def begin(
    where: str,
    array: Array | Stored,
    state: State,
    param: Array | Stored,
    options: Options,
    place: tuple[int, int, int],
) -> None:
    """Write the initial value of a state, which is all zero before.

    Narrow formats round it with the noise of step 0 at `place`: the leaf, the slot, and the index
    in the whole tensor at which the array begins. A large array is written in pieces, so that it
    takes little extra memory.
    """
    value = state.first(options)
    if value == 0:
        return
    is_double = not isinstance(array, Stored) and array.dtype == np.float64
    if value is not None and not is_double and abs(value) > float(np.finfo(np.float32).max):
        raise ValueError(f"{where}: {state.init}={value} is beyond float32, in which steps compute")
    if value is None and array.shape != param.shape:  # a sample
        data = param.decode() if isinstance(param, Stored) else param
        array[...] = formats.flat(data)[:: options[state.every]]  # type: ignore[index]
        return
    leaf, slot, origin = place
    key = formats.key(options["seed"], leaf, 0, slot)
    sources = formats.pieces(param) if value is None else repeat((0, np.float64(value)))
    view, done = formats.flat(array.data if isinstance(array, Stored) else array), 0
    for (start, piece), (_, source) in zip(formats.pieces(array), sources, strict=False):
        values = source.decode() if isinstance(source, Stored) else source
        if isinstance(piece, Stored):
            formats.encode(piece, np.broadcast_to(values, piece.shape), key, origin + start)
        else:
            piece[...] = values
        done = _relieve_behind(view, done, start)
    _core.relieve(view[done:])


def begin_all(
    names: Sequence[str],
    params: Sequence[Array | Stored],
    states: Sequence[Sequence[Array | Stored | None]],
    rule: Rule,
    options: Options,
    first: int,
    origins: Sequence[int],
) -> None:
    """Write the initial values of all states of some leaves, numbered from `first`."""
    rows = [(k, state) for k, state in enumerate(rule.states) if state.init != "zeros"]
    for leaf, (name, param, arrays) in enumerate(zip(names, params, states, strict=True), first):
        for k, state in rows:
            array = arrays[k]
            if array is not None:
                place = (leaf, 1 + k, origins[leaf - first])
                begin(f"{name}.{state.name}", array, state, param, options, place)


def shown(param: Array | Stored, values: Array) -> Array:
    """Return float `values` as the caller sees such a parameter: rounded to nearest."""
    if not isinstance(param, Stored):
        return values
    data = np.empty_like(param.data, subok=False)
    Stored(param.format.split("+")[0].removesuffix("-stochastic"), data).encode(values)
    return data


def _strides(like: Array, dtype: Any) -> tuple[int, ...]:
    return tuple(s // like.itemsize * np.dtype(dtype).itemsize for s in like.strides)


def _specs(form: str, like: Array, shape: tuple[int, ...]) -> list[Spec]:
    dtype, extra, _ = _FORMS[form]
    dtype = np.uint16 if dtype is None else dtype
    if shape != like.shape:
        return [(shape, dtype, None)]
    specs: list[Spec] = [(like.shape, dtype, _strides(like, dtype))]
    return specs if extra is None else [*specs, (extra_shape(form, like.shape), extra, None)]


def _take(form: str, arrays: Any) -> Array | Stored:
    data: Array = next(arrays)
    if form in ("float32", "float64", COUNTS):
        return data
    return Stored(form, data, None if FORMATS[form][1] is None else next(arrays))


def kept(
    params: Sequence[Array | Stored],
    states: Sequence[Sequence[Array | Stored | None]],
    state_names: Sequence[str],
) -> dict[str, int]:
    """Return the bytes of parameters, of their residual bits and of each state."""
    found: dict[str, int] = {"param": 0}
    for param, arrays in zip(params, states, strict=True):
        found["param"] += (param.data if isinstance(param, Stored) else param).nbytes
        if isinstance(param, Stored) and param.extra is not None:
            found["residual"] = found.get("residual", 0) + param.extra.nbytes
        for name, array in zip(state_names, arrays, strict=True):
            if array is not None:
                found[name] = found.get(name, 0) + array.nbytes
    return found


def memory(
    params: Sequence[Array],
    kept: Mapping[str, int],
    grad_itemsize: int | None,
    more: Mapping[str, tuple[int, int]],
) -> dict[str, dict[str, float]]:
    """Return the table of `Optimizer.memory`.

    `kept` is what a step reads and writes; `more` the bytes, resident and moved, of rows that are
    otherwise.
    """
    grads = sum(param.size * (grad_itemsize or param.itemsize) for param in params)
    rows = {name: (size, 2 * size) for name, size in kept.items()} | {"grad": (0, grads), **more}
    size = max(1, sum(param.size for param in params))
    table = {
        name: {"resident": resident / size, "moved": moved / size}
        for name, (resident, moved) in rows.items()
    }
    table["total"] = {
        column: sum(row[column] for row in table.values()) for column in ("resident", "moved")
    }
    return table


def pairs(
    where: str,
    ours: Array | Stored,
    theirs: Any,
    convert: bool,
    place: tuple[int, int, int],
    origin: int = 0,
) -> list[tuple[Array, Array]]:
    """Return (part of `ours`, its new contents from `theirs`) pairs; raise if they do not fit.

    The contents are in the memory order of the part. `place`, the leaf, step and slot, keys the
    noise of a conversion; `origin` is where the array begins, if it is a part of another.
    """
    if (
        type(ours) is type(theirs) is np.ndarray
        and ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
    ):  # the usual case: the rest takes 5 us
        return [(ours, _laid_as(ours, theirs))]
    if isinstance(theirs, Stored):
        theirs = _check.stored(where, theirs, writes=False)
    else:
        theirs = np.asarray(theirs) if np.isscalar(theirs) else theirs
        if not isinstance(theirs, np.ndarray):
            raise TypeError(f"{where}: expected an array, got {type(theirs).__name__}")
    mine, its = _kind(ours), _kind(theirs)
    if theirs.shape != ours.shape or (mine != its and not convert):
        can = theirs.shape == ours.shape and _can_convert(ours, theirs)
        way_out = "; convert=True converts" if can else ""
        raise ValueError(
            f"{where}: {its}{list(theirs.shape)} does not fit {mine}{list(ours.shape)}{way_out}"
        )
    if mine != its:
        theirs = _converted(where, ours, theirs, place, origin)
    elif (
        isinstance(ours, Stored)
        and FORMATS[mine][2] > 1
        and not _core.same_layout(theirs.data, ours.data)
    ):
        if not convert:
            raise ValueError(
                f"{where}: its blocks of {FORMATS[mine][2]} follow the memory order of a parameter "
                f"with strides {theirs.data.strides}, here {ours.data.strides}; convert=True "
                "encodes them again"
            )
        theirs = _converted(where, ours, theirs, place, origin)
    return [(a, _laid_as(a, b)) for a, b in zip(parts(ours), parts(theirs), strict=True)]


def _laid_as(a: Array, b: Array) -> Array:
    if a.strides == b.strides or _core.same_layout(b, a):
        return b
    laid = np.empty_like(a, subok=False)
    np.copyto(laid, b.view(a.dtype))
    return laid


def _can_convert(ours: Array | Stored, theirs: Array | Stored) -> bool:
    """Whether numbers of this kind have a meaning in the other: counts, or what is computed."""
    source, target = (np.float32 if isinstance(a, Stored) else a.dtype for a in (theirs, ours))
    return np.can_cast(source, target, "same_kind")


def _converted(
    where: str,
    ours: Array | Stored,
    theirs: Array | Stored,
    place: tuple[int, int, int],
    origin: int,
) -> Array | Stored:
    """Return the numbers of `theirs` in a new array in the format of `ours`."""
    if not _can_convert(ours, theirs):
        raise TypeError(f"{where}: {_kind(theirs)} cannot be converted to {_kind(ours)}")
    values = theirs.decode() if isinstance(theirs, Stored) else theirs
    if not isinstance(ours, Stored):
        return values.astype(ours.dtype)
    wide = np.float64 if values.dtype == np.float64 else np.float32
    laid = np.empty_like(ours.data, wide, subok=False)
    np.copyto(laid, values, casting="same_kind")
    twin = Stored(ours.format, *(np.empty_like(part, subok=False) for part in ours.parts()))
    formats.encode(twin, formats.flat(laid), formats.key(0, *place), origin)
    return twin


def param_pair(where: str, ours: Array | Stored, theirs: Any) -> tuple[Array, Array]:
    """Return (array of a parameter, its new contents); raise if they do not fit.

    For a bfloat16 parameter these are the bits that it shows, for 8-bit codes the codes; residual
    bits and blocks are state.
    """
    array = ours.data if isinstance(ours, Stored) else ours
    if not isinstance(theirs, np.ndarray):
        raise TypeError(f"{where}: expected an array, got {type(theirs).__name__}")
    if theirs.shape != array.shape or theirs.dtype != array.dtype:
        raise ValueError(
            f"{where}: {theirs.dtype}{list(theirs.shape)} does not fit the parameter, "
            f"{array.dtype}{list(array.shape)}"
        )
    is_blocks = isinstance(ours, Stored) and FORMATS[ours.format][2] > 1
    if is_blocks and not _core.same_layout(theirs, array):
        raise ValueError(
            f"{where}: its blocks follow the memory order of a parameter with strides "
            f"{theirs.strides}, here {array.strides}"
        )
    return array, _laid_as(array, theirs)


def zeros_like(array: Array | Stored) -> Array | Stored:
    """Return an array of the same format, shape and memory order, all zero."""
    zeros = [np.zeros_like(part, subok=False) for part in parts(array)]
    return Stored(array.format, *zeros) if isinstance(array, Stored) else zeros[0]


def _kind(array: Array | Stored) -> str:
    return array.format if isinstance(array, Stored) else str(array.dtype)


def parts(array: Array | Stored) -> list[Array]:
    """Return the NumPy arrays that an array consists of."""
    return array.parts() if isinstance(array, Stored) else [array]
