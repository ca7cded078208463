"""Inputs scaled to mean 0 and standard deviation 1, with the numbers that do and undo it."""

from typing import NamedTuple, TypeVar

import jax
import numpy as np

Inputs = TypeVar("Inputs", np.ndarray, jax.Array)


class Standardization(NamedTuple):
    """The affine map ``(inputs - mean) / std`` and its inverse.

    It is a tree of two arrays, so `hypergrad.files.save` stores it; what `hypergrad.files.load` gives back
    is a dictionary, from which ``Standardization(**saved)`` makes it again.

    Attributes:
      mean: ``(features,)`` or ``(channels,)``, or a scalar for gray images.
      std: as `mean`, and positive.
    """

    mean: np.ndarray
    std: np.ndarray

    def apply(self, inputs: Inputs) -> Inputs:
        """The standardized inputs, ``(inputs - mean) / std``.

        Args:
          inputs: an array whose last axis holds the features or channels; any shape for a scalar mean.

        Raises:
          ValueError: the last axis is of another length.
        """
        mean, std = self._spread("apply", inputs)
        return (inputs - mean) / std

    def undo(self, inputs: Inputs) -> Inputs:
        """The inputs in their own units, ``inputs * std + mean``.

        Args:
          inputs: standardized inputs, shaped as for `apply`.

        Raises:
          ValueError: the last axis is of another length.
        """
        mean, std = self._spread("undo", inputs)
        return inputs * std + mean

    def _spread(self, method: str, inputs: np.ndarray | jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation with as many axes as the inputs have."""
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        if inputs.shape[inputs.ndim - mean.ndim :] != mean.shape:
            raise ValueError(
                f"Standardization.{method}(inputs) with inputs of shape {inputs.shape}: mean and std are "
                f"of {len(mean)} features or channels. Pass inputs with as many on the last axis."
            )
        ones = (1,) * (inputs.ndim - mean.ndim)
        return mean.reshape(ones + mean.shape), std.reshape(ones + std.shape)


def standardization(inputs: np.ndarray) -> Standardization:
    """Mean and standard deviation of inputs to train on: per feature of tables, per channel of images.

    What is constant gets the standard deviation 1, and so becomes 0.

    Args:
      inputs: ``(n, features)``, ``(n, height, width)`` or ``(n, height, width, channels)`` finite numbers;
        take the training part alone, so that nothing of the test part is used.

    Returns:
      A `Standardization` in float32, of sums in float64.

    Raises:
      ValueError: the shape is another, or a number is NaN or infinite.

    >>> scale = standardization(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> scale.apply(np.array([[2.0, 5.0], [4.0, 6.0]]))
    array([[0., 0.],
           [2., 1.]])
    """
    numbers = np.asarray(inputs)
    call = f"standardization(inputs) with inputs of shape {numbers.shape}"
    if numbers.ndim not in (2, 3, 4) or numbers.size == 0:
        raise ValueError(
            f"{call}: pass a table (n, features), gray images (n, height, width) or images with channels "
            "(n, height, width, channels)"
        )
    if not np.isfinite(numbers).all():
        raise ValueError(f"{call}: there is NaN or infinity in them. Remove or replace it first")
    axes = {2: 0, 3: None, 4: (0, 1, 2)}[numbers.ndim]
    mean, std = (f(numbers, axis=axes, dtype=np.float64).astype(np.float32) for f in (np.mean, np.std))
    # The rounded mean of equal numbers may differ from them, and then the standard deviation is not 0.
    constant = (numbers.max(axis=axes) == numbers.min(axis=axes)) | (std == 0)
    return Standardization(np.asarray(mean), np.where(constant, np.float32(1), std))
