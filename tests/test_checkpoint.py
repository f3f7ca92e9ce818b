"""Files: exact round trips, damage refused, the old file never lost."""

import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
from campaigns import checkpoints

import fusedopt
from fusedopt import _checkpoint

SUFFIXES = [".npz", ".safetensors"]


def make(lr=0.5, seed=0, **options):
    rng = np.random.default_rng(seed)
    params = {
        "W": rng.standard_normal((5, 7)).astype(np.float32),
        "F": np.asfortranarray(rng.standard_normal((4, 3))),
        "T": rng.standard_normal((2, 3, 4)).astype(np.float32).transpose(2, 0, 1),
        "empty": np.ones((0, 3), np.float32),
        "scalar": np.array(2.0),
        "a/b 'ü'": np.ones(2),
    }
    opt = fusedopt.Adam(params, lr=lr, **options)
    for _ in range(2):
        opt.step({k: rng.standard_normal(p.shape).astype(p.dtype) for k, p in params.items()})
    return opt


def contents(opt):
    return {k: [np.asarray(v).tobytes() for v in s.values()] for k, s in opt.state.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, suffix):
    """All layouts come back, element by element, with options and step counts."""
    path = tmp_path / f"checkpoint{suffix}"
    opt, other = make(lr=0.25, betas=(0.5, 0.75)), make(seed=1)
    other.step(
        {name: None for name in ("W", "F", "T", "empty", "scalar")} | {"a/b 'ü'": np.ones(2)}
    )
    opt.save(path)
    other.load(str(path))
    assert contents(other) == contents(opt)
    for key in ("lr", "betas", "eps"):
        assert other.param_groups[0][key] == opt.param_groups[0][key]
    assert other.state_dict()["step"] == 2
    assert os.listdir(tmp_path) == [path.name]
    opt.save(path)  # over itself
    other.load(path)


LAYOUTS = {
    "0-d": lambda a: a[0, 0, 0],
    "C": lambda a: a,
    "F": lambda a: np.asfortranarray(a),
    "axes swapped": lambda a: a.transpose(1, 2, 0),
    "strided": lambda a: a[:, ::2, 1:],
    "reversed": lambda a: a[::-1],
    "empty": lambda a: a[:0],
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "u2", "i1", "i2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_any_layout(tmp_path, suffix, dtype, layout):
    array = np.asarray(LAYOUTS[layout](np.arange(60).astype(dtype).reshape(3, 4, 5)))
    _checkpoint.write(tmp_path / f"x{suffix}", {"a": array}, {"b": 1})
    arrays, meta = _checkpoint.read(tmp_path / f"x{suffix}")
    assert meta == {"b": 1} and arrays["a"].dtype == array.dtype
    np.testing.assert_array_equal(arrays["a"], array, strict=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_schedules_stay_with_the_optimizer(tmp_path, suffix):
    path = tmp_path / f"checkpoint{suffix}"
    rate = fusedopt.schedules.constant(0.125)
    make(lr=rate).save(path)
    other = make(lr=0.5)
    other.load(path)
    assert other.param_groups[0]["lr"] == 0.5
    make(lr=0.5).save(path)
    other = make(lr=rate)
    other.load(path)
    assert other.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_and_damaged(tmp_path, suffix):
    """Truncations and flips are refused with the file's name, and change nothing."""
    path = tmp_path / f"checkpoint{suffix}"
    make().save(path)
    whole = path.read_bytes()
    opt = make(seed=1)
    before = contents(opt)
    for end in [0, 1, 8, 100, *range(200, len(whole), len(whole) // 50), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=f"checkpoint{suffix}: "):
            opt.load(path)
        assert contents(opt) == before
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            opt.load(path)
        except ValueError as exc:
            assert str(path) in str(exc)
            assert contents(opt) == before
        else:  # safetensors has no checksum: a flip in the numbers cannot be seen
            before = contents(opt)
    path.write_bytes(whole)
    opt.load(path)


FOREIGN = {
    "text": b"hello",
    "empty": b"",
    "pickle": b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign(tmp_path, suffix, kind):
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(ValueError, match=f"foreign{suffix}: not a checkpoint of fusedopt"):
        make().load(path)


def test_foreign_npz(tmp_path):
    path = tmp_path / "foreign.npz"
    np.savez(path, x=np.ones(3))
    with pytest.raises(ValueError, match="not a checkpoint of fusedopt"):
        make().load(path)
    np.savez(path, fusedopt=np.array([{"a": 1}], object))  # would need unpickling
    with pytest.raises(ValueError, match="not a checkpoint of fusedopt"):
        make().load(path)
    _checkpoint.write(path, {"x": np.ones(2)}, {"anything": 1})
    with pytest.raises(ValueError, match="not the state of an optimizer"):
        make().load(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("fusedopt.npy", b"\x93NUMPY")
    with pytest.raises(ValueError, match="not a checkpoint of fusedopt"):
        make().load(path)


def test_other_optimizer(tmp_path):
    path = tmp_path / "sgd.npz"
    fusedopt.SGD([np.ones(2)], momentum=0.9).save(path)
    with pytest.raises(ValueError, match=r"sgd.npz: state dict: params\[0\] should have step, exp"):
        fusedopt.Adam([np.ones(2)]).load(path)


def test_names_and_folders(tmp_path):
    opt = make()
    with pytest.raises(ValueError, match="must end in .npz or .safetensors"):
        opt.save(tmp_path / "checkpoint.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        opt.save(tmp_path / "nowhere" / "checkpoint.npz")
    with pytest.raises(FileNotFoundError, match="missing.npz"):
        opt.load(tmp_path / "missing.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_interrupted_save_keeps_the_old_file(tmp_path, suffix, monkeypatch):
    """Whatever goes wrong before the rename, the old file is whole and no debris is left."""
    path = tmp_path / f"checkpoint{suffix}"
    opt = make()
    opt.save(path)
    old = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    def interrupt(*args):
        raise KeyboardInterrupt

    for name, fault, error in [("fsync", full, OSError), ("fsync", interrupt, KeyboardInterrupt)]:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fault)
            with pytest.raises(error):
                make(seed=3).save(path)
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == [path.name]


def test_file_mode_follows_umask(tmp_path):
    path = tmp_path / "checkpoint.npz"
    before = os.umask(0o027)
    try:
        make().save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o600)
    make().save(path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("convert", [False, True])
def test_state_that_cannot_be_converted_changes_nothing(convert):
    """The last array of all does not fit; those before it have not been copied."""
    p = np.ones(5, ml_dtypes.bfloat16)
    opt = fusedopt.SGD([p], momentum=0.9, master_bits=24)
    opt.step([np.ones(5, np.float32)])
    before = contents(opt)
    state = opt.state_dict()["state"]["params[0]"]
    broken = {"step": 7, "momentum_buffer": np.full(5, 9, np.float32)}
    broken["residual"] = np.zeros(5, np.float32)
    assert state.keys() == broken.keys()
    with pytest.raises((TypeError, ValueError), match=r"params\[0\].residual: float32"):
        opt.load_state_dict(opt.state_dict() | {"state": {"params[0]": broken}}, convert=convert)
    assert contents(opt) == before


def test_a_small_file_cannot_fill_the_memory(tmp_path):
    """Compressed zeros are refused unread; `save` does not compress."""
    path = tmp_path / "bomb.npz"
    make().save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez_compressed(path, x=np.zeros(10**6), **arrays)
    with pytest.raises(ValueError, match=r"bomb.npz: .*larger than the file"):
        make().load(path)


@pytest.mark.parametrize("steps", [2**62, -1, 10**400])
def test_impossible_step_counts(steps):
    opt = make()
    before = contents(opt)
    with pytest.raises(ValueError, match="state dict: step: must be"):
        opt.load_state_dict(opt.state_dict() | {"step": steps})
    assert contents(opt) == before


@pytest.mark.filterwarnings("ignore")  # of archives with two members of one name, made on purpose
def test_hostile_files(tmp_path):
    """A short run of campaigns/checkpoints.py."""
    campaign = checkpoints.Campaign(tmp_path)
    for seed in range(600):
        campaign.one(10**9 + seed)
    campaign.check_memory()
    assert campaign.taken > 20 and campaign.refused > 300
