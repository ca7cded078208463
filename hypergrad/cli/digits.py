"""The problem that needs no file: scikit-learn's digits."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad import data, nets
from hypergrad.training.problem import Problem

WIDTHS = (64, 50, 50, 10)
BATCH = 100
HELD_OUT = 437  # of the 1,437 training images


def digits_problem() -> Problem:
    """A small network on the digits, judged by its loss on images that it is not trained on.

    >>> import hypergrad as hg
    >>> trained = digits_problem().train({"learning_rate": 0.01}, steps=20, optimizer=hg.adam())
    >>> bool(trained.losses[-1] < trained.losses[0])
    True
    """
    digits = data.digits()
    images = jnp.asarray(digits.train_images.reshape(-1, 64) - digits.train_images.mean())
    labels = jnp.asarray(digits.train_labels)
    count = len(images) - HELD_OUT
    init, apply = nets.mlp(WIDTHS)

    def loss(params: Any, meta: Any, rows: Array) -> Array:
        return nets.cross_entropy(apply(params, images[rows]), labels[rows])

    def batches(key: Array, steps: int) -> Array:
        return data.minibatches(key, count, BATCH, steps)

    def validation(params: Any) -> Array:
        return nets.cross_entropy(apply(params, images[count:]), labels[count:])

    return Problem(init, loss, batches, validation)
