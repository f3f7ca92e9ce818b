"""A step on lists of arrays that the caller keeps: a function for each rule, made from a `Rule`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from fusedopt import _arrays, _check, _storage, _threads
from fusedopt._check import Array
from fusedopt.formats import Stored
from fusedopt.optimizer import Optimizer
from fusedopt.rule import NARROW, Option, Options, Rule

Step: TypeAlias = Callable[..., Any]
_List: TypeAlias = Sequence[Any]
# rule, parameters, gradients, a list for each state (of None where it is not used), step, options
_Engine: TypeAlias = Callable[[Rule, _List, _List, list[_List], int, Options], Any]

_DOC = """Take one `{cls}` step on lists of arrays, in place.

Parameters
----------
params, grads, {states} : list of array
    One entry for each tensor. All but `grads` are updated; a tensor whose gradient is None is
    skipped. An entry is an array or a `fusedopt.formats.Stored`; a float16 or bfloat16 array is
    rounded stochastically.{optional}
step : int
    The number of this step, from 1.
{options}
    As for `{cls}`{rate}.{remembered}
seed : int
    Seed of stochastic rounding.
{returns}
Raises
------
TypeError, ValueError
    Naming the array or the option; nothing has been written.
"""
_PARTS = """ An entry is None where the
    class keeps no such array for a parameter of that shape."""
_RETURNS = """
Returns
-------
dict
    What `{cls}` remembers after this step; as it was if the step changed nothing.
"""


def function(cls: type[Optimizer], engine: _Engine | None = None) -> Step:
    """Return the functional form of a class: ``f(params, grads, *states, *, step, **options)``.

    Each state has a list, named in the plural. A flag that asks for a state (`amsgrad`) is not an
    argument: giving the list sets it. Nor is an option with an initial value of state. What the
    rule remembers is an argument: its value in this step. `engine` replaces the step in C.
    """
    rule, take = cls.rule, engine or _step_in_c
    plurals = [state.plural or f"{state.name}s" for state in rule.states]
    rows = list(zip(rule.states, plurals, strict=True))
    flags = {s.needs: plural for s, plural in rows if rule.defaults.get(s.needs) is False}
    begins = {state.init for state in rule.states}  # the caller has initialised the state
    own = [option for option in rule.options if option.name not in flags.keys() | begins]
    remembered = [row.name for row in rule.memory if not row.shown]
    known = {"seed", *remembered, *(option.name for option in own)}

    def step_function(
        params: Sequence[Array | Stored],
        grads: Sequence[Array | None],
        *states: Sequence[Array | Stored] | None,
        step: int,
        **options: Any,
    ) -> Any:
        if len(states) > len(plurals):
            raise TypeError(f"{name}: {len(states)} lists of state for {len(plurals)}")
        given: dict[str, Any] = dict(zip(plurals, states, strict=False))
        for plural in plurals[len(states) :]:
            given[plural] = options.pop(plural, None)
        if not known.issuperset(options):
            unknown = ", ".join(options.keys() - known)
            raise TypeError(f"{name}: unknown option, or a list given twice: {unknown}")
        if absent := [key for key in remembered if key not in options]:
            raise TypeError(f"{name}: needs {', '.join(absent)}: values in this step")
        step = _check.steps("step", step, least=1)
        for flag, plural in flags.items():
            options[flag] = given[plural] is not None
        checked = rule.check(rule.defaults | options)
        if callable(checked["lr"]):
            raise TypeError("lr: expected a number, the rate of this step; only classes schedule")
        used = rule.uses(checked)
        _check_lists(rule, params, grads, given, used)
        nothing = [None] * len(params)
        lists = [
            values if use and values is not None else nothing
            for values, use in zip(given.values(), used, strict=True)
        ]
        return take(rule, params, grads, lists, step, checked)

    name = cls.__name__.lower()
    step_function.__name__ = step_function.__qualname__ = name
    step_function.__module__ = cls.__module__
    step_function.__signature__ = _signature(rule, plurals, own)  # type: ignore[attr-defined]
    optional = [plural for state, plural in rows if state.needs]
    as_now = f"\n{', '.join(remembered)}\n    What `{cls.__name__}` remembers: values in this step."
    step_function.__doc__ = _DOC.format(
        cls=cls.__name__,
        states=", ".join(plurals),
        options=", ".join(option.name for option in own),
        rate="; `lr` is a number" if "lr" in known else "",
        remembered=as_now if remembered else "",
        optional="".join(f" `{plural}` may be None." for plural in optional)
        + (_PARTS if rule.has_parts else ""),
        returns=_RETURNS.format(cls=cls.__name__) if rule.settle else "",
    )
    return step_function


def _signature(rule: Rule, plurals: Sequence[str], own: Sequence[Option]) -> inspect.Signature:
    either, only = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, either) for name in ("params", "grads")]
    for state, plural in zip(rule.states, plurals, strict=True):
        default = None if state.needs else inspect.Parameter.empty
        parameters.append(inspect.Parameter(plural, either, default=default))
    parameters.append(inspect.Parameter("step", only))
    for option in own:
        parameters.append(inspect.Parameter(option.name, only, default=option.default))
    parameters += [inspect.Parameter(row.name, only) for row in rule.memory if not row.shown]
    parameters.append(inspect.Parameter("seed", only, default=rule.defaults["seed"]))
    returns = None if rule.settle is None else dict[str, Any]
    return inspect.Signature(parameters, return_annotation=returns)


def _check_lists(
    rule: Rule, params: Any, grads: Any, states: Mapping[str, Any], used: Sequence[bool]
) -> None:
    """Raise TypeError or ValueError that names a list which is missing or does not fit."""
    lists = {"params": params, "grads": grads, **states}
    for name, values in lists.items():
        if values is None and name in states:
            continue
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list of arrays, got {type(values).__name__}")
        if len(values) != len(params):
            raise ValueError(f"{name}: {len(values)} arrays for {len(params)} in params")
    ways = {"zeros": "numpy.zeros_like", "param": "a copy"}
    for (name, values), state, use in zip(states.items(), rule.states, used, strict=True):
        if state.part:
            continue  # it depends on the parameter: see `_check_parts`
        if use and values is None:
            raise ValueError(f"{name}: these options need it; pass one array for each parameter")
        if use and (i := _arrays.find_none(values, grads)) >= 0:
            way = ways.get(state.init, "numpy.full_like")
            raise ValueError(
                f"{name}[{i}]: is None; these options need it, pass {way} of the parameter in the "
                "first step"
            )
        refused = NARROW if state.wide else state.refuses
        for i, array in enumerate(values if use and refused else ()):
            if _storage.narrow(array) in refused:
                kind = array.format if isinstance(array, Stored) else array.dtype
                raise ValueError(
                    f"{name}[{i}]: {rule.name} keeps {state.name!r}, for which {kind} is too "
                    "narrow; pass float32"
                )


def _check_parts(
    rule: Rule, name: str, param: Any, row: list[Any], layout: Any, options: Options
) -> None:
    """Let a parameter's states be those of its shape."""
    _storage.check_order(rule, name, param, options)
    rows = zip(rule.states, layout[1], rule.uses(options), strict=True)
    for k, (state, shape, use) in enumerate(rows):
        plural = f"{state.plural or state.name + 's'}[{name[7:-1]}]"
        if shape is None and row[k] is not None:
            raise ValueError(f"{plural}: {name} of shape {param.shape} has none; pass None")
        if shape is not None and use and row[k] is None:
            raise ValueError(
                f"{plural}: is None; {name} of shape {param.shape} needs it, of shape {shape}, "
                "zeros in the first step"
            )


def listed(
    rule: Rule, params: _List, states: list[_List], step: int, options: Options
) -> _arrays.ArrayList:
    """Return the leaves, checked, before the step of this number."""
    names = [f"params[{i}]" for i in range(len(params))]
    layouts = [rule.layout(np.shape(param), options) for param in params]
    rows = [list(row) for row in zip(*states, strict=True)] or [[]] * len(params)
    if rule.needs_row_major(options):
        for name, param, row, layout in zip(names, params, rows, layouts, strict=True):
            _check_parts(rule, name, param, row, layout, options)
    grad_names = [f"grads[{i}]" for i in range(len(params))]
    work = _arrays.ArrayList(rule.row([options]), rule.state_names)
    threads = _threads.get_num_threads()
    work.add(names, grad_names, list(params), rows, layouts, group=0, zero=False, threads=threads)
    for name, param in zip(names, work.params, strict=True):
        rule.check_shape(name, param.shape)
    work.set_steps(step - 1, [step - 1] * len(params))
    return work


def _step_in_c(
    rule: Rule, params: _List, grads: _List, states: list[_List], step: int, options: Options
) -> dict[str, Any] | None:
    work, threads = listed(rule, params, states, step, options), _threads.get_num_threads()
    shared = options if rule.share is None else rule.share([options])[0]
    settled = shared

    def settle(first: float, second: float) -> list[Any] | None:
        nonlocal settled
        assert rule.settle is not None
        found = rule.settle([shared], first, second)
        settled = shared if found is None else found[0]
        return None if found is None else [rule.plan(settled)]

    def prepare(grads: Any) -> Any:
        work.settler = settle
        return list(grads), [rule.plan(shared)]

    work.step(prepare, grads, threads)
    return remembered(rule, settled)


def remembered(rule: Rule, options: Options) -> dict[str, Any] | None:
    """Return what a rule that settles its constants remembers after a step."""
    if rule.settle is None:
        return None
    return {row.name: options[row.name] for row in rule.memory if row.name in options}
