"""Agreement with torch.optim, or a rule's original library, over 100 steps, within bounds."""

import inspect

import numpy as np
import pytest
from cases import CLASSES

import fusedopt

torch = pytest.importorskip("torch", reason="compares with torch.optim: extra `peers`")

STEPS = 100
# The largest difference of a parameter after 100 steps, in units of eps * (|p| + total path):
# torch's single-tensor code rounds in another order, each step by a few ULP of the update and one
# of p.
BOUND = 4
# Of rules whose parameter torch rounds twice in a step: roundings of p add up as a random walk.
TWICE = {"NAdam": 20}

ROWS = [
    ("Adam", {}),
    ("Adam", {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-4}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"maximize": True, "weight_decay": 0.01}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.2, "maximize": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    ("SGD", {"lr": 0.01, "momentum": 0.9}),
    ("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "maximize": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "eps": 1e-3}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.5, "lr_decay": 0.1}),
    ("Adagrad", {"weight_decay": 0.1, "maximize": True}),
    ("Adagrad", {"initial_accumulator_value": 0.3, "eps": 1e-3}),
    ("NAdam", {}),
    ("NAdam", {"lr": 0.01, "betas": (0.5, 0.9), "momentum_decay": 0.1, "maximize": True}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("RAdam", {"betas": (0.5, 0.9), "weight_decay": 0.1, "maximize": True}),
    ("RAdam", {"betas": (0.5, 0.6), "lr": 0.01}),
    ("RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("Adamax", {}),
    ("Adamax", {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "maximize": True}),
    ("Adamax", {"weight_decay": 0.1}),
    ("Adadelta", {}),
    ("Adadelta", {"lr": 0.5, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    ("ASGD", {}),
    ("ASGD", {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 3, "weight_decay": 0.1}),
    ("Rprop", {}),
    ("Rprop", {"lr": 0.3, "etas": (0.3, 1.5), "step_sizes": (1e-2, 0.7), "maximize": True}),
    ("Lion", {}),
    ("Lion", {"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.1}),
]
PACKAGES = {"Lion": "lion_pytorch"}  # if it is not torch.optim


def peer_of(name, tensors, options):
    if name in PACKAGES:
        package = pytest.importorskip(PACKAGES[name], reason="compares with it: extra `peers`")
        return getattr(package, name)(tensors, **options)
    cls = getattr(torch.optim, name)
    fused = {"fused": False} if "fused" in inspect.signature(cls).parameters else {}
    return cls(tensors, **options, foreach=False, **fused)


@pytest.fixture(autouse=True)
def torch_default(request):
    """Let torch keep its numbers in float64 where parameters are: NAdam's product of momenta."""
    before = torch.get_default_dtype()
    if "float64" in request.node.name:
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize(("name", "options"), ROWS)
def test_agrees(name, options, dtype):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape).astype(dtype) for shape in [(3, 700), (11,), ()]]
    ours = [p.copy() for p in start]
    theirs = [torch.tensor(p, requires_grad=True) for p in start]
    opt = getattr(fusedopt, name)(ours, **options)
    peer = peer_of(name, theirs, options)
    path = [np.zeros_like(p) for p in start]
    for _ in range(STEPS):
        grads = [rng.standard_normal(p.shape).astype(dtype) for p in start]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = torch.from_numpy(np.asarray(g))
        before = [p.copy() for p in ours]
        opt.step(grads)
        peer.step()
        for total, a, b in zip(path, ours, before, strict=True):
            total += np.abs(a - b)
    for a, b, total in zip(ours, theirs, path, strict=True):
        unit = np.finfo(dtype).eps * (np.abs(a) + total)
        worst = float(np.max(np.abs(a - b.detach().numpy()) / unit))
        assert worst <= TWICE.get(name, BOUND), f"{worst:.2f}"
    for state, p in zip(opt.state.values(), theirs, strict=True):
        for key, value in state.items():
            if key != "step":
                np.testing.assert_allclose(
                    value, peer.state[p][key].numpy(), rtol=STEPS * np.finfo(dtype).eps,
                    atol=4 * np.finfo(dtype).eps,
                )  # fmt: skip


def test_adagrad_without_eps_is_torchs_where_all_gradients_were_zero():
    g = np.array([0, 0, 2], np.float32)
    ours, theirs = np.ones(3, np.float32), torch.ones(3, requires_grad=True)
    theirs.grad = torch.from_numpy(g)
    for begin in 0.0, 0.25:
        opt = fusedopt.Adagrad(ours, lr=0.5, eps=0.0, initial_accumulator_value=begin)
        options = {"eps": 0.0, "initial_accumulator_value": begin, "foreach": False}
        with np.errstate(invalid="ignore"):
            opt.step(g)
        torch.optim.Adagrad([theirs], lr=0.5, **options).step()
        assert np.array_equal(ours, theirs.detach().numpy(), equal_nan=True)
        assert np.isnan(ours[:2]).all() and np.isfinite(ours[2])


def test_state_names_and_defaults_are_torchs():
    names = [cls.__name__ for cls in CLASSES if hasattr(torch.optim, cls.__name__)]
    assert len(names) >= 6
    for name in names:
        ours = getattr(fusedopt, name)([np.ones(2)]).param_groups[0]
        theirs = getattr(torch.optim, name)([torch.ones(2, requires_grad=True)]).param_groups[0]
        for option in set(ours) & set(theirs) - {"params"}:
            assert ours[option] == theirs[option], option
