"""LARS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from fusedopt import _check, _storage
from fusedopt._check import Array
from fusedopt._functional import apply
from fusedopt._groups import Check, Options
from fusedopt.formats import Stored
from fusedopt.optimizer import Optimizer


class LARS(Optimizer):
    """LARS [1]_: gradient descent with momentum and a rate for each leaf, for large batches.

    The rate of a leaf is ``lr`` times ``trust_coefficient * norm(p) / (norm(g) + weight_decay *
    norm(p) + eps)``, norms over the leaf; times 1 where one of them is 0. It is part of what enters
    the buffer: ``b = momentum * b + rate * (g + weight_decay * p)``, ``p = p - b``.

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
        Added to the norms that divide, >= 0.
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
    The norms take one more read of parameter and gradient, and of the buffer as it lies beside
    them. State of a leaf: ``step`` and ``momentum_buffer``. `fusedopt.reference.lars` is the
    formula.

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

    rule = "lars"
    state_names = ("momentum_buffer",)
    state_is_square = (False,)
    checks: ClassVar[dict[str, Check]] = {
        "lr": _check.nonnegative,
        "momentum": _check.nonnegative,
        "weight_decay": _check.nonnegative,
        "trust_coefficient": _check.positive,
        "eps": _check.nonnegative,
        "maximize": _check.flag,
        **_storage.CHECKS,
    }

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
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
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
        return (True,)

    @staticmethod
    def scalars(step: int, options: Options) -> dict[str, float]:
        """Return the constants of a step, in double; names as in csrc/rules/lars.h."""
        return {
            "grad_scale": -1.0 if options["maximize"] else 1.0,
            "l2": 0.0,
            "l1": 0.0,
            "lr": options["lr"],
            "momentum": options["momentum"],
            "weight_decay": options["weight_decay"],
            "trust": options["trust_coefficient"],
            "eps": options["eps"],
        }


def lars(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    momentum_buffers: Sequence[Array | Stored],
    *,
    step: int,
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one `LARS` step on lists of arrays, in place.

    Parameters
    ----------
    params, grads, momentum_buffers : list of array
        One entry for each tensor. `params` and `momentum_buffers` are updated; a gradient of None
        leaves its tensor out. An entry is an array or a `fusedopt.formats.Stored`; a float16 or
        bfloat16 array is rounded stochastically.
    step : int
        The number of this step, from 1.
    lr, momentum, weight_decay, trust_coefficient, eps, maximize
        As for `LARS`; `lr` is a number.
    seed : int
        Of stochastic rounding.

    Raises
    ------
    TypeError, ValueError
        Naming the array or the option; nothing has been written.
    """
    apply(
        LARS,
        {"params": params, "grads": grads, "momentum_buffers": momentum_buffers},
        step=step,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        maximize=maximize,
        seed=seed,
    )
