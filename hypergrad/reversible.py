"""Exact reversal: the run is played backwards, bit for bit.

The run forwards (`_play`) moves integers and writes the bits that scales destroy to tapes; the run
backwards (`_replay`) reads them, finds the gradient again at every step, and differentiates the float twin
of the step.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from hypergrad import exact
from hypergrad.program import PARAMS, Exact, ExactLeaf, Leaf, Optimizer, ReversalError, Seen
from hypergrad.run import (
    Constants,
    Inputs,
    Outputs,
    PyTree,
    Run,
    Solution,
    Static,
    freeze,
    instantiate,
    linearise,
    scatter,
    split,
    thaw,
)
from hypergrad.tapes import Scaled, complete, known_lengths, scales_of

RECOVERED = "hypergrad: recovered"  # by which a program shows that it plays a run backwards


class _Health(NamedTuple):
    """How a run went.

    Attributes:
      failed: ``(2,)``, the first step that failed or -1, and why: an index into `Exact.troubles`.
      needed: tape, by scale.
      recovered: whether the start was.
    """

    failed: Array
    needed: list[Array]
    recovered: Array


class _Played(NamedTuple):
    """A segment of the run forwards: its exact end, its tapes, what it remembered, and how it went."""

    leaves: list[ExactLeaf]
    tapes: list[list[Array]]
    records: list[dict[str, Array]]
    outputs: Outputs
    failed: Array
    needed: list[Array]


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


def _highs(leaves: Sequence[ExactLeaf]) -> list[dict[str, Array]]:
    return [leaf.high for leaf in leaves]


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
    result depends.

    Args:
      explain: from the numbers, as Python scalars, to a message, or None if all is well.
      result: a pytree of arrays.
      numbers: scalars.
      error: its class.
    """

    def check(*numbers: Any) -> np.ndarray:
        columns = np.broadcast_arrays(*numbers)
        for row in zip(*(column.ravel().tolist() for column in columns)):
            message = explain(*row)
            if message is not None:
                raise error(message)
        return np.zeros(columns[0].shape, bool)

    if not numbers:
        return result
    if not any(isinstance(x, jax.core.Tracer) for x in numbers):
        check(*numbers)
        return result
    shape = jax.ShapeDtypeStruct((), bool)
    refused = jax.pure_callback(check, shape, *numbers, vmap_method="broadcast_all")
    return jax.tree.map(
        lambda x: (
            jnp.where(refused, jnp.nan, x).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x
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
    return jnp.all(jnp.stack(jax.tree.leaves(same)))


def _same(start: list[dict[str, Array]], found: list[ExactLeaf]) -> Array:
    """Whether a segment backwards arrived at its start, with nothing left in the buffers."""
    empty = [exact.is_empty(b) for leaf in found for b in leaf.buffers]
    return jnp.all(jnp.stack([_all_equal(start, _highs(found)), *empty]))


def _play(
    run: Run,
    integers: Exact,
    scales: list[list[Scaled]],
    lengths: list[list[int]] | None,
    flags: _Flags,
    high: list[dict[str, Array]],
    constants: Constants,
    inputs: Inputs,
    span: _Span,
    failed: Array,
) -> _Played:
    """A segment forwards on integers, from empty buffers.

    Args:
      run: the run.
      integers: its exact arithmetic.
      scales: of every leaf.
      lengths: of the tapes; None if there will be no way back.
      flags: what will be differentiated on the way back.
      high: integers at the start.
      constants: of the run.
      inputs: of the run.
      span: the steps of the segment.
      failed: the first step that has failed so far, or -1, and why.
    """
    tapes = [
        [
            exact.blank_tape(s.shape, s.factor_shape, 0 if lengths is None else lengths[i][k])
            for k, s in enumerate(leaf)
        ]
        for i, leaf in enumerate(scales)
    ]
    leaves = [
        ExactLeaf(each, [exact.empty(s.shape, s.factor_shape) for s in scaled])
        for each, scaled in zip(high, scales)
    ]

    def step(carry: Any, t: Array) -> Any:
        leaves, tapes, failed = carry
        x = _at(inputs, t)
        live = x.step >= 0
        params = [leaf[PARAMS] for leaf in integers.floats(leaves, PARAMS)]
        if lengths is None:
            loss, evaluated = run.gradient(params, constants.loss, x.batch)
        else:
            at = linearise(run, params, (constants.loss, x.batch), flags.loss, live)
            loss, evaluated, _ = at.primal
        seen = run.seen(constants.hypers, x.hypers, evaluated, live)
        at_step = (constants.hypers, x.hypers, x.step)
        new, tapes, records, wrong = integers.step(at_step, leaves, tapes, seen, live)
        wrong = jnp.where(jnp.isfinite(loss), wrong, jnp.int32(integers.troubles().index(("loss", ""))))
        failed = jnp.where((failed[0] < 0) & (wrong > 0), jnp.stack([x.step, wrong]), failed)
        snapshot = run.snapshot(integers.floats(leaves), loss, evaluated, x.step)
        return (new, tapes, failed), (Outputs(loss, run.watched(snapshot, constants)), records)

    (leaves, tapes, failed), (outputs, records) = jax.lax.scan(step, (leaves, tapes, failed), span.steps())
    needed = [exact.tape_length(b.bits) for leaf in leaves for b in leaf.buffers]
    return _Played(leaves, tapes, records, outputs, failed, needed)


def _replay(
    run: Run,
    integers: Exact,
    flags: _Flags,
    played: _Played,
    start: list[Leaf],
    constants: Constants,
    inputs: Inputs,
    span: _Span,
    loss_bars: Array,
    bars: list[Leaf],
    sums: list[Array],
) -> Any:
    """A segment backwards.

    Args:
      run: the run.
      integers: its exact arithmetic.
      flags: what is differentiated.
      played: the segment forwards.
      start: of the run, for shapes.
      constants: of the run.
      inputs: of the run.
      span: the steps of the segment.
      loss_bars: cotangents of the losses of the run.
      bars: cotangents of its end.
      sums: cotangents of the constants, from later segments.

    Returns:
      Exact start of the segment, its cotangents and the sums; and the cotangents of the inputs.
    """
    wanted = sum(jax.tree.leaves(flags.constants.loss))
    fixed = len(sums) - wanted
    slices = jax.eval_shape(lambda tree: jax.tree.map(lambda h: h[0], tree), inputs.hypers)
    spread_shapes = _spread_shapes(run, flags.hypers, (constants.hypers, slices), start)

    def unstep(carry: Any, at: tuple[Array, list[dict[str, Array]]]) -> Any:
        leaves, bars, sums = carry
        t, records = at
        x, loss_bar = _at((inputs, loss_bars), t)
        at_step = (constants.hypers, x.hypers, x.step)
        live = x.step >= 0
        leaves = integers.unstep(at_step, leaves, played.tapes, None, records, live)
        params = [leaf[PARAMS] for leaf in integers.floats(leaves, PARAMS)]
        linearised = linearise(run, params, (constants.loss, x.batch), flags.loss, live)
        evaluated = linearised.primal[1]
        seen = run.seen(constants.hypers, x.hypers, evaluated, live)
        leaves = integers.unstep(at_step, leaves, played.tapes, seen, records, live)
        floats = integers.floats(leaves)

        # The float twin of the step, as a function of everything but the loss.
        hypers, merge = split(flags.hypers, (constants.hypers, x.hypers))
        spread = [jnp.broadcast_to(h, shape) for h, shape in zip(hypers, spread_shapes)]

        def twin(floats: list[Leaf], evaluated: list[Seen], spread: list[Array]) -> list[Leaf]:
            fixed, scheduled = merge(spread)
            return run.stepped(floats, evaluated, fixed, scheduled, x.step)

        bars, direction, spread = jax.vjp(twin, floats, evaluated, spread)[1](bars)
        products = linearised.transposed(loss_bar, direction)
        for leaf, product in zip(bars, products.params):
            leaf[PARAMS] += product
        each = [_sum_to(bar, h.shape) for bar, h in zip(spread, hypers)]
        same = [*products.wanted[:wanted], *each[:fixed]]
        sums = [a + b for a, b in zip(sums, same)]
        return (leaves, bars, sums), (products.wanted[wanted:], each[fixed:])

    carry = (played.leaves, bars, sums)
    return jax.lax.scan(unstep, carry, (span.steps(), played.records), reverse=True)


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
    parameter to ``S k + T b / S``, with ``b`` bits destroyed per step and ``k`` bits of state (64 for the
    parameters and for every variable).  It is least for ``S = √(T b / k)``.

    Args:
      bits: room of the information buffers, in bits per element and step for every `Scale` of the
        optimizer, in (0, 7]; one number, or by variable (``{"velocity": 0.2}``).  The mean of
        ``log2(1 / factor)`` over the run is needed.  It counts only where the factors (momentum) are not
        known before the run, that is under ``jit``; else the need is computed.  By default 1.
      radix: binary digits after the point, by variable (``{"params": 40}``), where the optimizer's own
        do not suit; values must stay below ``2**(62 - radix)``.
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
        scales = scales_of(run, start, constants, inputs)
        assert isinstance(run.optimizer, Optimizer)
        variables = [PARAMS, *run.optimizer.variables]
        bits: Mapping[str, float] = {} if isinstance(self.bits, int | float) else dict(self.bits)
        for name, given in (("radix", [*dict(self.radix)]), ("bits", [*bits])):
            unknown = sorted(set(given) - set(variables))
            if unknown:
                raise ValueError(f"{run.call}: {name} has {unknown}; the variables are {variables}")
        length = self.length(run.steps)
        known = known_lengths(run, scales, start, constants, inputs, length)
        nothing = _Flags(*jax.tree.map(lambda _: False, (constants, inputs)))

        @jax.custom_vjp
        def solve(start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
            return self._forward(run, scales, None, nothing, length, start, constants, inputs)[0]

        def forward(*arguments: Any) -> Any:
            flags = _Flags(*jax.tree.map(lambda x: x.perturbed, arguments[1:]))
            arguments = jax.tree.map(lambda x: x.value, arguments)
            # Values that are traced outside may be known here: `jax.grad` without `jit` unwraps them.
            now_known = known
            if not complete(known):
                start, constants, inputs = arguments
                now_known = known_lengths(run, scales, start, constants, inputs, length)
            lengths = self._allot(scales, now_known, length)
            solution, *record = self._forward(run, scales, lengths, flags, length, *arguments)
            return solution, (arguments, record, freeze(flags), Static(lengths))

        def backward(saved: Any, cotangents: Any) -> Any:
            arguments, (played, checkpoints, health), flags, lengths = saved
            bars, health = self._backward(
                run,
                scales,
                lengths.value,
                thaw(flags),
                length,
                played,
                checkpoints,
                health,
                instantiate(cotangents),
                *arguments,
            )
            # What went wrong forwards is told here too: without jit nobody may have looked there, and
            # under jit the compiler leaves out what only an unused value depends on.
            return self._refuse(run, scales, lengths.value, bars, health)

        solve.defvjp(forward, backward, symbolic_zeros=True)
        return solve(start, constants, inputs)

    def length(self, steps: int) -> int:
        """Steps of a segment, of a run of so many; the last may be shorter."""
        return -(-steps // min(self.segments, steps))

    def _radix(self, run: Run) -> dict[str, int]:
        assert isinstance(run.optimizer, Optimizer)
        own = {name: run.optimizer.radix_of(name) for name in (PARAMS, *run.optimizer.variables)}
        return own | dict(self.radix)

    def _exact(self, run: Run, start: list[Leaf]) -> Exact:
        return Exact(run.moves, self._radix(run), [leaf[PARAMS].dtype for leaf in start], run.x64)

    def _allot(
        self, scales: list[list[Scaled]], known: list[list[int | None]], length: int
    ) -> list[list[int]]:
        """Length of every tape: what is needed where that is known, else from `bits`."""

        def room(scaled: Scaled) -> int:
            bits = exact.MARGIN + self._bits(scaled.variable) * length
            rows = max(0, math.ceil((bits - exact.DIGITS) / 8)) + 1
            return rows * math.prod(scaled.factor_shape)

        return [
            [room(scaled) if need is None else need for need, scaled in zip(*leaf)]
            for leaf in zip(known, scales)
        ]

    def tape_bytes(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> int:
        """Bytes of tape that are reserved under ``jit`` when no factor is known."""
        scales = scales_of(run, start, constants, inputs)
        length = self.length(run.steps)
        lengths = self._allot(scales, [[None] * len(leaf) for leaf in scales], length)
        return sum(
            (n + 1) * math.prod(scaled.shape if scaled.factor_shape == () else ())
            for scaled, n in zip(itertools.chain(*scales), itertools.chain(*lengths))
        )

    def _bits(self, variable: str) -> float:
        return self.bits if isinstance(self.bits, int | float) else dict(self.bits).get(variable, 1.0)

    def _to_high(self, run: Run, start: list[Leaf]) -> list[dict[str, Array]]:
        """The start as integers."""
        radix = self._radix(run)
        return [{name: exact.to_fixed(x, radix[name]) for name, x in leaf.items()} for leaf in start]

    def _forward(
        self,
        run: Run,
        scales: list[list[Scaled]],
        lengths: list[list[int]] | None,
        flags: _Flags,
        length: int,
        start: list[Leaf],
        constants: Constants,
        inputs: Inputs,
    ) -> tuple[Solution, _Played, list[list[dict[str, Array]]], _Health]:
        """The run forwards: its solution, its last segment, the starts of segments, and how it went.

        Without `lengths` nothing is recorded.
        """
        integers = self._exact(run, start)
        whole, rest = divmod(run.steps, length)
        tapeless = None if lengths is None else [[0 for _ in leaf] for leaf in lengths]
        with jax.enable_x64(True):
            high = self._to_high(run, start)
            failed = jnp.array([-1, 0], jnp.int32)
            for leaf in high:
                for name, x in leaf.items():
                    trouble = integers.troubles().index(("range", name))
                    failed = jnp.where(exact.fits(x), failed, jnp.array([0, trouble], jnp.int32))
            if whole == 1 and rest == 0:
                span = _Span(jnp.int32(0), length)
                played = _play(run, integers, scales, lengths, flags, high, constants, inputs, span, failed)
                checkpoints, outputs = [], played.outputs
                needed = played.needed
            else:

                def segment(carry: Any, first: Array, count: int = length) -> Any:
                    high, failed, needed = carry
                    span = _Span(first, count)
                    played = _play(
                        run, integers, scales, tapeless, flags, high, constants, inputs, span, failed
                    )
                    needed = [jnp.maximum(*pair) for pair in zip(needed, played.needed)]
                    return (_highs(played.leaves), played.failed, needed), (high, played.outputs)

                nothing = [jnp.int64(0) for leaf in scales for _ in leaf]
                carry = (high, failed, nothing)
                firsts = length * jnp.arange(whole, dtype=jnp.int32)
                carry, (kept, outputs) = jax.lax.scan(segment, carry, firsts)
                checkpoints = [kept]
                outputs = jax.tree.map(lambda x: x.reshape(whole * length, *x.shape[2:]), outputs)
                if rest:
                    carry, (kept, ended) = segment(carry, jnp.int32(whole * length), rest)
                    checkpoints.append(kept)
                    outputs = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, ended)
                high, failed, needed = carry
                played = _Played([ExactLeaf(x, []) for x in high], [], [], outputs, failed, needed)
            end = integers.floats(played.leaves)
        health = _Health(played.failed, needed, jnp.asarray(True))
        end, outputs = self._refuse(run, scales, lengths, (end, outputs), health)
        return (end, outputs), played._replace(outputs=Outputs(outputs.loss, None)), checkpoints, health

    def _backward(
        self,
        run: Run,
        scales: list[list[Scaled]],
        lengths: list[list[int]],
        flags: _Flags,
        length: int,
        played: _Played,
        checkpoints: list[Any],
        health: _Health,
        cotangents: Solution,
        start: list[Leaf],
        constants: Constants,
        inputs: Inputs,
    ) -> tuple[tuple[list[Leaf], PyTree, PyTree], _Health]:
        """The run backwards: cotangents of start, constants and inputs, and how it went."""
        integers = self._exact(run, start)
        constant, _ = split(
            (flags.constants.loss, flags.constants.hypers), (constants.loss, constants.hypers)
        )
        wanted = sum(jax.tree.leaves(flags.constants.loss))
        bars, loss_bars = cotangents[0], cotangents[1].loss
        with jax.enable_x64(True):
            sums = [jnp.zeros_like(x) for x in constant]
            if not checkpoints:
                high = self._to_high(run, start)
                span = _Span(jnp.int32(0), length)
                (found, bars, sums), steps = _replay(
                    run, integers, flags, played, start, constants, inputs, span, loss_bars, bars, sums
                )
                recovered = _same(high, found)
            else:

                def segment(carry: Any, at: Any, count: int = length) -> Any:
                    end, bars, sums, recovered = carry
                    high, first = at
                    span, unharmed = _Span(first, count), jnp.array([-1, 0], jnp.int32)
                    played = _play(
                        run, integers, scales, lengths, flags, high, constants, inputs, span, unharmed
                    )
                    again = _all_equal(end, _highs(played.leaves))
                    (found, bars, sums), steps = _replay(
                        run, integers, flags, played, start, constants, inputs, span, loss_bars, bars, sums
                    )
                    return (high, bars, sums, recovered & again & _same(high, found)), steps

                carry = (_highs(played.leaves), bars, sums, jnp.asarray(True))
                whole, rest = divmod(run.steps, length)
                ended = []
                if rest:
                    carry, steps = segment(carry, (checkpoints[1], jnp.int32(whole * length)), rest)
                    ended.append(steps)
                firsts = length * jnp.arange(whole, dtype=jnp.int32)
                carry, steps = jax.lax.scan(segment, carry, (checkpoints[0], firsts), reverse=True)
                joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
                steps = jax.tree.map(lambda *parts: jnp.concatenate(parts), joined, *ended)
                _, bars, sums, recovered = carry
        batch_bars, hyper_bars = steps
        constant_bars = Constants(
            scatter(flags.constants.loss, sums[:wanted]),
            scatter(flags.constants.hypers, sums[wanted:]),
            [None for _ in constants.watch],  # type: ignore[misc]  # watching is not differentiated
        )
        input_bars = Inputs(
            scatter(flags.inputs.batch, batch_bars),
            scatter(flags.inputs.hypers, hyper_bars),
            None,  # type: ignore[arg-type]  # of integers
        )
        recovered = checkpoint_name(recovered, RECOVERED)
        return (bars, constant_bars, input_bars), health._replace(recovered=recovered)

    def _refuse(
        self, run: Run, scales: list[list[Scaled]], lengths: Any, result: PyTree, health: _Health
    ) -> PyTree:
        """Pass the result on, or raise what was wrong with the run."""
        allotted = None if lengths is None else [length for leaf in lengths for length in leaf]

        def explain(failed: int, why: int, recovered: bool, *needed: int) -> str | None:
            if failed >= 0:
                return self._failed(run, failed, why)
            for have, need, scaled in zip(allotted or needed, needed, itertools.chain(*scales)):
                if need > have:
                    return self._overflowed(run, scaled, need)
            return None if recovered else self._not_recovered(run)

        return refuse_if(explain, result, *health.failed, health.recovered, *health.needed)

    def _failed(self, run: Run, step: int, why: int) -> str:
        kind, name = self._exact(run, []).troubles()[why]
        at = f"{run.call}: at step {step} "
        if kind == "loss":
            return f"{at}the loss became NaN or infinite: training has diverged; lower the learning rate"
        if kind == "factor":
            return (
                f"{at}a factor of {name!r} left [2**-7, 1], outside of which it cannot be undone; keep it "
                "inside, or pass adjoint=Checkpointed() (and sgd() if there is to be no momentum)"
            )
        radix = self._radix(run)[name]
        wider = {name: max(0, radix - 12)}
        return (
            f"{at}{name!r} became NaN or left the range of exact arithmetic, |{name}| < 2**{62 - radix}. "
            "Training has diverged (lower the learning rate), or its numbers are large: pass "
            f"Reversible(radix={wider}) for {max(0, 62 - radix) + 12} binary digits before the point"
        )

    def _overflowed(self, run: Run, scaled: Scaled, need: int) -> str:
        length = self.length(run.steps)
        bits = (8 * need / math.prod(scaled.factor_shape) + 8) / length
        enough = {scaled.variable: math.ceil(100 * bits) / 100}
        return (
            f"{run.call}: the information buffer of {scaled.variable!r} would overflow: its factors "
            f"destroy {bits:.3g} bits per element and step, and room for "
            f"{self._bits(scaled.variable):.3g} was reserved; pass Reversible(bits={enough}) or more"
        )

    def _not_recovered(self, run: Run) -> str:
        return (
            f"{run.call}: played backwards, the run did not arrive at its start, so that its "
            "hypergradient would be wrong and is withheld. The loss did not give the same gradient bit "
            "for bit when it was evaluated again (a non-deterministic operation or an impure function?); "
            "make it deterministic or pass adjoint=Checkpointed()"
        )
