"""The blocks of docs/programs.md give the numbers of the programs that they are for.

Those of a library that installs quickly are compared with it, and the others with a transcription.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "programs.md").read_text()
BLOCKS = dict(re.findall(r"^## (.*?)$.*?```python\n(.*?)```", PAGE, re.S | re.M))
STEPS = 25
BOUND = {np.float32: 3e-6, np.float64: 1e-12}
either = pytest.mark.parametrize("dtype", BOUND, ids=lambda d: d.__name__)


def block(title):
    names = {}
    exec(compile(BLOCKS[title], title, "exec"), names)
    return names


def assert_near(ours, theirs, dtype):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert np.abs(a - b).max() <= BOUND[dtype] * max(1, np.abs(b).max())


def flower(kind, weights, m, v, delta, server_round, eta, beta_1, beta_2, tau):
    """Flower 1.42, `aggregate_fit` of the strategies, transcribed; m and v change in place."""
    for i, (w, y) in enumerate(zip(weights, delta, strict=True)):
        m[i] = np.multiply(beta_1, m[i]) + (1 - beta_1) * y
        if kind == "FedAdam":
            v[i] = beta_2 * v[i] + (1 - beta_2) * np.multiply(y, y)
        elif kind == "FedYogi":
            v[i] = v[i] - (1.0 - beta_2) * np.multiply(y, y) * np.sign(v[i] - np.multiply(y, y))
        else:
            v[i] = v[i] + np.multiply(y, y)
        rate = eta
        if kind == "FedAdam":
            rate *= np.sqrt(1 - np.power(beta_2, server_round + 1.0))
            rate /= 1 - np.power(beta_1, server_round + 1.0)
        weights[i] = (w + rate * m[i] / (np.sqrt(v[i]) + tau)).astype(w.dtype)


@pytest.mark.parametrize("kind", ["FedAdam", "FedYogi", "FedAdagrad"])
@either
def test_flower(kind, dtype):
    names = block("Flower")
    rng = np.random.default_rng(0)
    ours = [rng.standard_normal(shape).astype(dtype) for shape in [(3, 17), (5,)]]
    theirs = [w.copy() for w in ours]
    m, v = ([np.zeros_like(w) for w in ours] for _ in range(2))
    betas, eta, tau = (0.9, 0.99), 0.1, 1e-3
    opt = names["make"](kind, ours, *betas, tau)
    for t in range(1, STEPS + 1):
        server_round = t + (t > 10)  # a round in which all clients fail changes nothing
        delta = [rng.standard_normal(w.shape).astype(dtype) for w in ours]
        if kind == "FedAdam":
            names["fedadam"](opt, delta, server_round, eta, *betas)
        elif kind == "FedYogi":
            names["fedyogi"](opt, delta, t, eta, *betas, tau)
        else:
            names["fedadagrad"](opt, delta, t, eta, betas[0], tau)
        flower(kind, theirs, m, v, delta, server_round, eta, *betas, tau)
    assert_near(ours, theirs, dtype)


@either
def test_scikit_learn(dtype, monkeypatch):
    mlp = pytest.importorskip(
        "sklearn.neural_network._multilayer_perceptron", reason="compares with it: extra `demo`"
    )
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((100, 5)).astype(dtype), rng.integers(0, 3, 100)

    def fit():
        model = mlp.MLPClassifier((16,), activation="tanh", max_iter=STEPS // 5, random_state=0,
                                  batch_size=20, learning_rate_init=0.01)  # fmt: skip
        with pytest.warns(match="hasn't converged"):
            return model.fit(x, y)

    theirs = fit()
    monkeypatch.setattr(mlp, "AdamOptimizer", mlp.AdamOptimizer)  # to be put back
    names = block("scikit-learn")
    ours = fit()
    assert isinstance(ours._optimizer, names["FusedAdam"])
    assert_near(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, dtype)


@either
def test_pacmap(dtype):
    """PaCMAP 0.9, `update_embedding_adam`, transcribed to NumPy."""
    names = block("PaCMAP")
    rng = np.random.default_rng(0)
    ours = rng.standard_normal((40, 2)).astype(dtype)
    theirs, m, v = ours.copy(), np.zeros_like(ours), np.zeros_like(ours)
    beta1, beta2, lr = 0.9, 0.999, 1.0
    opt = names["make"](ours, lr)
    for itr in range(STEPS):
        grad = rng.standard_normal((41, 2)).astype(dtype)
        names["update"](opt, grad)
        lr_t = lr * math.sqrt(1.0 - beta2 ** (itr + 1)) / (1.0 - beta1 ** (itr + 1))
        m += (1 - beta1) * (grad[:-1] - m)
        v += (1 - beta2) * (grad[:-1] ** 2 - v)
        theirs -= lr_t * m / (np.sqrt(v) + 1e-7)
    assert_near([ours], [theirs], dtype)


def test_autograd():
    optimizers = pytest.importorskip(
        "autograd.misc.optimizers", reason="compares with it: pip install autograd"
    )
    autograd = pytest.importorskip("autograd")
    anp = pytest.importorskip("autograd.numpy")
    names = block("autograd")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 2))
    start = [(rng.standard_normal((4, 6)), np.zeros(6)), (rng.standard_normal((6, 2)), np.zeros(2))]

    def loss(layers, i):
        (w1, b1), (w2, b2) = layers
        return anp.mean((anp.dot(anp.tanh(anp.dot(x, w1) + b1), w2) + b2 - y) ** 2)

    ends = [
        adam(autograd.grad(loss), start, num_iters=STEPS, step_size=0.1)
        for adam in (names["adam"], optimizers.adam)
    ]
    assert_near(*([p for layer in end for p in layer] for end in ends), np.float64)


@either
def test_evolution_strategies(dtype):
    """OpenAI's evolution-strategies-starter, `Adam._compute_step`, transcribed."""
    names = block("Evolution strategies")
    rng = np.random.default_rng(0)
    ours = rng.standard_normal(30).astype(dtype)
    theirs, m, v = ours.copy(), np.zeros_like(ours), np.zeros_like(ours)
    opt = names["make"](ours, 0.05)
    for t in range(1, STEPS + 1):
        noise = rng.standard_normal((20, 30)).astype(dtype)
        returns = rng.standard_normal(20)  # of an environment: not of theta, so that both see these
        names["es_step"](opt, ours, noise, returns, 0.1, 0.005)
        ranks = returns.argsort().argsort() / 19 - 0.5
        g = (-(ranks @ noise) / (20 * 0.1) + 0.005 * theirs).astype(dtype)
        a = 0.05 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        m = 0.9 * m + (1 - 0.9) * g
        v = 0.999 * v + (1 - 0.999) * (g * g)
        theirs += (-a * m / (np.sqrt(v) + 1e-8)).astype(dtype)
    assert_near([ours], [theirs], dtype)


def test_thinc():
    thinc = pytest.importorskip("thinc", reason="compares with it: pip install thinc")
    peer = pytest.importorskip("thinc.optimizers")
    options = {"L2": 0.01, "grad_clip": 1.0, "learn_rate": 0.1}
    config = {"optimizer": {"@optimizers": "fusedopt.Adam.v1", **options}}
    ours, theirs = thinc.registry.resolve(config)["optimizer"], peer.Adam(**options)
    assert type(block("thinc and spaCy")["optimizer"]) is type(ours)
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape).astype("f4") for shape in [(3, 17), (100,)]]
    pairs = [[p.copy() for p in params] for _ in range(2)]
    for _ in range(STEPS):
        grads = [rng.standard_normal(p.shape).astype("f4") for p in params]
        for opt, mine in zip((ours, theirs), pairs, strict=True):
            for i, (p, g) in enumerate(zip(mine, grads, strict=True)):
                opt((i, "W"), p, g.copy())
            opt.step_schedules()
    for a, b in zip(*pairs, strict=True):  # thinc rounds 1 - beta2, by up to 3e-5, before the root
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max()
    assert_near(*(o.mom1.values() for o in (ours, theirs)), np.float32)
    assert ours.averages.keys() == theirs.averages.keys()
