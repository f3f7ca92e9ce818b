"""Muon."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import sqrt
from typing import Any, Unpack

import numpy as np

from fusedopt import _check
from fusedopt._functional import function
from fusedopt.optimizer import Optimizer
from fusedopt.rule import Common, Option, Options, Rule, State

_QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: nearly as steep at 0 as can be


def _constants(step: int, o: Options) -> dict[str, float]:
    return {
        "lr": o["lr"],
        "keep": 1 - o["lr"] * o["weight_decay"],
        "momentum": o["momentum"],
        "w": 1 - o["momentum"],
        "nesterov": float(o["nesterov"]),
    }


def _demand_shape(where: str, shape: Sequence[int]) -> None:
    if len(shape) != 2:
        raise ValueError(
            f"{where}: has shape {tuple(shape)}, and Muon only supports 2D parameters, that is "
            "matrices; give it to AdamW"
        )


def make_orthogonal(u: Any, options: Options) -> None:
    """Replace a matrix by one with nearly equal singular values, times the ratio of its shape.

    `u` is an array, or a tensor: then the steps are the operations of torch.optim.Muon.
    """
    rows, columns = u.shape
    iterate = _in_place if isinstance(u, np.ndarray) else _in_bfloat16
    with np.errstate(all="ignore"):
        u[...] = iterate(u, options["ns_coefficients"], options["ns_steps"], options["eps"])
    if options["adjust_lr_fn"] == "match_rms_adamw":
        u *= 0.2 * sqrt(max(rows, columns))
    else:
        u *= sqrt(max(1, rows / columns))


def _in_place(u: Any, coefficients: tuple[float, ...], steps: int, eps: float) -> Any:
    """Return the result of the iteration, computed by NumPy in the dtype of `u`."""
    a, b, c = coefficients
    is_tall = u.shape[0] > u.shape[1]
    squares = np.einsum("ij,ij->", u, u, dtype=np.float64)
    x = (u.T if is_tall else u) / max(sqrt(squares), eps)
    for _ in range(steps):
        gram = x @ x.T
        quintic = gram @ gram
        quintic *= c
        gram *= b
        quintic += gram
        higher = quintic @ x
        x *= a
        x += higher
    return x.T if is_tall else x


def _in_bfloat16(u: Any, coefficients: tuple[float, ...], steps: int, eps: float) -> Any:
    """Return the result of the iteration as torch.optim.Muon computes it."""
    a, b, c = coefficients
    is_tall = u.shape[0] > u.shape[1]
    x = u.bfloat16()
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        quintic = gram.addmm(gram, gram, beta=b, alpha=c)
        x = x.addmm(quintic, x, beta=a)
    return x.T if is_tall else x


RULE = Rule(
    name="muon",
    options=(
        Option("lr", 1e-3, _check.nonnegative),
        Option("weight_decay", 0.1, _check.nonnegative),
        Option("momentum", 0.95, _check.nonnegative),
        Option("nesterov", True, _check.flag),
        Option("ns_coefficients", _QUINTIC, partial(_check.numbers, length=3)),
        Option("eps", 1e-7, _check.nonnegative),
        Option("ns_steps", 5, _check.count_below(100)),
        Option("adjust_lr_fn", None, _check.choice(None, "original", "match_rms_adamw")),
    ),
    states=(State("momentum_buffer"),),
    constants=_constants,
    counts=False,
    outside=make_orthogonal,
    demand_shape=_demand_shape,
)


class Muon(Optimizer):
    """Muon [1]_: momentum of matrices, made orthogonal, as in `torch.optim.Muon`.

    The direction of a matrix is its momentum ``U S V'`` with singular values near 1, so about ``U
    V'``, computed by Newton-Schulz iterations, which are products of matrices. It is meant for the
    hidden layers of a network. Only matrices are accepted: give biases to `AdamW`, and preferably
    the first and the last layer too.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        As for `Adam`, each of two dimensions.
    lr : float or callable(step) -> float, default 1e-3
        Step size, >= 0; a callable gets the step, from 1.
    weight_decay : float, default 0.1
        Decoupled decay, >= 0: parameters shrink by ``lr * weight_decay`` in each step.
    momentum : float, default 0.95
        Decay of the buffer, >= 0, which is a mean of the gradients.
    nesterov : bool, default True
        Look ahead: the gradient enters the direction once more.
    ns_coefficients : (float, float, float), default (3.4445, -4.775, 2.0315)
        Of an iteration ``a * x + b * x**3 + c * x**5`` on the singular values.
    eps : float, default 1e-7
        Least norm that a direction is divided by before the iterations, >= 0.
    ns_steps : int, default 5
        Number of iterations, below 100.
    adjust_lr_fn : None, "original" or "match_rms_adamw", default None
        Factor of the rate of a matrix of shape (A, B): "original" or None,
        ``sqrt(max(1, A / B))``; or ``0.2 * sqrt(max(A, B))`` [2]_, which suits rates and decays
        chosen for `AdamW`.
    **common
        How arrays are stored, a running average of the parameters, threads; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As for `Adam`, and for a parameter that is no matrix.

    Notes
    -----
    Momentum and update are one pass each, with NumPy's matrix products in the dtype that the step
    computes in, float32 or float64, between them: they take most of the time, and run on the
    threads of NumPy's BLAS. So unlike those of other optimizers, bits may depend on the machine, on
    the build of NumPy and on the number of its threads. `fusedopt.torch.Muon` uses torch's products
    in bfloat16, as `torch.optim.Muon` does.

    A step needs memory for one more array of each parameter's shape in that dtype, which `memory`
    does not count, and for the products of one of them. ``reduce=`` is refused: it is for parts of
    leaves. State of a leaf: ``step`` and ``momentum_buffer``. `fusedopt.reference.muon` is the
    formula.

    References
    ----------
    .. [1] Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/; options and formula are
       those of `torch.optim.Muon` in PyTorch 2.13.
    .. [2] Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982 (2025).

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> w = np.zeros((2, 2))
    >>> opt = fusedopt.Muon(w, lr=0.1, ns_steps=10, ns_coefficients=(1.5, -0.5, 0.0))
    >>> opt.step(np.array([[0.0, 3.0], [-2.0, 0.0]]))
    StepResult(step=1, updated=1)
    >>> w.round(3) + 0.0
    array([[ 0. , -0.1],
           [ 0.1,  0. ]])
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = _QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        """See the class."""
        super().__init__(
            params, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
            **common,
        )  # fmt: skip


muon = function(Muon)
