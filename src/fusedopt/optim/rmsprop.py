"""RMSprop."""

from __future__ import annotations

from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import EPS_IN_SQRT, MAXIMIZE, Common, Option, Rule, State

RULE = Rule(
    name="rmsprop",
    options=(
        Option("lr", 1e-2, _check.nonnegative),
        Option("alpha", 0.99, _check.decay_rate),
        Option("eps", 1e-8, _check.nonnegative),
        Option("weight_decay", 0.0, _check.nonnegative, term="l2"),
        Option("momentum", 0.0, _check.nonnegative),
        Option("centered", False, _check.flag),
        MAXIMIZE,
        EPS_IN_SQRT,
    ),
    states=(
        State("square_avg", squared=True),
        State("momentum_buffer", needs="momentum"),
        State("grad_avg", needs="centered"),
    ),
    constants=lambda step, o: {
        "lr": o["lr"],
        "alpha": o["alpha"],
        "w": 1 - o["alpha"],
        "eps": o["eps"],
        "momentum": o["momentum"],
        "inside": float(o["eps_in_sqrt"]),
    },
)


class RMSprop(Optimizer):
    """RMSprop [1]_: gradient descent with each element's step divided by its recent size.

    ``v = alpha * v + (1 - alpha) * g**2``, then ``p = p - lr * g / (sqrt(v) + eps)``; with momentum
    a buffer sums these quotients, and the parameter moves by ``lr`` times the buffer.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1e-2
        Step size, >= 0, in units of the parameter; a callable gets the step, from 1.
    alpha : float, default 0.99
        Decay of the mean of squares, in [0, 1).
    eps : float, default 1e-8
        Added to the root, >= 0.
    weight_decay : float, default 0
        L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
    momentum : float, default 0
        Decay of the buffer, >= 0; with 0 there is none.
    centered : bool, default False
        Divide by the standard deviation of the gradient [2]_: the root of
        ``v - mean(g)**2``, which counts as 0 if rounding makes it negative.
    maximize : bool, default False
        Step along the gradient, not against it.
    eps_in_sqrt : bool, default False
        Add `eps` to ``v``, not to its root, and let the buffer sum ``lr`` times the quotients, as
        TensorFlow, Keras and optax do.
    **common
        How arrays are stored, a running average of the parameters, threads; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`.

    Notes
    -----
    State of a leaf: ``step``, ``square_avg`` and, if used, ``momentum_buffer`` and ``grad_avg``.
    `fusedopt.reference.rmsprop` is the formula.

    References
    ----------
    .. [1] Tieleman & Hinton, Coursera, Neural Networks for Machine Learning, lecture 6.5, 2012;
       as torch.optim.RMSprop 2.13.
    .. [2] Graves, arXiv 1308.0850 (2013), equations 38 to 45.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0])
    >>> opt = fusedopt.RMSprop(w, lr=0.1)
    >>> opt.step(np.array([1.0, -2.0]))
    StepResult(step=1, updated=1)
    >>> w.round(3)
    array([0., 3.])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        eps_in_sqrt: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum,
            centered=centered, maximize=maximize, eps_in_sqrt=eps_in_sqrt, **common,
        )  # fmt: skip


rmsprop = function(RMSprop)
