"""Types of the compiled border for arrays."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

from numpy.typing import NDArray

from fusedopt._leaves import LeafList
from fusedopt._options import Reduction, StepOptions, StepResult
from fusedopt.formats import Stored
from fusedopt.optimizer import Optimizer
from fusedopt.rule import Layout, Plan

_Grads: TypeAlias = list[Any]  # of each leaf, an array or Rows or None
_Prepared: TypeAlias = tuple[_Grads, list[Plan]]  # of each leaf; of each group

def are_settled(param_groups: Any, groups: list[Any]) -> bool: ...

@final
class Reader:
    def __new__(cls, keys: tuple[Any, ...] | None, parts: list[Reader] | None) -> Reader: ...
    def read(self, name: str, other: Any) -> list[Any]: ...

def find_none(values: Sequence[Any], grads: Sequence[Any]) -> int: ...

@final
class ArrayList(LeafList):
    def __new__(cls, rule: str, state_names: tuple[str, ...]) -> ArrayList: ...
    def __len__(self) -> int: ...
    settler: Callable[[float, float], list[Plan] | None] | None
    @property
    def names(self) -> list[str]: ...
    @property
    def grad_names(self) -> list[str]: ...
    @property
    def params(self) -> list[NDArray[Any]]: ...
    @property
    def stored(self) -> list[NDArray[Any] | Stored]: ...
    @property
    def states(self) -> list[list[NDArray[Any] | Stored | None]]: ...
    @property
    def count(self) -> int: ...
    def add(
        self,
        names: list[str],
        grad_names: list[str],
        params: Sequence[NDArray[Any] | Stored],
        states: Sequence[Sequence[NDArray[Any] | Stored | None]],
        layouts: Sequence[Layout | None],
        group: int,
        zero: bool,
        threads: int,
        begin: Callable[[], None] | None = None,
        origins: Sequence[int] | None = None,
    ) -> None: ...
    def step(
        self,
        prepare: Callable[[Any], _Prepared],
        grads: Any,
        threads: int,
        options: StepOptions | None = None,
        copies: list[NDArray[Any] | None] | None = None,
        reduction: Reduction | None = None,
        source: ArrayList | None = None,
        owner: Optimizer | None = None,
    ) -> StepResult: ...
    def check(
        self,
        grads: _Grads,
        plans: list[Plan] | None,
        options: StepOptions,
        copies: list[NDArray[Any] | None] | None,
    ) -> None: ...
    def advance(self, grads: _Grads) -> None: ...
    def knows(self, grads: _Grads) -> bool: ...
    def forget(self) -> None: ...
    def clear(self) -> None: ...
    def stream(self, grads: list[NDArray[Any]], how: int, threads: int) -> None: ...
    def use_states(self, i: int, used: tuple[bool, ...]) -> None: ...
    def get_step(self, i: int) -> int: ...
    def set_steps(self, count: int, steps: list[int]) -> None: ...
    def restore(
        self,
        pairs: list[tuple[NDArray[Any], NDArray[Any]]],
        count: int,
        steps: list[int],
        groups: list[dict[str, Any]],
        options: list[dict[str, Any]],
    ) -> None: ...

@final
class Swap:
    def __new__(cls, leaves: ArrayList, show: Callable[[], list[NDArray[Any] | None]]) -> Swap: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
