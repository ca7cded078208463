"""The real examples that a set is distilled from, and what is refused of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import data
from hypergrad._base.checks import is_whole
from hypergrad.distillation.augment import refuse_without_pictures
from hypergrad.distillation.baselines import rows_like
from hypergrad.distillation.distilled import checksum_of
from hypergrad.distillation.recipe import Network, Recipe, logits_of


class Examples(NamedTuple):
    """Real examples in random order, normalized.

    Attributes:
      real: inputs and labels of those to learn from.
      unseen: inputs and labels of those held out for validation.
      mean, std: by which they were normalized.
      checksum: checksum of all examples.
    """

    real: tuple[Array, Array]
    unseen: tuple[Array, Array]
    mean: np.ndarray
    std: np.ndarray
    checksum: str

    @staticmethod
    def of(
        call: str,
        given: tuple[np.ndarray, np.ndarray],
        normalise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        held_out: int,
        key: Array,
    ) -> "Examples":
        """Examples from images and labels, some of which are held out."""
        images, labels = given
        mean, std = (np.asarray(x, images.dtype) for x in normalise(images))
        order = np.asarray(jax.random.permutation(key, len(images)))
        inputs, targets = (images[order] - mean) / std, labels[order].astype(np.int32)
        kept, classes = len(images) - held_out, int(labels.max()) + 1
        data.require_classes(
            f"{call}, validation={held_out}", "what is left to learn from", targets[:kept], classes
        )
        real = (jnp.asarray(inputs[:kept]), jnp.asarray(targets[:kept]))
        unseen = (jnp.asarray(inputs[kept:]), jnp.asarray(targets[kept:]))
        return Examples(real, unseen, mean, std, checksum_of(images, labels))

    def start(self, per_class: int, given: Any, key: Array) -> tuple[np.ndarray, Array]:
        """Classes in turn, and initial images of them: those given, or random real ones."""
        targets = np.asarray(self.real[1])
        classes = int(targets.max()) + 1
        hard = np.arange(per_class * classes, dtype=np.int32) % classes
        if given is None:
            return hard, self.real[0][rows_like(hard, targets, key)]
        return hard, jnp.asarray((np.asarray(given, self.mean.dtype) - self.mean) / self.std)


def check_examples(
    call: str, images: np.ndarray, labels: np.ndarray, start: Any, per_class: int, held_out: int
) -> int:
    """Refuse examples that cannot be learned from; returns the number of their classes."""
    what = "inputs" if images.ndim == 2 else "images"
    whole = np.issubdtype(labels.dtype, np.integer)
    if labels.shape != images.shape[:1] or not whole or images.ndim < 2 or images.size == 0:
        raise ValueError(
            f"{call} with images or inputs {images.shape} and labels {labels.shape} of {labels.dtype}: "
            "pass images (N, height, width) or (N, height, width, channels), or a table (N, features), "
            "and one integer label for each"
        )
    if not np.issubdtype(images.dtype, np.floating):
        cast = "inputs.astype(np.float32)" if images.ndim == 2 else "images / 255"
        raise ValueError(
            f"{call} with {what} of {images.dtype}: what is learned are real numbers. "
            f"Pass floats, such as {cast}"
        )
    if not np.isfinite(images).all():
        raise ValueError(f"{call}: the {what} hold numbers that are not finite; remove or replace them")
    classes = int(labels.max()) + 1
    empty = sorted(set(range(classes)) - set(labels.tolist()))
    if labels.min() < 0 or empty:
        raise ValueError(
            f"{call}: the labels must be 0, 1, ... without gaps; missing: {empty}, smallest: {labels.min()}"
        )
    if not is_whole(per_class):
        raise ValueError(f"{call}: per_class={per_class!r} must be a whole number, at least 1")
    wanted = (per_class * classes, *images.shape[1:])
    if start is not None and np.shape(start) != wanted:
        raise ValueError(
            f"{call}: start has shape {np.shape(start)}, and the learned {what} have {wanted}: number i "
            "is of class i mod C"
        )
    if not 0 <= held_out <= len(images) // 2:
        raise ValueError(
            f"{call}: validation={held_out} of {len(images)} examples; hold out from 0 to half of them"
        )
    return classes


def check_network(
    call: str, network: Network, recipe: Recipe, shape: tuple[int, ...], classes: int
) -> None:
    """Refuse a network with another number of outputs than classes, and augmentation of no pictures."""
    refuse_without_pictures(call, recipe.augmentation, shape)
    one = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.result_type(float))
    found = logits_of(network, one).shape
    if found != (1, classes):
        raise ValueError(
            f"{call}: for one example the network gives logits {found}, and the labels have {classes} "
            f"classes; pass a network that gives (1, {classes})"
        )
