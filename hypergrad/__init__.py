"""Exact, memory-light hypergradients through whole training runs, in JAX."""

from hypergrad import data, meta, nets, schedules
from hypergrad.adjoints import Adjoint, Checkpointed, ReversalError, Reversible, Stored
from hypergrad.check import Report, check_hypergradient
from hypergrad.optimizers import heavy_ball, momentum, sgd
from hypergrad.run import Snapshot
from hypergrad.train import Trained, train

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "Checkpointed",
    "Report",
    "ReversalError",
    "Reversible",
    "Snapshot",
    "Stored",
    "Trained",
    "check_hypergradient",
    "data",
    "heavy_ball",
    "meta",
    "momentum",
    "nets",
    "schedules",
    "sgd",
    "train",
]
