"""Optimizers, each a short program of moves (see `hypergrad.program`)."""

from hypergrad.optimizers.adam_family import adam, adamax, adamw, amsgrad, nadam, radam
from hypergrad.optimizers.adaptive import (
    adadelta,
    adagrad,
    adagrad_momentum,
    rmsprop,
    rmsprop_momentum,
    sm3,
)
from hypergrad.optimizers.average import with_average
from hypergrad.optimizers.clipping import clip, clip_by_global_norm
from hypergrad.optimizers.diagonal_curvature import gauss_newton_bartlett, hutchinson, sophia
from hypergrad.optimizers.distances import dadapt_adamw, madgrad, prodigy
from hypergrad.optimizers.factored import adafactor, novograd
from hypergrad.optimizers.kalman_filter import filtered
from hypergrad.optimizers.kfac.adaptive import adaptive_kfac
from hypergrad.optimizers.kfac.asynchrony import Asynchrony
from hypergrad.optimizers.kfac.reversible import kfac
from hypergrad.optimizers.kronecker import shampoo
from hypergrad.optimizers.labels import frozen, partition
from hypergrad.optimizers.layerwise import lamb, lars
from hypergrad.optimizers.momentum_family import heavy_ball, momentum, nesterov, sgd
from hypergrad.optimizers.muon_family import adamuon, muon, normuon
from hypergrad.optimizers.optax_interop import as_optax, from_optax
from hypergrad.optimizers.relatives import adabelief, ademamix, adopt, yogi
from hypergrad.optimizers.signs import cautious_adamw, grams, lion, signum
from hypergrad.optimizers.step_rules import expected_improvement, probability_of_improvement, quadratic

__all__ = [
    "Asynchrony",
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adagrad_momentum",
    "adam",
    "adamax",
    "adamuon",
    "adamw",
    "adaptive_kfac",
    "ademamix",
    "adopt",
    "amsgrad",
    "as_optax",
    "cautious_adamw",
    "clip",
    "clip_by_global_norm",
    "dadapt_adamw",
    "expected_improvement",
    "filtered",
    "from_optax",
    "frozen",
    "gauss_newton_bartlett",
    "grams",
    "heavy_ball",
    "hutchinson",
    "kfac",
    "lamb",
    "lars",
    "lion",
    "madgrad",
    "momentum",
    "muon",
    "nadam",
    "nesterov",
    "normuon",
    "novograd",
    "partition",
    "probability_of_improvement",
    "prodigy",
    "quadratic",
    "radam",
    "rmsprop",
    "rmsprop_momentum",
    "sgd",
    "shampoo",
    "signum",
    "sm3",
    "sophia",
    "with_average",
    "yogi",
]
