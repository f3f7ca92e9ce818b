"""The optimizers in plain NumPy: they document the fast ones, which equal them bit for bit.

Functions and classes have the names and signatures of `fusedopt.functional` and `fusedopt`, and
make the same checks before the first write. After that they step leaf by leaf: an exception in the
middle of a step, from a signal's handler or for lack of memory, leaves the step half done.
"""

from fusedopt.reference.adadelta import Adadelta, adadelta
from fusedopt.reference.adafactor import Adafactor, adafactor
from fusedopt.reference.adagrad import Adagrad, adagrad
from fusedopt.reference.adam import Adam, AdamW, adam, adamw
from fusedopt.reference.adamax import Adamax, adamax
from fusedopt.reference.ademamix import AdEMAMix, ademamix
from fusedopt.reference.adopt import ADOPT, adopt
from fusedopt.reference.asgd import ASGD, asgd
from fusedopt.reference.lamb import LAMB, lamb
from fusedopt.reference.lars import LARS, lars
from fusedopt.reference.lion import Lion, lion
from fusedopt.reference.muon import Muon, muon
from fusedopt.reference.nadam import NAdam, nadam
from fusedopt.reference.prodigy import Prodigy, prodigy
from fusedopt.reference.radam import RAdam, radam
from fusedopt.reference.rmsprop import RMSprop, rmsprop
from fusedopt.reference.rprop import Rprop, rprop
from fusedopt.reference.schedulefree import (
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    schedulefreeadamw,
    schedulefreesgd,
)
from fusedopt.reference.sgd import SGD, sgd
from fusedopt.reference.signsgd import SignSGD, signsgd
from fusedopt.reference.yogi import Yogi, yogi

__all__ = [
    "ADOPT", "ASGD", "LAMB", "LARS", "SGD", "AdEMAMix", "Adadelta", "Adafactor", "Adagrad",
    "Adam", "AdamW", "Adamax", "Lion", "Muon", "NAdam", "Prodigy", "RAdam", "RMSprop", "Rprop",
    "ScheduleFreeAdamW", "ScheduleFreeSGD", "SignSGD", "Yogi",
    "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "ademamix", "adopt", "asgd",
    "lamb", "lars", "lion", "muon", "nadam", "prodigy", "radam", "rmsprop", "rprop",
    "schedulefreeadamw", "schedulefreesgd", "sgd", "signsgd", "yogi",
]  # fmt: skip
