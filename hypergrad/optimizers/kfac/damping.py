"""Kronecker factors damped, inverted and applied."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from hypergrad._base import trees
from hypergrad.optimizers import roots

AXES = {1: ("A",), 2: ("A", "G"), 3: ("A", "B", "G")}  # a block's factors, one for each of its axes


def factor_start(name: str, block: Array) -> Array:
    """A factor of zeros; empty if the block does not have it."""
    axes = AXES[block.ndim]
    width = block.shape[axes.index(name)] if name in axes else 0
    square = name not in axes or block.ndim > 1
    return jnp.zeros((width, width) if square else (width,), block.dtype)


def one_number(call: str, name: str, value: Array) -> Array:
    """A hyperparameter that must be one number for a block."""
    if jnp.size(value) != 1:
        raise ValueError(
            f"{call}: {name} has shape {list(jnp.shape(value))} within a layer, but it belongs to all of "
            "it; pass one number per layer (and step)"
        )
    return jnp.reshape(value, ())


def damped(factors: Sequence[Array], damping: Array, pi: Array) -> tuple[Array, ...]:
    """``A + π γ I`` and ``G + γ/π I``, with ``π = p √((tr A / dim A) / (tr G / dim G))`` and ``γ = √λ``.

    If a trace is 0, ``π = p``.  A gain has one factor: ``D + λ``.  Three are scaled as `kfac` says, by 1
    where a trace is 0.

    Source: Martens and Grosse, ICML 2015, section 6.3; Ba, Grosse, Martens, ICLR 2017, for three.

    >>> import jax.numpy as jnp
    >>> A, G = damped([4.0 * jnp.eye(1), jnp.eye(1)], jnp.float32(0.01), jnp.float32(1.0))
    >>> A, G
    (Array([[4.2]], dtype=float32), Array([[1.05]], dtype=float32))
    """
    if len(factors) == 1:
        return (factors[0] + damping,)
    means = [jnp.trace(factor) / max(len(factor), 1) for factor in factors]
    alive = jnp.all(jnp.stack(means) > 0)
    means = [jnp.where(alive, mean, 1) for mean in means]
    if len(factors) == 2:
        pi = pi * jnp.sqrt(means[0] / means[1])
        gamma = roots.sqrt(damping)
        added = [pi * gamma, gamma / pi]
    else:
        common = jnp.exp(sum(map(jnp.log, means)) / len(factors))
        factors = [common / mean * factor for mean, factor in zip(means, factors)]
        positive = damping > 0
        gamma = jnp.where(positive, jnp.cbrt(jnp.where(positive, damping, 1)), 0)
        added = [roots.sqrt(pi) * gamma, roots.sqrt(pi) * gamma, gamma / pi]
    return tuple(x + c * jnp.eye(len(x), dtype=x.dtype) for x, c in zip(factors, added))


def inverse(factor: Array) -> Array:
    """``A⁻¹``; of the factor of a gain ``1 / D``.

    >>> import jax.numpy as jnp
    >>> inverse(4.0 * jnp.eye(1))
    Array([[0.25]], dtype=float32)
    """
    return 1 / factor if factor.ndim == 1 else roots.inverse(factor)


def precondition(inverses: Sequence[Array], gradient: Array) -> Array:
    """``A⁻¹ ∇ G⁻¹``; for a gain ``∇ / D``; of three axes, along every one of them.

    >>> import jax.numpy as jnp
    >>> precondition([jnp.full((1, 1), 0.5), jnp.full((1, 1), 0.25)], jnp.ones((1, 1)))
    Array([[0.125]], dtype=float32)
    """
    if len(inverses) == 1:
        return inverses[0] * gradient
    rest = math.prod(gradient.shape[1:])
    along_rows = trees.dot(inverses[0], gradient.reshape(len(inverses[0]), rest)).reshape(gradient.shape)
    if len(inverses) == 3:
        along_rows = trees.dot(inverses[1][None], along_rows)
    last = along_rows.reshape(math.prod(gradient.shape[:-1]), gradient.shape[-1])
    return trees.dot(last, inverses[-1]).reshape(gradient.shape)
