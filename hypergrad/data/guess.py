"""Data by their name or path."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypergrad.data.archives import read_npz
from hypergrad.data.built_in import a9a, digits, fashion_mnist, mnist
from hypergrad.data.images import read_images
from hypergrad.data.kinds import DataError, Dataset, Table
from hypergrad.data.tables import read_csv
from hypergrad.data.text import Text, read_text

_BUILT_IN: dict[str, Callable[..., Any]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "a9a": a9a,
}
_READERS: dict[str, Callable[..., Any]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".npz": read_npz,
    ".txt": read_text,
}


def load(path: str | os.PathLike[str], **options: Any) -> Dataset | Table | Text:
    """Read any data by the name of a data set or by the path of a user's own.

    =================================================  ====================
    ``"digits"``                                       `digits`
    ``"mnist"``, ``"fashion-mnist"``, ``"a9a"``        `mnist`, `fashion_mnist`, `a9a`
    a folder                                           `read_images`
    a file named ``.csv`` or ``.tsv``                  `read_csv`
    a file named ``.npz``                              `read_npz`
    a file named ``.txt``                              `read_text`
    =================================================  ====================

    A name goes before a folder of that name; ``"./digits"`` and ``Path("digits")`` are the folder.

    Args:
      path: the name or path.
      options: what that function takes beside the path, such as ``label=`` for `read_csv`.

    Returns:
      What that function returns.

    Raises:
      DataError: there is nothing of that name, or it is of none of these kinds; also what the function
        raises.
      ValueError: the function takes no such option; also what the function raises.

    >>> load("digits").train_images.shape
    (1437, 8, 8)
    """
    name, file = os.fspath(path), Path(path)
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    call = f"load({name!r}{given})"
    reader = _BUILT_IN.get(path) if isinstance(path, str) else None
    arguments = () if reader else (path,)
    if reader is None and file.is_dir():
        reader = read_images
    if reader is None and not file.exists():
        raise DataError(
            f"{call}: there is no such file or folder. Check the path, or pass one of the names "
            f"{', '.join(_BUILT_IN)}."
        )
    reader = reader or _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(
            f"{call}: the name does not say what it is: a folder of images, or a file named "
            f"{', '.join(_READERS)}. Rename it, or call read_text, read_csv or another reader."
        )
    takes = [key for key in inspect.signature(reader).parameters if key not in ("path", "folder")]
    if unknown := [key for key in options if key not in takes]:
        raise ValueError(
            f"{call}: {reader.__name__} reads this, which does not take {unknown[0]!r}. Choose from "
            f"{', '.join(takes) or 'nothing'}"
        )
    return reader(*arguments, **options)
