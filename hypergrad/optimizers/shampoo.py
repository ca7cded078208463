"""Shampoo: a preconditioner for the rows of a weight matrix, and one for its columns.

======  =============  ===============  ==========================================================
symbol  name           shape            meaning
======  =============  ===============  ==========================================================
``w``   params         leaf             parameters of one leaf
``G``   gradient       (a, b)           gradient at ``w``, as a matrix: all axes but the last merged
``L``   left           (a, a)           sum of ``G Gᵀ``
``R``   right          (b, b)           sum of ``Gᵀ G``
``m``   velocity       leaf             momentum's sum
``α``   learning_rate  ``>= 0``
``γ``   momentum       ``0 <= γ < 1``   ``γ >= 2**-7`` to be reversed
``ε``   eps            ``> 0``          a scalar for every leaf; in units of ``G²``
======  =============  ===============  ==========================================================
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad.optimizers.roots import dot, inverse_root
from hypergrad.program import Move, Optimizer, Scale, Shift, Variable

DOMAINS = {"learning_rate": (0.0, float("inf")), "momentum": (0.0, 1.0), "eps": (0.0, float("inf"))}


def shampoo() -> Optimizer:
    """Shampoo with momentum, from the gradient ``G`` of every leaf as a matrix.

    ``L <- L + G Gᵀ;  R <- R + Gᵀ G;  m <- γ m + (L + ε I)^(-1/4) G (R + ε I)^(-1/4);  w <- w - α m``.
    Leaves of two and more axes are matrices with as many columns as their last axis is long.  A vector
    has one factor: ``m <- γ m + (L + ε I)^(-1/2) G``.

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (γ, default 0.9) and ``eps`` (ε, default 1e-4; a
    scalar for every leaf).  Variables: ``left``, ``right`` (of shape (0, 0) for vectors) and
    ``velocity``.  Reversible: costs ``log2(1 / γ)`` bits per parameter and step; the factors cost
    nothing.

    Raises:
      ValueError: where ε differs within a leaf.

    Source: Gupta, Koren, Singer, "Shampoo: preconditioned stochastic tensor optimization", ICML 2018,
    Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1, "eps": 1e-12}
    >>> hg.train(square, jnp.ones((1, 1)), hypers, steps=1, optimizer=hg.shampoo()).params
    Array([[0.9]], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        if jnp.size(h.eps) != 1:
            raise ValueError(
                f"shampoo(): eps has shape {list(jnp.shape(h.eps))} within a leaf, but it is added to the "
                "diagonal of the leaf's factors; pass one number per leaf (and step)"
            )

        def power(factor: Array, p: int) -> Array:
            n = factor.shape[0]
            return inverse_root(factor + jnp.reshape(h.eps, ()) * jnp.eye(n, dtype=factor.dtype), p)

        def preconditioned(s: Any) -> Array:
            G = _matrix(s.gradient)
            if s.gradient.ndim < 2:
                result = dot(power(s.left, 2), G)
            else:
                result = dot(dot(power(s.left, 4), G), power(s.right, 4))
            return result.reshape(s.gradient.shape)

        def columns(s: Any) -> Array:
            G = _matrix(s.gradient)
            return dot(G.T, G) if s.gradient.ndim >= 2 else jnp.zeros((0, 0), G.dtype)

        return [
            Shift("left", lambda s: dot(_matrix(s.gradient), _matrix(s.gradient).T)),
            Shift("right", columns),
            Scale("velocity", h.momentum),
            Shift("velocity", preconditioned),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    variables = {
        "left": Variable(init=lambda leaf: _square(_matrix(leaf).shape[0], leaf)),
        "right": Variable(init=lambda leaf: _square(leaf.shape[-1] if leaf.ndim >= 2 else 0, leaf)),
        "velocity": Variable(),
    }
    hypers = {"learning_rate": None, "momentum": 0.9, "eps": 1e-4}
    return Optimizer("shampoo()", moves, variables, hypers, DOMAINS)


def _matrix(leaf: Array) -> Array:
    """All axes but the last merged; a vector as a column."""
    return leaf.reshape(-1, leaf.shape[-1] if leaf.ndim >= 2 else 1)


def _square(n: int, leaf: Array) -> Array:
    return jnp.zeros((n, n), leaf.dtype)
