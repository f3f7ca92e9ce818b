"""The range test and the probe: what they suggest, and that nothing of them is left."""

import copy
import os
import random
import signal
from time import perf_counter

import numpy as np
import pytest
from cases import EVERY_CLASS
from test_interrupts import interrupted_at, moments

import fusedopt
from fusedopt import _copies, schedules, tune
from fusedopt.formats import Stored

SHORT = {"start": 1e-4, "stop": 1.0, "steps": 12}
CLASSES = [cls for cls in EVERY_CLASS if cls is not fusedopt.Rprop]  # which reads its rate once


def problem(seed=0, dtype="f4", size=70):
    """Parameters, a generator, and a callback that draws noise from it."""
    rng = np.random.default_rng(seed)
    params = {"W": rng.standard_normal((size, 3)).astype(dtype), "b": np.zeros(5, dtype)}

    def loss_and_grads():
        noise = {k: 0.1 * rng.standard_normal(p.shape) for k, p in params.items()}
        error = {k: p - 0.3 + noise[k] for k, p in params.items()}
        loss = sum(float((e * e).sum()) for e in error.values())
        return loss, {name: (2 * e).astype(params[name].dtype) for name, e in error.items()}

    return params, rng, loss_and_grads


def image(opt, params, rng):
    """All that a test must leave as it is: bytes, numbers, and objects that must be the same."""
    tree = params.values() if isinstance(params, dict) else [a for p in params for a in p.values()]
    arrays = [np.asarray(a) for a in tree]
    for own in opt.state.values():
        for value in own.values():
            arrays += value.parts() if isinstance(value, Stored) else [np.asarray(value)]
    groups = [dict(group) for group in opt.param_groups]
    objects = [id(opt.param_groups), *map(id, opt.param_groups), *map(id, vars(opt))]
    values = [a.tobytes() for a in arrays], opt.state_dict()["step"], groups
    return *values, objects, copy.deepcopy(rng.bit_generator.state)


def warmed(cls, params, loss_and_grads, **options):
    opt = cls(params, **options)
    for _ in range(2):
        opt.step(loss_and_grads()[1])
    return opt


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_rule_is_restored_and_gives_the_same_answer(cls):
    params, rng, loss_and_grads = problem()
    if cls.rule.demand_shape is not None:
        del params["b"]
    opt = warmed(cls, params, loss_and_grads, lr=0.01)
    before = image(opt, params, rng)
    first = tune.range_test(opt, loss_and_grads, **SHORT, rng=rng)
    assert image(opt, params, rng) == before
    second = tune.range_test(opt, loss_and_grads, **SHORT, rng=rng)
    assert first.losses.tobytes() == second.losses.tobytes() and len(set(first.losses)) > 3
    assert first.suggestion == second.suggestion


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_training_goes_on_as_without_a_test(cls):
    found = []
    for tested in (False, True):
        params, rng, loss_and_grads = problem()
        if cls.rule.demand_shape is not None:
            del params["b"]
        opt = warmed(cls, params, loss_and_grads, lr=lambda t: 0.01 / t)
        if tested:
            tune.range_test(opt, loss_and_grads, **SHORT, rng=rng)
        for _ in range(3):
            opt.step(loss_and_grads()[1])
        found.append([p.tobytes() for p in params.values()])
    assert found[0] == found[1]


OPTIONS = [
    {"state_dtype": "int8", "min_8bit_size": 0},
    {"state_dtype": "bfloat16"},
    {"ema": 0.9},
    {"amsgrad": True, "lr": schedules.warmup(5, schedules.cosine(0.1, 20))},
]
MASTERS = [None, 24, 16]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_formats_averages_and_schedules(options):
    params, rng, loss_and_grads = problem()
    opt = warmed(fusedopt.AdamW, params, loss_and_grads, **options)
    before = image(opt, params, rng)
    found = tune.range_test(opt, loss_and_grads, **SHORT, rng=rng)
    assert image(opt, params, rng) == before and len(set(found.losses)) > 3


@pytest.mark.parametrize("bits", MASTERS)
def test_bits_that_a_parameter_does_not_show(bits):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    params, rng, loss_and_grads = problem(dtype=ml_dtypes.bfloat16)
    opt = warmed(fusedopt.AdamW, params, loss_and_grads, lr=0.01, master_bits=bits)
    before = image(opt, params, rng)
    tune.range_test(opt, loss_and_grads, **SHORT, rng=rng)
    assert image(opt, params, rng) == before


def test_groups_keep_the_ratios_of_their_rates():
    a, b = np.ones(3), np.ones(3)
    opt = fusedopt.SGD([{"params": a, "lr": lambda t: 0.2 * t}, {"params": b, "lr": 0.1}])
    opt.step([a * 0, b * 0])  # the next is step 2: rates 0.4 and 0.1
    rates = []

    def loss_and_grads():
        rates.append((1 - a[0], 1 - b[0]))
        return 1.0, [np.ones(3), np.ones(3)]

    found = tune.range_test(opt, loss_and_grads, start=0.1, stop=1, steps=10, kind="linear")
    moved = np.diff(np.array(rates), axis=0)
    np.testing.assert_allclose(moved[:, 0], found.rates[:-1])
    np.testing.assert_allclose(moved[:, 1], found.rates[:-1] / 4)
    np.testing.assert_allclose(np.diff(found.rates), 0.1)
    assert callable(opt.param_groups[0]["lr"]) and opt.param_groups[1]["lr"] == 0.1
    assert (a == 1).all() and found.suggestion is None and "did not fall" in found.reason


def test_schedule_free_shows_the_same_average():
    params, rng, loss_and_grads = problem()
    opt = warmed(fusedopt.ScheduleFreeAdamW, params, loss_and_grads, lr=0.01)
    before = {name: a.copy() for name, a in opt.ema_params().items()}
    tune.range_test(opt, loss_and_grads, **SHORT, rng=rng)
    assert all((a == before[name]).all() for name, a in opt.ema_params().items())
    with opt.swap_ema(), pytest.raises(RuntimeError, match="leave the block of swap_ema"):
        tune.range_test(opt, loss_and_grads, **SHORT)
    opt.step(loss_and_grads()[1])


def test_copies_are_put_back():
    params, rng, loss_and_grads = problem()
    half = {name: np.zeros(p.shape, "f2") for name, p in params.items()}
    opt = fusedopt.SGD(params, lr=0.1)
    opt.step(loss_and_grads()[1], copy_out=half)
    before = [a.tobytes() for a in half.values()]
    tune.range_test(opt, loss_and_grads, **SHORT, copy_out=half)
    assert [a.tobytes() for a in half.values()] == before


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_what_the_callback_raises_arrives_and_all_is_back(after, error):
    params, rng, loss_and_grads = problem()
    opt = warmed(fusedopt.Adam, params, loss_and_grads, ema=0.9)
    before, calls = image(opt, params, rng), []

    def failing():
        calls.append(1)
        if len(calls) > after:
            raise error
        opt.param_groups[0]["betas"] = (0.1, 0.2)  # which is undone too
        return loss_and_grads()

    with pytest.raises(error):
        tune.range_test(opt, failing, **SHORT, rng=rng)
    assert len(calls) == after + 1 and image(opt, params, rng) == before


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_sweep(loss):
    params, rng, loss_and_grads = problem()
    opt = warmed(fusedopt.SGD, params, loss_and_grads, lr=0.1)
    before, calls = image(opt, params, rng), []

    def breaking():
        calls.append(1)
        real, grads = loss_and_grads()
        return (real if len(calls) < 4 else loss), grads

    found = tune.range_test(opt, breaking, **SHORT, rng=rng)
    assert image(opt, params, rng) == before
    assert found.diverged and len(found.losses) == len(found.rates) == 4
    assert found.suggestion is None and "begin with a lower rate" in found.reason


def test_gradients_that_a_step_refuses_end_the_sweep():
    params, rng, loss_and_grads = problem()
    opt = fusedopt.SGD(params, lr=0.1)

    def broken():
        loss, grads = loss_and_grads()
        grads["b"][1] = np.nan
        return loss, grads

    found = tune.range_test(opt, broken, **SHORT, nonfinite="raise")
    assert found.diverged and len(found.losses) == 1


@pytest.mark.slow("interrupts a sweep at every line")
@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.ScheduleFreeAdamW, fusedopt.Prodigy])
def test_interrupted_at_every_line(cls):
    """Ctrl-C at each line of code: all is back, and the next test gives the answer."""
    params, rng, loss_and_grads = problem(size=2)
    narrow = {"state_dtype": "int8", "min_8bit_size": 0} if cls is fusedopt.Adam else {}
    opt = warmed(cls, params, loss_and_grads, **narrow)
    before = image(opt, params, rng)
    short = SHORT | {"steps": 10}
    expected = tune.range_test(opt, loss_and_grads, **short, rng=rng).losses.tolist()

    def test():
        tune.range_test(opt, loss_and_grads, **short, rng=rng)

    came = 0
    for when in moments(test, 37):
        came += interrupted_at(when, test)
        assert image(opt, params, rng) == before, when
    assert came > 500
    assert tune.range_test(opt, loss_and_grads, **short, rng=rng).losses.tolist() == expected


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_interrupted_at_any_moment():
    params, rng, loss_and_grads = problem(size=3000)
    opt = warmed(fusedopt.Adam, params, loss_and_grads)
    before, came, start = image(opt, params, rng), 0, perf_counter()
    tune.range_test(opt, loss_and_grads, **SHORT, rng=rng)
    longest = perf_counter() - start

    def ring(*_):
        raise InterruptedError

    handler = signal.signal(signal.SIGALRM, ring)
    try:
        for i in range(150):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + longest * (i * 0.618 % 1))
                    tune.range_test(opt, loss_and_grads, **SHORT, rng=rng)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except InterruptedError:  # also one that came right before the timer was stopped
                came += 1
            assert image(opt, params, rng) == before
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert came > 30


def test_undone():
    """All calls are made, in order, and again where a signal's exception came; it is raised."""
    made = []

    def interrupted(name):
        made.append(name)
        if made.count(name) < 2:
            raise KeyboardInterrupt

    def broken():
        made.append("broken")
        raise ValueError("no")

    assert _copies.undone([("a", made.append, 1), ("b", made.append, 2)], lambda: 3) == 3
    with pytest.raises(KeyboardInterrupt):
        _copies.undone([("a", interrupted, 3), ("b", made.append, 4)], lambda: 5)
    with pytest.raises(RuntimeError, match="b: cannot be restored: no"):
        _copies.undone([("b", broken), ("c", made.append, 6)], lambda: 1 / 0)
    assert made == [1, 2, 3, 3, 4, "broken", "broken", "broken", 6]


GENERATORS = [
    np.random.default_rng(1), np.random.Generator(np.random.MT19937(2)),
    np.random.RandomState(3), random.Random(4),
]  # fmt: skip


def test_generators():
    params, _, loss_and_grads = problem()
    opt = fusedopt.SGD(params, lr=0.1)

    def draw():
        return [g.random() for g in GENERATORS]

    def drawing():
        draw()
        return loss_and_grads()

    kept = copy.deepcopy(GENERATORS)
    tune.range_test(opt, drawing, **SHORT, rng=GENERATORS)
    assert draw() == [g.random() for g in kept]
    with pytest.raises(TypeError, match="rng: expected a generator, got int"):
        tune.range_test(opt, drawing, **SHORT, rng=3)


@pytest.mark.parametrize("rule", tune.RULES)
@pytest.mark.parametrize("curvature", [0.01, 1.0, 100.0])
def test_suggestion_on_a_quadratic(rule, curvature):
    """SGD on c x^2 / 2 diverges beyond 2 / c, and is best at 1 / c."""
    w = np.linspace(-1, 1, 40)
    opt = fusedopt.SGD(w, lr=1.0)

    def loss_and_grads():
        return float(curvature * w @ w / 2), curvature * w

    found = tune.range_test(
        opt, loss_and_grads, start=1e-5 / curvature, stop=1e3 / curvature, rule=rule
    )
    assert found.diverged and 0.01 < found.suggestion * curvature < 1, found
    assert 1 < found.rates[-1] * curvature < 30
    assert found.by("steepest").losses is found.losses and found.by(rule).rule == rule


def test_why_there_is_no_suggestion():
    w = np.ones(4)
    opt, rng = fusedopt.SGD(w, lr=1.0), np.random.default_rng(0)

    def noise():
        return rng.standard_normal(), np.zeros(4)

    def quadratic():
        return float(w @ w), 2 * w

    found = tune.range_test(opt, noise, divergence=1e9)
    assert found.suggestion is None and "did not fall by more than its noise" in found.reason
    for rule in tune.RULES:
        low = tune.range_test(opt, quadratic, start=1e-6, stop=1e-2, rule=rule)
        assert low.suggestion is None and "sweep beyond 0.01" in low.reason, low
    high = tune.range_test(opt, quadratic, start=5.0)
    assert high.suggestion is None and "begin with a lower rate" in high.reason
    assert "suggestion: none (steepest: the loss diverged at" in repr(high)


def test_a_negative_loss_that_falls_does_not_diverge():
    w = np.zeros(3)
    opt = fusedopt.SGD(w, lr=1.0)

    def loss_and_grads():
        return float(((w - 1) ** 2).sum()) - 100, 2 * (w - 1)

    found = tune.range_test(opt, loss_and_grads, start=1e-5, stop=0.3)
    assert not found.diverged and len(found.rates) == 100
    assert 1e-3 < found.suggestion < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, "start: must be > 0"),
        ({"start": 2.0, "stop": 1.0}, "stop: must be above start"),
        ({"steps": 9}, "steps: must be >= 10"),
        ({"kind": "cubic"}, "kind: "),
        ({"rule": "lowest"}, "rule: "),
        ({"smoothing": 1.0}, "smoothing: "),
        ({"divergence": 1.0}, "divergence: must be > 1"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    params, _, loss_and_grads = problem()
    with pytest.raises(ValueError, match=message):
        tune.range_test(fusedopt.SGD(params), loss_and_grads, **options)


def test_bad_callbacks():
    params, _, loss_and_grads = problem()
    with pytest.raises(ValueError, match="lr: Rprop's is what its step sizes begin with"):
        tune.range_test(fusedopt.Rprop(params), loss_and_grads)
    opt = fusedopt.SGD(params)
    with pytest.raises(TypeError, match="loss_and_grads: expected a callable"):
        tune.range_test(opt, 3)
    with pytest.raises(TypeError, match="opt: expected an optimizer of fusedopt, got dict"):
        tune.range_test({}, loss_and_grads)
    with pytest.raises(TypeError, match="loss: expected a number or an array of one element"):
        tune.range_test(opt, lambda: ("x", params))
    with pytest.raises(ValueError, match=r"grads\['W'\]"):
        tune.range_test(opt, lambda: (1.0, {"W": np.ones(3, "f4"), "b": params["b"]}))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_plot(tmp_path, kind):
    pytest.importorskip("matplotlib")
    params, rng, loss_and_grads = problem()
    opt = fusedopt.SGD(params, lr=0.1)
    found = tune.range_test(opt, loss_and_grads, start=1e-4, stop=2.0, kind=kind, rng=rng)
    figure = found.plot(tmp_path / "test.png")
    assert os.path.getsize(tmp_path / "test.png") > 5000
    assert figure.axes[0].get_xscale() == ("linear" if kind == "linear" else "log")


# ---------------------------------------------------------------------- probe


@pytest.mark.parametrize("given", [3, [5, 6]])
def test_probe_leaves_nothing_and_repeats(given):
    params, rng, loss_and_grads = problem()
    opt = warmed(fusedopt.AdamW, params, loss_and_grads)
    before = image(opt, params, rng)
    first = tune.probe(params, loss_and_grads, seeds=given, rng=rng)
    assert image(opt, params, rng) == before
    second = tune.probe(params, loss_and_grads, seeds=given, rng=rng)
    assert first.curves.tobytes() == second.curves.tobytes()
    assert len(set(first.estimates)) == len(first.estimates) == (given if given == 3 else 2)
    assert first.estimates.min() <= first.suggestion <= first.estimates.max()
    assert first.spread == first.estimates.max() / first.estimates.min() < 3
    assert f"suggestion: {first.suggestion:.3g} for AdamW" in repr(first)


def test_probe_follows_the_scale_of_the_problem():
    """d is a distance: the same problem in parameters 10 times as large has a rate 10 times."""
    rates = []
    for scale in (1.0, 10.0):
        w, target = np.zeros(50), scale * np.linspace(-1, 1, 50)
        found = tune.probe(w, lambda w=w, t=target: (1.0, w - t), seeds=1)
        rates.append(found.suggestion)
        assert not w.any()
    assert 5 < rates[1] / rates[0] < 20


def test_probe_says_why_there_is_no_rate():
    w = np.ones(5)
    broken = tune.probe(w, lambda: (np.nan, w), seeds=2)
    assert broken.suggestion is None and "infinite or NaN" in broken.reason
    flat = tune.probe(w, lambda: (1.0, 0 * w), seeds=1)
    assert flat.suggestion is None and "never rose" in flat.reason
    with pytest.raises(ZeroDivisionError):
        tune.probe(w, lambda: (1 / 0, w))
    with pytest.raises(ValueError, match="seeds: is empty"):
        tune.probe(w, lambda: (1.0, w), seeds=[])
    with pytest.raises(TypeError, match="rng: expected a numpy.random.Generator"):
        tune.probe(w, lambda: (1.0, w), rng=random.Random(1))
    assert (w == 1).all()


@pytest.mark.slow("interrupts a sweep at every line")
def test_probe_interrupted_at_every_line():
    params, rng, loss_and_grads = problem(size=2)
    opt = fusedopt.AdamW(params)
    before = image(opt, params, rng)

    def test():
        tune.probe(params, loss_and_grads, steps=10, rng=rng)

    test()  # what is cached at first runs no lines later
    came = 0
    for when in moments(test, 101):
        came += interrupted_at(when, test)
        assert image(opt, params, rng) == before, when
    assert came > 500
