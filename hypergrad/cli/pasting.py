"""What was learned, as text to paste where it is used."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from hypergrad import files, schedules
from hypergrad._base.trees import PyTree
from hypergrad.program import AnyOptimizer

JSON = "learned.json"


def write_pastes(
    folder: Path, optimizer: AnyOptimizer, hypers: Mapping[str, PyTree], steps: int, params: PyTree
) -> list[str]:
    plain = jax.tree.map(lambda x: np.asarray(x).tolist(), schedules.values(dict(hypers), steps))
    files.replace_file(folder / JSON, json.dumps(plain).encode())
    return [f"plain numbers: {folder / JSON}"]
