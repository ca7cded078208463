"""Euclidean norms of numbers of any size: no square overflows, and none is lost.

In float32 the square of ``1e-23`` is 0, and that of ``1e20`` is infinite.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any


def power(tree: PyTree) -> Array:
    """A power of two near the largest size of a number in a tree; 1 where that is 0 or not finite.

    Dividing by it rounds nothing, so that what is computed of numbers of ordinary size stays the same bit
    for bit.  It counts as a constant where it is differentiated.

    >>> import jax.numpy as jnp
    >>> float(power({"a": jnp.array([3.0, -5.0]), "b": jnp.zeros(0)}))
    8.0
    """
    leaves = [jax.lax.stop_gradient(x) for x in jax.tree.leaves(tree)]
    dtype = jnp.result_type(*leaves)
    sizes = [jnp.max(jnp.abs(x)).astype(dtype) for x in leaves if x.size]
    if not sizes:
        return jnp.ones((), dtype)
    largest = jnp.max(jnp.stack(sizes))
    usable = (largest > 0) & jnp.isfinite(largest)
    # Beyond this its inverse, and the squares of what is divided by it, would themselves be at the limit.
    most = int(0.78 * jnp.finfo(dtype).maxexp)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 0.5))
    return jnp.ldexp(jnp.ones((), dtype), jnp.clip(exponent, -most, most))


def norm(tree: PyTree) -> Array:
    """``√Σ x²`` over all numbers of a tree, whose derivative at 0 is 0.

    >>> import jax, jax.numpy as jnp
    >>> [float(f"{norm(jnp.array([3.0, 4.0]) * size):.6g}") for size in (1e-30, 1.0, 1e30)]
    [5e-30, 5.0, 5e+30]
    >>> jax.grad(norm)(jnp.array([3e25, 4e25]))
    Array([0.6, 0.8], dtype=float32)
    """
    scale = power(tree)
    parts = [jnp.ravel(x / scale.astype(x.dtype)) for x in jax.tree.leaves(tree)]
    squares = sum(jnp.sum(x * x) for x in parts)
    zero = squares == 0
    return scale * jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))
