"""A meta-optimizer with a rate for every coordinate, which its own gradients adapt.

======  ===========  ==========================================================================
symbol  name         meaning
======  ===========  ==========================================================================
``g``   gradient     of a coordinate, cut at ``4 √v``, so that a cliff leaves no trace
``m``   mean         running average of ``g``, of weight ``1 - 0.6``
``v``   square       running average of ``g²``, of weight ``1 - 0.9``
``α``   rate         of the coordinate
``f``   value        the loss
======  ===========  ==========================================================================
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hypergrad._base.trees import PyTree, Scalar

UP, DOWN = 1.2, 0.7
LEAST, MOST = 1e-3, 0.7  # of a rate; a step is no longer than the latter
MEAN, SQUARE = 0.6, 0.9
CUT = 4.0
JUMP = 5.0  # how many times its usual change the loss may rise


class DeltaBarDelta(NamedTuple):
    """State of `delta_bar_delta`.

    Attributes:
      made: number of steps.
      mean: by coordinate.
      square: by coordinate.
      rate: by coordinate.
      best: the values with the smallest loss so far.
      smallest: that loss.
      first: the first loss.
      last: the last loss that was followed.
      change: running average of its absolute changes.
    """

    made: Array
    mean: PyTree
    square: PyTree
    rate: PyTree
    best: PyTree
    smallest: Scalar
    first: Scalar
    last: Scalar
    change: Scalar


def delta_bar_delta(rate: float = 0.1) -> optax.GradientTransformationExtraArgs:
    """Adam with a rate for every coordinate, which grows while its gradients agree in sign.

    ``α <- 1.2 α if g m > 0, 0.7 α if g m < 0;  w <- w - α m̂ / √v̂``, with ``0.001 <= α <= 0.7``

    Coordinates of different sensitivity thereby find rates of their own, which shrink where a gradient is
    noise or changes its sign.  A loss that is above the first one and has jumped is not followed: the step
    leads back to the best values so far, and all rates are halved.

    Args:
      rate: ``α`` at the start, > 0, in units of the raw values: 0.1 changes a positive number by a tenth.

    Returns:
      An optax transformation, whose update needs the loss as ``value``, as `hypergrad.meta.optimize` gives
      it.

    Source: Jacobs, "Increased rates of convergence through learning rate adaptation", Neural Networks,
    1988; Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP
    algorithm", 1993, for the signs.

    >>> import hypergrad as hg
    >>> far = lambda x, key: jnp.sum(jnp.array([1.0, 1e-4]) * (x - 5.0) ** 2)
    >>> settings = {"optimizer": hg.meta.delta_bar_delta(), "steps": 40, "progress": False}
    >>> hg.meta.optimize(far, jnp.zeros(2), **settings).hypers.round(1)
    Array([5., 5.], dtype=float32)
    """

    def init(raw: PyTree) -> DeltaBarDelta:
        zeros = jax.tree.map(jnp.zeros_like, raw)
        rates = jax.tree.map(lambda x: jnp.full_like(x, rate), raw)
        zero, infinite = jnp.zeros(()), jnp.full((), jnp.inf)
        return DeltaBarDelta(jnp.zeros((), jnp.int32), zeros, zeros, rates, raw, infinite, zero, zero, zero)

    def update(
        gradient: PyTree, state: DeltaBarDelta, raw: PyTree = None, *, value: Any, **_: Any
    ) -> tuple[PyTree, DeltaBarDelta]:
        count, value = state.made + 1, jnp.asarray(value, state.last.dtype)
        first = jnp.where(count == 1, value, state.first)
        jumped = (count > 2) & (value > jnp.maximum(first, state.last + JUMP * state.change))
        better = value < state.smallest
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), raw, state.best)

        def coordinate(g: Array, m: Array, v: Array, a: Array, x: Array, back: Array) -> Any:
            step, *new = _step(g, m, v, a, count)
            old = (m, v, jnp.maximum(a / 2, LEAST))
            new = [jnp.where(jumped, kept, moved) for kept, moved in zip(old, new)]
            return jnp.where(jumped, back - x, step), *new

        moved = jax.tree.map(coordinate, gradient, *state[1:4], raw, best)
        step, mean, square, rates = jax.tree.transpose(
            jax.tree.structure(raw), jax.tree.structure((0, 0, 0, 0)), moved
        )
        change = jnp.abs(value - state.last)
        usual = jnp.where(count == 2, change, 0.8 * state.change + 0.2 * change)
        smallest = jnp.minimum(value, state.smallest)
        return step, DeltaBarDelta(
            count,
            mean,
            square,
            rates,
            best,
            smallest,
            first,
            last=jnp.where(jumped, smallest, value),
            change=jnp.where(jumped | (count == 1), state.change, usual),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _step(g: Array, m: Array, v: Array, rate: Array, count: Array) -> tuple[Array, ...]:
    """The step of a coordinate, and its mean, square and rate."""
    begun = count > 1
    usual = jnp.sqrt(v / jnp.where(begun, 1 - SQUARE ** (count - 1), 1))
    g = jnp.where(begun, jnp.clip(g, -CUT * usual, CUT * usual), g)
    agreement = jnp.sign(g) * jnp.sign(m)
    factor = jnp.where(agreement > 0, UP, jnp.where(agreement < 0, DOWN, 1))
    rate = jnp.clip(rate * factor, LEAST, MOST).astype(g.dtype)
    m, v = MEAN * m + (1 - MEAN) * g, SQUARE * v + (1 - SQUARE) * g * g
    size = jnp.sqrt(v / (1 - SQUARE**count))
    step = -rate * (m / (1 - MEAN**count)) / jnp.where(size > 0, size, 1)
    return jnp.clip(step, -MOST, MOST).astype(g.dtype), m, v, rate
