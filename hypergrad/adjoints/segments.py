"""Two strategies to play a run: as one segment or as many.

A single segment keeps its tapes for the way back.  Of many segments only the starts are kept, as integers,
and each segment is played forwards again before it is played backwards; only one has its tapes in memory.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from hypergrad import exact
from hypergrad._base.placement import on_device, on_host
from hypergrad._base.trees import Flag, Step
from hypergrad._base.varying import cast
from hypergrad.adjoints.guards import failed_by_range, failed_by_rounding, no_failure
from hypergrad.adjoints.integers import ExactLeaf
from hypergrad.adjoints.playback import Backwards, Cotangents, Forwards, Noted, Played, Player, Span
from hypergrad.adjoints.run import Outputs
from hypergrad.adjoints.starts import on_new_tapes, same_state


class Recorded(NamedTuple):
    """What the way back needs.

    Attributes:
      last: the last segment, with its tapes and records if it is the only one.
      starts: of all segments: those of full length stacked, then the shorter last one if there is one.
    """

    last: Played
    starts: list[list[ExactLeaf]]


class Strategy(Protocol):
    """How the segments of a run are played."""

    def forwards(self, player: Player) -> tuple[Recorded, Outputs, list[Array]]:
        """The run forwards: what the way back needs, the outputs, and the length of tape needed."""

    def backwards(
        self, player: Player, recorded: Recorded, now: Backwards, given: Cotangents
    ) -> tuple[Backwards, Any, Flag]:
        """The run backwards.

        Args:
          player: plays the run.
          recorded: by the run forwards.
          now: where the run backwards begins: where the run forwards ended.
          given: cotangents of the results of the run.

        Returns:
          Where the run backwards is; the cotangents of the inputs; and whether the start was recovered.
        """


def strategy_of(steps: int, length: int, offload: bool) -> Strategy:
    """The strategy for a run in segments of this length, whose starts may be offloaded."""
    return OneSegment(steps) if length == steps else ManySegments(*divmod(steps, length), length, offload)


def _begun(player: Player) -> Forwards:
    """Where a run forwards begins."""
    leaves, guards = player.begin()
    failed = failed_by_range([leaf.numbers for leaf in leaves], player.inputs.step[0], player.integers)
    return player.varying(Forwards(leaves, guards, failed))


def _ended(player: Player, played: Played) -> Played:
    """A run that was played forwards, with rounding among its failures."""
    now = played.now
    firsts = [place[0] for place in player.joint.places]
    failed = failed_by_rounding(now.failed, now.guards, player.integers, firsts)
    return played._replace(now=now._replace(failed=failed))


def _tape_needed(player: Player, leaves: list[ExactLeaf]) -> list[Array]:
    """Length of tape that was needed, for everything that is taped."""
    return [
        leaf.numbers[each.variable].rows.astype(jnp.int64)
        if each.buffer is None
        else exact.tape_length(leaf.buffers[each.buffer].bits)
        for leaf, taped in zip(leaves, player.taped)
        for each in taped
    ]


class OneSegment(NamedTuple):
    """The whole run as one segment, with its tapes.

    Attributes:
      steps: of the run.
    """

    steps: int

    def forwards(self, player: Player) -> tuple[Recorded, Outputs, list[Array]]:
        """See `Strategy`."""
        played = player.play(_begun(player), Span(jnp.int32(0), self.steps), taping=True)
        played, outputs = _ended(player, played), played.outputs
        return Recorded(played, []), outputs, _tape_needed(player, played.now.leaves)

    def backwards(
        self, player: Player, recorded: Recorded, now: Backwards, given: Cotangents
    ) -> tuple[Backwards, Any, Flag]:
        """See `Strategy`."""
        now, of_inputs = player.replay(recorded.last, now, given, Span(jnp.int32(0), self.steps))
        return now, of_inputs, player.recovered(now.leaves)


class ManySegments(NamedTuple):
    """A run in many segments, the last of which may be shorter.

    Attributes:
      full: number of segments of full length.
      rest: steps of the shorter segment at the end; 0 for none.
      length: steps of a segment of full length.
      offload: whether the starts of segments are kept in the memory of the host.
    """

    full: int
    rest: int
    length: int
    offload: bool

    def firsts(self) -> Int[Array, " full"]:
        """The first steps of the segments of full length."""
        return self.length * jnp.arange(self.full, dtype=jnp.int32)

    def last(self) -> Step:
        """The first step of the shorter segment."""
        return jnp.int32(self.full * self.length)

    def forwards(self, player: Player) -> tuple[Recorded, Outputs, list[Array]]:
        """See `Strategy`."""

        def segment(carry: Any, first: Step, length: int = self.length) -> Any:
            now, needed = carry
            played = player.play(now, Span(first, length), taping=False)
            needed = [jnp.maximum(*pair) for pair in zip(needed, _tape_needed(player, played.now.leaves))]
            end = played.now._replace(leaves=on_new_tapes(played.now.leaves))
            return (end, needed), (on_host(self.offload, now.leaves), played.outputs)

        needed = cast([jnp.int64(0) for leaf in player.taped for _ in leaf], player.axes())
        carry = (_begun(player), needed)
        carry, (starts, outputs) = jax.lax.scan(segment, carry, self.firsts())
        outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
        recorded = [starts]
        if self.rest:
            carry, (starts, ended) = segment(carry, self.last(), self.rest)
            recorded.append(starts)
            outputs = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, ended)
        now, needed = carry
        return Recorded(_ended(player, Played(now, [], Noted([], []), outputs)), recorded), outputs, needed

    def backwards(
        self, player: Player, recorded: Recorded, now: Backwards, given: Cotangents
    ) -> tuple[Backwards, Any, Flag]:
        """See `Strategy`."""
        _, guards = jax.eval_shape(player.begin)
        fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), guards)  # not judged again

        def segment(carry: Any, at: Any, length: int = self.length) -> Any:
            now, recovered = carry
            start, first = on_device(self.offload, at[0]), at[1]
            span = Span(first, length)
            played = player.play(Forwards(start, fresh, no_failure()), span, taping=True)
            again = same_state(now.leaves, on_new_tapes(played.now.leaves))
            now = now._replace(leaves=played.now.leaves)
            now, of_inputs = player.replay(played, now, given, span)
            recovered = recovered & again & same_state(start, now.leaves)
            return (now._replace(leaves=start), recovered), of_inputs

        leaves, axes = on_new_tapes(now.leaves), player.axes()
        now = now._replace(leaves=leaves, broken=cast(now.broken, axes))
        carry = (now, cast(jnp.asarray(True), axes))
        ended = []
        if self.rest:
            carry, of_inputs = segment(carry, (recorded.starts[1], self.last()), self.rest)
            ended.append(of_inputs)
        xs = (recorded.starts[0], self.firsts())
        (now, recovered), of_inputs = jax.lax.scan(segment, carry, xs, reverse=True)
        joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), of_inputs)
        return now, jax.tree.map(lambda *parts: jnp.concatenate(parts), joined, *ended), recovered
