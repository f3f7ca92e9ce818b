"""A call that fails in the middle changes nothing; NaN and infinities step as in the reference."""

import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
from campaigns import faults
from cases import CASES, assert_same, takes

import fusedopt
from fusedopt import reference

linux = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replaces glibc's malloc")
unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and limits of processes")
SUFFIXES = [".npz", ".safetensors"]
old_numpy = int(np.__version__.partition(".")[0]) < 2
# if a write fails, NumPy 1 leaves a ZipFile open, which warns when it is collected
left_open = pytest.mark.filterwarnings(
    f"{'ignore' if old_numpy else 'error'}::pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.slow("repeats calls until each allocation has failed")
@linux
@pytest.mark.skipif(old_numpy, reason="NumPy 1 crashes without memory")
@pytest.mark.skipif(shutil.which("cc") is None, reason="compiles a library to preload")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another library replaces malloc")
@pytest.mark.parametrize(
    "malloc",
    [
        "pymalloc",
        pytest.param(
            "malloc",
            marks=pytest.mark.skipif(
                sys.version_info >= (3, 12),
                reason="a generator of CPython 3.12 or 3.13 crashes without memory",
            ),
        ),
    ],
)
def test_every_allocation_fails_once(malloc):
    counts = faults.allocations(malloc)
    if malloc == "pymalloc":
        assert counts["step"] == [0, 0, 0]  # a step allocates nothing
    for name, (failed, raised, late) in counts.items():
        assert late <= 2, name  # once, when a finished step cannot return its result
        # NumPy's products need not have all that they ask for
        assert raised >= (0.7 if name == "step of matrices" else 0.9) * failed, name
        assert malloc == "pymalloc" or failed >= 5, name


@unix
@left_open
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_out_of_disk_space(suffix):
    assert faults.full_disk(suffix, stride=199) > 20


@unix
@left_open
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk(suffix, tmp_path):
    """A real one: a file system of a few pages."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    try:
        path = tmp_path / f"state{suffix}"
        faults.make(1.0, 800).save(path)  # 15 kB: one fits, two do not
        old = path.read_bytes()
        with pytest.raises(OSError, match=rf"state{suffix}|No space"):
            faults.make(2.0, 800).save(path)
        assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow("kills a process again and again")
@unix
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_killed_while_saving(suffix):
    replaced = faults.kills(25, suffix)
    assert replaced <= 25


def test_loading_ones_own_arrays_in_another_order():
    """The arrays of a state dict are the live ones: each is read before it is overwritten."""
    opt = fusedopt.SGD({"a": np.ones(5), "b": np.ones(5)}, lr=0.1, momentum=0.9)
    opt.step({"a": np.full(5, 1.0), "b": np.full(5, 2.0)})
    state = opt.state_dict()
    a, b = state["state"]
    state["state"] = {a: state["state"][b], b: state["state"][a]}
    opt.load_state_dict(state)
    values = [s["momentum_buffer"][0] for s in opt.state.values()]
    assert values == [2.0, 1.0]


@pytest.mark.parametrize(
    ("case", "storage"),
    [
        (case, {} if kind is None else {"state_dtype": kind})
        for case in CASES
        for kind in (None, "bfloat16", "int8")
        if takes(case.cls, kind)
    ],
    ids=str,
)
def test_storms(case, storage):
    """Gradients of mostly NaN, infinities, largest and smallest numbers, then normal ones."""
    finite = np.finfo(np.float32)
    storm = [np.nan, np.inf, -np.inf, finite.max, -finite.max, finite.tiny, 0.0, 1.0]
    rng = np.random.default_rng(0)
    start = rng.standard_normal(4200).astype(np.float32)
    results = []
    for module in (fusedopt, reference):
        p = start.copy()
        opt = getattr(module, case.cls)([p], **case.options | case.class_options, **storage)
        states = []
        for k, value in enumerate(storm):
            grad = np.full(p.shape, value, np.float32)
            grad[k::97] = 1.0
            opt.step([grad])
            states += [p.copy(), *map(np.copy, faults.arrays_of(opt))]
        results.append(states)
    assert_same(*results, [str(i) for i in range(len(results[0]))])
