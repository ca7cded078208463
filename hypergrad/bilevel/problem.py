"""A bilevel problem on finite sums."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._base.checks import check_whole
from hypergrad._base.trees import PyTree


@dataclass(frozen=True)
class Problem:
    """Two functions of parameters, hyperparameters and rows of data, each a mean over its rows.

    ``f(w, θ) = mean_i inner(w, θ, [i])`` over ``inner_size`` examples, and ``g`` likewise.  The rows are
    cut into blocks of ``batch_size`` neighbors, of which a step draws some at random; without a batch size
    there is one block.  Shuffle the data first, because neighbors stay together.

    Attributes:
      inner: ``inner(params, hypers, rows) -> scalar``, a JAX function, ``rows`` being ``(b,)`` int32.
      outer: ``outer(params, hypers, rows) -> scalar``, on separate examples.
      inner_size: number of examples of the inner function; None if it does not use the rows.  It must be
        the length of the arrays that the rows index, because JAX reads indices beyond the end as the last
        row.
      outer_size: number of examples of the outer function, likewise.
      batch_size: rows of a minibatch, of either kind; it divides both numbers.  None for all of them.

    Raises:
      ValueError: a number is not whole or not at least 1, or the batch size does not divide both numbers.

    >>> import jax.numpy as jnp
    >>> from hypergrad import bilevel
    >>> X = jnp.arange(12.0).reshape(6, 2)
    >>> inner = lambda w, log_penalty, rows: (
    ...     jnp.mean((X[rows] @ w - 1) ** 2) + jnp.exp(log_penalty) * jnp.sum(w**2))
    >>> outer = lambda w, log_penalty, rows: jnp.mean((X[3:][rows] @ w - 2) ** 2)
    >>> bilevel.Problem(inner, outer, inner_size=6, outer_size=3, batch_size=3).inner_blocks
    2
    """

    inner: Callable[[PyTree, PyTree, Array], Array]
    outer: Callable[[PyTree, PyTree, Array], Array]
    inner_size: int | None = None
    outer_size: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        call, sizes = str(self), {"inner_size": self.inner_size, "outer_size": self.outer_size}
        for name, number in (sizes | {"batch_size": self.batch_size}).items():
            if number is not None:
                check_whole(call, name, number, 1, None)
        for name, size in sizes.items():
            if self.batch_size is not None and size is not None and size % self.batch_size:
                raise ValueError(
                    f"{call}: batch_size must divide {name}, or the mean over blocks is not that over "
                    f"examples; leave out {size % self.batch_size} of the examples, or take another one"
                )

    def __str__(self) -> str:
        sizes = f"inner_size={self.inner_size}, outer_size={self.outer_size}, batch_size={self.batch_size}"
        return f"Problem(inner, outer, {sizes})"

    @property
    def inner_batch(self) -> int:
        """Rows in a block of the inner function."""
        return 1 if self.inner_size is None else self.batch_size or self.inner_size

    @property
    def outer_batch(self) -> int:
        """Rows in a block of the outer function."""
        return 1 if self.outer_size is None else self.batch_size or self.outer_size

    @property
    def inner_blocks(self) -> int:
        """Number of blocks of the inner function."""
        return (self.inner_size or 1) // self.inner_batch

    @property
    def outer_blocks(self) -> int:
        """Number of blocks of the outer function."""
        return (self.outer_size or 1) // self.outer_batch

    def inner_rows(self, block: Array) -> Array:
        """Rows of a block of the inner function, ``(b,)`` int32."""
        return block * self.inner_batch + jnp.arange(self.inner_batch, dtype=jnp.int32)

    def outer_rows(self, block: Array) -> Array:
        """Rows of a block of the outer function, ``(b,)`` int32."""
        return block * self.outer_batch + jnp.arange(self.outer_batch, dtype=jnp.int32)

    def draw(self, key: Array, inner: int, outer: int) -> tuple[Array, Array]:
        """Blocks, ``(inner,)`` and ``(outer,)`` int32, independent and uniform."""
        inner_key, outer_key = jax.random.split(key)
        return (
            jax.random.randint(inner_key, (inner,), 0, self.inner_blocks, jnp.int32),
            jax.random.randint(outer_key, (outer,), 0, self.outer_blocks, jnp.int32),
        )
