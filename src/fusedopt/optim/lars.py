"""LARS."""

from __future__ import annotations

from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import MAXIMIZE, Common, Option, Rule, State

RULE = Rule(
    name="lars",
    options=(
        Option("lr", 1.0, _check.nonnegative),
        Option("momentum", 0.9, _check.nonnegative),
        Option("weight_decay", 0.0, _check.nonnegative),
        Option("trust_coefficient", 1e-3, _check.positive),
        Option("eps", 0.0, _check.nonnegative),
        MAXIMIZE,
    ),
    states=(State("momentum_buffer"),),
    constants=lambda step, o: {
        "lr": o["lr"],
        "momentum": o["momentum"],
        "weight_decay": o["weight_decay"],
        "trust": o["trust_coefficient"],
        "eps": o["eps"],
    },
)


class LARS(Optimizer):
    """LARS [1]_: gradient descent with momentum and a rate for each leaf, for large batches.

    The rate of a leaf is ``lr`` times ``trust_coefficient * norm(p) / (norm(g) + weight_decay *
    norm(p) + eps)``, norms over the leaf; ``lr`` if one of them is 0. The buffer includes it:
    ``b = momentum * b + rate * (g + weight_decay * p)``, ``p = p - b``.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1.0
        Step size, >= 0; a callable gets the step, from 1.
    momentum : float, default 0.9
        Decay of the buffer, >= 0.
    weight_decay : float, default 0
        >= 0: ``weight_decay * param`` is added to the gradient.
    trust_coefficient : float, default 1e-3
        > 0: how far a leaf may go in a step, as a fraction of its norm.
    eps : float, default 0
        Added to the divisor, >= 0.
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
    The norms need one more read of parameter, gradient and buffer. State of a leaf: ``step`` and
    ``momentum_buffer``. `fusedopt.reference.lars` is the formula.

    References
    ----------
    .. [1] You, Gitman & Ginsburg, arXiv 1708.03888 (2017), Algorithm 1.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([3.0, 4.0])
    >>> opt = fusedopt.LARS(w, trust_coefficient=0.1)
    >>> opt.step(np.array([0.0, 2.0]))
    StepResult(step=1, updated=1)
    >>> w
    array([3. , 3.5])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        *,
        maximize: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay,
            trust_coefficient=trust_coefficient, eps=eps, maximize=maximize, **common,
        )  # fmt: skip


lars = function(LARS)
