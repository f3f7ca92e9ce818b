"""Small torch models and parameters, for the tests of fusedopt.torch."""

import pytest

torch = pytest.importorskip("torch", reason="tests the PyTorch adapter: extra `torch`")

import fusedopt.torch as fo  # noqa: E402 (needs torch)
from fusedopt.formats import Stored  # noqa: E402

# those that step tensors of any shape; test_torch_muon.py has the others
ANY_SHAPE = [name for name in fo.__all__ if getattr(fo, name)._rule.demand_shape is None]


def since(version):
    """Mark a test that needs at least a version of torch, e.g. "2.6"."""
    parts = [tuple(map(int, v.split(".")[:2])) for v in (torch.__version__, version)]
    return pytest.mark.skipif(parts[0] < parts[1], reason=f"needs torch {version}")


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


def training(opt):
    """The optimizer, in train mode if it has modes."""
    if opt._rule.average is not None:
        opt.train()
    return opt


def evaluating(opt):
    """The optimizer, in eval mode if it has modes."""
    if opt._rule.average is not None:
        opt.eval()
    return opt


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


def numbers(opt, p, name):
    """The numbers of a state array in any format."""
    own = opt.state[p]
    if name in own:
        return own[name].float()
    form = "uint8" if name.endswith("_sq") else "int8"
    codes, blocks = (own[name + end].numpy() for end in ("_codes", "_blocks"))
    return torch.from_numpy(Stored(form, codes, blocks.reshape(-1)).decode())
