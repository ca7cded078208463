"""Exact reversal: the run is played backwards, bit for bit.

The run forwards (`_Playback.play`) moves integers and writes the bits that scales destroy to tapes; the run
backwards (`_Playback.replay`) reads them, finds the gradient again at every step, and differentiates the
float twin of the step.

First derivatives are taken so.  Derivatives of these, of any order and in any nesting, are those of the
float twin of the whole run, in segments that are computed again (`twin`).
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from hypergrad import bundles, exact
from hypergrad.compiler import in_place
from hypergrad.opaque import with_rule
from hypergrad.program import (
    BAD_LOSS,
    LARGEST_LOSS,
    PARAMS,
    Exact,
    ExactLeaf,
    Leaf,
    Optimizer,
    ReversalError,
    Seen,
    Stepped,
)
from hypergrad.run import (
    Constants,
    Inputs,
    Outputs,
    PyTree,
    Run,
    Solution,
    Static,
    closures_refused,
    freeze,
    in_segments,
    instantiate,
    linearise,
    perturbed,
    scatter,
    split,
    thaw,
)
from hypergrad.tapes import Taped, complete, known_lengths, taped_of

RECOVERED = "hypergrad: recovered"  # by which a program shows that it plays a run backwards


class LaneWarning(RuntimeWarning):
    """Some of the runs under ``jax.vmap`` failed; their results are NaN."""


class _Guard(NamedTuple):
    """How coarse the shifts of one variable of one leaf were so far, and since what step too much so.

    Attributes:
      total: by row, see `exact.coarseness`.
      since: -1 for none.
    """

    total: Array
    since: Array


class _Health(NamedTuple):
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


class _Played(NamedTuple):
    """A segment of the run forwards.

    Attributes:
      leaves: its exact end.
      tapes: of every leaf.
      records: what was remembered, by step and leaf.
      outputs: of its steps.
      failed: as in `_Health`.
      guards: by leaf and variable.
    """

    leaves: list[ExactLeaf]
    tapes: list[list[Array]]
    records: list[dict[str, Array]]
    outputs: Outputs
    failed: Array
    guards: list[dict[str, _Guard]]


class _Record(NamedTuple):
    """What the way back needs: the last segment, and the starts of all where there are several."""

    played: _Played
    checkpoints: list[list[ExactLeaf]]
    health: _Health


class _Flags(NamedTuple):
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


class _Cotangents(NamedTuple):
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


def refuse_if(
    explain: Callable[..., str | None],
    result: PyTree,
    *numbers: Array,
    error: type[Exception] = ReversalError,
) -> PyTree:
    """Pass the result on, unless the numbers are a reason not to: then raise an error.

    Raises at once where the numbers are known, else from the running program, by a callback on which the
    result depends.  Of several runs under ``vmap`` those that failed end in NaN, derivatives too, with a
    `LaneWarning` that names them; only where all did is the error raised.

    Args:
      explain: from the numbers, as Python scalars, to a message, or None if all is well.
      result: a pytree of arrays.
      numbers: scalars.
      error: its class.
    """

    def check(*numbers: Any) -> np.ndarray:
        columns = np.broadcast_arrays(*numbers)
        shape = columns[0].shape
        messages = [explain(*row) for row in zip(*(column.ravel().tolist() for column in columns))]
        failed = {k: message for k, message in enumerate(messages) if message is not None}
        if failed and len(failed) == len(messages):
            raise error(failed[0])
        for k, message in failed.items():
            lane = [int(i) for i in np.unravel_index(k, shape)]
            warnings.warn(LaneWarning(f"run {lane} of {list(shape)} under vmap: {message}"), stacklevel=2)
        return np.reshape([message is not None for message in messages], shape)

    if not numbers:
        return result
    if not any(isinstance(x, jax.core.Tracer) for x in numbers):
        check(*numbers)
        return result
    shape = jax.ShapeDtypeStruct((), bool)
    refused = jax.pure_callback(check, shape, *numbers, vmap_method="broadcast_all")
    # A product, so that derivatives are NaN too.
    return jax.tree.map(
        lambda x: (
            x * jnp.where(refused, jnp.nan, 1.0).astype(x.dtype)
            if jnp.issubdtype(x.dtype, jnp.inexact)
            else x
        ),
        result,
    )


class _Span(NamedTuple):
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


class _Arrays(NamedTuple):
    """What a run is given.

    Attributes:
      constants: the same at every step.
      inputs: by step.
      live: true, which the compiler does not know; see `hypergrad.compiler`.
    """

    constants: Constants
    inputs: Inputs
    live: Array


def _arrays(start: list[Leaf], constants: Constants, inputs: Inputs) -> _Arrays:
    """What a run is given; where all of that is known to the compiler, so is what comes of it."""
    given = jax.tree.leaves((start, constants, inputs))
    numbers = [x for x in given if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
    firsts = [jax.lax.slice(x, [0] * x.ndim, [1] * x.ndim).reshape(()) for x in numbers]
    live = [x * 0 != 1 for x in firsts]
    return _Arrays(constants, inputs, jnp.all(jnp.stack([jnp.asarray(True), *live])))


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


def packed(leaves: Sequence[ExactLeaf], guards: Sequence[Mapping[str, _Guard]]) -> PyTree:
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


def twin(run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
    """The whole run in floats, for derivatives of derivatives: by JAX alone, in segments."""
    return in_segments(run, math.isqrt(run.steps), start, constants, inputs, run.plain_gradient)


def _weighed(
    guards: list[dict[str, _Guard]], now: Stepped, at: tuple[Array, Array], steps: int
) -> list[dict[str, _Guard]]:
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
            new[i][name] = _Guard(totals[k], since[k])
    return new


@dataclass(frozen=True)
class _Playback:
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
    flags: _Flags
    lengths: list[list[int]] | None

    @property
    def length(self) -> int:
        """Of a segment, in steps; the last may be shorter."""
        return self.adjoint.length(self.run.steps)

    def begin(
        self, start: list[Leaf], constants: Constants, live: Array
    ) -> tuple[list[ExactLeaf], list[dict[str, _Guard]]]:
        """The start as integers, and what rounding took from it."""
        earlier, totals = (None, None) if constants.exact is None else unpacked(constants.exact)
        numbers: list[dict[str, exact.Fixed]] = [{} for _ in start]
        guards: list[dict[str, _Guard]] = [{} for _ in start]
        for name in self.integers.variables:
            given = [leaf[name] for leaf in start]
            fresh = self.started(name, given, live)
            for i, coarse in enumerate(bundles.coarseness(live, fresh, given, LARGEST_LOSS)):
                number, before = fresh[i], None if earlier is None else earlier[i].numbers[name]
                if before is not None and totals is not None:
                    # The integers behind the start, where it is still what an earlier run left: that is
                    # not rounded again.
                    known = jnp.all(exact.to_float(before, given[i].dtype) == given[i])
                    number = jax.tree.map(lambda a, b, known=known: jnp.where(known, a, b), before, number)
                    coarse = jnp.where(known, totals[i][name], coarse)
                numbers[i][name] = number
                guards[i][name] = _Guard(coarse, jnp.int32(-1))
        return [ExactLeaf(*each) for each in zip(numbers, self.buffers(earlier))], guards

    def buffers(self, earlier: list[ExactLeaf] | None) -> list[list[exact.Buffer]]:
        """Those with which the run begins: empty, or as an earlier run left them."""
        if earlier is not None:
            return [leaf.buffers for leaf in earlier]
        return [[exact.empty(s.shape, s.factor_shape) for s in taped] for taped in self.taped]

    def started(self, name: str, given: list[Array], live: Array) -> list[exact.Fixed]:
        """The start of a variable."""
        assert isinstance(self.run.optimizer, Optimizer)
        radix = dict(self.adjoint.radix).get(name, exact.UNSET)
        words = self.run.optimizer.words_of(name)
        return bundles.shift(live, [exact.zero(x.shape, words, radix) for x in given], given)

    def recovered(
        self, start: list[Leaf], constants: Constants, found: Sequence[ExactLeaf], live: Array
    ) -> Array:
        """Whether the run backwards arrived at its start; looked at one variable after the other."""
        earlier = None if constants.exact is None else unpacked(constants.exact)[0]
        same = []
        for name in self.integers.variables:
            given = [leaf[name] for leaf in start]
            numbers = [leaf.numbers[name] for leaf in found]

            def alike(_: Array, numbers: list[exact.Fixed], given: list[Array], name: str = name) -> Array:
                again = self.started(name, given, live)
                equal = [_all_equal(*pair) for pair in zip(_bits(numbers), _bits(again))]
                if earlier is not None:
                    before = [leaf.numbers[name] for leaf in earlier]
                    known = [jnp.all(exact.to_float(a, x.dtype) == x) for a, x in zip(before, given)]
                    kept = [_all_equal(*pair) for pair in zip(_bits(numbers), _bits(before))]
                    equal = [jnp.where(*each) for each in zip(known, kept, equal)]
                return jnp.all(jnp.stack(equal))

            same.append(in_place(live, alike, jnp.asarray(False), numbers, given))
        same.append(_all_equal([leaf.buffers for leaf in found], self.buffers(earlier)))
        return jnp.all(jnp.stack(same))

    def play(
        self,
        leaves: list[ExactLeaf],
        guards: list[dict[str, _Guard]],
        failed: Array,
        arrays: _Arrays,
        span: _Span,
        lengths: list[list[int]] | None,
    ) -> _Played:
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
            live = always & (x.step >= 0)
            params = [leaf[PARAMS] for leaf in integers.floats(live, leaves, PARAMS)]
            if self.lengths is None:
                loss, evaluated = run.gradient(params, constants.loss, x.batch)
            else:
                at = linearise(run, params, (constants.loss, x.batch), self.flags.loss, live)
                loss, evaluated, _ = at.primal
            seen = run.seen(constants.hypers, x.hypers, evaluated, live)
            # Rounding is looked at in the first steps, and in every eighth: it is in all alike.
            guarded = (t < 8) | (t % 8 == 0)
            now = integers.step((constants.hypers, x.hypers, x.step), leaves, tapes, seen, live, guarded)
            wrong = jnp.where(jnp.isfinite(loss), now.wrong, bad_loss)
            at_step = jnp.concatenate([x.step[None], wrong])
            failed = jnp.where((failed[0] < 0) & (wrong[0] > 0), at_step, failed)
            snapshot = run.snapshot(integers.floats(live, leaves), loss, evaluated, x.step)
            outputs = Outputs(loss, run.watched(snapshot, constants))
            guards = _weighed(guards, now, (x.step, guarded), run.steps)
            return (now.leaves, now.tapes, guards, failed), (outputs, now.records)

        carry, (outputs, records) = jax.lax.scan(step, (leaves, tapes, guards, failed), span.steps())
        leaves, tapes, guards, failed = carry
        return _Played(leaves, tapes, records, outputs, failed, guards)

    def replay(
        self,
        played: _Played,
        cotangents: _Cotangents,
        sums: list[Array],
        broken: Array,
        arrays: _Arrays,
        span: _Span,
    ) -> Any:
        """A segment backwards.

        Args:
          played: the segment forwards.
          cotangents: of its end, and of the losses of the whole run and what was watched in it.
          sums: cotangents of the constants, from later segments.
          broken: as in `_Health`.
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
            leaves, bars, sums, broken = carry
            t, records = at
            x, loss_bars, watched_bars = _at((inputs, cotangents.loss, cotangents.watched), t)
            at_step = (constants.hypers, x.hypers, x.step)
            live = always & (x.step >= 0)
            leaves, kept = integers.kept(at_step, leaves, played.tapes)
            records = [a | b for a, b in zip(records, kept)]
            leaves = integers.unstep(at_step, leaves, played.tapes, None, records, live)
            params = [leaf[PARAMS] for leaf in integers.floats(live, leaves, PARAMS)]
            linearised = linearise(run, params, (constants.loss, x.batch), flags.loss, live)
            loss, evaluated, _ = linearised.primal
            seen = run.seen(constants.hypers, x.hypers, evaluated, live)
            leaves = integers.unstep(at_step, leaves, played.tapes, seen, records, live)
            floats = integers.floats(live, leaves)

            # The float twin of the step, as a function of everything but the parameters of the loss.
            hypers, merge = split(flags.hypers, (constants.hypers, x.hypers))
            watching, merge_watch = split(flags.constants.watch, constants.watch)
            spread = [jnp.broadcast_to(h, shape) for h, shape in zip(hypers, spread_shapes)]

            def twin(
                floats: list[Leaf], loss: Array, evaluated: list[Seen], spread: list[Array], watch: Any
            ) -> Any:
                fixed, scheduled = merge(spread)
                new = run.stepped(floats, evaluated, fixed, scheduled, x.step, kept)
                if cotangents.watched is None:
                    return new, None
                snapshot = run.snapshot(floats, loss, evaluated, x.step)
                return new, _inexact(run.watched(snapshot, constants._replace(watch=merge_watch(watch))))

            _, pull = jax.vjp(twin, floats, loss, evaluated, spread, watching)
            bars, of_loss, direction, spread, of_watch = pull((bars, watched_bars))
            of_losses = [*(loss_bars or []), *([] if cotangents.watched is None else [of_loss])]
            products = linearised.transposed(sum(of_losses) if of_losses else None, direction)
            for leaf, product in zip(bars, products.params):
                leaf[PARAMS] += product
            each = [_sum_to(bar, h.shape) for bar, h in zip(spread, hypers)]
            same = [*products.wanted[:wanted], *each[:hypers_wanted], *of_watch]
            sums = [a + b for a, b in zip(sums, same)]
            for i, leaf in enumerate(bars):
                # Behind the first step are only the derivatives in the start of variables.
                unused = {name: (t == 0) & (name != PARAMS) for name in leaf}
                largest = {name: jnp.max(jnp.abs(bar), initial=0) for name, bar in leaf.items()}
                numbers = jnp.all(jnp.stack([jnp.isfinite(largest[k]) | unused[k] for k in leaf]))
                here = jnp.stack([x.step, jnp.int32(i)])
                broken = jnp.where((broken[0] == -1) & ~numbers, here, broken)
            return (leaves, bars, sums, broken), (products.wanted[wanted:], each[hypers_wanted:])

        carry = (played.leaves, cotangents.end, sums, broken)
        return jax.lax.scan(unstep, carry, (span.steps(), played.records), reverse=True)

    def forward(self, start: list[Leaf], constants: Constants, inputs: Inputs) -> tuple[Solution, _Record]:
        """The run forwards: its solution, and what the way back needs."""
        with jax.enable_x64(True):
            # Compiled as one also where nobody else does.
            (end, outputs), record = jax.jit(self.played, inline=True)(start, constants, inputs)
        end, outputs = self.refuse((end, outputs), record.health)
        return (end, outputs), record

    def played(self, start: list[Leaf], constants: Constants, inputs: Inputs) -> tuple[Solution, _Record]:
        """`forward`, whatever goes wrong."""
        arrays = _arrays(start, constants, inputs)
        whole, rest = divmod(self.run.steps, self.length)
        with jax.enable_x64(True):
            live = arrays.live
            leaves, guards = self.begin(start, constants, live)
            failed = jnp.array([-1, 0, 0], jnp.int32)
            for i, leaf in enumerate(leaves):
                for name, x in leaf.numbers.items():
                    trouble = self.integers.troubles().index(("range", name))
                    step = inputs.step[0]
                    wrong = jnp.stack([step, jnp.int32(trouble), jnp.int32(i)])
                    failed = jnp.where(exact.fits(x) | (failed[0] >= 0), failed, wrong)
            checkpoints: list[Any] = []
            if whole == 1 and rest == 0:
                span = _Span(jnp.int32(0), self.length)
                played = self.play(leaves, guards, failed, arrays, span, self.lengths)
                needed = self.tape_needed(played.leaves)
            else:

                def segment(carry: Any, first: Array, count: int = self.length) -> Any:
                    leaves, guards, failed, needed = carry
                    played = self.play(leaves, guards, failed, arrays, _Span(first, count), None)
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
                played = _Played(leaves, [], [], outputs, failed, guards)
            failed = self.too_coarse(played)
            end, state = self.integers.floats(live, played.leaves), packed(played.leaves, played.guards)
        fine = jnp.array([-1, 0], jnp.int32)
        health = _Health(failed, needed, jnp.asarray(True), fine)
        record = _Record(played._replace(outputs=Outputs(None, None), guards=[]), checkpoints, health)
        return (end, played.outputs._replace(exact=state)), record

    def tape_needed(self, leaves: Sequence[ExactLeaf]) -> list[Array]:
        """Length of tape that was needed, by what is taped."""
        return [exact.tape_length(b.bits) for leaf in leaves for b in leaf.buffers]

    def too_coarse(self, played: _Played) -> Array:
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
        record: _Record,
        cotangents: _Cotangents,
    ) -> tuple[tuple[list[Leaf], list[Array]], _Health]:
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
        live = arrays.live
        with jax.enable_x64(True):
            sums = [jnp.zeros_like(x) for x in fixed]
            # Where what came in was no number, nothing on the way is to blame.
            broken = jnp.stack([jnp.where(given, -1, -2).astype(jnp.int32), jnp.int32(0)])
            if not checkpoints:
                span = _Span(jnp.int32(0), self.length)
                carry, steps = self.replay(played, cotangents, sums, broken, arrays, span)
                found, bars, sums, broken = carry
                recovered = self.recovered(start, constants, found, live)
            else:

                def segment(carry: Any, at: Any, count: int = self.length) -> Any:
                    end, bars, sums, broken, recovered = carry
                    leaves, first = at
                    span, unharmed = _Span(first, count), jnp.array([-1, 0, 0], jnp.int32)
                    guards = self.begin(start, constants, live)[1]  # for their shapes
                    played = self.play(leaves, guards, unharmed, arrays, span, self.lengths)
                    again = _same(end, _torn_off(played.leaves))
                    now = cotangents._replace(end=bars)
                    carry, steps = self.replay(played, now, sums, broken, arrays, span)
                    found, bars, sums, broken = carry
                    return (leaves, bars, sums, broken, recovered & again & _same(leaves, found)), steps

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
                _, bars, sums, broken, recovered = carry
        recovered = checkpoint_name(recovered, RECOVERED)
        batch_bars, hyper_bars = steps
        found_all = [*sums, *batch_bars, *hyper_bars]
        numbers = jnp.all(jnp.stack([jnp.asarray(True), *(jnp.all(jnp.isfinite(x)) for x in found_all)]))
        broken = jnp.where((broken[0] == -1) & ~numbers, jnp.array([-3, 0], jnp.int32), broken)
        return (bars, found_all), health._replace(recovered=recovered, broken=broken)

    def refuse(self, result: PyTree, health: _Health) -> PyTree:
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

        return refuse_if(explain, result, *health.failed, health.recovered, *health.broken, *health.needed)

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


def _by_variable(name: str, given: Any) -> dict[str, Any]:
    """A setting of `Reversible` by variable."""
    try:
        found = dict(given)
    except (TypeError, ValueError):
        found = {None: None}
    if not all(isinstance(variable, str) for variable in found):
        raise ValueError(
            f"Reversible({name}={given!r}): {name} goes by variable of the optimizer, such as "
            f'{name}={{"params": {"0.2" if name == "bits" else "40"}}}'
        )
    return found


@dataclass(frozen=True)
class Reversible:
    """The run is played backwards, bit for bit; memory holds only the bits that a step destroys.

    Weights and the optimizer's variables are integers, as in Maclaurin, Duvenaud and Adams (2015).
    Before a hypergradient is returned the recovered start is compared with the real one; where a single
    bit differs the caller gets a `ReversalError`.

    With several segments only their starts are kept, as integers, and every segment is played forwards
    again before it is played backwards: for one more training run, memory falls from ``T b`` bits per
    parameter to ``S k + T b / S``, with ``b`` bits destroyed per step and ``k`` bits of state (96 for the
    parameters and for every variable, 32 more for squares and for every `Scale`).  It is least for
    ``S = √(T b / k)``.  The bits of the run are the same for every ``S``.

    Derivatives of the hypergradient (Hessian-vector products of the outer objective by ``jax.jvp`` of
    ``jax.grad``, ``jax.hessian``, a `train` within a trained loss) are right in every nesting.  They are
    those of the run in floats, with the memory of `Checkpointed` for ``jax.jvp``.

    Args:
      bits: room of the information buffers, in bits per element and step for every `Scale` of the
        optimizer, in (0, 7]; one number, or by variable (``{"velocity": 0.2}``).  The mean of
        ``log2(1 / factor)`` over the run is needed.  It counts only where the factors (momentum) are not
        known before the run, that is under ``jit``; else the need is computed.  By default 1.
      radix: binary digits before the low words, by variable (``{"params": 40}``): values must stay below
        ``2**(62 - radix)``, and the largest radix for which they do rounds least.  By default chosen for
        every array, when the first numbers come into it, with room to outgrow them by ``2**32`` (squares
        ``2**50``).
      segments: in how many segments the run is played back, in ``[1, T]``.

    Raises:
      ReversalError: at the call, or, under ``jit``, from the running program.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015, Algorithms 2 and 3.

    >>> import hypergrad as hg
    >>> hg.Reversible(segments=10)
    Reversible(bits=(), radix=(), segments=10)
    """

    bits: float | Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    radix: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    segments: int = 1

    def __post_init__(self) -> None:
        bits = {"all": self.bits} if isinstance(self.bits, int | float) else _by_variable("bits", self.bits)
        if not all(isinstance(b, int | float | np.number) and 0 < b <= 7 for b in bits.values()):
            raise ValueError(f"Reversible(bits={self.bits}): bits per step must lie in (0, 7]")
        radix = _by_variable("radix", self.radix).values()
        if not all(isinstance(r, int | np.integer) and not isinstance(r, bool) and r >= 0 for r in radix):
            raise ValueError(
                f"Reversible(radix={self.radix!r}): binary digits after the point are whole numbers from 0"
            )
        whole = isinstance(self.segments, int | np.integer) and not isinstance(self.segments, bool)
        if not (whole and self.segments >= 1):
            raise ValueError(
                f"Reversible(segments={self.segments!r}): there must be at least one segment, and a whole "
                "number of them"
            )
        # Hashable, as what is static must be.
        object.__setattr__(self, "radix", tuple(dict(self.radix).items()))
        if not isinstance(self.bits, int | float):
            object.__setattr__(self, "bits", tuple(dict(self.bits).items()))

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `hypergrad.adjoints.Adjoint`."""
        taped = taped_of(run, start, constants, inputs)
        assert isinstance(run.optimizer, Optimizer)
        variables = [PARAMS, *run.optimizer.variables]
        kept = [each.variable for leaf in taped for each in leaf if each.levels]
        bits: Mapping[str, float] = {} if isinstance(self.bits, int | float) else dict(self.bits)
        for name, given, possible in (
            ("radix", [*dict(self.radix)], variables),
            ("bits", [*bits], [*variables, *dict.fromkeys(kept)]),
        ):
            unknown = sorted(set(given) - set(possible))
            if unknown:
                raise ValueError(f"{run.call}: {name} has {unknown}; the variables are {possible}")
        integers = Exact(run.moves, variables, [leaf[PARAMS].dtype for leaf in start], run.x64)
        length = self.length(run.steps)
        known = known_lengths(run, taped, start, constants, inputs, length)
        nothing = _Flags(*jax.tree.map(lambda _: False, (constants, inputs)))

        @jax.custom_vjp
        def solve(start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
            playback = _Playback(self, run, integers, taped, nothing, None)
            return _forward(playback)(start, constants, inputs)[0]

        def forward(*arguments: Any) -> Any:
            flags = _Flags(*perturbed(arguments[1:]))
            arguments = jax.tree.map(lambda x: x.value, arguments)
            # Values that are traced outside may be known here: `jax.grad` without `jit` unwraps them.
            now_known = known
            if not complete(known):
                start, constants, inputs = arguments
                now_known = known_lengths(run, taped, start, constants, inputs, length)
            lengths = self._allot(taped, now_known, length)
            solution, record = _forward(_Playback(self, run, integers, taped, flags, lengths))(*arguments)
            return solution, (arguments, record, freeze(flags), Static(lengths))

        def backward(saved: Any, cotangents: Any) -> Any:
            arguments, record, frozen, lengths = saved
            flags = thaw(frozen)
            playback = _Playback(self, run, integers, taped, flags, lengths.value)
            end, outputs = cotangents
            given = _Cotangents(instantiate(end), _present([outputs.loss]), _present(outputs.watched))
            with closures_refused(run.call):
                bars, wanted = _backward(playback)(arguments, record, given)
            fixed = sum(jax.tree.leaves(flags.constants))
            return bars, scatter(flags.constants, wanted[:fixed]), scatter(flags.inputs, wanted[fixed:])

        solve.defvjp(forward, backward, symbolic_zeros=True)
        with closures_refused(run.call):
            return solve(start, constants, inputs)

    def length(self, steps: int) -> int:
        """Steps of a segment, of a run of so many; the last may be shorter."""
        return -(-steps // min(self.segments, steps))

    def _allot(
        self, taped: list[list[Taped]], known: list[list[int | None]], length: int
    ) -> list[list[int]]:
        """Length of every tape: what is needed where that is known, else from `bits`."""

        def room(each: Taped) -> int:
            bits = exact.MARGIN + self.bits_of(each.variable) * length
            rows = max(0, math.ceil((bits - exact.DIGITS) / 8)) + 1
            return rows * math.prod(each.factor_shape)

        return [
            [room(each) if need is None else need for need, each in zip(*leaf)]
            for leaf in zip(known, taped)
        ]

    def tape_bytes(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> int:
        """Bytes of tape that are reserved under ``jit`` when no factor is known."""
        taped = taped_of(run, start, constants, inputs)
        length = self.length(run.steps)
        lengths = self._allot(taped, [[None] * len(leaf) for leaf in taped], length)
        return sum(
            (n + 1) * math.prod(each.shape if each.factor_shape == () else ())
            for each, n in zip(itertools.chain(*taped), itertools.chain(*lengths))
        )

    def bits_of(self, variable: str) -> float:
        """Room that is reserved for a variable, in bits per element and step."""
        return self.bits if isinstance(self.bits, int | float) else dict(self.bits).get(variable, 1.0)


def _inexact(tree: PyTree) -> list[Any]:
    """The leaves that have derivatives."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, SymbolicZero))
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _present(cotangents: PyTree) -> list[Array] | None:
    """Cotangents of what has derivatives; None where all are zero by structure."""
    leaves = _inexact(cotangents)
    if all(isinstance(x, SymbolicZero) for x in leaves):
        return None
    return instantiate(leaves)


def _zero_tangents(tree: PyTree) -> PyTree:
    """Of any arrays."""

    def zero(x: Array) -> Any:
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.zeros_like(x) if inexact else np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def _forward(playback: _Playback) -> Callable[..., tuple[Solution, _Record]]:
    """`_Playback.forward`, whose derivative in forward mode is that of the float twin."""

    def rule(arguments: Any, tangents: Any) -> Any:
        solution, record = played(*arguments)
        _, (end, outputs) = jax.jvp(lambda *x: twin(playback.run, *x), arguments, tangents)
        outputs = outputs._replace(exact=_zero_tangents(solution[1].exact))
        return (solution, record), ((end, outputs), _zero_tangents(record))

    played = with_rule(playback.forward, rule)
    return played


def _backward(playback: _Playback) -> Callable[..., tuple[list[Leaf], list[Array]]]:
    """`_Playback.backward`, whose derivative in forward mode is that of the float twin played backwards."""

    def backward(arguments: Any, record: _Record, cotangents: _Cotangents) -> Any:
        start, constants, inputs = arguments
        return playback.backward(start, constants, inputs, record, cotangents)

    def of_twin(arguments: Any, cotangents: _Cotangents) -> Any:
        start, *arrays = arguments
        wanted, merge = split(tuple(playback.flags), tuple(arrays))

        def solution(start: list[Leaf], wanted: list[Array]) -> _Cotangents:
            end, outputs = twin(playback.run, start, *merge(wanted))
            loss = None if cotangents.loss is None else [outputs.loss]
            return _Cotangents(end, loss, None if cotangents.watched is None else _inexact(outputs.watched))

        _, pull = jax.vjp(solution, start, wanted)
        return pull(cotangents)

    def rule(primals: Any, tangents: Any) -> Any:
        arguments, _, cotangents = primals
        result = pulled(*primals)
        _, change = jax.jvp(of_twin, (arguments, cotangents), (tangents[0], tangents[2]))
        return result, change

    pulled = with_rule(backward, rule)
    return pulled
