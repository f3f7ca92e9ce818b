"""Step options: the bits of the reference, and the results of separate operations in NumPy."""

import pickle
import threading
from copy import copy, deepcopy
from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest
from cases import ALL_STEP_OPTIONS as ALL
from cases import CASES, TILE, canonical, isa, takes, threads, values
from cases import STEP_OPTIONS as OPTIONS

import fusedopt
from fusedopt import _core, reference
from fusedopt.formats import Stored

BF16 = ml_dtypes.bfloat16
SHAPES = [(), (1,), (0,), (15, 1), (17,), (TILE - 1,), (3, TILE), (5 * TILE + 3,), (70, 33)]
BIG = [(300 * TILE + 77,), (9, 1000), (33,)]
STORAGE = [
    {},
    {"ema": 0.9},
    {"ema": 0.99, "ema_warmup": True, "state_dtype": "bfloat16"},
    {"state_dtype": "int8", "min_8bit_size": 0, "ema": 0.5},
]


def tree_bytes(x):
    """All bytes of the results of a run, with all NaNs made the same."""
    if isinstance(x, dict):
        return {key: tree_bytes(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [tree_bytes(value) for value in x]
    if isinstance(x, Stored):
        return [canonical(part) for part in x.parts()]
    if isinstance(x, fusedopt.StepStats):
        return [tree_bytes(getattr(x, column)) for column in x.COLUMNS]
    return canonical(x) if isinstance(x, np.ndarray) else canonical(np.asarray(x, np.float64)) if (
        isinstance(x, float)) else x  # fmt: skip


def contents(opt):
    """The bytes of all that an optimizer has, but for its parameters."""
    return tree_bytes([opt.param_groups, opt.state, opt.state_dict()["step"]])


@lru_cache(maxsize=64)
def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [
        np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 2)) for shape in shapes
    ]


def run(module, case, options, storage, shapes, dtype=np.float32, grad_dtype=None, copies=None,
        steps=3, hostile=False):  # fmt: skip
    """The results of three steps with these options."""
    # hostile values have a NaN norm, which makes all values NaN: they have a test of their own
    params = [values(int(np.prod(s)), np.float32, i, hostile).reshape(s) for i, s in
              enumerate(shapes)]  # fmt: skip
    params = [p.astype(dtype) for p in params]
    if len(shapes) > 5:
        params.append(np.asfortranarray(params[-1]))
    given = case.options | case.class_options | storage
    opt = getattr(module, case.cls)(params, **given)
    out = copies and [np.zeros_like(p, copies) for p in params]
    results, left = [], []
    for step in range(steps):
        grads = []
        drawn = draw(step, *[p.shape for p in params])
        for i, (p, g) in enumerate(zip(params, drawn, strict=True)):
            g = g.astype(grad_dtype or dtype)
            if hostile and g.size:
                g = values(g.size, np.float32, 100 + i).reshape(p.shape).astype(g.dtype)
            grads.append(None if i % 7 == 1 + step else np.copy(g, order="K" if i < 9 else "F"))
        results.append(opt.step(grads, copy_out=out, **options))
        left.append(grads)
    return tree_bytes([params, opt.state, out, left, [list(r) for r in results]])


def same(*args, **kwargs):
    ours, theirs = run(fusedopt, *args, **kwargs), run(reference, *args, **kwargs)
    for name, a, b in zip(["params", "state", "copies", "grads", "results"], ours, theirs,
                          strict=True):  # fmt: skip
        assert a == b, name
    return ours


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_bits(case, options):
    """Every option with every other rule, on leaves of many sizes and orders."""
    same(case, options, {}, SHAPES)


@pytest.mark.parametrize("copies", [np.float16, BF16, np.float32])
@pytest.mark.parametrize(
    "dtypes",
    [
        *((np.float32, grad) for grad in (BF16, np.float16, np.float64)),
        (BF16, BF16),
        (np.float16, np.float32),
    ],
)
@pytest.mark.parametrize(
    ("case", "storage"),
    [(c, s) for c in (CASES[0], CASES[-1]) for s in STORAGE if takes(c.cls, s)],
    ids=str,
)
def test_formats(case, dtypes, copies, storage):
    same(case, ALL, storage, SHAPES, *dtypes, copies)


@pytest.mark.parametrize("copies", [np.float16, BF16, np.float64])
@pytest.mark.parametrize("grad_dtype", [np.float32, np.float64, BF16])
def test_double(grad_dtype, copies):
    same(CASES[0], ALL, {"ema": 0.9}, SHAPES, np.float64, grad_dtype, copies)


@pytest.mark.parametrize("name", _core.available_isas())
@pytest.mark.parametrize("case", [CASES[0], CASES[-3], CASES[-1]], ids=str)
def test_isas_and_threads(case, name):
    """Sums do not depend on the width of registers or the number of threads."""
    wanted = run(reference, case, ALL, {"ema": 0.9}, BIG, copies=BF16, steps=2)
    for count in range(1, 9):
        with isa(name), threads(count):
            assert run(fusedopt, case, ALL, {"ema": 0.9}, BIG, copies=BF16, steps=2) == wanted


@pytest.mark.parametrize("name", _core.available_isas())
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hostile_values(options, name):
    """Infinities, NaN and subnormals give the results of IEEE 754."""
    with isa(name):
        same(CASES[0], options, {"ema": 0.9}, SHAPES, copies=np.float16, hostile=True)


def test_alignments():
    """Any byte offset of gradient, parameter and copy gives the same sums."""
    n, results = 3 * TILE + 5, set()
    rng = np.random.default_rng(0)
    for offsets in [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], *rng.integers(0, 64, (8, 3))]:
        p, g, c = (
            np.zeros(4 * n + 64, np.uint8)[o : o + size * n].view(dtype)
            for o, size, dtype in zip(offsets, [4, 4, 2], ["f4", "f4", "f2"], strict=True)
        )
        p[...], g[...] = values(n, np.float32, 0, False), values(n, np.float32, 1, False)
        result = fusedopt.Adam([p]).step([g], copy_out=[c], **ALL)
        results.add((p.tobytes(), c.tobytes(), str(tree_bytes(list(result)))))
    assert len(results) == 1


def test_clip_is_torchs():
    """Like clip_grad_norm_ and then a step, within the rounding of the factor."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(s).astype("f4") for s in [(30, 40), (7,)]]
    grads = [rng.standard_normal(p.shape).astype("f4") for p in start]
    for limit, kind, each in [(1.0, 2, 0), (100.0, 2, 0), (0.5, np.inf, 0), (0.3, 2, 1)]:
        ours = [p.copy() for p in start]
        theirs = [torch.nn.Parameter(torch.tensor(p)) for p in start]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = torch.tensor(g)
        if each:
            for p in theirs:
                torch.nn.utils.clip_grad_norm_([p], limit, norm_type=kind)
        else:
            norm = torch.nn.utils.clip_grad_norm_(theirs, limit, norm_type=kind)
        torch.optim.SGD(theirs, lr=1.0).step()
        result = fusedopt.SGD(ours, lr=1.0).step(
            grads, max_grad_norm=limit, norm_type=kind, per_tensor=bool(each)
        )
        if not each:
            np.testing.assert_allclose(result.grad_norm, float(norm), rtol=1e-6)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------ magnitudes of measured values

MAGNITUDES = [1e-45, 1e-38, 1e-30, 1e-24, 1e-19, 1e-12, 1.0, 1e12, 1e18, 1e20, 1e30, 3e37]
LENGTHS = [1, 15, 16, 17, 63, 64, 65, TILE - 1, TILE, TILE + 65, 5 * TILE + 3]


def measured(module, dtype, storage, magnitudes):
    """Norms of parameters and updates, from a step and from NumPy in float64."""
    rng = np.random.default_rng(1)

    def some(n, kind):
        x = rng.standard_normal(n) * rng.choice(magnitudes, n)
        x[rng.random(n) < 0.2] = 0
        with np.errstate(over="ignore"):
            return x.astype(kind)

    params = [some(n, dtype) for n in LENGTHS]
    grads = [some(n, np.float64 if dtype == np.float64 else np.float32) for n in LENGTHS]
    opt = module.SGD(params, lr=0.5, momentum=0.9, **storage)
    before = [p.copy() for p in opt.master_params().values()]
    stats = opt.step(grads, stats=True).stats
    after = opt.master_params().values()
    moved = [a - b for a, b in zip(after, before, strict=True)]
    norms = [[np.linalg.norm(x.astype(np.float64)) for x in xs] for xs in (after, moved)]
    return [stats.param_norm, stats.update_norm], norms


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [(np.float32, {}), (np.float64, {}), (BF16, {})]
    + [(dtype, {"state_dtype": "int8", "min_8bit_size": 0}) for dtype in (np.float32, BF16)],
    ids=str,
)
@pytest.mark.parametrize("magnitudes", [*([m] for m in MAGNITUDES), MAGNITUDES, [0.0]], ids=str)
def test_norms_of_any_size(magnitudes, storage, dtype):
    """Squares beyond the range of float: over full and partial tiles and blocks."""
    theirs, _ = measured(reference, dtype, storage, magnitudes)
    for name in _core.available_isas():
        with isa(name):
            ours, norms = measured(fusedopt, dtype, storage, magnitudes)
        assert tree_bytes(ours) == tree_bytes(theirs)
        np.testing.assert_allclose(ours, norms, rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_norms_of_infinities_without_a_scale():
    p = np.ones(3, np.float32)
    result = fusedopt.SGD(p).step(np.full(3, np.inf, np.float32), grad_scale=0.0, stats=True)
    assert np.isnan(result.stats["params"]["grad_norm"]) and np.isnan(p).all()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_norms_of_non_finite_parameters(bad):
    for module in (fusedopt, reference):
        p = np.ones(700, np.float32)
        p[100] = bad
        stats = module.SGD({"p": p, "q": np.ones(9, np.float32)}, lr=1.0).step(
            {"p": np.zeros(700, np.float32), "q": np.zeros(9, np.float32)}, stats=True
        ).stats  # fmt: skip
        np.testing.assert_equal(stats.param_norm, [bad, 3.0])


# ------------------------------------------------------------------ finite or not


@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fused", "reference"])
def test_the_least_factor_of_a_clip_for_each_tensor(module):
    """NaN if one is, wherever it stands; of leaves with a gradient alone."""
    opt = module.SGD([np.ones(3, np.float32) for _ in range(3)], lr=0.0)
    grads = [np.full(3, fill, np.float32) for fill in (np.nan, 5, 1)]
    for turn in range(3):
        result = opt.step(grads[turn:] + grads[:turn], max_grad_norm=1.0, per_tensor=True)
        assert np.isnan(result.clip_factor)
    tiny = {"max_grad_norm": 1e-7, "per_tensor": True}
    assert opt.step([None] * 3, **tiny).clip_factor == 1
    grads = [None, np.ones(3, np.float32), None]
    assert opt.step(grads, **tiny).clip_factor == pytest.approx(1e-7 / 3**0.5)


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float64])
def test_a_limit_below_the_least_number(dtype):
    """One that is 0 in float32 limits to 0, with the gradient's sign; in float64 it is itself."""
    found = []
    for module in (fusedopt, reference):
        p = np.zeros(70, dtype)
        opt = module.SGD(p, lr=1.0, momentum=0.5)
        opt.step(np.repeat([-2.0, 3.0, -0.0, 0.0, np.inf], 14).astype(dtype), clip_value=1e-60)
        limit = 1e-60 if dtype == np.float64 else 0.0
        expected = np.repeat([-limit, limit, -0.0, 0.0, limit], 14)
        buffer = opt.state["params"]["momentum_buffer"]
        np.testing.assert_array_equal(buffer, expected)
        np.testing.assert_array_equal(np.signbit(buffer), np.signbit(expected))
        np.testing.assert_array_equal(p, -expected)
        found.append(canonical(p) + canonical(buffer))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["weight_decay", "l1"])
@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fused", "reference"])
def test_a_penalty_below_the_least_number(module, name):
    """One that is 0 in float32 is none: it makes no NaN of an infinite parameter."""
    p = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
    opt = module.SGD(p, lr=1.0, momentum=0.5, **{name: 1e-60})
    opt.step(np.full(4, -0.0, np.float32))
    buffer = opt.state["params"]["momentum_buffer"]
    assert (buffer == 0).all() and np.signbit(buffer).all()
    np.testing.assert_array_equal(p, [np.inf, -np.inf, np.nan, 1.0])


def problem(cls=fusedopt.Adam, **options):
    params = {"a": np.ones(700, np.float32), "b": {"c": np.ones((2, 3), np.float32)}}
    grads = {"a": np.full(700, 0.5, np.float32), "b": {"c": np.full((2, 3), 2.0, np.float32)}}
    return params, grads, cls(params, **options)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fused", "reference"])
def test_skip_and_raise(bad, module):
    params, grads, opt = problem(module.AdamW, ema=0.9)
    opt.step(grads)
    grads["b"]["c"][1, 2] = bad
    before = tree_bytes([params, opt.state])
    result = opt.step(grads, nonfinite="skip", max_grad_norm=1.0, stats=True)
    assert (result.step, result.updated, result.skipped, result.stats) == (1, 0, True, None)
    with pytest.raises(FloatingPointError, match=r"^grads\['b'\]\['c'\]: 1 of 6 elements"):
        opt.step(grads, nonfinite="raise", zero_grads=True)
    assert tree_bytes([params, opt.state]) == before
    assert grads["a"][0] == 0.5
    result = opt.step(grads, nonfinite="skip", zero_grads=True)
    assert result.skipped
    assert not grads["a"].any() and not grads["b"]["c"].any()
    assert opt.step(grads, nonfinite="raise").step == 2


def test_large_finite_gradients_are_finite():
    """Squares that overflow float32 do not overflow here."""
    p = np.zeros(3, np.float32)
    g = np.array([3e38, -3e38, 0], np.float32)
    result = fusedopt.SGD(p, lr=1.0).step(g, max_grad_norm=1.0, nonfinite="raise")
    np.testing.assert_allclose(result.grad_norm, 3e38 * np.sqrt(2), rtol=1e-7)
    np.testing.assert_allclose(p, [-np.sqrt(0.5), np.sqrt(0.5), 0], rtol=1e-6)


# ------------------------------------------------------------------ statistics


def test_stats_are_what_they_say():
    params, grads, opt = problem()
    grads["a"][::2] = 0
    grads["b"]["c"][0, 0] = np.nan
    before = {"a": params["a"].copy(), "b": params["b"]["c"].copy()}
    result = opt.step(grads, stats=True, grad_scale=-2.0)
    stats = result.stats
    assert stats.names == ("params['a']", "params['b']['c']") and len(stats) == 2
    a = stats["params['a']"]
    moved = params["a"].astype("f8") - before["a"]
    np.testing.assert_allclose(a["grad_norm"], 2 * np.sqrt(350) * 0.5)
    np.testing.assert_allclose(a["param_norm"], np.linalg.norm(params["a"].astype("f8")))
    np.testing.assert_allclose(a["update_norm"], np.linalg.norm(moved), rtol=1e-6)
    np.testing.assert_allclose(a["update_ratio"], a["update_norm"] / a["param_norm"])
    np.testing.assert_allclose(a["max_update"], np.abs(moved).max(), rtol=1e-6)
    assert (a["zero_fraction"], a["nonfinite"]) == (0.5, 0)
    assert stats["params['b']['c']"]["nonfinite"] == 1
    assert "StepStats of 2" in repr(stats)


def test_stats_of_leaves_with_a_gradient_only():
    _, grads, opt = problem()
    stats = opt.step({"a": None, "b": grads["b"]}, stats=True).stats
    assert "params['a']" not in stats and list(stats) == ["params['b']['c']"]
    with pytest.raises(KeyError, match=r"params\['a'\]: no such leaf .* known: params\['b'\]"):
        stats["params['a']"]
    assert stats.names == ("params['b']['c']",)
    assert stats.grad_norm.shape == (1,)


# ------------------------------------------------------------------ averages


def test_ema_and_swap():
    params, grads, opt = problem(ema=0.9)
    twin = {k: v.astype("f8") for k, v in (("a", params["a"]), ("c", params["b"]["c"]))}
    for _ in range(5):
        opt.step(grads)
        twin["a"] += 0.1 * (params["a"] - twin["a"])
        twin["c"] += 0.1 * (params["b"]["c"] - twin["c"])
    averages = opt.ema_params()
    np.testing.assert_allclose(averages["params['a']"], twin["a"], rtol=1e-6)
    now = params["a"].copy()
    with pytest.raises(KeyError), opt.swap_ema():
        assert (params["a"] == averages["params['a']"]).all()
        assert (params["b"]["c"] == averages["params['b']['c']"]).all()
        for call in (opt.step, opt.load_state_dict, opt.add_param_group):
            with pytest.raises(RuntimeError, match="leave the block of swap_ema first"):
                call(grads)
        with pytest.raises(RuntimeError, match="leave the block of swap_ema first"):
            opt.master_params()
        raise KeyError
    assert (params["a"] == now).all()
    opt.step(grads)


def test_warmup_forgets_the_start():
    p = np.zeros(4, np.float32)
    opt = fusedopt.SGD(p, lr=1.0, ema=0.999, ema_warmup=True)
    opt.step(np.full(4, -1.0, np.float32))
    np.testing.assert_allclose(opt.ema_params()["params"], 1 - 2 / 11, rtol=1e-6)


def test_swap_of_16_bit_parameters_gives_back_every_bit():
    w = np.linspace(-1, 1, 300).astype(BF16)
    opt = fusedopt.Adam([w], ema=0.5)
    for seed in range(3):
        opt.step([np.random.default_rng(seed).standard_normal(300).astype(BF16)])
    before = w.tobytes(), opt.master_params()["params[0]"].tobytes()
    with opt.swap_ema():
        assert (w == opt.ema_params()["params[0]"].astype(BF16)).all()
    assert (w.tobytes(), opt.master_params()["params[0]"].tobytes()) == before


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_ema_in_checkpoints(tmp_path, suffix):
    params, grads, opt = problem(ema=0.9)
    opt.step(grads)
    opt.save(tmp_path / f"x{suffix}")
    _, _, other = problem(ema=0.9)
    other.load(tmp_path / f"x{suffix}")
    assert tree_bytes(other.state) == tree_bytes(opt.state)
    _, _, without = problem()
    with pytest.raises(ValueError, match="ema"):
        without.load(tmp_path / f"x{suffix}")
    with pytest.raises(ValueError, match="no average"):
        without.ema_params()
    opt.param_groups[0]["ema"] = 0.99
    opt.step(grads)
    opt.param_groups[0]["ema"] = None
    with pytest.raises(ValueError, match="ema: an average is kept from the start"):
        opt.step(grads)
    assert opt.memory()["ema"] == {"resident": 4.0, "moved": 8.0}


# ------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_accumulator(dtype):
    """The sum is NumPy's, its norm that of a step on it, and a step consumes it."""
    params, _, opt = problem()
    sums = fusedopt.GradAccumulator(params)
    rng = np.random.default_rng(0)
    total = {"a": np.zeros(700, "f4"), "c": np.zeros((2, 3), "f4")}
    for _ in range(4):
        g = {"a": rng.standard_normal(700).astype(dtype), "b": {"c": np.ones((2, 3), dtype)}}
        sums.add(g, scale=0.25)
        total["a"] += np.float32(0.25) * g["a"].astype("f4")
        total["c"] += np.float32(0.25) * g["b"]["c"].astype("f4")
    assert sums.count == 4
    assert (sums.grads["a"] == total["a"]).all() and (sums.grads["b"]["c"] == total["c"]).all()
    twin, _, other = problem()
    options = {"max_grad_norm": 0.5, "nonfinite": "raise", "stats": True, "grad_scale": 0.5}
    wanted = other.step({"a": total["a"], "b": {"c": total["c"]}}, **options)
    result = opt.step(sums, **options)
    assert tree_bytes(list(result)) == tree_bytes(list(wanted))
    assert tree_bytes(params) == tree_bytes(twin)
    assert sums.count == 0 and sums.grads == {"a": None, "b": {"c": None}}
    sums.add({"a": g["a"], "b": None})
    assert (sums.grads["a"] == g["a"].astype("f4")).all()
    assert opt.step(sums).updated == 1


def test_accumulator_finds_non_finite_gradients():
    params, grads, opt = problem()
    sums = fusedopt.GradAccumulator(params)
    grads["a"][3] = np.inf
    sums.add(grads)
    with pytest.raises(FloatingPointError, match=r"grads\['a'\]: 1 of 700"):
        opt.step(sums, nonfinite="raise")
    assert sums.count == 1
    assert opt.step(sums, nonfinite="skip").skipped
    grads["a"][3] = 0
    sums.add(grads)
    assert opt.step(sums, nonfinite="skip").step == 1
    sums.add(grads)
    sums.zero()
    assert sums.count == 0
    with pytest.raises(ValueError, match=r"grads\['a'\]: shape"):
        sums.add({"a": np.ones(3, np.float32), "b": None})
    with pytest.raises(TypeError, match="scale"):
        sums.add(grads, scale="1")


def test_accumulator_of_groups():
    a, b = np.ones(3, np.float32), np.ones(4)
    groups = [{"params": [a]}, {"params": b, "lr": 0.5}]
    opt, sums = fusedopt.SGD(groups, lr=1.0), fusedopt.GradAccumulator(groups)
    for _ in range(2):
        sums.add([[np.ones(3, np.float32)], np.ones(4)])
    opt.step(sums)
    assert a.tolist() == [-1] * 3 and b.tolist() == [0] * 4


def test_accumulator_whose_buffers_were_written():
    """A step uses what others add or scale, not what was measured before."""
    for change, options, wanted in [
        (0.01, {"max_grad_norm": 10.0}, (3**0.5, False)),
        (np.nan, {"nonfinite": "skip"}, (np.nan, True)),
    ]:
        p = np.zeros(3, np.float32)
        opt, sums = fusedopt.SGD(p, lr=1.0), fusedopt.GradAccumulator(p)
        sums.add(np.full(3, 100, np.float32))
        kept = sums.grads
        kept *= np.float32(change)
        result = opt.step(sums, **options)
        assert repr((result.grad_norm, result.skipped)) == repr(wanted)
        assert (p == (0 if result.skipped else -1)).all() and not kept.any()
        sums.add(np.full(3, 100, np.float32))
        kept *= np.float32(change)  # through the view read before
        result = opt.step(sums, **options)
        assert repr((result.grad_norm, result.skipped)) == repr(wanted)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_accumulator_of_another_order(per_tensor):
    """Its sums belong to its own leaves, in any order."""

    def run(make):
        p = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}
        grads = {"a": np.full(4, 100, np.float32), "b": np.full(4, 0.1, np.float32)}
        result = fusedopt.SGD(p, lr=1.0).step(
            make(grads), max_grad_norm=1.0, per_tensor=per_tensor, stats=True
        )
        return tree_bytes([p, list(result)])

    def accumulated(grads):
        sums = fusedopt.GradAccumulator({k: np.zeros(4, np.float32) for k in ("b", "a")})
        sums.add(grads)
        return sums

    assert run(accumulated) == run(lambda grads: grads)


def test_accumulator_of_fewer_leaves():
    """A leaf of it without gradients may stand for a whole part of the parameters."""
    tree = [[np.zeros(4, np.float32) for _ in range(1000)], np.zeros(4, np.float32)]
    sums = fusedopt.GradAccumulator([np.zeros(4, np.float32), np.zeros(4, np.float32)])
    sums.add([None, np.full(4, 3, np.float32)])
    assert fusedopt.SGD(tree, lr=1.0).step(sums, max_grad_norm=1.0).grad_norm == 6
    np.testing.assert_allclose(tree[1], -0.5, rtol=1e-6)


def test_accumulator_between_threads():
    """The second of two concurrent calls is refused, and no gradient is lost."""
    p, g = np.zeros(300_000, np.float32), np.ones(300_000, np.float32)
    opt, sums = fusedopt.SGD(p, lr=1.0), fusedopt.GradAccumulator(p)
    added = []

    def add():
        for _ in range(100):
            try:
                sums.add(g)
                added.append(1)
            except RuntimeError as exc:
                assert "another thread" in str(exc)

    thread = threading.Thread(target=add)
    thread.start()
    while thread.is_alive():
        try:
            opt.step(sums)
        except RuntimeError as exc:
            assert "another thread" in str(exc)
    thread.join()
    opt.step(sums)
    assert (p == -len(added)).all()


# ------------------------------------------------------------------ copies


@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BF16])
@pytest.mark.parametrize("copies", [np.float16, BF16])
def test_copies_are_written_always(module, dtype, copies):
    """Also of leaves without gradient and in skipped steps: old contents never stay."""
    params = [values(n, np.float32, n, False).astype(dtype) for n in (0, 5, 3 * TILE + 7)]
    for grads in ([None] * 3, [None, np.full(5, np.inf, dtype), None]):
        opt = module.AdamW(params, lr=0.0, weight_decay=0.0, ema=0.5)
        out = [np.full(p.shape, 777, copies) for p in params]
        result = opt.step(grads, copy_out=out, nonfinite="skip", stats=True)
        assert result.updated == 0
        for p, copied in zip(opt.master_params().values(), out, strict=True):
            assert copied.tobytes() == p.astype(copies).tobytes()


# ------------------------------------------------------------------ wrong input

WRONG = [
    ({"grad_scale": np.nan}, ValueError, "grad_scale: must be finite"),
    ({"grad_scale": "2"}, TypeError, "grad_scale"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm: must be > 0"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm: must be > 0"),
    ({"max_grad_norm": 1.0, "norm_type": 1}, ValueError, "norm_type: expected 2 or inf"),
    ({"norm_type": 3}, ValueError, "norm_type: expected 2 or inf"),
    ({"norm_type": np.inf}, ValueError, "norm_type: no norm is asked for; give max_grad_norm"),
    ({"per_tensor": True}, ValueError, "per_tensor: applies to the clip; give max_grad_norm"),
    ({"max_grad_norm": np.nan}, ValueError, "max_grad_norm: must be finite"),
    ({"max_grad_norm": -np.inf}, ValueError, "max_grad_norm: must be finite"),
    ({"max_grad_norm": 1.0, "per_tensor": 1}, TypeError, "per_tensor"),
    ({"clip_value": 0.0}, ValueError, "clip_value: must be > 0"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite: expected 'propagate' or 'skip' or 'raise'"),
    ({"stats": 1}, TypeError, "stats"),
    ({"stats": None}, TypeError, "stats: expected True or False"),
    ({"zero_grads": 0}, TypeError, "zero_grads: expected True or False"),
    ({"grad_scale": True}, TypeError, "grad_scale: expected a number"),
    ({"grad_scale": np.ones(2)}, TypeError, "grad_scale: expected a number"),
    ({"max_grad_norm": np.full(2, np.inf)}, TypeError, "max_grad_norm: expected a number"),
    ({"norm_type": np.ones(2)}, ValueError, "norm_type: expected 2 or inf"),
    ({"nonfinite": np.array(["skip", "raise"])}, ValueError, "nonfinite: expected 'propagate'"),
    ({"zero_grads": "yes"}, TypeError, "zero_grads"),
    ({"copy_out": {"a": None}}, ValueError, "copy_out: no 'b'"),
]


@pytest.mark.parametrize(("options", "error", "words"), WRONG, ids=str)
def test_wrong_options(options, error, words):
    params, grads, opt = problem()
    before = tree_bytes([params, opt.state, grads])
    with pytest.raises(error, match=words):
        opt.step(grads, **options)
    assert tree_bytes([params, opt.state, grads]) == before


def copies_of(params, **other):
    return {"a": np.zeros_like(params["a"], np.float16), "b": None} | other


def test_wrong_arrays():
    params, grads, opt = problem()
    before = tree_bytes([params, opt.state, grads])
    good = copies_of(params)
    read_only = np.zeros(700, np.float16)
    read_only.flags.writeable = False
    shared = np.zeros((2, 3), np.float32)
    for options, error, words in [
        ({"copy_out": {**good, "a": np.zeros(3, "f2")}}, ValueError, r"copy_out\['a'\]: shape"),
        ({"copy_out": {**good, "a": [0]}}, ValueError, r"copy_out\['a'\]: expected|TypeError"),
        ({"copy_out": {**good, "a": np.zeros(700)}}, TypeError, r"copy_out\['a'\]: a copy of"),
        ({"copy_out": {**good, "a": read_only}}, ValueError, r"copy_out\['a'\]: read-only"),
        ({"copy_out": {**good, "a": params["a"]}}, ValueError, r"copy_out\['a'\]: shares memory"),
        ({"copy_out": {**good, "a": grads["a"]}}, ValueError, r"grads\['a'\]: shares memory"),
        ({"copy_out": {**good, "a": grads["a"]}, "zero_grads": True}, ValueError, "share memory"),
        ({"copy_out": {"a": None, "b": {"c": np.zeros((3, 2), "f4").T}}}, ValueError, "strides"),
    ]:
        with pytest.raises((error, TypeError), match=words):
            opt.step(grads, **options)
    pair = [np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)]
    both = fusedopt.SGD(pair)
    with pytest.raises(ValueError, match=r"grads\[0\] and grads\[1\] share memory"):
        both.step([shared, shared], zero_grads=True)
    fortran = np.asfortranarray(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"grads\[0\]: its memory order differs"):
        both.step([fortran, None], zero_grads=True)
    frozen = np.ones((2, 3), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"grads\[1\]: read-only"):
        both.step([None, frozen], zero_grads=True)
    copy = np.zeros((2, 3), np.float16)
    with pytest.raises(ValueError, match=r"copy_out\[0\] and copy_out\[1\] share memory"):
        both.step([shared, shared.copy()], copy_out=[copy, copy])
    assert tree_bytes([params, opt.state, grads]) == before
    assert all((p == 1).all() for p in pair) and (fortran == 1).all()


@pytest.mark.parametrize("ema", [1.0, -0.1, np.nan, "0.9"])
def test_wrong_ema(ema):
    with pytest.raises((ValueError, TypeError), match="^ema"):
        fusedopt.Adam(np.ones(3), ema=ema)


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("clone", [copy, deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_statistics_are_computed_when_read(clone, is_read):
    """Until then a copy has what they are computed from, and tab completion finds their names."""
    stats = fusedopt.SGD(np.full(5, 2.0), lr=1.0).step(np.ones(5), stats=True).stats
    assert {"names", *stats.COLUMNS} <= set(dir(stats))
    assert not is_read or stats.param_norm == [np.sqrt(5)]
    other = clone(stats)
    assert other["params"] == stats["params"]
    with pytest.raises(AttributeError, match=r"StepStats has no 'norm'; it has names, grad_norm"):
        other.norm  # noqa: B018
