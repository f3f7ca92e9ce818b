"""Nested lists, tuples and dicts: from a tree of arrays to a flat list, and to names.

A leaf's name is the expression that leads to it: ``params['dense1']['W']``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

DEEPEST = 100  # containers in containers; deeper nesting is treated as a cycle

# a container, what was in it, as a list or dict, and the names of that
Node = tuple[str, Any, list[Any] | dict[Any, Any], list[str]]


def _children(name: str, tree: Any) -> Iterator[tuple[str, Any]] | None:
    """Return the items of a list, tuple or dict with their names; None for any other object."""
    if isinstance(tree, dict):
        return ((f"{name}[{key!r}]", node) for key, node in tree.items())
    if isinstance(tree, (list, tuple)):
        return ((f"{name}[{i}]", node) for i, node in enumerate(tree))
    return None


def leaves(name: str, tree: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield (name, leaf) in order; whatever is not a list, tuple or dict is a leaf.

    Raises
    ------
    ValueError
        If the nesting is deeper than `DEEPEST`, e.g. because a list contains itself.
    """
    children = _children(name, tree)
    if children is None:
        yield name, tree
        return
    if depth == DEEPEST:
        raise ValueError(
            f"{name[:80]}...: nested more than {DEEPEST} deep; does a container contain itself? "
            "Pass a flat list or dict of the arrays"
        )
    for inner, node in children:
        yield from leaves(inner, node, depth + 1)


def nodes(name: str, tree: Any) -> Iterator[Node]:
    """Yield (name, container, its items now, their names) for each list and dict of a tree."""
    inside = dict(_children(name, tree) or ())
    if isinstance(tree, (dict, list)):
        yield name, tree, dict(tree) if isinstance(tree, dict) else list(tree), list(inside)
    for inner, node in inside.items():
        yield from nodes(inner, node)


def refuse_change(
    name: str, container: Any, before: list[Any] | dict[Any, Any], names: list[str]
) -> None:
    """Raise ValueError if a container no longer has the objects of `before`."""
    now = dict(_children(name, container) or ())
    values = before.values() if isinstance(before, dict) else before
    for inner, value in zip(names, values, strict=True):
        if inner not in now:
            raise ValueError(f"{inner}: was removed; make another optimizer without it")
        if now.pop(inner) is not value:
            raise ValueError(
                f"{inner}: is another object than when this optimizer was made, so steps would not "
                f"update it; write into the array, {inner}[...] = value, or make another optimizer"
            )
    if now:
        raise ValueError(
            f"{', '.join(now)}: was added after this optimizer was made; remove it and pass it to "
            "add_param_group"
        )


def is_groups(params: Any) -> bool:
    """Whether these are torch-style groups: dicts with ``params`` in a list."""
    return (
        isinstance(params, (list, tuple))
        and len(params) > 0
        and all(isinstance(group, dict) and "params" in group for group in params)
    )


Reader = Callable[[str, Any, list[Any]], None]


def reader(tree: Any) -> Reader:
    """Return a function (name, other, out) that appends to `out` the leaves of `other`.

    `other` must be nested like `tree`; None instead of a part stands for all its leaves. Built
    once, because every step reads its gradients with it.
    """
    if isinstance(tree, dict):
        return _dict_reader({key: reader(node) for key, node in tree.items()})
    if isinstance(tree, (list, tuple)):
        return _list_reader([reader(node) for node in tree])
    return _read_leaf


def _read_leaf(name: str, other: Any, out: list[Any]) -> None:
    out.append(other)  # _check tests whether it is an array


def _dict_reader(parts: dict[Any, Reader]) -> Reader:
    keys = parts.keys()
    is_flat = all(part is _read_leaf for part in parts.values())
    take: Callable[[Any], Sequence[Any]]
    if len(parts) > 1:
        take = itemgetter(*parts)
    else:
        take = lambda other: [other[key] for key in parts]

    def read(name: str, other: Any, out: list[Any]) -> None:
        if other is None:
            other = dict.fromkeys(keys)
        elif not isinstance(other, dict):
            raise ValueError(f"{name}: expected a dict as in params, got {type(other).__name__}")
        values: Sequence[Any] = ()
        if len(other) == len(keys) and (type(other) is dict or other.keys() == keys):
            try:
                values = take(other)
            except KeyError:
                pass
        if len(values) != len(keys):
            missing = [f"no {key!r}" for key in keys if key not in other]
            foreign = [f"{key!r} is not in params" for key in other if key not in parts]
            raise ValueError(f"{name}: {', '.join(missing + foreign)}")
        if is_flat:
            out.extend(values)
        else:
            for (key, part), value in zip(parts.items(), values, strict=True):
                part(f"{name}[{key!r}]", value, out)

    return read


def _list_reader(parts: list[Reader]) -> Reader:
    is_flat = all(part is _read_leaf for part in parts)

    def read(name: str, other: Any, out: list[Any]) -> None:
        if other is None:
            other = [None] * len(parts)
        elif not isinstance(other, (list, tuple)):
            raise ValueError(f"{name}: expected a list as in params, got {type(other).__name__}")
        elif len(other) != len(parts):
            raise ValueError(f"{name}: {len(other)} entries for {len(parts)} in params")
        if is_flat:
            out.extend(other)
        else:
            for i, part in enumerate(parts):
                part(f"{name}[{i}]", other[i], out)

    return read


def rebuilder(tree: Any) -> Callable[[list[Any]], Any]:
    """Return a function that nests a flat list of leaves like `tree`; tuples become lists."""

    def build(node: Any, values: Iterator[Any]) -> Any:
        if isinstance(node, dict):
            return {key: build(part, values) for key, part in node.items()}
        if isinstance(node, list):
            return [build(part, values) for part in node]
        return next(values)

    skeleton = _skeleton(tree)
    return lambda flat: build(skeleton, iter(flat))


def _skeleton(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _skeleton(node) for key, node in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_skeleton(node) for node in tree]
    return None
