"""`cautious=True`: agreement with timm 1.0.31's formula, borders, groups that differ, ranks."""

import itertools

import numpy as np
import pytest
from cases import assert_same, isa, threads, values

import fusedopt
from fusedopt import _core, functional, reference

MODULES = pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "reference"])
KINDS = pytest.mark.parametrize("cls", ["AdamW", "Lion"])
BOUND = {np.float32: 3e-6, np.float64: 1e-12}  # of the largest parameter
COMMON = {"weight_decay": (0.0, 0.1), "maximize": (False, True)}
OPTIONS = {
    "AdamW": {"betas": ((0.9, 0.999), (0.6, 0.5)), "eps": (1e-8, 1e-3), "amsgrad": (False, True)},
    "Lion": {"betas": ((0.9, 0.99), (0.5, 0.9))},
}


def rate(step):
    return 0.02 / (1 + 0.1 * (step % 7))


def mask_of(update, grad):
    """timm: (update * grad > 0), divided by its mean, which is at least 1e-3."""
    mask = (update * grad > 0).astype(grad.dtype)
    return mask / np.maximum(mask.mean(), 1e-3) if mask.size else mask


def timm_adamw(p, g, state, t, lr, betas, eps, weight_decay, amsgrad, maximize):
    """A step of timm's _single_tensor_adamw with caution."""
    g = -g if maximize else g
    p *= 1 - lr * weight_decay
    m, v, x = state
    m += (g - m) * (1 - betas[0])
    v *= betas[1]
    v += (1 - betas[1]) * g * g
    np.maximum(x, v, out=x)
    d = np.sqrt(x if amsgrad else v) / (1 - betas[1] ** t) ** 0.5 + eps
    p -= lr / (1 - betas[0] ** t) * (m * mask_of(m, g)) / d


def timm_lion(p, g, state, t, lr, betas, weight_decay, maximize):
    """A step of timm's _single_tensor_lion with caution."""
    g = -g if maximize else g
    p *= 1 - lr * weight_decay
    m = state[0]
    update = np.sign(m + (1 - betas[0]) * (g - m))
    p -= lr * update * mask_of(update, g)
    m += (1 - betas[1]) * (g - m)


@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: d.__name__)
@KINDS
def test_agrees_with_timm(cls, dtype):
    """Every option crossed, 25 steps, a rate that changes."""
    source = {"AdamW": timm_adamw, "Lion": timm_lion}[cls]
    crossed = OPTIONS[cls] | COMMON
    for row in itertools.product(*crossed.values()):
        options = dict(zip(crossed, row, strict=True))
        rng = np.random.default_rng(0)
        start = [rng.standard_normal(shape).astype(dtype) for shape in [(3, 17), (), (2, 300)]]
        ours, theirs = [p.copy() for p in start], [p.copy() for p in start]
        states = [[np.zeros_like(p) for _ in range(3)] for p in start]
        opt = getattr(fusedopt, cls)(ours, lr=rate, cautious=True, **options)
        for step in range(1, 26):
            grads = [rng.standard_normal(p.shape).astype(dtype) for p in start]
            opt.step(grads)
            for p, g, state in zip(theirs, grads, states, strict=True):
                source(p, np.asarray(g), state, step, rate(step), **options)
        largest = max(np.abs(p).max() for p in theirs)
        worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
        assert worst <= BOUND[dtype] * largest, (options, worst / largest)


@MODULES
@KINDS
def test_masks(cls, module):
    """None, one, most or all of a leaf's elements move; each leaf has a count of its own."""
    make = getattr(module, cls)
    for n, moving in [(1, 0), (1, 1), (1000, 1), (5000, 1), (1000, 999), (64, 64), (0, 0)]:
        p, other = np.zeros(n), np.zeros(3)
        opt = make([p, other], lr=1.0, betas=(0.9, 0.9), weight_decay=0.0, cautious=True)
        first = np.ones(n)
        opt.step([first, np.ones(3)])
        p[...], other[...] = 0, 0
        second = np.where(np.arange(n) < moving, 1.0, -0.1)  # the mean is still positive
        opt.step([second, np.ones(3)])
        assert np.isfinite(p).all()
        assert (p[:moving] < 0).all() and (p[moving:] == 0).all()
        np.testing.assert_allclose(other, -1, rtol=1e-6)
        if moving and cls == "Lion":
            np.testing.assert_allclose(p[:moving], -min(n / moving, 1000), rtol=1e-12)


@MODULES
@KINDS
def test_border_values(cls, module):
    """Gradients of 0 move nothing; a NaN stays in its element; tiny ones move as others do."""
    p = np.ones(200, np.float32)
    opt = getattr(module, cls)(p, lr=0.5, weight_decay=0.0, cautious=True)
    for _ in range(2):
        opt.step(np.zeros(200, np.float32))
    assert (p == 1).all()
    opt.step(np.full(200, 1e-30, np.float32))  # whose product with the mean is 0 in float32
    assert (p < 1).all() if cls == "Lion" else np.isfinite(p).all()
    g = np.ones(200, np.float32)
    g[7], g[9] = np.nan, np.inf
    for _ in range(2):
        opt.step(g)
    assert np.isnan(p[7])
    assert np.isfinite(np.delete(p, [7, 9])).all()


@pytest.mark.parametrize("name", _core.available_isas())
@KINDS
def test_groups_that_differ(cls, name):
    """Groups, leaves and times at which the option is off are stepped as by the plain rule."""
    options = {"lr": 0.1, "weight_decay": 0.1} | ({"amsgrad": True} if cls == "AdamW" else {})
    shapes = [5000, 70, 3, 0]

    def run(module, flags, state_dtype):
        arrays = [values(n, np.float32, n, False) for n in shapes]
        groups = [{"params": arrays[:2], "cautious": flags[0][0]}, {"params": arrays[2:]}]
        opt = getattr(module, cls)(groups, **options, state_dtype=state_dtype)
        for step, row in enumerate(flags):
            for group, flag in zip(opt.param_groups, row, strict=True):
                group["cautious"] = flag
            grads = [values(n, np.float32, 10 * step + n, False) for n in shapes]
            opt.step([grads[:2], grads[2:]], stats=step % 2 == 0, max_grad_norm=5.0)
        states = [getattr(a, "data", a) for s in opt.state.values() for a in s.values()]
        return arrays, [np.asarray(a) for a in states]

    rows = [(False, False), (True, False), (False, True), (True, True), (False, False)]
    with isa(name), threads(2):
        for state_dtype in (None, "bfloat16", "int8"):
            (ours, state), (theirs, its) = (
                run(module, rows, state_dtype) for module in (fusedopt, reference)
            )
            assert_same(ours + state, theirs + its, [str(i) for i in range(len(ours + state))])
        mixed, _ = run(fusedopt, [(True, False)] * 4, None)
        plain, _ = run(fusedopt, [(False, False)] * 4, None)
        both, _ = run(fusedopt, [(True, True)] * 4, None)
        assert_same(mixed[:2] + mixed[2:], both[:2] + plain[2:], list("0123"))
        assert not np.array_equal(mixed[0], plain[0])


@KINDS
def test_checkpoints_and_errors(cls, tmp_path):
    make = getattr(fusedopt, cls)
    p, q = np.ones(9), np.ones(9)
    opt, other = make(p, cautious=True), make(q)
    opt.step(np.ones(9))
    opt.save(tmp_path / "a.npz")
    q[...] = p
    other.load(tmp_path / "a.npz")
    assert other.param_groups[0]["cautious"] is True
    g = np.where(np.arange(9) < 3, 1.0, -0.01)
    for each in (opt, other):
        each.step(g)
    assert np.array_equal(p, q)
    with pytest.raises(TypeError, match="^cautious: expected True or False, got 1"):
        make(p, cautious=1)
    with pytest.raises(TypeError, match="^Adam: unknown option 'cautious'"):
        fusedopt.Adam(p, **{"cautious": True})
    assert "cautious" in functional.adamw.__signature__.parameters


@KINDS
def test_no_direction_is_measured_without_it(cls):
    """The row of the C table is the plain one; one cautious group makes it the other."""
    opt = getattr(fusedopt, cls)([{"params": np.ones(9)}, {"params": np.ones(3)}])
    called = []
    opt.step([np.ones(9), np.ones(3)], reduce=called.append)
    assert not called
    opt.param_groups[1]["cautious"] = True
    opt.step([np.ones(9), np.ones(3)], reduce=called.append)
    assert len(called) == 1
    opt.param_groups[1]["cautious"] = False
    opt.step([np.ones(9), np.ones(3)], reduce=called.append)
    assert len(called) == 1


@KINDS
def test_torch(cls):
    """A state dict has it where it is on, also one that went through torch's class."""
    torch = pytest.importorskip("torch", reason="tests the PyTorch adapter: extra `torch`")
    import fusedopt.torch as fo

    def made(kind, **options):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n)) for n in (300, 5)]
        return params, kind(params, lr=0.1, **options)

    def step(params, opt, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()

    make = getattr(fo, cls)
    params, opt = made(make, cautious=True)
    arrays = [p.detach().numpy().copy() for p in params]
    plain = getattr(reference, cls)(arrays, lr=0.1, cautious=True)
    for seed in range(4):
        step(params, opt, seed)
        plain.step([p.grad.numpy() for p in params])
    assert_same([p.detach().numpy() for p in params], arrays, ["0", "1"])
    with pytest.raises(TypeError, match="cautious: expected True or False"):
        made(make, cautious=1)
    opt.param_groups[0]["cautious"] = "yes"
    with pytest.raises(TypeError, match=r"^param_groups\[0\]\.cautious: expected True or False"):
        step(params, opt, 5)
    opt.param_groups[0]["cautious"] = True
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "cautious": False})
    assert [group["cautious"] for group in opt.param_groups] == [True, False]
    if cls == "AdamW":
        assert "cautious" not in made(make)[1].param_groups[0]
        theirs, peer = made(torch.optim.AdamW)
        ours, other = made(make, cautious=True)
        step(ours, other, 0)
        peer.load_state_dict(other.state_dict())
        step(theirs, peer, 1)
        other.load_state_dict(peer.state_dict())
        assert other.param_groups[0]["cautious"] is True
        fresh, last = made(make)
        last.load_state_dict(peer.state_dict())
        assert last.param_groups[0]["cautious"] is True  # as all options of a state dict
        step(fresh, last, 2)
