"""Whether a state dict fits an optimizer: all is checked and made ready before the first write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedopt import _check, _storage
from fusedopt._check import Array
from fusedopt.formats import Stored
from fusedopt.rule import Options

if TYPE_CHECKING:
    from fusedopt.optimizer import Optimizer


def fit(
    optimizer: Optimizer, state: dict[str, Any], groups: Sequence[Any], convert: bool
) -> tuple[list[tuple[Array, Array]], list[int], list[Options]]:
    """Return each array with what it shall hold, step counts and options; write nothing."""
    options = _groups(optimizer, groups, convert)
    steps, pairs = _states(optimizer, state, options, convert)
    for i, (own, new) in enumerate(zip(optimizer._groups, options, strict=True)):
        _storage.refuse_change(f"state dict: param_groups[{i}].", own.options, new)
    return pairs, steps, options


def _states(
    optimizer: Optimizer, state: dict[str, Any], options: Sequence[Options], convert: bool
) -> tuple[list[int], list[tuple[Array, Array]]]:
    """Return the step counts, and each array with what it shall hold.

    `options` are those of the groups from now on. State that they do not use, as of momentum that
    was switched off, is ignored where the optimizer has none, and zero where the dict has none.
    """
    ours = optimizer.state
    if state.keys() != ours.keys():
        missing = [name for name in ours if name not in state]
        foreign = [name for name in state if name not in ours]
        raise ValueError(
            "state dict: other parameters than this optimizer's; "
            f"missing {missing[:3]}, foreign {foreign[:3]}"
        )
    unused = []  # by leaf
    for group, its in zip(optimizer._groups, options, strict=True):
        used = zip(optimizer.rule.state_names, optimizer.rule.uses(its), strict=True)
        unused += [{name for name, use in used if not use}] * len(group.leaves)
    slots = {name: 1 + k for k, name in enumerate(optimizer.rule.slots)}  # of others it is 0
    steps, pairs = [], []
    for leaf, (name, arrays) in enumerate(ours.items()):
        given = state[name]
        if not isinstance(given, Mapping) or (given.keys() ^ arrays.keys()) - unused[leaf]:
            raise ValueError(
                f"state dict: {name} should have {', '.join(arrays)}; "
                "make the optimizer with the options that the state was made with"
            )
        step = _check.steps(f"state dict: {name}.step", given["step"])
        steps.append(step)
        for key, array in arrays.items():
            if key not in given:  # as if it had never been used
                parts = array.parts() if isinstance(array, Stored) else [array]
                pairs += [(part, np.zeros_like(part)) for part in parts]
            elif key != "step":
                where, place = f"state dict: {name}.{key}", (leaf, step, slots.get(key, 0))
                pairs += _storage.pairs(where, array, given[key], convert, place)
    return steps, pairs


def _groups(optimizer: Optimizer, given: Sequence[Any], convert: bool) -> list[Options]:
    """Return the new options of all groups."""
    if len(given) != len(optimizer.param_groups):
        raise ValueError(
            f"state dict: {len(given)} param_groups for this optimizer's "
            f"{len(optimizer.param_groups)}"
        )
    fitted = []
    for i, (group, own) in enumerate(zip(given, optimizer._groups, strict=True)):
        where = f"state dict: param_groups[{i}]"
        mine = optimizer._options_now(own, optimizer.param_groups[i])
        names = optimizer.rule.checks
        if not isinstance(group, Mapping) or any(name not in group for name in names):
            raise ValueError(f"{where}: expected {', '.join(names)}")
        options = {name: group[name] for name in names}
        if options["lr"] is None or callable(mine["lr"]):
            options["lr"] = mine["lr"]
        if convert:
            options |= {name: mine[name] for name in _storage.FIXED}
        checked = optimizer.rule.check(options, f"{where}.")
        lacking = optimizer._lacking_state(own, checked)
        if lacking is not None:
            raise ValueError(
                f"{where}: its options need other state than this optimizer has: {lacking}"
            )
        fitted.append(checked)
    return fitted
