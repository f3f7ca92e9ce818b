"""Learning rates as functions of the step.

Every schedule is a callable ``step -> float`` with steps counted from 1, and can be the `lr` of any
optimizer; so can any other callable of that kind. A schedule of n steps reaches its end at step
n + 1, `one_cycle` at step n, as torch's do, and stays there. They can be combined:

>>> rate = warmup(100, then=cosine(0.5, steps=900))
>>> rate(50), rate(100), rate(550), rate(1000)
(0.25, 0.5, 0.25, 0.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedopt import _check

__all__ = [
    "constant",
    "cosine",
    "exponential",
    "from_optax",
    "linear",
    "one_cycle",
    "piecewise",
    "polynomial",
    "staircase",
    "warmup",
]

Schedule = Callable[[int], float]


def _positive(name: str, value: Any) -> float:
    result = _check.number(name, value)
    if result <= 0:
        raise ValueError(f"{name}: must be > 0, got {result}")
    return result


def _some(name: str, value: Any) -> int:
    return _check.count(name, value, least=1)


# Each class checks its fields by this table, so that a bad schedule fails where it is made.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lr": _check.nonnegative,
    "end": _check.nonnegative,
    "start": _check.nonnegative,
    "max_lr": _check.nonnegative,
    "steps": _some,
    "every": _some,
    "gamma": _positive,
    "power": _positive,
    "div_factor": _positive,
    "final_div_factor": _positive,
}


class _Checked:
    """A dataclass whose fields have been checked, and turned into Python numbers."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            if name in _CHECKS:
                object.__setattr__(self, name, _CHECKS[name](name, getattr(self, name)))


@dataclass(frozen=True)
class constant(_Checked):  # noqa: N801
    """``lr``, at every step."""

    lr: float

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        return self.lr


@dataclass(frozen=True)
class polynomial(_Checked):  # noqa: N801
    """From `lr` to `end` over `steps` steps, as ``(1 - t / steps) ** power``, t = step - 1."""

    lr: float
    end: float
    steps: int
    power: float = 1.0

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        left = 1 - min((step - 1) / self.steps, 1.0)
        return float(self.end + (self.lr - self.end) * left**self.power)


def linear(lr: float, end: float, steps: int) -> polynomial:
    """Return the straight line from `lr` to `end` over `steps` steps."""
    return polynomial(lr, end, steps)


@dataclass(frozen=True)
class cosine(_Checked):  # noqa: N801
    """Half a cosine from `lr` to `end` over `steps` steps [1]_.

    References
    ----------
    .. [1] Loshchilov & Hutter, SGDR, ICLR 2017, equation 5, without restarts.
    """

    lr: float
    steps: int
    end: float = 0.0

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        return _anneal(self.lr, self.end, (step - 1) / self.steps)


def _anneal(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2


@dataclass(frozen=True)
class exponential(_Checked):  # noqa: N801
    """``lr * gamma ** (t / every)``, t = step - 1: smooth in the step."""

    lr: float
    gamma: float
    every: int = 1

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        return float(self.lr * self.gamma ** ((step - 1) / self.every))


@dataclass(frozen=True)
class staircase(_Checked):  # noqa: N801
    """``lr * gamma ** (t // every)``, t = step - 1: in jumps."""

    lr: float
    gamma: float
    every: int

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        return float(self.lr * self.gamma ** ((step - 1) // self.every))


@dataclass(frozen=True)
class piecewise(_Checked):  # noqa: N801
    """`lr`, times each factor of `{steps: factor}` once that many steps have been taken."""

    lr: float
    factors: Mapping[int, float] = field(hash=False)

    def __post_init__(self) -> None:
        """Check the table as well."""
        super().__post_init__()
        if not isinstance(self.factors, Mapping):
            raise TypeError(f"factors: expected a dict of step to factor, got {self.factors!r}")
        checked = {
            _some("factors", k): _positive(f"factors[{k}]", f) for k, f in self.factors.items()
        }
        object.__setattr__(self, "factors", checked)

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        return self.lr * math.prod(f for after, f in self.factors.items() if step > after)


@dataclass(frozen=True)
class one_cycle(_Checked):  # noqa: N801
    """One cycle over `steps` steps: up to `max_lr`, then down to nearly 0, by cosines [1]_.

    It starts at ``max_lr / div_factor``, peaks after `pct_start` of the steps, and ends at its
    start divided by `final_div_factor`, like torch's OneCycleLR with two phases. With
    ``pct_start=1`` the last step is the peak.

    References
    ----------
    .. [1] Smith & Topin, Super-Convergence, 2017 (arXiv:1708.07120).
    """

    max_lr: float
    steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        """Check that the peak lies inside the cycle."""
        super().__post_init__()
        share = _check.number("pct_start", self.pct_start)
        if not 0 <= share <= 1:
            raise ValueError(f"pct_start: must be in [0, 1], got {share}")

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        t, last = min(step, self.steps) - 1, self.steps - 1
        peak = self.pct_start * self.steps - 1
        start = self.max_lr / self.div_factor
        if t <= peak:  # the first step may be the peak; torch divides by 0 there
            return _anneal(start, self.max_lr, t / peak if peak else 1.0)
        return _anneal(self.max_lr, start / self.final_div_factor, (t - peak) / (last - peak))


@dataclass(frozen=True)
class warmup(_Checked):  # noqa: N801
    """Rise in a line from `start` to ``then(1)`` over `steps` steps, then continue with `then`.

    The first step is already above `start`; step number `steps` is at the top, and the one after it
    is the second of `then`.
    """

    steps: int
    then: Schedule
    start: float = 0.0

    def __post_init__(self) -> None:
        """Check that `then` is a schedule."""
        super().__post_init__()
        if not callable(self.then):
            raise TypeError(f"then: expected a schedule, got {self.then!r}; use constant(lr)")

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        if step < self.steps:
            return self.start + (float(self.then(1)) - self.start) * step / self.steps
        return float(self.then(step - self.steps + 1))


@dataclass(frozen=True)
class from_optax:  # noqa: N801
    """An optax schedule, which counts its steps from 0."""

    schedule: Callable[[int], Any]

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 1."""
        return float(self.schedule(step - 1))
