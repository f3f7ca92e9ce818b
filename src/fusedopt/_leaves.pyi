"""Types of what the compiled borders share: see _leaves.pyx."""

from typing import Any, final

from typing_extensions import disjoint_base

__pyx_capi__: dict[str, object]  # what the borders use, see _leaves.pxd

@final
class Verdict:
    @property
    def skipped(self) -> bool: ...
    @property
    def grad_norm(self) -> float | None: ...
    @property
    def clip_factor(self) -> float: ...

@disjoint_base
class LeafList:
    writes: list[tuple[dict[str, Any], str, Any]]
    disk: Any
    def use_row(self, rule: str) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, kind: object, value: object, trace: object) -> None: ...
