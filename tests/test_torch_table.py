"""fusedopt.torch: every rule with every option, storage and size of a model, bit for bit.

The oracle is `fusedopt.reference`, with the same arrays, options and gradients.
"""

import itertools

import numpy as np
import pytest
from cases import canonical
from torch_cases import fo, torch

from fusedopt import reference

ml_dtypes = pytest.importorskip("ml_dtypes")

RULES = [
    ("Adam", {"lr": 0.1}),
    ("Adam", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.1, "amsgrad": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
]
STORAGE = [
    (torch.float32, {}),
    (torch.float64, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"master_bits": 24}),
    (torch.bfloat16, {"master_bits": 16, "seed": 3}),
    (torch.float16, {}),
    (torch.float32, {"state_dtype": "bfloat16"}),
    (torch.float32, {"state_dtype": "int8", "min_8bit_size": 64, "seed": 5}),
    (torch.bfloat16, {"state_dtype": "int8", "min_8bit_size": 64}),
]
AVERAGES = [{}, {"ema": 0.9}, {"ema": 0.9, "ema_warmup": True}]
AROUND = [
    {},
    {"stats": True},
    {"max_grad_norm": 0.5},
    {"max_grad_norm": float("inf")},
    {"max_grad_norm": 0.5, "stats": True},
]
MODELS = {"one": [(700,)], "several": [(7, 90), (9,), (), (0,), (3, 50)]}


def as_numpy(tensor):
    """The same memory: bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def raw(array):
    return canonical(array) if array.dtype in (np.float32, np.float64) else array.tobytes()


def check_state(own, theirs):
    """Every entry of a leaf's state against the reference's, and none too many."""
    seen = set()
    for key, value in own.items():
        if key == "step":
            assert value == theirs["step"]
            continue
        name = key.removesuffix("_codes").removesuffix("_blocks")
        seen.add(name)
        stored = theirs[name]
        array = stored if isinstance(stored, np.ndarray) else stored.data
        assert (array.dtype == np.uint8) == (key != name), key
        if key.endswith("_blocks"):
            array = stored.extra
        assert raw(as_numpy(value)) == raw(array.view(as_numpy(value).dtype)), key
    assert seen == set(theirs) - {"step"}


@pytest.mark.parametrize("shapes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("dtype", "storage"), STORAGE, ids=str)
@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_bits(name, options, dtype, storage, shapes):
    for averages, around in itertools.product(AVERAGES, AROUND):
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        params = [torch.nn.Parameter(p.clone()) for p in start]
        arrays = [as_numpy(p.clone()) for p in start]
        opt = getattr(fo, name)(params, **options, **storage, **averages, **around)
        peer = getattr(reference, name)(arrays, **options, **storage, **averages)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            opt.step()
            result = peer.step([as_numpy(p.grad) for p in params], **around)
            case = f"{averages} {around}"
            for p, a in zip(params, arrays, strict=True):
                assert raw(as_numpy(p.detach())) == raw(a), case
            if around:
                ours = opt.last_step
                assert (ours.step, ours.grad_norm, ours.clip_factor) == (
                    result.step, result.grad_norm, result.clip_factor
                ), case  # fmt: skip
            if around.get("stats"):
                for column in result.stats.COLUMNS:
                    a, b = getattr(ours.stats, column), getattr(result.stats, column)
                    np.testing.assert_array_equal(a, b, column)
        for p, theirs in zip(params, peer.state.values(), strict=True):
            check_state(opt.state[p] if p in opt.state else {}, theirs)


@pytest.mark.parametrize(("dtype", "storage"), STORAGE, ids=str)
@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_another_default_device(name, options, dtype, storage):
    """State lies beside its parameter, a count of steps on the CPU; also where copies stand in."""
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        wide = torch.randn(30, 40).to(dtype)
        params = [
            torch.nn.Parameter(p)
            for p in (torch.randn(700).to(dtype), wide[:, :20], wide[:, 20:].t().contiguous().t())
        ]
        grads = [torch.randn(p.shape).to(dtype) for p in params]
        opt = getattr(fo, name)(params, ema=0.9, max_grad_norm=1.0, **options, **storage)
        torch.set_default_device(device)
        try:
            for _ in range(2):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
                opt.step()
                opt.load_state_dict(opt.state_dict())
            with opt.swap_ema():
                pass
        finally:
            torch.set_default_device(None)
        tensors = [v for p in params for v in opt.state[p].values()]
        assert all(str(tensor.device) == "cpu" for tensor in tensors)
        results.append([tensor.clone() for tensor in (*params, *tensors)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_another_default_dtype(wide):
    """Steps are counted in torch's dtype: bfloat16 would count to 256."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(wide)
    try:
        dtypes = []
        for module in (fo, torch.optim):
            p = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
            p.grad = torch.ones(3, dtype=torch.float32)
            opt = module.Adam([p])
            opt.step()
            dtypes.append({key: value.dtype for key, value in opt.state[p].items()})
        assert dtypes[0] == dtypes[1]
    finally:
        torch.set_default_dtype(before)
