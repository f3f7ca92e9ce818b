"""State on disk: the bits are those of state in memory, and nothing is lost."""

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import zlib
from functools import lru_cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import ALL_STEP_OPTIONS, EVERY_CLASS, assert_same, swapped

import fusedopt
from fusedopt import _core, _disk, _storage, reference
from fusedopt.formats import Stored
from fusedopt.tune import range_test

resource = pytest.importorskip("resource", reason="needs a Unix system")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs mapped files of a Unix system")

FORMATS = {  # dtype of the parameters, options
    "float32": (np.float32, {}),
    "float64": (np.float64, {}),
    "bfloat16 state": (np.float32, {"state_dtype": "bfloat16"}),
    "int8 state": (np.float32, {"state_dtype": "int8", "min_8bit_size": 100}),
    "bfloat16": (ml_dtypes.bfloat16, {}),
    "bfloat16, 24 bits": (ml_dtypes.bfloat16, {"master_bits": 24, "state_dtype": "bfloat16"}),
    "bfloat16, 16 bits": (ml_dtypes.bfloat16, {"master_bits": 16, "ema": 0.9}),
    "float16": (np.float16, {"ema": 0.5}),
}
MANY = 200  # threads: so many make the pieces of a pass small


@pytest.fixture
def small(monkeypatch):
    """Have small arrays on disk too."""
    monkeypatch.setattr(_disk, "LEAST", 256)


def start(dtype=np.float32):
    """Parameters, of which the first is several pieces of a pass."""
    large, columns = drawn(0, dtype, (300, 1000), (33, 70))
    tiny = np.ones((3, 5), dtype)
    return {"large": large.copy(), "columns": np.asfortranarray(columns), "tiny": tiny}


def gradients(params, seed):
    values = drawn(seed, params["large"].dtype.type, *(p.shape for p in params.values()))
    out = {k: np.empty_like(p) for k, p in params.items()}
    for g, its in zip(out.values(), values, strict=True):
        g[...] = its
    return out


@lru_cache(maxsize=64)
def drawn(seed, dtype, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def parts(opt):
    return {
        f"{leaf}.{name}": part
        for leaf, state in opt.state.items()
        for name, value in state.items()
        if name != "step"
        for part in (value.parts() if isinstance(value, Stored) else [value])
    }


def is_on_disk(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, _core.Mapped)


def same(ours, theirs, params, others):
    assert_same(list(params.values()), list(others.values()), list(params))
    a, b = parts(ours), parts(theirs)
    assert a.keys() == b.keys()
    assert_same(list(a.values()), list(b.values()), list(a))


def fits(cls, dtype, options):
    try:
        cls.rule.check(cls.rule.defaults | options)
    except ValueError:
        return False
    return dtype is not np.float64 or "state_dtype" not in options


@pytest.mark.parametrize(
    ("cls", "form"),
    [(cls, form) for cls in EVERY_CLASS for form, row in FORMATS.items() if fits(cls, *row)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_bits(tmp_path, small, one_blas_thread, cls, form):
    """Each rule in each format: some steps, with all that a step can do around the rule."""
    dtype, options = FORMATS[form]
    options = options | {"ns_steps": 1} if "ns_steps" in cls.rule.defaults else options
    params, others = start(dtype), start(dtype)
    if cls.rule.has_parts:  # takes matrices in row-major order alone
        params["columns"], others["columns"] = (
            np.ascontiguousarray(p["columns"]) for p in (params, others)
        )
    opt = cls(params, **options)
    disk = cls(others, state_dir=tmp_path, threads=MANY, **options)
    if any(part.nbytes > 10**5 for part in parts(opt).values()):
        assert any(map(is_on_disk, parts(disk).values()))
    for step in range(3):
        grads = gradients(params, step)
        how = {"max_grad_norm": 0.5, "stats": True} if step == 1 else {}
        results = [o.step(grads, **how) for o in (opt, disk)]
        assert repr(results[0]) == repr(results[1])
        for state in (parts(opt), parts(disk)):  # which may be written to between steps
            for array in state.values():
                if array.dtype == np.float32 and array.size:
                    array.reshape(-1, order="A")[-1] = 0.5
    same(opt, disk, params, others)
    assert os.listdir(tmp_path) == []  # the file has no name


@pytest.mark.parametrize(
    "how", [ALL_STEP_OPTIONS, {"nonfinite": "skip"}, {"max_grad_norm": 0.1}], ids=str
)
def test_options_of_a_step(tmp_path, small, how):
    params, others = start(), start()
    opt, disk = fusedopt.Adam(params), fusedopt.Adam(others, state_dir=tmp_path, threads=MANY)
    copies = [{k: np.zeros_like(p, np.float16) for k, p in params.items()} for _ in range(2)]
    for step in range(3):
        for o, copy in zip((opt, disk), copies, strict=True):
            grads = gradients(params, step)
            grads["tiny"] = None
            if step == 1:
                grads["columns"][0, 0] = np.nan
            o.step(grads, copy_out=copy, **how)
    same(opt, disk, params, others)
    for k in params:
        assert np.array_equal(copies[0][k], copies[1][k], equal_nan=True)


def test_the_reference(tmp_path, small):
    params, others = start(), start()
    opt = fusedopt.Adam(params, state_dir=tmp_path)
    plain = reference.Adam(others, state_dir=tmp_path)
    for o in (opt, plain):
        o.step(gradients(params, 0))
    assert any(map(is_on_disk, parts(plain).values()))
    same(opt, plain, params, others)


def test_steps_that_are_undone(tmp_path, small):
    """A range test leaves state on disk as it was."""
    params = start()
    opt = fusedopt.Adam(params, state_dir=tmp_path)
    opt.step(gradients(params, 0))
    before = {k: a.copy() for k, a in (parts(opt) | params).items()}
    rates = range_test(
        opt, lambda: (1.0, gradients(params, 1)), start=1e-5, stop=1e-2, steps=10
    ).rates
    assert len(rates) > 1
    for k, a in (parts(opt) | params).items():
        assert np.array_equal(a, before[k]), k


def test_groups_and_averages(tmp_path, small):
    params, others = start(), start()
    opts = [
        fusedopt.AdamW([{"params": [p["large"]]}], ema=0.9, state_dir=folder, threads=2)
        for p, folder in ((params, None), (others, tmp_path))
    ]
    for opt, p in zip(opts, (params, others), strict=True):
        opt.add_param_group({"params": [p["columns"]], "lr": 0.5})
        grads = gradients(p, 0)
        opt.step([[grads["large"]], [grads["columns"]]])
        with opt.swap_ema():
            p["seen"] = p["large"].copy()
    same(*opts, params, others)


def test_parameters_in_mapped_files(tmp_path, small):
    params, others = start(), start()
    for k, p in others.items():
        order = "F" if p.flags.f_contiguous and p.ndim > 1 and not p.flags.c_contiguous else "C"
        mapped = np.memmap(tmp_path / k, p.dtype, "w+", shape=p.shape, order=order)
        mapped[...] = p
        others[k] = mapped
    opt, disk = fusedopt.Adam(params), fusedopt.Adam(others, state_dir=tmp_path / "state")
    for step in range(2):
        grads = gradients(params, step)
        grads["large"].tofile(tmp_path / "grad")
        opt.step(grads)
        grads["large"] = np.memmap(tmp_path / "grad", np.float32, "r", shape=(300, 1000))
        disk.step(grads)
    same(opt, disk, params, others)


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("form", ["float32", "int8 state", "bfloat16"])
def test_checkpoints(tmp_path, small, monkeypatch, suffix, form):
    """Files have the same bytes, and load into either kind."""
    monkeypatch.setattr("fusedopt._checkpoint._PIECE", 10_000)
    dtype, options = FORMATS[form]
    makers = {"memory": {}, "disk": {"state_dir": tmp_path / "state"}}
    files = {}
    for name, where in makers.items():
        params = start(dtype)
        opt = fusedopt.Adam(params, **options, **where)
        opt.step(gradients(params, 0))
        opt.save(tmp_path / f"{name}{suffix}", params=True)
        files[name] = (tmp_path / f"{name}{suffix}").read_bytes()
    assert files["memory"] == files["disk"]
    for where in makers.values():
        others = start(dtype)
        other = fusedopt.Adam(others, **options, **where)
        other.step(gradients(params, 5))
        other.load(tmp_path / f"disk{suffix}")
        same(opt, other, params, others)
        other.step(gradients(params, 1))
    opt.step(gradients(params, 1))
    same(opt, other, params, others)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_damaged_files(tmp_path, small, suffix):
    params = start()
    opt = fusedopt.Adam(params, state_dir=tmp_path)
    opt.step(gradients(params, 0))
    path = tmp_path / f"x{suffix}"
    opt.save(path, params=True)
    whole = path.read_bytes()
    before = {k: a.copy() for k, a in (parts(opt) | params).items()}
    for end in [0, 1, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=f"x{suffix}: not a checkpoint"):
            opt.load(path)
    if suffix == ".npz":
        broken = bytearray(whole)
        broken[len(whole) // 2] ^= 1
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="its sum is wrong"):
            opt.load(path)
    for k, a in (parts(opt) | params).items():
        assert np.array_equal(a, before[k]), k
    path.write_bytes(whole)
    opt.load(path)


def test_state_dicts(tmp_path, small):
    params, others = start(), start()
    opt, disk = fusedopt.Adam(params), fusedopt.Adam(others, state_dir=tmp_path)
    opt.step(gradients(params, 0))
    disk.load_state_dict(opt.state_dict())
    assert_same(list(parts(opt).values()), list(parts(disk).values()), list(parts(opt)))
    opt.load_state_dict(disk.state_dict())
    assert not any(map(is_on_disk, parts(opt).values()))


# ------------------------------------------------------------------ faults


@pytest.mark.parametrize("value", [3, 1.5, ["x"]])
def test_what_is_no_path(value):
    with pytest.raises(TypeError, match="state_dir: expected a path"):
        fusedopt.Adam([np.ones(3)], state_dir=value)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        fusedopt.Adam([np.ones(3)], state_dir=tmp_path / "file")


def test_other_systems(monkeypatch, tmp_path):
    monkeypatch.setattr(_disk.os, "name", "nt")
    with pytest.raises(NotImplementedError, match="state_dir: needs Linux or another Unix"):
        _disk.Disk(str(tmp_path))


def test_without_posix_fallocate(monkeypatch, tmp_path, small):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    params, others = start(), start()
    opt, disk = fusedopt.Adam(params), fusedopt.Adam(others, state_dir=tmp_path)
    for o in (opt, disk):
        o.step(gradients(params, 0))
    same(opt, disk, params, others)


def test_a_file_system_where_files_have_names(tmp_path, small, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    params = start()
    fusedopt.Adam(params, state_dir=tmp_path).step(gradients(params, 0))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_folder_that_takes_no_files():
    with pytest.raises(OSError, match="'/proc/self'$"):
        fusedopt.Adam(start(), state_dir="/proc/self")


def test_a_full_disk(tmp_path, small, monkeypatch):
    """The error names the folder, and comes before anything is there."""
    params = start()
    opt = fusedopt.Adam([{"params": [params["tiny"]]}], state_dir=tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no space for [\d,]+ bytes of state.*" + tmp_path.name):
        opt.add_param_group({"params": [params["large"]]})
    assert len(opt.param_groups) == 1
    opt.step([[np.ones((3, 5), np.float32)]])


def run(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, **kwargs
    )


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate here")
def test_a_limit_of_the_system(tmp_path):
    """What the system refuses is an error, and no signal."""
    done = run(f"""
        import resource, numpy as np, fusedopt
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, 1 << 22))
        try:
            fusedopt.Adam([np.ones(1 << 22, np.float32)], state_dir={str(tmp_path)!r})
        except OSError as exc:
            assert exc.filename == {str(tmp_path)!r}, exc
            print("refused")
        """)
    assert done.stdout == "refused\n", done


@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.LAMB, fusedopt.Prodigy])
def test_a_disk_that_does_not_read(tmp_path, small, cls):
    """Nothing is lost by what fails before the first write."""
    params, others = start(), start()
    opt, disk = cls(params), cls(others, state_dir=tmp_path)
    undo = swapped(disk, lambda _: ("/dev/null", os.O_RDONLY))
    with pytest.raises(OSError, match=str(tmp_path)):
        disk.step(gradients(params, 0))
    undo()
    for step in range(2):
        for o in (opt, disk):
            o.step(gradients(params, step))
    same(opt, disk, params, others)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_disk_that_does_not_write(tmp_path, small):
    """The optimizer refuses to go on or to replace a checkpoint, until it has loaded one."""
    params, others = start(), start()
    opt, disk = fusedopt.Adam(params), fusedopt.Adam(others, state_dir=tmp_path)
    for o in (opt, disk):
        o.step(gradients(params, 0))
    disk.save(tmp_path / "x.npz", params=True)
    before = (tmp_path / "x.npz").read_bytes()
    undo = swapped(disk, lambda number: (f"/proc/self/fd/{number}", os.O_RDONLY))
    with pytest.raises(OSError, match=str(tmp_path)):
        disk.step(gradients(params, 1))
    undo()
    with pytest.raises(RuntimeError, match="load a checkpoint of both"):
        disk.step(gradients(params, 1))
    with pytest.raises(RuntimeError, match="load a checkpoint of both"):
        disk.save(tmp_path / "x.npz", params=True)
    assert (tmp_path / "x.npz").read_bytes() == before
    disk.load(tmp_path / "x.npz")
    for o in (opt, disk):
        o.step(gradients(params, 1))
    same(opt, disk, params, others)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_child_of_a_fork(tmp_path, small):
    params = start()
    opt = fusedopt.Adam(params, state_dir=tmp_path)
    opt.step(gradients(params, 0))
    before = {k: a.copy() for k, a in parts(opt).items()}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            opt.step(gradients(params, 1))
        except RuntimeError as exc:
            status = "of which this one is a fork" not in str(exc)
        del opt  # which leaves the parent's file as it is
        gc.collect()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    for k, a in parts(opt).items():
        assert np.array_equal(a, before[k]), k


def test_a_killed_process_leaves_nothing(tmp_path):
    path = tmp_path / "x.npz"
    code = f"""
        import numpy as np, fusedopt
        params = [np.ones(3_000_000, np.float32)]
        opt = fusedopt.Adam(params, state_dir={str(tmp_path / "state")!r})
        opt.step([np.ones(3_000_000, np.float32)])
        opt.save({str(path)!r}, params=True)
        print("saved", flush=True)
        while True:
            opt.step([np.ones(3_000_000, np.float32)])
        """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"saved\n"
        process.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path / "state") == []
    p = [np.ones(3_000_000, np.float32)]
    opt, twin = fusedopt.Adam(p, state_dir=tmp_path / "state"), [np.ones(3_000_000, np.float32)]
    opt.load(path)
    fusedopt.Adam(twin).step([np.ones(3_000_000, np.float32)])
    assert np.array_equal(p[0], twin[0])


@pytest.mark.slow("writes hundreds of megabytes")
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA"), reason="needs a limit of memory")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another library replaces malloc")
def test_more_state_than_memory(tmp_path):
    """State is three times what the process may use, and what is resident within the window."""
    done = run(f"""
        import resource, zlib
        import numpy as np, fusedopt
        from fusedopt import _core

        def status(name):
            line = next(x for x in open("/proc/self/status") if x.startswith(name))
            return 1024 * int(line.split()[1])

        n, room = 1 << 25, 192 << 20
        params, grads = [np.ones(n, np.float32)], [np.ones(n, np.float32)]
        options = dict(amsgrad=True, ema=0.9, threads=2)  # 512 MiB, and 128 of the parameters
        fusedopt.Adam([np.ones(100_000, np.float32)], threads=2).step(
            [np.ones(100_000, np.float32)])  # starts the threads
        used = status("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
        try:
            fusedopt.Adam(params, **options)
            raise SystemExit("there is enough memory")
        except MemoryError:
            pass
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # forget the largest size
        opt = fusedopt.Adam(params, state_dir={str(tmp_path)!r}, **options)
        for _ in range(2):
            opt.step(grads)
        opt.save({str(tmp_path / "x.npz")!r}, params=True)
        opt.load({str(tmp_path / "x.npz")!r})
        opt.step(grads)
        most = status("VmHWM") - before
        assert most < _core.WINDOW, most
        print(most >> 20, *(zlib.crc32(a) for a in (params[0], *(
            opt.state["params[0]"][k] for k in ("exp_avg", "exp_avg_sq", "ema")))))
        """)
    assert done.returncode == 0, done.stderr
    params, grads = [np.ones(1 << 25, np.float32)], [np.ones(1 << 25, np.float32)]
    opt = fusedopt.Adam(params, amsgrad=True, ema=0.9)
    for _ in range(3):
        opt.step(grads)
    state = opt.state["params[0]"]
    sums = [
        zlib.crc32(a) for a in (params[0], *(state[k] for k in ("exp_avg", "exp_avg_sq", "ema")))
    ]
    assert [int(x) for x in done.stdout.split()[1:]] == sums


def test_large_arrays_alone():
    """Small ones stay in memory: each on disk would cost a request."""
    large, small = _disk.LEAST // 4, _disk.LEAST // 4 - 1
    assert _disk.on_disk(((large,), np.float32, (4,)))
    assert not _disk.on_disk(((small,), np.float32, (4,)))
    assert not _disk.on_disk(((large,), np.float32, None))  # of another shape than its parameter
    assert _storage.make_arrays([], None) == []


def test_the_page_of_the_documentation(monkeypatch, tmp_path):
    """Its Python blocks, one after the other, as a reader would run them."""
    page = Path(__file__).parent.parent / "docs/disk.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    assert len(blocks) == 2
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    exec(compile("\n".join(blocks), str(page), "exec"), {})
