"""fusedopt.torch: torch's behaviour around a step of ours, and every trap on the way to memory."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest

import fusedopt

torch = pytest.importorskip("torch", reason="tests the PyTorch adapter: extra `torch`")

import fusedopt.torch as fo  # noqa: E402 (needs torch)
from fusedopt import _torch_plain  # noqa: E402

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


def model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)]
    return torch.nn.Sequential(*layers).to(dtype)


def backward(net, seed):
    generator = torch.Generator().manual_seed(seed)
    first = next(net.parameters())
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64).to(first.dtype)
    loss = net(x).square().mean()
    loss.backward()
    return loss


def train(net, opt, seeds):
    for seed in seeds:
        opt.zero_grad()
        backward(net, seed)
        opt.step()


def close(a, b, rtol=1e-5, atol=1e-6):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def leaf(*shape, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(shape, dtype=dtype))
    p.grad = torch.randn(shape, dtype=dtype)
    return p


def twins(make):
    """The same parameter twice, with an optimizer of ours and torch's: (p, opt, q, peer)."""
    p, q = make(), make()
    return p, fo.AdamW([p], lr=0.1), q, torch.optim.AdamW([q], lr=0.1, foreach=False)


# ------------------------------------------------------------------ torch's behaviour


@pytest.mark.parametrize(("name", "options"), ROWS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_and_exchanges_checkpoints(name, options, dtype):
    """Ten steps here, ten in torch.optim and back, against thirty in torch.optim."""
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


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_is_torchs_class(name):
    import inspect

    cls, peer = getattr(fo, name), getattr(torch.optim, name)
    opt = cls([leaf(3)])
    assert isinstance(opt, peer)
    assert opt.defaults == peer([leaf(3)]).defaults
    own = ["state_dtype", "master_bits", "min_8bit_size", "seed", "ema", "ema_warmup"]
    own += ["max_grad_norm", "stats", "threads"]
    assert list(inspect.signature(cls).parameters) == [*inspect.signature(peer).parameters, *own]


def test_bits_are_those_of_the_reference():
    p = leaf(700)
    start, grad = p.detach().numpy().copy(), p.grad.numpy().copy()
    fo.AdamW([p], lr=0.1).step()
    plain = fusedopt.reference.AdamW([start], lr=0.1)
    plain.step([grad])
    assert start.tobytes() == p.detach().numpy().tobytes()


def test_without_the_exchange_api(monkeypatch):
    """As in a torch that has none: tensors are exported one by one, with the same result."""
    results = []
    for have in (True, False):
        if not have:
            monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
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


def test_groups_added_later():
    net, peer_net = model(), model()
    for n, module in ((net, fo), (peer_net, torch.optim)):
        params = list(n.parameters())
        opt = module.AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:2]}])
        train(n, opt, range(3))
        opt.add_param_group({"params": params[2:], "weight_decay": 0.5, "betas": (0.5, 0.6)})
        train(n, opt, range(3, 6))
    close(net, peer_net)


def test_decoupled_weight_decay_of_adam():
    options = {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}
    net, peer_net = model(), model()
    train(net, fo.Adam(net.parameters(), **options), range(3))
    train(peer_net, torch.optim.Adam(peer_net.parameters(), **options), range(3))
    close(net, peer_net)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_alike(clone):
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


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale):
    """The scale is taken off on the fly; a step with an infinite gradient changes nothing."""
    net, peer_net = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    opt = fo.AdamW(net.parameters())
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


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compile():
    """Around the model, and around the step: the graph breaks there, and the result is right."""
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


def test_parameters_without_gradient_are_left():
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


# ------------------------------------------------------------------ memory


def neg_view(x):
    return torch._neg_view(-x)


def neg_strided(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@pytest.mark.parametrize("make", [neg_view, neg_strided])
@pytest.mark.parametrize("shape", [(6,), (1,), ()])
@pytest.mark.parametrize("role", ["grad", "param"])
def test_negative_bit(make, shape, role):
    def build():
        p = leaf(*shape)
        if role == "grad":
            p.grad = make(p.grad)
            assert p.grad.is_neg()
            return p
        view = make(p.detach())
        assert view.is_neg()
        view.requires_grad_()
        view.grad = p.grad
        return view

    p, opt, q, peer = twins(build)
    opt.step()
    peer.step()
    torch.testing.assert_close(p.detach().resolve_neg(), q.detach().resolve_neg())


def strided(x):
    """A parameter with gaps."""
    return torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps": strided,
}


@pytest.mark.parametrize("p_layout", LAYOUTS)
@pytest.mark.parametrize("g_layout", LAYOUTS)
@pytest.mark.parametrize("state_layout", LAYOUTS)
def test_layouts(p_layout, g_layout, state_layout):
    """Any mix of memory orders; where they differ, copies stand in, and state stays in place."""
    torch.manual_seed(0)
    start, grad = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)

    def build():
        p = LAYOUTS[p_layout](start).requires_grad_()
        p.grad = LAYOUTS[g_layout](grad)
        return p

    p, opt, q, peer = twins(build)
    for _ in range(2):
        opt.step()
        peer.step()
        for key in ("exp_avg", "exp_avg_sq"):
            opt.state[p][key] = LAYOUTS[state_layout](opt.state[p][key])
        held = opt.state[p]["exp_avg"]
    opt.step()
    peer.step()
    assert opt.state[p]["exp_avg"] is held
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(held, peer.state[q]["exp_avg"])


def test_pointers_are_not_kept():
    p, opt, q, peer = twins(lambda: leaf(50))
    opt.step()
    peer.step()
    for o, x in ((opt, p), (peer, q)):
        x.data = x.data.clone()
        x.grad = x.grad.clone()
        o.state[x]["exp_avg"] = o.state[x]["exp_avg"].clone()
        o.step()
    torch.testing.assert_close(p, q)


def test_data_exchanged_for_a_negative():
    """A parameter is asked for its sign again when its data is another's."""
    p, q = leaf(6), leaf(6)
    opt, peer = fo.Adam([p]), torch.optim.Adam([q])
    for _ in range(2):
        opt.step()
        peer.step()
        p.data = neg_view(p.detach())
        q.data = neg_view(q.detach())
        assert p.is_neg()
    torch.testing.assert_close(p.detach().resolve_neg(), q.detach().resolve_neg())


@pytest.mark.parametrize("size", [6, 100_000])  # of which the small are shared from step to step
def test_state_lives_no_longer_than_in_the_optimizer(size):
    opt = fo.Adam([leaf(size)])
    opt.step()
    opt.step()
    own = next(iter(opt.state.values()))
    old = [weakref.ref(tensor) for tensor in own.values()]
    del own
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()
    assert [ref() for ref in old] == [None] * 3
    old = [weakref.ref(tensor) for tensor in next(iter(opt.state.values())).values()]
    del opt
    assert [ref() for ref in old] == [None] * 3


def test_a_cycle_through_a_hook_is_collected():
    p = leaf(6)
    opt = fo.SGD([p], momentum=0.9)
    p.register_hook(lambda _, opt=opt: None)
    for _ in range(2):
        p.exp().sum().backward()
        opt.step()
    gone = weakref.ref(p)
    del p, opt
    gc.collect()
    assert gone() is None


def test_subclass_with_memory_is_stepped():
    class Named(torch.Tensor):
        pass

    p, q = leaf(5), leaf(5)
    named = p.detach().as_subclass(Named).requires_grad_()
    named.grad = p.grad
    version = named._version
    fo.SGD([named], lr=0.1).step()
    assert named._version > version
    fo.SGD([q], lr=0.1).step()
    assert torch.equal(named.detach().as_subclass(torch.Tensor), q)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (1, 1), (3, 1, 2)])
def test_odd_shapes(shape):
    p, opt, q, peer = twins(lambda: leaf(*shape))
    for _ in range(2):
        opt.step()
        peer.step()
    torch.testing.assert_close(p, q)


def test_steps_counted_in_other_tensors():
    """float64 (default dtype), an integer, one element in an array."""
    for count in (torch.tensor(3.0, dtype=torch.float64), torch.tensor(3), torch.tensor([3.0])):
        p, opt, q, peer = twins(lambda: leaf(5))
        for o, x in ((opt, p), (peer, q)):
            o.step()
            o.state[x]["step"] = count.clone()
            o.step()
        assert opt.state[p]["step"].item() == 4
        torch.testing.assert_close(p, q)


# ------------------------------------------------------------------ refused


def refused(p, match, error=TypeError):
    good = leaf(4, seed=9)
    before = good.detach().clone()
    opt = fo.AdamW([good, p])
    with pytest.raises(error, match=match):
        opt.step()
    assert torch.equal(good, before) and len(opt.state) == 0


def test_sparse_gradient():
    layer = torch.nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    refused(layer.weight, r"\['params'\]\[1\]\.grad: is a sparse_coo tensor.*sparse=False")


def test_named_in_errors():
    layer = torch.nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    opt = fo.SGD(layer.named_parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"\['params'\]\[0\] \(weight\)\.grad"):
        opt.step()


def test_meta():
    p = torch.nn.Parameter(torch.zeros(3, device="meta"))
    p.grad = torch.zeros(3, device="meta")
    refused(p, "is on device meta")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes(dtype):
    p = torch.zeros(3).to(dtype).requires_grad_()
    p.grad = torch.zeros(3).to(dtype)
    refused(p, "of dtype torch.*supported: float32")


@pytest.mark.filterwarnings("ignore")  # torch: quantization is deprecated
def test_quantized():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = fo.Adam([p])
    p.grad = torch.zeros(3)
    opt.step()
    opt.state[p]["exp_avg"] = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match="exp_avg: is of dtype torch.quint8"):
        opt.step()
    assert int(opt.state[p]["step"]) == 1


def test_fake_tensor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.zeros(3)
    refused(p, "is a .* without memory of its own")


def test_inside_a_transform():
    seen = []

    def inner(x):
        p = x.detach()
        seen.append(p)
        with pytest.raises(TypeError, match="without memory of its own"):
            _torch_plain.local("p", p)
        return x.sum()

    torch.func.grad(inner)(torch.zeros(3))
    assert seen


def test_expanded_parameter():
    p = torch.zeros(1).expand(5).requires_grad_()
    p.grad = torch.zeros(5)
    refused(p, "elements share memory", ValueError)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_same_parameter_twice():
    p = leaf(5)
    opt = fo.AdamW([p, p])
    with pytest.raises(ValueError, match=r"\['params'\]\[0\].*\['params'\]\[1\].*share memory"):
        opt.step()


def test_overlapping_parameters():
    base = torch.zeros(10)
    views = [base[:6].requires_grad_(), base[5:].detach().requires_grad_()]
    for view in views:
        view.grad = torch.ones_like(view)
    opt = fo.SGD(views, lr=0.1)
    with pytest.raises(ValueError, match="share memory"):
        opt.step()
    assert not base.any()


def test_neighbours_in_one_buffer():
    base = torch.zeros(10)
    views = [base[:5].requires_grad_(), base[5:].detach().requires_grad_()]
    for view in views:
        view.grad = torch.ones_like(view)
    opt = fo.SGD(views, lr=0.5)
    for _ in range(2):
        opt.step()
    assert (base == -1).all()


def test_gradient_that_is_the_parameter():
    p = leaf(5)
    p.grad = p.detach()
    refused(p, r"\.grad: shares memory with", ValueError)


def test_overlap_is_found_when_addresses_change():
    p, q = leaf(5), leaf(5, seed=1)
    opt = fo.SGD([p, q], lr=0.1)
    opt.step()
    q.data = p.data
    with pytest.raises(ValueError, match="share memory"):
        opt.step()


def test_two_threads():
    p = leaf(4_000_000)
    opt = fo.Adam([p])
    opt.step()
    errors = []

    def work():
        for _ in range(20):
            try:
                opt.step()
            except RuntimeError as exc:
                errors.append(str(exc))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another thread" in text for text in errors)
    assert int(opt.state[p]["step"]) == 41 - len(errors)


def test_devices_other_than_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    p = leaf(3)
    q = torch.nn.Parameter(p.detach().cuda())
    q.grad = p.grad.cuda()
    refused(q, "is on device cuda")


# ------------------------------------------------------------------ storage formats

FORMATS = [
    (torch.bfloat16, {}),
    (torch.bfloat16, {"master_bits": 24}),
    (torch.bfloat16, {"master_bits": 16, "seed": 3}),
    (torch.float16, {}),
    (torch.float32, {"state_dtype": "bfloat16"}),
    (torch.float32, {"state_dtype": "int8", "min_8bit_size": 64, "seed": 5}),
    (torch.bfloat16, {"state_dtype": "int8", "min_8bit_size": 64}),
]


def as_numpy(tensor):
    """A bfloat16 tensor as fusedopt.formats.Stored has it: its bits, uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_formats_have_the_bits_of_the_numpy_interface(name, dtype, options):
    """The same codes, residual bits and blocks after five steps, with the same noise."""
    ml_dtypes = pytest.importorskip("ml_dtypes") if dtype == torch.bfloat16 else None
    options = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {}), **options}
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (700, 30)]
    plain = [as_numpy(p.detach().clone()) for p in params]
    if ml_dtypes is not None:
        plain = [a.view(ml_dtypes.bfloat16) for a in plain]
    opt, peer = getattr(fo, name)(params, **options), getattr(fusedopt, name)(plain, **options)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        grads = [as_numpy(p.grad) for p in params]
        peer.step([g.view(plain[0].dtype) for g in grads])
        opt.step()
    for p, a, state in zip(params, plain, peer.state.values(), strict=True):
        assert as_numpy(p.detach()).tobytes() == a.tobytes()
        for key, value in opt.state[p].items():
            if key == "step":
                assert value == 5
            elif key == "residual":
                assert as_numpy(value).tobytes() == state[key].tobytes()
            elif key.endswith("_blocks"):
                assert value.numpy().tobytes() == state[key.removesuffix("_blocks")].extra.tobytes()
            else:
                theirs = state[key]
                theirs = theirs if isinstance(theirs, np.ndarray) else theirs.data
                assert as_numpy(value).tobytes() == theirs.tobytes(), key


@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=str)
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_formats_resume_exactly(name, dtype, options, tmp_path):
    """Through a file: state keeps its dtype, which torch's rule would cast to the parameter's."""
    options = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {}), **options}

    def steps(p, opt, seeds):
        for seed in seeds:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            opt.step()

    def start():
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(20, 10).to(dtype))
        return p, getattr(fo, name)([p], **options)

    straight, opt = start()
    steps(straight, opt, range(6))
    p, opt = start()
    steps(p, opt, range(3))
    torch.save({"p": p, "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt")
    q, opt = start()
    with torch.no_grad():
        q.copy_(saved["p"])
    opt.load_state_dict(saved["opt"])
    for key, value in saved["opt"]["state"][0].items():
        assert opt.state[q][key].dtype == value.dtype, key
    steps(q, opt, range(3, 6))
    assert torch.equal(q, straight)


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
def test_state_of_torch_is_converted(state_dtype):
    """torch keeps bfloat16 state of a bfloat16 parameter; ours is what was asked for."""
    p = torch.nn.Parameter(torch.randn(5000).bfloat16())
    p.grad = torch.randn(5000).bfloat16()
    peer = torch.optim.Adam([p])
    peer.step()
    ours = fo.Adam([p], state_dtype=state_dtype)
    ours.load_state_dict(peer.state_dict())
    state = ours.state[p]
    wanted = {None: torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}[state_dtype]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wanted
    assert ("exp_avg_blocks" in state) == (state_dtype == "int8")
    ours.step()
    back = fo.Adam([p])  # and 8-bit codes become numbers again
    back.load_state_dict(ours.state_dict())
    assert back.state[p]["exp_avg"].dtype == torch.float32
    assert "exp_avg_blocks" not in back.state[p]
    expected = peer.state[p]["exp_avg"].float() * 0.9 + 0.1 * p.grad.float()
    torch.testing.assert_close(back.state[p]["exp_avg"], expected, rtol=0.4, atol=1e-3)
    torch.optim.Adam([p]).load_state_dict(ours.state_dict())  # what torch makes of it is its own


def test_state_that_fits_no_more():
    p = leaf(3, 4, 5, 6)
    opt = fo.Adam([p], state_dtype="int8", min_8bit_size=1)
    opt.step()
    p.data = p.data.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="another memory order"):
        opt.step()
    p = leaf(300)
    opt = fo.Adam([p], state_dtype="int8", min_8bit_size=1)
    opt.step()
    del opt.state[p]["exp_avg_blocks"]
    with pytest.raises(ValueError, match="exp_avg_blocks"):
        opt.step()
    opt.state[p]["exp_avg"] = torch.zeros(300, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64 does not fit"):
        opt.step()
    with pytest.raises(ValueError, match="state_dtype"):
        fo.SGD([p], state_dtype="int4")
    with pytest.raises(ValueError, match=r"param_groups\[1\]: master_bits"):
        opt.add_param_group({"params": [leaf(2)], "master_bits": 17})


# ------------------------------------------------------------------ around the rule


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_clip_is_that_of_torch(name):
    """As clip_grad_norm_ before the step, but for rounding; gradients stay as they are."""
    torch.manual_seed(0)
    ours, theirs = ([leaf(30, 20), leaf(7)] for _ in range(2))
    opt = getattr(fo, name)(ours, lr=0.1, max_grad_norm=0.5)
    peer = getattr(torch.optim, name)(theirs, lr=0.1)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        before = [p.grad.clone() for p in ours]
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        opt.step()
        peer.step()
        assert opt.last_step.grad_norm == pytest.approx(float(norm), rel=1e-6)
        assert opt.last_step.step == step + 1
        for p, g in zip(ours, before, strict=True):
            assert torch.equal(p.grad, g)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_averages(name, dtype):
    """The bits of the NumPy interface; swapped in and out; exact through a checkpoint."""
    start = torch.randn(600).to(dtype)
    p = torch.nn.Parameter(start.clone())
    opt = getattr(fo, name)([p], lr=0.1, ema=0.9, ema_warmup=True)
    wide = np.float64 if dtype == torch.float64 else np.float32
    average = start.to(torch.float64).numpy().astype(wide)
    for step in range(1, 4):
        p.grad = torch.full_like(p, 0.5)
        opt.step()
        if dtype != torch.bfloat16:
            weight = wide(1 - min(0.9, (1 + step) / (10 + step)))
            average = average + weight * (p.detach().numpy() - average)
            assert (opt.ema_params()[p].numpy() == average).all()
    before = p.detach().clone()
    with opt.swap_ema():
        assert torch.equal(p, opt.ema_params()[p].to(dtype))
    assert torch.equal(p, before)
    twin = torch.nn.Parameter(before.clone())
    other = getattr(fo, name)([twin], lr=0.1, ema=0.9, ema_warmup=True)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for q, o in [(p, opt), (twin, other)]:
        q.grad = torch.full_like(q, 0.25)
        o.step()
    assert torch.equal(p, twin) and torch.equal(opt.ema_params()[p], other.ema_params()[twin])


def test_average_begins_with_a_checkpoint_of_torch():
    """Momentum that torch has gathered goes on, and the average begins as the parameter is."""
    p, q = leaf(5), leaf(5)
    q.data.copy_(p.data)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for _ in range(2):
        q.grad = torch.ones(5)
        theirs.step()
    p.data.copy_(q.data)
    ours = fo.SGD([p], lr=0.1, momentum=0.9, ema=0.5)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for x, opt in [(p, ours), (q, theirs)]:
        x.grad = torch.ones(5)
        opt.step()
    torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="there is no average"):
        fo.SGD([leaf(2)]).ema_params()


def test_stats_and_history():
    opt = fo.AdamW([("w", leaf(40, 3)), ("b", leaf(3))], stats=True, max_grad_norm=1.0)
    history = fusedopt.monitor.History()
    for _ in range(3):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        opt.step()
        history.record(opt.last_step)
    stats = opt.last_step.stats
    assert [name.split()[-1] for name in stats.names] == ["(w)", "(b)"]
    np.testing.assert_allclose(stats.grad_norm, [120**0.5, 3**0.5])
    assert history.steps == [1, 2, 3]
    again = pickle.loads(pickle.dumps(opt))
    assert again.defaults["max_grad_norm"] == 1.0 and again.defaults["stats"] is True


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 0}, {"ema": 1.0}, {"stats": 1}, {"ema_warmup": "yes"}]
)
def test_wrong_options_of_our_own(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        fo.Adam([leaf(3)], **options)


def test_threads_of_its_own():
    """Checked; used by the steps, and no part of a checkpoint."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = fo.SGD([p], lr=0.5, threads=1)
    p.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [0.5] * 3
    assert "threads" not in opt.state_dict()["param_groups"][0]
    with pytest.raises(ValueError, match="^threads: must be >= 1"):
        fo.SGD([p], lr=0.5, threads=0)
