"""Properties that hold for any data, which hypothesis chooses."""

import inspect

import numpy as np
import pytest
from cases import CASES, CLASSES, TILE, assert_same, threads
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fusedopt
from fusedopt import _check, functional, reference

FLOATS = st.sampled_from([np.float32, np.float64])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)


@st.composite
def leaves(draw):
    """A parameter and a gradient of any shape, dtype, order and values."""
    dtype = draw(FLOATS)
    shape = draw(SHAPES)
    elements = hnp.from_dtype(np.dtype(dtype), allow_nan=True, allow_infinity=True)
    pair = [
        np.array(draw(hnp.arrays(dtype, shape, elements=elements, fill=elements))) for _ in range(2)
    ]
    return [np.array(a, order=draw(st.sampled_from("CF"))) for a in pair]


@settings(max_examples=150, deadline=None)
@given(
    case=st.sampled_from(CASES),
    data=st.lists(leaves(), min_size=1, max_size=5),
    skips=st.lists(st.booleans(), min_size=15, max_size=15),
    count=st.integers(1, 4),
)
def test_is_the_reference(case, data, skips, count):
    """Any leaves, any of them skipped in any step, any number of threads."""
    ours, theirs = ([p.copy(order="K") for p, _ in data] for _ in range(2))
    with threads(count):
        a, b = case.make(ours), case.make(theirs, reference)
        for step in range(3):
            grads = [None if skips[5 * step + i] else g for i, (_, g) in enumerate(data)]
            assert a.step(grads) == b.step(grads)
    assert_same(ours, theirs, [str(i) for i in range(len(ours))])
    for x, y in zip(a.state.values(), b.state.values(), strict=True):
        arrays = [k for k in x if k != "step"]
        assert x["step"] == y["step"]
        assert_same([x[k] for k in arrays], [y[k] for k in arrays], arrays)


RATES = st.floats(0, 1, exclude_max=True)
VALUES = {  # by the check of an option
    _check.positive: st.floats(1e-3, 10),
    _check.nonnegative: st.floats(0, 10),
    _check.number: st.floats(-10, 10),
    _check.decay_rate: RATES,
    _check.decay_rates: st.tuples(RATES, RATES),
    _check.three_decay_rates: st.tuples(RATES, RATES, RATES),
    _check.fraction: st.floats(0, 1),
    _check.optional_positive: st.none() | st.floats(1e-3, 1e7),
    _check.optional_fraction: st.none() | st.floats(0, 1),
    _check.limit: st.floats(0.1, 100),
    _check.any_number: st.floats(-10, 10),
    _check.one_or_more: st.just(1),  # others ask for state of another shape
    _check.exponent: st.none() | st.floats(0, 16),
    _check.around_one: st.tuples(st.floats(0.01, 0.99), st.floats(1.01, 3)),
    _check.interval: st.tuples(st.floats(0, 1), st.floats(1, 100)),
    _check.flag: st.booleans(),
    _check.count: st.integers(0, 9),
    _check.steps: st.integers(0, 9),
}


@pytest.mark.parametrize("function", [cls.__name__.lower() for cls in CLASSES])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), dtype=FLOATS, step=st.integers(1, 10**7))
def test_any_options(function, data, dtype, step):
    """Options of the function, each with any value that its check accepts."""
    fast, plain = getattr(functional, function), getattr(reference, function)
    (rule,) = {cls.rule.for_tensors for cls in CLASSES if cls.__name__.lower() == function}
    known = inspect.signature(fast).parameters
    options = {
        option.name: data.draw(VALUES[option.check], label=option.name)
        for option in (*rule.options, *rule.memory)
        if option.name in known
    }
    if rule.demand is not None:
        try:
            rule.demand("", rule.defaults | options)
        except ValueError:
            reject()
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(TILE + 3).astype(dtype) for _ in range(2)]
    arrays += [rng.random(TILE + 3).astype(dtype) for _ in rule.states]
    ours, theirs = ([a.copy() for a in arrays] for _ in range(2))
    faults = []
    for step_of, (p, g, *states) in ((fast, ours), (plain, theirs)):
        try:
            step_of([p], [g], *[[state] for state in states], step=step, **options)
        except ValueError as fault:  # numbers that do not fit each other
            faults.append(str(fault))
    assert not faults or (len(faults) == 2 and faults[0] == faults[1])
    assert_same(ours, theirs, ["param", "grad", *rule.state_names])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3 * TILE), min_size=1, max_size=40), st.integers(2, 8))
def test_any_sizes_many_leaves(sizes, count):
    """The split over threads steps every leaf and tile exactly once."""
    whole = np.arange(sum(sizes) + 200 * TILE, dtype=np.float64)
    parts = np.split(whole.copy(), np.cumsum(sizes))
    with threads(count):
        fusedopt.SGD(parts, lr=1.0).step([np.ones_like(p) for p in parts])
    assert np.array_equal(np.concatenate(parts), whole - 1)


# layer-wise rules sum over the elements in order
@pytest.mark.parametrize("case", [c for c in CASES if not c.is_layerwise], ids=str)
@settings(max_examples=20, deadline=None)
@given(scale=st.sampled_from([2.0**k for k in range(-8, 9)]), data=st.data())
def test_elements_do_not_mix(case, scale, data):
    """A permutation of the elements permutes the result."""
    n = data.draw(st.integers(1, 2000))
    rng = np.random.default_rng(n)
    p, g, order = rng.standard_normal(n), rng.standard_normal(n) * scale, rng.permutation(n)
    straight, mixed = p.copy(), p[order].copy()
    case.make([straight]).step([g])
    case.make([mixed]).step([g[order]])
    assert np.array_equal(straight[order], mixed)
