"""What a rule may declare, with made-up rules on existing C loops.

Initial values of its state, formats that it refuses, and numbers that it remembers for a group.
"""

import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from cases import assert_same, in_two_threads, values

import fusedopt
from fusedopt import _arrays, _check, _functional, _storage, formats
from fusedopt.formats import PIECE, Stored
from fusedopt.optim.adam import ADAM
from fusedopt.optimizer import Optimizer
from fusedopt.reference._plain import reference
from fusedopt.reference.adam import _adam
from fusedopt.rule import Option, Rule, Scalar, State

BEGINS = replace(
    ADAM,
    options=(*ADAM.options, Option("begin", 0.3, _check.number)),
    states=(
        State("exp_avg", init="param"),
        State("exp_avg_sq", squared=True, init="begin"),
        State("max_exp_avg_sq", squared=True, needs="amsgrad", init="begin"),
    ),
)


class Begins(fusedopt.Adam):
    rule = BEGINS

    def __init__(self, params, **options):
        Optimizer.__init__(self, params, **options)


PlainBegins, plain_begins = reference(Begins, _adam)
begins = _functional.function(Begins)


def numbers(array):
    return array.decode() if isinstance(array, Stored) else array


def raw(opt):
    """The bytes of all state, one array after the other."""
    arrays = [a for own in opt.state.values() for key, a in own.items() if key != "step"]
    return [part.view(f"u{part.itemsize}") for a in arrays for part in _storage.parts(a)]


def parameters(dtype):
    shapes = [(0,), (), (64,), (5, 1000), (PIECE // 32, 33)]
    params = [values(int(np.prod(s)), np.float32, 3, hostile=False).reshape(s) for s in shapes]
    params.append(np.asfortranarray(params[3]))
    return [p.astype(dtype, order="K") for p in params]


def bfloat16():
    return pytest.importorskip("ml_dtypes", reason="bfloat16 arrays come from it").bfloat16


STORAGE = [(np.float64, {"state_dtype": None})] + [
    (dtype, {"state_dtype": state_dtype, **options})
    for dtype, options in [
        (np.float32, {}),
        (np.float16, {}),
        (bfloat16, {}),
        (bfloat16, {"master_bits": 24}),
    ]
    for state_dtype in (None, "bfloat16", "int8")
]


@pytest.mark.parametrize(("dtype", "options"), STORAGE)
def test_state_begins_as_declared(dtype, options):
    """In every format, with the reference's bits, at first and after some steps."""
    dtype = bfloat16() if dtype is bfloat16 else dtype
    state_dtype = options["state_dtype"]
    options = {"amsgrad": True, "seed": 5, "begin": 0.3} | options
    ours, theirs = parameters(dtype), parameters(dtype)
    fast, plain = Begins(ours, **options), PlainBegins(theirs, **options)
    names = [f"{i}" for i in range(len(raw(fast)))]
    assert_same(raw(fast), raw(plain), names)
    error = {"bfloat16": 2**-7, "int8": 2**-3}.get(state_dtype, 2**-23)
    for param, own in zip(ours, fast.state.values(), strict=True):
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            got = numbers(own[key])
            np.testing.assert_allclose(got, 0.3, rtol=error)
            if got.size > PIECE and state_dtype is not None:  # random: the mean is right
                assert abs(got.mean(dtype=np.float64) / 0.3 - 1) <= error / 50
        scale = np.abs(param).max(initial=0)
        smallest = scale * 2.0**-12 if state_dtype == "int8" else 0
        np.testing.assert_allclose(
            numbers(own["exp_avg"]), param.astype(np.float64), rtol=error, atol=smallest
        )
    for step in range(3):
        grads = [values(p.size, np.float32, step, False).reshape(p.shape, order="A") for p in ours]
        fast.step(grads)
        plain.step(grads)
    assert_same(raw(fast), raw(plain), names)
    for a, b in zip(ours, theirs, strict=True):
        assert a.tobytes() == b.tobytes()


def test_noise_does_not_depend_on_the_pieces():
    n = 2 * PIECE + 77
    opt = Begins(values(n, np.float32, 0, False), state_dtype="int8", seed=9)
    for slot, (key, begun) in enumerate({"exp_avg": None, "exp_avg_sq": 0.3}.items(), 1):
        own = opt.state["params"][key]
        twin = _storage.zeros_like(own)
        whole = opt._work.params[0] if begun is None else np.full(n, begun)
        formats.encode(twin, whole, formats.key(9, 0, 0, slot))
        assert_same(_storage.parts(own), _storage.parts(twin), ["codes", "blocks"])
    halves = opt.state["params"]["exp_avg_sq"].data.reshape(-1)[: 2 * PIECE].reshape(2, -1)
    assert not np.array_equal(*halves)


def test_leaves_of_later_groups_have_noise_of_their_own():
    p = values(5000, np.float32, 0, False)
    opt = Begins([{"params": p}], state_dtype="int8")
    opt.add_param_group({"params": p.copy(), "begin": 0.3})
    opt.add_param_group({"params": p.copy(), "begin": 2.0})
    first, second, third = (own["exp_avg_sq"] for own in opt.state.values())
    assert first.data.tobytes() != second.data.tobytes()
    np.testing.assert_allclose(third.decode(), 2, rtol=2**-3)


def test_large_state_takes_no_temporary_memory():
    p = np.ones(1 << 22, np.float32)
    for state_dtype in ("int8", "bfloat16", "float32"):
        tracemalloc.start()
        Begins(p, state_dtype=state_dtype)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < p.nbytes / 4


def test_state_that_a_checkpoint_lacks_begins_anew():
    """State that the dict lacks is as in a new optimizer."""
    for state_dtype in (None, "bfloat16", "int8"):
        ours, theirs = np.ones(5000, np.float32), np.ones(5000, np.float32)
        g = values(5000, np.float32, 1, False)
        opt = Begins(ours, amsgrad=True, state_dtype=state_dtype)
        new = Begins(theirs.copy(), amsgrad=True, state_dtype=state_dtype, begin=0.7)
        other = Begins(theirs, state_dtype=state_dtype, begin=0.7)
        opt.step(g)
        other.step(g)
        opt.load_state_dict(other.state_dict())
        got, expected = (o.state["params"]["max_exp_avg_sq"] for o in (opt, new))
        for a, b in zip(_storage.parts(got), _storage.parts(expected), strict=True):
            assert a.tobytes() == b.tobytes()
        opt.param_groups[0]["amsgrad"] = True
        opt.step(g)


def test_state_that_is_switched_on_again_is_unchanged():
    opt = Begins(np.ones(9, np.float32), amsgrad=True, begin=4.0)
    opt.param_groups[0]["amsgrad"] = False
    opt.step(np.ones(9, np.float32))
    assert (opt.state["params"]["max_exp_avg_sq"] == 4).all()
    opt.param_groups[0]["amsgrad"] = True
    opt.step(np.ones(9, np.float32))
    assert (opt.state["params"]["max_exp_avg_sq"] == 4).all()  # kept
    assert (opt.state["params"]["exp_avg_sq"] < 4).all()


def test_a_number_that_float32_does_not_hold():
    opt = Begins([{"params": np.ones(3), "begin": 1e300}])
    assert (opt.state["params[0]['params']"]["exp_avg_sq"] == 1e300).all()
    with pytest.raises(ValueError, match=r"params\[1\]\['params'\].exp_avg_sq: begin=1e\+300 is"):
        opt.add_param_group({"params": np.ones(3, np.float32), "begin": 1e300})
    assert len(opt.param_groups) == len(opt.state) == 1
    opt.step([np.ones(3)])


def test_functions_take_state_as_it_is():
    p, g, m, x = (np.ones(3, np.float32) for _ in range(4))
    with pytest.raises(TypeError, match="unknown option"):
        begins([p], [g], [m], [x], step=1, begin=0.5)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\]: is None; .* pass a copy of the param"):
        begins([p], [g], [None], [x], step=1)
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\]: is None; .* pass numpy.full_like of"):
        begins([p], [g], [m], [None], step=1)


# ---------------------------------------------------------------- formats that state refuses

REFUSES = replace(
    ADAM,
    states=(
        State("exp_avg"),
        State("exp_avg_sq", squared=True, refuses=("int8",)),
        State("max_exp_avg_sq", squared=True, needs="amsgrad", refuses=("bfloat16",)),
    ),
)


class Refuses(fusedopt.Adam):
    rule = REFUSES

    def __init__(self, params, **options):
        Optimizer.__init__(self, params, **options)


PlainRefuses, plain_refuses = reference(Refuses, _adam)
refuses = _functional.function(Refuses)
TOO_NARROW = "state_dtype: adam keeps 'exp_avg_sq', for which 'int8' is too narrow; use 'bfloat16' "
NO_16_BITS = (
    "state_dtype: adam keeps 'max_exp_avg_sq', for which 'bfloat16' is too narrow; use None"
)


@pytest.mark.parametrize("kind", [Refuses, PlainRefuses])
def test_refused_formats(kind):
    """By name: when an optimizer or a group is made, when options change, in state dicts."""
    p = np.ones(9, np.float32)
    with pytest.raises(ValueError, match=f"^{TOO_NARROW}or None$"):
        kind(p, state_dtype="int8")  # also below min_8bit_size
    with pytest.raises(ValueError, match=f"^{NO_16_BITS}$"):
        kind(p, state_dtype="bfloat16", amsgrad=True)
    opt = kind([{"params": p}], state_dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"^params\[1\].{TOO_NARROW}or None$"):
        opt.add_param_group({"params": p.copy(), "state_dtype": "int8"})
    assert len(opt.state) == 1
    opt.step([np.ones(9)])
    before = p.copy()
    opt.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match=rf"^param_groups\[0\].{NO_16_BITS}$"):
        opt.step([np.ones(9)])
    assert np.array_equal(p, before)
    opt.param_groups[0]["amsgrad"] = False
    saved = opt.state_dict()
    saved["param_groups"][0]["state_dtype"] = "int8"
    with pytest.raises(ValueError, match=rf"^state dict: param_groups\[0\].{TOO_NARROW}"):
        opt.load_state_dict(saved)
    for state_dtype in (None, "float32"):
        kind(p, state_dtype=state_dtype, amsgrad=True).step(np.ones(9))


@pytest.mark.parametrize("step_of", [refuses, plain_refuses])
def test_refused_formats_of_functions(step_of):
    p, g, m = (np.ones(64, np.float32) for _ in range(3))
    codes = Stored("uint8", np.zeros(64, np.uint8), np.zeros(1, np.uint8))
    half = np.ones(64, np.float16)
    kept = Stored("bfloat16+int16", np.zeros(64, np.uint16), np.zeros(64, np.int16))
    for lists, message in [
        (
            ([codes],),
            r"^exp_avg_sqs\[0\]: adam keeps 'exp_avg_sq', for which uint8 is too narrow; ",
        ),
        (([m], [half]), r"^max_exp_avg_sqs\[0\]: adam keeps .*, for which float16 is too narrow; "),
    ]:
        with pytest.raises(ValueError, match=f"{message}pass float32$"):
            step_of([p], [g], [m], *lists, step=1)
    assert (p == 1).all()
    step_of([p], [g], [m], [half], step=1)
    wide = np.zeros(64, np.float32)
    step_of([p], [g], [m], [wide], [kept], step=1)


# ---------------------------------------------------------------- what a rule remembers


def advance(o):
    most = max(o["lr"], o["lr_max"])
    return {"k": o["k"] + 1, "weight_sum": o["weight_sum"] + most * o["betas"][1], "lr_max": most}


def rate(o):
    return o["lr"] * o["lr_max"] / o["weight_sum"]


AVERAGES = Rule(
    name="sgd",
    options=(
        Option("lr", 0.5, _check.nonnegative),
        Option("betas", (0.5, 0.75), _check.decay_rates),
        Option("lowest", 0.125, _check.number),
    ),
    states=(State("momentum_buffer", needs="lowest"),),
    constants=lambda step, o: {
        "lr": rate(o),
        "momentum": o["betas"][0],
        "w": 1.0,
        "nesterov": 0.0,
        "first": float(step == 1),
    },
    memory=(Scalar("k", 0, _check.steps), Scalar("weight_sum", 0.0), Scalar("lr_max", "lowest")),
    advance=advance,
)


class Averages(fusedopt.SGD):
    rule = AVERAGES

    def __init__(self, params, **options):
        Optimizer.__init__(self, params, **options)


def update(p, g, b, *, step, **o):
    c = p.dtype.type
    b[...] = g if step == 1 else c(o["betas"][0]) * b + g
    p[...] = p - c(rate(o)) * b


PlainAverages, plain_averages = reference(Averages, update)
averages = _functional.function(Averages)

KINDS = pytest.mark.parametrize("kind", [Averages, PlainAverages])


def memory(opt, i=0):
    return {row.name: opt.param_groups[i][row.name] for row in AVERAGES.memory}


def snapshot(opt):
    return repr(opt.state_dict()), [p.tobytes() for p in opt._work.params]


def test_remembered_numbers_advance_with_the_steps():
    """By group, also if leaves are skipped; readable, and with the reference's bits."""
    ours, theirs = ([values(n, np.float32, n, False) for n in (700, 5, 9)] for _ in range(2))
    expected = [{"k": 0, "weight_sum": 0.0, "lr_max": 0.125}, dict(k=0, weight_sum=0.0, lr_max=0.5)]
    made = []
    for kind, params in (Averages, ours), (PlainAverages, theirs):
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.25, "lowest": 0.5}]
        made.append(kind(groups, lr=lambda step: 1 / step, state_dtype="int8", min_8bit_size=0))
    for step in range(1, 7):
        grads = [values(p.size, np.float32, step, False) for p in ours]
        grads = [[grads[0], None], [None if step == 3 else grads[2]]]
        for i, lr in enumerate((1 / step, 0.25)):
            expected[i] |= advance(expected[i] | {"lr": lr, "betas": (0.5, 0.75)})
        for opt in made:
            opt.step(grads)
            assert [memory(opt, i) for i in range(2)] == expected
            assert _arrays.are_settled(opt.param_groups, opt._groups)
        assert_same(ours, theirs, ["700", "5", "9"])
    opt = made[0]
    opt.add_param_group({"params": np.ones(3, np.float32)})
    assert memory(opt, 2) == {"k": 0, "weight_sum": 0.0, "lr_max": 0.125}
    opt.step([*grads, np.ones(3)])
    assert [memory(opt, i)["k"] for i in range(3)] == [7, 7, 1]


def fail(opt):
    """Steps that raise or are skipped, each with what it raises."""
    bad = np.full(4, np.nan, np.float32)

    def rate(step):
        raise ZeroDivisionError

    yield ValueError, lambda: opt.step(np.ones(3, np.float32))
    yield FloatingPointError, lambda: opt.step(bad, nonfinite="raise")
    yield None, lambda: opt.step(bad, nonfinite="skip")
    yield ValueError, lambda: opt.step(bad, grad_scale=np.inf)
    old = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = rate
    yield ZeroDivisionError, lambda: opt.step(np.ones(4, np.float32))
    opt.param_groups[0]["lr"] = lambda step: opt.step(np.ones(4, np.float32)).step
    yield RuntimeError, lambda: opt.step(np.ones(4, np.float32))
    opt.param_groups[0]["lr"] = lambda step: 1e308
    opt.param_groups[0]["weight_sum"] = kept = 1.75e308
    yield ValueError, lambda: opt.step(np.ones(4, np.float32))
    assert opt.param_groups[0]["weight_sum"] is kept
    opt.param_groups[0]["weight_sum"] = 0.875
    opt.param_groups[0]["lr"] = old


@KINDS
def test_only_steps_that_succeed_are_remembered(kind):
    p, q = np.ones(4, np.float32), np.ones(4, np.float32)
    opt, twin = kind(p), kind(q)
    g = np.ones(4, np.float32)
    for _ in range(2):
        opt.step(g)
        twin.step(g)
    assert memory(opt) == {"k": 2, "weight_sum": 0.75, "lr_max": 0.5}
    opt.param_groups[0]["weight_sum"] = twin.param_groups[0]["weight_sum"] = 0.875
    for error, call in fail(opt):
        before = memory(opt), p.tobytes()
        if error is None:
            assert call().skipped
        else:
            with pytest.raises(error):
                call()
        assert (memory(opt), p.tobytes()) == before
    opt.step(g)
    twin.step(g)
    assert snapshot(opt) == snapshot(twin)


def test_an_overflow_is_named():
    opt = Averages(np.ones(4), lr=1e308, betas=(0.5, 0.99))
    opt.step(np.zeros(4))
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]: in this step weight_sum: must be fini"
    ):
        opt.step(np.zeros(4))
    assert memory(opt)["k"] == 1


@KINDS
@pytest.mark.parametrize("way", ["dict", ".npz", ".safetensors"])
def test_checkpoints_hold_what_is_remembered(kind, way, tmp_path):
    def made(p, q, **options):
        return kind([{"params": p}, {"params": q, "lr": 0.3}], lr=0.1, **options)

    ours = [values(n, np.float32, n, False) for n in (5000, 3)]
    grads = [values(n, np.float32, n + 1, False) for n in (5000, 3)]
    opt = made(*ours, state_dtype="int8")
    for _ in range(3):
        opt.step(grads)
    theirs = [p.copy() for p in ours]
    same, other = made(*theirs, state_dtype="int8"), made(*theirs)
    for target, convert in (same, False), (other, True):
        if way == "dict":
            target.load_state_dict(opt.state_dict(), convert=convert)
        else:
            if way == ".safetensors":
                pytest.importorskip("safetensors", reason="reads such files")
            opt.save(tmp_path / f"a{way}")
            target.load(tmp_path / f"a{way}", convert=convert)
        assert [memory(target, i) for i in range(2)] == [memory(opt, i) for i in range(2)]
    opt.step(grads)
    same.step(grads)
    assert memory(same) == memory(opt) != memory(other)
    assert_same(ours, theirs, ["5000", "3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: group.pop("lr_max"), r"expected lr, .*; has no lr_max$"),
        (lambda group: group.update(k=1.5), r"param_groups\[0\].k: expected a whole number"),
        (
            lambda group: group.update(weight_sum=np.nan),
            r"param_groups\[0\].weight_sum: must be fin",
        ),
    ],
)
def test_checkpoints_without_it_are_refused(change, message):
    opt, target = Averages(np.ones(3)), Averages(np.ones(3))
    opt.step(np.ones(3))
    saved = opt.state_dict()
    change(saved["param_groups"][0])
    before = snapshot(target)
    with pytest.raises((TypeError, ValueError), match=message):
        target.load_state_dict(saved)
    assert snapshot(target) == before


def test_edits_by_hand_are_checked():
    opt = Averages([{"params": np.ones(3)}])
    group = opt.param_groups[0]
    for value, error in ("1", TypeError), (None, TypeError), (np.inf, ValueError):
        group["weight_sum"] = value
        with pytest.raises(error, match=r"param_groups\[0\].weight_sum"):
            opt.step([np.ones(3)])
        assert opt.state_dict()["param_groups"][0]["weight_sum"] == 0  # the last step's
    del group["weight_sum"]
    with pytest.raises(ValueError, match=r"param_groups\[0\]: has no 'weight_sum'"):
        opt.step([np.ones(3)])
    group["weight_sum"] = np.float32(2)
    opt.step([np.ones(3)])
    assert group["weight_sum"] == 2 + 0.5 * 0.75
    group["betas"] = [0.5, 0.75]  # a list may change in place, so each step reads all options
    opt.step([np.ones(3)])
    opt.step([np.ones(3)])
    assert memory(opt) == {"k": 3, "weight_sum": 2 + 3 * 0.5 * 0.75, "lr_max": 0.5}
    with pytest.raises(TypeError, match="unknown option 'weight_sum'"):
        Averages(np.ones(3), weight_sum=1.0)
    with pytest.raises(TypeError, match=r"params\[1\]: unknown option 'k'"):
        opt.add_param_group({"params": np.ones(3), "k": 1})
    assert "weight_sum" not in repr(opt)


def test_concurrent_threads_remember_each_step_once():
    opt, taken, meet = Averages(np.ones(1000)), [], threading.Barrier(2)

    def work():
        meet.wait()
        for _ in range(300):
            try:
                taken.append(opt.step(np.ones(1000)).step)
            except RuntimeError:
                pass

    in_two_threads(work)
    assert memory(opt)["k"] == opt.state_dict()["step"] == len(set(taken)) == len(taken) > 0


@pytest.mark.parametrize("step_of", [averages, plain_averages])
def test_functions_take_the_remembered_numbers_of_a_step(step_of):
    ours, theirs = np.ones(9, np.float32), np.ones(9, np.float32)
    opt, buffer = Averages(ours), np.zeros(9, np.float32)
    for step in range(1, 4):
        g = values(9, np.float32, step, False)
        opt.step(g)
        step_of([theirs], [g], [buffer], step=step, **memory(opt))
    assert_same([ours], [theirs], ["params"])
    with pytest.raises(TypeError, match="averages: needs k, weight_sum: values in this step"):
        step_of([theirs], [g], [buffer], step=4, lr_max=0.5)
    with pytest.raises(ValueError, match="weight_sum: must be finite"):
        step_of([theirs], [g], [buffer], step=4, lr_max=0.5, k=1, weight_sum=np.nan)
    assert "k, weight_sum, lr_max\n    What `Averages` remembers" in step_of.__doc__ or (
        "plain NumPy" in step_of.__doc__
    )
