"""Shampoo: a preconditioner for the rows of a weight matrix, and one for its columns.

======  =============  ===============  ==========================================================
symbol  name           shape            meaning
======  =============  ===============  ==========================================================
``w``   params         leaf             parameters of one leaf
``G``   gradient       (a, b)           gradient at ``w``, as a matrix: all axes but the last merged
``L``   left           (a, a) or (a,)   sum of ``G Gᵀ``, or of its diagonal
``R``   right          (b, b) or (b,)   sum of ``Gᵀ G``, or of its diagonal
``m``   velocity       leaf             momentum's sum
``α``   learning_rate  ``>= 0``
``γ``   momentum       ``0 <= γ < 1``   ``γ >= 2**-7`` to be reversed
``ε``   eps            ``> 0``          a scalar for every leaf; in units of ``G²``
======  =============  ===============  ==========================================================
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad._base.trees import dot
from hypergrad.optimizers.roots import inverse_root
from hypergrad.program import Move, Optimizer, Scale, Shift, Variable

DOMAINS = {"learning_rate": (0.0, float("inf")), "momentum": (0.0, 1.0), "eps": (0.0, float("inf"))}


def shampoo(limit: int = 1024) -> Optimizer:
    """Shampoo with momentum, from the gradient ``G`` of every leaf as a matrix.

    ``L <- L + G Gᵀ;  R <- R + Gᵀ G;  m <- γ m + (L + ε I)^(-1/4) G (R + ε I)^(-1/4);  w <- w - α m``.
    Leaves of two and more axes are matrices with as many columns as their last axis is long.  A vector
    has one factor: ``m <- γ m + (L + ε I)^(-1/2) G``.

    Of a factor with more than ``limit`` rows only the diagonal is kept, the sums of squares of a row or a
    column of ``G``; otherwise an embedding of 50,000 words would take matrices of 2.5 billion numbers, and
    a root of one at every step.  For a vector that long it is AdaGrad with momentum.

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (γ, default 0.9) and ``eps`` (ε, default 1e-4; a
    scalar for every leaf).  Variables: ``left``, ``right`` (of shape (0, 0) for vectors) and
    ``velocity``.  Reversible: costs ``log2(1 / γ)`` bits per parameter and step; the factors cost
    nothing.

    Args:
      limit: maximum number of rows of a factor that is kept as a full matrix, at least 0; with 0 all are
        diagonal.  A step takes time proportional to its cube.

    Raises:
      ValueError: ε differs within a leaf, or the limit is below 0.

    Source: Gupta, Koren, Singer, "Shampoo: preconditioned stochastic tensor optimization", ICML 2018,
    Algorithm 1; diagonal factors of long axes, as in its experiments.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1, "eps": 1e-12}
    >>> hg.train(square, jnp.ones((1, 1)), hypers, steps=1, optimizer=hg.shampoo()).params
    Array([[0.9]], dtype=float32)
    """
    name = "shampoo()" if limit == 1024 else f"shampoo(limit={limit})"
    if limit < 0:
        raise ValueError(f"{name}: limit must be at least 0; with 0 all factors are diagonal")

    def moves(h: Any, t: Array) -> Sequence[Move]:
        if jnp.size(h.eps) != 1:
            raise ValueError(
                f"{name}: eps has shape {list(jnp.shape(h.eps))} within a leaf, but it is added to the "
                "diagonal of the leaf's factors; pass one number per leaf (and step)"
            )
        eps = jnp.reshape(h.eps, ())

        def along_rows(factor: Array, p: int, G: Array) -> Array:
            """``(L + ε I)^(-1/p) G``."""
            if factor.ndim == 2:
                return dot(inverse_root(factor + eps * jnp.eye(len(factor), dtype=factor.dtype), p), G)
            damped = factor + eps
            dead = damped == 0  # and so is the row of G
            return jnp.where(dead, 0, jnp.where(dead, 1, damped) ** (-1 / p))[:, None] * G

        def preconditioned(s: Any) -> Array:
            G = _matrix(s.gradient)
            if s.gradient.ndim < 2:
                result = along_rows(s.left, 2, G)
            else:
                result = along_rows(s.right, 4, along_rows(s.left, 4, G).T).T
            return result.reshape(s.gradient.shape)

        def of_rows(G: Array) -> Array:
            return dot(G, G.T) if len(G) <= limit else jnp.sum(G * G, axis=1)

        def of_columns(s: Any) -> Array:
            G = _matrix(s.gradient)
            return of_rows(G.T) if s.gradient.ndim >= 2 else jnp.zeros((0, 0), G.dtype)

        return [
            Shift("left", lambda s: of_rows(_matrix(s.gradient))),
            Shift("right", of_columns),
            Scale("velocity", h.momentum),
            Shift("velocity", preconditioned),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    def start(n: int, leaf: Array) -> Array:
        return jnp.zeros((n, n) if n <= limit else (n,), leaf.dtype)

    variables = {
        "left": Variable(init=lambda leaf: start(_matrix(leaf).shape[0], leaf)),
        "right": Variable(
            init=lambda leaf: (
                start(leaf.shape[-1], leaf) if leaf.ndim >= 2 else jnp.zeros((0, 0), leaf.dtype)
            )
        ),
        "velocity": Variable(),
    }
    hypers = {"learning_rate": None, "momentum": 0.9, "eps": 1e-4}
    return Optimizer(name, moves, variables, hypers, DOMAINS)


def _matrix(leaf: Array) -> Array:
    """The leaf with all axes but the last merged; a vector becomes a column."""
    columns = leaf.shape[-1] if leaf.ndim >= 2 else 1
    return leaf.reshape(math.prod(leaf.shape[:-1] if leaf.ndim >= 2 else leaf.shape), columns)
