"""Optimizers, each a short program of moves (see `hypergrad.program`)."""

from hypergrad.optimizers.bridge import as_optax, from_optax
from hypergrad.optimizers.clipping import clip, clip_by_global_norm
from hypergrad.optimizers.momentum import heavy_ball, momentum, sgd

__all__ = ["as_optax", "clip", "clip_by_global_norm", "from_optax", "heavy_ball", "momentum", "sgd"]
