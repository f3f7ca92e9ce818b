"""Schedules: values at the borders, torch's closed forms, bad arguments."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedopt import schedules as s

ALL = [
    s.constant(0.5),
    s.linear(0.5, 0.1, 10),
    s.polynomial(0.5, 0.0, 10, power=2.0),
    s.cosine(0.5, 10, end=0.1),
    s.exponential(0.5, 0.9, every=3),
    s.staircase(0.5, 0.1, every=3),
    s.piecewise(0.5, {3: 0.1, 7: 2.0}),
    s.one_cycle(0.5, 20),
    s.warmup(5, s.cosine(0.5, 10)),
]


def test_borders():
    assert s.constant(0.5)(10**9) == 0.5
    line = s.linear(1.0, 0.0, 4)
    assert [line(k) for k in range(1, 8)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    half = s.cosine(1.0, 10, end=0.5)
    assert (half(1), half(6), half(11), half(99)) == (1.0, 0.75, 0.5, 0.5)
    assert [s.staircase(1.0, 0.5, 2)(k) for k in range(1, 6)] == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert s.exponential(1.0, 0.25, every=2)(2) == 0.5
    assert [s.piecewise(1.0, {2: 0.5, 3: 0.5})(k) for k in (1, 2, 3, 4)] == [1, 1, 0.5, 0.25]
    assert s.polynomial(1.0, 0.0, 2, power=2)(2) == 0.25


# schedule of 10 steps -> rates of steps 1, 10, 11, 12
ENDS = [
    (s.linear(0.5, 0.1, 10), (0.5, 0.14, 0.1, 0.1)),
    (s.polynomial(0.5, 0.1, 10, power=2.0), (0.5, 0.104, 0.1, 0.1)),
    (s.cosine(0.5, 10, end=0.1), (0.5, 0.1 + 0.2 * (1 + math.cos(0.9 * math.pi)), 0.1, 0.1)),
    (s.one_cycle(0.5, 10), (0.02, 2e-6, 2e-6, 2e-6)),
    (s.warmup(5, s.linear(0.5, 0.1, 6)), (0.1, 0.5 - 0.4 * 5 / 6, 0.1, 0.1)),
    (s.exponential(0.5, 0.5, every=10), (0.5, 0.5**1.9, 0.25, 0.5**2.1)),
    (s.staircase(0.5, 0.5, every=10), (0.5, 0.5, 0.25, 0.25)),
    (s.piecewise(0.5, {10: 0.5}), (0.5, 0.5, 0.25, 0.25)),
]


@pytest.mark.parametrize(("schedule", "rates"), ENDS, ids=lambda x: repr(x)[:40])
def test_ends(schedule, rates):
    assert [schedule(k) for k in (1, 10, 11, 12)] == pytest.approx(rates, rel=1e-14)


# steps, pct_start -> step: rate, for a peak of 100 between 4 and 0.0004
ONE_CYCLES = {
    (40, 0.99): {1: 4, 39: 4 + 48 * (1 - math.cos(math.pi * 38 / 38.6)), 40: 0.0004, 41: 0.0004},
    (40, 1.0): {1: 4, 40: 100, 41: 100},
    (40, 0.0): {1: 0.0004 + 49.9998 * (1 + math.cos(math.pi / 40)), 40: 0.0004, 41: 0.0004},
    (40, 0.5): {1: 4, 20: 100, 40: 0.0004},
    (4, 0.25): {1: 100, 4: 0.0004},  # the peak is the first step
    (3, 0.9): {1: 4, 2: 4 + 48 * (1 - math.cos(math.pi / 1.7)), 3: 0.0004},
    (2, 0.5): {1: 100, 2: 0.0004},
    (1, 1.0): {1: 100, 2: 100},
    (1, 0.3): {1: 0.0004, 2: 0.0004},
}


@pytest.mark.parametrize("cycle", ONE_CYCLES, ids=str)
def test_one_cycle(cycle):
    steps, share = cycle
    rate = s.one_cycle(100.0, steps, pct_start=share)
    for step, right in ONE_CYCLES[cycle].items():
        assert rate(step) == pytest.approx(right, rel=1e-9), step


def test_warmup():
    rate = s.warmup(4, s.linear(1.0, 0.0, 4))
    assert [rate(k) for k in range(1, 9)] == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert s.warmup(2, s.constant(1.0), start=0.5)(1) == 0.75
    assert s.warmup(2, lambda step: 2.0)(1) == 1.0


def test_from_optax_counts_from_0():
    seen = []
    rate = s.from_optax(lambda t: seen.append(t) or 0.5)
    assert (rate(1), rate(2), seen) == (0.5, 0.5, [0, 1])


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_is_a_value(schedule):
    """Its repr makes an equal one, it compares by value, and it can be pickled."""
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule), vars(s)) == schedule


@given(st.sampled_from(ALL), st.integers(1, 10**6))
def test_is_bounded(schedule, step):
    value = schedule(step)
    assert isinstance(value, float)
    assert 0 <= value <= 1.0
    assert math.isfinite(value)


BAD = [
    (lambda: s.constant(-1), ValueError, "lr: must be >= 0"),
    (lambda: s.constant("x"), TypeError, "lr: expected a number"),
    (lambda: s.linear(1, 0, 0), ValueError, "steps: must be >= 1"),
    (lambda: s.linear(1, 0, 2.5), TypeError, "steps: expected a whole number"),
    (lambda: s.cosine(1, 10, end=-1), ValueError, "end: must be >= 0"),
    (lambda: s.exponential(1, 0), ValueError, "gamma: must be > 0"),
    (lambda: s.exponential(1, math.nan), ValueError, "gamma: must be finite"),
    (lambda: s.staircase(1, 0.5, 0), ValueError, "every: must be >= 1"),
    (lambda: s.polynomial(1, 0, 5, power=0), ValueError, "power: must be > 0"),
    (lambda: s.piecewise(1, [3]), TypeError, "factors: expected a dict"),
    (lambda: s.piecewise(1, {0: 0.5}), ValueError, "factors: must be >= 1"),
    (lambda: s.piecewise(1, {5: -0.5}), ValueError, r"factors\[5\]: must be > 0"),
    (lambda: s.one_cycle(1, 10, pct_start=2), ValueError, r"pct_start: must be in \[0, 1\]"),
    (lambda: s.one_cycle(1, 10, div_factor=0), ValueError, "div_factor: must be > 0"),
    (lambda: s.warmup(3, 0.1), TypeError, r"then: expected a schedule, got 0.1"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match="^" + message):
        make()


STEPS = 40


def torch_schedulers():
    torch = pytest.importorskip("torch", reason="compares with torch's schedulers: extra `peers`")
    lr = torch.optim.lr_scheduler
    return [
        (s.cosine(0.5, STEPS, end=0.1), lambda o: lr.CosineAnnealingLR(o, STEPS, eta_min=0.1)),
        (s.polynomial(0.5, 0.0, 20, power=2.0), lambda o: lr.PolynomialLR(o, 20, power=2.0)),
        (s.linear(0.5, 0.125, 20), lambda o: lr.LinearLR(o, 1.0, 0.25, total_iters=20)),
        (s.exponential(0.5, 0.9), lambda o: lr.ExponentialLR(o, 0.9)),
        (s.staircase(0.5, 0.1, 7), lambda o: lr.StepLR(o, 7, gamma=0.1)),
        (s.piecewise(0.5, {5: 0.1, 9: 0.1}), lambda o: lr.MultiStepLR(o, [5, 9], gamma=0.1)),
        (s.one_cycle(0.5, STEPS), lambda o: lr.OneCycleLR(o, 0.5, STEPS, cycle_momentum=False)),
        (
            s.one_cycle(0.5, STEPS, pct_start=0.45, div_factor=10.0, final_div_factor=100.0),
            lambda o: lr.OneCycleLR(
                o, 0.5, STEPS, pct_start=0.45, div_factor=10.0, final_div_factor=100.0,
                cycle_momentum=False,
            ),
        ),
    ]  # fmt: skip


def assert_as_torch(ours, make, steps):
    import torch

    opt = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    scheduler = make(opt)
    for step in range(1, steps + 1):
        theirs = opt.param_groups[0]["lr"]
        assert math.isclose(ours(step), theirs, rel_tol=1e-11, abs_tol=1e-15), (ours, step)
        opt.step()
        if step < steps:
            scheduler.step()


def test_agrees_with_torch():
    for ours, make in torch_schedulers():
        past = not isinstance(ours, s.one_cycle)  # torch's raises after its last step
        assert_as_torch(ours, make, STEPS + past)


CYCLES = [
    (share, steps)
    for share in (0.0, 1e-3, 0.01, 0.3, 1 / 3, 0.5, 0.97, 0.99, 0.999, 1.0)
    for steps in (1, 2, 3, 4, 10, 40, 97)
    if share * steps != 1  # the peak is the first step: torch divides by 0
]


@pytest.mark.parametrize(("share", "steps"), CYCLES)
def test_one_cycle_agrees_with_torch(share, steps):
    torch = pytest.importorskip("torch", reason="compares with torch's schedulers: extra `peers`")
    cycle = torch.optim.lr_scheduler.OneCycleLR
    assert_as_torch(
        s.one_cycle(0.5, steps, pct_start=share),
        lambda opt: cycle(opt, 0.5, steps, pct_start=share, cycle_momentum=False),
        steps,
    )
