"""Before the first test: settle torch's vector library, where a test has imported torch.

Its MKL chooses the kernel of a function at the first call, not safely between threads: a first
`sqrt` in several threads may compute one thread's share to 12 bits, once in hundreds of processes
(pytorch/pytorch#188792). A first call of one element in one thread makes the choice for all.
"""

import sys


def pytest_collection_finish():
    if torch := sys.modules.get("torch"):
        for dtype in (torch.float32, torch.float64):
            torch.ones(1, dtype=dtype).sqrt()
