"""Decoder-only transformers."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._base.checks import is_whole
from hypergrad.nets.attention import causal_attention
from hypergrad.nets.losses import chunks_of, one_hot, widened
from hypergrad.nets.perceptrons import Dense

ONE_HOT = 2**22  # numbers in the one-hot rows that are looked up at once


class Embedding(NamedTuple):
    """What a `transformer` adds up for every place of a sequence.

    Attributes:
      tokens: ``(vocabulary, width)``, a row for each token.
      positions: ``(length, width)``, a row for each place.
    """

    tokens: jax.Array
    positions: jax.Array


class Norm(NamedTuple):
    """Layer normalization, over the last axis.

    Attributes:
      scale: ``(width,)``, by which each normalized number is multiplied.
      offset: ``(width,)``, added after the scale.
    """

    scale: jax.Array
    offset: jax.Array


class Block(NamedTuple):
    """One block of a `transformer`.

    Attributes:
      attention_norm: the normalization before attention.
      attention: ``(width, 3 width)``, to queries, keys and values, each with its heads side by side.
      projection: ``width`` to ``width``, from the heads back.
      mlp_norm: the normalization before the perceptron.
      expansion: ``width`` to ``4 width``, before the GELU.
      contraction: ``4 width`` to ``width``, behind it.
    """

    attention_norm: Norm
    attention: jax.Array
    projection: Dense
    mlp_norm: Norm
    expansion: Dense
    contraction: Dense


class Head(NamedTuple):
    """The last layer of a `transformer`.

    Attributes:
      norm: the normalization before it.
      dense: ``width`` to ``vocabulary``; None where the weights are those of the embedding.
    """

    norm: Norm
    dense: Dense | None


def transformer(
    vocabulary: int,
    length: int,
    *,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    tied: bool = False,
    scan_layers: bool = False,
    remat: bool = False,
    query_chunk: int | None = None,
) -> tuple[Callable[..., tuple[Any, ...]], Callable[..., Any]]:
    """A decoder-only transformer, as a pair of pure functions ``(init, apply)``.

    ``h <- E[token] + P[place]``;  ``h <- h + attend(norm(h))``, ``h <- h + mlp(norm(h))``, ``D`` times;
    ``logits = norm(h) W + b``

    ``attend(x) = concat_heads(softmax(mask(Q Kᵀ / √d)) V) W + b`` with ``Q, K, V = x W`` and
    ``d = width / heads``, where the mask lets no token see later ones.  These three have no biases, because
    those of the keys would change nothing.  ``mlp(x) = gelu(x W + b) W + b`` is four times as wide inside,
    and ``gelu(x) = x Φ(x)``.  ``norm`` scales each token's numbers to mean zero and, up to ``ε = 1e-5``,
    variance one, and then multiplies and shifts them.  There is no dropout.

    Args:
      vocabulary: the number of different tokens.
      length: the greatest length of a sequence.
      width: the number of values that stand for a token between the layers; a multiple of `heads`.
      depth: ``D``, the number of blocks.
      heads: the number of heads of attention.
      tied: whether the logits are ``norm(h) Eᵀ``, and have no weights of their own.
      scan_layers: whether the blocks are one `Block` whose arrays have an axis of ``D`` in front, over
        which `jax.lax.scan` goes: a deep network compiles as fast as one block, and blocks that are
        differentiated one after the other share their memory.
      remat: whether a derivative computes the inside of a block again instead of keeping it, by
        `jax.checkpoint`, so that all that is kept of a block is what went into it.
      query_chunk: of `causal_attention`, for memory that grows linearly with the length.

    Returns:
      ``init(key)``, which returns a tuple of an `Embedding`, ``D`` `Block` (one with `scan_layers`) and a
      `Head` in JAX's default float type.  Weights are ``normal / sqrt(n_in)``, and those that lead back to
      ``h`` (`projection` and `contraction`) are divided by ``sqrt(2 D)`` too; ``E`` and ``P`` are
      ``0.02 normal``, scales one, offsets and biases zero.

      ``apply(params, tokens)``, which returns logits ``(n, l, vocabulary)`` for integers ``(n, l)`` with
      ``l <= length``, and raises ValueError for others.  Logits ``[:, t]`` depend on tokens up to ``t``,
      and foretell token ``t + 1``.  A token outside [0, vocabulary) makes all logits of its sequence NaN.
      ``apply(params, tokens, logits=False)`` returns what `chunked_cross_entropy` takes: ``norm(h)``, which
      is ``(n, l, width)``, and the last layer as a `Dense`.

    Raises:
      ValueError: a size is not a positive integer, or the width is no multiple of the heads.

    Source: A. Vaswani et al., "Attention is all you need", 2017; A. Radford et al., "Language models are
    unsupervised multitask learners", 2019, for the order of the layers and the initial weights.

    >>> init, apply = transformer(65, 32, width=16, depth=1, heads=2)
    >>> apply(init(jax.random.key(0)), jnp.zeros((3, 20), int)).shape
    (3, 20, 65)
    """
    call = (
        f"transformer(vocabulary={vocabulary!r}, length={length!r}, width={width!r}, depth={depth!r}, "
        f"heads={heads!r})"
    )
    if not all(map(is_whole, (vocabulary, length, width, depth, heads))):
        raise ValueError(f"{call}: all sizes are positive integers. Pass whole numbers of at least 1")
    if width % heads:
        raise ValueError(
            f"{call}: every head takes an equal share of the width. Pass a width that is a multiple of "
            f"{heads}"
        )
    layer: Callable[..., jax.Array] = partial(_block, heads=heads, query_chunk=query_chunk)
    layer = jax.checkpoint(layer, prevent_cse=not scan_layers) if remat else layer

    def init(key: jax.Array) -> tuple[Any, ...]:
        tokens, positions, head, *keys = jax.random.split(key, 3 + depth)
        embedding = Embedding(
            0.02 * jax.random.normal(tokens, (vocabulary, width)),
            0.02 * jax.random.normal(positions, (length, width)),
        )
        blocks = [_new_block(key, width, depth) for key in keys]
        if scan_layers:
            blocks = [jax.tree.map(lambda *x: jnp.stack(x), *blocks)]
        return embedding, *blocks, Head(_no_norm(width), None if tied else _dense(head, width, vocabulary))

    def apply(params: tuple[Any, ...], tokens: jax.Array | np.ndarray, *, logits: bool = True) -> Any:
        whole = jnp.issubdtype(tokens.dtype, jnp.integer)
        if tokens.ndim != 2 or not whole or not 1 <= tokens.shape[1] <= length:
            raise ValueError(
                f"apply(params, tokens) with tokens of shape {tokens.shape} and {tokens.dtype}: {call} "
                f"takes (n, l) integers with l from 1 to {length}. tokens[None] makes a batch of one "
                "sequence."
            )
        embedding, *blocks, head = params
        hidden = _look_up(embedding.tokens, tokens) + embedding.positions[None, : tokens.shape[1]]
        if scan_layers:
            hidden, _ = jax.lax.scan(lambda h, block: (layer(block, h), None), hidden, *blocks)
        else:
            for block in blocks:
                hidden = layer(block, hidden)
        normal, last = _layer_norm(head.norm, hidden), head.dense
        if last is None:
            last = Dense(embedding.tokens.T, jnp.zeros(vocabulary, normal.dtype))
        return _affine(last, normal) if logits else (normal, last)

    return init, apply


def _dense(key: jax.Array, n_in: int, n_out: int, divisor: float = 1.0) -> Dense:
    """Random weights and no biases."""
    return Dense(jax.random.normal(key, (n_in, n_out)) / math.sqrt(n_in * divisor), jnp.zeros(n_out))


def _new_block(key: jax.Array, width: int, depth: int) -> Block:
    """One of so many blocks, as training begins with it."""
    attention, projection, expansion, contraction = jax.random.split(key, 4)
    return Block(
        _no_norm(width),
        _dense(attention, width, 3 * width).weights,
        _dense(projection, width, width, 2 * depth),
        _no_norm(width),
        _dense(expansion, width, 4 * width),
        _dense(contraction, 4 * width, width, 2 * depth),
    )


def _block(block: Block, hidden: jax.Array, *, heads: int, query_chunk: int | None) -> jax.Array:
    """Attention and perceptron, each added to what goes in."""
    seen = _layer_norm(block.attention_norm, hidden) @ block.attention
    hidden = hidden + _affine(block.projection, _attend(seen, heads, query_chunk))
    inner = jax.nn.gelu(_affine(block.expansion, _layer_norm(block.mlp_norm, hidden)), approximate=False)
    return hidden + _affine(block.contraction, inner)


def _look_up(rows: jax.Array, tokens: jax.Array | np.ndarray) -> jax.Array:
    """The rows of all tokens, by a product with one-hot rows, not too many at once."""
    vocabulary, chunk = len(rows), max(1, ONE_HOT // len(rows))
    if tokens.size <= chunk:
        return one_hot(tokens, vocabulary, rows.dtype) @ rows
    pick = jax.checkpoint(
        lambda rows, some: one_hot(some, vocabulary, rows.dtype) @ rows, prevent_cse=False
    )
    _, found = jax.lax.scan(
        lambda _, some: (None, pick(rows, some)), None, chunks_of(jnp.asarray(tokens).ravel(), chunk)
    )
    return found.reshape(-1, rows.shape[1])[: tokens.size].reshape(*tokens.shape, -1)


def _no_norm(width: int) -> Norm:
    """The scale and offset with which training begins."""
    return Norm(jnp.ones(width), jnp.zeros(width))


def _affine(layer: Dense, inputs: jax.Array) -> jax.Array:
    """The layer on the last of three axes."""
    return inputs @ layer.weights + layer.biases[None, None]


def _layer_norm(norm: Norm, inputs: jax.Array) -> jax.Array:
    """The normalization of the last of three axes, in float32 or wider."""
    wide = widened(inputs)
    centred = wide - jnp.mean(wide, axis=2, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=2, keepdims=True) + 1e-5)
    return normal.astype(inputs.dtype) * norm.scale[None, None] + norm.offset[None, None]


def _attend(seen: jax.Array, heads: int, query_chunk: int | None) -> jax.Array:
    """Causal attention, (n, length, 3 width) -> (n, length, width)."""
    n, length, _ = seen.shape
    queries, keys, values = jnp.moveaxis(seen.reshape(n, length, 3, heads, -1), 2, 0)
    return causal_attention(queries, keys, values, query_chunk=query_chunk).reshape(n, length, -1)
