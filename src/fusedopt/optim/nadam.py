"""NAdam."""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import DECOUPLED, MAXIMIZE, Common, Option, Options, Rule, State, kept


def momentum(step: int, beta1: float, decay: float) -> float:
    """Return the momentum of a step, from 1: ``beta1 * (1 - 0.96**(step * decay) / 2)``."""
    missing: float = 0.96 ** (step * decay)
    return beta1 * (1.0 - 0.5 * missing)


@lru_cache(maxsize=64)
def _products(beta1: float, decay: float) -> tuple[float, ...]:
    """Return the products of the momenta of no steps, of one, ..., until they matter no more.

    That is when they are zero in float32, or when the next momentum is `beta1`.
    """
    products = [1.0]
    while products[-1] > 1e-46 and len(products) * decay < 918:  # 0.96**918 < 2**-54
        products.append(products[-1] * momentum(len(products), beta1, decay))
    return tuple(products)


def momentum_product(step: int, beta1: float, decay: float) -> float:
    """Return the product of the momenta of the steps from 1 to `step`."""
    products = _products(beta1, decay)
    last = min(step, len(products) - 1)
    return products[last] * beta1 ** (step - last)


def _constants(step: int, o: Options) -> dict[str, float]:
    beta1, beta2 = o["betas"]
    decay = o["momentum_decay"]
    g_size = o["lr"] * (1 - momentum(step, beta1, decay))
    m_size = o["lr"] * momentum(step + 1, beta1, decay)
    return {
        "keep": kept(o),
        "w1": 1 - beta1,
        "beta2": beta2,
        "w2": 1 - beta2,
        "root": sqrt(1 - beta2**step),
        "eps": o["eps"],
        "g_size": g_size / (1 - momentum_product(step, beta1, decay)),
        "m_size": m_size / (1 - momentum_product(step + 1, beta1, decay)),
    }


RULE = Rule(
    name="nadam",
    options=(
        Option("lr", 2e-3, _check.nonnegative),
        Option("betas", (0.9, 0.999), _check.decay_rates),
        Option("eps", 1e-8, _check.nonnegative),
        Option("weight_decay", 0.0, _check.nonnegative, term="l2"),
        Option("momentum_decay", 4e-3, _check.nonnegative),
        DECOUPLED,
        MAXIMIZE,
    ),
    states=(State("exp_avg"), State("exp_avg_sq", squared=True)),
    constants=_constants,
    numbers=(
        ("mu_product", lambda step, o: momentum_product(step, o["betas"][0], o["momentum_decay"])),
    ),
)


class NAdam(Optimizer):
    """NAdam [1]_: Adam with Nesterov's momentum.

    The parameter moves along the gradient and its mean, weighted by the momentum of this step and
    of the next. The momentum of step t, ``betas[0] * (1 - 0.96**(t * momentum_decay) / 2)``, rises
    from half of ``betas[0]`` to all of it.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 2e-3
        Step size, >= 0, in units of the parameter; a callable gets the step, from 1.
    betas : (float, float), default (0.9, 0.999)
        Decay rates of the moments, each in [0, 1).
    eps : float, default 1e-8
        Added to the square root of the corrected second moment, >= 0. With 0 an element whose
        gradients were all 0 becomes NaN.
    weight_decay : float, default 0
        L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
    momentum_decay : float, default 4e-3
        How fast the momentum rises, >= 0.
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
    State of a leaf: ``step``, ``exp_avg``, ``exp_avg_sq``. `fusedopt.reference.nadam` is the
    formula.

    The correction of the bias has the product of all momenta so far. Torch multiplies it up in
    float32, as ``mu_product`` of each parameter; here it is computed in double, from the step and
    the present options. A state dict of `fusedopt.torch.NAdam` has it too, and loads into either.

    References
    ----------
    .. [1] Dozat, ICLR workshop 2016, Algorithm 2; as torch.optim.NAdam 2.13.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0])
    >>> opt = fusedopt.NAdam(w, lr=0.1)
    >>> opt.step(np.array([1.0, -2.0]))
    StepResult(step=1, updated=1)
    >>> w.round(3)
    array([0.894, 2.106])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            momentum_decay=momentum_decay, decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize, **common,
        )  # fmt: skip


nadam = function(NAdam)
