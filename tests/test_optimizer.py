"""Groups, state, schedules, and results that are known in closed form."""

import numpy as np
import pytest
from cases import CASES, assert_same, values

import fusedopt


def ones(*shape):
    return np.ones(shape, np.float32)


def test_first_adam_step_is_the_learning_rate():
    """With eps = 0 the first step is lr * sign(g), whatever the gradient's size."""
    p = np.zeros(5)
    fusedopt.Adam([p], lr=0.25, eps=0.0).step([np.array([1e-30, -1e-3, 1.0, 1e3, -1e100])])
    np.testing.assert_allclose(p, [-0.25, 0.25, -0.25, -0.25, 0.25], rtol=1e-12)


def test_constant_gradient():
    """Adam's moments under a constant gradient are g (1 - b1^t) and g^2 (1 - b2^t)."""
    p, g = np.zeros(3), np.array([1.0, -2.0, 0.5])
    opt = fusedopt.Adam([p], lr=0.1, betas=(0.8, 0.9), eps=0.0)
    for _ in range(50):
        opt.step([g])
    state = opt.state["params[0]"]
    np.testing.assert_allclose(state["exp_avg"], g * (1 - 0.8**50), rtol=1e-12)
    np.testing.assert_allclose(state["exp_avg_sq"], g**2 * (1 - 0.9**50), rtol=1e-12)
    np.testing.assert_allclose(p, -0.1 * 50 * np.sign(g), rtol=1e-12)


def test_decay_without_gradient():
    """AdamW shrinks by 1 - lr * weight_decay a step; SGD's L2 by 1 - lr * weight_decay too."""
    a, b = np.array([8.0, -2.0]), np.array([8.0, -2.0])
    fusedopt.AdamW([a], lr=0.5, weight_decay=0.5).step([np.zeros(2)])
    fusedopt.SGD([b], lr=0.5, weight_decay=0.5).step([np.zeros(2)])
    assert a.tolist() == b.tolist() == [6.0, -1.5]


def test_l1_pulls_towards_zero():
    p = np.array([3.0, -3.0, 0.0])
    fusedopt.SGD([p], lr=1.0, l1=0.5).step([np.zeros(3)])
    assert p.tolist() == [2.5, -2.5, 0.0]


def test_momentum_sums_gradients():
    p = np.zeros(1)
    opt = fusedopt.SGD([p], lr=1.0, momentum=0.5, dampening=0.5)
    for expected in [-2.0, -4.0, -6.0]:  # buffer: 2, then 0.5 * 2 + 0.5 * 2 = 2 for ever
        opt.step([np.array([2.0])])
        assert p[0] == expected


def test_minimizes_a_quadratic():
    for opt_of in [
        lambda p: fusedopt.Adam(p, lr=0.1),
        lambda p: fusedopt.AdamW(p, lr=0.1, weight_decay=0.0, amsgrad=True),
        lambda p: fusedopt.SGD(p, lr=0.1, momentum=0.5, nesterov=True),
    ]:
        p, goal = np.zeros(4), np.array([1.0, -2.0, 3.0, 0.5])
        opt = opt_of(p)
        for _ in range(500):
            opt.step(p - goal)
        np.testing.assert_allclose(p, goal, atol=1e-3)


def test_one_array_is_a_tree_too():
    p = ones(3)
    opt = fusedopt.SGD(p, lr=1.0)
    assert opt.step(ones(3)) == fusedopt.StepResult(step=1, updated=1)
    assert list(opt.state) == ["params"]
    assert not p.any()


def test_groups_have_their_own_options():
    a, b, c = ones(2), ones(2), ones(2)
    groups = [{"params": {"W": a}, "lr": 1.0}, {"params": [b], "momentum": 0.9}]
    opt = fusedopt.SGD(groups, lr=0.25)
    opt.add_param_group({"params": c, "lr": 0.5})
    opt.step([{"W": ones(2)}, [ones(2)], ones(2)])
    assert [a[0], b[0], c[0]] == [0.0, 0.75, 0.5]
    assert list(opt.state) == ["params[0]['params']['W']", "params[1]['params'][0]",
                               "params[2]['params']"]  # fmt: skip
    opt.param_groups[2]["lr"] = 0.0
    opt.step([{"W": None}, None, ones(2)])
    assert c[0] == 0.5
    assert [s["step"] for s in opt.state.values()] == [1, 1, 2]
    assert [len(s) for s in opt.state.values()] == [1, 2, 1]


def test_splitting_into_groups_changes_no_bit():
    """The same leaves in one group or in three give the same bits."""
    arrays = [values(n, np.float32, n, hostile=False) for n in (10, 700, 5000)]
    grads = [values(n, np.float32, n + 1, hostile=False) for n in (10, 700, 5000)]
    one, three = [a.copy() for a in arrays], [a.copy() for a in arrays]
    whole = fusedopt.Adam(one, amsgrad=True)
    split = fusedopt.Adam([{"params": a} for a in three], amsgrad=True)
    for _ in range(3):
        whole.step(grads)
        split.step(grads)
    assert_same(one, three, ["10", "700", "5000"])


def test_schedule_gets_the_step_from_1():
    p, seen = np.zeros(1), []

    def rate(step):
        seen.append(step)
        return np.float32(step)  # any number is accepted, also a JAX or NumPy scalar

    opt = fusedopt.SGD([p], lr=rate)
    for expected in [-1.0, -3.0, -6.0]:
        opt.step([np.ones(1)])
        assert p[0] == expected
    opt.step([None])
    assert seen == [1, 2, 3, 4]
    opt.param_groups[0]["lr"] = 1.0
    opt.step([np.ones(1)])
    assert p[0] == -7.0


def test_leaf_steps_set_the_bias_correction():
    """A leaf that was skipped continues with its own step count, as in torch."""
    a, b = np.zeros(3), np.zeros(3)
    both = fusedopt.Adam([a, b], lr=0.1)
    g = np.array([1.0, 2.0, 3.0])
    both.step([None, g])
    both.step([g, None])
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_dict_round_trip(case):
    """A fresh optimizer with the state of another continues with the same bits."""
    first = [values(n, np.float32, n, hostile=False) for n in (3, 800)]
    grads = [values(n, np.float32, n + 9, hostile=False) for n in (3, 800)]
    opt = case.make(first)
    for step in range(3):
        opt.step([grads[0], grads[1] if step else None])
    second = [a.copy() for a in first]
    other = case.make(second)
    other.load_state_dict(opt.state_dict())
    for name, state in opt.state.items():
        for key, value in state.items():
            mine = other.state[name][key]
            assert np.array_equal(mine, value)
            assert key == "step" or mine is not value
    for o in (opt, other):
        o.step(grads)
    assert_same(first, second, ["3", "800"])
    assert other.state_dict()["step"] == 4


def stepped(cls=fusedopt.Adam, **options):
    opt = cls({"a": ones(2), "b": ones(3)}, **options)
    opt.step({"a": ones(2), "b": ones(3)})
    return opt


def damage(path, value):
    def do(d):
        *way, last = path
        for key in way:
            d = d[key]
        if value is None:
            del d[last]
        else:
            d[last] = value

    return do


A = "params['a']"
DAMAGE = [
    (damage(["step"], None), "expected 'step', 'state' and 'param_groups'"),
    (damage(["step"], -1), "state dict: step: must be >= 0"),
    (damage(["state", A], None), r"not those of this .* missing \[\"params\['a'\]\"\]"),
    (damage(["state", "x"], {}), r"unexpected \['x'\]"),
    (damage(["state", A, "exp_avg"], None), r"params\['a'\] should have step, exp_avg, exp_avg_sq"),
    (damage(["state", A, "step"], 1.5), r"params\['a'\].step: expected a whole number"),
    (damage(["state", A, "exp_avg"], np.ones(3, "f4")), r"exp_avg: float32\[3\] does not fit"),
    (damage(["state", A, "exp_avg"], np.ones(2)), r"exp_avg: float64\[2\] does not fit float32"),
    (damage(["state", A, "exp_avg"], [1, 1]), "exp_avg: expected an array, got list"),
    (damage(["state", A], 3), "should have step, exp_avg"),
    (damage(["param_groups"], [{}, {}]), "2 param_groups for this optimizer's 1"),
    (damage(["param_groups", 0, "lr"], None), r"param_groups\[0\]: expected lr, betas"),
    (damage(["param_groups", 0, "lr"], -1.0), r"param_groups\[0\].lr: must be >= 0"),
    (damage(["param_groups", 0, "amsgrad"], True), "need state that this optimizer does not have"),
]


@pytest.mark.parametrize(("do", "message"), DAMAGE, ids=[m for _, m in DAMAGE])
def test_state_that_does_not_fit_changes_nothing(do, message):
    source, target = stepped(lr=0.5), stepped(lr=0.25)
    target.step({"a": ones(2), "b": ones(3)})
    broken = source.state_dict()
    broken["state"] = {name: dict(state) for name, state in broken["state"].items()}
    do(broken)
    before = repr(target.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        target.load_state_dict(broken)
    assert repr(target.state_dict()) == before


def test_state_lies_on_cache_lines_in_the_parameters_order():
    params = [ones(3), np.asfortranarray(ones(5, 7)), ones(2, 3, 4).transpose(2, 0, 1), ones()]
    for p, state in zip(params, fusedopt.Adam(params).state.values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            a = state[name]
            assert (a.shape, a.strides, a.dtype) == (p.shape, p.strides, p.dtype)
            assert a.ctypes.data % 64 == 0
            assert not a.any()


def test_large_state_starts_at_zero():
    opt = fusedopt.Adam([ones(3_000_001)])
    assert not opt.state["params[0]"]["exp_avg"].any()
    assert not opt.state["params[0]"]["exp_avg_sq"].any()


def test_state_outlives_the_optimizer():
    state = fusedopt.Adam([ones(1000)]).state["params[0]"]
    state["exp_avg"][...] = 3
    assert state["exp_avg"].sum() == 3000
