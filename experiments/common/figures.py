"""Figures for people: labelled, in colours that the colour-blind tell apart and that also read in grey.

The only module of the experiments that imports matplotlib.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np

from experiments.common import records
from hypergrad.files import replace_file

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1)))
# Paul Tol's high-contrast colours and black; their lightness in CIELAB is 0, 29, 50 and 73.
COLOURS = ("#000000", "#004488", "#BB5566", "#DDAA33")


def figure(rows: int = 1, columns: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Any, Any]:
    """An empty figure and its axes, a ``(rows, columns)`` array.

    Args:
      rows: of axes.
      columns: of axes.
      width: of one axes, in inches.
      height: of one axes, in inches.
    """
    made = matplotlib.figure.Figure(figsize=(width * columns, height * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def look(k: int, **more: Any) -> dict[str, Any]:
    """How the ``k``-th curve is drawn: dashes and colour, and what is given more."""
    return {"linestyle": LINES[k % len(LINES)], "color": COLOURS[k % len(COLOURS)]} | more


def shades(count: int) -> Any:
    """So many colours from dark to light, for more curves than `look` tells apart."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.85, count))


def lines(axes: matplotlib.axes.Axes, curves: Mapping[str, Any], **style: Any) -> None:
    """One line per curve against its index, told apart by dashes and lightness and not by colour alone.

    Args:
      axes: to draw in.
      curves: by the name in the legend, ``(T,)`` values.
      style: passed to matplotlib's ``plot``.
    """
    for k, (name, values) in enumerate(curves.items()):
        drawn = look(k, linewidth=1.4) | style
        axes.plot(np.arange(len(values)), np.asarray(values), label=name, **drawn)
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")


def images(
    axes: matplotlib.axes.Axes,
    array: Any,
    *,
    columns: int = 10,
    names: Sequence[str] = (),
    limit: float | None = None,
    label: str = "",
) -> None:
    """A grid of images in one axes, on one colour scale that is symmetric about 0, with its colour bar.

    Negative numbers are dark and blue, 0 is grey, positive numbers are light and yellow.

    Args:
      axes: to draw in.
      array: ``(n, height, width)``, image ``k`` in row ``k // columns`` of the grid.
      columns: of the grid.
      names: one for each column, written below it.
      limit: end of the scale, beyond which the colour no longer changes; by default the largest magnitude.
      label: of the colour bar, with the unit.

    Raises:
      ValueError: where the array is no stack of images, or has nothing but zeros in it.

    >>> made, axes = figure()
    >>> images(axes[0, 0], np.linspace(-1, 1, 24).reshape(6, 2, 2), columns=3, names="abc")
    >>> axes[0, 0].get_images()[0].get_array().shape  # 2 rows of 3 images, apart by a pixel
    (5, 8)
    """
    array = np.asarray(array, np.float64)
    largest = np.max(np.abs(array), initial=0.0) if limit is None else limit
    if array.ndim != 3 or not 0 < largest < np.inf:
        raise ValueError(
            f"images(axes, array, limit={limit}): the array is {array.shape}, at most {largest} in size; "
            "pass finite images (n, height, width) that are not all 0, or a positive limit"
        )
    _, height, width = np.add(array.shape, (0, 1, 1))  # a pixel between neighbours stays empty
    columns = min(columns, len(array))
    mosaic = np.full((-(-len(array) // columns) * height - 1, columns * width - 1), np.nan)
    for k, image in enumerate(array):
        top, left = k // columns * height, k % columns * width
        mosaic[top : top + height - 1, left : left + width - 1] = image
    drawn = axes.imshow(mosaic, cmap="cividis", vmin=-largest, vmax=largest, interpolation="nearest")
    axes.set_xticks([width * k + width / 2 - 1 for k in range(len(names))], names)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    beyond = "both" if np.any(np.abs(array) > largest) else "neither"
    axes.figure.colorbar(drawn, cax=axes.inset_axes((1.02, 0, 0.02, 1)), label=label, extend=beyond)


def save(made: matplotlib.figure.Figure, path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write a figure as PNG and, beside it, the record of what made it; each atomically.

    Args:
      made: the figure.
      path: of the PNG, in a folder that is made where it is missing; the record has the suffix ``.json``.
      record: configuration, seed, results: anything that `records.plain` makes JSON of; versions are added.
    """
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=130)
    records.write(Path(path).with_suffix(".json"), record)
    replace_file(path, buffer.getvalue())
