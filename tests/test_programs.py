"""The blocks of docs/programs.md give the numbers of the programs that they are for.

They are compared with the library's own code, where it is installed. Evolution strategies have a
transcription, because their program is no package; PaCMAP has one too, because it takes long to
install and computes in float32 only.
"""

import importlib.util
import math
import re
import subprocess
import sys
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


def assert_near(ours, theirs, dtype, bound=None):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert np.abs(a - b).max() <= (bound or BOUND[dtype]) * max(1, np.abs(b).max())


@pytest.mark.parametrize("kind", ["FedAdam", "FedYogi", "FedAdagrad"])
@either
def test_flower(kind, dtype):
    """The library's strategy gets one client's weights; NumPy 2 makes FedAdam's float64."""
    pytest.importorskip("flwr", reason="compares with it: pip install flwr==1.42.0")
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.server import strategy

    names = block("Flower")
    rng = np.random.default_rng(0)
    ours = [rng.standard_normal(shape).astype(dtype) for shape in [(3, 17), (5,)]]
    betas, eta, tau = (0.0 if kind == "FedAdagrad" else 0.9, 0.99), 0.1, 1e-3
    decay = {} if kind == "FedAdagrad" else {"beta_1": betas[0], "beta_2": betas[1]}
    server = getattr(strategy, kind)(
        initial_parameters=ndarrays_to_parameters(ours), eta=eta, tau=tau, **decay
    )
    opt = names["make"](kind, ours, *betas, tau)
    for t in range(1, STEPS + 1):
        server_round = t + (t > 10)  # a round in which all clients fail changes nothing
        trained = [w + rng.standard_normal(w.shape).astype(dtype) for w in ours]
        delta = [x - y for x, y in zip(trained, ours, strict=True)]
        if kind == "FedAdam":
            names["fedadam"](opt, delta, server_round, eta, *betas)
        elif kind == "FedYogi":
            names["fedyogi"](opt, delta, t, eta, *betas, tau)
        else:
            names["fedadagrad"](opt, delta, t, eta, betas[0], tau)
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(trained), 1, {})
        server.aggregate_fit(server_round, [(None, result)], [])
    assert_near(ours, [w.astype(dtype) for w in server.current_weights], dtype)


@pytest.mark.parametrize("kind", ["Adagrad", "Adam", "Yogi"])
@pytest.mark.parametrize("initial", [0.0, 0.1])
@either
def test_openfl(kind, initial, dtype):
    openfl = pytest.importorskip(
        "openfl.utilities.optimizers.numpy",
        reason="compares with it: pip install openfl==1.9, of which its optimizers need dynaconf",
    )
    names = block("OpenFL")
    rng = np.random.default_rng(0)
    start = {"conv.weight": (3, 17), "conv.bias": (5,), "scale": ()}
    start = {name: rng.standard_normal(shape).astype(dtype) for name, shape in start.items()}
    ours, theirs = ({name: np.array(p) for name, p in start.items()} for _ in range(2))
    options = {"learning_rate": 0.05, "initial_accumulator_value": initial}
    pair = (
        names[f"Fused{kind}"](params=ours, **options),
        getattr(openfl, f"NumPy{kind}")(params=theirs, **options),
    )
    for step in range(STEPS):
        some = list(start)[step % 3 :]
        grads = {name: np.array(rng.standard_normal(start[name].shape), dtype) for name in some}
        for opt in pair:
            opt.step({name: g.copy() for name, g in grads.items()})
    assert_near(ours.values(), theirs.values(), dtype)
    with pytest.raises((KeyError, ValueError), match="unknown"):
        pair[0].step({"unknown": np.zeros(3, dtype)})


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


PACMAP = """
import sys
import numpy as np
from pacmap.pacmap import update_embedding_adam
begin, grads = np.load(sys.argv[1]).values()
m, v = np.zeros_like(begin), np.zeros_like(begin)
for itr, grad in enumerate(grads):
    update_embedding_adam(begin, grad, m, v, 0.9, 0.999, 1.0, itr)
np.save(sys.argv[2], begin)
"""


def test_pacmap_itself(tmp_path):
    """A process of its own: Numba's threads would slow down other tests of this one."""
    names = block("PaCMAP")
    rng = np.random.default_rng(0)
    ours = rng.standard_normal((40, 2)).astype("f4")
    grads = rng.standard_normal((STEPS, 41, 2)).astype("f4")
    np.savez(tmp_path / "in.npz", ours, grads)
    if importlib.util.find_spec("pacmap") is None:
        pytest.skip("compares with it: pip install pacmap==0.9.1")
    subprocess.run(
        [sys.executable, "-c", PACMAP, tmp_path / "in.npz", tmp_path / "out.npy"], check=True
    )
    opt = names["make"](ours, 1.0)
    for grad in grads:
        names["update"](opt, grad)
    theirs = np.load(tmp_path / "out.npy")
    assert_near([ours], [theirs], np.float32, bound=1e-5)  # PaCMAP has powers of betas in float32


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


TEXTS = {
    "good film": 1, "bad film": 0, "a great day": 1, "an awful day": 0,
    "great film": 1, "awful film": 0, "good day": 1, "bad day": 0,
}  # fmt: skip


def losses(spacy, pipe, optimizer):
    """Return the losses of a blank pipeline trained by its config's optimizer."""
    from spacy.training import Example

    spacy.util.fix_random_seed(0)
    nlp = spacy.blank("en", config={"training": {"optimizer": optimizer}})
    nlp.add_pipe(pipe)
    tags = {2: ["JJ", "NN"], 3: ["DT", "JJ", "NN"]}
    examples = []
    for text, good in TEXTS.items():
        cats = {"good": float(good), "bad": 1.0 - good}
        known = {"cats": cats} if pipe == "textcat" else {"tags": tags[len(text.split())]}
        examples.append(Example.from_dict(nlp.make_doc(text), known))
    sgd = nlp.initialize(lambda: examples)
    assert ("fusedopt" in optimizer["@optimizers"]) == ("fusedopt" in type(sgd).__module__)
    return np.array([nlp.update(examples, sgd=sgd, losses={})[pipe] for _ in range(STEPS)])


@pytest.mark.parametrize("pipe", ["textcat", "tagger"])
@pytest.mark.parametrize("betas, bound", [((0.9, 0.999), 1e-5), ((0.875, 1 - 2**-10), 1e-6)])
def test_spacy(pipe, betas, bound):
    """A config names the optimizer; the losses are those of thinc's."""
    spacy = pytest.importorskip("spacy", reason="compares with it: pip install spacy==3.8.18")
    config = re.search(r"```ini\n(.*?)```", PAGE, re.S)[1]
    options = spacy.util.load_config_from_str("[training]\n" + config)["training"]["optimizer"]
    options = options | {"beta1": betas[0], "beta2": betas[1]}
    ours = losses(spacy, pipe, options)
    theirs = losses(spacy, pipe, options | {"@optimizers": "Adam.v1"})
    assert np.abs(ours - theirs).max() <= bound * theirs[0]
    assert theirs[-1] < 1e-3 * theirs[0]
