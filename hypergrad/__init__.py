"""Exact, memory-light hypergradients through whole training runs, in JAX."""

from hypergrad import constraints, data, files, meta, nets, schedules
from hypergrad.adjoints import Adjoint, Checkpointed, Forward, Stored, Truncated
from hypergrad.optimizers import (
    as_optax,
    clip,
    clip_by_global_norm,
    from_optax,
    heavy_ball,
    momentum,
    sgd,
)
from hypergrad.planner import Estimate, Plan, plan
from hypergrad.reversible import ReversalError, Reversible
from hypergrad.run import Snapshot
from hypergrad.train import Trained, train

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "Checkpointed",
    "Estimate",
    "Forward",
    "Plan",
    "ReversalError",
    "Reversible",
    "Snapshot",
    "Stored",
    "Trained",
    "Truncated",
    "as_optax",
    "clip",
    "clip_by_global_norm",
    "constraints",
    "data",
    "files",
    "from_optax",
    "heavy_ball",
    "meta",
    "momentum",
    "nets",
    "plan",
    "schedules",
    "sgd",
    "train",
]
