"""The IDX format, in which MNIST and its relatives are published."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from hypergrad.data.kinds import DataError
from hypergrad.data.sources import content_of

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


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
    hint = "the files of mnist() and fashion_mnist() lie in the folder that HYPERGRAD_DATA names"
    content = content_of(call, path, f"Check the path; {hint}.")
    return parse_idx(call, content, compressed=Path(path).suffix == ".gz")


def parse_idx(call: str, content: bytes, compressed: bool) -> np.ndarray:
    """The array in the content of an IDX file.

    Args:
      call: the user's call, for messages.
      content: the bytes of the file.
      compressed: whether they are gzip's.

    Raises:
      DataError: they are not those of an IDX file.
    """
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
