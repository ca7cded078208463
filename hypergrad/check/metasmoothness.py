"""Whether objective and hypergradient are smooth along the direction of descent."""

import math
from typing import Any

import numpy as np

from hypergrad.check.objective import FAILURES, Point, cosine_of
from hypergrad.check.report import Finding


def metasmoothness(point: Point, noise: float, step: float) -> Finding:
    """Objective and hypergradient along ``z - s step d sign(g)``, ``0 <= s <= 1``."""
    name = "metasmoothness"
    move = {k: -step * np.sign(g) for k, g in enumerate(point.gradient)}
    end = point.moved(move, 1.0)
    predicted = point.linear(point.gradient, end)
    if not math.isfinite(predicted) or predicted == 0:
        return Finding(name, "not checked", {}, "The hypergradient gives no direction to go in.")
    size = f"A meta-step of {step:g} of every number's size"
    fractions = [0.25, 0.5, 0.75, 1.0]
    changes = [point.program.value(point.moved(move, s)) - point.start for s in fractions]
    measured: dict[str, Any] = {"predicted": predicted, "fractions": fractions, "changes": changes}
    try:
        middle, last = (point.program.gradient(point.moved(move, s)) for s in (0.5, 1.0))
    except FAILURES as error:
        return Finding(name, "warning", measured, f"{size} leads to where the run fails: {error}")
    slopes = [point.linear(g, end) for g in (point.gradient, middle, last)]
    measured["slopes"] = slopes
    if not np.all(np.isfinite([*changes, *slopes])):
        meaning = (
            f"{size} leads to where the objective or its hypergradient is NaN or infinite. Shorten it."
        )
        return Finding(name, "warning", measured, meaning)

    before, after = (
        np.concatenate([np.ravel(g * d) for g, d in zip(gradient, point.sizes)])
        for gradient in (point.gradient, last)
    )
    same, weights = np.sign(before) * np.sign(after), np.abs(before) + np.abs(after)
    length2 = sum(float(np.sum((d * move[k]) ** 2)) for k, d in enumerate(point.sizes))
    cosine, smooth = cosine_of(before, after), float(np.sum(weights * same) / np.sum(weights))
    measured |= {
        "cosine": cosine,
        "same_signs": float(np.mean(same[weights > 0] > 0)),
        "metasmoothness": smooth,
        "curvature": abs(changes[3] - 2 * changes[1]) / (length2 / 4),
    }
    actual, added = changes[-1], (slopes[0] + 4 * slopes[1] + slopes[2]) / 6  # Simpson: exact for cubics
    followed = (
        f"{size} changes the objective by {actual:.2g}; {predicted:.2g} was predicted. Hypergradients "
        f"before and after it have a cosine of {cosine:.2f} and agree in sign by {smooth:.2f} (1 is all)."
    )
    if 3 * noise > 0.1 * abs(predicted):
        meaning = f"{size} changes the objective by little more than rounding does. Pass a larger step."
        return Finding(name, "warning", measured, meaning)
    if abs(actual - added) > 0.1 * max(map(abs, slopes)) + 3 * noise:
        meaning = (
            f"{followed} Hypergradients on the way add up to {added:.2g}: the objective is rough, and they "
            "do not describe a step of this length. Shorten it, or make training smoother (lower rates, "
            "wider nets)."
        )
        return Finding(name, "failed", measured, meaning)
    if abs(actual - predicted) > 0.25 * abs(predicted):
        meaning = f"{followed} Smooth, but curved over this step: shorten it."
        return Finding(name, "warning", measured, meaning)
    return Finding(name, "ok", measured, followed)
