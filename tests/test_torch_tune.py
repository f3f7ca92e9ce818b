"""The range test for torch's optimizers: what it suggests, and that nothing of it is left."""

import copy
import io

import pytest

torch = pytest.importorskip("torch", reason="extra `torch`")

from test_interrupts import interrupted_at  # noqa: E402
from torch import nn  # noqa: E402

import fusedopt.torch as fo  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:state_dict.. in train mode")
SHORT = {"start": 1e-4, "stop": 1.0, "steps": 12}


@pytest.fixture(autouse=True)
def one_thread():
    """Small models take long where busy processes keep torch's threads waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(seed=0):
    """A model with dropout and a batch norm, and data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)
    )
    x = torch.randn(64, 6)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    return model, data


def loader(data):
    return torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)


def closure_of(model, opt, data):
    def closure():
        rows = torch.randint(len(data), (16,))
        x, y = data[rows]
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def image(opt, model):
    """All that a test must leave as it is: bytes, and objects that must be the same."""
    file = io.BytesIO()
    torch.save([model.state_dict(), [p.grad for p in model.parameters()]], file)
    state = {k: {n: v.clone() for n, v in s.items()} for k, s in opt.state_dict()["state"].items()}
    torch.save([state, torch.get_rng_state(), torch.is_grad_enabled()], file)
    objects = [id(opt.state), id(opt.param_groups), *map(id, opt.param_groups), *vars(opt)]
    objects += [id(p.grad) for p in model.parameters() if p.grad is not None]
    noted = {name for name, _ in getattr(opt, "_rule", fo.SGD._rule).numbers}  # by state_dict()
    objects += [id(t) for own in opt.state.values() for k, t in own.items() if k not in noted]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return file.getvalue(), objects, groups, [m.training for m in model.modules()]


def warmed(cls, model, data, steps=2, **options):
    opt = cls(model.parameters(), lr=0.01, **options)
    if hasattr(opt, "train"):
        opt.train()
    for _ in range(steps):
        closure_of(model, opt, data)()
        opt.step()
    return opt


CLASSES = [
    name for name in fo.__all__
    if getattr(fo, name)._rule.demand_shape is None and name != "Rprop"  # which reads its rate once
]  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_every_rule_is_restored_and_gives_the_same_answer(name):
    model, data = problem()
    opt = warmed(getattr(fo, name), model, data)
    before = image(opt, model)
    first = fo.range_test(opt, closure_of(model, opt, data), model=model, **SHORT)
    assert image(opt, model) == before
    second = fo.range_test(opt, closure_of(model, opt, data), model=model, **SHORT)
    assert first.losses.tobytes() == second.losses.tobytes() and len(set(first.losses)) > 3


@pytest.mark.parametrize("name", CLASSES)
def test_training_goes_on_as_without_a_test(name):
    found = []
    for tested in (False, True):
        model, data = problem()
        opt = warmed(getattr(fo, name), model, data)
        if tested:
            fo.range_test(opt, model=model, loss=nn.MSELoss(), loader=loader(data), **SHORT)
        for _ in range(3):
            closure_of(model, opt, data)()
            opt.step()
        found.append([p.detach().numpy().tobytes() for p in model.state_dict().values()])
    assert found[0] == found[1]


OPTIONS = [
    {"state_dtype": "int8", "min_8bit_size": 0}, {"state_dtype": "bfloat16"},
    {"ema": 0.9, "max_grad_norm": 1.0, "zero_grads": True}, {"amsgrad": True},
]  # fmt: skip


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_formats_and_averages(options, steps):
    model, data = problem()
    opt = warmed(fo.AdamW, model, data, steps, **options)
    before = image(opt, model)
    found = fo.range_test(opt, model=model, loss=nn.MSELoss(), loader=loader(data), **SHORT)
    assert image(opt, model) == before and len(set(found.losses)) > 3


@pytest.mark.parametrize("bits", [None, 24, 16])
def test_bits_that_a_parameter_does_not_show(bits):
    w = torch.randn(40).bfloat16().requires_grad_()
    opt = fo.AdamW([w], lr=0.01, master_bits=bits)
    w.square().sum().backward()
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    before = w.detach().clone()

    def closure():
        loss = (w - 3).square().sum()
        loss.backward()
        return loss

    fo.range_test(opt, closure, **SHORT)
    assert torch.equal(w, before) and str(opt.state_dict()) == str(state)


def test_torchs_own_optimizer_with_a_scheduler():
    model, data = problem()
    opt = warmed(torch.optim.Adam, model, data)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    before, known = image(opt, model), scheduler.state_dict()
    found = fo.range_test(opt, closure_of(model, opt, data), model=model, **SHORT)
    assert image(opt, model) == before and scheduler.state_dict() == known
    assert len(set(found.losses)) > 3
    opt.step()
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.005


@pytest.mark.parametrize("train", [True, False])
def test_schedule_free_stays_in_its_mode(train):
    model, data = problem()
    opt = warmed(fo.ScheduleFreeAdamW, model, data)
    if not train:
        opt.eval()
    before = image(opt, model)
    fo.range_test(opt, closure_of(model, opt, data), model=model, **SHORT)
    assert image(opt, model) == before and opt.param_groups[0]["train_mode"] is train


def test_groups_keep_the_ratios_of_their_rates():
    a, b = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    opt = fo.SGD([{"params": [a], "lr": 0.4}, {"params": [b], "lr": torch.tensor(0.1)}], lr=1.0)
    seen = []

    def closure():
        seen.append((-a[0].item(), -b[0].item()))
        (a.sum() + b.sum()).backward()
        return 1.0

    found = fo.range_test(opt, closure, start=0.1, stop=1.0, steps=10, kind="linear")
    moved = torch.tensor(seen).diff(dim=0)
    torch.testing.assert_close(moved[:, 0], torch.tensor(found.rates[:-1]).float())
    torch.testing.assert_close(moved[:, 1], torch.tensor(found.rates[:-1]).float() / 4)
    assert opt.param_groups[0]["lr"] == 0.4 and a.grad is None and not a.any()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_the_closure_raises_arrives_and_all_is_back(error):
    model, data = problem()
    opt = warmed(fo.Adam, model, data, ema=0.9)
    before, inner, calls = image(opt, model), closure_of(model, opt, data), []

    def failing():
        calls.append(1)
        if len(calls) > 3:
            raise error
        return inner()

    with pytest.raises(error):
        fo.range_test(opt, failing, model=model, **SHORT)
    assert len(calls) == 4 and image(opt, model) == before


def test_a_closure_that_exchanges_a_tensor():
    w, v = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    opt = fo.SGD([w, v], lr=0.1)
    data = w.data_ptr()

    def closure():
        w.data = torch.zeros(7)
        v.data = torch.zeros(2)
        (w.sum() + v.sum()).backward()
        return 1.0

    fo.range_test(opt, closure, **SHORT)
    assert w.data_ptr() == data and w.tolist() == [1, 1, 1] and v.tolist() == [1, 1]


def test_a_loss_that_is_not_finite_ends_the_sweep():
    model, data = problem()
    opt = warmed(fo.SGD, model, data)
    before, inner = image(opt, model), closure_of(model, opt, data)
    found = fo.range_test(opt, lambda: inner() * float("nan"), model=model, **SHORT)
    assert found.diverged and found.suggestion is None and len(found.losses) == 1
    assert image(opt, model) == before


@pytest.mark.parametrize("cls", [fo.AdamW, fo.ScheduleFreeAdamW])
def test_interrupted_at_every_line(cls):
    """Ctrl-C at each line of Python code, torch's too: all is back."""
    w = nn.Linear(3, 1)
    opt = cls(w.parameters(), lr=0.01)
    x, before = torch.ones(2, 3), image(opt, w)

    def closure():
        loss = w(x).square().sum()
        loss.backward()
        return loss

    def test():
        fo.range_test(opt, closure, model=w, start=1e-3, stop=0.1, steps=10)

    when = 1
    while interrupted_at(when, test):
        assert image(opt, w) == before, when
        when += 3 if when < 300 else 31
    assert when > 500


def test_suggestion():
    model, data = problem()
    opt = fo.AdamW(model.parameters())
    found = fo.range_test(opt, model=model, loss=nn.MSELoss(), loader=loader(data))
    assert found.diverged and 1e-3 < found.suggestion < 0.5, found


def test_bad_arguments():
    model, data = problem()
    opt = fo.SGD(model.parameters(), lr=0.1)
    closure = closure_of(model, opt, data)
    with pytest.raises(TypeError, match="give a closure, or model, loss and loader"):
        fo.range_test(opt, model=model, loss=nn.MSELoss())
    with pytest.raises(TypeError, match="not both"):
        fo.range_test(opt, closure, loader=loader(data))
    with pytest.raises(TypeError, match="loader: is an iterator"):
        fo.range_test(opt, model=model, loss=nn.MSELoss(), loader=iter(loader(data)))
    with pytest.raises(ValueError, match="loader: has no batches"):
        fo.range_test(opt, model=model, loss=nn.MSELoss(), loader=[])
    with pytest.raises(TypeError, match="loader: expected pairs"):
        fo.range_test(opt, model=model, loss=nn.MSELoss(), loader=[torch.ones(3)])
    with pytest.raises(ValueError, match="lr: Rprop's is what its step sizes begin with"):
        fo.range_test(fo.Rprop(model.parameters()), closure)
    with pytest.raises(TypeError, match="opt: expected an optimizer of torch"):
        fo.range_test(3, closure)
    averaging = fo.SGD(model.parameters(), lr=0.1, ema=0.9)
    closure()
    averaging.step()
    with averaging.swap_ema(), pytest.raises(RuntimeError, match="leave the block of swap_ema"):
        fo.range_test(averaging, closure)
