"""Stochastic gradient descent, with and without momentum."""

from __future__ import annotations

from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt._rows import ALL, TOUCHED
from fusedopt.optimizer import Optimizer
from fusedopt.rule import L1, MAXIMIZE, Common, Option, Options, Rule, State


def _demand(where: str, options: Options) -> None:
    if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
        raise ValueError(f"{where}nesterov: needs momentum > 0 and dampening == 0")


def _by_rows(options: Options) -> str:
    moves = options["momentum"] or options["weight_decay"] or options.get("l1")
    return ALL if moves and not options.get("lazy") else TOUCHED


RULE = Rule(
    name="sgd",
    options=(
        Option("lr", 1e-3, _check.nonnegative),
        Option("momentum", 0.0, _check.nonnegative),
        Option("dampening", 0.0, _check.number),
        Option("weight_decay", 0.0, _check.nonnegative, term="l2"),
        Option("nesterov", False, _check.flag),
        L1,
        MAXIMIZE,
        Option("lazy", False, _check.flag),
    ),
    states=(State("momentum_buffer", needs="momentum"),),
    constants=lambda step, o: {
        "lr": o["lr"],
        "momentum": o["momentum"],
        "w": 1 - o["dampening"],
        "nesterov": float(o["nesterov"]),
        "first": float(step == 1),
    },
    demand=_demand,
    counts=False,
    by_rows=_by_rows,
)


class SGD(Optimizer):
    """Gradient descent, with momentum or Nesterov's form of it [1]_, in place, in one pass.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        float32, float64, float16 or bfloat16, any shape, writable, without gaps. Updated in place
        and referenced as long as the optimizer exists.
    lr : float or callable(step) -> float, default 1e-3
        Step size, >= 0; a callable gets the step, from 1.
    momentum : float, default 0
        Decay of the momentum buffer, >= 0; with 0 there is no buffer.
    dampening : float, default 0
        The gradient enters the buffer with the weight ``1 - dampening``; in the first step with 1.
    weight_decay : float, default 0
        L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
    nesterov : bool, default False
        Look ahead along the buffer; needs momentum > 0 and no dampening.
    l1 : float, default 0
        L1 penalty, >= 0: ``l1 * sign(param)`` is added to the gradient.
    maximize : bool, default False
        Step along the gradient, not against it.
    lazy : bool, default False
        For a gradient that is `fusedopt.Rows`: leave rows without a gradient, and their momentum,
        as they are. By default momentum, weight decay and L1 are exact: with any of them such a
        gradient takes as much time and memory as one of all rows.
    **common
        How arrays are stored, a running average of the parameters, threads; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError
        Naming the leaf or the option; nothing has been written.
    MemoryError
        If there is no memory for the state.

    Notes
    -----
    State of a leaf: ``step`` and, with momentum, ``momentum_buffer``. `fusedopt.reference.sgd` is
    the formula in NumPy; the result equals it bit for bit.

    References
    ----------
    .. [1] Sutskever, Martens, Dahl & Hinton, ICML 2013; the rate outside the buffer, as in torch.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0])
    >>> opt = fusedopt.SGD(w, lr=0.5)
    >>> opt.step(np.array([1.0, 1.0]))
    StepResult(step=1, updated=1)
    >>> w
    array([0.5, 1.5])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        l1: float = 0.0,
        maximize: bool = False,
        lazy: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, l1=l1, maximize=maximize, lazy=lazy, **common,
        )  # fmt: skip


sgd = function(SGD)
