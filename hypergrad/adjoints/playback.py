"""A run on integers, step by step: forwards, and backwards bit for bit.

Forwards (`Player.step`, Algorithm 1), a step moves integers and writes the bits that scales destroy to
tapes.  Backwards (`Player.unstep`, Algorithm 2), it reads these bits, evaluates the gradient again, undoes
the moves, and differentiates the same step in floats.  Comments quote the lines of the paper, which are
for momentum.  `hypergrad.adjoints.segments` joins the steps to runs.

==========  ======================  ================================================================
symbol      name                    meaning
==========  ======================  ================================================================
``w, v``    leaves                  parameters and variables, as integers
``g``       observations            gradient at ``w``, and what else the optimizer observes there
``w̄, v̄``    cotangents              of the state after a step, then of the state before it; ``dw, dv``
                                    in the paper
``θ̄``       sums                    of what is the same at every step, summed over the steps; ``dθ``
==========  ======================  ================================================================

Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
learning", ICML 2015, Algorithms 1 to 3.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Int

from hypergrad import exact
from hypergrad._base.compiler import same_bits_everywhere
from hypergrad._base.placement import divided, whole
from hypergrad._base.trees import Flag, PyTree, Scalar, Step, dot, finite_squares, split
from hypergrad._base.varying import axes_of, cast
from hypergrad.adjoints.failures import Broken
from hypergrad.adjoints.guards import Guards, is_guarded, weighed
from hypergrad.adjoints.integers import BAD_LOSS, Drops, Exact, ExactLeaf, Moment, Tapes
from hypergrad.adjoints.joint import Joint
from hypergrad.adjoints.linearize import InParts, Linearized, linearize
from hypergrad.adjoints.run import Constants, Inputs, Outputs, Run
from hypergrad.adjoints.starts import Start
from hypergrad.adjoints.tapes import Taped
from hypergrad.program import PARAMS, Leaf, Observed, Record
from hypergrad.program import step as step_in_floats


class Flags(NamedTuple):
    """Which arrays are to be differentiated.

    Attributes:
      constants: a bool for every array of the `Constants`.
      inputs: a bool for every array of the `Inputs`.
    """

    constants: PyTree
    inputs: PyTree

    @property
    def loss(self) -> PyTree:
        """The flags of the arrays that the loss takes."""
        return self.constants.loss, self.inputs.batch

    @property
    def hypers(self) -> PyTree:
        """The flags of the hyperparameters, which the moves take."""
        return self.constants.hypers, self.inputs.hypers


class Cotangents(NamedTuple):
    """Cotangents of the results of a run; None means zero.

    Attributes:
      end: of the final state, by leaf.
      loss: of the losses by step, a list of one array ``(T,)``.
      watched: of what was watched by step, a flat list.
    """

    end: list[Leaf]
    loss: list[Array] | None
    watched: list[Array] | None


class Forwards(NamedTuple):
    """Where a run forwards is.

    Attributes:
      leaves: its exact state.
      guards: how coarse its shifts have been.
      failed: the first failure; see `Health.failed`.
    """

    leaves: list[ExactLeaf]
    guards: Guards
    failed: Int[Array, "3"]


class Noted(NamedTuple):
    """What a step notes for the way back, besides its tapes; see `hypergrad.adjoints.integers.Stepped`."""

    records: list[Record]
    drops: list[Drops]


class Played(NamedTuple):
    """A segment that was played forwards.

    Attributes:
      now: where it ended.
      tapes: of every leaf, by name.
      noted: of every step, the scalars that were remembered, by leaf, and the bytes that were dropped.
      outputs: by step.
    """

    now: Forwards
    tapes: list[Tapes]
    noted: Noted
    outputs: Outputs


class Backwards(NamedTuple):
    """Where a run backwards is.

    Attributes:
      leaves: its exact state.
      cotangents: of that state, floats.
      sums: cotangents of the constants, summed over later steps.
      broken: see `Health.broken`.
    """

    leaves: list[ExactLeaf]
    cotangents: list[Leaf]
    sums: list[Array]
    broken: Int[Array, "2"]


class Span(NamedTuple):
    """Steps ``first ... first + length - 1`` of a run.

    Inputs are taken from whole arrays step by step, so that no array is cut up.

    Attributes:
      first: int32, the first step, counted from the start of the run.
      length: the number of steps.
    """

    first: Step
    length: int

    def steps(self) -> Int[Array, " length"]:
        """The numbers of the steps, counted from the start of the run."""
        return self.first + jnp.arange(self.length, dtype=jnp.int32)


@dataclass(frozen=True)
class Player:
    """One run on integers: its static part and its arrays.

    Attributes:
      joint: the run to be played, and its joint leaves, which are meant by "leaf" from here on.
      integers: its exact arithmetic.
      beginning: how its integers begin.
      flags: what will be differentiated on the way back.
      lengths: of the tapes of a segment, in rows or bytes; None if there will be no way back.
      start: the float state before the first step.
      constants: what is the same at every step.
      inputs: what differs from step to step.
      always_true: see `hypergrad._base.compiler`.
      starts: of the user's leaves in the joint ones; see `Joint.starts`.
      shard: the mesh axis over which the state is divided, or None.
    """

    joint: Joint
    integers: Exact
    beginning: Start
    flags: Flags
    lengths: list[list[int]] | None
    start: list[Leaf]
    constants: Constants
    inputs: Inputs
    always_true: Flag
    starts: list[Array | None]
    shard: str | None = None

    @property
    def run(self) -> Run:
        """The run to be played."""
        return self.joint.run

    @property
    def taped(self) -> Any:
        """What is taped of every leaf."""
        return self.beginning.taped

    def begin(self) -> tuple[list[ExactLeaf], Guards]:
        """The start as integers, and what rounding took from it."""
        return self.beginning.begin(self.start, self.constants.exact, self.always_true)

    def recovered(self, found: list[ExactLeaf]) -> Flag:
        """Whether the run backwards arrived at its start."""
        return self.beginning.recovered(self.start, self.constants.exact, found, self.always_true)

    def blank_tape(self, leaf: int, k: int, taping: bool) -> Array:
        """The tape ``k`` of a leaf, before a segment."""
        taped = self.taped[leaf][k]
        length = 0 if self.lengths is None or not taping else self.lengths[leaf][k]
        # What is held whole writes a row only when it drops one.
        length = max(length - 1, 0) if taped.buffer is None else length
        blank = exact.blank_tape(taped.shape, taped.factor_shape, length)
        return divided(self.shard, cast(blank, self.axes_of_taped(leaf, taped)))

    # ---- over which axes of a mesh the carries vary; see `hypergrad._base.varying`

    def axes(self) -> frozenset[str]:
        """Over which anything in the run varies."""
        return axes_of((self.start, self.constants, self.inputs))

    def axes_of_taped(self, leaf: int, taped: Taped) -> frozenset[str]:
        """Over which a buffer and its tape vary: those of what is scaled or kept."""
        return axes_of(self.start[leaf].get(taped.variable, self.start[leaf][PARAMS]))

    def varying(self, now: Forwards) -> Forwards:
        """Where a run is, as varying as it is after a step."""
        leaves = []
        for i, (leaf, taped) in enumerate(zip(now.leaves, self.taped)):
            numbers = {name: cast(x, axes_of(self.start[i][name])) for name, x in leaf.numbers.items()}
            axes = [self.axes_of_taped(i, each) for each in taped if each.buffer is not None]
            buffers = [cast(*each) for each in zip(leaf.buffers, axes)]
            leaves.append(ExactLeaf(numbers, buffers))
        guards, failed = cast((now.guards, now.failed), self.axes())
        return Forwards(divided(self.shard, leaves), guards, failed)

    # ---- forwards

    def play(self, now: Forwards, span: Span, taping: bool) -> Played:
        """Play a segment forwards.

        Args:
          now: where the run is before the segment.
          span: the steps of the segment.
          taping: whether to keep tapes; not needed if the segment will be played forwards again.
        """
        tapes = [
            {each.name: self.blank_tape(i, k, taping) for k, each in enumerate(leaf)}
            for i, leaf in enumerate(self.taped)
        ]
        (now, tapes), (outputs, noted) = jax.lax.scan(self.step, (self.varying(now), tapes), span.steps())
        return Played(now, tapes, noted, outputs)

    def step(self, carry: tuple[Forwards, Any], t: Step) -> tuple[Any, tuple[Outputs, Noted]]:
        """One step of Algorithm 1: the gradient at ``w``, then the moves of the optimizer on integers."""
        (leaves, guards, failed), tapes = carry
        run, integers, constants = self.run, self.integers, self.constants
        x, at = self._moment(t)
        # g = ∇L(w): evaluate the gradient.
        loss, evaluated = self._gradient(leaves, x, at)
        hypers = (at.fixed, at.scheduled)
        observations = self.joint.observations(hypers, evaluated, self.starts, at.always_true)
        guarded = is_guarded(t)
        # v <- γ v - (1 - γ) g and w <- w + α v: update velocity and position.
        so_far = guards.totals, guards.faded
        now = integers.step(at, leaves, tapes, observations, so_far, guarded)

        bad_loss = jnp.array([integers.troubles().index(BAD_LOSS), 0], jnp.int32)
        wrong = jnp.where(jnp.isfinite(loss), now.wrong, bad_loss)
        at_step = jnp.concatenate([x.step[None], wrong])
        failed = jnp.where((failed[0] < 0) & (wrong[0] > 0), at_step, failed)

        users = self.joint.split_leaves(integers.floats(at.always_true, leaves), self.starts)
        snapshot = run.snapshot(users, loss, evaluated, x.step)
        outputs = Outputs(loss, run.watched(snapshot, constants))
        guards = weighed(guards, now, (x.step, guarded), run.steps)
        leaves, tapes = divided(self.shard, (now.leaves, now.tapes))
        return (Forwards(leaves, guards, failed), tapes), (outputs, Noted(now.records, now.drops))

    def _moment(self, t: Step) -> tuple[Inputs, Moment]:
        """The inputs of a step, and the step with its hyperparameters."""
        x = _at(self.inputs, t)
        always_true = self.always_true & (x.step >= 0)
        return x, Moment(self.constants.hypers, x.hypers, x.step, always_true)

    def _gradient(self, leaves: list[ExactLeaf], x: Inputs, at: Moment) -> tuple[Scalar, list[Observed]]:
        """Loss and, by the user's leaves, gradient; with the bits of the way back, if there will be one."""
        if self.lengths is None and self.run.shards is None:
            params = self._params(leaves, at)
            return self.run.plain_gradient(params, self.constants.loss, x.batch)
        loss, evaluated, _ = self._linearized(leaves, x, at).primal
        return loss, evaluated

    def _params(self, leaves: list[ExactLeaf], at: Moment) -> list[Array]:
        """The parameters, by the user's leaves."""
        params = [leaf[PARAMS] for leaf in self.integers.floats(at.always_true, leaves, PARAMS)]
        return whole(self.shard, self.joint.split(params, self.starts))

    def _linearized(self, leaves: list[ExactLeaf], x: Inputs, at: Moment) -> Linearized | InParts:
        theta = (self.constants.loss, x.batch)
        return linearize(self.run, self._params(leaves, at), theta, self.flags.loss, at.always_true)

    # ---- backwards

    def replay(self, played: Played, now: Backwards, cotangents: Cotangents, span: Span) -> tuple[Any, Any]:
        """Play a segment backwards.

        Args:
          played: the segment, played forwards.
          now: where the run backwards is, at the end of the segment.
          cotangents: of the losses of the whole run and of what was watched in it.
          span: the steps of the segment.

        Returns:
          Where the run backwards is, at the start of the segment; and the cotangents of its inputs.
        """

        def unstep(now: Backwards, at: tuple[Array, Noted]) -> tuple[Backwards, Any]:
            return self.unstep(now, played.tapes, cotangents, *at)

        leaves, behind = divided(self.shard, (now.leaves, now.cotangents))
        now = Backwards(leaves, behind, now.sums, cast(now.broken, self.axes()))
        return jax.lax.scan(unstep, now, (span.steps(), played.noted), reverse=True)

    def unstep(
        self, now: Backwards, tapes: list[Tapes], cotangents: Cotangents, t: Step, noted: Noted
    ) -> tuple[Backwards, Any]:
        """One step of Algorithm 2: recover ``w``, then the gradient at ``w``, then everything else.

        Args:
          now: where the run backwards is, after the step.
          tapes: of every leaf.
          cotangents: of the losses of the whole run and of what was watched in it.
          t: the step, counted from the start of the run.
          noted: what was noted in the step.

        Returns:
          Where the run backwards is, before the step; and the cotangents of its inputs.
        """
        integers, (x, at) = self.integers, self._moment(t)
        leaves, kept = integers.kept(at, now.leaves, tapes)
        records = [a | b for a, b in zip(noted.records, kept)]
        # w <- w - α v: undo the position update.
        leaves = integers.unstep(at, leaves, tapes, None, records, noted.drops)
        # g = ∇L(w): the gradient at the recovered weights.
        linearized = self._linearized(leaves, x, at)
        _, evaluated, _ = linearized.primal
        hypers = (at.fixed, at.scheduled)
        observations = self.joint.observations(hypers, evaluated, self.starts, at.always_true)
        # v <- [v + (1 - γ) g] / γ: undo the velocity update.
        leaves = integers.unstep(at, leaves, tapes, observations, records, noted.drops)

        # dw, dv, dθ, dα, dγ: pull the cotangents back through the step, in floats.
        floats = integers.floats(at.always_true, leaves)
        _, along_loss, along_watched = _at(cotangents._replace(end=[]), t)
        before, constants, inputs = _InFloats(self, x, at, kept, linearized).transposed(
            floats, now.cotangents, along_loss, along_watched
        )
        sums = [a + b for a, b in zip(now.sums, constants)]
        leaves, before = divided(self.shard, (leaves, before))
        return Backwards(leaves, before, sums, self._broken(now.broken, before, t, x.step)), inputs

    def _broken(
        self, broken: Int[Array, "2"], cotangents: list[Leaf], t: Step, step: Step
    ) -> Int[Array, "2"]:
        """`Health.broken` after one more step back."""

        def wrong(k: int, leaf: Leaf) -> tuple[Flag, Array]:
            """Whether a cotangent of a leaf is no number, and of which of the user's leaves."""
            rows = [jnp.zeros(1, bool)]
            for name, x in ((name, x) for name, x in leaf.items() if x.size):
                # Before the first step, cotangents of variables are only the derivatives in their start.
                used = (t > 0) | (name == PARAMS)
                rows.append(used & jnp.any(~jnp.isfinite(x.reshape(len(x) if x.ndim else 1, -1)), axis=1))
            if not self.joint.is_joined(k):
                return jnp.any(jnp.concatenate(rows)), jnp.int32(self.joint.places[k][0])
            found = jnp.any(jnp.stack(rows[1:]), axis=0)
            owners = jnp.asarray(self.joint.leaves_of_rows(k))
            return jnp.any(found), owners[jax.lax.argmax(found, 0, jnp.int32)]

        def first(cotangents: list[Leaf]) -> Int[Array, "2"]:
            flags, places = (jnp.stack(x) for x in zip(*(wrong(*each) for each in enumerate(cotangents))))
            place = jnp.stack([step, places[jax.lax.argmax(flags, 0, jnp.int32)]])
            return jnp.where((broken[0] == Broken.NOWHERE) & jnp.any(flags), place, broken)

        # Sums of squares are inner products, which compilers vectorize; only overflow needs a second look.
        return jax.lax.cond(finite_squares(cotangents), lambda _: broken, first, cotangents)


class _InFloats(NamedTuple):
    """One step in floats, to be differentiated backwards.

    Attributes:
      player: plays the run.
      x: inputs of the step.
      at: the step and its hyperparameters.
      kept: what `Keep` kept in the step, by leaf.
      linearized: loss and gradient, with their derivatives.
    """

    player: Player
    x: Inputs
    at: Moment
    kept: list[Record]
    linearized: Linearized | InParts

    def transposed(
        self, floats: list[Leaf], behind: list[Leaf], along_loss: Any, along_watched: Any
    ) -> tuple[list[Leaf], list[Array], tuple[list[Array], list[Array]]]:
        """Pull cotangents back through the step.

        Args:
          floats: the state before the step.
          behind: cotangents of the state after the step.
          along_loss: cotangent of the loss of the step, a list of one, or None.
          along_watched: cotangents of what was watched in the step, or None.

        Returns:
          Cotangents of the state before the step; of the wanted constants; and of the wanted inputs: of the
          batch, and of scheduled hyperparameters.
        """
        player, joint, constants = self.player, self.player.joint, self.player.constants
        flags, watches = player.flags, along_watched is not None
        loss, evaluated, _ = self.linearized.primal
        hypers, merge = split(flags.hypers, (self.at.fixed, self.at.scheduled))
        watching, merge_watch = split(flags.constants.watch, constants.watch)
        spread = [jnp.broadcast_to(h, shape) for h, shape in zip(hypers, self.spread_shapes(floats))]

        # What the loss gave by the user's leaves is joined before the step, if nobody else looks at it.
        early = player.run.optimizer.transform is None and not watches
        if early:
            evaluated = joint.transformed((self.at.fixed, self.at.scheduled), evaluated, player.starts)

        # The step as a function of everything except the arguments of the loss.
        def step(
            floats: list[Leaf], loss: Scalar, evaluated: list[Observed], spread: list[Array], watch: Any
        ) -> Any:
            hypers = merge(spread)
            observed = evaluated if early else joint.transformed(hypers, evaluated, player.starts)
            new = step_in_floats(
                joint.moves(hypers[0], hypers[1], self.x.step), floats, observed, self.kept
            )
            if not watches:
                return new, None
            users = joint.split_leaves(floats, player.starts)
            snapshot = player.run.snapshot(users, loss, evaluated, self.x.step)
            watched = player.run.watched(snapshot, constants._replace(watch=merge_watch(watch)))
            return new, inexact_leaves(watched)

        def pulled(point: Any, cotangents: Any) -> Any:
            before, of_loss, direction, of_spread, of_watch = jax.vjp(step, *point)[1](cotangents)
            return (
                before,
                of_loss,
                direction,
                [_sum_to(x, h.shape) for x, h in zip(of_spread, hypers)],
                of_watch,
            )

        # dα = dwᵀ v;  dv <- dv + α dw;  dγ = dvᵀ (v + g);  dv <- γ dv.
        given = ((floats, loss, evaluated, spread, watching), (behind, along_watched))
        if player.run.shards is None:
            before, of_loss, direction, of_hypers, of_watch = pulled(*given)
        else:  # to the same bits in programs for one device and for many
            before, of_loss, direction, of_hypers, of_watch = same_bits_everywhere(
                self.at.always_true, pulled, *given
            )
        if early:
            direction = joint.split_leaves(direction, player.starts)
        of_losses = [*(along_loss or []), *([of_loss] if watches else [])]
        # dw <- dw - (1 - γ) dv ∇w∇w L;  dθ <- dθ - (1 - γ) dv ∇θ∇w L: Hessian-vector products.
        products = self.linearized.transposed(sum(of_losses) if of_losses else None, direction)
        for leaf, product in zip(before, joint.join(products.params)):
            leaf[PARAMS] += product
        first_batch = sum(jax.tree.leaves(flags.constants.loss))
        first_scheduled = sum(jax.tree.leaves(flags.constants.hypers))
        same = [*products.wanted[:first_batch], *of_hypers[:first_scheduled], *of_watch]
        return before, same, (products.wanted[first_batch:], of_hypers[first_scheduled:])

    def spread_shapes(self, floats: list[Leaf]) -> list[tuple[int, ...]]:
        """Shapes to which the wanted hyperparameters are broadcast before differentiating in them.

        Their cotangents are then found element by element, and `_sum_to` adds them faster than the
        compiler.  This is only for optimizers that act element by element; others, such as K-FAC, need
        scalars.
        """
        variables = self.player.run.program.variables.values()
        alike = all(variable.init is jnp.zeros_like for variable in variables)
        shapes = []
        for part, flags in zip((self.at.fixed, self.at.scheduled), self.player.flags.hypers):
            for k, (leaf, leaf_hypers, leaf_flags) in enumerate(zip(floats, part, flags)):
                for name in sorted(leaf_hypers):
                    shape = leaf_hypers[name].shape
                    by_leaf = self.player.joint.is_joined(k) and shape != ()
                    if leaf_flags[name]:
                        shapes.append(leaf[PARAMS].shape if alike and not by_leaf else shape)
        return shapes


def inexact_leaves(tree: PyTree) -> list[Any]:
    """The leaves of a tree that have derivatives."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, SymbolicZero))
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _at(tree: PyTree, step: Step) -> PyTree:
    """The slice of one step from arrays whose leading axis is the step."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, step, keepdims=False), tree)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that were broadcast; sums over everything are inner products, which vectorize."""
    if shape == () and x.ndim:
        ones = jnp.ones(x.shape[-1], x.dtype)
        return jnp.sum(dot(x, ones))
    padded = (1,) * (x.ndim - len(shape)) + shape
    axes = [k for k, (a, b) in enumerate(zip(x.shape, padded)) if a != b]
    return jnp.sum(x, axis=axes, keepdims=True).reshape(shape)
