"""Types of the compiled border for tensors."""

from collections.abc import Callable
from typing import Any, final

from fusedopt._copies import Copier
from fusedopt._leaves import LeafList
from fusedopt._options import StepOptions

@final
class GroupPlan:
    def __new__(
        cls,
        states: list[tuple[int, str, str | None, str]],
        squares: tuple[bool, ...],
        bfloat16: str,
        seed: int,
        maps: tuple[int, ...],
        rest: tuple[bool, ...] | None,
        every: int,
    ) -> GroupPlan: ...
    @property
    def names(self) -> tuple[str, ...]: ...

def is_same(seen: dict[str, Any], now: dict[str, Any]) -> bool: ...
def is_known(checked: dict[int, Any], i: int, group: dict[str, Any]) -> bool: ...

@final
class TensorList(LeafList):
    counted: bool
    @property
    def filled(self) -> Any: ...  # of an accumulator: dict[int, tensor]
    @property
    def grads(self) -> dict[int, Any] | None: ...
    def __new__(
        cls,
        rule: str,
        state_names: tuple[str, ...],
        kinds: tuple[type, type],
        is_plain: Callable[[type], bool],
        is_neg: Callable[[], bool],
        exchange: object,
        export: Callable[[Any], object],
        mark: Callable[[list[Any]], object],
        copier: Copier,
        counts: bool,
        needs_rows: bool,
    ) -> TensorList: ...
    def step(
        self,
        owner: Any,
        state: Any,
        threads: int,
        options: StepOptions | None = None,
        copies: dict[int, Any] | None = None,
        chosen: Any = None,
        grads: dict[int, Any] | None = None,
        sources: list[Any] | None = None,
        drops: bool = False,
        accumulator: Any = None,
    ) -> None: ...
    def zero(self, owner: Any, buffers: list[Any], value: Any) -> None: ...
