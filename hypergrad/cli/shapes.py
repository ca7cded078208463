"""The shapes of schedules that can be learned, and for which parameters each holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import schedules
from hypergrad._base.trees import PyTree
from hypergrad.cli.refusals import RefusedError
from hypergrad.cli.settings import check_choice

BY = ("all", "layer", "leaf")
KINDS = ("per-step", "knots:10", "warmup-cosine")


class Shape(NamedTuple):
    """A shape of schedules.

    Attributes:
      words: in words.
      begin: from a number to a schedule that begins there.
    """

    words: str
    begin: Callable[[float], Any]


def shape_of(given: str, steps: int) -> Shape:
    """The shape that the command line names.

    Args:
      given: ``per-step``, ``knots:K`` or ``warmup-cosine``.
      steps: T.

    Raises:
      RefusedError: it is none of these, or has more numbers than the run has steps.

    >>> shape_of("knots:3", 5).begin(0.5).positions.tolist()
    [0.0, 2.0, 4.0]
    """
    if given == "per-step":
        return Shape("one value for each step", lambda value: jnp.full(steps, value))
    if given == "warmup-cosine":
        if steps < 4:
            raise RefusedError(
                f"--shape warmup-cosine: a run of {steps} steps is too short; take 4 steps or more"
            )
        return Shape("linear warm-up, then half a cosine", lambda value: _warmup_cosine(value, steps))
    kind, _, count = given.partition(":")
    if kind != "knots":
        check_choice("--shape", given, KINDS)
    if not (count.isdecimal() and 2 <= int(count) <= steps):
        raise RefusedError(
            f"--shape {given}: give a number of knots between 2 and {steps}, the number of steps, such as "
            f"knots:{min(10, steps)}"
        )
    positions = jnp.linspace(0.0, steps - 1.0, int(count))
    # Not flat, where the positions of the knots would have no derivative.
    falling = jnp.linspace(1.0, 0.99, int(count))
    return Shape(
        f"straight lines between {count} knots",
        lambda value: schedules.PiecewiseLinear(positions, value * falling),
    )


def _warmup_cosine(peak: float, steps: int) -> schedules.WarmupCosine:
    """A tenth of the run to warm up from a tenth of the peak, and down to a hundredth of it."""
    numbers = (0.1 * peak, peak, 0.1 * steps, float(steps), 0.01 * peak)
    return schedules.WarmupCosine(*map(jnp.asarray, numbers))


def spread(by: str, schedule: Any, params: PyTree) -> PyTree:
    """The schedule for all parameters, or one for each layer or leaf.

    Args:
      by: ``all``, ``layer`` or ``leaf``.
      schedule: that all begin as.
      params: parameters, or their shapes.

    Raises:
      RefusedError: there are no layers.
    """
    check_choice("--by", by, BY)
    if by == "all":
        return schedule
    if jax.tree_util.all_leaves([params]):
        raise RefusedError(f"--by {by}: the parameters are one array; use --by all")
    end = (lambda node: node is not params) if by == "layer" else None

    def part(node: PyTree) -> Any:
        return schedule if jax.tree.leaves(node) else None  # of a module, what is static has none

    return jax.tree.map(part, params, is_leaf=end)
