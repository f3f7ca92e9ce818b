"""What a rule is: one value that holds everything about it except its formula.

The formula is in csrc/rules/NAME.h and, in plain NumPy, in reference/NAME.py. Classes, functions,
adapters, references and the benchmark read a rule's options, state and constants from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, TypedDict

from fusedopt import _check

Options = dict[str, Any]
Check = Callable[[str, Any], Any]
# of each state its fo_map (csrc/fusedopt.h) and its shape or None; the members of fo_shape
Layout = tuple[tuple[int, ...], tuple[tuple[int, ...] | None, ...], tuple[int, ...]]

COUNTS = 4  # in place of a fo_map, of what C does not see: `State.counts`


class Constants(NamedTuple):
    """The constants of steps with some options, see `Rule.at`.

    A tuple, as `_core.set_constants` reads it in each step.

    Attributes
    ----------
    of_rule : callable(step, options) -> dict
        `Rule.constants`.
    options : dict
        What it gets.
    grad_scale, l1, l2 : float
        What all rules have: see fo_hyper (csrc/fusedopt.h).
    decay : float or None
        Of the running average, if there is one.
    warms_up : bool
        Whether that depends on the number of the step.
    """

    of_rule: Callable[[int, Options], dict[str, float]]
    options: Options
    grad_scale: float
    l1: float
    l2: float
    decay: float | None
    warms_up: bool

    def ema_weight(self, count: int) -> float:
        """Return the weight of the parameters in the average."""
        if self.decay is None:
            return 0.0
        warm = (1 + count) / (10 + count)
        return 1 - (min(self.decay, warm) if self.warms_up else self.decay)

    def __call__(self, step: int, count: int | None = None) -> dict[str, float]:
        """Return all of them by name, in double.

        `step` is from 1; `count` is the number of the step for the average, if the rule has started
        again since.
        """
        return self.of_rule(step, self.options) | {
            "grad_scale": self.grad_scale,
            "l1": self.l1,
            "l2": self.l2,
            "ema_weight": self.ema_weight(step if count is None else count),
        }


Plan = tuple[Constants, int, Callable[[Any], None] | None, str]  # see `Rule.plan`


@dataclass(frozen=True)
class Option:
    """An option of a rule.

    Attributes
    ----------
    name : str
        As in the library that made the rule known.
    default
        Its value if it is not given.
    check : callable(name, value) -> value
        Returns the value in the form that the package uses; its errors begin with the name.
    term : {"", "l1", "l2"}
        The term of the gradient that it weights, before the rule: ``l1 * sign(p)`` or ``l2 * p``.
    """

    name: str
    default: Any
    check: Check
    term: str = ""


@dataclass(frozen=True)
class State:
    """An array that a rule keeps for each parameter, of its shape unless `part` or `every` is set.

    Attributes
    ----------
    name : str
        As in torch.
    squared : bool
        Whether it is a mean or sum of squares, or for another reason never negative: unsigned in 8
        bits.
    needs : str
        The option that asks for it: not kept if that is False or 0. Empty: always kept.
    init : str
        Its initial value: "zeros", "param" (the parameter's value), or the name of the option that
        holds the value of every element; of a schedule of `lr`, that of the next step.
    refuses : tuple of str
        The values of `state_dtype`, of "bfloat16" and "int8", that lose what the rule needs of it.
        Optimizers, groups, changes of options and functions that would keep it so are refused by
        name. The class's documentation says why.
    plural : str
        Name of its list in functions, if it is not `name` with an s.
    wide : bool
        Whether it is kept in float32, or float64, whatever `state_dtype` says.
    part : str
        Of a rule with factors: "rows" or "columns", with one number for each of every matrix and an
        axis of length 1 in the place of the other, kept for parameters of two or more axes; or
        "rest", of the parameter's shape, kept for others.
    every : str
        Name of an option with a number k, which cannot change later: if it is above 1, a flat array
        of the parameter's elements 0, k, 2 * k, ..., in the order of memory. Such a state is wide.
    by_row : str
        Name of an option which, if it is set, lets the state be one number for each row, along the
        first axis: all other axes have length 1. It cannot change later. Such a state is wide.
    counts : bool
        Of a state by row: whether it is how many steps each row has taken, int64, and no array of
        the C rule. Each row then is stepped by the constants of its own next step.
    """

    name: str
    squared: bool = False
    needs: str = ""
    init: str = "zeros"
    refuses: tuple[str, ...] = ()
    plural: str = ""
    wide: bool = False
    part: str = ""
    every: str = ""
    by_row: str = ""
    counts: bool = False

    @property
    def fixed_by(self) -> str:
        """The option that its shape depends on, if there is one."""
        return self.every or self.by_row

    def shape(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Return its shape for a parameter of a shape; None if it is not kept for that."""
        if self.part and (self.part == "rest") == (len(shape) > 1):
            return None
        if self.part == "rows":
            return (*shape[:-1], 1)
        if self.part == "columns":
            return (*shape[:-2], 1, shape[-1])
        if self.every and options[self.every] > 1:
            return (-(-prod(shape) // int(options[self.every])),)
        if self.is_by_row(options):
            return (*shape[:1], *(1 for _ in shape[1:]))
        return shape

    def is_by_row(self, options: Mapping[str, Any]) -> bool:
        """Whether it is one number for each row."""
        return bool(self.by_row and options.get(self.by_row))

    def first(self, options: Mapping[str, Any]) -> float | None:
        """Return the initial value of every element; None if it is the parameter's."""
        if self.init == "param":
            return None
        return 0.0 if self.init == "zeros" else options[self.init]


@dataclass(frozen=True)
class Scalar:
    """A number that a rule remembers for a group from step to step.

    It is in `param_groups` and in checkpoints beside the options, and is not an argument of the
    class.

    Attributes
    ----------
    name : str
        As in the library that made the rule known.
    init : float or str
        Its initial value: a number, or the name of the option that holds it.
    check : callable(name, value) -> value
        As in `Option`.
    shown : bool
        Whether it is only there to be read, and no step depends on it: functions do not take it.
    """

    name: str
    init: float | str
    check: Check = _check.number
    shown: bool = False


@dataclass(frozen=True)
class Average:
    """An average x of the parameters by which a rule takes its steps, and which it does not keep.

    The parameters y lie between it and a state array z, ``y = (1 - weight) * z + weight * x``, and
    x is to be evaluated. `Optimizer.swap_ema` and `Optimizer.ema_params` show it, so that such a
    rule refuses `ema`; a torch class has ``train`` and ``eval``.

    Attributes
    ----------
    state : str
        Name of z.
    option : str
        Name of the option with the weight, for messages.
    weight : callable(options) -> float
        Its value.
    """

    state: str
    option: str
    weight: Callable[[Options], float]


# of a rule with an `Average`: whether the parameters hold y, which arrays do, and tensors may
MODE = Scalar("train_mode", True, _check.flag, shown=True)

MAXIMIZE = Option("maximize", False, _check.flag)
DECOUPLED = Option("decoupled_weight_decay", False, _check.flag)
CAUTIOUS = Option("cautious", False, _check.flag)
EPS_IN_SQRT = Option("eps_in_sqrt", False, _check.flag)
L1 = Option("l1", 0.0, _check.nonnegative, term="l1")


# names of the flag that decouples weight decay: torch's, pytorch_optimizer's, prodigyopt's
_DECOUPLES = (DECOUPLED.name, "weight_decouple", "decouple")


def kept(options: Mapping[str, Any]) -> float:
    """Return the factor of a parameter by decoupled weight decay in a step; 1 without."""
    if not any(options.get(name) for name in _DECOUPLES):
        return 1.0
    rate: float = 1.0 if options.get("fixed_decay") else options["lr"]
    return 1 - rate * float(options["weight_decay"])


NARROW = ("bfloat16", "int8")  # narrow values of `state_dtype`

# what every optimizer has; documented at `fusedopt.Optimizer`
COMMON = (
    Option("state_dtype", None, _check.state_dtype),
    Option("master_bits", None, _check.choice(None, 16, 24, 32)),
    Option("min_8bit_size", 4096, _check.count),
    Option("seed", 0, _check.count),
    Option("ema", None, _check.optional(_check.decay_rate)),
    Option("ema_warmup", False, _check.flag),
)


class Common(TypedDict, total=False):
    """The types of `COMMON`, and of what belongs to no group: defaults of steps, and where and how.

    Those are `threads` and `state_dir`.
    """

    state_dtype: Any
    master_bits: int | None
    min_8bit_size: int
    seed: int
    ema: float | None
    ema_warmup: bool
    max_grad_norm: float | None
    norm_type: float
    per_tensor: bool
    clip_value: float | None
    nonfinite: str
    stats: bool
    zero_grads: bool
    threads: int | None
    state_dir: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes
    ----------
    name : str
        Name of its row in the C table.
    options : tuple of Option
        In the order of the signature.
    states : tuple of State
        Optional ones last.
    constants : callable(step, options) -> dict
        The scalars of the C rule in a step, from 1, by name, in double. What the rule remembers is
        among the options, with its value in this step. Of a rule with a state that counts, the step
        may be an array of steps: what depends on it is an array then, with the bits of the numbers.
    demand : callable(where, options), optional
        Raises ValueError for a combination of valid options that is not allowed.
    counts : bool
        Whether torch keeps the number of steps in a parameter's state. If not, the torch class
        takes steps with the number 1 while state is new, and 2 afterwards.
    memory : tuple of Scalar
        What the rule remembers for a group.
    advance : callable(options) -> dict, optional
        Returns the values of `memory` in the optimizer's next step. It may be called more than once
        for a step, and must depend only on the options, which include what was remembered after the
        last successful step. All else that it returns is for the constants of this step alone.
    share : callable(list of options) -> list of options, optional
        Returns the options of all groups, completed by what a step needs from the other groups;
        raises ValueError if they do not fit each other.
    settle : callable(list of options, float, float) -> list of options or None, optional
        Of a SUMMING rule (csrc/rules/index.h): returns for all groups, from the sums of both terms
        over all leaves, the values of `memory` after a step and what its constants need; None if
        the step changes nothing. It comes before the first write of a step, and may raise.
    numbers : tuple of (name, callable(step, options) -> float)
        What torch keeps for each parameter as a number beside its state: functions of how many
        steps were taken, and of the options. They are in state dicts of the torch class alone.
    recall : callable(step, numbers, options) -> dict, optional
        Returns what is remembered after `step` steps, from `numbers` (by name), which torch keeps
        instead. The options hold what is remembered, if the group has it.
    variant : (str, str), optional
        An option, and the name of another row of the C table: it steps all groups if one has the
        option, and must step groups without it as the first row does.
    average : Average, optional
        The average to evaluate instead of the parameters. Such a rule remembers `MODE`.
    ignored : tuple of Option
        Further options of the class that made the rule known, which have no effect here: the torch
        class accepts them and keeps them in groups, where that class looks for them.
    outside : callable(direction, options), optional
        Of a MATRIX rule (csrc/rules/index.h): replaces the direction of a leaf, an array or tensor
        of the compute type in the parameter's shape, in place. It comes before the first write of a
        step, and may raise; its bits are not promised.
    demand_shape : callable(where, shape), optional
        Raises ValueError for a parameter of a shape that is not allowed.
    by_rows : callable(options) -> str, optional
        What a step does with a gradient of some rows, `fusedopt.Rows`. `_rows.TOUCHED`: steps those
        alone, because a gradient of 0 leaves the others as they are, or because the options ask for
        it. `_rows.LAZY`: steps those alone, though a gradient of 0 would move the others.
        `_rows.ALL`: steps all rows. Empty, or without this: refuses.
    """

    name: str
    options: tuple[Option, ...]
    states: tuple[State, ...]
    constants: Callable[[int, Options], dict[str, float]]
    demand: Callable[[str, Options], None] | None = None
    counts: bool = True
    memory: tuple[Scalar, ...] = ()
    advance: Callable[[Options], dict[str, Any]] | None = None
    share: Callable[[list[Options]], list[Options]] | None = None
    settle: Callable[[list[Options], float, float], list[Options] | None] | None = None
    numbers: tuple[tuple[str, Callable[[int, Options], float]], ...] = ()
    recall: Callable[[int, dict[str, float], Options], dict[str, float]] | None = None
    variant: tuple[str, str] | None = None
    average: Average | None = None
    ignored: tuple[Option, ...] = ()
    outside: Callable[[Any, Options], None] | None = None
    demand_shape: Callable[[str, Sequence[int]], None] | None = None
    by_rows: Callable[[Options], str] | None = None

    @cached_property
    def checks(self) -> dict[str, Check]:
        """The checks of all entries of a group of arrays but these: options, and memory."""
        rows: list[Option | Scalar] = [*self.options, *COMMON, *self.memory]
        checks = {row.name: row.check for row in rows}
        checks["lr"] = _check.or_callable(checks["lr"])
        return checks | ({MODE.name: _check.training} if MODE in self.memory else {})

    @cached_property
    def check_rate(self) -> Check:
        """The check of a learning rate that a schedule has returned."""
        return next(option.check for option in self.options if option.name == "lr")

    @cached_property
    def defaults(self) -> Options:
        """The default of each option by name, including those that every optimizer has."""
        return {option.name: option.default for option in (*self.options, *COMMON)}

    def row(self, groups: Iterable[Mapping[str, Any]]) -> str:
        """Return the name of the row of the C table that steps groups with these options."""
        if self.variant is not None and any(group.get(self.variant[0]) for group in groups):
            return self.variant[1]
        return self.name

    @cached_property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states."""
        return tuple(state.name for state in self.states)

    @cached_property
    def counter(self) -> int | None:
        """Which of the states counts the steps of rows, if one does."""
        return next((k for k, state in enumerate(self.states) if state.counts), None)

    @cached_property
    def for_tensors(self) -> Rule:
        """The rule without what arrays alone may have: rows that count their steps."""
        if self.counter is None:
            return self
        asks = self.states[self.counter].needs
        return replace(
            self,
            options=tuple(option for option in self.options if option.name != asks),
            states=tuple(state for state in self.states if not state.counts),
        )

    @cached_property
    def remembers(self) -> bool:
        """Whether constants of a step depend on what all groups remember, and on a whole step."""
        return self.advance is not None or self.share is not None

    @cached_property
    def has_parts(self) -> bool:
        """Whether it keeps factors of matrices, and needs them whole and in row-major order."""
        return any(state.part for state in self.states)

    @cached_property
    def needs_whole(self) -> bool:
        """Whether it cannot step a part of a parameter."""
        return self.has_parts or self.outside is not None

    @cached_property
    def fixed(self) -> tuple[str, ...]:
        """Its options that cannot change once the arrays are made."""
        return tuple(dict.fromkeys(state.fixed_by for state in self.states if state.fixed_by))

    def needs_row_major(self, options: Mapping[str, Any]) -> bool:
        """Whether state of a parameter is of its rows, which must follow one another in memory."""
        return self.has_parts or any(state.is_by_row(options) for state in self.states)

    def layout(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> Layout | None:
        """Return the layout of a parameter's states, if some differ from its own."""
        if any(state.is_by_row(options) for state in self.states):
            maps = tuple(
                state.is_by_row(options) * (COUNTS if state.counts else 2) for state in self.states
            )
            shapes = tuple(state.shape(shape, options) for state in self.states)
            return maps, shapes, (1, 1, prod(shape[:1]), prod(shape[1:]))
        every = next((int(options[state.every]) for state in self.states if state.every), 1)
        if every == 1 and not self.has_parts:
            return None
        parts = {"rows": 2, "columns": 3}
        maps = tuple(
            parts.get(state.part, int(bool(state.every) and every > 1)) for state in self.states
        )
        shapes = tuple(state.shape(shape, options) for state in self.states)
        sizes = (prod(shape[:-2]), *shape[-2:]) if len(shape) > 1 else (0, 0, 0)
        return maps, shapes, (every, *sizes)

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Names of all arrays of a parameter's shape kept for it: states, and a running average."""
        return (*self.state_names, "ema")

    @cached_property
    def _terms(self) -> tuple[str, str, str]:
        """The options that weight L1 and L2, and that has no L2; empty if there is none."""
        names = {option.term: option.name for option in self.options}
        decoupled = next((row.name for row in self.options if row.name in _DECOUPLES), "")
        return names.get("l1", ""), names.get("l2", ""), decoupled

    def check(self, options: Options, where: str = "") -> Options:
        """Return those of `options` that a group has, checked; messages begin with `where`."""
        checked = {
            name: check(where + name, options[name])
            for name, check in self.checks.items()
            if name in options
        }
        if self.demand is not None:
            self.demand(where, checked)
        self.refuse_narrow(where, checked)
        self.refuse_ema(where, checked)
        return checked

    def refuse_narrow(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError if a state in use refuses `state_dtype`, see `State`."""
        asked = options.get("state_dtype")
        if asked in (None, "float32"):
            return
        used = [row for row, use in zip(self.states, self.uses(options), strict=True) if use]
        for state in used:
            if asked in state.refuses:
                refused = {name for row in used for name in row.refuses}
                ways = [repr(name) for name in NARROW if name not in refused]
                raise ValueError(
                    f"{where}state_dtype: {self.name} keeps {state.name!r}, for which {asked!r} is "
                    f"too narrow; use {' or '.join([*ways, 'None'])}"
                )

    def beginning(self, options: Options, step: int) -> Options:
        """Return the options for initial values of state: a rate among them is that of a step."""
        rate = options["lr"]
        if not callable(rate) or all(state.init != "lr" for state in self.states):
            return options
        return options | {"lr": self.check_rate(f"lr({step})", rate(step))}

    def refuse_ema(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError if `ema` is asked of a rule with an average of its own."""
        if self.average is not None and options.get("ema") is not None:
            raise ValueError(
                f"{where}ema: {self.name} has an average of its own, which swap_ema and ema_params "
                "show; leave ema out"
            )

    def check_shape(self, where: str, shape: Sequence[int]) -> None:
        """Raise ValueError if the rule steps no parameters of a shape."""
        if self.demand_shape is not None:
            self.demand_shape(where, shape)

    def begun(self, options: Options) -> Options:
        """Return the options with the initial values of what the rule remembers."""
        return options | {
            row.name: options[row.init] if isinstance(row.init, str) else row.init
            for row in self.memory
        }

    def advanced(self, options: Options, where: str = "") -> Options:
        """Return the options with the next step's values of what the rule remembers."""
        if self.advance is None:
            return options
        new = self.advance(options)
        checked = {row.name: row.check(where + row.name, new[row.name]) for row in self.memory}
        return options | new | checked

    def writes(self, options: Options, *places: Options | None) -> list[tuple[Options, str, Any]]:
        """Return (dict, key, value) for each number that a successful step stores in each place."""
        return [
            (place, row.name, options[row.name])
            for place in places
            if place is not None
            for row in self.memory
        ]

    def uses(self, options: Mapping[str, Any]) -> tuple[bool, ...]:
        """Return for each state whether these options need it."""
        return tuple(not state.needs or bool(options[state.needs]) for state in self.states)

    def plan(self, options: Options) -> Plan:
        """Return what steps with these options are made of.

        That is: their constants, see `at`; the seed of the noise; what replaces a direction; and
        what a step does with rows.
        """
        rows = "" if self.by_rows is None else self.by_rows(options)
        if self.outside is None:
            return self.at(options), options["seed"], None, rows
        outside = self.outside
        return self.at(options), options["seed"], lambda direction: outside(direction, options), ""

    def at(self, options: Options) -> Constants:
        """Return the constants of steps with these options: the rule's and what all rules have.

        Parameters
        ----------
        options : dict
            Checked, with `lr` as a number; of `COMMON` those that are not the default. What the
            rule remembers is as `advanced` returns it.
        """
        l1, l2, decoupled = self._terms
        return Constants(
            of_rule=self.constants,
            options=options,
            grad_scale=-1.0 if options.get("maximize") else 1.0,
            l1=options.get(l1, 0.0),
            l2=0.0 if options.get(decoupled) else options.get(l2, 0.0),
            decay=options.get("ema"),
            warms_up=bool(options.get("ema_warmup")),
        )
