"""How much memory an optimizer would take: computed from shapes, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

import fusedopt
from fusedopt import _check, _storage

SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


def memory(
    params: Any,
    optimizer: str = "AdamW",
    *,
    dtype: Any = "float32",
    grad_dtype: Any = None,
    **options: Any,
) -> dict[str, dict[str, int]]:
    """Return the bytes that an optimizer would keep and move; allocates nothing.

    Parameters
    ----------
    params : nesting of shapes, arrays or tensors; or torch.nn.Module
        Any nesting of lists, tuples and dicts. A list or tuple of whole numbers is a shape, a
        number one of one axis; objects with ``shape`` and ``dtype`` are taken as they are, also
        tensors on torch's device "meta".
    optimizer : str, default "AdamW"
        Name of a class of `fusedopt`.
    dtype : str or dtype, default "float32"
        Of parameters that are given as shapes: float32, float64, float16 or bfloat16.
    grad_dtype : str or dtype, optional
        Of the gradients; by default that of each parameter.
    **options
        Of the optimizer: `state_dtype`, `master_bits`, `min_8bit_size`, `ema`, `amsgrad`, ...

    Returns
    -------
    dict
        ``param``, ``grad``, ``residual`` and the state's names, and ``total``; for each,
        ``resident``: the bytes kept, and ``moved``: the bytes that a step reads and writes if
        nothing is in the cache. Gradients are the caller's and count as moved only.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter or the option.

    Examples
    --------
    >>> import fusedopt
    >>> fusedopt.memory([(30000, 64), (64, 256), 256])["total"]["resident"]
    23239680
    >>> fusedopt.memory([(30000, 64), (64, 256), 256], state_dtype="int8")["total"]["resident"]
    11681888
    """
    cls = getattr(fusedopt, optimizer, None) if isinstance(optimizer, str) else None
    rule = getattr(cls, "rule", None)
    if rule is None:
        known = [name for name in fusedopt.__all__ if hasattr(getattr(fusedopt, name), "rule")]
        raise ValueError(f"optimizer: expected one of {', '.join(known)}, got {optimizer!r}")
    _check.refuse_unknown(optimizer, options, rule.defaults)
    checked = rule.check(rule.defaults | options)
    leaves = list(_leaves(params, _kind("dtype", dtype)))
    if not leaves:
        raise ValueError("params: no shapes in it")
    _storage.refuse_master(checked["master_bits"], (SIZES[kind] for _, _, kind in leaves))
    grads = None if grad_dtype is None else SIZES[_kind("grad_dtype", grad_dtype)]
    kept, moved = {"param": 0}, 0
    for name, shape, kind in leaves:
        kept["param"] += prod(shape) * SIZES[kind]
        moved += prod(shape) * (grads or SIZES[kind])
        own, forms = _storage.plan(name, shape, kind, rule, checked)
        if own is not None and (extra := _storage.extra_bytes(own, shape)):
            kept["residual"] = kept.get("residual", 0) + extra
        for state, form in zip(rule.slots, forms, strict=True):
            if form is not None:
                kept[state] = kept.get(state, 0) + _storage.nbytes(*form)
    table = {name: {"resident": size, "moved": 2 * size} for name, size in kept.items()}
    table["grad"] = {"resident": 0, "moved": moved}
    table["total"] = {
        column: sum(row[column] for row in table.values()) for column in ("resident", "moved")
    }
    return table


def _kind(name: str, dtype: Any) -> str:
    kind = _check.dtype_name(dtype)
    if kind not in SIZES:
        raise TypeError(f"{name}: dtype {kind} is not supported; use {', '.join(SIZES)}")
    return kind


def _leaves(params: Any, kind: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and dtype of each parameter."""
    if hasattr(params, "named_parameters"):
        params = dict(params.named_parameters())
    elif isinstance(params, Iterator):  # of a model's parameters
        params = list(params)
    yield from _walk("params", params, kind)


def _walk(name: str, node: Any, kind: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    if hasattr(node, "shape") and hasattr(node, "dtype") and not _is_size(node):
        yield name, tuple(node.shape), _kind(name, node.dtype)
        return
    sizes = (node,) if _is_size(node) else node
    if isinstance(sizes, (list, tuple)) and sizes and all(map(_is_size, sizes)):
        if min(sizes) < 0:
            raise ValueError(f"{name}: a shape has no negative numbers, got {node!r}")
        yield name, tuple(map(int, sizes)), kind
    elif isinstance(node, Mapping):
        for key, inner in node.items():
            yield from _walk(f"{name}[{key!r}]", inner, kind)
    elif isinstance(node, (list, tuple)):
        for i, inner in enumerate(node):
            yield from _walk(f"{name}[{i}]", inner, kind)
    else:
        raise TypeError(f"{name}: expected a shape, or an array or tensor, got {node!r}")


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
