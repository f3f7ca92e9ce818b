"""Before the first test: settle torch's vector library, and let Ctrl-C through.

MKL, which torch calls, chooses the kernel of a function at the first call, not safely between
threads: a first `sqrt` in several threads may compute one thread's share to 12 bits, once in
hundreds of processes (pytorch/pytorch#188792). A first call of one element in one thread makes the
choice for all.

Steps use threads that are asleep or late too, so that threads are tested on any machine.

A shell starts background jobs with SIGINT ignored, and children inherit that, so the tests that
interrupt themselves or a child would wait for ever. A handler here is the default in children.
"""

import signal
import sys

from fusedopt import _core


def pytest_sessionstart():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    _core.force_threads(True)
    if torch := sys.modules.get("torch"):
        for dtype in (torch.float32, torch.float64):
            torch.ones(1, dtype=dtype).sqrt()
