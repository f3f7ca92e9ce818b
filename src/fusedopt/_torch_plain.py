"""Kinds and formats of tensors for `fusedopt.torch`, and conversion of state.

Also the stand-ins for a leaf whose tensors are not plain.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from fusedopt import _core, formats
from fusedopt import _torch_ranks as _ranks
from fusedopt.formats import BLOCK, Stored

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CODES = "_codes"  # ends the name of state that is kept in 8-bit codes: torch knows no such state,
BLOCKS = "_blocks"  # and never takes codes for numbers; and of what belongs to them
MOST_AXES = 64


def stored(
    where: str, param: Any, name: str, square: bool, saved: Mapping[str, Any], dtype: Any
) -> dict[str, Any]:
    """Return a saved state array in another dtype: numbers, or 8-bit codes with their blocks.

    Raises
    ------
    TypeError, ValueError
        If its shape does not fit, if codes are of another dtype or lack their blocks, or if it is
        given twice.
    """
    coded = saved.get(name) is None
    if not coded and saved.get(name + CODES) is not None:
        raise ValueError(f"{where}: {both(name)}")
    key = name + CODES if coded else name
    value = saved_tensor(f"{where}.{key}", saved[key], param, (*DTYPES, torch.uint8))
    if coded and value.dtype != torch.uint8:
        raise TypeError(
            f"{where}.{key}: {value.dtype}, but codes are torch.uint8; torch.optim casts what it "
            "loads, so take the checkpoint that it loaded"
        )
    if value.dtype == torch.uint8:
        blocks = saved.get(name + BLOCKS)
        if isinstance(blocks, torch.Tensor) and blocks.dtype == torch.uint8:
            blocks = local(f"{where}.{name}{BLOCKS}", blocks.to(param.device), (torch.uint8,))
        if (
            not isinstance(blocks, torch.Tensor)
            or blocks.dtype != torch.uint8
            or blocks.numel() != count_blocks(local(where, value, (torch.uint8,)))
        ):
            raise ValueError(
                f"{where}.{key}: 8-bit codes need {name}{BLOCKS}, one byte for {BLOCK} codes"
            )
        if coded:  # (under `name` itself, as they once were, blocks follow the memory)
            value = _row_major(value)
        if coded and dtype == torch.uint8:
            return {name + CODES: value, name + BLOCKS: _blocks_of(value, blocks.contiguous())}
        value = _decoded(value, blocks, square)
    if dtype != torch.uint8:
        return {name: value.to(dtype)}
    codes, blocks = new_codes(value)
    array = as_stored(codes, blocks, square)
    values = local(where, value).float().contiguous().numpy()
    formats.encode(array, values, 0, _ranks.origin(value))
    return {name + CODES: codes, name + BLOCKS: blocks}


def as_stored(tensor: Any, blocks: Any, is_square: bool) -> Any:
    """Return an array on the memory of a state tensor; `Stored` if its format is narrow."""
    tensor = local("state", tensor, (*DTYPES, torch.uint8))
    if tensor.dtype == torch.uint8:
        blocks = local("blocks", blocks, (torch.uint8,)).reshape(-1).numpy()
        return Stored("uint8" if is_square else "int8", tensor.numpy(), blocks)
    if tensor.dtype == torch.bfloat16:
        return Stored("bfloat16-stochastic", tensor.view(torch.int16).numpy().view(np.uint16))
    if tensor.dtype == torch.float16:
        return Stored("float16-stochastic", tensor.numpy())
    return tensor.numpy()


def part(
    where: str, param: Any, name: str, saved: Mapping[str, Any], dtype: Any, shape: Any
) -> dict[str, Any]:
    """Return a saved state array that may have another shape than its parameter.

    The library that made the rule known may keep it flat, or as one number for all elements.

    Raises
    ------
    TypeError, ValueError
        If its shape does not fit, or if there is none of such a parameter.
    """
    value, where = saved.get(name), f"{where}.{name}"
    if shape is None:
        raise ValueError(f"{where}: a parameter of shape {tuple(param.shape)} has none")
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where}: is a {type(value).__name__}; expected a tensor")
    if hasattr(type(value), "to_local"):
        return {name: saved_tensor(where, value, param, DTYPES).to(dtype)}
    value = local(where, value.detach().to(param.device)).resolve_neg()
    if value.shape != shape:
        is_flat = value.dim() == 1 and value.numel() == prod(shape)
        if not is_flat and value.dim() != 0:
            raise ValueError(f"{where}: shape {tuple(value.shape)}; expected {tuple(shape)}")
        value = value.reshape(shape) if is_flat else value.expand(shape)
    return {name: value.to(dtype).contiguous()}


def saved_tensor(where: str, value: Any, param: Any, known: tuple[Any, ...]) -> Any:
    """Return a saved tensor beside its parameter, if it is such a one and of a known dtype."""
    same_shape(where, value, param)
    same_place(where, value, param)
    if value.device.type != "meta":
        value = value.to(param.device)
    own = local(where, value, known)
    if is_shared(param) and not is_shared(value) and own.shape != param.to_local().shape:
        raise ValueError(
            f"{where}: is a whole tensor, its parameter a shard; distribute it first, as "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict does"
        )
    value = value.detach() if value.requires_grad else value
    return value.resolve_neg()


def both(name: str) -> str:
    """Return the message for state that is given twice."""
    return f"its state has {name} and {name}{CODES}, of which one can be right; delete the other"


def same_shape(where: str, tensor: Any, param: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{where}: is a {type(tensor).__name__}; expected a tensor")
    if tensor.shape != param.shape:
        raise ValueError(
            f"{where}: shape {tuple(tensor.shape)} does not fit the parameter's "
            f"{tuple(param.shape)}"
        )


def numbers(codes: Any, blocks: Any, is_square: bool) -> Any:
    """Return the numbers of 8-bit state in float32; of a shard, those of the shard."""
    return _decoded(_row_major(codes), blocks, is_square)


def _decoded(codes: Any, blocks: Any, is_square: bool) -> Any:
    value = torch.from_numpy(as_stored(codes, blocks, is_square).decode())
    return _shard(codes, value, codes.shape) if hasattr(type(codes), "to_local") else value


def _row_major(codes: Any) -> Any:
    if not hasattr(type(codes), "to_local"):
        return codes.contiguous()
    own = local("codes", codes, (torch.uint8,))
    return codes if own.is_contiguous() else _shard(codes, own.contiguous(), codes.shape)


def count_blocks(param: Any) -> int:
    return -(-param.numel() // BLOCK)


def new_codes(param: Any) -> tuple[Any, Any]:
    """Return 8-bit state of a parameter, all zero: codes, in row-major order, and their blocks.

    Blocks have the shape of the parameter, except along the axes within a block, so that they are
    spread over ranks as the DTensor is, if its shards are whole blocks. Those of another shard are
    a plain tensor, which belongs to that shard alone.
    """
    like = torch.contiguous_format
    codes = torch.zeros_like(param, dtype=torch.uint8, memory_format=like, requires_grad=False)
    own = local("codes", codes, (torch.uint8,))
    return codes, _blocks_of(codes, own.new_zeros(count_blocks(own)))


def has_blocks(codes: Any) -> bool:
    """Whether the blocks of codes are those of the whole tensor, also where this is a shard."""
    axis = _block_axis(codes.shape)
    dims = [d for d in _ranks.sharded_dims(codes) if codes.placements[d].dim >= axis]
    if not dims:  # then blocks are whole in any shard
        return True
    cut = codes.placements[dims[0]]
    if len(dims) > 1 or cut.dim != axis or type(cut).__name__ != "Shard":
        return False
    count, inner = codes.device_mesh.size(dims[0]), prod(codes.shape[axis + 1 :])
    own = -(-codes.shape[axis] // count) * inner  # elements of the first shard, within `axis`
    whole = _block_shape(codes.shape, axis)[axis]
    return own % BLOCK == 0 and -(-whole // count) == own // BLOCK


def _blocks_of(codes: Any, blocks: Any) -> Any:
    """Return the blocks of codes, given on this rank, as the state has them."""
    axis = _block_axis(codes.shape)
    if not hasattr(type(codes), "to_local"):
        return blocks.reshape(_block_shape(codes.shape, axis))
    if not has_blocks(codes):
        return blocks.reshape(-1)
    own = local("codes", codes, (torch.uint8,))
    return _shard(
        codes, blocks.reshape(_block_shape(own.shape, axis)), _block_shape(codes.shape, axis)
    )


def _block_axis(shape: tuple[int, ...]) -> int:
    """Return the last axis from which on a tensor has whole blocks; 0 if there is none."""
    axes = range(len(shape) - 1, -1, -1)
    return next((axis for axis in axes if prod(shape[axis:]) % BLOCK == 0), 0)


def _block_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], -(-prod(shape[axis:]) // BLOCK))


def _shard(like: Any, tensor: Any, shape: tuple[int, ...]) -> Any:
    """Return a tensor as this rank's part of one of `shape` that lies on the ranks as `like`."""
    shape = torch.Size(shape)
    stride = tuple(max(1, prod(max(1, n) for n in shape[k + 1 :])) for k in range(len(shape)))
    return type(like).from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def is_plain(kind: Any) -> bool:
    """Whether tensors of a type have memory of their own that C can describe in full."""
    return (
        issubclass(kind, torch.Tensor)
        and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not hasattr(kind, "to_local")
    )


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


def restored(codes: Any) -> Any:
    """Return 8-bit codes as uint8 where a loader has cast them, as that of a torch optimizer does.

    Megatron's HybridDeviceOptimizer loads the state of ours in that way. Any float dtype holds
    codes exactly; what holds anything else is returned as it is.
    """
    if not is_plain(type(codes)) or not codes.is_floating_point() or codes.device.type != "cpu":
        return codes
    made = codes.nan_to_num(nan=256.0).clamp(0, 255).to(torch.uint8)
    return made if torch.equal(made.to(codes.dtype), codes) else codes


def by_number(where: str, given: Any, numbers: Mapping[Any, int]) -> dict[int, Any]:
    """Return tensors that are given by parameter, or for each one, by the parameter's number.

    Raises
    ------
    ValueError
        If a key is no parameter, or if there is not one tensor, or None, for each.
    """
    if isinstance(given, Mapping):
        if any(param not in numbers for param in given):
            raise ValueError(f"{where}: has a key that is none of the parameters")
        pairs = [(numbers[param], tensor) for param, tensor in given.items()]
    elif isinstance(given, Sequence) and len(given) == len(numbers):
        pairs = list(enumerate(given))
    else:
        raise ValueError(
            f"{where}: expected a dict, or a list with a tensor or None for each of the "
            f"{len(numbers)} parameters"
        )
    return {number: tensor for number, tensor in pairs if tensor is not None}


def repeats(tensor: Any) -> bool:
    """Whether elements may share memory, as after expand()."""
    found: bool = _core.repeats(tuple(tensor.shape), tensor.stride())
    return found


def stand_ins(
    where: list[str],
    tensors: list[Any],
    given: Any,
    extras: list[Any],
    residual: Any,
    zeroes: bool,
    shapes: Mapping[str, Any],
) -> tuple[list[Any], list[Any], list[tuple[Any, Any, str]]]:
    """Return for [parameter, gradient, copy, *state] plain tensors of one shape, in any order.

    Those that are plain already, or hold such a tensor, are used as they are; others are copied.
    Gradient and copy may be None. `given` is the gradient before it was `placed`. Also returns,
    alike, what belongs to their codes (`extras`; of the parameter, residual bits of dtype
    `residual`), and what to write back, as (tensor, its copy, name); the gradient too if the step
    sets it to zero (`zeroes`). `shapes` has, by name, that of state with one of its own.

    Raises
    ------
    TypeError, ValueError
        Saying `where` it is, if there can be none.
    """
    back = []
    known = [(torch.uint8,) if name.endswith(CODES) else STATE_DTYPES for name in where[3:]]
    own: list[Any] = [
        tensor if tensor is None else local(name, tensor, dtypes)
        for name, tensor, dtypes in zip(
            where, tensors, [DTYPES, DTYPES, DTYPES, *known], strict=True
        )
    ]
    param, target = own[0], own[2]
    is_double = param.dtype == torch.float64

    def fit(name: str, tensor: Any, written: bool) -> Any:
        if name not in shapes:
            same_shape(name, tensor, param)
        elif tensor.shape != shapes[name]:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; expected {tuple(shapes[name])}")
        if tensor.dim() > MOST_AXES:
            raise ValueError(f"{name}: has {tensor.dim()} axes, of at most {MOST_AXES}")
        if written and repeats(tensor):
            raise ValueError(f"{name}: elements share memory (expanded?); pass a contiguous copy")
        copy = tensor.resolve_neg()
        if name in shapes:
            copy = copy.contiguous()
        if written and copy is not tensor:
            back.append((tensor, copy, name))
        return copy

    is_moved = tensors[1] is not given  # then it is another's memory that is set to zero
    plain: list[Any] = [
        tensor if tensor is None else fit(name, tensor, k != 1 or (zeroes and not is_moved))
        for k, (name, tensor) in enumerate(zip(where, own, strict=True))
    ]
    if zeroes and is_moved:
        plain[1] = plain[1].clone()  # it may be a part of the gradient's memory
        given = local(where[1], given)
        back.append((given, torch.zeros_like(given), where[1]))
    if target is not None and target.dtype == (torch.float32 if is_double else torch.float64):
        raise TypeError(
            f"{where[2]}: a copy of {param.dtype} is written as float16, bfloat16 or in the dtype "
            f"that steps compute in, not as {target.dtype}"
        )
    for name, tensor in zip(where[3:], plain[3:], strict=True):
        if tensor.dtype != torch.uint8 and (tensor.dtype == torch.float64) != is_double:
            raise TypeError(f"{name}: {tensor.dtype} does not fit the parameter's {param.dtype}")
        if name in shapes and tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: is of dtype {tensor.dtype}; it is kept in float32")
    if extras[0] is not None:
        name = f"{where[0]}.residual"
        if extras[0].dtype != residual:
            raise TypeError(f"{name}: expected {residual}, got {extras[0].dtype}")
        extras[0] = fit(name, local(name, extras[0], (residual,)), True)
    for k, (name, tensor) in enumerate(zip(where, plain, strict=True)):
        if k < 3 or tensor.dtype != torch.uint8:
            continue
        if is_double:
            raise TypeError(f"{name}: 8-bit codes do not fit the parameter's {param.dtype}")
        name = name.removesuffix(CODES) + BLOCKS
        blocks = extras[k] if extras[k] is None else local(name, extras[k], (torch.uint8,))
        if blocks is None or blocks.numel() != count_blocks(param):
            raise ValueError(f"{where[k]}: 8-bit codes need {name}, one byte for {BLOCK} codes")
        if repeats(blocks):
            raise ValueError(f"{name}: elements share memory (expanded?); pass a contiguous copy")
        extras[k] = blocks.resolve_neg().contiguous()
        if extras[k] is not blocks:
            back.append((blocks, extras[k], name))
    return plain, extras, back


def placed(where: list[str], tensors: list[Any]) -> list[Any]:
    """Return [parameter, gradient, copy, *state] with the gradient on the ranks as the parameter.

    A DTensor's gradient can be a sum that is still to be taken (tensor parallelism makes such), or
    lie in other shards: it is redistributed, as by torch.optim, by all ranks together.

    Raises
    ------
    TypeError, ValueError
        If the gradient cannot be, or another tensor lies on the ranks in another way.
    """
    param, grad, *others = tensors
    for name, tensor in zip(where[1:], tensors[1:], strict=True):
        if tensor is not grad or not must_move(param, grad):
            same_place(name, tensor, param)
    if must_move(param, grad):
        grad = grad.redistribute(placements=param.placements)
    return [param, grad, *others]


def is_shared(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which each rank has a part, or all."""
    return hasattr(type(tensor), "to_local")


def must_move(param: Any, grad: Any) -> bool:
    """Whether a gradient is a DTensor that lies on its parameter's mesh in another way."""
    theirs, ours = getattr(grad, "placements", None), getattr(param, "placements", None)
    if theirs is None or ours is None or theirs == ours:
        return False
    return bool(grad.device_mesh == param.device_mesh)


def same_place(where: str, tensor: Any, param: Any) -> None:
    """Raise TypeError or ValueError if a DTensor lies on the ranks otherwise than its parameter."""
    theirs, ours = getattr(tensor, "placements", None), getattr(param, "placements", None)
    if theirs is None:
        return
    if ours is None:
        raise TypeError(f"{where}: is a DTensor, its parameter is not; pass its full_tensor()")
    if tensor.device_mesh != param.device_mesh or theirs != ours:
        raise ValueError(
            f"{where}: lies on the ranks as {theirs} of {tensor.device_mesh}, its parameter as "
            f"{ours} of {param.device_mesh}; redistribute it"
        )


def shared(members: list[tuple[Any, ...]], n_written: int) -> tuple[int, int] | None:
    """Return two arrays that share a byte, the first of which is written, or None.

    Each is given by its address, shape, strides in bytes and bytes of an element; those that are
    only read come last.
    """
    reach = [
        low + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + size
        for low, shape, strides, size in members
    ]
    cluster: list[int] = []
    end = 0
    for i in sorted(range(len(members)), key=lambda i: members[i][0]):
        if cluster and members[i][0] >= end:
            if (pair := _shared(members, n_written, sorted(cluster), end)) is not None:
                return pair
            cluster = []
        cluster.append(i)
        end = max(end, reach[i])
    return _shared(members, n_written, sorted(cluster), end)


def _shared(
    members: list[tuple[Any, ...]], n_written: int, cluster: list[int], end: int
) -> tuple[int, int] | None:
    """Do so for arrays that lie close together, below an address, by a mark for each byte."""
    if len(cluster) < 2:
        return None
    base = min(members[i][0] for i in cluster)
    marks = np.zeros(end - base, bool)

    def of(i: int) -> Any:
        low, shape, strides, size = members[i]
        axes = [axis for axis in zip(shape, strides, strict=True) if axis[0] != 1] + [(size, 1)]
        shape, strides = zip(*axes, strict=True)
        return as_strided(marks[low - base :], shape, strides)

    for i in cluster:
        if of(i).any():
            for k in cluster:
                marks[:] = False
                of(k)[...] = True
                if of(i).any():
                    return k, i
        if i < n_written:
            of(i)[...] = True
    return None


def gathered(params: Collection[Any]) -> list[Any]:
    """Return the FSDP2 modules of which some parameter is among `params`.

    A parameter does not know its module; torch's registry of such modules does.
    """
    registry = sys.modules.get("torch.distributed._composable_state")
    known = {} if registry is None else getattr(registry, "_module_state_mapping", None)
    if known is None:
        if not any(hasattr(type(param), "to_local") for param in params):
            return []
        raise RuntimeError(
            "this version of torch does not show what FSDP2 has gathered; copy ema_params() into "
            "the parameters yourself, and reshard() the modules"
        )
    found = []
    for module, reference in list(known.items()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # an older torch: a module has but one
            groups = [getattr(state, "_fsdp_param_group", None)]
        shards = [own.sharded_param for group in groups if group for own in group.fsdp_params]
        if hasattr(module, "reshard") and any(shard in params for shard in shards):
            found.append(module)
    return found
