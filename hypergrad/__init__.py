"""Exact, memory-light hypergradients through whole training runs, in JAX."""

from hypergrad import constraints, curvature, data, files, implicit, meta, nets, problems, schedules
from hypergrad.adjoints import Adjoint, Checkpointed, Forward, Stored, Truncated
from hypergrad.augment import Augmentation
from hypergrad.check import Finding, Report, check_hypergradient
from hypergrad.distill import ChaosWarning, Distilled, Recipe, distill, load_distilled
from hypergrad.evaluation import Evaluation, evaluate
from hypergrad.optimizers import (
    adadelta,
    adagrad,
    adagrad_momentum,
    adam,
    adamax,
    adamw,
    amsgrad,
    as_optax,
    clip,
    clip_by_global_norm,
    from_optax,
    heavy_ball,
    lamb,
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
from hypergrad.planner import Estimate, Plan, plan
from hypergrad.reversible import ReversalError, Reversible
from hypergrad.run import Snapshot
from hypergrad.train import Trained, train
from hypergrad.tuning import Tuned, tune

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "Augmentation",
    "ChaosWarning",
    "Checkpointed",
    "Distilled",
    "Estimate",
    "Evaluation",
    "Finding",
    "Forward",
    "Plan",
    "Recipe",
    "Report",
    "ReversalError",
    "Reversible",
    "Snapshot",
    "Stored",
    "Trained",
    "Truncated",
    "Tuned",
    "adadelta",
    "adagrad",
    "adagrad_momentum",
    "adam",
    "adamax",
    "adamw",
    "amsgrad",
    "as_optax",
    "check_hypergradient",
    "clip",
    "clip_by_global_norm",
    "constraints",
    "curvature",
    "data",
    "distill",
    "evaluate",
    "files",
    "from_optax",
    "heavy_ball",
    "implicit",
    "lamb",
    "lars",
    "load_distilled",
    "meta",
    "momentum",
    "nadam",
    "nesterov",
    "nets",
    "plan",
    "problems",
    "radam",
    "rmsprop",
    "rmsprop_momentum",
    "schedules",
    "sgd",
    "shampoo",
    "sm3",
    "train",
    "tune",
]
