"""Curvature without matrices: Hessian, Gauss-Newton and Fisher products, and what they reveal.

A *matvec* is a linear function of trees like the parameters, ``v -> A v``.  It is compiled when it is first
called.  It is a pytree of the arrays inside it, so that compiled functions take it as an argument and
derivatives go through it.  The user's functions are traced when the matvec is made, not when it is called:
if parameters change from step to step, make it inside the function that is compiled, as in
``jax.jit(lambda w, v: hessian(loss, w, x)(v))``.

========  ====================  ====================================================================
symbol    name                  meaning
========  ====================  ====================================================================
``w``     params                parameters, ``d`` numbers in all
``v``     vector                a tree like the parameters
``z``     outputs               of the network, ``z = apply(w, inputs)``
``J``                           Jacobian ``∂z/∂w``
``L``     loss                  mean of the losses of ``n`` examples, ``L = 1/n Σ_i f_i``
``g_i``   gradient              ``∇f_i(w)``
``h_i``   hvp                   ``∇²f_i(w) δ``
``δ``     direction             a tree like the parameters
========  ====================  ====================================================================

A loss is a function ``loss(params, *data) -> scalar``, the *mean* over examples, which are the leading axis
of every array in ``data``.  It may be given all examples, a chunk of them, or a single one.
"""

from hypergrad.curvature.examples import Moment, Moments, PerExample, moments, per_example
from hypergrad.curvature.likelihoods import Likelihood, bernoulli, categorical, normal
from hypergrad.curvature.products import empirical_fisher, fisher, gauss_newton, hessian, sampled_fisher
from hypergrad.curvature.spectra import (
    Matvec,
    Ritz,
    Spectrum,
    Trace,
    asymmetry,
    batched,
    dense,
    density,
    lanczos,
    spectrum,
    trace,
)

__all__ = [
    "Likelihood",
    "Matvec",
    "Moment",
    "Moments",
    "PerExample",
    "Ritz",
    "Spectrum",
    "Trace",
    "asymmetry",
    "batched",
    "bernoulli",
    "categorical",
    "dense",
    "density",
    "empirical_fisher",
    "fisher",
    "gauss_newton",
    "hessian",
    "lanczos",
    "moments",
    "normal",
    "per_example",
    "sampled_fisher",
    "spectrum",
    "trace",
]
