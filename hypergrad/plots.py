"""Pictures of results, as matplotlib figures.

matplotlib is imported when a picture is drawn, and not before; it comes with ``hypergrad-jax[plots]``.
"""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hypergrad._base.checks import is_whole
from hypergrad.distillation import Distilled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 0.9  # inches of the side of an image
MOST_COLUMNS = 10  # of a set whose classes are many
CUT = 1.0  # percent of the numbers at each end of the scale, where the color no longer changes


def images(
    made: Distilled,
    *,
    columns: int | None = None,
    names: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """The images of a distilled set, side by side, in the units of the data.

    Images with three channels are drawn in color, others in gray with a scale beside them.

    Args:
      made: the set, of images ``(n, height, width)`` or ``(n, height, width, channels)`` with 1 or 3
        channels.
      columns: images in a row; by default one for every class, and 10 at most.
      names: what the classes are called, in the order of their labels; by default their numbers.
      limits: the numbers that are drawn black and white (or as no and full color); by default the first and
        last percentile.

    Returns:
      A matplotlib figure; ``figure.savefig(path)`` writes it, and a notebook shows it.

    Raises:
      ValueError: the set holds no images, or an argument does not fit it.
      ImportError: matplotlib is not installed.

    >>> import numpy as np, hypergrad as hg
    >>> pixels = np.random.default_rng(0).uniform(size=(4, 8, 8, 3))
    >>> made = hg.Distilled(pixels, np.arange(4), np.zeros(3), np.ones(3), hg.Recipe())
    >>> figure = hg.plots.images(made, names=["ship", "car", "cat", "dog"])
    >>> len(figure.axes)
    4
    """
    pixels, labels = np.asarray(made.images, np.float64), np.asarray(made.labels)
    call = f"plots.images(made, columns={columns!r}, names={tuple(names)!r}, limits={limits!r})"
    hard = labels.argmax(1) if labels.ndim == 2 else labels
    classes = labels.shape[1] if labels.ndim == 2 else int(hard.max()) + 1
    _refuse(call, pixels.shape, classes, columns, names, limits)
    low, high = np.percentile(pixels, (CUT, 100 - CUT)) if limits is None else limits
    high = high if high > low else low + 1  # of a set of one number
    across = min(classes, MOST_COLUMNS) if columns is None else columns
    down = -(-len(pixels) // across)
    color = pixels.ndim == 4 and pixels.shape[3] == 3
    figure, axes = _figure(call, down, across, room=0.0 if color else 0.8)
    drawn: Any = None
    for place, image, label in zip(axes.flat, pixels, hard):
        shown = np.clip((image - low) / (high - low), 0, 1) if color else image.reshape(image.shape[:2])
        drawn = place.imshow(shown, cmap="gray", vmin=None if color else low, vmax=None if color else high)
        place.set_title(names[label] if names else str(label), fontsize="small")
    for place in axes.flat:
        place.set_axis_off()
    if not color:
        figure.colorbar(drawn, ax=axes, label="value of a pixel", extend="both")
    return figure


def _figure(call: str, rows: int, columns: int, room: float) -> tuple["Figure", Any]:
    """An empty figure for a grid of images, with room in inches on the right, and its axes."""
    try:
        matplotlib = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            f"{call}: matplotlib, which draws it, is not installed; pip install 'hypergrad-jax[plots]'"
        ) from error
    size = (max(SIDE * columns, 2.0) + room, (SIDE + 0.25) * rows)
    made = matplotlib.Figure(figsize=size, layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def _refuse(
    call: str,
    shape: tuple[int, ...],
    classes: int,
    columns: int | None,
    names: Sequence[str],
    limits: tuple[float, float] | None,
) -> None:
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise ValueError(
            f"{call}: the set holds {list(shape)}, which are no gray or color images; those are (n, "
            "height, width) or (n, height, width, 1 or 3). For a table look at made.images"
        )
    if columns is not None and not is_whole(columns):
        raise ValueError(f"{call}: columns must be a whole number, at least 1")
    if names and len(names) != classes:
        raise ValueError(f"{call}: there are {len(names)} names and {classes} classes; pass one for each")
    if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
        raise ValueError(f"{call}: limits must be two numbers, the lower first")
