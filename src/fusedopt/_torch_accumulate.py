"""Gradients of several micro-batches, added up in buffers in host memory, for `fusedopt.torch`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from fusedopt import _check, _options, _threads
from fusedopt import _torch_plain as _plain
from fusedopt._options import StepOptions
from fusedopt._torch_fused import Fused
from fusedopt._torch_options import plain_base
from fusedopt._torch_state import wide
from fusedopt.accumulate import ADD
from fusedopt.accumulate import GradAccumulator as GradAccumulatorOfArrays


class Adder(Fused, plain_base(ADD)):  # type: ignore[misc]
    """An optimizer whose parameters are buffers, and whose step adds gradients to them."""

    _rule, _is_torchs, _extras = ADD, False, {}

    def __init__(self, groups: list[dict[str, Any]], params: list[Any]) -> None:
        """Make the list; `params` are those of which the buffers are."""
        super().__init__(groups)
        self.params = params
        self._leaves.keep_sums(len(params))

    def add(self, given: dict[int, Any] | None, chosen: Any, drops: bool, how: StepOptions) -> None:
        """Add gradients to some buffers, or to all: those given, or in ``.grad``."""
        sources = self.params if given is None else None
        threads = _threads.get_num_threads()
        self._leaves.step(self, self.state, threads, how, None, chosen, given, sources, drops)

    def _reduction(self, group: Any) -> None:
        """Return that nothing is summed over ranks: the step which takes the sums does that."""

    def _move_rest(self, chosen: Any = None) -> None:
        """Redistribute the gradients for which other ranks wait, where this one cannot add."""
        given = self._leaves.grads
        with contextlib.suppress(Exception):  # the fault is the one to tell
            if given is None:
                self._move((param, param.grad) for param in self.params)
            else:
                self._move((self.params[number], grad) for number, grad in given.items())

    def _stand_in(self, group: int, i: int, names: Any, tensors: list[Any], *others: Any) -> Any:
        """Return plain tensors, as a step does; of a gradient on another device a copy."""
        if isinstance(tensors[1], torch.Tensor) and tensors[1].device.type != "meta":
            tensors = [tensors[0], tensors[1].to("cpu"), *tensors[2:]]
        return super()._stand_in(group, i, names, tensors, *others)

    def _rows(self, group: int, i: int, zeroes: bool) -> NoReturn:
        raise ValueError(
            f"{self._name(group, i)}.grad: is sparse, and a GradAccumulator takes dense gradients; "
            "pass grad.to_dense(), or make it dense, e.g. Embedding(sparse=False)"
        )


class GradAccumulator:
    """Adds gradients of micro-batches to buffers in host memory, and measures the sum meanwhile.

    Each `add` reads the micro-batch's gradients and updates the buffers in one pass, which also
    sums the squares and counts non-finite elements: a step that clips or checks for them then needs
    no extra pass. ``opt.step(grads=accumulator)`` consumes the sum: the buffers are zeroed in the
    pass that reads them. Worth it where gradients are narrower than float32, or come from another
    device; float32 gradients on the CPU add up in ``.grad`` too.

    A step that skips (``nonfinite="skip"``) consumes the sum too; one that raises keeps it.

    Parameters
    ----------
    params : iterable of tensor, or list of groups
        As given to the optimizer, such as ``model.parameters()`` or ``opt.param_groups``; on the
        CPU, and exactly those of the optimizer that will step. Buffers are float32, of float64
        parameters float64, and DTensors of DTensors.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter.

    Notes
    -----
    A call that raises has changed nothing; one that is interrupted has done all or nothing. Sums
    have the bits of those of `fusedopt.GradAccumulator`. Of DTensors each rank adds up its shards;
    the step sums over ranks what was measured of them.

    Examples
    --------
    >>> import torch
    >>> import fusedopt.torch as fo
    >>> model = torch.nn.Linear(3, 2).bfloat16()
    >>> opt = fo.AdamW(model.parameters(), max_grad_norm=1.0)
    >>> total = fo.GradAccumulator(model.parameters())
    >>> for micro_batch in range(4):
    ...     (model(torch.ones(1, 3).bfloat16()).sum() / 4).backward()
    ...     total.add()
    >>> opt.step(grads=total)
    >>> round(opt.last_step.grad_norm, 3)
    2.828
    """

    def __init__(self, params: Iterable[Any]) -> None:
        """Make the buffers, which are zero."""
        if not isinstance(params, torch.Tensor):  # which torch refuses below
            params = [_only_params(group) for group in params]
        known = torch.optim.Optimizer(params, {})  # which makes torch's checks, and takes names
        groups = [
            {**group, "params": [
                _buffer(f"param_groups[{g}]['params'][{i}]", param)
                for i, param in enumerate(group["params"])
            ]}
            for g, group in enumerate(known.param_groups)
        ]  # fmt: skip
        own = [param for group in known.param_groups for param in group["params"]]
        self._adder = Adder(groups, own)
        self._buffers = self._adder._all_params()
        self._numbers = {param: number for number, param in enumerate(own)}
        if len(self._numbers) < len(own):
            raise ValueError("params: has a parameter twice")

    __reduce__ = GradAccumulatorOfArrays.__reduce__

    @torch.compiler.disable
    def add(self, grads: Any = None, *, scale: float = 1.0, set_to_none: bool = True) -> None:
        """Add the gradients of a micro-batch, times `scale`: all of them, or none.

        Parameters
        ----------
        grads : dict or sequence of tensor, optional
            Gradients of any dtype that a step takes: by parameter, or one (or None) for each in the
            order of the groups. They may be on another device, and are left as they are. By
            default ``.grad`` of each parameter, which is consumed.
        scale : float, default 1
            Multiplies the gradients, in the buffers' dtype.
        set_to_none : bool, default True
            How ``.grad`` is consumed: set to None, or to zeros in the pass that reads it, so that
            the next backward pass adds to the same memory.

        Raises
        ------
        TypeError, ValueError
            Naming the parameter; nothing has been added.
        RuntimeError
            If another thread is adding to the same buffers, or steps with them.
        """
        given = chosen = None
        try:
            if grads is not None:
                given = _plain.by_number("grads", grads, self._numbers)
            scale = _check.number("scale", scale)
            drops = _check.flag("set_to_none", set_to_none) and grads is None
        except Exception:
            self._tell_ranks(grads)
            raise
        if isinstance(grads, Mapping):
            chosen = [self._buffers[number] for number in given or ()]
        zeroes = grads is None and not drops
        how = StepOptions(grad_scale=scale, measure=_options.PARAM, zero_grads=zeroes)
        self._adder.add(given, chosen, drops, how)

    def _tell_ranks(self, grads: Any) -> None:
        """Redistribute gradients of a wrong call, as far as they are known, for other ranks."""
        params: Iterable[Any] = self._adder.params
        self._adder._moved = 0
        with contextlib.suppress(Exception):  # the fault is the one to tell
            if grads is None:
                self._adder._move((param, param.grad) for param in params)
            elif isinstance(grads, Mapping):
                self._adder._move(pair for pair in grads.items() if pair[0] in self._numbers)
            elif isinstance(grads, Sequence):
                self._adder._move(zip(params, grads, strict=False))

    @property
    def count(self) -> int:
        """Number of micro-batches in the sum.

        Where some parameters are added at a time, another begins when one of them comes again.
        """
        return self._adder.last_step.step

    @property
    def grads(self) -> list[Any]:
        """The sums, one for each parameter in the order of the groups; None without gradients.

        They are the live buffers, and may be written, for example to add those of other ranks.
        From then on, steps do not use what `add` measures: they read the buffers where they need a
        norm.
        """
        leaves = self._adder._leaves
        leaves.drop_sums()
        return [leaves.filled.get(number) for number in range(len(self._buffers))]

    def zero(self) -> None:
        """Set the buffers to zero.

        Raises
        ------
        RuntimeError
            If another thread is adding to the same buffers, or steps with them.
        """
        plain = [_plain.local("grads", buffer) for buffer in self._buffers]
        self._adder._leaves.zero(self._adder, plain, torch.zeros((), device="cpu"))


def _only_params(group: Any) -> Any:
    """Return a group without its options; a parameter as it is."""
    if not isinstance(group, dict):
        return group
    return {name: group[name] for name in ("params", "param_names") if name in group}


def _buffer(name: str, param: Any) -> Any:
    """Return zeros for the sum of the gradients of a parameter."""
    _plain.local(name, param)
    with torch.inference_mode(False):  # such a tensor could only be written within it
        return torch.zeros_like(
            param, dtype=wide(param), memory_format=torch.preserve_format, requires_grad=False
        )
