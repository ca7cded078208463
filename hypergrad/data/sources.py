"""How files are opened, and how packages that only some data need are imported."""

import importlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from hypergrad.data.kinds import DataError


def content_of(call: str, path: str | os.PathLike[str], way_out: str) -> bytes:
    """The content of a file.

    Args:
      call: the user's call, for the message.
      path: the file.
      way_out: what to do if it cannot be read, for the message.

    Raises:
      DataError: the file is missing, or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{call}: cannot read the file ({error.strerror}). {way_out}") from error


def text_of(call: str, path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, without a byte order mark, every line ended by a newline character alone.

    Args:
      call: the user's call, for the message.
      path: the file.

    Raises:
      DataError: the file is missing, cannot be read, or is not UTF-8.
    """
    content = content_of(call, path, "Check the path.")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{call}: not a text in UTF-8: byte {error.start:,} is 0x{error.object[error.start]:02x} "
            f"({error.reason}). Save the file as UTF-8."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def arrays_of(
    call: str, file: str, content: bytes, choose: Callable[[list[str]], Sequence[str]]
) -> dict[str, np.ndarray]:
    """Some of the arrays in a ``.npz`` file, by their names.

    Args:
      call: the user's call, for messages.
      file: the name of the file, for messages.
      content: its bytes.
      choose: the names of the wanted arrays, from those of all.

    Raises:
      DataError: the file is damaged, is another file, or lacks an array.
    """
    try:
        with np.load(io.BytesIO(content)) as archive:
            return {name: archive[name] for name in choose(archive.files)}
    except DataError:  # of `choose`
        raise
    except (TypeError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{call}: {file} is damaged or is another file ({error}). Put the right one in its place."
        ) from error


def optional(call: str, module: str, package: str) -> ModuleType:
    """A module of a package that the extra ``data`` installs; imported when it is needed.

    Args:
      call: the user's call, for the message.
      module: the module's full name.
      package: the package and what it is for, for the message.

    Raises:
      ImportError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{call}: {package} is not installed; install it, or hypergrad-jax[data]"
        ) from error
