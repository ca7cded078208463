"""Differentiable augmentation: random small changes of images, through which gradients pass.

======  ========================================================================
symbol  meaning
======  ========================================================================
``p``   place of a pixel relative to the center of the image, ``(row, column)``
``A``   rotation times scale, ``(2, 2)``, drawn for every image
``b``   shift in pixels, ``(2,)``, drawn for every image
======  ========================================================================
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Augmentation:
    """Random shifts, rotations, scales, contrasts and holes, drawn anew for every image.

    ``image(p) <- c image(A p + b)``, by linear interpolation and 0 outside; then a square is set to 0.  The
    result is differentiable in the images.

    Attributes:
      shift: maximum shift in pixels up, down, left or right, >= 0.
      degrees: maximum rotation in degrees, in either direction, >= 0.
      scale: largest relative change of its size, in [0, 1).
      contrast: largest relative change ``|c - 1|`` of its values, in [0, 1).
      cutout: side of the square that is set to 0, as a share of the image's, in [0, 1).
      flip: whether half of the images are mirrored; not for digits.

    Raises:
      ValueError: a setting is out of its range.

    Source: B. Zhao, H. Bilen, "Dataset condensation with differentiable siamese augmentation", ICML 2021.

    >>> import jax, jax.numpy as jnp
    >>> Augmentation(shift=1.0)(jax.random.key(0), jnp.ones((5, 8, 8))).shape
    (5, 8, 8)
    """

    shift: float = 0.0
    degrees: float = 0.0
    scale: float = 0.0
    contrast: float = 0.0
    cutout: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("shift", "degrees"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"Augmentation({name}={getattr(self, name)!r}): it must be 0 or more")
        for name in ("scale", "contrast", "cutout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Augmentation({name}={getattr(self, name)!r}): it must lie in [0, 1)")

    def __call__(self, key: Array, images: Array) -> Array:
        """Augmented images.

        Args:
          key: PRNG key.
          images: ``(n, height, width)`` or ``(n, height, width, channels)``.

        Raises:
          ValueError: the images have another number of axes.
        """
        if images.ndim not in (3, 4):
            raise ValueError(
                f"{self}(key, images) with images of shape {images.shape}: it turns and shifts pictures. "
                "Pass (n, height, width) or (n, height, width, channels)"
            )
        keys = jax.random.split(key, len(images))
        return jax.vmap(self._one)(keys, images)

    def _one(self, key: Array, image: Array) -> Array:
        keys = jax.random.split(key, 6)

        def uniform(k: int, size: float, shape: tuple[int, ...] = ()) -> Array:
            return jax.random.uniform(keys[k], shape, image.dtype, -size, size)

        if self.shift or self.degrees or self.scale or self.flip:
            angle, size = uniform(0, np.deg2rad(self.degrees)), 1 + uniform(1, self.scale)
            mirror = jnp.where(self.flip & jax.random.bernoulli(keys[2]), -1, 1).astype(image.dtype)
            cos, sin = jnp.cos(angle), jnp.sin(angle)
            matrix = jnp.array([[cos, -sin * mirror], [sin, cos * mirror]]) / size
            image = moved(image, matrix, uniform(3, self.shift, (2,)))
        if self.contrast:
            image = image * (1 + uniform(4, self.contrast))
        if self.cutout:
            sides = jnp.asarray(image.shape[:2], image.dtype)
            middle = uniform(5, 0.5, (2,)) * sides
            near = jnp.abs(_places(image) - middle[None, None]) < (self.cutout * sides / 2)[None, None]
            image = jnp.where(_over_channels(jnp.all(near, axis=-1), image), 0, image)
        return image


def refuse_without_pictures(call: str, augmentation: Augmentation | None, shape: tuple[int, ...]) -> None:
    """Refuse an augmentation of what are no pictures.

    Args:
      call: the user's call, for the message.
      augmentation: of a recipe.
      shape: ``(N, ...)``, of the examples.
    """
    if augmentation is not None and len(shape) not in (3, 4):
        raise ValueError(
            f"{call}: the augmentation of the recipe turns and shifts pictures, and the inputs are "
            f"{list(shape)}. Leave it out, or pass (N, height, width) or (N, height, width, channels)"
        )


def moved(image: Array, matrix: Array, shift: Array) -> Array:
    """``image(A p + b)``, linearly between pixels and 0 outside.

    Args:
      image: ``(height, width)`` or ``(height, width, channels)``.
      matrix: ``A``, ``(2, 2)``.
      shift: ``b``, ``(2,)``, in pixels.
    """
    centre = (jnp.asarray(image.shape[:2], image.dtype) - 1) / 2
    places = _places(image) @ matrix.T + (centre + shift)[None, None]
    corner = jnp.floor(places)
    part = places - corner
    last = jnp.asarray(image.shape[:2], jnp.int32)[None, None] - 1
    result = jnp.zeros_like(image)
    for step in np.ndindex(2, 2):  # the four pixels around a place
        ahead = jnp.asarray(step, jnp.int32)[None, None]
        at = corner.astype(jnp.int32) + ahead
        weight = jnp.prod(jnp.where(ahead == 1, part, 1 - part), axis=-1)
        inside = jnp.all((at >= 0) & (at <= last), axis=-1)
        rows, columns = jnp.moveaxis(jnp.clip(at, 0, last), -1, 0)
        result += _over_channels(jnp.where(inside, weight, 0), image) * image[rows, columns]
    return result


def _places(image: Array) -> Array:
    """``(height, width, 2)`` places of the pixels relative to the center."""
    axes = [jnp.arange(n, dtype=image.dtype) - (n - 1) / 2 for n in image.shape[:2]]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)


def _over_channels(x: Array, image: Array) -> Array:
    """``(height, width)`` values with an axis for the channels, if the image has one."""
    return x if image.ndim == 2 else x[:, :, None]
