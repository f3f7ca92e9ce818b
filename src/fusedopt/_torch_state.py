"""What `fusedopt.torch` keeps for a parameter: making, loading and showing its state."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fusedopt import _check, _copies, _core, _storage
from fusedopt import _torch_plain as _plain
from fusedopt import _torch_ranks as _ranks
from fusedopt._disk import Disk, on_disk
from fusedopt.formats import FORMATS
from fusedopt.rule import COMMON, Option, Rule, State

OWN = {option.name: option for option in COMMON}  # how parameters and state are kept
_DTYPES = {  # by storage format; 8-bit codes of either sign are bytes
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16-stochastic": torch.bfloat16,
    "int8": torch.uint8,
    "uint8": torch.uint8,
}
_ENDS = ("", _plain.CODES, _plain.BLOCKS)

copier = _copies.Copier()


class StateKeeper:
    """The state of one of torch's optimizers in our formats; a base class."""

    _rule: ClassVar[Rule]
    _extras: ClassVar[Mapping[str, Option]]  # of the rule, which a class of torch's does not have
    _groups: Any  # by number: their options, as last checked, and plans
    _checked: Any  # returns those of a group
    _is_torchs: ClassVar[bool]  # whether the constructor, its checks and a step are of torch.optim
    _state_dict_dtype: str | None = None  # of narrow state in state dicts, if not as it is kept
    _disk: Disk | None = None  # where large state is
    _is_swapped = False  # whether the averages are in the place of the parameters: see swap_ema
    defaults: Any  # torch's
    param_groups: Any
    state: Any

    def _name(self, group: int, i: int) -> str:
        names = self.param_groups[group].get("param_names")
        return f"param_groups[{group}]['params'][{i}]" + (f" ({names[i]})" if names else "")

    def _is_elsewhere(self, param: Any) -> bool:
        """Whether torch's step is taken for a parameter: on another device, of a rule of torch."""
        return self._is_torchs and param.device.type not in ("cpu", "meta")

    def _is_counted(self) -> bool:
        """Whether the state of a parameter has its number of steps."""
        return self._rule.counts or any(group.get("ema") is not None for group in self.param_groups)

    @classmethod
    def _states(
        cls, used: tuple[bool, ...], averages: bool
    ) -> list[tuple[int, str, str | None, str]]:
        """Return the number, and the names, of the state arrays in use: see `GroupPlan`."""
        names = [*cls._rule.slots]
        uses = [*used, averages]
        wide = {"ema", *(state.name for state in cls._rule.states if state.wide)}
        return [
            (k, name, None if name in wide else name + _plain.CODES, name + _plain.BLOCKS)
            for k, (name, use) in enumerate(zip(names, uses, strict=True))
            if use
        ]

    def _state_dtype(self, group: int, param: Any, state: State) -> Any:
        """Return the dtype in which a state of a parameter is kept; float32 unless asked."""
        options = {**self._rule.defaults, **self.param_groups[group]}
        options["state_dtype"] = _check.state_dtype("state_dtype", options["state_dtype"])
        is_double = param.dtype == torch.float64
        return _DTYPES[_storage.state_format(is_double, param.numel(), state, options)]

    def _shapes(self, group: int, param: Any) -> dict[str, tuple[int, ...] | None]:
        """Return the shape of each state of a parameter; None if it is not kept for that."""
        options = {**self._rule.defaults, **self.param_groups[group]}
        shape = tuple(param.shape)
        return {state.name: state.shape(shape, options) for state in self._rule.states}

    def _missing(
        self, name: str, own: Mapping[str, Any], states: Sequence[str], begun: bool
    ) -> list[str]:
        """Return which state arrays are to be made; refuse incomplete state."""
        missing = [state for state in states if not _has(own, state)]
        absent = [state for state in missing if state != "ema"]  # which may begin at any time
        counts = self._rule.counts
        begun = begun and (counts or any(_has(own, state) for state in states if state != "ema"))
        if begun and (absent or (counts and own.get("step") is None)):
            raise ValueError(
                f"{name}: its state has no {', '.join(absent) or 'step'}, which these options "
                "need; set them when the optimizer is made, or load a checkpoint that has it"
            )
        return missing

    def _make_state(
        self, group: int, i: int, param: Any, own: dict[str, Any] | None
    ) -> tuple[dict[str, Any], bool]:
        """Return new state for a parameter, and whether more is new than the average.

        The list adds it to `state` after the step.
        """
        name = self._name(group, i)
        _plain.local(name, param)  # which names what it is, if it cannot be stepped
        shapes = self._shapes(group, param)
        names = [n for n in self._groups[group].plan.names if shapes.get(n, ()) is not None]
        missing = self._missing(name, own or {}, names, bool(own))
        rows = {state.name: state for state in self._rule.states}
        made: dict[str, Any] = {}
        if self._is_counted() and not (own and "step" in own):
            made["step"] = _new_count()
        for state in missing:
            if state == "ema":
                made[state] = param.detach().to(wide(param), copy=True)
                continue
            dtype = self._state_dtype(group, param, rows[state])
            if shapes[state] != tuple(param.shape):
                if _ranks.sharded_dims(param):
                    raise ValueError(
                        f"{name}: is a shard, of which {state!r} cannot be kept in a shape of its "
                        f"own; {_way_out(self._rule)}"
                    )
                made[state] = torch.zeros(shapes[state], dtype=dtype, device=param.device)
                continue
            if dtype == torch.uint8:
                made[state + _plain.CODES], made[state + _plain.BLOCKS] = _plain.new_codes(param)
                continue
            made[state] = torch.zeros_like(
                param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
            )
        self._begin(group, i, param, made, set(missing) - {"ema"})
        states = [value for key, value in made.items() if key != "step"]
        has_count = "step" in made or bool(own and "step" in own)
        has_residual = bool(own and own.get("residual") is not None)
        self._keep(name, made)
        made |= self._make_extras(group, i, param, states, has_residual, has_count)
        return made, bool(set(missing) - {"ema"})

    def _keep(self, name: str, own: dict[str, Any]) -> None:
        """Move large state of a parameter to the disk, if the optimizer has one."""
        if self._disk is None:
            return
        for key, value in own.items():
            if key == "step" or not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                continue
            kind, size = f"{'iu'[value.dtype == torch.uint8]}{value.itemsize}", value.itemsize
            spec = (tuple(value.shape), kind, tuple(size * step for step in value.stride()))
            if not on_disk(spec):
                continue
            if not _plain.is_plain(type(value)):
                raise ValueError(
                    f"{name}: is a {type(value).__name__}, whose state cannot be on disk; leave "
                    "state_dir out"
                )
            if _plain.repeats(value):
                value = value.contiguous()
                spec = (spec[0], kind, tuple(size * step for step in value.stride()))
            array = self._disk.allocate([spec])[0]
            own[key] = torch.from_numpy(array).view(value.dtype).copy_(value)
            _core.relieve(array)

    def _begin(
        self, group: int, i: int, param: Any, made: Mapping[str, Any], names: Collection[str]
    ) -> None:
        """Write what new state, all zero, begins as where that is not zero."""
        options = self._groups[group].options
        number = i + sum(len(before["params"]) for before in self.param_groups[:group])
        for k, state in enumerate(self._rule.states):
            if state.name not in names or state.first(options) == 0:
                continue
            key = state.name if state.name in made else state.name + _plain.CODES
            where = f"{self._name(group, i)}.{state.name}"
            blocks = made.get(state.name + _plain.BLOCKS)
            array = _plain.as_stored(made[key], blocks, state.squared)
            source = _plain.local(where, param.detach())
            like = _plain.local(where, made[key], (*_plain.DTYPES, torch.uint8))
            if like.shape != source.shape:  # a sample, in row-major order
                source = source.resolve_neg().contiguous()
            elif state.init == "param":  # in the memory order of the state
                if source.stride() != like.stride() or source.is_neg():
                    source = torch.empty_like(like, dtype=source.dtype).copy_(source)
            value = _plain.as_stored(source, None, False)
            seeded = {"seed": 0, **options}
            place = (number, 1 + k, _ranks.origin(param))
            _storage.begin(where, array, state, value, seeded, place)

    def _make_extras(
        self,
        group: int,
        i: int,
        param: Any,
        states: Sequence[Any],
        has_residual: bool,
        has_count: bool,
    ) -> dict[str, Any]:
        """Return what 16-bit parameters, and stochastically rounded state, need and do not have.

        That is the bits that a bfloat16 parameter does not show, and the number of the step, which
        keys the noise.
        """
        made: dict[str, Any] = {}
        residual = residual_dtype(self.param_groups[group])
        is_bfloat16 = param.dtype == torch.bfloat16
        rounded = param.dtype == torch.float16 or (is_bfloat16 and residual is not torch.int16)
        narrow = torch.bfloat16, torch.uint8
        rounded |= any(getattr(state, "dtype", None) in narrow for state in states)
        if rounded and not has_count:
            made["step"] = _new_count()
        if is_bfloat16 and residual is not None and not has_residual:
            made["residual"] = torch.zeros_like(param, dtype=residual, requires_grad=False)
            self._keep(self._name(group, i), made)
        return made

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

    def state_dict(self) -> dict[str, Any]:
        """Return state and options, as in torch.

        State is there as it is kept. With ``state_dict_dtype="float32"`` it is numbers in float32,
        and groups are without our own options, so that it loads into torch.optim and into other
        formats. 8-bit state of a shard whose blocks are not those of the whole tensor is numbers in
        any case.
        """
        self._note_numbers()
        made: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        made["state"] = {key: self._shown(own) for key, own in made["state"].items()}
        for group in made["param_groups"] if self._state_dict_dtype is not None else ():
            for name in OWN:
                group.pop(name, None)  # which no state dict changes
        return made

    def _shown(self, own: Any) -> Any:
        """Return the state of a parameter as state dicts have it."""
        if not isinstance(own, dict):
            return own
        shown, is_wide = dict(own), self._state_dict_dtype is not None
        for state in self._rule.states:
            name, coded = state.name, state.name + _plain.CODES
            codes, value = own.get(coded), own.get(name)
            if codes is not None and (is_wide or not _plain.has_blocks(codes)):
                blocks = shown.pop(name + _plain.BLOCKS)
                shown[name] = _plain.numbers(shown.pop(coded), blocks, state.squared)
            elif is_wide and value is not None and value.dtype == torch.bfloat16:
                shown[name] = value.float()
        return shown

    def _note_numbers(self) -> None:
        """Write the numbers that torch keeps in the state of a parameter: see `Rule.numbers`."""
        for i, group in enumerate(self.param_groups if self._rule.numbers and self.state else ()):
            options = self._checked(f"param_groups[{i}]", group).options
            for k, param in enumerate(group["params"]):
                own: Any = None if self._is_elsewhere(param) else self.state.get(param)
                for name, number in self._rule.numbers if own and "step" in own else ():
                    value = number(self._count(i, k, own["step"]), options)
                    own[name] = torch.tensor(value, dtype=_count_dtype(), device="cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and options, as in torch, into this optimizer's own storage.

        State is stored as this optimizer was made, whatever `state_dict` has: state in another
        dtype (such as torch's own bfloat16 state of a bfloat16 parameter) is converted, from and to
        8-bit codes too, and not cast to the parameter's dtype as torch does. Options that torch
        does not have, and that the saved groups lack, stay as they are.

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
        _copies.refuse_within_swap(self)
        hooks: Any = self
        state_dict = state_dict.copy()
        for hook in hooks._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        state, param_groups = copier.call(False, self._loaded, state_dict)
        self.__dict__.update(state=state, param_groups=param_groups)  # both: it is one call in C
        if self._disk is not None:
            self._disk.lost = None
        for hook in hooks._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _loaded(self, saved: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return state and groups as they will be; torch makes the groups, in a twin of this."""
        none: dict[Any, Any] = {}
        twin: Any = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._optimizer_load_state_dict_pre_hooks = none
        twin._optimizer_load_state_dict_post_hooks = none
        state = self._state_elsewhere(saved)
        super(StateKeeper, twin).load_state_dict({**saved, "state": state})  # type: ignore[misc]
        places = {}
        for g, group in enumerate(twin.param_groups):
            for name in OWN:
                group.pop(name, None)
            group.update({k: v for k, v in self.param_groups[g].items() if k in OWN})
            for name in self._extras.keys() & self.param_groups[g].keys():
                group.setdefault(name, self.param_groups[g][name])  # of which torch says nothing
            numbers = saved["param_groups"][g]["params"]
            places.update({n: (g, i) for i, n in enumerate(numbers)})
        for number, own in saved["state"].items():
            if number in state:
                continue
            if number not in places:  # as torch does
                twin.state[number] = own
                continue
            g, i = places[number]
            param = twin.param_groups[g]["params"][i]
            twin.state[param] = twin._loaded_leaf(g, i, param, own)
        if self._rule.recall is not None:
            twin._recall()
        return twin.state, twin.param_groups

    def _state_elsewhere(self, saved: Mapping[str, Any]) -> dict[Any, Any]:
        """Return what torch itself loads: the saved state of parameters that it steps."""
        found = {}
        for g, (theirs, ours) in enumerate(
            zip(saved["param_groups"], self.param_groups, strict=False)
        ):
            for i, (number, param) in enumerate(
                zip(theirs["params"], ours["params"], strict=False)
            ):
                if number in saved["state"] and self._is_elsewhere(param):
                    found[number] = saved["state"][number]
                    if any(str(key).endswith(_plain.CODES) for key in found[number]):
                        raise ValueError(
                            f"{self._name(g, i)}: is on device {param.device}, and its state in "
                            "8-bit codes, which steps on the CPU alone know"
                        )
        return found

    def _recall(self) -> None:
        """Give groups what the rule remembers, from the numbers that torch keeps in its place."""
        assert self._rule.recall is not None
        for g, group in enumerate(self.param_groups):
            for name, value in self._rule.begun({**self._rule.defaults, **group}).items():
                group.setdefault(name, value)
            names, latest, numbers = [name for name, _ in self._rule.numbers], 0, {}
            for i, param in enumerate(group["params"]):
                own = self.state.get(param, {})
                if all(isinstance(own.get(name), torch.Tensor) for name in ("step", *names)):
                    taken = self._count(g, i, own["step"])
                    if taken > latest:
                        latest, numbers = taken, {name: own[name].item() for name in names}
            if numbers:
                options = self._checked(f"param_groups[{g}]", group).options
                group.update(self._rule.recall(latest, numbers, options))

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
        shapes = self._shapes(group, param)
        options = {**self._rule.defaults, **self.param_groups[group]}
        for state in self._rule.states:
            if _has(saved, state.name):
                dtype, shape = self._state_dtype(group, param, state), shapes[state.name]
                if state.every or state.part or state.is_by_row(options):
                    own.update(_plain.part(name, param, state.name, saved, dtype, shape))
                    continue
                own.update(_plain.stored(name, param, state.name, state.squared, saved, dtype))
        if saved.get("ema") is not None:
            own.update(_plain.stored(name, param, "ema", False, saved, wide(param)))
        residual = saved.get("residual")
        if residual is not None:
            known = (*_plain.DTYPES, torch.int16, torch.int8)
            residual = _plain.saved_tensor(f"{name}.residual", residual, param, known)
            if residual.dtype == residual_dtype(self.param_groups[group]):
                own["residual"] = residual
        ours = {"step", "ema", "residual"}
        ours.update(s + end for s in self._rule.state_names for end in _ENDS)
        own.update({key: value for key, value in saved.items() if key not in ours})
        used = [
            name
            for _, name, *_ in self._states(self._rule.uses(options), False)
            if shapes[name] is not None
        ]
        self._missing(name, own, used, bool(saved))
        self._keep(name, own)
        return own

    def share_memory(self) -> None:
        """Move all state into shared memory, as a class of torch's does."""
        for own in self.state.values():
            for tensor in own.values():
                if isinstance(tensor, torch.Tensor):
                    tensor.share_memory_()

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

    def swap_ema(self) -> _copies.Swap:
        """Put the averages in the place of the parameters for a ``with`` block.

        A copy of the parameters is kept meanwhile; they are restored when the block ends, however
        it ends. Values written to them in the block are lost. Weights that FSDP2 gathered, and
        casts that autocast keeps, are dropped when it begins and ends.

        Raises
        ------
        ValueError
            If no group has `ema`, or no step was taken.
        RuntimeError
            In the block, from `step`, `load_state_dict`, `add_param_group` and another `swap_ema`,
            which need the parameters. At its end, naming a parameter whose shape was changed; the
            others are restored.
        """
        return _copies.Swap(copier, self)

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
        """Drop copies of the parameters that engines have made for computations."""
        torch.clear_autocast_cache()
        for module in _plain.gathered(self.state):
            module.reshard()


def _way_out(rule: Rule) -> str:
    """Return how a parameter that is a shard can be stepped."""
    return f"set {rule.fixed[0]}=1" if rule.fixed else "use AdamW for it, or keep it whole"


def _has(own: Mapping[str, Any], state: str) -> bool:
    return own.get(state) is not None or own.get(state + _plain.CODES) is not None


def wide(param: Any) -> Any:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _new_count() -> Any:
    """Return a count of steps where torch keeps it: beside no parameter."""
    return torch.tensor(0.0, dtype=_count_dtype(), device="cpu")


def _count_dtype() -> Any:
    """Return torch's dtype for it."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def residual_dtype(group: Mapping[str, Any]) -> Any:
    """Return the dtype of the bits that a bfloat16 parameter does not show, or None."""
    dtype = FORMATS[_storage.MASTERS[group.get("master_bits")]][1]
    return None if dtype is None else getattr(torch, np.dtype(dtype).name)
