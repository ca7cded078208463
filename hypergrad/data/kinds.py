"""What data sets are: named tuples of NumPy arrays."""

from typing import NamedTuple

import numpy as np


class DataError(ValueError):
    """A data file is missing, damaged, or not what its name says."""


class Dataset(NamedTuple):
    """Labeled images as NumPy arrays, split into train and test.

    Attributes:
      train_images: ``(n, height, width)`` if gray, ``(n, height, width, 3)`` in color; float32 in [0, 1].
      train_labels: ``(n,)`` int32 in [0, classes).
      test_images: as `train_images`, for the test split.
      test_labels: as `train_labels`, for the test split.
      name: the set's name, such as "mnist".
      classes: the number of classes.
      class_names: what the classes are called, in the order of their labels; empty if they have no names.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    name: str
    classes: int
    class_names: tuple[str, ...] = ()


class Table(NamedTuple):
    """Labeled rows of numbers as NumPy arrays, split into train and test.

    Attributes:
      train_inputs: ``(n, features)`` float32.
      train_labels: ``(n,)`` int32 in [0, classes).
      test_inputs: as `train_inputs`, for the test split.
      test_labels: as `train_labels`, for the test split.
      name: the set's name, such as "a9a".
      classes: the number of classes.
      class_names: what the classes are called, in the order of their labels; empty if they have no names.
      feature_names: what the features are called; empty if they have no names.
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    name: str
    classes: int
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()


class Omniglot(NamedTuple):
    """Handwritten characters of several alphabets, each drawn by the same 20 people, as NumPy arrays.

    Attributes:
      images: ``(characters, 20, 28, 28)`` float32 in [0, 1], ink 1; the second axis is the person who drew.
      alphabet: ``(characters,)`` int32, indices into `names`.
      evaluation: ``(characters,)`` bool, whether the alphabet belongs to the set's evaluation part.
      names: the alphabets' names.
    """

    images: np.ndarray
    alphabet: np.ndarray
    evaluation: np.ndarray
    names: tuple[str, ...]
