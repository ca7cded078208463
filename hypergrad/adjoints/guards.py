"""Watches, along the run, how much rounding takes from what is added to the integers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hypergrad import bundles, exact
from hypergrad._base.compiler import seldom
from hypergrad._base.trees import Flag, Step
from hypergrad.adjoints.integers import LARGEST_LOSS, Exact, Stepped, Totals


class Guards(NamedTuple):
    """How coarse the shifts of a run have been so far.

    Attributes:
      totals: by leaf and variable, and by row, the sum of `exact.coarseness` over the guarded steps.
      faded: by leaf, the part of the parameters that is left since their last guarded shift.
      since: int32, for all totals one after another, the first step at which they were too large; -1 for
        none.
      owner: int32, likewise, in which of the user's leaves, if the leaf is made of several; else -1.
    """

    totals: Totals
    faded: list[Float[Array, ""]]
    since: Int[Array, " totals"]
    owner: Int[Array, " totals"]

    @staticmethod
    def of(totals: Totals) -> "Guards":
        """Guards of a run that has not failed yet."""
        nowhere = jnp.full(len(places_of(totals)), -1, jnp.int32)
        return Guards(totals, [jnp.float64(1) for _ in totals], nowhere, nowhere)


def places_of(totals: Totals) -> list[tuple[int, str]]:
    """The leaf and the variable of every total."""
    return [(i, name) for i, leaf in enumerate(totals) for name in leaf]


def is_guarded(step: Step) -> Flag:
    """Whether rounding is checked in a step: in the first eight and every 32nd, as steps are alike."""
    return (step < 8) | (step % 32 == 0)


def weighed(guards: Guards, now: Stepped, at: tuple[Step, Flag], steps: int) -> Guards:
    """The guards after one more step.

    Only what has been added so far is judged, since later steps may be large only because an earlier one
    was lost.  Totals of the parameters decay with them: parameters that were large excuse nothing once they
    are small.

    Args:
      guards: before the step.
      now: the result of the step.
      at: the number of the step, and whether it was guarded.
      steps: of the run.
    """
    step, guarded = at
    places = places_of(now.totals)
    totals = [now.totals[i][name] for i, name in places]
    numbers = [now.leaves[i].numbers[name] for i, name in places]
    so_far = (guards.since, guards.owner)

    def judged(since: Array, owner: Array, totals: list[Array], numbers: list[exact.Fixed]) -> Any:
        found, where = bundles.matters(totals, numbers, LARGEST_LOSS, steps)
        first = (since < 0) & found
        return jnp.where(first, step, since), jnp.where(first, where, owner)

    def looked_at(since: Array, owner: Array, totals: list[Array], numbers: list[exact.Fixed]) -> Any:
        doubted = jnp.stack([jnp.any(total > 0) for total in totals])
        wanted = jnp.any(doubted & (since < 0))
        return seldom(wanted, judged, (since, owner), since, owner, totals, numbers)

    since, owner = seldom(guarded, looked_at, so_far, *so_far, totals, numbers)
    return Guards(now.totals, now.faded, since, owner)


def no_failure() -> Int[Array, "3"]:
    """See `Health.failed`."""
    return jnp.array([-1, 0, 0], jnp.int32)


def failed_by_rounding(
    failed: Int[Array, "3"], guards: Guards, integers: Exact, firsts: Sequence[int]
) -> Int[Array, "3"]:
    """The first failure of a run, including rounding that took too much.

    Args:
      failed: the first failure of another kind; see `Health.failed`.
      guards: at the end of the run.
      integers: the exact arithmetic of the run.
      firsts: of every leaf, the first of the user's leaves of which it is made.
    """
    for k, (i, name) in enumerate(places_of(guards.totals)):
        trouble = integers.troubles().index(("rounding", name))
        owner = jnp.where(guards.owner[k] < 0, firsts[i], guards.owner[k])
        found = jnp.stack([guards.since[k], jnp.int32(trouble), owner])
        failed = jnp.where((failed[0] < 0) & (guards.since[k] >= 0), found, failed)
    return failed


def failed_by_range(
    numbers: Sequence[dict[str, exact.Fixed]], step: Step, integers: Exact
) -> Int[Array, "3"]:
    """The first failure at the start of a run, whose numbers may already be too large.

    Args:
      numbers: of every leaf, by variable.
      step: the first step.
      integers: the exact arithmetic of the run.

    Returns:
      See `Health.failed`.
    """
    failed = no_failure()
    for i, leaf in enumerate(numbers):
        for name, x in leaf.items():
            trouble = integers.troubles().index(("range", name))
            wrong = jnp.stack([step, jnp.int32(trouble), jnp.int32(i)])
            failed = jnp.where(exact.fits(x) | (failed[0] >= 0), failed, wrong)
    return failed
