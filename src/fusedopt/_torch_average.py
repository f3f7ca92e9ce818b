"""Train and eval mode of a torch optimizer that takes its steps by an average: see `rule.Average`.

In train mode the parameters hold y, in eval mode the average x. A change of mode changes all
tensors, and the mode itself, in one call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from fusedopt import _check, _copies
from fusedopt import _torch_plain as _plain
from fusedopt._torch_state import copier, residual_dtype
from fusedopt.formats import Stored
from fusedopt.rule import MODE, Rule


class Averaging:
    """What such an optimizer adds to the step and the state; a base class before `Fused`."""

    _rule: ClassVar[Rule]
    _name: Callable[[int, int], str]
    _forget_weights: Callable[[], None]
    _has_warned = False
    param_groups: Any
    state: Any

    def train(self) -> None:
        """Put y, which steps need, in the place of the parameters, unless it is there.

        Raises
        ------
        TypeError, ValueError
            Naming a parameter whose state does not fit; nothing has been written.
        RuntimeError
            Within `swap_ema`.
        """
        _copies.refuse_within_swap(self)
        copier.call(False, self._switch, True)

    def eval(self) -> None:
        """Put the average x, which is to be evaluated, in the place of the parameters.

        Raises
        ------
        TypeError, ValueError
            Naming a parameter whose state does not fit; nothing has been written.
        RuntimeError
            Within `swap_ema`.
        """
        _copies.refuse_within_swap(self)
        copier.call(False, self._switch, False)

    def _switch(self, train: bool) -> None:
        targets: list[Any] = []
        sources: list[Any] = []
        writes: list[tuple[dict[str, Any], str, bool]] = []
        for i, group in enumerate(self.param_groups):
            if self._is_training(i) is train:
                continue
            weight = self._weight(i)
            extent = 1 - weight if train else 1 - 1 / weight
            for k, param in enumerate(group["params"]):
                own = self._state_of(param)
                if own is not None:
                    name = self._name(i, k)
                    values = _moved(
                        name, param, own, self._average(name, param, own, extent), group
                    )
                    plain = _plain.is_plain(type(param))
                    targets.append(param if plain else _plain.local(name, param.detach()))
                    if len(values) > 1:
                        targets.append(_residual(name, own["residual"], targets[-1]))
                    sources += values
            writes.append((group, MODE.name, train))
        if writes:
            copier.apply(targets, sources, writes)
            self._forget_weights()

    def _is_training(self, group: int) -> bool:
        return _check.flag(
            f"param_groups[{group}].{MODE.name}", self.param_groups[group][MODE.name]
        )

    def _weight(self, group: int) -> float:
        """Return the weight of the average in the parameters, checked."""
        average = self._rule.average
        assert average is not None
        where = f"param_groups[{group}].{average.option}"
        weight = _check.number(where, average.weight(self.param_groups[group]))
        if not 0 < weight < 1:
            raise ValueError(f"{where}: must be between 0 and 1, got {weight}")
        return weight

    def _state_of(self, param: Any) -> Mapping[str, Any] | None:
        """Return the state of a parameter if it was stepped; else it is its own average."""
        assert self._rule.average is not None
        own = self.state.get(param)
        return None if not own or own.get(self._rule.average.state) is None else own

    def _average(self, name: str, param: Any, own: Mapping[str, Any], extent: float) -> Any:
        """Return a parameter moved towards z, or away from it, in the dtype that steps compute in.

        With ``torch.lerp``, as in the library that made the rules known.
        """
        assert self._rule.average is not None
        state = self._rule.average.state
        z = own[state]
        _plain.same_shape(f"{name}.{state}", z, param)
        wide = _wide(name, param, own)
        z = _plain.local(f"{name}.{state}", z.detach(), _plain.STATE_DTYPES)
        return torch.lerp(wide, z.to(wide.dtype), extent)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Take a step in train mode; see `fusedopt.torch.AdamW.step`.

        Raises
        ------
        RuntimeError
            In eval mode, before the closure is called.
        """
        _copies.refuse_within_swap(self)
        for i in range(len(self.param_groups)):
            if not self._is_training(i):
                raise RuntimeError(
                    f"param_groups[{i}]: is in eval mode: the parameters hold the average; call "
                    ".train() of the optimizer before steps, and .eval() before evaluation"
                )
        return super().step(closure, **options)  # type: ignore[misc]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, in the others' mode; the first in eval mode."""
        known = self.param_groups
        param_group.setdefault(MODE.name, bool(known) and self._is_training(0))
        super().add_param_group(param_group)  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """Return state and options, as in torch; warns once if the parameters are not to be saved.

        That is the case in train mode, after the first step.
        """
        training = any(group.get(MODE.name) for group in self.param_groups)
        if training and self.state and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "state_dict() in train mode: the parameters hold what steps need, not the average, "
                "so a model that is saved now is right to resume this run and wrong to evaluate; "
                "call .eval() of the optimizer first, or save ema_params()",
                UserWarning,
                stacklevel=2,
            )
        made: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return made

    def ema_params(self) -> dict[Any, Any]:
        """Return copies of the averages by parameter, in the dtype that steps compute in.

        Raises
        ------
        TypeError, ValueError
            Naming a parameter whose state does not fit.
        RuntimeError
            Within `swap_ema`.
        """
        _copies.refuse_within_swap(self)
        found: dict[Any, Any] = copier.call(False, self._averages)
        return found

    def _averages(self) -> dict[Any, Any]:
        found = {}
        for i, group in enumerate(self.param_groups):
            extent = 1 - 1 / self._weight(i)
            for k, param in enumerate(group["params"]):
                name, own = self._name(i, k), self._state_of(param)
                if own is None or not self._is_training(i):
                    values = _wide(name, param, own or {})
                else:
                    values = self._average(name, param, own, extent)
                kept = param.detach().to(values.dtype, copy=True)
                _plain.local(name, kept).copy_(values)
                found[param] = kept
        return found


def _wide(name: str, param: Any, own: Mapping[str, Any]) -> Any:
    """Return a parameter as steps compute with it, in float32 or float64."""
    tensor = _plain.local(name, param.detach())
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    residual = own.get("residual")
    if tensor.dtype == torch.float16 or residual is None:
        return tensor.float()
    low = _residual(name, residual, tensor).contiguous().numpy()
    bits = tensor.resolve_neg().contiguous().view(torch.int16).numpy().view("uint16")
    form = f"bfloat16+{low.dtype}"
    return torch.from_numpy(Stored(form, bits, low).decode())


def _residual(name: str, residual: Any, param: Any) -> Any:
    """Return the bits that a parameter does not show."""
    low = _plain.local(f"{name}.residual", residual, (torch.int16, torch.int8))
    _plain.same_shape(f"{name}.residual", low, param)
    return low


def _moved(
    name: str, param: Any, own: Mapping[str, Any], values: Any, group: Mapping[str, Any]
) -> list[Any]:
    """Return what a parameter, and the bits that it does not show, hold of new values."""
    tensor = _plain.local(name, param.detach())
    if _plain.repeats(tensor):
        raise ValueError(f"{name}: elements share memory (expanded?)")
    residual = own.get("residual")
    if tensor.dtype != torch.bfloat16 or residual is None:
        return [values.to(tensor.dtype)]
    dtype = _residual(name, residual, tensor).dtype
    if dtype != residual_dtype(group):
        raise TypeError(f"{name}.residual: expected {residual_dtype(group)}, got {dtype}")
    bits = torch.empty(tensor.shape, dtype=torch.bfloat16, device="cpu")
    low = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    raw = bits.view(torch.int16).numpy().view("uint16")
    Stored(f"bfloat16+{low.numpy().dtype}", raw, low.numpy()).encode(values.contiguous().numpy())
    return [bits, low]
