"""The messages and plots of History, and the loss scale."""

import runpy
from pathlib import Path

import numpy as np
import pytest

import fusedopt
from fusedopt import StepResult, _checkpoint, schedules
from fusedopt.monitor import ROWS, History

TABLE = runpy.run_path(str(Path(__file__).parent.parent / "bench" / "monitor.py"))


@pytest.mark.slow("trains networks")
def test_precision_and_recall(one_blas_thread):
    """Of 40 trainings, healthy and sick; bench/results/monitor.md has other seeds."""
    precision, recall, _ = TABLE["figures"](range(1))
    assert precision >= 0.9 and recall >= 0.9


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
        (lambda step: 0.0, {}, "dead: the gradient was 0 everywhere in the last 20 records and in"),
        (lambda step: MOSTLY_ZERO, {}, None),  # sparse input
        (lambda step: MOSTLY_ZERO if step > 30 else 0.5, {}, "dying units: 99% of the gradient is"),
        (lambda step: 0.5 if step < 30 else 0.0, {}, "records; lower the learning rate"),
        (lambda step: 1e-3 * 1.2**step, {}, "exploding"),
        (lambda step: 0.8**step, {}, "vanishing"),
        (lambda step: 1e-3, {}, "moves it by 1e-06 of its norm, and faster leaves by 0.0008"),
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
    assert len(history.steps) == 20 and len(history.skipped) == history.skips == 40
    assert "40 of 60 steps were skipped" in history.troubles()[0]


def test_columns_and_leaves_without_gradient():
    params = [np.ones(3, np.float32), np.ones(4, np.float32)]
    opt, history = fusedopt.Adam(params), History(window=2, every=1)
    ones = [np.ones_like(p) for p in params]
    history.record(opt.step([ones[0], None], stats=True))
    history.record(opt.step(ones, stats=True))
    column = history.column("grad_norm")
    np.testing.assert_allclose(column["params[0]"], [3**0.5] * 2)
    np.testing.assert_allclose(column["params[1]"], [np.nan, 2.0])
    assert history.steps == [1, 2]
    with pytest.raises(ValueError, match="known: grad_norm"):
        history.column("norm")
    with pytest.raises(ValueError, match=r"stats=history\.due"):
        history.record(opt.step(ones))
    for options in ({"window": 0}, {"every": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            History(**options)
    with pytest.raises(TypeError, match="loss: expected a number, got 'x'"):
        history.record(opt.step(ones, stats=True), loss="x")
    with pytest.raises(ValueError, match="lr: must be >= 0"):
        history.record(opt.step(ones, stats=True), lr=-1)
    with pytest.raises(ValueError, match="known: loss, lr"):
        history.series("rate")
    assert history.steps == [1, 2]


def long(steps, **options):
    """Steps on one leaf with a loss of 1, 2, ..., of which some are measured."""
    w, g = np.ones(4, np.float32), np.ones(4, np.float32)
    opt, history = fusedopt.SGD(w, lr=1e-6), History(**options)
    for step in range(1, steps + 1):
        g[0] = np.nan if step in (4, 2001) else 1
        result = opt.step(g, stats=history.due, nonfinite="propagate" if step == 4 else "skip")
        history.record(result, loss=5000 + step, lr=1e-6)
        w[...] = 1
    return history


def test_every_tenth_step_is_measured():
    history = long(95)
    assert history.steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91]
    np.testing.assert_allclose(history.series("loss"), [5001, *np.arange(5006.5, 5090, 10)])
    assert (history.series("lr") == 1e-6).all()


def test_memory_is_bounded_and_nothing_of_the_ends_is_lost():
    history = long(3000, every=1, window=5)
    assert history.skipped == [2000]  # the optimizer's count, which a skipped step is none of
    steps = history.steps
    assert len(steps) < ROWS + 10 and set(np.diff(steps[5:-5])) <= {4, 8}
    assert steps[:5] == [1, 2, 3, 4, 5] and steps[-5:] == list(range(2995, 3000))
    assert history.troubles() == ["params: infinite or NaN gradient in step 4"]
    for row, after in zip(history._rows, history._rows[1:], strict=False):
        if not row.step < 2000 <= after.step:  # the skipped step's loss is there
            expected = 5000 + np.arange(row.step + 1, after.step + 1.0).mean() + (row.step >= 2000)
            assert after.loss == pytest.approx(expected)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_saved_and_loaded(tmp_path, suffix):
    if suffix == "safetensors":
        pytest.importorskip("safetensors", reason="extra `safetensors`")
    path = tmp_path / f"h.{suffix}"
    history = long(2020, every=3)
    history.save(path)
    again = History.load(path)
    assert {k: v for k, v in vars(again).items() if k not in ("_rows", "_last")} == {
        k: v for k, v in vars(history).items() if k not in ("_rows", "_last")
    }
    for which in (history, again):
        for step in range(2020, 2100):
            which.record(StepResult(step, updated=0), loss=step)
    assert again.steps == history.steps and again.troubles() == history.troubles()
    for name in ("loss", "lr"):
        np.testing.assert_array_equal(again.series(name), history.series(name))
    np.testing.assert_array_equal(again._table(), history._table())


def test_what_is_no_saved_history(tmp_path):
    path = tmp_path / "h.npz"
    fusedopt.SGD([np.ones(2)], lr=0.1).save(path)
    with pytest.raises(ValueError, match=r"h\.npz: not a saved History: KeyError\('window'\)"):
        History.load(path)
    long(30).save(path)
    arrays, meta = _checkpoint.read(path)
    for changes, altered in [
        ({"window": 0}, {}),
        ({"names": ["a", "b"]}, {}),
        ({"names": 5}, {}),
        ({"broken": [["loss"]]}, {}),
        ({"_wait": -1}, {}),
        ({}, {"table": arrays["table"][0]}),
        ({}, {"step": arrays["step"][:-1]}),
        ({}, {"lr": arrays["lr"][:-1]}),
        ({}, {"sums": np.full(2, np.inf)}),
    ]:
        _checkpoint.write(path, arrays | altered, meta | changes)
        with pytest.raises(ValueError, match=r"h\.npz: not a saved History"):
            History.load(path)


def test_log():
    w = {"W": np.ones(4, np.float32)}
    opt, history = fusedopt.SGD(w, lr=0.1), History(every=2)
    assert history.log() == {}
    g = {"W": np.full(4, 0.5, np.float32)}
    history.record(opt.step(g, stats=history.due, max_grad_norm=9), loss=np.float32(2), lr=0.1)
    logged = history.log()
    assert logged.pop("update_ratio/params['W']") == pytest.approx(0.1 * 0.5 / 0.95)
    assert logged == {
        "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "skipped": 0.0,
        "grad_norm/params['W']": 1.0, "zero_fraction/params['W']": 0.0,
    }  # fmt: skip
    history.record(opt.step(g, stats=history.due), loss=1.0)  # not measured
    assert history.log() == {"loss": 1.0, "skipped": 0.0}


def test_steps_of_loss_alone_come_before_others():
    """Those of an earlier run: the picture shows them, and no leaf is judged by them."""
    history = History(every=1)
    for step in range(1, 31):
        history.record(StepResult(step, updated=0), loss=2.0)
    assert history.troubles() == [] and history.names == []
    opt = fusedopt.SGD(np.ones(3, np.float32), lr=1e-3)
    for _ in range(25):
        history.record(opt.step(np.zeros(3, np.float32), stats=True))
    (line,) = history.troubles()
    assert line.startswith("params: dead")


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_infinite_loss_is_reported(loss):
    history = History()
    for step in range(1, 8):
        history.record(StepResult(step, updated=0), loss=loss if step in (3, 5) else 1.0)
    assert history.troubles() == ["infinite or NaN loss in step 3, and in 1 more"]


@pytest.mark.slow("draws figures")
@pytest.mark.parametrize("leaves", [2, 12, 13, 1000])
@pytest.mark.parametrize(
    ("records", "curves"), [(1, {}), (60, {"accuracy": ([1, 60], [0.5, 0.75])})]
)
def test_plot(tmp_path, leaves, records, curves):
    """A panel for each of loss, curves, rate, norm, ratio and zeros; labels do not overlap."""
    pytest.importorskip("matplotlib")
    params = [np.ones(5, np.float32) for _ in range(leaves)]
    opt, history = fusedopt.Adam(params), History()
    with pytest.raises(ValueError, match="nothing to draw"):
        history.plot()
    for step in range(records):
        grads = [np.full(5, step + i, np.float32) for i in range(leaves)]
        grads[0] = None if step % 7 else grads[0]
        grads[1][:3] = np.inf if step == 40 else 0
        result = opt.step(grads, stats=True, nonfinite="skip")
        history.record(result, loss=np.nan if step == 50 else 0.5**step, lr=1e-3)
    path = None if records == 1 else tmp_path / "x.png"  # writing takes half of the time
    figure = history.plot(path, title="a title", curves=curves)
    if path is None:
        figure.draw_without_rendering()
    else:
        assert path.stat().st_size > 10_000
    labels = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    assert len(figure.axes) == 5 + len(curves)
    assert labels[: len(curves) + 3] == ["training loss", *curves, "learning rate", "gradient norm"]
    maps = [ax for ax in figure.axes if ax.collections and ax.get_ylabel() == ""]
    assert len(maps) == (2 if leaves > 12 else 0)
    for ax in maps:
        texts = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert 12 == len(texts) and not any(
            a.overlaps(b) for a, b in zip(texts, texts[1:], strict=False)
        )
    for ax in figure.axes:
        legend = ax.get_legend()
        assert legend is None or legend.get_window_extent().x1 <= figure.bbox.x1


def test_a_layer_has_one_colour_and_its_bias_is_dashed():
    from fusedopt._picture import COLOURS, _looks

    names = [f"params['dense{i}'][{leaf!r}]" for i in range(3) for leaf in "Wb"]
    for looks in (_looks(names), _looks(["0.weight", "0.bias", "2.weight", "2.bias"])):
        weights, biases = looks[::2], looks[1::2]
        assert [w[0] for w in weights] == [b[0] for b in biases] == list(COLOURS[: len(weights)])
        assert {w[1] for w in weights} == {"-"} and "-" not in {b[1] for b in biases}
    listed = _looks([f"params[{i}]" for i in range(12)])  # no layers to be seen
    assert len(set(map(str, listed))) == 12


def test_losses_share_a_panel(tmp_path):
    pytest.importorskip("matplotlib")
    history = History()
    for step in range(1, 5):
        history.record(StepResult(step, updated=0), loss=2.0 / step)
    figure = history.plot(curves={"held-out loss": ([2, 4], [1.5, 1.0])})
    (ax,) = figure.axes
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "loss"
    assert [line.get_label() for line in ax.lines] == ["records", "held-out loss"]


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
