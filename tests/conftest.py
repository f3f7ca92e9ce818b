"""Before the first test: make torch's vector library choose its kernels, and enable Ctrl-C.

MKL, which torch calls, chooses the kernel of a function at its first call, which is not safe in
several threads: a first `sqrt` there may compute one thread's share to 12 bits, once in hundreds of
processes (pytorch/pytorch#188792). A first call of one element in one thread makes the choice for
all.

Steps use threads that are asleep or late too, so that threads are tested on any machine.

A shell starts background jobs with SIGINT ignored, and children inherit that, so the tests that
interrupt themselves or a child would wait for ever. With a handler here, children have the default.

`--every N` runs a fixed sample, one test in N: rules, formats and options are crossed in thousands,
and where all is slow, or all ran before on another Python, some of each do.
"""

import os
import signal
import sys
import zlib

import pytest

from fusedopt import _core

os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras reads it as it is imported


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one test in N")


def pytest_collection_modifyitems(config, items):
    every, kept, left = config.getoption("every"), [], []
    for item in items:
        (left if zlib.crc32(item.nodeid.encode()) % every else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_sessionstart():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    _core.force_threads(True)
    if torch := sys.modules.get("torch"):
        for dtype in (torch.float32, torch.float64):
            torch.ones(1, dtype=dtype).sqrt()


@pytest.fixture
def one_blas_thread():
    """Products of small matrices take long where busy processes keep BLAS's threads waiting."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield
