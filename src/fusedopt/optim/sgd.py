"""Stochastic gradient descent, plain and with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from fusedopt import _check, _storage
from fusedopt._check import Array
from fusedopt._functional import apply
from fusedopt._groups import Check, Options
from fusedopt.formats import Stored
from fusedopt.optimizer import Optimizer


class SGD(Optimizer):
    """Gradient descent, with momentum or Nesterov's form of it [1]_, in place, in one pass.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        float32, float64, float16 or bfloat16, any shape, writable, without gaps. Updated in place;
        held until the optimizer is gone.
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
    State of a leaf: ``step`` and, with momentum, ``momentum_buffer``. `fusedopt.reference.sgd` is
    the formula, in NumPy, that the result equals bit for bit.

    References
    ----------
    .. [1] Sutskever, Martens, Dahl & Hinton, ICML 2013, with the rate outside the buffer, as torch.

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

    rule = "sgd"
    state_names = ("momentum_buffer",)
    state_is_square = (False,)
    checks: ClassVar[dict[str, Check]] = {
        "lr": _check.nonnegative,
        "momentum": _check.nonnegative,
        "dampening": _check.number,
        "weight_decay": _check.nonnegative,
        "nesterov": _check.flag,
        "l1": _check.nonnegative,
        "maximize": _check.flag,
        **_storage.CHECKS,
    }

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
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            l1=l1,
            maximize=maximize,
            state_dtype=state_dtype,
            master_bits=master_bits,
            min_8bit_size=min_8bit_size,
            seed=seed,
            ema=ema,
            ema_warmup=ema_warmup,
            threads=threads,
        )

    @classmethod
    def check_options(cls, options: Options, where: str) -> Options:
        """Check each option, and that Nesterov has what it needs."""
        checked = super().check_options(options, where)
        if checked["nesterov"] and (checked["momentum"] == 0 or checked["dampening"] != 0):
            raise ValueError(f"{where}nesterov: needs momentum > 0 and dampening == 0")
        return checked

    @staticmethod
    def uses(options: Options) -> tuple[bool, ...]:
        """Return which state these options need."""
        return (options["momentum"] != 0,)

    @staticmethod
    def scalars(step: int, options: Options) -> dict[str, float]:
        """Return the constants of a step, in double; names as in csrc/rules/sgd.h."""
        return {
            "grad_scale": -1.0 if options["maximize"] else 1.0,
            "l2": options["weight_decay"],
            "l1": options["l1"],
            "lr": options["lr"],
            "momentum": options["momentum"],
            "w": 1 - options["dampening"],
            "nesterov": float(options["nesterov"]),
            "first": float(step == 1),
        }


def sgd(
    params: Sequence[Array | Stored],
    grads: Sequence[Array | None],
    momentum_buffers: Sequence[Array | Stored] | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    seed: int = 0,
) -> None:
    """Take one `SGD` step on lists of arrays, in place.

    Parameters
    ----------
    params, grads, momentum_buffers : list of array
        One entry for each tensor. `params` and, with momentum, `momentum_buffers` are updated; a
        gradient of None leaves its tensor out. An entry is an array or a
        `fusedopt.formats.Stored`; a float16 or bfloat16 array is rounded stochastically.
    step : int
        The number of this step, from 1: in the first, the buffer becomes the gradient.
    lr, momentum, dampening, weight_decay, nesterov, l1, maximize
        As for `SGD`; `lr` is a number.
    seed : int
        Of stochastic rounding.

    Raises
    ------
    TypeError, ValueError
        Naming the array or the option; nothing has been written.
    """
    apply(
        SGD,
        {"params": params, "grads": grads, "momentum_buffers": momentum_buffers},
        step=step,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        l1=l1,
        maximize=maximize,
        seed=seed,
    )
