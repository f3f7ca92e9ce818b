"""Whether a state dict fits an optimizer: all is checked and made ready before the first write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusedopt import _check, _storage, formats
from fusedopt._check import Array

if TYPE_CHECKING:
    from fusedopt.optimizer import Optimizer, Options


def states(
    optimizer: Optimizer, state: dict[str, Any], convert: bool
) -> tuple[list[int], list[tuple[Array, Array]]]:
    """Return the step counts, and each array with what it shall hold; write nothing."""
    ours = optimizer.state
    if state.keys() != ours.keys():
        missing = [name for name in ours if name not in state]
        foreign = [name for name in state if name not in ours]
        raise ValueError(
            "state dict: other parameters than this optimizer's; "
            f"missing {missing[:3]}, foreign {foreign[:3]}"
        )
    steps, pairs = [], []
    for leaf, (name, arrays) in enumerate(ours.items()):
        if not isinstance(state[name], Mapping) or state[name].keys() != arrays.keys():
            raise ValueError(
                f"state dict: {name} should have {', '.join(arrays)}; "
                "make the optimizer with the options that the state was made with"
            )
        steps.append(_check.steps(f"state dict: {name}.step", state[name]["step"]))
        for key, array in arrays.items():
            if key != "step":
                slot = 1 + optimizer._slots.index(key) if key in optimizer._slots else 0
                noise = formats.key(0, leaf, steps[-1], slot)
                where = f"state dict: {name}.{key}"
                pairs += _storage.pairs(where, array, state[name][key], convert, noise)
    return steps, pairs


def groups(optimizer: Optimizer, given: Sequence[Any], convert: bool) -> list[Options]:
    """Return the new options of all groups; write nothing."""
    if len(given) != len(optimizer.param_groups):
        raise ValueError(
            f"state dict: {len(given)} param_groups for this optimizer's "
            f"{len(optimizer.param_groups)}"
        )
    fitted = []
    for i, (group, mine) in enumerate(zip(given, optimizer.param_groups, strict=True)):
        where = f"state dict: param_groups[{i}]"
        if not isinstance(group, Mapping) or any(name not in group for name in optimizer.checks):
            raise ValueError(f"{where}: expected {', '.join(optimizer.checks)}")
        options = {name: group[name] for name in optimizer.checks}
        if options["lr"] is None or callable(mine["lr"]):
            options["lr"] = mine["lr"]
        if convert:
            options |= {name: mine[name] for name in _storage.FIXED}
        checked = optimizer.check_options(options, f"{where}.")
        if optimizer.uses(checked) != optimizer.uses(
            optimizer.check_options({name: mine[name] for name in optimizer.checks}, "")
        ):
            raise ValueError(f"{where}: its options need other state than this optimizer has")
        _storage.refuse_change(f"{where}.", mine, checked)
        fitted.append(checked)
    return fitted
