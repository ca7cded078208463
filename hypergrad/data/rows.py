"""Which rows: minibatches, and the split into training and test."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.data.kinds import DataError

SHARE = 0.2  # of every class, to test on, unless the user says otherwise


def minibatches(key: jax.Array, examples: int, batch_size: int, steps: int) -> jax.Array:
    """Row indices of the minibatches of a run, drawn without replacement in each epoch.

    Epoch ``e`` is a permutation of ``range(examples)`` under ``fold_in(key, e)``, cut into
    ``floor(examples / batch_size)`` batches; the rows left over are not used in that epoch.  No batch
    straddles two epochs, and a longer run starts with the batches of a shorter one.

    Args:
      key: a JAX random key; the only argument that `jax.jit` may trace.
      examples: the number of rows to draw from.
      batch_size: the number of rows in a batch, from 1 to ``examples``.
      steps: the number of batches, 0 or more.

    Returns:
      ``(steps, batch_size)`` int32 in [0, examples).

    Raises:
      TypeError: a size is not an integer.
      ValueError: a size is out of range.

    >>> minibatches(jax.random.key(0), examples=10, batch_size=5, steps=4).shape
    (4, 5)
    """
    call = f"minibatches(key, examples={examples}, batch_size={batch_size}, steps={steps})"
    if not all(isinstance(size, int | np.integer) for size in (examples, batch_size, steps)):
        raise TypeError(
            f"{call}: the sizes set the result's shape, so they must be Python integers. Round "
            "floats with int(), and under jax.jit mark them static: "
            "jax.jit(minibatches, static_argnums=(1, 2, 3))."
        )
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"{call}: a batch takes its rows from one epoch without replacement, so batch_size "
            f"must lie in 1..examples. Pass a batch_size from 1 to {examples}."
        )
    if steps < 0:
        raise ValueError(f"{call}: steps counts batches. Pass steps of 0 or more.")
    per_epoch = examples // batch_size
    rows = jnp.arange(examples, dtype=jnp.int32)

    def epoch(index: jax.Array) -> jax.Array:
        shuffled = jax.random.permutation(jax.random.fold_in(key, index), rows)
        return shuffled[: per_epoch * batch_size].reshape(per_epoch, batch_size)

    epochs = jax.vmap(epoch)(jnp.arange(math.ceil(steps / per_epoch)))
    return epochs.reshape(-1, batch_size)[:steps]


def require_classes(call: str, part: str, labels: np.ndarray, classes: int) -> None:
    """Refuse a part of split data in which a class has no example.

    Args:
      call: the user's call, for the message.
      part: the name of the part.
      labels: ``(n,)`` integers in [0, classes), the labels of the part.
      classes: the number of classes.

    Raises:
      ValueError: a class has no example; the message names every such class.

    >>> require_classes("split(...)", "the training part", np.array([0, 1, 1]), classes=2)
    """
    lost = sorted(set(range(classes)) - set(np.asarray(labels).tolist()))
    if lost:
        raise ValueError(
            f"{call}: {part} has no example of class {', '.join(map(str, lost))}: all went elsewhere "
            "when the data were split. Hold out fewer, pass more examples of it, or another key"
        )


def fixed_order(count: int) -> np.ndarray:
    """An order of ``range(count)`` that looks random and is the same everywhere.

    Returns:
      ``(count,)`` integers, a stable argsort of raw 64-bit outputs of ``numpy.random.PCG64(0)``.

    >>> fixed_order(5)
    array([3, 2, 1, 0, 4])
    """
    # NumPy keeps the raw stream of a bit generator fixed, but not that of Generator.permutation.
    return np.argsort(np.random.PCG64(0).random_raw(count), kind="stable")


def check_share(call: str, share: float) -> None:
    """Refuse a share of data to test on that is not between 0 and 1."""
    if not isinstance(share, float | np.floating) or not 0 < share < 1:
        raise ValueError(
            f"{call}: test_share is the share of the data that is kept for testing. Pass a number between "
            "0 and 1, such as 0.2"
        )


def split(
    call: str, labels: np.ndarray, names: Sequence[str], share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to test on, the same everywhere, with every class in both by its share.

    Args:
      call: the user's call, for messages.
      labels: ``(n,)`` integers in [0, classes).
      names: what the classes are called, for messages.
      share: the share of every class to test on, rounded to at least one row and not all.

    Returns:
      Two arrays of row indices, both in the order of `fixed_order`.

    Raises:
      DataError: there is only one class, or a class has only one row.

    >>> split("read_csv('a.csv')", np.array([0, 0, 0, 1, 1, 1]), ("no", "yes"), 0.2)
    (array([1, 0, 4, 5]), array([3, 2]))
    """
    counts = np.bincount(labels, minlength=len(names))
    if len(names) < 2:
        raise DataError(f"{call}: all examples are of the class {names[0]!r}. Add another class.")
    if counts.min() < 2:
        lonely = names[int(counts.argmin())]
        raise DataError(
            f"{call}: class {lonely!r} has only one example, but one to train on and one to test on are "
            "needed. Add examples, or remove the class."
        )
    order = fixed_order(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    place = np.empty(len(labels), int)  # of every row in its class
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    tested = place < np.clip(np.rint(share * counts), 1, counts - 1)[labels]
    return order[~tested[order]], order[tested[order]]
