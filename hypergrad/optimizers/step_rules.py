"""How far to go along a direction whose slope and curvature are uncertain.

Slope and curvature along a direction ``d`` are normal, and so is the change of the loss by a step ``α d``:

    f(w + α d) - f(w)  ~  N( -a α + ½ b α²,  c + p α² + ¼ q α⁴ )

======  ==================  ======================================================================
symbol  name                meaning
======  ==================  ======================================================================
``α``   step                size of the step along ``d``
``a``   slope               ``-dᵀm``, by which the loss falls
``b``   curvature           ``dᵀB d``, of either sign
``p``   slope_variance      of ``dᵀm``
``q``   curvature_variance  of ``dᵀB d``
``c``   loss_variance       of the loss before plus that of the loss after: ``2 s``
``μ``   mean                ``-a α + ½ b α²``
``z``                       ``-μ / σ``, where ``σ²`` is the variance
======  ==================  ======================================================================

A rule maps an `Improvement` and the largest step allowed to a step; it is differentiable in both.

Source: Chen, Choi, Balles, Duvenaud, Hennig, "Self-tuning stochastic optimization with curvature-aware
gradient filtering", 2020, equation 11.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.stats import norm

from hypergrad._base.opaque import with_rule
from hypergrad._base.trees import PyTree

NEWTON_STEPS = 12  # from at most 3 times the root; 9 give all digits of float64
GRID, BISECTIONS = 64, 50  # of the search for the largest expected improvement


class Improvement(NamedTuple):
    """The belief about the loss along a direction; all scalars.

    Attributes:
      slope: ``a``, above 0 where the direction leads downhill.
      curvature: ``b``.
      slope_variance: ``p``, at least 0.
      curvature_variance: ``q``, at least 0.
      loss_variance: ``c``, at least 0.
    """

    slope: Array
    curvature: Array
    slope_variance: Array
    curvature_variance: Array
    loss_variance: Array


Rule = Callable[[Improvement, Array], Array]


def law(improvement: Improvement, step: Array) -> tuple[Array, Array]:
    """Mean and variance of the change of the loss, ``-a α + ½ b α²`` and ``c + p α² + ¼ q α⁴``.

    Args:
      improvement: along a direction.
      step: ``α``, of any shape.

    Returns:
      ``(mean, variance)``, of that shape.

    >>> law(Improvement(2.0, 1.0, 0.0, 0.0, 3.0), 2.0)
    (-2.0, 3.0)
    """
    a, b, p, q, c = improvement
    return -a * step + 0.5 * b * step**2, c + p * step**2 + 0.25 * q * step**4


def quadratic(improvement: Improvement, max_step: Array) -> Array:
    """The minimum of the mean, ``α = a / b``, whatever the uncertainty; where ``b <= 0``, the largest step.

    Args:
      improvement: along a direction; where ``a <= 0``, the step is 0.
      max_step: the largest step allowed, above 0.

    Returns:
      A scalar in ``[0, max_step]``.

    Source: Chen et al. (2020), section 3.

    >>> float(quadratic(Improvement(2.0, 4.0, 1.0, 1.0, 1.0), 2.0))
    0.5
    """
    a, b, *_ = map(jnp.asarray, improvement)
    inside = a < b * max_step
    step = jnp.where(inside, a / jnp.where(inside, b, 1), max_step)
    return jnp.where(a > 0, step, 0)


def probability_of_improvement(improvement: Improvement, max_step: Array) -> Array:
    """The step most likely to lower the loss, ``argmax Φ(-μ / σ)``: the root of a quartic.

    ``(a q / 4) α⁴ + (b p / 2) α³ + c b α - c a = 0``.  By Descartes' rule of signs it has exactly one
    positive root wherever ``a, c, q > 0``, for ``b`` of either sign.  Limits: ``p, q -> 0`` gives
    ``a / b``; ``c -> 0`` gives 0, or ``-2 b p / (a q)`` where ``b < 0``; with ``q = 0`` and ``b <= 0``
    there is no root, and a larger step is always better.  Differentiated as an implicit function, not
    through the search.

    Args:
      improvement: along a direction; where ``a <= 0``, the step is 0.
      max_step: the largest step allowed, above 0.

    Returns:
      A scalar in ``[0, max_step]``.

    Source: Chen et al. (2020), section 3, where Newton's method on the objective takes the quartic's place.

    >>> round(float(probability_of_improvement(Improvement(2.0, 3.0, 1.0, 1.0, 0.1), 2.0)), 3)
    0.374
    """
    improvement = Improvement(*map(jnp.asarray, improvement))
    unit = jax.lax.stop_gradient(_above_root(improvement))
    certain = (improvement.slope_variance == 0) & (improvement.curvature_variance == 0)
    solvable = ~certain & (unit > 0) & (unit < 3 * max_step)
    otherwise = jnp.where(certain, quadratic(improvement, max_step), jnp.where(unit > 0, max_step, 0))
    a, b, p, q, c = (jnp.where(solvable, x, 1) for x in improvement)
    unit = jnp.where(solvable, unit, 1)

    # In this unit of length, and with coefficients of at most 1, nothing overflows or underflows.
    b, p, q = unit * b / a, unit**2 * p, unit**2 * (unit**2 * q)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(p, q), c) * jnp.maximum(abs(b), 1))
    p, q, c = p / largest, q / largest, c / largest

    def quartic(x: Array, b: Array, p: Array, q: Array, c: Array) -> Array:
        return 0.25 * q * x**4 + b * (0.5 * p * x**3 + c * x) - c

    def newton(_: int, x: Array) -> Array:
        return x - quartic(x, b, p, q, c) / (q * x**3 + b * (1.5 * p * x**2 + c))

    # Right of the root the quartic rises and is convex, so that Newton's method descends to it.
    root = jax.lax.fori_loop(0, NEWTON_STEPS, newton, jnp.ones_like(unit))
    root = unit * _implicit(quartic, root, (b, p, q, c))
    return jnp.where(solvable, jnp.minimum(root, max_step), otherwise)


def _above_root(improvement: Improvement) -> Array:
    """Between 1 and 3 times the root of the quartic; 0 where the root is 0, and infinite without one."""
    a, b, p, q, c = improvement

    def ratio(x: Array, y: Array) -> Array:
        return jnp.where(x == 0, 0, x / y)

    # Where b > 0, all terms but -c a are positive and at the root add up to c a: none is larger, and the
    # largest is at least a third of it.
    t = ratio(a, b)
    convex = jnp.minimum(jnp.minimum(t, jnp.cbrt(ratio(2 * t * c, p))), (4 * ratio(c, q)) ** 0.25)
    # Otherwise only the first is, no smaller than any other and at most three times the largest.
    t = ratio(-b, a)
    concave = jnp.maximum(
        jnp.maximum(ratio(2 * t * p, q), jnp.cbrt(ratio(4 * t * c, q))), (4 * ratio(c, q)) ** 0.25
    )
    return jnp.where(a > 0, jnp.where(b > 0, convex, 3 * concave), 0)


def expected_improvement(improvement: Improvement, max_step: Array) -> Array:
    """The first maximum of the expected improvement ``-μ Φ(z) + σ φ(z)``, or the largest step.

    Uncertainty counts as an opportunity here: the maximum is beyond ``a / b``, and for ``b <= 0`` there is
    none.  Farther out the expected improvement may rise again, without bound.  Differentiated as an
    implicit function.

    Args:
      improvement: along a direction; where ``a <= 0``, the step is 0.
      max_step: the largest step allowed, above 0.

    Returns:
      A scalar in ``[0, max_step]``.

    Source: Chen et al. (2020), section 3, where it must be scaled down to be useful.

    >>> round(float(expected_improvement(Improvement(2.0, 3.0, 1.0, 1.0, 0.1), 2.0)), 3)
    0.838
    """
    improvement = Improvement(*map(jnp.asarray, improvement))
    a, b, p, q, _ = improvement
    certain = (p == 0) & (q == 0)
    inside = (a > 0) & (a < b * max_step) & ~certain
    safe = Improvement(*(jnp.where(inside, x, 1) for x in improvement))

    def rises(step: Array, along: Improvement = safe) -> Array:
        """``(σ' φ(z) - μ' Φ(z)) / Φ(z)``: of the sign of the derivative."""
        a, b, p, q, _ = along
        mean, variance = law(along, step)
        deviation = jnp.sqrt(variance)
        z = -mean / deviation
        odds = jnp.exp(norm.logpdf(z) - norm.logcdf(z))
        return (p * step + 0.5 * q * step**3) / deviation * odds - (b * step - a)

    first = jnp.where(inside, jax.lax.stop_gradient(safe.slope / safe.curvature), 1)
    last = jnp.where(inside, jax.lax.stop_gradient(max_step), 2)
    grid = first * (last / first) ** jnp.linspace(0, 1, GRID, dtype=first.dtype)
    falling = jax.lax.stop_gradient(jax.vmap(rises)(grid)) < 0
    k = jnp.argmax(falling)

    def bisect(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        below = rises(middle) > 0
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    found = inside & falling[k]
    low, high = jax.lax.fori_loop(0, BISECTIONS, bisect, (grid[jnp.maximum(k - 1, 0)], grid[k]))
    root = _implicit(rises, jnp.where(found, 0.5 * (low + high), first), (safe,))
    straight = quadratic(improvement, max_step)
    return jnp.where(
        found, root, jnp.where(certain, straight, jnp.where(improvement.slope > 0, max_step, 0))
    )


def _implicit(function: Callable[..., Array], root: Array, given: PyTree) -> Array:
    """A root of ``F(x, *given)``, with the derivative of an implicit function: ``-∂F / (∂F/∂x)``."""

    def rule(primals: Any, tangents: Any) -> tuple[Array, Array]:
        x, given = solution(*primals), primals[1]  # for derivatives of this derivative
        _, change = jax.jvp(lambda given: function(x, *given), (given,), (tangents[1],))
        return x, -change / jax.grad(function)(x, *given)

    solution = with_rule(lambda root, given: root, rule)
    return solution(jax.lax.stop_gradient(root), given)
