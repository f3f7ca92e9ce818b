"""What is stepped: shapes, optimizer and dtype, and the values that fill them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

import fusedopt
from fusedopt import _core
from fusedopt._check import Array
from fusedopt.optimizer import Optimizer

Shape = tuple[int, ...]

_CLASSES = {
    cls.__name__.lower(): cls
    for cls in vars(fusedopt).values()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    if cls.rule.demand_shape is None  # every case has a vector
}
CLASSES = {name: cls.__name__ for name, cls in _CLASSES.items()}
_CHANGED = {"sgd": {"momentum": 0.9}}  # options that differ from the defaults
# options of a step that are numbers, by torch's names
OPTIMIZERS: dict[str, dict[str, Any]] = {
    name: {
        option.name: option.default
        for option in cls.rule.options
        if not isinstance(option.default, bool)
        and option.term != "l1"
        and option.name not in {state.init for state in cls.rule.states}
    }
    | _CHANGED.get(name, {})
    for name, cls in _CLASSES.items()
}


def takers(state_dtype: str) -> tuple[str, ...]:
    """Return the optimizers that do not refuse to keep state so."""
    return tuple(
        name
        for name, cls in _CLASSES.items()
        if not any(state_dtype in state.refuses for state in cls.rule.states)
    )


# state arrays of a vector, which a step reads and writes
STATES = {
    name: sum(
        use and state.shape((1,), cls.rule.defaults) is not None
        for use, state in zip(
            cls.rule.uses(cls.rule.defaults | OPTIMIZERS[name]), cls.rule.states, strict=True
        )
    )
    for name, cls in _CLASSES.items()
}
# whether a rule has a rate for each leaf, of norms over it
LAYERWISE = {
    name: _core.RULES[cls.rule.name][3] not in ("elementwise", "internal")
    for name, cls in _CLASSES.items()
}
DTYPES = ("float32", "float64")

_BLOCK = 65_537  # values repeat after this many: a prime, so that no two tensors begin alike


@dataclass(frozen=True)
class Case:
    """The parameters of one step.

    `kind` is "size" for one array (a point of the curve over sizes), "many" for many small arrays,
    "model" for the parameters of a model, "own" for an array of a shape of the user's.
    """

    name: str
    title: str
    kind: str
    shapes: tuple[Shape, ...]
    source: str = ""

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)


def _models() -> list[Case]:
    text = resources.files("fusedopt.bench").joinpath("shapes.json").read_text("utf-8")
    return [
        Case(
            name,
            model["title"],
            "model",
            tuple(tuple(shape) for count, shape in model["shapes"] for _ in range(count)),
            model["source"],
        )
        for name, model in json.loads(text).items()
    ]


def _sizes() -> list[Case]:
    sizes = {"1k": 10**3, "30k": 30_000, "1M": 10**6, "10M": 10**7, "50M": 5 * 10**7}
    sizes["200M"] = 2 * 10**8
    return [Case(name, f"{name} in one array", "size", ((n,),)) for name, n in sizes.items()]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *_sizes(),
        Case("400x250", "400 arrays of 250", "many", ((250,),) * 400),
        *_models(),
    )
}


def own_case(name: str) -> Case | None:
    """Return the case of one array of a shape, as in "64x256"; None if it is no shape."""
    sizes = name.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        return None
    shape = tuple(map(int, sizes))
    return Case(name, f"one array of {' x '.join(sizes)}", "own", (shape,))


@cache
def _block(stream: int, dtype: str) -> Array:
    """Return normal values moved 0.1 away from 0: the form of epsilon makes no difference."""
    x = np.random.default_rng(stream).standard_normal(_BLOCK)
    return (x + np.copysign(0.1, x)).astype(dtype)


def _values(stream: int, dtype: str, leaf: int) -> Array:
    """Return the values that the elements of a leaf repeat."""
    return np.roll(_block(stream, dtype), 7 * leaf)


@dataclass(frozen=True)
class Problem:
    """A case with an optimizer and a dtype: all that a contender needs to set itself up."""

    case: Case
    optimizer: str
    dtype: str
    threads: int

    @property
    def options(self) -> dict[str, Any]:
        """The optimizer's options, by torch's names."""
        return OPTIMIZERS[self.optimizer]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return np.dtype(self.dtype).itemsize

    @property
    def moved(self) -> int:
        """Bytes that a step must read and write, with state in the parameter's dtype."""
        return self.itemsize * (3 * self.case.elements + 2 * self._kept)

    @property
    def held(self) -> int:
        """Bytes of all arrays that a step touches: parameters, gradients and state."""
        return self.itemsize * (2 * self.case.elements + self._kept)

    @property
    def _kept(self) -> int:
        """Elements of all state arrays."""
        rule = _CLASSES[self.optimizer].rule
        options = rule.defaults | self.options
        shapes = [
            state.shape(shape, options)
            for shape in self.case.shapes
            for use, state in zip(rule.uses(options), rule.states, strict=True)
            if use
        ]
        return sum(math.prod(shape) for shape in shapes if shape is not None)

    def param(self, leaf: int) -> Array:
        """Return a new array with the values that parameter `leaf` begins with."""
        return self._filled(leaf, stream=0)

    def grad(self, leaf: int) -> Array:
        """Return a new array with the gradient of parameter `leaf`."""
        return self._filled(leaf, stream=1)

    def params(self) -> list[Array]:
        """Return new arrays with the values that all parameters begin with."""
        return [self.param(i) for i in range(len(self.case.shapes))]

    def grads(self) -> list[Array]:
        """Return new arrays with the gradients of all parameters."""
        return [self.grad(i) for i in range(len(self.case.shapes))]

    def some(self, leaf: int, where: Array) -> tuple[Array, Array]:
        """Return initial values and gradients of some elements of parameter `leaf`."""
        p, g = (_values(stream, self.dtype, leaf) for stream in (0, 1))
        return p[where % p.size], g[where % g.size]

    def _filled(self, leaf: int, stream: int) -> Array:
        block = _values(stream, self.dtype, leaf)
        out = np.empty(self.case.shapes[leaf], self.dtype)
        flat = out.reshape(-1)
        whole = flat.size // block.size * block.size
        flat[:whole].reshape(-1, block.size)[...] = block
        flat[whole:] = block[: flat.size - whole]
        return out
