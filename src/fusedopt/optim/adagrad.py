"""Adagrad."""

from __future__ import annotations

from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt._rows import ALL, TOUCHED
from fusedopt.optimizer import Optimizer
from fusedopt.rule import EPS_IN_SQRT, MAXIMIZE, Common, Option, Rule, State

RULE = Rule(
    name="adagrad",
    options=(
        Option("lr", 1e-2, _check.nonnegative),
        Option("lr_decay", 0.0, _check.nonnegative),
        Option("weight_decay", 0.0, _check.nonnegative, term="l2"),
        Option("initial_accumulator_value", 0.0, _check.nonnegative),
        Option("eps", 1e-10, _check.nonnegative),
        MAXIMIZE,
        EPS_IN_SQRT,
        Option("rowwise", False, _check.flag),
    ),
    states=(State("sum", squared=True, init="initial_accumulator_value", by_row="rowwise"),),
    constants=lambda step, o: {
        "step_size": o["lr"] / (1 + (step - 1) * o["lr_decay"]),
        "eps": o["eps"],
        "inside": float(o["eps_in_sqrt"]),
        "rowwise": float(o.get("rowwise", False)),
    },
    variant=("rowwise", "rowwise_adagrad"),
    by_rows=lambda o: ALL if o["weight_decay"] else TOUCHED,
)


class Adagrad(Optimizer):
    """Adagrad [1]_: each element's step divided by the root of all its squared gradients.

    ``sum = sum + g**2``, then ``p = p - lr * g / (sqrt(sum) + eps)``: elements that seldom have a
    gradient, such as rows of an embedding, keep a large rate.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1e-2
        Step size, >= 0, in units of the parameter; a callable gets the step, from 1.
    lr_decay : float, default 0
        >= 0: the rate of a leaf's step t, from 1, is ``lr / (1 + (t - 1) * lr_decay)``.
    weight_decay : float, default 0
        L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
    initial_accumulator_value : float, default 0
        Initial value of every element of ``sum``, >= 0; later changes have no effect.
    eps : float, default 1e-10
        Added to the root, >= 0. With 0 an element whose gradients were all 0 becomes NaN.
    maximize : bool, default False
        Step along the gradient, not against it.
    eps_in_sqrt : bool, default False
        Add `eps` to ``sum``, not to its root, as Keras does.
    rowwise : bool, default False
        Keep one number for each row, along the first axis, instead of one for each element:
        ``sum = sum + mean(g**2)``, the mean over the row [2]_. It is in float32, or float64 of
        float64 parameters, whatever `state_dtype` is, and cannot change later.
    **common
        How arrays are stored, a running average of the parameters, threads; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`.

    Notes
    -----
    State of a leaf: ``step`` and ``sum``. `fusedopt.reference.adagrad` is the formula.

    Rounding errors stay in a sum that never decays. Stochastic rounding keeps its mean right; over
    10,000 steps of normal gradients the standard deviation of its relative error, of 65,536
    elements, grew to 0.22 in 8 bits (0.21 after 1,000) and 0.05 in bfloat16. The error of the
    update is half as large.

    References
    ----------
    .. [1] Duchi, Hazan & Singer, JMLR 12 (2011), with diagonal matrices; as torch.optim.Adagrad
       2.13.
    .. [2] EXACT_ROWWISE_ADAGRAD of FBGEMM 1.2, and RowWiseAdagrad of TorchRec 1.1: of matrices.
       FBGEMM divides the rate by the root first, which rounds differently.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0])
    >>> opt = fusedopt.Adagrad(w, lr=0.5)
    >>> opt.step(np.array([1.0, -2.0]))
    StepResult(step=1, updated=1)
    >>> w.round(3)
    array([0.5, 2.5])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        eps_in_sqrt: bool = False,
        rowwise: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, eps=eps, maximize=maximize,
            eps_in_sqrt=eps_in_sqrt, rowwise=rowwise, **common,
        )  # fmt: skip


adagrad = function(Adagrad)
