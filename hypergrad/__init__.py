"""Exact, memory-light hypergradients through whole training runs, in JAX."""

from hypergrad import data, meta, nets, problems, schedules
from hypergrad.adjoints import Adjoint, Checkpointed, ReversalError, Reversible, Stored
from hypergrad.optimizers import heavy_ball, momentum, sgd
from hypergrad.run import Snapshot
from hypergrad.train import Trained, train

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "Checkpointed",
    "ReversalError",
    "Reversible",
    "Snapshot",
    "Stored",
    "Trained",
    "data",
    "heavy_ball",
    "meta",
    "momentum",
    "nets",
    "problems",
    "schedules",
    "sgd",
    "train",
]
