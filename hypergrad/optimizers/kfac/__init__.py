"""K-FAC: Kronecker factors of the curvature by layer, in a reversible and in an adaptive form."""

from hypergrad.optimizers.kfac.adaptive import AdaptiveState, adaptive_kfac
from hypergrad.optimizers.kfac.asynchrony import Asynchrony
from hypergrad.optimizers.kfac.damping import damped, inverse, precondition
from hypergrad.optimizers.kfac.reversible import kfac

__all__ = ["AdaptiveState", "Asynchrony", "adaptive_kfac", "damped", "inverse", "kfac", "precondition"]
