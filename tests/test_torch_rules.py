"""What a rule may declare, in fusedopt.torch: initial values of state, and remembered numbers.

With the made-up rules of test_rules.py, against their references in NumPy.
"""

import copy
import pickle

import numpy as np
import pytest
from test_rules import (
    AVERAGES,
    NO_16_BITS,
    TOO_NARROW,
    Averages,
    Begins,
    PlainAverages,
    PlainBegins,
    Refuses,
)
from test_torch_table import STORAGE, as_numpy, check_state, raw
from torch_cases import ANY_SHAPE, evaluating, fo, torch, training

TorchBegins, TorchAverages = fo._torch_class(Begins), fo._torch_class(Averages)
for made in (TorchBegins, TorchAverages):
    made.__module__ = __name__  # where pickle finds them
    globals()[made.__name__ + "OfTorch"] = made
    made.__qualname__ = made.__name__ + "OfTorch"


def parameters(dtype):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in [(700,), (3, 50), (), (0,), (40, 9)]]


def step(opt, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    opt.step()
    return [as_numpy(p.grad) for p in params]


@pytest.mark.parametrize(("dtype", "storage"), STORAGE, ids=str)
def test_state_begins_as_declared(dtype, storage):
    """Adam's rule, whose moments begin as the parameter and as an option."""
    params = [torch.nn.Parameter(p) for p in parameters(dtype)]
    arrays = [as_numpy(p) for p in parameters(dtype)]
    opt = TorchBegins(params, lr=0.1, begin=0.3, amsgrad=True, **storage)
    peer = PlainBegins(arrays, lr=0.1, begin=0.3, amsgrad=True, **storage)
    for seed in range(3):
        peer.step(step(opt, params, seed))
        for p, a in zip(params, arrays, strict=True):
            assert raw(as_numpy(p.detach())) == raw(a)
    for p, own in zip(params, peer.state.values(), strict=True):
        check_state(opt.state[p], own)


def test_state_that_torch_makes_in_its_constructor():
    """Adagrad's sum is there before the first step, as in torch, and in our formats."""
    p = torch.nn.Parameter(torch.ones(5000))
    opt = fo.Adagrad([p], initial_accumulator_value=0.5, state_dtype="int8")
    assert opt.state[p].keys() == {"step", "sum_codes", "sum_blocks"}
    wide = fo.Adagrad([p], initial_accumulator_value=0.5)
    assert torch.equal(wide.state[p]["sum"], torch.full((5000,), 0.5))
    peer = torch.optim.Adagrad([p], initial_accumulator_value=0.5)
    peer.load_state_dict(wide.state_dict())
    p.grad = torch.ones(5000)
    wide.step()
    opt.step()
    wide.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})  # made in its first step
    wide.param_groups[1]["params"][0].grad = torch.ones(3)
    wide.step()


def test_refused_formats():
    """As in NumPy: when it is made, when a group is added, and when options change."""
    cls = fo._torch_class(Refuses)
    p, q = (torch.nn.Parameter(torch.ones(9)) for _ in range(2))
    with pytest.raises(ValueError, match=rf"^param_groups\[0\].{TOO_NARROW}or None$"):
        cls([p], state_dtype="int8")
    opt = cls([p], state_dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"^param_groups\[1\].{TOO_NARROW}"):
        opt.add_param_group({"params": [q], "state_dtype": "int8"})
    p.grad = torch.ones(9)
    opt.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match=rf"^param_groups\[0\].{NO_16_BITS}$"):
        opt.step()
    assert torch.equal(p, torch.ones(9)) and not opt.state
    opt.param_groups[0]["amsgrad"] = False
    opt.step()
    wide = cls([q])
    wide.load_state_dict(opt.state_dict())
    assert wide.state[q]["exp_avg_sq"].dtype == torch.float32


def memory(opt, i):
    return {row.name: opt.param_groups[i][row.name] for row in AVERAGES.memory}


def make(kind, params):
    return kind([{"params": params[:2]}, {"params": params[2:], "lr": 0.25, "lowest": 0.5}])


def test_remembered_numbers():
    """By group, with the reference's bits; not in skipped steps; in copies and state dicts."""
    params = [torch.nn.Parameter(p) for p in parameters(torch.float32)]
    arrays = [as_numpy(p) for p in parameters(torch.float32)]
    opt, peer = make(TorchAverages, params), make(PlainAverages, arrays)
    for seed in range(5):
        grads = step(opt, params, seed)
        peer.step([grads[:2], grads[2:]])
        assert [memory(opt, i) for i in range(2)] == [
            {row.name: peer.param_groups[i][row.name] for row in AVERAGES.memory} for i in range(2)
        ]
        for p, a in zip(params, arrays, strict=True):
            assert raw(as_numpy(p.detach())) == raw(a)
    before = memory(opt, 0)
    params[0].grad = torch.full((700,), np.nan)
    opt.step(nonfinite="skip")
    with pytest.raises(FloatingPointError):
        opt.step(nonfinite="raise")
    assert memory(opt, 0) == before
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert memory(twin, 0) == before
    other = make(TorchAverages, [torch.nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(opt.state_dict())
    assert [memory(other, i) for i in range(2)] == [memory(opt, i) for i in range(2)]
    opt.param_groups[0]["weight_sum"] = np.inf
    with pytest.raises(ValueError, match=r"param_groups\[0\].weight_sum: must be finite"):
        opt.step()
    del opt.param_groups[0]["weight_sum"]
    with pytest.raises(ValueError, match=r"param_groups\[0\]: has no weight_sum"):
        opt.step()


NUMBERS = [name for name in fo.__all__ if getattr(fo, name)._rule.numbers]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_torch_keeps_for_a_parameter(name):
    """In state dicts as torch has them, also where a parameter had no gradient; into and from it.

    A pickle and a copy have them too: torch reads them there.
    """
    ours, theirs = ([torch.nn.Parameter(torch.ones(50)) for _ in range(2)] for _ in range(2))
    opt, peer = getattr(fo, name)(ours), getattr(torch.optim, name)(theirs, foreach=False)
    assert opt.state_dict()["state"] == {}

    def take(steps):
        for seed in steps:
            for params in (ours, theirs):
                grads = step_grads(seed)
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
            opt.step()
            peer.step()

    def step_grads(seed):
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(50, generator=generator) for _ in range(2)]
        return [made[0], None if seed % 3 == 1 else made[1]]

    def check():
        mine, its = opt.state_dict()["state"], peer.state_dict()["state"]
        for number, own in its.items():
            assert own.keys() == mine[number].keys()
            for key, value in own.items():
                assert mine[number][key].dtype == value.dtype, key
                torch.testing.assert_close(mine[number][key], value, rtol=2e-6, atol=1e-7)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=3e-6, atol=0)

    take(range(4))
    check()
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert repr(twin.state_dict()["state"]) == repr(opt.state_dict()["state"])
    mine, its = copy.deepcopy(opt.state_dict()), copy.deepcopy(peer.state_dict())
    opt, peer = getattr(fo, name)(ours), getattr(torch.optim, name)(theirs, foreach=False)
    opt.load_state_dict(its)
    peer.load_state_dict(mine)
    check()
    take(range(4, 9))
    check()


EXTRAS = [(name, extra) for name in fo.__all__ for extra in getattr(fo, name)._extras]


@pytest.mark.parametrize(("name", "extra"), EXTRAS)
def test_options_that_torch_does_not_have(name, extra):
    """In groups where they are not the default; checkpoints of torch's leave them as they are."""
    cls, peer = getattr(fo, name), getattr(torch.optim, name)
    other = not cls._rule.defaults[extra]
    params = [torch.nn.Parameter(torch.ones(300)) for _ in range(4)]
    plain, asked, loaded, theirs = (
        cls([params[0]]), cls([params[1]], **{extra: other}), cls([params[2]]), peer([params[3]])
    )  # fmt: skip
    assert extra not in plain.param_groups[0] and asked.param_groups[0][extra] is other

    def step(*optimizers):
        for opt in optimizers:
            opt.param_groups[0]["params"][0].grad = torch.linspace(0, 1e-7, 300)
            opt.step()

    step(plain, asked, theirs)
    # lazy is of sparse gradients, and rowwise of rows, which are one element long here
    assert torch.equal(params[0], params[1]) == (extra in ("lazy", "rowwise"))
    theirs.load_state_dict(copy.deepcopy(asked.state_dict()))
    step(theirs)
    loaded.load_state_dict(copy.deepcopy(asked.state_dict()))
    assert loaded.param_groups[0][extra] is other
    with torch.no_grad():
        params[2].copy_(params[1])
    step(loaded, asked)
    assert torch.equal(params[2], params[1])
    assert pickle.loads(pickle.dumps(asked)).param_groups[0][extra] is other
    asked.load_state_dict(peer([params[3]]).state_dict())
    assert asked.param_groups[0][extra] is other
    asked.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], extra: not other})
    assert [group[extra] for group in asked.param_groups] == [other, not other]
    asked.param_groups[1][extra] = "yes"
    with pytest.raises(TypeError, match=rf"^param_groups\[1\].{extra}: expected True or False"):
        asked.step()
    with pytest.raises(TypeError, match=f"^{extra}: expected True or False"):
        cls([params[0]], **{extra: 1})


@pytest.mark.parametrize("peer", [torch.optim.Adam, torch.optim.AdamW])
def test_state_of_another_optimizer_of_torch(peer):
    """Adam's moments are LAMB's; an option that is none of LAMB's says nothing of its rule."""
    params = [torch.nn.Parameter(torch.ones(300)) for _ in range(2)]
    theirs, ours = peer([params[0]], lr=0.1), fo.LAMB([params[0]])
    params[0].grad = torch.ones(300)
    theirs.step()
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    plain = fo.LAMB([params[1]])
    state = copy.deepcopy(theirs.state_dict())
    for group in state["param_groups"]:
        group.pop("decoupled_weight_decay", None)
    plain.load_state_dict(state)
    with torch.no_grad():
        params[1].copy_(params[0])
    params[1].grad = torch.ones(300)
    ours.step()
    plain.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("name", [name for name in ANY_SHAPE if not hasattr(torch.optim, name)])
def test_options_of_our_own_optimizers(name):
    """Without a class of torch, options are checked as in fusedopt, given or edited."""
    p = torch.nn.Parameter(torch.ones(3))
    cls = getattr(fo, name)
    assert issubclass(cls, torch.optim.Optimizer)
    with pytest.raises(ValueError, match="^lr: must be >= 0"):
        cls([p], -1.0)
    with pytest.raises(TypeError, match="momentum_decay|unexpected"):
        cls([p], momentum_decay=1.0)
    with pytest.raises(TypeError, match="^lr: expected a number"):
        cls([p], lr="0.1")
    opt = training(cls([p], lr=torch.tensor(0.125)))
    with pytest.raises(ValueError, match=r"^param_groups\[1\].weight_decay: must be >= 0"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": -1.0})
    assert len(opt.param_groups) == 1
    p.grad = torch.ones(3)
    opt.param_groups[0]["lr"] = np.nan
    with pytest.raises(ValueError, match=r"^param_groups\[0\].lr: must be finite"):
        opt.step()
    assert torch.equal(p, torch.ones(3)) and not opt.state
    scheduled = training(cls([p], lr=0.1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5)
    scheduled.step()
    scheduler.step()
    assert scheduled.param_groups[0]["lr"] == 0.05
    twin = pickle.loads(pickle.dumps(evaluating(scheduled)))
    assert type(twin) is cls and twin.state_dict().keys() == scheduled.state_dict().keys()
