"""Every input check and its message.

A check either returns the value in the form that the rest of the package uses, or raises an error
that names the leaf or the option and says what to pass instead. Nothing here writes to the caller's
data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fusedopt._core import is_dense, same_layout
from fusedopt.formats import FORMATS, Stored, extra_shape, is_bfloat16

Array: TypeAlias = NDArray[Any]

SUPPORTED = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16))
_NAMES = "float32, float64, float16 or ml_dtypes.bfloat16"

# ------------------------------------------------------------------ arrays


def array(name: str, value: object) -> Array:
    """Return `value` if it is an ordinary NumPy array (or memory map) of a supported dtype."""
    if not isinstance(value, np.ndarray):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name}: expected a NumPy array, got {kind}; {_way_out(value)}")
    if type(value) not in (np.ndarray, np.memmap):
        raise TypeError(
            f"{name}: {type(value).__name__} is a subclass of array with semantics of its own, "
            "which an update in place would ignore; pass its data, numpy.asarray(...)"
        )
    if value.dtype not in SUPPORTED and not is_bfloat16(value.dtype):
        if value.dtype.newbyteorder("=") in SUPPORTED:
            raise TypeError(
                f"{name}: dtype {value.dtype.str} has foreign byte order; "
                f"convert it, .astype(numpy.{value.dtype.newbyteorder('=').name})"
            )
        way_out = (
            "pass bits of bfloat16 as .view(ml_dtypes.bfloat16)"
            if value.dtype == np.uint16
            else "convert it, e.g. .astype(numpy.float32)"
        )
        raise TypeError(f"{name}: dtype {value.dtype} is not supported ({_NAMES}); {way_out}")
    return value


def _way_out(value: object) -> str:
    """Return what to pass instead of a value that is not an array."""
    if type(value).__module__.partition(".")[0] == "torch":
        return "fusedopt.torch steps tensors; or pass its memory, .detach().numpy()"
    if isinstance(value, Mapping):
        return "convert it with dict(...)"
    if isinstance(value, Iterator) or isinstance(value, Set):
        return "convert it with list(...)"
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__") or _is_buffer(value):
        return "convert it with numpy.asarray(...)"
    if hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        return "pass a dict of its arrays, e.g. vars(...)"
    if isinstance(value, (int, float)):
        return "pass an array, which can be updated in place: numpy.array(...)"
    return "pass arrays, or lists, tuples and dicts of them"


def _is_buffer(value: object) -> bool:
    try:
        memoryview(value).release()  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bytes)


def writable(name: str, value: Array) -> Array:
    """Return `value` if its elements can be written, as one range of memory."""
    if not value.flags.writeable:
        raise ValueError(
            f"{name}: read-only array; fusedopt updates in place, pass a writable copy"
        )
    return dense(name, value)


def dense(name: str, value: Array) -> Array:
    """Return `value` if its elements are one range of memory."""
    if not is_dense(value):
        raise ValueError(
            f"{name}: array with gaps or negative strides (shape {value.shape}, strides "
            f"{value.strides}); fusedopt updates in place, pass a contiguous copy"
        )
    return value


def parameter(name: str, value: object) -> Array | Stored:
    """Return `value` if it can be updated in place; 16-bit arrays as `Stored`, with rounding."""
    if isinstance(value, Stored):
        return stored(name, value)
    param = writable(name, array(name, value))
    if param.itemsize > 2:
        return param
    kind = "bfloat16" if is_bfloat16(param.dtype) else "float16"
    return Stored(f"{kind}-stochastic", param)


def stored(name: str, value: Stored, *, writes: bool = True) -> Stored:
    """Return `value` if its parts are of its format, fit each other and can be written, or read."""
    usable = writable if writes else dense
    if value.format not in FORMATS or FORMATS[value.format][0] in (np.float32, np.float64):
        known = [name for name, row in FORMATS.items() if row[0] not in (np.float32, np.float64)]
        raise ValueError(f"{name}: unknown format {value.format!r}; known: {', '.join(known)}")
    dtype, extra_dtype, per = FORMATS[value.format]
    fits = (
        value.data.dtype == dtype
        if dtype is not None
        else is_bfloat16(value.data.dtype) or value.data.dtype == np.uint16
    )
    if not fits:
        raise TypeError(f"{name}: dtype {value.data.dtype} is not that of {value.format}")
    usable(name, value.data)
    if extra_dtype is None:
        return value
    extra = value.extra
    if extra is None or extra.dtype != extra_dtype:
        raise TypeError(f"{name}: {value.format} needs extra of dtype {np.dtype(extra_dtype)}")
    usable(f"{name}.extra", extra)
    if extra.shape != extra_shape(value.format, value.shape) or (
        per == 1 and not same_layout(extra, value.data)
    ):
        raise ValueError(f"{name}: extra of shape {extra.shape} does not fit {value.shape}")
    return value


def _same_shape(name: str, value: Array, param: Array) -> None:
    if value.shape != param.shape:
        raise ValueError(f"{name}: shape {value.shape} does not fit the parameter's {param.shape}")


def state(name: str, value: object, param: Array) -> Array | Stored:
    """Return `value` if it can be state of `param`: same shape and memory order, a format."""
    held = parameter(name, value)
    data = held.data if isinstance(held, Stored) else held
    _same_shape(name, data, param)
    is_double = param.dtype == np.float64
    if isinstance(held, Stored) and is_double:
        raise TypeError(f"{name}: {held.format} does not fit the parameter's float64")
    if not isinstance(held, Stored) and (held.dtype == np.float64) != is_double:
        raise TypeError(f"{name}: dtype {held.dtype} does not fit the parameter's {param.dtype}")
    if not same_layout(data, param):
        raise ValueError(
            f"{name}: strides {data.strides} differ from the parameter's {param.strides}; "
            "make it with numpy.zeros_like(param)"
        )
    return held


def _own_shape(name: str, data: Array, shape: tuple[int, ...], param: Array) -> None:
    if data.shape != shape:
        raise ValueError(
            f"{name}: shape {data.shape}; of a parameter of shape {param.shape} it is {shape}"
        )


def part(name: str, value: object, shape: tuple[int, ...], param: Array) -> Array:
    """Return `value` if it can be state of `param` that has a shape of its own."""
    data = array(name, value)
    _own_shape(name, data, shape, param)
    compute = np.float64 if param.dtype == np.float64 else np.float32
    if data.dtype != compute:
        raise TypeError(f"{name}: dtype {data.dtype}; it is kept as {np.dtype(compute)}")
    if not data.flags.c_contiguous:
        raise ValueError(f"{name}: strides {data.strides}; pass numpy.ascontiguousarray(...)")
    return writable(name, data)


def counts(name: str, value: object, shape: tuple[int, ...], param: Array) -> Array:
    """Return `value` if it can be how many steps each row of `param` has taken."""
    if type(value) is not np.ndarray:
        raise TypeError(f"{name}: expected a NumPy array, got {type(value).__name__}")
    if value.dtype != np.int64 or not value.dtype.isnative:
        raise TypeError(f"{name}: dtype {value.dtype}; it is kept as int64")
    _own_shape(name, value, shape, param)
    if not (value.flags.c_contiguous and value.flags.aligned):
        raise ValueError(
            f"{name}: strides {value.strides}, or memory that is not aligned; pass a copy"
        )
    return writable(name, value)


def refuse_counts(name: str, value: object) -> None:
    """Raise ValueError if something in an array of integers, or a number, is no number of steps."""
    value = np.asarray(value) if np.isscalar(value) else value
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
        for found in (value.min(), value.max()):
            steps(name, found)


def gradient(name: str, value: object, param: Array) -> Array:
    """Return `value`, or a copy of it in the memory order of `param` where they differ."""
    grad = array(name, value)
    _same_shape(name, grad, param)
    if same_layout(grad, param):
        return grad
    laid = np.empty_like(param, dtype=grad.dtype, subok=False)  # keeps the order of the axes
    np.copyto(laid, grad)
    return laid


def overlap(a: str, b: str) -> NoReturn:
    """Refuse two arrays that share memory and would both be written."""
    raise ValueError(
        f"{a} and {b} share memory and would both be written; pass each array once, "
        "and a copy where views overlap"
    )


def copy_target(name: str, value: object, param: Array) -> Array:
    """Return `value` if a rounded copy of `param` can be written to it."""
    target = writable(name, array(name, value))
    _same_shape(name, target, param)
    if target.itemsize > 2 and (target.dtype == np.float64) != (param.dtype == np.float64):
        raise TypeError(
            f"{name}: a copy of {param.dtype} is written as float16, bfloat16 or in the dtype that "
            f"steps compute in, not as {target.dtype}"
        )
    if not same_layout(target, param):
        raise ValueError(
            f"{name}: strides {target.strides} differ from the parameter's {param.strides}; "
            "make it with numpy.empty_like(param, dtype=...)"
        )
    return target


def zeroed(name: str, value: Array, param: Array) -> Array:
    """Return `value` if it is a gradient that can be set to zero in the pass that reads it."""
    if not value.flags.writeable:
        raise ValueError(f"{name}: read-only array; zero_grads writes to it, pass a writable one")
    if not same_layout(value, param):
        raise ValueError(
            f"{name}: its memory order differs from the parameter's, so a step reads a copy of it; "
            "zero_grads needs the same order, or set it to zero yourself"
        )
    return value


def not_finite(leaves: list[tuple[str, int, int]]) -> NoReturn:
    """Refuse gradients with infinite or NaN elements: (name, how many, of how many)."""
    if not leaves:
        raise FloatingPointError("a gradient of another rank has infinite or NaN elements")
    first = [f"{name}: {bad} of {n} elements are infinite or NaN" for name, bad, n in leaves[:4]]
    more = f"; and {len(leaves) - 4} more" if len(leaves) > 4 else ""
    raise FloatingPointError("; ".join(first) + more)


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
    except OverflowError:  # a whole number of hundreds of digits
        result = math.inf
    except (TypeError, ValueError) as exc:
        raise TypeError(f"{name}: expected a number, got {value!r}") from exc
    if not math.isfinite(result):
        raise ValueError(f"{name}: must be finite, got {result}")
    return result


def any_number(name: str, value: Any) -> float:
    """Return `value` as a float, which may be infinite or NaN."""
    if isinstance(value, (float, np.floating, np.ndarray)) and np.ndim(value) == 0:
        return float(value)
    return number(name, value)


def positive(name: str, value: Any) -> float:
    """Return `value` as a finite float > 0."""
    result = number(name, value)
    if result <= 0:
        raise ValueError(f"{name}: must be > 0, got {result}")
    return result


def limit(name: str, value: Any) -> float:
    """Return `value` as a float > 0, or infinity: no limit."""
    if isinstance(value, (float, np.floating, np.ndarray)) and np.all(value == math.inf):
        return math.inf if np.ndim(value) == 0 else positive(name, value)
    return positive(name, value)


def nonnegative(name: str, value: Any) -> float:
    """Return `value` as a finite float >= 0."""
    result = number(name, value)
    if result < 0:
        raise ValueError(f"{name}: must be >= 0, got {result}")
    return result


def nonpositive(name: str, value: Any) -> float:
    """Return `value` as a finite float <= 0."""
    result = number(name, value)
    if result > 0:
        raise ValueError(f"{name}: must be <= 0, got {result}")
    return result


def at_least(least: float) -> Any:
    """Return a check of a finite float that is not less."""

    def check(name: str, value: Any) -> float:
        result = number(name, value)
        if result < least:
            raise ValueError(f"{name}: must be >= {least:g}, got {result}")
        return result

    return check


def several(name: str, value: Any, length: int, word: str = "") -> None:
    """Let `value` be a tuple or list of a length, which messages may have as a word."""
    if not isinstance(value, (tuple, list)) or len(value) != length:
        raise TypeError(f"{name}: expected {word or length} numbers, got {value!r}")


def decay_rates(name: str, value: Any, count: int = 2) -> tuple[float, ...]:
    """Return `value` as two floats in [0, 1), or as many as are asked for."""
    several(name, value, count, {2: "two", 3: "three"}[count])
    return tuple([decay_rate(f"{name}[{i}]", rate) for i, rate in enumerate(value)])


def three_decay_rates(name: str, value: Any) -> tuple[float, ...]:
    """Return `value` as three floats in [0, 1)."""
    return decay_rates(name, value, 3)


def numbers(name: str, value: Any, length: int) -> tuple[float, ...]:
    """Return `value` as a number of finite floats."""
    several(name, value, length)
    return tuple(number(f"{name}[{i}]", x) for i, x in enumerate(value))


def decay_rate(name: str, value: Any) -> float:
    """Return `value` as a float in [0, 1)."""
    rate = number(name, value)
    if not 0 <= rate < 1:
        raise ValueError(f"{name}: must be in [0, 1), got {rate}")
    return rate


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float in [0, 1]."""
    rate = number(name, value)
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}: must be in [0, 1], got {rate}")
    return rate


def exponent(name: str, value: Any) -> float | None:
    """Return `value` as a float from 0 to 16, such that powers of any step are finite, or None."""
    result = None if value is None else number(name, value)
    if result is not None and not 0 <= result <= 16:
        raise ValueError(f"{name}: must be from 0 to 16, or None, got {result}")
    return result


def around_one(name: str, value: Any) -> tuple[float, float]:
    """Return `value` as two floats, the first between 0 and 1, the second > 1."""
    low, high = _two(name, value)
    if not 0 < low < 1 < high:
        raise ValueError(f"{name}: expected one number between 0 and 1 and one > 1, got {value!r}")
    return low, high


def interval(name: str, value: Any) -> tuple[float, float]:
    """Return `value` as two finite floats >= 0, in order."""
    low, high = _two(name, value)
    if not 0 <= low <= high:
        raise ValueError(f"{name}: expected numbers >= 0 in order, got {value!r}")
    return low, high


def _two(name: str, value: Any) -> tuple[float, float]:
    several(name, value, 2, "two")
    return number(f"{name}[0]", value[0]), number(f"{name}[1]", value[1])


def optional(check: Any) -> Any:
    """Return a check that also accepts None."""
    return lambda name, value: None if value is None else check(name, value)


optional_positive = optional(positive)
optional_fraction = optional(fraction)


def or_callable(check: Any) -> Any:
    """Return a check that also accepts a callable: a schedule, which each step calls."""
    return lambda name, value: value if callable(value) else check(name, value)


def flag(name: str, value: Any) -> bool:
    """Return `value` as a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def training(name: str, value: Any) -> bool:
    """Return `value`, which must be True."""
    if not flag(name, value):
        raise ValueError(
            f"{name}: must be True, as arrays hold what steps need but in the block of swap_ema, "
            "which shows what to evaluate"
        )
    return True


def count(name: str, value: Any, least: int = 0) -> int:
    """Return `value` as an int >= `least`, below 2**63."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if not least <= value < 2**63:
        raise ValueError(f"{name}: must be >= {least} and below 2**63, got {value}")
    return int(value)


def one_or_more(name: str, value: Any) -> int:
    """Return `value` as an int >= 1."""
    return count(name, value, 1)


def steps(name: str, value: Any, least: int = 0) -> int:
    """Return `value` as a number of steps: a count that can still grow in 64 bits."""
    result = count(name, value, least)
    if result >= 2**62:
        raise ValueError(f"{name}: must be below 2**62, got {value}")
    return result


def count_below(limit: int) -> Any:
    """Return a check of a count below a limit."""

    def check(name: str, value: Any) -> int:
        result = count(name, value)
        if result >= limit:
            raise ValueError(f"{name}: must be below {limit}, got {value}")
        return result

    return check


def dtype_name(value: Any) -> str:
    """Return the name of a dtype of NumPy, ml_dtypes or torch, without importing them."""
    text = str(value)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    try:
        return str(np.dtype(value).name)
    except TypeError:
        return text


def state_dtype(name: str, value: Any) -> str | None:
    """Return the name of a format of state; takes short names and dtypes."""
    short = {"bf16": "bfloat16", "fp32": "float32"}
    given: str | None = None
    if value is not None:
        given = value if isinstance(value, str) else dtype_name(value)
        given = short.get(given, given)
    if given not in (None, "float32", "bfloat16", "int8"):
        raise ValueError(
            f"{name}: expected None or 'float32' or 'bfloat16' or 'int8', or such a dtype, got "
            f"{value!r}"
        )
    return given


# names of our options in other libraries
_ALIASES = {
    "beta1": ("betas",), "beta2": ("betas",), "beta_1": ("betas",), "beta_2": ("betas",),
    "clip": ("max_grad_norm", "clip_value"), "clipnorm": ("max_grad_norm", "per_tensor"),
    "clipvalue": ("clip_value",), "decay": ("weight_decay",), "dtype": ("state_dtype",),
    "ema_decay": ("ema",), "epsilon": ("eps",), "global_clipnorm": ("max_grad_norm",),
    "grad_clip": ("max_grad_norm", "clip_value"), "l2": ("weight_decay",),
    "learning_rate": ("lr",), "rate": ("lr",), "wd": ("weight_decay",),
}  # fmt: skip


def refuse_unknown(where: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for options that are not known, with those that may be meant."""
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    import difflib  # here, as few need it

    said = []
    for name in unknown:
        meant = [alias for alias in _ALIASES.get(name, ()) if alias in known]
        meant = meant or difflib.get_close_matches(str(name), known, n=1, cutoff=0.7)
        said.append(f"{name!r}" + (f" (is {' or '.join(meant)} meant?)" if meant else ""))
    raise TypeError(f"{where}: unknown option {', '.join(said)}; known: {', '.join(known)}")


def choice(*allowed: Any) -> Any:
    """Return a check that `value` is one of `allowed`."""

    def check(name: str, value: Any) -> Any:
        for one in allowed:
            if type(value) is type(one) and value == one:
                return one
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")

    return check
