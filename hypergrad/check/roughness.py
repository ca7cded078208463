"""Above which scale an objective is smooth: what noise `hypergrad.smoothed` needs to help."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hypergrad._base.trees import PyTree
from hypergrad.check.objective import Point

SCALES = tuple(2.0**-k for k in range(12))  # of the noise, relative to the size of every array
DIRECTIONS = 16
COHERENT = 0.8  # cosine between changes at one scale and at half of it, 1 for a linear function


class Advice(NamedTuple):
    """What to do about a chaotic run.

    Attributes:
      sigma: a tree like what is differentiated; None if no noise helps.
      words: for the report.
    """

    sigma: PyTree
    words: str


def advise(point: Point, merge: Callable[[Sequence[Any]], PyTree], key: jax.Array) -> Advice:
    """Names the least noise that smooths the objective, if there is one.

    Args:
      point: where the objective is, and what it is a function of.
      merge: makes a tree like the user's of one entry for every leaf.
      key: of the directions.
    """
    scale, always = smooth_above(point, key)
    if scale is None:
        return Advice(
            None,
            "Lower the learning rate, or shorten the run: noise, as of hg.smoothed, does not help, because "
            f"the objective stays rough in moves of up to {SCALES[0]:.0%} of every array's size.",
        )
    sigma = merge([float(f"{scale * _size(x):.2g}") for x in point.leaves])
    told = repr(sigma)
    told = told if _literal(sigma) and len(told) <= 60 else "report.chaos.numbers['sigma']"
    start = (
        "The objective itself is smooth at all scales that were tried, and noise makes it calmer"
        if always
        else f"But in moves of {scale:.2g} of every array's size and more the objective is smooth"
    )
    return Advice(
        sigma,
        f"{start}: differentiate hg.smoothed(objective, sigma={told}, pairs=16) in place of it. Or lower "
        "the learning rate, or shorten the run.",
    )


def smooth_above(point: Point, key: jax.Array) -> tuple[float | None, bool]:
    """The least scale of moves above which the objective is smooth, and whether it is so at all of them.

    With random ``u``, ``c(s) = (f(z + s d u) - f(z - s d u)) / 2`` is twice as large as ``c(s/2)`` if the
    objective is linear at this scale, and has nothing to do with it if ripples shorter than ``s`` decide.
    From the largest scale for which the two agree, scales are halved until they do not.  Scales at which
    the objective is not defined are left out.
    """
    by_array = point._replace(sizes=[np.asarray(_size(x)) for x in point.leaves])
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    moves = [
        {k: rng.standard_normal(x.shape) for k, x in enumerate(point.leaves)} for _ in range(DIRECTIONS)
    ]

    def changes(s: float) -> np.ndarray:
        pairs = [(by_array.moved(move, s), by_array.moved(move, -s)) for move in moves]
        return np.array([point.program.value(a) - point.program.value(b) for a, b in pairs]) / 2

    found, rough = None, False
    coarse = changes(SCALES[0])
    for s, half in itertools.pairwise(SCALES):
        fine = changes(half)
        length = float(np.linalg.norm(coarse) * np.linalg.norm(fine))
        if math.isfinite(length):
            agree = length > 0 and float(coarse @ fine) >= COHERENT * length
            if found is not None and not agree:
                return found, False
            rough |= not agree
            found = s if agree else found
        coarse = fine
    # Scales so small that one ripple looks smooth are of no use, if there are rough ones above them.
    return (None, False) if rough else (found, found is not None)


def _size(x: np.ndarray) -> float:
    """Root mean square of an array; 1 for zeros."""
    return math.sqrt(float(np.mean(x.astype(np.float64) ** 2))) or 1.0


def _literal(tree: PyTree) -> bool:
    """Whether a tree reads as Python that makes it again."""
    if isinstance(tree, dict):
        return all(isinstance(k, str) and _literal(x) for k, x in tree.items())
    if type(tree) in (list, tuple):
        return all(map(_literal, tree))
    return isinstance(tree, float)
