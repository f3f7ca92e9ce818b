"""Bad input: a clear error that names the leaf, before the first write."""

import threading

import numpy as np
import pytest

import fusedopt
from fusedopt import functional, reference

f32 = np.float32


def ones(*shape, dtype=f32):
    return np.ones(shape, dtype)


class Tensor:
    """Stands for an array of another library."""


MASKED = np.ma.masked_array(ones(3), mask=[0, 1, 0])


def read_only():
    a = ones(3)
    a.flags.writeable = False
    return a


BAD_ARRAYS = {
    "tensor": (Tensor(), TypeError, r"expected a NumPy array, got .*Tensor; pass numpy.asarray"),
    "float": (1.0, TypeError, "expected a NumPy array, got float"),
    "none": (None, TypeError, "expected a NumPy array, got NoneType"),
    "int": (np.ones(3, int), TypeError, r"dtype int64 is not supported \(float32, float64, "),
    "object": (np.ones(3, object), TypeError, "dtype object is not supported"),
    "complex": (np.ones(3, complex), TypeError, "dtype complex128 is not supported"),
    "bool": (np.ones(3, bool), TypeError, "dtype bool is not supported"),
    "text": (np.array("x"), TypeError, "dtype <U1 is not supported"),
    "big-endian": (
        np.ones(3, ">f4"),
        TypeError,
        r"dtype >f4 has foreign byte order.*\.astype\(numpy.float32\)",
    ),
    "masked": (MASKED, TypeError, "MaskedArray is a subclass"),
    "matrix": (np.rec.array(np.ones(3)), TypeError, "recarray is a subclass"),
}
BAD_PARAMS = BAD_ARRAYS | {
    "read-only": (read_only(), ValueError, "read-only array; fusedopt updates in place"),
    "broadcast": (np.broadcast_to(ones(1), (5,)), ValueError, "read-only array"),
    "strided": (ones(6)[::2], ValueError, "array with gaps"),
    "reversed": (ones(6)[::-1], ValueError, "array with gaps or negative strides"),
    "inner slice": (ones(4, 6)[:, :3], ValueError, "array with gaps"),
}


@pytest.mark.parametrize("kind", BAD_PARAMS)
@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fusedopt", "reference"])
def test_bad_parameter(kind, module):
    bad, error, message = BAD_PARAMS[kind]
    with pytest.raises(error, match=r"params\['dense1'\]\[1\]: " + message):
        module.Adam({"ok": ones(2), "dense1": [ones(3), bad]})


@pytest.mark.parametrize("kind", [k for k in BAD_ARRAYS if k != "none"])
@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fusedopt", "reference"])
def test_bad_gradient_changes_nothing(kind, module):
    bad, error, message = BAD_ARRAYS[kind]
    params = {"a": ones(3), "b": {"W": ones(3)}}
    opt = module.SGD(params, lr=1.0, momentum=0.9)
    with pytest.raises(error, match=r"grads\['b'\]\['W'\]: " + message):
        opt.step({"a": ones(3), "b": {"W": bad}})
    unchanged(opt, params)
    opt.step({"a": ones(3), "b": {"W": ones(3)}})  # and it still works
    assert params["a"].tolist() == [0, 0, 0]


def unchanged(opt, params):
    assert all((p == 1).all() for _, p in fusedopt._tree.leaves("", params))
    for state in opt.state.values():
        assert state["step"] == 0
        assert all(not a.any() for name, a in state.items() if name != "step")


BAD_NESTING = [
    ({"a": ones(2)}, r"grads: no 'b'"),
    ({"a": ones(2), "b": [ones(2)], "c": 1}, r"grads: 'c' is not in params"),
    ({"a": ones(2), "b": []}, r"grads\['b'\]: 0 entries for 1 in params"),
    ({"a": ones(2), "b": ones(2)}, r"grads\['b'\]: expected a list as in params, got ndarray"),
    ([ones(2), ones(2)], r"grads: expected a dict as in params, got list"),
    ({"a": ones(3), "b": [ones(2)]}, r"grads\['a'\]: shape \(3,\) does not fit .* \(2,\)"),
    ({"a": ones(2, 1), "b": [ones(2)]}, r"grads\['a'\]: shape \(2, 1\) does not fit"),
]


@pytest.mark.parametrize(("grads", "message"), BAD_NESTING, ids=[m for _, m in BAD_NESTING])
def test_bad_nesting(grads, message):
    params = {"a": ones(2), "b": [ones(2)]}
    opt = fusedopt.Adam(params)
    with pytest.raises(ValueError, match=message):
        opt.step(grads)
    unchanged(opt, params)


def test_none_leaves_out_leaves_and_parts():
    params = {"a": ones(2), "b": {"W": ones(2), "c": ones(1)}, "d": [ones(1)]}
    opt = fusedopt.SGD(params, lr=1.0)
    assert opt.step({"a": ones(2), "b": None, "d": [None]})[:2] == (1, 1)
    assert params["a"].tolist() == [0, 0]
    assert params["b"]["W"].tolist() == [1, 1]
    assert [s["step"] for s in opt.state.values()] == [1, 0, 0, 0]
    assert opt.step(None)[:2] == (2, 0)


def test_overlapping_parameters():
    a = ones(10)
    for params, names in [
        ([a, a], r"params\[0\] and params\[1\] share memory"),
        ({"x": a[:6], "y": a[5:]}, r"params\['x'\] and params\['y'\] share memory"),
        ([a, a.reshape(2, 5)[1]], r"params\[0\] and params\[1\] share memory"),
    ]:
        with pytest.raises(ValueError, match=names):
            fusedopt.Adam(params)
    fusedopt.Adam([a[:5], a[5:], a[5:5], ones(0)])  # neighbours and empty ones do not overlap
    opt = fusedopt.Adam([a[:5]])
    with pytest.raises(ValueError, match="share memory"):
        opt.add_param_group({"params": [ones(2), a[4:]]})
    assert len(opt.param_groups) == 1
    opt.step([ones(5)])


def test_gradient_that_aliases():
    p, q = ones(4), ones(4)
    opt = fusedopt.Adam({"p": p, "q": q})
    m = opt.state["params['q']"]["exp_avg"]
    for grad, other in [(p, "p'"), (q, "q'"), (m, r"q'\]\.exp_avg")]:
        with pytest.raises(ValueError, match=r"grads\['p'\]: shares memory with params\['" + other):
            opt.step({"p": grad, "q": ones(4)})
    wide = ones(8)
    opt = fusedopt.Adam([wide[2:6]])
    for part in [wide[:4], wide[4:], wide[1:5], wide[2:6]]:
        with pytest.raises(ValueError, match="shares memory"):
            opt.step([part])
    opt.step([wide[:2].repeat(2)])
    shared = ones(3)  # two leaves may read the same gradient
    fusedopt.Adam([ones(3), ones(3)]).step([shared, shared])


BAD_OPTIONS = [
    ("Adam", {"lr": -1}, ValueError, "lr: must be >= 0"),
    ("Adam", {"lr": float("nan")}, ValueError, "lr: must be finite"),
    ("Adam", {"lr": "fast"}, TypeError, "lr: expected a number, got 'fast'"),
    ("Adam", {"lr": True}, TypeError, "lr: expected a number"),
    ("Adam", {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: must be in \[0, 1\)"),
    ("Adam", {"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\]: must be in \[0, 1\)"),
    ("Adam", {"betas": 0.9}, TypeError, "betas: expected two numbers"),
    ("Adam", {"eps": -1e-8}, ValueError, "eps: must be >= 0"),
    ("Adam", {"weight_decay": float("inf")}, ValueError, "weight_decay: must be finite"),
    ("Adam", {"l1": -1}, ValueError, "l1: must be >= 0"),
    ("Adam", {"amsgrad": 1}, TypeError, "amsgrad: expected True or False"),
    ("AdamW", {"weight_decay": -1}, ValueError, "weight_decay: must be >= 0"),
    ("SGD", {"momentum": -0.9}, ValueError, "momentum: must be >= 0"),
    ("SGD", {"dampening": float("nan")}, ValueError, "dampening: must be finite"),
    ("SGD", {"nesterov": True}, ValueError, "nesterov: needs momentum > 0"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "nesterov: needs"),
]


@pytest.mark.parametrize(("cls", "options", "error", "message"), BAD_OPTIONS)
def test_bad_options(cls, options, error, message):
    with pytest.raises(error, match="^" + message):
        getattr(fusedopt, cls)([ones(2)], **options)
    params = [ones(2)]
    opt = getattr(fusedopt, cls)(params)
    opt.param_groups[0].update(options)
    with pytest.raises(error, match=r"^param_groups\[0\]\." + message):
        opt.step([ones(2)])
    unchanged(opt, params)


def test_bad_groups():
    with pytest.raises(TypeError, match=r"params\[1\]: unknown option 'lrr'; known: lr, betas"):
        fusedopt.Adam([{"params": ones(2)}, {"params": ones(2), "lrr": 1}])
    with pytest.raises(ValueError, match=r"params\[1\]\.lr: must be >= 0"):
        fusedopt.Adam([{"params": ones(2)}, {"params": ones(2), "lr": -1}])
    with pytest.raises(TypeError, match="expected a dict with 'params'"):
        fusedopt.Adam(ones(2)).add_param_group([ones(1)])
    with pytest.raises(TypeError, match=r"params\[0\]\['params'\]\['W'\]: dtype int64"):
        fusedopt.Adam([{"params": {"W": np.ones(2, int)}}])
    opt = fusedopt.Adam([{"params": ones(2)}, {"params": [ones(3)], "lr": 1.0}])
    with pytest.raises(ValueError, match="one entry for each of the 2 groups"):
        opt.step([ones(2)])
    with pytest.raises(ValueError, match=r"grads\[1\]\[0\]: shape"):
        opt.step([ones(2), [ones(2)]])
    opt.param_groups[0]["params"] = ones(2)
    with pytest.raises(ValueError, match="was replaced; use add_param_group"):
        opt.step([ones(2), [ones(3)]])


@pytest.mark.parametrize("empty", [[], {}, (), [[], {}], {"a": []}], ids=str)
def test_no_parameters(empty):
    with pytest.raises(ValueError, match="params: no arrays in it"):
        fusedopt.Adam(empty)


def test_state_that_was_not_allocated():
    params = [ones(2)]
    opt = fusedopt.SGD(params)
    opt.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="need momentum_buffer, which was not allocated"):
        opt.step([ones(2)])
    unchanged(opt, params)
    opt.param_groups[0]["momentum"] = 0.0
    opt.step([ones(2)])


def test_bad_schedule():
    params = [ones(2)]
    opt = fusedopt.Adam(params, lr=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"lr\(1\): must be >= 0"):
        opt.step([ones(2)])
    opt = fusedopt.Adam(params, lr=lambda step: None)
    with pytest.raises(TypeError, match=r"lr\(1\): expected a number"):
        opt.step([ones(2)])
    unchanged(opt, params)


def test_arrays_that_must_work(tmp_path):
    """0-d, empty, memory-mapped, unaligned, F-order, permuted, read-only gradient."""
    mapped = np.memmap(tmp_path / "p", f32, "w+", shape=(4, 3))
    mapped[...] = 1
    unaligned = np.zeros(4 * 5 + 1, np.uint8)[1:].view(f32)
    unaligned[...] = 1
    permuted = ones(2, 3, 4).transpose(1, 2, 0)
    params = [np.array(1, f32), ones(0), mapped, unaligned, np.asfortranarray(ones(3, 4)), permuted]
    opt = fusedopt.SGD(params, lr=1.0)
    grads = [np.array(p) for p in params]
    for g in grads:
        g.flags.writeable = False
    assert opt.step(grads).updated == 6
    assert all((p == 0).all() for p in params)
    grad = np.arange(12, dtype=f32).reshape(3, 4)  # laid anew, element by element
    params[4][...] = 0
    opt.step([None] * 4 + [grad, None])
    assert (params[4] == -grad).all()


FUNCTIONAL_FAULTS = [
    (lambda a: ([a], [], [a], [a]), ValueError, "grads: 0 arrays for 1 in params"),
    (lambda a: (a, a, a, None), TypeError, "params: expected a list of arrays, got ndarray"),
    (lambda a: ([a], [ones(3)], [ones(3)], None), ValueError, "exp_avg_sqs: these options need it"),
    (lambda a: ([a], [ones(3)], [ones(3)], [ones(2)]), ValueError, r"exp_avg_sq: shape \(2,\)"),
    (
        lambda a: ([a], [ones(3)], [ones(3)], [ones(3, dtype="f8")]),
        TypeError,
        "exp_avg_sq: dtype float64 does not fit the parameter's float32",
    ),
    (lambda a: ([a], [ones(3)], [a], [ones(3)]), ValueError, "share memory"),
    (lambda a: ([a], [a], [ones(3)], [ones(3)]), ValueError, "shares memory with params"),
]


@pytest.mark.parametrize(("make", "error", "message"), FUNCTIONAL_FAULTS)
def test_functional_faults(make, error, message):
    a = ones(3)
    params, grads, exp_avgs, exp_avg_sqs = make(a)
    with pytest.raises(error, match=message):
        functional.adam(params, grads, exp_avgs, exp_avg_sqs, step=1)
    assert (a == 1).all()


@pytest.mark.parametrize("step", [0, -1, 1.0, None, True, 2**63])
def test_functional_step(step):
    with pytest.raises((TypeError, ValueError), match="^step: "):
        functional.sgd([ones(1)], [ones(1)], step=step)
    functional.sgd([ones(1)], [ones(1)], step=2**40)  # 64 bits


def test_parameters_stay_exported():
    p = ones(3)
    opt = fusedopt.Adam([p])
    with pytest.raises(ValueError, match="resize"):
        p.resize(1000)
    opt.step([ones(3)])


def test_same_optimizer_from_two_threads(tmp_path):
    """Any second call of the same optimizer is refused; the first is not disturbed."""
    params, inside, go = [ones(3)], threading.Event(), threading.Event()

    def rate(step):
        inside.set()
        assert go.wait(10)
        return 1.0

    opt = fusedopt.SGD(params, lr=rate)
    first = threading.Thread(target=opt.step, args=([ones(3)],))
    first.start()
    assert inside.wait(10)
    for call in (
        lambda: opt.step([ones(3)]),
        lambda: opt.add_param_group({"params": ones(2)}),
        lambda: opt.load_state_dict(opt.state_dict()),
        lambda: opt.save(tmp_path / "x.npz"),
    ):
        with pytest.raises(RuntimeError, match="another thread is in a step of this optimizer"):
            call()
    go.set()
    first.join()
    assert params[0].tolist() == [0, 0, 0]
    assert not list(tmp_path.iterdir())
    opt.step([ones(3)])


def test_a_schedule_cannot_step_its_own_optimizer():
    params = [ones(3)]
    opt = fusedopt.SGD(params, lr=lambda step: opt.step([ones(3)]))
    for _ in range(2):  # and the optimizer is not left claimed
        with pytest.raises(RuntimeError, match="this call comes from within one"):
            opt.step([ones(3)])
    opt.param_groups[0]["lr"] = 1.0
    opt.step([ones(3)])
    assert params[0].tolist() == [0, 0, 0]


def test_cannot_be_copied():
    import copy
    import pickle

    opt = fusedopt.Adam([ones(2)])
    for f in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            f(opt)


def test_repr_says_what_it_is():
    opt = fusedopt.SGD({"W": ones(10, 100)}, lr=0.1)
    assert repr(opt).startswith("SGD(1 arrays, 1,000 elements; lr=0.1, momentum=0.0")
