"""Causal attention, all at once or a chunk of queries after the other."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from hypergrad._base.checks import is_whole
from hypergrad.nets.losses import chunks_of, widened


def causal_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, *, query_chunk: int | None = None
) -> jax.Array:
    """Attention of every place of a sequence to itself and earlier places.

    ``out_t = Σ_{s <= t} softmax_s(q_t · k_s / √d) v_s``

    With chunks, the matrix of all pairs of places is never there as a whole: a derivative computes a chunk
    of its rows again instead of keeping them.  So value, gradient and Hessian-vector product need memory
    that grows linearly with the length, for one more evaluation in time per derivative.

    Args:
      queries: ``(n, length, heads, d)`` floats.
      keys: as the queries.
      values: ``(n, length, heads, m)`` floats.
      query_chunk: how many places look back at once, at least 1; None for all of them.

    Returns:
      ``(n, length, heads, m)``.  The softmax is computed in float32 where the numbers are narrower.

    Raises:
      ValueError: the shapes do not fit, or the chunk is no positive integer.

    Source: M. Rabe, C. Staats, "Self-attention does not need O(n²) memory", 2021, with chunks of queries
    alone.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> bool(jnp.allclose(causal_attention(x, x, x, query_chunk=2), x))
    True
    """
    if query_chunk is not None and not is_whole(query_chunk):
        raise ValueError(
            f"causal_attention(queries, keys, values, query_chunk={query_chunk!r}): it is how many places "
            "look back at once. Pass 1 or more, or None for all of them"
        )
    if queries.ndim != 4 or queries.shape != keys.shape or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"causal_attention(queries, keys, values) with queries {queries.shape}, keys {keys.shape} and "
            f"values {values.shape}: they do not fit. Pass arrays (n, length, heads, d)."
        )
    length = queries.shape[1]
    if query_chunk is None or query_chunk >= length:
        return _rows(keys, values, queries, jnp.arange(length))
    pieces = chunks_of(jnp.moveaxis(queries, 1, 0), query_chunk)
    places = chunks_of(jnp.arange(length), query_chunk)
    some = partial(jax.checkpoint(_rows, prevent_cse=False), keys, values)
    step = lambda _, piece: (None, some(jnp.moveaxis(piece[0], 0, 1), piece[1]))  # noqa: E731
    _, found = jax.lax.scan(step, None, (pieces, places))
    found = jnp.moveaxis(found, 0, 1)  # (n, chunks, places, heads, m)
    return found.reshape(found.shape[0], -1, *found.shape[3:])[:, :length]


def _rows(keys: jax.Array, values: jax.Array, queries: jax.Array, places: jax.Array) -> jax.Array:
    """Attention of some places to all."""
    scores = widened(jnp.einsum("nqhd,nkhd->nhqk", queries, keys)) / math.sqrt(queries.shape[3])
    earlier = places[:, None] >= jnp.arange(keys.shape[1])[None]
    shares = jax.nn.softmax(jnp.where(earlier[None, None], scores, -jnp.inf), axis=3)
    return jnp.einsum("nhqk,nkhd->nqhd", shares.astype(values.dtype), values)
