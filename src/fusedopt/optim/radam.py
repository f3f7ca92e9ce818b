"""RAdam."""

from __future__ import annotations

from math import sqrt
from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import DECOUPLED, MAXIMIZE, Common, Option, Options, Rule, State, kept


def rectification(step: int, beta2: float) -> float | None:
    """Return the factor of a step's rate; None while the mean of squares is of few gradients."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length <= 5:
        return None
    return sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))


def _constants(step: int, o: Options) -> dict[str, float]:
    beta1, beta2 = o["betas"]
    step_size, factor = o["lr"] / (1 - beta1**step), rectification(step, beta2)
    if factor is not None:
        step_size *= sqrt(1 - beta2**step) * factor
    return {
        "keep": kept(o),
        "w1": 1 - beta1,
        "beta2": beta2,
        "w2": 1 - beta2,
        "eps": o["eps"],
        "step_size": step_size,
        "rectified": 0.0 if factor is None else 1.0,
    }


RULE = Rule(
    name="radam",
    options=(
        Option("lr", 1e-3, _check.nonnegative),
        Option("betas", (0.9, 0.999), _check.decay_rates),
        Option("eps", 1e-8, _check.nonnegative),
        Option("weight_decay", 0.0, _check.nonnegative, term="l2"),
        DECOUPLED,
        MAXIMIZE,
    ),
    states=(State("exp_avg"), State("exp_avg_sq", squared=True)),
    constants=_constants,
)


class RAdam(Optimizer):
    """RAdam [1]_: Adam with a smaller rate while its mean of squares is of few gradients.

    The mean of squares is of about ``rho`` gradients; ``rho`` grows with the step and with
    ``betas[1]``. Above 5, Adam's rate is multiplied by a factor that rises to 1; up to 5 (5 steps
    with the defaults) the parameter moves by ``lr`` times the corrected mean of the gradients.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1e-3
        Step size, >= 0, in units of the parameter; a callable gets the step, from 1.
    betas : (float, float), default (0.9, 0.999)
        Decay rates of the moments, each in [0, 1).
    eps : float, default 1e-8
        Added to the square root of the second moment, before its correction, >= 0. With 0 an
        element whose gradients were all 0 becomes NaN.
    weight_decay : float, default 0
        L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
    decoupled_weight_decay : bool, default False
        Shrink the parameter by the factor ``1 - lr * weight_decay`` before the update instead.
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
    State of a leaf: ``step``, ``exp_avg``, ``exp_avg_sq``. `fusedopt.reference.radam` is the
    formula.

    References
    ----------
    .. [1] Liu et al., ICLR 2020, Algorithm 2; as torch.optim.RAdam 2.13.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0])
    >>> opt = fusedopt.RAdam(w, lr=0.1)
    >>> opt.step(np.array([1.0, -2.0]))
    StepResult(step=1, updated=1)
    >>> w.round(3)
    array([0.9, 2.2])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay, maximize=maximize, **common,
        )  # fmt: skip


radam = function(RAdam)
