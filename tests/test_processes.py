"""Forks, shutdown, subinterpreters, control groups: each ends in time, with the right bits."""

import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cases import SPLIT, threads, work

import fusedopt
from fusedopt import _core, reference

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
# from 3.12 on CPython warns of any fork with threads alive, which is tested here
quiet_fork = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def in_child(check, limit=30):
    """Run `check` in a child made by os.fork; whether it returned true within the limit."""
    child = os.fork()
    if child == 0:
        good = False
        try:
            good = check()
        finally:
            os._exit(0 if good else 1)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@needs_fork
@quiet_fork
def test_fork_after_parallel_steps():
    """The child, its child, and the parent afterwards."""
    with threads(4):
        expected = work()
        assert in_child(lambda: work() == expected and in_child(lambda: work() == expected))
        assert work() == expected


@needs_fork
@quiet_fork
@pytest.mark.skipif(_core.backend() != "pool", reason="the child of another build is serial")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in Linux's /proc")
def test_the_child_has_threads_of_its_own():
    def tasks_begun():
        before = len(os.listdir("/proc/self/task"))
        work()
        return len(os.listdir("/proc/self/task")) - before

    with threads(3):
        work()
        assert in_child(lambda: tasks_begun() == 2)


@needs_fork
@quiet_fork
def test_the_childs_optimizer_continues_the_parents():
    with threads(3):
        p, g = np.zeros(SPLIT, np.float32), np.ones(SPLIT, np.float32)
        opt = fusedopt.SGD([p], lr=1.0)
        opt.step([g])

        def check():
            opt.step([g])
            return (p == -2).all()

        assert in_child(check)
        assert (p == -1).all()


@pytest.mark.slow("forks many times")
@needs_fork
@quiet_fork
def test_fork_while_others_step():
    """A fork in the middle of other threads' steps, many times: the child can step."""
    expected = work(1, module=reference)
    stop = threading.Event()

    def others(seed):
        while not stop.is_set():
            work(seed)

    with threads(3):
        pool = [threading.Thread(target=others, args=(seed,)) for seed in (2, 3)]
        for t in pool:
            t.start()
        try:
            for _ in range(15):
                assert in_child(lambda: work(1) == expected)
        finally:
            stop.set()
            for t in pool:
                t.join()
        assert work(1) == expected


def run(code, limit=60, **env):
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        env=os.environ | env, capture_output=True, text=True, timeout=limit,
    )  # fmt: skip


WORK = """
import os, sys, threading, time
import numpy as np, fusedopt
fusedopt.set_num_threads(3)
def work(module=fusedopt, steps=3):
    rng = np.random.default_rng(0)
    p, g = (rng.standard_normal(400_000).astype(np.float32) for _ in range(2))
    opt = module.Adam([p])
    for _ in range(steps):
        opt.step([g])
    return p.tobytes()
expected = work(fusedopt.reference)
"""

FORK_WITH_TORCH = """
x = torch.ones(1000, 1000, requires_grad=True)
(x @ x).sum().backward()
assert work() == expected
child = os.fork()
if child == 0:
    os._exit(0 if work() == expected else 1)
assert os.waitpid(child, 0)[1] == 0 and work() == expected
"""


@needs_fork
@pytest.mark.parametrize("first", ["torch", "fusedopt"])
def test_fork_with_torch_loaded(first):
    """After torch and the step have both run in parallel."""
    pytest.importorskip("torch", reason="torch: extra `peers`")
    imports = ["import torch\n", WORK][:: 1 if first == "torch" else -1]
    done = run("".join(imports) + FORK_WITH_TORCH)
    assert done.returncode == 0, done.stderr


SHUTDOWN = {
    "daemons in the middle of steps": """
def forever():
    while True:
        work(steps=1)
for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.1)
sys.exit(3)
""",
    "a step at exit": """
import atexit
atexit.register(lambda: print(work() == expected))
work()
sys.exit(3)
""",
    "a step from a thread that outlives main": """
def late():
    time.sleep(0.2)
    print(work() == expected)
threading.Thread(target=late).start()
sys.exit(3)
""",
    "a step in a destructor at the end": """
class Last:
    def __del__(self, work=work, expected=expected):
        print(work() == expected)
last = Last()
sys.exit(3)
""",
}


@pytest.mark.parametrize("kind", SHUTDOWN)
def test_exit(kind):
    """The process ends with its own exit code, and steps that can still run do."""
    done = run(WORK + SHUTDOWN[kind])
    assert done.returncode == 3, done.stderr
    assert done.stdout in ("True\n", "") if "daemons" in kind else done.stdout == "True\n"


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
other = interpreters.create()
code = '''
try:
    import fusedopt, numpy as np
except ImportError as exc:
    print("refused:", type(exc).__name__)
else:
    p = np.ones(3)
    fusedopt.SGD([p], lr=1.0).step([np.ones(3)])
    print("works:", p.tolist())
'''
(getattr(interpreters, "exec", None) or interpreters.run_string)(other, code)
sys.stdout.flush()
interpreters.destroy(other)
print(work() == expected)
"""


def test_subinterpreter_refuses_or_works():
    """Never a crash, and the main interpreter still works."""
    done = run(WORK + SUBINTERPRETER)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first in ("refused: ImportError", "works: [0.0, 0.0, 0.0]")
    assert last == "True"


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this CPython has a global lock"
)
def test_free_threading_stays_free():
    """Importing fusedopt does not enable the global lock."""
    done = run("import sys, fusedopt; print(sys._is_gil_enabled())")
    assert done.stdout == "False\n", done.stderr


CGROUP = Path("/sys/fs/cgroup/cpu")


@pytest.fixture
def control_group():
    """A real control group (v1) with the time of 1.5 CPUs."""
    group = CGROUP / f"fusedopt-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("150000")
    except OSError as exc:
        pytest.skip(f"cannot make a control group here ({exc})")
    yield group
    group.rmdir()


def test_a_real_control_group(control_group):
    """The time of 1.5 CPUs allows two threads, and info says why."""
    code = """
import os, sys, pathlib
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
import fusedopt
from fusedopt import _threads
print(_threads.cpu_quota(), fusedopt.get_num_threads(), fusedopt.info()["threads"])
"""
    env = {k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(control_group)],
        env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    quota, count, *_ = done.stdout.split()
    assert (quota, int(count)) == ("1.5", min(2, len(os.sched_getaffinity(0)))), done.stderr
