"""AdEMAMix."""

from __future__ import annotations

from math import exp, log, sqrt
from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import MAXIMIZE, Common, Option, Options, Rule, State


def scheduled(step: int, o: Options) -> tuple[float, float]:
    """Return the weight of the slow mean in a step, and its decay."""
    beta1, _, beta3 = o["betas"]
    alpha, warmup = o["alpha"], o["t_alpha_beta3"]
    if warmup is None or step >= warmup:
        return alpha, beta3
    done, fast, slow = step / warmup, log(beta1), log(beta3)
    beta = exp(fast * slow / ((1.0 - done) * slow + done * fast))
    return min(step * alpha / warmup, alpha), min(beta, beta3)


def _constants(step: int, o: Options) -> dict[str, float]:
    beta1, beta2, _ = o["betas"]
    alpha, beta3 = scheduled(step, o)
    return {
        "keep": 1 - o["lr"] * o["weight_decay"],
        "w1": 1 - beta1,
        "beta2": beta2,
        "w2": 1 - beta2,
        "w3": 1 - beta3,
        "root": sqrt(1 - beta2**step),
        "eps": o["eps"],
        "fast_size": o["lr"] / (1 - beta1**step),
        "slow_size": o["lr"] * alpha,
    }


def _demand(where: str, o: Options) -> None:
    if o["t_alpha_beta3"] is not None and not 0 < o["betas"][0] <= o["betas"][2]:
        raise ValueError(
            f"{where}t_alpha_beta3: raises the slow decay from betas[0] to betas[2], and so needs "
            f"0 < betas[0] <= betas[2], got {o['betas']}"
        )


RULE = Rule(
    name="ademamix",
    options=(
        Option("lr", 1e-3, _check.nonnegative),
        Option("betas", (0.9, 0.999, 0.9999), _check.three_decay_rates),
        Option("eps", 1e-8, _check.nonnegative),
        Option("weight_decay", 0.0, _check.nonnegative),
        Option("alpha", 5.0, _check.nonnegative),
        Option("t_alpha_beta3", None, _check.optional_positive),
        MAXIMIZE,
    ),
    states=(
        State("exp_avg"),
        State("exp_avg_sq", squared=True),
        State("exp_avg_slow", refuses=("int8",)),
    ),
    constants=_constants,
    demand=_demand,
)


class AdEMAMix(Optimizer):
    """AdEMAMix [1]_: AdamW along a sum of two means of the gradients, a fast one and a slow one.

    ``p = p - lr * (m / (1 - betas[0]**t) + alpha * s) / (sqrt(v / (1 - betas[1]**t)) + eps)``,
    where ``s`` is the mean that decays by ``betas[2]`` and whose bias is not corrected.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1e-3
        Step size, >= 0, in units of the parameter; a callable gets the step, from 1.
    betas : (float, float, float), default (0.9, 0.999, 0.9999)
        Decay rates of the fast mean, of the mean of squares, and of the slow mean, each in [0, 1).
    eps : float, default 1e-8
        Added to the square root of the corrected second moment, >= 0. With 0 an element whose
        gradients were all 0 becomes NaN.
    weight_decay : float, default 0
        >= 0: before the update the parameter shrinks by the factor ``1 - lr * weight_decay``.
    alpha : float, default 5
        Weight of the slow mean, >= 0.
    t_alpha_beta3 : float > 0, optional
        Steps in which the weight rises from 0 to `alpha`, linearly, and the slow decay from
        ``betas[0]`` to ``betas[2]``, so that its half-life in steps rises linearly.
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
    State of a leaf: ``step``, ``exp_avg``, ``exp_avg_sq``, ``exp_avg_slow``.
    `fusedopt.reference.ademamix` is the formula.

    The slow mean keeps errors of rounding for 10,000 steps: after as many of normal gradients the
    error of ``exp_avg_slow``, root mean square of 65,536 elements, was 1.9 times its size in 8
    bits, which are refused for it, and 0.14 times in bfloat16; with a mean of 0.3 standard
    deviations in the gradients 0.34 and 0.08.

    pytorch_optimizer counts the steps of a group; here each leaf has its own, as in torch.

    References
    ----------
    .. [1] Pagliardini, Ablin & Grangier, ICLR 2025, Algorithm 1; as pytorch_optimizer 4.1.0 with
       ``weight_decouple=True``.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0])
    >>> opt = fusedopt.AdEMAMix(w, lr=0.1)
    >>> opt.step(np.array([1.0, -2.0]))
    StepResult(step=1, updated=1)
    >>> w.round(3)
    array([0.9, 2.1])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 5.0,
        t_alpha_beta3: float | None = None,
        *,
        maximize: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, alpha=alpha,
            t_alpha_beta3=t_alpha_beta3, maximize=maximize, **common,
        )  # fmt: skip


ademamix = function(AdEMAMix)
