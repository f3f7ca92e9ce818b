"""Adam and AdamW."""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import Any, Unpack

import numpy as np

from fusedopt import _check
from fusedopt._check import Array
from fusedopt._functional import function
from fusedopt._rows import LAZY
from fusedopt.optimizer import Optimizer
from fusedopt.rule import CAUTIOUS, L1, MAXIMIZE, Common, Option, Options, Rule, State


def corrections(
    step: Any, betas: tuple[float, float], bias_correction: bool, eps_hat: bool
) -> tuple[Any, Any]:
    """Return the divisor of the rate, and that of the root before epsilon is added to it.

    For an array of steps they are arrays with the same bits, which NumPy's power does not give.
    """
    if not bias_correction:
        return 1.0, 1.0
    if isinstance(step, np.ndarray):
        mean, root = 1 - _powers(betas[0], step), np.sqrt(1 - _powers(betas[1], step))
    else:
        mean, root = 1 - betas[0] ** step, sqrt(1 - betas[1] ** step)
    return (mean / root, 1.0) if eps_hat else (mean, root)


_MANY = 1 << 12


@lru_cache(maxsize=8)
def _first_powers(beta: float) -> Array:
    return np.array([beta**t for t in range(16 * _MANY)])


def _powers(beta: float, steps: Array) -> Array:
    """Return ``beta**t`` for each of an array of steps; of many, from a table of the first."""
    if len(steps) < _MANY:
        return np.array([beta**t for t in steps.tolist()])
    first = _first_powers(beta)
    found: Array = first[np.minimum(steps, len(first) - 1)]
    beyond = np.flatnonzero(steps >= len(first))
    found[beyond] = [beta**t for t in steps[beyond].tolist()]
    return found


def _constants(step: Any, o: Options) -> dict[str, Any]:
    beta1, beta2 = betas = o["betas"]
    mean, root = corrections(step, betas, o["bias_correction"], o["eps_hat"])
    return {
        "keep": 1.0,
        "w1": 1 - beta1,
        "beta2": beta2,
        "w2": 1 - beta2,
        "root": root,
        "eps": o["eps"],
        "step_size": o["lr"] / mean,
    }


def _decoupled_constants(step: Any, o: Options) -> dict[str, Any]:
    constants = _constants(step, o)
    constants["keep"] = 1 - o["lr"] * o["weight_decay"]
    constants["cautious"] = float(o.get("cautious", False))
    return constants


_OPTIONS = (
    Option("lr", 1e-3, _check.nonnegative),
    Option("betas", (0.9, 0.999), _check.decay_rates),
    Option("eps", 1e-8, _check.nonnegative),
)
_AMSGRAD = Option("amsgrad", False, _check.flag)
_CONVENTIONS = (
    Option("bias_correction", True, _check.flag),
    Option("eps_hat", False, _check.flag),
)
_ROW_STEPS = Option("row_steps", False, _check.flag)
_STATES = (
    State("exp_avg"),
    State("exp_avg_sq", squared=True),
    State("max_exp_avg_sq", squared=True, needs="amsgrad"),
    State("row_step", needs="row_steps", plural="row_steps", by_row="row_steps", counts=True),
)


def _demand(where: str, o: Options) -> None:
    if o.get("cautious") and o.get("row_steps"):
        raise ValueError(
            f"{where}cautious: it takes no Rows, for which row_steps is; leave one of them out"
        )


ADAM = Rule(
    name="adam",
    options=(
        *_OPTIONS,
        Option("weight_decay", 0.0, _check.nonnegative, term="l2"),
        L1,
        _AMSGRAD,
        MAXIMIZE,
        *_CONVENTIONS,
        _ROW_STEPS,
    ),
    states=_STATES,
    constants=_constants,
    by_rows=lambda o: LAZY,
)
ADAMW = Rule(
    name="adam",
    options=(
        *_OPTIONS,
        Option("weight_decay", 1e-2, _check.nonnegative),
        _AMSGRAD,
        MAXIMIZE,
        *_CONVENTIONS,
        CAUTIOUS,
        _ROW_STEPS,
    ),
    states=_STATES,
    constants=_decoupled_constants,
    demand=_demand,
    variant=("cautious", "cautious_adam"),
    by_rows=lambda o: LAZY,
)


SPARSE_ADAM = Rule(  # torch's, which is Adam's step of some rows: the class is fusedopt.torch's
    name="adam",
    options=(*_OPTIONS, MAXIMIZE),
    states=_STATES[:2],
    constants=lambda step, o: _constants(step, o | {"bias_correction": True, "eps_hat": True}),
    by_rows=lambda o: LAZY,
)


class Adam(Optimizer):
    """Adam [1]_, in place, in one pass over memory.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        float32, float64, float16 or bfloat16, any shape, writable, without gaps. Updated in place
        and referenced as long as the optimizer exists: write into the arrays; the next step refuses
        other arrays in their place. ``resize(refcheck=False)`` of such an array would move its
        memory unnoticed.
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
        Step along the gradient, not against it.
    bias_correction : bool, default True
        Divide the moments by ``1 - beta**step``. False is FedAdam [3]_.
    eps_hat : bool, default False
        Add `eps` to the root of the second moment before it is corrected, as TensorFlow, Keras,
        scikit-learn and thinc do: ``lr * sqrt(1 - beta2**step) / (1 - beta1**step)`` is the rate,
        as in the paper's remark after Algorithm 1.
    row_steps : bool, default False
        Let each row of a parameter, along the first axis, count the steps that it has taken, and
        correct its moments by that count and not by that of the parameter: for `Rows`, which step
        some rows. A dense gradient steps, and counts, all of them. The parameter must be in
        row-major order. It cannot change later.
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
    State of a leaf: ``step``, ``exp_avg``, ``exp_avg_sq`` and, with `amsgrad`,
    ``max_exp_avg_sq``, arrays of the parameter's shape and dtype; with `row_steps` also
    ``row_step``, one int64 for each row. `fusedopt.reference.adam` is the formula in NumPy; the
    result equals it bit for bit.

    References
    ----------
    .. [1] Kingma & Ba, ICLR 2015, Algorithm 1.
    .. [2] Reddi, Kale & Kumar, ICLR 2018, Algorithm 2, in torch's form.
    .. [3] Reddi et al., ICLR 2021, Algorithm 2, where the gradient is the mean of the clients'
       updates times -1. Flower 1.42 corrects its rate in round t as in Adam's step t + 1: that is
       ``bias_correction=False`` with such an `lr`, a callable.

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

    rule = ADAM

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
        bias_correction: bool = True,
        eps_hat: bool = False,
        row_steps: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, l1=l1,
            amsgrad=amsgrad, maximize=maximize, bias_correction=bias_correction, eps_hat=eps_hat,
            row_steps=row_steps, **common,
        )  # fmt: skip


class AdamW(Adam):
    """AdamW: Adam with decoupled weight decay [1]_.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize, bias_correction, eps_hat, row_steps
        As for `Adam`; so are the options in `common`.
    weight_decay : float, default 1e-2
        >= 0: before the update the parameter shrinks by the factor ``1 - lr * weight_decay``.
    cautious : bool, default False
        Move only elements whose update is against the present gradient [2]_: those where
        ``exp_avg`` and the gradient have the same sign. The others are only decayed. Updates are
        divided by the share of the moved elements in the leaf, or by 1e-3 if that is less. The
        share needs one more read of parameters, gradients and state, and is summed over ranks as a
        norm is.

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
    .. [2] Liang et al., 2024 (arXiv 2411.16085), Algorithm 2; as ``caution`` of timm 1.0.31, which
       compares signs by a product that may underflow.
    """

    rule = ADAMW

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
        bias_correction: bool = True,
        eps_hat: bool = False,
        cautious: bool = False,
        row_steps: bool = False,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        Optimizer.__init__(
            self, params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad,
            maximize=maximize, bias_correction=bias_correction, eps_hat=eps_hat,
            cautious=cautious, row_steps=row_steps, **common,
        )  # fmt: skip


adam, adamw = function(Adam), function(AdamW)
