"""Lion."""

from __future__ import annotations

from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import CAUTIOUS, MAXIMIZE, Common, Option, Options, Rule, State


def _constants(step: int, o: Options) -> dict[str, float]:
    beta1, beta2 = o["betas"]
    return {
        "lr": o["lr"],
        "beta1": beta1,
        "w1": 1 - beta1,
        "beta2": beta2,
        "w2": 1 - beta2,
        "keep": 1 - o["lr"] * o["weight_decay"],
        "cautious": float(o["cautious"]),
    }


RULE = Rule(
    name="lion",
    options=(
        Option("lr", 1e-4, _check.nonnegative),
        Option("betas", (0.9, 0.99), _check.decay_rates),
        Option("weight_decay", 0.0, _check.nonnegative),
        MAXIMIZE,
        CAUTIOUS,
    ),
    states=(State("exp_avg"),),
    constants=_constants,
    variant=("cautious", "cautious_lion"),
    counts=False,
)


class Lion(Optimizer):
    """Lion [1]_: every element moves by `lr`, along the sign of an interpolated momentum.

    ``p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)``, and then
    ``m = beta2 * m + (1 - beta2) * g``.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1e-4
        Step size, >= 0, in units of the parameter: a third to a tenth of Adam's; a callable gets
        the step, from 1.
    betas : (float, float), default (0.9, 0.99)
        Interpolation of the direction, and decay of the momentum, each in [0, 1).
    weight_decay : float, default 0
        Decoupled decay, >= 0: three to ten times AdamW's, because it is multiplied by `lr`.
    maximize : bool, default False
        Step along the gradient, not against it.
    cautious : bool, default False
        As for `AdamW` [2]_.
    **common
        How arrays are stored, a running average of the parameters, threads; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`.

    Notes
    -----
    State of a leaf: ``step`` and ``exp_avg``. `fusedopt.reference.lion` is the formula.

    References
    ----------
    .. [1] Chen et al., NeurIPS 2023, Algorithm 2; as lion-pytorch 0.2.5.
    .. [2] Liang et al., 2024 (arXiv 2411.16085); as ``caution`` of timm 1.0.31.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0, 3.0])
    >>> opt = fusedopt.Lion(w, lr=0.5)
    >>> opt.step(np.array([1e-3, -10.0, 0.0]))
    StepResult(step=1, updated=1)
    >>> w
    array([0.5, 2.5, 3. ])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        cautious: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize,
            cautious=cautious, **common,
        )  # fmt: skip


lion = function(Lion)
