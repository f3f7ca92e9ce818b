"""Adam, AdamW and SGD for PyTorch on the CPU: torch's own classes with fusedopt's step.

>>> import torch
>>> import fusedopt.torch as fo
>>> model = torch.nn.Linear(3, 2)
>>> opt = fo.AdamW(model.parameters(), lr=3e-4)
>>> model(torch.ones(1, 3)).sum().backward()
>>> opt.step()
>>> isinstance(opt, torch.optim.AdamW)
True

Each class is a subclass of its namesake in `torch.optim` and inherits all but the step: arguments,
groups, state, ``state_dict``, hooks. So what works with the one works with the other (schedulers,
GradScaler, checkpoints, DDP, FSDP2), and a run can change from one to the other and back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, NoReturn

try:
    import torch
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        'fusedopt.torch needs PyTorch 2.4 or newer: pip install "fusedopt[torch]"'
    ) from exc

from fusedopt import _check, _tensors, _threads
from fusedopt import _torch_plain as _plain
from fusedopt._around import LEAF, NOTHING, Around, StepResult, StepStats
from fusedopt._ieee import ieee
from fusedopt.optim import adam as _adam
from fusedopt.optim import sgd as _sgd
from fusedopt.rule import COMMON, Rule

__all__ = ["SGD", "Adam", "AdamW"]

_OF_NO_GROUP = ("max_grad_norm", "stats")  # options in `defaults` only
_COMMON = {option.name: option for option in COMMON}
_CONSTANT = frozenset({float, int, bool, str, type(None)})  # types of values that stay as they are
_ENDS = ("", _plain.CODES, _plain.BLOCKS)
_RESIDUALS = {32: torch.int16, 24: torch.int8}  # by master_bits of a bfloat16 parameter


_copier = _tensors.Copier()


@dataclass(slots=True)
class _Group:
    """One of `param_groups`, as last checked.

    Attributes
    ----------
    options : dict
        Its options; numbers in the place of tensors.
    plan : tuple
        Of `TensorList.step`, without the parameters.
    seen : dict or None
        The dict as it was then; None if a value may change in place.
    """

    options: dict[str, Any]
    plan: tuple[Any, ...]
    seen: dict[str, Any] | None

    def is_of(self, group: Mapping[str, Any]) -> bool:
        """Whether no option has changed since."""
        seen = self.seen
        if seen is None or len(seen) != len(group):
            return False
        for name, value in group.items():
            if seen.get(name, _Group) is not value and name != "params":
                return False
        return True


class _Fused:
    """The step, to stand before a class of `torch.optim` among the bases.

    `_tensors.TensorList` walks over groups, parameters and state in C, and asks the methods below
    for what is not there yet, or not plain.
    """

    _rule: ClassVar[Rule]
    _counts: ClassVar[bool]  # whether the state of a leaf has its number of steps
    _leaves: _tensors.TensorList | None = None
    # what the last step measured, with max_grad_norm or stats; that GradScaler had it skipped
    last_step = StepResult(0, 0)

    _storage_options: Mapping[str, Any] = {}
    _threads: int | None = None
    _groups: dict[int, _Group]  # by number
    _is_swapped = False  # whether the averages are in the place of the parameters: see swap_ema
    defaults: Any  # torch's
    param_groups: Any
    state: Any

    def __init__(
        self,
        params: Any,
        *args: Any,
        state_dtype: str | None = None,
        master_bits: int | None = None,
        min_8bit_size: int = 4096,
        seed: int = 0,
        ema: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        stats: bool = False,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        """See the class."""
        self._threads = None if threads is None else _threads.check("threads", threads)
        own = {
            "state_dtype": state_dtype,
            "master_bits": master_bits,
            "min_8bit_size": min_8bit_size,
            "seed": seed,
            "ema": ema,
            "ema_warmup": ema_warmup,
        }
        own = {name: value for name, value in own.items() if value != _COMMON[name].default}
        self._storage_options = _own_options(own)
        super().__init__(params, *args, **options)  # type: ignore[call-arg]
        self.defaults.update(self._storage_options)
        # in defaults, which torch copies and pickles; of no group, as the norm is of all
        limit = _check.optional(_check.limit)("max_grad_norm", max_grad_norm)
        if limit is not None:
            self.defaults["max_grad_norm"] = limit
        if _check.flag("stats", stats):
            self.defaults["stats"] = True

    def __init_subclass__(cls) -> None:
        """Show torch's arguments, and then ours, where the signature is asked for."""
        own = list(inspect.signature(_Fused.__init__).parameters.values())[3:-1]
        base = next((base for base in cls.__mro__ if base.__module__.startswith("torch.")), None)
        if base is not None:
            shown = inspect.signature(base)
            cls.__signature__ = shown.replace(  # type: ignore[attr-defined]
                parameters=[*shown.parameters.values(), *own]
            )

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on all parameters that have a gradient, in one call of C.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Returns
        -------
        object
            The closure's loss; None without one.

        Raises
        ------
        TypeError, ValueError
            Naming the parameter; no parameter, state or step count has changed.
        RuntimeError
            If another thread is inside `step` of the same optimizer, or within `swap_ema`; nothing
            has been written.
        """
        _tensors.refuse_within_swap(self)
        loss = None
        if closure is not None:
            loss = _copier.call(True, closure)
        found_inf = getattr(self, "found_inf", None)  # set by GradScaler, and so is grad_scale
        if found_inf is not None and found_inf.item() != 0:
            if self._measures():
                self.last_step = StepResult(self.last_step.step, 0, skipped=True)
            return loss
        if self._leaves is None:
            self._leaves, self._groups = _new_list(self._rule.name), {}
        groups = [self._plan(i, group) for i, group in enumerate(self.param_groups)]
        around = self._around()
        written, outcome = self._leaves.step(
            self, groups, self._is_counted(), self.state, _threads.of(self._threads), around
        )
        _mark_written(written)
        if outcome is not None:
            norm, factor, measured = outcome
            stats = None
            if measured is not None:
                names, sizes, table = measured
                stats = StepStats(names, sizes, table, around.grad_scale)
            self.last_step = StepResult(
                self.last_step.step + 1, len(written), False, norm, factor, stats
            )
        return loss

    def _measures(self) -> bool:
        return self.defaults.get("max_grad_norm") is not None or self.defaults.get("stats", False)

    @ieee
    def _around(self) -> Any:
        """Return what the step shall do around the rule, or None."""
        if not self._measures():
            return None
        limit, stats = self.defaults.get("max_grad_norm"), self.defaults.get("stats", False)
        scale = getattr(self, "grad_scale", None)
        return Around(
            grad_scale=1.0 if scale is None else 1 / scale.item(),
            max_grad_norm=limit,
            measure=LEAF if stats else NOTHING,
        )

    def _is_counted(self) -> bool:
        return self._counts or any(group.get("ema") is not None for group in self.param_groups)

    def ema_params(self) -> dict[Any, Any]:
        """Return the running averages by parameter: the live tensors.

        Raises
        ------
        ValueError
            If no group has `ema`, or no step was taken.
        """
        averages = {p: own["ema"] for p, own in self.state.items() if own.get("ema") is not None}
        if not averages and not any(group.get("ema") is not None for group in self.param_groups):
            raise ValueError("there is no average: make the optimizer with ema=0.999 or the like")
        if not averages:
            raise ValueError("there is no average yet: it begins with the first step")
        return averages

    def swap_ema(self) -> _tensors.Swap:
        """Put the averages in the place of the parameters for a ``with`` block.

        The parameters, which are back when it ends, however it ends, are kept in a copy meanwhile.
        What is written to them within is lost. Weights that FSDP2 gathered, and casts that
        autocast keeps, are dropped when it begins and ends.

        Raises
        ------
        ValueError
            If no group has `ema`, or no step was taken.
        RuntimeError
            Within: by `step`, `load_state_dict`, `add_param_group` and another `swap_ema`, which
            need the parameters. At the end: naming a parameter whose shape was changed; the others
            are back.
        """
        return _tensors.Swap(_copier, self)

    def _prepare_swap(self) -> tuple[list[Any], list[Any], list[Any], list[str]]:
        """Return the parameters that have an average, the averages, copies, and names."""
        known = _plain.STATE_DTYPES
        places = {
            param: self._name(number, i)
            for number, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
        }
        params, averages, names = [], [], []
        for param, average in self.ema_params().items():
            name = places.get(param, "a parameter of no group")
            local = _plain.local(name, param.detach())
            params.append(param if _plain.is_plain(type(param)) else local)
            averages.append(_plain.local(f"{name}.ema", average.detach(), known))
            names.append(name)
            _plain.same_shape(f"{name}.ema", averages[-1], local)
            if _plain.repeats(local):
                raise ValueError(f"{name}: elements share memory (expanded?)")
        return params, averages, [param.detach().clone() for param in params], names

    def _forget_weights(self) -> None:
        """Drop copies of the parameters that engines have made to compute with."""
        torch.clear_autocast_cache()
        for module in _plain.gathered(self.state):
            module.reshard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as in torch."""
        _tensors.refuse_within_swap(self)
        where = f"param_groups[{len(self.param_groups)}]"
        _refuse_of_no_group(where, param_group)
        _refuse_options(where, {**self.defaults, **param_group})
        for name, value in _own_options(param_group, f"{where}: ").items():
            param_group[name] = value
        for name, value in self._storage_options.items():
            param_group.setdefault(name, value)
        super().add_param_group(param_group)  # type: ignore[misc]
        for name in _OF_NO_GROUP:
            self.param_groups[-1].pop(name, None)  # which torch takes from the defaults

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle keeps: torch's, and the number of threads."""
        state: Any = super().__getstate__()
        return {**state, "_threads": self._threads}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and options, as in torch, into this optimizer's own storage.

        How state is stored remains as this optimizer was made, whatever `state_dict` has: what
        comes in another dtype (torch's own bfloat16 state of a bfloat16 parameter, say) is
        converted, from and to 8-bit codes too, and torch's rule to cast state to the parameter's
        dtype is not followed.

        Raises
        ------
        TypeError, ValueError
            As torch does; and naming state that does not fit, or that no step could take.
        RuntimeError
            Within `swap_ema`.

        Notes
        -----
        If it raises anything (a signal's exception too), the optimizer is as it was.
        """
        _tensors.refuse_within_swap(self)
        hooks: Any = self
        state_dict = state_dict.copy()
        for hook in hooks._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        state, param_groups = _copier.call(False, self._loaded, state_dict)
        self.__dict__.update(state=state, param_groups=param_groups)  # both: it is one call in C
        for hook in hooks._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _loaded(self, saved: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return state and groups as they will be; torch makes the groups, in a twin of this."""
        none: dict[Any, Any] = {}
        twin: Any = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._optimizer_load_state_dict_pre_hooks = none
        twin._optimizer_load_state_dict_post_hooks = none
        super(_Fused, twin).load_state_dict({**saved, "state": {}})  # type: ignore[misc]
        places = {}
        for g, group in enumerate(twin.param_groups):
            for name in _COMMON:
                group.pop(name, None)
            group.update({k: v for k, v in self.param_groups[g].items() if k in _COMMON})
            numbers = saved["param_groups"][g]["params"]
            places.update({n: (g, i) for i, n in enumerate(numbers)})
        for number, own in saved["state"].items():
            if number not in places:  # as torch does
                twin.state[number] = own
                continue
            g, i = places[number]
            param = twin.param_groups[g]["params"][i]
            twin.state[param] = twin._loaded_leaf(g, i, param, own)
        return twin.state, twin.param_groups

    def _loaded_leaf(
        self, group: int, i: int, param: Any, saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return saved state of a parameter in our formats; what is not of our own as it is."""
        name, own = self._name(group, i), {}
        if not isinstance(saved, Mapping):
            raise TypeError(f"{name}: its state is a {type(saved).__name__}; expected a dict")
        step = saved.get("step")
        if step is not None:
            if isinstance(step, (int, float)):  # as torch once kept it
                step = torch.tensor(float(step), device="cpu", dtype=_count_dtype())
            self._count(group, i, step)
            own["step"] = step.to(param.device)
        for state in self._rule.states:
            if _has(saved, state.name):
                dtype = self._state_dtype(group, param)
                own.update(_plain.stored(name, param, state.name, state.squared, saved, dtype))
        if saved.get("ema") is not None:
            own.update(_plain.stored(name, param, "ema", False, saved, _wide(param)))
        residual = saved.get("residual")
        if residual is not None:
            known = (*_plain.DTYPES, *_RESIDUALS.values())
            residual = _plain.saved_tensor(f"{name}.residual", residual, param, known)
            if residual.dtype == _RESIDUALS.get(_bits(self.param_groups[group])):
                own["residual"] = residual
        ours = {"step", "ema", "residual"}
        ours.update(s + end for s in self._rule.state_names for end in _ENDS)
        own.update({key: value for key, value in saved.items() if key not in ours})
        options = {**self._rule.defaults, **self.param_groups[group]}
        self._missing(name, own, self._columns(self._rule.uses(options), False)[0], bool(saved))
        return own

    def _missing(
        self, name: str, own: Mapping[str, Any], states: Sequence[str], begun: bool
    ) -> list[str]:
        """Return which state arrays are to be made; refuse state that is there in part."""
        missing = [state for state in states if not _has(own, state)]
        absent = [state for state in missing if state != "ema"]  # which may begin at any time
        if self._counts and begun and (own.get("step") is None or absent):
            raise ValueError(
                f"{name}: its state has no {', '.join(absent) or 'step'}, which these options "
                "need; set them when the optimizer is made, or load a checkpoint that has it"
            )
        return missing

    # -------------------------------------------------------------- asked by TensorList.step

    def _name(self, group: int, i: int) -> str:
        names = self.param_groups[group].get("param_names")
        return f"param_groups[{group}]['params'][{i}]" + (f" ({names[i]})" if names else "")

    def _constants(self, group: int, step: int, count: int) -> dict[str, float]:
        """Return the constants of a step by name, with all that scales the gradient.

        `count` is the number of the step, 0 if nobody counts; `step` is what the rule makes of it:
        SGD has a first step with each new buffer, as in torch.
        """
        options = self._groups[group].options
        scale = getattr(self, "grad_scale", None)
        grad_scale = 1.0 if scale is None else 1.0 / scale.item()
        return self._rule_of(options).hyper(step, options, grad_scale, count)

    def _rule_of(self, options: Mapping[str, Any]) -> Rule:
        return self._rule

    def _plan(self, i: int, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what the list must know of a group: see `TensorList.step`."""
        known = self._groups.get(i)
        if known is None or not known.is_of(group):
            known = self._groups[i] = self._checked(f"param_groups[{i}]", group)
        params = group["params"]
        return (params if type(params) is list else list(params), *known.plan)

    def _checked(self, where: str, group: Mapping[str, Any]) -> _Group:
        """Return a group with its options checked, as anybody may write into it."""
        rule = [option for option in self._rule.options if option.name in self.defaults]
        names = ["params", *(option.name for option in rule)]
        if missing := [name for name in names if name not in group]:
            raise ValueError(f"{where}: has no {', '.join(missing)}")
        _refuse_options(where, group)
        _refuse_of_no_group(where, group)
        options = {name: value for name, value in group.items() if name != "params"}
        options |= _own_options(group, f"{where}.")
        for option in rule:
            name, value = option.name, group[option.name]
            if isinstance(option.default, tuple):
                options[name] = _pair(f"{where}.{name}", value)
            elif not isinstance(option.default, bool):
                options[name] = _number(f"{where}.{name}", value)
        averages = options.get("ema") is not None
        columns = self._columns(self._rule.uses(options), averages)
        return _Group(
            options,
            (*columns, _bits(options), options.get("seed", 0), averages),
            dict(group) if all(map(_is_constant, group.items())) else None,
        )

    @classmethod
    @functools.cache
    def _columns(cls, used: tuple[bool, ...], averages: bool) -> tuple[tuple[Any, ...], ...]:
        """Return of the state arrays in use the names, also of codes and extras, and the squares.

        An average is never in codes: None stands for their name.
        """
        rows = zip(cls._rule.states, used, strict=True)
        columns = [(state.name, state.squared) for state, use in rows if use]
        columns += [("ema", False)] * averages
        names = tuple(name for name, _ in columns)
        codes = tuple(None if name == "ema" else name + _plain.CODES for name in names)
        extras = ("residual", *(name + _plain.BLOCKS for name in names))
        return names, codes, extras, tuple(square for _, square in columns)

    def _state_dtype(self, group: int, param: Any) -> Any:
        """Return the dtype in which state of a parameter is kept; float32 unless asked."""
        options = {name: option.default for name, option in _COMMON.items()}
        options |= self.param_groups[group]
        if param.dtype == torch.float64:
            return torch.float64
        if options["state_dtype"] == "bfloat16":
            return torch.bfloat16
        if options["state_dtype"] == "int8" and param.numel() >= options["min_8bit_size"]:
            return torch.uint8
        return torch.float32

    def _make_state(
        self, group: int, i: int, param: Any, own: dict[str, Any] | None
    ) -> tuple[dict[str, Any], bool]:
        """Return new state for a parameter, and whether more is new than the average.

        The list adds it to `state` after the step.
        """
        name = self._name(group, i)
        local = _plain.local(name, param)
        names = self._groups[group].plan[0]
        missing = self._missing(name, own or {}, names, bool(own))
        dtype = self._state_dtype(group, param)
        if dtype == torch.uint8 and local is not param and hasattr(type(param), "to_local"):
            raise TypeError(f"{name}: is a shard; 8-bit state is for whole tensors only")
        made: dict[str, Any] = {}
        if self._is_counted() and not (own and "step" in own):
            made["step"] = _new_count()
        for state in missing:
            if state == "ema":
                made[state] = param.detach().to(_wide(param), copy=True)
                continue
            if dtype == torch.uint8:
                made[state + _plain.CODES], made[state + _plain.BLOCKS] = _plain.new_codes(param)
                continue
            made[state] = torch.zeros_like(
                param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
            )
        return made, bool(set(missing) - {"ema"})

    def _count(self, group: int, i: int, step: Any) -> int:
        """Return the number of steps from a tensor that is not plain, or no such number."""
        name = f"{self._name(group, i)}.step"
        if not isinstance(step, torch.Tensor) or step.numel() != 1:
            raise TypeError(f"{name}: expected a tensor of one element")
        if step.device.type == "meta":
            raise TypeError(f"{name}: is on device meta, without a value")
        taken = step.item()
        if isinstance(taken, complex) or not (0 <= taken < 2**62 and taken == int(taken)):
            raise ValueError(
                f"{name}: is {taken}, which is no number of steps; set it to how many were taken, "
                "torch.tensor(5.0), or load a checkpoint"
            )
        return int(taken)

    def _stand_in(
        self,
        group: int,
        i: int,
        names: tuple[str, ...],
        tensors: list[Any],
        extras: list[Any],
        is_counted: bool,
    ) -> tuple[list[Any], list[Any], list[tuple[Any, Any, str]], dict[str, Any]]:
        """Return what C can work on for [parameter, gradient, *state]: see `stand_ins`.

        Also returns state that a 16-bit parameter needs and that was not there.
        """
        name = self._name(group, i)
        made: dict[str, Any] = {}
        residual = _RESIDUALS.get(_bits(self.param_groups[group]))
        rounded = tensors[0].dtype == torch.float16 or (
            tensors[0].dtype == torch.bfloat16 and residual is not torch.int16
        )
        rounded |= any(state.dtype in (torch.bfloat16, torch.uint8) for state in tensors[2:])
        if rounded and not is_counted:  # by chance, which is keyed by the step
            made["step"] = _new_count()
        if tensors[0].dtype == torch.bfloat16 and residual is not None and extras[0] is None:
            extras[0] = torch.zeros_like(tensors[0], dtype=residual, requires_grad=False)
            made["residual"] = extras[0]
        where = [name, f"{name}.grad", *(f"{name}.{state}" for state in names)]
        return *_plain.stand_ins(where, tensors, extras, residual), made

    def _refuse_both(self, group: int, i: int, state: str) -> NoReturn:
        raise ValueError(f"{self._name(group, i)}: {_plain.both(state)}")

    _shared = staticmethod(_plain.shared)

    @staticmethod
    def _copy(tensor: Any, strides: tuple[int, ...]) -> Any:
        """Return a copy of a tensor in another memory order."""
        tensor = tensor.detach()  # cheaper than no_grad
        return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


_increment_version = torch.autograd.graph.increment_version
try:
    _increment_version([])
except RuntimeError:  # before torch 2.5 it takes one tensor

    def _mark_written(params: list[Any]) -> None:
        for param in params:
            _increment_version(param)

else:
    _mark_written = _increment_version


def _refuse_options(where: str, group: Mapping[str, Any]) -> None:
    for option, purpose in (
        ("capturable", "is for graphs of an accelerator"),
        ("differentiable", "needs a step that autograd can see"),
    ):
        if group.get(option):
            raise ValueError(
                f"{where}: {option}=True {purpose}, and fusedopt steps in place on the CPU; "
                f"leave it False, or use torch.optim"
            )


def _refuse_of_no_group(where: str, group: Mapping[str, Any]) -> None:
    for name in _OF_NO_GROUP:
        if name in group:
            raise ValueError(
                f"{where}.{name}: is of the optimizer, not of a group: {name}=... beside lr"
            )


def _own_options(options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return those of our own options that are given, checked."""
    return {
        name: option.check(where + name, options[name])
        for name, option in _COMMON.items()
        if name in options
    }


def _has(own: Mapping[str, Any], state: str) -> bool:
    return own.get(state) is not None or own.get(state + _plain.CODES) is not None


def _is_constant(item: tuple[str, Any]) -> bool:
    name, value = item
    if type(value) is tuple:
        return all(type(x) in _CONSTANT for x in value)
    return type(value) in _CONSTANT or name in ("params", "param_names")


def _number(where: str, value: Any) -> float:
    """Return an option of torch's as a number; which numbers are right, torch says."""
    if type(value) is float:
        return value
    result = value
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type != "meta":
        result = value.item()
    if not isinstance(result, Real):
        raise TypeError(f"{where}: expected a number, got {value!r}")
    return float(result)


def _pair(where: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{where}: expected two numbers, got {value!r}")
    return tuple(_number(f"{where}[{i}]", x) for i, x in enumerate(value))


def _wide(param: Any) -> Any:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _new_count() -> Any:
    """Return a count of steps where torch keeps it: beside no parameter."""
    return torch.tensor(0.0, dtype=_count_dtype(), device="cpu")


def _count_dtype() -> Any:
    """Return torch's dtype for it."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _bits(group: Mapping[str, Any]) -> int:
    return group.get("master_bits") or 32


def _new_list(rule: str) -> _tensors.TensorList:
    return _tensors.TensorList(
        rule,
        kinds=(torch.Tensor, torch.nn.Parameter),
        is_plain=_plain.is_plain,
        is_neg=torch.empty(0, device="cpu").is_neg,
        exchange=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
        export=lambda tensor: torch.utils.dlpack.to_dlpack(tensor.detach()),
        copier=_copier,
    )


class _FusedAdam(_Fused):
    _rule = _adam.ADAM
    _counts = True

    def _rule_of(self, options: Mapping[str, Any]) -> Rule:
        decoupled = options.get("decoupled_weight_decay", isinstance(self, torch.optim.AdamW))
        return _adam.ADAMW if decoupled else _adam.ADAM


class Adam(_FusedAdam, torch.optim.Adam):
    """`torch.optim.Adam` for CPU tensors, stepping all of them in one pass and one call.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As for `torch.optim.Adam`. Parameters are float32, float64, bfloat16 or float16, on the CPU.
    foreach : bool, optional
        Accepted and without effect.
    fused : bool, optional
        As in torch, GradScaler leaves its scale to the step where True, which takes it off on the
        fly. Unlike torch's, which writes to ``.grad`` what it took the scale off, the step leaves
        ``.grad`` scaled. No other effect.
    capturable, differentiable : bool, default False
        Refused where True.
    state_dtype : {None, "float32", "bfloat16", "int8"}, default None
        How the state is kept: in float32, whatever the parameter's dtype, unless a narrower dtype
        is asked for (float64 of float64 parameters). See `fusedopt.Optimizer`.
    master_bits : {None, 16, 24, 32}, default None
        Bits of a 16-bit parameter that steps compute with, rounded stochastically to 24 and 16.
        None: 32 of a bfloat16 parameter, of which what it does not show is kept as ``residual`` in
        its state; 16 of float16.
    min_8bit_size : int, default 4096
        Tensors of fewer elements keep float32 state in the place of int8.
    seed : int, default 0
        Of the stochastic rounding.
    ema : float in [0, 1), optional
        Decay of a running average of the parameters, kept as state ``ema`` and updated in the pass;
        see `ema_params` and `swap_ema`. `ema_warmup` as for `fusedopt.Optimizer`.
    max_grad_norm : float > 0, optional
        Clip by the norm of all gradients, as ``torch.nn.utils.clip_grad_norm_``, in the pass; the
        gradients stay as they are. The norm is in ``last_step.grad_norm``; ``float("inf")`` asks
        for it alone. After a step that GradScaler skipped, ``last_step.skipped`` is True. Of the
        optimizer, as `stats` is, and not of a group.
    stats : bool, default False
        Measure every parameter in each step: ``last_step.stats``, see `fusedopt.StepStats`, as
        `fusedopt.monitor.History` records it.
    threads : int, optional
        Most threads for this optimizer's steps; by default `fusedopt.get_num_threads`.

    Raises
    ------
    ValueError
        As torch does, and for `capturable` and `differentiable`.

    Notes
    -----
    State and ``state_dict`` are torch's, and load into either; groups have our own options only
    where they are not the default. Results are the bits of `fusedopt.reference.adam`, within a
    few units in the last place of torch's. A step that raises has changed nothing.

    8-bit state is kept as ``exp_avg_codes`` and, one byte for each 64 of them in the order of the
    index, ``exp_avg_blocks``, both uint8. These names are not torch's: `load_state_dict` here
    converts from and to codes, but torch's Adam misses ``exp_avg`` in its first step (SGD begins
    its momentum anew), and torch.distributed.checkpoint, which loads by name, refuses them for a
    missing key. So it does a bfloat16 model's checkpoint of torch.optim, which has no
    ``residual``: load that one with ``planner=DefaultLoadPlanner(allow_partial_load=True)``.

    What differs: state of 16-bit parameters is float32; tensors that overlap are refused, and so
    are parameters on other devices (there, torch's own fused step is the one to use); the version
    counter of each parameter is raised, that of its state is not.
    """


class AdamW(_FusedAdam, torch.optim.AdamW):
    """`torch.optim.AdamW` for CPU tensors; see `Adam`.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize
    foreach, fused, capturable, differentiable
        As for `torch.optim.AdamW` and `Adam`.
    """


class SGD(_Fused, torch.optim.SGD):
    """`torch.optim.SGD` for CPU tensors; see `Adam`.

    Parameters
    ----------
    params, lr, momentum, dampening, weight_decay, nesterov, maximize
    foreach, fused, differentiable
        As for `torch.optim.SGD` and `Adam`.
    """

    _rule = _sgd.RULE
    _counts = False
