"""What an optimizer knows about one of its `param_groups`: its leaves and its checked options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedopt import _check, _storage, _tree
from fusedopt._arrays import Reader
from fusedopt.rule import Check, Options, Plan, Rule

_IMMUTABLE = (int, float, bool, str, type(None))


@dataclass(slots=True)
class Group:
    """A group of parameters.

    Attributes
    ----------
    tree
        The parameters, nested as they were given.
    reader : Reader
        Reads gradients that are nested in the same way.
    nodes : list
        The containers in `tree`, see `_tree.nodes`.
    leaves : range
        Numbers of its leaves.
    kept : tuple of bool
        Whether each state of the rule has arrays.
    options : dict
        As last checked, with `lr` as a number; and what the rule remembers.
    seen : dict or None
        The dict in `param_groups` when it was last checked; None if a value may change in place:
        then each step checks it.
    schedule : callable(step) -> float, or None
        `lr`, if it is not a number.
    plan : tuple
        See `Rule.plan`.
    """

    tree: Any
    reader: Reader
    nodes: list[_tree.Node]
    leaves: range
    kept: tuple[bool, ...]
    options: Options = field(default_factory=dict)
    seen: Options | None = None
    schedule: Callable[[int], Any] | None = None
    plan: Plan | None = None

    def note(self, rule: Rule, given: Mapping[str, Any], options: Options) -> None:
        """Store checked `options`, made from `given`."""
        values = [value for name, value in given.items() if name != "params"]
        self.seen = dict(given) if all(map(_is_constant, values)) else None
        self.options, lr = options, options["lr"]
        self.schedule = lr if callable(lr) else None
        self.plan = rule.plan(options)

    def schedule_rate(self, rule: Rule, step: int) -> None:
        """Take over the rate of a step from the schedule."""
        assert self.schedule is not None
        rate = rule.check_rate(f"lr({step})", self.schedule(step))
        self.options = self.options | {"lr": rate}
        self.plan = rule.plan(self.options)

    def lacks(self, rule: Rule, used: tuple[bool, ...]) -> str | None:
        """Return the name of a state that is used, see `Rule.uses`, and was not allocated."""
        rows = zip(rule.state_names, used, self.kept, strict=True)
        return next((name for name, use, kept in rows if use and not kept), None)

    def check(self, rule: Rule, given: Options, where: str) -> Options:
        """Return options in the place of the present ones, checked; messages begin with `where`."""
        options = rule.check(given, f"{where}.")
        _storage.refuse_fixed(f"{where}.", rule, self.options, options)
        _storage.refuse_change(f"{where}.", self.options, options)
        lacking = self.lacks(rule, rule.uses(options))
        if lacking is not None:
            raise ValueError(
                f"{where}: these options need {lacking}, which was not allocated; "
                "set them when the optimizer is made"
            )
        return options

    def valid(self, rule: Rule, given: Mapping[str, Any]) -> Options:
        """Return the options, with the last step's value in the place of an invalid one.

        All are the last step's if no step could take them together.
        """
        options = {}
        for name, check in rule.checks.items():
            try:
                options[name] = check(name, given[name])
            except (KeyError, TypeError, ValueError):
                options[name] = self.options[name]
        try:
            self.check(rule, options, "")
        except (TypeError, ValueError):
            options |= {name: self.options[name] for name in rule.defaults if name != "lr"}
        return options


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return type(value) in _IMMUTABLE or callable(value)


def refuse_unknown(where: str, given: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raise TypeError if a group has a key that is not an option."""
    _check.refuse_unknown(where, (name for name in given if name != "params"), checks)
