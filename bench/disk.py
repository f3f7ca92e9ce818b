"""State on disk against what the disk can do.

    python bench/disk.py --folder /scratch --gigabytes 4 --write bench/results/disk.md

Each round takes, in turns, a step with the state on disk and a stream: the same bytes read from a
file and written back to it, in the same pieces, by as many threads, by the same direct access and
through the same kind of memory, with nothing done in between. Their ratio is what the optimizer
adds to the disk's own time. With ``--memory`` the same step is timed on state in memory too.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import fusedopt
from fusedopt import _core, _disk

PIECE = 4 << 20  # bytes: an array's part of a piece of a pass


def stream(file: int, size: int, threads: int) -> float:
    """Read and write back a file; return the seconds."""
    places = iter(range(0, size, PIECE))
    lock = threading.Lock()

    def work() -> None:
        buffer = _core.allocate([((PIECE,), np.uint8, None)])[0]  # on huge pages, as a step's
        while True:
            with lock:
                at = next(places, None)
            if at is None:
                return
            part = buffer[: min(PIECE, size - at)].data
            assert os.preadv(file, [part], at) == len(part) == os.pwrite(file, part, at)

    started = time.perf_counter()
    workers = [threading.Thread(target=work) for _ in range(threads + 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def status(name: str) -> int:
    """Return a size from /proc/self/status in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="time state in memory too")
    parser.add_argument("--write", type=Path, help="a report")
    args = parser.parse_args()
    threads = fusedopt.get_num_threads()
    n = int(args.gigabytes * 2**30 / 8) // 2**19 * 2**19
    params, grads = [np.ones(n, np.float32)], [np.full(n, 1e-3, np.float32)]
    twin = fusedopt.Adam([params[0].copy()]) if args.memory else None
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident size
    opt = fusedopt.Adam(params, state_dir=args.folder)
    opt.step(grads)
    resident = status("VmHWM") - before
    size, rows = 8 * n, []
    with tempfile.TemporaryFile(dir=args.folder, buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        _disk._make_direct(file.fileno())
        stream(file.fileno(), size, threads)  # a first write allocates
        for _ in range(args.rounds):
            first = stream(file.fileno(), size, threads)
            started = time.perf_counter()
            opt.step(grads)
            step = time.perf_counter() - started
            second = stream(file.fileno(), size, threads)
            memory = float("nan")
            if twin is not None:
                started = time.perf_counter()
                twin.step(grads)
                memory = time.perf_counter() - started
            rows.append((step, (first + second) / 2, memory))
            print(f"step {step:.2f} s, stream {first:.2f} and {second:.2f} s", flush=True)
    steps, streams, memories = zip(*rows, strict=True)
    ratios = [a / b for a, b in zip(steps, streams, strict=True)]
    speed = size / 1e9 / statistics.median(streams)
    lines = [
        "# State on disk",
        "",
        f"`python bench/disk.py {' '.join(sys.argv[1:])}`: Adam in float32, {n:,} elements, "
        f"{size / 2**30:.2f} GiB of state; {platform.machine()}, {platform.system()} "
        f"{platform.release()}, {threads} threads and two more for the disk, {args.rounds} rounds; "
        f"a load of {os.getloadavg()[0]:.1f} in the last minute, with other processes.",
        "",
        "| | median | from | to |",
        "|---|---|---|---|",
        f"| a step, s | {statistics.median(steps):.2f} | {min(steps):.2f} | {max(steps):.2f} |",
        f"| the same bytes read and written alone, s | {statistics.median(streams):.2f} | "
        f"{min(streams):.2f} | {max(streams):.2f} |",
        f"| step / stream of its round | {statistics.median(ratios):.2f} | {min(ratios):.2f} | "
        f"{max(ratios):.2f} |",
    ]
    if twin is not None:
        lines.append(
            f"| a step with state in memory, s | {statistics.median(memories):.3f} | "
            f"{min(memories):.3f} | {max(memories):.3f} |"
        )
    lines += [
        "",
        f"The disk reads and writes {speed:.2f} GB/s each at the same time. What became resident "
        f"by making the optimizer and a step: {resident / 2**20:.0f} MiB, of a window of "
        f"{_core.WINDOW >> 20} MiB.",
        "",
    ]
    print("\n".join(lines))
    if args.write is not None:
        args.write.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
