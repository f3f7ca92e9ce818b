"""Bad input: a clear error that names the leaf, before the first write."""

import inspect
import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import pytest
from cases import CASES

import fusedopt
from fusedopt import functional, reference

f32 = np.float32


def ones(*shape, dtype=f32):
    return np.ones(shape, dtype)


class Tensor:
    """An array of another library."""

    def __array__(self, dtype=None, copy=None):
        return np.ones(3, f32)


@dataclass
class Layer:
    W: np.ndarray


MASKED = np.ma.masked_array(ones(3), mask=[0, 1, 0])


def read_only():
    a = ones(3)
    a.flags.writeable = False
    return a


BAD_ARRAYS = {
    "tensor": (Tensor(), TypeError, r"expected a NumPy array, got .*Tensor; .* numpy.asarray"),
    "float": (1.0, TypeError, r"expected a NumPy array, got float; .* numpy.array\(...\)"),
    "buffer": (memoryview(b"1234"), TypeError, ".*got memoryview; convert it with numpy.asarray"),
    "generator": ((x for x in ()), TypeError, r".*got generator; convert it with list\(...\)"),
    "set": ({1}, TypeError, r".*got set; convert it with list\(...\)"),
    "mapping": (MappingProxyType({}), TypeError, r".*got mappingproxy; .* with dict\(...\)"),
    "dataclass": (
        Layer(ones(3)),
        TypeError,
        r".*Layer; pass a dict of its arrays, .*vars\(...\)",
    ),
    "class": (Layer, TypeError, ".*got type; pass arrays, or lists, tuples and dicts of them"),
    "text itself": ("W", TypeError, ".*got str; pass arrays, or lists, tuples and dicts of them"),
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


class Short(list):
    """Has more entries by its length than by its iterator."""

    def __iter__(self):
        return iter(())


BAD_NESTING = [
    ({"a": ones(2)}, r"grads: no 'b'"),
    ({"a": ones(2), "b": [ones(2)], "c": 1}, r"grads: 'c' is not in params"),
    ({"a": ones(2), "b": []}, r"grads\['b'\]: 0 entries for 1 in params"),
    ({"a": ones(2), "b": Short([ones(2)])}, r"grads\['b'\]: 0 entries for 1 in params"),
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


@pytest.mark.parametrize("kind", [dict, OrderedDict, partial(defaultdict, list)])
@pytest.mark.parametrize("first", range(4))
def test_gradients_are_found_by_their_keys(kind, first):
    """In any order of the dict, under keys that are equal to those of the parameters."""
    values = [1.0, 2.0, 4.0, 8.0]
    params = dict(zip(["a", "b2", "b1", 1], [np.zeros(2) for _ in values], strict=True))
    keys = ["a", "".join("b2"), "".join("b1"), 1.0]
    rows = [(key, np.full(2, value)) for key, value in zip(keys, values, strict=True)]
    fusedopt.SGD(params, lr=1.0).step(kind(rows[first:] + rows[:first]))
    assert [p[0] for p in params.values()] == [-value for value in values]


class Renamed(dict):
    """Has other keys, and fewer, by its iterator than by its items."""

    def __iter__(self):
        return iter(("c",))


def test_keys_of_gradients_are_those_of_items():
    params = Renamed(a=[ones(2)], b=[ones(2)])
    opt = fusedopt.SGD(params, lr=1.0)
    assert opt.step({"a": [ones(2)], "b": None}).updated == 1
    assert opt.step(None).updated == 0
    assert params["a"][0].tolist() == [0, 0]


def test_none_skips_leaves_and_parts():
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
    ("Adam", {"eps_hat": 1}, TypeError, "eps_hat: expected True or False"),
    ("Adadelta", {"rho": 1.5}, ValueError, r"rho: must be in \[0, 1\]"),
    ("AdEMAMix", {"betas": (0.9, 0.999)}, TypeError, "betas: expected three numbers"),
    ("AdEMAMix", {"t_alpha_beta3": 0.0}, ValueError, "t_alpha_beta3: must be > 0"),
    (
        "AdEMAMix",
        {"t_alpha_beta3": 9, "betas": (0.9, 0.9, 0.5)},
        ValueError,
        r"t_alpha_beta3: raises .* needs 0 < betas\[0\] <= betas\[2\]",
    ),
    ("AdEMAMix", {"state_dtype": "int8"}, ValueError, "state_dtype: ademamix keeps 'exp_avg"),
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
    with pytest.raises(
        TypeError, match=r"params\[1\]: unknown option 'lrr' \(is lr meant\?\); known: lr, betas"
    ):
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
    grad = np.arange(12, dtype=f32).reshape(3, 4)  # copied to the parameter's memory order
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
    (
        lambda a: ([a, ones(2)], [ones(3), ones(5)], *([ones(3), ones(2)] for _ in "mv")),
        ValueError,
        r"grads\[1\]: shape \(5,\) does not fit",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), FUNCTIONAL_FAULTS)
@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_functional_faults(module, make, error, message):
    a = ones(3)
    params, grads, exp_avgs, exp_avg_sqs = make(a)
    with pytest.raises(error, match=message):
        module.adam(params, grads, exp_avgs, exp_avg_sqs, step=1)
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
    """Any second call of the same optimizer is refused; the first one succeeds."""
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
    for one in (opt, fusedopt.GradAccumulator([ones(2)])):
        for f in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=f"^{type(one).__name__} .*cannot be copied or pi"):
                f(one)


def test_repr_says_what_it_is():
    opt = fusedopt.SGD({"W": ones(10, 100)}, lr=0.1)
    assert repr(opt).startswith("SGD(1 arrays, 1,000 elements; lr=0.1, momentum=0.0")


# ------------------------------------------------------------------ trees and groups


def cycle():
    inner = [ones(2)]
    inner.append({"again": inner})
    return inner


def deep(depth):
    tree = ones(2)
    for _ in range(depth):
        tree = [tree]
    return tree


class Key:
    """Two of these are different keys with the same repr."""

    def __repr__(self):
        return "key"


BAD_TREES = {
    "cycle": (cycle(), r"params\[1\]\['again'\]\[1\].*: nested more than 100 deep"),
    "deep": (deep(5000), r"params\[0\]\[0\].*: nested more than 100 deep"),
    "names": ({Key(): ones(2), Key(): ones(2)}, r"params\[key\]: two parameters have this name"),
}


@pytest.mark.parametrize("take", [fusedopt.Adam, reference.SGD, fusedopt.GradAccumulator])
@pytest.mark.parametrize("kind", BAD_TREES)
def test_bad_trees(kind, take):
    tree, message = BAD_TREES[kind]
    if kind == "names" and take is fusedopt.GradAccumulator:
        take(tree)  # which identifies leaves by position
        return
    with pytest.raises(ValueError, match=message):
        take(tree)


def test_deepest_tree():
    p = ones(3)
    tree = p
    for _ in range(100):
        tree = {"x": tree}
    grads = tree
    opt = fusedopt.SGD(tree, lr=1.0)
    assert opt.step(grads and fusedopt._tree.rebuilder(tree)([ones(3)])).updated == 1
    assert not p.any()


def rebound(tree):
    tree["a"] = tree["a"] + 1


def rebound_inside(tree):
    tree["b"]["c"][0] = ones(2)


def replaced(tree):
    tree["b"] = {"c": [tree["b"]["c"][0]]}


def under_each_others_names(tree):
    """In the same order as they were."""
    a, b = tree.values()
    tree.clear()
    tree["b"], tree["a"] = a, b


REBINDINGS = {
    "names": (under_each_others_names, r"params\['a'\]: is another object"),
    "array": (rebound, r"params\['a'\]: is another object .* write into the array, params\['a'\]"),
    "in a list": (rebound_inside, r"params\['b'\]\['c'\]\[0\]: is another object"),
    "container": (replaced, r"params\['b'\]: is another object"),
    "added": (lambda tree: tree.update(new=ones(1)), r"params\['new'\]: was added"),
    "appended": (
        lambda tree: tree["b"]["c"].append(ones(1)),
        r"params\['b'\]\['c'\]\[1\]: was add",
    ),
    "removed": (lambda tree: tree.pop("a"), r"params\['a'\]: was removed"),
}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", REBINDINGS)
@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fusedopt", "reference"])
def test_parameters_that_were_exchanged(module, kind, grouped):
    """A step on arrays that are no longer in the caller's tree would be lost."""
    change, message = REBINDINGS[kind]
    tree = {"a": ones(2), "b": {"c": [ones(2)]}}
    arrays = [tree["a"], tree["b"]["c"][0]]
    opt = module.SGD([{"params": tree}] if grouped else tree, lr=1.0)
    grads = {"a": ones(2), "b": {"c": [ones(2)]}}
    change(tree)
    place = r"params\[0\]\['params'\]" if grouped else "params"
    with pytest.raises(ValueError, match=message.replace("params", place)):
        opt.step([grads] if grouped else grads)
    assert all((a == 1).all() for a in arrays)


def test_what_is_no_exchange():
    """In-place operators and another order of keys are accepted; tuples cannot change."""
    tree = {"a": ones(2), "b": (ones(2), [ones(2)])}
    opt = fusedopt.SGD(tree, lr=0.0)
    tree["a"] += 1
    tree["b"] = tree.pop("b")
    tree["a"] = tree.pop("a")
    assert opt.step({"a": ones(2), "b": (ones(2), [ones(2)])}).updated == 3


def grown(opt):
    opt.param_groups.append({"params": ones(2)})


BAD_GROUPS = {
    "append": (grown, ValueError, "param_groups: has 2 entries for 1 groups .* add_param_group"),
    "clear": (lambda opt: opt.param_groups.clear(), ValueError, "param_groups: has 0 entries"),
    "unknown": (
        lambda opt: opt.param_groups[0].update(learning_rate=1), TypeError,
        r"param_groups\[0\]: unknown option 'learning_rate' \(is lr meant\?\); known: lr, ",
    ),
    "missing": (
        lambda opt: opt.param_groups[0].pop("lr"), ValueError, r"param_groups\[0\]: has no 'lr'"),
    "no dict": (
        lambda opt: opt.param_groups.__setitem__(0, None), TypeError,
        r"param_groups\[0\]: expected a dict, got NoneType",
    ),
    "no list": (
        lambda opt: setattr(opt, "param_groups", None), TypeError,
        "param_groups: expected a list, got NoneType",
    ),
    "no params": (
        lambda opt: opt.param_groups[0].pop("params"), ValueError, r"\['params'\]: was replaced"),
    "array": (
        lambda opt: opt.param_groups[0].update(lr=np.ones(2)), TypeError, "lr: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_GROUPS)
@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fusedopt", "reference"])
def test_groups_changed_badly(module, kind):
    change, error, message = BAD_GROUPS[kind]
    p = ones(2)
    opt = module.SGD(p, lr=1.0)
    change(opt)
    saved = module.SGD(ones(2), lr=0.5).state_dict()
    for call in (lambda: opt.step(ones(2)), lambda: opt.step(ones(2), stats=True)):
        with pytest.raises(error, match=message):
            call()
    if kind in ("append", "clear", "no dict", "no list"):
        with pytest.raises(error, match=message):
            opt.load_state_dict(saved)
    assert (p == 1).all()
    assert opt.state_dict()["param_groups"][0]["lr"] == 1.0  # what an emergency save holds


@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fusedopt", "reference"])
def test_options_changed_in_place_are_seen(module):
    p, rate, betas = ones(2), np.array(1.0), [np.array(0.5), 0.5]
    opt = module.SGD(p, lr=0.0)
    opt.param_groups[0]["lr"] = rate
    opt.step(ones(2))
    rate[...] = 0.0
    opt.step(ones(2))
    assert (p == 0).all()
    q, r = ones(2), ones(2)
    opt, other = module.Adam(q, lr=0.5), module.Adam(r, lr=0.5)
    for new in (betas, (betas[0], 0.5)):  # a list, and a tuple with an array in it
        opt.param_groups[0]["betas"] = new
        for beta in (0.25, 0.125):
            betas[0][...] = beta
            other.param_groups[0]["betas"] = (beta, 0.5)
            assert opt.step(np.full(2, beta, f32)).step == other.step(np.full(2, beta, f32)).step
            assert q.tobytes() == r.tobytes()


def test_groups_that_are_kinds_of_dicts(tmp_path):
    """A load into them is complete, too."""
    arrays = [ones(2), ones(2)]
    groups = [OrderedDict(params=a, lr=0.1) for a in arrays]
    opt, other = fusedopt.SGD(groups), fusedopt.SGD([{"params": a.copy()} for a in arrays], lr=0.5)
    opt.param_groups[1] = OrderedDict(opt.param_groups[1])
    opt.step([ones(2), ones(2)])
    opt.load_state_dict(other.state_dict())
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.5]


def test_a_group_that_is_in_no_list():
    with pytest.raises(TypeError, match=r"params: a group, which must be in a list: \[\{'params'"):
        fusedopt.SGD({"params": ones(2), "lr": 0.1})
    fusedopt.SGD({"params": ones(2)})  # an array of that name


def test_the_base_class():
    with pytest.raises(TypeError, match="Optimizer is the base class; make an Adam"):
        fusedopt.Optimizer(ones(2))


@pytest.mark.parametrize("case", [case for case in CASES if case.states], ids=str)
def test_functional_state_that_is_none(case):
    """Each state in turn is a list of None; if gradients are None too, all states may be."""
    p, g, none = [ones(2), ones(2)], [ones(2), ones(2)], [None, None]
    for k, name in enumerate(case.plurals):
        states = [[ones(2), ones(2)] for _ in case.states]
        states[k] = none
        with pytest.raises(ValueError, match=rf"{name}\[0\]: is None; these options need it"):
            step_of(case, p, g, states)
        assert all((a == 1).all() for a in p)
    if "lr" in inspect.signature(case.fast).parameters:
        with pytest.raises(TypeError, match="lr: expected a number, the rate of this step"):
            step_of(case, p, g, states, lr=lambda step: 0.1)
    step_of(case, p, none, [none] * len(case.states))  # as for frozen tensors
    assert all((a == 1).all() for a in p)


def step_of(case, p, g, states, **options):
    case.fast(
        p, g, **dict(zip(case.plurals, states, strict=True)), step=1, **case.options | options
    )
