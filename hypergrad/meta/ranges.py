"""In which coordinates hyperparameters and the parameters of schedules are learned."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import schedules
from hypergrad._base.checks import is_function
from hypergrad._base.trees import PyTree
from hypergrad.constraints import Constraint, ascending, interval, positive, real
from hypergrad.schedules import OneCycle, PerStep, PiecewiseLinear, Triangular, WarmupCosine, is_schedule

# A learned factor stays above this, or above half of its start; the buffers have room for that.
SMALLEST_FACTOR = 0.25
SMALLEST_SHARE = 1e-3  # of the largest value of a schedule, in place of its zeros

Domain = tuple[float, float]
Limits = dict[str, Constraint | None]  # by parameter of a schedule


def entered(value: PyTree, steps: int) -> PyTree:
    """A hyperparameter as it is learned: arrays of floats, in schedules of ours or without.

    A function from the step to a value becomes a value for every step.  Its zeros become a thousandth of
    its largest value, because a logarithm has no zero.

    Args:
      value: as for `hypergrad.train`.
      steps: ``T``.

    >>> entered({"a": 0.5, "b": lambda count: 0.25 * count}, 3)["b"].values.tolist()
    [0.0005000000237487257, 0.25, 0.5]
    """
    dtype = jnp.result_type(float)

    def node(x: Any) -> Any:
        if is_function(x):
            x = schedules.values(x, steps)
            return PerStep(jnp.where(x == 0, SMALLEST_SHARE * jnp.max(jnp.abs(x)), x).astype(dtype))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), x)  # of a number, or of a schedule

    return jax.tree.map(node, value, is_leaf=is_schedule)


def lowest(value: PyTree, steps: int) -> float:
    """The lower limit of a factor while it is learned."""
    arrays = jax.tree.leaves(schedules.values(value, steps))
    return min(SMALLEST_FACTOR, 0.5 * min(float(np.min(x)) for x in arrays))


def limits_of(value: PyTree, domain: Domain, least: float, steps: int) -> PyTree:
    """A constraint for every array of a hyperparameter; None where it begins outside and is held.

    Args:
      value: as `entered` returns it.
      domain: of the hyperparameter, ``[low, high)``.
      least: what is learned stays above this, if the domain is an interval.
      steps: ``T``.
    """
    low, high = domain
    end = max(low, least) if math.isfinite(low) and math.isfinite(high) else low

    def limit(x: Any) -> Constraint | None:
        return between(end, high) if np.all((np.asarray(x) > end) & (np.asarray(x) < high)) else None

    def node(x: Any) -> Any:
        if not is_schedule(x):
            return limit(x)
        return type(x)(**_LENGTHS.get(type(x), _no_lengths)(x, steps) | _values(x, limit))

    return jax.tree.map(node, value, is_leaf=is_schedule)


def between(low: float, high: float) -> Constraint:
    """Values above one end and below another, each of which may be infinite."""
    if not math.isfinite(low):
        return real if not math.isfinite(high) else _beyond(high, -1)
    if not math.isfinite(high):
        return positive if low == 0 else _beyond(low, 1)
    return interval(low, high)


def _beyond(end: float, side: int) -> Constraint:
    """Values above an end (side 1) or below it (side -1): ``value = end + side exp(raw)``."""

    def to_constrained(raw: Array) -> Array:
        # Rounding in the sum may land on the end itself.
        nearest = jnp.nextafter(jnp.asarray(end, raw.dtype), jnp.asarray(side * np.inf, raw.dtype))
        value = end + side * positive.to_constrained(raw)
        return jnp.maximum(value, nearest) if side > 0 else jnp.minimum(value, nearest)

    words = f"x > {end:g}" if side > 0 else f"x < {end:g}"
    return Constraint(
        to_constrained, lambda value: jnp.log(side * (value - end)), f"beyond({words})", words
    )


# The parameters of our schedules that are values of the hyperparameter; the others are lengths and shares.
_VALUES = frozenset(["value", "values", "init_value", "peak_value", "end_value", "base_value", "max_value"])


def _values(schedule: Any, limit: Callable[[Any], Constraint | None]) -> Limits:
    return {name: limit(x) for name, x in schedule._asdict().items() if name in _VALUES}


def _inside(low: float, high: float, x: Any) -> Constraint | None:
    """The constraint to an interval; None for a number that is not within it."""
    return between(low, high) if low < float(x) < high else None


def _numbers(*values: Any) -> list[float]:
    return [float(x) for x in values]


def _twice(x: Any, steps: int) -> float:
    return 2 * max(steps, float(x))


def _no_lengths(schedule: Any, steps: int) -> Limits:
    return {}


def _of_piecewise_linear(schedule: PiecewiseLinear, steps: int) -> Limits:
    return {"positions": ascending}


def _of_warmup_cosine(schedule: WarmupCosine, steps: int) -> Limits:
    """What is between the ends of warm-up and decay at the start remains between them."""
    warmup, decay = _numbers(schedule.warmup_steps, schedule.decay_steps)
    middle, end = (warmup + decay) / 2, _twice(decay, steps)
    return {
        "warmup_steps": _inside(0.0, middle, warmup),
        "decay_steps": _inside(middle, end, decay),
    }


def _of_triangular(schedule: Triangular, steps: int) -> Limits:
    return {"cycle_steps": _inside(1.0, _twice(schedule.cycle_steps, steps), schedule.cycle_steps)}


def _of_one_cycle(schedule: OneCycle, steps: int) -> Limits:
    start, final = _numbers(schedule.pct_start, schedule.pct_final)
    middle, infinite = (start + final) / 2, math.inf
    length = schedule.transition_steps
    return {
        "transition_steps": _inside(1.0, _twice(length, steps), length),
        "pct_start": _inside(0.0, middle, start),
        "pct_final": _inside(middle, 1.0, final),
        "div_factor": _inside(0.0, infinite, schedule.div_factor),
        "final_div_factor": _inside(0.0, infinite, schedule.final_div_factor),
    }


_LENGTHS: dict[type, Callable[[Any, int], Limits]] = {
    PiecewiseLinear: _of_piecewise_linear,
    WarmupCosine: _of_warmup_cosine,
    Triangular: _of_triangular,
    OneCycle: _of_one_cycle,
}


def shifted(value: PyTree, limits: PyTree, shift: float) -> PyTree:
    """A hyperparameter whose values, but not lengths, are shifted in their coordinates.

    Args:
      value: as `entered` returns it.
      limits: as `limits_of` returns them.
      shift: of the raw values; ``log 10`` makes a positive number ten times as large.
    """

    def move(x: Any, limit: Constraint | None) -> Any:
        return x if limit is None else limit.to_constrained(limit.to_raw(x) + shift)

    def node(x: Any, limit: Any) -> Any:
        if not is_schedule(x):
            return move(x, limit)
        return x._replace(
            **{name: move(getattr(x, name), getattr(limit, name)) for name in _VALUES & set(x._fields)}
        )

    return jax.tree.map(node, value, limits, is_leaf=is_schedule)
