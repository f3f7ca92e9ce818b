"""What every contender is: a step on arrays of its own, and a row with the conditions for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedopt._check import Array
from fusedopt.bench.cases import Problem


class Contender(ABC):
    """One implementation, set up as its own documentation recommends.

    The constructor takes the problem and the parameters' initial values, which it may keep or copy,
    and imports what it needs. `load` is called before the first step.
    """

    # Undoes what a step does to its gradients. Called before every step, not timed.
    restore: Any = None

    @abstractmethod
    def __init__(self, problem: Problem, params: list[Array], **options: Any) -> None: ...

    @abstractmethod
    def load(self, grads: list[Array]) -> None:
        """Set the gradients, by keeping or copying the arrays."""

    @abstractmethod
    def step(self) -> object:
        """Take one step, and return when it is done."""

    @abstractmethod
    def params(self) -> list[Array]:
        """Return the parameters as they are now, in the problem's dtype."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Return the bytes of all state."""

    def moved(self) -> int | None:
        """Return the bytes that a step must read and write; None if as in the problem."""
        return None


@dataclass(frozen=True)
class Row:
    """A line of the table of contenders.

    Parameters
    ----------
    name, title : str
        For the command line; for reports.
    cls : type
        A `Contender`, made with `options`.
    packages : tuple of str
        What must be installed, by the names that pip uses.
    process : str
        Contenders with the same value share a process; `env` is set before it starts.
    optimizers, dtypes : tuple of str
        Those that it supports.
    temporaries : float
        Arrays of a parameter's size that a step allocates at once, to plan memory with.
    tolerance : float
        Allowed difference from the reference after two steps, in learning rates.
    quick : bool
        Whether it belongs to a quick run.
    most_tensors, most_elements : int, optional
        It is left out of cases with more, unless asked for by name: `most_why` says why.
    traced : bool
        Whether tracemalloc sees all that it allocates.
    """

    name: str
    title: str
    cls: type[Contender]
    packages: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    process: str = "shared"
    env: Mapping[str, str] = field(default_factory=dict)
    optimizers: tuple[str, ...] = ("adam", "adamw", "sgd")  # of most peers; ours have all
    dtypes: tuple[str, ...] = ("float32", "float64")
    temporaries: float = 0
    tolerance: float = 0.01
    quick: bool = True
    most_tensors: int | None = None
    most_elements: int | None = None
    most_why: str = ""
    traced: bool = False

    def lacks(self, problem: Problem) -> str | None:
        """Return why it cannot run a problem of this kind; None if it can."""
        if problem.optimizer not in self.optimizers:
            return f"has no {problem.optimizer} of this form"
        if problem.dtype not in self.dtypes:
            return f"has no {problem.dtype}"
        return None

    def too_much(self, problem: Problem, few_steps: bool = False) -> bool:
        """Return whether a problem is too large to be measured unless asked for by name.

        With `few_steps` the number of elements does not matter, because only steps take long.
        """
        tensors, elements = len(problem.case.shapes), problem.case.elements
        if self.most_tensors is not None and tensors > self.most_tensors:
            return True
        return self.most_elements is not None and elements > self.most_elements and not few_steps


def nbytes(arrays: Any) -> int:
    """Return the bytes of arrays or tensors of any library."""
    return sum(a.nbytes for a in arrays)
