"""Adafactor."""

from __future__ import annotations

from math import sqrt
from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import MAXIMIZE, NARROW, Common, Option, Options, Rule, State


def _eps(name: str, value: Any) -> tuple[float | None, float]:
    _check.several(name, value, 2, "two")
    first, second = value
    if first is not None:
        first = _check.nonnegative(f"{name}[0]", first)
    return first, _check.nonnegative(f"{name}[1]", second)


def _constants(step: int, o: Options) -> dict[str, float]:
    eps1, eps2 = o["eps"]
    return {
        "weight": step ** o["beta2_decay"],
        "eps1": -1.0 if eps1 is None else eps1,
        "keep": 1 - o["lr"] * o["weight_decay"],
        "rate": min(o["lr"], 1 / sqrt(step)),
        "eps2": eps2,
        "d": o["d"],
    }


RULE = Rule(
    name="adafactor",
    options=(
        Option("lr", 1e-2, _check.nonnegative),
        Option("beta2_decay", -0.8, _check.nonpositive),
        Option("eps", (None, 1e-3), _eps),
        Option("d", 1.0, _check.at_least(1.0)),
        Option("weight_decay", 0.0, _check.nonnegative),
        MAXIMIZE,
    ),
    states=(
        State("row_var", squared=True, part="rows", refuses=NARROW),
        State("col_var", squared=True, part="columns", refuses=NARROW),
        State("variance", squared=True, part="rest", refuses=NARROW),
    ),
    constants=_constants,
)


class Adafactor(Optimizer):
    """Adafactor [1]_: second moments of matrices as a product of their rows' and columns' means.

    It keeps one number for each row and each column of a matrix instead of one for each element,
    and no first moment, so that the state of a large matrix takes next to no memory. Small matrices
    take more: 3x3 convolutions have 2 numbers for 3 elements. The rate is relative to the size of a
    parameter, ``alpha = max(eps[1], RMS(p)) * min(lr, 1 / sqrt(t))``; with ``u``, the gradient
    divided by the root of the estimate, ``p = p - alpha * u / max(1, RMS(u) / d)``.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`. Of more than two axes the last two are matrices; those of two and more must
        be in row-major order.
    lr : float or callable(step) -> float, default 1e-2
        Largest rate, >= 0, as a part of the parameter's size; a callable gets the step, from 1.
    beta2_decay : float, default -0.8
        New squares have the weight ``t**beta2_decay`` in the means, <= 0.
    eps : (None or float, float), default (None, 1e-3)
        The first, squared, is the least estimate, and the least mean of a matrix: None is the
        rounding unit of the dtype that steps compute in. The second is the least size of a
        parameter. Each >= 0.
    d : float, default 1
        Largest root mean square of an update before the rate, >= 1.
    weight_decay : float, default 0
        Decoupled decay, >= 0: parameters shrink by ``lr * weight_decay`` in each step.
    maximize : bool, default False
        Step along the gradient, not against it.
    **common
        How parameters are stored, a running average of them, threads; see `Optimizer`. Narrow
        values of `state_dtype` are refused: they would save next to nothing.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`, and for matrices in another order.

    Notes
    -----
    A step reads the gradient three times: for the sums of squares of rows and columns, for the size
    of the update, and to take it. The first step allocates memory for the sums, some 2% of a large
    matrix; of 3x3 convolutions it is 1.3 times the parameter in float32, of a matrix of one column
    or row twice, and of 1x1 convolutions 4 times: pass these as matrices, ``w[:, :, 0, 0]``.
    ``reduce=`` is refused: it is for parts of leaves.

    State of a leaf: ``step``, and ``row_var`` and ``col_var``, of the parameter's shape with 1 for
    the last axis, and for the one before; or ``variance``, of the parameter's shape, of those with
    less than two axes. `fusedopt.reference.adafactor` is the formula.

    References
    ----------
    .. [1] Shazeer & Stern, ICML 2018, Algorithms 4 and 5; options and formula are those of
       `torch.optim.Adafactor` in PyTorch 2.13, which has no first moment, and whose ``eps[0]``
       follows a 16-bit parameter's own dtype.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.ones((2, 3))
    >>> opt = fusedopt.Adafactor(w, lr=0.1)
    >>> opt.step(np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]))
    StepResult(step=1, updated=1)
    >>> w.round(3)
    array([[0.9, 0.9, 0.9],
           [0.9, 0.9, 0.9]])
    >>> opt.state["params"]["row_var"].ravel().round(3)
    array([ 4.667, 18.667])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay,
            maximize=maximize, **common,
        )  # fmt: skip


adafactor = function(Adafactor)
