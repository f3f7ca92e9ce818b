"""No memory, no disk space, a killed process: a call that fails in the middle has changed nothing.

    python tests/campaigns/faults.py [kills]

Allocations: in a process with native/nomemory.c preloaded, the first, second, ... allocation of
a call fails, until the call succeeds; PYTHONMALLOC=malloc makes each object an allocation.
Disk: the file may not grow beyond 0, 5, 10, ... bytes. Process: SIGKILL at any moment of `save`.
"""

import ctypes
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fusedopt
from fusedopt import _core
from fusedopt.formats import Stored

NATIVE = Path(__file__).parent.parent / "native"


def make(fill=1.0, size=700):
    params = [np.full(size, fill, np.float32), np.full(33, fill, np.float16), np.full(5, fill)]
    opt = fusedopt.Adam(params, amsgrad=True)
    opt.step([np.full(p.shape, fill, p.dtype) for p in params])
    return opt


def contents(opt):
    found = [opt.state_dict()["step"], len(opt.param_groups)]
    for group in opt.param_groups:
        found += [p.tobytes() for p in group["params"]]
        found += [value for name, value in group.items() if name != "params"]
    for state in opt.state.values():
        found += [a for key, a in state.items() if key == "step"]
    return found + [a.tobytes() for a in arrays_of(opt)]


# ---------------------------------------------------------------- memory


def preload(folder):
    """Compile nomemory.c; return the path of the library."""
    library = Path(folder) / "nomemory.so"
    compiler = os.environ.get("CC", "cc")
    source = NATIVE / "nomemory.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return library


def matrices():
    return [np.ones((9, 70)), np.ones((30, 4), np.float32)]


def counting():
    """Rows that have taken many different numbers of steps, of which none is kept by CPython."""
    opt = fusedopt.Adam([np.ones((700, 2), np.float32), np.ones((9, 70))], row_steps=True)
    for state in opt.state.values():
        state["row_step"][:, 0] = 1000 + np.arange(len(state["row_step"]))
    return opt


def some_rows():
    index = np.array([5, 2, 5])
    return [np.ones((700, 2), np.float32), fusedopt.Rows(index, np.ones((3, 70)))]


def stepping(grads, make=make):
    """A step, the contents that it changes, and those of a twin that has enough memory."""
    opt, twin = make(), make()

    def whole():
        twin.step(grads)
        return contents(twin)

    return lambda: opt.step(grads), lambda: contents(opt), whole


def calls(folder):
    """Name -> a call that allocates, contents that a failure keeps, and maybe those of success."""
    path, full = Path(folder, "state.npz"), Path(folder, "full.npz")
    opt, other, grown = make(), make(2.0), make()
    summed = fusedopt.Adagrad([np.ones(9, np.float32)], state_dtype="bfloat16")
    opt.save(path)
    other.save(full)
    grads = [np.ones(700, np.float64), np.ones(33, np.float32), np.ones(5, np.float32)]
    laid = [np.ones(1400, np.float32)[::2], None, np.ones(10)[::2]]  # copied first
    params = [np.ones(40_000, np.float32) for _ in range(3)]

    def files():
        return {name: Path(folder, name).read_bytes() for name in os.listdir(folder)}

    def saved():
        return {"state.npz": full.read_bytes(), "full.npz": full.read_bytes()}

    return {
        "make": (
            lambda: fusedopt.AdamW(params, state_dtype="int8"),
            lambda: [p.tobytes() for p in params],
        ),
        "add_param_group": (
            lambda: grown.add_param_group({"params": [np.ones(9), np.ones(5000)]}),
            lambda: contents(grown),
        ),
        "add_param_group, state not zero": (
            lambda: summed.add_param_group(
                {"params": [np.ones(5000, np.float32)], "initial_accumulator_value": 0.1}
            ),
            lambda: contents(summed),
        ),
        "step": stepping(grads),
        "step with copies": stepping(laid),
        "step of matrices": stepping(matrices(), lambda: fusedopt.Muon(matrices())),
        "step of factors": stepping(matrices(), lambda: fusedopt.Adafactor(matrices())),
        "step of an estimate": stepping(matrices(), lambda: fusedopt.Prodigy(matrices())),
        "step of rows": stepping(some_rows(), counting),
        "load": (lambda: opt.load(full), lambda: contents(opt)),
        "save": (lambda: other.save(path), files, saved),
    }


def fail_allocations(folder):
    """In the preloaded process: print, for each call, how many allocations were made to fail."""
    library = ctypes.CDLL(None)
    arm, left = library.nomemory_arm, library.nomemory_left
    arm.argtypes, left.restype = [ctypes.c_long], ctypes.c_long
    counts = {}
    for name, (call, watch, *whole) in calls(folder).items():
        n = remaining = raised = late = 0
        while remaining <= 0 and n < 100_000:  # until it has no n-th allocation
            before, error = watch(), None
            try:
                arm(n)
                call()
            except Exception as exc:  # without memory, Python and NumPy may raise anything
                error = repr(exc)
            finally:
                remaining = 1 + left()
            raised += error is not None
            after = watch()
            if whole and after != before:  # all was done, but returning the result may have failed
                late += error is not None
                before = whole[0]()
            may_differ = error is None and not whole
            assert may_differ or after == before, f"{name}: allocation {n}, {error}"
            n += 1
        counts[name] = [n - 1, raised, late]
    print(json.dumps(counts))


def allocations(malloc="malloc"):
    """Name of the call -> allocations made to fail, how often it raised, how often when done."""
    with tempfile.TemporaryDirectory() as folder:
        library = preload(folder)
        work = Path(folder, "work")
        work.mkdir()
        env = os.environ | {"LD_PRELOAD": str(library), "PYTHONMALLOC": malloc}
        if _core.backend() == "openmp":  # libgomp ends the process if it gets no memory
            env["FUSEDOPT_NUM_THREADS"] = "1"
        done = subprocess.run(
            [sys.executable, __file__, "allocations", work],
            env=env, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


# ---------------------------------------------------------------- disk


def limited_save(opt, path, limit):
    """Save with a limit on the size of files, in bytes; return the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        opt.save(path)
    except OSError as exc:
        return exc
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return None


def full_disk(suffix, stride):
    """Save with less disk space than needed, from 0 bytes on; return how many saves failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"state{suffix}")
        make(1.0).save(path)
        old, new = path.read_bytes(), make(2.0)
        failed = 0
        for limit in range(0, len(old), stride):
            error = limited_save(new, path, limit)
            assert error is not None and path.name in str(error), (limit, error)
            assert path.read_bytes() == old and os.listdir(folder) == [path.name], limit
            failed += 1
        assert limited_save(new, path, 2 * len(old)) is None
        assert path.read_bytes() != old
        return failed


# ---------------------------------------------------------------- process


def kills(count, suffix, seed=0):
    """Kill a child that saves again and again; return how many of its files were replaced."""
    r = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"state{suffix}")
        old, new, reader = make(1.0, 50_000), make(2.0, 50_000), make(0.0, 50_000)
        states = [[a.tobytes() for a in arrays_of(opt)] for opt in (old, new)]
        old.save(path)
        replaced = 0
        for i in range(count):
            ours = (new, old)[i % 2]
            child = os.fork()
            if child == 0:
                while True:
                    ours.save(path)
            time.sleep(r.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reader.load(path)
            found = states.index([a.tobytes() for a in arrays_of(reader)])
            replaced += found == (i + 1) % 2
        return replaced


def arrays_of(opt):
    """All parts of all states."""
    found = []
    for state in opt.state.values():
        for key, a in state.items():
            if key != "step":
                found += a.parts() if isinstance(a, Stored) else [a]
    return found


def main(count=2000):
    from record import record

    counts = allocations()
    record(
        "; ".join(f"{name}: {n} allocations failed, one by one" for name, (n, *_) in counts.items())
        + "; each time nothing had changed, or the step was complete"
    )
    for suffix in (".npz", ".safetensors"):
        failed = full_disk(suffix, stride=5)
        record(f"{suffix}: {failed} saves without disk space; only the old file was there")
        replaced = kills(count, suffix)
        record(
            f"{suffix}: {count} times SIGKILL within 20 ms of saving; {replaced} times the new "
            "state was there, otherwise the old one, complete"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["allocations"]:
        fail_allocations(sys.argv[2])
    else:
        main(*map(int, sys.argv[1:]))
