"""A signal handler that raises at any moment: a call has happened completely or not at all."""

import gc
import signal
import sys

import pytest
from test_processes import run

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")

CONTENTS = """
def contents(opt):
    return repr([[opt.param_groups], opt.state_dict()])
np.set_printoptions(threshold=10**9, precision=17)
opt, twin = make(), make()
"""
# name -> setup; the repeated call; what holds after each interruption; what is done at the end
PROGRAMS = {
    "step": (
        """
p, g = np.zeros(100_000, np.float32), np.ones(100_000, np.float32)
opt = fusedopt.SGD([p], lr=1.0)
""",
        "opt.step([g])",
        "assert (p == -opt.state['params[0]']['step']).all()",
        "",
    ),
    "step of matrices": (
        """
params = [np.ones((20, 30), np.float32), np.ones((30, 20))]
grads = [np.ones((20, 30), np.float32), np.ones((30, 20))]
opt = fusedopt.Muon(params, lr=1.0, momentum=0.0, weight_decay=1.0, ns_steps=1)
opt.step(grads)
direction = [p.copy() for p in params]
""",
        "opt.step(grads)",
        "states = list(opt.state.values()); assert states[0]['step'] == states[1]['step']; "
        "assert all((p == d).all() for p, d in zip(params, direction)); "
        "assert all((s['momentum_buffer'] == 1).all() for s in states)",
        "opt.step(grads)",
    ),
    "step of factors": (
        """
def make():
    return fusedopt.Adafactor([np.ones((200, 30), np.float32), np.ones((2, 9, 20)), np.ones(9)])
grads = [np.ones((200, 30), np.float32), np.ones((2, 9, 20)), np.ones(9)]
"""
        + CONTENTS,
        "opt.step(grads)",
        "steps = {s['step'] for s in opt.state.values()}; assert len(steps) == 1",
        "while twin.state_dict()['step'] < max(steps): twin.step(grads)\n"
        "assert contents(twin) == contents(opt)",
    ),
    "step of an estimate": (
        """
def make():
    groups = [{"params": [np.ones((20, 30), np.float32)]}, {"params": np.ones(9)}]
    return fusedopt.Prodigy(groups, d0=1e-3, growth_rate=1.0, slice_p=3)
grads = [[np.ones((20, 30), np.float32)], np.ones(9)]
"""
        + CONTENTS,
        "opt.step(grads)",
        "steps = {*(s['step'] for s in opt.state.values()), *(g['k'] for g in opt.param_groups)}; "
        "assert len(steps) == 1",
        "while twin.state_dict()['step'] < max(steps): twin.step(grads)\n"
        "assert contents(twin) == contents(opt)",
    ),
    "step of rows that count": (
        """
def make():
    params = [np.ones((200, 30), np.float32), np.ones((9, 4)), np.ones((500, 2), np.float32)]
    return fusedopt.Adam(params, row_steps=True)
def grads():
    rows = fusedopt.Rows(np.array([5, 7, 5]), np.ones((3, 30), np.float32))
    return [rows, np.ones((9, 4)), np.ones((500, 2), np.float32)]
"""
        + CONTENTS
        + """
for start in (opt, twin):
    for s in start.state.values():
        s["row_step"][...] = np.arange(s["row_step"].size)[:, None] % 50
""",
        "opt.step(grads())",
        "steps = {s['step'] for s in opt.state.values()}; assert len(steps) == 1\n"
        "a, b, c = (s['row_step'] for s in opt.state.values())\n"
        "assert a[5, 0] - 5 == b[0, 0] == c[499, 0] - 49 == max(steps) and a[6, 0] == 6",
        "while twin.state_dict()['step'] < max(steps): twin.step(grads())\n"
        "assert contents(twin) == contents(opt)",
    ),
    "load": (
        """
def make(fill):
    opt = fusedopt.Adam({f"p{i}": np.full(50, fill) for i in range(60)}, lr=fill)
    opt.step({f"p{i}": np.full(50, fill) for i in range(60)})
    return opt
def state(opt):
    arrays = [a for s in opt.state.values() for a in s.values()]
    return [opt.param_groups[0]["lr"]] + [np.asarray(a).tobytes() for a in arrays]
made, opt = [make(1.0), make(2.0)], make(3.0)
dicts, states = [o.state_dict() for o in made], [state(o) for o in made]
opt.load_state_dict(dicts[0])
""",
        "opt.load_state_dict(dicts[0]); opt.load_state_dict(dicts[1])",
        "assert state(opt) in states",
        "",
    ),
    "save": (
        """
fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a save waits for its disk
folder = tempfile.TemporaryDirectory(dir=fast)
path = Path(folder.name, "run.npz")
opt, other = (fusedopt.Adam({f"k{i}": np.zeros(2000, np.float32) for i in range(20)}) for _ in "12")
os.umask(0o022)
""",
        "opt.save(path); os.unlink(path); opt.save(path)",
        "assert os.umask(0o022) == 0o022; opt.save(path); other.load(path)",
        "assert os.listdir(folder.name) == ['run.npz']",
    ),
    "swap_ema": (
        """
params = [np.zeros(5000, np.float32) for _ in range(40)]
grads = [np.ones(5000, np.float32) for _ in range(40)]
opt = fusedopt.SGD(params, lr=1.0, ema=0.5)
def evaluate():
    with opt.swap_ema():
        sum(p[0] for p in params)
""",
        "opt.step(grads); evaluate()",
        "steps = opt.state['params[0]']['step']; assert all((p == -steps).all() for p in params)",
        "evaluate()",
    ),
    "state on disk": (
        """
import gc
def next_descriptor():
    gc.collect()
    os.close(number := os.dup(0))
    return number
folder = tempfile.TemporaryDirectory()
p, g = np.zeros(300_000, np.float32), np.ones(300_000, np.float32)
def train():
    fusedopt.SGD([p], lr=1.0, momentum=0.9, state_dir=folder.name).step([g])
train()
before = next_descriptor()
""",
        "train()",
        "pass",
        "assert next_descriptor() <= before, (next_descriptor(), before)",
    ),
    "signals held back": (
        """
from fusedopt._comms import DeferredSignals
signal.signal(signal.SIGTERM, lambda *_: None)
def hold():
    with DeferredSignals(True):
        pass
def handlers():
    return [signal.getsignal(number) for number in signal.valid_signals()]
before = handlers()
""",
        "hold()",
        "assert handlers() == before",
        "",
    ),
    "accumulate": (
        """
params = [np.zeros(5000, np.float32) for _ in range(20)]
grads = [np.ones(5000, np.float32) for _ in range(20)]
opt, sums = fusedopt.SGD(params, lr=1.0), fusedopt.GradAccumulator(params)
def micro_batch():
    sums.add(grads)
    if sums.count >= 7:
        opt.step(sums)
""",
        "micro_batch()",
        "assert all((b == sums.count).all() for b in sums._buffers)",
        "n = sums.count; norm = opt.step(sums, max_grad_norm=np.inf).grad_norm\n"
        "assert n == 0 or abs(norm - n * 100_000**0.5) < 1e-6",
    ),
}
HARNESS = """
import os, signal, tempfile, time
from pathlib import Path
import numpy as np, fusedopt
fusedopt.set_num_threads(1)
class Alarm(Exception):
    pass
def ring(*_):
    raise Alarm
signal.signal(signal.SIGALRM, ring)
{made}
start = time.perf_counter()
for _ in range(20):
    {act}
longest = (time.perf_counter() - start) / 10  # twice a call
alarms, end = 0, time.monotonic() + 5
while alarms < 100 and time.monotonic() < end:
    try:
        # repeated, because an exception within a destructor is lost
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + longest * ((alarms * 0.618) % 1), 0.5)
        while True:
            {act}
    except Alarm:
        signal.setitimer(signal.ITIMER_REAL, 0)
        alarms += 1
    {holds}
{finally_}
print(alarms)
"""


def traced(call, trace):
    """Call, and trace the lines of Python code that the call runs.

    Without collections of garbage: an exception in a callback of the collector, of which
    hypothesis has one, is lost.
    """
    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()


def interrupted_at(when, call):
    """Whether Ctrl-C came, at the `when`-th line of Python code that the call runs."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        lines += event == "line"
        if event == "line" and lines == when:
            raise KeyboardInterrupt
        return trace

    try:
        traced(call, trace)
    except KeyboardInterrupt:
        return True
    return False


def moments(call, every):
    """Numbers of lines at which to interrupt a call, by `interrupted_at`.

    Those at which a line of code runs first, and of all lines that run, one of `every`.
    """
    first, lines = {}, 0

    def trace(frame, event, arg):
        nonlocal lines
        if event == "line":
            lines += 1
            first.setdefault((frame.f_code, frame.f_lineno), lines)
        return trace

    traced(call, trace)
    return sorted({*first.values(), *range(1, lines, every)})


@pytest.mark.slow("interrupts a call again and again")
@pytest.mark.parametrize("name", PROGRAMS)
def test_interrupted_at_any_moment(name):
    made, act, holds, finally_ = PROGRAMS[name]
    done = run(HARNESS.format(made=made, act=act, holds=holds, finally_=finally_))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
