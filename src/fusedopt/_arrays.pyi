"""Types of the compiled border for arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, final, overload

from numpy.typing import NDArray

from fusedopt._around import Around
from fusedopt.formats import Stored

# skipped, norm of the gradients, factor of the clip, (leaves, statistics)
_Outcome: TypeAlias = tuple[bool, float | None, float, tuple[Sequence[int], NDArray[Any]] | None]

# the gradient of each leaf, the options of each group
_Prepared: TypeAlias = tuple[list[NDArray[Any] | None], list[dict[str, Any]]]

def are_settled(param_groups: Any, groups: list[Any]) -> bool: ...
def find_none(values: Sequence[Any], grads: Sequence[Any]) -> int: ...

@final
class ArrayList:
    def __new__(cls, rule: str, state_names: tuple[str, ...]) -> ArrayList: ...
    def __len__(self) -> int: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def params(self) -> list[NDArray[Any]]: ...
    @property
    def stored(self) -> list[NDArray[Any] | Stored]: ...
    @property
    def states(self) -> list[list[NDArray[Any] | Stored | None]]: ...
    @property
    def count(self) -> int: ...
    writes: list[tuple[dict[str, Any], str, Any]]
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def add(
        self,
        names: list[str],
        grad_names: list[str],
        params: Sequence[NDArray[Any] | Stored],
        states: Sequence[Sequence[NDArray[Any] | Stored | None]],
        group: int,
        zero: bool,
        threads: int,
        begin: Callable[[], None] | None = None,
    ) -> None: ...
    @overload
    def step(
        self,
        prepare: Callable[[Any], _Prepared],
        grads: Any,
        hyper: Callable[[int, dict[str, Any]], Mapping[str, float]],
        threads: int,
        plain: Any = None,
        around: None = None,
        source: ArrayList | None = None,
    ) -> tuple[int, int]: ...
    @overload
    def step(
        self,
        prepare: Callable[[Any], _Prepared],
        grads: Any,
        hyper: Callable[[int, dict[str, Any]], Mapping[str, float]],
        threads: int,
        plain: Any,
        around: Around,
        source: ArrayList | None = None,
    ) -> tuple[int, int, _Outcome]: ...
    def keep_sums(self) -> None: ...
    def drop_sums(self) -> None: ...
    def clear(self) -> None: ...
    def stream(self, grads: list[NDArray[Any]], threads: int) -> None: ...
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
