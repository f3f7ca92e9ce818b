"""A step on lists of arrays that the caller keeps: a function for each rule, made of its value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from fusedopt import _arrays, _check, _threads
from fusedopt._check import Array
from fusedopt.formats import Stored
from fusedopt.optimizer import Optimizer
from fusedopt.rule import Options, Rule

Step: TypeAlias = Callable[..., None]
_Lists: TypeAlias = Mapping[str, Sequence[Any] | None]
_Engine: TypeAlias = Callable[[Rule, _Lists, int, Options], None]

_DOC = """Take one `{cls}` step on lists of arrays, in place.

Parameters
----------
params, grads, {states} : list of array
    One entry for each tensor. All but `grads` are updated; a gradient of None leaves its tensor
    out. An entry is an array or a `fusedopt.formats.Stored`; a float16 or bfloat16 array is
    rounded stochastically.{optional}
step : int
    The number of this step, from 1.
{options}
    As for `{cls}`; `lr` is a number.
seed : int
    Of stochastic rounding.

Raises
------
TypeError, ValueError
    Naming the array or the option; nothing has been written.
"""


def function(cls: type[Optimizer], engine: _Engine | None = None) -> Step:
    """Return the functional form of a class: ``f(params, grads, *states, *, step, **options)``.

    A state array has a list, named in the plural. A flag that asks for one (`amsgrad`) is no
    argument: its list is given or not. `engine` takes the step, in the place of C.
    """
    rule, take = cls.rule, engine or _step_in_c
    lists = {state.name: f"{state.name}s" for state in rule.states}
    flags = {state.needs for state in rule.states if rule.defaults.get(state.needs) is False}
    own = [option for option in rule.options if option.name not in flags]
    known = {"seed", *(option.name for option in own)}

    def step_function(
        params: Sequence[Array | Stored],
        grads: Sequence[Array | None],
        *states: Sequence[Array | Stored] | None,
        step: int,
        **options: Any,
    ) -> None:
        if len(states) > len(lists):
            raise TypeError(f"{name}: {len(states)} lists of state for {len(lists)}")
        given = dict(zip(lists.values(), states, strict=False))
        for plural in lists.values():
            if plural in options:
                if plural in given:
                    raise TypeError(f"{name}: {plural} is given twice")
                given[plural] = options.pop(plural)
            else:
                given.setdefault(plural, None)
        if unknown := options.keys() - known:
            raise TypeError(f"{name}: unknown option {', '.join(sorted(unknown))}")
        step = _check.steps("step", step, least=1)
        derived = {
            state.needs: given[lists[state.name]] is not None
            for state in rule.states
            if state.needs in flags
        }
        checked = rule.check(rule.defaults | derived | options)
        if callable(checked["lr"]):
            raise TypeError("lr: expected a number, that of this step; schedules are for classes")
        _check_lists(rule, params, grads, given, checked)
        take(rule, {"params": params, "grads": grads, **given}, step, checked)

    name = cls.__name__.lower()
    step_function.__name__ = step_function.__qualname__ = name
    step_function.__module__ = cls.__module__
    step_function.__signature__ = _signature(rule, lists, own)  # type: ignore[attr-defined]
    optional = [lists[state.name] for state in rule.states if state.needs]
    step_function.__doc__ = _DOC.format(
        cls=cls.__name__,
        states=", ".join(lists.values()),
        options=", ".join(option.name for option in own),
        optional="".join(f" `{plural}` may be None." for plural in optional),
    )
    return step_function


def _signature(rule: Rule, lists: Mapping[str, str], own: Sequence[Any]) -> inspect.Signature:
    either, only = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, either) for name in ("params", "grads")]
    for state in rule.states:
        default = None if state.needs else inspect.Parameter.empty
        parameters.append(inspect.Parameter(lists[state.name], either, default=default))
    parameters.append(inspect.Parameter("step", only))
    for option in own:
        parameters.append(inspect.Parameter(option.name, only, default=option.default))
    parameters.append(inspect.Parameter("seed", only, default=rule.defaults["seed"]))
    return inspect.Signature(parameters, return_annotation=None)


def _check_lists(rule: Rule, params: Any, grads: Any, states: _Lists, options: Options) -> None:
    """Raise TypeError or ValueError, naming it, for a list that is missing or does not fit."""
    present = [(name, values) for name, values in states.items() if values is not None]
    for name, values in [("params", params), ("grads", grads), *present]:
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list of arrays, got {type(values).__name__}")
    for name, values in [("grads", grads), *present]:
        if len(values) != len(params):
            raise ValueError(f"{name}: {len(values)} arrays for {len(params)} in params")
    for (name, values), use in zip(states.items(), rule.uses(options), strict=True):
        if use and values is None:
            raise ValueError(f"{name}: these options need it; pass one array for each parameter")
        for i, value in enumerate(values or ()):
            if use and value is None and grads[i] is not None:
                raise ValueError(
                    f"{name}[{i}]: is None; these options need it, pass numpy.zeros_like of the "
                    "parameter where there is none yet"
                )


def columns(rule: Rule, lists: _Lists, options: Options) -> list[Sequence[Array | Stored | None]]:
    """Return for each state its list, of None where the options do not need it."""
    params, _, *states = lists.values()
    assert params is not None
    return [
        values if use and values is not None else [None] * len(params)
        for values, use in zip(states, rule.uses(options), strict=True)
    ]


def _step_in_c(rule: Rule, lists: _Lists, step: int, options: Options) -> None:
    params, grads = lists["params"], lists["grads"]
    assert params is not None and grads is not None
    rows = list(zip(*columns(rule, lists, options), strict=True)) or [()] * len(params)
    names = [f"params[{i}]" for i in range(len(params))]
    grad_names = [f"grads[{i}]" for i in range(len(params))]
    threads = _threads.get_num_threads()
    work = _arrays.ArrayList(rule.name, rule.state_names)
    work.add(names, grad_names, list(params), rows, group=0, zero=False, threads=threads)
    work.set_steps(step - 1, [step - 1] * len(params))
    work.step(lambda grads: (list(grads), [options]), grads, rule.hyper, threads)
