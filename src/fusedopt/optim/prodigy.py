"""Prodigy."""

from __future__ import annotations

from math import inf, sqrt
from typing import Any, Unpack

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import Common, Option, Options, Rule, Scalar, State

# options that must be the same in all groups, as there is one d
_ALIKE = ("betas", "beta3", "use_bias_correction", "safeguard_warmup", "d0", "d_coef",
          "growth_rate")  # fmt: skip
_ESTIMATE = ("k", "d", "d_max", "d_numerator")  # what is remembered for all groups: the first's


def beta3(o: Options, betas: tuple[float, float]) -> float:
    """Return the decay of s, and of the numerator of d."""
    return sqrt(betas[1]) if o["beta3"] is None else float(o["beta3"])


def weight(o: Options) -> float:
    """Return the weight of the gradient in s."""
    return float(o["d"] / o["d0"] * (o["d"] if o["safeguard_warmup"] else o["size"]))


def _share(groups: list[Options]) -> list[Options]:
    """Give every group the one estimate, and the size of the step."""
    first = groups[0]
    lr = max(o["lr"] for o in groups)
    for i, o in enumerate(groups):
        for name in _ALIKE:
            if o[name] != first[name]:
                raise ValueError(
                    f"param_groups[{i}].{name}: {o[name]!r} differs from {first[name]!r} of the "
                    "first group; Prodigy has one estimate for all groups"
                )
        if o["lr"] not in (lr, 0.0):
            raise ValueError(
                f"param_groups[{i}].lr: {o['lr']} differs from another group's {lr}; with Prodigy "
                "groups have the same lr, or 0"
            )
    (beta1, beta2), k = first["betas"], first["k"]
    correction = 1.0
    if first["use_bias_correction"]:
        correction = sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1))
    size = first["d"] * lr * correction
    estimate = {name: first[name] for name in _ESTIMATE}
    return [o | estimate | {"d_before": first["d"], "size": size} for o in groups]


def _settle(groups: list[Options], dots: float, sizes: float) -> list[Options] | None:
    """Return the groups with the new d, as in step of prodigyopt 1.1.2."""
    first = groups[0]
    if first["size"] == 0:  # the rate is 0: a step that counts, or a schedule would stay there
        return groups
    if sizes == 0:  # all gradients so far were zero
        return None
    d, d_max = first["d"], first["d_max"]
    ratio = first["d"] / first["d0"]
    numerator = first["d_numerator"] * beta3(first, first["betas"])
    numerator += ratio * first["size"] * dots
    d_hat = first["d_coef"] * numerator / sizes
    if d == first["d0"]:
        d = max(d, d_hat)
    d_max = max(d_max, d_hat)
    d = min(d_max, d * first["growth_rate"])
    new = {
        "k": first["k"] + 1, "d": d, "d_max": d_max, "d_numerator": numerator, "d_denom": sizes,
        "d_hat": d_hat,
    }  # fmt: skip
    return [o | new for o in groups]


def _constants(step: int, o: Options) -> dict[str, float]:
    (beta1, beta2), d, size = o["betas"], o["d_before"], o["size"]
    return {
        "learns": float(o["lr"] > 0),
        "beta1": beta1,
        "w1": (d if beta1 > 0 else o["d"]) * (1 - beta1),  # as in the source
        "beta2": beta2,
        "w2": d * d * (1 - beta2),
        "beta3": beta3(o, o["betas"]),
        "ws": weight(o | {"d": d}),
        "keep": 1 - size * o["weight_decay"] if o["decouple"] else 1.0,
        "size": size,
        "eps": o["d"] * o["eps"],
    }


RULE = Rule(
    name="prodigy",
    options=(
        Option("lr", 1.0, _check.nonnegative),
        Option("betas", (0.9, 0.999), _check.decay_rates),
        Option("beta3", None, _check.optional_fraction),
        Option("eps", 1e-8, _check.positive),
        Option("weight_decay", 0.0, _check.nonnegative, term="l2"),
        Option("decouple", True, _check.flag),
        Option("use_bias_correction", False, _check.flag),
        Option("safeguard_warmup", False, _check.flag),
        Option("d0", 1e-6, _check.positive),
        Option("d_coef", 1.0, _check.positive),
        Option("growth_rate", inf, _check.limit),
        Option("slice_p", 1, _check.one_or_more),
    ),
    states=(
        State("exp_avg"),
        State("exp_avg_sq", squared=True),
        State("s", plural="ss", wide=True, every="slice_p"),
        State("p0", init="param", wide=True, every="slice_p"),
    ),
    constants=_constants,
    memory=(
        Scalar("k", 0, _check.steps),
        Scalar("d", "d0", _check.limit),
        Scalar("d_max", "d0", _check.limit),
        Scalar("d_numerator", 0.0, _check.any_number),
        Scalar("d_denom", 0.0, _check.any_number, shown=True),
        Scalar("d_hat", "d0", _check.any_number, shown=True),
    ),
    share=_share,
    settle=_settle,
    ignored=(Option("fsdp_in_use", False, _check.flag),),
)


class Prodigy(Optimizer):
    """Prodigy [1]_: Adam that estimates its step size from how far the parameters have moved.

    An estimate d of the distance to the solution takes the place of the learning rate: it begins as
    `d0` and grows. ``lr`` multiplies it, and is to stay at 1, or to follow a schedule that begins
    or ends there (cosine is recommended).

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`.
    lr : float or callable(step) -> float, default 1
        Factor of the estimate, >= 0; a callable gets the step, from 1. Groups have the same one,
        or 0.
    betas : (float, float), default (0.9, 0.999)
        Decay rates of the moments, each in [0, 1).
    beta3 : float, optional
        Decay of the sums that the estimate is made of, in [0, 1]; by default the root of
        ``betas[1]``.
    eps : float, default 1e-8
        Times d, added to the root of the second moment, > 0.
    weight_decay : float, default 0
        >= 0; decoupled unless `decouple` is False: parameters shrink by ``d * lr * weight_decay``.
    decouple : bool, default True
        If False, `weight_decay` is an L2 penalty.
    use_bias_correction : bool, default False
        Adam's bias corrections.
    safeguard_warmup : bool, default False
        Leave `lr` out of the denominator of the estimate, for a schedule with warmup.
    d0 : float, default 1e-6
        First estimate, > 0.
    d_coef : float, default 1
        Factor of new estimates, > 0: the way to make steps larger or smaller.
    growth_rate : float, default inf
        Largest factor by which d grows in a step, > 0; not of the first growth, from `d0`.
    slice_p : int, default 1
        Estimate from one element in that many: 11 saves most of the memory of the estimate.
    **common
        How arrays are stored, a running average of the parameters, threads; see `Optimizer`.
        ``s`` and ``p0`` stay in float32.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`. ValueError in a step where options of groups do not fit each other.

    Notes
    -----
    A step reads gradients and parameters twice: the sums over all of them must be known before the
    first write. With ``reduce=`` they are sums over ranks. Where all gradients so far were 0 a step
    changes nothing, and says that it was skipped. Where every `lr` is 0 it counts, so that a
    schedule goes on, but changes neither parameters nor the estimate.

    A group whose `lr` is 0 keeps its moments and has no part in the estimate; as in the source it
    still moves along the moments that it has, and decays, at the others' rate.

    State of a leaf: ``step``, ``exp_avg``, ``exp_avg_sq``, ``s`` and ``p0``, the parameter as it
    was when the optimizer was made; with `slice_p` above 1 the last two are flat, of elements in
    the order of memory. ``opt.param_groups[0]["d"]`` is the estimate; every group remembers ``k``,
    ``d``, ``d_max``, ``d_numerator``, and to be read ``d_denom`` and ``d_hat``.
    `fusedopt.reference.prodigy` is the formula; functions take what is remembered as keywords, and
    return its values after the step.

    References
    ----------
    .. [1] Mishchenko & Defazio, ICML 2024 (arXiv 2306.06101); as Prodigy of prodigyopt 1.1.2, which
       takes options of the first group for all. Where ``betas[0]`` is 0 it keeps no ``exp_avg``,
       and a group whose `lr` is 0 moves along its gradient.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.array([3.0, -2.0])
    >>> opt = fusedopt.Prodigy(w)
    >>> for _ in range(200):
    ...     result = opt.step(2 * w)
    >>> bool(abs(w).max() < 0.1), 0.1 < opt.param_groups[0]["d"] < 10
    (True, True)
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = inf,
        slice_p: int = 1,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, betas=betas, beta3=beta3, eps=eps, weight_decay=weight_decay,
            decouple=decouple, use_bias_correction=use_bias_correction,
            safeguard_warmup=safeguard_warmup, d0=d0, d_coef=d_coef, growth_rate=growth_rate,
            slice_p=slice_p, **common,
        )  # fmt: skip


prodigy = function(Prodigy)
