"""Sparse gradients of torch: agreement with torch, only their rows are touched, and errors."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch", reason="tests the PyTorch adapter: extra `torch`")

import numpy as np  # noqa: E402

import fusedopt  # noqa: E402
import fusedopt.torch as fo  # noqa: E402 (needs torch)
from fusedopt import _core  # noqa: E402

# torch itself warns once that it does not check
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning")

CLASSES = {  # name, options, namesake's options
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-maximize": ("SGD", {"lr": 0.1, "maximize": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    "adagrad-eps": ("Adagrad", {"eps": 1e-3}),
    "sparse-adam": ("SparseAdam", {"lr": 0.05}),
    "sparse-adam-all": ("SparseAdam", {"betas": (0.5, 0.75), "eps": 1e-3, "maximize": True}),
}
KINDS = ["unsorted", "repeated", "coalesced", "empty"]


def sparse(kind, param, rng, dtype=None):
    """A gradient with some rows, of the kind that backward() makes."""
    n = param.shape[0]
    count = {"empty": 0, "repeated": 2 * n, "unsorted": n // 2, "coalesced": n // 2}[kind]
    index = rng.integers(0, n, count) if kind == "repeated" else rng.permutation(n)[:count]
    values = torch.from_numpy(rng.standard_normal((count, *param.shape[1:])))
    made = torch.sparse_coo_tensor(
        torch.from_numpy(index)[None], values.to(dtype or param.dtype), param.shape,
        check_invariants=True,
    )  # fmt: skip
    return made.coalesce() if kind == "coalesced" else made


def tables(dtype=torch.float32):
    rng = np.random.default_rng(5)
    shapes = [(30, 7), (9, 2, 64), (50,), (40, 64)]
    return [torch.nn.Parameter(torch.from_numpy(rng.standard_normal(s)).to(dtype)) for s in shapes]


def train(opt, params, kind, steps=4, **how):
    for step in range(steps):
        rng = np.random.default_rng(step)
        for i, param in enumerate(params):
            param.grad = None if i == step else sparse(kind, param, rng)
        opt.step(**how)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CLASSES)
def test_agrees_with_torch(case, dtype, kind):
    name, options = CLASSES[case]
    ours, theirs = tables(dtype), tables(dtype)
    opt, peer = getattr(fo, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    train(opt, ours, kind)
    train(peer, theirs, kind)
    rtol = 3e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    for p, q in zip(ours, theirs, strict=True):
        assert opt.state[p].keys() == peer.state[q].keys()
        for key, value in opt.state[p].items():
            other = torch.as_tensor(peer.state[q][key], dtype=value.dtype)
            torch.testing.assert_close(value, other, rtol=rtol, atol=rtol)
    assert opt.last_step.updated == len(ours) - 1  # one has no gradient in it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CLASSES)
def test_has_the_bits_of_arrays(case, kind):
    """And of the reference, which arrays are tested against."""
    name, options = CLASSES[case]
    params = tables()
    arrays = [p.detach().numpy().copy() for p in params]
    opt = getattr(fo, name)(params, **options)
    if name == "SparseAdam":
        name, options = "Adam", options | {"eps_hat": True}
    twin = getattr(fusedopt, name)(arrays, **options)
    for step in range(3):
        rng = np.random.default_rng(step)
        for param in params:
            param.grad = sparse(kind, param, rng)
        twin.step(
            [fusedopt.Rows(p.grad._indices()[0].numpy(), p.grad._values().numpy()) for p in params],
            max_grad_norm=0.3,
        )
        opt.step(max_grad_norm=0.3)
    for param, array in zip(params, arrays, strict=True):
        assert param.detach().numpy().tobytes() == array.tobytes()


def test_rowwise_state():
    """Sparse or dense: the bits of arrays; torch's own state of all elements does not fit."""
    params = [*tables(), torch.nn.Parameter(torch.ones(5, 130))]
    arrays = [p.detach().numpy().copy() for p in params]
    opt = fo.Adagrad(params, rowwise=True, lr=0.1)
    twin = fusedopt.Adagrad(arrays, rowwise=True, lr=0.1)
    for step in range(3):
        rng = np.random.default_rng(step)
        for param in params[:-1]:
            param.grad = sparse("repeated", param, rng)
        params[-1].grad = torch.linspace(-1, 1, 650).reshape(5, 130)
        given = [p.grad for p in params[:-1]]
        rows = [fusedopt.Rows(g._indices()[0].numpy(), g._values().numpy()) for g in given]
        twin.step([*rows, params[-1].grad.numpy()])
        opt.step()
    for param, array in zip(params, arrays, strict=True):
        assert param.detach().numpy().tobytes() == array.tobytes()
    shapes = [tuple(opt.state[p]["sum"].shape) for p in params]
    assert shapes == [(30, 1), (9, 1, 1), (50,), (40, 1), (5, 1)]
    other = fo.Adagrad(copy.deepcopy(params), rowwise=True)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with pytest.raises(ValueError, match="sum"):
        other.load_state_dict(torch.optim.Adagrad(copy.deepcopy(params)).state_dict())


def test_embeddings_train_beside_dense_layers():
    """Of one model, in one optimizer; gradients as backward() makes them."""
    results = []
    for module in (fo, torch.optim):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.EmbeddingBag(50, 16, sparse=True), torch.nn.Linear(16, 3)
        )
        opt = module.Adagrad(net.parameters(), lr=0.1)
        for step in range(5):
            index = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(step))
            opt.zero_grad()
            net(index).square().sum().backward()
            assert net[0].weight.grad.is_sparse and not net[1].weight.grad.is_sparse
            opt.step()
        results.append(list(net.parameters()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["sgd", "adagrad", "sparse-adam"])
def test_touches_only_its_rows(case):
    name, options = CLASSES[case]
    param = torch.nn.Parameter(torch.ones(6, 3))
    opt = getattr(fo, name)([param], **options)
    param.grad = torch.sparse_coo_tensor([[4, 1, 4]], torch.ones(3, 3), (6, 3))
    before, version = param.grad.clone(), param._version
    opt.step()
    assert (param[[0, 2, 3, 5]] == 1).all() and (param[[1, 4]] != 1).all()
    assert torch.equal(param.grad.to_dense(), before.to_dense())
    assert param._version > version


def test_rows_of_several_axes():
    """Of a tensor with more than one sparse axis, rows are along all of them."""
    rng = np.random.default_rng(0)
    index = torch.from_numpy(np.stack([rng.integers(0, 5, 9), rng.integers(0, 4, 9)]))
    results = []
    for module in (fo, torch.optim):
        param = torch.nn.Parameter(torch.ones(5, 4, 3))
        values = torch.arange(27.0).reshape(9, 3)
        param.grad = torch.sparse_coo_tensor(index, values, param.shape)
        opt = module.SparseAdam([param])
        opt.step()
        results.append(param)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_parameters_and_values(dtype):
    """A bfloat16 parameter keeps its residual: rows are whole blocks."""
    param = torch.nn.Parameter(torch.ones(6, 64, dtype=dtype))
    opt = fo.SparseAdam([param], lr=0.1)
    for _ in range(3):
        param.grad = sparse("repeated", param, np.random.default_rng(0))
        opt.step()
    assert torch.isfinite(param).all() and (param != 1).any()
    if dtype == torch.bfloat16:
        assert opt.state[param]["residual"].any()


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_narrow_state(state_dtype):
    param, wide = (torch.nn.Parameter(torch.ones(80, 64)) for _ in range(2))
    opt, other = fo.SparseAdam([param], state_dtype=state_dtype), fo.SparseAdam([wide])
    train(opt, [param], "repeated", 6)
    train(other, [wide], "repeated", 6)
    torch.testing.assert_close(param, wide, rtol=0, atol=2e-3)
    assert not torch.equal(param, wide)


def test_state_dicts_go_both_ways():
    first = tables()
    opt = fo.SparseAdam(first, lr=0.1)
    train(opt, first, "repeated", 2)
    for source in (opt, torch.optim.SparseAdam(copy.deepcopy(first), lr=0.1)):
        if source is not opt:
            source.load_state_dict(copy.deepcopy(opt.state_dict()))
            train(source, source.param_groups[0]["params"], "repeated", 1)
        mine, theirs = (copy.deepcopy(source.param_groups[0]["params"]) for _ in range(2))
        ours, peer = fo.SparseAdam(mine), torch.optim.SparseAdam(theirs)
        ours.load_state_dict(copy.deepcopy(source.state_dict()))
        peer.load_state_dict(copy.deepcopy(source.state_dict()))
        train(ours, mine, "repeated", 3)
        train(peer, theirs, "repeated", 3)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert isinstance(pickle.loads(pickle.dumps(opt)), fo.SparseAdam)


def test_step_options():
    params = tables()
    opt = fo.SGD(params, lr=0.1)
    for param in params:
        param.grad = sparse("repeated", param, np.random.default_rng(1))
    norm = torch.stack([p.grad.coalesce()._values().norm() for p in params]).norm()
    opt.step(max_grad_norm=1.0, stats=True, zero_grads=True)
    assert opt.last_step.grad_norm == pytest.approx(float(norm), rel=1e-6)
    assert len(opt.last_step.stats) == len(params)
    assert not any(p.grad._values().any() for p in params)
    before = copy.deepcopy(params)
    params[1].grad._values()[0] = torch.nan
    opt.step(nonfinite="skip", zero_grads=True)
    assert opt.last_step.skipped and not params[1].grad._values().any()
    torch.testing.assert_close(params, before, rtol=0, atol=0)


def test_scaler_and_hooks():
    param = torch.nn.Parameter(torch.ones(6, 3))
    opt = fo.SparseAdam([param])
    assert isinstance(opt, torch.optim.SparseAdam)
    for step in range(1, 3):
        param.grad = sparse("unsorted", param, np.random.default_rng(0))
        opt.step_params([param])
        assert opt.last_step.step == step
    assert float(opt.state[param]["step"]) == 2
    torch.optim.lr_scheduler.StepLR(opt, 1)
    assert opt.step(lambda: 3.0) == 3.0


def bad(case):
    """An optimizer, its parameter and the error."""
    param = torch.nn.Parameter(torch.ones(6, 3))
    param.grad = torch.sparse_coo_tensor([[0, 1]], torch.ones(2, 3), (6, 3))
    if case == "dense":
        param.grad = torch.ones(6, 3)
        return fo.SparseAdam([param]), RuntimeError, "does not support dense gradients"
    if case == "momentum":
        return fo.SGD([param], momentum=0.9), ValueError, "these options step all rows"
    if case == "decay":
        return fo.Adagrad([param], weight_decay=0.1), ValueError, "these options step all rows"
    if case == "adam":
        return fo.AdamW([param]), TypeError, "AdamW steps all rows; use SparseAdam"
    if case == "rule":
        return fo.Lion([param]), TypeError, "Lion steps all rows"
    if case == "ema":
        return fo.SGD([param], ema=0.9), ValueError, "ema is of all rows"
    if case == "blocks":
        options = {"state_dtype": "int8", "min_8bit_size": 1}
        return fo.SparseAdam([param], **options), ValueError, "rows of 3 elements.*multiple of 64"
    if case == "index":
        param.grad = torch.sparse_coo_tensor([[0, 1]], torch.ones(2, 3), (6, 3))
        param.grad._indices()[0, 1] = 6
        return fo.SGD([param]), ValueError, "an index of 6 along axis 0, which has 6"
    if case == "negative":
        param.grad._indices()[0, 1] = -1
        return fo.SGD([param]), ValueError, "an index of -1 along axis 0"
    if case == "alias":
        values = param.detach()[2:4]
        param.grad = torch.sparse_coo_tensor([[1, 0]], values, (6, 3))
        return fo.SGD([param]), ValueError, "shares memory with"
    if case == "axes":
        param.grad = torch.sparse_coo_tensor([[0, 1], [2, 2]], torch.ones(2), (6, 3))
        return fo.Adagrad([param], rowwise=True), ValueError, "is sparse along 2 axes"
    assert case == "order"
    param.data = torch.ones(3, 6).T
    return fo.SGD([param]), ValueError, "do not follow one another in memory"


@pytest.mark.parametrize(
    "case",
    ["dense", "momentum", "decay", "adam", "rule", "ema", "blocks", "index", "negative", "alias",
     "axes", "order"],
)  # fmt: skip
def test_errors_change_nothing(case):
    opt, kind, message = bad(case)
    (param,) = opt.param_groups[0]["params"]
    other = torch.nn.Parameter(torch.ones(2))
    if not isinstance(opt, fo.SparseAdam):
        opt.add_param_group({"params": [other]})
        other.grad = torch.ones(2)
    had = pickle.dumps(opt.state_dict())
    with pytest.raises(kind, match=message):
        opt.step()
    assert (param == 1).all() and (other == 1).all()
    assert pickle.dumps(opt.state_dict()) == had
    if case != "dense":
        with pytest.raises(kind, match=r"param_groups\[0\]\['params'\]\[0\]"):
            opt.step()


@pytest.mark.parametrize("index", [[0, 1, 2], [2, 0, 1], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_values_in_memory_that_a_step_writes(zero, index):
    given = torch.ones(3, 3)
    params = [torch.nn.Parameter(torch.ones(6, 3)), torch.nn.Parameter(torch.ones(1, 3))]
    params[0].grad = torch.sparse_coo_tensor([index], given, (6, 3))
    params[1].grad = torch.ones(1, 3)
    opt = fo.SGD(params, zero_grads=zero)
    with pytest.raises(ValueError, match=r"\[0\]\.grad: shares memory with copy_out of"):
        opt.step(copy_out=[None, given[2:]])
    params[1].grad = given[2:]
    if zero:
        with pytest.raises(ValueError, match=r"\[0\]\.grad: shares memory with .*\[1\]\.grad"):
            opt.step()
        assert all((tensor == 1).all() for tensor in (given, *params))
    else:
        opt.step()
        assert (params[1] != 1).all() and (given == 1).all()


def test_torch_counts_on_in_double():
    """A count in a float32 tensor would make torch round the bias corrections to that."""
    params = [torch.nn.Parameter(torch.zeros(6, 3, dtype=torch.float64)) for _ in range(2)]
    grad = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 3, dtype=torch.float64), (6, 3))
    ours, theirs = fo.SparseAdam(params[:1]), torch.optim.SparseAdam(params[1:])
    params[0].grad = params[1].grad = grad
    ours.step()
    params[1].data.copy_(params[0].data)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    ours.step()
    theirs.step()
    torch.testing.assert_close(*params, rtol=1e-14, atol=0)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_narrow_state_of_no_rows(state_dtype):
    """A batch that touched none, as of an empty bag: a step that changes nothing else."""
    param = torch.nn.Parameter(torch.ones(6, 64))
    opt = fo.SparseAdam([param], state_dtype=state_dtype, min_8bit_size=1)
    for count in (0, 1, 0):
        index = torch.full((1, count), 2)
        param.grad = torch.sparse_coo_tensor(index, torch.ones(count, 64), (6, 64))
        before = param.detach().clone()
        opt.step()
        assert (before != param).any(dim=1).sum() == count
    assert float(opt.state[param]["step"]) == 3


def test_indices_that_change_once_checked(monkeypatch):
    """As by another thread: the step takes those that were checked."""
    param = torch.nn.Parameter(torch.ones(6, 3))
    param.grad = torch.sparse_coo_tensor([[4, 1]], torch.ones(2, 3), (6, 3))
    indices = param.grad._indices()
    look = _core.look_at_rows

    def look_and_change(rows, count):
        found = look(rows, count)
        indices[...] = 1 << 40
        return found

    monkeypatch.setattr(_core, "look_at_rows", look_and_change)
    fo.SGD([param], lr=1.0).step()
    assert (param[[1, 4]] == 0).all() and (param[[0, 2, 3, 5]] == 1).all()


def test_sgd_with_momentum_is_lazy_on_request():
    param = torch.nn.Parameter(torch.ones(6, 3))
    opt = fo.SGD([param], lr=0.1, momentum=0.9, lazy=True)
    for _ in range(2):
        param.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (6, 3))
        opt.step()
    torch.testing.assert_close(param[1], torch.full((3,), 1 - 0.1 - 0.19))
    assert (param[[0, 2, 3, 4, 5]] == 1).all()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SparseAdam"])
def test_rows_of_tensors_count_no_steps(name):
    """An option of arrays alone is refused with what to do, in groups too, which torch ignores."""
    made, params = getattr(fo, name), [torch.nn.Parameter(torch.ones(3, 2)) for _ in "12"]
    with pytest.raises(TypeError, match=rf"^{name}: row_steps: rows of .* to fusedopt.Adam"):
        made(params, row_steps=True)
    with pytest.raises(TypeError, match=r"^param_groups\[0\]: row_steps: rows of tensors"):
        made([{"params": params, "row_steps": True}])
    opt = made(params[:1])
    with pytest.raises(TypeError, match=r"^param_groups\[1\]: row_steps: rows of tensors"):
        opt.add_param_group({"params": params[1:], "row_steps": True})
    assert len(opt.param_groups) == 1


def test_copies_of_all_rows_are_refused():
    param = torch.nn.Parameter(torch.ones(6, 3))
    param.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (6, 3))
    with pytest.raises(ValueError, match="copy_out is of all rows"):
        fo.SGD([param]).step(copy_out=[torch.zeros(6, 3)])
    assert (param == 1).all()
