"""Trial runs before meta-steps: a pattern search for where to begin."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

Shifts = dict[str, float]  # of the raw values, by name
Round = Sequence[tuple[str, float]]  # names with the lengths of their shifts


def rounds_of(kinds: Mapping[str, str]) -> Iterable[Round]:
    """The rounds of a search: learning rates first, to half a decade, and then everything, ever finer.

    Args:
      kinds: by name "rate", "share" or "other".

    >>> rounds = iter(rounds_of({"b1": "share", "learning_rate": "rate"}))
    >>> [next(rounds)[0] for _ in range(2)], next(rounds)[0]
    ([('learning_rate', 2.302585092994046), ('learning_rate', 1.151292546497023)], ('b1', 1.5))
    """
    rates, shares, others = ([k for k in kinds if kinds[k] == x] for x in ("rate", "share", "other"))
    decade, wide = math.log(10), 1.5
    yield [(name, decade) for name in rates]
    yield [(name, decade / 2) for name in rates]
    while shares or rates or others:
        yield [(name, wide) for name in (*shares, *others)] + [(name, decade / 4) for name in rates]
        decade, wide = decade / 2, wide / 2


def pattern_search(
    score: Callable[[Shifts], float], rounds: Iterable[Round], trials: int
) -> tuple[Shifts, list[float]]:
    """Shift one name after the other, up or down, for as long as the score falls.

    Args:
      score: of some shifts; not finite where a run fails.
      rounds: what is shifted, and how far.
      trials: how many scores it may ask for besides that of the start.

    Returns:
      The shifts with the smallest score, none if nothing works, and all scores in order; the first is that
      of the start.

    Source: Hooke and Jeeves, "Direct search solution of numerical and statistical problems", 1961.

    >>> pattern_search(lambda x: (x.get("a", 0.0) - 3) ** 2, [[("a", 2.0)], [("a", 1.0)]], trials=6)
    ({'a': 3.0}, [9.0, 1.0, 1.0, 0.0, 1.0])
    """
    best: Shifts = {}
    scores = [score(best)]
    least = scores[0]

    def walk(name: str, length: float) -> bool:
        """Go on in one direction while that helps, or down while nothing works."""
        nonlocal best, least
        went = False
        while len(scores) <= trials:
            moved = best | {name: best.get(name, 0.0) + length}
            scores.append(score(moved))
            lost = not math.isfinite(least) and length < 0
            if not (scores[-1] < least or lost):
                break
            best, went = moved, True
            least = scores[-1] if math.isfinite(scores[-1]) else least
        return went

    for each in rounds:
        for name, length in each:
            _ = walk(name, length) or walk(name, -length)
        if len(scores) > trials:
            break
    return best if math.isfinite(least) else {}, scores
