"""The steps as functions on lists of arrays that the caller keeps."""

from fusedopt.optim.adagrad import adagrad
from fusedopt.optim.adam import adam, adamw
from fusedopt.optim.lamb import lamb
from fusedopt.optim.lars import lars
from fusedopt.optim.lion import lion
from fusedopt.optim.muon import muon
from fusedopt.optim.rmsprop import rmsprop
from fusedopt.optim.sgd import sgd

__all__ = ["adagrad", "adam", "adamw", "lamb", "lars", "lion", "muon", "rmsprop", "sgd"]
