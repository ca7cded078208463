"""Hyperparameters that belong to a whole leaf."""

import jax.numpy as jnp
from jax import Array


def number(call: str, name: str, value: Array) -> Array:
    """A hyperparameter of a leaf as a scalar.

    Raises:
      ValueError: the value differs within the leaf.

    >>> import jax.numpy as jnp
    >>> float(number("novograd()", "b2", jnp.full((1, 1), 0.25)))
    0.25
    """
    if jnp.size(value) != 1:
        raise ValueError(
            f"{call}: {name} has shape {list(jnp.shape(value))} within a leaf, but it belongs to all of "
            "it; pass one number per leaf (and step)"
        )
    return jnp.reshape(value, ())
