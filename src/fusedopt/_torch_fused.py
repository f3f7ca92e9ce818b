"""The step of `fusedopt.torch`, and the options that it adds to torch's optimizers."""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NoReturn

import torch

from fusedopt import _check, _copies, _core, _options, _storage, _tensors, _threads
from fusedopt import _torch_plain as _plain
from fusedopt import _torch_ranks as _ranks
from fusedopt import _torch_rows as _sparse
from fusedopt._disk import Disk
from fusedopt._ieee import ieee
from fusedopt._options import Reduction, StepOptions, StepResult
from fusedopt._rows import ALL, LAZY, TOUCHED, Ordered
from fusedopt._torch_options import (
    CONSTANT,
    OF_NO_GROUP,
    checked_options,
    is_constant,
    number,
    numbers,
    refuse_of_all,
    refuse_of_arrays,
    refuse_of_no_group,
    refuse_options,
)  # fmt: skip
from fusedopt._torch_state import OWN, StateKeeper, copier, residual_dtype
from fusedopt.optim import adam as _adam
from fusedopt.rule import Constants, Option, Options, Rule


@dataclass(slots=True)
class _Group:
    """One of `param_groups`, as last checked.

    Attributes
    ----------
    options : dict
        Its options; numbers in the place of tensors.
    constants : Constants
        Of a step, see `Rule.at`.
    plan : GroupPlan
        What the list must know of it.
    seen : dict or None
        The dict as it was then; None if a value may change in place.
    """

    options: dict[str, Any]
    constants: Constants
    plan: _tensors.GroupPlan
    seen: dict[str, Any] | None


class Fused(StateKeeper):
    """The step: a base class before a class of `torch.optim`.

    `_tensors.TensorList` walks over groups, parameters and state in C, and calls the methods below
    for what does not exist yet, or is not plain.
    """

    _rule: ClassVar[Rule]
    _leaves: _tensors.TensorList
    found_inf: Any = None  # GradScaler sets it for a step, and then deletes it, as grad_scale
    last_step = StepResult(0, 0)  # what the last step did; also if GradScaler had it skipped

    _own: ClassVar[Mapping[str, Option]]  # options that a class of torch's does not have
    _own_given: Mapping[str, Any] = {}  # those of the constructor that are not the default
    _threads: int | None = None
    _groups: dict[int, _Group]  # by number
    _process_group: Any = None
    _moved = 0  # gradients that were redistributed in this step
    _is_lazy = _needs_rows = False  # of a class for sparse gradients: see `SparseAdam`
    _has_new_options = True  # of a group, for `Rule.row`
    _advanced: Sequence[Options] = ()  # of the groups, in this step
    _own_step: tuple[dict[str, Any], StepOptions | None] = {}, None  # of `defaults`, checked

    def __init__(
        self,
        params: Any,
        *args: Any,
        state_dtype: Any = None,
        master_bits: int | None = None,
        min_8bit_size: int = 4096,
        seed: int = 0,
        ema: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        per_tensor: bool = False,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        stats: bool = False,
        zero_grads: bool = False,
        process_group: Any = None,
        state_dict_dtype: str | None = None,
        threads: int | None = None,
        state_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """See the class."""
        self._disk = None if state_dir is None else Disk(state_dir)
        given = {
            "max_grad_norm": max_grad_norm, "norm_type": norm_type, "per_tensor": per_tensor,
            "clip_value": clip_value, "nonfinite": nonfinite, "stats": stats,
            "zero_grads": zero_grads,
        }  # fmt: skip
        _options.step_options(_options.DEFAULTS | given)
        self._process_group = _ranks.checked_group(process_group)
        if state_dict_dtype not in (None, "float32"):
            raise ValueError(
                f"state_dict_dtype: expected None or 'float32', got {state_dict_dtype!r}"
            )
        self._state_dict_dtype = state_dict_dtype
        self._threads = None if threads is None else _threads.check("threads", threads)
        own = {
            "state_dtype": state_dtype,
            "master_bits": master_bits,
            "min_8bit_size": min_8bit_size,
            "seed": seed,
            "ema": ema,
            "ema_warmup": ema_warmup,
        }
        own.update({name: options.pop(name) for name in self._extras if name in options})
        self._own_given = {
            name: value
            for name, value in self._own_options(own).items()
            if value != self._own[name].default
        }
        fused = next(cls for cls in type(self).__mro__ if "_rule" in vars(cls))
        refuse_of_arrays(type(self).__name__, options)
        _check.refuse_unknown(type(self).__name__, options, _taken(fused))
        super().__init__(params, *args, **options)  # type: ignore[call-arg]
        bits = self._own_given.get("master_bits")
        _storage.refuse_master(bits, (param.dtype.itemsize for param in self._all_params()))
        self.defaults.update(self._own_given)
        # in defaults, which torch copies and pickles; of no group, as a norm is of all
        self.defaults.update({k: v for k, v in given.items() if v != _options.DEFAULTS[k]})
        self._leaves, self._groups = self._new_list(), {}
        self._replace_state()

    def _replace_state(self) -> None:
        """Convert state that torch's constructor has made to our formats."""
        if self.state:
            for i, group in enumerate(self.param_groups):
                self._plan(i, group)
                for k, param in enumerate(group["params"]):
                    if self._is_elsewhere(param):
                        continue
                    own = self._make_state(i, k, param, None)[0]
                    own.pop("ema", None)  # which begins with the first step
                    self.state[param] = own

    def __init_subclass__(cls) -> None:
        """Show the base's arguments, and then ours, where the signature is asked for."""
        if "_rule" in vars(cls):
            cls._own = {**OWN, **cls._extras}
            only = inspect.Parameter.KEYWORD_ONLY
            own = [inspect.Parameter(name, only, default=option.default)
                   for name, option in cls._extras.items()]  # fmt: skip
            own += list(inspect.signature(Fused.__init__).parameters.values())[3:-1]
            shown = inspect.signature(cls.__mro__[cls.__mro__.index(StateKeeper) + 1])
            cls.__signature__ = shown.replace(  # type: ignore[attr-defined]
                parameters=[*shown.parameters.values(), *own]
            )

    @torch.compiler.disable
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads: Any = None,
        copy_out: Any = None,
        **options: Any,
    ) -> Any:
        """Take one step on all parameters that have a gradient, in one call of C.

        What the step did is in ``last_step``, a `fusedopt.StepResult`.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.
        grads : GradAccumulator, optional
            Its sums are the gradients, in the place of those in ``.grad``. The step consumes them,
            also if it skips, and needs no further read for a norm or a search for what is not
            finite. Not within GradScaler, which looks at ``.grad``: give `grad_scale` and
            `nonfinite`.
        copy_out : dict or sequence of tensor, optional
            Tensors that get the parameters after the step, rounded to nearest: by parameter, or one
            (or None) for each parameter in the order of the groups. float16, bfloat16, or the dtype
            that steps compute in. As in `fusedopt.Optimizer.step`.
        grad_scale : float, default 1
            Multiplies the gradients on the fly, beside the scale of a GradScaler.
        **options
            `max_grad_norm`, `norm_type`, `per_tensor`, `clip_value`, `nonfinite`, `stats`,
            `zero_grads`, in the place of the constructor's for this step; see
            `fusedopt.Optimizer.step`.

        Returns
        -------
        object
            The closure's loss; None without one.

        Raises
        ------
        TypeError, ValueError
            Naming the parameter or option; no parameter, state or step count has changed.
        FloatingPointError
            Naming the gradients that are not finite, where `nonfinite` is "raise"; alike.
        RuntimeError
            If another thread is inside `step` of the same optimizer, or within `swap_ema`; nothing
            has been written. Where ranks take part in a norm, in statistics or in what to skip: if
            another rank cannot step, which has raised one of the above; alike. From
            torch.distributed, where another rank is gone: nothing has been written, unless only
            `stats` are summed, which is done after the step.
        """
        _copies.refuse_within_swap(self)
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"step: closure: expected a callable, got {type(closure).__name__}; an "
                    "accumulator is given as grads=..."
                )
            loss = copier.call(True, closure)
        try:
            adder = None if grads is None else self._adder_of(grads)
            how = self._step_options(options, copy_out, adder is not None)
            copies = None if copy_out is None else self._copies(copy_out)
        except Exception as exc:
            self._tell_ranks(exc, grads is not None or self._concerns_ranks(options))
            raise
        threads = _threads.of(self._threads)
        self._leaves.step(self, self.state, threads, how, copies, accumulator=adder)
        return loss

    def step_params(self, params: Sequence[Any], *, copy_out: Any = None, **options: Any) -> None:
        """Step some of the parameters now, as from a hook while backward() goes on.

        >>> import torch
        >>> import fusedopt.torch as fo
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = fo.AdamW(model.parameters(), zero_grads=True)
        >>> for p in model.parameters():
        ...     handle = p.register_post_accumulate_grad_hook(lambda p: opt.step_params([p]))
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> opt.last_step.step
        1

        Each parameter counts its own steps; ``last_step.step`` increases when a parameter is
        stepped again. The hooks of `step` are not called.

        Parameters
        ----------
        params : list of tensor
            Parameters of this optimizer; those without a gradient are left as they are.
        copy_out, **options
            As for `step`, except options that depend on all gradients: `max_grad_norm` without
            `per_tensor`, and `nonfinite` "skip".

        Raises
        ------
        TypeError, ValueError, FloatingPointError, RuntimeError
            As `step` does; nothing of `params` has changed. ValueError also for such an option, for
            a tensor that is no parameter, and for a rule that remembers numbers of a whole step.
        """
        if self._is_swapped:
            _copies.refuse_within_swap(self)
        if self._rule.remembers:
            raise ValueError(
                f"step_params: {type(self).__name__} remembers numbers of a whole step; use step"
            )
        try:
            how = self._step_options(options, copy_out)
            if how is not None:
                refuse_of_all(how)
            copies = None if copy_out is None else self._copies(copy_out)
        except Exception as exc:
            self._tell_ranks(exc, self._concerns_ranks(options), params)
            raise
        self._leaves.step(self, self.state, _threads.of(self._threads), how, copies, params)
        self._opt_called = True  # for torch's schedulers, which note a call of `step`

    def _new_list(self) -> _tensors.TensorList:
        """Return a list for the leaves of steps, which needs new `_groups`."""
        made = _tensors.TensorList(
            self._rule.name,
            self._rule.state_names,
            kinds=(torch.Tensor, torch.nn.Parameter),
            is_plain=_plain.is_plain,
            is_neg=torch.empty(0, device="cpu").is_neg,
            exchange=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
            export=lambda tensor: torch.utils.dlpack.to_dlpack(tensor.detach()),
            mark=mark_written,
            copier=copier,
            counts=self._rule.counts,
            needs_rows=self._needs_rows,
        )
        made.disk = self._disk
        return made

    def _prepare(self, concerns: bool) -> list[tuple[list[Any], _tensors.GroupPlan]]:
        """Return the result of `_plan` for each group, in a step; the list is claimed.

        `concerns` says whether the options of the step are such that ranks wait for one another.
        """
        try:
            groups = self._renew()
            if self._rule.remembers:
                self._advance()
        except Exception as exc:
            self._tell_ranks(exc, concerns)
            raise
        return groups

    def _renew(self) -> list[tuple[list[Any], _tensors.GroupPlan]]:
        """Take over the options of all groups; return the result of `_plan` for each."""
        groups = [self._plan(i, group) for i, group in enumerate(self.param_groups)]
        if self._has_new_options:
            known = [self._groups[i].options for i in range(len(groups))]
            self._leaves.use_row(self._rule.row(known))
            self._leaves.counted = self._is_counted()
            self._has_new_options = False
        return groups

    def _advance(self) -> None:
        """Take over what the rule remembers, as it is in this step."""
        advanced = [
            self._rule.advanced(self._groups[i].options, f"param_groups[{i}]: in this step ")
            for i in range(len(self.param_groups))
        ]
        if self._rule.share is not None:
            advanced = self._rule.share(advanced)
        self._take_over(advanced, self._rule.settle is None)

    def _settle(self, first: float, second: float) -> bool:
        """Compute the constants of a step from the sums of a rule; False if it changes nothing."""
        assert self._rule.settle is not None
        settled = self._rule.settle(list(self._advanced), first, second)
        if settled is not None:
            self._take_over(settled, True)
        return settled is not None

    def _take_over(self, advanced: list[Options], remembers: bool) -> None:
        """Make the constants of groups in this step, and note what they then remember."""
        self._advanced, self._leaves.writes = advanced, []
        for i, (group, options) in enumerate(zip(self.param_groups, advanced, strict=True)):
            known = self._groups[i]
            known.constants = self._rule.at(options)
            if remembers:
                self._leaves.writes += self._rule.writes(options, group, known.options, known.seen)

    def _step_options(
        self, given: Mapping[str, Any], copy_out: Any, knows_norm: bool = False
    ) -> StepOptions | None:
        """Return what this step does around the rule; None if nothing.

        `knows_norm` says that the gradients are the sums of an accumulator, which are consumed.
        """
        if knows_norm:
            return replace(self._checked_step(given, True), zero_grads=True)
        if given or self.found_inf is not None or getattr(self, "grad_scale", None) is not None:
            return self._checked_step(given)
        seen, how = self._own_step
        if not _tensors.is_same(seen, self.defaults):
            own = [value for name, value in self.defaults.items() if name in OF_NO_GROUP]
            how = self._checked_step(given) if own else None
            if all(type(value) in CONSTANT for value in own):
                self._own_step = self.defaults.copy(), how
        return _options.PLAIN if how is None and copy_out is not None else how

    @ieee
    def _checked_step(self, given: Mapping[str, Any], knows_norm: bool = False) -> StepOptions:
        scale, found_inf = getattr(self, "grad_scale", None), self.found_inf
        own = {name: self.defaults[name] for name in OF_NO_GROUP if name in self.defaults}
        _check.refuse_unknown("step", sorted(given), [*_options.DEFAULTS, "copy_out"])
        options = {**_options.DEFAULTS, **own, **given}
        if scale is not None:
            options["grad_scale"] = _options.CHECKS["grad_scale"](
                "grad_scale", options["grad_scale"]
            ) * (1 / scale.item())
        how = _options.step_options(options, knows_norm=knows_norm)
        return how if found_inf is None else replace(how, skip=bool(found_inf))

    def _copies(self, given: Any) -> dict[int, Any]:
        """Return the tensor that gets the copy of each parameter, by the parameter's number."""
        numbers = {param: number for number, param in enumerate(self._all_params())}
        return _plain.by_number("copy_out", given, numbers)

    def _adder_of(self, grads: Any) -> Any:
        """Return the optimizer in an accumulator, which adds to the sums."""
        adder = getattr(grads, "_adder", None)
        if adder is None:
            raise TypeError(
                f"grads: expected a GradAccumulator of fusedopt.torch, got {type(grads).__name__}"
            )
        if self.found_inf is not None:
            for name in ("found_inf", "grad_scale"):  # GradScaler leaves them after an error
                vars(self).pop(name, None)
            raise ValueError(
                "grads: torch's GradScaler looks for overflow in .grad, not in the sums of an "
                "accumulator; call step(grads=..., grad_scale=1 / scale, nonfinite='skip') "
                "yourself, and read last_step.skipped"
            )
        return adder

    def _sums_of(self, adder: Any) -> tuple[dict[int, Any], list[int] | None]:
        """Return the sums that an accumulator has, by the number of a parameter.

        And its own numbers, by the same, if they differ.
        """
        ours, filled = self._all_params(), adder._leaves.filled
        if len(ours) == len(adder.params) and all(map(operator.is_, ours, adder.params)):
            return filled, None
        numbers = {param: number for number, param in enumerate(adder.params)}
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param not in numbers:
                    raise ValueError(
                        f"{self._name(g, i)}: the accumulator has no buffer for it; make it of "
                        "this optimizer's parameters"
                    )
        if len(numbers) > len(ours):
            raise ValueError(
                f"grads: the accumulator has buffers for {len(numbers)} parameters, of which this "
                f"optimizer has {len(ours)}; make one for each optimizer"
            )
        theirs = [numbers[param] for param in ours]
        return {number: filled[k] for number, k in enumerate(theirs) if k in filled}, theirs

    def _tell_ranks(self, fault: Exception, concerns: bool, chosen: Any = None) -> None:
        """Raise a fault that was found before the list's own checks; on other ranks too.

        Ranks whose step depends on this one wait for it. `concerns` says whether the options of the
        step are such that they do.
        """
        if not isinstance(chosen, (list, tuple, type(None))):
            return
        self._moved = 0
        self._move_rest(chosen)
        params = self._params_there()
        if chosen is not None and not any(map(_plain.is_shared, chosen)):
            return
        kind = _core.RULES[self._rule.row(self.param_groups)][3]
        concerns |= _core.KINDS.index(kind) >= _core.KINDS.index("layerwise")
        if concerns:
            group = self._process_group if chosen is None else None
            reduction = _ranks.reduction(params, group)
            if reduction is not None:
                reduction.agree(len(params), fault, False)

    def _concerns_ranks(self, given: Mapping[str, Any]) -> bool:
        """Whether options that may be wrong make ranks wait for one another.

        Other ranks are taken to have the same.
        """
        asked = {**_options.DEFAULTS, **self.defaults, **given}
        return self.found_inf is not None or any(
            type(asked[name]) is not type(default) or asked[name] != default
            for name, default in _options.DEFAULTS.items()
            if name in ("max_grad_norm", "nonfinite", "stats")
        )

    def _params_there(self) -> list[Any]:
        """Return the parameters of all groups, one of which may be without its list."""
        return [param for group in self.param_groups for param in group.get("params", ())]

    def _move_rest(self, chosen: Any = None) -> None:
        """Redistribute the gradients for which other ranks wait, where this one cannot step."""
        if not isinstance(chosen, (list, tuple, type(None))):
            return
        with contextlib.suppress(Exception):  # the fault is the one to tell
            params = self._params_there() if chosen is None else chosen
            self._move((param, param.grad) for param in params if _plain.is_shared(param))

    def _move(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Redistribute gradients, given with their parameters, from the first that was not on."""
        moving = [pair for pair in pairs if _plain.must_move(*pair)]
        for param, grad in moving[self._moved :]:
            grad.redistribute(placements=param.placements)

    def _reduction(self, group: Any) -> Reduction | None:
        """Return what sums over the ranks that have other parts of the parameters, if any."""
        return _ranks.reduction(self._all_params(), group)

    def _all_params(self) -> list[Any]:
        """Return the parameters of all groups, by their numbers."""
        return [param for group in self.param_groups for param in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as in torch."""
        _copies.refuse_within_swap(self)
        where = f"param_groups[{len(self.param_groups)}]"
        refuse_of_no_group(where, param_group)
        refuse_options(where, {**self.defaults, **param_group})
        for name, value in self._own_options(param_group, f"{where}: ").items():
            param_group[name] = value
        for name, value in self._own_given.items():
            param_group.setdefault(name, value)
        options = {**self.defaults, **param_group}
        self._checked_own(f"{where}.", options)
        self._check_shapes(param_group)
        begun = self._rule.begun(options)
        for row in self._rule.memory:
            param_group.setdefault(row.name, begun[row.name])
        super().add_param_group(param_group)  # type: ignore[misc]
        for name in OF_NO_GROUP:
            self.param_groups[-1].pop(name, None)  # which torch takes from the defaults

    def _check_shapes(self, group: dict[str, Any]) -> None:
        """Raise ValueError naming a parameter of a new group that the rule does not step."""
        if self._rule.demand_shape is None or isinstance(group["params"], set):
            return
        params = group["params"]
        group["params"] = params = [params] if isinstance(params, torch.Tensor) else list(params)
        for i, param in enumerate(params):
            name = f"param_groups[{len(self.param_groups)}]['params'][{i}]"
            if isinstance(param, tuple) and len(param) == 2:  # its name comes first
                name, param = f"{name} ({param[0]})", param[1]
            if isinstance(param, torch.Tensor):
                self._rule.demand_shape(name, tuple(param.shape))

    def _checked_own(self, where: str, group: Options) -> Options:
        """Return what is checked here, and not by torch."""
        checked = {} if self._is_torchs else checked_options(self._rule, where, group)
        for row in self._rule.memory:
            if row.name in group:
                checked[row.name] = row.check(where + row.name, group[row.name])
        self._rule.refuse_narrow(where, group)
        self._rule.refuse_ema(where, group)
        return checked

    @classmethod
    def _own_options(cls, options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Return those of our own options that are given, checked."""
        return {
            name: option.check(where + name, options[name])
            for name, option in cls._own.items()
            if name in options
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep: torch's data, that of no group, the last step."""
        if self._process_group is not None:
            raise TypeError(
                f"{type(self).__name__} with a process_group cannot be copied or pickled; make one "
                "on the other parameters and give it state_dict()"
            )
        self._note_numbers()
        state: Any = super().__getstate__()
        own = ("_threads", "_state_dict_dtype", "last_step")
        return {**state, **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over such data; a copy has a list of its own."""
        super().__setstate__(state)  # type: ignore[misc]
        if "_leaves" not in vars(self):
            self._leaves, self._groups = self._new_list(), {}

    # -------------------------------------------------------------- asked by TensorList.step

    def _constants(self, group: int) -> Constants:
        """Return the constants of steps of a group."""
        return self._groups[group].constants

    def _rule_of(self, options: Mapping[str, Any]) -> Rule:
        """Return the rule of a group: an option of torch's Adam may turn it into AdamW."""
        decoupled = options.get("decoupled_weight_decay")
        if decoupled is None or self._rule.name != _adam.ADAM.name:
            return self._rule
        return _adam.ADAMW if decoupled else _adam.ADAM

    def _plan(self, i: int, group: dict[str, Any]) -> tuple[list[Any], _tensors.GroupPlan]:
        """Return the parameters of a group, and what the list must know of it."""
        if not _tensors.is_known(self._groups, i, group):
            self._has_new_options = True
            self._groups[i] = self._checked(f"param_groups[{i}]", group)
        params = group["params"]
        return params if type(params) is list else list(params), self._groups[i].plan

    def _checked(self, where: str, group: Mapping[str, Any]) -> _Group:
        """Return a group with its options checked, because users write into it."""
        rule = [
            option
            for option in self._rule.options
            if option.name in self.defaults and option.name not in self._extras
        ]
        remembered = [row.name for row in self._rule.memory]
        names = ["params", *(option.name for option in rule), *remembered]
        if missing := [name for name in names if name not in group]:
            raise ValueError(f"{where}: has no {', '.join(missing)}")
        refuse_options(where, group)
        refuse_of_no_group(where, group)
        options = {name: option.default for name, option in self._extras.items()}
        options |= {name: value for name, value in group.items() if name != "params"}
        options |= self._own_options(group, f"{where}.")
        for option in rule:
            name, value = option.name, group[option.name]
            if isinstance(option.default, tuple) and None not in option.default:
                options[name] = numbers(f"{where}.{name}", value, len(option.default))
            elif isinstance(option.default, tuple):
                options[name] = option.check(f"{where}.{name}", value)
            elif isinstance(option.default, float) or isinstance(value, torch.Tensor):
                if value is not None or self._is_torchs:
                    options[name] = number(f"{where}.{name}", value)
            elif self._is_torchs and not isinstance(option.default, bool):
                options[name] = option.check(f"{where}.{name}", value)  # no step of torch's does
        options |= self._checked_own(f"{where}.", options)
        states = self._states(self._rule.uses(options), options.get("ema") is not None)
        squares = tuple(state.squared for state in self._rule.states)
        layout = self._rule.layout((1, 1), options)
        maps, _, (every, *_) = layout or ((0,) * len(squares), (), (1,))
        rest = tuple(state.part == "rest" for state in self._rule.states)
        return _Group(
            options,
            self._rule_of(options).at(options),
            _tensors.GroupPlan(
                states,
                squares,
                _storage.MASTERS[options.get("master_bits")],
                options.get("seed", 0),
                maps,
                rest if self._rule.has_parts else None,
                every,
            ),
            dict(group) if all(map(is_constant, group.items())) else None,
        )

    def _stand_in(
        self,
        group: int,
        i: int,
        names: Sequence[str],
        tensors: list[Any],
        extras: list[Any],
        zeroes: bool,
    ) -> tuple[list[Any], list[Any], list[tuple[Any, Any, str]]]:
        """Return tensors for C in place of [parameter, gradient, copy, *state]: see `stand_ins`."""
        name = self._name(group, i)
        for k, state in enumerate(names, 3):
            if state.endswith(_plain.CODES):
                self._restore(tensors, extras, k, state)
        if self._rule.needs_whole and _ranks.sharded_dims(tensors[0]):
            raise ValueError(
                f"{name}: is a shard, and {type(self).__name__} computes with whole matrices; use "
                "AdamW for it, or keep it whole"
            )
        residual = residual_dtype(self.param_groups[group])
        where = [name, f"{name}.grad", f"copy_out of {name}"]
        where += [f"{name}.{state}" for state in names]
        shapes = {
            f"{name}.{state}": shape
            for state, shape in self._shapes(group, tensors[0]).items()
            if shape not in (None, tuple(tensors[0].shape))
        }
        grad = tensors[1]
        tensors = _plain.placed(where, tensors)
        self._moved += tensors[1] is not grad
        return _plain.stand_ins(where, tensors, grad, extras, residual, zeroes, shapes)

    def _restore(self, tensors: list[Any], extras: list[Any], k: int, codes: str) -> None:
        """Put 8-bit state back into its dtype, where a loader has cast it."""
        blocks = codes.removesuffix(_plain.CODES) + _plain.BLOCKS
        for values, at, key in ((tensors, k, codes), (extras, k, blocks)):
            made = _plain.restored(values[at])
            if made is not values[at]:
                values[at] = self.state[tensors[0]][key] = made

    _origin = staticmethod(_ranks.origin)

    def _replace(self, group: int, direction: Any) -> None:
        """Replace the direction of a parameter by what the rule makes of it."""
        assert self._rule.outside is not None
        self._rule.outside(direction, self._groups[group].options)

    @staticmethod
    def _new_direction(param: Any, strides: tuple[int, ...] | None, is_double: bool) -> Any:
        """Return a tensor for it, in a memory order, in the dtype that steps compute in."""
        dtype = torch.float64 if is_double else torch.float32
        if strides is None:
            return param.detach().new_empty(param.shape, dtype=dtype)
        return param.detach().new_empty_strided(param.shape, strides, dtype=dtype)

    def _check_elsewhere(self, places: list[tuple[int, int, int]], has_options: bool) -> None:
        """Raise ValueError naming a parameter that torch steps, and what it cannot do."""
        for g, i, _ in places:
            group = self.param_groups[g]
            asked = [
                name
                for name, option in {**self._extras, "ema": OWN["ema"]}.items()
                if group.get(name, option.default) != option.default
            ]
            if has_options or asked:
                raise ValueError(
                    f"{self._name(g, i)}: is on device {group['params'][i].device}, where torch's "
                    f"own step is taken, which has no {asked[0] if asked else 'options of a step'}"
                )

    def _step_elsewhere(self, places: list[tuple[int, int, int]]) -> None:
        """Take torch's own step on parameters that are on other devices."""
        groups: dict[int, dict[str, Any]] = {}
        for g, i, _ in places:
            group = self.param_groups[g]
            groups.setdefault(g, {**group, "params": []})["params"].append(group["params"][i])
        kind = type(self).__mro__[type(self).__mro__.index(StateKeeper) + 1]
        twin: Any = object.__new__(kind)
        twin.__dict__.update(self.__dict__, param_groups=list(groups.values()))
        step: Any = kind.step  # type: ignore[attr-defined]
        if getattr(step, "hooked", False):  # by torch, for hooks, which are of the whole step
            step = step.__wrapped__
        step(twin)

    def _rows(self, group: int, i: int, zeroes: bool) -> Ordered:
        """Return the rows of a sparse gradient; refuse it if the rule does not step rows alone."""
        name, options = self._name(group, i), self._groups[group].options
        by_rows = self._rule.by_rows
        way = "" if by_rows is None else by_rows(options)
        if way == ALL:
            raise ValueError(
                f"{name}.grad: is sparse, and these options step all rows (momentum, or decay of "
                "the weights); set p.grad = p.grad.to_dense(), or lazy=True where there is that"
            )
        if way != TOUCHED and not (way == LAZY and self._is_lazy):
            raise TypeError(
                f"{name}.grad: is a sparse tensor, and {type(self).__name__} steps all rows; use "
                "SparseAdam, or make it dense, e.g. Embedding(sparse=False)"
            )
        param = self.param_groups[group]["params"][i]
        axes = param.grad.sparse_dim()
        if self._rule.needs_row_major(options) and axes != min(1, param.dim()):
            raise ValueError(
                f"{name}.grad: is sparse along {axes} axes, and the state is one number for each "
                "row along the first; set p.grad = p.grad.to_dense().to_sparse(1)"
            )
        return _sparse.in_order(name, param, param.grad, zeroes)

    def _refuse_all_rows(self, group: int, i: int, option: str) -> NoReturn:
        raise ValueError(
            f"{self._name(group, i)}.grad: is sparse, and {option} is of all rows; make it dense, "
            f"or leave {option} out"
        )

    def _refuse_strange(self, group: int, i: int) -> NoReturn:
        raise ValueError(
            f"{self._name(group, i)}.grad: is sparse, which needs parameter and state to be plain "
            "tensors; make it dense"
        )

    def _refuse_both(self, group: int, i: int, state: str) -> NoReturn:
        raise ValueError(f"{self._name(group, i)}: {_plain.both(state)}")

    def _refuse_state(self, group: int, i: int, state: Any) -> NoReturn:
        kind = type(state).__name__
        raise TypeError(f"{self._name(group, i)}: its state is a {kind}; expected a dict")

    _shared = staticmethod(_plain.shared)

    @staticmethod
    def _copy(tensor: Any, strides: tuple[int, ...] | None) -> Any:
        """Return a copy of a tensor in another memory order; within a step, so without grad."""
        if strides is None:
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


# in C: a signal could interrupt torch.autograd.graph.increment_version, which calls it
_increment_version: Any = torch._C._increment_version
try:
    _increment_version([])
except (RuntimeError, TypeError):  # before torch 2.5 it takes one tensor

    def mark_written(params: list[Any]) -> None:
        for param in params:
            _increment_version(param)

else:
    mark_written = _increment_version


@cache
def _taken(cls: type[Fused]) -> tuple[str, ...]:
    """Return the names of all arguments of a class; cached, as many optimizers may be made."""
    return tuple(inspect.signature(cls).parameters)
