"""Baselines that a distilled set is compared with, and may start from: class means and random rows."""

import jax
import numpy as np
from jax import Array


def rows_like(wanted: np.ndarray, real: np.ndarray, key: Array) -> np.ndarray:
    """Rows of random real examples with the wanted labels, without repetition while there are enough.

    Args:
      wanted: ``(n,)`` integers.
      real: ``(N,)`` integers, the labels of the real examples.
      key: PRNG key.
    """
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    rows = np.empty(len(wanted), int)
    for c in np.unique(wanted):
        mine = np.flatnonzero(real == c)
        count = int(np.count_nonzero(wanted == c))
        rows[wanted == c] = generator.choice(mine, count, replace=count > len(mine))
    return rows


def class_means(images: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The mean image of every class, ``(classes, ...)``.

    Args:
      images: ``(N, ...)``.
      labels: ``(N,)`` integers from 0, every class at least once.
      classes: number of classes.
    """
    return np.stack([images[labels == c].mean(0) for c in range(classes)])
