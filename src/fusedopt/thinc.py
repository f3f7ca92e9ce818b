"""Adam for thinc and spaCy, under the name "fusedopt.Adam.v1" in a config.

It has the arguments of thinc's "Adam.v1", and all but the update is thinc's: schedules, bias
correction, clipping, weight decay, averages. thinc calls the optimizer for each parameter, so a
step is many calls. The update is thinc's own where weights are not float32 NumPy arrays, as on a
GPU.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np

try:
    from thinc import optimizers, registry
    from thinc.backends import NumpyOps
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(f"fusedopt.thinc needs thinc 8.3: pip install thinc ({exc})") from exc

from fusedopt.functional import adam

__all__ = ["Adam"]


class _Ops(NumpyOps):
    """thinc's operations on NumPy arrays, with the update of `fusedopt.functional.adam`.

    `thinc.optimizers.Optimizer` reads its options, which are numbers in thinc 8 and schedules in
    thinc 9, and calls this one function with their values.
    """

    def adam(
        self, weights: Any, gradient: Any, mom1: Any, mom2: Any, beta1: float, beta2: float,
        eps: float, learn_rate: float,
    ) -> Any:  # fmt: skip
        adam(
            [weights], [gradient], [mom1], [mom2], step=1, lr=learn_rate, betas=(beta1, beta2),
            eps=eps, bias_correction=False,  # learn_rate has it
        )  # fmt: skip
        return weights, gradient, mom1, mom2


_OPS = _Ops()


class Optimizer(optimizers.Optimizer):
    """`thinc.optimizers.Optimizer` with the update of `fusedopt.functional.adam`."""

    __slots__ = ()

    def _adam(self, ops: Any, weights: Any, *args: Any) -> Any:
        if type(weights) is np.ndarray and weights.dtype == np.float32:
            ops = _OPS
        return super()._adam(ops, weights, *args)


@registry.optimizers("fusedopt.Adam.v1")
@wraps(optimizers.Adam, assigned=())  # the signature of thinc's function, with our documentation
def Adam(learn_rate: Any = optimizers.ADAM_DEFAULTS["learn_rate"], **options: Any) -> Optimizer:
    """Return an optimizer with the arguments of thinc's "Adam.v1", and all of its defaults."""
    return Optimizer(learn_rate, **options)
