"""Records of runs: JSON files of the configuration, of what came out, and of the versions that made it."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypergrad.files import replace_file, versions


def plain(x: Any) -> Any:
    """As JSON can hold it: fields by name, arrays as lists, None for NaN and infinity.

    >>> plain({"losses": np.array([0.5, np.inf]), "steps": (1, 2)})
    {'losses': [0.5, None], 'steps': [1, 2]}
    """
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {field.name: plain(getattr(x, field.name)) for field in dataclasses.fields(x)}
    if hasattr(x, "_asdict"):
        return plain(x._asdict())
    if isinstance(x, Mapping):
        return {k: plain(value) for k, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(x).tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write a record with the versions, atomically; its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(record) | {"versions": versions()}, indent=1) + "\n"
    replace_file(path, text.encode())


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A record again, as to draw it."""
    return json.loads(Path(path).read_text())


def remembered(
    path: str | os.PathLike[str] | None, asked: Any, compute: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """What a computation gives, as `plain` makes it; from a file, where that has it for the same question.

    Args:
      path: of the file, which is written after a computation; None for no file.
      asked: everything on which the result depends.
      compute: called where there is no file, or the file answers another question.
    """
    asked = plain(asked)
    if path is not None and Path(path).exists():
        saved = read(path)
        if saved["asked"] == asked:
            return saved["found"]
    found = plain(compute())
    if path is not None:
        write(path, {"asked": asked, "found": found})
    return found
