"""Exact reversal: the run is played backwards, bit for bit.

The run forwards (`Playback.play`) moves integers and writes the bits that scales destroy to tapes; the run
backwards (`Playback.replay`) reads them, finds the gradient again at every step, and differentiates the
float twin of the step.

First derivatives are taken so.  Derivatives of these, of any order and in any nesting, are those of the
float twin of the whole run, in segments that are computed again (`twin`).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from hypergrad import bundles, exact
from hypergrad._base.compiler import in_place
from hypergrad._base.errors import error_if
from hypergrad._base.trees import PyTree, split
from hypergrad.adjoints.integers import BAD_LOSS, LARGEST_LOSS, Exact, ExactLeaf, Stepped
from hypergrad.adjoints.run import Constants, Inputs, Outputs, Run, Solution, linearise
from hypergrad.adjoints.tapes import Taped

if TYPE_CHECKING:
    from hypergrad.adjoints.reversible import Reversible
from hypergrad.program import PARAMS, Leaf, Observed, Optimizer

RECOVERED = "hypergrad: recovered"  # by which a program shows that it plays a run backwards


class Guard(NamedTuple):
    """How coarse the shifts of one variable of one leaf were so far, and since what step too much so.

    Attributes:
      total: by row, see `exact.coarseness`.
      since: -1 for none.
    """

    total: Array
    since: Array


class Health(NamedTuple):
    """How a run went.

    Attributes:
      failed: ``(3,)``, the first step that failed or -1, why (an index into `Exact.troubles`), and where.
      needed: tape, by what is taped.
      recovered: whether the start was.
      broken: ``(2,)``, the last step whose derivatives were no numbers, and the leaf; -1 for none, -3 where
        only what comes out for hyperparameters, meta, batches and closures is no number.
    """

    failed: Array
    needed: list[Array]
    recovered: Array
    broken: Array


class Played(NamedTuple):
    """A segment of the run forwards.

    Attributes:
      leaves: its exact end.
      tapes: of every leaf.
      records: what was remembered, by step and leaf.
      outputs: of its steps.
      failed: as in `Health`.
      guards: by leaf and variable.
    """

    leaves: list[ExactLeaf]
    tapes: list[list[Array]]
    records: list[dict[str, Array]]
    outputs: Outputs
    failed: Array
    guards: list[dict[str, Guard]]


class Recorded(NamedTuple):
    """What the way back needs: the last segment, and the starts of all where there are several."""

    played: Played
    checkpoints: list[list[ExactLeaf]]
    health: Health


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


def _spread_shapes(run: Run, flags: PyTree, hypers: PyTree, start: list[Leaf]) -> list[tuple[int, ...]]:
    """To which shapes to spread the wanted hyperparameters before differentiating in them.

    Their cotangents then come element by element, and `_sum_to` adds them faster than the compiler.  Only
    for optimizers that act element by element: others, such as K-FAC, need numbers.
    """
    assert isinstance(run.optimizer, Optimizer)
    alike = all(variable.init is jnp.zeros_like for variable in run.optimizer.variables.values())
    shapes = []
    for part, part_flags in zip(hypers, flags):
        for leaf, leaf_hypers, leaf_flags in zip(start, part, part_flags):
            for name in sorted(leaf_hypers):
                if leaf_flags[name]:
                    shapes.append(leaf[PARAMS].shape if alike else leaf_hypers[name].shape)
    return shapes


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over what was broadcast.  Sums over everything are inner products, which vectorise."""
    if shape == () and x.ndim:
        ones = jnp.ones(x.shape[-1], x.dtype)
        return jnp.sum(jnp.matmul(x, ones, precision="highest"))
    padded = (1,) * (x.ndim - len(shape)) + shape
    axes = [k for k, (a, b) in enumerate(zip(x.shape, padded)) if a != b]
    return jnp.sum(x, axis=axes, keepdims=True).reshape(shape)


class Span(NamedTuple):
    """Steps ``first ... first + length - 1`` of a run; taken one by one, so that no array is cut up."""

    first: Array
    length: int

    def steps(self) -> Array:
        """Their numbers, counted from the start of the run."""
        return self.first + jnp.arange(self.length, dtype=jnp.int32)


def _at(tree: PyTree, step: Array) -> PyTree:
    """One step's slice of arrays by step."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, step, keepdims=False), tree)


def _all_equal(a: PyTree, b: PyTree) -> Array:
    same = jax.tree.map(lambda x, y: jnp.all(x == y), a, b)
    return jnp.all(jnp.stack([jnp.asarray(True), *jax.tree.leaves(same)]))


class Arrays(NamedTuple):
    """What a run is given.

    Attributes:
      constants: the same at every step.
      inputs: by step.
      always_true: true, which the compiler does not know; see `hypergrad._base.compiler`.
    """

    constants: Constants
    inputs: Inputs
    always_true: Array


def _arrays(start: list[Leaf], constants: Constants, inputs: Inputs) -> Arrays:
    """What a run is given; where all of that is known to the compiler, so is what comes of it."""
    given = jax.tree.leaves((start, constants, inputs))
    numbers = [x for x in given if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
    firsts = [jax.lax.slice(x, [0] * x.ndim, [1] * x.ndim).reshape(()) for x in numbers]
    always_true = [x * 0 != 1 for x in firsts]
    return Arrays(constants, inputs, jnp.all(jnp.stack([jnp.asarray(True), *always_true])))


def _bits(numbers: Sequence[exact.Fixed]) -> list[Any]:
    """Numbers without their radix, which does not count where they are zeros."""
    return [number[:2] for number in numbers]


def _same(a: Sequence[ExactLeaf], b: Sequence[ExactLeaf]) -> Array:
    """Whether two states are the same bits.  The radix of an array of zeros does not count."""

    def bits(leaves: Sequence[ExactLeaf]) -> PyTree:
        return [(_bits([*leaf.numbers.values()]), leaf.buffers) for leaf in leaves]

    return _all_equal(bits(a), bits(b))


def _torn_off(leaves: Sequence[ExactLeaf]) -> list[ExactLeaf]:
    """A state to go on from on new tapes."""
    return [ExactLeaf(leaf.numbers, [exact.torn_off(b) for b in leaf.buffers]) for leaf in leaves]


def packed(leaves: Sequence[ExactLeaf], guards: Sequence[Mapping[str, Guard]]) -> PyTree:
    """An exact state as arrays of at most 32 bits, which survive with JAX's 64-bit mode off.

    How coarse its shifts were goes with it: a run that goes on where training has all but ended adds
    little to numbers that are little by now, and is no coarser for it than one run of all steps.
    """
    with jax.enable_x64(True):

        def narrow(x: Array) -> Array:
            if x.dtype == jnp.float64:
                x = jax.lax.bitcast_convert_type(x, jnp.int64)
            if x.dtype != jnp.int64:
                return x
            return jnp.stack([(x >> 32).astype(jnp.uint32), x.astype(jnp.uint32)])

        totals = [{name: guard.total for name, guard in each.items()} for each in guards]
        return jax.tree.map(narrow, [(*leaf, each) for leaf, each in zip(_torn_off(leaves), totals)])


def unpacked(state: PyTree) -> tuple[list[ExactLeaf], list[dict[str, Array]]]:
    """Undo `packed`: the state, and how coarse its shifts were."""
    with jax.enable_x64(True):

        def wide(x: Array) -> Array:
            return ((x[0].astype(jnp.uint64) << 32) | x[1].astype(jnp.uint64)).astype(jnp.int64)

        leaves = [
            ExactLeaf(
                {name: exact.Fixed(wide(x.high), x.low, x.radix) for name, x in numbers.items()},
                [exact.Buffer(b.register, wide(b.bits)) for b in buffers],
            )
            for numbers, buffers, _ in state
        ]
        double = lambda x: jax.lax.bitcast_convert_type(wide(x), jnp.float64)  # noqa: E731
        return leaves, [{name: double(x) for name, x in totals.items()} for _, _, totals in state]


def _weighed(
    guards: list[dict[str, Guard]], now: Stepped, at: tuple[Array, Array], steps: int
) -> list[dict[str, Guard]]:
    """The guards after one more step.

    Looked at is what was added up to now: later steps may be large only because an earlier one was lost.
    What has decayed is no longer there: parameters that were large excuse nothing once they are small.

    Args:
      guards: before the step.
      now: after it.
      at: the step, and whether it was guarded.
      steps: of the run.
    """
    step, guarded = at
    new = [dict(each) for each in guards]
    for name in dict.fromkeys(name for each in now.coarse for name in each):
        places = [i for i, each in enumerate(now.coarse) if name in each]
        totals = [guards[i][name].total for i in places]
        if name == PARAMS:
            totals = [total * now.faded[i] for total, i in zip(totals, places)]
        totals = [total + now.coarse[i][name] for total, i in zip(totals, places)]
        since = jnp.stack([guards[i][name].since for i in places])
        doubted = jnp.stack([jnp.any(total > 0) for total in totals])
        doubted = guarded & jnp.any(doubted & (since < 0))

        def judged(_: Array, doubted: Array, totals: list[Array], numbers: list[exact.Fixed]) -> Array:
            return bundles.matters(doubted, totals, numbers, LARGEST_LOSS, steps)

        numbers = [now.leaves[i].numbers[name] for i in places]
        none = jnp.zeros(len(places), bool)
        found = in_place(doubted, judged, none, doubted, totals, numbers)
        since = jnp.where((since < 0) & found, step, since)
        for k, i in enumerate(places):
            new[i][name] = Guard(totals[k], since[k])
    return new


@dataclass(frozen=True)
class Playback:
    """All that is static about playing one run, forwards and backwards.

    Attributes:
      adjoint: of the user's.
      run: to be played.
      integers: its exact arithmetic.
      taped: what is taped of every leaf.
      flags: what will be differentiated on the way back.
      lengths: of the tapes; None if there will be no way back.
    """

    adjoint: "Reversible"
    run: Run
    integers: Exact
    taped: list[list[Taped]]
    flags: Flags
    lengths: list[list[int]] | None

    @property
    def length(self) -> int:
        """Of a segment, in steps; the last may be shorter."""
        return self.adjoint.length(self.run.steps)

    def begin(
        self, start: list[Leaf], constants: Constants, always_true: Array
    ) -> tuple[list[ExactLeaf], list[dict[str, Guard]]]:
        """The start as integers, and what rounding took from it."""
        earlier, totals = (None, None) if constants.exact is None else unpacked(constants.exact)
        numbers: list[dict[str, exact.Fixed]] = [{} for _ in start]
        guards: list[dict[str, Guard]] = [{} for _ in start]
        for name in self.integers.variables:
            given = [leaf[name] for leaf in start]
            fresh = self.started(name, given, always_true)
            for i, coarse in enumerate(bundles.coarseness(always_true, fresh, given, LARGEST_LOSS)):
                number, before = fresh[i], None if earlier is None else earlier[i].numbers[name]
                if before is not None and totals is not None:
                    # The integers behind the start, where it is still what an earlier run left: that is
                    # not rounded again.
                    known = jnp.all(exact.to_float(before, given[i].dtype) == given[i])
                    number = jax.tree.map(lambda a, b, known=known: jnp.where(known, a, b), before, number)
                    coarse = jnp.where(known, totals[i][name], coarse)
                numbers[i][name] = number
                guards[i][name] = Guard(coarse, jnp.int32(-1))
        return [ExactLeaf(*each) for each in zip(numbers, self.buffers(earlier))], guards

    def buffers(self, earlier: list[ExactLeaf] | None) -> list[list[exact.Buffer]]:
        """Those with which the run begins: empty, or as an earlier run left them."""
        if earlier is not None:
            return [leaf.buffers for leaf in earlier]
        return [[exact.empty(s.shape, s.factor_shape) for s in taped] for taped in self.taped]

    def started(self, name: str, given: list[Array], always_true: Array) -> list[exact.Fixed]:
        """The start of a variable."""
        assert isinstance(self.run.optimizer, Optimizer)
        radix = dict(self.adjoint.radix).get(name, exact.UNSET)
        words = self.run.optimizer.words_of(name)
        return bundles.shift(always_true, [exact.zero(x.shape, words, radix) for x in given], given)

    def recovered(
        self, start: list[Leaf], constants: Constants, found: Sequence[ExactLeaf], always_true: Array
    ) -> Array:
        """Whether the run backwards arrived at its start; looked at one variable after the other."""
        earlier = None if constants.exact is None else unpacked(constants.exact)[0]
        same = []
        for name in self.integers.variables:
            given = [leaf[name] for leaf in start]
            numbers = [leaf.numbers[name] for leaf in found]

            def alike(_: Array, numbers: list[exact.Fixed], given: list[Array], name: str = name) -> Array:
                again = self.started(name, given, always_true)
                equal = [_all_equal(*pair) for pair in zip(_bits(numbers), _bits(again))]
                if earlier is not None:
                    before = [leaf.numbers[name] for leaf in earlier]
                    known = [jnp.all(exact.to_float(a, x.dtype) == x) for a, x in zip(before, given)]
                    kept = [_all_equal(*pair) for pair in zip(_bits(numbers), _bits(before))]
                    equal = [jnp.where(*each) for each in zip(known, kept, equal)]
                return jnp.all(jnp.stack(equal))

            same.append(in_place(always_true, alike, jnp.asarray(False), numbers, given))
        same.append(_all_equal([leaf.buffers for leaf in found], self.buffers(earlier)))
        return jnp.all(jnp.stack(same))

    def play(
        self,
        leaves: list[ExactLeaf],
        guards: list[dict[str, Guard]],
        failed: Array,
        arrays: Arrays,
        span: Span,
        lengths: list[list[int]] | None,
    ) -> Played:
        """A segment forwards on integers, on new tapes of these lengths, or without a way back."""
        run, integers, (constants, inputs, always) = self.run, self.integers, arrays
        tapes = [
            [
                exact.blank_tape(s.shape, s.factor_shape, 0 if lengths is None else lengths[i][k])
                for k, s in enumerate(leaf)
            ]
            for i, leaf in enumerate(self.taped)
        ]
        bad_loss = jnp.array([integers.troubles().index(BAD_LOSS), 0], jnp.int32)

        def step(carry: Any, t: Array) -> Any:
            leaves, tapes, guards, failed = carry
            x = _at(inputs, t)
            always_true = always & (x.step >= 0)
            params = [leaf[PARAMS] for leaf in integers.floats(always_true, leaves, PARAMS)]
            if self.lengths is None:
                loss, evaluated = run.gradient(params, constants.loss, x.batch)
            else:
                at = linearise(run, params, (constants.loss, x.batch), self.flags.loss, always_true)
                loss, evaluated, _ = at.primal
            observations = run.observations(constants.hypers, x.hypers, evaluated, always_true)
            # Rounding is looked at in the first steps, and in every eighth: it is in all alike.
            guarded = (t < 8) | (t % 8 == 0)
            now = integers.step(
                (constants.hypers, x.hypers, x.step), leaves, tapes, observations, always_true, guarded
            )
            wrong = jnp.where(jnp.isfinite(loss), now.wrong, bad_loss)
            at_step = jnp.concatenate([x.step[None], wrong])
            failed = jnp.where((failed[0] < 0) & (wrong[0] > 0), at_step, failed)
            snapshot = run.snapshot(integers.floats(always_true, leaves), loss, evaluated, x.step)
            outputs = Outputs(loss, run.watched(snapshot, constants))
            guards = _weighed(guards, now, (x.step, guarded), run.steps)
            return (now.leaves, now.tapes, guards, failed), (outputs, now.records)

        carry, (outputs, records) = jax.lax.scan(step, (leaves, tapes, guards, failed), span.steps())
        leaves, tapes, guards, failed = carry
        return Played(leaves, tapes, records, outputs, failed, guards)

    def replay(
        self,
        played: Played,
        cotangents: Cotangents,
        sums: list[Array],
        broken: Array,
        arrays: Arrays,
        span: Span,
    ) -> Any:
        """A segment backwards.

        Args:
          played: the segment forwards.
          cotangents: of its end, and of the losses of the whole run and what was watched in it.
          sums: cotangents of the constants, from later segments.
          broken: as in `Health`.
          arrays: of the run.
          span: the steps of the segment.

        Returns:
          Exact start of the segment, its cotangents, the sums, and what is broken; and the cotangents of
          the inputs.
        """
        run, integers, flags = self.run, self.integers, self.flags
        constants, inputs, always = arrays
        wanted = sum(jax.tree.leaves(flags.constants.loss))
        hypers_wanted = sum(jax.tree.leaves(flags.constants.hypers))
        slices = jax.eval_shape(lambda tree: jax.tree.map(lambda h: h[0], tree), inputs.hypers)
        like = jax.eval_shape(lambda leaves: integers.floats(jnp.asarray(True), leaves), played.leaves)
        spread_shapes = _spread_shapes(run, flags.hypers, (constants.hypers, slices), like)

        def unstep(carry: Any, at: tuple[Array, list[dict[str, Array]]]) -> Any:
            leaves, leaf_cotangents, sums, broken = carry
            t, records = at
            x, loss_bars, watched_bars = _at((inputs, cotangents.loss, cotangents.watched), t)
            at_step = (constants.hypers, x.hypers, x.step)
            always_true = always & (x.step >= 0)
            leaves, kept = integers.kept(at_step, leaves, played.tapes)
            records = [a | b for a, b in zip(records, kept)]
            leaves = integers.unstep(at_step, leaves, played.tapes, None, records, always_true)
            params = [leaf[PARAMS] for leaf in integers.floats(always_true, leaves, PARAMS)]
            linearised = linearise(run, params, (constants.loss, x.batch), flags.loss, always_true)
            loss, evaluated, _ = linearised.primal
            observations = run.observations(constants.hypers, x.hypers, evaluated, always_true)
            leaves = integers.unstep(at_step, leaves, played.tapes, observations, records, always_true)
            floats = integers.floats(always_true, leaves)

            # The float twin of the step, as a function of everything but the parameters of the loss.
            hypers, merge = split(flags.hypers, (constants.hypers, x.hypers))
            watching, merge_watch = split(flags.constants.watch, constants.watch)
            spread = [jnp.broadcast_to(h, shape) for h, shape in zip(hypers, spread_shapes)]

            def twin(
                floats: list[Leaf], loss: Array, evaluated: list[Observed], spread: list[Array], watch: Any
            ) -> Any:
                fixed, scheduled = merge(spread)
                new = run.stepped(floats, evaluated, fixed, scheduled, x.step, kept)
                if cotangents.watched is None:
                    return new, None
                snapshot = run.snapshot(floats, loss, evaluated, x.step)
                return new, inexact_leaves(
                    run.watched(snapshot, constants._replace(watch=merge_watch(watch)))
                )

            _, pull = jax.vjp(twin, floats, loss, evaluated, spread, watching)
            leaf_cotangents, of_loss, direction, spread, of_watch = pull((leaf_cotangents, watched_bars))
            of_losses = [*(loss_bars or []), *([] if cotangents.watched is None else [of_loss])]
            products = linearised.transposed(sum(of_losses) if of_losses else None, direction)
            for leaf, product in zip(leaf_cotangents, products.params):
                leaf[PARAMS] += product
            each = [_sum_to(bar, h.shape) for bar, h in zip(spread, hypers)]
            same = [*products.wanted[:wanted], *each[:hypers_wanted], *of_watch]
            sums = [a + b for a, b in zip(sums, same)]
            for i, leaf in enumerate(leaf_cotangents):
                # Behind the first step are only the derivatives in the start of variables.
                unused = {name: (t == 0) & (name != PARAMS) for name in leaf}
                largest = {name: jnp.max(jnp.abs(bar), initial=0) for name, bar in leaf.items()}
                numbers = jnp.all(jnp.stack([jnp.isfinite(largest[k]) | unused[k] for k in leaf]))
                place = jnp.stack([x.step, jnp.int32(i)])
                broken = jnp.where((broken[0] == -1) & ~numbers, place, broken)
            return (leaves, leaf_cotangents, sums, broken), (products.wanted[wanted:], each[hypers_wanted:])

        carry = (played.leaves, cotangents.end, sums, broken)
        return jax.lax.scan(unstep, carry, (span.steps(), played.records), reverse=True)

    def forward(self, start: list[Leaf], constants: Constants, inputs: Inputs) -> tuple[Solution, Recorded]:
        """The run forwards: its solution, and what the way back needs."""
        with jax.enable_x64(True):
            # Compiled as one also where nobody else does.
            (end, outputs), record = jax.jit(self.played, inline=True)(start, constants, inputs)
        end, outputs = self.refuse((end, outputs), record.health)
        return (end, outputs), record

    def played(self, start: list[Leaf], constants: Constants, inputs: Inputs) -> tuple[Solution, Recorded]:
        """`forward`, whatever goes wrong."""
        arrays = _arrays(start, constants, inputs)
        whole, rest = divmod(self.run.steps, self.length)
        with jax.enable_x64(True):
            always_true = arrays.always_true
            leaves, guards = self.begin(start, constants, always_true)
            failed = jnp.array([-1, 0, 0], jnp.int32)
            for i, leaf in enumerate(leaves):
                for name, x in leaf.numbers.items():
                    trouble = self.integers.troubles().index(("range", name))
                    step = inputs.step[0]
                    wrong = jnp.stack([step, jnp.int32(trouble), jnp.int32(i)])
                    failed = jnp.where(exact.fits(x) | (failed[0] >= 0), failed, wrong)
            checkpoints: list[Any] = []
            if whole == 1 and rest == 0:
                span = Span(jnp.int32(0), self.length)
                played = self.play(leaves, guards, failed, arrays, span, self.lengths)
                needed = self.tape_needed(played.leaves)
            else:

                def segment(carry: Any, first: Array, count: int = self.length) -> Any:
                    leaves, guards, failed, needed = carry
                    played = self.play(leaves, guards, failed, arrays, Span(first, count), None)
                    needed = [jnp.maximum(*pair) for pair in zip(needed, self.tape_needed(played.leaves))]
                    end = _torn_off(played.leaves)
                    return (end, played.guards, played.failed, needed), (leaves, played.outputs)

                carry = (leaves, guards, failed, [jnp.int64(0) for leaf in self.taped for _ in leaf])
                firsts = self.length * jnp.arange(whole, dtype=jnp.int32)
                carry, (starts, outputs) = jax.lax.scan(segment, carry, firsts)
                checkpoints.append(starts)
                outputs = jax.tree.map(lambda x: x.reshape(whole * self.length, *x.shape[2:]), outputs)
                if rest:
                    carry, (starts, ended) = segment(carry, jnp.int32(whole * self.length), rest)
                    checkpoints.append(starts)
                    outputs = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, ended)
                leaves, guards, failed, needed = carry
                played = Played(leaves, [], [], outputs, failed, guards)
            failed = self.too_coarse(played)
            end, state = (
                self.integers.floats(always_true, played.leaves),
                packed(played.leaves, played.guards),
            )
        fine = jnp.array([-1, 0], jnp.int32)
        health = Health(failed, needed, jnp.asarray(True), fine)
        record = Recorded(played._replace(outputs=Outputs(None, None), guards=[]), checkpoints, health)
        return (end, played.outputs._replace(exact=state)), record

    def tape_needed(self, leaves: Sequence[ExactLeaf]) -> list[Array]:
        """Length of tape that was needed, by what is taped."""
        return [exact.tape_length(b.bits) for leaf in leaves for b in leaf.buffers]

    def too_coarse(self, played: Played) -> Array:
        """What has failed, rounding that took too much included."""
        failed = played.failed
        for i, guards in enumerate(played.guards):
            for name, guard in guards.items():
                trouble = self.integers.troubles().index(("rounding", name))
                found = jnp.stack([guard.since, jnp.int32(trouble), jnp.int32(i)])
                failed = jnp.where((failed[0] < 0) & (guard.since >= 0), found, failed)
        return failed

    def backward(self, *given: Any) -> tuple[list[Leaf], list[Array]]:
        """The run backwards, from what `replayed` is given.

        Returns:
          Cotangents of the start, and of what is wanted of constants and inputs.
        """
        with jax.enable_x64(True):
            result, health = jax.jit(self.replayed, inline=True)(*given)
        # What went wrong forwards is told here too: without jit nobody may have looked there, and under jit
        # the compiler leaves out what only an unused value depends on.
        return self.refuse(result, health)

    def replayed(
        self,
        start: list[Leaf],
        constants: Constants,
        inputs: Inputs,
        record: Recorded,
        cotangents: Cotangents,
    ) -> tuple[tuple[list[Leaf], list[Array]], Health]:
        """`backward`, whatever goes wrong."""
        played, checkpoints, health = record
        arrays, flags = _arrays(start, constants, inputs), self.flags
        fixed, _ = split(
            (flags.constants.loss, flags.constants.hypers, flags.constants.watch),
            (constants.loss, constants.hypers, constants.watch),
        )
        whole, rest = divmod(self.run.steps, self.length)
        ends = [x for leaf in cotangents.end for x in leaf.values()]
        given = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in ends]))
        always_true = arrays.always_true
        with jax.enable_x64(True):
            sums = [jnp.zeros_like(x) for x in fixed]
            # Where what came in was no number, nothing on the way is to blame.
            broken = jnp.stack([jnp.where(given, -1, -2).astype(jnp.int32), jnp.int32(0)])
            if not checkpoints:
                span = Span(jnp.int32(0), self.length)
                carry, steps = self.replay(played, cotangents, sums, broken, arrays, span)
                found, leaf_cotangents, sums, broken = carry
                recovered = self.recovered(start, constants, found, always_true)
            else:

                def segment(carry: Any, at: Any, count: int = self.length) -> Any:
                    end, leaf_cotangents, sums, broken, recovered = carry
                    leaves, first = at
                    span, unharmed = Span(first, count), jnp.array([-1, 0, 0], jnp.int32)
                    guards = self.begin(start, constants, always_true)[1]  # for their shapes
                    played = self.play(leaves, guards, unharmed, arrays, span, self.lengths)
                    again = _same(end, _torn_off(played.leaves))
                    now = cotangents._replace(end=leaf_cotangents)
                    carry, steps = self.replay(played, now, sums, broken, arrays, span)
                    found, leaf_cotangents, sums, broken = carry
                    return (
                        leaves,
                        leaf_cotangents,
                        sums,
                        broken,
                        recovered & again & _same(leaves, found),
                    ), steps

                carry = (_torn_off(played.leaves), cotangents.end, sums, broken, jnp.asarray(True))
                ended = []
                if rest:
                    at = (checkpoints[1], jnp.int32(whole * self.length))
                    carry, steps = segment(carry, at, rest)
                    ended.append(steps)
                firsts = self.length * jnp.arange(whole, dtype=jnp.int32)
                carry, steps = jax.lax.scan(segment, carry, (checkpoints[0], firsts), reverse=True)
                joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
                steps = jax.tree.map(lambda *parts: jnp.concatenate(parts), joined, *ended)
                _, leaf_cotangents, sums, broken, recovered = carry
        recovered = checkpoint_name(recovered, RECOVERED)
        batch_bars, hyper_bars = steps
        found_all = [*sums, *batch_bars, *hyper_bars]
        numbers = jnp.all(jnp.stack([jnp.asarray(True), *(jnp.all(jnp.isfinite(x)) for x in found_all)]))
        broken = jnp.where((broken[0] == -1) & ~numbers, jnp.array([-3, 0], jnp.int32), broken)
        return (leaf_cotangents, found_all), health._replace(recovered=recovered, broken=broken)

    def refuse(self, result: PyTree, health: Health) -> PyTree:
        """Pass the result on, or raise what was wrong with the run."""
        allotted = None if self.lengths is None else [n for leaf in self.lengths for n in leaf]

        def explain(
            step: int, why: int, leaf: int, recovered: bool, broken: int, broken_leaf: int, *needed: int
        ) -> str | None:
            if step >= 0:
                return self.what_failed(step, why, leaf)
            for have, need, taped in zip(allotted or needed, needed, itertools.chain(*self.taped)):
                if need > have:
                    return self.overflowed(taped, need)
            if not recovered:
                return self.not_recovered()
            return None if broken in (-1, -2) else self.no_numbers(broken, broken_leaf)

        return error_if(explain, result, *health.failed, health.recovered, *health.broken, *health.needed)

    def what_failed(self, step: int, why: int, leaf: int) -> str:
        """Message for a step that failed."""
        kind, name = self.integers.troubles()[why]
        call, place = self.run.call, self.run.names[leaf]
        at = f"{call}: at step {step} "
        whose = f"{name!r} of {place}" if name != PARAMS else place
        if kind == "loss":
            return (
                f"{at}the loss, or what the optimizer remembers of the step, became NaN or infinite: "
                "either training has diverged, which a lower learning rate cures, or the loss is undefined "
                "there"
            )
        if kind == "factor":
            return (
                f"{at}a factor of {whose} left [2**-7, 1], outside of which it cannot be undone; keep it "
                "inside, or pass adjoint=Checkpointed() (and sgd() if there is to be no momentum)"
            )
        if kind == "level":
            return f"{at}what the optimizer keeps of {place} was none of the levels that its Keep names"
        given = dict(self.adjoint.radix).get(name)
        assert isinstance(self.run.optimizer, Optimizer)
        words = self.run.optimizer.words_of(name)
        if kind == "rounding":
            return (
                f"{at}rounding took more than {LARGEST_LOSS:.0e} of what was added to a row of {whose}: "
                "next to the largest numbers in it, those are too small for exact arithmetic. Give them a "
                "leaf of their own, or pass adjoint=Checkpointed(), or "
                + (
                    f"Reversible(radix={{{name!r}: r}}) with the largest r for which |{name}| < "
                    "2**(62 - r) all along"
                    if given is None
                    else f"a larger radix than {given}"
                )
            )
        if given is not None:
            return (
                f"{at}{whose} became NaN or left the range of exact arithmetic, |{name}| < "
                f"2**{62 - given}, that radix={{{name!r}: {given}}} asks for; leave the radix to be chosen "
                "from the numbers, or pass a smaller one"
            )
        return (
            f"{at}{whose} became NaN or grew to 2**{exact.HEADROOM[words]} times the largest number that "
            "was first in it. Either training has diverged, which a lower learning rate cures, or it began "
            f"with numbers that say nothing of later ones: pass Reversible(radix={{{name!r}: r}}) with "
            f"the largest r for which |{name}| < 2**(62 - r) all along, or adjoint=Checkpointed()"
        )

    def overflowed(self, taped: Taped, need: int) -> str:
        """Message for a tape that is too short."""
        bits = (8 * need / max(1, math.prod(taped.factor_shape)) + 8) / self.length
        enough = {taped.variable: math.ceil(100 * bits) / 100}
        return (
            f"{self.run.call}: the information buffer of {taped.variable!r} would overflow: its factors "
            f"destroy {bits:.3g} bits per element and step, and room for "
            f"{self.adjoint.bits_of(taped.variable):.3g} was reserved; pass Reversible(bits={enough}) or "
            "more"
        )

    def not_recovered(self) -> str:
        """Message for a run that did not come back."""
        return (
            f"{self.run.call}: played backwards, the run did not arrive at its start, so that its "
            "hypergradient would be wrong and is withheld. The loss did not give the same gradient bit "
            "for bit when it was evaluated again (a non-deterministic operation or an impure function?); "
            "make it deterministic or pass adjoint=Checkpointed()"
        )

    def no_numbers(self, step: int, leaf: int) -> str:
        """Message for a derivative that is NaN or infinite."""
        where = "in a hyperparameter, meta or batch"
        if step >= 0:
            where = f"of step {step} in {self.run.names[leaf]}"
        return (
            f"{self.run.call}: the run was recovered, but on the way back the derivative {where} became "
            "NaN or infinite. Either a second derivative of the loss is undefined there (a norm or a root "
            "at 0, |w|**1.5), which a small constant under the root cures; or hypergradients grow from "
            "step to step until they overflow: take fewer steps or a lower learning rate, where gradients "
            "have died away to rounding a larger eps, or differentiate the last steps only with "
            "adjoint=Truncated(steps)"
        )


def inexact_leaves(tree: PyTree) -> list[Any]:
    """The leaves that have derivatives."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, SymbolicZero))
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
