"""Schedule-Free rules on tensors: modes, state dicts of either library, what is refused."""

import copy
import pickle
import warnings

import numpy as np
import pytest
from test_interrupts import HARNESS
from test_processes import run
from torch_cases import fo, torch

from fusedopt.formats import Stored

NAMES = ["ScheduleFreeAdamW", "ScheduleFreeSGD"]
KINDS = pytest.mark.parametrize("cls", NAMES)
SOURCE = {"ScheduleFreeAdamW": "AdamWScheduleFree", "ScheduleFreeSGD": "SGDScheduleFree"}


def peer(cls):
    source = pytest.importorskip("schedulefree", reason="compares with it: extra `peers`")
    return getattr(source, SOURCE[cls])


def leaves(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in [(700,), (3, 50), (), (0,)]]


def step(opt, params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    opt.step()


def stepped(cls, steps=3, dtype=torch.float32, make=None, **options):
    params = leaves(dtype)
    opt = (make or getattr(fo, cls))(params, **{"lr": 0.1} | options)
    opt.train()
    for seed in range(steps):
        step(opt, params, seed)
    return params, opt


def copies(params):
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@KINDS
def test_modes(cls):
    """It begins in eval mode; steps are refused there, before a closure runs; groups that are added
    have the mode of the others."""
    params = leaves()
    opt = getattr(fo, cls)(params[:2], lr=0.1)
    assert opt.param_groups[0]["train_mode"] is False
    for p in params:
        p.grad = torch.ones_like(p)
    before = copies(params)
    for closure in (None, lambda: pytest.fail("was called")):
        with pytest.raises(
            RuntimeError, match=r"^param_groups\[0\]: .* call \.train\(\) of the optim"
        ):
            opt.step(closure)
    assert same(params, before) and not opt.state
    opt.train()
    opt.step()
    opt.add_param_group({"params": params[2:]})
    assert opt.param_groups[1]["train_mode"] is True
    opt.step()
    opt.step()
    y = copies(params)
    averages = [x.clone() for x in opt.ema_params().values()]
    opt.eval()
    assert [group["train_mode"] for group in opt.param_groups] == [False, False]
    assert same(params, averages) and not same(params, y)
    versions = [p._version for p in params]
    opt.eval()
    assert same(params, averages) and [p._version for p in params] == versions
    assert same(opt.ema_params().values(), averages)
    with opt.swap_ema():
        assert same(params, averages)
        for call in (opt.train, opt.eval, opt.step, opt.ema_params):
            with pytest.raises(RuntimeError, match="leave the block of swap_ema first"):
                call()
    with pytest.raises(RuntimeError, match=r"^param_groups\[0\]: is in eval mode"):
        opt.step()
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert twin.param_groups[0]["train_mode"] is False
    opt.train()
    for a, b in zip(params, y, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    opt.step()


@KINDS
def test_swap_leaves_no_trace(cls):
    """With the bits of bfloat16 parameters that they do not show, and for other memory orders."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        params = leaves(dtype)
        params.append(torch.nn.Parameter(torch.randn(9, 4).to(dtype).t()))
        params.append(torch.nn.Parameter(torch.randn(9, 8).to(dtype)[:, ::2]))
        opt = getattr(fo, cls)(params, lr=0.1)
        opt.train()
        for seed in range(3):
            step(opt, params, seed)
        before = copies(params), copy.deepcopy(list(opt.state.values()))
        x = opt.ema_params()
        with opt.swap_ema():
            for p in params:
                assert torch.equal(p, x[p].to(dtype))
        assert same(params, before[0])
        for own, old in zip(opt.state.values(), before[1], strict=True):
            assert all(torch.equal(own[key], old[key]) for key in old)


@pytest.mark.parametrize("bits", [None, 24, 16])
def test_modes_of_16_bit_parameters(bits):
    """A parameter and the bits that it does not show are those of x, then of y again."""
    for dtype in (torch.bfloat16, torch.float16):
        if dtype == torch.float16 and bits == 24:
            continue
        params, opt = stepped(NAMES[0], dtype=dtype, master_bits=bits)
        p, own = params[0], opt.state[params[0]]

        def wide(p=p, own=own):
            if "residual" not in own:
                return p.detach().float().numpy()
            low = own["residual"].numpy()
            raw = p.detach().view(torch.int16).numpy().view("u2")
            return Stored(f"bfloat16+{low.dtype}", raw, low).decode()

        y, z = wide(), own["z"].numpy()
        x = torch.lerp(torch.from_numpy(y), own["z"], 1 - 1 / 0.9).numpy()
        assert np.array_equal(opt.ema_params()[p].numpy(), x)
        opt.eval()
        error = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        error = error if "residual" not in own else 2**-24 if bits is None else 2**-14
        np.testing.assert_allclose(wide(), x, rtol=error, atol=1e-6)
        if bits is None and dtype == torch.bfloat16:
            assert np.array_equal(wide(), x)
        assert np.array_equal(opt.ema_params()[p].numpy(), wide())
        opt.train()
        np.testing.assert_allclose(wide(), y, rtol=4 * error, atol=1e-6)
        assert np.array_equal(own["z"].numpy(), z)
        step(opt, params)


@pytest.mark.parametrize("evaluates", [False, True])
@KINDS
def test_state_dicts_of_either_library(cls, evaluates):
    """A run goes on in the other class, in either mode, as if it had been its own."""
    for first, second in ((getattr(fo, cls), peer(cls)), (peer(cls), getattr(fo, cls))):
        ends = []
        for kinds in ((first, first), (first, second)):
            params, opt = stepped(cls, make=kinds[0], warmup_steps=4)
            if evaluates:
                opt.eval()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                saved = copy.deepcopy(opt.state_dict())
            opt = kinds[1](params)
            opt.load_state_dict(saved)
            assert opt.param_groups[0]["train_mode"] is not evaluates
            assert opt.param_groups[0]["k"] == 3
            opt.train()
            for seed in range(3, 6):
                step(opt, params, seed)
            opt.eval()
            ends.append(copies(params))
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


@KINDS
def test_groups_are_the_sources(cls):
    p = [torch.nn.Parameter(torch.ones(2))]
    ours, theirs = getattr(fo, cls)(p), peer(cls)(p)
    assert ours.param_groups == theirs.param_groups
    assert list(ours.state_dict()) == list(theirs.state_dict())
    getattr(fo, cls)(p, foreach=False)
    with pytest.raises(TypeError, match="^foreach: expected True or False"):
        getattr(fo, cls)(p, foreach=2)


@KINDS
def test_a_model_saved_in_train_mode_is_warned_of(cls):
    """Once for each optimizer; not before the first step, in eval mode or within no mode at all."""
    params = leaves()
    opt = getattr(fo, cls)(params)
    opt.state_dict()
    opt.train()
    opt.state_dict()
    step(opt, params)
    opt.eval()
    opt.state_dict()
    opt.train()
    with pytest.warns(
        UserWarning, match=r"in train mode: .* call \.eval\(\) of the optimizer first"
    ):
        opt.state_dict()
    opt.state_dict()


@KINDS
def test_a_switch_that_fails_changes_nothing(cls):
    params, opt = stepped(cls)
    before, z = copies(params), opt.state[params[1]]["z"]
    for bad, error, message in [
        (
            torch.ones(3),
            ValueError,
            r"^param_groups\[0\]\['params'\]\[1\]\.z: shape \(3,\) does not",
        ),
        (torch.ones(3, 50).to_sparse(), TypeError, r"\[1\]\.z: is a sparse"),
        (3.0, TypeError, r"\[1\]\.z: is a float; expected a tensor"),
    ]:
        opt.state[params[1]]["z"] = bad
        with pytest.raises(error, match=message):
            opt.eval()
        assert same(params, before) and opt.param_groups[0]["train_mode"] is True
    opt.state[params[1]]["z"] = z
    name = "betas" if cls.endswith("AdamW") else "momentum"
    right = opt.param_groups[0][name]
    opt.param_groups[0][name] = (0.0, 0.9) if name == "betas" else 0.0
    with pytest.raises(ValueError, match=rf"^param_groups\[0\]\.{name}.*: must be between 0 and 1"):
        opt.eval()
    assert same(params, before)
    opt.param_groups[0][name] = right
    del opt.state[params[1]]["z"]
    if cls.endswith("AdamW"):
        with pytest.raises(
            ValueError, match=r"\[1\]: its state has no z, which these options need"
        ):
            step(opt, params)
        assert same(params, before)


@KINDS
def test_refused_options(cls):
    make, p = getattr(fo, cls), [torch.nn.Parameter(torch.ones(9))]
    with pytest.raises(
        ValueError, match=r"^param_groups\[0\]\.ema: schedulefree has an average of"
    ):
        make(p, ema=0.9)
    with pytest.raises(
        ValueError, match=r"^param_groups\[0\]\.state_dtype: schedulefree keeps 'z'"
    ):
        make(p, state_dtype="bfloat16")
    name = "betas" if cls.endswith("AdamW") else "momentum"
    with pytest.raises(ValueError, match="must be > 0, as without it the parameters do not depend"):
        make(p, **{name: (0.0, 0.9) if name == "betas" else 0.0})


def test_state_of_adam_is_refused():
    p = torch.nn.Parameter(torch.ones(9))
    p.grad = torch.ones(9)
    other = torch.optim.AdamW([p])
    other.step()
    opt = fo.ScheduleFreeAdamW([p])
    with pytest.raises(ValueError, match="its state has no z"):
        opt.load_state_dict(other.state_dict())
    opt.train()
    opt.step()


def test_switches_interrupted_at_any_moment():
    """All parameters and the mode have changed, or nothing has."""
    made = """
import torch, fusedopt.torch as fo
params = [torch.nn.Parameter(torch.zeros(5000)) for _ in range(30)]
opt = fo.ScheduleFreeSGD(params, lr=0.5, momentum=0.5)
opt.train()
for _ in range(3):
    for p in params:
        p.grad = torch.ones(5000)
    opt.step()
values = {True: params[0][0].item(), False: next(iter(opt.ema_params().values()))[0].item()}
assert values[True] != values[False]
"""
    act = "opt.eval(); opt.train()"
    holds = (
        "mode = opt.param_groups[0]['train_mode']; "
        "assert all((p == values[mode]).all() for p in params), mode; "
        "assert torch.is_grad_enabled()"
    )
    done = run(HARNESS.format(made=made, act=act, holds=holds, finally_=""))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
