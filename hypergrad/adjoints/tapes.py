"""The lengths of the tapes of an exact reversal, computed before the run from its factors alone."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Var

from hypergrad import exact
from hypergrad._base.errors import ReversalError
from hypergrad._base.tracing import closed_part
from hypergrad._base.varying import settled
from hypergrad.adjoints.integers import buffer_name, buffer_place
from hypergrad.adjoints.joint import Joint
from hypergrad.adjoints.run import Constants, Inputs, Run
from hypergrad.program import PARAMS, Assign, Keep, Leaf, Scale, Shift


class Taped(NamedTuple):
    """What writes to one tape of one leaf.

    A variable that is held whole drops bytes as its factors, each of which is one for the array, make it
    small.  Everything else has an information buffer: a `Keep`, and a `Scale` of another variable.

    Attributes:
      variable: name of the variable, or of what is kept.
      shape: of the variable, or of the leaf if something is kept.
      factor_shape: of the factor, () or the shape of the variable; () if something is kept.
      buffer: place of its buffer among those of the leaf; None if it is held whole.
      levels: number of levels of what is kept; 0 for what is scaled.
      scales: how many moves scale it.
    """

    variable: str
    shape: tuple[int, ...]
    factor_shape: tuple[int, ...]
    buffer: int | None = None
    levels: int = 0
    scales: int = 1

    @property
    def name(self) -> str:
        """The name of the tape."""
        return self.variable if self.buffer is None else buffer_name(self.buffer)


def held_whole(taped: Sequence[Taped]) -> frozenset[str]:
    """The variables of a leaf that are held whole."""
    return frozenset(each.variable for each in taped if each.buffer is None)


def _costs(
    joint: Joint, leaf: int, taped: Sequence[Taped], fixed: Any, scheduled: Any, t: Array
) -> list[Array | None]:
    """Bits that everything taped of one leaf costs in one step; None if only the run itself can tell."""
    moves = joint.leaf_moves(leaf, SimpleNamespace(**fixed, **scheduled), t)
    whole, shapes = held_whole(taped), {each.name: each.shape for each in taped}
    costs: dict[str, Array | None] = {each.name: jnp.int64(0) for each in taped}
    for k, move in enumerate(moves):
        if isinstance(move, Keep):
            name = buffer_name(buffer_place(moves, k, whole))
            costs[name] = jnp.asarray(exact.cost_of_levels(len(move.levels)), jnp.int64)
        elif isinstance(move, Scale):
            name = move.variable
            name = name if name in whole else buffer_name(buffer_place(moves, k, whole))
            so_far = costs[name]
            if callable(move.factor) or so_far is None:
                costs[name] = None
            else:
                costs[name] = so_far + exact.cost(exact.spread(move.numerator(move.factor), shapes[name]))
    return [costs[each.name] for each in taped]


def taped_of(joint: Joint, start: list[Leaf], constants: Constants, inputs: Inputs) -> list[list[Taped]]:
    """What is taped of every joint leaf.

    Args:
      joint: the run, and its joint leaves, which are meant by "leaf" here.
      start: the float state before the first step, by leaf.
      constants: what is the same at every step.
      inputs: what differs from step to step.

    Raises:
      ReversalError: if the program cannot be reversed.
    """
    run, name = joint.run, joint.run.program.name
    result = []
    for i, leaf in enumerate(start):
        h = SimpleNamespace(**constants.hypers[i], **{k: x[0] for k, x in inputs.hypers[i].items()})
        moves = joint.leaf_moves(i, h, inputs.step[0])
        for move in moves:
            if isinstance(move, Assign):
                overwrites = f"{name} overwrites {move.variable!r}"
                what = f"{joint.names[i]} {move.why}" if move.why else overwrites
                raise ReversalError(
                    f"{run.call}: {what} in a way that cannot be undone, so the run has no exact reversal; "
                    "pass adjoint=Checkpointed() or Stored()"
                )
        factor_shapes: dict[str, list[tuple[int, ...]]] = {}
        for move in moves:
            if isinstance(move, Scale):
                shape = leaf[move.variable].shape
                # A factor may read only remembered scalars.
                factor = move.factor(_Ones()) if callable(move.factor) else move.factor
                n = jax.eval_shape(lambda f, shape=shape: exact.spread(f, shape), factor)
                factor_shapes.setdefault(move.variable, []).append(n.shape)
        # What makes room does so before something is added.
        shifted = dict.fromkeys(move.variable for move in moves if isinstance(move, Shift))
        whole = [name for name in shifted if all(s == () for s in factor_shapes.get(name, []))]
        taped, scaled = list[Taped](), {name: iter(shapes) for name, shapes in factor_shapes.items()}
        for move in moves:
            if isinstance(move, Keep):
                taped.append(Taped(move.name, leaf[PARAMS].shape, (), len(taped), len(move.levels)))
            elif isinstance(move, Scale) and move.variable not in whole:
                shape = leaf[move.variable].shape
                taped.append(Taped(move.variable, shape, next(scaled[move.variable]), len(taped)))
        for name in whole:
            taped.append(Taped(name, leaf[name].shape, (), scales=len(factor_shapes.get(name, []))))
        result.append(taped)
    return result


def covers_run(run: Run, constants: Constants, length: int) -> bool:
    """Whether a segment of so many steps is the run, which begins with numbers, not with integers."""
    return constants.exact is None and length == run.steps


def known_lengths(
    joint: Joint,
    taped: Sequence[Sequence[Taped]],
    length: int,
    constants: Constants,
    inputs: Inputs,
) -> list[list[int | None]]:
    """Lengths of the tapes of a segment, computed before the run; None if a length is not known.

    Args:
      joint: the run.
      taped: what is taped of every leaf.
      length: steps of the segment.
      constants: what is the same at every step.
      inputs: what differs from step to step.

    Returns:
      In rows or bytes, for everything that is taped of every leaf.
    """
    # A factor may differ by one unit from that of the run: one more bit is enough for all steps.
    # Registers that are not empty at the start hold up to one more byte.
    whole = covers_run(joint.run, constants, length)

    def begun(each: Taped) -> Array:
        if each.buffer is not None:
            return exact.empty_bits(each.factor_shape) + (1 if whole else 9) * exact.BIT
        # The first word of a buffer is no tape.
        return jnp.int64(exact.DIGITS + 8 * exact.outgrown(whole) + (each.scales > 0)) * exact.BIT

    def needed(hypers: list[Any], steps: Array) -> list[list[Array | None]]:
        result = []
        for i, (each, (fixed, scheduled)) in enumerate(zip(taped, hypers)):
            empty = [begun(s) for s in each]
            costs = partial(_costs, joint, i, each)
            if all(s.factor_shape == () for s in each):
                over = jax.vmap(costs, (None, 0, 0))(fixed, scheduled, steps)
                result.append(
                    [
                        None if n is None else exact.tape_length(bits + _longest(n, length))
                        for n, bits in zip(over, empty)
                    ]
                )
            else:
                result.append(_needed(partial(costs, fixed), empty, length, scheduled, steps))
        return result

    arguments = ([*zip(constants.hypers, inputs.hypers)], inputs.step)
    with jax.enable_x64(True):
        closed, shapes = jax.make_jaxpr(needed, return_shape=True)(*jax.tree.map(jax.typeof, arguments))
        told = iter(_known_results(closed, jax.tree.leaves(arguments)))
    return [[None if each is None else next(told) for each in leaf] for leaf in shapes]


def _known_results(closed: Any, arguments: list[Array]) -> list[int | None]:
    """The results of a jaxpr that do not depend on traced values; None for the others."""
    jaxpr = closed.jaxpr
    variables = [*jaxpr.constvars, *jaxpr.invars]
    given = dict(zip(variables, [*closed.consts, *arguments]))
    known = {v for v, x in given.items() if not isinstance(x, jax.core.Tracer)}
    made = []
    for eqn in jaxpr.eqns:
        if all(v in known for v in eqn.invars if isinstance(v, Var)):
            made.append(eqn)
            known.update(eqn.outvars)
    outputs = [v for v in jaxpr.outvars if isinstance(v, Var) and v in known]
    inputs = [v for v in variables if v in known]
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        found = _compiled(_Program(closed_part(jaxpr, inputs, made, outputs)))(*(given[v] for v in inputs))
    values = {v: int(x) for v, x in zip(outputs, found)}
    return [values.get(v) if isinstance(v, Var) else int(v.val) for v in jaxpr.outvars]


class _Program:
    """A closed jaxpr, equal to another if both print alike.

    If two different ones were taken for equal, a tape would be too short, which is an error, or too long.
    """

    def __init__(self, closed: Any):
        self.closed, self.text = closed, str(closed.jaxpr)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=256)
def _compiled(program: _Program) -> Callable[..., list[Array]]:
    return jax.jit(jax.extend.core.jaxpr_as_fun(program.closed))


def _needed(
    costs: Callable[..., list[Array | None]],
    empty: list[Array],
    length: int,
    scheduled: Mapping[str, Array],
    steps: Array,
) -> list[Array | None]:
    """Tape that is enough for every segment, for factors that differ from element to element."""

    def add(carry: Any, x: Any) -> Any:
        (bits, needed), (hypers, t) = carry, x
        first = (t - steps[0]) % length == 0
        grown = [
            jnp.where(first, e, b) + (0 if c is None else c)
            for e, b, c in zip(empty, bits, costs(hypers, t))
        ]
        return (grown, [jnp.maximum(n, exact.tape_length(b)) for n, b in zip(needed, grown)]), None

    nothing = [jnp.int64(0) for _ in empty]

    def one(carry: Any) -> Any:
        return add(carry, jax.tree.map(lambda x: x[0], (scheduled, steps)))[0]

    begun = settled(one, (empty, nothing))
    (_, needed), _ = jax.lax.scan(add, begun, (scheduled, steps))
    told = costs({name: x[0] for name, x in scheduled.items()}, steps[0])
    return [None if cost is None else need for cost, need in zip(told, needed)]


def _longest(costs: Array, length: int) -> Array:
    """The largest cost of a segment of so many steps, from the costs ``(T,)`` of all steps."""
    padded = jnp.pad(costs, (0, -costs.size % length))
    return jnp.max(jnp.sum(padded.reshape(-1, length), axis=1))


class _Ones:
    """Stands for what a step remembers if only shapes matter."""

    def __getattr__(self, name: str) -> float:
        return 1.0


def destroyed_bits(
    joint: Joint, start: list[Leaf], constants: Constants, inputs: Inputs
) -> dict[str, float]:
    """Bits per element and step that the run destroys, by variable: the largest over all leaves.

    If only the run itself can tell, it is one bit, for which `Reversible` has room by default.

    Args:
      joint: the run.
      start: the float state before the first step, by leaf.
      constants: what is the same at every step.
      inputs: what differs from step to step.
    """
    run = joint.run
    taped = taped_of(joint, start, constants, inputs)
    lengths = known_lengths(joint, taped, run.steps, constants, inputs)
    for_growth = exact.outgrown(covers_run(run, constants, run.steps))
    bits: dict[str, float] = {}
    for each, need in zip(itertools.chain(*taped), itertools.chain(*lengths)):
        if not each.scales and not each.levels:
            continue
        own = 0 if each.buffer is not None else for_growth
        rate = 1.0 if need is None else 8 * (need - own) / max(1, math.prod(each.factor_shape)) / run.steps
        bits[each.variable] = max(rate / max(1, each.scales), bits.get(each.variable, 0.0))
    return bits


def complete(lengths: list[list[int | None]]) -> bool:
    """Whether all lengths are known."""
    return all(length is not None for leaf in lengths for length in leaf)
