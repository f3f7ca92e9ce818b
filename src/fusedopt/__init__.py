"""fusedopt: optimizer steps in place, in one pass over memory, on the CPU.

>>> import numpy as np, fusedopt
>>> params = {"W": np.zeros((784, 10), np.float32), "b": np.zeros(10, np.float32)}
>>> opt = fusedopt.AdamW(params, lr=3e-4)
>>> grads = {"W": np.ones((784, 10), np.float32), "b": np.ones(10, np.float32)}
>>> opt.step(grads)
StepResult(step=1, updated=2)
"""

import importlib as _importlib
import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from fusedopt import _core

_isa = _os.environ.get("FUSEDOPT_ISA")
if _isa is not None:
    try:
        _core.select_isa(_isa)
    except ValueError as exc:
        raise ImportError(
            f"FUSEDOPT_ISA={_isa!r}: this machine and build can run "
            f"{', '.join(_core.available_isas())}"
        ) from exc

from fusedopt import _threadpoolctl, formats, functional  # noqa: E402
from fusedopt._info import info  # noqa: E402
from fusedopt._memory import memory  # noqa: E402
from fusedopt._options import StepResult, StepStats  # noqa: E402
from fusedopt._rows import Rows  # noqa: E402
from fusedopt._threads import get_num_threads, set_num_threads  # noqa: E402
from fusedopt._version import __version__  # noqa: E402
from fusedopt.accumulate import GradAccumulator  # noqa: E402
from fusedopt.optim.adadelta import Adadelta  # noqa: E402
from fusedopt.optim.adafactor import Adafactor  # noqa: E402
from fusedopt.optim.adagrad import Adagrad  # noqa: E402
from fusedopt.optim.adam import Adam, AdamW  # noqa: E402
from fusedopt.optim.adamax import Adamax  # noqa: E402
from fusedopt.optim.ademamix import AdEMAMix  # noqa: E402
from fusedopt.optim.adopt import ADOPT  # noqa: E402
from fusedopt.optim.asgd import ASGD  # noqa: E402
from fusedopt.optim.lamb import LAMB  # noqa: E402
from fusedopt.optim.lars import LARS  # noqa: E402
from fusedopt.optim.lion import Lion  # noqa: E402
from fusedopt.optim.muon import Muon  # noqa: E402
from fusedopt.optim.nadam import NAdam  # noqa: E402
from fusedopt.optim.prodigy import Prodigy  # noqa: E402
from fusedopt.optim.radam import RAdam  # noqa: E402
from fusedopt.optim.rmsprop import RMSprop  # noqa: E402
from fusedopt.optim.rprop import Rprop  # noqa: E402
from fusedopt.optim.schedulefree import ScheduleFreeAdamW, ScheduleFreeSGD  # noqa: E402
from fusedopt.optim.sgd import SGD  # noqa: E402
from fusedopt.optim.signsgd import SignSGD  # noqa: E402
from fusedopt.optim.yogi import Yogi  # noqa: E402
from fusedopt.optimizer import Optimizer  # noqa: E402
from fusedopt.scaler import GradScaler  # noqa: E402

if _TYPE_CHECKING:
    from fusedopt import monitor, reference, schedules, tune

_threadpoolctl.watch()

_LATER = (
    "monitor",
    "reference",
    "schedules",
    "tune",
)  # imported at their first use: a step needs none of them


def __getattr__(name: str) -> _Any:
    """Import one of these modules, which becomes an attribute."""
    if name not in _LATER:
        raise AttributeError(f"module 'fusedopt' has no attribute {name!r}")
    return _importlib.import_module(f"fusedopt.{name}")


def __dir__() -> list[str]:
    """Return all names, those of modules to be imported too."""
    return sorted({*globals(), *_LATER})


__all__ = [
    "ADOPT",
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "GradAccumulator",
    "GradScaler",
    "Lion",
    "NAdam",
    "Muon",
    "Optimizer",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Rows",
    "Rprop",
    "SignSGD",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "StepResult",
    "StepStats",
    "Yogi",
    "__version__",
    "formats",
    "functional",
    "get_num_threads",
    "info",
    "memory",
    "monitor",
    "reference",
    "schedules",
    "set_num_threads",
    "tune",
]
