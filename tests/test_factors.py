"""Rules whose state has other shapes than the parameter: factors of matrices, samples of elements.

Bits are those of the reference. The other tables have arrays whose state is of their own shape.
"""

import ml_dtypes
import numpy as np
import pytest
from cases import ALL_STEP_OPTIONS, FACTOR_CASES, STEP_OPTIONS, canonical, isa, threads
from test_step_options import contents, run, same, tree_bytes

import fusedopt
from fusedopt import _core, functional, reference

BF16 = ml_dtypes.bfloat16
# matrices of a part and of several, tiny ones and many, vectors and numbers
SHAPES = pytest.mark.parametrize(
    "shapes",
    [
        [(70, 33)],
        [(17,), (), (15, 1), (1, 15), (0, 4)],
        [(3, 5, 7, 9), (129, 513), (2, 128, 65), (4, 0), (300, 2)],
        [(40, 6, 3, 3), (1,), (1, 1), (3, 2100)],
    ],
    ids=["one", "small", "several", "convolutions"],
)
STORAGE = [{}, {"ema": 0.9}, {"master_bits": 24}]
EACH = pytest.mark.parametrize("case", FACTOR_CASES, ids=str)
SAMPLES = [case for case in FACTOR_CASES if case.rule == "prodigy"]


def arrays(seed, shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]


MIXED = [(30, 50), (7,), (2, 3, 4), ()]


@SHAPES
@pytest.mark.parametrize("options", [{}, *STEP_OPTIONS], ids=str)
@EACH
def test_step_options(case, options, shapes):
    same(case, options, {}, shapes)


@SHAPES
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("dtypes", [(np.float32, BF16), (BF16, BF16), (BF16, np.float32)])
@EACH
def test_formats(case, dtypes, storage, shapes):
    if "master_bits" in storage and dtypes[0] is not BF16:
        dtypes = (BF16, *dtypes[1:])
    same(case, ALL_STEP_OPTIONS, storage, shapes, *dtypes, np.float16)


@SHAPES
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_narrow_moments(case, state_dtype, shapes):
    """Beside samples, which stay wide."""
    storage = {"state_dtype": state_dtype, "min_8bit_size": 0}
    same(case, ALL_STEP_OPTIONS, storage, shapes)


@SHAPES
@pytest.mark.parametrize("grad_dtype", [np.float32, np.float64, BF16])
@EACH
def test_double(case, grad_dtype, shapes):
    same(case, ALL_STEP_OPTIONS, {"ema": 0.9}, shapes, np.float64, grad_dtype, BF16)


@SHAPES
@pytest.mark.parametrize("options", STEP_OPTIONS[::3], ids=str)
@EACH
def test_hostile_values(case, options, shapes):
    same(case, options, {}, shapes, hostile=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BF16])
@pytest.mark.parametrize("case", FACTOR_CASES[:2] + SAMPLES, ids=str)
def test_gradients_of_zero_are_finite(case, dtype):
    """In rows, columns, or all of a matrix, also before there is any state."""
    params = arrays(0, [(6, 8), (5,), (2, 1, 3)], dtype)
    opt = case.make(params)
    for step in range(3):
        grads = arrays(1 + step, [p.shape for p in params], dtype)
        grads[0][step] = grads[0][:, 3 + step] = 0
        opt.step([np.zeros_like(g) for g in grads] if step == 0 else grads)
        assert all(np.isfinite(p.astype(np.float64)).all() for p in params)


@pytest.mark.parametrize("name", _core.available_isas())
@EACH
def test_isas_and_threads(case, name):
    args = case, ALL_STEP_OPTIONS, {}, [(300, 1700), (900, 3, 3), (2, 257, 64), (999,)]
    wanted = run(reference, *args)
    for count in (1, 2, 5):
        with isa(name), threads(count):
            assert run(fusedopt, *args) == wanted


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_samples_follow_the_memory(case, order):
    """Of an array in column-major order the elements as they lie."""
    p, g = (np.asarray(x, order=order) for x in arrays(0, [(8, 9)] * 2))
    q, h = (x.ravel(order).copy() for x in (p, g))
    ours, theirs = case.make([p]), case.make([q])
    for _ in range(3):
        ours.step([g])
        theirs.step([h])
    assert p.ravel(order).tobytes() == q.tobytes()
    assert tree_bytes(ours.state)["params[0]"]["s"] == tree_bytes(theirs.state)["params[0]"]["s"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@EACH
def test_functions(case, dtype):
    """The class's bits, and what it remembers."""
    params, ours, plain = (arrays(0, MIXED, dtype) for _ in range(3))
    opt = case.make(params)
    rule = opt.rule
    lists = [
        [[None if s.get(row.name) is None else np.copy(s[row.name]) for s in opt.state.values()]
         for row in rule.states] for _ in range(2)
    ]  # fmt: skip
    memory = {row.name: opt.param_groups[0][row.name] for row in rule.memory if not row.shown}
    kept = [dict(memory), dict(memory)]
    for step in range(1, 5):
        grads = arrays(step, MIXED, dtype)
        grads[1] = None if step == 2 else grads[1]
        opt.step(grads)
        if grads[1] is None:
            continue  # functions have one number of steps; the leaf's is one less from now on
        for k, (module, its) in enumerate([(functional, ours), (reference, plain)]):
            found = getattr(module, case.function)(
                its, grads, *lists[k], step=step, **case.options, **kept[k]
            )
            if found is not None:
                kept[k] = {name: found[name] for name in kept[k]}
        if step == 1:
            assert [canonical(p) for p in ours] == [canonical(p) for p in params]
            assert all(opt.param_groups[0][name] == kept[0][name] for name in memory)
        assert [canonical(p) for p in ours] == [canonical(p) for p in plain]
        assert kept[0] == kept[1]


def test_lists_of_parts_fit_the_parameters():
    def call(rows, columns, rest, p=None):
        p = np.ones((3, 4)) if p is None else p
        functional.adafactor([p], [np.ones_like(p)], [rows], [columns], [rest], step=1)
        return p

    rows, columns = np.zeros((3, 1)), np.zeros((1, 4))
    assert (call(rows, columns, None) != 1).all()
    assert (call(None, None, np.zeros(4), np.ones(4)) != 1).all()
    for args, error, match in [
        (
            (None, columns, None),
            ValueError,
            r"row_vars\[0\]: is None; .* needs it, of shape \(3, 1\)",
        ),
        ((rows, columns, np.zeros((3, 4))), ValueError, r"variances\[0\]: .* has none; pass None"),
        ((np.zeros(3), columns, None), ValueError, r"row_var: shape \(3,\); .* it is \(3, 1\)"),
        ((np.zeros((3, 1), "f4"), columns, None), TypeError, "row_var: dtype float32; it is kept"),
        ((rows, np.zeros((1, 8))[:, ::2], None), ValueError, "col_var: strides .*ascontiguous"),
        ((rows, columns, None, np.ones((3, 4), order="F")), ValueError, "row-major order"),
    ]:
        before = [None if a is None else a.copy() for a in args]
        with pytest.raises(error, match=match):
            call(*args)
        assert tree_bytes(before) == tree_bytes(list(args))


@pytest.mark.parametrize("every", [64, 199, 200, 2**31, 2**62, 2**63 - 1])
def test_samples_of_few_elements(every):
    """Down to the first alone, in the blocks that have none too."""
    found = []
    for module in (fusedopt, reference):
        p, g = arrays(0, [(200,)] * 2)
        opt = module.Prodigy([p], slice_p=every, d0=1e-2)
        for _ in range(3):
            opt.step([g])
        assert opt.state["params[0]"]["s"].shape == (-(-200 // every),)
        found.append(tree_bytes([p, contents(opt)]))
    assert found[0] == found[1]


def test_orders_of_memory():
    for bad in (np.ones((3, 4), order="F"), np.ones((2, 3, 4)).transpose(0, 2, 1)):
        with pytest.raises(ValueError, match=r"^params\['W'\]: strides .* row-major order"):
            fusedopt.Adafactor({"W": bad})
    params = [np.ones((3, 1), order="F"), np.ones(4)[::1]]
    assert fusedopt.Adafactor(params).step([np.ones((3, 1)), np.ones(4)]).updated == 2


def test_state_and_memory():
    params = {"W": np.ones((200, 300), np.float32), "b": np.ones(300, np.float32)}
    state = fusedopt.Adafactor(params).state
    shapes = {leaf: {k: v.shape for k, v in s.items() if k != "step"} for leaf, s in state.items()}
    assert shapes == {
        "params['W']": {"row_var": (200, 1), "col_var": (1, 300)},
        "params['b']": {"variance": (300,)},
    }
    table = fusedopt.Adafactor(params["W"]).memory()
    assert table["total"]["resident"] == pytest.approx(4 + 4 * 500 / 60000)
    opt = fusedopt.Prodigy(params, slice_p=7, state_dtype="int8", min_8bit_size=0)
    own = opt.state["params['W']"]
    assert own["s"].shape == own["p0"].shape == (8572,) and own["s"].dtype == np.float32
    assert own["exp_avg"].data.itemsize == 1


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@EACH
def test_files(tmp_path, case, storage, suffix):
    """A run continues from a file with the same bits."""
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    dtype, path = BF16 if "master_bits" in storage else np.float32, tmp_path / f"run.{suffix}"
    params = arrays(0, MIXED, dtype)
    opt = getattr(fusedopt, case.cls)(params, **case.options, **storage)
    for seed in range(3):
        opt.step(arrays(1 + seed, MIXED, dtype))
    opt.save(path)
    twin = getattr(fusedopt, case.cls)([p.copy() for p in params], **case.options, **storage)
    twin.load(path)
    assert contents(twin) == contents(opt)
    for each in (opt, twin):
        each.step(arrays(9, MIXED, dtype))
    assert contents(twin) == contents(opt)


def test_checkpoints_of_other_shapes():
    opt = fusedopt.Adafactor(np.ones((3, 4)))
    saved = fusedopt.Adafactor(np.ones((3, 5))).state_dict()
    with pytest.raises(
        ValueError, match=r"params.col_var: float64\[1, 5\] does not fit float64\[1, 4\]"
    ):
        opt.load_state_dict(saved)
    opt = fusedopt.Prodigy(np.ones(20), slice_p=2)
    with pytest.raises(ValueError, match="slice_p: 3, but the arrays were made with 2"):
        opt.load_state_dict(fusedopt.Prodigy(np.ones(20), slice_p=3).state_dict())
    opt.param_groups[0]["slice_p"] = 3
    with pytest.raises(ValueError, match=r"slice_p: 3, but the arrays were made with 2"):
        opt.step(np.ones(20))


# ---------------------------------------------------------------- one estimate for all groups


def prodigy(module=fusedopt, seed=0, **options):
    first, second = arrays(seed, MIXED), arrays(seed + 1, MIXED)
    return [first, second], module.Prodigy([{"params": first}, {"params": second}], **options)


def test_groups():
    """One d, of the gradients of all; a group at rate 0 is out of it, and keeps its moments."""
    found = []
    for module in (fusedopt, reference):
        params, opt = prodigy(module, weight_decay=0.1)
        for step in range(6):
            opt.param_groups[1]["lr"] = 0.0 if step in (2, 3) else 1.0
            before = contents(opt)[1]
            opt.step([arrays(10 + step, MIXED), arrays(20 + step, MIXED)])
            if step in (2, 3):
                now = contents(opt)[1]
                assert all(
                    before[name][key] == now[name][key]
                    for name in before if name.startswith("params[1]")
                    for key in ("exp_avg", "exp_avg_sq", "s")
                )  # fmt: skip
            assert opt.param_groups[0]["d"] == opt.param_groups[1]["d"]
            assert opt.param_groups[0]["k"] == step + 1
        found.append(tree_bytes([params, contents(opt)]))
    assert found[0] == found[1]


def test_a_step_without_information_changes_nothing():
    for module in (fusedopt, reference):
        params, opt = prodigy(module)
        before = tree_bytes([params, contents(opt)])
        result = opt.step([[np.zeros(shape) for shape in MIXED]] * 2)
        assert result.skipped and result.updated == 0 and result.step == 0
        assert tree_bytes([params, contents(opt)]) == before
        assert opt.step([arrays(3, MIXED), arrays(4, MIXED)]).step == 1


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("storage", [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_schedule_leaves_rate_0(start, storage, dtype):
    """Steps there count, and change nothing; 8-bit moments are rounded again."""
    rates, found = [start, 0.0, 0.0, 1.0], []

    def schedule(step):
        return rates[step - 1]

    for module in (fusedopt, reference):
        params = arrays(0, [*MIXED, (70, 70)], dtype)
        opt = module.Prodigy(params, lr=schedule, weight_decay=0.1, **storage)
        for step, rate in enumerate(rates, 1):
            before = tree_bytes([params, *contents(opt)[:2]])
            result = opt.step(arrays(step, [*MIXED, (70, 70)], dtype))
            assert (result.step, result.skipped) == (step, False)
            after = tree_bytes([params, *contents(opt)[:2]])
            for state in (*before[2].values(), *after[2].values()):
                del state["step"]
            if "int8" in storage.values():
                del before[2], after[2]
            assert (after == before) == (rate == 0)
        found.append(tree_bytes([params, contents(opt)]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["d", "d_max"])
@pytest.mark.parametrize("value", [np.nan, 0.0, -1.0])
def test_estimates_that_no_run_has(name, value):
    w = np.ones(5)
    opt = fusedopt.Prodigy(w)
    opt.step(2 * w)
    state, before = opt.state_dict(), w.copy()
    state["param_groups"][0] = state["param_groups"][0] | {name: value}
    with pytest.raises(ValueError, match=rf"param_groups\[0\].{name}: must be"):
        opt.load_state_dict(state)
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=rf"^param_groups\[0\].{name}: must be"):
        opt.step(2 * w)
    assert (w == before).all()
    opt.param_groups[0][name] = np.inf  # of a run that diverged: its file can be loaded
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("lr", 0.5, r"param_groups\[1\].lr: 0.5 differs from another group's 1.0"),
        ("betas", (0.9, 0.99), r"param_groups\[1\].betas: .* differs from .* one estimate"),
        ("d_coef", 2.0, r"param_groups\[1\].d_coef: 2.0 differs from 1.0"),
    ],
)
def test_groups_that_do_not_go_together(name, value, match):
    for module in (fusedopt, reference):
        params, opt = prodigy(module)
        before = tree_bytes(params)
        opt.param_groups[1][name] = value
        with pytest.raises(ValueError, match=match):
            opt.step([arrays(3, MIXED), arrays(4, MIXED)])
        assert tree_bytes(params) == before and opt.param_groups[0]["k"] == 0


def test_the_estimate_grows_to_the_distance():
    w = np.full(1000, 3.0)
    opt = fusedopt.Prodigy(w)
    for _ in range(300):
        opt.step(2 * w)
    assert abs(w).max() < 0.2 and 0.05 < opt.param_groups[0]["d"] < 30


@pytest.mark.parametrize(
    ("cls", "option", "value", "error", "match"),
    [
        ("Adafactor", "d", 0.5, ValueError, "d: must be >= 1, got 0.5"),
        ("Adafactor", "beta2_decay", 0.1, ValueError, "beta2_decay: must be <= 0"),
        ("Adafactor", "eps", 1e-8, TypeError, "eps: expected two numbers"),
        ("Adafactor", "eps", (None, None), TypeError, r"eps\[1\]: expected a number"),
        ("Adafactor", "eps", (-1e-9, 1e-3), ValueError, r"eps\[0\]: must be >= 0"),
        ("Adafactor", "state_dtype", "int8", ValueError, "state_dtype: adafactor keeps 'row_var'"),
        ("Prodigy", "d0", 0.0, ValueError, "d0: must be > 0"),
        ("Prodigy", "eps", 0.0, ValueError, "eps: must be > 0"),
        ("Prodigy", "slice_p", 0, ValueError, "slice_p: must be >= 1"),
        ("Prodigy", "slice_p", 2.5, TypeError, "slice_p: expected a whole number"),
        ("Prodigy", "growth_rate", 0.0, ValueError, "growth_rate: must be > 0"),
        ("Prodigy", "beta3", 1.5, ValueError, r"beta3: must be in \[0, 1\]"),
    ],
)
def test_bad_options(cls, option, value, error, match):
    for module in (fusedopt, reference):
        with pytest.raises(error, match=match):
            getattr(module, cls)([np.ones((2, 3))], **{option: value})


@pytest.mark.parametrize("cls", ["Adafactor"])
def test_parts_of_matrices_are_refused(cls):
    opt = getattr(fusedopt, cls)(np.ones((2, 3)))
    with pytest.raises(ValueError, match=f"^reduce: {cls} computes with whole matrices"):
        opt.step(np.ones((2, 3)), reduce=lambda array: None)


@pytest.mark.parametrize(
    ("case", "at"),
    [(case, at) for case in FACTOR_CASES for at in range(3 if case in SAMPLES else 1)],
    ids=str,
)
def test_no_memory_changes_nothing(case, at, monkeypatch):
    """For new options, for the constants of the sums, and for those of the step behind them."""
    opt = case.make(arrays(0, MIXED))
    opt.step(arrays(1, MIXED))
    opt.param_groups[0]["lr"] = 0.25
    before, rule, calls, plan = contents(opt), type(opt.rule), [], type(opt.rule).plan

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 1 + at:
            raise MemoryError("meanwhile")
        return plan(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(rule, "plan", failing)
        with pytest.raises(MemoryError, match="meanwhile"):
            opt.step(arrays(2, MIXED))
    assert contents(opt) == before
    assert opt.step(arrays(2, MIXED)).step == 2
