"""Agreement with the library that a rule is from: every option crossed, with a rate that changes.

Within 1e-12 of the largest parameter in float64 and 3e-6 in float32, over 25 steps.
"""

import itertools

import numpy as np
import pytest

import fusedopt
from fusedopt.optim import nadam, radam

torch = pytest.importorskip("torch", reason="compares with torch.optim: extra `peers`")

STEPS = 25
BOUND = {np.float32: 3e-6, np.float64: 1e-12}
FLAG = (False, True)
BETAS = ((0.9, 0.999), (0.6, 0.5))
# options of each rule, with the values that are crossed
OPTIONS = {
    "NAdam": {
        "betas": BETAS,
        "eps": (1e-8, 1e-3),
        "weight_decay": (0.0, 0.1),
        "momentum_decay": (4e-3, 1.0),
        "decoupled_weight_decay": FLAG,
        "maximize": FLAG,
    },
    "RAdam": {
        "betas": (*BETAS, (0.9, 0.7)),  # rectified from step 6 on, never, from step 10 on
        "eps": (1e-8, 1e-3),
        "weight_decay": (0.0, 0.1),
        "decoupled_weight_decay": FLAG,
        "maximize": FLAG,
    },
    "Adamax": {
        "betas": BETAS,
        "eps": (1e-8, 1e-3),
        "weight_decay": (0.0, 0.1),
        "maximize": FLAG,
    },
    "Adadelta": {
        "rho": (0.9, 0.0, 1.0),
        "eps": (1e-6, 1e-2),
        "weight_decay": (0.0, 0.1),
        "maximize": FLAG,
    },
    "AdEMAMix": {
        "betas": ((0.9, 0.999, 0.9999), (0.6, 0.5, 0.9)),
        "eps": (1e-8, 1e-3),
        "weight_decay": (0.0, 0.1),
        "alpha": (5.0, 0.5),
        "t_alpha_beta3": (None, 10.0, 100.0),
        "maximize": FLAG,
    },
}


def peer_of(name, params, options):
    """The optimizer of the library that the rule is from."""
    if hasattr(torch.optim, name):
        return getattr(torch.optim, name)(params, foreach=False, **options)
    package = pytest.importorskip("pytorch_optimizer", reason="compares with it: extra `peers`")
    return getattr(package, name)(params, foreach=False, weight_decouple=True, **options)


def test_radam_is_rectified_where_more_than_five_gradients_count():
    for beta2, first in ((0.999, 6), (0.9, 6), (0.7, 10), (0.5, None)):
        rectified = [radam.rectification(step, beta2) is not None for step in range(1, 40)]
        assert rectified == [first is not None and step >= first for step in range(1, 40)]


@pytest.mark.parametrize("decay", [0.0, 4e-3, 0.05, 1.0, 1e3])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.9999])
def test_product_of_nadams_momenta(beta1, decay):
    """Whatever the step, also one that nobody multiplies up to; below float32's least it is 0."""
    product = 1.0
    for step in range(1, 5001):
        product *= nadam.momentum(step, beta1, decay)
        got = nadam.momentum_product(step, beta1, decay)
        assert got == pytest.approx(product, rel=1e-11, abs=1e-45)
    assert np.float32(nadam.momentum_product(2**60, beta1, decay)) == 0


def rate(step):
    return 0.02 / (1 + 0.1 * (step % 7))


def trained(make, start, peer):
    """The parameters after some steps; torch's groups take the rate of each."""
    rng = np.random.default_rng(1)
    params = [torch.tensor(p, requires_grad=True) if peer else p.copy() for p in start]
    opt = make(params)
    for step in range(1, STEPS + 1):
        grads = [rng.standard_normal(p.shape).astype(p.dtype) for p in start]
        if peer:
            opt.param_groups[0]["lr"] = rate(step)
            for p, g in zip(params, grads, strict=True):
                p.grad = torch.tensor(g)
            opt.step()
        else:
            opt.step(grads)
    return [p.detach().numpy() if peer else p for p in params]


@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_its_source(name, dtype):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape).astype(dtype) for shape in [(3, 17), ()]]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.from_numpy(start[0]).dtype)  # of numbers that torch keeps
    try:
        for values in itertools.product(*OPTIONS[name].values()):
            options = dict(zip(OPTIONS[name], values, strict=True))
            ours = trained(
                lambda params: getattr(fusedopt, name)(params, lr=rate, **options),  # noqa: B023
                start,
                False,
            )
            theirs = trained(
                lambda params: peer_of(name, params, options),  # noqa: B023
                start,
                True,
            )
            largest = max(np.abs(p).max() for p in theirs)
            worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
            assert worst <= BOUND[dtype] * largest, (options, worst / largest)
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------- conventions of Adam


def keras(p, g, m, v, x, step, lr, betas, eps):
    """Keras 3.15; so do TensorFlow and, but for v, thinc."""
    rate = lr * np.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
    m += (g - m) * (1 - betas[0])
    v += (g * g - v) * (1 - betas[1])
    np.maximum(x, v, out=x)
    p -= m * rate / (np.sqrt(x) + eps)


def fedadam(p, g, m, v, x, step, lr, betas, eps):
    """Reddi et al., ICLR 2021, Algorithm 2, where the mean of the clients' updates is -g."""
    m[...] = betas[0] * m - (1 - betas[0]) * g
    v[...] = betas[1] * v + (1 - betas[1]) * g * g
    p += lr * m / (np.sqrt(v) + eps)


def flower(p, g, m, v, x, step, lr, betas, eps):
    """Flower 1.42's FedAdam in round `step`."""
    lr = lr * np.sqrt(1 - betas[1] ** (step + 1.0)) / (1 - betas[0] ** (step + 1.0))
    fedadam(p, g, m, v, x, step, lr, betas, eps)


def flowers_rate(step):
    return 0.1 * np.sqrt(1 - 0.99 ** (step + 1.0)) / (1 - 0.9 ** (step + 1.0))


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        (keras, {"eps_hat": True, "amsgrad": True}),
        (fedadam, {"bias_correction": False}),
        (flower, {"bias_correction": False, "lr": flowers_rate}),
    ],
)
@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: d.__name__)
def test_adam_is_that_of_other_libraries(formula, options, dtype):
    """With an epsilon as large as the gradients, so that its place matters."""
    rng = np.random.default_rng(0)
    ours = rng.standard_normal(60).astype(dtype)
    theirs, m, v, x = ours.copy(), *(np.zeros_like(ours) for _ in range(3))
    same = {"betas": (0.9, 0.99), "eps": 0.5}
    opt = fusedopt.Adam(ours, **{"lr": 0.1} | same | options)
    for step in range(1, STEPS + 1):
        g = rng.standard_normal(60).astype(dtype)
        opt.step(g)
        formula(theirs, g, m, v, x, step, 0.1, **same)
    assert np.abs(ours - theirs).max() <= BOUND[dtype] * np.abs(theirs).max()


@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: d.__name__)
def test_adam_is_scikit_learns(dtype):
    optimizers = pytest.importorskip(
        "sklearn.neural_network._stochastic_optimizers", reason="compares with it: extra `demo`"
    )
    rng = np.random.default_rng(0)
    ours = [rng.standard_normal(shape).astype(dtype) for shape in [(3, 17), (5,)]]
    theirs = [p.copy() for p in ours]
    opt = fusedopt.Adam(ours, lr=0.1, betas=(0.9, 0.99), eps=0.5, eps_hat=True)
    peer = optimizers.AdamOptimizer(theirs, 0.1, beta_1=0.9, beta_2=0.99, epsilon=0.5)
    for _ in range(STEPS):
        grads = [rng.standard_normal(p.shape).astype(dtype) for p in ours]
        opt.step(grads)
        peer.update_params(theirs, grads)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() <= BOUND[dtype] * np.abs(b).max()
