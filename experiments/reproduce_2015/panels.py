"""One panel of a figure: our curves, and the authors' numbers as circles on them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.common import figures

CIRCLES = {"linestyle": "none", "color": "0.35", "marker": "o", "mfc": "none", "ms": 4}


def panel(
    axes: Any, curves: Mapping[str, Any], theirs: Any, words: tuple[str, str, str], every: int = 1
) -> None:
    """Draw curves by name against their index, and every so many of the authors' numbers.

    axes: to draw in.
    curves: ours, by the name in the legend.
    theirs: the authors' numbers for one of the curves, of which as many are drawn as ours has.
    words: the title, and the labels of both axes with their units.
    every: how many of their numbers there are to a circle.
    """
    figures.lines(axes, curves)
    theirs = np.asarray(theirs)[: max(map(len, curves.values()))]
    axes.plot(theirs, **CIRCLES, markevery=every, label="authors, 2015")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    axes.set(title=words[0], xlabel=words[1], ylabel=words[2])
