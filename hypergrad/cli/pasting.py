"""What was learned, as text to paste where it is used."""

from collections.abc import Mapping
from pathlib import Path

from hypergrad import exports, files
from hypergrad._base.trees import PyTree
from hypergrad.program import AnyOptimizer

JSON, OPTAX, TORCH = "learned.json", "paste_optax.py", "paste_torch.py"
USE = "paste_use.py"
_USE = """import hypergrad as hg

made = hg.load_distilled({path!r})
params = made.train(network, key)  # network = (init, apply): a new one, trained by the recipe of the set
outputs = network[1](params, made.normalised(new_examples))

# Without this library, plain arrays:
import numpy as np

with np.load({path!r}) as arrays:
    examples, labels = (arrays["images"] - arrays["mean"]) / arrays["std"], arrays["labels"]
"""


def write_pastes(
    folder: Path, optimizer: AnyOptimizer, hypers: Mapping[str, PyTree], steps: int, params: PyTree
) -> list[str]:
    """Write the learned hyperparameters for optax, for PyTorch and as JSON, each where it is possible.

    Args:
      folder: of the run.
      optimizer: that they belong to.
      hypers: by name.
      steps: T.
      params: shapes of the parameters.

    Returns:
      What the user is told about them.
    """
    makers = {
        JSON: ("plain numbers", exports.as_json),
        OPTAX: ("to paste with optax", exports.optax_code),
        TORCH: ("to paste with PyTorch", exports.torch_code),
    }
    told = []
    for name, (what, make) in makers.items():
        try:
            text = make(optimizer, hypers, steps, params)
        except ValueError as error:
            told.append(f"{what}: none, {str(error).partition('): ')[2] or error}")
            continue
        files.replace_file(folder / name, text.encode())
        told.append(f"{what}: {folder / name}")
    return told


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
