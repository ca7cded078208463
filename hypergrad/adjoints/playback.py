"""A run on integers, step by step: forwards, and backwards bit for bit.

Forwards (`Player.step`) a step moves integers and writes the bits that scales destroy to tapes.
Backwards (`Player.unstep`) it reads them, finds the gradient again, undoes the moves, and differentiates
the same step in floats.  `hypergrad.adjoints.segments` puts the steps together to runs.

==========  ======================  ================================================================
symbol      name                    meaning
==========  ======================  ================================================================
``w, v``    leaves                  integers behind parameters and variables, before a step
``g``       observations            gradient, and what else the optimizer has observed of a step
``w̄, v̄``    cotangents              of the state behind the step; in the end, before it
``θ̄``       sums                    of what is the same at every step, added up
==========  ======================  ================================================================

Source: Maclaurin, Duvenaud, Adams, ICML 2015, Algorithms 2 and 3.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Int

from hypergrad import exact
from hypergrad._base.trees import Flag, PyTree, Scalar, Step, dot, split
from hypergrad.adjoints.guards import Guards, is_guarded, weighed
from hypergrad.adjoints.integers import BAD_LOSS, Exact, ExactLeaf, Moment
from hypergrad.adjoints.linearize import Linearized, linearize
from hypergrad.adjoints.run import Constants, Inputs, Outputs, Run
from hypergrad.adjoints.starts import Start
from hypergrad.program import PARAMS, Leaf, Observed, Record


class Flags(NamedTuple):
    """Which arrays of constants and inputs are to be differentiated."""

    constants: PyTree
    inputs: PyTree

    @property
    def loss(self) -> PyTree:
        """Those that the loss takes."""
        return self.constants.loss, self.inputs.batch

    @property
    def hypers(self) -> PyTree:
        """Those that the moves take."""
        return self.constants.hypers, self.inputs.hypers


class Cotangents(NamedTuple):
    """Of what a run gives out: its end; by step, in lists, its losses and what was watched.

    None means zero.
    """

    end: list[Leaf]
    loss: list[Array] | None
    watched: list[Array] | None


class Forwards(NamedTuple):
    """Where a run forwards is: its exact state, how coarse it was, and the first failure; see `Health`."""

    leaves: list[ExactLeaf]
    guards: Guards
    failed: Int[Array, "3"]


class Played(NamedTuple):
    """A segment of the run forwards: where it ended, its tapes and records by step, what it gave out."""

    now: Forwards
    tapes: list[list[Array]]
    records: list[Record]
    outputs: Outputs


class Backwards(NamedTuple):
    """Where a run backwards is.

    Attributes:
      leaves: its exact state.
      cotangents: of that state, as floats.
      sums: cotangents of the constants, from later steps.
      broken: see `Health`.
    """

    leaves: list[ExactLeaf]
    cotangents: list[Leaf]
    sums: list[Array]
    broken: Int[Array, "2"]


class Span(NamedTuple):
    """Steps ``first ... first + length - 1`` of a run; taken one by one, so that no array is cut up."""

    first: Step
    length: int

    def steps(self) -> Int[Array, " length"]:
        """Their numbers, counted from the start of the run."""
        return self.first + jnp.arange(self.length, dtype=jnp.int32)


@dataclass(frozen=True)
class Player:
    """One run on integers: what is static about it, and the arrays of one computation.

    Attributes:
      run: to be played.
      integers: its exact arithmetic.
      beginning: how its integers begin.
      flags: what will be differentiated on the way back.
      lengths: of the tapes of a segment; None if there will be no way back.
      start: the floats that the run begins with.
      constants: the same at every step.
      inputs: by step.
      always_true: see `hypergrad._base.compiler`.
    """

    run: Run
    integers: Exact
    beginning: Start
    flags: Flags
    lengths: list[list[int]] | None
    start: list[Leaf]
    constants: Constants
    inputs: Inputs
    always_true: Flag

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

    # ---- forwards

    def play(self, now: Forwards, span: Span, taping: bool) -> Played:
        """A segment forwards, on new tapes, or on none where it will be played again."""
        lengths = self.lengths if taping else None
        tapes = [
            [
                exact.blank_tape(each.shape, each.factor_shape, 0 if lengths is None else lengths[i][k])
                for k, each in enumerate(leaf)
            ]
            for i, leaf in enumerate(self.taped)
        ]
        (now, tapes), (outputs, records) = jax.lax.scan(self.step, (now, tapes), span.steps())
        return Played(now, tapes, records, outputs)

    def step(self, carry: tuple[Forwards, Any], t: Step) -> tuple[Any, tuple[Outputs, list[Record]]]:
        """One step: the gradient at ``w``, then the moves of the optimizer on integers."""
        (leaves, guards, failed), tapes = carry
        run, integers, constants = self.run, self.integers, self.constants
        x, at = self._moment(t)
        loss, evaluated = self._gradient(leaves, x, at)
        observations = run.observations((at.fixed, at.scheduled), evaluated, at.always_true)
        guarded = is_guarded(t)
        now = integers.step(at, leaves, tapes, observations, guarded)

        bad_loss = jnp.array([integers.troubles().index(BAD_LOSS), 0], jnp.int32)
        wrong = jnp.where(jnp.isfinite(loss), now.wrong, bad_loss)
        at_step = jnp.concatenate([x.step[None], wrong])
        failed = jnp.where((failed[0] < 0) & (wrong[0] > 0), at_step, failed)

        snapshot = run.snapshot(integers.floats(at.always_true, leaves), loss, evaluated, x.step)
        outputs = Outputs(loss, run.watched(snapshot, constants))
        guards = weighed(guards, now, (x.step, guarded), run.steps)
        return (Forwards(now.leaves, guards, failed), now.tapes), (outputs, now.records)

    def _moment(self, t: Step) -> tuple[Inputs, Moment]:
        """The inputs of a step, and the hyperparameters there."""
        x = _at(self.inputs, t)
        always_true = self.always_true & (x.step >= 0)
        return x, Moment(self.constants.hypers, x.hypers, x.step, always_true)

    def _gradient(self, leaves: list[ExactLeaf], x: Inputs, at: Moment) -> tuple[Scalar, list[Observed]]:
        """Loss and gradient, to the same bits as on the way back if there will be one."""
        if self.lengths is None:
            params = self._params(leaves, at)
            return self.run.plain_gradient(params, self.constants.loss, x.batch)
        loss, evaluated, _ = self._linearized(leaves, x, at).primal
        return loss, evaluated

    def _params(self, leaves: list[ExactLeaf], at: Moment) -> list[Array]:
        return [leaf[PARAMS] for leaf in self.integers.floats(at.always_true, leaves, PARAMS)]

    def _linearized(self, leaves: list[ExactLeaf], x: Inputs, at: Moment) -> Linearized:
        theta = (self.constants.loss, x.batch)
        return linearize(self.run, self._params(leaves, at), theta, self.flags.loss, at.always_true)

    # ---- backwards

    def replay(self, played: Played, now: Backwards, cotangents: Cotangents, span: Span) -> tuple[Any, Any]:
        """A segment backwards.

        Args:
          played: the segment forwards.
          now: where the run backwards is: at its end.
          cotangents: of the losses of the whole run and what was watched in it.
          span: the steps of the segment.

        Returns:
          Where the run backwards is: at its start; and the cotangents of the inputs.
        """

        def unstep(now: Backwards, at: tuple[Array, list[Record]]) -> tuple[Backwards, Any]:
            return self.unstep(now, played.tapes, cotangents, *at)

        return jax.lax.scan(unstep, now, (span.steps(), played.records), reverse=True)

    def unstep(
        self, now: Backwards, tapes: Any, cotangents: Cotangents, t: Step, records: list[Record]
    ) -> tuple[Backwards, Any]:
        """One step back: ``w`` is recovered first, then the gradient there, then everything else."""
        integers, (x, at) = self.integers, self._moment(t)
        leaves, kept = integers.kept(at, now.leaves, tapes)
        records = [a | b for a, b in zip(records, kept)]
        leaves = integers.unstep(at, leaves, tapes, None, records)
        linearized = self._linearized(leaves, x, at)
        _, evaluated, _ = linearized.primal
        observations = self.run.observations((at.fixed, at.scheduled), evaluated, at.always_true)
        leaves = integers.unstep(at, leaves, tapes, observations, records)

        floats = integers.floats(at.always_true, leaves)
        _, along_loss, along_watched = _at(cotangents._replace(end=[]), t)
        before, constants, inputs = _InFloats(self, x, at, kept, linearized).transposed(
            floats, now.cotangents, along_loss, along_watched
        )
        sums = [a + b for a, b in zip(now.sums, constants)]
        return Backwards(leaves, before, sums, self._broken(now.broken, before, t, x.step)), inputs

    def _broken(
        self, broken: Int[Array, "2"], cotangents: list[Leaf], t: Step, step: Step
    ) -> Int[Array, "2"]:
        """`Health.broken`, after one more step back."""
        for i, leaf in enumerate(cotangents):
            # Behind the first step are only the derivatives in the start of variables.
            unused = {name: (t == 0) & (name != PARAMS) for name in leaf}
            largest = {name: jnp.max(jnp.abs(x), initial=0) for name, x in leaf.items()}
            numbers = jnp.all(jnp.stack([jnp.isfinite(largest[k]) | unused[k] for k in leaf]))
            place = jnp.stack([step, jnp.int32(i)])
            broken = jnp.where((broken[0] == -1) & ~numbers, place, broken)
        return broken


class _InFloats(NamedTuple):
    """One step in floats, to be differentiated backwards.

    Attributes:
      player: of the run.
      x: inputs of the step.
      at: which step.
      kept: what `Keep` has kept in it.
      linearized: loss and gradient, with their derivatives.
    """

    player: Player
    x: Inputs
    at: Moment
    kept: list[Record]
    linearized: Linearized

    def transposed(
        self, floats: list[Leaf], behind: list[Leaf], along_loss: Any, along_watched: Any
    ) -> tuple[list[Leaf], list[Array], tuple[list[Array], list[Array]]]:
        """Cotangents pulled back through the step.

        Args:
          floats: the state before it.
          behind: cotangents of the state behind it.
          along_loss: cotangent of its loss, a list of one, or None.
          along_watched: cotangents of what was watched, or None.

        Returns:
          Cotangents of the state before the step; of what is wanted of the constants; and of its inputs:
          of the batch, and of scheduled hyperparameters.
        """
        player, constants = self.player, self.player.constants
        flags, watches = player.flags, along_watched is not None
        loss, evaluated, _ = self.linearized.primal
        hypers, merge = split(flags.hypers, (self.at.fixed, self.at.scheduled))
        watching, merge_watch = split(flags.constants.watch, constants.watch)
        spread = [jnp.broadcast_to(h, shape) for h, shape in zip(hypers, self.spread_shapes(floats))]

        # As a function of everything but the parameters of the loss.
        def step(
            floats: list[Leaf], loss: Scalar, evaluated: list[Observed], spread: list[Array], watch: Any
        ) -> Any:
            new = player.run.stepped(floats, evaluated, merge(spread), self.x.step, self.kept)
            if not watches:
                return new, None
            snapshot = player.run.snapshot(floats, loss, evaluated, self.x.step)
            watched = player.run.watched(snapshot, constants._replace(watch=merge_watch(watch)))
            return new, inexact_leaves(watched)

        _, pull = jax.vjp(step, floats, loss, evaluated, spread, watching)
        before, of_loss, direction, of_spread, of_watch = pull((behind, along_watched))
        of_losses = [*(along_loss or []), *([of_loss] if watches else [])]
        products = self.linearized.transposed(sum(of_losses) if of_losses else None, direction)
        for leaf, product in zip(before, products.params):
            leaf[PARAMS] += product
        of_hypers = [_sum_to(x, h.shape) for x, h in zip(of_spread, hypers)]
        first_batch = sum(jax.tree.leaves(flags.constants.loss))
        first_scheduled = sum(jax.tree.leaves(flags.constants.hypers))
        same = [*products.wanted[:first_batch], *of_hypers[:first_scheduled], *of_watch]
        return before, same, (products.wanted[first_batch:], of_hypers[first_scheduled:])

    def spread_shapes(self, floats: list[Leaf]) -> list[tuple[int, ...]]:
        """To which shapes to spread the wanted hyperparameters before differentiating in them.

        Their cotangents then come element by element, and `_sum_to` adds them faster than the compiler.
        Only for optimizers that act element by element: others, such as K-FAC, need numbers.
        """
        variables = self.player.beginning.variables.values()
        alike = all(variable.init is jnp.zeros_like for variable in variables)
        shapes = []
        for part, flags in zip((self.at.fixed, self.at.scheduled), self.player.flags.hypers):
            for leaf, leaf_hypers, leaf_flags in zip(floats, part, flags):
                for name in sorted(leaf_hypers):
                    if leaf_flags[name]:
                        shapes.append(leaf[PARAMS].shape if alike else leaf_hypers[name].shape)
        return shapes


def always_true(*given: PyTree) -> Flag:
    """True, which the compiler does not know, unless it knows all that it is made from."""
    numbers = [x for x in jax.tree.leaves(given) if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
    firsts = [jax.lax.slice(x, [0] * x.ndim, [1] * x.ndim).reshape(()) for x in numbers]
    return jnp.all(jnp.stack([jnp.asarray(True), *(x * 0 != 1 for x in firsts)]))


def inexact_leaves(tree: PyTree) -> list[Any]:
    """The leaves that have derivatives."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, SymbolicZero))
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _at(tree: PyTree, step: Step) -> PyTree:
    """One step's slice of arrays by step."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, step, keepdims=False), tree)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over what was broadcast.  Sums over everything are inner products, which vectorise."""
    if shape == () and x.ndim:
        ones = jnp.ones(x.shape[-1], x.dtype)
        return jnp.sum(dot(x, ones))
    padded = (1,) * (x.ndim - len(shape)) + shape
    axes = [k for k, (a, b) in enumerate(zip(x.shape, padded)) if a != b]
    return jnp.sum(x, axis=axes, keepdims=True).reshape(shape)
