"""Before the first test: make torch's vector library choose its kernels, and enable Ctrl-C.

MKL, which torch calls, chooses the kernel of a function at its first call, which is not safe in
several threads: a first `sqrt` there may compute one thread's share to 12 bits, once in hundreds of
processes (pytorch/pytorch#188792). A first call of one element in one thread makes the choice for
all.

Steps use threads that are asleep or late too, so that threads are tested on any machine. OpenMP's
threads sleep as soon as they have no work. By default they look for more for some milliseconds, on
CPUs that tests in other processes need: on two busy ones, tests of many small steps took five times
as long, and those with torch twice. An OMP_WAIT_POLICY in the environment is kept.

A shell starts background jobs with SIGINT ignored, and children inherit that, so the tests that
interrupt themselves or a child would wait for ever. With a handler here, children have the default.

`-m "not slow"` leaves out what takes long: tests that are marked with the reason, and of a table of
more than QUICK rows all but a fixed sample. Rules, formats and options are crossed in thousands.
"""

import os
import signal
import sys
import zlib
from collections import defaultdict

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read as a library of OpenMP is loaded
os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras reads it as it is imported

from fusedopt import _core  # noqa: E402 (loads OpenMP)

QUICK = 7


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    tables = defaultdict(list)
    for item in items:
        tables[item.nodeid.partition("[")[0]].append(item)
        for mark in item.iter_markers("slow"):
            if not (mark.args and isinstance(mark.args[0], str)):
                raise pytest.UsageError(f"{item.nodeid}: `slow` without a reason")
    for rows in tables.values():
        rows.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in rows[QUICK:]:
            item.add_marker(pytest.mark.slow(f"one of {len(rows)} rows; {QUICK} are quick enough"))


def pytest_sessionstart():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    _core.force_threads(True)
    if torch := sys.modules.get("torch"):
        for dtype in (torch.float32, torch.float64):
            torch.ones(1, dtype=dtype).sqrt()


@pytest.fixture(scope="session")
def thread_pools():
    """The libraries that have threads, searched for once: a search takes 3 ms."""
    return pytest.importorskip("threadpoolctl").ThreadpoolController()


@pytest.fixture
def one_blas_thread(thread_pools):
    """Products of small matrices take long where busy processes keep BLAS's threads waiting."""
    with thread_pools.limit(limits=1, user_api="blas"):
        yield
