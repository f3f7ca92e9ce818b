"""Types of what the compiled borders share: see _leaves.pyx."""

from typing import Any

class Verdict:
    skipped: bool
    grad_norm: float | None
    clip_factor: float

class LeafList:
    writes: list[tuple[dict[str, Any], str, Any]]
    def __enter__(self) -> None: ...
    def __exit__(self, kind: object, value: object, trace: object) -> None: ...
