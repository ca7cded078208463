"""The figure of a run; the only module that draws, and only if matplotlib is there."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad import files, schedules
from hypergrad._base.trees import PyTree
from hypergrad.cli.trials import Judged
from hypergrad.cli.wording import parts_of

FIGURE = "figure.png"
# Paul Tol's high-contrast colors and black, told apart in gray too; dashes beside them.
COLORS, DASHES = ("#004488", "#BB5566", "#DDAA33", "#000000"), ("-", "--", "-.", ":")
MOST = 8  # curves in one plot


def draw(
    folder: Path,
    hypers: Mapping[str, PyTree],
    rows: Sequence[Mapping[str, Any]],
    before: Judged,
    after: Judged,
) -> list[str]:
    """Draw what was learned, how the score fell, and the training before and after.

    Args:
      folder: of the run.
      hypers: those that were learned, by name.
      rows: of the history.
      before: runs with the initial hyperparameters.
      after: runs with those learned.

    Returns:
      What the user is told, if there is no figure.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return ["no figure, because matplotlib is not installed: pip install matplotlib"]
    from matplotlib.figure import Figure

    steps = len(after.losses)
    figure = Figure(figsize=(5.0 * (len(hypers) + 2), 3.6), layout="constrained")
    *own, meta, inner = figure.subplots(1, len(hypers) + 2)
    for axes, (name, tree) in zip(own, hypers.items()):
        _learned(axes, name, tree, rows, steps)
    _curves(meta, {"score": [row["loss"] for row in rows]})
    meta.set(title="Learning", xlabel="meta-step", ylabel="score")
    _curves(inner, {"before": before.losses, "with what was learned": after.losses})
    inner.set(title="Training, new seed", xlabel="training step", ylabel="training loss")
    if min(np.min(before.losses), np.min(after.losses)) > 0:
        inner.set_yscale("log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    files.replace_file(folder / FIGURE, buffer.getvalue())
    return []


def _learned(axes: Any, name: str, tree: PyTree, rows: Sequence[Mapping[str, Any]], steps: int) -> None:
    """A learned hyperparameter over the training steps, or over the meta-steps if it is a number."""
    values = parts_of({name: schedules.values(tree, steps)})
    over_steps = {
        part.removeprefix(f"{name} of "): x for part, x in values.items() if np.ndim(x) == 1 and len(x) == steps
    }
    if over_steps:
        _curves(axes, dict(list(over_steps.items())[:MOST]))
        axes.set(title=f"Learned {name}", xlabel="training step", ylabel=name)
    else:
        told = [row["hypers"][name] for row in rows if name in row["hypers"]]
        _curves(axes, {name: [x["mean"] if isinstance(x, Mapping) else x for x in told]})
        axes.set(title=f"Learned {name}", xlabel="meta-step", ylabel=name)


def _curves(axes: Any, curves: Mapping[str, Any]) -> None:
    for k, (name, values) in enumerate(curves.items()):
        style = {"color": COLORS[k % len(COLORS)], "linestyle": DASHES[(k // len(COLORS)) % len(DASHES)]}
        axes.plot(np.arange(len(values)), np.asarray(values), label=name, linewidth=1.4, **style)
    axes.grid(alpha=0.25)
    if len(curves) > 1:
        axes.legend(fontsize="small")
