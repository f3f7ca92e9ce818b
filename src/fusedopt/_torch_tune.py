"""The range test for torch's optimizers: see `fusedopt.tune.range_test`."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from fusedopt import _copies
from fusedopt._sweep import RangeTest, Sweep, Undo, keep_generators, number, rate_setter
from fusedopt._torch_state import copier


def range_test(
    opt: Any,
    closure: Callable[[], Any] | None = None,
    *,
    model: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    loader: Iterable[Any] | None = None,
    start: float = 1e-7,
    stop: float = 10.0,
    steps: int = 100,
    kind: str = "exponential",
    smoothing: float = 0.8,
    divergence: float = 4.0,
    rule: str = "steepest",
    rng: Any = (),
) -> RangeTest:
    """Take steps with rising learning rates, undo them, and suggest a rate.

    Afterwards parameters, their ``grad``, the optimizer, torch's generator and, where `model` is
    given, its buffers are as they were, bit for bit: also if the closure raises, if Ctrl-C
    interrupts, and where the loss diverges.

    >>> import torch
    >>> import fusedopt.torch as fo
    >>> model, x = torch.nn.Linear(8, 1), torch.randn(64, 8)
    >>> opt = fo.AdamW(model.parameters())
    >>> batches = [(x, x.sum(1, keepdim=True))]
    >>> found = fo.range_test(opt, model=model, loss=torch.nn.MSELoss(), loader=batches)
    >>> 1e-5 < found.suggestion < 1, len(opt.state)
    (True, 0)

    Parameters
    ----------
    opt : torch.optim.Optimizer
        Of `fusedopt.torch`, or torch's own. A schedule-free one takes the steps in train mode.
    closure : callable(), optional
        Computes the loss of the next batch, calls ``backward()`` and returns the loss. ``grad`` of
        all parameters is None before.
    model : torch.nn.Module, optional
        With a closure: that whose buffers, as those of a batch norm, it changes.
    loss, loader : callable(output, target), iterable of (input, target)
        Instead of a closure, with `model`: the loss is ``loss(model(input), target)``. The
        loader is started again where it ends.
    start, stop, steps, kind, smoothing, divergence, rule
        As for `fusedopt.tune.range_test`.
    rng : generator or sequence of them, optional
        Other generators that are drawn from, beside torch's default one and the loader's own.

    Returns
    -------
    fusedopt.tune.RangeTest

    Raises
    ------
    TypeError, ValueError
        Before the first step, for options; and what closure and steps raise, all undone.
    RuntimeError
        Within a block of `swap_ema`; and naming what could not be undone.

    Notes
    -----
    It keeps a copy of parameters and state meanwhile. No other thread, and no other rank, may use
    them. What the closure changes beside the above stays changed.
    """
    sweep = Sweep(start, stop, steps, kind, smoothing, divergence, rule)
    by_loader = (model is not None, loss is not None, loader is not None)
    if closure is None and not all(by_loader):
        raise TypeError("range_test: give a closure, or model, loss and loader")
    if closure is not None and any(by_loader[1:]):
        raise TypeError("range_test: give a closure, or loss and loader, not both")
    if not isinstance(opt, torch.optim.Optimizer):
        raise TypeError(f"opt: expected an optimizer of torch, got {type(opt).__name__}")
    if getattr(opt, "_is_swapped", False):
        _copies.refuse_within_swap(opt)
    batches = _batches(loader) if closure is None else iter(())
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    own = [g for owner in owners if (g := getattr(owner, "generator", None)) is not None]
    undo = keep_generators([torch.default_generator, *own]) + keep_generators(rng)
    undo += copier.call(False, _keep_model, model) if model is not None else []
    more, begin = copier.call(False, _rehearsal, opt)
    params = [param for group in opt.param_groups for param in group["params"]]

    def evaluate() -> float:
        for param in params:
            param.grad = None
        if closure is not None:
            value = copier.call(True, closure)
        else:
            value = copier.call(True, _backward, model, loss, next(batches))
        return number(value.detach() if isinstance(value, torch.Tensor) else value)

    return sweep.run(undo + more, begin, evaluate, rate_setter(opt, 0), opt.step)


def _batches(loader: Any) -> Iterator[Any]:
    """Yield batches without end."""
    if isinstance(loader, Iterator):
        raise TypeError(
            "loader: is an iterator, which can be read once; give what it was made from"
        )

    def again() -> Iterator[Any]:
        while True:
            count = 0
            for count, batch in enumerate(loader, start=1):  # noqa: B007
                yield batch
            if not count:
                raise ValueError("loader: has no batches")

    return again()


def _backward(model: Any, loss: Any, batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError("loader: expected pairs of input and target; give a closure for others")
    value = loss(model(batch[0]), batch[1])
    value.backward()
    return value


def _keep_model(model: Any) -> Undo:
    """Return what puts the buffers of a model back."""
    modules = [module for module in model.modules() if module._buffers]
    tensors = [t for module in modules for t in module._buffers.values() if t is not None]
    kept = [tensor.detach().clone() for tensor in tensors]
    undo: Undo = [("buffers", copier.apply, tensors, kept, [])]
    return undo + [("buffers", m._buffers.update, dict(m._buffers)) for m in modules]


def _rehearsal(opt: Any) -> tuple[Undo, Callable[[], None]]:
    """Return what undoes steps, for `_copies.undone`, and what to call before the first.

    The optimizer steps with a copy of its state and groups, so that the originals stay as they are.
    """
    saved = dict(vars(opt))
    state: Any = defaultdict(dict)
    for param, own in opt.state.items():
        state[param] = {key: _copied(value) for key, value in own.items()}
    groups = [{**group, "params": list(group["params"])} for group in opt.param_groups]
    exchanged = {"state": state, "param_groups": groups}
    if hasattr(opt, "_leaves"):
        exchanged |= {"_leaves": opt._new_list(), "_groups": {}}
    undo: Undo = []
    for g, group in enumerate(opt.param_groups):
        for i, param in enumerate(group["params"]):
            name, known = f"param_groups[{g}]['params'][{i}]", param.detach()
            undo.append((name, setattr, param, "data", known))  # the closure may exchange it
            undo.append((name, copier.apply, [param], [known.clone()], []))
            undo.append((f"{name}.grad", setattr, param, "grad", param.grad))
    undo += [("optimizer", vars(opt).clear), ("optimizer", vars(opt).update, saved)]

    def begin() -> None:
        vars(opt).update(exchanged)
        if hasattr(opt, "train"):  # a schedule-free one
            opt.train()

    return undo, begin


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
