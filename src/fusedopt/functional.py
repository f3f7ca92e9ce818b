"""The steps as functions on lists of arrays that the caller keeps."""

from fusedopt.optim.adagrad import adagrad
from fusedopt.optim.adam import adam, adamw
from fusedopt.optim.lamb import lamb
from fusedopt.optim.lars import lars
from fusedopt.optim.lion import lion
from fusedopt.optim.rmsprop import rmsprop
from fusedopt.optim.schedulefree import schedulefreeadamw, schedulefreesgd
from fusedopt.optim.sgd import sgd

__all__ = [
    "adagrad", "adam", "adamw", "lamb", "lars", "lion", "rmsprop",
    "schedulefreeadamw", "schedulefreesgd", "sgd",
]  # fmt: skip
