"""fusedopt.torch, rules whose state has other shapes: tensors that are not plain, and bad state."""

import copy

import pytest
from torch_cases import close, fo, model, torch, train

RULES = [("Adafactor", {}), ("Prodigy", {"slice_p": 3})]


class Own(torch.Tensor):
    """A subclass, which C does not take as it is."""


def tensor(seed):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


def negative(x):
    """The same numbers, with torch's negative bit."""
    return torch.complex(x, -x).conj().imag


KINDS = {
    "subclass": lambda x: x.as_subclass(Own),
    "negative": negative,
    "gaps": lambda x: x.repeat(1, 2)[:, :6],
    "transposed": lambda x: x.t().contiguous().t(),
}


STATES = KINDS | {
    "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.repeat(2, *[1] * (x.dim() - 1))[: len(x)],  # a part of another
}


@pytest.mark.parametrize("role", ["parameter", "gradient", "state"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "options"), RULES)
def test_kinds_of_tensors(name, options, kind, role):
    """The bits of plain ones; state stays where it is."""
    first, make = tensor(0), KINDS[kind]
    p = make(first.clone()) if role == "parameter" else first.clone()
    p, q = (x.requires_grad_() for x in (p, first.clone()))
    opt, peer = (getattr(fo, name)([x], **options) for x in (p, q))
    for seed in range(1, 5):
        grad = tensor(seed)
        p.grad, q.grad = make(grad.clone()) if role == "gradient" else grad.clone(), grad
        if role == "state" and seed == 2:
            key = "row_var" if name == "Adafactor" else "s"
            opt.state[p][key] = kept = STATES[kind](opt.state[p][key])
        opt.step()
        peer.step()
    assert torch.equal(p, q)
    if role == "state":
        assert opt.state[p][key] is kept
    for key, value in peer.state[q].items():
        assert torch.equal(opt.state[p][key], value), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_of_torch_in_16_bits(dtype):
    """Which has no residual bits; a vector's state beside that of a matrix."""
    params = [torch.nn.Parameter(tensor(seed).to(dtype)) for seed in range(2)]
    params[1] = torch.nn.Parameter(params[1].detach()[0].clone())
    for p in params:
        p.grad = torch.ones_like(p)
    theirs = torch.optim.Adafactor(params)
    theirs.step()
    opt = fo.Adafactor(params)
    opt.load_state_dict(copy.deepcopy(theirs.state_dict()))
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert opt.state[params[0]]["row_var"].dtype == torch.float32
    assert ("residual" in opt.state[params[0]]) == (dtype == torch.bfloat16)


PRODIGY = [{"slice_p": 1}, {"slice_p": 3}, {"betas": (0.0, 0.9)}]


@pytest.mark.parametrize("options", PRODIGY, ids=str)
@pytest.mark.parametrize("start", ["zero", "random"])
def test_prodigyopt(options, start):
    """The source's numbers, and its state dicts; its p0 is one number where a parameter is 0."""
    source = pytest.importorskip("prodigyopt", reason="compares with it: extra `peers`")
    first = tensor(0).double() * (start == "random")
    ours, theirs = (torch.nn.Parameter(first.clone()) for _ in range(2))
    opt, peer = fo.Prodigy([ours], d0=1e-3, **options), source.Prodigy([theirs], d0=1e-3, **options)

    def take(seeds):
        for seed in seeds:
            ours.grad = theirs.grad = tensor(seed).double() + 3
            opt.step()
            peer.step()
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
            assert opt.param_groups[0]["d"] == pytest.approx(peer.param_groups[0]["d"], rel=1e-10)

    take(range(1, 5))
    assert opt.param_groups[0]["d"] > 2e-3
    if "betas" in options:
        return
    mine, its = copy.deepcopy(opt.state_dict()), copy.deepcopy(peer.state_dict())
    for key in ("s", "p0"):
        mine["state"][0][key] = mine["state"][0][key].flatten()
    opt, peer = fo.Prodigy([ours], **options), source.Prodigy([theirs], **options)
    opt.load_state_dict(its)
    peer.load_state_dict(mine)
    take(range(5, 9))


@pytest.mark.parametrize(("name", "options"), [*RULES, ("Prodigy", {"d0": 1e-2})])
def test_state_dicts_of_distributed_checkpoints(name, options):
    """A new optimizer gets its state by a step at rate 0, on gradients that are 0."""
    tools = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    net, other = model(0), model(1)
    opt, twin = (getattr(fo, name)(m.parameters(), **options) for m in (net, other))
    train(net, opt, range(3))
    parts = copy.deepcopy(tools.get_state_dict(net, opt))
    new = tools.get_state_dict(other, twin)[1]["state"]  # into which a file is read by name
    assert {k: v.keys() for k, v in new.items()} == {
        k: v.keys() for k, v in parts[1]["state"].items()
    }
    tools.set_state_dict(other, twin, model_state_dict=parts[0], optim_state_dict=parts[1])
    for each, its in ((net, opt), (other, twin)):
        train(each, its, range(3, 6))
    close(net, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "key", "change", "error", "match"),
    [
        ("Adafactor", "row_var", lambda x: x.t(), ValueError, r"shape \(1, 6\); expected \(6, 1\)"),
        ("Adafactor", "col_var", lambda x: x[0], ValueError, r"shape \(6,\); expected \(1, 6\)"),
        ("Adafactor", "row_var", lambda x: x[:1].expand(6, 1), ValueError, "elements share memory"),
        ("Adafactor", "row_var", torch.Tensor.double, TypeError, "float64 does not fit"),
        ("Prodigy", "s", lambda x: x.view(2, 6), ValueError, r"shape \(2, 6\); expected \(12,\)"),
        ("Prodigy", "p0", lambda x: x[:1].expand(12), ValueError, "elements share memory"),
        ("Prodigy", "p0", torch.Tensor.bfloat16, TypeError, "it is kept in float32"),
    ],
)
def test_bad_state(name, key, change, error, match):
    """Named, and nothing is written."""
    p = torch.nn.Parameter(tensor(0)[:6])
    opt = getattr(fo, name)([p], **dict(RULES)[name])
    p.grad = tensor(1)[:6]
    opt.step()
    opt.state[p][key] = change(opt.state[p][key])
    kept = copy.deepcopy(opt.state_dict()), p.detach().clone()
    with pytest.raises(error, match=rf"^param_groups\[0\]\['params'\]\[0\].{key}: .*{match}"):
        opt.step()
    assert repr(opt.state_dict()) == repr(kept[0]) and torch.equal(p, kept[1])
