"""A step on arrays that the caller keeps: what the functions of all rules have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusedopt import _arrays, _check, _storage, _threads
from fusedopt.optimizer import Optimizer


def apply(
    cls: type[Optimizer],
    lists: Mapping[str, Sequence[Any] | None],
    *,
    step: int,
    **options: Any,
) -> None:
    """Take one step of the rule of `cls` on arrays that the caller keeps: the functional form.

    `lists` holds the parameters, the gradients, then the state arrays by their argument's name;
    None in the place of a list stands for a state that is not there.
    """
    step = _check.steps("step", step, least=1)
    options = cls.check_options(_storage.DEFAULTS | options, where="")
    (params_name, params), (grads_name, grads), *states = lists.items()
    present = [(name, values) for name, values in states if values is not None]
    for name, values in [(params_name, params), (grads_name, grads), *present]:
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list of arrays, got {type(values).__name__}")
    assert params is not None and grads is not None
    for name, values in [(grads_name, grads), *present]:
        if len(values) != len(params):
            raise ValueError(f"{name}: {len(values)} arrays for {len(params)} in {params_name}")
    for (name, values), use in zip(states, cls.uses(options), strict=True):
        if use and values is None:
            raise ValueError(f"{name}: these options need it; pass one array for each parameter")
        for i, (value, grad) in enumerate(zip(values or (), grads, strict=bool(values))):
            if use and value is None and grad is not None:
                raise ValueError(
                    f"{name}[{i}]: is None; these options need it, pass numpy.zeros_like of the "
                    "parameter where there is none yet"
                )
    columns = [
        values if use and values is not None else [None] * len(params)
        for (_, values), use in zip(states, cls.uses(options), strict=True)
    ]
    rows = list(zip(*columns, strict=True))
    names = [f"{params_name}[{i}]" for i in range(len(params))]
    grad_names = [f"{grads_name}[{i}]" for i in range(len(params))]
    threads = _threads.get_num_threads()
    work = _arrays.ArrayList(cls.rule, cls.state_names)
    work.add(names, grad_names, list(params), rows, group=0, zero=False, threads=threads)
    work.set_steps(step - 1, [step - 1] * len(params))
    work.step(lambda grads: (list(grads), [options]), grads, cls.scalars, threads)
