"""Checks an installed fusedopt with nothing but NumPy and the standard library.

Runs with an empty PATH, in an environment with only what `pip install fusedopt` installs. Prints
what is worth recording: versions, import time, size.
"""

import importlib.metadata
import statistics
import subprocess
import sys
from pathlib import Path

IMPORT = """
import numpy, time
start = time.perf_counter()
import fusedopt
print(time.perf_counter() - start)
"""


def import_seconds() -> float:
    """Return the median time to import fusedopt after NumPy."""
    runs = [
        subprocess.run([sys.executable, "-I", "-c", IMPORT], capture_output=True, check=True)
        for _ in range(7)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def check_steps() -> None:
    """Step each optimizer on each instruction set and compare with the reference, byte for byte."""
    import numpy as np

    import fusedopt
    from fusedopt import _core

    for isa in _core.available_isas():
        _core.select_isa(isa)
        for cls in [*vars(fusedopt).values()]:  # a step may load modules
            if not hasattr(cls, "rule"):
                continue
            # every option that asks for state, and every term of the gradient
            asked = {state.needs: 0.9 for state in cls.rule.states if state.needs}
            options = {
                option.name: type(option.default)(asked.get(option.name, 0.01))
                for option in cls.rule.options
                if option.name in asked or option.term
            }
            shapes = [3, 300_001] if cls.rule.demand_shape is None else [(1, 3), (70, 90)]
            results = []
            for module in (fusedopt, fusedopt.reference):
                rng = np.random.default_rng(0)
                params = [rng.standard_normal(n).astype(t) for n in shapes for t in "fd"]
                opt = getattr(module, cls.__name__)(params, **options)
                for _ in range(3):
                    opt.step([rng.standard_normal(p.shape).astype(p.dtype) for p in params])
                results.append([p.tobytes() for p in params])
            assert results[0] == results[1], (isa, cls)


def main() -> None:
    """Check, and print the record."""
    seconds = import_seconds()
    import numpy

    import fusedopt

    files = importlib.metadata.files("fusedopt") or []
    size = sum(Path(str(f.locate())).stat().st_size for f in files if f.suffix != ".pyc")
    info = fusedopt.info()
    assert info["backend"] == "pthread pool", info["backend"]
    assert "site-packages" in fusedopt.__file__, fusedopt.__file__
    required = importlib.metadata.requires("fusedopt") or []
    assert [r for r in required if "extra ==" not in r] == ["numpy>=1.25"], required
    check_steps()
    print(
        f"fusedopt {info['version']}, CPython {sys.version.split()[0]}, NumPy {numpy.__version__}, "
        f"{info['available']}: correct; import {seconds * 1e3:.0f} ms after NumPy, "
        f"{size / 1e3:.0f} kB installed"
    )


if __name__ == "__main__":
    main()
