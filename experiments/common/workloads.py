"""Data, losses and starts of training that more than one experiment uses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from hypergrad import data, nets

NAMES = ("digits", "mnist", "fashion-mnist")


class Examples(NamedTuple):
    """The data: arguments of the compiled functions, not constants inside them."""

    images: Any  # (n, pixels)
    labels: Any  # (n,)
    test_images: Any
    test_labels: Any


class NoisyLabels(NamedTuple):
    """Data of which some training labels are wrong, and as many clean examples as there are to test on."""

    images: Array  # (n, pixels), centred
    labels: Array  # (n,), some of them wrong
    clean_images: Array  # for the outer loss
    clean_labels: Array
    test_images: Array
    test_labels: Array


def load(name: str, directory: str | None) -> data.Dataset:
    """A data set of images by name."""
    loaders = {"digits": lambda _: data.digits(), "mnist": data.mnist, "fashion-mnist": data.fashion_mnist}
    return loaders[name](directory)


def flat(loaded: data.Dataset, centred: bool = True) -> Examples:
    """Every image as one row of pixels, less the mean training image if centred; NumPy's arrays."""
    images, test = (x.reshape(len(x), -1) for x in (loaded.train_images, loaded.test_images))
    mean = images.mean(axis=0) if centred else np.float32(0)
    return Examples(images - mean, loaded.train_labels, test - mean, loaded.test_labels)


def wrong_labels(
    name: str, directory: str | None, share: float, seed: int
) -> tuple[NoisyLabels, np.ndarray]:
    """A share of the training labels replaced by other ones, half of the test set being clean examples.

    And which of the training labels are wrong.
    """
    loaded = load(name, directory)
    images, right, test, test_labels = flat(loaded)
    half, n, rng = len(test) // 2, len(images), np.random.default_rng(seed)
    wrong = np.zeros(n, bool)
    wrong[rng.permutation(n)[: round(share * n)]] = True
    labels = np.where(wrong, (right + rng.integers(1, loaded.classes, n)) % loaded.classes, right)
    arrays = images, labels, test[:half], test_labels[:half], test[half:], test_labels[half:]
    return NoisyLabels(*map(jnp.asarray, arrays)), wrong


def linear(w: nets.Dense, inputs: Array) -> Array:
    """Logits of one layer."""
    return inputs @ w.weights + w.biases[None]


def losses(apply: Callable[..., Array], w: Any, inputs: Array, labels: Array) -> Array:
    """Cross-entropy of every example, nats."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(w, inputs), labels)


def minibatch_loss(apply: Callable[..., Array], w: Any, examples: Any, rows: Array) -> Array:
    """Mean cross-entropy of some rows of the images, nats."""
    return nets.cross_entropy(apply(w, examples.images[rows]), examples.labels[rows])


def start_and_rows(
    init: Callable[[Array], Any], key: Array, examples: int, batch_size: int, steps: int
) -> tuple[Any, Array]:
    """Initial weights, and the rows of every minibatch, by one key."""
    weights, order = jax.random.split(key)
    return init(weights), data.minibatches(order, examples, min(batch_size, examples), steps)
