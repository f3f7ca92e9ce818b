"""The steps as functions on lists of arrays that the caller keeps.

Each call checks its arguments, which a class does once: for small arrays the classes are faster.
"""

from fusedopt.optim.adadelta import adadelta
from fusedopt.optim.adafactor import adafactor
from fusedopt.optim.adagrad import adagrad
from fusedopt.optim.adam import adam, adamw
from fusedopt.optim.adamax import adamax
from fusedopt.optim.ademamix import ademamix
from fusedopt.optim.adopt import adopt
from fusedopt.optim.asgd import asgd
from fusedopt.optim.lamb import lamb
from fusedopt.optim.lars import lars
from fusedopt.optim.lion import lion
from fusedopt.optim.muon import muon
from fusedopt.optim.nadam import nadam
from fusedopt.optim.prodigy import prodigy
from fusedopt.optim.radam import radam
from fusedopt.optim.rmsprop import rmsprop
from fusedopt.optim.rprop import rprop
from fusedopt.optim.schedulefree import schedulefreeadamw, schedulefreesgd
from fusedopt.optim.sgd import sgd
from fusedopt.optim.signsgd import signsgd
from fusedopt.optim.yogi import yogi

__all__ = [
    "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "ademamix", "adopt", "asgd",
    "lamb", "lars", "lion", "muon", "nadam", "prodigy", "radam", "rmsprop", "rprop",
    "schedulefreeadamw", "schedulefreesgd", "sgd", "signsgd", "yogi",
]  # fmt: skip
