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
USE = "paste_use.py"
_USE = """import hypergrad as hg

made = hg.load_distilled({path!r})
params = made.train(network, key)  # network = (init, apply): a new one, trained by the recipe of the set
outputs = network[1](params, made.normalised(new_examples))

# Without this library, plain arrays:
import numpy as np

arrays = np.load({path!r})
examples, labels = (arrays["images"] - arrays["mean"]) / arrays["std"], arrays["labels"]
"""


def write_pastes(
    folder: Path, optimizer: AnyOptimizer, hypers: Mapping[str, PyTree], steps: int, params: PyTree
) -> list[str]:
    plain = jax.tree.map(lambda x: np.asarray(x).tolist(), schedules.values(dict(hypers), steps))
    files.replace_file(folder / JSON, json.dumps(plain).encode())
    return [f"plain numbers: {folder / JSON}"]


def write_use_of_distilled(folder: Path, name: str) -> list[str]:
    """Write how a distilled set is used, in this library and without it.

    Args:
      folder: of the run.
      name: of the file of the set, in this folder.

    Returns:
      What the user is told about it.
    """
    files.replace_file(folder / USE, _USE.format(path=str((folder / name).resolve())).encode())
    return [f"to paste where it is used: {folder / USE}"]
