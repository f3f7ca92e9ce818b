"""The adapter for Keras: the numbers of Keras's optimizers, by one call on its torch backend."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="tests the Keras adapter: extra `keras`")
torch = pytest.importorskip("torch", reason="tests the Keras adapter: extra `keras`")
if keras.backend.backend() != "torch":
    pytest.skip("tests the Keras adapter on the torch backend", allow_module_level=True)
fk = pytest.importorskip("fusedopt.keras")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning"),
]

STEPS = 50
BOUND = {"float32": 1e-5, "float64": 1e-9}
DECAYS = keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.5)
CASES = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "epsilon": 1e-2}),
    ("Adam", {"learning_rate": DECAYS, "weight_decay": 0.1, "use_ema": True}),
    ("Adam", {"gradient_accumulation_steps": 3, "global_clipnorm": 1.0}),
    ("Adam", {"ema_overwrite_frequency": 5, "use_ema": True, "loss_scale_factor": 8.0}),
    ("AdamW", {}),
    ("AdamW", {"learning_rate": 0.01, "weight_decay": 0.3, "clipvalue": 0.5}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "learning_rate": DECAYS}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "clipnorm": 1.0}),
    ("Lion", {}),
    ("Lion", {"beta_1": 0.5, "weight_decay": 0.1}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "epsilon": 1e-2}),
    ("RMSprop", {"momentum": 0.9, "learning_rate": DECAYS}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
    ("Adagrad", {}),
    ("Adagrad", {"initial_accumulator_value": 0.0, "epsilon": 1e-2}),
]


@pytest.fixture
def steps(monkeypatch):
    """Whether each update so far was fusedopt's."""
    taken, step = [], fk._Fused._step
    monkeypatch.setattr(fk._Fused, "_step", lambda *args: taken.append(step(*args)) or taken[-1])
    return taken


def made(library, name, options, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = [(7, 33), (), (600,)]
    variables = [
        keras.Variable(rng.standard_normal(shape), dtype=dtype, name=f"v{i}")
        for i, shape in enumerate(shapes)
    ]
    opt = getattr(library, name)(**options, name="opt")
    opt.build(variables)
    return opt, variables


def values(opt, variables):
    return [v.value.detach().double().numpy().copy() for v in [*variables, *opt.variables]]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{name}-{'-'.join(options)}" for name, options in CASES]
)
def test_equals_keras(name, options, dtype, steps):
    """Parameters and all variables of the optimizer, on the same gradients."""
    pairs = [made(library, name, options, dtype) for library in (fk, keras.optimizers)]
    rng = np.random.default_rng(1)
    for step in range(STEPS):
        grads = [torch.tensor(rng.standard_normal(v.shape), dtype=v.value.dtype)
                 for v in pairs[0][1]]  # fmt: skip
        grads[2] = None if step % 10 == 3 and len(options) < 2 else grads[2]
        for opt, variables in pairs:
            opt.apply([None if g is None else g.clone() for g in grads], variables)
    ours, theirs = (values(*pair) for pair in pairs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=BOUND[dtype], atol=BOUND[dtype])
    assert steps == [True] * (STEPS // options.get("gradient_accumulation_steps", 1))
    assert pairs[0][0].get_config() == pairs[1][0].get_config()
    assert [v.path for v in pairs[0][0].variables] == [v.path for v in pairs[1][0].variables]


def page():
    text = (Path(__file__).parent.parent / "docs" / "keras.md").read_text()
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


def test_page(steps):
    """The classic example learns."""
    pytest.importorskip("sklearn", reason="has the data: extra `demo`")
    keras.utils.set_random_seed(0)
    names = {}
    exec(compile(page(), "docs/keras.md", "exec"), names)
    assert names["accuracy"] > 0.85 and len(steps) == 5 * 47 and all(steps)


def test_classic_example_equals_keras():
    """50 steps of `fit`, in float64: in float32 a rounding may turn a ReLU on or off."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((STEPS * 32, 64)), rng.integers(0, 10, STEPS * 32)
    ends = []
    for library in (fk, keras.optimizers):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(n, activation=how, dtype="float64")
                  for n, how in [(128, "relu"), (128, "relu"), (10, "softmax")]]  # fmt: skip
        model = keras.Sequential([keras.Input((64,), dtype="float64"), *layers])
        model.compile(
            optimizer=library.Adam(), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
        )
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
        ends.append((model.evaluate(x, y, verbose=0), [v.value for v in model.weights]))
    (ours, weights), (theirs, others) = ends
    assert ours == pytest.approx(theirs, abs=1e-5)
    for a, b in zip(weights, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def small(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, name="dense")])
    model.compile(optimizer=optimizer, loss="mse")
    return model


def test_a_file_resumes(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 8)), rng.standard_normal((64, 3))
    model = small(fk.Adam(0.01))
    model.fit(x, y, verbose=0, shuffle=False)
    model.save(tmp_path / "x.keras")
    other = keras.saving.load_model(tmp_path / "x.keras")
    assert type(other.optimizer) is fk.Adam
    theirs = small(keras.optimizers.Adam(0.01))
    theirs.optimizer.build(theirs.trainable_variables)
    theirs.set_weights(model.get_weights())
    for to, value in zip(theirs.optimizer.variables, model.optimizer.variables, strict=True):
        to.assign(value)
    for each in (model, other, theirs):
        each.fit(x, y, verbose=0, shuffle=False)
    for a, b, c in zip(model.weights, other.weights, theirs.weights, strict=True):
        assert torch.equal(a.value, b.value)
        torch.testing.assert_close(a.value, c.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_keras_own(dtype, steps):
    opt, variables = made(fk, "SGD", {"learning_rate": 0.5}, dtype)
    before = values(opt, variables)
    opt.apply([torch.ones(v.shape, dtype=v.value.dtype) for v in variables], variables)
    assert steps == [False]
    assert all((a != b).all() for a, b in zip(before[:3], values(opt, variables), strict=False))


def test_stateless_apply_changes_no_variable(steps):
    opt, variables = made(fk, "Adam", {})
    before = values(opt, variables)
    state, params = [v.value.clone() for v in opt.variables], [v.value.clone() for v in variables]
    grads = [torch.ones_like(p) for p in params]
    new, _ = opt.stateless_apply(state, grads, params)
    assert steps == [False] and not torch.equal(new[0], params[0])
    for a, b in zip(before, values(opt, variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_gradient_that_does_not_fit_is_named():
    opt, variables = made(fk, "Adam", {})
    before = values(opt, variables)
    grads = [torch.ones(v.shape) for v in variables]
    with pytest.raises(ValueError, match="gradient of v2"):
        opt.apply([*grads[:2], torch.ones(599)], variables)
    for a, b in zip(before, values(opt, variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_variables_that_move_are_found(steps):
    opt, variables = made(fk, "SGD", {"momentum": 0.5, "learning_rate": 1.0})
    grads = [torch.ones(v.shape) for v in variables]
    opt.apply(grads, variables)
    old = variables[2].value.data
    variables[2].value.data = torch.zeros(600)
    opt.momentums[2].value.data = torch.zeros(600)
    kept = old.clone()
    opt.apply(grads, variables)
    assert torch.equal(old, kept) and torch.equal(variables[2].value, -torch.ones(600))
    assert steps == [True, True]


def test_autograd_sees_the_update():
    opt, variables = made(fk, "Adam", {})
    loss = variables[0].value.square().sum()
    opt.apply([torch.ones(v.shape) for v in variables], variables)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_where_keras_has_no_tensors_of_torch(monkeypatch):
    monkeypatch.setattr(fk, "_IS_TORCH", False)
    monkeypatch.setattr(fk._Fused, "_step", None)
    ends = []
    for library in (fk, keras.optimizers):
        opt, variables = made(library, "RMSprop", {})
        opt.apply([torch.ones(v.shape) for v in variables], variables)
        ends.append(values(opt, variables))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


JAX = """
import numpy as np, keras, fusedopt.keras as fk
ends = []
for library in (fk, keras.optimizers):
    variables = [keras.Variable(np.ones(5, "float32"))]
    opt = library.Adam(0.1)
    opt.build(variables)
    for _ in range(3):
        opt.apply([np.arange(5, dtype="float32")], variables)
    ends.append(np.array(variables[0].value))
print(keras.backend.backend(), np.array_equal(*ends), ends[0][1] < 0.8)
"""


def test_another_backend_has_keras_own_update(monkeypatch):
    if importlib.util.find_spec("jax") is None:
        pytest.skip("needs JAX: pip install jax")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    run = subprocess.run([sys.executable, "-c", JAX], capture_output=True, text=True)
    assert run.stdout == "jax True True\n", run.stderr
