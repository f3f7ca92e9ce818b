"""An array beyond 2^31 elements and 2^32 bytes, with state in 8 bits: each element is correct.

    python tests/campaigns/huge.py

Takes 11 GiB of memory. All numbers have so few bits that no rounding, random or not, changes them.
"""

import time

import numpy as np
from record import record

import fusedopt

N = 2**31 + 77
PERIOD = 3
PART = PERIOD * 2**24  # elements that are filled and compared at once


def parts(pattern):
    """The slice of each part, and the numbers of the pattern there, as float16."""
    whole = np.resize(np.array(pattern, np.float16), PART)
    for begin in range(0, N, PART):
        end = min(begin + PART, N)
        yield slice(begin, end), whole[: end - begin]


def main():
    p, g = np.full(N, 8, np.float16), np.empty(N, np.float16)
    for part, values in parts([1.0, 0.5, 0.25]):
        g[part] = values
    opt = fusedopt.SGD([p], lr=0.5, momentum=0.5, state_dtype="int8")
    start = time.perf_counter()
    opt.step([g])  # the buffer becomes g, p = 8 - 0.5 g
    opt.step([g])  # 1.5 g, 8 - 1.25 g
    seconds = time.perf_counter() - start
    for part, values in parts([6.75, 7.375, 7.6875]):
        assert np.array_equal(p[part].view(np.uint16), values.view(np.uint16)), part
    buffer = opt.state["params[0]"]["momentum_buffer"]
    end = N - N % 64 - 64  # the last block and a half
    last = type(buffer)(buffer.format, buffer.data[end:], buffer.extra[end // 64 :])
    assert np.array_equal(last.decode(), 1.5 * g[end:].astype(np.float32))
    record(
        f"one float16 array of 2^31 + 77 elements, {p.nbytes:,} bytes, its momentum in 8 bits: all "
        f"elements correct after two steps of {seconds / 2:.0f} s"
    )


if __name__ == "__main__":
    main()
