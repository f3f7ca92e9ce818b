"""Narrow formats: the reference's bits, no bias, and no element damaged or lost."""

import itertools
from functools import lru_cache

import numpy as np
import pytest
from cases import CASES, CLASSES, TILE, assert_same, isa, takes, threads, values

import fusedopt
from fusedopt import _core, formats, reference
from fusedopt.formats import BLOCK, FORMATS, Stored

ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays come from ml_dtypes")
BF16 = np.dtype(ml_dtypes.bfloat16)

NARROW = [name for name, row in FORMATS.items() if row[0] not in (np.float32, np.float64)]
PARAMS = ["float32", *(name for name in NARROW if name not in ("int8", "uint8"))]
GRADS = [np.float32, np.float64, np.float16, BF16]
STATES = ["float32", "bfloat16", "int8"]
STOCHASTIC = ["bfloat16+int8", "int8", "uint8"]  # and those with it in their name
SLOTS = 1 + max(len(cls.rule.states) for cls in CLASSES)


def make(name, n, fill=None, offset=0):
    """An array of n zeros in a format, its parts at a byte offset; `fill` is encoded into it."""

    def zeros(count, dtype):
        memory = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
        return memory[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)

    dtype, extra, per = FORMATS[name]
    data = zeros(n, BF16 if dtype is None else dtype)
    if name in ("float32", "float64"):
        data[...] = 0 if fill is None else fill
        return data
    made = Stored(name, data, None if extra is None else zeros(-(-n // per), extra))
    if fill is not None:
        made.encode(fill)
    return made


def parts_of(array):
    return array.parts() if isinstance(array, Stored) else [array]


def raw(array):
    """The parts of an array as a list, 16-bit floats as float32."""
    out = []
    for x in parts_of(array):
        out.append(x.astype(np.float32) if x.dtype in (BF16, np.float16) else x)
    return out


def state_format(case, k, kind):
    its = getattr(fusedopt, case.cls).rule.states[k]
    if its.wide or kind in its.refuses:
        return "float32"
    is_square = its.squared
    return {"float32": "float32", "bfloat16": "bfloat16-stochastic"}.get(
        kind, "uint8" if is_square else "int8"
    )


@lru_cache(maxsize=200)
def begun(name, n, hostile):
    """The parts of a parameter before a run, which many rows begin with."""
    return parts_of(make(name, n, values(n, np.float32, 1, hostile)))


def run(case, step_of, n, param, grad, state, steps=4, offset=0, hostile=True):
    p = make(param, n, offset=offset)
    for part, start in zip(parts_of(p), begun(param, n, hostile), strict=True):
        part[...] = start
    g = make_grad(n, grad, hostile).copy()
    states = [make(state_format(case, k, state), n, offset=offset) for k in range(len(case.states))]
    with np.errstate(all="ignore"):
        for step in range(case.first_step, case.first_step + steps):
            step_of([p], [g], *[[s] for s in states], step=step, seed=7, **case.options)
    return [part for array in [p, *states] for part in raw(array)]


@lru_cache(maxsize=100)
def make_grad(n, dtype, hostile):
    with np.errstate(all="ignore"):
        return values(n, np.float64, 2, hostile).astype(np.float32).astype(dtype)


def compare(case, *args, isas=None, **kwargs):
    """The bytes of the reference, on this instruction set or on each of some."""
    theirs = run(case, case.reference, *args, **kwargs)
    for name in isas or [_core.isa()]:
        with isa(name):
            ours = run(case, case.fast, *args, **kwargs)
        assert_same(ours, theirs, [f"part {i} with {name}" for i in range(len(ours))])


def test_table_is_that_of_c():
    for name, size, extra, per, stochastic in _core.formats():
        dtype, extra_dtype, every = FORMATS[name]
        assert size == np.dtype(dtype or np.uint16).itemsize
        assert extra == (0 if extra_dtype is None else np.dtype(extra_dtype).itemsize)
        assert per == every
        assert stochastic == (name.endswith("-stochastic") or name in STOCHASTIC)
    assert [row[0] for row in _core.formats()] == list(FORMATS)
    assert _core.BLOCK == BLOCK


@pytest.mark.parametrize(
    ("cls", "state"),
    [(cls, state) for cls in CLASSES for state in STATES if takes(cls.__name__, state)],
)
@pytest.mark.parametrize("param", PARAMS)
def test_steps_from_zero_are_finite(cls, param, state):
    """With a gradient of 0 and state of 0, in every format, with the default epsilon."""
    p = make(param, BLOCK + 3, np.linspace(-2, 2, BLOCK + 3, dtype=np.float32))
    needed = {s.needs: 0.9 for s in cls.rule.states if s.needs == "momentum"}
    opt = cls([p], state_dtype=state, min_8bit_size=0, **needed)
    for _ in range(2):
        opt.step([np.zeros(BLOCK + 3, np.float32)])
        values = [p, *(a for key, a in opt.state["params[0]"].items() if key != "step")]
        decoded = [a.decode() if isinstance(a, Stored) else a for a in values if a is not None]
        assert all(np.isfinite(a).all() for a in decoded if a.dtype.kind == "f")


@pytest.mark.parametrize(
    ("case", "state"),
    [(case, state) for case in CASES for state in STATES if takes(case.cls, state)],
    ids=str,
)
def test_bits(case, state):
    """Every parameter and gradient format with every state format, near borders of blocks."""
    every, isas = list(itertools.product(PARAMS, GRADS)), _core.available_isas()
    large = itertools.cycle([BLOCK - 1, BLOCK, BLOCK + 1, TILE - 1, TILE, TILE + 1, 3 * TILE + 77])
    sizes = itertools.islice(large, CASES.index(case), None)  # each mix has each, over the cases
    rows = list(zip(sizes, every, strict=False))
    rows += zip([0, 1, 2] * 3, every[STATES.index(state) :: 3], strict=False)
    with threads(1):
        for n, (param, grad) in rows:
            compare(case, n, param, grad, state, isas=isas, steps=2)


@pytest.mark.parametrize("name", _core.available_isas())
@pytest.mark.parametrize("n", [1, 63, 65, 4097])
def test_a_block_is_marked_by_its_own_elements_alone(n, name):
    """Behind the end of an array, where gradients are 0, this makes 0 / 0."""
    found = []
    with isa(name):
        for module in (fusedopt, reference):
            p = np.zeros(n, np.float32)
            opt = module.RMSprop(p, eps=0.0, momentum=0.5, state_dtype="int8", min_8bit_size=0)
            opt.step(np.ones(n, np.float32))
            state = opt.state["params"]
            assert (state["momentum_buffer"].extra & 1 == 0).all() and np.isfinite(p).all()
            found.append([part.tobytes() for k in opt.rule.state_names if k in state
                          for part in state[k].parts()])  # fmt: skip
    assert found[0] == found[1]


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("param", ["float32", "bfloat16+int8"])
def test_threads(param, state, count):
    with threads(count):
        compare(CASES[0], 200 * TILE + 77, param, BF16, state, steps=2)


@pytest.mark.parametrize("param", PARAMS)
def test_alignments(param):
    for offset in (1, 2, 3, 5):
        for state in STATES:
            compare(CASES[0], TILE + 9, param, BF16, state, offset=offset)


@pytest.mark.parametrize("master_bits", [None, 16, 24, 32])
@pytest.mark.parametrize(
    ("cls", "state_dtype"),
    [
        (cls, state)
        for cls in CLASSES
        for state in (None, "bfloat16", "int8")
        if takes(cls.__name__, state)
    ],
)
def test_classes(cls, state_dtype, master_bits):
    """Many leaves of several dtypes and layouts, some skipped in some steps."""

    def train(module):
        params = [values(n, np.float32, n, hostile=False).astype(BF16) for n in (3, 70, 5000)]
        params.append(np.asfortranarray(values(6000, np.float32, 98).reshape(60, 100)).astype(BF16))
        params += [values(5000, np.float32, 5, hostile=False), np.ones(9)]
        if master_bits in (None, 16):
            params.append(values(4500, np.float32, 6, hostile=False).astype(np.float16))
        groups = [
            {"params": params[:-1] if params[-1].dtype != float else params[:5]},
        ]
        rule = cls.rule
        asked = [s.needs for s in rule.states if s.needs and not s.counts]
        options = {name: type(rule.defaults[name])(0.9) for name in asked}
        if state_dtype is not None:
            groups[0]["params"] = [p for p in params if p.dtype != float]
        opt = getattr(module, cls.__name__)(
            groups, lr=0.01, master_bits=master_bits, seed=3, state_dtype=state_dtype, **options
        )
        for step in range(3):
            rng = np.random.default_rng(step)
            grads = [
                None if (i + step) % 4 == 0
                else rng.standard_normal(p.shape).astype(BF16 if i % 2 else np.float32, order="A")
                for i, p in enumerate(groups[0]["params"])
            ]  # fmt: skip
            opt.step([grads])
        state = opt.state_dict()["state"]
        out = [p for p in groups[0]["params"]]
        for leaf in state.values():
            out += [a for key, a in leaf.items() if key != "step"]
        return [part for array in out for part in raw(array)]

    ours, theirs = train(fusedopt), train(reference)
    assert_same(ours, theirs, [f"part {i}" for i in range(len(ours))])


# ---------------------------------------------------------------- the codecs


@pytest.mark.parametrize("name", NARROW)
def test_codes_are_stable(name):
    """Decoding and encoding again changes no bit."""
    fill = np.abs(values(5 * BLOCK + 3, np.float32, 4, hostile=False)) % np.float32(7) + 1
    array = make(name, fill.size, fill)
    before = array.decode()
    array.encode(before, key=99)
    assert_same([array.decode()], [before], ["values"])


@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=str)
def test_nearest_is_that_of_the_dtype(dtype):
    x = values(100_000, np.float32, 3)
    array = make(np.dtype(dtype).name, x.size, x)
    with np.errstate(all="ignore"):
        expected = x.astype(dtype).astype(np.float32)
    assert_same([array.data.astype(np.float32)], [expected], ["data"])


def between(dtype):
    """float64 numbers close to the middle between neighbours of a 16-bit dtype, and their codes."""
    infinite = int(np.array(np.inf, dtype).view(np.uint16))
    codes = np.arange(infinite, dtype=np.uint16)
    with np.errstate(over="ignore"):
        low = codes.view(dtype).astype(np.float64)
    high = np.append(low[1:], 2 * low[-1] - low[-2])  # beyond the largest: infinity's place
    middle = (low + high) / 2
    even = codes + (codes & 1)
    below, above = np.nextafter(middle, 0), np.nextafter(middle, np.inf)
    rows = [(low, codes), (below, codes), (middle, even), (above, codes + 1)]
    for part in (2.0**-13, 2.0**-30):  # of the way from the middle to a neighbour
        rows += [
            (middle - part * (middle - low), codes),
            (middle + part * (high - middle), codes + 1),
        ]
    ends = np.array([1e300, np.inf, np.finfo(float).max, 2.0**128, 5e-324, 0.0])
    rows.append((ends, np.array([infinite] * 4 + [0, 0])))
    x = np.concatenate([x for x, _ in rows])
    expected = np.concatenate([code for _, code in rows]).astype(np.uint16)
    return np.concatenate([x, -x]), np.concatenate([expected, expected | 0x8000])


@pytest.mark.parametrize("name", _core.available_isas())
@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=str)
def test_doubles_are_rounded_once(dtype, module, name):
    """Not to float32 first, which may round a number to the middle of its neighbours."""
    x, expected = between(dtype)
    copy = np.empty(x.size + 3, dtype)
    x3 = np.append(x, [np.nan, 1.0, 2.0])
    with isa(name):
        module.SGD(x3, lr=0.0).step(np.zeros(x3.size), copy_out=copy)
    assert np.isnan(float(copy[-3]))
    wrong = np.flatnonzero(copy[:-3].view(np.uint16) != expected)
    assert not wrong.size, (wrong.size, x[wrong[:5]], copy[wrong[:5]])


def test_doubles_are_rounded_once_in_conversions():
    """State of a float64 parameter that is converted to a narrow format is rounded once."""
    x, expected = between(BF16)
    stored = Stored("bfloat16", np.empty(x.size, BF16))
    stored.encode(x)
    assert np.array_equal(stored.data.view(np.uint16), expected)


def test_residual_restores_float32_exactly():
    x = values(50_000, np.float32, 3)
    array = make("bfloat16+int16", x.size, x)
    assert_same([array.decode()], [x], ["master"])
    visible = array.data.astype(np.float32)
    with np.errstate(all="ignore"):
        nearest = x.astype(BF16).astype(np.float32)
        is_tie = np.abs(x - visible) == np.abs(x - nearest)  # away from zero, not to even
    assert ((visible == nearest) | is_tie | np.isnan(x)).all()


def test_short_residual_is_a_neighbour_in_24_bits():
    x = values(50_000, np.float32, 3, hostile=False)
    array = make("bfloat16+int8", x.size, x)
    got = array.decode()
    low, bits = got.view(np.uint32) & 0xFF, x.view(np.uint32).astype(np.int64)
    assert not low.any()
    assert (np.abs(got.view(np.uint32).astype(np.int64) - bits) < 256).all()
    error = np.abs(array.data.astype(np.float32) - got)
    assert (error <= np.abs(got) * np.float32(2.0**-8)).all()  # the bfloat16 is the nearest


@pytest.mark.parametrize("name", [row[0] for row in _core.formats() if row[4]])
def test_rounding_has_no_bias(name):
    """The mean over many keys is the number itself, within 5 standard errors."""
    n, rounds = 1024, 400
    bits = {"float16-stochastic": 10, "bfloat16-stochastic": 7, "bfloat16+int8": 15}
    step = 2.0 ** -bits.get(name, 3)  # of numbers in [1, 2)
    x = (1 + np.random.default_rng(0).random(n)).astype(np.float32)
    share = (x - 1.0) / step % 1
    array, total = make(name, n), np.zeros(n)
    for number in range(rounds):
        array.encode(x, formats.key(1, 2, number, 0))
        total += array.decode().astype(np.float64) - x
    scores = total / step / np.sqrt(rounds * share * (1 - share) + 1)
    assert np.abs(scores).max() < 5.5
    assert abs(scores.mean()) * np.sqrt(n) < 4
    assert 0.8 < scores.std() < 1.2


def test_noise_is_random_enough():
    """Uniform, and uncorrelated with neighbours, the other half, another array or another step."""
    n = 1 << 19
    before = []
    for t in range(8):
        now = []
        for slot in range(SLOTS):
            x = formats.random_bits(20, formats.key(1, 2, t, slot), n // BLOCK).ravel()
            counts = np.bincount(x >> np.uint32(12), minlength=256)
            chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
            assert abs(chi - 255) / np.sqrt(510) < 5
            now.append((x - (2**20 - 1) / 2) / (2**20 / np.sqrt(12)))
        for c in now:
            for lag in (1, 2, 3, 31, 32, 33, 64, 256, 512):
                assert abs((c[lag:] * c[:-lag]).mean()) * np.sqrt(n) < 5
        for a, b in [*itertools.combinations(now, 2), *itertools.product(before, now)]:
            for lag in (0, 32):
                assert abs((a[lag:] * b[: n - lag]).mean()) * np.sqrt(n) < 5
        before = now[:2]


def test_slots_have_factors_of_their_own():
    keys = [formats.key(5, 6, 7, slot) for slot in range(SLOTS)]
    assert len({key & 0xFFFFFFFF for key in keys}) == 1  # the leaf's hash is computed once
    assert len({key >> 32 for key in keys}) == len(keys)
    assert all(key >> 32 & 1 for key in keys)  # else numbers would be lost


@pytest.mark.parametrize("master_bits", [16, 24, 32])
@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "reference"])
def test_updates_below_half_a_unit_are_not_lost(module, master_bits):
    """Many of them move a parameter by their sum, and not at all if their mean is 0."""
    rng = np.random.default_rng(0)
    steps = 1000
    p, q, r = (np.ones(4096, BF16) for _ in range(3))
    still, drift = (module.SGD(x, lr=1e-5, master_bits=master_bits) for x in (p, q))
    noisy = module.Adam(r, lr=1e-5, master_bits=master_bits)
    for i in range(steps):
        still.step(np.full(4096, 0.5, np.float32))
        drift.step(np.full(4096, (-1.0) ** i, np.float32))
        noisy.step(rng.standard_normal(4096).astype(np.float32))
    means = [opt.master_params()["params"].mean(dtype=float) for opt in (still, drift, noisy)]
    # 5 standard errors: of Adam's random walk, and of so many roundings to the unit below 1
    unit = 2.0 ** -(master_bits - 8)
    error = 5e-5 + 5 * np.sqrt(1e-5 * unit * steps / 4096)
    np.testing.assert_allclose(means, [1 - 0.5e-5 * steps, 1, 1], rtol=0, atol=error)


@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_relative_error_of_8_bits(name):
    """Below 1/8 within the window; below it zero, or in uint8 the smallest number."""
    x = np.exp2(-np.arange(BLOCK, dtype=np.float32) / 1.7) * np.float32(3.3)
    array = make(name, BLOCK, x)
    got = array.decode()
    within = x >= x[0] * np.float32(2.0 ** -(13 if name == "int8" else 29))
    assert within.sum() > 20
    assert (np.abs(got - x)[within] < x[within] / 8).all()
    assert (got[~within] <= x[within].min()).all()
    if name == "uint8":
        assert (got > 0).all()
    assert make(name, BLOCK, np.zeros(BLOCK, np.float32)).decode().tolist() == [0.0] * BLOCK


def test_what_second_moments_become_below_the_window():
    """The window's smallest number; below 2^-129 that or 0, at random; 0 for 0."""
    x = np.full(BLOCK, 2.0**-128, np.float32)
    x[0], x[1:17], x[17:] = 1.0, 0.0, np.float32(2.0**-130)
    x[-1] = 2.0**-128
    array, smallest, zeros = make("uint8", BLOCK), 2.0**-31 * 1.125, 0
    for step in range(200):
        array.encode(x, formats.key(0, 0, step, 2))
        got = array.decode()
        assert (got[1:17] == 0).all() and got[-1] == smallest
        assert np.isin(got[17:-1], [0, smallest]).all()
        zeros += (got[17:-1] == 0).sum()
    assert abs(zeros / (200 * 46) - 0.5) < 5 * 0.5 / np.sqrt(200 * 46)


@pytest.mark.parametrize("name", _core.available_isas())
def test_bits_of_tiny_moments(name):
    """Squares around 2^-129, below which moments become 0."""
    rng = np.random.default_rng(0)
    n = 64 * BLOCK
    scale = np.repeat(np.exp2(np.linspace(-75, -50, 64)), BLOCK)
    grads = [(rng.standard_normal(n) * scale).astype(np.float32) for _ in range(6)]
    found = []
    with isa(name):
        for module in (fusedopt, reference):
            p = values(n, np.float32, 1, False)
            opt = module.Adam(p, eps=1e-30, state_dtype="int8", min_8bit_size=0)
            for g in grads:
                opt.step(g)
            state = opt.state["params"]
            found.append([p, *raw(state["exp_avg"]), *raw(state["exp_avg_sq"])])
    assert_same(*found, ["param", "m", "m's blocks", "v", "v's blocks"])
    codes = found[0][3]
    assert (codes == 0).any() and (codes == 1).any() and (codes > 1).any()


@pytest.mark.parametrize("name", ["int8", "uint8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_element_changes_no_other(name, bad):
    x = np.linspace(0.5, 2, 3 * BLOCK).astype(np.float32)
    clean = make(name, x.size, x).decode()
    x[70] = bad
    got = make(name, x.size, x).decode()
    assert np.isnan(got[70])
    assert np.array_equal(np.delete(got, 70), np.delete(clean, 70))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_step_sizes_survive(state_dtype):
    """Rprop reaches its least step on curvatures that span six powers of ten within a block."""
    rng = np.random.default_rng(0)
    curvature = 10 ** rng.uniform(-3, 3, 1 << 14).astype(np.float32)
    p = rng.standard_normal(1 << 14).astype(np.float32)
    opt = fusedopt.Rprop(p, state_dtype=state_dtype)
    for _ in range(120):
        opt.step(curvature * p)
    assert np.mean(np.abs(p) < 2e-6) > 0.9 and np.abs(p).max() < 1e-3


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_second_moment_follows_a_change_of_scale(state_dtype):
    """The mean of v falls with the gradient; rounded to nearest, it would stop changing."""
    rng = np.random.default_rng(0)
    n = 8192
    opt = fusedopt.Adam([np.zeros(n, np.float32)], state_dtype=state_dtype)
    for scale in (1.0, 0.1):
        for _ in range(3000):
            opt.step([(scale * rng.standard_normal(n)).astype(np.float32)])
    exact = 0.01 * (1 - 0.999**3000) + 0.999**3000
    v = opt.state["params[0]"]["exp_avg_sq"].decode()
    assert abs(v.mean() / exact - 1) < 0.05


# ---------------------------------------------------------------- errors, checkpoints, accounts


def bf16(n=100):
    return np.ones(n, BF16)


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: fusedopt.Adam([np.ones(3, np.uint16)]), TypeError, r"uint16.*view\(ml_dtypes"),
        (lambda: fusedopt.Adam([np.ones(3)], state_dtype="int8"), ValueError, "float64 parameter"),
        (lambda: fusedopt.Adam([bf16()], state_dtype="fp8"), ValueError, "None or 'float32' or"),
        (lambda: fusedopt.Adam([bf16()], master_bits=17), ValueError, "master_bits: expected"),
        (lambda: fusedopt.Adam([np.ones(3, "f2")], master_bits=24), ValueError, "needs bfloat16"),
        (lambda: fusedopt.Adam([bf16()], seed=-1), ValueError, "seed: must be >= 0"),
        (lambda: fusedopt.Adam([Stored("int4", bf16())]), ValueError, "unknown format 'int4'"),
        (lambda: fusedopt.Adam([Stored("int8", bf16())]), TypeError, "is not that of int8"),
        (lambda: fusedopt.Adam([Stored("bfloat16+int8", bf16())]), TypeError, "needs extra"),
        (
            lambda: fusedopt.Adam([Stored("bfloat16+int8", bf16(), np.zeros(9, np.int8))]),
            ValueError,
            "extra of shape",
        ),
        (
            lambda: fusedopt.functional.sgd(
                [np.ones(99)], [np.ones(99)], [make("int8", 99)], step=1, momentum=0.9
            ),
            TypeError,
            "int8 does not fit the parameter's float64",
        ),
    ],
)
def test_bad_input(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()


def test_formats_cannot_change_later():
    opt = fusedopt.Adam([np.ones(5000, np.float32)], state_dtype="int8")
    opt.param_groups[0]["state_dtype"] = "bfloat16"
    with pytest.raises(ValueError, match="'bfloat16', but the arrays were made with 'int8'"):
        opt.step([np.ones(5000, np.float32)])


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
def test_checkpoints(tmp_path, state_dtype, suffix):
    """After save and load, training continues as if it had not been interrupted."""

    def make_opt(seed):
        params = [values(5000, np.float32, seed, False).astype(BF16), np.ones(70, np.float32)]
        return params, fusedopt.Adam(params, state_dtype=state_dtype, seed=4)

    grads = [values(5000, np.float32, 9, False), np.ones(70, np.float32)]
    params, opt = make_opt(1)
    others, other = make_opt(1)
    for _ in range(3):
        opt.step(grads)
    opt.save(tmp_path / f"x.{suffix}")
    other.load(tmp_path / f"x.{suffix}")
    for a, b in zip(others, params, strict=True):
        a[...] = b
    opt.step(grads)
    other.step(grads)
    for a, b in zip(params, others, strict=True):
        assert a.tobytes() == b.tobytes()
    for a, b in zip(opt.state.values(), other.state.values(), strict=True):
        for key in a:
            if key != "step":
                assert_same(raw(a[key]), raw(b[key]), ["data", "extra"][: len(raw(a[key]))])


@pytest.mark.parametrize(("source", "target"), [*itertools.permutations(STATES, 2)])
def test_conversion_is_explicit(source, target):
    p = values(5000, np.float32, 1, False)
    old = fusedopt.Adam([p.copy()], state_dtype=source)
    old.step([values(5000, np.float32, 2, False)])
    new = fusedopt.Adam([p.copy()], state_dtype=target)
    with pytest.raises(ValueError, match="convert=True converts"):
        new.load_state_dict(old.state_dict())
    assert new.state["params[0]"]["step"] == 0
    new.load_state_dict(old.state_dict(), convert=True)
    a, b = (
        {k: v.decode() if isinstance(v, Stored) else v for k, v in o.state["params[0]"].items()}
        for o in (old, new)
    )
    assert a["step"] == b["step"] == 1
    assert new.param_groups[0]["state_dtype"] == target
    for key in ("exp_avg", "exp_avg_sq"):
        large = np.abs(a[key]) > np.abs(a[key]).max() * 1e-3
        assert np.abs(b[key][large] / a[key][large] - 1).max() < 0.13


def test_memory():
    n = 64 * 1000
    adam = fusedopt.Adam([np.zeros(n, np.float32)])
    assert adam.memory()["total"] == {"resident": 12.0, "moved": 28.0}
    assert fusedopt.Adam([np.zeros(n, np.float32)], state_dtype="bfloat16").memory()["total"] == {
        "resident": 8.0,
        "moved": 20.0,
    }
    eight = fusedopt.Adam([np.zeros(n, np.float32)], state_dtype="int8").memory()
    assert eight["total"]["moved"] == 16.0 + 4 / BLOCK
    small = fusedopt.Adam([np.zeros(n, BF16)], state_dtype="int8", master_bits=24).memory()
    assert small["residual"] == {"resident": 1.0, "moved": 2.0}
    assert small["total"]["moved"] == 4 + 2 + 2 + 4 + 4 / BLOCK
    assert fusedopt.Adam([np.zeros(n, np.float32)]).memory(grad_itemsize=2)["grad"]["moved"] == 2.0


def test_small_tensors_keep_float32():
    params = [np.ones(4095, np.float32), np.ones(4096, np.float32)]
    state = fusedopt.Adam(params, state_dtype="int8").state
    assert isinstance(state["params[0]"]["exp_avg"], np.ndarray)
    assert isinstance(state["params[1]"]["exp_avg"], Stored)
    state = fusedopt.Adam(params, state_dtype="int8", min_8bit_size=0).state
    assert isinstance(state["params[0]"]["exp_avg"], Stored)


def test_master_has_more_bits_than_the_parameter():
    p = np.ones(100, BF16)
    opt = fusedopt.SGD([p], lr=1e-4)
    for _ in range(10):
        opt.step([np.ones(100, np.float32)])
    assert (p == 1).all()
    assert np.allclose(opt.master_params()["params[0]"], 1 - 1e-3, atol=1e-6)
