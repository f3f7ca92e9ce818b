"""Communication between ranks, such that no rank waits for one that has raised.

`MPI` and `TorchDistributed` are the two libraries as `Comm` has them. Each is imported only where
it is used.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from fusedopt._check import Array
from fusedopt._parts import Comm

_TAG = 17512  # of messages, which are the package's alone
_SIGNALS = tuple(map(int, signal.valid_signals()))  # once: the call takes longer than all the rest


class MPI:
    """A communicator of mpi4py, as `Sharded` uses it.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Used as it is, and not duplicated; messages between two ranks have the tag 17512.
    """

    def __init__(self, comm: Any) -> None:
        """Take over a communicator."""
        from mpi4py import MPI as mpi

        if comm.Is_inter():
            raise TypeError("comm: an intercommunicator; pass an intracommunicator")
        self._comm, self._byte, self._wait = comm, mpi.BYTE, mpi.Request.Waitall
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def exchange(self, send: Sequence[Array], receive: Sequence[Array]) -> None:
        """See `Comm`."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        comm, byte = self._comm, self._byte
        requests = [comm.Irecv([receive[r], byte], r, _TAG) for r in others if receive[r].size]
        requests += [comm.Isend([send[r], byte], r, _TAG) for r in others if send[r].size]
        self._wait(requests)

    def gather(self, value: Any) -> list[Any]:
        """See `Comm`."""
        return list(self._comm.allgather(value))


class TorchDistributed:
    """A process group of torch.distributed, as `Sharded` uses it.

    Parameters
    ----------
    group : ProcessGroup, optional
        Of a backend for the CPU, such as gloo; by default that of all ranks.
    """

    def __init__(self, group: Any = None) -> None:
        """Take over a group."""
        import torch

        self._torch, self._dist, self._group = torch, torch.distributed, group
        self.rank: int = self._dist.get_rank(group)
        self.size: int = self._dist.get_world_size(group)
        self._numbers = self._dist.get_process_group_ranks(group)

    def exchange(self, send: Sequence[Array], receive: Sequence[Array]) -> None:
        """See `Comm`."""
        dist, works = self._dist, []
        for call, arrays in ((dist.irecv, receive), (dist.isend, send)):
            for rank, array in enumerate(arrays):
                if rank != self.rank and array.size:
                    own = array if array.flags.writeable else array.copy()  # torch warns of others
                    tensor = self._torch.from_numpy(own)
                    works.append(call(tensor, self._numbers[rank], group=self._group))
        for work in works:
            work.wait()

    def gather(self, value: Any) -> list[Any]:
        """See `Comm`."""
        values = [None] * self.size
        self._dist.all_gather_object(values, value, group=self._group)
        return values


def comm_of(comm: Any) -> Comm:
    if hasattr(comm, "exchange") and hasattr(comm, "gather") and hasattr(comm, "rank"):
        return comm  # type: ignore[no-any-return]
    if hasattr(comm, "Get_rank"):
        return MPI(comm)
    if type(comm).__module__.split(".")[0] == "torch":
        return TorchDistributed(comm)
    raise TypeError(
        f"comm: expected a communicator of mpi4py, a process group of torch.distributed or an "
        f"object with the methods of fusedopt.mpi.Comm, got {type(comm).__name__}"
    )


class DeferredSignals:
    """Defers the handlers of signals to the end of a block, and with them what they raise."""

    def __init__(self, wanted: bool) -> None:
        """Prepare a block; unless `wanted`, it defers nothing."""
        is_main = threading.current_thread() is threading.main_thread()
        self._wanted = wanted and is_main  # only there Python calls handlers
        self._handlers: dict[int, Any] = {}
        self._come: list[tuple[int, Any]] = []

    def __enter__(self) -> DeferredSignals:
        """Replace each handler by one that only notes the signal."""
        if self._wanted:
            handlers = {number: signal.getsignal(number) for number in _SIGNALS}
            self._handlers = {number: its for number, its in handlers.items() if callable(its)}
            try:
                for number in self._handlers:
                    signal.signal(number, self._note)
            except BaseException:  # of a handler that was still in its place
                self._put_back()
                raise
        return self

    def __exit__(self, *about: object) -> None:
        """Put the handlers back, and call those of the signals that have come."""
        try:
            self._put_back()
        finally:
            self.check()

    def _put_back(self) -> None:
        try:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        except BaseException:  # of a handler that is restored: the others must be too
            self._put_back()
            raise

    def _note(self, number: int, frame: Any) -> None:
        self._come.append((number, frame))

    def check(self) -> None:
        """Call the handlers of the signals that have come, all of them even if one raises."""
        if self._come:
            number, frame = self._come.pop(0)
            try:
                self._handlers[number](number, frame)
            finally:
                self.check()


def agree(
    comm: Comm,
    fault: BaseException | None,
    said: Mapping[str, str] | None = None,
    outcome: str = "nothing has changed",
) -> None:
    """Raise on all ranks if one has a `fault`, or if their texts differ.

    Raises
    ------
    BaseException
        The `fault`, on its rank.
    RuntimeError
        On the others, with its message; and if ranks are in different calls.
    ValueError
        Naming the line in which the texts of ranks differ.
    """
    told = None if fault is None else f"{type(fault).__name__}: {fault}"
    every = comm.gather((told, said))
    if fault is not None:
        raise fault
    for rank, (text, _) in enumerate(every):
        if text is not None:
            raise RuntimeError(f"rank {rank} has failed, and {outcome}: {text}")
    first = every[0][1] or {}
    for rank, (_, its) in enumerate(every):
        if (its or {}).keys() != first.keys():
            raise RuntimeError(
                f"ranks 0 and {rank} are in different calls, and nothing has changed: all ranks "
                "call the same methods, in the same order"
            )
        for name, value in first.items():
            if its[name] != value:
                lines = zip_longest(value.splitlines(), its[name].splitlines())
                a, b = next(pair for pair in lines if pair[0] != pair[1])
                raise ValueError(
                    f"{name}: ranks 0 and {rank} differ, and nothing has changed: {a} and {b}"
                )
