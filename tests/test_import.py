"""An import that is interrupted or finds wrong modules ends with an exception, not a crash."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt import _arrays, _core, _tensors

INTERRUPTED = """
import os, signal, sys
{first}
for i in range(16):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    sys.exit()
came = False
def interrupt(*_):
    global came
    came = True
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
try:
    signal.setitimer(signal.ITIMER_REAL, 0.0002 + 0.04 * (0.618 * i % 1))
    import fusedopt
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("imported")
except BaseException as exc:  # NumPy, and CPython where it makes a class, raise others from it
    if not came:
        raise
    print("interrupted")
"""


def run(code, **kwargs):
    """The result of a fresh interpreter, which must not be ended by a signal other than SIGINT."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)
    # an interrupt of code run by exec(), as in dataclasses, ends in SIGINT, caught or not
    assert done.returncode >= 0 or done.returncode == -signal.SIGINT, (done.returncode, done.stderr)
    return done


@pytest.mark.slow("interrupts an import many times")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="interrupts by a timer")
@pytest.mark.parametrize("first", ["", "import numpy", "import dataclasses, numpy"])
def test_interrupted(first):
    """At many moments, each in a fork of one process: no crash, whichever module was at work."""
    done = run(INTERRUPTED.format(first=first))
    found = done.stdout.split()
    ends, codes = found[::2], found[1::2]
    assert len(codes) == 16 and set(ends) <= {"interrupted", "imported"}, (found, done.stderr)
    assert all(int(code) in (0, -signal.SIGINT) for code in codes), (found, done.stderr)
    assert ends.count("interrupted") > 2


@pytest.mark.parametrize("name", ["ast", "dis", "inspect"])
def test_modules_of_the_same_name(name, tmp_path):
    """A user's file that shadows a module of Python: an exception, as from NumPy."""
    (tmp_path / f"{name}.py").write_text("x = 1\n")
    code = """
try:
    import fusedopt
except (AttributeError, ImportError) as exc:
    print("refused", exc)
else:
    print("imported")
"""
    done = run(code, cwd=tmp_path)
    assert done.stdout.split()[:1] in (["refused"], ["imported"]), done.stderr


@pytest.mark.parametrize("module", [_arrays, _core, _tensors], ids=lambda m: m.__name__)
def test_the_compiled_modules_need_no_inspect(module):
    """Cython imports it in each of them, and mistakes a failed import for a module."""
    assert b"inspect" not in Path(module.__file__).read_bytes()
