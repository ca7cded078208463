"""Watches, along the run, how much rounding takes from what is added to the integers."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hypergrad import bundles, exact
from hypergrad._base.compiler import seldom
from hypergrad._base.trees import Flag, Step
from hypergrad.adjoints.integers import LARGEST_LOSS, Exact, Stepped
from hypergrad.program import PARAMS


class Guard(NamedTuple):
    """How coarse the shifts of one variable of one leaf have been so far.

    Attributes:
      total: by row, the sum of `exact.coarseness` over the guarded steps.
      since: the first step at which they were too coarse; -1 for none.
      owner: int32, in which of the user's leaves, if the leaf is made of several; else -1.
    """

    total: Float[Array, " rows"]
    since: Step
    owner: Int[Array, ""]


Guards = list[dict[str, Guard]]  # by leaf and variable


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
    new = [dict(each) for each in guards]
    places = [(i, name) for i, each in enumerate(now.coarse) for name in each]
    if not places:
        return new
    totals = []
    for i, name in places:
        before = guards[i][name].total
        totals.append((before * now.faded[i] if name == PARAMS else before) + now.coarse[i][name])
    since = jnp.stack([guards[i][name].since for i, name in places])
    doubted = jnp.stack([jnp.any(total > 0) for total in totals])

    def judged(totals: list[Array], numbers: list[exact.Fixed]) -> tuple[Array, Array]:
        return bundles.matters(totals, numbers, LARGEST_LOSS, steps)

    numbers = [now.leaves[i].numbers[name] for i, name in places]
    wanted = guarded & jnp.any(doubted & (since < 0))
    owner = jnp.stack([guards[i][name].owner for i, name in places])
    found, where = seldom(wanted, judged, (jnp.zeros(len(places), bool), owner), totals, numbers)
    first = (since < 0) & found
    since, owner = jnp.where(first, step, since), jnp.where(first, where, owner)
    for k, (i, name) in enumerate(places):
        new[i][name] = Guard(totals[k], since[k], owner[k])
    return new


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
    for i, leaf in enumerate(guards):
        for name, guard in leaf.items():
            trouble = integers.troubles().index(("rounding", name))
            owner = jnp.where(guard.owner < 0, firsts[i], guard.owner)
            found = jnp.stack([guard.since, jnp.int32(trouble), owner])
            failed = jnp.where((failed[0] < 0) & (guard.since >= 0), found, failed)
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
