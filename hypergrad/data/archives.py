"""Images or tables with labels in ``.npz`` files."""

import os
from functools import partial
from pathlib import Path

import numpy as np

from hypergrad.data.kinds import DataError, Dataset, Table
from hypergrad.data.rows import SHARE, check_share, split
from hypergrad.data.sources import arrays_of, content_of

_PAIRS = (("images", "labels"), ("inputs", "labels"), ("x", "y"), ("X", "y"))
_SPLIT = tuple(
    tuple(pattern.format(part, name) for part in ("train", "test") for name in pair)
    for pair in _PAIRS
    for pattern in ("{0}_{1}", "{1}_{0}")
)


def read_npz(path: str | os.PathLike[str], *, test_share: float | None = None) -> Dataset | Table:
    """Read labeled images, or labeled rows of numbers, from one ``.npz`` file.

    Its arrays are called ``images, labels``, ``inputs, labels``, ``x, y`` or ``X, y``.  If they are split
    into training and test, ``train_`` and ``test_`` stand before each name, or ``_train`` and ``_test``
    behind it, as in ``x_train, y_train, x_test, y_test``.  Other arrays are passed over.

    Args:
      path: the file.
      test_share: the share of every class that is kept for testing, between 0 and 1; None takes 0.2.  The
        same file is split in the same way everywhere.  It must be None if the file is split.

    Returns:
      A `Table` of inputs ``(n, features)``, finite numbers of any type, or a `Dataset` of images
      ``(n, height, width)``, ``(n, height, width, 1)`` or ``(n, height, width, 3)``: uint8, which is
      divided by 255, or floats in [0, 1].  Both are float32 and named like the file.

    Raises:
      DataError: the file is missing, damaged, or has none of these names or several; shapes, types or
        numbers of the arrays are others; labels are not the integers from 0 to classes - 1, ``(n,)`` or
        ``(n, 1)``; a class has no example to train on; with a file to split, there is only one class, or a
        class of only one example.
      ValueError: the share is out of range, or the file is split.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "noise.npz"
    >>> np.savez(path, images=np.zeros((10, 4, 4), np.uint8), labels=np.arange(10) % 2)
    >>> noise = read_npz(path)
    >>> noise.train_images.shape, noise.test_labels, noise.classes
    ((8, 4, 4), array([1, 0], dtype=int32), 2)
    """
    call, path = f"read_npz({str(path)!r}, test_share={test_share!r})", Path(path)
    if test_share is not None:
        check_share(call, test_share)
    content = content_of(call, path, "Check the path.")
    arrays = arrays_of(call, path.name, content, partial(_chosen, call))
    names = tuple(arrays)
    if len(names) == 4 and test_share is not None:
        raise ValueError(
            f"{call}: the file is split already, into {', '.join(names)}. Leave test_share out"
        )
    parts = [
        (_inputs(call, x, arrays[x]), _labels(call, y, arrays[y])) for x, y in zip(names[::2], names[1::2])
    ]
    for inputs, labels in parts:
        if len(inputs) != len(labels) or inputs.shape[1:] != parts[0][0].shape[1:]:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise DataError(
                f"{call}: the file holds {shapes}, but there must be one label for each example, and "
                "examples of one shape. Write it again."
            )
    classes = _classes(call, [labels for _, labels in parts])
    parts = [(inputs, labels.astype(np.int32)) for inputs, labels in parts]
    if len(parts) == 1:
        inputs, labels = parts[0]
        share = SHARE if test_share is None else test_share
        rows = split(call, labels, [*map(str, range(classes))], share)
        parts = [(inputs[part], labels[part]) for part in rows]
    kind = Table if parts[0][0].ndim == 2 else Dataset
    return kind(*parts[0], *parts[1], path.stem, classes)


def _chosen(call: str, there: list[str]) -> tuple[str, ...]:
    """The names of the arrays that are read, of two or of four."""
    fitting = [names for names in _SPLIT + _PAIRS if set(names) <= set(there)]
    if len(fitting) != 1:
        several = f"; both {fitting[0]} and {fitting[1]} fit" if fitting else ""
        raise DataError(
            f"{call}: the file holds the arrays {', '.join(there)}{several}. Name them as one of "
            f"{', '.join(' and '.join(pair) for pair in _PAIRS)}, or as these with _train and _test "
            "behind or train_ and test_ before each."
        )
    return fitting[0]


def _inputs(call: str, name: str, array: np.ndarray) -> np.ndarray:
    """Rows of numbers, or images with pixels in [0, 1]."""
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim in (2, 3) or (array.ndim == 4 and array.shape[3] == 3)):
        raise DataError(
            f"{call}: {name} has the shape {array.shape}, but must be (n, features), (n, height, width), "
            "or (n, height, width, 3) with channels last, and not empty. Write it so."
        )
    if array.ndim == 2:
        with np.errstate(over="ignore"):
            table = array.astype(np.float32) if array.dtype.kind in "fiub" else np.full(1, np.nan)
        if not np.isfinite(table).all():
            raise DataError(
                f"{call}: {name}, of {array.dtype}, holds what is no finite number in float32. Remove or "
                "replace it."
            )
        return table
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if array.dtype.kind not in "fb" or not (array.min() >= 0 and array.max() <= 1):
        raise DataError(
            f"{call}: {name} holds images of {array.dtype} from {array.min()} to {array.max()}, but they "
            "must be uint8, or floats from 0 to 1. Scale or convert them; standardization() does the "
            "rest."
        )
    return array.astype(np.float32)


def _labels(call: str, name: str, array: np.ndarray) -> np.ndarray:
    """One integer for each example."""
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise DataError(
            f"{call}: {name} has the shape {array.shape} and the type {array.dtype}, but labels are (n,) "
            "integers. Write them so; numpy.argmax(labels, axis=1) makes them of one-hot rows."
        )
    return array


def _classes(call: str, parts: list[np.ndarray]) -> int:
    """The number of classes, if they are numbered from 0 without gaps and all are in the first part."""
    found = np.unique(np.concatenate(parts))
    if not np.array_equal(found, np.arange(len(found))):
        raise DataError(
            f"{call}: the labels are {len(found)} different numbers from {found[0]} to {found[-1]}, but "
            "classes are numbered 0, 1, 2, ... without a gap. numpy.unique(labels, "
            "return_inverse=True)[1] renumbers them."
        )
    if missing := sorted(set(found.tolist()) - set(parts[0].tolist())):
        raise DataError(
            f"{call}: class {missing[0]} is in the test part alone. Put examples of it into the other."
        )
    return len(found)
