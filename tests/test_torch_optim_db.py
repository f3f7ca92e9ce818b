"""torch's own optimizer inputs: its `optim_db`, every configuration that applies on the CPU."""

import pytest

torch = pytest.importorskip("torch", reason="tests the PyTorch adapter: extra `torch`")
common = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="needs expecttest: extra `peers`"
)

from torch_cases import ANY_SHAPE, fo  # noqa: E402 (needs torch)

INFOS = {
    info.optim_cls.__name__: info
    for info in common.optim_db
    if info.optim_cls.__name__ in ANY_SHAPE
}
INPUTS = [
    pytest.param(name, entry, dtype, id=f"{name}-{entry.desc}-{dtype}".replace(" ", "_"))
    for name, info in INFOS.items()
    for dtype in (torch.float32, torch.float64)
    for entry in info.optim_inputs_func(device="cpu", dtype=dtype)
]
ERRORS = [
    pytest.param(name, entry, id=f"{name}-{entry.optimizer_error_input.desc}".replace(" ", "_"))
    for name, info in INFOS.items()
    for entry in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    if entry.error_on is common.OptimizerErrorEnum.CONSTRUCTION_ERROR
]


def test_all_are_there():
    """torch's list has every optimizer that is in both modules."""
    assert set(INFOS) == {name for name in ANY_SHAPE if hasattr(torch.optim, name)}
    assert len(INPUTS) >= 50 and len(ERRORS) >= 10


def fresh(entry):
    """The options, with copies of tensors: schedulers and steps may write into them."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in entry.kwargs.items()}


@pytest.mark.parametrize(("name", "entry", "dtype"), INPUTS)
def test_agrees_with_single_tensor(name, entry, dtype):
    """Like torch's test_foreach_matches_forloop: seven steps of a small net, with states."""
    results = []
    for module in (fo, torch.optim):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(10, 5), torch.nn.Sigmoid(), torch.nn.Linear(5, 1)]
        net = torch.nn.Sequential(*layers).to(dtype)
        extra = {"foreach": False} if module is torch.optim else {}
        opt = getattr(module, name)(net.parameters(), **fresh(entry), **extra)
        x = torch.rand(16, 10, dtype=dtype)
        for step in range(7):
            opt.zero_grad()
            net(x).square().sum().backward()
            if step == 3:  # as torch's tests do: gradients may be missing for a step
                net[0].weight.grad = None
            opt.step()
        results.append((list(net.parameters()), opt))
    (ours, opt), (theirs, peer) = results
    opt.state_dict()  # notes the numbers that torch keeps in the state
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
        assert opt.state[p].keys() == peer.state[q].keys()
        for key, value in peer.state[q].items():
            torch.testing.assert_close(opt.state[p][key], value, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("name", "entry"), ERRORS)
def test_raises_what_torch_raises(name, entry):
    given = entry.optimizer_error_input
    params = given.params
    if params is None:
        params = [torch.nn.Parameter(torch.randn(2, 3))]
    with pytest.raises(entry.error_type) as raised:
        getattr(fo, name)(params, **given.kwargs)
    assert raised.match(entry.error_regex)
