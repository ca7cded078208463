"""Bilevel problems ``min_θ g(w*(θ), θ)``, ``w*(θ) = argmin_w f(w, θ)``, by solvers that move both at once.

Such a solver moves the hyperparameters long before the parameters have converged.  All of them work on one
description, a `Problem`, and each is a pair of functions, like an optax optimizer; `solve` runs it.

================  =====================================  ============  ====================================
solver            ``u`` in the step of ``θ``             work          use it
================  =====================================  ============  ====================================
`saba`            as `soba`, with less and less noise    3             **Recommended**, if its tables fit
`soba`            ``u <- u - β (A u - ∂g/∂w)``           3             **Recommended** otherwise
`amortized`       the same, after more steps of ``w``    T + 2 U + 3   Situational: hard inner problems
`f2sa`            none; off by ``O(1/λ)``                3 T + 3       Situational: no second derivatives
`unrolled`        ``α Σ_{k<T} (I - α A)^k ∂g/∂w``        3 T + 1       Situational: runs that stop early
`truncated`       its first ``K`` terms                  T + 2 K + 1   Situational: cheaper, and biased
`t1_t2`           ``α ∂g/∂w``                            T + 3         Situational: cheap, most biased
`darts`           ``ξ ∂g/∂w``                            5             Situational: the same
`darts(order=1)`  0                                      2             Not recommended: direct effects only
================  =====================================  ============  ====================================

They descend along ``∂g/∂θ - M u``, and at the solution ``u = A⁻¹ ∂g/∂w``.  Work is that of a step with
minibatches of one example.  A gradient, in parameters and hyperparameters together, counts 1.  A product
with second derivatives counts 2, as usual, even if the gradient in it was kept and not recomputed.  But
``∂f/∂w``, ``A u`` and ``M u`` come out of one pass, and are not counted separately, as calls in papers are.

If ``f`` contains derivatives written by hand (``jax.custom_vjp`` and ``jax.custom_jvp``: straight-through,
reversed, clipped gradients), ``∂f/∂w`` is what JAX computes, and ``A`` is its derivative, which need not be
symmetric: ``Aᵀ`` then replaces ``A`` above.

========  ==============  ==================================================================
symbol    name            meaning
========  ==============  ==================================================================
``w``     params          inner variables, a tree of ``d`` numbers
``θ``     hypers          outer variables, a tree of ``h`` numbers, unconstrained
``f``     inner           what ``w`` minimizes, a mean over examples
``g``     outer           what ``θ`` should minimize at that minimum, a mean over examples
``A``                     ``∂²f/∂w²``, ``(d, d)``
``M``                     ``∂²f/∂θ∂w``, ``(h, d)``
``u``     adjoint         approximation of ``A⁻¹ ∂g/∂w``, a tree like ``w``
``α``     rate            step size of ``w``
``β``     linear_rate     step size of ``u``
``γ``     hyper_rate      step size of ``θ``
``ξ``     lookahead       step size of the step of ``w`` that `darts` looks ahead
``T``     inner_steps     steps of ``w`` for one of ``θ``
``U``     linear_steps    steps of ``u`` for one of ``θ``
``K``     window          the last steps of ``w`` that are differentiated
``λ``     penalty         weight of ``f`` beside ``g``
========  ==============  ==================================================================
"""

from hypergrad.bilevel.penalty import f2sa
from hypergrad.bilevel.problem import Problem
from hypergrad.bilevel.single_loop import amortized, saba, soba
from hypergrad.bilevel.steps import Rate, Solution, Solver, State, Work, solve
from hypergrad.bilevel.unrolling import darts, t1_t2, truncated, unrolled

__all__ = [
    "Problem",
    "Rate",
    "Solution",
    "Solver",
    "State",
    "Work",
    "amortized",
    "darts",
    "f2sa",
    "saba",
    "soba",
    "solve",
    "t1_t2",
    "truncated",
    "unrolled",
]
