"""The optimizers in plain NumPy: they document the fast ones, which equal them bit for bit.

Functions and classes have the names and signatures of `fusedopt.functional` and `fusedopt`, and
make the same checks before the first write. From there on they go leaf by leaf: an exception in the
middle of a step, of a signal's handler or for want of memory, leaves it half done.
"""

from fusedopt.reference.adagrad import Adagrad, adagrad
from fusedopt.reference.adam import Adam, AdamW, adam, adamw
from fusedopt.reference.lamb import LAMB, lamb
from fusedopt.reference.lars import LARS, lars
from fusedopt.reference.lion import Lion, lion
from fusedopt.reference.muon import Muon, muon
from fusedopt.reference.rmsprop import RMSprop, rmsprop
from fusedopt.reference.sgd import SGD, sgd

__all__ = [
    "LAMB", "LARS", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "Muon", "RMSprop",
    "adagrad", "adam", "adamw", "lamb", "lars", "lion", "muon", "rmsprop", "sgd",
]  # fmt: skip
