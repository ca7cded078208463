"""The integers with which a run begins: made from floats, or handed on by an earlier run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import bundles, exact
from hypergrad._base.compiler import computed
from hypergrad._base.trees import Flag, PyTree
from hypergrad.adjoints.guards import Guards
from hypergrad.adjoints.integers import LARGEST_LOSS, ExactLeaf, Totals
from hypergrad.adjoints.tapes import Taped, held_whole
from hypergrad.program import PARAMS, Leaf, Optimizer


@dataclass(frozen=True)
class Start:
    """How the integers of a run begin.

    Attributes:
      program: the optimizer.
      radix: as set by the user, by variable.
      taped: what is taped of every leaf.
      owners: of each that is made of several of the user's leaves, of which every row is; else None.
    """

    program: Optimizer
    radix: Mapping[str, int]
    taped: Sequence[Sequence[Taped]]
    owners: Sequence[np.ndarray | None]

    def goes_on(self, start: list[Leaf], earlier: PyTree) -> bool:
        """Whether an earlier run, if there is one, was one of such arrays, variables and tapes.

        Args:
          start: the float state, by leaf.
          earlier: as given to `begin`.
        """
        if earlier is None:
            return True
        names = (PARAMS, *self.program.variables)
        wanted = [
            (
                {name: (leaf[name].shape, self.words_of(i, name)) for name in names},
                [(one.shape, one.factor_shape) for one in each if one.buffer is not None],
            )
            for i, (leaf, each) in enumerate(zip(start, self.taped))
        ]
        try:
            found = [
                (
                    {name: (x.high.shape[1:], len(x.low)) for name, x in numbers.items()},
                    [(b.register.shape, b.bits.shape[1:]) for b in buffers],
                )
                for numbers, buffers, _ in earlier
            ]
        except (AttributeError, TypeError, ValueError):
            return False
        return bool(found == wanted)

    def begin(
        self, start: list[Leaf], earlier: PyTree, always_true: Flag
    ) -> tuple[list[ExactLeaf], Guards]:
        """The start as integers, and what rounding took from it.

        Args:
          start: the float state, by leaf.
          earlier: the `packed` end of an earlier run, or None.
          always_true: see `hypergrad._base.compiler`.
        """
        given = self.by_variable(start)
        zeros = [self.zero(i, name, x) for (i, name), x in given.items()]
        fresh = bundles.rounded(always_true, zeros, [*given.values()])
        numbers: list[dict[str, exact.Fixed]] = [{} for _ in start]
        found: Totals = [{} for _ in start]
        before, totals = (None, None) if earlier is None else unpacked(earlier)
        coarse_of = bundles.coarseness(fresh, [*given.values()], LARGEST_LOSS)
        for ((i, name), x), number, coarse in zip(given.items(), fresh, coarse_of):
            if before is not None and totals is not None:
                # If the start is still what an earlier run left, take the integers behind it: these
                # are not rounded again.
                left = before[i].numbers[name]
                known = jnp.all(exact.to_float(left, x.dtype) == x)
                number = jax.tree.map(lambda a, b, known=known: jnp.where(known, a, b), left, number)
                coarse = jnp.where(known, totals[i][name], coarse)
            numbers[i][name] = number
            found[i][name] = coarse
        return [ExactLeaf(*each) for each in zip(numbers, self.buffers(before))], Guards.of(found)

    def by_variable(self, start: list[Leaf]) -> dict[tuple[int, str], Array]:
        """The arrays of a state, by leaf and variable."""
        names = (PARAMS, *self.program.variables)
        return {(i, name): leaf[name] for name in names for i, leaf in enumerate(start)}

    def buffers(self, before: Sequence[ExactLeaf] | None) -> list[list[exact.Buffer]]:
        """The buffers with which the run begins: empty, or as an earlier run left them."""
        if before is not None:
            return [leaf.buffers for leaf in before]
        return [
            [exact.empty(s.shape, s.factor_shape) for s in leaf if s.buffer is not None]
            for leaf in self.taped
        ]

    def zero(self, leaf: int, name: str, x: Array) -> exact.Fixed:
        """Zeros for a variable of a leaf, of the shape of its floats."""
        whole, owner = name in held_whole(self.taped[leaf]), self.owners[leaf] if x.size else None
        return exact.zero(x.shape, self.words_of(leaf, name), self.radix.get(name), whole, owner)

    def words_of(self, leaf: int, name: str) -> int:
        """Number of low words of a variable of a leaf: one more where it drops no bytes, or is joined."""
        whole = name in held_whole(self.taped[leaf])
        return self.program.words_of(name) + (not whole) + (self.owners[leaf] is not None)

    def growth_of(self, leaf: int, name: str) -> int:
        """How far a variable may outgrow its first numbers, in binary digits."""
        return exact.growth_of(self.words_of(leaf, name), name in held_whole(self.taped[leaf]))

    def recovered(
        self, start: list[Leaf], earlier: PyTree, found: Sequence[ExactLeaf], always_true: Flag
    ) -> Flag:
        """Whether the run backwards arrived at its start, checked one variable at a time.

        A compiler for several devices divides the numbers of a run as what they are compared with.  Were
        that no computation by itself, it could divide the way back otherwise than the way there, whose
        sums would then have other bits.

        Args:
          start: the float state with which the run began, by leaf.
          earlier: as given to `begin`.
          found: the exact state at the end of the way back.
          always_true: see `hypergrad._base.compiler`.
        """
        before = None if earlier is None else unpacked(earlier)[0]
        same = []
        for name in (PARAMS, *self.program.variables):
            given = [leaf[name] for leaf in start]
            numbers = [leaf.numbers[name] for leaf in found]

            def alike(numbers: list[exact.Fixed], given: list[Array], name: str = name) -> Array:
                again = bundles.rounded_like(always_true, numbers, given)
                equal = [_all_equal(*pair) for pair in zip(_bits(numbers), _bits(again))]
                if before is not None:
                    left = [leaf.numbers[name] for leaf in before]
                    known = [jnp.all(exact.to_float(a, x.dtype) == x) for a, x in zip(left, given)]
                    kept = [_all_equal(*pair) for pair in zip(_bits(numbers), _bits(left))]
                    equal = [jnp.where(*each) for each in zip(known, kept, equal)]
                return jnp.all(jnp.stack(equal))

            same.append(computed(always_true, alike, numbers, given))
        same.append(_all_equal([leaf.buffers for leaf in found], self.buffers(before)))
        rows = [x.rows for leaf in found for x in leaf.numbers.values()]
        same.append(jnp.all(jnp.stack(rows) == 0))
        return jnp.all(jnp.stack(same))


def same_state(a: Sequence[ExactLeaf], b: Sequence[ExactLeaf]) -> Flag:
    """Whether two states have the same bits, apart from their exponents."""

    def bits(leaves: Sequence[ExactLeaf]) -> PyTree:
        return [(_bits([*leaf.numbers.values()]), leaf.buffers) for leaf in leaves]

    return _all_equal(bits(a), bits(b))


def on_new_tapes(leaves: Sequence[ExactLeaf]) -> list[ExactLeaf]:
    """A state from which to continue on new tapes."""
    return [
        ExactLeaf(
            {name: x._replace(rows=jnp.zeros_like(x.rows)) for name, x in leaf.numbers.items()},
            [exact.torn_off(b) for b in leaf.buffers],
        )
        for leaf in leaves
    ]


def packed(leaves: Sequence[ExactLeaf], guards: Guards) -> PyTree:
    """An exact state as arrays of at most 32 bits, which survive if JAX's 64-bit mode is off.

    How coarse its shifts were is packed too.  A run that continues where training has almost ended adds
    small amounts to small numbers; with the totals it is judged like one run of all steps.

    Args:
      leaves: the exact state.
      guards: at the end of the run.
    """
    with jax.enable_x64(True):

        def narrow(x: Array) -> Array:
            if x.dtype == jnp.float64:
                x = jax.lax.bitcast_convert_type(x, jnp.int64)
            if x.dtype != jnp.int64:
                return x
            return jnp.stack([(x >> 32).astype(jnp.uint32), x.astype(jnp.uint32)])

        totals = [leaf | {PARAMS: leaf[PARAMS] * left} for leaf, left in zip(guards.totals, guards.faded)]
        return jax.tree.map(narrow, [(*leaf, each) for leaf, each in zip(on_new_tapes(leaves), totals)])


def unpacked(state: PyTree) -> tuple[list[ExactLeaf], list[dict[str, Array]]]:
    """Undo `packed`: the state, and how coarse its shifts were."""
    with jax.enable_x64(True):

        def wide(x: Array) -> Array:
            return ((x[0].astype(jnp.uint64) << 32) | x[1].astype(jnp.uint64)).astype(jnp.int64)

        leaves = [
            ExactLeaf(
                {
                    name: x._replace(
                        high=wide(x.high), exponent=wide(x.exponent), floor=wide(x.floor), top=wide(x.top)
                    )
                    for name, x in numbers.items()
                },
                [exact.Buffer(b.register, wide(b.bits)) for b in buffers],
            )
            for numbers, buffers, _ in state
        ]
        double = lambda x: jax.lax.bitcast_convert_type(wide(x), jnp.float64)  # noqa: E731
        return leaves, [{name: double(x) for name, x in totals.items()} for _, _, totals in state]


def _bits(numbers: Sequence[exact.Fixed]) -> list[Any]:
    """Numbers without their exponent, which does not matter if they are zero."""
    return [number[:2] for number in numbers]


def _all_equal(a: PyTree, b: PyTree) -> Flag:
    same = jax.tree.map(lambda x, y: jnp.all(x == y), a, b)
    return jnp.all(jnp.stack([jnp.asarray(True), *jax.tree.leaves(same)]))
