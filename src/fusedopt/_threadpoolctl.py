"""Reports the number of threads to threadpoolctl, and applies its limits.

threadpoolctl is not imported for that: importing it takes milliseconds and writes to the
environment. The controller is registered when other code imports it, before or after fusedopt.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from fusedopt import _core, _threads

_NAME = "threadpoolctl"


def _register(threadpoolctl: ModuleType) -> None:
    if not hasattr(threadpoolctl, "register"):  # before 3.5
        return

    class Controller(threadpoolctl.LibController):  # type: ignore[misc, name-defined]
        """The extension, as threadpoolctl sees it."""

        user_api = internal_api = "fusedopt"
        filename_prefixes = ("_core.",)
        check_symbols = ("fo_backend",)  # other packages have a _core too

        def set_additional_attributes(self) -> None:
            self.threading_layer = _core.backend()
            self.architecture = _core.isa()

        def get_version(self) -> str:
            from fusedopt import __version__

            return __version__

        def get_num_threads(self) -> int:
            return _threads.get_num_threads()

        def set_num_threads(self, n: int) -> None:
            _threads.limit(n)

    threadpoolctl.register(Controller)


class _OnImport:
    """Finds threadpoolctl once, as import finders do, and registers the controller then."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Register the controller now, or when threadpoolctl is imported."""
    if _NAME in sys.modules:
        _register(sys.modules[_NAME])
    else:
        sys.meta_path.insert(0, _OnImport())
