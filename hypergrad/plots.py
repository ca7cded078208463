"""Figures for people: labelled, readable in grey.  The only module that imports matplotlib."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np

from hypergrad.files import replace_file

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1)))
GREYS = ("0.0", "0.35", "0.55", "0.7")


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


def lines(axes: matplotlib.axes.Axes, curves: Mapping[str, Any], **style: Any) -> None:
    """One line per curve against its index, told apart by dashes and shade and not by colour alone.

    Args:
      axes: to draw in.
      curves: by the name in the legend, ``(T,)`` values.
      style: passed to matplotlib's ``plot``.
    """
    for k, (name, values) in enumerate(curves.items()):
        look = {"linestyle": LINES[k % len(LINES)], "color": GREYS[k % len(GREYS)], "linewidth": 1.4}
        axes.plot(np.arange(len(values)), np.asarray(values), label=name, **(look | style))
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")


def save(made: matplotlib.figure.Figure, path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write a figure as PNG and, beside it, the JSON of what made it; each atomically.

    Args:
      made: the figure.
      path: of the PNG; the JSON has the suffix ``.json`` instead.
      record: configuration, seed, results: anything JSON can hold; versions are added.
    """
    from hypergrad import __version__

    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=130)
    versions = {"hypergrad": __version__, "jax": jax.__version__, "numpy": np.__version__}
    text = json.dumps(dict(record) | {"versions": versions}, indent=1) + "\n"
    replace_file(path, buffer.getvalue())
    replace_file(Path(path).with_suffix(".json"), text.encode())
