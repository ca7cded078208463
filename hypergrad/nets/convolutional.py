"""Convolutional networks."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.nets.perceptrons import Dense, mlp, normal, probed


class Conv(NamedTuple):
    """One block of `convnet`: convolution, instance normalization, ReLU, pooling.

    Attributes:
      weights: ``(3, 3, n_in, n_out)``.
      scale: ``(n_out,)``, by which each normalized channel is multiplied.
      offset: ``(n_out,)``, added to each channel after the scale.
    """

    weights: jax.Array
    scale: jax.Array
    offset: jax.Array


def convnet(
    shape: tuple[int, int, int], classes: int, *, width: int = 128, depth: int = 3
) -> tuple[Callable[..., tuple[Conv | Dense, ...]], Callable[..., Any]]:
    """The ConvNet-D of dataset distillation, as a pair of pure functions ``(init, apply)``.

    ``h <- pool(relu(a (W * h - μ) / sqrt(σ² + ε) + b))``, ``D`` times;  ``logits = h W + b``

    ``W * h`` is a 3x3 convolution with zero padding, ``μ`` and ``σ²`` are the mean and variance over the
    pixels of each channel of each image, and ``ε = 1e-5``.  ``pool`` averages squares of 2x2 pixels and
    drops an odd last row or column.  The convolutions have no biases, because subtracting ``μ`` would undo
    them.

    Args:
      shape: (height, width, channels) of an image.
      classes: the number of logits.
      width: the number of channels of every block.
      depth: ``D``, the number of blocks, at most log2 of the shorter side of the image.

    Returns:
      ``init(key)``, which returns a tuple of ``D`` `Conv` and a `Dense` in JAX's default float type.
      Weights are ``normal / sqrt(n_in)``, with ``9 n_in`` in place of ``n_in`` in convolutions; scales are
      one, offsets and biases zero.

      ``apply(params, inputs)``, which returns logits ``(n, classes)`` for inputs
      ``(n, height, width, channels)``, ``(n, height * width * channels)`` or, with one channel,
      ``(n, height, width)``, and raises ValueError for others.  ``apply(params, inputs, probes)`` takes
      probes structured like the parameters, a tuple of ``D`` `Conv` and one more.  It adds them to
      ``W * h`` (``weights``) and to the results of scale and offset.  It returns the logits and a tuple
      like the probes of the layers' inputs: the 3x3 patches of ``h``, what is multiplied by the scale, and
      ones.

    Raises:
      ValueError: a size is not a positive integer, or the depth is too great.

    Source: S. Gidaris, N. Komodakis, "Dynamic few-shot visual learning without forgetting", 2018; B. Zhao,
    K. Mopuri, H. Bilen, "Dataset condensation with gradient matching", 2021.

    >>> init, apply = convnet((8, 8, 1), 10, width=4, depth=2)
    >>> apply(init(jax.random.key(0)), jnp.zeros((3, 64))).shape
    (3, 10)
    """
    call = f"convnet(shape={shape!r}, classes={classes!r}, width={width!r}, depth={depth!r})"
    sizes = (*shape, classes, width, depth)
    if len(shape) != 3 or not all(isinstance(n, int | np.integer) and n > 0 for n in sizes):
        raise ValueError(
            f"{call}: shape is the (height, width, channels) of an image, such as (28, 28, 1), and "
            "it and the other sizes are positive integers."
        )
    height, breadth, channels = shape
    deepest = min(height, breadth).bit_length() - 1
    if depth > deepest:
        way_out = f"a depth of at most {deepest}" if deepest else "use mlp"
        raise ValueError(
            f"{call}: each block halves the image, and {depth} of them leave nothing of it. Pass "
            f"larger images, or {way_out}."
        )
    pixels = (height >> depth) * (breadth >> depth)
    head_init, head_apply = mlp((pixels * width, classes))

    def init(key: jax.Array) -> tuple[Conv | Dense, ...]:
        def block(key: jax.Array, n_in: int) -> Conv:
            weights = normal(key, (3, 3, n_in, width)) / math.sqrt(9 * n_in)
            return Conv(weights, jnp.ones(width), jnp.zeros(width))

        head, *keys = jax.random.split(key, 1 + depth)
        widths = (channels, *[width] * (depth - 1))
        return *map(block, keys, widths), *head_init(head)

    def apply(
        params: tuple[Any, ...], inputs: jax.Array | np.ndarray, probes: Sequence[Any] | None = None
    ) -> Any:
        fitting = [tuple(shape), (math.prod(shape),), tuple(shape[:2])][: 3 if channels == 1 else 2]
        if inputs.shape[1:] not in fitting:
            raise ValueError(
                f"apply(params, inputs) with inputs of shape {inputs.shape}: {call} takes n images of "
                f"shape {' or '.join(map(str, fitting))}. inputs[None] makes a batch of one image."
            )
        hidden = jnp.asarray(inputs).reshape(inputs.shape[0], *shape)
        seen = []
        for k, (weights, scale, offset) in enumerate(params[:-1]):
            patches = _patches(hidden)
            of_weights, of_scale, of_offset = (None, None, None) if probes is None else probes[k]
            normal = _normalise(probed(_convolve(patches, weights), of_weights))
            hidden = normal * scale[None, None, None] + offset[None, None, None]
            hidden = _pool(jax.nn.relu(probed(probed(hidden, of_scale), of_offset)))
            seen.append(Conv(patches, normal, jnp.ones_like(normal)))
        if probes is None:
            return head_apply(params[-1:], hidden)
        logits, last = head_apply(params[-1:], hidden, probes[-1:])
        return logits, (*seen, *last)

    return init, apply


def _patches(images: jax.Array) -> jax.Array:
    """The 3x3 neighborhoods with zero padding, (n, h, w, n_in) -> (n, h, w, 9 n_in), channels last."""
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=3)


def _convolve(patches: jax.Array, weights: jax.Array) -> jax.Array:
    """Convolution of the patches, (n, h, w, 9 n_in) and (3, 3, n_in, n_out) -> (n, h, w, n_out)."""
    # One matrix product with the nine shifted images side by side. XLA has fast convolutions for CPUs, but
    # does not use them inside a loop, where training runs; there this is 5 to 10 times faster.
    return jnp.tensordot(patches, weights.reshape(-1, weights.shape[3]), axes=1)


def _normalise(images: jax.Array) -> jax.Array:
    """Every channel of every image scaled to mean zero and, up to ε, variance one."""
    centred = images - jnp.mean(images, axis=(1, 2), keepdims=True)
    # The ε is inside the root, so that the derivative is finite where an image is constant.
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=(1, 2), keepdims=True) + 1e-5)


def _pool(images: jax.Array) -> jax.Array:
    """Means over squares of 2x2 pixels, without an odd last row or column."""
    n, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(n, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
