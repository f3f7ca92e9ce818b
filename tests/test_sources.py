"""Agreement with the library that a rule is from: every option crossed, with a rate that changes.

Within 1e-12 of the largest parameter in float64 and 3e-6 in float32, over 25 steps.
"""

import importlib.util
import itertools
import subprocess
import sys

import numpy as np
import pytest

import fusedopt
from fusedopt.optim import nadam, radam

torch = pytest.importorskip("torch", reason="compares with torch.optim: extra `peers`")
fo = pytest.importorskip("fusedopt.torch")

STEPS = 25
BOUND = {np.float32: 3e-6, np.float64: 1e-12}
FLAG = (False, True)
BETAS = ((0.9, 0.999), (0.6, 0.5))
DECAY = {"weight_decay": (0.0, 0.1), "weight_decouple": FLAG}  # as pytorch_optimizer has it
# options of each rule, with the values that are crossed
OPTIONS = {
    "ADOPT": {
        "betas": BETAS,
        "clip_exp": (0.25, None, 0.0),
        **DECAY,
        "fixed_decay": FLAG,
        "eps": (1e-6, 0.3),
        "maximize": FLAG,
    },
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
    "Adafactor": {
        "beta2_decay": (-0.8, -0.3),
        "eps": ((None, 1e-3), (1e-4, 0.3)),
        "d": (1.0, 3.0),
        "weight_decay": (0.0, 0.1),
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
    "ASGD": {
        "lambd": (1e-4, 0.3),
        "alpha": (0.75, 1.5),
        "t0": (1e6, 0, 7),
        "weight_decay": (0.0, 0.1),
        "maximize": FLAG,
    },
    "Rprop": {
        "etas": ((0.5, 1.2), (0.3, 2.0)),
        "step_sizes": ((1e-6, 50.0), (0.01, 0.03)),
        "maximize": FLAG,
    },
    "Prodigy": {
        "betas": BETAS,
        "beta3": (None, 0.7),
        "weight_decay": (0.0, 0.1),
        "decouple": FLAG,
        "use_bias_correction": FLAG,
        "safeguard_warmup": FLAG,
        "d0": (1e-2,),
        "d_coef": (1.0, 3.0),
        "growth_rate": (float("inf"), 1.1),
        "slice_p": (1, 3),
    },
    "SignSGD": {"momentum": (0.9, 0.3, 0.0), **DECAY, "maximize": FLAG},
    "Yogi": {
        "betas": BETAS,
        "initial_accumulator": (1e-6, 0.3),
        **DECAY,
        "fixed_decay": FLAG,
        "eps": (1e-3, 1e-8),
        "maximize": FLAG,
    },
}


def peer_of(name, params, options):
    """The optimizer of the library that the rule is from."""
    if hasattr(torch.optim, name):
        return getattr(torch.optim, name)(params, foreach=False, **options)
    if name == "Prodigy":
        package = pytest.importorskip("prodigyopt", reason="compares with it: extra `peers`")
        return package.Prodigy(params, **options)
    package = pytest.importorskip("pytorch_optimizer", reason="compares with it: extra `peers`")
    always = {"AdEMAMix": {"weight_decouple": True}}.get(name, {})
    given = always | {k: v for k, v in options.items() if k != "clip_exp"}
    if "clip_exp" in options:
        power = options["clip_exp"]
        given["clip_lambda"] = None if power is None else lambda step: step**power
    return getattr(package, name)(params, foreach=False, **given)


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


EDGES = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-30, -1e30, 1.0]


@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: d.__name__)
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("name", ["ADOPT", "ASGD", "Rprop", "SignSGD", "Yogi"])
def test_gradients_that_are_not_finite(name, options, dtype):
    """Each edge in one of three steps: what becomes NaN or infinite does so in the source too."""
    known = fusedopt.functional.__dict__[name.lower()].__signature__.parameters
    options = {k: v for k, v in options.items() if k in known}
    n = len(EDGES)
    ours = np.linspace(-1, 1, 3 * n).astype(dtype)
    theirs = torch.tensor(ours, requires_grad=True)
    opt = getattr(fusedopt, name)(ours, **options)
    peer = peer_of(name, [theirs], options)
    for step in range(6):
        g = np.ones(3 * n, dtype)
        if step < 3:
            g[step * n : (step + 1) * n] = np.array(EDGES, dtype)
        theirs.grad = torch.tensor(g)
        opt.step(g)
        peer.step()
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, err_msg=f"{step}")


@pytest.mark.parametrize("wanted", [None, "bfloat16", "int8"])
def test_the_first_step_of_adopt_only_begins_the_second_moment(wanted, tmp_path):
    """Also after a skipped step, for a leaf whose first gradient comes later, and in a new run."""
    p, q = (np.ones(100, np.float32) for _ in range(2))
    g, bad = np.full(100, 2, np.float32), np.full(100, np.nan, np.float32)
    opt = fusedopt.ADOPT([p, q], lr=0.5, state_dtype=wanted, min_8bit_size=1)
    assert opt.step([bad, bad], nonfinite="skip").skipped
    opt.save(tmp_path / "x.npz")
    opt.load(tmp_path / "x.npz")
    opt.step([g, None])
    assert (p == 1).all() and opt.state["params[0]"]["step"] == 1
    opt.save(tmp_path / "x.npz")
    other = fusedopt.ADOPT([p, q], lr=0.5, state_dtype=wanted, min_8bit_size=1)
    other.load(tmp_path / "x.npz")
    other.step([g, g])
    np.testing.assert_allclose(p, 0.95, rtol=1e-2)  # 1 - 0.5 * (1 - 0.9) * 2 / sqrt(2**2)
    assert (q == 1).all()
    other.step([None, g])
    np.testing.assert_allclose(q, 0.95, rtol=1e-2)


def test_the_first_step_of_adopt_in_torch():
    p = torch.nn.Parameter(torch.ones(3))
    opt = fo.ADOPT([p], lr=0.5, weight_decay=0.5, weight_decouple=True)
    p.grad = torch.full((3,), torch.nan)
    opt.step(nonfinite="skip")
    p.grad = torch.full((3,), 2.0)
    opt.step()
    assert torch.equal(p, torch.full((3,), 0.75))  # decoupled decay, as in the source
    other = fo.ADOPT([p], lr=0.5)
    other.load_state_dict(opt.state_dict())
    other.param_groups[0]["weight_decay"] = 0.0
    other.step()
    torch.testing.assert_close(p, torch.full((3,), 0.7))


OPTAX = """
import numpy as np, optax, fusedopt
rng = np.random.default_rng(0)
p = rng.standard_normal(50).astype("f4")
theirs, transform = p.copy(), optax.sign_sgd(0.1)
state = transform.init(theirs)
opt = fusedopt.SignSGD(p, lr=0.1, momentum=0.0)
for _ in range(5):
    g = rng.standard_normal(50).astype("f4")
    g[:5] = 0
    opt.step(g)
    changes, state = transform.update(g, state, theirs)
    theirs = np.asarray(optax.apply_updates(theirs, changes))
print(np.array_equal(p, theirs), list(opt.state["params"]))
"""


def test_signsgd_without_momentum_is_that_of_optax():
    """In a process of its own: JAX warns of every fork after it."""
    if importlib.util.find_spec("optax") is None:
        pytest.skip("compares with optax: extra `bench`")
    run = subprocess.run([sys.executable, "-c", OPTAX], capture_output=True, text=True)
    assert run.stdout == "True ['step']\n", run.stderr
