"""Options as torch's optimizers keep them: checks, and a base class with the options of a rule.

`Fused` checks a group with these functions when it has changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from fusedopt import _check, _options
from fusedopt._options import StepOptions
from fusedopt.rule import CAUTIOUS, L1, MAXIMIZE, Options, Rule

# options of a step, which are in `defaults` only, where they are not the default
OF_NO_GROUP = frozenset(_options.DEFAULTS) - {"grad_scale"}
CONSTANT = frozenset({float, int, bool, str, type(None)})  # types of values that stay as they are


def refuse_of_arrays(where: str, options: Mapping[str, Any]) -> None:
    """Raise TypeError for options that classes of arrays alone have."""
    if options.get("row_steps"):
        raise TypeError(
            f"{where}: row_steps: rows of tensors do not count their steps; leave it out, or give "
            "the table as an array, table.detach().numpy(), to fusedopt.Adam or AdamW"
        )


def refuse_options(where: str, group: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for options that a step of tensors cannot have."""
    refuse_of_arrays(where, group)
    for option, purpose in (
        ("capturable", "is for graphs of an accelerator"),
        ("differentiable", "needs a step that autograd can see"),
    ):
        if group.get(option):
            raise ValueError(
                f"{where}: {option}=True {purpose}, and fusedopt steps in place on the CPU; "
                f"leave it False, or use torch.optim"
            )


def refuse_of_no_group(where: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError for options in a group that are of the optimizer."""
    for name in OF_NO_GROUP:
        if name in group:
            raise ValueError(
                f"{where}.{name}: is of the optimizer, not of a group: {name}=... beside lr; where "
                f"an engine makes groups of all options, functools.partial(CLASS, {name}=...)"
            )


def refuse_of_all(how: StepOptions) -> None:
    """Raise ValueError for options that depend on all gradients."""
    if how.max_grad_norm is not None and not how.per_tensor:
        raise ValueError(
            "step_params: max_grad_norm is about the norm of all gradients; give per_tensor=True, "
            "or use step"
        )
    if how.nonfinite == "skip":
        raise ValueError(
            "step_params: nonfinite='skip' changes all parameters or none; give 'raise', or use "
            "step"
        )


def is_constant(item: tuple[str, Any]) -> bool:
    """Whether a value of a group cannot change in place."""
    name, value = item
    if type(value) is tuple:
        return all(type(x) in CONSTANT for x in value)
    return type(value) in CONSTANT or name in ("params", "param_names")


def number(where: str, value: Any) -> float:
    """Return one of torch's options as a number, in a range that torch checks."""
    if type(value) is float:
        return value
    result = value
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type != "meta":
        result = value.item()
    if not isinstance(result, Real):
        raise TypeError(f"{where}: expected a number, got {value!r}")
    return float(result)


def numbers(where: str, value: Any, count: int) -> tuple[float, ...]:
    _check.several(where, value, count)
    return tuple(number(f"{where}[{i}]", x) for i, x in enumerate(value))


def plain_base(rule: Rule) -> type[Any]:
    """Return a class of torch optimizers with the options of a rule that torch does not have."""
    signature = _signature(rule)

    class Base(torch.optim.Optimizer):
        def __init__(self, *args: Any, **options: Any) -> None:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            params = bound.arguments.pop("params")
            ignored = {
                row.name: row.check(row.name, bound.arguments[row.name]) for row in rule.ignored
            }
            super().__init__(params, checked_options(rule, "", bound.arguments) | ignored)

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            for group in self.param_groups:
                for option in (*rule.options, *rule.ignored):
                    group.setdefault(option.name, option.default)

    Base.__signature__ = signature
    return Base


def _signature(rule: Rule) -> inspect.Signature:
    either, only = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("params", either)]
    for option in (*rule.options, *rule.ignored):
        kind = only if option in (L1, MAXIMIZE, CAUTIOUS) else either
        parameters.append(inspect.Parameter(option.name, kind, default=option.default))
    return inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))


def checked_options(rule: Rule, where: str, group: Mapping[str, Any]) -> Options:
    """Return a rule's options of a group, checked."""
    values = {}
    for option in rule.options:
        value = group[option.name]
        if isinstance(value, torch.Tensor):
            value = number(where + option.name, value)
        values[option.name] = option.check(where + option.name, value)
    if rule.demand is not None:
        rule.demand(where, values)
    return values
