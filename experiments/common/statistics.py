"""Standard errors, differences on the same seeds, and searches over grids of constants."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Hypers = dict[str, float]

# Where a grid goes on beyond its ends.
LADDER = tuple(float(f"{digit}e{power}") for power in range(-5, 8) for digit in (1, 3))


# ---- means and their errors


def standard_error(x: Any) -> Any:
    """Of the mean over the first axis of independent numbers, of which there are two or more.

    >>> float(standard_error([1.0, 2.0, 3.0, 4.0]))
    0.6454972243679028
    """
    return np.std(x, axis=0, ddof=1) / np.sqrt(len(x))


def plus_minus(mean: Any, error: Any, spec: str = ".2f") -> str:
    """A mean and its error in words; a sign that is asked for is that of the mean.

    >>> plus_minus(0.5, 0.01, "+.3f")
    '+0.500 ± 0.010'
    """
    return f"{mean:{spec}} ± {error:{spec.lstrip('+')}}"


class Difference(NamedTuple):
    """The mean of differences, and its standard error."""

    mean: float
    standard_error: float

    def sign(self, errors: float = 2.0) -> int:
        """1 or -1 where it is larger than so many standard errors, else 0."""
        return int(np.sign(self.mean)) if abs(self.mean) > errors * self.standard_error else 0

    def __str__(self) -> str:
        return plus_minus(self.mean, self.standard_error, "+.4f")


def paired(ours: Any, theirs: Any) -> Difference:
    """Ours less theirs, ``(n,)`` each, on the same seeds."""
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return Difference(float(difference.mean()), float(standard_error(difference)))


# ---- grids


def grid(**values: Sequence[float]) -> list[Hypers]:
    """All combinations.

    >>> grid(rate=(1, 2), momentum=(0.5,))
    [{'rate': 1, 'momentum': 0.5}, {'rate': 2, 'momentum': 0.5}]
    """
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def ranked(tried: Sequence[Any], loss: Callable[[Any], Any]) -> list[Any]:
    """Those tried, best first, and last what diverges: NaN counts as infinite."""
    return sorted(tried, key=lambda one: float(np.nan_to_num(float(loss(one)), nan=np.inf)))


def edges(chosen: Mapping[str, float], tried: Sequence[Mapping[str, float]]) -> list[str]:
    """The hyperparameters whose chosen value is the least or largest of those tried."""
    values = {name: [hypers[name] for hypers in tried] for name in chosen}
    return [name for name, value in chosen.items() if value in (min(values[name]), max(values[name]))]


class Widened(NamedTuple):
    """The best point of a grid that has grown, the grid by axis, and whether the point is inside."""

    best: tuple[float, ...]
    axes: list[tuple[float, ...]]
    inside: bool


def widening(
    axes: Sequence[tuple[float, ...]],
    loss: Callable[[tuple[float, ...]], float],
    stable: Callable[[tuple[float, ...]], bool],
    times: int,
) -> Widened:
    """The best stable point of a grid that grows along `LADDER` while the best is at its edge.

    Args:
      axes: the values on every axis, neighbours on the ladder.
      loss: of a point; asked again and again, so that it should remember.
      stable: whether a point may be chosen; where none may, it is the one with the least loss.
      times: how often the grid may grow.
    """
    axes = list(axes)
    for widened in range(times + 1):
        order = sorted(itertools.product(*axes), key=loss)
        best = next(filter(stable, order), order[0])
        wider = [_beyond(values, k, best, loss) for k, values in enumerate(axes)]
        if wider == axes or widened == times:
            break
        axes = wider
    return Widened(best, axes, wider == axes)


def _beyond(
    values: tuple[float, ...], axis: int, best: tuple[float, ...], loss: Callable[..., float]
) -> tuple[float, ...]:
    """The values of an axis, and one more if the best is the last and better than the one before.

    An axis of one value is held.
    """
    for end, step in ((0, -1), (-1, 1)) if len(values) > 1 else ():
        other = (*best[:axis], values[end - step], *best[axis + 1 :])
        if best[axis] == values[end] and not loss(best) >= loss(other):
            new = LADDER[LADDER.index(values[end]) + step]
            return (new, *values) if step < 0 else (*values, new)
    return values
