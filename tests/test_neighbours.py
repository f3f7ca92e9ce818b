"""With other libraries that have threads, in any order of import."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import threads

import fusedopt
from fusedopt import _core

PARALLEL = _core.backend() != "serial"


def run(code):
    """Run code in a fresh interpreter; return the JSON that it printed. A deadlock times out."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SEEN = """
import json
{imports}
ours = [i for i in threadpoolctl.threadpool_info() if i["user_api"] == "fusedopt"]
print(json.dumps(ours))
"""


@pytest.mark.parametrize(
    "imports", ["import fusedopt, threadpoolctl", "import threadpoolctl, fusedopt"]
)
def test_threadpoolctl_sees_us(imports):
    (ours,) = run(SEEN.format(imports=imports))
    assert ours["num_threads"] == fusedopt.get_num_threads()
    assert ours["filepath"] == str(Path(_core.__file__).resolve())
    assert ours["threading_layer"] == _core.backend()
    assert ours["version"] == fusedopt.__version__


def test_threadpoolctl_is_not_imported_for_that():
    """Importing it takes time and sets KMP_DUPLICATE_LIB_OK in the environment."""
    code = "import sys, json, fusedopt; print(json.dumps('threadpoolctl' in sys.modules))"
    assert run(code) is False


def test_a_broken_or_old_threadpoolctl_is_ignored(tmp_path):
    (tmp_path / "threadpoolctl.py").write_text("x = 1\n")
    code = f"""
import sys, json, fusedopt
sys.path.insert(0, {str(tmp_path)!r})
import threadpoolctl
print(json.dumps([threadpoolctl.x, type(sys.meta_path[0]).__name__]))
"""
    x, first = run(code)
    assert (x, first != "_OnImport") == (1, True)


LIMITED = """
import json, os
import numpy as np, fusedopt, threadpoolctl

def tasks():
    return len(os.listdir("/proc/self/task"))

fusedopt.set_num_threads(1)  # making an optimizer zeroes its state in parallel too
p, g = np.zeros(1_000_000, np.float32), np.ones(1_000_000, np.float32)
opt = fusedopt.SGD([p], lr=1.0)
fusedopt.set_num_threads(3)
counts = []
with threadpoolctl.threadpool_limits(1):
    before = tasks()
    opt.step([g])
    counts += [fusedopt.get_num_threads(), tasks() - before, fusedopt.info()["threads"]]
with threadpoolctl.threadpool_limits({"fusedopt": 2}):
    opt.step([g])
    counts += [fusedopt.get_num_threads(), tasks() - before]
with threadpoolctl.threadpool_limits(1, user_api="blas"):
    counts += [fusedopt.get_num_threads()]
opt.step([g])
counts += [fusedopt.get_num_threads(), tasks() - before, fusedopt.info()["threads"]]
print(json.dumps(counts))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in Linux's /proc")
@pytest.mark.skipif(not PARALLEL, reason="a serial build starts no thread")
def test_threadpool_limits_apply():
    """Under a limit of one a step starts no thread; the limit ends with its block."""
    counts = run(LIMITED)
    assert counts == [1, 0, "1 (threadpoolctl)", 2, 1, 3, 3, 2, "3 (set_num_threads)"]


def test_limits_beyond_ours_are_cut():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threads(2), threadpoolctl.threadpool_limits(1000):
        assert fusedopt.get_num_threads() == 256


NEIGHBOURS = """
import hashlib, json
{imports}
import threadpoolctl
import numpy as np
from sklearn.cluster import KMeans

def step_of(module, steps=3):
    rng = np.random.default_rng(0)
    p, g = (rng.standard_normal(600_000).astype(np.float32) for _ in range(2))
    opt = module.AdamW([p])
    for _ in range(steps):
        opt.step([g])
        x = torch.randn(256, 256, requires_grad=True)
        (x @ x).sum().backward()
        KMeans(2, n_init=1, max_iter=2).fit(rng.standard_normal((5000, 4)))
    return hashlib.sha256(p.tobytes()).hexdigest()

before = torch.get_num_threads(), fusedopt.get_num_threads()
same = step_of(fusedopt) == step_of(fusedopt.reference)
with threadpoolctl.threadpool_limits(1):
    inside = torch.get_num_threads(), fusedopt.get_num_threads()
    same_limited = step_of(fusedopt) == step_of(fusedopt.reference)
after = torch.get_num_threads(), fusedopt.get_num_threads()
apis = sorted({{i["user_api"] for i in threadpoolctl.threadpool_info()}})
print(json.dumps([before, inside, after, same, same_limited, apis]))
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch: extra `peers`")
@pytest.mark.parametrize(
    "imports",
    [
        "import fusedopt, torch, sklearn.cluster",
        "import torch, sklearn.cluster, fusedopt",
        "import sklearn.cluster, fusedopt, torch",
    ],
)
def test_torch_and_sklearn_in_one_process(imports):
    """All work, none changes another's number of threads, and all obey threadpoolctl."""
    before, inside, after, same, same_limited, apis = run(NEIGHBOURS.format(imports=imports))
    assert before == after
    assert inside == [1, 1]
    assert same and same_limited
    assert {"blas", "fusedopt", "openmp"} <= set(apis)
