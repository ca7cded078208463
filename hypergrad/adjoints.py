"""How a training run is differentiated.

An adjoint is one function from a run and its arrays to the end of the run, whose derivative it arranges.

================  ===========================================  ============================
adjoint           memory beside the parameters                 time, in plain trainings
================  ===========================================  ============================
`Reversible`      ``log2(1/γ)`` bits per parameter and step    about 3 to 4
`Stored`          everything, every step                       about 3
`Checkpointed`    ``2 √T`` copies of the state                 about 4
================  ===========================================  ============================
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from hypergrad import exact, program
from hypergrad.program import PARAMS, Assign, Exact, ExactLeaf, Leaf, Scale
from hypergrad.run import (
    Constants,
    Inputs,
    Outputs,
    PyTree,
    Run,
    Static,
    freeze,
    instantiate,
    linearise,
    scatter,
    split,
    thaw,
)

Solution = tuple[list[Leaf], Outputs]
RECOVERED = "hypergrad: recovered"  # by which a program shows that it plays a run backwards


class ReversalError(ArithmeticError):
    """The run cannot be, or was not, reversed exactly; no hypergradient is returned."""


class Adjoint(Protocol):
    """A differentiation strategy: one function from the arrays of a run to its end.

    Args of the call: the static run, the start (for every leaf of the parameters its float variables by
    name), constants and inputs.  Returns the end, like the start, and the outputs of all steps.
    """

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """Run to the end."""


@dataclass(frozen=True)
class Stored:
    """Reverse mode through the loop, with everything stored: the reference for the others.

    Memory grows by everything a step computes, at every step.

    >>> import hypergrad as hg
    >>> hg.Stored()
    Stored()
    """

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `Adjoint`."""
        return jax.lax.scan(lambda leaves, x: run.step(leaves, constants, x), start, inputs)


@dataclass(frozen=True)
class Checkpointed:
    """Reverse mode through segments that are run again on the way back.

    Args:
      segments: how many states are kept, in ``[1, T]``; None for ``√T``, the least memory.

    Source: Griewank and Walther, "Evaluating derivatives", 2008, chapter 12 (one level).

    >>> import hypergrad as hg
    >>> hg.Checkpointed(segments=10)
    Checkpointed(segments=10)
    """

    segments: int | None = None

    def __post_init__(self) -> None:
        if self.segments is not None and self.segments < 1:
            raise ValueError(f"Checkpointed(segments={self.segments}): there must be at least one segment")

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `Adjoint`."""
        segments = math.isqrt(run.steps) if self.segments is None else self.segments
        length = -(-run.steps // max(1, min(segments, run.steps)))
        whole = run.steps // length

        @partial(jax.checkpoint, prevent_cse=False)
        def segment(leaves: list[Leaf], x: Inputs) -> Solution:
            return jax.lax.scan(lambda leaves, x: run.step(leaves, constants, x), leaves, x)

        cut = jax.tree.map(lambda x: x[: whole * length].reshape(whole, length, *x.shape[1:]), inputs)
        leaves, outputs = jax.lax.scan(segment, start, cut)
        outputs = jax.tree.map(lambda x: x.reshape(whole * length, *x.shape[2:]), outputs)
        if whole * length == run.steps:
            return leaves, outputs
        leaves, rest = segment(leaves, jax.tree.map(lambda x: x[whole * length :], inputs))
        return leaves, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, rest)


class _Health(NamedTuple):
    """How a run went: the first step that failed or -1, tape needed by every scale, start recovered."""

    failed: Array
    needed: list[Array]
    recovered: Array


class _Scaled(NamedTuple):
    """One `Scale` of one leaf: its variable, that variable's shape, and the factor's: () or the same."""

    variable: str
    shape: tuple[int, ...]
    factor_shape: tuple[int, ...]


def _factors(run: Run, leaf: int, start: Leaf, fixed: Any, scheduled: Any, t: Array) -> list[Array]:
    """Numerators of all scales of one leaf at one step."""
    with jax.enable_x64(run.x64):
        moves = run.optimizer.moves(SimpleNamespace(**fixed, **scheduled), t)
    return [
        exact.spread(move.numerator(move.factor), start[move.variable].shape)
        for move in moves
        if isinstance(move, Scale)
    ]


def _scales(run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> list[list[_Scaled]]:
    """The scales of every leaf; refuses a program that cannot be reversed."""
    result = []
    for i, leaf in enumerate(start):
        with jax.enable_x64(run.x64):
            h = SimpleNamespace(**constants.hypers[i], **{k: x[0] for k, x in inputs.hypers[i].items()})
            moves = run.optimizer.moves(h, inputs.step[0])
        for move in moves:
            if isinstance(move, Assign):
                raise ReversalError(
                    f"{run.call}: {run.optimizer.name} overwrites {move.variable!r} in a way that cannot "
                    "be undone, so it has no exact reversal; pass adjoint=Checkpointed() or Stored()"
                )
        scaled = []
        for move in moves:
            if isinstance(move, Scale):
                shape = leaf[move.variable].shape
                n = jax.eval_shape(lambda f, shape=shape: exact.spread(f, shape), move.factor)
                scaled.append(_Scaled(move.variable, shape, n.shape))
        result.append(scaled)
    return result


def _known_lengths(
    run: Run,
    scales: list[list[_Scaled]],
    start: list[Leaf],
    constants: Constants,
    inputs: Inputs,
) -> list[list[int | None]]:
    """Length of every tape, computed before the run, or None where the factors are traced."""
    lengths: list[list[int | None]] = []
    for i, (leaf, scaled) in enumerate(zip(start, scales)):
        fixed, scheduled = constants.hypers[i], inputs.hypers[i]
        lengths.append([None] * len(scaled))
        if not scaled:
            continue
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            numerators = partial(_factors, run, i, leaf)
            if all(s.factor_shape == () for s in scaled):
                over = jax.vmap(numerators, (None, 0, 0))
                totals = [jnp.sum(exact.cost(n)) for n in over(fixed, scheduled, inputs.step)]
            elif any(isinstance(x, jax.core.Tracer) for x in [*fixed.values(), *scheduled.values()]):
                continue
            else:
                zero = [jnp.zeros(s.factor_shape, jnp.int64) for s in scaled]

                def add(totals: list[Array], x: Any, fixed: Any = fixed, f: Any = numerators) -> Any:
                    return [a + exact.cost(n) for a, n in zip(totals, f(fixed, *x))], None

                totals, _ = jax.lax.scan(add, zero, (scheduled, inputs.step))
            for k, (total, s) in enumerate(zip(totals, scaled)):
                bits = exact.empty_bits(s.factor_shape) + total
                length = exact.tape_length(bits)
                lengths[i][k] = None if isinstance(length, jax.core.Tracer) else int(length)
    return lengths


def _complete(lengths: list[list[int | None]]) -> bool:
    return all(length is not None for leaf in lengths for length in leaf)


def _highs(leaves: Sequence[ExactLeaf]) -> list[dict[str, Array]]:
    return [leaf.high for leaf in leaves]


def _spread_shapes(flags: PyTree, hypers: PyTree, start: list[Leaf]) -> list[tuple[int, ...]]:
    """To which shapes to spread the wanted hyperparameters before differentiating in them.

    Their cotangents then come element by element, and `_sum_to` adds them faster than the compiler.
    """
    shapes = []
    for part, part_flags in zip(hypers, flags):
        for leaf, leaf_hypers, leaf_flags in zip(start, part, part_flags):
            alike = all(x.shape == leaf[PARAMS].shape for x in leaf.values())
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


def refuse_if(explain: Callable[..., str | None], result: PyTree, *numbers: Array) -> PyTree:
    """Pass the result on, unless the numbers are a reason not to: then raise a `ReversalError`.

    Raises at once where the numbers are known, else from the running program, by a callback on which the
    result depends.

    Args:
      explain: from the numbers, as Python scalars, to a message, or None if all is well.
      result: a pytree of arrays.
      numbers: scalars.
    """

    def check(*numbers: Any) -> np.ndarray:
        columns = np.broadcast_arrays(*numbers)
        for row in zip(*(column.ravel().tolist() for column in columns)):
            message = explain(*row)
            if message is not None:
                raise ReversalError(message)
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


@dataclass(frozen=True)
class Reversible:
    """The run is played backwards, bit for bit; memory holds only the bits that a step destroys.

    Weights and the optimizer's variables are integers, as in Maclaurin, Duvenaud and Adams (2015).
    Before a hypergradient is returned the recovered start is compared with the real one; where a single
    bit differs the caller gets a `ReversalError`.

    Args:
      bits: room of the information buffers, in bits per element and step for every `Scale` of the
        optimizer; the mean of ``log2(1 / factor)`` over the run is needed.  It counts only where the
        factors (momentum) are not known before the run, that is under ``jit``; else the need is
        computed.  None is 1.
      radix: binary digits after the point, by variable (``{"params": 40}``), where the optimizer's own
        do not suit; values must stay below ``2**(62 - radix)``.

    Raises:
      ReversalError: at the call, or, under ``jit``, from the running program.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015, Algorithms 2 and 3.

    >>> import hypergrad as hg
    >>> hg.Reversible(bits=0.2)
    Reversible(bits=0.2, radix=())
    """

    bits: float | None = None
    radix: Mapping[str, int] | tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.bits is not None and not 0 < self.bits <= 7:
            raise ValueError(f"Reversible(bits={self.bits}): bits per step must lie in (0, 7]")
        object.__setattr__(self, "radix", tuple(dict(self.radix).items()))  # hashable

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `Adjoint`."""
        unknown = sorted(set(dict(self.radix)) - {PARAMS, *run.optimizer.variables})
        if unknown:
            raise ValueError(
                f"{run.call}: radix has {unknown}; the variables are {[PARAMS, *run.optimizer.variables]}"
            )
        scales = _scales(run, start, constants, inputs)
        known = _known_lengths(run, scales, start, constants, inputs)
        nothing = jax.tree.map(lambda _: False, (constants, inputs))

        @jax.custom_vjp
        def solve(start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
            return self._play(run, scales, None, nothing, start, constants, inputs)[0]

        def forward(*arguments: Any) -> Any:
            flags = jax.tree.map(lambda x: x.perturbed, arguments[1:])
            arguments = jax.tree.map(lambda x: x.value, arguments)
            # Values that are traced outside may be known here: `jax.grad` without `jit` unwraps them.
            now_known = known if _complete(known) else _known_lengths(run, scales, *arguments)
            lengths = self._allot(run, scales, now_known)
            solution, *record = self._play(run, scales, lengths, flags, *arguments)
            return solution, (arguments, record, freeze(flags), Static(lengths))

        def backward(saved: Any, cotangents: Any) -> Any:
            arguments, (end, tapes, health), flags, lengths = saved
            bars, health = self._replay(
                run, scales, thaw(flags), end, tapes, health, instantiate(cotangents), *arguments
            )
            # What went wrong forwards is told here too: without jit nobody may have looked there, and
            # under jit the compiler leaves out what only an unused value depends on.
            return self._refuse(run, scales, lengths.value, bars, health)

        solve.defvjp(forward, backward, symbolic_zeros=True)
        return solve(start, constants, inputs)

    def _radix(self, run: Run) -> dict[str, int]:
        own = {name: run.optimizer.radix_of(name) for name in (PARAMS, *run.optimizer.variables)}
        return own | dict(self.radix)

    def _exact(self, run: Run, start: list[Leaf]) -> Exact:
        return Exact(self._radix(run), [leaf[PARAMS].dtype for leaf in start], run.x64)

    def _allot(
        self, run: Run, scales: list[list[_Scaled]], known: list[list[int | None]]
    ) -> list[list[int]]:
        """Length of every tape: what is needed where that is known, else from `bits`."""
        room = exact.MARGIN + (1.0 if self.bits is None else self.bits) * run.steps
        rows = max(0, math.ceil((room - exact.DIGITS) / 8)) + 1
        return [
            [
                rows * math.prod(scaled.factor_shape) if length is None else length
                for length, scaled in zip(*leaf)
            ]
            for leaf in zip(known, scales)
        ]

    def _to_exact(self, run: Run, scales: list[list[_Scaled]], start: list[Leaf]) -> list[ExactLeaf]:
        """The start as integers, with empty buffers."""
        leaves, radix = [], self._radix(run)
        for leaf, scaled in zip(start, scales):
            high = {name: exact.to_fixed(x, radix[name]) for name, x in leaf.items()}
            leaves.append(ExactLeaf(high, [exact.empty(s.shape, s.factor_shape) for s in scaled]))
        return leaves

    def _play(
        self,
        run: Run,
        scales: list[list[_Scaled]],
        lengths: list[list[int]] | None,
        flags: PyTree,
        start: list[Leaf],
        constants: Constants,
        inputs: Inputs,
    ) -> tuple[Solution, list[ExactLeaf], list[list[Array]], _Health]:
        """The run forwards on integers: its solution, its exact end, the tapes, and how it went.

        Without `lengths` nothing is recorded.
        """
        integers = self._exact(run, start)
        loss_flags = (flags[0].loss, flags[1].batch)
        tapes = [
            [
                exact.blank_tape(s.shape, s.factor_shape, 0 if lengths is None else lengths[i][k])
                for k, s in enumerate(leaf)
            ]
            for i, leaf in enumerate(scales)
        ]

        def step(carry: Any, x: Inputs) -> Any:
            leaves, tapes, failed = carry
            live = x.step >= 0
            params = [leaf[PARAMS] for leaf in integers.floats(leaves, PARAMS)]
            if lengths is None:
                loss, gradient = run.gradient(params, constants.loss, x.batch)
            else:
                at = linearise(run, params, (constants.loss, x.batch), loss_flags, live)
                loss, gradient, _ = at.primal
            moves = run.moves(constants.hypers, x.hypers, x.step)
            new, tapes, valid = integers.step(moves, leaves, tapes, gradient, live)
            failed = jnp.where((failed < 0) & ~(valid & jnp.isfinite(loss)), x.step, failed)
            snapshot = run.snapshot(integers.floats(leaves), loss, gradient, x.step)
            return (new, tapes, failed), Outputs(loss, run.watched(snapshot, constants))

        with jax.enable_x64(True):
            leaves = self._to_exact(run, scales, start)
            valid = jnp.all(jnp.stack([exact.fits(x) for x in jax.tree.leaves(_highs(leaves))]))
            carry = leaves, tapes, jnp.where(valid, jnp.int32(-1), jnp.int32(0))
            (leaves, tapes, failed), outputs = jax.lax.scan(step, carry, inputs)
            needed = [exact.tape_length(b.bits) for leaf in leaves for b in leaf.buffers]
            end = integers.floats(leaves)
        health = _Health(failed, needed, jnp.asarray(True))
        end, outputs = self._refuse(run, scales, lengths, (end, outputs), health)
        return (end, outputs), leaves, tapes, health

    def _replay(
        self,
        run: Run,
        scales: list[list[_Scaled]],
        flags: PyTree,
        end: list[ExactLeaf],
        tapes: list[list[Array]],
        health: _Health,
        cotangents: Solution,
        start: list[Leaf],
        constants: Constants,
        inputs: Inputs,
    ) -> tuple[tuple[list[Leaf], PyTree, PyTree], _Health]:
        """The run backwards: cotangents of start, constants and inputs, and how it went."""
        integers = self._exact(run, start)
        constant_flags, input_flags = flags
        loss_flags = (constant_flags.loss, input_flags.batch)
        hyper_flags = (constant_flags.hypers, input_flags.hypers)
        constant, _ = split(
            (constant_flags.loss, constant_flags.hypers), (constants.loss, constants.hypers)
        )
        wanted = sum(jax.tree.leaves(constant_flags.loss))
        fixed = len(constant) - wanted
        slices = jax.eval_shape(lambda tree: jax.tree.map(lambda h: h[0], tree), inputs.hypers)
        spread_shapes = _spread_shapes(hyper_flags, (constants.hypers, slices), start)

        def unstep(carry: Any, inputs: tuple[Inputs, Array]) -> Any:
            leaves, bars, sums = carry
            x, output_bar = inputs
            moves = run.moves(constants.hypers, x.hypers, x.step)
            live = x.step >= 0
            leaves = integers.unstep(moves, leaves, tapes, None, live)
            params = [leaf[PARAMS] for leaf in integers.floats(leaves, PARAMS)]
            linearised = linearise(run, params, (constants.loss, x.batch), loss_flags, live)
            gradient = linearised.primal[1]
            leaves = integers.unstep(moves, leaves, tapes, gradient, live)
            floats = integers.floats(leaves)

            # The float twin of the step, as a function of everything but the loss.
            hypers, merge = split(hyper_flags, (constants.hypers, x.hypers))
            spread = [jnp.broadcast_to(h, shape) for h, shape in zip(hypers, spread_shapes)]

            def twin(floats: list[Leaf], gradient: list[Array], spread: list[Array]) -> list[Leaf]:
                fixed, scheduled = merge(spread)
                moves = run.moves(fixed, scheduled, x.step)
                return [program.step(*part) for part in zip(moves, floats, gradient)]

            bars, direction, spread = jax.vjp(twin, floats, gradient, spread)[1](bars)
            products = linearised.transposed(output_bar, direction)
            for leaf, product in zip(bars, products.params):
                leaf[PARAMS] += product
            each = [_sum_to(bar, h.shape) for bar, h in zip(spread, hypers)]
            same = [*products.wanted[:wanted], *each[:fixed]]
            sums = [a + b for a, b in zip(sums, same)]
            return (leaves, bars, sums), (products.wanted[wanted:], each[fixed:])

        bars, output_bars = cotangents
        with jax.enable_x64(True):
            carry = (end, bars, [jnp.zeros_like(x) for x in constant])
            (leaves, bars, sums), steps = jax.lax.scan(
                unstep, carry, (inputs, output_bars.loss), reverse=True
            )
            recovered = self._recovered(self._to_exact(run, scales, start), leaves)
        batch_bars, hyper_bars = steps
        constant_bars = Constants(
            scatter(constant_flags.loss, sums[:wanted]),
            scatter(constant_flags.hypers, sums[wanted:]),
            [None for _ in constants.watch],  # type: ignore[misc]  # watching is not differentiated
        )
        input_bars = Inputs(
            scatter(input_flags.batch, batch_bars),
            scatter(input_flags.hypers, hyper_bars),
            None,  # type: ignore[arg-type]  # of integers
        )
        return (bars, constant_bars, input_bars), health._replace(recovered=recovered)

    @staticmethod
    def _recovered(start: list[ExactLeaf], leaves: list[ExactLeaf]) -> Array:
        """Whether the run backwards arrived at the start, with nothing left in the buffers."""
        same = jax.tree.map(lambda a, b: jnp.all(a == b), _highs(start), _highs(leaves))
        empty = [exact.is_empty(b) for leaf in leaves for b in leaf.buffers]
        return checkpoint_name(jnp.all(jnp.stack(jax.tree.leaves(same) + empty)), RECOVERED)

    def _refuse(
        self, run: Run, scales: list[list[_Scaled]], lengths: Any, result: PyTree, health: _Health
    ) -> PyTree:
        """Pass the result on, or raise what was wrong with the run."""
        allotted = None if lengths is None else [length for leaf in lengths for length in leaf]

        def explain(failed: int, recovered: bool, *needed: int) -> str | None:
            if failed >= 0:
                return self._diverged(run, failed)
            for have, need, scaled in zip(allotted or needed, needed, itertools.chain(*scales)):
                if need > have:
                    return self._overflowed(run, scaled, need)
            return None if recovered else self._not_recovered(run)

        return refuse_if(explain, result, health.failed, health.recovered, *health.needed)

    def _diverged(self, run: Run, failed: int) -> str:
        own = {name: 62 - radix for name, radix in self._radix(run).items()}
        ranges = ", ".join(f"|{name}| < 2**{digits}" for name, digits in own.items())
        return (
            f"{run.call}: at step {failed} the loss, a gradient or a variable became NaN or infinite, or "
            f"left the range of exact arithmetic ({ranges}), or a factor left [2**-7, 1]. Training has "
            "diverged (lower the learning rate), or a factor such as momentum is 0 or nearly so (use "
            "sgd() with Checkpointed()), or the range is too small (pass Reversible(radix={'params': ...}))"
        )

    def _overflowed(self, run: Run, scaled: _Scaled, need: int) -> str:
        bits = (8 * need / math.prod(scaled.factor_shape) + 8) / run.steps
        reserved = 1.0 if self.bits is None else self.bits
        return (
            f"{run.call}: the information buffer of {scaled.variable!r} would overflow: its factors "
            f"destroy {bits:.3g} bits per element and step, and room for {reserved:.3g} was reserved; "
            f"pass Reversible(bits={math.ceil(100 * bits) / 100}) or more"
        )

    def _not_recovered(self, run: Run) -> str:
        return (
            f"{run.call}: played backwards, the run did not arrive at its start, so that its "
            "hypergradient would be wrong and is withheld. The loss did not give the same gradient bit "
            "for bit when it was evaluated again (a non-deterministic operation or an impure function?); "
            "make it deterministic or pass adjoint=Checkpointed()"
        )
