"""Adam for thinc and spaCy, which a config names "fusedopt.Adam.v1".

It has the arguments of thinc's "Adam.v1", and all but the update is thinc's: schedules, clipping,
weight decay, averages. thinc calls the optimizer for each parameter, so a step is many calls. The
update is thinc's own where weights are not float32 NumPy arrays, as on a GPU.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np

try:
    from thinc import optimizers, registry
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(f"fusedopt.thinc needs thinc 9: pip install thinc ({exc})") from exc

from fusedopt.functional import adam


class Optimizer(optimizers.Optimizer):
    """`thinc.optimizers.Optimizer` with the update of `fusedopt.functional.adam`."""

    __slots__ = ()

    def _adam(
        self, ops: Any, weights: Any, gradient: Any, lr_scale: float, key: Any, nr_upd: int
    ) -> Any:
        if type(weights) is not np.ndarray or weights.dtype != np.float32:
            return super()._adam(ops, weights, gradient, lr_scale, key, nr_upd)
        for moments in (self.mom1, self.mom2):
            if key not in moments:
                moments[key] = ops.alloc1f(weights.size)
        args = self._schedule_args(key)
        adam(
            [weights],
            [gradient],
            [self.mom1[key].reshape(weights.shape)],
            [self.mom2[key].reshape(weights.shape)],
            step=nr_upd,
            lr=self.learn_rate(self.step, **args) * lr_scale,
            betas=(self.b1(self.step, **args), self.b2(self.step, **args)),
            eps=self.eps(self.step, **args),
            eps_hat=True,
        )
        return weights, gradient


@registry.optimizers("fusedopt.Adam.v1")
@wraps(optimizers.Adam)
def Adam(learn_rate: Any = optimizers.ADAM_DEFAULTS["learn_rate"], **options: Any) -> Optimizer:
    """Return an optimizer with the arguments of thinc's "Adam.v1"."""
    return Optimizer(learn_rate, **options)
