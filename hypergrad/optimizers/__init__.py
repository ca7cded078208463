"""Optimizers, each a short program of moves (see `hypergrad.program`)."""

from hypergrad.optimizers.momentum import heavy_ball, momentum, sgd

__all__ = ["heavy_ball", "momentum", "sgd"]
