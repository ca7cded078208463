"""Exact, memory-light hypergradients through whole training runs, in JAX."""

from hypergrad import data, meta, nets, schedules
from hypergrad.adjoints import Adjoint, Checkpointed, ReversalError, Reversible, Stored
from hypergrad.optimizers import (
    adadelta,
    adagrad,
    adagrad_momentum,
    adam,
    adamax,
    adamw,
    amsgrad,
    heavy_ball,
    lars,
    momentum,
    nadam,
    nesterov,
    radam,
    rmsprop,
    rmsprop_momentum,
    sgd,
    shampoo,
    sm3,
)
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
    "adadelta",
    "adagrad",
    "adagrad_momentum",
    "adam",
    "adamax",
    "adamw",
    "amsgrad",
    "data",
    "heavy_ball",
    "lars",
    "meta",
    "momentum",
    "nadam",
    "nesterov",
    "nets",
    "radam",
    "rmsprop",
    "rmsprop_momentum",
    "schedules",
    "sgd",
    "shampoo",
    "sm3",
    "train",
]
