"""Schedule-Free rules, on arrays: agreement with schedulefree 1.4.1, averages, what is refused."""

import itertools
import math

import numpy as np
import pytest
from cases import assert_same, values

import fusedopt
from fusedopt import functional, reference
from fusedopt.formats import Stored

NAMES = ["ScheduleFreeAdamW", "ScheduleFreeSGD"]
KINDS = pytest.mark.parametrize("cls", NAMES)
MODULES = pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "reference"])
MEMORY = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")
MOMENTUM = {"ScheduleFreeAdamW": "betas", "ScheduleFreeSGD": "momentum"}

# every option, with the values that are crossed
WEIGHTS = {
    "weight_decay": (0.0, 0.1),
    "warmup_steps": (0, 7),
    "r": (0.0, 1.5),
    "weight_lr_power": (2.0, 0.0),
}
OPTIONS = {
    "ScheduleFreeAdamW": {"betas": ((0.9, 0.999), (0.6, 0.5)), "eps": (1e-8, 1e-3), **WEIGHTS},
    "ScheduleFreeSGD": {"momentum": (0.9, 0.5), **WEIGHTS},
}
BOUND = {np.float32: 3e-6, np.float64: 1e-12}  # of the largest parameter


def crossed(name):
    for row in itertools.product(*OPTIONS[name].values()):
        yield dict(zip(OPTIONS[name], row, strict=True))


def rate(step):
    return 0.02 / (1 + 0.1 * (step % 7))


def start(dtype):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in [(3, 17), ()]]


def gradients(dtype, steps=25):
    rng = np.random.default_rng(1)
    shapes = [p.shape for p in start(dtype)]
    return [[rng.standard_normal(s).astype(dtype) for s in shapes] for _ in range(steps)]


def by_arrays(name, dtype, options):
    """Parameters and averages after some of the steps, and what is remembered."""
    params = start(dtype)
    opt = getattr(fusedopt, name)(params, **options)
    seen = []
    for step, grads in enumerate(gradients(dtype), 1):
        opt.step(grads)
        if step % 10 == 3:
            with opt.swap_ema():
                seen += [p.copy() for p in params]
            seen += [p.copy() for p in params]
    return seen + params, {key: opt.param_groups[0][key] for key in MEMORY}


def by_tensors(make, dtype, options):
    """The same of an optimizer of torch's, with a switch to eval mode and back."""
    import torch

    options, lr = dict(options), options.get("lr")
    if callable(lr):
        del options["lr"]
    params = [torch.tensor(p, requires_grad=True) for p in start(dtype)]
    opt = make(params, **options)
    opt.train()
    seen = []
    for step, grads in enumerate(gradients(dtype), 1):
        if callable(lr):
            opt.param_groups[0]["lr"] = lr(step)
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        opt.step()
        if step % 10 == 3:
            for mode in (opt.eval, opt.train):
                mode()
                mode()
                seen += [p.detach().numpy().copy() for p in params]
    seen += [p.detach().numpy() for p in params]
    return seen, {key: opt.param_groups[0][key] for key in MEMORY}


def assert_close(ours, theirs, dtype):
    largest = max(np.abs(p).max() for p in theirs)
    worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    assert worst <= BOUND[dtype] * largest, worst / largest


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: d.__name__)
@KINDS
def test_agrees_with_its_source(cls, dtype, schedule):
    """Every option crossed, 25 steps, with switches: arrays and tensors."""
    pytest.importorskip("torch", reason="compares with schedulefree: extra `peers`")
    source = pytest.importorskip("schedulefree", reason="compares with it: extra `peers`")
    import fusedopt.torch as fo

    theirs_is = {"ScheduleFreeAdamW": "AdamWScheduleFree", "ScheduleFreeSGD": "SGDScheduleFree"}
    for options in crossed(cls):
        options |= {"lr": rate} if schedule else {}
        theirs, remembered = by_tensors(getattr(source, theirs_is[cls]), dtype, options)
        for ours, memory in (
            by_arrays(cls, dtype, options),
            by_tensors(getattr(fo, cls), dtype, options),
        ):
            assert_close(ours, theirs, dtype)
            assert memory == remembered


@KINDS
def test_agrees_with_the_paper(cls):
    """Algorithm 1: x, the weighted mean of all z, is kept and interpolated, in float64."""
    for options in crossed(cls):
        options |= {"lr": rate}
        o = getattr(fusedopt, cls).rule.defaults | options
        beta1, beta2 = o.get("betas", (o.get("momentum"), None))
        z, total, most, v = start(np.float64), 0.0, 0.0, [0.0, 0.0]
        x = [p.copy() for p in z]
        seen = []
        for k, grads in enumerate(gradients(np.float64), 1):
            y = [(1 - beta1) * a + beta1 * b for a, b in zip(z, x, strict=True)]
            lr = rate(k) * min(1, k / max(1, o["warmup_steps"]))
            most = max(most, lr)
            weight = k ** o["r"] * most ** o["weight_lr_power"]
            total += weight
            for i, g in enumerate(grads):
                way = g
                if beta2 is not None:
                    v[i] = beta2 * v[i] + (1 - beta2) * g**2
                    way = g / (np.sqrt(v[i] / (1 - beta2**k)) + o["eps"])
                z[i] = z[i] - lr * (way + o["weight_decay"] * y[i])
                x[i] = x[i] + weight / total * (z[i] - x[i])
            y = [(1 - beta1) * a + beta1 * b for a, b in zip(z, x, strict=True)]
            if k % 10 == 3:
                seen += [*map(np.copy, x), *map(np.copy, y)]
        assert_close(by_arrays(cls, np.float64, options)[0], seen + y, np.float64)


@MODULES
@KINDS
def test_averages(cls, module):
    """By group, also of 16-bit parameters and of leaves without a gradient; y is back bit for bit.

    ``ema_params`` returns copies.
    """
    params = [values(n, np.float32, n, False).astype(t) for n, t in ((700, "f4"), (9, "f2"))]
    params += [np.asfortranarray(values(60, np.float64, 60, False).reshape(5, 12)), np.ones(3)]
    name = MOMENTUM[cls]
    other = (0.5, 0.9) if name == "betas" else 0.5
    opt = getattr(module, cls)(
        [{"params": params[:2]}, {"params": params[2:], name: other}], lr=0.1
    )
    for step in range(4):
        grads = [
            values(p.size, np.float32, step, False).reshape(p.shape, order="A") for p in params
        ]
        opt.step([grads[:2], [grads[2], None]])
    before = [p.copy(order="K") for p in params]
    averages = opt.ema_params()
    for i, (p, own) in enumerate(zip(params, opt.state.values(), strict=True)):
        beta1 = 0.9 if i < 2 else 0.5
        x = p + (own["z"] - p) * own["z"].dtype.type(1 - 1 / beta1)
        average = list(averages.values())[i]
        assert average.dtype == own["z"].dtype and average.tobytes("A") == x.tobytes("A")
        assert not np.may_share_memory(average, p) and not np.may_share_memory(average, own["z"])
        assert (i < 3) == (not np.array_equal(x, p))
    with pytest.raises(ZeroDivisionError):
        with opt.swap_ema():
            for p, average in zip(params, averages.values(), strict=True):
                assert np.array_equal(p, average.astype(p.dtype))
            for call in (
                lambda: opt.step([grads[:2], grads[2:]]),
                lambda: opt.save("x.npz"),
                opt.ema_params,
                opt.swap_ema().__enter__,
            ):
                with pytest.raises(RuntimeError, match="leave the block of swap_ema first"):
                    call()
            params[0][...] = 3
            raise ZeroDivisionError
    assert_same(before, params, [str(i) for i in range(4)])


@MODULES
def test_averages_of_bfloat16_parameters(module):
    """The block shows x rounded to nearest; y is back with the bits that it does not show."""
    bfloat16 = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays come from it").bfloat16
    for bits in (32, 24, 16):
        p = values(500, np.float32, 1, False).astype(bfloat16)
        opt = getattr(module, NAMES[0])(p, lr=0.1, master_bits=bits)
        for step in range(5):
            opt.step(values(500, np.float32, 2 + step, False))
        y, shown, z = opt.master_params()["params"], p.copy(), opt.state["params"]["z"]
        (x,) = opt.ema_params().values()
        np.testing.assert_array_equal(x, y + (z - y) * np.float32(1 - 1 / 0.9))
        with opt.swap_ema():
            nearest = np.empty_like(p)
            Stored("bfloat16", nearest).encode(x)
            assert p.tobytes() == nearest.tobytes()
        assert p.tobytes() == shown.tobytes()
        assert opt.master_params()["params"].tobytes() == y.tobytes()


@KINDS
def test_resumed_runs_are_uninterrupted(cls, tmp_path):
    """From the parameters, which are y, and a file, which says so."""
    p, g = values(700, np.float32, 1, False), values(700, np.float32, 2, False)
    opt = getattr(fusedopt, cls)(p, lr=0.1, warmup_steps=5)
    for _ in range(3):
        opt.step(g)
    opt.save(tmp_path / "a.npz")
    assert opt.state_dict()["param_groups"][0]["train_mode"] is True
    q = p.copy()
    other = getattr(fusedopt, cls)(q)
    other.load(tmp_path / "a.npz")
    for each in (opt, other):
        each.step(g)
    assert_same([p, *opt.ema_params().values()], [q, *other.ema_params().values()], ["y", "x"])


@MODULES
@KINDS
def test_refused_options(cls, module):
    make, p = getattr(module, cls), np.ones(5000, np.float32)
    with pytest.raises(
        ValueError, match="^ema: schedulefree has an average of its own, which swap"
    ):
        make(p, ema=0.9)
    for narrow in ("bfloat16", "int8"):
        with pytest.raises(ValueError, match=f"^state_dtype: .*'z', for which '{narrow}' is too n"):
            make(p, state_dtype=narrow)
    zero = (0.0, 0.9) if cls.endswith("AdamW") else 0.0
    name = r"betas\[0\]" if cls.endswith("AdamW") else "momentum"
    with pytest.raises(ValueError, match=f"^{name}: must be > 0, as without it"):
        make(p, **{MOMENTUM[cls]: zero})
    with pytest.raises(TypeError, match="^warmup_steps: expected a whole number"):
        make(p, warmup_steps=1.5)
    with pytest.raises(TypeError, match="unknown option 'train_mode'"):
        make(p, train_mode=False)
    opt = make(p)
    opt.step(p.copy())
    before = p.copy()
    opt.param_groups[0]["train_mode"] = False
    with pytest.raises(ValueError, match=r"^param_groups\[0\].train_mode: must be True, as arrays"):
        opt.step(p.copy())
    saved = opt.state_dict()
    assert saved["param_groups"][0]["train_mode"] is True
    saved["param_groups"][0]["train_mode"] = False
    with pytest.raises(
        ValueError, match=r"^state dict: param_groups\[0\].train_mode: must be True"
    ):
        opt.load_state_dict(saved)
    assert np.array_equal(p, before)


@MODULES
@KINDS
def test_numbers_at_the_border(cls, module):
    """No weight at all; one that double does not hold; no gradient."""
    make, p = getattr(module, cls), np.array([1.0, -2.0])
    opt = make(p, lr=0.0, weight_decay=0.1)
    for _ in range(3):
        opt.step(np.array([1.0, 0.0]))
    assert opt.param_groups[0]["weight_sum"] == 0 and p.tolist() == [1, -2]
    opt.param_groups[0]["lr"] = 0.1
    opt.step(np.zeros(2))
    assert opt.param_groups[0]["weight_sum"] == pytest.approx(0.01)
    assert np.allclose(p, [0.99, -1.98], rtol=1e-3)  # z has moved by the decay, and y is z
    with opt.swap_ema():
        assert np.isfinite(p).all()
    still = make(np.zeros(70, np.float32))
    still.step(np.zeros(70, np.float32))
    assert all(
        (a == 0).all() for a in (still.param_groups[0]["params"], *still.ema_params().values())
    )
    for options in ({"lr": 0.0, "weight_lr_power": -1.0}, {"lr": 1e300}, {"r": 1e6}):
        q = np.ones(2)
        opt = make(q, **{"lr": 0.1} | options)
        with pytest.raises(
            ValueError, match=r"^param_groups\[0\]: in this step weight_sum: must be"
        ):
            for _ in range(2):
                opt.step(np.zeros(2))
        assert opt.param_groups[0]["k"] == opt.state["params"]["step"] <= 1
        assert (q == 1).all()


@KINDS
def test_functions(cls):
    """With what the class remembers of each step: its bits."""
    ours, theirs = (values(700, np.float32, 1, False) for _ in range(2))
    options = {"lr": 0.1, "warmup_steps": 3, "r": 1.0, "weight_decay": 0.1}
    opt = getattr(fusedopt, cls)(ours, **options)
    states = [[theirs.copy()], [np.zeros_like(theirs)]][: 1 + cls.endswith("AdamW")]
    for step in range(1, 6):
        g = values(700, np.float32, step, False)
        opt.step(g)
        now = {key: opt.param_groups[0][key] for key in ("k", "weight_sum", "lr_max")}
        getattr(functional, cls.lower())([theirs], [g], *states, step=step, **options, **now)
    assert_same([ours], [theirs], ["param"])
    with pytest.raises(TypeError, match="needs k, weight_sum, lr_max: values in this step"):
        getattr(functional, cls.lower())([theirs], [g], *states, step=6)
    with pytest.raises(ValueError, match="^weight_sum: the weight of step 1, .* is beyond double"):
        getattr(functional, cls.lower())(
            [theirs], [g], *states, step=6, k=1, lr_max=1.0, weight_sum=math.ulp(0.0)
        )
    assert_same([ours], [theirs], ["param"])


def test_functions_take_a_narrow_second_moment():
    """The formats of a function's arrays are the caller's; of z only wide ones."""
    p, g = values(700, np.float32, 1, False), values(700, np.float32, 2, False)
    now = {"step": 1, "k": 1, "weight_sum": 0.01, "lr_max": 0.1, "lr": 0.1}
    codes = Stored("uint8", np.zeros(700, np.uint8), np.zeros(11, np.uint8))
    functional.schedulefreeadamw([p], [g], [p.copy()], [codes], **now)
    assert np.isfinite(p).all() and codes.decode().any()
    with pytest.raises(ValueError, match=r"^zs\[0\]: .* for which float16 is too narrow"):
        functional.schedulefreeadamw([p], [g], [p.astype(np.float16)], [codes], **now)
