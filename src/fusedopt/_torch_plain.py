"""What `fusedopt.torch` takes a tensor for: plain or not, its memory order, its format.

And what stands in for one that is not as C wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fusedopt.formats import BLOCK, Stored

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)
BLOCKS = "_blocks"  # ends the name of what belongs to 8-bit codes


def stored(
    param: Any, name: str, square: bool, saved: Mapping[str, Any], dtype: Any
) -> dict[str, Any]:
    """Return a saved state array in another dtype, with the blocks of 8-bit codes."""
    value, form = saved[name].to(param.device), "uint8" if square else "int8"
    if value.dtype == dtype:
        blocks = saved.get(name + BLOCKS)
        return {name: value} if blocks is None else {name: value, name + BLOCKS: blocks}
    if value.dtype == torch.uint8:
        stored = Stored(form, value.numpy(), saved[name + BLOCKS].numpy())
        value = torch.from_numpy(stored.decode())
    if dtype != torch.uint8:
        return {name: value.to(dtype)}
    codes = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    blocks = torch.zeros(-(-param.numel() // BLOCK), dtype=dtype)
    laid = torch.empty_like(codes, dtype=torch.float32).copy_(value)
    Stored(form, codes.numpy(), blocks.numpy()).encode(laid.numpy())
    return {name: codes, name + BLOCKS: blocks}


def local(where: str, tensor: Any, known: tuple[Any, ...] = DTYPES) -> Any:
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
    elif tensor.dtype not in known:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
        fault = f"of dtype {tensor.dtype}; supported: {names}"
    elif not has_memory(tensor):
        fault = f"a {type(tensor).__name__} without memory of its own; pass the tensor in it"
    if fault is not None:
        raise TypeError(f"{where}: is {fault}")
    return tensor if type(tensor) is torch.nn.Parameter else tensor.as_subclass(torch.Tensor)


def has_memory(tensor: Any) -> bool:
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return False  # a wrapper: FakeTensor, MaskedTensor, low-bit weights, ...
    try:
        return tensor.numel() == 0 or tensor.data_ptr() != 0
    except RuntimeError:  # inside a transform of torch.func
        return False


def order(tensor: Any) -> tuple[int, ...]:
    """Return the strides of a tensor if it is dense, else those of its contiguous copy."""
    expected = 1
    for stride, length in sorted(
        axis for axis in zip(tensor.stride(), tensor.shape, strict=True) if axis[1] != 1
    ):
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= length
    return tensor.stride()


def same_order(tensor: Any, strides: tuple[int, ...]) -> bool:
    axes = zip(tensor.stride(), strides, tensor.shape, strict=True)
    return all(a == b for a, b, length in axes if length != 1)


def repeats(tensor: Any) -> bool:
    """Whether one place in memory is more than one element, as after expand()."""
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return reach < tensor.numel() and tensor.numel() > 0


def stand_ins(
    where: list[str], tensors: list[Any], extras: list[Any], residual: Any
) -> tuple[list[Any], list[Any], list[tuple[Any, Any]]]:
    """Return for [parameter, gradient, *state] plain tensors in one dense memory order.

    Those that are so already, or hold such a one, stand for themselves; of the others a copy does.
    Also returns, alike, what belongs to their codes (`extras`; of the parameter, residual bits of
    dtype `residual`), and what to write back, as (tensor, its copy).

    Raises
    ------
    TypeError, ValueError
        Saying `where` it is, if there can be none.
    """
    own = [
        local(name, tensor, DTYPES if k < 2 else STATE_DTYPES)
        for k, (name, tensor) in enumerate(zip(where, tensors, strict=True))
    ]
    param, strides, back = own[0], order(own[0]), []

    def fit(name: str, tensor: Any, written: bool) -> Any:
        if tensor.shape != param.shape:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)} does not fit the parameter's "
                f"{tuple(param.shape)}"
            )
        if written and repeats(tensor):
            raise ValueError(f"{name}: elements share memory (expanded?); pass a contiguous copy")
        if same_order(tensor, strides) and not tensor.is_neg():
            return tensor
        if tensor.dtype == torch.uint8:
            raise ValueError(
                f"{name}: 8-bit state, made in another memory order than the parameter has now; "
                "keep the order, or make the optimizer anew"
            )
        copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
        if written:
            back.append((tensor, copy))
        return copy

    plain = [fit(name, t, k != 1) for k, (name, t) in enumerate(zip(where, own, strict=True))]
    for name, tensor in zip(where[2:], plain[2:], strict=True):
        if (tensor.dtype == torch.float64) != (param.dtype == torch.float64):
            raise TypeError(f"{name}: {tensor.dtype} does not fit the parameter's {param.dtype}")
    if extras[0] is not None:
        name = f"{where[0]}.residual"
        if extras[0].dtype != residual:
            raise TypeError(f"{name}: expected {residual}, got {extras[0].dtype}")
        extras[0] = fit(name, local(name, extras[0], (residual,)), True)
    for name, tensor, blocks in zip(where[2:], plain[2:], extras[2:], strict=True):
        if tensor.dtype == torch.uint8 and (
            blocks is None or blocks.shape != (-(-param.numel() // BLOCK),)
        ):
            raise ValueError(f"{name}: 8-bit codes need {name}{BLOCKS}, one byte for {BLOCK} codes")
    return plain, extras, back
