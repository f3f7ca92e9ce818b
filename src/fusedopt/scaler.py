"""A loss scale that follows what the gradients can bear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusedopt import _check
from fusedopt._ieee import ieee

if TYPE_CHECKING:
    from fusedopt._around import StepResult
    from fusedopt.optimizer import Optimizer


class GradScaler:
    """Scales the loss so that float16 gradients do not vanish, as ``torch.amp.GradScaler`` does.

    The loop multiplies the loss by `scale` (or the gradient that starts backpropagation); `step`
    takes it off in the optimizer's pass, skips the step if a gradient is infinite or NaN, and lets
    the scale shrink after such a step and grow after many without one.

    Parameters
    ----------
    init_scale : float > 0, default 65536
        Scale of the first step.
    growth_factor : float > 1, default 2
        Multiplies the scale after `growth_interval` good steps in a row.
    backoff_factor : float in (0, 1), default 0.5
        Multiplies it after a step that was skipped.
    growth_interval : int, default 2000
        Good steps until it grows.

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
    >>> scaler.step(opt, np.full(3, np.inf, np.float16)).skipped
    True
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
        self.scale = _check.positive("init_scale", init_scale)
        self.growth_factor = _check.number("growth_factor", growth_factor)
        self.backoff_factor = _check.positive("backoff_factor", backoff_factor)
        self.growth_interval = _check.count("growth_interval", growth_interval, least=1)
        if self.growth_factor <= 1:
            raise ValueError(f"growth_factor: must be > 1, got {growth_factor}")
        if self.backoff_factor >= 1:
            raise ValueError(f"backoff_factor: must be < 1, got {backoff_factor}")
        self._good = 0

    @ieee
    def step(self, optimizer: Optimizer, grads: Any, **options: Any) -> StepResult:
        """Step with gradients of the scaled loss, and adapt the scale.

        Parameters
        ----------
        optimizer : Optimizer
        grads
            As for `Optimizer.step`: gradients of ``scale * loss``.
        **options
            Of `Optimizer.step`, but for `grad_scale` and `nonfinite`, which are ours.

        Returns
        -------
        StepResult
            Of the optimizer; `skipped` if a gradient was infinite or NaN.
        """
        result = optimizer.step(grads, grad_scale=1 / self.scale, nonfinite="skip", **options)
        if result.skipped:
            self.scale = max(self.scale * self.backoff_factor, math.ulp(0.0) * 2**52)
            self._good = 0
        else:
            self._good += 1
            if self._good == self.growth_interval:
                larger = self.scale * self.growth_factor
                self.scale = larger if math.isfinite(larger) else self.scale
                self._good = 0
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and how it changes, under the names that torch's has."""
        return {
            "scale": self.scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._good,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, also torch's; ValueError if it is none."""
        try:
            names = ("scale", "growth_factor", "backoff_factor", "growth_interval")
            loaded = GradScaler(*(state_dict[name] for name in names))
            good = _check.count("_growth_tracker", state_dict["_growth_tracker"])
        except KeyError as exc:
            raise ValueError(f"state dict: no {exc}") from exc
        self.__dict__.update(loaded.__dict__, _good=good)
