"""Meta-optimization: follow hypergradients to better hyperparameters, and survive being killed."""

from hypergrad.meta.lbfgsb import LBFGSB
from hypergrad.meta.outer_loop import optimize
from hypergrad.meta.runs import History, HypergradientExplosion, Objective, Optimized, SeedFailure
from hypergrad.meta.tuning import Tuned, tune

__all__ = [
    "LBFGSB",
    "History",
    "HypergradientExplosion",
    "Objective",
    "Optimized",
    "SeedFailure",
    "Tuned",
    "optimize",
    "tune",
]
