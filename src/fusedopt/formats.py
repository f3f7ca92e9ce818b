"""Storage formats narrower than float32, in plain NumPy: the oracle of csrc/codec, bit for bit.

An array in such a format is a `Stored`: the codes, and what belongs to them (residual bits, or one
byte for each block of 64 elements). A step decodes a block, computes in float32 and encodes it
again, so that no float32 array of the tensor's size ever exists.

=====================  ==========================================================  ===========
format                 an element                                                  bytes
=====================  ==========================================================  ===========
``bfloat16``           8 exponent and 7 mantissa bits                              2
``float16``            5 exponent and 10 mantissa bits                             2
``bfloat16+int16``     the bfloat16 nearest to a float32, and the bits to restore  4
                       that float32 exactly
``bfloat16+int8``      the same for a float with 15 mantissa bits                  3
``int8``               sign, 4 exponent and 3 mantissa bits in a block's window    1 + 1 / 64
``uint8``              5 exponent and 3 mantissa bits, no sign                     1 + 1 / 64
=====================  ==========================================================  ===========

The last three, and the first two with ``-stochastic`` in their name, round up or down at random, so
that the mean is kept: rounded to nearest, a value that moves by less than half a unit in each
update would stop changing. The relative error of one rounding is below 1/8 (8-bit, within the
window of 13 or 29 powers of two below the block's largest element), 1/128 (bfloat16) or 2**-15
(with 8 residual bits), with mean 0. Below the window ``int8`` is 0; ``uint8``, which holds second
moments, becomes the window's smallest number, so that no update divides by a moment of 0; below
2**-129 it may be 0. An infinite or NaN element of an 8-bit block is stored as NaN, and does not
affect the other elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedopt._ieee import ieee

__all__ = [
    "BLOCK", "FORMATS", "Stored", "decode", "encode", "extra_shape", "is_bfloat16", "key", "noise",
]  # fmt: skip

Array = NDArray[Any]

BLOCK = 64
"""Elements that are coded together."""
PIECE = 1024 * BLOCK  # elements encoded at a time, so that a large array needs little extra memory
INFINITE, QUIET_NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)

FORMATS: dict[str, tuple[Any, Any, int]] = {
    "float32": (np.float32, None, 1),
    "float64": (np.float64, None, 1),
    "bfloat16": (None, None, 1),
    "float16": (np.float16, None, 1),
    "bfloat16-stochastic": (None, None, 1),
    "float16-stochastic": (np.float16, None, 1),
    "bfloat16+int16": (None, np.int16, 1),
    "bfloat16+int8": (None, np.int8, 1),
    "int8": (np.uint8, np.uint8, BLOCK),
    "uint8": (np.uint8, np.uint8, BLOCK),
}
"""By name: dtype of the data (None: bfloat16), dtype of the extra, elements per entry of that."""


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is the dtype that ml_dtypes registers; ml_dtypes need not be installed."""
    return dtype.itemsize == 2 and dtype.type.__name__ == "bfloat16"


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """An array in a narrow format.

    Attributes
    ----------
    format : str
        A name of the table above.
    data : array
        The codes, in the shape of the array they stand for: float16, bfloat16 or its bits as
        uint16, or uint8.
    extra : array or None
        Residual bits, int16 or int8 in the shape of `data`; or uint8, one for each block of 64
        elements in memory order; or None.
    """

    format: str
    data: Array
    extra: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return self.data.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.data.size

    @property
    def nbytes(self) -> int:
        """Bytes of data and extra."""
        return self.data.nbytes + (0 if self.extra is None else self.extra.nbytes)

    def parts(self) -> list[Array]:
        """Return the arrays that it consists of."""
        return [self.data] if self.extra is None else [self.data, self.extra]

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the memory order in copies and pickles, because blocks follow it; NumPy does not."""
        order = memory_order(self.data)
        return in_order, (self.format, self.data.transpose(order), self.extra, order)

    def decode(self) -> NDArray[np.float32]:
        """Return the numbers, as a new float32 array of the same shape and memory order."""
        out = np.empty_like(self.data, np.float32, subok=False)
        flat(out)[...] = decode(self)
        return out

    def encode(self, values: Array, key: int = 0) -> None:
        """Store `values`, float32 or float64 in the same shape and memory order, rounded once.

        `key` selects the noise.
        """
        encode(self, flat(values), key)


def in_order(name: str, data: Array, extra: Array | None, order: list[int]) -> Stored:
    """Return the array whose axes, taken in `order`, give `data`; its memory is that of `data`."""
    return Stored(name, data.transpose(np.argsort(order)), extra)


def memory_order(array: Array) -> list[int]:
    """Return the axes from the one with the longest stride to the one with the shortest."""
    axes = sorted(range(array.ndim), key=lambda k: (-array.strides[k], k))
    axes.sort(key=lambda k: array.shape[k] == 1)  # axes of length 1 have any stride
    return axes


def flat(array: Array) -> Array:
    """Return a one-dimensional view of a dense array, in memory order."""
    view = array.transpose(memory_order(array)).reshape(-1)
    if array.size and not np.may_share_memory(view, array):  # a copy: writes to it would be lost
        raise ValueError(f"array of strides {array.strides} has gaps: it has no flat view")
    return view


def pieces(array: Array | Stored) -> Iterator[tuple[int, Array | Stored]]:
    """Yield (first element, flat view) of each piece of an array; pieces are whole blocks."""
    data = array.data if isinstance(array, Stored) else array
    view = flat(data)
    for start in range(0, view.size, PIECE):
        piece = view[start : start + PIECE]
        if not isinstance(array, Stored):
            yield start, piece
        elif array.extra is None:
            yield start, Stored(array.format, piece)
        else:
            per = FORMATS[array.format][2]
            extra = flat(array.extra)[start // per : (start + PIECE) // per]
            yield start, Stored(array.format, piece, extra)


def extra_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of `Stored.extra` for a format that has one and an array of `shape`."""
    per = FORMATS[name][2]
    return shape if per == 1 else (-(-math.prod(shape) // per),)


# ---------------------------------------------------------------- noise


def mix(x: int) -> int:
    """Return 64 well-mixed bits: splitmix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    full = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & full
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & full
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & full
    return x ^ (x >> 31)


def key(seed: int, leaf: int, step: int, slot: int) -> int:
    """Return the 64-bit key of an array: slot 0 is the parameter, then come its states.

    The lower half is the same for all arrays of a leaf in a step, the upper one for all leaves.
    """
    own = mix(mix(mix(seed) + leaf) + step) >> 32
    return pow(0x9E3779B9, slot - 1, 1 << 32) << 32 | own


def noise(key: int, counter: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return 32 random bits for each counter: those of the leaf times the factor of the slot."""
    x = (counter * np.uint32(0x9E3779B9)) ^ np.uint32(key & 0xFFFFFFFF)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    return x * np.uint32(key >> 32 | 1)


def random_bits(count: int, key: int, blocks: int, first: int = 0) -> NDArray[np.uint32]:
    """Return so many random bits for each element, in one row per block, from block `first` on.

    The two elements that share 32 bits take the lowest and the highest of them.
    """
    counter = np.arange(blocks * BLOCK // 2, dtype=np.uint32)
    counter += np.uint32(first * BLOCK // 2 % 2**32)
    random = noise(key, counter).reshape(blocks, BLOCK // 2)
    return np.hstack([random & np.uint32((1 << count) - 1), random >> np.uint32(32 - count)])


# ---------------------------------------------------------------- codecs, on rows of one block


def _rows(array: Array, dtype: Any) -> Array:
    padded = np.zeros(-(-array.size // BLOCK) * BLOCK, dtype)
    padded[: array.size] = flat(array).view(dtype)
    return padded.reshape(-1, BLOCK)


@ieee
def decode(stored: Stored) -> NDArray[np.float32]:
    """Return the elements of `stored` in memory order."""
    name, extra = stored.format, stored.extra
    if name in ("int8", "uint8"):
        assert extra is not None
        bits = _decode_8bit(_rows(stored.data, np.uint8), extra, name == "int8")
    elif name.startswith("float16"):
        return flat(stored.data).astype(np.float32)
    else:
        bits = _rows(stored.data, np.uint16).astype(np.uint32) << np.uint32(16)
        if extra is not None:
            shift = np.uint32(0 if extra.dtype == np.int16 else 8)
            low = _rows(extra, extra.dtype).astype(np.int32).view(np.uint32)
            bits += low << shift
    return bits.ravel().view(np.float32)[: stored.size]


@ieee
def encode(stored: Stored, values: Array, key: int, start: int = 0) -> None:
    """Store float32 or float64 `values`, in memory order, in `stored`.

    `stored` may be a piece of a larger array that begins at element `start`, of which the block
    counts.
    """
    name, extra, n = stored.format, stored.extra, stored.size
    if values.dtype == np.float64 and name != "bfloat16+int16":  # which holds a whole float32
        values = _to_odd(values)
    bits = _rows(np.ascontiguousarray(values, np.float32), np.uint32)
    is_8bit = name in ("int8", "uint8")
    random = random_bits(20 if is_8bit else 16, key, len(bits), start // BLOCK)
    if is_8bit:
        assert extra is not None
        codes, extra[...] = _encode_8bit(bits, random, name == "int8")
    elif name.startswith("float16"):
        codes = _encode_f16(bits, random if name.endswith("-stochastic") else None)
    elif extra is not None:
        shift = np.uint32(0 if extra.dtype == np.int16 else 8)
        if shift:
            longer = (bits + (random >> np.uint32(8))) >> shift << shift
            bits = np.where(_size(bits) <= INFINITE, longer, bits)
        bits = _quiet(bits)
        codes = (bits + np.uint32(0x8000)) >> np.uint32(16)
        low = (bits - (codes << np.uint32(16))).view(np.int32) >> shift.astype(np.int32)
        flat(extra)[...] = low.astype(extra.dtype).ravel()[:n]
    else:
        nearest = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        add = random if name.endswith("-stochastic") else nearest
        codes = np.where(_size(bits) < INFINITE, bits + add, _quiet(bits)) >> np.uint32(16)
    unsigned = np.uint8 if stored.data.itemsize == 1 else np.uint16
    flat(stored.data).view(unsigned)[...] = codes.astype(unsigned).ravel()[:n]


def _to_odd(values: Array) -> NDArray[np.float32]:
    """Return float64 `values` truncated to float32, with the last bit set if that is inexact.

    Rounding this to 22 bits or fewer gives the bits of one rounding (Boldo & Melquiond, 2008).
    """
    with np.errstate(all="ignore"):
        near = values.astype(np.float32)
    bits, size = near.view(np.uint32), np.abs(values)
    bits -= np.abs(near).astype(np.float64) > size
    bits |= np.abs(near).astype(np.float64) != size
    return near


def _size(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return bits & np.uint32(0x7FFFFFFF)


def _quiet(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return np.where(_size(bits) > INFINITE, QUIET_NAN, bits)


def _encode_f16(bits: NDArray[np.uint32], random: NDArray[np.uint32] | None) -> NDArray[np.uint32]:
    size = _size(bits)
    is_small = size < np.uint32(0x38800000)  # below the least normal float16
    small = np.where(is_small, size, np.uint32(0)).view(np.float32)
    if random is None:
        add = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        subnormal = (small + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    else:
        add = random >> np.uint32(3)
        chance = random.astype(np.float32) * np.float32(2.0**-16)
        subnormal = (small * np.float32(2.0**24) + chance).astype(np.uint32)
    normal = np.minimum(((size + add) >> np.uint32(13)) - np.uint32(112 << 10), np.uint32(0x7C00))
    codes = np.where(is_small, subnormal, normal)
    codes = np.where(size >= INFINITE, np.uint32(0x7C00), codes)
    codes = np.where(size > INFINITE, np.uint32(0x7E00), codes)
    signed: NDArray[np.uint32] = codes | ((bits >> np.uint32(16)) & np.uint32(0x8000))
    return signed


def _decode_8bit(codes: Array, about: Array, signed: bool) -> NDArray[np.uint32]:
    top = np.uint32(0x7F if signed else 0xFF)
    base = (about.astype(np.uint32) & np.uint32(0xFE))[:, None] << np.uint32(23)
    size = codes.astype(np.uint32) & top
    bits = np.where(size != 0, (size << np.uint32(20)) + base, np.uint32(0))
    if signed:
        bits += (codes.astype(np.uint32) & np.uint32(0x80)) << np.uint32(24)
    has_nonfinite = (about & np.uint8(1)).astype(bool)[:, None]
    return np.where(has_nonfinite & (size == top), QUIET_NAN, bits)


def _encode_8bit(
    bits: NDArray[np.uint32], random: NDArray[np.uint32], signed: bool
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    size = _size(bits)
    is_finite = size < INFINITE
    largest = np.where(is_finite, size, np.uint32(0)).max(axis=1, initial=0)
    base = ((largest + np.uint32(2 << 20)) >> np.uint32(23)).astype(np.int32)
    base = np.maximum((base - (15 if signed else 31) + 1) & ~1, 0)
    sums = ((size + random) >> np.uint32(20)).astype(np.int32)
    least = 0 if signed else np.minimum(sums, 1)
    codes = np.maximum(sums - (base[:, None] << 3), least).astype(np.uint32)
    if signed:
        codes |= (bits >> np.uint32(24)) & np.uint32(0x80)
    codes = np.where(is_finite, codes, np.uint32(0x7F if signed else 0xFF))
    return codes, (base | ~is_finite.all(axis=1)).astype(np.uint8)
