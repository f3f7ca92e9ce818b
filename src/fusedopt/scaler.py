"""A loss scale that adapts to gradients that overflow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusedopt import _check
from fusedopt._ieee import ieee

if TYPE_CHECKING:
    from fusedopt._options import StepResult
    from fusedopt.mpi import Sharded
    from fusedopt.optimizer import Optimizer


class GradScaler:
    """Scales the loss so that float16 gradients do not vanish, as ``torch.amp.GradScaler`` does.

    The loop multiplies the loss by `scale` (or the gradient that starts backpropagation). `step`
    divides by it in the optimizer's pass, and skips the step if a gradient is infinite or NaN. Once
    all optimizers have stepped, `update` shrinks the scale if one of them skipped its step, and
    grows it after many iterations without a skipped step.

    Parameters
    ----------
    init_scale : float > 0, default 65536
        Scale of the first step.
    growth_factor : float > 1, default 2
        Multiplies the scale after `growth_interval` iterations in a row without a skipped step.
    backoff_factor : float in (0, 1), default 0.5
        Multiplies the scale after an iteration with a skipped step.
    growth_interval : int, default 2000
        Iterations until it grows.

    Raises
    ------
    TypeError, ValueError
        Naming the option.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.ones(3, np.float32)
    >>> opt, scaler = fusedopt.SGD(w, lr=0.5), fusedopt.GradScaler(init_scale=8.0)
    >>> scaler.step(opt, np.float16(scaler.scale) * np.ones(3, np.float16)).skipped
    False
    >>> scaler.update()
    >>> scaler.step(opt, np.full(3, np.inf, np.float16)).skipped
    True
    >>> scaler.update()
    >>> w, scaler.scale
    (array([0.5, 0.5, 0.5], dtype=float32), 4.0)
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        """See the class."""
        self.scale = _scale("init_scale", init_scale)
        self.growth_factor = _check.number("growth_factor", growth_factor)
        self.backoff_factor = _check.positive("backoff_factor", backoff_factor)
        self.growth_interval = _check.count("growth_interval", growth_interval, least=1)
        if self.growth_factor <= 1:
            raise ValueError(f"growth_factor: must be > 1, got {growth_factor}")
        if self.backoff_factor >= 1:
            raise ValueError(f"backoff_factor: must be < 1, got {backoff_factor}")
        self._good = 0
        # since the last update; whether skipped
        self._stepped: list[tuple[Optimizer | Sharded, bool]] = []

    @ieee
    def step(self, optimizer: Optimizer | Sharded, grads: Any, **options: Any) -> StepResult:
        """Step with gradients of the scaled loss; `update` adapts the scale afterwards.

        Parameters
        ----------
        optimizer : Optimizer or mpi.Sharded
        grads
            As for `Optimizer.step`: gradients of ``scale * loss``.
        **options
            Of `Optimizer.step`, except `grad_scale` and `nonfinite`, which the scaler sets.

        Returns
        -------
        StepResult
            Of the optimizer; `skipped` if a gradient was infinite or NaN.

        Raises
        ------
        TypeError, ValueError
            As for `Optimizer.step`.
        RuntimeError
            If this optimizer has stepped since the last `update`.
        """
        if not hasattr(optimizer, "step"):
            raise TypeError(f"optimizer: expected an optimizer, got {type(optimizer).__name__}")
        scale = _scale("scale", self.scale)
        if any(optimizer is other for other, _ in self._stepped):
            raise RuntimeError("step: this optimizer has stepped already; call update() in between")
        result = optimizer.step(grads, grad_scale=1 / scale, nonfinite="skip", **options)
        self._stepped.append((optimizer, result.skipped))
        return result

    @ieee
    def update(self) -> None:
        """Adapt the scale to skipped steps: once, after the steps of all optimizers.

        Raises
        ------
        RuntimeError
            If there was no step since the last call.
        """
        if not self._stepped:
            raise RuntimeError("update: no optimizer has stepped since the last update")
        scale, good = self.scale, self._good + 1
        if any(skipped for _, skipped in self._stepped):
            scale, good = max(scale * self.backoff_factor, math.ulp(0.0) * 2**52), 0
        elif good == self.growth_interval:
            larger = scale * self.growth_factor
            scale, good = larger if math.isfinite(larger) else scale, 0
        self.scale, self._good, self._stepped = scale, good, []

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and how it changes, under torch's names."""
        return {
            "scale": self.scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._good,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a `state_dict`, also one of torch's; ValueError if it is not one."""
        try:
            names = ("scale", "growth_factor", "backoff_factor", "growth_interval")
            loaded = GradScaler(*(state_dict[name] for name in names))
            good = _check.count("_growth_tracker", state_dict["_growth_tracker"])
        except KeyError as exc:
            raise ValueError(f"state dict: no {exc}") from exc
        except (TypeError, ValueError) as exc:
            raise ValueError(f"state dict: {exc}") from exc
        self.__dict__.update(loaded.__dict__, _good=good)


def _scale(name: str, value: Any) -> float:
    scale = _check.positive(name, value)
    if not math.isfinite(1 / scale):
        raise ValueError(f"{name}: {scale} is too small to divide gradients by")
    return scale
