"""Nested lists, tuples and dicts: from a tree of arrays to a flat list, and to names.

A leaf's name is the expression that leads to it: ``params['dense1']['W']``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fusedopt._arrays import Reader

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


def reader(tree: Any) -> Reader:
    """Return what reads the leaves of others that are nested like `tree`.

    None instead of a part stands for all its leaves. Made once, because every step reads its
    gradients with it.
    """
    if isinstance(tree, dict):
        items = list(tree.items())  # as `leaves` reads it: the keys of a subclass may be others
        return Reader(tuple([key for key, _ in items]), [reader(node) for _, node in items])
    if isinstance(tree, (list, tuple)):
        return Reader(None, [reader(node) for node in tree])
    return Reader(None, None)


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
