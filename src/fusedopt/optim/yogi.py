"""Yogi."""

from __future__ import annotations

from math import sqrt
from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import MAXIMIZE, Common, Option, Options, Rule, State, kept


def _constants(step: int, o: Options) -> dict[str, float]:
    beta1, beta2 = o["betas"]
    return {
        "keep": kept(o),
        "w1": 1 - beta1,
        "w2": 1 - beta2,
        "root": sqrt(1 - beta2**step),
        "eps": o["eps"],
        "step_size": o["lr"] / (1 - beta1**step),
    }


RULE = Rule(
    name="yogi",
    options=(
        Option("lr", 1e-2, _check.nonnegative),
        Option("betas", (0.9, 0.999), _check.decay_rates),
        Option("initial_accumulator", 1e-6, _check.nonnegative),
        Option("weight_decay", 0.0, _check.nonnegative, term="l2"),
        Option("weight_decouple", True, _check.flag),
        Option("fixed_decay", False, _check.flag),
        Option("eps", 1e-3, _check.nonnegative),
        MAXIMIZE,
    ),
    states=(
        State("exp_avg", init="initial_accumulator"),
        State("exp_avg_sq", squared=True, init="initial_accumulator"),
    ),
    constants=_constants,
)


class Yogi(Optimizer):
    """Yogi [1]_: Adam whose second moment shrinks slowly where gradients become small.

    ``m = m + (1 - beta1) * (g - m)``, ``v = v - (1 - beta2) * sign(v - g**2) * g**2``, and then
    ``p = p - lr * m / (1 - beta1**t) / (sqrt(v) / sqrt(1 - beta2**t) + eps)``.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1e-2
        Step size, >= 0, in units of the parameter; a callable gets the step, from 1.
    betas : (float, float), default (0.9, 0.999)
        Decay rates of the moments, each in [0, 1).
    initial_accumulator : float, default 1e-6
        Initial value of every element of both moments, >= 0; later changes have no effect.
    weight_decay : float, default 0
        >= 0: before the update the parameter shrinks by the factor ``1 - lr * weight_decay``.
    weight_decouple : bool, default True
        If not, the decay is an L2 penalty: ``weight_decay * param`` is added to the gradient.
    fixed_decay : bool, default False
        Let the factor be ``1 - weight_decay``, whatever the rate.
    eps : float, default 1e-3
        Added to the root of the corrected second moment, >= 0.
    maximize : bool, default False
        Step along the gradient, not against it.
    **common
        How arrays are stored, a running average of the parameters, threads; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`.

    Notes
    -----
    State of a leaf: ``step``, ``exp_avg`` and ``exp_avg_sq``. `fusedopt.reference.yogi` is the
    formula. What differs from [2]_: steps are counted for each leaf, not for a group.

    Narrow formats keep the second moment right in the mean: after 10,000 steps of normal gradients
    that of 65,536 elements was 1.4% too large in 8 bits and 0.1% in bfloat16, with standard
    deviations of the relative error of 0.23 and 0.06. The held-out loss of ``fusedopt train``, of
    eight seeds, was 0.20 (standard deviation 0.06) with float32 state, 0.19 with bfloat16 and 0.18
    with 8 bits.

    References
    ----------
    .. [1] Zaheer, Reddi, Sachan, Kale & Kumar, NeurIPS 2018, Algorithm 2, with Adam's corrections.
    .. [2] pytorch_optimizer.Yogi 4.1.0, whose results these are.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0])
    >>> opt = fusedopt.Yogi(w, lr=0.5)
    >>> opt.step(np.array([1.0, -2.0]))
    StepResult(step=1, updated=1)
    >>> w.round(3)
    array([0.501, 2.5  ])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        initial_accumulator: float = 1e-6,
        weight_decay: float = 0.0,
        weight_decouple: bool = True,
        fixed_decay: bool = False,
        eps: float = 1e-3,
        *,
        maximize: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, betas=betas, initial_accumulator=initial_accumulator,
            weight_decay=weight_decay, weight_decouple=weight_decouple, fixed_decay=fixed_decay,
            eps=eps, maximize=maximize, **common,
        )  # fmt: skip


yogi = function(Yogi)
