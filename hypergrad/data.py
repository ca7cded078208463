"""Small real data sets as NumPy arrays, the IDX reader behind them, and minibatch schedules."""

import gzip
import hashlib
import importlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Train images, train labels, test images, test labels: the order of Dataset's first four fields.
_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_MD5 = {
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
}
# Train and test, as distributed in LIBSVM's format.
_A9A = {"a9a": "983b7716a395c5ed24f4dc3dd3c26303", "a9a.t": "f0bb16cf1ee3e80ff560e9d132ee647e"}
_A9A_FEATURES = 123
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DIGITS_TRAIN = 1437


class DataError(ValueError):
    """A data file is missing, damaged, or not what its name says."""


class Dataset(NamedTuple):
    """Labeled gray images as NumPy arrays, split into train and test.

    Attributes:
      train_images: ``(n, height, width)`` float32 in [0, 1].
      train_labels: ``(n,)`` int32 in [0, classes).
      test_images: as `train_images`, for the test split.
      test_labels: as `train_labels`, for the test split.
      name: the set's name, such as "mnist".
      classes: the number of classes.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    name: str
    classes: int


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


class Table(NamedTuple):
    """Labeled rows of numbers as NumPy arrays, split into train and test.

    Attributes:
      train_inputs: ``(n, features)`` float32.
      train_labels: ``(n,)`` int32 in [0, classes).
      test_inputs: as `train_inputs`, for the test split.
      test_labels: as `train_labels`, for the test split.
      name: the set's name, such as "a9a".
      classes: the number of classes.
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    name: str
    classes: int


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten 8x8 digits: 1,437 to train on, 360 to test on.

    The split is the same everywhere: rows in the order of a stable argsort of the 1,797 raw 64-bit outputs
    of ``numpy.random.PCG64(0)``, the first 1,437 of them for training.  Pixels are divided by 16.  No file
    beyond scikit-learn itself is needed.

    Returns:
      A `Dataset` with images ``(n, 8, 8)`` and 10 classes.

    Source: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI, 1998.

    >>> digits().train_images.shape
    (1437, 8, 8)
    """
    load_digits = _sklearn("digits()").load_digits

    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    # NumPy keeps the raw stream of a bit generator fixed, but not that of Generator.permutation.
    order = np.argsort(np.random.PCG64(0).random_raw(len(labels)), kind="stable")
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return Dataset(images[train], labels[train], images[test], labels[test], "digits", 10)


def mnist(directory: str | os.PathLike[str] | None = None) -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten 28x28 digits, in the order of the original files.

    Args:
      directory: the folder that holds ``mnist/`` with the four original ``*-ubyte.gz`` files; None takes
        the environment variable HYPERGRAD_DATA.  Nothing is downloaded.

    Returns:
      A `Dataset` with images ``(n, 28, 28)``, pixels divided by 255 in float32, and 10 classes;
      ``np.rint(255 * images)`` restores the bytes.

    Raises:
      DataError: a file is missing, or its md5 is not the original's.

    Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
    recognition", Proc. IEEE 86, 1998.

    >>> mnist("path/to/data").train_labels[:5]  # doctest: +SKIP
    array([5, 0, 4, 1, 9], dtype=int32)
    """
    return _load("mnist", f"mnist(directory={directory!r})", directory)


def fashion_mnist(directory: str | os.PathLike[str] | None = None) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 28x28 pictures of clothes, in the order of its files.

    Args:
      directory: the folder that holds ``fashion-mnist/`` with the four original ``*-ubyte.gz`` files; None
        takes the environment variable HYPERGRAD_DATA.  Nothing is downloaded.

    Returns:
      A `Dataset` with images ``(n, 28, 28)``, pixels divided by 255 in float32, and 10 classes;
      ``np.rint(255 * images)`` restores the bytes.

    Raises:
      DataError: a file is missing, or its md5 is not the original's.

    Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", arXiv:1708.07747, 2017.

    >>> fashion_mnist("path/to/data").train_labels[:5]  # doctest: +SKIP
    array([9, 0, 0, 3, 0], dtype=int32)
    """
    return _load("fashion-mnist", f"fashion_mnist(directory={directory!r})", directory)


def omniglot(
    directory: str | os.PathLike[str] | None = None, alphabets: Sequence[str] | None = None
) -> Omniglot:
    """Omniglot: 1,623 characters of 50 alphabets, each drawn by 20 people, as 28x28 images.

    Args:
      directory: the folder that holds ``omniglot/omniglot_28.npz``, a file of the arrays ``images``
        ``(characters, 20, 28, 28)`` uint8 with ink 255, ``alphabet`` (names), ``alphabet_id``
        ``(characters,)`` and ``is_evaluation`` ``(characters,)``; None takes the environment variable
        HYPERGRAD_DATA.  Nothing is downloaded.
      alphabets: the names of the alphabets to load, in the order wanted; None takes all, in the file's
        order.

    Returns:
      An `Omniglot`, with the characters of each alphabet next to each other, and pixels divided by 255 in
      float32.

    Raises:
      DataError: the file is missing, damaged or a different one.
      ValueError: an alphabet is not in the file, or none is asked for.

    Source: B. M. Lake, R. Salakhutdinov, J. B. Tenenbaum, "Human-level concept learning through
    probabilistic program induction", Science 350, 2015.

    >>> omniglot("path/to/data", ["Hebrew"]).images.shape  # doctest: +SKIP
    (22, 20, 28, 28)
    """
    call = f"omniglot(directory={directory!r}, alphabets={alphabets!r})"
    file = "omniglot_28.npz"
    content = _read(call, directory, "omniglot", file, None, file)
    try:
        with np.load(io.BytesIO(content)) as arrays:
            pixels, known, owner, evaluation = (
                arrays[key] for key in ("images", "alphabet", "alphabet_id", "is_evaluation")
            )
    except (TypeError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{call}: {file} is damaged or is another file ({error}). Put the right one in its place."
        ) from error
    right = pixels.dtype == np.uint8 and pixels.shape[1:] == (20, 28, 28)
    if not right or not owner.shape == evaluation.shape == pixels.shape[:1]:
        raise DataError(
            f"{call}: {file} holds images {pixels.shape} {pixels.dtype}, alphabet_id {owner.shape} and "
            f"is_evaluation {evaluation.shape}, but (n, 20, 28, 28) uint8, (n,) and (n,) are read. Put "
            "the right file in its place."
        )
    known = [str(name) for name in known]
    names = tuple(known if alphabets is None else alphabets)
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise ValueError(
            f"{call}: {f'there is no alphabet {missing[0]!r}' if missing else 'no alphabet is asked for'}. "
            f"Choose from {', '.join(known)}."
        )
    rows = [np.flatnonzero(owner == known.index(name)) for name in names]
    chosen = np.concatenate(rows)
    return Omniglot(
        pixels[chosen].astype(np.float32) / 255,
        np.repeat(np.arange(len(names), dtype=np.int32), [len(x) for x in rows]),
        evaluation[chosen].astype(bool),
        names,
    )


def a9a(directory: str | os.PathLike[str] | None = None) -> Table:
    """a9a: 32,561 + 16,281 people of the Adult census data in 123 binary features, in file order.

    Args:
      directory: the folder that holds ``libsvm/`` with the two files ``a9a`` and ``a9a.t``; None takes the
        environment variable HYPERGRAD_DATA.  Nothing is downloaded.

    Returns:
      A `Table` of zeros and ones; label 1 is an income above 50,000 dollars (+1 in the file).

    Raises:
      DataError: a file is missing, or its md5 is not the original's.

    Source: J. Platt, "Fast training of support vector machines using sequential minimal optimization",
    1998; R. Kohavi, UCI, 1996.

    >>> a9a("path/to/data").train_inputs.shape  # doctest: +SKIP
    (32561, 123)
    """
    load_svmlight_file = _sklearn(f"a9a(directory={directory!r})").load_svmlight_file

    call = f"a9a(directory={directory!r})"
    arrays = []
    for file, expected in _A9A.items():
        content = _read(call, directory, "libsvm", file, expected, "its two files a9a and a9a.t")
        rows, signs = load_svmlight_file(
            io.BytesIO(content), n_features=_A9A_FEATURES, dtype=np.float32, zero_based=False
        )
        arrays += [rows.toarray(), (signs > 0).astype(np.int32)]
    train_inputs, train_labels, test_inputs, test_labels = arrays
    return Table(train_inputs, train_labels, test_inputs, test_labels, "a9a", 2)


def _sklearn(call: str) -> ModuleType:
    """``sklearn.datasets``; imported here, since it takes a second and nothing else needs it."""
    try:
        return importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            f"{call}: scikit-learn, which has or reads these data, is not installed; install it, or "
            "hypergrad-jax[data]"
        ) from error


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read one array from an IDX file, gzip-compressed if its name ends in ``.gz``.

    Args:
      path: the file.  Its element type is uint8, int8, int16, int32, float32 or float64.

    Returns:
      A fresh array of the shape and type in the header, in native byte order.

    Raises:
      DataError: the file is missing or unreadable, is not gzip though named ``.gz``, is not IDX, ends too
        early, or continues after its last element.

    Source: the IDX format as MNIST's authors give it on the data set's page.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "pair-idx1-ubyte"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]))
    >>> read_idx(path)
    array([5, 7], dtype=uint8)
    """
    call = f"read_idx({str(path)!r})"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{call}: cannot read the file ({error.strerror}). Check the path; the files of "
            "mnist() and fashion_mnist() lie in the folder that HYPERGRAD_DATA names."
        ) from error
    return _parse_idx(call, content, compressed=Path(path).suffix == ".gz")


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


def _load(name: str, call: str, directory: str | os.PathLike[str] | None) -> Dataset:
    arrays = []
    for file, expected in zip(_FILES, _MD5[name]):
        content = _read(call, directory, name, file, expected, "its four original *-ubyte.gz files")
        arrays.append(_parse_idx(f"{call}: {file}", content, compressed=True))
    train_images, train_labels, test_images, test_labels = arrays
    return Dataset(
        train_images.astype(np.float32) / 255,
        train_labels.astype(np.int32),
        test_images.astype(np.float32) / 255,
        test_labels.astype(np.int32),
        name,
        10,
    )


def _read(
    call: str,
    directory: str | os.PathLike[str] | None,
    folder: str,
    file: str,
    expected: str | None,
    files: str,
) -> bytes:
    """The content of a data set's file, with its md5 checked if the original's is given."""
    root = os.environ.get("HYPERGRAD_DATA") or None if directory is None else directory
    way_out = (
        f"Pass directory=, or set the environment variable HYPERGRAD_DATA, to the folder that "
        f"holds {folder}/ with {files}."
    )
    if root is None:
        raise DataError(f"{call}: no directory was given and HYPERGRAD_DATA is not set. {way_out}")
    path = Path(root, folder, file)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{call}: looked for {path} ({error.strerror}). {way_out}") from error
    if expected is None:
        return content
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{call}: {path} has md5 {found}, but the original has {expected}: the file is "
            "damaged or is another version. Put the original in its place."
        )
    return content


def _parse_idx(call: str, content: bytes, compressed: bool) -> np.ndarray:
    if compressed:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{call}: the name ends in .gz, but the content does not decompress ({error}). "
                "Get the file again, or drop .gz from the name of a plain file."
            ) from error
    if len(content) >= 4 and (content[:2] != b"\0\0" or content[2] not in _IDX_TYPES):
        raise DataError(
            f"{call}: not an IDX file: it starts with {content[:4].hex(' ')}, not with 00 00, a "
            "type byte in 08 09 0b 0c 0d 0e, and the number of axes. Pass an IDX file; name a "
            "compressed one .gz."
        )
    start = 4 + 4 * content[3] if len(content) >= 4 else 4
    if len(content) < start:
        raise DataError(
            f"{call}: truncated: {len(content)} bytes, but the IDX header alone takes {start}. "
            "Get the file again."
        )
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    dtype = np.dtype(_IDX_TYPES[content[2]])
    stop = start + math.prod(shape) * dtype.itemsize
    if len(content) != stop:
        reason = "truncated" if len(content) < stop else "trailing bytes"
        raise DataError(
            f"{call}: {reason}: {len(content)} bytes, but the header's shape {shape} of "
            f"{dtype.name} makes {stop}. Get the file again."
        )
    try:
        array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    except ValueError as error:  # more axes than numpy has, or an empty array with vast ones
        raise DataError(
            f"{call}: numpy cannot hold the header's shape {shape} ({error}). Get the file again."
        ) from error
    return array.astype(dtype.newbyteorder("="))
