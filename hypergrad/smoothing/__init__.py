"""Objectives smoothed over noise in the hyperparameters, for runs so chaotic that slopes say nothing.

Where a run is chaotic, its hypergradient is exact and useless: it is the slope of a ripple.  The objective
averaged over a little noise has a slope that is worth following, and it needs no derivative of the run::

    F(θ) = E f(θ + σ ε),  ε ~ N(0, I);    ∇F(θ) = E ε (f(θ + σ ε) - f(θ - σ ε)) / (2 σ)

========== =================== =========================================== ============================
function   an update needs     noise                                       use it
========== =================== =========================================== ============================
`smoothed` whole runs          one vector for a pair of runs               **Recommended**
`nres`     windows of K steps  one vector for a pair of runs               Situational: very long runs
`pes`      windows of K steps  fresh in every window, weighted by its sum  Not recommended: varies more
========== =================== =========================================== ============================

All three estimates are unbiased for the slope of what they smooth.  `training` describes the runs of
`hypergrad.train` for `nres` and `pes`.

======  ===========  ===================================================================
symbol  name         meaning
======  ===========  ===================================================================
``f``   objective    the outer objective, or the sum of the losses of all windows
``θ``   hypers       what it is a function of, a tree of arrays of floats
``σ``   sigma        standard deviation of the noise in every number of ``θ``
``ε``   noise        standard normal, one number for every number of ``θ``
``P``   pairs        how many ``ε`` are drawn; each is used with both signs
``K``   window       steps of the inner run in one window
``T``   steps        steps of a whole inner run, an episode of ``T / K`` windows
======  ===========  ===================================================================
"""

from hypergrad.smoothing.full import smoothed
from hypergrad.smoothing.runs import training
from hypergrad.smoothing.windows import Estimate, Estimator, Particles, nres, pes

__all__ = ["Estimate", "Estimator", "Particles", "nres", "pes", "smoothed", "training"]
