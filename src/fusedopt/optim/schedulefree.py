"""Schedule-Free AdamW and Schedule-Free SGD."""

from __future__ import annotations

from math import inf, isfinite, sqrt
from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import MODE, Average, Common, Option, Options, Rule, Scalar, State


def rate(o: Options) -> float:
    """Return the rate of step k, from 1, after warmup."""
    lr, k, warmup_steps = float(o["lr"]), int(o["k"]), int(o["warmup_steps"])
    return lr * (k / warmup_steps) if k < warmup_steps else lr


def _weight(o: Options) -> float:
    """Return the weight of step k in the average; infinite where that is beyond double."""
    try:
        power: float = max(rate(o), o["lr_max"]) ** o["weight_lr_power"]
        weight: float = max(o["k"], 1) ** o["r"] * power
    except (OverflowError, ZeroDivisionError):
        return inf
    return weight


def part(o: Options) -> float:
    """Return the weight of step k as a part of all weights so far; 0 if all of them were 0."""
    if o["weight_sum"] == 0:
        return 0.0
    result: float = _weight(o) / o["weight_sum"]
    if not isfinite(result):
        raise ValueError(
            f"weight_sum: the weight of step {o['k']}, k ** r * lr_max ** weight_lr_power, is "
            f"beyond double beside {o['weight_sum']}"
        )
    return result


def _advance(o: Options) -> dict[str, Any]:
    now = o | {"k": o["k"] + 1}
    now["scheduled_lr"] = rate(now)
    now["lr_max"] = max(now["scheduled_lr"], o["lr_max"])
    now["weight_sum"] = o["weight_sum"] + _weight(now)
    return now


def _constants(o: Options, beta1: float) -> dict[str, float]:
    lr, weight = rate(o), part(o)
    return {
        "weight_decay": o["weight_decay"],
        "part": weight,
        "y_size": lr * (1 - beta1 * (1 - weight)),
        "z_size": lr,
    }


def _of_adamw(step: int, o: Options) -> dict[str, float]:
    beta1, beta2 = o["betas"]
    own = {
        "beta2": beta2,
        "w2": 1 - beta2,
        "root": sqrt(1 - beta2 ** o["k"]),
        "eps": o["eps"],
    }
    return own | _constants(o, beta1)


def _of_sgd(step: int, o: Options) -> dict[str, float]:
    return {"beta2": 0.0, "w2": 1.0, "root": 1.0, "eps": 0.0} | _constants(o, o["momentum"])


def _demand(where: str, name: str, beta1: float) -> None:
    if beta1 == 0:
        raise ValueError(
            f"{where}{name}: must be > 0, as without it the parameters do not depend on the average"
        )


_WEIGHTS = (
    Option("warmup_steps", 0, _check.count),
    Option("r", 0.0, _check.number),
    Option("weight_lr_power", 2.0, _check.number),
)
# a step is added to z as to a parameter: narrow formats would lose it or add noise
_Z = State("z", init="param", refuses=("bfloat16", "int8"))
_MEMORY = (
    Scalar("k", 0, _check.steps),
    Scalar("weight_sum", 0.0),
    Scalar("lr_max", -1.0),
    Scalar("scheduled_lr", 0.0, shown=True),
    MODE,
)
_IGNORED = (Option("foreach", True, _check.optional(_check.flag)),)

ADAMW = Rule(
    name="schedulefree",
    options=(
        Option("lr", 2.5e-3, _check.nonnegative),
        Option("betas", (0.9, 0.999), _check.decay_rates),
        Option("eps", 1e-8, _check.nonnegative),
        Option("weight_decay", 0.0, _check.nonnegative),
        *_WEIGHTS,
    ),
    states=(_Z, State("exp_avg_sq", squared=True)),
    constants=_of_adamw,
    demand=lambda where, o: _demand(where, "betas[0]", o["betas"][0]),
    counts=False,
    memory=_MEMORY,
    advance=_advance,
    average=Average("z", "betas[0]", lambda o: o["betas"][0]),
    ignored=_IGNORED,
)
SGD = Rule(
    name="schedulefree",
    options=(
        Option("lr", 1.0, _check.nonnegative),
        Option("momentum", 0.9, _check.decay_rate),
        Option("weight_decay", 0.0, _check.nonnegative),
        *_WEIGHTS,
    ),
    states=(_Z,),
    constants=_of_sgd,
    demand=lambda where, o: _demand(where, "momentum", o["momentum"]),
    counts=False,
    memory=_MEMORY,
    advance=_advance,
    average=Average("z", "momentum", lambda o: o["momentum"]),
    ignored=_IGNORED,
)


class ScheduleFreeAdamW(Optimizer):
    """Schedule-Free AdamW [1]_: evaluates an average of all steps, and needs no schedule.

    The parameters hold y while training, the points at which gradients are taken. Each step adds
    ``lr * u`` to z, where ``u = -(g / (sqrt(v) / sqrt(1 - beta2**k) + eps) + weight_decay * y)``,
    and moves x, the average of all z, by a weight of its own towards it; ``y = (1 - beta1) * z +
    beta1 * x``. **x is what to evaluate and to deploy, not y**: ``with opt.swap_ema():`` puts it in
    the place of the parameters for a block, and `ema_params` returns copies of it.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 2.5e-3
        Step size, >= 0, in units of the parameter, constant for a whole run: 1 to 10 times the rate
        with which a schedule of AdamW would begin. A callable gets the step, from 1.
    betas : (float, float), default (0.9, 0.999)
        How close y is to x, between 0 and 1, and decay rate of the second moment, in [0, 1).
    eps : float, default 1e-8
        Added to the square root of the corrected second moment, >= 0. With 0 an element whose
        gradients were all 0 becomes NaN.
    weight_decay : float, default 0
        Decoupled decay of y, >= 0.
    warmup_steps : int, default 0
        Steps over which the rate rises from 0.
    r : float, default 0
        A step's weight in the average is ``k**r * lr_max**weight_lr_power``, where k is its number
        from 1 and lr_max the largest rate so far.
    weight_lr_power : float, default 2
        See `r`.
    **common
        How arrays are stored, threads; see `Optimizer`. `ema` is refused, as this is an average
        itself, and so are narrow values of `state_dtype`: z sums up steps as a parameter does.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`.

    Notes
    -----
    State of a leaf: ``step``, ``z``, which begins as the parameter when the optimizer is made, and
    ``exp_avg_sq``. The group remembers ``k``, ``weight_sum``, ``lr_max``, and to be read
    ``scheduled_lr`` and ``train_mode``, which is always True, as arrays hold y outside the block of
    `swap_ema`. `fusedopt.reference.schedulefreeadamw` is the formula; functions take ``k``,
    ``weight_sum`` and ``lr_max`` of the step that they take.

    To resume a run, save the parameters, which are y, and the optimizer. What steps see and return
    (`copy_out`, statistics, `master_params`) is y. A 16-bit parameter shows x rounded to nearest
    within the block; y itself is back bit for bit.

    References
    ----------
    .. [1] Defazio et al., NeurIPS 2024 (arXiv 2405.15682), Algorithm 1; as AdamWScheduleFree of
       schedulefree 1.4.1, which divides by 0 where betas[0] is 0.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0])
    >>> opt = fusedopt.ScheduleFreeAdamW(w, lr=0.1)
    >>> for _ in range(3):
    ...     result = opt.step(2 * w)
    >>> w.round(3)
    array([0.797, 1.793])
    >>> with opt.swap_ema():
    ...     print(w.round(3))
    [0.806 1.803]
    """

    rule = ADAMW

    def __init__(
        self,
        params: Any,
        lr: Any = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power, **common,
        )  # fmt: skip


class ScheduleFreeSGD(Optimizer):
    """Schedule-Free SGD [1]_: evaluates an average of all steps, and needs no schedule.

    As `ScheduleFreeAdamW`, with ``u = -(g + weight_decay * y)``. **What to evaluate and to deploy
    is x, not what the parameters hold while training**: see `swap_ema` and `ema_params`.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1.0
        Step size, >= 0: 10 to 50 times the rate with which a schedule of SGD would begin.
    momentum : float, default 0.9
        How close y is to x, between 0 and 1.
    weight_decay : float, default 0
        L2 penalty, >= 0: ``weight_decay * y`` is added to the gradient.
    warmup_steps, r, weight_lr_power
        As for `ScheduleFreeAdamW`.
    **common
        As for `ScheduleFreeAdamW`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`.

    Notes
    -----
    State of a leaf: ``step`` and ``z``; else as for `ScheduleFreeAdamW`.
    `fusedopt.reference.schedulefreesgd` is the formula.

    References
    ----------
    .. [1] Defazio et al., NeurIPS 2024 (arXiv 2405.15682), equations 3 to 5; as SGDScheduleFree of
       schedulefree 1.4.1.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([1.0, 2.0])
    >>> opt = fusedopt.ScheduleFreeSGD(w, lr=0.25)
    >>> for _ in range(3):
    ...     result = opt.step(2 * w)
    >>> with opt.swap_ema():
    ...     print(w.round(3))
    [0.273 0.546]
    """

    rule = SGD

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay,
            warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power, **common,
        )  # fmt: skip


schedulefreeadamw = function(ScheduleFreeAdamW)
schedulefreesgd = function(ScheduleFreeSGD)
