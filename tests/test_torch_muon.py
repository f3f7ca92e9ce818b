"""Rules that step matrices alone, in fusedopt.torch: whose direction torch's own products make."""

import copy
import io
import pickle

import numpy as np
import pytest
from cases import ALL_STEP_OPTIONS, MATRIX_CASES
from test_torch_table import STORAGE, check_bits
from torch_cases import fo, leaf, since, torch

import fusedopt
from fusedopt.optim import muon as module

SHAPES = [(7, 90), (90, 7), (1, 60), (60, 1), (0, 5), (5, 0), (1, 1), (33, 33)]
MODELS = {"one": [(30, 50)], "several": SHAPES}
EACH = pytest.mark.parametrize("case", MATRIX_CASES, ids=str)


def parameters(seed=0, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(p.to(dtype)) for p in drawn]


def give(params, seed):
    drawn = parameters(seed, torch.float64, [p.shape for p in params])
    for p, g in zip(params, drawn, strict=True):
        p.grad = g.detach().to(p.dtype)


def contents(opt):
    """All that a step may change, with the gradients."""
    params = [p for group in opt.param_groups for p in group["params"]]
    found = [opt.last_step.step, len(opt.state)]
    for p in params:
        found += [p.detach().clone(), None if p.grad is None else p.grad.clone()]
        found += [(name, value.clone()) for name, value in opt.state.get(p, {}).items()]
    return found


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    """Products of small matrices take long where threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the step


@pytest.fixture
def numpy_uses_torch(monkeypatch):
    """The NumPy reference computes its products as fusedopt.torch does, so that bits are equal."""

    def iterate(u, *args):
        return module._in_bfloat16(torch.from_numpy(u), *args).float().numpy()

    monkeypatch.setattr(module, "_in_place", iterate)


@pytest.mark.parametrize("shapes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("dtype", "storage"), STORAGE, ids=str)
@EACH
def test_bits(case, dtype, storage, shapes, numpy_uses_torch):
    """With the same products, all else is the reference's: every storage, options of a step."""
    turn = MATRIX_CASES.index(case) + STORAGE.index((dtype, storage))
    check_bits(case.cls, case.options, dtype, storage, shapes, turn)


@since("2.9")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("options", [
    {},
    {"nesterov": False},
    {"momentum": 0.3, "weight_decay": 0.0, "lr": 1e-4},  # bfloat16 rounds some bits apart
    {"momentum": 0.0, "nesterov": False},
    {"adjust_lr_fn": "match_rms_adamw", "lr": 3e-4},
    {"adjust_lr_fn": "original", "ns_steps": 2, "eps": 1e-2},
    {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 9},
    {"ns_steps": 0},
], ids=str)  # fmt: skip
def test_agrees_with_torch(options, dtype, bound):
    """Over 25 steps; the last ten after both have exchanged their states."""
    shapes = [shape for shape in SHAPES if shape != (5, 0)]  # where torch divides by 0
    ours, theirs = (parameters(0, dtype, shapes) for _ in range(2))
    opt, peer = fo.Muon(ours, **options), torch.optim.Muon(theirs, **options)
    assert isinstance(opt, torch.optim.Muon)
    for seed in range(1, 26):
        give(ours, seed)
        give(theirs, seed)
        opt.step()
        peer.step()
        if seed == 15:
            mine, its = copy.deepcopy(opt.state_dict()), copy.deepcopy(peer.state_dict())
            assert mine["param_groups"] == its["param_groups"]
            assert {*mine["state"][0]} == {*its["state"][0]} == {"momentum_buffer"}
            opt, peer = fo.Muon(ours, lr=9.0), torch.optim.Muon(theirs, lr=9.0)
            opt.load_state_dict(its)
            peer.load_state_dict(mine)
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            assert (p - q).abs().max() <= bound * q.abs().max()


@pytest.mark.parametrize("storage", [{}, {"state_dtype": "int8", "min_8bit_size": 0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_orders(dtype, storage):
    """Of parameters: transposed, strided, negative; of gradients: another than the parameter's.

    The products round differently in another order.
    """
    shape, results = (24, 32), []
    for views in (False, True):
        made = [p.detach() for p in parameters(dtype=dtype, shapes=[shape] * 4)]
        if views:
            gaps = torch.zeros(48, 32, dtype=dtype)[::2]
            transposed, negative = made[1].t().contiguous().t(), torch._neg_view(-made[3])
            made[1:] = [transposed, gaps.copy_(made[2]), negative]
        params = [torch.nn.Parameter(p) for p in made]
        assert [p.is_contiguous() and not p.is_neg() for p in params].count(False) == 3 * views
        opt = fo.Muon(params, lr=0.01, **storage)
        for seed in range(1, 4):
            give(params, seed)
            for p in params if views else ():
                p.grad = p.grad.t().contiguous().t()
            opt.step()
        results.append([p.detach().clone() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.resolve_neg(), b.resolve_neg(), rtol=1e-2, atol=1e-3)


def test_another_default_device():
    results = []
    for device in ("cpu", "meta"):
        params = parameters()
        opt = fo.Muon(params, ema=0.9, max_grad_norm=1.0)
        give(params, 1)
        torch.set_default_device(device)
        try:
            opt.step()
        finally:
            torch.set_default_device(None)
        results.append(contents(opt))
    assert equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_zero(dtype):
    params = parameters(dtype=dtype)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    fo.Muon(params, lr=0.5).step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old * 0.95)


def test_groups_of_other_options():
    """As two optimizers; also where an option changes between steps."""
    first, second = {"lr": 0.1, "ns_steps": 2}, {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    params, twins = parameters(shapes=SHAPES[:4]), parameters(shapes=SHAPES[:4])
    opt = fo.Muon([{"params": params[:2], **first}, {"params": params[2:], **second}])
    apart = [fo.Muon(twins[:2], **first), fo.Muon(twins[2:], **second)]
    for seed in range(1, 5):
        give(params, seed)
        give(twins, seed)
        params[3].grad = twins[3].grad = None
        for each in (opt, *apart):
            each.step()
        for group in (opt.param_groups[1], apart[1].param_groups[0]):
            group.update(ns_coefficients=(1.5, -0.5, 0.0), nesterov=False)
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt)), "saved"]
)
def test_copies(clone):
    params = parameters()
    opt = fo.Muon(params, ns_steps=3, ema=0.5, state_dtype="bfloat16")
    give(params, 1)
    opt.step()
    if clone == "saved":
        buffer = io.BytesIO()
        torch.save(opt, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = clone(opt)
    give(twin.param_groups[0]["params"], 2)
    give(params, 2)
    opt.step()
    twin.step()
    assert equal(contents(twin), contents(opt))


def test_the_other_parameters_of_a_model():
    """As its documentation says: matrices here, the rest by AdamW."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    matrices = [p for p in net.parameters() if p.ndim == 2]
    rest = [p for p in net.parameters() if p.ndim != 2]
    opts = [fo.Muon(matrices, lr=0.02, adjust_lr_fn="match_rms_adamw"), fo.AdamW(rest, lr=0.02)]
    x = torch.randn(64, 8)
    losses = []
    for _ in range(150):
        loss = (net(x) - x[:, :2] * x[:, 2:4]).square().mean()
        net.zero_grad()
        loss.backward()
        for opt in opts:
            opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_without_a_namesake_in_torch(monkeypatch):
    """Torch before 2.9: options are checked as in fusedopt, and steps are the same."""
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    own = fo._torch_class(fusedopt.Muon)
    assert not hasattr(torch.optim, "Muon") and own.__mro__[2].__module__.startswith("fusedopt")
    params, twins = parameters(), parameters()
    options = {"lr": 0.1, "ns_steps": 3, "adjust_lr_fn": "original"}
    opts = own(params, **options), fo.Muon(twins, **options)
    for seed in range(1, 4):
        give(params, seed)
        give(twins, seed)
        for opt in opts:
            opt.step()
    assert all(map(torch.equal, params, twins))
    with pytest.raises(ValueError, match="^ns_steps: must be below 100"):
        own(params, ns_steps=100)
    with pytest.raises(ValueError, match=r"\['params'\]\[1\]: has shape \(3,\), .*AdamW"):
        own([leaf(2, 2), leaf(3)])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape):
    words = "has shape .*, and Muon only supports 2D parameters, .*; give it to AdamW"
    good, bad = leaf(2, 3), leaf(*shape)
    where = r"^param_groups\[0\]\['params'\]\[1\]"
    with pytest.raises(ValueError, match=f"{where}: {words}"):
        fo.Muon(p for p in (good, bad))
    with pytest.raises(ValueError, match=rf"{where} \(net.bias\): {words}"):
        fo.Muon([("net.weight", good), ("net.bias", bad)])
    opt = fo.Muon([good])
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]\['params'\]\[0\]: {words}"):
        opt.add_param_group({"params": bad})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": (p for p in [leaf(4, 4)])})
    assert len(opt.param_groups[1]["params"]) == 1


@pytest.mark.parametrize(
    ("option", "value", "error", "match"),
    [
        ("lr", "1", TypeError, "lr: expected a number"),
        ("ns_coefficients", (1.0, 2.0), TypeError, "ns_coefficients: expected 3 numbers"),
        ("ns_steps", 100, ValueError, "ns_steps: must be below 100"),
        ("ns_steps", 5.0, TypeError, "ns_steps: expected a whole number"),
        ("adjust_lr_fn", "none", ValueError, "adjust_lr_fn: expected None or 'original' or"),
        ("eps", None, TypeError, "eps: expected a number"),
    ],
)
def test_edited_options_are_checked(option, value, error, match):
    """Which torch does in its constructor alone, or in the middle of a step."""
    params = parameters()
    opt = fo.Muon(params)
    give(params, 1)
    before = contents(opt)
    opt.param_groups[0][option] = value
    with pytest.raises(error, match=rf"^param_groups\[0\]\.{match}"):
        opt.step()
    assert equal(contents(opt), before)


@pytest.mark.parametrize("options", [{}, ALL_STEP_OPTIONS], ids=["plain", "all"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("begun", [False, True])
def test_a_product_that_fails(begun, at, fault, options, monkeypatch):
    """All is as it was, state that is new too, and the next step as if it had not been tried."""
    made = {"state_dtype": "int8", "min_8bit_size": 0, "ema": 0.9}
    wide, other = torch.randn(20, 30), torch.randn(20, 30)
    params, twins = parameters(), parameters()
    params.append(torch.nn.Parameter(wide[:, ::2]))  # which a copy stands in for
    twins.append(torch.nn.Parameter(other.copy_(wide)[:, ::2]))
    opt, twin = fo.Muon(params, **made), fo.Muon(twins, **made)
    for each in (opt, twin) if begun else ():
        give(each.param_groups[0]["params"], 1)
        each.step()
    give(params, 2)
    give(twins, 2)
    before, calls, product = contents(opt), [], module._in_bfloat16

    def failing(*args):
        calls.append(args)
        if len(calls) == at + 1:
            raise fault("meanwhile")
        return product(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_in_bfloat16", failing)
        with pytest.raises(fault, match="meanwhile"):
            opt.step(**options)
    assert len(calls) == at + 1
    assert equal(contents(opt), before)
    assert torch.is_grad_enabled()
    opt.step(**options)
    twin.step(**options)
    assert equal(contents(opt), contents(twin))


def test_no_memory_for_directions(monkeypatch):
    params, made = parameters(), []
    opt = fo.Muon(params)
    give(params, 1)
    before, new = contents(opt), fo.Muon._new_direction

    def failing(*args):
        made.append(args)
        if len(made) == 4:
            raise MemoryError("no more")
        return new(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fo.Muon, "_new_direction", staticmethod(failing))
        with pytest.raises(MemoryError, match="no more"):
            opt.step()
    assert equal(contents(opt), before)
    opt.step()
    assert opt.last_step.step == 1


def test_nothing_is_computed_for_a_skipped_step(monkeypatch):
    monkeypatch.delattr(module, "_in_bfloat16")
    params = parameters()
    opt = fo.Muon(params, nonfinite="skip")
    give(params, 1)
    params[0].grad[0, 0] = np.nan
    before = [p.detach().clone() for p in params]
    opt.step()
    assert opt.last_step.skipped and all(map(torch.equal, params, before))
