"""Every input check and its message.

A check either returns the value in the form that the rest of the package works with, or raises an
error that names the leaf or the option and says the way out. Nothing here writes to the caller's
data.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

SUPPORTED = (np.dtype(np.float32), np.dtype(np.float64))
_NAMES = " or ".join(d.name for d in SUPPORTED)

# ------------------------------------------------------------------ arrays


def array(name: str, value: object) -> Array:
    """Return `value` if it is a plain NumPy array (or memory map) of a supported dtype."""
    if not isinstance(value, np.ndarray):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(
            f"{name}: expected a NumPy array, got {kind}; pass numpy.asarray(...) of it"
        )
    if type(value) not in (np.ndarray, np.memmap):
        raise TypeError(
            f"{name}: {type(value).__name__} is a subclass of array with a meaning of its own, "
            "which an update in place would pass by; pass its plain data, numpy.asarray(...)"
        )
    if value.dtype not in SUPPORTED:
        if value.dtype.newbyteorder("=") in SUPPORTED:
            raise TypeError(
                f"{name}: dtype {value.dtype.str} has foreign byte order; "
                f"convert it, .astype(numpy.{value.dtype.newbyteorder('=').name})"
            )
        raise TypeError(
            f"{name}: dtype {value.dtype} is not supported ({_NAMES}); "
            "convert it, e.g. .astype(numpy.float32)"
        )
    return value


def is_dense(value: Array) -> bool:
    """Whether the elements fill one range of memory without gaps, in some order of the axes."""
    expected = value.itemsize
    if value.size == 0:
        return True
    axes = zip(value.strides, value.shape, strict=True)
    for stride, length in sorted(axis for axis in axes if axis[1] > 1):
        if stride != expected:
            return False
        expected *= length
    return True


def parameter(name: str, value: object) -> Array:
    """Return `value` if it can be updated in place."""
    param = array(name, value)
    if not param.flags.writeable:
        raise ValueError(
            f"{name}: read-only array; fusedopt updates in place, pass a writable copy"
        )
    if not is_dense(param):
        raise ValueError(
            f"{name}: array with gaps or negative strides (shape {param.shape}, strides "
            f"{param.strides}); fusedopt updates in place, pass a contiguous copy"
        )
    return param


def _same_shape(name: str, value: Array, param: Array) -> None:
    if value.shape != param.shape:
        raise ValueError(f"{name}: shape {value.shape} does not fit the parameter's {param.shape}")


def _same_layout(value: Array, param: Array) -> bool:
    unit, other = param.itemsize, value.itemsize
    axes = zip(value.strides, param.strides, param.shape, strict=True)
    return param.size == 0 or all(a * unit == b * other for a, b, n in axes if n > 1)


def state(name: str, value: object, param: Array) -> Array:
    """Return `value` if it can serve as state of `param`: same dtype, shape and memory order."""
    held = parameter(name, value)
    _same_shape(name, held, param)
    if held.dtype != param.dtype:
        raise TypeError(f"{name}: dtype {held.dtype} does not fit the parameter's {param.dtype}")
    if not _same_layout(held, param):
        raise ValueError(
            f"{name}: strides {held.strides} differ from the parameter's {param.strides}; "
            "make it with numpy.zeros_like(param)"
        )
    return held


def gradient(name: str, value: object, param: Array) -> Array:
    """Return `value`, or a copy of it in the memory order of `param` where they differ."""
    grad = array(name, value)
    _same_shape(name, grad, param)
    if _same_layout(grad, param):
        return grad
    laid = np.empty_like(param, dtype=grad.dtype, subok=False)  # keeps the order of the axes
    np.copyto(laid, grad)
    return laid


def overlap(a: str, b: str) -> NoReturn:
    """Refuse two arrays that share memory and would both be written."""
    raise ValueError(
        f"{a} and {b} share memory and would be updated twice; pass each array once, "
        "and a copy where views overlap"
    )


def alias(grad: str, other: str) -> NoReturn:
    """Refuse a gradient that the step itself would change."""
    raise ValueError(f"{grad}: shares memory with {other}, which the step writes; pass a copy")


# ------------------------------------------------------------------ options


def number(name: str, value: Any) -> float:
    """Return `value` as a finite float; takes NumPy and JAX scalars, no strings or bools."""
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        result = float(value)
    except (TypeError, ValueError) as exc:
        raise TypeError(f"{name}: expected a number, got {value!r}") from exc
    if not math.isfinite(result):
        raise ValueError(f"{name}: must be finite, got {result}")
    return result


def nonnegative(name: str, value: Any) -> float:
    """Return `value` as a finite float >= 0."""
    result = number(name, value)
    if result < 0:
        raise ValueError(f"{name}: must be >= 0, got {result}")
    return result


def decay_rates(name: str, value: Any) -> tuple[float, float]:
    """Return `value` as two floats in [0, 1)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected two numbers, got {value!r}")
    rates = (number(f"{name}[0]", value[0]), number(f"{name}[1]", value[1]))
    for k, rate in enumerate(rates):
        if not 0 <= rate < 1:
            raise ValueError(f"{name}[{k}]: must be in [0, 1), got {rate}")
    return rates


def flag(name: str, value: Any) -> bool:
    """Return `value` as a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def count(name: str, value: Any, least: int = 0) -> int:
    """Return `value` as an int >= `least`, below 2**63."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if not least <= value < 2**63:
        raise ValueError(f"{name}: must be >= {least} and below 2**63, got {value}")
    return int(value)
