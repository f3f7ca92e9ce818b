"""How the leaves of an optimizer are cut into parts for ranks, and how parts travel between ranks.

All leaves lie on a line, which is cut into one range for each rank, of as many bytes as the others.
Cuts are at multiples of a leaf's unit: a tile, on which blocks, noise and sums depend. Parts travel
in buckets, so that buffers need little memory whatever the size of the leaves. Sums over ranks are
taken in the order of the ranks: they do not depend on the order in which messages come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from fusedopt import formats
from fusedopt._check import Array
from fusedopt._ieee import ieee
from fusedopt.formats import Stored, is_bfloat16

BUCKET = 1 << 17  # elements that travel at a time from each rank to each other

Segment = tuple[int, int, int]  # a leaf, and the range of its elements


class Comm(Protocol):
    """What sums and copies between ranks need of a library."""

    rank: int
    size: int

    def exchange(self, send: Sequence[Array], receive: Sequence[Array]) -> None:
        """Send `send[r]` to each other rank r, and fill `receive[r]` by what it sends.

        All are flat arrays of uint8. Both sides know their lengths; an empty one is not sent.
        """

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks, on each rank."""


def cut(
    sizes: Sequence[int], itemsizes: Sequence[int], units: Sequence[int], loads: Sequence[int]
) -> tuple[list[list[int]], list[int]]:
    """Cut leaves so that the ranks have as many bytes as each other, of these and of `loads`.

    `loads` are the bytes that each rank has already. Return for each leaf the elements at which the
    parts of the ranks begin, and its end; and what each rank has then.
    """
    total = sum(n * width for n, width in zip(sizes, itemsizes, strict=True))
    borders = _borders(total, loads)
    start, cuts, after = 0, [], list(loads)
    for n, width, unit in zip(sizes, itemsizes, units, strict=True):
        places = [(border - start) // width for border in borders]
        inner = [min(max(place + unit // 2, 0) // unit * unit, n) for place in places]
        cuts.append([0, *inner, n])
        start += n * width
        for rank in range(len(loads)):
            after[rank] += (cuts[-1][rank + 1] - cuts[-1][rank]) * width
    return cuts, after


def _borders(total: int, loads: Sequence[int]) -> list[int]:
    """Return where to cut `total` bytes, so that ranks of small load are filled to one level."""
    rising = sorted(loads)
    for n in range(1, len(loads) + 1):
        level = total + sum(rising[:n])  # n times it: n is the number of ranks that it reaches
        if n == len(loads) or level <= n * rising[n]:
            break
    sums = accumulate(max(0, level - n * load) for load in loads)
    return [its // n for its in sums][:-1]


def scaled(cuts: Sequence[int], per: int, total: int) -> list[int]:
    """Return the cuts of an array of `total` numbers, one for each `per` elements of a leaf."""
    return [0, *(total if place == cuts[-1] else place // per for place in cuts[1:])]


class Mover:
    """Moves parts of flat arrays between ranks.

    Parameters
    ----------
    comm : Comm
    cuts : list of list of int
        Of each leaf: see `cut`.
    """

    def __init__(self, comm: Comm, cuts: Sequence[Sequence[int]]) -> None:
        """Plan the buckets and allocate the buffers."""
        self._comm, self._cuts = comm, cuts
        self._buckets = [list(_buckets(cuts, rank)) for rank in range(comm.size)]
        self._turns = max(map(len, self._buckets))
        size = (comm.size, 8 * BUCKET if comm.size > 1 else 0)
        self._out, self._in = np.empty(size, np.uint8), np.empty(size, np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self._out.nbytes + self._in.nbytes

    def _bucket(self, rank: int, turn: int) -> list[Segment]:
        return self._buckets[rank][turn] if turn < len(self._buckets[rank]) else []

    @ieee
    def add(self, sources: Sequence[Array | None], sums: Sequence[Array | None], wire: str) -> None:
        """Write to `sums` this rank's part of the sums of the ranks' `sources`.

        Both have an entry for each leaf: a whole flat array, and the part; None leaves out the
        leaf, on all ranks. The dtypes of sources are those of the other ranks. With `wire`
        "bfloat16" they are rounded to that before they are added, those of this rank too.
        """
        rank = self._comm.rank
        dtypes = [None if s is None else _wire_dtype(s.dtype, wire) for s in sources]
        widths = [0 if dtype is None else dtype.itemsize for dtype in dtypes]

        def take(segment: Segment) -> Array:
            leaf, low, high = segment
            source = sources[leaf]
            assert source is not None
            if wire == "bfloat16" and not is_bfloat16(source.dtype):
                return _rounded(source[low:high]).view(np.uint8)
            return source[low:high].view(np.uint8)

        for turn in range(self._turns):
            send = [
                self._packed(self._bucket(other, turn), widths, self._out[other], take)
                for other in range(self._comm.size)
            ]
            own = self._bucket(rank, turn)
            receive = list(self._in[:, : send[rank].size])
            receive[rank] = send[rank]
            self._comm.exchange(send, receive)
            for place, (leaf, low, high) in _laid(own, widths):
                total, first = sums[leaf], self._cuts[leaf][rank]
                assert total is not None
                out, dtype = total[low - first : high - first], dtypes[leaf]
                end = place + (high - low) * widths[leaf]
                _add([part[place:end].view(dtype) for part in receive], out)

    def gather(
        self,
        parts: Sequence[Array | None],
        wholes: Sequence[Array | None],
        cuts: Sequence[Sequence[int]] | None = None,
        root: int | None = None,
    ) -> None:
        """Fill `wholes`, flat arrays, by the `parts` of all ranks.

        A part may be a view of its place in the whole. With `root`, only that rank needs `wholes`.
        With `cuts`, the arrays are not the leaves and are cut at these. A None in `parts` leaves
        out the array, on all ranks.
        """
        if self._comm.size == 1:
            for part, whole in zip(parts, wholes, strict=True):
                if part is not None and whole is not None:
                    whole[...] = part
            return
        comm, planned = self._comm, self._buckets
        turns, cuts = self._turns, self._cuts if cuts is None else cuts
        if cuts is not self._cuts:
            planned = [list(_buckets(cuts, rank)) for rank in range(comm.size)]
            turns = max(map(len, planned))
        widths = [0 if part is None else part.itemsize for part in parts]
        receives = root is None or root == comm.rank

        def take(segment: Segment) -> Array:
            leaf, low, high = segment
            part, first = parts[leaf], cuts[leaf][comm.rank]
            assert part is not None
            return part[low - first : high - first].view(np.uint8)

        for turn in range(turns):
            its = [rows[turn] if turn < len(rows) else [] for rows in planned]
            packed = self._packed(its[comm.rank], widths, self._out[0], take)
            nothing = packed[:0]
            send = [packed if root is None or root == r else nothing for r in range(comm.size)]
            if not receives:
                comm.exchange(send, [nothing] * comm.size)
                continue
            receive, places = [], []
            for rank, bucket in enumerate(its):
                laid = list(_laid(bucket, widths))
                places.append([(place, _bytes_of(wholes, segment)) for place, segment in laid])
                length = _length(bucket, widths)
                receive.append(places[-1][0][1] if len(laid) == 1 else self._in[rank, :length])
            comm.exchange(send, receive)
            for rank, targets in enumerate(places):
                data = packed if rank == comm.rank else receive[rank]
                for place, target in targets:
                    if _address(target) != _address(data):  # else it is there already
                        target[...] = data[place : place + target.size]

    def _packed(
        self,
        bucket: list[Segment],
        widths: Sequence[int],
        buffer: Array,
        take: Callable[[Segment], Array],
    ) -> Array:
        """Return the bytes of a bucket, in a buffer if it has more than one segment."""
        laid = list(_laid(bucket, widths))
        if len(laid) == 1:
            return take(laid[0][1])
        for place, segment in laid:
            data = take(segment)
            buffer[place : place + data.size] = data
        return buffer[: _length(bucket, widths)]


def _bytes_of(arrays: Sequence[Array | None], segment: Segment) -> Array:
    leaf, low, high = segment
    array = arrays[leaf]
    assert array is not None
    return array[low:high].view(np.uint8)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def add_over_ranks(comm: Comm, array: Array, most: bool = False) -> None:
    """Add a float64 array over ranks in place, or take the maximum."""
    own = np.ascontiguousarray(array)
    every = np.empty((comm.size, *own.shape))
    flat = [part.reshape(-1).view(np.uint8) for part in every]
    comm.exchange([own.reshape(-1).view(np.uint8)] * comm.size, flat)
    every[comm.rank] = own
    array[...] = every[0]
    for part in every[1:]:
        (np.maximum if most else np.add)(array, part, out=array)


def _buckets(cuts: Sequence[Sequence[int]], rank: int) -> Iterator[list[Segment]]:
    """Yield the segments of a rank's range, `BUCKET` elements at a time."""
    bucket: list[Segment] = []
    room = BUCKET
    for leaf, places in enumerate(cuts):
        low, high = places[rank], places[rank + 1]
        while low < high:
            end = min(high, low + room)
            bucket.append((leaf, low, end))
            room -= end - low
            low = end
            if room == 0:
                yield bucket
                bucket, room = [], BUCKET
    if bucket:
        yield bucket


def _laid(bucket: list[Segment], widths: Sequence[int]) -> Iterator[tuple[int, Segment]]:
    """Yield (first byte, segment) of the segments that travel; each is aligned to 8 bytes."""
    place = 0
    for segment in bucket:
        leaf, low, high = segment
        if widths[leaf]:
            yield place, segment
            place += -(-(high - low) * widths[leaf] // 8) * 8


def _length(bucket: list[Segment], widths: Sequence[int]) -> int:
    """Return the bytes of a bucket, to the end of its last segment."""
    end = 0
    for place, (leaf, low, high) in _laid(bucket, widths):
        end = place + (high - low) * widths[leaf]
    return end


def _wire_dtype(dtype: np.dtype[Any], wire: str) -> np.dtype[Any]:
    """Return the dtype in which numbers travel; bfloat16 is uint16."""
    is_short = wire == "bfloat16" or is_bfloat16(dtype)
    return np.dtype(np.uint16) if is_short else dtype


def _add(parts: list[Array], out: Array) -> None:
    """Add parts in their order; those that are uint16 are bfloat16."""
    with np.errstate(all="ignore"):
        for i, part in enumerate(parts):
            if part.dtype == np.uint16:
                part = (part.astype(np.uint32) << np.uint32(16)).view(np.float32)
            if i == 0:
                out[...] = part
            else:
                np.add(out, part, out=out)


def _rounded(values: Array) -> Array:
    """Return numbers as bfloat16, rounded to nearest and ties to even: `formats.encode`, faster."""
    out = np.empty(values.shape, np.uint16)
    bits = values.view(np.uint32) if values.dtype == np.float32 else None
    if bits is None or ((bits & np.uint32(0x7FFFFFFF)) >= formats.INFINITE).any():
        Stored("bfloat16", out).encode(np.ascontiguousarray(values))
        return out
    rounded = (bits >> np.uint32(16)) & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    out[...] = rounded
    return out
