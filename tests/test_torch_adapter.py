"""fusedopt.torch: the behaviour of torch's optimizers, with our step."""

import copy
import pickle
from collections import OrderedDict

import numpy as np
import pytest
from torch_cases import backward, close, fo, leaf, model, since, torch, train

import fusedopt
from fusedopt._options import DEFAULTS as STEP_OPTIONS
from fusedopt.rule import COMMON

ROWS = [
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True}),
    ("Adam", {"maximize": True}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"amsgrad": True, "maximize": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
]
IDS = [f"{name}-{'-'.join(options) or 'default'}" for name, options in ROWS]


@pytest.mark.parametrize(("name", "options"), ROWS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_and_exchanges_checkpoints(name, options, dtype):
    """Ten steps of ours, ten of torch.optim and ten of ours, against thirty of torch.optim."""
    ours, theirs = model(dtype=dtype), model(dtype=dtype)
    cls, peer_cls = getattr(fo, name), getattr(torch.optim, name)
    peer = peer_cls(theirs.parameters(), **options, foreach=False)
    train(theirs, peer, range(30))

    first = cls(ours.parameters(), **options)
    train(ours, first, range(10))
    second = peer_cls(ours.parameters(), **options, foreach=False)
    second.load_state_dict(first.state_dict())
    train(ours, second, range(10, 20))
    third = cls(ours.parameters(), **options)
    third.load_state_dict(second.state_dict())
    train(ours, third, range(20, 30))

    close(ours, theirs, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-6)
    a, b = third.state_dict(), peer.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for key, state in b["state"].items():
        assert a["state"][key].keys() == state.keys()
        for entry, value in state.items():
            mine = a["state"][key][entry]
            assert (mine.dtype, mine.shape) == (value.dtype, value.shape), entry
            torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-6)
    assert [set(g) for g in a["param_groups"]] == [set(g) for g in b["param_groups"]]


@pytest.mark.parametrize("name", [name for name in fo.__all__ if hasattr(torch.optim, name)])
def test_is_torchs_class(name):
    import inspect

    cls, peer = getattr(fo, name), getattr(torch.optim, name)
    shape = (3,) if cls._rule.demand_shape is None else (3, 2)
    opt = cls([leaf(*shape)])
    assert isinstance(opt, peer)
    assert opt.defaults == peer([leaf(*shape)]).defaults
    own = [*cls._extras, *(option.name for option in COMMON)]
    own += [name for name in STEP_OPTIONS if name != "grad_scale"]
    own += ["process_group", "state_dict_dtype", "threads", "state_dir"]
    assert list(inspect.signature(cls).parameters) == [*inspect.signature(peer).parameters, *own]


def test_bits_are_those_of_the_reference():
    p = leaf(700)
    start, grad = p.detach().numpy().copy(), p.grad.numpy().copy()
    fo.AdamW([p], lr=0.1).step()
    plain = fusedopt.reference.AdamW([start], lr=0.1)
    plain.step([grad])
    assert start.tobytes() == p.detach().numpy().tobytes()


def test_without_the_exchange_api(monkeypatch):
    """As in a torch without it: tensors are exported one by one, with the same result."""
    results = []
    for have in (True, False):
        if not have:
            monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
        net = model()
        train(net, fo.Adam(net.parameters()), range(3))
        results.append(net)
    close(*results, rtol=0, atol=0)


SCHEDULERS = [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=10),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.01, 3, cycle_momentum=True),
    lambda o: torch.optim.lr_scheduler.LinearLR(o),
    lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [3],
    ),
]


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR's own, in torch 2.4
@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_schedulers(make, name, tensor):
    """They write lr, betas or momentum into the groups, in place where lr is a tensor."""
    nets = []
    for module in (fo, torch.optim):
        net = model()
        options = {"momentum": 0.9} if name == "SGD" else {}
        lr = torch.tensor(0.01) if tensor else 0.01
        opt = getattr(module, name)(net.parameters(), lr=lr, **options)
        scheduler = make(opt)
        for seed in range(8):
            train(net, opt, [seed])
            scheduler.step()
        nets.append(net)
    close(*nets)


def test_plateau_scheduler():
    net = model()
    opt = fo.Adam(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        train(net, opt, [0])
        scheduler.step(1.0)
    assert opt.param_groups[0]["lr"] < 1


def test_closure_runs_with_gradients():
    net, peer_net = model(), model()
    opt, peer = fo.Adam(net.parameters()), torch.optim.Adam(peer_net.parameters())
    losses = []
    for o, n in ((opt, net), (peer, peer_net)):
        with torch.no_grad():
            losses.append(o.step(lambda o=o, n=n: (o.zero_grad(), backward(n, 0))[1]))
    assert losses[0] == losses[1]
    close(net, peer_net)


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_groups_added_later(kind):
    net, peer_net = model(), model()
    for n, module in ((net, fo), (peer_net, torch.optim)):
        params = list(n.parameters())
        opt = module.AdamW([kind(params=params[:1], lr=0.1), kind(params=params[1:2])])
        train(n, opt, range(3))
        opt.add_param_group(kind(params=params[2:], weight_decay=0.5, betas=(0.5, 0.6)))
        train(n, opt, range(3, 6))
    close(net, peer_net)


@since("2.7")
def test_decoupled_weight_decay_of_adam():
    options = {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}
    net, peer_net = model(), model()
    train(net, fo.Adam(net.parameters(), **options), range(3))
    train(peer_net, torch.optim.Adam(peer_net.parameters(), **options), range(3))
    close(net, peer_net)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_equally(clone):
    net = model()
    opt = fo.AdamW(net.parameters(), amsgrad=True)
    train(net, opt, range(3))
    net2, opt2 = clone((net, opt))
    assert type(opt2) is fo.AdamW
    train(net, opt, range(3, 6))
    train(net2, opt2, range(3, 6))
    close(net, net2, rtol=0, atol=0)


def test_hooks():
    net, seen = model(), []
    opt = fo.SGD(net.parameters(), momentum=0.9)
    opt.register_step_pre_hook(lambda *a: seen.append("pre"))
    opt.register_step_post_hook(lambda *a: seen.append("post"))
    opt.register_state_dict_pre_hook(lambda o: seen.append("state"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(d["mine"]))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    train(net, opt, [0])
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", "post", "state", 1, "loaded"]


def test_optimizer_in_backward():
    net, peer_net = model(), model()
    owned = {p: fo.Adam([p]) for p in net.parameters()}

    def step_now(p):
        owned[p].step()
        owned[p].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    for seed in range(4):
        backward(net, seed)
    train(peer_net, torch.optim.Adam(peer_net.parameters()), range(4))
    assert all(p.grad is None for p in net.parameters())
    close(net, peer_net)


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_unscaling_is_done_where_torch_does_it(name, fused):
    """GradScaler leaves it to an optimizer with this attribute; Lightning does not clip such."""
    found = []
    for module in (fo, torch.optim):
        opt = getattr(module, name)([leaf(3)], lr=0.1, fused=fused)
        loaded = getattr(module, name)([leaf(3)], lr=0.1)
        loaded.load_state_dict(opt.state_dict())
        copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), loaded]
        opt.add_param_group({"params": [leaf(2)]})
        ways = [getattr(o, "_step_supports_amp_scaling", False) for o in (opt, *copies)]
        found.append((ways, hasattr(getattr(module, name), "_step_supports_amp_scaling")))
    assert found[0] == found[1]
    assert found[0][0][0] == bool(fused)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale, fused):
    """With fused=True the step divides by the scale; an infinite gradient changes nothing."""
    net, peer_net = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    opt = fo.AdamW(net.parameters(), fused=fused)
    for seed in range(5):
        opt.zero_grad()
        with torch.no_grad():
            before = [p.clone() for p in net.parameters()]
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
        scaler.scale(net(x).square().mean()).backward()
        if seed == 4:
            next(net.parameters()).grad[0, 0] = np.inf
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if seed == 4:
            assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert opt.state[next(net.parameters())]["step"] == 4
    peer = torch.optim.AdamW(peer_net.parameters())
    for seed in range(4):
        peer.zero_grad()
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
        peer_net(x).square().mean().backward()
        peer.step()
    close(net, peer_net)


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_compile():
    """Of the model, and of the step: the graph breaks there, and the result is right."""
    nets = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = model()
        opt = fo.Adam(net.parameters(), lr=0.1)
        run = torch.compile(net, backend="eager") if compiled else net

        def step(run=run, opt=opt):
            opt.zero_grad()
            run(torch.ones(5, 7)).square().mean().backward()
            opt.step()

        whole = torch.compile(step, backend="eager") if compiled else step
        for _ in range(4):
            whole()
        nets.append(net)
    close(*nets, rtol=0, atol=0)
    assert int(opt.state[next(net.parameters())]["step"]) == 4


def test_flags_without_effect_and_refused():
    results = []
    for flags in ({}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        net = model()
        train(net, fo.Adam(net.parameters(), **flags), range(2))
        results.append(net)
    for net in results[1:]:
        close(results[0], net, rtol=0, atol=0)
    for flag in ("capturable", "differentiable"):
        with pytest.raises(ValueError, match=flag):
            fo.Adam([leaf(3)], **{flag: True})
    opt = fo.Adam([leaf(3)])
    with pytest.raises(ValueError, match=r"param_groups\[1\]: capturable"):
        opt.add_param_group({"params": [leaf(2)], "capturable": True})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["differentiable"] = True
    with pytest.raises(ValueError, match="differentiable"):
        opt.step()


def test_parameters_in_a_tuple_and_unknown_options():
    p, q = leaf(5), leaf(5)
    for x, module in ((p, fo), (q, torch.optim)):
        opt = module.SGD([x], lr=0.1)
        opt.param_groups[0].update(params=(x,), mine="a note")
        opt.add_param_group({"params": [leaf(2)], "theirs": 1})
        opt.step()
    assert torch.equal(p, q)


def test_parameters_without_gradient_are_skipped():
    p, q = leaf(5), leaf(5, seed=1)
    q.grad = None
    before = q.detach().clone()
    opt = fo.Adam([p, q])
    opt.step()
    assert torch.equal(q, before) and q not in opt.state and len(opt.state) == 1
    opt.zero_grad()
    opt.step()  # none at all
    assert int(opt.state[p]["step"]) == 1


def test_amsgrad_asked_for_later():
    p = leaf(5)
    opt = fo.Adam([p])
    opt.step()
    opt.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="max_exp_avg_sq"):
        opt.step()
    assert int(opt.state[p]["step"]) == 1


# ------------------------------------------------------------------ autograd


def test_version_counters_of_what_was_written():
    p, q = leaf(5), leaf(5, seed=1)
    q.grad = None
    versions = p._version, q._version, p.grad._version
    fo.AdamW([p, q]).step()
    assert p._version > versions[0]
    assert (q._version, p.grad._version) == versions[1:]


def test_backward_after_step_is_an_error():
    p = leaf(5)
    loss = p.exp().mul(p).sum()  # saves p
    fo.SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
def test_gradient_with_a_graph():
    p = torch.nn.Parameter(torch.randn(5))
    (p**3).sum().backward(create_graph=True)
    q = torch.nn.Parameter(p.detach().clone())
    q.grad = p.grad.detach().clone()
    fo.SGD([p], lr=0.1).step()
    fo.SGD([q], lr=0.1).step()
    assert torch.equal(p, q)
    p.grad = None  # p and its gradient hold one another
