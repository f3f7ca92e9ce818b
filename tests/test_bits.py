"""Every step gives the bytes of the reference."""

import hashlib
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from cases import CASES, DTYPES, TILE, assert_same, isa, threads, values

import fusedopt
from fusedopt import _core, reference

STEPS = 4


def run_functional(case, step_of, arrays, options):
    p, g, *states = arrays
    for step in range(case.first_step, case.first_step + STEPS):
        step_of([p], [g], *[[s] for s in states], step=step, **options)


def compare(case, makes, isas=None):
    """Run case on sets of the same arrays, on some instruction sets; all bytes must agree.

    The reference steps the first set's arrays, once.
    """
    theirs = makes[0]()
    run_functional(case, case.reference, theirs, case.options)
    for name, make in itertools.product(isas or [_core.isa()], makes):
        ours = make()
        with isa(name):
            run_functional(case, case.fast, ours, case.options)
        assert_same(ours, theirs, [f"{a} with {name}" for a in ("param", "grad", *case.states)])


def arrays(case, n, dtype, hostile=True):
    states = [np.zeros(n, dtype) for _ in case.states]
    return [values(n, dtype, 1, hostile), values(n, dtype, 2, hostile), *states]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case, dtype):
    """Sizes near the borders of vectors and tiles, on one thread, on each ISA."""
    with threads(1):
        for n in [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, TILE - 1, TILE, TILE + 1, 5 * TILE + 3]:
            compare(case, [lambda n=n: arrays(case, n, dtype)], _core.available_isas())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads(case):
    """Large enough to be split, with a ragged end: each ISA on 1 to 8 threads."""
    begin = arrays(case, 130 * TILE + 77, np.float32)
    theirs = [a.copy() for a in begin]
    run_functional(case, case.reference, theirs, case.options)
    for name, count in itertools.product(_core.available_isas(), range(1, 9)):
        ours = [a.copy() for a in begin]
        with isa(name), threads(count):
            run_functional(case, case.fast, ours, case.options)
        where = f"on {count} threads of {name}"
        assert_same(ours, theirs, [f"{a} {where}" for a in ("param", "grad", *case.states)])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_alignments(case, dtype):
    """Any byte offset of each array, also unaligned ones."""

    def make(offsets):
        out = []
        for x, offset in zip(arrays(case, 2 * TILE + 5, dtype), offsets, strict=True):
            memory = np.zeros(x.nbytes + 64, np.uint8)
            y = memory[offset : offset + x.nbytes].view(dtype)
            y[...] = x
            out.append(y)
        return out

    rng = np.random.default_rng(0)
    n = 2 + len(case.states)
    offsets = [[1] * n, [4] * n, *rng.integers(0, 64, (12, n)).tolist()]
    compare(case, [lambda its=its: make(its) for its in offsets])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtypes", [(np.float32, np.float64), (np.float64, np.float32)], ids=str)
def test_gradient_of_the_other_dtype(case, dtypes):
    def make():
        made = arrays(case, 3 * TILE + 1, dtypes[0], hostile=False)
        made[1] = values(3 * TILE + 1, dtypes[1], 2, hostile=False)
        return made

    compare(case, [make])


SHAPES = [(), (1,), (0,), (3, 5), (TILE,), (7, TILE - 1), (2, 3, 4), (1, 1), (60, 100), (40_001,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_classes(case, dtype):
    """Many leaves of many shapes in one call, some skipped in some steps."""

    def run(module):
        params = [values(int(np.prod(s)), dtype, i).reshape(s) for i, s in enumerate(SHAPES)]
        params.append(np.asfortranarray(values(6 * 50, dtype, 98).reshape(6, 50)))
        params.append(values(2 * 9 * 11, dtype, 99).reshape(2, 9, 11).transpose(2, 0, 1))
        opt = case.make(params, module)
        for step in range(STEPS):
            rng = np.random.default_rng(step)
            grads = [
                None if i % 5 == step else rng.standard_normal(p.shape).astype(dtype)
                for i, p in enumerate(params)
            ]  # in C order: the last two are copied to the parameters' order
            opt.step([g if g is None else np.asarray(g, dtype) for g in grads])
        state = [a for s in opt.state.values() for a in s.values()]
        return params + [np.asarray(a, np.float64 if np.isscalar(a) else None) for a in state]

    ours, theirs = run(fusedopt), run(reference)
    assert_same(ours, theirs, [str(i) for i in range(len(ours))])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_constant_divisor(dtype):
    """sqrt(v) / root is rounded as a division for hard values, though computed by a product."""
    rng = np.random.default_rng(3)
    for step in [1, 2, 3, 10, 1000, 10**6]:
        for beta2 in [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999999]:
            v = (rng.random(40_000) * 10.0 ** rng.integers(-44, 38, 40_000)).astype(dtype)
            args = [np.ones_like(v), np.zeros_like(v), np.ones_like(v), v]
            ours, theirs = [[a.copy() for a in args] for _ in range(2)]
            for f, (p, g, m, w) in [(fusedopt.functional.adam, ours), (reference.adam, theirs)]:
                f([p], [g], [m], [w], step=step, betas=(0.9, beta2), lr=1.0)
            assert_same(ours, theirs, ["param", "grad", "exp_avg", "exp_avg_sq"])


@pytest.mark.parametrize("name", _core.available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_maximum_keeps_a_nan_of_either_side(dtype, name):
    ours, theirs = ([values(1000, dtype, i, hostile=False) for i in range(5)] for _ in range(2))
    for arrays in (ours, theirs):
        arrays[3][::3] = np.nan  # exp_avg_sq
        arrays[4][::2] = np.nan  # max_exp_avg_sq
    with isa(name):
        for f, states in [(fusedopt.functional.adam, ours), (reference.adam, theirs)]:
            f(*[[a] for a in states], step=1)
    assert_same(ours, theirs, ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])


DIGEST = """
import hashlib, numpy as np, fusedopt
rng = np.random.default_rng(0)
params = {"a": rng.standard_normal(70_003).astype("f4"), "b": rng.standard_normal((31, 17))}
opt = fusedopt.AdamW(params, amsgrad=True)
for _ in range(5):
    opt.step({k: rng.standard_normal(v.shape).astype(v.dtype) for k, v in params.items()})
h = hashlib.sha256()
for p in params.values():
    h.update(p.tobytes())
print(h.hexdigest(), fusedopt.info()["isa"].split()[0], fusedopt.get_num_threads())
"""


def test_environment_choices_keep_the_bits():
    """FUSEDOPT_ISA and FUSEDOPT_NUM_THREADS take effect, and change no bit."""
    digests = set()
    for name in _core.available_isas():
        for count in ["1", "3"]:
            env = os.environ | {"FUSEDOPT_ISA": name, "FUSEDOPT_NUM_THREADS": count}
            run = subprocess.run(
                [sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True
            )
            digest, used, used_count = run.stdout.split()
            assert (used, used_count) == (name, count)
            digests.add(digest)
    assert len(digests) == 1
    assert len(next(iter(digests))) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}], ids=str
)
def test_lists_larger_than_caches(options):
    """Prefetching loops give the same bytes and sums, up to the last element."""
    shapes = [4 << 20, TILE + 3]
    ours, theirs = ([values(n, np.float32, 1, False) for n in shapes] for _ in range(2))
    grads = [values(n, np.float32, 2, False) for n in shapes]
    fast, plain = fusedopt.Adam(ours, **options), reference.Adam(theirs, **options)
    for how in ({}, {"stats": True, "max_grad_norm": 1.0}):
        a, b = fast.step(grads, **how), plain.step(grads, **how)
    assert_same(ours, theirs, ["first", "second"])
    assert pickle.dumps(fast.state_dict()["state"]) == pickle.dumps(plain.state_dict()["state"])
    assert a.grad_norm == b.grad_norm
    for column in a.stats.COLUMNS:
        np.testing.assert_array_equal(getattr(a.stats, column), getattr(b.stats, column))
