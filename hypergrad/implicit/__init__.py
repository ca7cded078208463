"""Hypergradients at a solution, by the implicit function theorem: how it was found does not matter.

If ``F(w, θ) = 0`` determines ``w``, its derivative is ``dw = -A⁻¹ ∂F/∂θ dθ``.  In reverse mode that is one
linear system, whatever the number of hyperparameters: ``Aᵀ u = ∂g/∂w``, and the hypergradient is
``∂g/∂θ - (∂F/∂θ)ᵀ u``.

========  ================  ========================================================================
symbol    name              meaning
========  ================  ========================================================================
``w``     params            the solution, a tree of ``d`` numbers
``θ``     args, hypers      what the solution is differentiated in
``f``     objective         what ``w`` minimizes; then ``F = ∂f/∂w``
``F``     optimality        a tree like ``w``; 0 at the solution
``A``     matvec            ``∂F/∂w``, ``(d, d)``; the Hessian of ``f``
``g``     outer             the outer objective at the solution, such as a validation loss
``u``     adjoint           ``A⁻ᵀ ∂g/∂w``
========  ================  ========================================================================

The linear systems are solved by a solver of `hypergrad.linear`, whose names are public here.
"""

from hypergrad._base.errors import ConvergenceError, ZeroHypergradientWarning
from hypergrad.implicit.approximate import Hoag, Hypergradient, hoag, hypergradient
from hypergrad.implicit.decorators import host, minimizer, root
from hypergrad.implicit.linear import (
    GMRES,
    ConjugateGradients,
    Direct,
    LinearSolver,
    Neumann,
    NormalEquations,
    Nystrom,
    Solved,
    linear_solve,
)

__all__ = [
    "GMRES",
    "ConjugateGradients",
    "ConvergenceError",
    "Direct",
    "Hoag",
    "Hypergradient",
    "LinearSolver",
    "Neumann",
    "NormalEquations",
    "Nystrom",
    "Solved",
    "ZeroHypergradientWarning",
    "hoag",
    "host",
    "hypergradient",
    "linear_solve",
    "minimizer",
    "root",
]
