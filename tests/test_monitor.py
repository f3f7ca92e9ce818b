"""The messages and plots of History, and the loss scale."""

import numpy as np
import pytest

import fusedopt
from fusedopt import schedules
from fusedopt.monitor import History


def run(grads_of, steps=60, lr=1e-3, **options):
    """Record steps on one leaf of 100 ones, and on one of 10 with a usual gradient."""
    params = {"tested": np.ones(100, np.float32), "usual": np.ones(10, np.float32)}
    opt, history = fusedopt.SGD(params, lr=lr), History()
    for step in range(steps):
        tested = np.broadcast_to(np.asarray(grads_of(step), np.float32), 100).copy()
        grads = {"tested": tested, "usual": np.ones(10, np.float32)}
        history.record(opt.step(grads, stats=True, **options))
    return history


MOSTLY_ZERO = np.eye(1, 100, dtype=np.float32)[0]


@pytest.mark.parametrize(
    ("grads_of", "options", "words"),
    [
        (lambda step: 0.5, {}, None),
        (lambda step: 0.0, {}, "gradient was 0 everywhere in the last 20 steps: a dead layer"),
        (lambda step: MOSTLY_ZERO, {}, "99% of its gradient is 0"),
        (lambda step: 1e-3 * 1.2**step, {}, "exploding"),
        (lambda step: 0.8**step, {}, "vanishing"),
        (lambda step: 1e-3, {}, "too small; raise the learning rate"),
        (lambda step: 300.0 * (-1) ** step, {}, "too large; lower the learning rate"),
        (lambda step: np.nan if step in (7, 9) else 0.5, {}, "NaN gradient in step 8, and in 1 mo"),
        (lambda step: 0.5, {"steps": 10}, None),
    ],
)
def test_troubles(grads_of, options, words):
    found = run(grads_of, **options).troubles()
    if words is None:
        assert found == []
    else:
        assert any(words in line and line.startswith("params['tested']: ") for line in found), found
        assert not any("params['usual']" in line for line in found)


STEPS = 240
SCHEDULES = {
    "constant": schedules.constant(1.0),
    "linear": schedules.linear(1.0, 0.0, STEPS),
    "polynomial": schedules.polynomial(1.0, 0.0, STEPS, power=3.0),
    "cosine": schedules.cosine(1.0, STEPS),
    "cosine for half the run": schedules.cosine(1.0, STEPS // 2),
    "exponential": schedules.exponential(1.0, 0.1, every=40),
    "staircase": schedules.staircase(1.0, 0.01, every=STEPS // 3),
    "piecewise": schedules.piecewise(1.0, {STEPS - 30: 1e-8}),
    "one_cycle": schedules.one_cycle(1.0, STEPS),
    "one_cycle, late peak": schedules.one_cycle(1.0, STEPS, pct_start=0.95),
    "warmup": schedules.warmup(STEPS // 2, schedules.cosine(1.0, STEPS // 2)),
}
# name -> function that makes the optimizer, with a rate that gives usual steps of 1e-3 to 1e-2
RULES = {
    "adam": lambda p, lr: fusedopt.Adam(p, lr=lambda step: 3e-3 * lr(step)),
    "sgd": lambda p, lr: fusedopt.SGD(p, lr=lambda step: 0.05 * lr(step), momentum=0.9),
    "gd": lambda p, lr: fusedopt.SGD(p, lr=lambda step: 0.1 * lr(step)),
    "lamb": lambda p, lr: fusedopt.LAMB(p, lr=lambda step: 1e-2 * lr(step)),
    "lars": lambda p, lr: fusedopt.LARS(p, lr=lambda step: 1.0 * lr(step)),
}


def regression(make, rate, noise, steps=STEPS):
    """Fit a linear map, and an offset that begins at 0, with noise on the targets."""
    rng = np.random.default_rng(0)
    true = rng.standard_normal((8, 4)).astype(np.float32)
    p = {"W": rng.standard_normal((8, 4)).astype(np.float32), "b": np.zeros(4, np.float32)}
    opt, history = make(p, rate), History()
    for _ in range(steps):
        x = rng.standard_normal((32, 8)).astype(np.float32)
        y = x @ true + 1 + noise * rng.standard_normal((32, 4)).astype(np.float32)
        delta = (x @ p["W"] + p["b"] - y) / 32
        history.record(opt.step({"W": x.T @ delta, "b": delta.sum(axis=0)}, stats=True))
    return history


@pytest.mark.parametrize("noise", [0.0, 1.0])  # without noise, gradients fall to 0
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", RULES)
def test_healthy_runs_have_no_trouble(rule, schedule, noise):
    assert regression(RULES[rule], SCHEDULES[schedule], noise).troubles() == []


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "warmup"])
@pytest.mark.parametrize(("factor", "words"), [(1e-4, "too small; raise"), (500, "too large; low")])
def test_wrong_rates_are_reported_for_any_schedule(schedule, factor, words):
    """A gradient of alternating sign: a step moves the parameter by the rate times its norm."""
    p = np.random.default_rng(0).standard_normal((30, 30)).astype(np.float32)
    g, rate = p.copy(), SCHEDULES[schedule]
    opt, history = fusedopt.SGD(p, lr=lambda step: 1e-3 * factor * rate(step)), History()
    for step in range(STEPS):
        history.record(opt.step(g * np.float32((-1) ** step), stats=True))
    (line,) = history.troubles()
    assert words in line


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("places", [1, 50])
@pytest.mark.parametrize("since", [0, 7, 59])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_non_finite_parameters_are_reported(value, places, since, dtype):
    params = {"tested": np.ones(50, dtype), "usual": np.ones(50, dtype)}
    opt, history = fusedopt.SGD(params, lr=1e-3), History()
    for step in range(60):
        if step == since:
            params["tested"][:places] = value
        grads = {name: np.ones(50, dtype) for name in params}
        history.record(opt.step(grads, stats=True))
    more = "" if since == 59 else f", and in {59 - since} more"
    assert history.troubles() == [
        f"params['tested']: infinite or NaN parameter in step {since + 1}{more}"
    ]


def test_skipped_steps_are_reported():
    history = run(lambda step: np.inf if step % 3 else 0.5, nonfinite="skip")
    assert len(history.steps) == 20 and len(history.skipped) == 40
    assert "40 of 60 steps were skipped" in history.troubles()[0]


def test_columns_and_leaves_without_gradient():
    params = [np.ones(3, np.float32), np.ones(4, np.float32)]
    opt, history = fusedopt.Adam(params), History(window=2)
    ones = [np.ones_like(p) for p in params]
    history.record(opt.step([ones[0], None], stats=True))
    history.record(opt.step(ones, stats=True))
    column = history.column("grad_norm")
    np.testing.assert_allclose(column["params[0]"], [3**0.5] * 2)
    np.testing.assert_allclose(column["params[1]"], [np.nan, 2.0])
    assert history.steps == [1, 2]
    with pytest.raises(ValueError, match="known: grad_norm"):
        history.column("norm")
    with pytest.raises(ValueError, match="stats=True"):
        history.record(opt.step(ones))
    with pytest.raises(ValueError, match="window"):
        History(window=0)


@pytest.mark.parametrize("leaves", [2, 40])
def test_plot(tmp_path, leaves):
    pytest.importorskip("matplotlib")
    params = [np.ones(5, np.float32) for _ in range(leaves)]
    opt, history = fusedopt.Adam(params), History()
    with pytest.raises(ValueError, match="nothing to draw"):
        history.plot()
    for step in range(5):
        grads = [np.full(5, step + i, np.float32) for i in range(leaves)]
        history.record(opt.step(grads, stats=True))
    figure = history.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert [len(ax.lines) for ax in figure.axes] == [leaves, leaves + 1, leaves]


def test_scaler_follows_torchs_rules():
    w = np.ones(4, np.float32)
    opt = fusedopt.SGD(w, lr=1.0)
    scaler = fusedopt.GradScaler(init_scale=4.0, growth_interval=3)
    scales = []
    for step in range(8):
        g = np.full(4, np.inf if step == 4 else 0.25 * scaler.scale, np.float16)
        result = scaler.step(opt, g, max_grad_norm=1e3)
        assert result.skipped == (step == 4)
        scaler.update()
        scales.append(scaler.scale)
    assert scales == [4, 4, 8, 8, 4, 4, 4, 8]
    np.testing.assert_allclose(w, 1 - 7 * 0.25)
    torch = pytest.importorskip("torch")
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0)
    theirs.scale(torch.ones(1))  # makes the state
    scaler.load_state_dict(theirs.state_dict())
    assert scaler.state_dict() == theirs.state_dict()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"init_scale": 0}, ValueError),
        ({"init_scale": 1e-310}, ValueError),
        ({"growth_factor": 1.0}, ValueError),
        ({"backoff_factor": 1.0}, ValueError),
        ({"growth_interval": 0.5}, TypeError),
    ],
)
def test_wrong_scaler(options, error):
    with pytest.raises(error, match=next(iter(options))):
        fusedopt.GradScaler(**options)
    with pytest.raises(ValueError, match="no 'scale'"):
        fusedopt.GradScaler().load_state_dict({})
    for bad in (None, [], dict.fromkeys(fusedopt.GradScaler().state_dict(), "x")):
        with pytest.raises(ValueError, match="^state dict: "):
            fusedopt.GradScaler().load_state_dict(bad)


def test_scaler_of_two_optimizers():
    """Both use the scale of the iteration; one skipped step lowers it once."""
    a, b = np.zeros(3, np.float32), np.zeros(3, np.float32)
    scaler = fusedopt.GradScaler(init_scale=4.0)
    one, two = fusedopt.SGD(a, lr=1.0), fusedopt.SGD(b, lr=1.0)
    for scale in (4.0, 2.0):
        assert scaler.scale == scale
        assert scaler.step(one, np.full(3, np.inf, np.float32)).skipped
        assert not scaler.step(two, np.full(3, scale, np.float32)).skipped
        with pytest.raises(RuntimeError, match=r"stepped already; call update\(\)"):
            scaler.step(one, np.ones(3, np.float32))
        scaler.update()
        with pytest.raises(RuntimeError, match="no optimizer has stepped since"):
            scaler.update()
    assert (a == 0).all() and (b == -2).all() and scaler.scale == 1.0


def test_scaler_refuses_bad_arguments():
    scaler, opt = fusedopt.GradScaler(), fusedopt.SGD(np.ones(3), lr=1.0)
    with pytest.raises(TypeError, match="optimizer: expected an optimizer, got ndarray"):
        scaler.step(np.ones(3), opt)
    scaler.scale = 0.0
    with pytest.raises(ValueError, match="scale: must be > 0"):
        scaler.step(opt, np.ones(3))


def test_scale_stays_a_number():
    scaler = fusedopt.GradScaler(init_scale=1e308, growth_interval=1)
    opt = fusedopt.SGD(np.ones(1), lr=1.0)
    scaler.step(opt, np.ones(1))
    scaler.update()
    assert np.isfinite(scaler.scale)
    for _ in range(2200):
        scaler.step(opt, np.full(1, np.nan))
        scaler.update()
    assert scaler.scale > 0 and np.isfinite(1 / scaler.scale)
