"""What a rule may declare, with made-up rules on loops that exist: what state begins as."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from cases import assert_same, values

import fusedopt
from fusedopt import _check, _functional, _storage, formats
from fusedopt.formats import PIECE, Stored
from fusedopt.optim.adam import ADAM
from fusedopt.optimizer import Optimizer
from fusedopt.reference._plain import reference
from fusedopt.reference.adam import _adam
from fusedopt.rule import Option, State

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
    """In every format, and with the reference's bits, then and after some steps."""
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
            if got.size > PIECE and state_dtype is not None:  # rounded by chance, the mean is right
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


def test_large_state_takes_no_memory_beside_its_own():
    p = np.ones(1 << 22, np.float32)
    for state_dtype in ("int8", "bfloat16", "float32"):
        tracemalloc.start()
        Begins(p, state_dtype=state_dtype)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < p.nbytes / 4


def test_state_that_a_checkpoint_lacks_begins_anew():
    """As if it had never been used: what the dict lacks is what a new optimizer has."""
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


def test_state_that_is_switched_on_is_as_it_was_left():
    opt = Begins(np.ones(9, np.float32), amsgrad=True, begin=4.0)
    opt.param_groups[0]["amsgrad"] = False
    opt.step(np.ones(9, np.float32))
    assert (opt.state["params"]["max_exp_avg_sq"] == 4).all()
    opt.param_groups[0]["amsgrad"] = True
    opt.step(np.ones(9, np.float32))
    assert (opt.state["params"]["max_exp_avg_sq"] == 4).all()  # of a mean that fell since
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
