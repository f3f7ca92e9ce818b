"""LAMB."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, ClassVar

from fusedopt import _check, _storage
from fusedopt._check import Array
from fusedopt._functional import apply
from fusedopt._groups import Check, Options
from fusedopt.formats import Stored
from fusedopt.optimizer import Optimizer


class LAMB(Optimizer):
    """LAMB [1]_: Adam with a rate for each leaf, for large batches.

    Where Adam would go, ``u = m / (sqrt(v) + eps) + weight_decay * p`` with its bias corrections,
    each leaf goes with the rate ``lr * norm(p) / norm(u)``, norms over the leaf; with ``lr`` where
    one of them is 0.

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
        Decoupled decay, >= 0: part of the direction, before its norm is taken.
    maximize : bool, default False
        Go up the gradient.
    state_dtype, master_bits, min_8bit_size, seed, ema, ema_warmup, threads
        How arrays are stored, a running average of the parameters, threads; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`.

    Notes
    -----
    The norms take one more read of parameter, gradient and state: 44 bytes for a parameter in the
    place of Adam's 28. State of a leaf: ``step``, ``exp_avg``, ``exp_avg_sq``.
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

    rule = "lamb"
    state_names = ("exp_avg", "exp_avg_sq")
    state_is_square = (False, True)
    checks: ClassVar[dict[str, Check]] = {
        "lr": _check.nonnegative,
        "betas": _check.decay_rates,
        "eps": _check.nonnegative,
        "weight_decay": _check.nonnegative,
        "maximize": _check.flag,
        **_storage.CHECKS,
    }

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        state_dtype: str | None = None,
        master_bits: int | None = None,
        min_8bit_size: int = 4096,
        seed: int = 0,
        ema: float | None = None,
        ema_warmup: bool = False,
        threads: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            state_dtype=state_dtype,
            master_bits=master_bits,
            min_8bit_size=min_8bit_size,
            seed=seed,
            ema=ema,
            ema_warmup=ema_warmup,
            threads=threads,
        )

    @staticmethod
    def uses(options: Options) -> tuple[bool, ...]:
        """Return which state these options need."""
        return True, True

    @staticmethod
    def scalars(step: int, options: Options) -> dict[str, float]:
        """Return the constants of a step, in double; names as in csrc/rules/lamb.h."""
        beta1, beta2 = options["betas"]
        return {
            "grad_scale": -1.0 if options["maximize"] else 1.0,
            "l2": 0.0,
            "l1": 0.0,
            "lr": options["lr"],
            "w1": 1 - beta1,
            "beta2": beta2,
            "w2": 1 - beta2,
            "unbias": 1 / (1 - beta1**step),
            "root": sqrt(1 - beta2**step),
            "eps": options["eps"],
            "weight_decay": options["weight_decay"],
        }


def lamb(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    exp_avgs: Sequence[Array | Stored],
    exp_avg_sqs: Sequence[Array | Stored],
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one `LAMB` step on lists of arrays, in place.

    Parameters
    ----------
    params, grads, exp_avgs, exp_avg_sqs : list of array
        One entry for each tensor. All but `grads` are updated; a gradient of None leaves its tensor
        out. An entry is an array or a `fusedopt.formats.Stored`; a float16 or bfloat16 array is
        rounded stochastically.
    step : int
        The number of this step, from 1: it sets the bias corrections.
    lr, betas, eps, weight_decay, maximize
        As for `LAMB`; `lr` is a number.
    seed : int
        Of stochastic rounding.

    Raises
    ------
    TypeError, ValueError
        Naming the array or the option; nothing has been written.
    """
    apply(
        LAMB,
        {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        seed=seed,
    )
