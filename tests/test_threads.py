"""The number of threads, and that they end: forks, concurrent callers, signals."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from cases import CLASSES, SPLIT, threads, work

import fusedopt
from fusedopt import _core, _threads, reference


def test_set_and_get():
    with threads(3):
        assert fusedopt.get_num_threads() == 3
        assert "set_num_threads" in fusedopt.info()["threads"] or _core.backend() == "serial"
    for bad in (0, -1, 257):
        with pytest.raises(ValueError, match="^n: must be"):
            fusedopt.set_num_threads(bad)
    for bad in (1.0, "2", None, True):
        with pytest.raises(TypeError, match="^n: expected a whole number"):
            fusedopt.set_num_threads(bad)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_optimizers_own(cls):
    """It is checked, changes no bit, and is not in groups or checkpoints."""
    results = []
    for count in (None, 1, 3):
        p = np.ones(SPLIT, np.float32)
        opt = cls([p], threads=count)
        opt.step([p.copy()])
        results.append(p.tobytes())
        assert "threads" not in opt.param_groups[0]
        assert "threads" not in opt.state_dict()["param_groups"][0]
    assert len(set(results)) == 1
    with pytest.raises(ValueError, match="^threads: must be at most 256, got 300"):
        cls([p], threads=300)
    with pytest.raises(ValueError, match="^threads: must be >= 1"):
        cls([p], threads=0)
    with pytest.raises(TypeError, match="^threads: expected a whole number"):
        cls([p], threads=True)


# children wait for work as in a user's process, not as tests do (conftest.py)
USUAL = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}

OWN = """
import os, sys
import numpy as np, fusedopt
def tasks():
    return len(os.listdir("/proc/self/task"))
fusedopt.set_num_threads(2)
p, g = np.zeros(1_000_000, np.float32), np.ones(1_000_000, np.float32)
before = tasks()
counts = []
for own in (1, None, 4):
    opt = fusedopt.SGD([p], lr=1.0, threads=own)
    opt.step([g])
    counts.append(tasks() - before)
    import threadpoolctl
    with threadpoolctl.threadpool_limits(1):  # limits all
        opt.step([g])
    counts.append(tasks() - before)
print(*counts)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in Linux's /proc")
@pytest.mark.skipif(_core.backend() == "serial", reason="a serial build starts no thread")
def test_an_optimizers_own_are_used():
    command = [sys.executable, "-c", OWN]
    done = subprocess.run(command, env=USUAL, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0", "0", "1", "1", "3", "3"], done.stderr


def files(root, contents):
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


QUOTAS = {
    "none": ({}, None),
    "v2": ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
    "v2 of a parent": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
        },
        0.5,
    ),
    "v2 in a namespace": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"},
        3.0,
    ),
    "v1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/job\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "v1 without": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_quota(tmp_path, kind):
    contents, expected = QUOTAS[kind]
    assert _threads.cpu_quota(files(tmp_path, contents)) == expected


AFFINITY, QUOTA, OPENMP = "CPU affinity", "CPU quota of the control group", "OMP_NUM_THREADS"
SHARE, IGNORED = ", divided by LOCAL_WORLD_SIZE", "; not the launcher's OMP_NUM_THREADS=1"
DEFAULTS = [  # environment, whether there is a quota of 1.5, of 6 CPUs: threads, and why
    ({}, False, 6, AFFINITY),
    ({}, True, 2, QUOTA),
    ({"OMP": "1"}, True, 1, OPENMP),
    ({"OMP": "4,2"}, False, 4, OPENMP),
    ({"OMP": "99"}, False, 6, AFFINITY),
    ({"OMP": "odd"}, False, 6, AFFINITY),
    ({"FUSEDOPT": "9"}, True, 9, "FUSEDOPT_NUM_THREADS"),
    # launchers: torchrun for one rank, which leaves the variable alone, and for more; accelerate
    ({"RANKS": "1", "OMP": "1"}, False, 1, OPENMP),
    ({"RANKS": "2"}, False, 3, AFFINITY + SHARE),
    ({"RANKS": "2", "OMP": "1"}, False, 3, AFFINITY + SHARE + IGNORED),
    ({"RANKS": "2", "OMP": "1"}, True, 1, QUOTA + SHARE + IGNORED),
    ({"RANKS": "2", "OMP": "2"}, False, 2, OPENMP),
    ({"RANKS": "2", "OMP": "4"}, False, 3, AFFINITY + SHARE),
    ({"RANKS": "1000", "OMP": "1"}, False, 1, AFFINITY + SHARE + IGNORED),
    ({"RANKS": "?", "OMP": "1"}, False, 1, OPENMP),
    ({"RANKS": "2", "OMP": "1", "FUSEDOPT": "7"}, False, 7, "FUSEDOPT_NUM_THREADS"),
    ({"MPICH": "1"}, False, 6, AFFINITY),
    ({"MPICH": "2"}, False, 3, AFFINITY + ", divided by MPI_LOCALNRANKS"),
    ({"MPICH": "2", "OMP": "1"}, False, 1, OPENMP),
    ({"MPICH": "2", "RANKS": "3"}, False, 2, AFFINITY + SHARE),
    ({"ACCELERATE": "no", "OMP": "1"}, False, 6, AFFINITY + IGNORED),
    ({"ACCELERATE": "no", "OMP": "2"}, False, 2, OPENMP),
    ({"ACCELERATE": "bf16", "RANKS": "3", "OMP": "1"}, False, 2, AFFINITY + SHARE + IGNORED),
    ({"RAY": "1", "OMP": "1"}, False, 6, AFFINITY + IGNORED),
    ({"RAY": "3", "OMP": "1"}, False, 2, AFFINITY + ", divided by RAY_LOCAL_WORLD_SIZE" + IGNORED),
    ({"DEEPSPEED": "2", "RANK": "0"}, False, 3, AFFINITY + ", divided by LOCAL_SIZE"),
    ({"DEEPSPEED": "2", "RANK": "0", "OMP": "1"}, False, 1, OPENMP),
    ({"DEEPSPEED": "2"}, False, 6, AFFINITY),
]
VARIABLES = {
    "OMP": "OMP_NUM_THREADS",
    "FUSEDOPT": "FUSEDOPT_NUM_THREADS",
    "RANKS": "LOCAL_WORLD_SIZE",
    "MPICH": "MPI_LOCALNRANKS",
    "ACCELERATE": "ACCELERATE_MIXED_PRECISION",
    "RAY": "RAY_LOCAL_WORLD_SIZE",
    "DEEPSPEED": "LOCAL_SIZE",
    "RANK": "LOCAL_RANK",
}


@pytest.mark.parametrize(("environ", "limited", "count", "why"), DEFAULTS, ids=str)
def test_default(environ, limited, count, why, tmp_path, monkeypatch):
    root = files(tmp_path, QUOTAS["v2"][0] if limited else {})
    monkeypatch.setattr(_threads, "_affinity", lambda pid=0: 6)
    environ = {VARIABLES[name]: value for name, value in environ.items()}
    assert _threads.default_threads(environ, root) == (count, why)


BOUND = [  # CPUs of this rank, of its launcher, ranks, whether there is a quota of 3: threads, why
    (8, 64, 8, False, 8, AFFINITY),  # each to its part
    (32, 64, 8, False, 8, AFFINITY + SHARE),  # to a node, which four share
    (64, 64, 8, False, 8, AFFINITY + SHARE),
    (8, 1, 2, False, 4, AFFINITY + SHARE),  # the launcher alone is bound
    (8, 0, 2, False, 4, AFFINITY + SHARE),  # it is gone, or not to be asked
    (8, 64, 3, True, 1, QUOTA + SHARE),
]


@pytest.mark.parametrize(("own", "launchers", "ranks", "limited", "count", "why"), BOUND, ids=str)
def test_bound_ranks(own, launchers, ranks, limited, count, why, tmp_path, monkeypatch):
    root = files(tmp_path, QUOTAS["v2 in a namespace"][0] if limited else {})
    monkeypatch.setattr(_threads, "_affinity", lambda pid=0: launchers if pid else own)
    assert _threads.default_threads({"LOCAL_WORLD_SIZE": str(ranks)}, root) == (count, why)


def test_affinity_of_the_launcher():
    """A rank that is bound to one CPU sees those of the process that started it."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cpus) < 2:
        pytest.skip("needs two CPUs and a system that binds processes")
    code = (
        f"import os; os.sched_setaffinity(0, [{cpus[0]}]); from fusedopt import _threads; "
        "print(_threads._affinity(), _threads._affinity(os.getppid()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", str(len(cpus))]


@pytest.mark.parametrize("bad", ["0", "-1", "x", "", "1.5", "257", "²"])
def test_bad_number_in_the_environment(bad):
    with pytest.raises(ValueError, match="expected a whole number from 1 to 256"):
        _threads.default_threads({"FUSEDOPT_NUM_THREADS": bad})


def test_bad_environment_is_an_error_at_import():
    env = os.environ | {"FUSEDOPT_NUM_THREADS": "many"}
    run = subprocess.run([sys.executable, "-c", "import fusedopt"], env=env, capture_output=True)
    assert run.returncode != 0
    assert b"ValueError: FUSEDOPT_NUM_THREADS='many': expected a whole number" in run.stderr


def send_work(pipe):
    pipe.send_bytes(work())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
# from 3.12 on CPython warns of any fork with threads alive, which is tested here
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_child_processes_finish(method):
    """The parent steps, then the child, then the parent: all end, with the same bits."""
    with threads(4):
        expected = work()
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        child = context.Process(target=send_work, args=(theirs,))
        child.start()
        assert ours.poll(60), "the child hangs"
        assert ours.recv_bytes() == expected
        child.join(30)
        assert child.exitcode == 0
        assert work() == expected


def test_concurrent_optimizers():
    """Many Python threads, each with its own optimizer, at once."""
    expected = [work(seed, module=reference) for seed in range(6)]
    results = {}
    with threads(2):
        pool = [
            threading.Thread(target=lambda s=seed: results.update({s: work(s)}))
            for seed in range(6)
        ]
        for t in pool:
            t.start()
        for t in pool:
            t.join()
    assert [results[seed] for seed in range(6)] == expected


PLACES = """
import os, sys, time
import numpy as np, fusedopt
def tasks(what):
    numbers = sorted(map(int, os.listdir("/proc/self/task")))
    files = [open(f"/proc/self/task/{number}/status") for number in numbers]
    return [line.split()[1] for file in files for line in file if line.startswith(what)]
cpus = set(list(os.sched_getaffinity(0))[:int(sys.argv[1])])
os.sched_setaffinity(0, cpus)
allowed = tasks("Cpus_allowed:")[0]
fusedopt.set_num_threads(3)
before = len(tasks("State"))
p, g = np.zeros(200_000, np.float32), np.ones(200_000, np.float32)
opt = fusedopt.SGD([p], lr=1.0)
for i in range(300):
    opt.step([g])
    if i % 30 == 0:
        time.sleep(0.002)
print((p == -300).all(), len(tasks("State")) - before)
def at_rest():  # a thread that was woken late may still be on its way to another CPU
    return set(tasks("Cpus_allowed:")[-2:]) == {allowed} and tasks("State").count("R") == 1
end = time.monotonic() + 60
while not at_rest() and time.monotonic() < end:
    time.sleep(0.001)
print(at_rest())
"""


@pytest.mark.skipif(_core.backend() == "serial", reason="a serial build starts no thread")
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads Linux's /proc")
@pytest.mark.parametrize("cpus", [1, 256])
def test_more_threads_than_cpus(cpus):
    """All steps are right, threads keep the CPUs they may use, and sleep when all is done."""
    command = [sys.executable, "-c", PLACES, str(cpus)]
    done = subprocess.run(command, env=USUAL, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "2", "True"], done


BUSY = """
import os, subprocess, sys
import numpy as np, fusedopt
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
try:
    fusedopt.set_num_threads(2)
    p, g = np.zeros(200_000, np.float32), np.ones(200_000, np.float32)
    opt = fusedopt.SGD([p], lr=1.0)
    for _ in range(300):
        opt.step([g])
    print((p == -300).all(), fusedopt.info()["late"])
finally:
    for other in others:
        other.kill()
"""


@pytest.mark.slow("waits beside busy processes")
def test_beside_busy_processes():
    """Steps are right whether threads come late or not, and info tells of it."""
    command = [sys.executable, "-c", BUSY]
    done = subprocess.run(command, env=USUAL, capture_output=True, text=True, timeout=120)
    right, _, told = done.stdout.strip().partition(" ")
    assert right == "True", done.stderr
    late = r"threads, \d+ times; so \d+ passes ran on one thread; now on (one thread|all threads)"
    assert told == "no thread" or re.fullmatch(late, told), told
    assert told == "no thread" or _core.backend() != "serial"


def test_threads_are_forced_in_tests():
    """Else steps of this suite would be on one thread where the machine is busy."""
    assert not _core.lateness()[2]


def test_interrupt_is_seen_after_the_step():
    """Ctrl-C in the middle of a step: the step is completed, then KeyboardInterrupt."""
    p = np.zeros(4_000_000, np.float32)
    g = np.ones_like(p)
    opt = fusedopt.SGD([p], lr=1.0)
    opt.step([g])
    done = 1

    def interrupt():
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt):
        killer.start()
        while True:
            opt.step([g])
            done += 1
    killer.join()
    steps = opt.state["params[0]"]["step"]
    assert steps in (done, done + 1)
    assert (p == -steps).all()


def test_the_lock_is_released():
    """Other Python threads run during a step."""
    p = np.zeros(20_000_000, np.float32)
    opt = fusedopt.Adam([p])
    g = np.ones_like(p)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    with threads(1):
        opt.step([g])
        ticker.start()
        start = time.perf_counter()
        opt.step([g])
        end = time.perf_counter()
        stop.set()
        ticker.join()
    assert sum(start < t < end for t in ticks) >= 2
