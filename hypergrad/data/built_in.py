"""Small real data sets, as they are published."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hypergrad.data.idx import parse_idx
from hypergrad.data.kinds import DataError, Dataset, Omniglot, Table
from hypergrad.data.rows import fixed_order
from hypergrad.data.sources import arrays_of, optional

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
_DIGITS_TRAIN = 1437
_SKLEARN = ("sklearn.datasets", "scikit-learn, which has or reads these data,")


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
    bunch = optional("digits()", *_SKLEARN).load_digits()
    images = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    order = fixed_order(len(labels))
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
    wanted = ("images", "alphabet", "alphabet_id", "is_evaluation")
    pixels, known, owner, evaluation = arrays_of(call, file, content, lambda _: wanted).values()
    right = pixels.dtype == np.uint8 and pixels.shape[1:] == (20, 28, 28)
    if not right or not owner.shape == evaluation.shape == pixels.shape[:1]:
        raise DataError(
            f"{call}: {file} holds images {pixels.shape} {pixels.dtype}, alphabet_id {owner.shape} and "
            f"is_evaluation {evaluation.shape}, but (n, 20, 28, 28) uint8, (n,) and (n,) are read. Put "
            "the right file in its place."
        )
    known_names = [str(name) for name in known]
    names = tuple(known_names if alphabets is None else alphabets)
    missing = [name for name in names if name not in known_names]
    if missing or not names:
        raise ValueError(
            f"{call}: {f'there is no alphabet {missing[0]!r}' if missing else 'no alphabet is asked for'}. "
            f"Choose from {', '.join(known_names)}."
        )
    rows = [np.flatnonzero(owner == known_names.index(name)) for name in names]
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
    call = f"a9a(directory={directory!r})"
    load_svmlight_file = optional(call, *_SKLEARN).load_svmlight_file
    arrays = []
    for file, expected in _A9A.items():
        content = _read(call, directory, "libsvm", file, expected, "its two files a9a and a9a.t")
        rows, signs = load_svmlight_file(
            io.BytesIO(content), n_features=_A9A_FEATURES, dtype=np.float32, zero_based=False
        )
        arrays += [rows.toarray(), (signs > 0).astype(np.int32)]
    train_inputs, train_labels, test_inputs, test_labels = arrays
    return Table(train_inputs, train_labels, test_inputs, test_labels, "a9a", 2)


def _load(name: str, call: str, directory: str | os.PathLike[str] | None) -> Dataset:
    arrays = []
    for file, expected in zip(_FILES, _MD5[name]):
        content = _read(call, directory, name, file, expected, "its four original *-ubyte.gz files")
        arrays.append(parse_idx(f"{call}: {file}", content, compressed=True))
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
