"""Torch's forward and backward with our step after them, against the sum of both alone.

    python tests/campaigns/beside.py

In fresh processes, for each order of imports, with scikit-learn loaded or not. Two libraries with
threads of their own may make each other wait: 1.0 means that they do not.
"""

import json
import statistics
import subprocess
import sys

from record import record

import fusedopt

ORDERS = {
    "torch first": "import torch; import fusedopt.torch as fo",
    "fusedopt first": "import fusedopt; import torch; import fusedopt.torch as fo",
    "torch first, with scikit-learn": "import sklearn.cluster, torch; import fusedopt.torch as fo",
    "fusedopt first, with scikit-learn": (
        "import fusedopt, sklearn.cluster, torch; import fusedopt.torch as fo"
    ),
}

CODE = """
import json, statistics, time
{imports}
torch.manual_seed(0)
layers = [torch.nn.Linear(512, 512) for _ in range(4)]
model = torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.ReLU())])
opt = fo.AdamW(model.parameters(), lr=1e-4)
x = torch.randn(256, 512)

def backward():
    model(x).square().mean().backward()

def both():
    backward()
    opt.step()

def clock(f, n=20):
    start = time.perf_counter()
    for _ in range(n):
        f()
    return (time.perf_counter() - start) / n

both(), clock(both)
ratios, parts = [], []
for i in range(21):
    turn = [backward, opt.step, both]
    turn = turn[i % 3:] + turn[:i % 3]
    times = {f.__name__: clock(f) for f in turn}
    alone = times["backward"] + times[opt.step.__name__]
    ratios.append(times["both"] / alone)
    parts.append([times["backward"], times[opt.step.__name__], times["both"]])
print(json.dumps([ratios, [statistics.median(p) * 1e3 for p in zip(*parts)]]))
"""


def main():
    found = []
    for order, imports in ORDERS.items():
        code = CODE.replace("{imports}", imports)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ratios, (backward, step, both) = json.loads(done.stdout)
        low, middle, high = statistics.quantiles(ratios, n=4)
        found.append(
            f"{order}: {middle:.2f} (quartiles {low:.2f} to {high:.2f}; forward and backward "
            f"{backward:.1f} ms, step {step:.2f} ms, both {both:.1f} ms)"
        )
        print(found[-1], flush=True)
    record(f"{fusedopt.info()['backend']}: " + "; ".join(found))


if __name__ == "__main__":
    main()
