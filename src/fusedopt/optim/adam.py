"""Adam and AdamW."""

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


class Adam(Optimizer):
    """Adam [1]_, in place, in one pass over memory.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        float32, float64, float16 or bfloat16, any shape, writable, without gaps. Updated in place;
        held until the optimizer is gone: write into the arrays, and do not put others in their
        place in the nesting, which the next step would refuse. ``resize(refcheck=False)`` of such
        an array moves its memory away unseen.
    lr : float or callable(step) -> float, default 1e-3
        Step size, >= 0, in units of the parameter; a callable gets the step, from 1.
    betas : (float, float), default (0.9, 0.999)
        Decay rates of the moments, each in [0, 1).
    eps : float, default 1e-8
        Added to the square root of the corrected second moment, >= 0.
    weight_decay : float, default 0
        L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
    l1 : float, default 0
        L1 penalty, >= 0: ``l1 * sign(param)`` is added to the gradient.
    amsgrad : bool, default False
        Divide by the largest second moment so far [2]_.
    maximize : bool, default False
        Go up the gradient.
    state_dtype, master_bits, min_8bit_size, seed, ema, ema_warmup, threads
        How arrays are stored, a running average of the parameters, threads; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError
        Naming the leaf or the option; nothing has been written.
    MemoryError
        If there is no memory for the state.

    Notes
    -----
    State of a leaf: ``step``, ``exp_avg``, ``exp_avg_sq`` and, with `amsgrad`,
    ``max_exp_avg_sq``, arrays of the parameter's shape and dtype. `fusedopt.reference.adam` is
    the formula, in NumPy, that the result equals bit for bit.

    References
    ----------
    .. [1] Kingma & Ba, ICLR 2015, Algorithm 1.
    .. [2] Reddi, Kale & Kumar, ICLR 2018, Algorithm 2, in torch's form.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> params = {"W": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    >>> opt = fusedopt.Adam(params, lr=0.5)
    >>> opt.step({"W": np.ones((2, 3), np.float32), "b": None})
    StepResult(step=1, updated=1)
    >>> params["W"].round(3)
    array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5]], dtype=float32)
    """

    rule = "adam"
    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    state_is_square = (False, True, True)
    checks: ClassVar[dict[str, Check]] = {
        "lr": _check.nonnegative,
        "betas": _check.decay_rates,
        "eps": _check.nonnegative,
        "weight_decay": _check.nonnegative,
        "l1": _check.nonnegative,
        "amsgrad": _check.flag,
        "maximize": _check.flag,
        **_storage.CHECKS,
    }

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        l1: float = 0.0,
        amsgrad: bool = False,
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
            l1=l1,
            amsgrad=amsgrad,
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
        return True, True, options["amsgrad"]

    @staticmethod
    def scalars(step: int, options: Options) -> dict[str, float]:
        """Return the constants of a step, in double; names as in csrc/rules/adam.h."""
        return _constants(step, options, options["weight_decay"], options["l1"], 1.0)


class AdamW(Adam):
    """AdamW: Adam with decoupled weight decay [1]_.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize
    state_dtype, master_bits, min_8bit_size, seed, ema, ema_warmup, threads
        As for `Adam`.
    weight_decay : float, default 1e-2
        >= 0: before the update the parameter shrinks by the factor ``1 - lr * weight_decay``.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`.

    Notes
    -----
    `fusedopt.reference.adamw` is the formula.

    References
    ----------
    .. [1] Loshchilov & Hutter, ICLR 2019, Algorithm 2.
    """

    checks: ClassVar[dict[str, Check]] = {k: v for k, v in Adam.checks.items() if k != "l1"}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
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
        Optimizer.__init__(
            self,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
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
    def scalars(step: int, options: Options) -> dict[str, float]:
        """Return the constants of a step: Adam's, with the decay as a factor."""
        keep = 1 - options["lr"] * options["weight_decay"]
        return _constants(step, options, 0.0, 0.0, keep)


def _constants(step: int, options: Options, l2: float, l1: float, keep: float) -> dict[str, float]:
    beta1, beta2 = options["betas"]
    return {
        "grad_scale": -1.0 if options["maximize"] else 1.0,
        "l2": l2,
        "l1": l1,
        "keep": keep,
        "w1": 1 - beta1,
        "beta2": beta2,
        "w2": 1 - beta2,
        "root": sqrt(1 - beta2**step),
        "eps": options["eps"],
        "step_size": options["lr"] / (1 - beta1**step),
    }


def adam(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    exp_avgs: Sequence[Array | Stored],
    exp_avg_sqs: Sequence[Array | Stored],
    max_exp_avg_sqs: Sequence[Array | Stored] | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one `Adam` step on lists of arrays, in place.

    Parameters
    ----------
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs : list of array
        One entry for each tensor. All but `grads` are updated; a gradient of None leaves its tensor
        out. AMSGrad where `max_exp_avg_sqs` is given. An entry is an array or a
        `fusedopt.formats.Stored`; a float16 or bfloat16 array is rounded stochastically.
    step : int
        The number of this step, from 1: it sets the bias corrections.
    lr, betas, eps, weight_decay, l1, maximize
        As for `Adam`; `lr` is a number.
    seed : int
        Of stochastic rounding.

    Raises
    ------
    TypeError, ValueError
        Naming the array or the option; nothing has been written.
    """
    apply(
        Adam,
        {
            "params": params,
            "grads": grads,
            "exp_avgs": exp_avgs,
            "exp_avg_sqs": exp_avg_sqs,
            "max_exp_avg_sqs": max_exp_avg_sqs,
        },
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        l1=l1,
        amsgrad=max_exp_avg_sqs is not None,
        maximize=maximize,
        seed=seed,
    )


def adamw(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    exp_avgs: Sequence[Array | Stored],
    exp_avg_sqs: Sequence[Array | Stored],
    max_exp_avg_sqs: Sequence[Array | Stored] | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one `AdamW` step on lists of arrays, in place; arguments as for `adam`."""
    apply(
        AdamW,
        {
            "params": params,
            "grads": grads,
            "exp_avgs": exp_avgs,
            "exp_avg_sqs": exp_avg_sqs,
            "max_exp_avg_sqs": max_exp_avg_sqs,
        },
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=max_exp_avg_sqs is not None,
        maximize=maximize,
        seed=seed,
    )
