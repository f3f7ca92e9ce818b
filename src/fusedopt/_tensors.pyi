"""Types of the compiled border for tensors."""

from collections.abc import Callable
from typing import Any, final

from fusedopt._around import Around

@final
class TensorList:
    def __new__(
        cls,
        rule: str,
        kinds: tuple[type, type],
        is_neg: Callable[[], bool],
        exchange: object,
        export: Callable[[Any], object],
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
