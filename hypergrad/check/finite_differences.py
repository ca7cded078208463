"""The hypergradient against central differences of the objective, in random directions."""

import math
from collections.abc import Callable

import jax.extend.core
import numpy as np

from hypergrad.check.objective import (
    Point,
    Slope,
    cosine_of,
    fraction,
    listed,
    machine_epsilon,
    random_signs,
    slope_along,
)
from hypergrad.check.report import Finding


def compare_with_differences(
    point: Point,
    noise: float,
    directions: int,
    tolerance: float | None,
    key: jax.Array,
    advance: Callable[[str], None],
) -> Finding:
    """Compare slopes along random directions with central differences; each of them advances a bar."""
    name = "finite differences"
    broken = [n for n, g in zip(point.names, point.gradient) if not np.all(np.isfinite(g))]
    if broken or not math.isfinite(point.start):
        what = f"hypergradient in {listed(broken)}" if broken else "objective"
        return Finding(name, "failed", {"not_finite": broken}, f"The {what} is NaN or infinite.")
    again = point.program.value(point.leaves)
    if again != point.start:
        meaning = (
            f"Cannot tell: the objective is {point.start:.8g}, and {again:.8g} when it is evaluated again. "
            "Fix its random keys and make it a pure function."
        )
        return Finding(name, "warning", {"values": [point.start, again]}, meaning)
    epsilon = machine_epsilon(point.program.dtype, *(x.dtype for x in point.leaves))
    tolerance = epsilon**0.25 if tolerance is None else tolerance
    slopes: dict[str, list[Slope]] = {}
    for k, leaf in enumerate(point.names):
        moves = [random_signs(point, jax.random.fold_in(key, 1 + i), k) for i in range(directions)]
        slopes[leaf] = []
        for move in moves:
            slopes[leaf].append(slope_along(point, move, noise, tolerance))
            advance(f"finite differences in {leaf}")

    return _judged(slopes, tolerance, noise, epsilon)


def _judged(slopes: dict[str, list[Slope]], tolerance: float, noise: float, epsilon: float) -> Finding:
    """The finding from slopes along random directions in every leaf."""
    name = "finite differences"
    zero = [n for n, each in slopes.items() if all(s.zero for s in each)]
    clear = [n for n, e in slopes.items() if all(s.agrees(tolerance) or s.disagrees(tolerance) for s in e)]
    clear = [*dict.fromkeys(zero + clear)]
    suspect = [n for n, each in slopes.items() if any(s.disagrees(tolerance) for s in each)]
    wrong = [n for n in suspect if n in clear]
    unclear = [n for n in slopes if n not in clear]
    errors = {n: max(fraction(abs(s.error), s.scale) for s in each) for n, each in slopes.items()}
    bounds = {n: max(fraction(s.uncertainty, s.scale) for s in each) for n, each in slopes.items()}
    # An unclear slope does no harm if it is, and can only be, a small part of the hypergradient.
    total = np.linalg.norm([each[0].typical for each in slopes.values()])
    rest = np.linalg.norm([max(max(s.scale, s.uncertainty) for s in slopes[n]) for n in unclear])
    share = fraction(float(rest), float(total))
    # But a slope that is large enough to be visible and still not resolved is a part that nothing confirms.
    unconfirmed = [n for n in unclear if all(s.visible for s in slopes[n])]
    pairs = np.array([(s.expected, s.expected + s.error) for each in slopes.values() for s in each])
    cosine = cosine_of(*pairs[np.isfinite(pairs[:, 1])].T)
    measured = {
        "relative_error": errors,
        "uncertainty": bounds,
        "cosine": cosine,
        "tolerance": tolerance,
        "noise": noise,
        "unclear": unclear,
        "unclear_share": share,
        "zero": zero,
        "unconfirmed": unconfirmed,
    }
    if wrong:
        worst = max(wrong, key=errors.__getitem__)
        return Finding(name, "failed", measured, _disagrees(worst, errors[worst], bounds[worst], cosine))
    if share > 0.1 or suspect or unconfirmed:
        worst = max(unconfirmed or unclear, key=bounds.__getitem__)
        return Finding(name, "warning", measured, _cannot_tell(worst, bounds[worst], epsilon))
    if len(zero) == len(slopes):
        meaning = "The hypergradient is 0, and so are differences: the objective is constant here."
        return Finding(name, "ok", measured, meaning)
    worst = max((n for n in clear if n not in zero), key=errors.__getitem__)
    meaning = (
        f"Agrees with finite differences: relative error at most {errors[worst]:.1e}, in {worst}, resolved "
        f"to {bounds[worst]:.1e}; cosine {cosine:.6f}."
    )
    if zero:
        meaning += f" Zero, like the differences: {listed(zero)}."
    if unclear:
        meaning += f" Too small to resolve: {listed(unclear)}, at most {share:.1%} of the hypergradient."
    return Finding(name, "ok", measured, meaning)


def _disagrees(leaf: str, error: float, bound: float, cosine: float) -> str:
    return (
        f"Disagrees with finite differences by {error:.2g} in {leaf}, relative to its typical "
        f"slope, where those are certain to {bound:.1g}; cosine over all {cosine:.4f}. "
        "Something on the way has a wrong derivative (a custom rule, a stop_gradient), or none here."
    )


def _cannot_tell(leaf: str, bound: float, epsilon: float) -> str:
    way_out = (
        "Shorten or calm the run."
        if epsilon < 1e-15
        else "Call the check within `with jax.enable_x64(True):`, on float64 arrays throughout."
    )
    return (
        "Cannot tell: in this precision the objective is too rough or noisy, or the hypergradient too "
        f"small. Differences resolve the slope in {leaf} to {bound:.2g} of it only. {way_out}"
    )
