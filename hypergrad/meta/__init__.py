"""Meta-optimization: follow hypergradients to better hyperparameters, and survive being killed."""

from hypergrad.meta.adaptive_rates import delta_bar_delta
from hypergrad.meta.lbfgsb import LBFGSB
from hypergrad.meta.outer_loop import optimize
from hypergrad.meta.runs import (
    History,
    HypergradientExplosion,
    MetaStep,
    Objective,
    Optimized,
    SeedFailure,
)
from hypergrad.meta.signs import NegativeWarning
from hypergrad.meta.tuned import Tuned, load_tuned
from hypergrad.meta.tuning import tune

__all__ = [
    "LBFGSB",
    "History",
    "HypergradientExplosion",
    "MetaStep",
    "NegativeWarning",
    "Objective",
    "Optimized",
    "SeedFailure",
    "Tuned",
    "delta_bar_delta",
    "load_tuned",
    "optimize",
    "tune",
]
