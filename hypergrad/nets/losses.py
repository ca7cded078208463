"""Losses of logits against labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
    log_p = jax.nn.log_softmax(jnp.asarray(logits))
    whole = labels.ndim < logits.ndim
    targets = one_hot(labels, log_p.shape[-1], log_p.dtype) if whole else jnp.asarray(labels)
    return -jnp.mean(jnp.sum(targets * log_p, axis=-1))


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
