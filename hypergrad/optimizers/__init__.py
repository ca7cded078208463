"""Optimizers, each a short program of moves (see `hypergrad.program`)."""

from hypergrad.optimizers.adam import adam, adamax, adamw, amsgrad, nadam, radam
from hypergrad.optimizers.adaptive import (
    adadelta,
    adagrad,
    adagrad_momentum,
    rmsprop,
    rmsprop_momentum,
    sm3,
)
from hypergrad.optimizers.asynchrony import Asynchrony
from hypergrad.optimizers.bridge import as_optax, from_optax
from hypergrad.optimizers.clipping import clip, clip_by_global_norm
from hypergrad.optimizers.filtered import filtered
from hypergrad.optimizers.improvement import expected_improvement, probability_of_improvement, quadratic
from hypergrad.optimizers.kfac import adaptive_kfac, kfac
from hypergrad.optimizers.layerwise import lamb, lars
from hypergrad.optimizers.momentum import heavy_ball, momentum, nesterov, sgd
from hypergrad.optimizers.shampoo import shampoo

__all__ = [
    "Asynchrony",
    "adadelta",
    "adagrad",
    "adagrad_momentum",
    "adam",
    "adamax",
    "adamw",
    "adaptive_kfac",
    "amsgrad",
    "as_optax",
    "clip",
    "clip_by_global_norm",
    "expected_improvement",
    "filtered",
    "from_optax",
    "heavy_ball",
    "kfac",
    "lamb",
    "lars",
    "momentum",
    "nadam",
    "nesterov",
    "probability_of_improvement",
    "quadratic",
    "radam",
    "rmsprop",
    "rmsprop_momentum",
    "sgd",
    "shampoo",
    "sm3",
]
