"""`fusedopt.mpi.Sharded` on 1, 2 and 4 ranks: equal to the plain class on the mean gradient."""

import importlib.util
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusedopt
from fusedopt import _options, _parts
from fusedopt.mpi import Comm, Sharded

SCRIPT = Path(__file__).with_name("mpi_ranks.py")
# for Open MPI, which otherwise refuses root and more ranks than CPUs
ENV = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}
SCENARIOS = (
    "rules", "step_options", "storage", "mixed", "around", "averages", "faults", "disks", "parts",
    "buckets", "groups", "faults_of_groups",
)  # fmt: skip


def launcher():
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if importlib.util.find_spec("mpi4py") is None or found is None:
        pytest.skip("needs mpi4py and an MPI library: pip install mpi4py mpich")
    return found


def finish(processes, world, scenarios, limit=120):
    """Each rank must report that each scenario has passed; none may wait for another."""
    texts = []
    try:
        texts = [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = "".join(texts)
    assert not any(process.returncode for process in processes), text
    for rank in range(world):
        for name in scenarios:
            assert f"rank {rank}: {name}: passed" in text, text


def start(command, env):
    return subprocess.Popen(
        command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def mpi(world, folder, *scenarios):
    command = [launcher(), "-n", str(world), sys.executable, SCRIPT, folder, *scenarios]
    finish([start(command, ENV)], world, scenarios)


@pytest.mark.slow("starts MPI's processes")
def test_ranks(tmp_path):
    """One rank and four load what two have saved.

    On four ranks also what depends on how many there are, as they take turns on few CPUs.
    """
    mpi(2, tmp_path, "save", "load", *SCENARIOS)
    of_all = ("step_options", "mixed", "faults", "disks", "parts", "groups", "faults_of_groups")
    mpi(4, tmp_path, "load", *of_all)
    mpi(1, tmp_path, "load", *SCENARIOS)


def test_torch_distributed(tmp_path):
    """The same over a gloo group."""
    torch = pytest.importorskip("torch", reason="torch: extra `peers`")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    names = ("mixed", "around", "faults", "save", "load", "faults_of_groups")
    command = [sys.executable, "-W", "ignore", SCRIPT, tmp_path, *names]
    processes = [start(command, {"RANK": str(rank), "WORLD": "2"}) for rank in range(2)]
    finish(processes, 2, names)


class Alone:
    """A communicator of one rank, by the protocol alone."""

    rank, size = 0, 1

    def exchange(self, send, receive):
        """Send nothing."""

    def gather(self, value):
        return [value]


def test_one_rank_by_the_protocol():
    comm: Comm = Alone()
    p, q = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    Sharded(fusedopt.Adam, [p], comm).step([p * 2])
    fusedopt.Adam([q]).step([q * 2])
    assert p.tobytes() == q.tobytes()
    rows = fusedopt.Rows(np.array([0]), np.ones((1, 4), np.float32))
    with pytest.raises(TypeError, match=r"^grads\[0\]: Sharded adds arrays .* not Rows"):
        Sharded(fusedopt.Adam, [p], comm).step([rows])
    for cls, option in (("Adam", "row_steps"), ("Adagrad", "rowwise")):
        for params in ([p], [{"params": [p]}, {"params": [p.copy()], option: True}]):
            with pytest.raises(ValueError, match=f"^{option}: keeps a number for each row"):
                given = {} if len(params) == 2 else {option: True}
                Sharded(getattr(fusedopt, cls), params, comm, **given)
    with pytest.raises(TypeError, match=r"^comm: expected a communicator .* got str"):
        Sharded(fusedopt.Adam, [p], "world")


# what an optimizer has and Sharded does not: of a method, an argument
LACKS = {("step", "reduce"): "it sums over ranks itself"}


def test_sharded_has_all_that_an_optimizer_has():
    p = np.ones(600, np.float32)
    plain, sharded = fusedopt.AdamW([p.copy()]), Sharded(fusedopt.AdamW, [p], Alone())
    lacking = set()
    for name in dir(plain):
        if name.startswith("_"):
            continue
        assert hasattr(sharded, name), name
        assert getattr(Sharded, name).__doc__, name
        if not inspect.isfunction(getattr(fusedopt.Optimizer, name, None)):
            continue
        theirs, ours = (
            inspect.signature(getattr(cls, name)).parameters
            for cls in (fusedopt.Optimizer, Sharded)
        )
        more = _options.CHECKS if "options" in ours else ()
        lacking |= {(name, its) for its in theirs if its not in ours and its not in more}
        for its in theirs.keys() & ours.keys():
            assert theirs[its].kind == ours[its].kind, (name, its)
            assert theirs[its].default == ours[its].default, (name, its)
    assert lacking == LACKS.keys()
    for name, value in _options.DEFAULTS.items():
        assert sharded.step([p * 2], **{name: value}) == plain.step([p * 2], **{name: value})
    assert (sharded.rule, sharded.defaults) == (plain.rule, plain.defaults)
    with pytest.raises(TypeError, match=r"^step: unknown option 'reduce'"):
        sharded.step([p], reduce=lambda array: None)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("sizes", [[1], [0, 5000, 3], [512 * 40], [100] * 300, [7, 10**9, 7]])
def test_cuts(sizes, ranks):
    """Parts follow one another, begin at multiples of the unit, and are about equal."""
    cuts, _ = _parts.cut(sizes, [4] * len(sizes), [512] * len(sizes), [0] * ranks)
    own = [0] * ranks
    for n, places in zip(sizes, cuts, strict=True):
        assert (places[0], places[-1], len(places)) == (0, n, ranks + 1)
        assert places == sorted(places)
        assert all(place % 512 == 0 or place == n for place in places)
        for rank in range(ranks):
            own[rank] += places[rank + 1] - places[rank]
    assert max(own) <= sum(sizes) / ranks + 512


@pytest.mark.parametrize("loads", [[0, 0], [900, 0, 300], [0, 7000, 0, 2000], [10**9, 0, 0, 0]])
@pytest.mark.parametrize("sizes", [[], [1], [3000, 0, 5000], [100] * 60, [7, 10**7, 7]])
@pytest.mark.parametrize("unit", [1, 512])
def test_cuts_level_the_loads(sizes, loads, unit):
    """What is added goes to ranks that have less, up to one level that those have in common."""
    cuts, after = _parts.cut(sizes, [4] * len(sizes), [unit] * len(sizes), loads)
    given = [sum(its[r + 1] - its[r] for its in cuts) * 4 for r in range(len(loads))]
    assert [a - b for a, b in zip(after, loads, strict=True)] == given
    assert sum(given) == 4 * sum(sizes)
    level = max((its for its, more in zip(after, given, strict=True) if more), default=0)
    error = 2 * unit * 4
    for its, more in zip(after, given, strict=True):
        assert its >= level - error
        assert not more or its <= min(after) + error


@pytest.mark.parametrize("world", [1, 2])
def test_the_page_on_processes(world, tmp_path):
    """All Python blocks of docs/processes.md, one after the other."""
    page = Path(__file__).parent.parent / "docs" / "processes.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) == 4
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks, 'print(f"rank {comm.rank}: page: passed", flush=True)']))
    command = [launcher(), "-n", str(world), sys.executable, "-m", "mpi4py", str(script)]
    finish([start(command, ENV)], world, ["page"])
