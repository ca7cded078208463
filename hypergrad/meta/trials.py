"""Trial runs before meta-steps, for where to begin: a race of a few constants, or a pattern search."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Shifts = dict[str, float]  # of the raw values, by name
Round = Sequence[tuple[str, float]]  # names with the lengths of their shifts
REACH = {"rate": 2 * math.log(10), "share": 3.5, "other": 3 * math.log(10)}  # of a race, by kind
ROUNDS = ((8, 1 / 2), (24, 1))  # of its runs, one in so many goes on; and with how many of the keys


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


def spread(kinds: Mapping[str, str], count: int) -> list[Shifts]:
    """Shifts that fill the reach of all names evenly, the first of which is none.

    Args:
      kinds: by name "rate", "share" or "other".
      count: how many.

    Source: M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018: multiples of powers
    of the root of ``x^(d+1) = x + 1``, modulo 1.

    >>> [{k: round(x, 2) for k, x in shifts.items()} for shifts in spread({"b1": "share"}, 4)]
    [{}, {'b1': -2.67}, {'b1': 1.65}, {'b1': -1.02}]
    """
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (len(kinds) + 1))
    steps = root ** -np.arange(1.0, len(kinds) + 1)
    places = 2 * ((0.5 + np.arange(1, count)[:, None] * steps) % 1) - 1
    reaches = [REACH[kind] for kind in kinds.values()]
    return [{}, *(dict(zip(kinds, map(float, place * reaches))) for place in places)]


def race(
    score: Callable[[Shifts, int], float], kinds: Mapping[str, str], trials: int, keys: int
) -> tuple[Shifts, list[float]]:
    """Many shifts with one key, the better ones with more, and the best with all; the start with all too.

    Noise makes a search in small steps stop anywhere, and few constants have few places to look at.

    Args:
      score: of shifts and the number of a key; infinite where a run fails.
      kinds: by name "rate", "share" or "other".
      trials: how many times ``keys`` runs it may make, at least 2.
      keys: how many keys there are.

    Returns:
      The shifts with the smallest mean over all keys, none if nothing works; and the mean scores of all
      shifts over the keys they were run with, of which the first is that of the start.

    Source: K. Jamieson, A. Talwalkar, "Non-stochastic best arm identification", 2016, for the halving.

    >>> far = lambda x, key: abs(x.get("a", 0.0) - 2) + abs(x.get("b", 0.0) + 1)
    >>> shifts, scores = race(far, {"a": "rate", "b": "share"}, trials=16, keys=6)
    >>> scores[0], len(scores), far(shifts, 0) < 1
    (3.0, 48, True)
    """
    runs = trials * keys
    places = spread(kinds, max(2, runs // 2))
    found = [[score(place, 0)] for place in places]
    goes_on = list(range(len(places)))
    for share, part in ROUNDS:
        goes_on = sorted(goes_on, key=lambda i: np.mean(found[i]))[: max(1, runs // share)]
        for i in {0, *goes_on}:
            found[i] += [score(places[i], key) for key in range(len(found[i]), math.ceil(part * keys))]
    means = [float(np.mean(x)) for x in found]
    best = min({0, *goes_on}, key=lambda i: means[i])
    return places[best] if math.isfinite(means[best]) else {}, means
