"""Contenders on NumPy arrays: fusedopt, its limit, NumPy, Numba, scikit-learn, thinc."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import compress
from math import ceil
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import fusedopt
from fusedopt import _core, functional, reference
from fusedopt._check import Array
from fusedopt.bench.cases import CLASSES, STATES, Problem
from fusedopt.bench.contenders._base import Contender, nbytes
from fusedopt.optimizer import Optimizer


class OnArrays(Contender):
    """Keeps the NumPy arrays that it is given as parameters and gradients."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        self.problem, self._params = problem, params
        self.grads: list[Array] = []

    def load(self, grads: list[Array]) -> None:
        self.grads = grads

    def params(self) -> list[Array]:
        return self._params


class Fusedopt(OnArrays):
    """`fusedopt.Adam` and the like; or, with `plain`, their reference in NumPy.

    `formats` are the options of the storage formats.
    """

    def __init__(
        self, problem: Problem, params: list[Array], plain: bool = False, **formats: Any
    ) -> None:
        super().__init__(problem, params)
        fusedopt.set_num_threads(problem.threads)
        cls = getattr(reference if plain else fusedopt, CLASSES[problem.optimizer])
        self.optimizer: Optimizer = cls(params, **problem.options, **formats)
        self.formats = formats

    def step(self) -> object:
        return self.optimizer.step(self.grads)

    def state_bytes(self) -> int:
        memory = self.optimizer.memory()
        names = {"residual", *self.optimizer.rule.state_names} & memory.keys()
        each = sum(memory[name]["resident"] for name in names)
        return round(each * self.problem.case.elements)

    def moved(self) -> int | None:
        if not self.formats:
            return None
        return round(self.optimizer.memory()["total"]["moved"] * self.problem.case.elements)


class FusedoptShort(Fusedopt):
    """Parameters and gradients in bfloat16; the residual bits of the parameters count as state."""

    def __init__(self, problem: Problem, params: list[Array], **formats: Any) -> None:
        from ml_dtypes import bfloat16

        self.dtype = bfloat16
        super().__init__(problem, [p.astype(bfloat16) for p in params], **formats)

    def load(self, grads: list[Array]) -> None:
        self.grads = [g.astype(self.dtype) for g in grads]

    def params(self) -> list[Array]:
        # the update added to the unrounded start: the check is of the update alone
        out = []
        for i, now in enumerate(self.optimizer.master_params().values()):
            start = self.problem.param(i)
            out.append(start + (now - start.astype(self.dtype).astype(now.dtype)))
        return out


class Limit(Fusedopt):
    """The memory's limit: the bytes of the step, read and written in C, with no arithmetic.

    In the fastest of several ways, which is found when the gradients come.
    """

    def load(self, grads: list[Array]) -> None:
        super().load(grads)
        self.how = fastest_stream(self.stream)

    def stream(self, how: int) -> None:
        self.optimizer._work.stream(self.grads, how, self.problem.threads)

    def step(self) -> None:
        self.stream(self.how)


def fastest_stream(stream: Callable[[int], None], rounds: int = 5, least: float = 1e-3) -> int:
    """Return which way to stream took the least time, in turns; `least` seconds each at least."""

    def seconds(how: int, repeats: int) -> float:
        start = perf_counter()
        for _ in range(repeats):
            stream(how)
        return (perf_counter() - start) / repeats

    ways = range(_core.STREAMS)
    repeats = ceil(least / min(seconds(how, 1) for how in ways))
    times = [[seconds(how, repeats) for how in ways] for _ in range(rounds)]
    return min(ways, key=lambda how: median(row[how] for row in times))


class WithStates(OnArrays):
    """Keeps state as NumPy arrays, zeros at first, and counts steps."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        super().__init__(problem, params)
        count = STATES[problem.optimizer]
        self.states: list[list[Any]] = [[np.zeros_like(p) for p in params] for _ in range(count)]
        self.count = 0

    def state_bytes(self) -> int:
        return nbytes(a for column in self.states for a in column if a is not None)


class Functional(WithStates):
    """`fusedopt.functional.adam` and the like."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        super().__init__(problem, params)
        fusedopt.set_num_threads(problem.threads)
        self.function = getattr(functional, problem.optimizer)
        self.rule = rule = getattr(fusedopt, CLASSES[problem.optimizer]).rule
        lists = {state.plural for state in rule.states}  # one has the name of an option
        self.known = inspect.signature(self.function).parameters.keys() - lists
        self.options = options = rule.begun(rule.defaults | problem.options)
        used = list(compress(rule.states, rule.uses(options)))
        if rule.has_parts:
            shapes = [[state.shape(p.shape, options) for p in params] for state in used]
            self.states = [
                [None if shape is None else np.zeros(shape, problem.dtype) for shape in column]
                for column in shapes
            ]
        for state, arrays in zip(used, self.states, strict=True):
            if state.part:
                continue
            for a, p in zip(arrays, params, strict=True):
                first = state.first(options)
                a[...] = p if first is None else first

    def step(self) -> object:
        self.count += 1
        self.options = self.rule.advanced(self.options)
        given = {name: self.options[name] for name in self.known & self.options.keys()}
        behind = self.function(self._params, self.grads, *self.states, step=self.count, **given)
        self.options |= behind or {}
        return None


class InPlace(WithStates):
    """A carefully written NumPy step: in place, with one scratch array for each leaf."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        super().__init__(problem, params)
        self.scratch = [np.empty_like(p) for p in params]
        steps = {"adam": self.adam, "adamw": self.adam, "sgd": self.sgd}
        self.step = steps[problem.optimizer]  # type: ignore[method-assign]

    def step(self) -> object:  # replaced in __init__
        raise NotImplementedError

    def adam(self) -> None:
        self.count += 1
        o = self.problem.options
        (beta1, beta2), t = o["betas"], self.count
        rate, root = o["lr"] / (1 - beta1**t), (1 - beta2**t) ** 0.5
        decay = o["lr"] * o["weight_decay"]
        for p, g, m, v, x in zip(self._params, self.grads, *self.states, self.scratch, strict=True):
            if decay:
                p *= 1 - decay
            m *= beta1
            np.multiply(g, 1 - beta1, out=x)
            m += x
            v *= beta2
            np.multiply(g, g, out=x)
            x *= 1 - beta2
            v += x
            np.sqrt(v, out=x)
            x /= root
            x += o["eps"]
            np.divide(m, x, out=x)
            x *= rate
            p -= x

    def sgd(self) -> None:
        o = self.problem.options
        for p, g, b, x in zip(self._params, self.grads, *self.states, self.scratch, strict=True):
            b *= o["momentum"]
            b += g
            np.multiply(b, o["lr"], out=x)
            p -= x


@cache
def _numba_kernels() -> dict[str, Callable[..., None]]:
    """One loop of parallel threads over an array, compiled at its first call."""
    import numba

    jit = numba.njit(parallel=True, fastmath=True, error_model="numpy")

    def adam(
        p: Any, g: Any, m: Any, v: Any, keep: Any, beta1: Any, w1: Any, beta2: Any, w2: Any,
        root: Any, eps: Any, rate: Any,
    ) -> None:  # fmt: skip
        for i in numba.prange(p.size):
            m[i] = beta1 * m[i] + w1 * g[i]
            v[i] = beta2 * v[i] + w2 * g[i] * g[i]
            p[i] = keep * p[i] - rate * m[i] / (np.sqrt(v[i]) / root + eps)

    def sgd(p: Any, g: Any, b: Any, momentum: Any, rate: Any) -> None:
        for i in numba.prange(p.size):
            b[i] = momentum * b[i] + g[i]
            p[i] = p[i] - rate * b[i]

    return {"adam": jit(adam), "adamw": jit(adam), "sgd": jit(sgd)}


class Numba(WithStates):
    """A parallel Numba loop for each array, in the arrays' own precision."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        super().__init__(problem, params)
        import numba

        numba.set_num_threads(problem.threads)
        self.kernel = _numba_kernels()[problem.optimizer]

    def load(self, grads: list[Array]) -> None:
        columns = (self._params, grads, *self.states)
        self.leaves = [[a.reshape(-1) for a in leaf] for leaf in zip(*columns, strict=True)]

    def constants(self) -> list[float]:
        o = self.problem.options
        if self.problem.optimizer == "sgd":
            return [o["momentum"], o["lr"]]
        (beta1, beta2), t = o["betas"], self.count
        return [
            1 - o["lr"] * o["weight_decay"], beta1, 1 - beta1, beta2, 1 - beta2,
            (1 - beta2**t) ** 0.5, o["eps"], o["lr"] / (1 - beta1**t),
        ]  # fmt: skip

    def step(self) -> None:
        self.count += 1
        real = np.dtype(self.problem.dtype).type  # Python floats would make it compute in double
        constants = [real(x) for x in self.constants()]
        for leaf in self.leaves:
            self.kernel(*leaf, *constants)


class ScikitLearn(OnArrays):
    """The optimizer classes inside scikit-learn's multi-layer perceptrons."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        super().__init__(problem, params)
        from sklearn.neural_network import _stochastic_optimizers as module

        o = problem.options
        makes = {
            "sgd": lambda: module.SGDOptimizer(params, o["lr"], "constant", o["momentum"], False),
            "adam": lambda: module.AdamOptimizer(params, o["lr"], *o["betas"], o["eps"]),
        }
        self.optimizer = makes[problem.optimizer]()

    def step(self) -> None:
        self.optimizer.update_params(self._params, self.grads)

    def state_bytes(self) -> int:
        names = ("velocities",) if self.problem.optimizer == "sgd" else ("ms", "vs")
        return nbytes(a for name in names for a in getattr(self.optimizer, name))


class Thinc(OnArrays):
    """thinc's optimizer. It clears the gradients, so an untimed call restores them each step."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        super().__init__(problem, params)
        from thinc.optimizers import Optimizer

        o = problem.options
        self.optimizer = Optimizer(
            o["lr"], beta1=o["betas"][0], beta2=o["betas"][1], eps=o["eps"], L2=o["weight_decay"],
            L2_is_weight_decay=True, grad_clip=0.0, use_averages=False,
        )  # fmt: skip
        self.keys = [(i, "p") for i in range(len(params))]

    def load(self, grads: list[Array]) -> None:
        self.kept, self.grads = grads, [g.copy() for g in grads]

    def restore(self) -> None:
        for g, kept in zip(self.grads, self.kept, strict=True):
            np.copyto(g, kept)

    def step(self) -> None:
        step = self.optimizer
        for i, (key, g) in enumerate(zip(self.keys, self.grads, strict=True)):
            self._params[i], _ = step(key, self._params[i], g)

    def state_bytes(self) -> int:
        return nbytes([*self.optimizer.mom1.values(), *self.optimizer.mom2.values()])
