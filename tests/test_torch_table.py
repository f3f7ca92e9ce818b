"""fusedopt.torch: every rule with every option, storage and size of a model, bit for bit.

The oracle is `fusedopt.reference`, with the same arrays, options and gradients.
"""

import inspect
import itertools

import numpy as np
import pytest
from cases import CASES, EVERY_CLASS, FACTOR_CASES, STEP_OPTIONS, canonical, takes
from torch_cases import ANY_SHAPE, evaluating, fo, torch, training

from fusedopt import reference

ml_dtypes = pytest.importorskip("ml_dtypes")

# every case whose options the class for torch has (no torch optimizer has L1)
RULES = [
    (case.cls, case.options | case.class_options)
    for case in [*CASES, *FACTOR_CASES]
    if {*case.options, *case.class_options}
    <= {*inspect.signature(getattr(fo, case.cls)).parameters}
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
ROWS = [(*rule, *kept) for rule in RULES for kept in STORAGE if takes(rule[0], kept[1])]
AVERAGES = [{}, {"ema": 0.9}, {"ema": 0.9, "ema_warmup": True}]
# (averages, options of the step): each case of a rule takes some rows, all its cases together most
OPTION_ROWS = [
    *itertools.product(AVERAGES, [{}, {"stats": True}, {"max_grad_norm": 0.5}]),
    *zip(itertools.cycle(AVERAGES), STEP_OPTIONS, strict=False),
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
    """Every entry of a leaf's state against the reference's; there are no others."""
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


def test_all_optimizers_are_here():
    assert set(fo.__all__) == {cls.__name__ for cls in EVERY_CLASS}
    assert set(ANY_SHAPE) == {name for name, _ in RULES}


@pytest.mark.parametrize("shapes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("name", "options", "dtype", "storage"), ROWS, ids=str)
def test_bits(name, options, dtype, storage, shapes):
    turn = RULES.index((name, options)) + STORAGE.index((dtype, storage))
    check_bits(name, options, dtype, storage, shapes, turn)


def check_bits(name, options, dtype, storage, shapes, turn):
    """Options of a step are given to the constructor, or to the step; with copies or without.

    One model has other rows of options than the other.
    """
    turn += 4 * (len(shapes) == 1)
    for row, (averages, step_options) in list(enumerate(OPTION_ROWS))[turn % 8 :: 8]:
        if not takes(name, averages):
            averages = {}
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        params = [torch.nn.Parameter(p.clone()) for p in start]
        arrays = [as_numpy(p.clone()) for p in start]
        now = dict(step_options)
        made = {} if row % 3 else {k: now.pop(k) for k in step_options if k != "grad_scale"}
        narrow = torch.bfloat16 if row % 3 else torch.float16
        copies = [torch.zeros(p.shape, dtype=narrow) for p in start] if row // 4 % 2 else None
        theirs = copies and [as_numpy(copy.clone()) for copy in copies]
        opt = training(getattr(fo, name)(params, **options, **storage, **averages, **made))
        peer = getattr(reference, name)(arrays, **options, **storage, **averages)
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            if step == 1:
                params[-1].grad = None
            grads = [None if p.grad is None else as_numpy(p.grad.clone()) for p in params]
            opt.step(copy_out=copies, **now)
            result = peer.step(grads, copy_out=theirs, **step_options)
            case = f"{averages} {step_options}"
            for p, a, g in zip(params, arrays, grads, strict=True):
                assert raw(as_numpy(p.detach())) == raw(a), case
                assert g is None or raw(as_numpy(p.grad)) == raw(g), case
            for a, b in zip(copies or [], theirs or [], strict=True):
                assert raw(as_numpy(a)) == raw(b), case
            assert opt.last_step[:-1] == result[:-1], case
            assert (result.stats is not None) == (bool(step_options.get("stats")) > result.skipped)
            if result.stats is not None:
                for column in result.stats.COLUMNS:
                    a, b = getattr(opt.last_step.stats, column), getattr(result.stats, column)
                    np.testing.assert_array_equal(a, b, column)
        for p, own in zip(params, peer.state.values(), strict=True):
            check_state(opt.state[p] if p in opt.state else {}, own)


@pytest.mark.parametrize(("name", "options", "dtype", "storage"), ROWS, ids=str)
def test_another_default_device(name, options, dtype, storage):
    """State is on its parameter's device, step counts on the CPU; also if copies are stepped."""
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        wide = torch.randn(30, 40).to(dtype)
        params = [
            torch.nn.Parameter(p)
            for p in (torch.randn(700).to(dtype), wide[:, :20], wide[:, 20:].t().contiguous().t())
        ]
        grads = [torch.randn(p.shape).to(dtype) for p in params]
        averages = {"ema": 0.9} if takes(name, {"ema": 0.9}) else {}
        opt = training(
            getattr(fo, name)(params, **averages, max_grad_norm=1.0, **options, **storage)
        )
        torch.set_default_device(device)
        try:
            for _ in range(2):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
                opt.step()
                evaluating(opt)
                opt.load_state_dict(opt.state_dict())
                training(opt)
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
