"""Whether the hypergradient grows exponentially with the number of steps."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hypergrad._base.errors import ReversalError
from hypergrad.check.objective import Leaves, program_of
from hypergrad.check.report import Finding
from hypergrad.check.roughness import Advice


def look_for_chaos(
    call: str,
    at: Callable[[int | None], Callable[[Sequence[Any]], Any]],
    leaves: Leaves,
    steps: Sequence[int] | None,
    last: Leaves | None,
    advise: Callable[[], Advice],
    advance: Callable[[str], None],
) -> Finding:
    """Fits of ``log |g|`` by ``rate T`` and by ``exponent log T``; `last` is ``g`` of the longest run.

    Where the run is chaotic, `advise` says what to do.
    """
    name = "chaos"
    if steps is None:
        meaning = (
            "Pass steps=(25, 50, 100) and an objective(everything, steps), to see how the hypergradient "
            "grows with the length of the run."
        )
        return Finding(name, "not checked", {}, meaning)

    def norm(length: int) -> float:
        try:
            gradient = (
                last if length == steps[-1] else program_of(call, at(length), leaves).gradient(leaves)
            )
        except ReversalError:
            gradient = None
        advance(f"chaos, T = {length}")
        return math.nan if gradient is None else math.sqrt(sum(float(np.sum(g**2)) for g in gradient))

    lengths = [int(length) for length in steps]
    norms = [norm(length) for length in lengths]
    measured: dict[str, Any] = {"steps": lengths, "norms": norms}
    failed = [length for length, x in zip(lengths, norms) if not math.isfinite(x)]
    if failed:
        meaning = f"At T = {failed[0]} the run or its hypergradient diverges. Lower the learning rate."
        return Finding(name, "failed", measured, meaning)
    if min(norms) == 0:
        at_zero = lengths[norms.index(0.0)]
        meaning = f"At T = {at_zero} the hypergradient is zero, so its growth has no measure."
        return Finding(name, "not checked", measured, meaning)

    T, log_norms = np.array(lengths, float), np.log(norms)
    (rate, *_), exponential_misfit, *_ = np.polyfit(T, log_norms, 1, full=True)
    (exponent, *_), power_misfit, *_ = np.polyfit(np.log(T), log_norms, 1, full=True)
    folds = rate * (T[-1] - T[0])
    measured |= {"rate": float(rate), "exponent": float(exponent)}
    span = f"From T = {lengths[0]} to {lengths[-1]} the norm goes from {norms[0]:.2g} to {norms[-1]:.2g}"
    if folds > 3 and (exponent > 4 or np.sum(exponential_misfit) < np.sum(power_misfit)):
        advice = advise()
        measured["sigma"] = advice.sigma
        meaning = (
            f"{span} and doubles every {math.log(2) / rate:.3g} steps: the run is chaotic, and its "
            f"hypergradient true but useless. {advice.words}"
        )
        return Finding(name, "failed", measured, meaning)
    if folds > 1 and exponent > 1.5:
        meaning = f"{span}, like T**{exponent:.2g}: growing. Longer runs may become chaotic; watch them."
        return Finding(name, "warning", measured, meaning)
    return Finding(name, "ok", measured, f"{span}, like T**{exponent:.2g}: stable.")
