"""The steps as functions on lists of arrays that the caller keeps."""

from fusedopt.optim.adagrad import adagrad
from fusedopt.optim.adam import adam, adamw
from fusedopt.optim.adopt import adopt
from fusedopt.optim.asgd import asgd
from fusedopt.optim.lamb import lamb
from fusedopt.optim.lars import lars
from fusedopt.optim.lion import lion
from fusedopt.optim.nadam import nadam
from fusedopt.optim.rmsprop import rmsprop
from fusedopt.optim.rprop import rprop
from fusedopt.optim.sgd import sgd
from fusedopt.optim.signsgd import signsgd
from fusedopt.optim.yogi import yogi

__all__ = [
    "adagrad", "adam", "adamw", "adopt", "asgd", "lamb", "lars", "lion", "nadam", "rmsprop",
    "rprop", "sgd", "signsgd", "yogi",
]  # fmt: skip
