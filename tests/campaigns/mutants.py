"""Faults put into the arithmetic, one after the other: the suite must detect each.

    python tests/campaigns/mutants.py [part of a name]

Works on a copy of the tree, built for no instruction set in particular and with little optimisation
(for speed) and with the thread pool; the environment needs the build tools of pyproject.toml. Each
text is searched for in csrc and src: one that is missing is reported, and counts as a mutant that
survived.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

ROOT = Path(__file__).parents[2]
BITS = ["test_bits.py"]
FORMATS = ["test_formats.py"]
THREADS = ["test_properties.py", "test_threads.py"]

MUTANTS = [  # what is wrong; the right text; the wrong one; tests that should see it
    ("the tail of a leaf is left out", "            end = leaf->n;\n",
     "            end = leaf->n - leaf->n % 16;\n", BITS),
    ("a tile is stepped twice", "end = tile_from(leaf, to) * FO_TILE;",
     "end = (tile_from(leaf, to) + 1) * FO_TILE;", THREADS),
    ("chunks are claimed by no atomic operation",
     "atomic_fetch_add_explicit(next, most, memory_order_relaxed);",
     "atomic_load(next); atomic_store(next, chunk + most);", THREADS),
    ("the pool keeps its threads after a fork", "    pool.workers = 0;\n", "",
     ["test_processes.py"]),
    ("a job is open after its caller has left",
     "    atomic_fetch_or(&pool.gate, CLOSED);\n    const", "    const", THREADS),
    ("swapped betas", "v[i] * beta2 + (w2 * g[i])", "v[i] * beta2 + (w1 * g[i])", BITS),
    ("no bias correction", '"root": sqrt(1 - beta2**step)', '"root": 1.0', BITS),
    ("no epsilon", "root) + eps", "root)", BITS),
    ("AMSGrad forgets NaN", "x[i] >= square || x[i] != x[i] ? x[i] : square",
     "x[i] >= square ? x[i] : square", BITS),
    ("the first momentum is damped", "if (first != 0)", "if (first > 1)", BITS),
    ("L1 pushes the wrong way", "x < 0 ? (REAL)-1 : x == 0", "x < 0 ? (REAL)1 : x == 0", BITS),
    ("products and sums are fused", "-ffp-contract=off",
     "-O2 -ffp-contract=fast -mavx2 -mfma -DFUSEDOPT_ANY_DISPATCH -U__GCC_IEC_559", BITS),
    ("an additive term where there is none", "const int has_l2 = plan->l2 != 0",
     "const int has_l2 = 1 | (plan->l2 != 0)", BITS),
    ("padding decides the base of a block", "memset(&tail, 0, sizeof tail);",
     "memset(&tail, 0x7b, sizeof tail);", FORMATS),
    ("a tile has the noise of its first block", "&random[i / FO_BLOCK]);", "&random[0]);", FORMATS),
    ("gradients of a tile are of the first", "load_tile)(&leaf->grad, at, n, grads)\n",
     "load_tile)(&leaf->grad, 0, n, grads)\n", FORMATS),
    ("the loop over blocks takes any gradient for bfloat16",
     "|| is_array_of(grad, FO_BF16)", "|| is_array_of(grad, FO_F16)", ["test_step_options.py"]),
    ("bfloat16 rounds ties up", "0x7fff + ((from->u[j] >> 16) & 1)", "0x8000", FORMATS),
    ("the exponent of a block is too small", "(largest + 2 * STEP) >> 23",
     "(largest + 1 * STEP) >> 23", FORMATS),
    ("noise of the step before", "noise_key((<tuple>plans[group])[1], i, step + 1)",
     "noise_key((<tuple>plans[group])[1], i, step)", FORMATS),
    ("noise of a shard as of a whole tensor", "leaf->origin + at + i,", "at + i,",
     ["test_torch_distributed.py"]),
    ("noise that repeats in each block", "((uint64_t)at / FO_BLOCK)",
     "((uint64_t)at / FO_BLOCK * 0)", FORMATS),
    ("directions are measured and not written", "memcpy(fo_data_at(&leaf->state[slot], at), out,",
     "memcpy(out, out,", ["test_muon.py"]),
    ("no direction looks ahead", "u[i] = nesterov != 0 ? ahead : mean;", "u[i] = mean;",
     ["test_muon.py"]),
    ("a matrix moves as far whatever its shape", "u *= sqrt(max(1, rows / columns))", "u *= 1.0",
     ["test_muon.py"]),
    ("sums in the order of threads", "grad[i % FO_LANES] += sums->grad",
     "grad[0] += sums->grad", ["test_step_options.py"]),
    ("a clip that loses NaN", "out[i] > clip ? clip : out[i] < -clip ? -clip : out[i]",
     "out[i] < clip ? (out[i] > -clip ? out[i] : -clip) : clip", ["test_step_options.py"]),
    ("workers keep their own mode", "const fo_mode before = fo_enter_ieee(); /* a worker",
     "const fo_mode before = FO_IEEE_MODE; /* a worker", ["test_modes.py"]),
    ("24 bits are truncated, not rounded", "V(srli_epi32)(r, 8) & K(random8)", "r ^ r", FORMATS),
    ("second moments below the window are lost",
     "V(max_epi16)(sums[i], V(min_epi16)(words, K(words_one)))", "sums[i]", FORMATS),
    ("a block that is not finite is not noticed", "largest >= INFINITE, 0",
     "largest > 0xffffff00u, 0", FORMATS),
    ("all arrays of a leaf take the same noise", "return slot == 1 ? x : multiply(",
     "return slot >= 1 ? x : multiply(", FORMATS),
    ("squares beyond the range of float", "if (sizeof(REAL) == sizeof(double))", "if (1)",
     ["test_step_options.py"]),
    ("written gradients are accepted", "        if found >= 0:\n            _check.alias(",
     "        if found > 1000:\n            _check.alias(", ["test_inputs.py"]),
    ("a sample is written one element too far", "i / shape->every, decoded->f[i - at]",
     "i / shape->every, decoded->f[i - at + 1]", ["test_factors.py"]),
    ("row factors are not in units of their mean", "rows[i] = rows[i] / by;", "(void)by;",
     ["test_factors.py"]),
    ("columns of the second part are left out", "below = 1; below < it->high; below++",
     "below = 2; below < it->high; below++", ["test_factors.py"]),
    ("elements between samples count", "first[i] = second[i] = 0;", "(void)i;",
     ["test_factors.py"]),
    ("an estimate that never grows", "d = min(d_max, d * first", "d = min(d, d * first",
     ["test_factors.py"]),
    ("a load that keeps the step counts", "            self.count = count\n            for i",
     "            for i", ["test_checkpoint.py", "test_machine.py"]),
]  # fmt: skip


SIMPLER = [
    ("CMakeLists.txt", "-O3", "-O1"),
    ("CMakeLists.txt", 'MATCHES "^(x86_64|AMD64|amd64)$"', 'STREQUAL "none"'),
    ("csrc/dispatch.c", "#if defined(__x86_64__)", "#if 0"),
]


def sources(tree):
    """All files that may hold the text of a mutant."""
    kinds = [("csrc", "*.[ch]"), ("csrc", "*.inc"), ("src", "*.py"), ("src", "*.pyx")]
    found = [path for folder, kind in kinds for path in (tree / folder).rglob(kind)]
    return sorted([tree / "CMakeLists.txt", *found])


def build(tree, site, builds):
    command = [
        sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps",
        "--upgrade", "--target", site, tree, "-C", "cmake.define.FUSEDOPT_THREADS=pool",
        "-C", f"build-dir={builds}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def is_caught(tree, site, tests):
    """Whether a test fails or times out."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--timeout=120",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, *tests], cwd=tree / "tests", env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True, text=True,
    )  # fmt: skip
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print("   ", failed[0][:110] if failed else f"exit status {done.returncode}", flush=True)
    return done.returncode != 0


def main(wish=""):
    wrong, caught = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tree, site, builds = (Path(folder, name) for name in ("tree", "site", "build"))
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("build", ".git", "__pycache__"))
        for path, right, simpler in SIMPLER:
            text = (tree / path).read_text()
            assert right in text, f"{path}: text not found: {right}"
            (tree / path).write_text(text.replace(right, simpler))
        os.environ["SETUPTOOLS_SCM_PRETEND_VERSION"] = "0"
        build(tree, site, builds)
        everything = sorted({test for *_, tests in MUTANTS for test in tests})
        print("without mutants", flush=True)
        assert not is_caught(tree, site, everything), "the suite fails without any mutant"
        for name, right, spoilt, tests in MUTANTS:
            if wish not in name:
                continue
            print(name, flush=True)
            holders = [path for path in sources(tree) if right in path.read_text()]
            if not holders:
                wrong.append(f"{name} (text not found: {right.strip()!r})")
                continue
            start, text = time.time(), holders[0].read_text()
            holders[0].write_text(text.replace(right, spoilt))
            build(tree, site, builds)
            if is_caught(tree, site, tests):
                caught += 1
            else:
                wrong.append(f"{name} (survived)")
            holders[0].write_text(text)
            print(f"    {time.time() - start:.0f} s", flush=True)
    for each in wrong:
        print("NOT CAUGHT:", each)
    if wish:
        return
    record(f"{caught} of {len(MUTANTS)} mutants caught" + "".join(f"; {each}" for each in wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
