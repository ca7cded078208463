"""Losses of logits against labels."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._base.checks import is_whole
from hypergrad.nets.perceptrons import Dense


def cross_entropy(logits: jax.Array | np.ndarray, labels: jax.Array | np.ndarray) -> jax.Array:
    """Mean cross-entropy of ``softmax(logits)`` against the labels, in nats.

    ``-1/n sum_i sum_c p_ic log softmax(logits_i)_c``, with ``p_i`` one-hot for integer labels

    Args:
      logits: ``(n, classes)`` floats of any finite size, or ``(n, length, classes)``, of which every place
        counts as an example.
      labels: ``(n,)`` or ``(n, length)`` integers in [0, classes), or probabilities shaped like the logits.
        An integer out of range makes the result NaN.

    Returns:
      A scalar.

    Raises:
      ValueError: the shapes or the labels' type do not fit.

    >>> round(float(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 2]))), 4)  # log 4
    1.3863
    """
    _check_labels("cross_entropy", logits, labels)
    return jnp.mean(_each(jnp.asarray(logits), labels))


def chunked_cross_entropy(
    hidden: jax.Array, last: Dense, labels: jax.Array | np.ndarray, *, chunks: int = 8
) -> jax.Array:
    """Mean cross-entropy of a last layer with a large vocabulary, in nats, without all logits at once.

    ``-1/n sum_i log softmax(h_i W + b)_{label_i}``

    It goes over the tokens chunk by chunk, and a derivative computes a chunk's logits again instead of
    keeping them.  So value, gradient and Hessian-vector product need the memory of ``n / chunks`` rows of
    logits, and the time of one more product with ``W`` per derivative.

    Args:
      hidden: ``(n, width)`` floats, or ``(n, length, width)``, of which every place counts as an example.
      last: the layer that makes logits of them, ``(width, classes)`` and ``(classes,)``.
      labels: ``(n,)`` or ``(n, length)`` integers in [0, classes).  One out of range makes the result NaN.
      chunks: the number of chunks, at least 1.

    Returns:
      A scalar, float32 where the numbers are narrower.

    Raises:
      ValueError: the shapes or the labels' type do not fit, or the chunks are no positive integer.

    Source: E. Wijmans et al., "Cut your losses in large-vocabulary language models", 2025, which cuts the
    vocabulary too.

    >>> layer = Dense(jnp.ones((2, 4)), jnp.zeros(4))
    >>> round(float(chunked_cross_entropy(jnp.ones((5, 2)), layer, jnp.arange(5) % 4, chunks=2)), 4)
    1.3863
    """
    call = f"chunked_cross_entropy(hidden, last, labels, chunks={chunks!r})"
    if not is_whole(chunks):
        raise ValueError(f"{call}: chunks is how many pieces the tokens are cut into. Pass 1 or more")
    width = len(last.weights)
    whole = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == hidden.shape[:-1]
    if hidden.ndim not in (2, 3) or not whole or hidden.shape[-1] != width:
        raise ValueError(
            f"{call} with hidden {hidden.shape}, labels {labels.shape} of {labels.dtype} and weights "
            f"{last.weights.shape}: they do not fit. Pass hidden (n, {width}) or (n, length, {width}), and "
            "labels that are integers without the last axis."
        )

    @partial(jax.checkpoint, prevent_cse=False)
    def total(last: Dense, hidden: jax.Array, labels: jax.Array, counts: jax.Array) -> jax.Array:
        each = _each(hidden @ last.weights + last.biases[None], labels)
        return jnp.sum(jnp.where(counts, each, 0))

    n = labels.size
    cut = partial(chunks_of, size=-(-n // min(chunks, n)))
    pieces = cut(hidden.reshape(n, width)), cut(jnp.asarray(labels).ravel()), cut(jnp.ones(n, bool))
    zero = jnp.zeros((), widened(hidden).dtype)
    return jax.lax.scan(lambda sofar, piece: (sofar + total(last, *piece), None), zero, pieces)[0] / n


def chunks_of(x: jax.Array, size: int) -> jax.Array:
    """An array in chunks, ``(n, ...) -> (chunks, size, ...)``, the last one filled up with zeros."""
    count = -(-len(x) // size)
    filled = jnp.pad(x, ((0, count * size - len(x)), *[(0, 0)] * (x.ndim - 1)))
    return filled.reshape(count, size, *x.shape[1:])


def widened(x: jax.Array) -> jax.Array:
    """The array, as float32 if its floats are narrower."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if narrow else x


def _each(logits: jax.Array, labels: jax.Array | np.ndarray) -> jax.Array:
    """The cross-entropy of every example, in float32 where the logits are narrower."""
    log_p = jax.nn.log_softmax(widened(logits))
    whole = labels.ndim < logits.ndim
    targets = one_hot(labels, log_p.shape[-1], log_p.dtype) if whole else jnp.asarray(labels)
    return -jnp.sum(targets * log_p, axis=-1)


def error_rate(logits: jax.Array | np.ndarray, labels: jax.Array | np.ndarray) -> jax.Array:
    """The share of examples whose largest logit is not at the label; the first wins a tie.

    Args:
      logits: ``(n, classes)`` floats, or ``(n, length, classes)``, of which every place counts as an
        example.
      labels: ``(n,)`` or ``(n, length)`` integers in [0, classes), or probabilities shaped like the logits,
        of which the largest counts.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: the shapes or the labels' type do not fit.

    >>> float(error_rate(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0])))
    0.5
    """
    _check_labels("error_rate", logits, labels)
    wanted = labels if labels.ndim < logits.ndim else jnp.argmax(labels, axis=-1)
    return jnp.mean(jnp.argmax(logits, axis=-1) != wanted, dtype=jnp.result_type(float))


def one_hot(integers: jax.Array | np.ndarray, classes: int, dtype: Any) -> jax.Array:
    """Rows of zeros and a one, on a new last axis; NaN for an integer out of range."""
    # A product with one-hot rows is used in place of a gather, because the derivative of a gather is a
    # scatter, which is slow inside scan. An integer out of range would become a row of zeros.
    integers = jnp.asarray(integers)
    valid = (integers >= 0) & (integers < classes)
    return jnp.where(valid[..., None], jax.nn.one_hot(integers, classes, dtype=dtype), jnp.nan)


def _check_labels(name: str, logits: jax.Array | np.ndarray, labels: jax.Array | np.ndarray) -> None:
    integers = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == logits.shape[:-1]
    if logits.ndim not in (2, 3) or not (integers or labels.shape == logits.shape):
        raise ValueError(
            f"{name}(logits, labels) with logits {logits.shape} and labels {labels.shape} of "
            f"{labels.dtype}: they do not fit. Pass logits (n, classes) or (n, length, classes), and "
            "labels either integers without the last axis, or probabilities of the logits' shape."
        )
