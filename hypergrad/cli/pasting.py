"""What was learned, as text to paste where it is used."""

from collections.abc import Mapping
from pathlib import Path

from hypergrad import exports, files
from hypergrad._base.trees import PyTree
from hypergrad.program import AnyOptimizer

JSON, OPTAX, TORCH = "learned.json", "paste_optax.py", "paste_torch.py"


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
