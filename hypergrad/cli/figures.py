"""The figure of a run, if matplotlib is there."""

import importlib
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypergrad import files, plots, schedules
from hypergrad.cli.trials import Judged
from hypergrad.distillation.distilled import Distilled
from hypergrad.meta.runs import MetaStep
from hypergrad.meta.tuned import Tuned

FIGURE = "figure.png"
WIDTH = 10.0  # inches
NO_FIGURE = "no figure, because matplotlib is not installed: pip install matplotlib"


def draw(
    folder: Path,
    tuned: Tuned,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    before: Judged,
    after: Judged,
) -> list[str]:
    """Draw what was learned, how the score fell, and the training before and after.

    Args:
      folder: of the run.
      tuned: what was learned.
      names: of what was learned.
      rows: of the history.
      before: runs with the initial hyperparameters.
      after: runs with those learned.

    Returns:
      What the user is told, if there is no figure.
    """
    if find_spec("matplotlib") is None:
        return [NO_FIGURE]
    values = schedules.values({name: tuned.hypers[name] for name in names}, tuned.steps)
    over_steps = [name for name in names if any(map(np.ndim, jax.tree.leaves(values[name])))]
    numbers = [name for name in names if name not in over_steps]
    learned = [over_steps] if over_steps else []
    told = [*["trials"] * bool(len(tuned.trials)), "loss", *numbers]
    figure, parts = _parts([*map(_height, learned), _height(told), plots.PANEL[1]])
    for part, shown in zip(parts, learned):
        plots.schedules(tuned, names=shown, part=part)
        part.suptitle("What was learned")
    plots.history(tuned, _path(rows, numbers), part=parts[-2])
    parts[-2].suptitle("Learning")
    plots.losses({"before": before.losses, "with what was learned": after.losses}, part=parts[-1])
    parts[-1].suptitle("Training, from a new seed")
    return _saved(figure, folder)


def draw_distilled(folder: Path, made: Distilled) -> list[str]:
    """Draw a distilled set, if it consists of images, and how its loss and its error fell.

    Args:
      folder: of the run.
      made: the set.

    Returns:
      What the user is told, if there is no figure.
    """
    if find_spec("matplotlib") is None:
        return [NO_FIGURE]
    shape = np.shape(made.images)
    pictured = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    rows = -(-shape[0] // min(plots.MOST_COLUMNS, len(np.unique(made.labels))))
    heights = [(plots.SIDE + 0.25) * rows + 0.5] if pictured else []
    figure, parts = _parts([*heights, plots.PANEL[1]])
    if pictured:
        plots.images(made, part=parts[0])
        parts[0].suptitle("Learned examples")
    plots.history(made, part=parts[-1])
    parts[-1].suptitle("Learning")
    return _saved(figure, folder)


def _height(names: Sequence[str]) -> float:
    """The height of a plot for each name."""
    return plots.PANEL[1] * -(-len(names) // plots.ACROSS)


def _path(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[MetaStep]:
    """The values of numbers at the meta-steps that a history tells of."""
    told = [row for row in rows if names and "hypers" in row]
    return [
        MetaStep(
            row["step"], row["loss"], row["gradient_norm"], {n: _mean(row["hypers"][n]) for n in names}, 0
        )
        for row in told
    ]


def _mean(summary: Any) -> float:
    x = summary["mean"] if isinstance(summary, Mapping) else summary
    return float("nan" if x is None else x)  # JSON has no NaN


def _parts(heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure of parts of some heights, one below the other."""
    size = (WIDTH, sum(heights))
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    return figure, list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)


def _saved(figure: Any, folder: Path) -> list[str]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    files.replace_file(folder / FIGURE, buffer.getvalue())
    return []
