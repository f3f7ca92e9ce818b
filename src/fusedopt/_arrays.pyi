"""Types of the compiled border for arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, final, overload

from numpy.typing import NDArray

from fusedopt._around import Around
from fusedopt.formats import Stored

# skipped, norm of the gradients, factor of the clip, (leaves, statistics)
_Outcome: TypeAlias = tuple[bool, float | None, float, tuple[Sequence[int], NDArray[Any]] | None]

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
    ) -> None: ...
    @overload
    def step(
        self,
        prepare: Callable[[Any], list[NDArray[Any] | None]],
        grads: Any,
        scalars: Callable[[int, dict[str, Any]], Mapping[str, float]],
        options: list[dict[str, Any]],
        threads: int,
        plain: Any = None,
        around: None = None,
    ) -> tuple[int, int]: ...
    @overload
    def step(
        self,
        prepare: Callable[[Any], list[NDArray[Any] | None]],
        grads: Any,
        scalars: Callable[[int, dict[str, Any]], Mapping[str, float]],
        options: list[dict[str, Any]],
        threads: int,
        plain: Any,
        around: Around,
    ) -> tuple[int, int, _Outcome]: ...
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
