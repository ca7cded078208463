"""Likelihoods, which turn outputs of a network into distributions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hypergrad import nets
from hypergrad._base.trees import Key, Scalar


class Likelihood(NamedTuple):
    """The predictive distribution ``p(y | z)`` of a network, whose negative logarithm is a loss.

    All three functions take *one* example.

    Attributes:
      loss: ``loss(outputs, target) -> scalar``, ``-log p(y | z)`` in nats, up to a constant.
      sample: ``sample(key, outputs) -> target``, drawn from ``p(y | z)``.
      fisher: ``fisher(outputs, tangent)``, the product of ``E_y[∇_z log p ∇_z log pᵀ]`` with a tangent,
        which is like the outputs.
    """

    loss: Callable[[Array, Array], Array]
    sample: Callable[[Array, Array], Array]
    fisher: Callable[[Array, Array], Array]


def categorical() -> Likelihood:
    """Softmax cross-entropy.

    ``-log p = -Σ_c y_c log p_c``, ``p = softmax(z)``, with the Fisher matrix ``diag(p) - p pᵀ``.  Logits
    are ``(classes,)``; the target is a class or ``(classes,)`` probabilities.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> curvature.categorical().fisher(jnp.zeros(2), jnp.array([1.0, 0.0]))
    Array([ 0.25, -0.25], dtype=float32)
    """

    def loss(z: Float[Array, "*output"], y: Array) -> Scalar:
        return nets.cross_entropy(z[None], jnp.asarray(y)[None])

    def fisher(z: Float[Array, "*output"], t: Float[Array, "*output"]) -> Float[Array, "*output"]:
        p = jax.nn.softmax(z)
        return p * (t - jnp.sum(p * t))

    return Likelihood(loss, jax.random.categorical, fisher)


def bernoulli() -> Likelihood:
    """Sigmoid cross-entropy, summed over the outputs.

    ``-log p = Σ_k log(1 + exp z_k) - y_k z_k``, ``p = sigmoid(z)``, with the Fisher matrix
    ``diag(p (1 - p))``.  Logits and targets have any one shape; targets are in [0, 1].

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> curvature.bernoulli().fisher(jnp.zeros(2), jnp.array([1.0, 2.0]))
    Array([0.25, 0.5 ], dtype=float32)
    """

    def loss(z: Float[Array, "*output"], y: Array) -> Scalar:
        return jnp.sum(jax.nn.softplus(z) - y * z)

    def sample(key: Key, z: Array) -> Array:
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)

    def fisher(z: Float[Array, "*output"], t: Float[Array, "*output"]) -> Float[Array, "*output"]:
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z) * t

    return Likelihood(loss, sample, fisher)


def normal() -> Likelihood:
    """Half the squared error, summed over the outputs: ``y ~ N(z, I)``.

    ``-log p = ½ Σ_k (z_k - y_k)²``, with the identity as Fisher matrix.  Outputs and targets have any one
    shape.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> float(curvature.normal().loss(jnp.array([1.0, 2.0]), jnp.zeros(2)))
    2.5
    """

    def loss(z: Float[Array, "*output"], y: Array) -> Scalar:
        return jnp.sum((z - y) ** 2) / 2

    def sample(key: Key, z: Array) -> Array:
        return z + jax.random.normal(key, z.shape, z.dtype)

    return Likelihood(loss, sample, lambda z, t: t)
