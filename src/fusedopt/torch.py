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

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

try:
    import torch
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        'fusedopt.torch needs PyTorch 2.4 or newer: pip install "fusedopt[torch]"'
    ) from exc

from fusedopt import _tensors, _threads
from fusedopt.optim import adam as _adam
from fusedopt.optim import sgd as _sgd
from fusedopt.optimizer import Optimizer as _NumpyOptimizer

__all__ = ["SGD", "Adam", "AdamW"]

_DTYPES = (torch.float32, torch.float64)


class _Fused:
    """The step, to stand before a class of `torch.optim` among the bases.

    `_tensors.TensorList` walks over groups, parameters and state in C, and asks the methods below
    for what is not there yet, or not plain.
    """

    _numpy: ClassVar[type[_NumpyOptimizer]]  # has the rule's name, state names and constants
    _counts: ClassVar[bool]  # whether the state of a leaf has its number of steps
    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to the step
    _leaves: _tensors.TensorList | None = None

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: dict[Any, dict[str, Any]]

    @torch.compiler.disable
    @torch.no_grad()
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
            If another thread is inside `step` of the same optimizer; nothing has been written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)  # set by GradScaler, and so is grad_scale
        if found_inf is not None and found_inf.item() != 0:
            return loss
        if self._leaves is None:
            self._leaves = _new_list(self._numpy.rule)
        groups = []
        for i, group in enumerate(self.param_groups):
            _refuse_options(f"param_groups[{i}]", group)
            used = zip(self._numpy.state_names, self._numpy.uses(group), strict=True)
            groups.append((group["params"], tuple(name for name, use in used if use)))
        written = self._leaves.step(
            self, groups, self._counts, self.state, _threads.get_num_threads()
        )
        torch.autograd.graph.increment_version(written)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as in torch."""
        _refuse_options(f"param_groups[{len(self.param_groups)}]", {**self.defaults, **param_group})
        super().add_param_group(param_group)  # type: ignore[misc]

    # -------------------------------------------------------------- asked by TensorList.step

    def _name(self, group: int, i: int) -> str:
        names = self.param_groups[group].get("param_names")
        return f"param_groups[{group}]['params'][{i}]" + (f" ({names[i]})" if names else "")

    def _constants(self, group: int, step: int) -> dict[str, float]:
        """Return the constants of a step by name, with all that scales the gradient."""
        options = self._numbers(self.param_groups[group])
        constants = self._rule(options).scalars(step, options)
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            constants["grad_scale"] /= scale.item()
        return constants

    def _rule(self, options: Mapping[str, Any]) -> type[_NumpyOptimizer]:
        return self._numpy

    @staticmethod
    def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group's options with numbers in the place of tensors of one element."""
        options = {"l1": 0.0}
        for name, value in group.items():
            if isinstance(value, torch.Tensor):
                value = value.item()
            elif name == "betas":
                value = tuple(float(beta) for beta in value)
            options[name] = value
        return options

    def _make_state(self, group: int, i: int, param: Any, own: dict[str, Any] | None) -> Any:
        """Return new state for a parameter; the list adds it to `state` after the step."""
        _local(self._name(group, i), param)
        names = self._numpy.state_names
        used = zip(names, self._numpy.uses(self.param_groups[group]), strict=True)
        missing = [name for name, use in used if use and not (own and name in own)]
        if self._counts and own:
            raise ValueError(
                f"{self._name(group, i)}: its state has no {', '.join(missing) or 'step'}, which "
                "these options need; set them when the optimizer is made"
            )
        made = {
            name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in missing
        }
        return {"step": torch.zeros((), dtype=torch.float32), **made} if self._counts else made

    def _count(self, group: int, i: int, step: Any) -> int:
        """Return the number of steps from a tensor that is not plain."""
        if not isinstance(step, torch.Tensor) or step.numel() != 1:
            raise TypeError(f"{self._name(group, i)}.step: expected a tensor of one element")
        return int(step.item())

    def _stand_in(
        self, group: int, i: int, names: tuple[str, ...], tensors: list[Any]
    ) -> tuple[list[Any], list[tuple[Any, Any]]]:
        """Return for [parameter, gradient, *state] plain tensors in one dense memory order.

        Those that are so already, or hold such a one, stand for themselves; of the others a copy
        does. Also returns what to write back: (tensor, its copy) for all but the gradient.
        """
        name = self._name(group, i)
        where = [name, f"{name}.grad", *(f"{name}.{state}" for state in names)]
        local = [_local(w, t) for w, t in zip(where, tensors, strict=True)]
        param = local[0]
        strides = _order(param)
        plain, back = [], []
        for k, (w, tensor) in enumerate(zip(where, local, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{w}: shape {tuple(tensor.shape)} does not fit the parameter's "
                    f"{tuple(param.shape)}"
                )
            if k > 1 and tensor.dtype != param.dtype:
                raise TypeError(f"{w}: {tensor.dtype} does not fit the parameter's {param.dtype}")
            if k != 1 and _repeats(tensor):
                raise ValueError(f"{w}: elements share memory (expanded?); pass a contiguous copy")
            if _same_order(tensor, strides) and not tensor.is_neg():
                plain.append(tensor)
                continue
            copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
            copy.copy_(tensor)
            plain.append(copy)
            if k != 1:
                back.append((tensor, copy))
        return plain, back


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


def _local(where: str, tensor: Any) -> Any:
    """Return the plain tensor that a parameter, gradient or state array is, or holds (DTensor).

    Raises
    ------
    TypeError
        If there is none that C can work on.
    """
    if hasattr(type(tensor), "to_local"):
        tensor = tensor.to_local()
        if hasattr(type(tensor), "wait"):  # the result of a collective that may still be running
            tensor = tensor.wait()
    fault = None
    if not isinstance(tensor, torch.Tensor):
        fault = f"a {type(tensor).__name__}; expected a tensor"
    elif tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        fault = f"a {kind} tensor; make it dense, e.g. Embedding(sparse=False), or use torch.optim"
    elif tensor.device.type != "cpu":
        fault = f"on device {tensor.device}; fusedopt steps on the CPU, use torch.optim elsewhere"
    elif tensor.dtype not in _DTYPES:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        fault = f"of dtype {tensor.dtype}; supported: {known}"
    elif not _has_memory(tensor):
        fault = f"a {type(tensor).__name__} without memory of its own; pass the tensor in it"
    if fault is not None:
        raise TypeError(f"{where}: is {fault}")
    return tensor if type(tensor) is torch.nn.Parameter else tensor.as_subclass(torch.Tensor)


def _has_memory(tensor: Any) -> bool:
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return False  # a wrapper: FakeTensor, MaskedTensor, low-bit weights, ...
    try:
        return tensor.numel() == 0 or tensor.data_ptr() != 0
    except RuntimeError:  # inside a transform of torch.func
        return False


def _order(tensor: Any) -> tuple[int, ...]:
    """Return the strides of a tensor if it is dense, else those of its contiguous copy."""
    expected = 1
    for stride, length in sorted(
        axis for axis in zip(tensor.stride(), tensor.shape, strict=True) if axis[1] != 1
    ):
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()  # type: ignore[no-any-return]
        expected *= length
    return tensor.stride()  # type: ignore[no-any-return]


def _same_order(tensor: Any, strides: tuple[int, ...]) -> bool:
    axes = zip(tensor.stride(), strides, tensor.shape, strict=True)
    return all(a == b for a, b, length in axes if length != 1)


def _repeats(tensor: Any) -> bool:
    """Whether one place in memory is more than one element, as after expand()."""
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return reach < tensor.numel() and tensor.numel() > 0


def _new_list(rule: str) -> _tensors.TensorList:
    return _tensors.TensorList(
        rule,
        kinds=(torch.Tensor, torch.nn.Parameter),
        is_neg=torch.empty(0).is_neg,
        exchange=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
        export=lambda tensor: torch.utils.dlpack.to_dlpack(tensor.detach()),
    )


class _FusedAdam(_Fused):
    _numpy = _adam.Adam
    _counts = True

    def _rule(self, options: Mapping[str, Any]) -> type[_NumpyOptimizer]:
        decoupled = options.get("decoupled_weight_decay", isinstance(self, torch.optim.AdamW))
        return _adam.AdamW if decoupled else _adam.Adam


class Adam(_FusedAdam, torch.optim.Adam):
    """`torch.optim.Adam` for CPU tensors, stepping all of them in one pass and one call.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As for `torch.optim.Adam`. Parameters are float32 or float64, on the CPU.
    foreach, fused : bool, optional
        Accepted and without effect.
    capturable, differentiable : bool, default False
        Refused where True.

    Raises
    ------
    ValueError
        As torch does, and for `capturable` and `differentiable`.

    Notes
    -----
    State and ``state_dict`` are torch's, and load into either. Results are the bits of
    `fusedopt.reference.adam`, within a few units in the last place of torch's. A step that raises
    has changed nothing.

    Differences: GradScaler's scale is taken off on the fly, so ``.grad`` stays scaled after a
    step; a tensor that another one overlaps is refused; parameters on other devices too.
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

    _numpy = _sgd.SGD
    _counts = False
