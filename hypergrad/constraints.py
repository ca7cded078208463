"""Constrained hyperparameters and the unconstrained numbers behind them.

A meta-optimizer moves unconstrained ("raw") numbers, but a training run needs learning rates above zero and
momenta between zero and one.  A `Constraint` is the pair of maps between the two.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class Constraint(NamedTuple):
    """A smooth bijection between raw numbers and a domain; all but `ascending` act element by element.

    A Constraint is a leaf wherever this library takes a tree of constraints.

    Attributes:
      to_constrained: raw array -> array of the same shape and dtype inside the domain.
      to_raw: its inverse; not finite exactly where its argument is outside the domain.
      name: what error messages and checkpoints call it.
      domain: the domain in words, for error messages.

    >>> import jax.numpy as jnp
    >>> cube = Constraint(lambda raw: raw**3, jnp.cbrt, "cube", "all real numbers")
    >>> float(cube.to_constrained(jnp.float32(2.0)))
    8.0
    """

    to_constrained: Callable[[jax.Array], jax.Array]
    to_raw: Callable[[jax.Array], jax.Array]
    name: str = "custom"
    domain: str = "where its to_raw is finite"


def _largest_raw(dtype: Any) -> float:
    # exp(+-this) is a normal number with decades to spare, so no map below overflows, flushes to
    # zero or makes 0 * inf in its derivative.
    return -0.9 * math.log(float(jnp.finfo(dtype).tiny))


def _exp(raw: jax.Array) -> jax.Array:
    limit = _largest_raw(raw.dtype)
    return jnp.exp(jnp.clip(raw, -limit, limit))


def _logistic(raw: jax.Array) -> jax.Array:
    # Above -log(eps) the logistic rounds to 1, which is outside (0, 1).
    top = -math.log(float(jnp.finfo(raw.dtype).eps))
    return jax.nn.sigmoid(jnp.clip(raw, -_largest_raw(raw.dtype), top))


real = Constraint(lambda raw: raw, lambda value: value, "real", "finite numbers")
"""No constraint: the raw value is the value."""

positive = Constraint(_exp, jnp.log, "positive", "x > 0")
"""Values above zero, such as learning rates: `value = exp(raw)`."""

unit = Constraint(_logistic, lambda x: jnp.log(x) - jnp.log1p(-x), "unit", "0 < x < 1")
"""Values strictly between 0 and 1, such as momenta: `value = 1 / (1 + exp(-raw))`."""


def interval(low: float, high: float) -> Constraint:
    """Values strictly between two numbers.

    ``value = low + (high - low) / (1 + exp(-raw))``

    Args:
      low: lower end, finite.
      high: upper end, finite, above ``low``.

    Returns:
      The Constraint.

    Raises:
      ValueError: the ends are not finite or not in order.

    >>> import jax.numpy as jnp
    >>> float(interval(-1.0, 3.0).to_constrained(jnp.float32(0.0)))
    1.0
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"interval(low={low!r}, high={high!r}): the ends must be finite with low < high; "
            "for a one-sided domain use constraints.positive"
        )

    def to_constrained(raw: jax.Array) -> jax.Array:
        ends = jnp.asarray([low, high], raw.dtype)
        # Rounding in the sum may land on an end, which is outside the open interval.
        inside = jnp.nextafter(ends, ends[::-1])
        return jnp.clip(low + (high - low) * _logistic(raw), inside[0], inside[1])

    def to_raw(value: jax.Array) -> jax.Array:
        return jnp.log(value - low) - jnp.log(high - value)

    return Constraint(to_constrained, to_raw, f"interval({low}, {high})", f"{low} < x < {high}")


def _ascend(raw: jax.Array) -> jax.Array:
    # Rounding may make a sum smaller than the one before it, depending on the order of additions.
    return jax.lax.cummax(jnp.cumsum(jnp.concatenate([raw[:1], _exp(raw[1:])])))


def _gaps(value: jax.Array) -> jax.Array:
    if value.ndim != 1:
        raise ValueError(
            f"constraints.ascending for a value of shape {value.shape}: an order needs an array of shape "
            "(K,); give it at a leaf that is one, and other constraints elsewhere"
        )
    gaps = jnp.diff(value)
    smallest = jnp.exp(-_largest_raw(value.dtype))  # a gap of 0 stands for one lost to rounding
    return jnp.concatenate([value[:1], jnp.log(jnp.where(gaps == 0, smallest, gaps))])


ascending = Constraint(_ascend, _gaps, "ascending", "x_1 <= x_2 <= ...")
"""Arrays `(K,)` in order, such as the knots of a schedule: `value_k = raw_1 + sum_{1<j<=k} exp(raw_j)`."""


def is_constraint(node: object) -> bool:
    """Whether a node of a tree is a Constraint, which is a leaf in a tree of constraints."""
    return isinstance(node, Constraint)


def _spread(call: str, constraints: PyTree, values: PyTree) -> PyTree:
    for leaf in jax.tree.leaves(constraints, is_leaf=is_constraint):
        if not isinstance(leaf, Constraint):
            raise TypeError(
                f"{call}(constraints=...): the leaf {leaf!r} is not a Constraint; use "
                "constraints.real, positive, unit, interval(low, high) or a Constraint of your own"
            )
    try:
        return jax.tree.broadcast(constraints, values, is_leaf=is_constraint)
    except ValueError as error:
        names = jax.tree.map(lambda leaf: leaf.name, constraints, is_leaf=is_constraint)
        raise ValueError(
            f"{call}(constraints={names}): not a prefix of the tree of values, "
            f"{jax.tree.structure(values)}; give one Constraint for all values, or a tree with "
            "one Constraint at each leaf or at each subtree that shares it"
        ) from error


def constrain(constraints: PyTree, raw: PyTree) -> PyTree:
    """Map raw values into their domains, ``value = to_constrained(raw)``; differentiable and jittable.

    Args:
      constraints: one Constraint, or a tree of them that is a prefix of `raw`.
      raw: tree of floating-point arrays of any shapes.

    Returns:
      The tree of `raw` with values inside the domains. The maps saturate just inside the ends (with zero
      derivative there), so the result never rounds onto an end of its domain.

    Raises:
      TypeError: a leaf of `constraints` is not a Constraint.
      ValueError: `constraints` is not a prefix of `raw`.

    >>> import jax.numpy as jnp
    >>> constrain({"momentum": unit, "rate": positive}, {"momentum": 0.0, "rate": 0.0})
    {'momentum': Array(0.5, dtype=float32), 'rate': Array(1., dtype=float32)}
    """
    spread = _spread("constrain", constraints, raw)
    return jax.tree.map(lambda leaf, constraint: constraint.to_constrained(_strong(leaf)), raw, spread)


def unconstrain(constraints: PyTree, values: PyTree) -> PyTree:
    """Map values to raw ones, ``raw = to_raw(value)``; the inverse of `constrain`.

    Args:
      constraints: one Constraint, or a tree of them that is a prefix of `values`.
      values: tree of floating-point arrays of any shapes, each inside its domain.

    Returns:
      The tree of `values` with raw values.

    Raises:
      TypeError: a leaf of `constraints` is not a Constraint, or a value is not floating-point.
      ValueError: `constraints` is not a prefix of `values`, or a value is outside its domain (values traced
        by `jax.jit` are unknown and not checked).

    >>> float(unconstrain(unit, 0.5))
    0.0
    """
    spread = _spread("unconstrain", constraints, values)

    def to_raw(path: Any, leaf: Any, constraint: Constraint) -> jax.Array:
        where = jax.tree_util.keystr(path) or "the value"
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"unconstrain(values=...): {where} has dtype {jnp.result_type(leaf)}; "
                "hyperparameters are floating-point, for example 1.0 for 1"
            )
        value = _strong(leaf)
        raw = constraint.to_raw(value)
        outside = ~jnp.isfinite(raw)
        if not isinstance(outside, jax.core.Tracer) and outside.any():
            raise ValueError(
                f"unconstrain(values=...): {where} holds {np.asarray(value)[outside].flat[0]}, "
                f"outside the domain of {constraint.name} ({constraint.domain}); move it inside "
                "or choose another constraint"
            )
        return raw

    return jax.tree.map_with_path(to_raw, values, spread)


def _strong(leaf: Any) -> jax.Array:
    # A Python number makes a weakly typed array, whose dtype may change in later arithmetic.
    return jnp.asarray(leaf, jnp.result_type(leaf))
