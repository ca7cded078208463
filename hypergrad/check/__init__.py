"""Whether a hypergradient can be trusted, on the user's own problem.

Every number ``z_i`` is moved in proportion to its size ``d_i``: its absolute value or the root mean square
of its array, whichever is larger.  Learning rates and images are thus measured on one scale.

======  ================  ==========================================================================
symbol  name              meaning
======  ================  ==========================================================================
``f``   value             the outer objective
``z``   leaves            everything that is differentiated, a list of arrays
``d``   sizes             of every number of ``z``
``g``   gradient          the hypergradient ``∂f/∂z`` that is checked
``u``   move              a direction, in units of ``d``
``r``   residual          ``f(z + s d u) - f(z) - g·(s d u)``: its slope at ``s = 0`` is the error of ``g``
``σ``   noise             standard deviation of the rounding error of ``f``
``T``   steps             length of the inner run
======  ================  ==========================================================================
"""

from hypergrad.check.inspection import check_hypergradient
from hypergrad.check.leave_out import check_leave_out
from hypergrad.check.report import Finding, LeaveOutReport, Report

__all__ = ["Finding", "LeaveOutReport", "Report", "check_hypergradient", "check_leave_out"]
