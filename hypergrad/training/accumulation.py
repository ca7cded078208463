"""Batches that do not fit into memory at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.trees import PyTree

Loss = Callable[[PyTree, PyTree, PyTree], Array]


def accumulated(loss: Loss) -> Loss:
    """The mean of a loss over microbatches, one after the other: ``1/k Σ_i loss(params, meta, batch_i)``.

    Its gradient is the mean of their gradients, and it takes the memory of one of them, also where a run is
    differentiated: each is computed once more on the way back.

    Args:
      loss: ``loss(params, meta, batch) -> scalar``, as for `hypergrad.train`.

    Returns:
      A loss whose batches have one more leading axis, ``(k, ...)``; `hypergrad.train` then takes batches
      ``(T, k, ...)``.

    Raises:
      ValueError: the arrays of a batch have no common leading axis.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> distance = lambda w, meta, x: jnp.mean((w - x) ** 2)
    >>> batches = jnp.arange(24.0).reshape(2, 3, 4)  # T = 2 steps, each of 3 microbatches of 4 numbers
    >>> hypers = {"learning_rate": 0.5, "momentum": 0.5}
    >>> hg.train(hg.accumulated(distance), jnp.zeros(()), hypers, None, batches, steps=2).losses.tolist()
    [42.166..., 229.479...]
    """

    def mean(params: PyTree, meta: PyTree, batch: PyTree) -> Array:
        shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
            raise ValueError(
                "accumulated(loss): the arrays of a batch need a leading axis of microbatches in common, "
                f"and have the shapes {[list(shape) for shape in shapes]}; reshape batches (T, n, ...) to "
                "(T, k, n // k, ...)"
            )
        each = jax.checkpoint(lambda one: loss(params, meta, one))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(each, batch))

    return mean
