"""Our numbers beside the authors', to the six digits that their files carry."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.reproduce_2015.authors import Arrays

# Half a unit in the sixth digit is what rounding did to the authors' numbers.  Beyond it, this much of an
# array's largest number is granted for the last bits of float64, in which sums in another order differ.
# Fifty steps of Adam, which divides by small numbers, take up half of it; all else stays below 1e-12.
DIGITS = 6
FLOOR = 1e-9


class Comparison(NamedTuple):
    """Our numbers beside the authors'.

    array: its name, with the region where only a part is meant.
    numbers: how many.
    difference: the largest absolute one.
    relative: that over the largest of the authors' numbers, or each over its own.
    beyond: the largest part of a difference that their rounding does not explain, over the same.
    agreeing: the share of numbers that are ours rounded to six digits, with nothing granted.
    agrees: the verdict; None where none is due.
    """

    array: str
    numbers: int
    difference: float
    relative: float
    beyond: float
    agreeing: float
    agrees: bool | None


def rounding(theirs: np.ndarray) -> np.ndarray:
    """Half a unit in the last of six significant digits of every number: what rounding may have done."""
    exponents = [int(f"{abs(x):e}".split("e")[1]) if np.isfinite(x) else 0 for x in theirs.ravel()]
    halves = 0.5 * 10.0 ** (np.array(exponents) - (DIGITS - 1.0))
    return np.where(theirs == 0, 0.0, halves.reshape(theirs.shape))


def compare(name: str, ours: Any, theirs: Any, apart: bool = False, granted: Any = None) -> Comparison:
    """Compare number by number.

    name: of the array.
    ours: an array, or only the beginning of one along any axis.
    theirs: the authors'.
    apart: whether every number is measured by itself and not by the largest of its array.
    granted: differences beyond their rounding that still agree; by default `FLOOR` of the measure.
    """
    theirs, ours = (np.atleast_1d(np.asarray(x, np.float64)) for x in (theirs, ours))
    theirs = theirs[tuple(map(slice, ours.shape))]
    difference = np.abs(ours - theirs)
    scale = np.abs(theirs) if apart else np.max(np.abs(theirs))
    beyond = np.maximum(difference - rounding(theirs), 0)
    beyond = np.where(np.isnan(beyond), np.inf, beyond)  # a NaN agrees with nothing
    agrees = bool(np.all(beyond <= (FLOOR * scale if granted is None else granted)))
    largest = [float(np.max(x)) for x in (difference, difference / scale, beyond / scale)]
    return Comparison(name, theirs.size, *largest, float(np.mean(beyond == 0)), agrees)


def compare_all(ours: Arrays, theirs: Mapping[str, np.ndarray]) -> list[Comparison]:
    """Compare every array that the authors saved."""
    return [compare(name, ours[name], theirs[name]) for name in theirs if name in ours]


HEADER = ("array", "numbers", "difference", "of scale", "beyond rounding", "six digits", "agrees")


def table(comparisons: Mapping[str, Sequence[Comparison]]) -> str:
    """The comparisons in words and numbers."""
    lines = [f"{HEADER[0]:46}" + "".join(f"{x:>16}" for x in HEADER[1:])]
    for name, rows in comparisons.items():
        lines.append(name)
        for row in rows:
            verdict = {True: "yes", False: "NO", None: "not asked"}[row.agrees]
            numbers = "".join(f"{x:16.1e}" for x in (row.difference, row.relative, row.beyond))
            lines.append(f"  {row.array:44}{row.numbers:16d}{numbers}{row.agreeing:16.1%}{verdict:>16}")
    return "\n".join(lines)
