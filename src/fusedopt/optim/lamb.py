"""LAMB."""

from __future__ import annotations

from math import sqrt
from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import MAXIMIZE, Common, Option, Options, Rule, State


def _constants(step: int, o: Options) -> dict[str, float]:
    beta1, beta2 = o["betas"]
    return {
        "lr": o["lr"],
        "w1": 1 - beta1,
        "beta2": beta2,
        "w2": 1 - beta2,
        "unbias": 1 / (1 - beta1**step),
        "root": sqrt(1 - beta2**step),
        "eps": o["eps"],
        "weight_decay": o["weight_decay"],
    }


RULE = Rule(
    name="lamb",
    options=(
        Option("lr", 1e-3, _check.nonnegative),
        Option("betas", (0.9, 0.999), _check.decay_rates),
        Option("eps", 1e-6, _check.nonnegative),
        Option("weight_decay", 0.01, _check.nonnegative),
        MAXIMIZE,
    ),
    states=(State("exp_avg"), State("exp_avg_sq", squared=True)),
    constants=_constants,
)


class LAMB(Optimizer):
    """LAMB [1]_: Adam with a rate for each leaf, for large batches.

    Each leaf moves along Adam's ``u = m / (sqrt(v) + eps) + weight_decay * p``, bias-corrected, at
    the rate ``lr * norm(p) / norm(u)``. The norms are over the leaf; if one of them is 0, the rate
    is ``lr``.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1e-3
        Step size, >= 0, as a fraction of the parameter's norm; a callable gets the step, from 1.
    betas : (float, float), default (0.9, 0.999)
        Decay rates of the moments, each in [0, 1).
    eps : float, default 1e-6
        Added to the square root of the corrected second moment, >= 0.
    weight_decay : float, default 0.01
        Decoupled decay, >= 0: part of the direction and its norm.
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
    The norms need one more read of parameter, gradient and state: 44 bytes per parameter instead of
    Adam's 28. State of a leaf: ``step``, ``exp_avg``, ``exp_avg_sq``.
    `fusedopt.reference.lamb` is the formula.

    References
    ----------
    .. [1] You et al., ICLR 2020, Algorithm 2, with phi the identity.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([3.0, 4.0])
    >>> opt = fusedopt.LAMB(w, lr=0.1, weight_decay=0.0)
    >>> opt.step(np.array([1.0, 1.0]))
    StepResult(step=1, updated=1)
    >>> w.round(3)
    array([2.646, 3.646])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize,
            **common,
        )  # fmt: skip


lamb = function(LAMB)
