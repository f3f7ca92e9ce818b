"""Types of the compiled border for tensors."""

from collections.abc import Callable
from typing import Any, final

from fusedopt._around import Around

@final
class Copier:
    def __new__(cls) -> Copier: ...
    def call(self, grad: bool, function: Callable[..., Any], *args: Any) -> Any: ...

@final
class Swap:
    def __new__(cls, copier: Copier, owner: Any) -> Swap: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...

def refuse_within_swap(owner: Any) -> None: ...

@final
class TensorList:
    def __new__(
        cls,
        rule: str,
        kinds: tuple[type, type],
        is_plain: Callable[[type], bool],
        is_neg: Callable[[], bool],
        exchange: object,
        export: Callable[[Any], object],
        copier: Copier,
    ) -> TensorList: ...
    def step(
        self,
        owner: Any,
        groups: list[tuple[Any, ...]],
        counted: bool,
        state: Any,
        threads: int,
        around: Around | None = None,
    ) -> tuple[list[Any], tuple[Any, ...] | None]: ...
