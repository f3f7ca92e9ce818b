"""Gradients of some rows: the bits of the reference, the semantics of dense steps, and errors."""

import importlib.util
import itertools
import os
import re
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from cases import DTYPES, ROW_CASES, assert_same, isa, threads, values

import fusedopt
from fusedopt import Rows, _core, _disk, reference

RULES = {  # class, options
    "sgd": ("SGD", {}),
    "sgd-momentum": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "sgd-decay": ("SGD", {"weight_decay": 0.1, "l1": 0.01}),
    "sgd-lazy": ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "l1": 0.01, "lazy": True}),
    "adagrad": ("Adagrad", {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    "adagrad-decay": ("Adagrad", {"weight_decay": 0.1, "maximize": True}),
    **{case.name: (case.cls, case.options | case.class_options) for case in ROW_CASES},
    "adam": ("Adam", {"weight_decay": 0.1, "l1": 0.01, "eps_hat": True}),
    "adamw": ("AdamW", {"amsgrad": True, "maximize": True}),
    "adam-row-steps": (
        "Adam", {"weight_decay": 0.1, "l1": 0.01, "eps_hat": True, "row_steps": True},
    ),
    "adamw-row-steps": ("AdamW", {"amsgrad": True, "maximize": True, "row_steps": True}),
    "adam-row-steps-plain": ("Adam", {"bias_correction": False, "row_steps": True}),
}  # fmt: skip
EXACT = ["sgd", "sgd-momentum", "sgd-decay", "adagrad", "adagrad-decay", "rowwise",
         "rowwise-decay"]  # fmt: skip
TABLES = [(40, 5), (1, 3), (7, 700), (90,), (6, 3, 50), (30, 64), (300, 1)]
KINDS = ["sorted", "unsorted", "repeated", "empty", "all", "one"]
STEPS = [
    {},
    {"grad_scale": -0.5, "clip_value": 0.3},
    {"max_grad_norm": 0.7, "stats": True},
    {"max_grad_norm": 0.2, "per_tensor": True, "nonfinite": "raise", "zero_grads": True},
    {"stats": True},
]


def indices(kind, n, rng):
    if kind == "empty":
        return np.empty(0, np.int64)
    if kind == "one":
        return rng.integers(0, n, 1)
    if kind == "all":
        return np.arange(n)
    if kind == "repeated":
        return rng.integers(0, n, 2 * n + 3)
    some = rng.permutation(n)[: n // 2 + 1]
    return np.sort(some) if kind == "sorted" else some


def rows(kind, shape, dtype, rng):
    index = indices(kind, shape[0], rng)
    return Rows(index, rng.standard_normal((len(index), *shape[1:])).astype(dtype))


@lru_cache(maxsize=100)
def drawn(number, kind, dtype, *tables):
    """The gradients of a step."""
    rng = np.random.default_rng(number)
    grads = {str(i): rows(kind, s, dtype, rng) for i, s in enumerate(tables)}
    grads["dense"] = rng.standard_normal((3, 70)).astype(dtype)
    if number == 3:
        grads["1"] = rng.standard_normal(tables[1]).astype(dtype)
    return grads


def arrays_of(opt):
    """All state of an optimizer, as plain arrays."""
    state = [value for own in opt.state.values() for value in own.values()]
    parts = [value.parts() if hasattr(value, "parts") else [np.asarray(value)] for value in state]
    return [part for its in parts for part in its]


def run(module, rule, tables, kind, dtype, grad_dtype, dense=None, steps=STEPS, **more):
    """Some steps of tables and a dense leaf; return all arrays and what the steps returned."""
    name, options = RULES[rule]
    params = {str(i): values(int(np.prod(s)), dtype, i, False).reshape(s) for i, s in
              enumerate(tables)}  # fmt: skip
    params["dense"] = np.ones((3, 70), dtype)
    opt = getattr(module, name)(params, **options, **more)
    results = []
    for number, how in enumerate(steps):
        grads = {
            key: Rows(g.indices, g.values.copy()) if isinstance(g, Rows) else g.copy()
            for key, g in drawn(number, kind, grad_dtype, *tables).items()
        }
        if number == 1:
            grads["0"] = None
        if dense is not None:
            grads = {key: dense(grad, params[key]) for key, grad in grads.items()}
        results.append(opt.step(grads, **how))
        if how.get("zero_grads"):
            left = [g.values if isinstance(g, Rows) else g for g in grads.values()]
            assert not any(array.any() for array in left)
    return [*params.values(), *arrays_of(opt)], results


def assert_same_runs(ours, theirs):
    assert_same(ours[0], theirs[0], [str(i) for i in range(len(ours[0]))])
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a[:-1] == b[:-1]
        for name in a.stats or ():
            np.testing.assert_equal(a.stats[name], b.stats[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("rule", RULES)
def test_bits(rule, dtype, kind):
    for grad_dtype in DTYPES:
        arguments = (rule, TABLES, kind, dtype, grad_dtype)
        assert_same_runs(run(fusedopt, *arguments), run(reference, *arguments))


@pytest.mark.parametrize("kind", ["sorted", "repeated"])
@pytest.mark.parametrize("rule", RULES)
def test_threads_and_instruction_sets(rule, kind):
    arguments = (rule, [(1000, 65), (50, 3)], kind, np.float32, np.float32)
    with threads(1):
        first = run(fusedopt, *arguments)
    assert_same_runs(first, run(reference, *arguments))
    for name, count in itertools.product(_core.available_isas(), [1, 2, 5]):
        with isa(name), threads(count):
            assert_same_runs(first, run(fusedopt, *arguments))


@pytest.mark.skipif(os.name != "posix", reason="state on disk needs a Unix")
@pytest.mark.parametrize("rule", RULES)
def test_state_on_disk(rule, tmp_path, monkeypatch):
    monkeypatch.setattr(_disk, "LEAST", 256)
    arguments = (rule, [(3000, 65), (50, 64)], "repeated", np.float32, np.float32)
    assert_same_runs(run(fusedopt, *arguments, state_dir=tmp_path), run(fusedopt, *arguments))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [None, 24, 16])
def test_narrow_formats(rule, state_dtype, bits):
    """Rows of whole blocks: those alone are encoded again, by the noise of a dense step."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    tables, options = [(9, 64), (5, 3, 128)], {"state_dtype": state_dtype, "min_8bit_size": 1}
    if RULES[rule][1].get("maximize") and state_dtype == "int8":
        options["seed"] = 3
    for dtype, kind in [(np.float32, "repeated"), (bfloat16, "unsorted"), (np.float16, "sorted")]:
        own = {"master_bits": bits} if dtype is bfloat16 else {}
        arguments = (rule, tables, kind, dtype, np.float32)
        assert_same_runs(
            run(fusedopt, *arguments, **options, **own),
            run(reference, *arguments, **options, **own),
        )


def dense(grad, param):
    if not isinstance(grad, Rows):
        return grad
    whole = np.zeros(param.shape, param.dtype)
    for index, value in zip(grad.indices, grad.values, strict=True):
        whole[index] += value
    return whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", EXACT)
def test_exact_rules_take_the_dense_step(rule, kind):
    """The bits of the dense step: rows without a gradient have one of 0."""
    arguments = (rule, TABLES, kind, np.float32, np.float32)
    steps = [{}, {"grad_scale": 0.5, "clip_value": 0.1}, {}]
    assert_same_runs(
        run(fusedopt, *arguments, steps=steps), run(fusedopt, *arguments, dense, steps=steps)
    )


@pytest.mark.parametrize("rule", sorted(RULES.keys() - set(EXACT)))
def test_lazy_rules_touch_only_the_rows(rule):
    name, options = RULES[rule]
    table = np.ones((6, 3), np.float32)
    opt = getattr(fusedopt, name)(table, **options)
    opt.step(Rows(np.array([1, 4]), np.ones((2, 3), np.float32)))
    before = [table.copy(), *(a.copy() for a in arrays_of(opt))]
    opt.step(Rows(np.array([4, 5]), np.ones((2, 3), np.float32)))
    for old, new in zip(before, [table, *arrays_of(opt)], strict=True):
        if old.shape == table.shape:
            assert np.array_equal(old[:4], new[:4])
            assert not np.array_equal(old[4], new[4]), "row 4 was stepped"
    assert opt.state["params"]["step"] == 2


def test_adam_counts_the_steps_of_the_table():
    """As torch's SparseAdam: the correction is that of the table's step, not of the row's."""
    tables = [np.zeros((4, 2), np.float32) for _ in range(2)]
    one, other = (fusedopt.Adam(table, lr=1.0) for table in tables)
    for opt in (one, other):
        opt.step(Rows(np.array([0]), np.ones((1, 2), np.float32)))
    one.step(Rows(np.array([3]), np.ones((1, 2), np.float32)))
    whole = np.zeros((4, 2), np.float32)
    whole[3] = 1
    other.step(whole)
    assert np.array_equal(tables[0][3], tables[1][3])
    assert not np.array_equal(tables[0][0], tables[1][0]), "the dense step moves row 0 on"


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_rows_that_count_their_steps(steps):
    """Each row is stepped as one of its own optimizer, which has seen its gradients alone."""
    rng, options = np.random.default_rng(0), {"lr": 0.1, "amsgrad": True, "row_steps": True}
    table = rng.standard_normal((9, 5)).astype(np.float32)
    singles = table.copy()
    opt = fusedopt.Adam(table, **options)
    opts = [fusedopt.Adam(single, **options | {"row_steps": False}) for single in singles]
    for step in range(steps):
        grad = rows(KINDS[step % 6], table.shape, np.float32, rng)
        whole = dense(grad, table)
        opt.step(whole if step % 4 == 3 else grad)
        for row in range(9) if step % 4 == 3 else np.unique(grad.indices):
            opts[row].step(whole[row])
    assert_same([table], [singles], ["table"])
    counts = opt.state["params"]["row_step"]
    assert counts.ravel().tolist() == [own.state["params"]["step"] for own in opts]
    assert counts.shape == (9, 1) and opt.state["params"]["step"] == steps


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (5,), ()])
def test_counts_of_small_tables(shape):
    for module in (fusedopt, reference):
        table = np.ones(shape, np.float32)
        opt = module.Adam({"a": table, "b": np.ones((3, 2), np.float32)}, row_steps=True)
        if shape:
            index = np.arange(shape[0])[:2]
            opt.step({"a": Rows(index, np.ones((len(index), *shape[1:]), np.float32)), "b": None})
        opt.step({"a": np.ones_like(table), "b": None}, stats=True)
        counts, others = (opt.state[f"params[{name!r}]"]["row_step"] for name in "ab")
        assert counts.ravel().tolist() == ([2, 2, 1, 1, 1][: shape[0]] if shape else [1])
        assert not others.any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adagrad", {"rowwise": True}),
        ("Adam", {"row_steps": True, "state_dtype": "bfloat16"}),
        ("Adam", {"state_dtype": "int8", "min_8bit_size": 0}),
    ],
)
@pytest.mark.parametrize("shape", [(0, 64), (5, 0)])
def test_rows_of_tables_without_elements(name, options, shape):
    """They count steps as any other, and no way of a step fails."""
    for module, index in itertools.product((fusedopt, reference), (np.arange(shape[0])[:2], None)):
        table = np.ones(shape, np.float32)
        opt = getattr(module, name)(table, **options)
        values = np.ones((2 if shape[0] else 0, *shape[1:]), np.float32)
        grad = np.ones_like(table) if index is None else Rows(index, values)
        assert opt.step(grad).updated == 1
        assert opt.step(grad, stats=True).stats.grad_norm == [0]


def test_many_counts():
    """More than fit into the first table of numbers; and the last step has one count for all."""
    results = []
    for module in (fusedopt, reference):
        rng = np.random.default_rng(0)
        table = np.zeros((40_000, 1), np.float32)
        opt = module.Adam(table, row_steps=True)
        counts = opt.state["params"]["row_step"]
        counts[:, 0] = rng.permutation(80_000)[:40_000] if module is fusedopt else results[0][2]
        start = counts[:, 0].copy()
        index = np.arange(0, 40_000, 1 if module is fusedopt else 997)
        opt.step(Rows(index, np.ones((len(index), 1), np.float32)))
        assert np.array_equal(counts[index, 0], start[index] + 1)
        counts[...] = 2**62 - 1
        opt.step(np.ones_like(table))
        results.append([table[::997].copy(), opt.state["params"]["exp_avg"][::997].copy(), start])
    with pytest.raises(ValueError, match=r"row_step: has 4611686018427387904, which is no number"):
        opt.step(np.ones_like(table))
    assert_same(*results, ["table", "exp_avg", "start"])


@pytest.mark.parametrize("how", [{}, {"stats": True}, {"zero_grads": True}, {"copy_out": True}])
@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("shape", [(700,), (90, 7), (3, 1100), (9, 64)], ids=str)
def test_dense_steps_of_different_counts(shape, ema, how):
    """In place, or by gathered tiles; the copy, the average and zeros are of all the leaf."""
    results = []
    for module, name in itertools.product((fusedopt, reference), _core.available_isas()):
        rng = np.random.default_rng(0)
        table = rng.standard_normal(shape).astype(np.float32)
        opt = module.Adam(table, row_steps=True, weight_decay=0.1, ema=ema, ema_warmup=True)
        opt.state["params"]["row_step"].reshape(-1)[...] = rng.integers(0, 5, shape[0])
        copy = np.zeros(shape, np.float16)
        options = how | ({"copy_out": copy} if "copy_out" in how else {})
        with isa(name), threads(5):
            for _ in range(3):
                grad = rng.standard_normal(shape).astype(np.float32)
                result = opt.step(grad, **options)
        assert not (grad.any() and "zero_grads" in how)
        results.append(([table, copy, *arrays_of(opt)], [result]))
    for other in results[1:]:
        assert_same_runs(results[0], other)


@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "plain"])
def test_steps_that_count_nothing(module):
    table = np.ones((5, 2), np.float32)
    opt = module.Adam({"a": table}, row_steps=True)
    counts = opt.state["params['a']"]["row_step"]
    grad = Rows(np.array([4, 1]), np.full((2, 2), np.nan, np.float32))
    for given in (grad, np.full_like(table, np.inf)):
        assert opt.step({"a": given}, nonfinite="skip").skipped
        with pytest.raises(FloatingPointError):
            opt.step({"a": given}, nonfinite="raise")
    assert opt.step({"a": None}).updated == 0
    assert not counts.any()
    counts[3] = -1
    good = np.ones((2, 2), np.float32)
    for given in (Rows(np.array([4, 3]), good), np.ones_like(table)):
        with pytest.raises(ValueError, match=r"^params\['a'\]\.row_step: has -1, which is"):
            opt.step({"a": given})
    assert (table == 1).all() and counts.sum() == -1
    opt.step({"a": Rows(np.array([4, 1]), good)})
    assert counts.ravel().tolist() == [0, 1, 0, -1, 1]


def resumed(make, path, names, grad, params):
    """An optimizer and its twin, which has the other's file and goes on with the same bits."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
    tables = [np.ones((5, 3), np.float32) for _ in range(2)]
    first, second = map(make, tables)
    first.step(grad)
    first.save(path, params=params)
    if not params:
        tables[1][...] = tables[0]
    second.load(path)
    for opt in (first, second):
        opt.step(grad)
    assert_same([tables[0], *arrays_of(first)], [tables[1], *arrays_of(second)], list(names))
    return first, second


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_checkpoints_of_counts(suffix, tmp_path):
    path = tmp_path / f"state{suffix}"
    grad = Rows(np.array([1, 4, 1]), np.arange(9, dtype=np.float32).reshape(3, 3))
    make = partial(fusedopt.AdamW, row_steps=True)
    first, second = resumed(make, path, "pmvcs", grad, params=True)
    with pytest.raises(ValueError, match="state that this optimizer does not have: row_step"):
        fusedopt.AdamW(np.ones((5, 3), np.float32)).load(path)
    saved = first.state_dict()
    for bad in (-1, 2**62, 2**64 - 5, np.int32(-3)):
        counts = np.full((5, 1), bad)
        saved["state"]["params"] = saved["state"]["params"] | {"row_step": counts}
        with pytest.raises(ValueError, match=r"state dict: params\.row_step: must be"):
            second.load_state_dict(saved, convert=True)
    saved["state"]["params"] = saved["state"]["params"] | {"row_step": np.ones((5, 1))}
    for convert, message in ((False, r"fit int64\[5, 1\]$"), (True, "float64 cannot be converted")):
        with pytest.raises((TypeError, ValueError), match=message):
            second.load_state_dict(saved, convert=convert)
    assert second.state["params"]["row_step"].ravel().tolist() == [0, 2, 0, 0, 2]
    with pytest.raises(ValueError, match=r"row_steps: False, but the arrays were made with True"):
        second.param_groups[0]["row_steps"] = False
        second.step(grad)


@pytest.mark.parametrize("bad", [-5, np.int64(-5), 2**62, 2**63, np.array(-5)])
def test_a_bad_count_of_a_number(bad):
    """A parameter without axes has one count, which may be given as a number."""
    opt = fusedopt.Adam(np.ones((), np.float32), row_steps=True)
    saved = opt.state_dict()
    for count in (bad, 7):
        saved["state"]["params"] = saved["state"]["params"] | {"row_step": count}
        if count is bad:
            with pytest.raises(ValueError, match=r"state dict: params\.row_step: must be"):
                opt.load_state_dict(saved, convert=True)
        else:
            opt.load_state_dict(saved)
    assert opt.state["params"]["row_step"] == 7


def test_counts_with_other_groups_and_averages():
    """Counts are memory, and new groups have their own; an average is that of the leaf's steps."""
    shape, params = (4, 64), [np.ones((4, 64), np.float32) for _ in range(3)]
    opt = fusedopt.AdamW([{"params": params[0], "row_steps": True}], ema=0.9, ema_warmup=True)
    opt.add_param_group({"params": params[1]})
    opt.add_param_group({"params": params[2], "row_steps": True})
    assert opt.memory()["row_step"]["resident"] == 2 * 4 * 8 / (3 * 4 * 64)
    about = fusedopt.memory([shape], "AdamW", row_steps=True)
    assert about["row_step"] == {"resident": 32, "moved": 64}
    for _ in range(3):
        opt.step([np.ones(shape, np.float32)] * 3)
    assert np.array_equal(params[0], params[1]) and np.array_equal(params[0], params[2])
    averages = list(opt.ema_params().values())
    assert np.array_equal(averages[0], averages[1])
    opt.param_groups[1]["cautious"] = True
    before = params[0].copy()
    with pytest.raises(ValueError, match=r"^grads\[0\]: the rows of this parameter count"):
        opt.step([np.ones(shape, np.float32)] * 3)
    assert np.array_equal(before, params[0])
    assert opt.state["params[0]['params']"]["row_step"].ravel().tolist() == [3] * 4
    for options in ({"cautious": True}, {"row_steps": 1}):
        with pytest.raises((TypeError, ValueError), match="cautious: it takes no Rows|row_steps: "):
            fusedopt.AdamW(np.ones(shape), **{"row_steps": True} | options)
    with pytest.raises(
        ValueError, match="^params: strides .* row-major order, in which adam keeps"
    ):
        fusedopt.Adam(np.asfortranarray(params[0]), row_steps=True)
    with pytest.raises(TypeError, match="row_steps"):
        fusedopt.SGD(params[0], row_steps=True)


BAD_COUNTS = {
    "dtype": (np.zeros((9, 1), np.int32), TypeError, "dtype int32; it is kept as int64"),
    "order": (np.zeros((9, 1), ">i8"), TypeError, "it is kept as int64"),
    "shape": (np.zeros(9, np.int64), ValueError, r"shape \(9,\); .* it is \(9, 1\)"),
    "strides": (np.zeros((9, 2), np.int64)[:, :1], ValueError, "strides"),
    "list": ([0] * 9, TypeError, "expected a NumPy array, got list"),
    "none": (None, ValueError, r"row_steps\[0\]: is None"),
}


@pytest.mark.parametrize("module", [fusedopt.functional, reference], ids=["fast", "plain"])
@pytest.mark.parametrize("case", BAD_COUNTS)
def test_bad_counts(case, module):
    counts, kind, message = BAD_COUNTS[case]
    p = np.ones((9, 65), np.float32)
    states = [np.zeros_like(p)], [np.zeros_like(p)]
    with pytest.raises(kind, match=message):
        module.adam([p], [p.copy()], *states, row_steps=[counts], step=1)
    table = np.zeros((9, 2))
    inside = table.view(np.int64).reshape(-1)[:9].reshape(9, 1)
    with pytest.raises(ValueError, match="share memory"):
        module.adam([table], [table.copy()], [table + 0], [table + 0], row_steps=[inside], step=1)
    assert (p == 1).all() and not table.any()


FUNCTIONS = {
    "sgd": [], "adagrad": ["sums"], "adam": ["exp_avgs", "exp_avg_sqs"],
    "adamw": ["exp_avgs", "exp_avg_sqs", "row_steps"],
}  # fmt: skip


def test_functions():
    for f, make in FUNCTIONS.items():
        results = []
        for module in (fusedopt.functional, reference):
            rng = np.random.default_rng(0)
            p = rng.standard_normal((9, 65)).astype(np.float32)
            states = {name: [np.zeros_like(p)] for name in make}
            if "row_steps" in make:
                states["row_steps"] = [np.zeros((9, 1), np.int64)]
            for step in range(1, 4):
                grad = rows("repeated", p.shape, np.float32, rng)
                getattr(module, f)([p], [grad], **states, step=step, lr=0.1)
            results.append([p, *(array for (array,) in states.values())])
        assert_same(*results, [f, *make])
        assert not np.array_equal(results[0][0], rng.standard_normal((9, 65)))


def test_guide_runs():
    """The Python blocks of the page, one after the other."""
    page = Path(__file__).parent.parent / "docs" / "embeddings.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) == 3
    if importlib.util.find_spec("torch") is None:
        del blocks[2]
    exec(compile("\n".join(blocks), page.name, "exec"), {})


@pytest.mark.slow("trains a network")
def test_example_trains_alike_by_rows(one_blas_thread):
    """bench/embeddings.py: the same losses, to the bit, by rows and by dense gradients."""
    path = Path(__file__).parent.parent / "bench" / "embeddings.py"
    spec = importlib.util.spec_from_file_location("embeddings", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    data = example.Clicks(3, 500)
    first = example.loss_and_grads(example.make(3, 500), data.batch(1, 2000))[0]
    for name in ("SGD", "Adagrad", "Adagrad, row-wise"):
        losses = [example.train(name, by_rows, data, 15)[1] for by_rows in (True, False)]
        assert losses[0] == losses[1] < first


def row_means(grad):
    return (grad.astype(np.float64) ** 2).mean(axis=1, keepdims=True)


def test_rowwise_formula():
    """FBGEMM's EXACT_ROWWISE_ADAGRAD: the mean of squares over each row that is touched.

    for row, g in rows: moment[row] += mean(g**2); row -= lr / (sqrt(moment[row]) + eps) * g
    """
    rng = np.random.default_rng(0)
    table = rng.standard_normal((20, 33))
    expected, moment = table.copy(), np.zeros((20, 1))
    opt = fusedopt.Adagrad(table, lr=0.3, eps=1e-8, rowwise=True)
    for step in range(25):
        grad = rows("unsorted" if step % 5 else "all", table.shape, np.float64, rng)
        index, given = grad.indices, grad.values
        moment[index] += row_means(given)
        expected[index] -= 0.3 / (np.sqrt(moment[index]) + 1e-8) * given
        opt.step(given if step % 5 == 0 else grad)
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    np.testing.assert_allclose(opt.state["params"]["sum"], moment, rtol=1e-12)


def test_rowwise_state():
    """One number for each row, in float32; other groups keep one for each element."""
    shapes = [(6, 64), (4, 2, 64), (9,), ()]
    params = [np.ones(shape, np.float32) for shape in shapes]
    opt = fusedopt.Adagrad(
        [{"params": params, "rowwise": True}, {"params": [np.ones((3, 64), np.float32)]}],
        state_dtype="int8", min_8bit_size=1, ema=0.9,
    )  # fmt: skip
    states = [own["sum"] for own in opt.state.values()]
    assert [state.shape for state in states] == [(6, 1), (4, 1, 1), (9,), (), (3, 64)]
    assert {state.dtype.name for state in states[:4]} == {"float32"}
    assert states[4].format == "uint8"
    grads = [[np.ones(shape, np.float32) for shape in shapes], [np.ones((3, 64), np.float32)]]
    copies = [[np.zeros(shape, np.float16) for shape in shapes], [None]]
    opt.step(grads, copy_out=copies, zero_grads=True)
    for param, copy, grad in zip(params, copies[0], grads[0], strict=True):
        np.testing.assert_allclose(param, 0.99, rtol=1e-6)
        assert np.array_equal(copy, param.astype(np.float16)) and not grad.any()
    np.testing.assert_allclose(opt.ema_params()["params[0]['params'][0]"], 0.999, rtol=1e-6)
    with pytest.raises(ValueError, match=r"rowwise: False, but the arrays were made with True"):
        opt.param_groups[0]["rowwise"] = False
        opt.step(grads)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_rowwise_checkpoints(suffix, tmp_path):
    path = tmp_path / f"state{suffix}"
    grad = Rows(np.array([1, 4, 1]), np.arange(9, dtype=np.float32).reshape(3, 3))
    resumed(partial(fusedopt.Adagrad, rowwise=True), path, "pst", grad, params=False)
    with pytest.raises(ValueError, match="rowwise: True, but the arrays were made with False"):
        fusedopt.Adagrad(np.ones((5, 3), np.float32)).load(path)


def test_rowwise_functions():
    results = []
    for module in (fusedopt.functional, reference):
        rng = np.random.default_rng(0)
        p = [rng.standard_normal((9, 600)).astype(np.float32) for _ in range(2)]
        sums = [np.zeros((9, 1), np.float32) for _ in p]
        for step in range(1, 4):
            grads = [rows("repeated", (9, 600), np.float32, rng), rng.standard_normal((9, 600))]
            module.adagrad(p, grads, sums, step=step, rowwise=True, weight_decay=0.1)
        results.append([*p, *sums])
        with pytest.raises(ValueError, match=r"sums\[0\]|params\[0\].sum"):
            module.adagrad(p, p[::-1], [np.zeros_like(x) for x in p], step=1, rowwise=True)
        order = [np.asfortranarray(p[0])]
        with pytest.raises(ValueError, match=r"params\[0\]: strides"):
            module.adagrad(order, [p[0]], sums[:1], step=1, rowwise=True)
    assert_same(*results, ["first", "second", "sum", "sum"])


def test_groups_and_single_arrays():
    a, b = np.ones((4, 3), np.float32), np.ones((5, 2), np.float32)
    opt = fusedopt.Adagrad([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.5}])
    ones = np.ones((1, 3), np.float32)
    opt.step([[Rows(np.array([3]), ones)], [Rows(np.array([0], np.uint8), ones[:, :2])]])
    assert a[3, 0] == 0
    assert b[0, 0] == 0.5
    assert a[:3].all() and b[1:].all()


def test_duplicates_are_added_in_the_order_given():
    """In float32, whatever the dtype of the values; a sum that another order rounds otherwise."""
    terms = [1e8, 1.0, -1e8, 1.0]
    for order in itertools.permutations(range(4)):
        given = np.array([terms[i] for i in order], np.float64)[:, None]
        expected = np.float32(given[0, 0])
        for term in given[1:, 0]:
            expected = expected + np.float32(term)
        table = np.zeros((2, 1), np.float32)
        fusedopt.SGD(table, lr=1.0).step(Rows(np.array([1, 1, 1, 1]), given))
        assert table[1, 0] == -expected


def test_measures_are_those_of_the_rows():
    table = np.full((5, 2), 3.0, np.float32)
    opt = fusedopt.SGD(table, lr=1.0)
    grad = Rows(np.array([3, 1, 3]), np.array([[1, 0], [2, 0], [2, 0]], np.float32))
    result = opt.step(grad, stats=True, max_grad_norm=np.inf)
    own = result.stats["params"]
    assert result.grad_norm == own["grad_norm"] == pytest.approx(np.sqrt(3**2 + 2**2))
    assert own["zero_fraction"] == 0.5
    assert own["max_update"] == 3
    assert own["param_norm"] == pytest.approx(np.linalg.norm(table[[1, 3]]))


@pytest.mark.parametrize("repeats", [False, True])
def test_what_is_not_finite(repeats):
    table = np.ones((5, 2), np.float32)
    opt = fusedopt.Adam(table)
    given = np.array([[1, 1], [np.inf, 0]], np.float32)
    grad = Rows(np.array([4, 4] if repeats else [2, 4]), given)
    result = opt.step(grad, nonfinite="skip", zero_grads=True)
    assert result.skipped and (table == 1).all() and opt.state["params"]["step"] == 0
    assert not given.any()
    given[...] = np.nan
    with pytest.raises(FloatingPointError, match=r"grads: . of . elements are infinite or NaN"):
        opt.step(grad, nonfinite="raise")
    assert (table == 1).all()


def test_reduce_sums_over_rows():
    """A norm over ranks, each of which has rows of its own."""
    table = np.zeros((5, 1), np.float32)

    def add(array):
        array *= 2  # two ranks with the same

    grad = Rows(np.array([1, 3]), np.array([[3.0], [4.0]], np.float32))
    result = fusedopt.SGD(table, lr=1.0).step(grad, max_grad_norm=1e9, reduce=add)
    assert result.grad_norm == pytest.approx(np.sqrt(2 * 25))


def test_values_that_ascend_are_not_copied():
    """The step reads the very array: zeroing it in the pass shows that."""
    given = np.ones((2, 3), np.float32)
    ordered = fusedopt._rows.in_order("grads", Rows(np.array([0, 2]), given), np.ones((4, 3)))
    assert ordered.values is given


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_values_in_a_memory_map(momentum, tmp_path):
    mapped = np.memmap(tmp_path / "table", np.float32, "w+", shape=(6, 3))
    table, given = np.ones((4, 3), np.float32), mapped[4:]
    given[...] = 1
    fusedopt.SGD(table, momentum=momentum).step(Rows(np.array([0, 2]), given), zero_grads=True)
    assert (table[[0, 2]] != 1).all() and not mapped.any()
    opt = fusedopt.SGD(mapped[:4], momentum=momentum)
    with pytest.raises(ValueError, match=r"grads\.values: shares memory with params"):
        opt.step(Rows(np.array([0, 2]), mapped[2:4]))


@pytest.mark.parametrize("index", [[0, 1, 2], [2, 0, 1], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_values_in_memory_that_a_step_writes(momentum, index):
    """All of them, also where they are more than rows, or a dense gradient is made of them."""
    given = np.ones((3, 3), np.float32)
    params = {"emb": np.ones((4, 3), np.float32), "b": np.ones((1, 3), np.float32)}
    opt = fusedopt.SGD(params, momentum=momentum)
    grads = {"emb": Rows(np.array(index), given), "b": np.ones((1, 3), np.float32)}
    for zero in (False, True):
        with pytest.raises(ValueError, match=r"grads\['emb'\].* share"):
            opt.step(grads, copy_out={"emb": None, "b": given[2:]}, zero_grads=zero)
    with pytest.raises(ValueError, match=r"grads\['emb'\].* share"):
        opt.step({**grads, "b": given[2:]}, zero_grads=True)
    assert (params["emb"] == 1).all() and (params["b"] == 1).all() and (given == 1).all()
    opt.step({**grads, "b": given[2:]})
    assert (params["b"] != 1).all()


@pytest.mark.parametrize("given", [Rows(3, 4), Rows(None, None), Rows([1], [[2.0]])])
def test_repr_of_anything(given):
    """As an error report shows it, before a step has checked it."""
    assert repr(given).startswith("<Rows of 1: values of shape (")


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,)])
def test_tables_without_elements(shape):
    table = np.zeros(shape, np.float32)
    opt = fusedopt.Adam({"a": table, "b": np.ones(2, np.float32)})
    index = np.arange(shape[0])[:2]
    grad = Rows(index, np.zeros((len(index), *shape[1:]), np.float32))
    assert opt.step({"a": grad, "b": np.ones(2, np.float32)}, stats=True).updated == 2
    assert opt.state["params['a']"]["step"] == 1


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_narrow_tables_without_elements(shape):
    """A step writes nothing, and is no reason to refuse a table."""
    table = np.zeros(shape, np.float16)
    opt = fusedopt.Adam(table, state_dtype="int8", min_8bit_size=1)
    assert opt.step(Rows(np.empty(0, int), np.empty((0, shape[1]), np.float32))).updated == 1


ONES = np.ones((2, 3), np.float32)
BAD = {  # what is given, and the error
    "a negative row": (Rows(np.array([1, -1]), ONES), ValueError, r"indices\[1\]: .* row -1"),
    "beyond": (Rows(np.array([9, 1]), ONES), ValueError, r"indices\[0\]: there is no row 9 in"),
    "huge": (
        Rows(np.array([0, 2**64 - 1], np.uint64), ONES),
        ValueError,
        r"indices.1.: .* no row 184467",
    ),
    "float": (Rows(np.array([0.0, 1.0]), ONES), TypeError, "indices: .* integers, got float64"),
    "bool": (Rows(np.array([True, False]), ONES), TypeError, "indices: .* integers, got bool"),
    "list": (Rows([0, 1], ONES), TypeError, "indices: .* integers, got list"),
    "masked": (
        Rows(np.ma.array([0, 1], mask=[True, False]), ONES),
        TypeError,
        "indices: .* integers, got MaskedArray",
    ),
    "axes": (Rows(np.array([[0], [1]]), ONES), ValueError, r"indices: .* shape \(2, 1\)"),
    "length": (Rows(np.array([0]), ONES), ValueError, r"values: shape \(2, 3\); .* \(1, 3\)"),
    "width": (Rows(np.array([0, 1]), ONES[:, :2]), ValueError, r"values: shape \(2, 2\)"),
    "dtype": (Rows(np.array([0, 1]), ONES.astype(int)), TypeError, "values: dtype int64"),
    "values": (Rows(np.array([0, 1]), [[1.0] * 3] * 2), TypeError, "values: .* NumPy array"),
}


@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "plain"])
@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case, module):
    given, kind, message = BAD[case]
    params = {"first": np.ones(3, np.float32), "emb": np.ones((5, 3), np.float32)}
    opt = module.Adam(params)
    with pytest.raises(kind, match=r"^grads\['emb'\]\." + message):
        opt.step({"first": np.ones(3, np.float32), "emb": given})
    for array in params.values():
        assert (array == 1).all()
    assert opt.state["params['first']"]["step"] == 0
    opt.step({"first": np.ones(3, np.float32), "emb": np.ones((5, 3), np.float32)})
    assert (params["emb"] != 1).all(), "the whole leaf is stepped again"


TAKES_NO_ROWS = {
    "rule": lambda table: fusedopt.RMSprop({"emb": table}),
    "layer-wise": lambda table: fusedopt.LAMB({"emb": table}),
    "matrix": lambda table: fusedopt.Muon({"emb": table}),
    "factored": lambda table: fusedopt.Adafactor({"emb": table}),
    "sums": lambda table: fusedopt.Prodigy({"emb": table}),
    "cautious": lambda table: fusedopt.AdamW({"emb": table}, cautious=True),
    "average": lambda table: fusedopt.Adam({"emb": table}, ema=0.9),
    "blocks": lambda table: fusedopt.Adam({"emb": table}, state_dtype="int8", min_8bit_size=1),
    "bfloat16": lambda table: fusedopt.Adam({"emb": table}, state_dtype="bfloat16"),
    "float16": lambda table: fusedopt.SGD({"emb": table.astype(np.float16)}),
    "order": lambda table: fusedopt.SGD({"emb": np.asfortranarray(table)}),
}


@pytest.mark.parametrize("case", TAKES_NO_ROWS)
def test_what_takes_no_rows(case):
    table = np.ones((5, 3), np.float32)
    opt = TAKES_NO_ROWS[case](table)
    with pytest.raises(ValueError, match=r"^grads\['emb'\]: .*(pass an array|multiple of 64)"):
        opt.step({"emb": Rows(np.array([0, 1]), ONES)})
    assert (opt._work.params[0] == 1).all()
    assert opt.state["params['emb']"]["step"] == 0
    opt.step({"emb": np.ones((5, 3), np.float32)})
    assert (opt._work.params[0] != 1).all()


def test_what_else_is_refused():
    table, ones = np.ones((4, 3), np.float32), ONES.copy()
    opt = fusedopt.Adam({"emb": table})
    grad = Rows(np.array([0, 1]), ones)
    with pytest.raises(ValueError, match=r"copy_out\['emb'\]: is of all rows, and grads\['emb'\]"):
        opt.step({"emb": grad}, copy_out={"emb": np.zeros_like(table)})
    for index in ([0, 1], [1, 0], [1, 1]):
        with pytest.raises(ValueError, match=r"grads\['emb'\]\.values: shares memory with params"):
            opt.step({"emb": Rows(np.array(index), table[2:])})
    ones.setflags(write=False)
    with pytest.raises(ValueError, match=r"grads\['emb'\]\.values: zero_grads writes to them"):
        opt.step({"emb": grad}, zero_grads=True)
    with pytest.raises(ValueError, match="without axes"):
        fusedopt.SGD(np.ones((), np.float32)).step(Rows(np.array([0]), np.ones(1, np.float32)))
    accumulator = fusedopt.GradAccumulator({"emb": table})
    with pytest.raises(ValueError, match=r"grads\['emb'\]: a GradAccumulator takes no Rows"):
        accumulator.add({"emb": grad})
    assert (table == 1).all() and opt.state["params['emb']"]["step"] == 0
    opt.step({"emb": grad})
    assert (table[:2] != 1).all() and (table[2:] == 1).all()
