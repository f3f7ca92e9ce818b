"""`state_dir` of fusedopt.torch: the bits are those of state in memory."""

import copy
import io
import os

import pytest

torch = pytest.importorskip("torch", reason="tests the PyTorch adapter: extra `torch`")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs mapped files of a Unix system")

import fusedopt.torch as fo  # noqa: E402 (needs torch)
from fusedopt import _disk  # noqa: E402

FORMATS = {  # dtype of the parameters, options
    "float32": (torch.float32, {"ema": 0.9}),
    "float64": (torch.float64, {}),
    "bfloat16 state": (torch.float32, {"state_dtype": "bfloat16"}),
    "int8 state": (torch.float32, {"state_dtype": "int8", "min_8bit_size": 100}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, 24 bits": (torch.bfloat16, {"master_bits": 24}),
    "float16": (torch.float16, {}),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Have small arrays on disk too."""
    monkeypatch.setattr(_disk, "LEAST", 256)


def start(dtype=torch.float32):
    torch.manual_seed(0)
    params = [torch.randn(300, 1000), torch.randn(70, 33).T, torch.ones(3, 5)]
    return [torch.nn.Parameter(p.to(dtype)) for p in params]


def step(params, opt, seed, **how):
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step(**how)


def make(cls, params, **options):
    opt = cls(params, **options)
    if opt._rule.average is not None:
        opt.train()
    return opt


def same(ours, theirs, params, others):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        a, b = ours.state[p], theirs.state[q]
        assert a.keys() == b.keys()
        for k in a:
            assert torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype, k


def is_on_disk(opt, tensor):
    return any(
        low <= tensor.data_ptr() < low + size for low, size, *_ in opt._disk.regions()
    ) and isinstance(tensor, torch.Tensor)


def fits(name, dtype, options):
    rule = getattr(fo, name)._rule
    try:
        rule.check(rule.defaults | options)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in fo.__all__ for form, row in FORMATS.items() if fits(name, *row)],
)
def test_bits(tmp_path, name, form):
    dtype, options = FORMATS[form]
    cls, params, others = getattr(fo, name), start(dtype), start(dtype)
    opt = make(cls, params, **options)
    disk = make(cls, others, state_dir=tmp_path, threads=200, **options)
    for seed in range(3):
        how = {"max_grad_norm": 0.5, "stats": True} if seed == 1 else {}
        for ps, o in ((params, opt), (others, disk)):
            step(ps, o, seed, **how)
    assert repr(opt.last_step) == repr(disk.last_step)
    same(opt, disk, params, others)
    large = [t for t in disk.state[others[0]].values() if t.nbytes > 10**5]
    assert all(is_on_disk(disk, t) for t in large) and (large or name in ("SGD", "Adafactor"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["float32", "int8 state", "bfloat16"])
def test_state_dicts(tmp_path, form):
    """A file of torch.save loads into either kind, and what it replaces frees its room."""
    dtype, options = FORMATS[form]
    params = start(dtype)
    opt = fo.AdamW(params, state_dir=tmp_path, **options)
    step(params, opt, 0)
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "params": params}, file)
    for where in ({}, {"state_dir": tmp_path}):
        others = start(dtype)
        other = fo.AdamW(others, **options, **where)
        step(others, other, 5)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        with torch.no_grad():
            for p, q in zip(others, saved["params"], strict=True):
                p.copy_(q)
        other.load_state_dict(saved["opt"])
        del saved
        same(opt, other, params, others)
        if where:
            large = [t for t in other.state[others[0]].values() if t.nbytes > 10**5]
            assert large and all(is_on_disk(other, t) for t in large)
            used = os.fstat(other._disk._file.fileno()).st_blocks * 512
            assert used < 1.2 * sum(t.nbytes for own in other.state.values() for t in own.values())
        step(params, opt, 1)
        step(others, other, 1)
        same(opt, other, params, others)
        file = io.BytesIO()
        torch.save({"opt": opt.state_dict(), "params": params}, file)


def test_copies_are_in_memory(tmp_path):
    params = start()
    opt = fo.AdamW(params, state_dir=tmp_path)
    step(params, opt, 0)
    others, other = copy.deepcopy((params, opt))
    same(opt, other, params, others)
    assert not any(is_on_disk(opt, t) for own in other.state.values() for t in own.values())
    step(params, opt, 1)
    step(others, other, 1)
    same(opt, other, params, others)


def test_a_disk_that_does_not_write(tmp_path):
    params, others = start(), start()
    opt, disk = fo.AdamW(params), fo.AdamW(others, state_dir=tmp_path)
    for ps, o in ((params, opt), (others, disk)):
        step(ps, o, 0)
    saved = copy.deepcopy((disk.state_dict(), [p.detach() for p in others]))
    number = disk._disk._file.fileno()
    kept, null = os.dup(number), os.open("/dev/zero", os.O_RDONLY)
    os.dup2(null, number)  # it reads zeros, and cannot be written
    os.close(null)
    with pytest.raises(OSError, match=str(tmp_path)):
        step(others, disk, 1)
    os.dup2(kept, number)
    os.close(kept)
    with pytest.raises(RuntimeError, match="load a checkpoint of both"):
        step(others, disk, 1)
    disk.load_state_dict(saved[0])
    with torch.no_grad():
        for p, q in zip(others, saved[1], strict=True):
            p.copy_(q)
    for ps, o in ((params, opt), (others, disk)):
        step(ps, o, 1)
    same(opt, disk, params, others)


def test_a_full_disk(tmp_path, monkeypatch):
    """The first step makes the state; it has changed nothing where there is no space."""
    params = start()
    before = [p.detach().clone() for p in params]
    opt = fo.AdamW(params, state_dir=tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no space for [\d,]+ bytes of state"):
        step(params, opt, 0)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and not opt.state


def test_what_is_no_path():
    with pytest.raises(TypeError, match="state_dir: expected a path"):
        fo.SGD(start(), state_dir=3)
