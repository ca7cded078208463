"""Small leaves that are moved alike, as one leaf for the whole run.

A compiler makes instructions for every array anew, which takes a second for every leaf of a model and both
directions of a run.  Most leaves are small, and most optimizers move every element by itself.  Such leaves
are laid end to end before the first step and taken apart only where the loss looks at them.  "Leaf" means
one of the user's in what follows, and "joint leaf" one on which the moves act.

A joint leaf has the shape ``(rows, 32)``, and every leaf begins with a new row.  What is left of its last
row is padding: its last element again, so that nothing that is computed there is NaN unless it is for a
real one.  Cotangents of padding are zero.
"""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal
from jaxtyping import Int

from hypergrad._base.compiler import CALLS, noinline, same_bits_everywhere, unknown
from hypergrad._base.compiler import always_true as known_later
from hypergrad._base.tracing import live
from hypergrad._base.trees import Flag, Step
from hypergrad.adjoints.run import Constants, Hypers, Inputs, Run
from hypergrad.bundles import LARGEST, SMALL
from hypergrad.program import (
    PARAMS,
    Keep,
    Leaf,
    Move,
    Observed,
    Scale,
    Shift,
    factor_of,
    view_of,
)

ROW = 32  # elements, all of one leaf: sums over rows, which judge rounding, are not of several leaves

# What computes every element of its result from the same element of its operands.
BY_ELEMENT = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt",
    "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq", "erf", "erf_inv",
    "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "rem", "round",
    "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip


class _NotByElementError(Exception):
    """A computation looks at more than one element at a time, or at the shape."""


@dataclass(frozen=True)
class Joint:
    """A run whose small leaves are joined.

    Attributes:
      run: of the leaves.
      places: which leaves every joint leaf is made of, in order; most often one.
      shapes: of the leaves.
    """

    run: Run
    places: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]

    # ---- leaves and joint leaves

    def is_joined(self, joint: int) -> bool:
        """Whether a joint leaf is made of several leaves."""
        return len(self.places[joint]) > 1

    @property
    def names(self) -> list[str]:
        """Of the joint leaves, for messages."""
        result = []
        for place in self.places:
            first, *others = (self.run.names[i] for i in place)
            more = (
                f" or {others[0]}" if len(others) == 1 else f" or one of {len(others)} other small leaves"
            )
            result.append(first + (more if others else ""))
        return result

    def _sizes(self, joint: int) -> list[int]:
        return [math.prod(self.shapes[i]) for i in self.places[joint]]

    def _rows(self, joint: int) -> list[int]:
        return [-(-size // ROW) for size in self._sizes(joint)]

    def leaves_of_rows(self, joint: int) -> Int[np.ndarray, " rows"]:
        """Which leaf every row of a joint leaf is of."""
        return np.repeat(np.array(self.places[joint], np.int32), self._rows(joint))

    def join(self, arrays: Sequence[Array]) -> list[Array]:
        """Arrays of the leaves as those of the joint leaves, with zeros as padding."""
        return [_end_to_end([arrays[i] for i in place]) for place in self.places]

    def _padded(self, joint: int, x: Array) -> Array:
        sizes = self._sizes(joint)
        if not x.size or not any(size % ROW for size in sizes):
            return x
        rows = self._rows(joint)
        ends = np.cumsum(rows)
        last = np.repeat([(end - 1) * ROW + (size - 1) % ROW for end, size in zip(ends, sizes)], rows)
        filled = np.full(int(ends[-1]), ROW)
        filled[ends - 1] = [(size - 1) % ROW + 1 for size in sizes]
        real = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < jnp.asarray(filled, jnp.int32)[:, None]
        again = jax.lax.stop_gradient(x.ravel()).at[jnp.asarray(last, jnp.int32)]
        return jnp.where(real, x, again.get(mode="promise_in_bounds")[:, None])

    def starts(self, always_true: Flag) -> list[Array | None]:
        """Where every leaf begins in its joint leaf, for `split`; see `hypergrad._base.compiler.unknown`.

        Args:
          always_true: see `hypergrad._base.compiler`.
        """
        places: dict[int, int] = {}
        for k in range(len(self.places)):
            ends = ROW * np.cumsum(self._rows(k))
            places |= zip(self.places[k], [0, *ends[:-1].tolist()]) if self.is_joined(k) else ()
        found = dict(zip(places, unknown(always_true, list(places.values()))))
        return [found.get(i) for i in range(len(self.shapes))]

    def split(self, arrays: Sequence[Array], starts: Sequence[Array | None]) -> list[Array]:
        """Undo `join`, whatever the padding; the starts are those of `starts`."""
        found: dict[int, Array] = {}
        for k, (place, x) in enumerate(zip(self.places, arrays)):
            found |= zip(place, self._split(k, x, starts))
        return [found[i] for i in range(len(self.shapes))]

    def _split(self, joint: int, x: Array, starts: Sequence[Array | None]) -> list[Array]:
        place = self.places[joint]
        if not self.is_joined(joint) or not x.size:  # alone, or a variable that these leaves lack
            return [x] * len(place)
        flat, parts = x.ravel(), list[Array]()
        for i, size in zip(place, self._sizes(joint)):
            start = starts[i]
            assert start is not None
            part = jax.lax.dynamic_slice_in_dim(flat, start, size, allow_negative_indices=False)
            parts.append(part.reshape(self.shapes[i]))
        return parts

    def join_leaves(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        """`join` for every variable."""
        return [
            {name: _end_to_end([leaves[i][name] for i in place]) for name in leaves[place[0]]}
            for place in self.places
        ]

    def padded_leaves(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        """Joint leaves with the last element of every leaf as its padding, instead of zeros."""
        return [
            {name: self._padded(k, x) if self.is_joined(k) else x for name, x in leaf.items()}
            for k, leaf in enumerate(leaves)
        ]

    def split_leaves(
        self, leaves: Sequence[Mapping[str, Array]], starts: Sequence[Array | None]
    ) -> list[Leaf]:
        """`split` for every variable."""
        result: list[Leaf] = [{} for _ in self.shapes]
        for k, (place, leaf) in enumerate(zip(self.places, leaves)):
            for name, x in leaf.items():
                for i, part in zip(place, self._split(k, x, starts)):
                    result[i][name] = part
        return result

    # ---- what a run is given

    def _hypers(self, hypers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Hyperparameters by joint leaf: a scalar that all its leaves share, or ``(leaves,)``, by step."""
        result: list[dict[str, Any]] = []
        for place in self.places:
            each = [hypers[i] for i in place]
            one = {name: len({id(h[name]) for h in each}) == 1 for name in each[0]}
            result.append(
                {name: each[0][name] if one[name] else _stacked([h[name] for h in each]) for name in one}
            )
        return result

    def _hypers_of_all(
        self, hypers: Sequence[Mapping[str, Any]], scalar: int, starts: Sequence[Array | None]
    ) -> list[dict[str, Any]]:
        """Undo `_hypers`.

        Args:
          hypers: by joint leaf; at one step, they may be spread over the elements.
          scalar: the dimensions of a scalar: 1 for one at every step.
          starts: see `split`.
        """
        result: list[dict[str, Any]] = [{} for _ in self.shapes]
        for k, (place, each) in enumerate(zip(self.places, hypers)):
            for name, x in each.items():
                if self.is_joined(k) and x.ndim == scalar + 2:
                    parts = self._split(k, x, starts)
                elif self.is_joined(k) and x.ndim == scalar + 1:
                    parts = [x[..., j] for j in range(len(place))]
                else:
                    parts = [x] * len(place)
                for i, part in zip(place, parts):
                    result[i][name] = part
        return result

    def together(
        self, start: Sequence[Leaf], constants: Constants, inputs: Inputs
    ) -> tuple[list[Leaf], Constants, Inputs]:
        """The arrays of a run, by joint leaf.

        Hyperparameters that leaves of a joint leaf share are one array, and have one cotangent.
        """
        fixed, scheduled = self._hypers(constants.hypers), self._hypers(inputs.hypers)
        leaves = self.padded_leaves(self.join_leaves(start))
        return leaves, constants._replace(hypers=fixed), inputs._replace(hypers=scheduled)

    def apart(
        self, start: Sequence[Leaf], constants: Constants, inputs: Inputs
    ) -> tuple[list[Leaf], Constants, Inputs]:
        """Undo `together`."""
        starts = self.starts(known_later(start, constants, inputs))
        fixed = self._hypers_of_all(constants.hypers, 0, starts)
        scheduled = self._hypers_of_all(inputs.hypers, 1, starts)
        return (
            self.split_leaves(start, starts),
            constants._replace(hypers=fixed),
            inputs._replace(hypers=scheduled),
        )

    # ---- what a run does

    def leaf_moves(self, joint: int, h: Any, t: Step) -> Sequence[Move]:
        """The moves of one joint leaf at one step, from its hyperparameters."""
        if self.is_joined(joint):  # each leaf's own for all its elements
            spread = {name: self._spread(joint, x) for name, x in vars(h).items() if x.ndim == 1}
            h = SimpleNamespace(**{**vars(h), **spread})
        return self.run.leaf_moves(self.places[joint][0], h, t)

    def _spread(self, joint: int, x: Array) -> Array:
        """A number for each leaf of a joint leaf as one for each of its elements."""
        rows = self._rows(joint)
        which = jnp.asarray(np.repeat(np.arange(len(rows), dtype=np.int32), rows))
        each = jnp.asarray(x).at[which].get(mode="promise_in_bounds")
        return jnp.broadcast_to(each[:, None], (len(which), ROW))

    def moves(
        self, constants: Sequence[Mapping[str, Array]], inputs: Sequence[Mapping[str, Array]], t: Step
    ) -> list[Sequence[Move]]:
        """The moves of every joint leaf at one step; see `Run.moves`."""
        return [
            self.leaf_moves(k, SimpleNamespace(**fixed, **scheduled), t)
            for k, (fixed, scheduled) in enumerate(zip(constants, inputs))
        ]

    def transformed(
        self, hypers: Hypers, observations: Sequence[Observed], starts: Sequence[Array | None]
    ) -> list[Observed]:
        """`Run.transformed`, from the observations of leaves to those of joint leaves."""
        if self.run.optimizer.transform is not None:
            constant, scheduled = (self._hypers_of_all(each, 0, starts) for each in hypers)
            observations = self.run.transformed((constant, scheduled), observations)
        return self.padded_leaves(self.join_leaves(observations))

    def observations(
        self,
        hypers: Hypers,
        observations: Sequence[Observed],
        starts: Sequence[Array | None],
        always_true: Flag,
    ) -> list[Observed]:
        """`transformed`, with the same bits in both directions (see `hypergrad._base.compiler`)."""
        if self.run.optimizer.transform is None:
            return self.transformed(hypers, observations, starts)
        apart = noinline if self.run.shards is None else same_bits_everywhere
        return apart(always_true, self.transformed, hypers, list(observations), starts)


def _end_to_end(arrays: Sequence[Array]) -> Array:
    """Arrays as one of rows, with zeros as padding; a single one as it is."""
    if len(arrays) == 1 or not any(x.size for x in arrays):  # a variable that these leaves lack
        return arrays[0]
    parts: list[Array] = []
    for x in arrays:
        parts += [x.ravel(), jnp.zeros(-x.size % ROW, x.dtype)]
    return jnp.concatenate([x for x in parts if x.size]).reshape(-1, ROW)


def joined(
    run: Run, start: Sequence[Leaf], constants: Constants, inputs: Inputs, possible: bool = True
) -> Joint:
    """Join the small leaves of a run that are moved element by element and in like ways.

    Learning rates and others may differ from leaf to leaf, but not what is in the factor of a `Scale`: the
    variable could no longer be held whole.

    Args:
      run: of the leaves.
      start: the float state before the first step.
      constants: what is the same at every step.
      inputs: what differs from step to step.
      possible: whether any may be joined.

    Raises:
      ReversalError: the optimizer is no program of moves.
    """
    program = run.program
    shapes = tuple(leaf[PARAMS].shape for leaf in start)
    possible = possible and run.shards is None and jax.sharding.get_abstract_mesh().empty
    possible = possible and program.observe is None
    kinds: list[Hashable] = list(range(len(start)))
    if possible:
        kind_of = partial(_kind, run, {})
        found = [kind_of(i, *each) for i, each in enumerate(zip(start, constants.hypers, inputs.hypers))]
        kinds = [i if kind is None else kind for i, kind in enumerate(found)]
    groups: dict[Hashable, list[list[int]]] = {}
    for i, (kind, shape) in enumerate(zip(kinds, shapes)):
        mine = groups.setdefault(kind, [[]])
        if sum(math.prod(shapes[k]) for k in mine[-1]) + math.prod(shape) > LARGEST:
            mine.append([])
        mine[-1].append(i)
    places = sorted(tuple(each) for every in groups.values() for each in every if each)
    return Joint(run, tuple(places), shapes)


def _kind(
    run: Run,
    programs: dict[Hashable, Any],
    i: int,
    leaf: Leaf,
    fixed: Mapping[str, Any],
    scheduled: Mapping[str, Any],
) -> Hashable:
    """What leaves have in common that may be joined; None if this one may not.

    Args:
      run: of the leaves.
      programs: those of earlier leaves, by what they depend on; the new one is added.
      i: index of the leaf.
      leaf: its float state before the first step.
      fixed: its constant hyperparameters.
      scheduled: its scheduled ones, by step.
    """
    scalars = all(x.ndim == 0 for x in fixed.values()) and all(x.ndim == 1 for x in scheduled.values())
    size = leaf[PARAMS].size
    if not scalars or not 0 < size < SMALL or any(x.size not in (0, size) for x in leaf.values()):
        return None
    if any(x.size and x.shape != leaf[PARAMS].shape for x in leaf.values()):
        return None
    if any(getattr(x, "sharding", None) is not None and _is_divided(x) for x in leaf.values()):
        return None
    hypers = {name: x.dtype for name, x in sorted({**fixed, **scheduled}.items())}
    variables = {name: (x.dtype, bool(x.size)) for name, x in sorted(leaf.items())}
    label = None if run.layout.labels is None else run.layout.labels[i]
    key = (leaf[PARAMS].shape, label, *hypers.items(), *variables.items())
    if key not in programs:
        written = partial(_written, run, i, variables, hypers)
        try:
            # As the leaf has it, and as joint leaves of more and fewer rows have it.
            one, *others = map(written, (leaf[PARAMS].shape, (2, ROW), (3, ROW)))
            programs[key] = one if all(other == one for other in others) else None
        except _NotByElementError:
            programs[key] = None
    if programs[key] is None:
        return None
    told, words, factors = programs[key]
    numbers = [
        (name, x.dtype, id(x) if name in factors else 0, x.ndim)
        for each in (fixed, scheduled)
        for name, x in sorted(each.items())
    ]
    return told, words, tuple(numbers), tuple(variables.items())


def _stacked(arrays: Sequence[Any]) -> Any:
    """Arrays along a new last axis; known ones stay known."""
    known = all(isinstance(x, np.ndarray | np.generic) for x in arrays)
    return np.stack(arrays, axis=-1) if known else jnp.stack(arrays, axis=-1)


def _is_divided(x: Any) -> bool:
    """Whether a concrete array lies on several devices."""
    return not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array) and len(x.devices()) > 1


def _written(
    run: Run, i: int, variables: dict[str, tuple[Any, bool]], hypers: dict[str, Any], shape: tuple[int, ...]
) -> tuple[Hashable, Hashable, frozenset[str]]:
    """The moves of a leaf, as they would be written down for any shape, and which hypers are in factors.

    Raises:
      _NotByElementError: they look at more than one element at a time, or cannot be reversed.
    """
    told: list[tuple[Any, ...]] = []

    def evaluate(hypers: dict[str, Array], t: Step, leaf: Leaf, gradient: Array) -> list[Array]:
        moves = run.leaf_moves(i, SimpleNamespace(**hypers), t)
        record, results = dict[str, Array](), list[Array]()
        for k, move in enumerate(moves):
            view = view_of(move, k, moves, leaf, {"gradient": gradient}, record)
            if isinstance(move, Scale):
                told.append((Scale, move.variable))
                with jax.enable_x64(run.x64):
                    factor = jnp.asarray(factor_of(move, view))
                results.append(jnp.asarray(move.numerator(factor)))
            elif isinstance(move, Shift):
                told.append((Shift, move.variable))
                with jax.enable_x64(run.x64):
                    results.append(jnp.asarray(move.amount(view)))
            elif isinstance(move, Keep):
                told.append((Keep, move.name, move.levels))
                with jax.enable_x64(run.x64):
                    results.append(jnp.asarray(move.value(view)))
                record[move.name] = jnp.broadcast_to(results[-1], shape).astype(leaf[PARAMS].dtype)
            else:
                raise _NotByElementError
        return results

    leaf = {
        name: jax.ShapeDtypeStruct(shape if has else (0,), dtype)
        for name, (dtype, has) in variables.items()
    }
    scalars = {name: jax.ShapeDtypeStruct((), dtype) for name, dtype in hypers.items()}
    with jax.enable_x64(True):
        closed = jax.make_jaxpr(evaluate)(scalars, jax.ShapeDtypeStruct((), np.int32), leaf, leaf[PARAMS])
    words = _in_words(closed.jaxpr, closed.consts, shape)
    in_factors = [out for out, (kind, *_) in zip(closed.jaxpr.outvars, told) if kind is Scale]
    _, needed = live(closed.jaxpr, in_factors)
    given = zip(sorted(hypers), closed.jaxpr.invars)
    return tuple(told), words, frozenset(name for name, v in given if v in needed)


def _in_words(jaxpr: Any, consts: Sequence[Any], shape: tuple[int, ...]) -> Hashable:
    """A jaxpr as a tuple, without the shape of the arrays in it: numbers may be arrays, or the reverse.

    Raises:
      _NotByElementError: it does not compute element by element.
    """
    words: dict[Any, Hashable] = {}
    numbers = itertools.count()

    def word(v: Any) -> Hashable:
        aval: Any = v.aval
        if isinstance(v, Literal):
            return str(aval.dtype), np.asarray(v.val).tobytes()
        if v not in words:
            words[v] = (str(aval.dtype), next(numbers))
        return words[v]

    for v, x in zip(jaxpr.constvars, consts):
        if np.ndim(x):
            raise _NotByElementError
        word(v)
    for v in jaxpr.invars:
        word(v)
    # What is traced lives as long as the trace; of what is known, another may come to the same place.
    traced = [isinstance(x, jax.core.Tracer) for x in consts]
    lines: list[Hashable] = [id(x) if t else np.asarray(x).tobytes() for x, t in zip(consts, traced)]
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if any(v.aval.shape not in ((), shape) for v in eqn.outvars):
            raise _NotByElementError
        if name == "broadcast_in_dim" and eqn.invars[0].aval.shape == ():
            words[eqn.outvars[0]] = word(eqn.invars[0])
            continue
        if name in CALLS:
            inner = params[CALLS[name]]
            what: Hashable = _in_words(inner.jaxpr, inner.consts, shape)
        elif name in BY_ELEMENT:
            what = str(sorted((key, str(x)) for key, x in params.items()))
        else:
            raise _NotByElementError
        lines.append((name, what, tuple(map(word, eqn.invars)), tuple(map(word, eqn.outvars))))
    return tuple(lines), tuple(map(word, jaxpr.outvars))
