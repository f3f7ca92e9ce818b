"""step_params: some parameters at a time, as from hooks, with the bits of a whole step."""

import itertools
import math
import re

import pytest
from cases import STEP_OPTIONS, takes
from test_torch_table import AVERAGES, MODELS, ROWS
from torch_cases import ANY_SHAPE, backward, fo, leaf, model, torch, train, training

OPTIONS = [
    options
    for options in STEP_OPTIONS
    if options.get("per_tensor", "max_grad_norm" not in options)
    and options.get("nonfinite") != "skip"
]
TURNS = list(itertools.product(OPTIONS, AVERAGES))
REMEMBERS = [name for name in ANY_SHAPE if getattr(fo, name)._rule.remembers]


def raw(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def contents(opt):
    """Parameters, gradients and state; None for no gradient."""
    params = opt._all_params()
    return [
        *params, *(p.grad for p in params),
        *(opt.state[p][key] for p in params if p in opt.state for key in sorted(opt.state[p])),
    ]  # fmt: skip


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(raw(a), raw(b))


@pytest.mark.parametrize(("row", "case"), list(enumerate(ROWS)), ids=str)
def test_bits(row, case):
    """In another order, two of them in one call; with copies, and options of either kind."""
    name, options, dtype, storage = case
    step_options, averages = TURNS[row % len(TURNS)]
    if name in REMEMBERS:
        return
    averages = averages if takes(name, averages) else {}
    generator = torch.Generator().manual_seed(row)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in MODELS["several"]]
    now = dict(step_options)
    made = {} if row % 2 else {k: now.pop(k) for k in step_options if k != "grad_scale"}
    opts, copies = [], []
    for _ in range(2):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        opts.append(getattr(fo, name)(groups, **options, **storage, **averages, **made))
        copies.append({p: torch.zeros(p.shape, dtype=torch.bfloat16) for p in params[1:]})
    whole, parts = opts
    for step in range(1, 4):
        for p, q in zip(*(opt._all_params() for opt in opts), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.clone()
        if step == 2:
            p.grad = q.grad = None
        whole.step(copy_out=copies[0], **now)
        params = parts._all_params()
        for part in (params[3:], params[2:3], [], tuple(params[:2])):
            out = {p: copies[1][p] for p in part if p in copies[1]}
            parts.step_params(part, copy_out=out, **now)
            assert parts.last_step.step == step
            assert parts.last_step.updated == sum(p.grad is not None for p in part)
            if step_options.get("stats") and part:
                mine, its = parts.last_step.stats, whole.last_step.stats
                names = [parts._name(g, i) for g, group in enumerate(parts.param_groups)
                         for i, p in enumerate(group["params"])
                         if any(p is q and p.grad is not None for q in part)]  # fmt: skip
                assert {*mine.names} == {*names}
                assert all(repr(mine[n]) == repr(its[n]) for n in names)
        same(contents(parts), contents(whole))
        same(copies[1].values(), copies[0].values())


@pytest.mark.parametrize("zero_grads", [True, False])
def test_optimizer_in_backward(zero_grads):
    """One optimizer for all hooks, with a schedule, is torch's whole step."""
    net, peer_net = model(), model()
    opt = fo.AdamW(net.parameters(), lr=0.1, zero_grads=zero_grads)
    peer = torch.optim.AdamW(peer_net.parameters(), lr=0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (opt, peer)]

    def step_now(p):
        opt.step_params([p])
        if not zero_grads:
            p.grad = None

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    kept = []
    for seed in range(5):
        backward(net, seed)
        train(peer_net, peer, [seed])
        for schedule in schedules:
            schedule.step()
        grads = [p.grad for p in net.parameters()]
        assert all(not g.any() for g in grads) if zero_grads else grads == [None] * 4
        kept.append([g if g is None else g.data_ptr() for g in grads])
        assert opt.last_step.step == seed + 1
        assert all(own["step"] == seed + 1 for own in opt.state.values())
    assert kept == kept[:1] * 5  # one buffer for each
    for a, b in zip(net.parameters(), peer_net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    peer.load_state_dict(opt.state_dict())  # it is torch's state


class Narrow(torch.autograd.Function):
    """A bfloat16 copy, whose gradient stays one."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch refuses such gradients")
@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB"])
def test_narrow_gradients_in_backward(name):
    """bfloat16 gradients of float32 parameters, zeroed in place; bfloat16 copies of parameters."""
    p, q = leaf(40, 9), leaf(40, 9)
    p.grad, p.grad_dtype = None, None
    opt, peer = (getattr(fo, name)([x], lr=0.1) for x in (p, q))
    copy = torch.zeros(40, 9, dtype=torch.bfloat16)

    def step_now(p):
        q.grad = p.grad.float()
        opt.step_params([p], copy_out={p: copy}, zero_grads=True)

    p.register_post_accumulate_grad_hook(step_now)
    places = set()
    for step in range(4):
        (Narrow.apply(p) * torch.randn(40, 9).bfloat16()).sum().backward()
        peer.step()
        same([p, copy], [q, q.bfloat16()])
        assert p.grad.dtype == torch.bfloat16 and q.grad.any() and not p.grad.any()
        places.add(p.grad.data_ptr())
        assert opt.last_step[:2] == (step + 1, 1)
    assert len(places) == 1


def refused(opt, params, error, match, **options):
    before = [None if x is None else x.clone() for x in contents(opt)]
    with pytest.raises(error, match=match):
        opt.step_params(params, **options)
    same(contents(opt), before)
    assert opt.last_step.step == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_grad_norm": 1.0}, "^step_params: max_grad_norm is about the norm of all gradients"),
        ({"max_grad_norm": math.inf}, "^step_params: max_grad_norm"),
        ({"nonfinite": "skip"}, "^step_params: nonfinite='skip' changes all parameters or none"),
    ],
    ids=str,
)
def test_what_is_decided_by_all_gradients(options, match):
    for made, now in ((options, {}), ({}, options)):
        p = leaf(3)
        refused(fo.AdamW([p], **made), [p], ValueError, match, **now)


@pytest.mark.parametrize("name", REMEMBERS)
def test_rules_that_remember_a_whole_step(name):
    p = leaf(3)
    opt = training(getattr(fo, name)([p]))
    refused(opt, [p], ValueError, f"^step_params: {name} remembers numbers of a whole step")


def test_bad_parameters():
    p, q = leaf(3), leaf(4)
    opt = fo.AdamW([p, q])
    refused(opt, p, TypeError, "^step_params: expected a list of parameters, got Parameter")
    other = "no parameter of this optimizer"
    refused(opt, [p, leaf(3)], ValueError, rf"^step_params: params\[1\] is {other}")
    refused(opt, [p, None], ValueError, rf"^step_params: params\[1\] is {other}")
    first = re.escape("param_groups[0]['params'][0]")
    refused(opt, [p, p], ValueError, f"^{first}.* share memory")
    q.grad[1] = math.nan
    name = re.escape("param_groups[0]['params'][1].grad: 1 of 4 elements")
    refused(opt, [p, q], FloatingPointError, f"^{name}", nonfinite="raise")
    opt.param_groups[0]["lr"] = "small"
    refused(opt, [p], TypeError, r"^param_groups\[0\]\.lr: expected a number")


def test_calls_that_step_nothing():
    """They are no part of a step, before the first and between others."""
    p, q = leaf(3), leaf(4)
    p.grad = None
    opt = fo.AdamW([p, q])
    steps = []
    for params in ([], [p], [q], [], [p], [q]):
        opt.step_params(params)
        steps.append(opt.last_step[:2])
    assert steps == [(0, 0), (0, 0), (1, 1), (1, 0), (1, 0), (2, 1)]


def test_many_steps():
    """Constants of the last steps are kept, of 64 at the most; and a whole step in between."""
    (p, q), (a, b) = ((leaf(70), leaf(9)) for _ in range(2))
    opt, peer = fo.NAdam([p, q], lr=0.01), fo.NAdam([a, b], lr=0.01)
    for step in range(150):
        peer.step()
        if step % 50 == 49:
            opt.step()
        else:
            opt.step_params([q])
            opt.step_params([p])
        assert opt.last_step.step == step + 1
    same(contents(opt), contents(peer))


def test_groups_that_change():
    """Parameters are found where they are now, with the options and the number of now."""
    params = [leaf(70, seed=seed) for seed in range(4)]
    peers = [leaf(70, seed=seed) for seed in range(4)]
    storage = {"state_dtype": "bfloat16"}  # whose noise depends on the number
    opt, peer = (fo.AdamW(x[1:], lr=0.1, **storage) for x in (params, peers))
    opt.step_params(params[1:])
    peer.step()
    for o, own in ((opt, params), (peer, peers)):
        o.param_groups[0]["params"].insert(0, own[0])
        o.param_groups[0]["lr"] = 0.2
        o.add_param_group({"params": [leaf(3)], "lr": 0.3})
        del o.param_groups[0]["params"][3]
    for p in (*opt.param_groups[1]["params"], *params[2::-1]):
        opt.step_params([p])
    peer.step()
    same(contents(opt), contents(peer))
    refused_now = r"^step_params: params\[0\] is no parameter"
    with pytest.raises(ValueError, match=refused_now):
        opt.step_params([params[3]])


def test_options_that_failed_in_part():
    """A group's new options hold, its other loop too, though another group's were refused."""
    (p, q), (a, b) = ((leaf(70), leaf(9)) for _ in range(2))
    opt, peer = (fo.AdamW([{"params": [x]}, {"params": [y]}]) for x, y in ((p, q), (a, b)))
    peer.param_groups[0]["cautious"] = True
    peer.step()
    opt.step_params([q])
    opt.param_groups[0]["cautious"] = True
    opt.param_groups[1]["lr"] = "small"
    for params in ([p, q], [p]):
        with pytest.raises(TypeError, match=r"^param_groups\[1\]\.lr"):
            opt.step_params(params)
    opt.param_groups[1]["lr"] = 1e-3
    opt.step_params([p])
    same(contents(opt), contents(peer))
