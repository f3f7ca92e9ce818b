"""Files: exact round trips, damage refused, the old file never lost."""

import copy
import json
import os
import pickle
import signal
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
from campaigns import checkpoints
from cases import CLASSES, assert_same

import fusedopt
from fusedopt import _checkpoint, reference

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
    with pytest.raises(ValueError, match="not a checkpoint of fusedopt.*no metadata of fusedopt"):
        make().load(path)
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    array = path.read_bytes()
    for content in (array, array[:1], b"x", b""):  # NumPy would advise to unpickle some of these
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a checkpoint of fusedopt.*no archive of arrays"):
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
    with pytest.raises(ValueError, match=r"sgd.npz: state dict: of SGD, and this .* is Adam"):
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
    """If anything fails before the rename, the old file is complete and no other file is left."""
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
    assert os.umask(before) == before
    path.chmod(0o600)
    make().save(path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("convert", [False, True])
def test_state_that_cannot_be_converted_changes_nothing(convert):
    """The last array does not fit; those before it have not been copied."""
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


@pytest.mark.filterwarnings("ignore")  # some archives have two members of one name on purpose
def test_hostile_files(tmp_path):
    """A short run of campaigns/checkpoints.py."""
    campaign = checkpoints.Campaign(tmp_path)
    for seed in range(600):
        campaign.one(10**9 + seed)
    campaign.check_memory()
    assert campaign.loaded > 20 and campaign.refused > 300


# ------------------------------------------------------------------ files hold all valid options

NAMES = [cls.__name__ for cls in CLASSES]


def unusual(value):
    """Other forms of an option's value that a step accepts: NumPy's scalars, arrays, lists."""
    if isinstance(value, bool):
        return [np.bool_(value)]
    if isinstance(value, int):
        return [np.int64(value)]
    if isinstance(value, float):
        whole = [int(value)] if value.is_integer() else []
        return [np.float32(value), np.float64(value), np.array(value), *whole]
    if isinstance(value, tuple):
        return [list(value), [np.float32(x) for x in value], tuple(np.array(x) for x in value)]
    return [value]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("cls", NAMES)
def test_options_of_any_numeric_type(tmp_path, cls, suffix):
    """Each option in each form that a step accepts: a saved and loaded run continues equally."""
    p = np.linspace(-1, 1, 50, dtype=np.float32)
    make = getattr(fusedopt, cls)
    for name, default in make(p.copy()).param_groups[0].items():
        if name in ("params", "state_dtype", "master_bits", "ema", "train_mode"):
            continue
        for value in unusual(default):
            params = [p.copy(), p.copy()]
            opts = [make([param]) for param in params]
            opts[0].param_groups[0][name] = value
            opts[0].step([p])
            opts[0].save(tmp_path / f"x{suffix}")
            params[1][...] = params[0]
            opts[1].load(tmp_path / f"x{suffix}")
            for opt in opts:
                opt.step([p])
            assert_same(params[:1], params[1:], [f"{name}={value!r}"])
            assert contents(opts[0]) == contents(opts[1])


SWITCHED_OFF = [  # class, state, options when made, options set later that do not use the state
    (cls.__name__, state.name, {state.needs: type(default)(0.9)}, {state.needs: type(default)(0)})
    for cls in CLASSES
    for state in cls.rule.states
    if state.needs and not state.fixed_by
    for default in [cls.rule.defaults[state.needs]]
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("cls", "state", "made", "then"), SWITCHED_OFF, ids=str)
def test_options_switched_off(tmp_path, cls, state, made, then, suffix):
    """Unused state is in the file, and the optimizer that loads it may lack that state."""
    path, g = tmp_path / f"x{suffix}", [np.ones(4), np.ones((2, 3))]
    params = [np.ones(4), np.ones((2, 3))]
    opt = getattr(fusedopt, cls)(params, **made)
    opt.step(g)
    opt.param_groups[0].update(then)
    opt.step(g)
    opt.save(path)
    for options in (then, made):
        others = [p.copy() for p in params]
        other = getattr(fusedopt, cls)(others, **options)
        other.load(path)
        assert other.param_groups[0] == {**opt.param_groups[0], "params": others}
        other.step(g)
        twins = [p.copy() for p in params]
        twin = getattr(fusedopt, cls)(twins, **made)
        twin.load(path)
        twin.step(g)
        assert_same(others, twins, ["0", "1"])
    opt.param_groups[0].update(made)
    opt.save(path)
    with pytest.raises(ValueError, match=f"that this optimizer does not have: {state}"):
        getattr(fusedopt, cls)(params, **then).load(path)


@pytest.mark.parametrize(("cls", "state", "made", "then"), SWITCHED_OFF, ids=str)
def test_options_that_were_never_on(tmp_path, cls, state, made, then):
    """State that the file lacks and its options do not use gets its initial value."""
    path = tmp_path / "x.npz"
    getattr(fusedopt, cls)([np.ones(4)], **then).save(path)
    opt = getattr(fusedopt, cls)([np.ones(4)], **made)
    opt.step([np.ones(4)])
    opt.load(path)
    assert then.items() <= opt.param_groups[0].items()
    assert not opt.state["params[0]"][state].any()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["a" * 70_000, "a\0b", "\ud800"], ids=["long", "nul", "surrogate"])
def test_names_that_no_file_can_hold(tmp_path, name, suffix):
    class Key(str):
        __repr__ = str.__str__

    opt = fusedopt.Adam({Key(name): np.ones(2)})
    with pytest.raises(ValueError, match="cannot name an array in a file; use other dict keys"):
        opt.save(tmp_path / f"x{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, -1.0, "fast", None])
def test_an_invalid_rate(tmp_path, value):
    """A checkpoint gets the last valid rate; a load replaces the invalid one."""
    path = tmp_path / "x.npz"
    opt = make(lr=0.25)
    opt.param_groups[0]["lr"] = value
    with pytest.raises((ValueError, TypeError), match="lr"):
        opt.step({name: None for name in opt.param_groups[0]["params"]})
    opt.save(path)
    other = make(lr=0.5)
    other.load(path)
    assert other.param_groups[0]["lr"] == 0.25
    opt.load(path)
    assert opt.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("name", "options", "changed"),
    [
        ("AdamW", {"row_steps": True}, {"cautious": True}),  # valid alone, but not together
        ("Adam", {"row_steps": True}, {"row_steps": False}),
        ("Adam", {}, {"amsgrad": True}),  # without its array
        ("Adam", {}, {"ema": 0.9}),
        ("Adam", {"state_dtype": "bfloat16"}, {"state_dtype": "int8", "eps": -1.0}),
        ("Adagrad", {"rowwise": True}, {"rowwise": False}),
        ("Prodigy", {"slice_p": 3}, {"slice_p": 1}),
    ],
)
def test_options_that_no_step_takes(tmp_path, name, options, changed):
    """A checkpoint gets those of the last step, and the rate; what the rule remembers is kept."""
    path, grad = tmp_path / "x.npz", np.ones((3, 2), np.float32)
    opt, other = (getattr(fusedopt, name)(np.ones((3, 2), np.float32), **options) for _ in "12")
    opt.step(grad)
    known = dict(opt.param_groups[0])
    opt.param_groups[0] |= {"lr": 0.125} | changed
    with pytest.raises(ValueError):
        opt.step(grad)
    opt.save(path, params=True)
    for loaded in (other, opt):
        loaded.load(path)
        assert loaded.param_groups[0] | {"params": None} == known | {"lr": 0.125, "params": None}
        loaded.step(grad)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("saved", NAMES)
def test_the_file_of_another_class(tmp_path, saved, suffix):
    path = tmp_path / f"x{suffix}"
    getattr(fusedopt, saved)([np.ones(2)]).save(path)
    for cls in NAMES:
        for module in (fusedopt, reference):
            opt = getattr(module, cls)([np.ones(2)])
            if cls == saved:
                opt.load(path)
                continue
            before = repr(opt)
            with pytest.raises(
                ValueError, match=f"x{suffix}: state dict: of {saved}, and .* {cls};"
            ):
                opt.load(path)
            assert repr(opt) == before

    class Mine(getattr(fusedopt, saved)):
        """A subclass has the rule of its base."""

    Mine([np.ones(2)]).load(path)


ORDERS = {
    "C": lambda a: a.copy(),
    "F": np.asfortranarray,
    "mixed": lambda a: a.transpose(1, 2, 0).copy().transpose(2, 0, 1),
}


COPIES = {
    "dict": lambda state: state,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("suffix", [*SUFFIXES, *COPIES])
@pytest.mark.parametrize("state_dtype", ["int8", "bfloat16", None])
@pytest.mark.parametrize("there", ORDERS)
@pytest.mark.parametrize("here", ORDERS)
def test_state_of_other_memory_orders(tmp_path, here, there, state_dtype, suffix):
    """8-bit blocks follow the memory: in another order they are encoded again, or refused."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((8, 12, 10)).astype(np.float32)
    grad = start * np.logspace(-3, 0, 8, dtype=np.float32)[:, None, None]
    p, q = ORDERS[here](start), ORDERS[there](start)
    options = {"state_dtype": state_dtype, "min_8bit_size": 0}
    opt, other = fusedopt.Adam([p], **options), fusedopt.Adam([q], **options)
    for _ in range(3):
        opt.step([ORDERS[here](grad)])
    if suffix not in COPIES:
        opt.save(tmp_path / f"x{suffix}")

    def load(**how):
        if suffix in COPIES:
            other.load_state_dict(COPIES[suffix](opt.state_dict()), **how)
        else:
            other.load(tmp_path / f"x{suffix}", **how)

    if state_dtype == "int8" and here != there:
        with pytest.raises(ValueError, match="blocks of 64 follow the memory order"):
            load()
        load(convert=True)
        rough = 0.3
    else:
        load()
        rough = 0
    for name in ("exp_avg", "exp_avg_sq"):
        ours, theirs = (o.state["params[0]"][name] for o in (opt, other))
        if state_dtype is not None:
            ours, theirs = ours.decode(), theirs.decode()
        np.testing.assert_allclose(theirs, ours, rtol=rough, atol=rough * np.abs(ours).max() / 1e3)


# ------------------------------------------------------------------ many arrays


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_many_small_arrays(tmp_path, suffix):
    """They share members; large arrays do not."""
    path = tmp_path / f"x{suffix}"

    def many(seed):
        rng = np.random.default_rng(seed)
        params = [
            rng.standard_normal((i % 3, 2)).astype("f4f8"[i % 2 * 2 :][:2]) for i in range(700)
        ]
        params += [np.asfortranarray(rng.standard_normal((40, 30))), np.ones(())]
        opt = fusedopt.Adam(params, state_dtype=None)
        opt.step([rng.standard_normal(p.shape).astype(p.dtype) for p in params])
        return opt

    opt, other = many(0), many(1)
    opt.save(path)
    other.load(path)
    assert contents(opt) == contents(other)
    arrays, meta = _checkpoint.read(path)
    if suffix == ".npz":
        with zipfile.ZipFile(path) as file:
            assert len(file.namelist()) == 1 + 2 + 2  # metadata, two dtypes, two large arrays
    for damage in (
        lambda rows: rows.pop(),
        lambda rows: rows.append(["x", [1]]),
        lambda rows: rows[0].__setitem__(1, [-1]),
        lambda rows: rows[0].__setitem__(1, "many"),
        lambda rows: rows[0].__setitem__(1, [2**70]),
    ):
        small = {"small:<f4": [[name, list(a.shape)] for name, a in arrays.items()]}
        flat = {"small:<f4": np.zeros(sum(a.size for a in arrays.values()), "f4")}
        damage(small["small:<f4"])
        text = json.dumps({"version": 1, "small": small, **meta})
        with open(path, "wb") as file:
            _checkpoint._WRITERS[suffix](file, flat, text)
        before = contents(other)
        with pytest.raises(ValueError, match=f"x{suffix}: "):
            other.load(path)
        assert contents(other) == before


def test_safetensors_reads_what_we_write(tmp_path):
    """The reader of safetensors finds every array, in C order, aligned."""
    numpy = pytest.importorskip("safetensors.numpy")
    opt = make()
    opt.save(tmp_path / "x.safetensors")
    read = numpy.load_file(tmp_path / "x.safetensors")
    arrays, _ = _checkpoint.pack(opt.state_dict())
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].flags.c_contiguous
        assert np.array_equal(read[name], array)
    head = (tmp_path / "x.safetensors").read_bytes()
    assert int.from_bytes(head[:8], "little") % 8 == 0


# ------------------------------------------------------------------ places


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_save_goes_through_links(tmp_path, suffix):
    disk = tmp_path / "disk"
    disk.mkdir()
    target, link = disk / f"run{suffix}", tmp_path / f"latest{suffix}"
    link.symlink_to(target)  # the file does not exist yet
    make().save(link)
    assert link.is_symlink() and target.is_file()
    before = target.read_bytes()
    make(seed=1).save(link)
    assert link.is_symlink() and target.read_bytes() != before
    assert os.listdir(disk) == [target.name]
    loop = tmp_path / f"loop{suffix}"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match=f"loop{suffix}"):
        make().save(loop)
    assert loop.is_symlink()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_save_refuses_what_it_must_not_replace(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    make().save(path)
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(PermissionError, match=rf"read-only file.*x{suffix}"):
        make(seed=1).save(path)
    assert path.read_bytes() == before
    path.chmod(0o644)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=f"not a regular file.*x{suffix}"):
        make().save(path)
    assert os.listdir(tmp_path) == [path.name] and not os.listdir(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.timeout(20)
def test_pipes_are_refused(tmp_path, suffix):
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"pipe{suffix}: not a regular file"):
        make().load(path)
    with pytest.raises(OSError, match=f"not a regular file.*pipe{suffix}"):
        make().save(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_leftovers_of_killed_saves(tmp_path, suffix, monkeypatch):
    """The next save to the same path removes them, but not the file of a running save."""
    path, ready = tmp_path / f"x{suffix}", tmp_path / "ready"
    opt = make()
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "fsync", lambda _: (ready.touch(), time.sleep(60)))
        opt.save(path)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    other = tmp_path / f".y{suffix}.0123456789abcdef.tmp"  # of another path
    other.write_bytes(b"x")
    opt.save(path)
    left = set(os.listdir(tmp_path)) - {path.name, ready.name, other.name}
    assert len(left) == 1
    empty = tmp_path / f".x{suffix}.0123456789abcdef.tmp"  # of a save killed at once
    empty.touch()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    opt.save(path)
    assert set(os.listdir(tmp_path)) == {path.name, ready.name, other.name}


# ------------------------------------------------------------------ parameters


def params_of(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "W": rng.standard_normal((9, 7)).astype(dtype),
        "F": np.asfortranarray(rng.standard_normal((4, 3)).astype(dtype)),
        "scalar": np.array(seed, dtype),
        "empty": np.ones((0, 3), dtype),
    }


KINDS = {
    "float32": (np.float32, {}),
    "float64": (np.float64, {"ema": 0.5}),
    "float16": (np.float16, {}),
    "bfloat16": (ml_dtypes.bfloat16, {}),
    "bfloat16, 16 bits": (ml_dtypes.bfloat16, {"master_bits": 16, "state_dtype": "int8"}),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters(tmp_path, kind, suffix):
    """A file has both parts, or one; those of both are of one step."""
    dtype, options = KINDS[kind]
    path, plain = tmp_path / f"x{suffix}", tmp_path / f"plain{suffix}"
    params, others = params_of(dtype), params_of(dtype, seed=1)
    opt, other = (fusedopt.Adam(p, **options) for p in (params, others))
    grads = {k: p * dtype(0.5) + dtype(1) for k, p in params.items()}
    grads["scalar"] = np.array(grads["scalar"])
    opt.step(grads)
    other.step(params_of(dtype, seed=3))
    opt.save(path, params=True)
    opt.save(plain)
    before, states = [{k: a.copy() for k, a in others.items()}, contents(other)], contents(opt)
    assert states != before[1]
    other.load(path, params=False)  # the state alone
    assert contents(other) == states
    assert_same(list(others.values()), list(before[0].values()), list(others))
    arrays = dict(others)
    for how in ({}, {"params": True}):
        for a in others.values():
            a[...] = 0
        other.load(path, **how)
        assert_same(list(params.values()), list(others.values()), list(params))
        assert all(others[k] is a for k, a in arrays.items())
    opt.step(grads)
    other.step(grads)
    assert_same(list(params.values()), list(others.values()), list(params))
    with pytest.raises(ValueError, match=rf"plain{suffix}: has no parameters"):
        other.load(plain, params=True)
    other.load(plain)
    assert_same(list(params.values()), list(others.values()), list(params))
    assert contents(other) == states
    with pytest.raises(TypeError, match="params: expected True or False"):
        opt.save(path, params="yes")
    with pytest.raises(TypeError, match="params: expected True or False"):
        opt.load(path, params="yes")


def test_parameters_of_8_bits(tmp_path):
    """Blocks follow the memory order, which a file keeps."""
    values = np.linspace(-2, 3, 12 * 70, dtype=np.float32).reshape(12, 70)

    def made(order):
        data = np.zeros((12, 70), np.uint8, order=order)
        stored = fusedopt.formats.Stored("int8", data, np.zeros(-(-12 * 70 // 64), np.uint8))
        stored.encode(np.array(values, order=order))
        return stored, fusedopt.SGD([stored])

    for order, other in (("C", "F"), ("F", "C")):
        stored, opt = made(order)
        twin, opt_twin = made(order)
        opt.step([values.copy(order)])
        opt.save(tmp_path / "x.npz", params=True)
        opt_twin.load(tmp_path / "x.npz")
        assert np.array_equal(stored.decode(), twin.decode())
        before, opt_before = made(other)
        codes = before.data.copy()
        with pytest.raises(ValueError, match=r"x.npz: params\[0\]: its blocks follow the memory"):
            opt_before.load(tmp_path / "x.npz")
        assert np.array_equal(before.data, codes)


OTHERS = {
    "shape": (
        lambda p: p | {"W": np.zeros((7, 9), np.float32)},
        r"params\['W'\].*\[9, 7\].*\[7, 9\]",
    ),
    "dtype": (lambda p: {k: a.astype(np.float16) for k, a in p.items()}, r"params\['W'\]"),
    "name": (lambda p: {"V": p.pop("W"), **p}, r"missing \[\"params\['V'\]\"\], unexpected"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("other", OTHERS)
def test_parameters_that_do_not_fit(tmp_path, other, suffix):
    """The error names the leaf, and nothing has changed: neither parameters nor state."""
    change, message = OTHERS[other]
    path, params = tmp_path / f"x{suffix}", params_of(np.float32)
    opt = fusedopt.SGD(params, momentum=0.9)
    opt.step(params_of(np.float32, seed=2))
    opt.save(path, params=True)
    others = change(params_of(np.float32, seed=1))
    opt = fusedopt.SGD(others, momentum=0.9)
    before = {k: a.copy() for k, a in others.items()}, contents(opt)
    with pytest.raises(ValueError, match=rf"x{suffix}: .*{message}"):
        opt.load(path)
    assert contents(opt) == before[1]
    assert_same(list(others.values()), list(before[0].values()), list(others))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parameters_whose_dtype_alone_differs(tmp_path, suffix):
    """State of both kinds fits both, parameters do not, and `convert` does not change that."""
    path, p = tmp_path / f"x{suffix}", [np.ones(5, np.float32)]
    fusedopt.SGD(p).save(path, params=True)
    q = [np.zeros(5, np.float64)]
    for convert in (False, True):
        with pytest.raises(ValueError, match=rf"x{suffix}: params\[0\]: float32.* float64"):
            fusedopt.SGD(q).load(path, convert=convert)
    assert not q[0].any()
    fusedopt.SGD(q).load(path, params=False)


def test_an_average_that_there_is_no_place_for(tmp_path):
    path = tmp_path / "x.npz"
    fusedopt.SGD([np.ones(5)], ema=0.9).save(path)
    with pytest.raises(ValueError, match=r"params\[0\] should have step; it has step, ema; make"):
        fusedopt.SGD([np.ones(5)]).load(path)


def test_parameters_within_swap_ema(tmp_path):
    """The averages are in their place then: neither is saved nor loaded."""
    opt = fusedopt.SGD([np.ones(5)], ema=0.9)
    opt.save(tmp_path / "x.npz", params=True)
    with opt.swap_ema():
        for call in (opt.save, opt.load):
            with pytest.raises(RuntimeError, match="leave the block of swap_ema first"):
                call(tmp_path / "x.npz", params=True)
