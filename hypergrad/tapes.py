"""How long the tapes of an exact reversal must be, which is known before the run from its factors alone."""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import exact
from hypergrad.program import Assign, Leaf, ReversalError, Scale, Whole
from hypergrad.run import Constants, Inputs, Run


class Scaled(NamedTuple):
    """One `Scale` of one leaf: its variable, that variable's shape, and the factor's: () or the same."""

    variable: str
    shape: tuple[int, ...]
    factor_shape: tuple[int, ...]


def _factors(run: Run, leaf: int, start: Leaf, fixed: Any, scheduled: Any, t: Array) -> list[Array | None]:
    """Numerators of all scales of one leaf at one step; None where only the run itself tells."""
    moves = run.leaf_moves(SimpleNamespace(**fixed, **scheduled), t)
    return [
        None
        if callable(move.factor)
        else exact.spread(move.numerator(move.factor), start[move.variable].shape)
        for move in moves
        if isinstance(move, Scale)
    ]


def scales_of(run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> list[list[Scaled]]:
    """The scales of every leaf; refuses a program that cannot be reversed."""
    if isinstance(run.optimizer, Whole):
        raise ReversalError(
            f"{run.call}: {run.optimizer.name} is no program of invertible moves, so it has no exact "
            "reversal; pass adjoint=Checkpointed() or Stored()"
        )
    result = []
    for i, leaf in enumerate(start):
        h = SimpleNamespace(**constants.hypers[i], **{k: x[0] for k, x in inputs.hypers[i].items()})
        moves = run.leaf_moves(h, inputs.step[0])
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
                # What a factor may remember are scalars.
                factor = move.factor(_Ones()) if callable(move.factor) else move.factor
                n = jax.eval_shape(lambda f, shape=shape: exact.spread(f, shape), factor)
                scaled.append(Scaled(move.variable, shape, n.shape))
        result.append(scaled)
    return result


def known_lengths(
    run: Run,
    scales: list[list[Scaled]],
    start: list[Leaf],
    constants: Constants,
    inputs: Inputs,
    length: int,
) -> list[list[int | None]]:
    """Length of the tapes of a segment of so many steps, computed before the run; None where not known."""
    lengths: list[list[int | None]] = []
    for i, (leaf, scaled) in enumerate(zip(start, scales)):
        fixed, scheduled = constants.hypers[i], inputs.hypers[i]
        lengths.append([None] * len(scaled))
        if not scaled:
            continue
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            numerators = partial(_factors, run, i, leaf)
            # A factor may come out one unit away from that of the run: one bit more is enough for all.
            empty = [exact.empty_bits(s.factor_shape) + exact.BIT for s in scaled]
            if all(s.factor_shape == () for s in scaled):
                over = jax.vmap(numerators, (None, 0, 0))(fixed, scheduled, inputs.step)
                needed = [
                    None if n is None else exact.tape_length(bits + _longest(exact.cost(n), length))
                    for n, bits in zip(over, empty)
                ]
            elif any(isinstance(x, jax.core.Tracer) for x in [*fixed.values(), *scheduled.values()]):
                continue
            else:
                needed = _needed(partial(numerators, fixed), empty, length, scheduled, inputs.step)
            for k, need in enumerate(needed):
                lengths[i][k] = None if need is None or isinstance(need, jax.core.Tracer) else int(need)
    return lengths


def _needed(
    numerators: Callable[..., list[Array | None]],
    empty: list[Array],
    length: int,
    scheduled: Mapping[str, Array],
    steps: Array,
) -> list[Array | None]:
    """Tape that any segment needs, for factors that differ from element to element."""

    def add(carry: Any, x: Any) -> Any:
        (bits, needed), (hypers, t) = carry, x
        first = (t - steps[0]) % length == 0
        costs = [0 if n is None else exact.cost(n) for n in numerators(hypers, t)]
        bits = [jnp.where(first, e, b) + c for e, b, c in zip(empty, bits, costs)]
        return (bits, [jnp.maximum(n, exact.tape_length(b)) for n, b in zip(needed, bits)]), None

    nothing = [jnp.int64(0) for _ in empty]
    (_, needed), _ = jax.lax.scan(add, (empty, nothing), (scheduled, steps))
    told = numerators({name: x[0] for name, x in scheduled.items()}, steps[0])
    return [None if n is None else need for n, need in zip(told, needed)]


def _longest(costs: Array, length: int) -> Array:
    """The most that a segment of so many steps costs, from the costs ``(T,)`` of all."""
    padded = jnp.pad(costs, (0, -costs.size % length))
    return jnp.max(jnp.sum(padded.reshape(-1, length), axis=1))


class _Ones:
    """Stands for what a step remembers where only shapes matter."""

    def __getattr__(self, name: str) -> float:
        return 1.0


def destroyed_bits(run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> dict[str, float]:
    """Bits per element and step that scales destroy, by variable; the most over all leaves.

    One bit, for which `Reversible` has room by default, where only the run itself tells.
    """
    scales = scales_of(run, start, constants, inputs)
    lengths = known_lengths(run, scales, start, constants, inputs, run.steps)
    bits: dict[str, float] = {}
    for scaled, need in zip(itertools.chain(*scales), itertools.chain(*lengths)):
        each = 1.0 if need is None else 8 * need / math.prod(scaled.factor_shape) / run.steps
        bits[scaled.variable] = max(each, bits.get(scaled.variable, 0.0))
    return bits


def complete(lengths: list[list[int | None]]) -> bool:
    """Whether all lengths are known."""
    return all(length is not None for leaf in lengths for length in leaf)
