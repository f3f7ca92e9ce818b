"""Whether a state dict fits an optimizer: all is checked and prepared before the first write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusedopt import _check, _storage
from fusedopt._check import Array
from fusedopt._groups import Group
from fusedopt.formats import Stored
from fusedopt.rule import Options, Rule


def fit(
    rule: Rule,
    groups: Sequence[Group],
    now: Sequence[Options],
    params: Sequence[Array | Stored],
    ours: dict[str, dict[str, Any]],
    state_dict: Mapping[str, Any],
    convert: bool,
    origins: Sequence[int],
) -> tuple[list[tuple[Array, Array]], list[int], list[Options]]:
    """Return (array, new contents) pairs, step counts and options; write nothing.

    `now` are the options of the groups, `params` and `ours` the parameter and the state of each
    leaf, `origins` where a leaf begins that is a part of an array.
    """
    options = _options(rule, groups, now, state_dict["param_groups"], convert)
    for i, (group, new) in enumerate(zip(groups, options, strict=True)):
        _storage.refuse_fixed(f"state dict: param_groups[{i}].", rule, group.options, new)
    by_leaf = [its for group, its in zip(groups, options, strict=True) for _ in group.leaves]
    steps, pairs = _states(rule, params, ours, state_dict["state"], by_leaf, convert, origins)
    for i, (group, new) in enumerate(zip(groups, options, strict=True)):
        _storage.refuse_change(f"state dict: param_groups[{i}].", group.options, new)
    return pairs, steps, options


def fit_params(
    names: Sequence[str], ours: Sequence[Array | Stored], given: Mapping[str, Any]
) -> list[tuple[Array, Array]]:
    """Return (array, new contents) pairs of the parameters by leaf name; write nothing."""
    if given.keys() != set(names):
        missing = [name for name in names if name not in given]
        unexpected = [name for name in given if name not in names]
        raise ValueError(
            "the parameters in it are not those of this optimizer; "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return [
        _storage.param_pair(name, array, given[name])
        for name, array in zip(names, ours, strict=True)
    ]


def _states(
    rule: Rule,
    params: Sequence[Array | Stored],
    ours: dict[str, dict[str, Any]],
    state: Mapping[str, Any],
    options: Sequence[Options],
    convert: bool,
    origins: Sequence[int],
) -> tuple[list[int], list[tuple[Array, Array]]]:
    """Return the step counts, and (array, new contents) pairs.

    State that the new options do not use (e.g. of momentum that was switched off) is ignored if the
    optimizer does not have it, and gets its initial value if the dict does not.
    """
    if state.keys() != ours.keys():
        missing = [name for name in ours if name not in state]
        unexpected = [name for name in state if name not in ours]
        raise ValueError(
            "state dict: its parameters are not those of this optimizer; "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    slots = {name: 1 + k for k, name in enumerate(rule.slots)}  # 0 for other arrays
    steps: list[int] = []
    pairs: list[tuple[Array, Array]] = []
    for leaf, (name, arrays) in enumerate(ours.items()):
        given, its = state[name], options[leaf]
        used = zip(rule.state_names, rule.uses(its), strict=True)
        unused = {key for key, use in used if not use}
        if not isinstance(given, Mapping) or (given.keys() ^ arrays.keys()) - unused:
            raise ValueError(
                f"state dict: {name} should have {', '.join(arrays)}"
                + (f"; it has {', '.join(given)}" if isinstance(given, Mapping) else "")
                + "; make the optimizer with the options that the state was made with"
            )
        step = _check.steps(f"state dict: {name}.step", given["step"])
        steps.append(step)
        for key, array in arrays.items():
            if key not in given:  # as in a new optimizer
                new, slot = _storage.zeros_like(array), slots[key]
                begun, first = rule.states[slot - 1], rule.beginning(its, step + 1)
                at = (leaf, slot, origins[leaf])
                _storage.begin(f"{name}.{key}", new, begun, params[leaf], first, at)
                pairs += zip(_storage.parts(array), _storage.parts(new), strict=True)
            elif key != "step":
                where, place = f"state dict: {name}.{key}", (leaf, step, slots.get(key, 0))
                if rule.counter is not None and slots.get(key) == 1 + rule.counter:
                    _check.refuse_counts(where, given[key])
                pairs += _storage.pairs(where, array, given[key], convert, place, origins[leaf])
    return steps, pairs


def _options(
    rule: Rule, groups: Sequence[Group], now: Sequence[Options], given: Sequence[Any], convert: bool
) -> list[Options]:
    """Return the new options of all groups."""
    if len(given) != len(groups):
        raise ValueError(
            f"state dict: {len(given)} param_groups for this optimizer's {len(groups)}"
        )
    fitted = []
    for i, (theirs, group, mine) in enumerate(zip(given, groups, now, strict=True)):
        where, names = f"state dict: param_groups[{i}]", rule.checks
        has = isinstance(theirs, Mapping) and theirs
        flags = {n: False for n in names if rule.defaults.get(n) is False}  # off if they are newer
        missing = [n for n in names if not has or (n not in has and n not in flags)]
        if missing:
            raise ValueError(f"{where}: expected {', '.join(names)}; has no {', '.join(missing)}")
        options = {name: theirs.get(name, flags.get(name)) for name in names}
        if options["lr"] is None or callable(mine["lr"]):
            options["lr"] = mine["lr"]
        if convert:
            options |= {name: mine[name] for name in _storage.FIXED}
        checked = rule.check(options, f"{where}.")
        lacking = group.lacks(rule, rule.uses(checked))
        if lacking is not None:
            raise ValueError(
                f"{where}: its options need state that this optimizer does not have: {lacking}"
            )
        fitted.append(checked)
    return fitted
