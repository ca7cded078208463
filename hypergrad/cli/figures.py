"""The figure of a run; the only module that draws, and only if matplotlib is there."""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad import files, schedules
from hypergrad._base.trees import PyTree
from hypergrad.cli.trials import Judged
from hypergrad.cli.wording import parts_of
from hypergrad.distillation.distilled import Distilled

FIGURE = "figure.png"
# Paul Tol's high-contrast colors and black, told apart in gray too; dashes beside them.
COLORS, DASHES = ("#004488", "#BB5566", "#DDAA33", "#000000"), ("-", "--", "-.", ":")
MOST = 8  # curves in one plot
NO_FIGURE = "no figure, because matplotlib is not installed: pip install matplotlib"


def draw(
    folder: Path,
    start: Mapping[str, PyTree],
    hypers: Mapping[str, PyTree],
    rows: Sequence[Mapping[str, Any]],
    before: Judged,
    after: Judged,
) -> list[str]:
    """Draw what was learned, how the score fell, and the training before and after.

    Args:
      folder: of the run.
      start: where those began that were learned, by name.
      hypers: the same, as they are now.
      rows: of the history.
      before: runs with the initial hyperparameters.
      after: runs with those learned.

    Returns:
      What the user is told, if there is no figure.
    """
    if find_spec("matplotlib") is None:
        return [NO_FIGURE]
    steps = len(after.losses)
    figure, (*own, meta, inner) = _figure(len(hypers) + 2)
    for axes, (name, tree) in zip(own, hypers.items()):
        _learned(axes, name, start[name], tree, rows, steps)
    _curves(meta, {"score": [row["loss"] for row in rows]})
    meta.set(title="Learning", xlabel="meta-step", ylabel="score")
    _curves(inner, {"before": before.losses, "with what was learned": after.losses})
    inner.set(title="Training, new seed", xlabel="training step", ylabel="training loss")
    if min(np.min(before.losses), np.min(after.losses)) > 0:
        inner.set_yscale("log")
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
    images = np.asarray(made.images)
    pictured = images.ndim > 2
    figure, axes = _figure(2 + pictured)
    if pictured:
        axes[0].imshow(_mosaic(images, len(np.unique(np.asarray(made.labels)))), cmap="gray")
        axes[0].set(title="Learned examples, a column for each class", xticks=[], yticks=[])
    _curves(axes[-2], {"loss": made.history["loss"]})
    axes[-2].set(title="Learning", xlabel="meta-step", ylabel="loss on real examples")
    looks = np.asarray(made.history.get("validation_error", np.zeros((0, 2))))
    axes[-1].plot(looks[:, 0], 100 * looks[:, 1], color=COLORS[0])
    axes[-1].set(title="Held-out examples", xlabel="meta-step", ylabel="error, %")
    axes[-1].grid(alpha=0.25)
    return _saved(figure, folder)


def _mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """Images side by side, in rows of so many, all stretched to [0, 1] together."""
    low, high = np.min(images), np.max(images)
    scaled = (images - low) / max(high - low, np.finfo(np.float32).tiny)
    framed = np.pad(scaled, [(0, 0), (1, 1), (1, 1), *[(0, 0)] * (images.ndim - 3)], constant_values=1.0)
    rows = [np.concatenate(list(framed[k : k + columns]), 1) for k in range(0, len(framed), columns)]
    return np.concatenate(rows, 0)


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * columns, 3.6), layout="constrained")
    return figure, figure.subplots(1, columns)


def _saved(figure: Any, folder: Path) -> list[str]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    files.replace_file(folder / FIGURE, buffer.getvalue())
    return []


def _learned(
    axes: Any, name: str, start: PyTree, tree: PyTree, rows: Sequence[Mapping[str, Any]], steps: int
) -> None:
    """A learned hyperparameter over the training steps, or over the meta-steps if it is a number."""
    begun, values = (parts_of({name: schedules.values(each, steps)}) for each in (start, tree))
    over_steps = {part: x for part, x in values.items() if np.shape(x) == (steps,)}
    if over_steps:
        shown = dict(list(over_steps.items())[:MOST])
        _curves(axes, {part.removeprefix(f"{name}."): x for part, x in shown.items()})
        axes.plot(np.arange(steps), np.asarray(begun[next(iter(shown))]), color="gray", linewidth=1.0)
        axes.set(title=f"Learned {name}, from the gray start", xlabel="training step", ylabel=name)
        if min(np.min(x) for x in shown.values()) > 0:
            axes.set_yscale("log")
    else:
        told = {row["step"]: row["hypers"][name] for row in rows if "hypers" in row}
        means = [x["mean"] if isinstance(x, Mapping) else x for x in told.values()]
        axes.plot(list(told), means, color=COLORS[0], linewidth=1.4)
        axes.grid(alpha=0.25)
        axes.set(title=f"Learned {name}", xlabel="meta-step", ylabel=name)


def _curves(axes: Any, curves: Mapping[str, Any]) -> None:
    for k, (name, values) in enumerate(curves.items()):
        style = {"color": COLORS[k % len(COLORS)], "linestyle": DASHES[(k // len(COLORS)) % len(DASHES)]}
        axes.plot(np.arange(len(values)), np.asarray(values), label=name, linewidth=1.4, **style)
    axes.grid(alpha=0.25)
    if len(curves) > 1:
        axes.legend(fontsize="small")
