"""The processes that hold contenders: started with equal threads, asked one at a time, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from typing import Any

from fusedopt.bench import machine
from fusedopt.bench.contenders import Row

PATIENCE = 300.0  # seconds that a request may take: compiling for hundreds of tensors is slow


class Failure(Exception):
    """A contender failed at a request.

    `absent`: it is not installed. `gone`: its process has ended, with all contenders in it.
    """

    def __init__(self, reason: str, *, absent: bool = False, gone: bool = False) -> None:
        super().__init__(reason)
        self.absent, self.gone = absent, gone


def environment(threads: int) -> dict[str, str]:
    """Return the variables that give every library the same number of threads, and no GPU."""
    n = str(threads)
    counts = (
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS",
        "FUSEDOPT_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC",
    )  # fmt: skip
    # some releases of XLA read NPROC; the CPUs that a worker is bound to limit the others
    return dict.fromkeys(counts, n) | {
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


class Worker:
    """One process, bound to some CPUs."""

    def __init__(self, threads: int, env: Mapping[str, str]) -> None:
        ours, theirs = Pipe()
        self._pipe = ours
        self.last_words = ""  # how it ended, and the last line that it wrote
        self._log = tempfile.TemporaryFile()
        with _bound_to(machine.cpus(threads)):  # a child inherits it, and so do all its threads
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fusedopt.bench.worker", str(theirs.fileno())],
                env=os.environ | environment(threads) | dict(env),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
            )
        theirs.close()
        with suppress(BrokenPipeError):  # it has ended already: the first request reports that
            ours.send(sys.path)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of `worker.Server`; Failure if it fails or the process ends."""
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(PATIENCE):
                self.stop()
                raise Failure(f"no answer within {PATIENCE:g} s", gone=True)
            kind, result = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as exc:
            self._process.wait()
            self.stop()
            raise Failure(f"its process ended: {self.last_words}", gone=True) from exc
        if kind != "ok":
            raise Failure(result, absent=kind == "absent")
        return result

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def stop(self) -> None:
        """End the process and all that it started."""
        self._pipe.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        with self._log as log:
            log.seek(0)
            lines = [line.strip() for line in log.read().decode(errors="replace").split("\n")]
        self.last_words = ": ".join([how, *[line[:200] for line in lines if line][-1:]])


@contextmanager
def _bound_to(cpus: list[int]) -> Iterator[None]:
    """Bind this thread to some CPUs in a block; if none are given, do nothing."""
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def busy_processes(count: int, cpus: list[int]) -> Iterator[list[int]]:
    """Run processes that compute on some CPUs, or on all if none are given; yield their numbers."""
    command = [sys.executable, "-c", "while True: pass"]
    with _bound_to(cpus):
        processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Workers:
    """A worker for each kind of process, started when first asked; a context that stops them.

    While it lasts, `busy` other processes keep the CPUs of the workers busy.
    """

    def __init__(
        self, threads: int, env: Mapping[str, str] | None = None, *, busy: int = 0
    ) -> None:
        self._threads, self._env, self._busy = threads, dict(env or {}), busy
        self._workers: dict[str, Worker] = {}
        self._busy_pids: list[int] = []
        self._stack = ExitStack()

    def ask(self, row: Row, method: str, *arguments: Any) -> Any:
        """Ask the worker that holds a row's contender; Failure as `Worker.ask`."""
        worker = self._workers.get(row.process)
        if worker is None:
            worker = self._workers[row.process] = Worker(self._threads, {**self._env, **row.env})
        try:
            return worker.ask(method, *arguments)
        except Failure as exc:
            if exc.gone:  # the next request starts a new one
                del self._workers[row.process]
            raise

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the workers, busy processes and this one have used."""
        workers = [worker.pid for worker in self._workers.values()]
        pids = [os.getpid(), *workers, *self._busy_pids]
        return sum(map(machine.process_seconds, pids))

    def __enter__(self) -> Workers:
        """Start busy processes, and no worker yet."""
        self._busy_pids = self._stack.enter_context(
            busy_processes(self._busy, machine.cpus(self._threads))
        )
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop all."""
        self._stack.close()
        for worker in self._workers.values():
            worker.stop()
