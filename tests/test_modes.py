"""The arithmetic mode of the caller (rounding, subnormals) changes no bit and is not changed."""

import ctypes
import platform
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import numpy as np
import pytest
from cases import CASES, TILE, canonical, isa, takes, threads
from test_step_options import tree_bytes

import fusedopt
from fusedopt import _core, reference
from fusedopt.formats import FORMATS, Stored

# where glibc's fenv_t has the control word, and its bits
MACHINES = {
    "x86_64": (7, {"flush": 0x8040, "down": 0x2000, "up": 0x4000, "toward zero": 0x6000}),
    "aarch64": (0, {"flush": 1 << 24, "up": 1 << 22, "down": 2 << 22, "toward zero": 3 << 22}),
}
if platform.libc_ver()[0] != "glibc" or platform.machine() not in MACHINES:
    pytest.skip("sets the mode through glibc", allow_module_level=True)

WORD, MODES = MACHINES[platform.machine()]
ALL = MODES["flush"] | MODES["down"] | MODES["up"]
LIBM = ctypes.CDLL("libm.so.6")
BIG = 130 * TILE + 77  # split over threads


def mode(new=None):
    """The control word of this thread, after setting its bits to `new` if given."""
    env = (ctypes.c_uint32 * 8)()
    LIBM.fegetenv(env)
    if new is not None:
        env[WORD] = env[WORD] & ~ALL | new
        LIBM.fesetenv(env)
    return env[WORD] & ALL


@contextmanager
def in_mode(name):
    """Set another library's mode for a block, which must not change it."""
    mode(MODES[name])
    try:
        yield
        after = mode()
    finally:
        mode(0)
    assert after == MODES[name]


@lru_cache(maxsize=100)
def numbers(n, dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * 10.0 ** rng.choice([-42, -38, -30, -20, -6, 0], n)
    return x.astype(dtype)


def some(n, dtype, seed):
    """Numbers of all sizes, many of them subnormal or with a subnormal square."""
    return numbers(n, dtype, seed).copy()


def rate(step):
    return 0.1 / (step + 2) ** 0.7


def trained(case, contexts, module, dtype, storage, sizes):
    """The results of steps of a class, each taken in a context."""
    params = [some(n, dtype, i) for i, n in enumerate(sizes)]
    copies = [np.zeros_like(p, np.float16) for p in params]
    options = case.options | case.class_options | {"lr": rate} | storage
    opt = getattr(module, case.cls)(params, **options)
    results = []
    for k, context in enumerate(contexts):
        grads = [some(n, dtype, 10 * k + i) for i, n in enumerate(sizes)]
        with context:
            result = opt.step(
                grads, grad_scale=1 / 3, max_grad_norm=0.7, stats=True, copy_out=copies
            )
        results.append(list(result))
    return tree_bytes([params, opt.state, copies, results])


def each_mode(case, storage):
    """A context for each step: all modes, of which other rows begin with another."""
    names = list(MODES)
    first = CASES.index(case) + STORAGE.index(storage)
    return [in_mode(names[(first + k) % len(names)]) for k in range(len(names))]


NO_MODES = [nullcontext() for _ in MODES]
STORAGE = [
    (np.float32, {"ema": 0.9}),
    (np.float64, {"ema": 0.9, "ema_warmup": True}),
    (np.float16, {"state_dtype": "int8", "min_8bit_size": 0}),
    (np.float32, {"state_dtype": "bfloat16"}),
    (np.float16, {}),
]
ROWS = [
    (case, dtype, storage)
    for case in CASES
    for dtype, storage in STORAGE
    if takes(case.cls, storage)
]


@pytest.mark.parametrize(("case", "dtype", "storage"), ROWS, ids=str)
def test_classes(case, dtype, storage):
    """Each step in another mode, on one thread or two."""
    count = 1 + STORAGE.index((dtype, storage)) // 2 % 2
    row = fusedopt, dtype, storage, [BIG if count > 1 else 5000, 700, 3]
    with threads(count):
        ours = trained(case, each_mode(case, (dtype, storage)), *row)
    assert ours == trained(case, NO_MODES, *row)


@pytest.mark.parametrize(("case", "dtype", "storage"), ROWS, ids=str)
def test_references(case, dtype, storage):
    """Each step in another mode."""
    row = dtype, storage, [700, 3]
    theirs = trained(case, each_mode(case, (dtype, storage)), reference, *row)
    assert theirs == trained(case, NO_MODES, fusedopt, *row)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_functions(case):
    """On each instruction set; with float32, and with stochastic rounding."""

    def step(function, context, kind):
        p, g = some(3000, kind, 1), some(3000, kind, 2)
        states = [[some(3000, np.float32, 3 + k) ** 2] for k in range(len(case.states))]
        for number in (1, 2):
            with context():
                function([p], [g], *states, step=number, **case.options)
        return [canonical(a) for a in (p, *(s for (s,) in states))]

    for kind in (np.float32, np.float16):
        right = step(case.fast, nullcontext, kind)
        for name in MODES:
            for which in _core.available_isas():
                with isa(which):
                    assert step(case.fast, lambda name=name: in_mode(name), kind) == right
            assert step(case.reference, lambda name=name: in_mode(name), kind) == right


@pytest.mark.parametrize("name", MODES)
def test_accumulator(name):
    def accumulate(context):
        params = {"a": np.zeros(BIG, np.float32), "b": np.zeros(5)}
        acc, opt = fusedopt.GradAccumulator(params), fusedopt.AdamW(params)
        for k in range(3):
            grads = {"a": some(BIG, np.float32, k), "b": some(5, np.float64, k)}
            with context():
                acc.add(grads, scale=1 / 3)
        with context():
            result = opt.step(acc, max_grad_norm=1e-3, stats=True)
        return tree_bytes([list(result), params])

    assert accumulate(lambda: in_mode(name)) == accumulate(nullcontext)


@pytest.mark.parametrize("name", MODES)
def test_scaler(name):
    def scale(context):
        p = np.ones(70, np.float32)
        opt, scaler = (
            fusedopt.Adam(p),
            fusedopt.GradScaler(3.0, growth_factor=1.1, growth_interval=1),
        )
        for k in range(4):
            grads = some(70, np.float32, k)
            with context():
                scaler.step(opt, grads)
                scaler.update()
        return p.tobytes(), scaler.scale

    assert scale(lambda: in_mode(name)) == scale(nullcontext)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("form", [f for f in FORMATS if f not in ("float32", "float64")])
def test_codecs(form, name):
    dtype, extra, per = FORMATS[form]

    def coded(context):
        out = []
        for kind in (np.float32, np.float64):
            x = some(640, kind, 1)
            data = np.zeros(640, np.uint16 if dtype is None else dtype)
            stored = Stored(form, data, None if extra is None else np.zeros(640 // per, extra))
            with context():
                stored.encode(x, key=5)
                back = stored.decode()
            out += [a.tobytes() for a in (*stored.parts(), back)]
        return out

    assert coded(lambda: in_mode(name)) == coded(nullcontext)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("rule", [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("SGD", {})], ids=str)
def test_torch(rule, name):
    torch = pytest.importorskip("torch")
    import fusedopt.torch as fo

    cls, options = rule

    def train(context):
        params = [torch.nn.Parameter(torch.from_numpy(some(n, np.float32, n))) for n in (BIG, 7)]
        params.append(torch.nn.Parameter(torch.from_numpy(some(70, np.float16, 3))))
        opt = getattr(fo, cls)(
            params, lr=0.013, weight_decay=0.1, max_grad_norm=0.5, stats=True, **options
        )
        opt.grad_scale = torch.tensor(3.0)  # as GradScaler leaves it
        results = []
        for k in range(3):
            for p in params:
                p.grad = torch.from_numpy(some(p.numel(), np.float32, k)).to(p.dtype)
            with context():
                opt.step()
            results.append(list(opt.last_step))
        state = [t.numpy() for s in opt.state.values() for t in s.values()]
        return tree_bytes([[p.detach().numpy() for p in params], state, results])

    assert train(lambda: in_mode(name)) == train(nullcontext)


@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("name", MODES)
def test_errors_leave_the_mode(name, module):
    opt, acc = module.Adam(np.ones(3)), fusedopt.GradAccumulator(np.ones(3))
    failing = [
        (ValueError, lambda: opt.step(np.ones(4))),
        (FloatingPointError, lambda: opt.step(np.full(3, np.nan), nonfinite="raise")),
        (ValueError, lambda: opt.step(np.ones(3), copy_out=np.ones(4, np.float16))),
        (ValueError, lambda: acc.add(np.ones(4))),
        (AssertionError, lambda: Stored("int8", np.zeros(3, np.uint8)).decode()),
    ]
    for error, call in failing:
        with in_mode(name), pytest.raises(error):
            call()


@pytest.mark.parametrize("name", MODES)
def test_a_callback_may_change_the_mode(name):
    """A mode that a schedule sets when it is called stays set."""

    def lr(step):
        mode(MODES[name])
        return 0.1

    opt = fusedopt.SGD(np.ones(3), lr=lr)
    try:
        opt.step(np.ones(3))
        assert mode() == MODES[name]
    finally:
        mode(0)


WORKERS = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np, fusedopt
from test_modes import MODES, mode, some

def step(count):
    fusedopt.set_num_threads(count)
    p = some(400_000, np.float32, 1)
    opt = fusedopt.Adam(p)
    for k in range(3):
        opt.step(some(400_000, np.float32, 2 + k))
    return p.tobytes()

one = step(1)
mode(MODES[{name!r}])
fusedopt.set_num_threads(3)
fusedopt.Adam(np.ones(400_000, np.float32))  # starts threads, which keep this mode
mode(0)
print(step(3) == one)
"""


@pytest.mark.parametrize("name", MODES)
def test_workers_in_another_mode(name):
    code = WORKERS.format(folder=str(__file__).rpartition("/")[0], name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
