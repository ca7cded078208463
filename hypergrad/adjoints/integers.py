"""A step of an optimizer's program on integers, and its exact undoing."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import bundles, exact
from hypergrad._base.compiler import same_bits
from hypergrad._base.trees import PyTree
from hypergrad.program import (
    PARAMS,
    Keep,
    Leaf,
    Move,
    Observed,
    Record,
    Remember,
    Scale,
    Shift,
    Total,
    alike,
    factor_of,
    first_params_move,
    members,
    moved_variable,
    remember,
    view_of,
)

# A run is refused where rounding takes a larger part of what is added to a row of a variable.
LARGEST_LOSS = 2.0**-10


class ExactLeaf(NamedTuple):
    """Exact state of one leaf: its variables, and a buffer for every `Scale` and `Keep` of its program."""

    numbers: dict[str, exact.Fixed]
    buffers: list[exact.Buffer]


Trouble = tuple[str, str]  # a kind and a variable
NO_TROUBLE = ("", "")
BAD_LOSS = ("loss", "")


class Stepped(NamedTuple):
    """What a step on integers gives.

    Attributes:
      leaves: the new state.
      tapes: of every leaf, one for every `Scale` and `Keep`.
      records: what was remembered, by leaf.
      coarse: how coarse the shifts were, by leaf and variable; see `exact.coarseness`.
      faded: what is left of the parameters, by leaf: the largest factor of each.
      wrong: what went wrong first and in which leaf, as indices into `Exact.troubles` and the leaves, or 0.
    """

    leaves: list[ExactLeaf]
    tapes: list[list[Array]]
    records: list[Record]
    coarse: list[dict[str, Array]]
    faded: list[Array]
    wrong: Array


class Exact(NamedTuple):
    """The exact arithmetic of an optimizer, on all leaves at once.

    Attributes:
      program: the moves of every leaf at one step, from the hyperparameters and the step.
      variables: their names, the parameters' first.
      dtypes: of the floats that the moves see, by leaf.
      x64: whether the user's code runs in JAX's 64-bit mode, which this code must not change for it.
    """

    program: Callable[..., Sequence[Sequence[Move]]]
    variables: Sequence[str]
    dtypes: Sequence[Any]
    x64: bool

    def troubles(self) -> list[Trouble]:
        """What can go wrong in a step."""
        kinds = ("range", "factor", "rounding")
        return [NO_TROUBLE, BAD_LOSS, ("level", ""), *((kind, v) for kind in kinds for v in self.variables)]

    def floats(
        self,
        always_true: Array,
        leaves: Sequence[ExactLeaf],
        *names: str,
        dtypes: Sequence[Any] | None = None,
    ) -> list[Leaf]:
        """The float state that the integers stand for: all variables, or those named."""
        result: list[Leaf] = [{} for _ in leaves]
        for v in names or leaves[0].numbers:
            numbers = [leaf.numbers[v] for leaf in leaves]
            for leaf, x in zip(result, bundles.floats(always_true, numbers, dtypes or self.dtypes)):
                leaf[v] = x
        return result

    def factors(
        self,
        k: int,
        group: Sequence[int],
        at: PyTree,
        leaves: Sequence[ExactLeaf],
        records: Sequence[Record],
        always_true: Array,
    ) -> list[Array]:
        """The numerators by which scale ``k`` of the programs multiplies the leaves of a group.

        Args:
          k: index of the move.
          group: indices of the leaves, whose programs are alike.
          at: arguments of `program`.
          leaves: exact state of all leaves.
          records: what has been remembered or kept in this step, by leaf.
          always_true: see `hypergrad._base.compiler`.
        """
        programs = self.program(*at)

        def evaluate(at: PyTree, records: Sequence[Record]) -> list[Array]:
            result, programs = [], self.program(*at)
            for i, record in zip(group, records):
                move = programs[i][k]
                assert isinstance(move, Scale)
                names: Leaf = dict.fromkeys(leaves[i].numbers, jnp.zeros(()))  # may not be read
                view = view_of(move, k, programs[i], names, {}, record)
                with jax.enable_x64(self.x64):
                    result.append(jnp.asarray(factor_of(move, view)))
            return result

        numerators = []
        scalars = [{k: x for k, x in records[i].items() if x.ndim == 0} for i in group]
        for i, factor in zip(group, same_bits(always_true, evaluate, at, scalars)):
            move = programs[i][k]
            assert isinstance(move, Scale)
            shape = leaves[i].numbers[move.variable].high.shape
            numerators.append(exact.spread(move.numerator(factor), shape))
        return numerators

    def amounts(
        self,
        k: int,
        group: Sequence[int],
        at: PyTree,
        leaves: Sequence[ExactLeaf],
        observations: Sequence[Observed],
        records: Sequence[Record],
        always_true: Array,
    ) -> list[Array]:
        """By how much shift ``k`` of the programs moves the leaves of a group; arguments: see `factors`."""
        variable = moved_variable(self.program(*at)[group[0]][k])
        others = [
            ExactLeaf({v: x for v, x in leaves[i].numbers.items() if v != variable}, []) for i in group
        ]
        dtypes = members(group, self.dtypes)

        def evaluate(at: PyTree, others: list[ExactLeaf], observations: Any, records: Any) -> list[Array]:
            floats, result, programs = (
                self.floats(always_true, others, dtypes=dtypes),
                [],
                self.program(*at),
            )
            for i, leaf, see, record in zip(group, floats, observations, records):
                move = programs[i][k]
                assert isinstance(move, Shift)
                with jax.enable_x64(self.x64):
                    amount = jnp.asarray(move.amount(view_of(move, k, programs[i], leaf, see, record)))
                result.append(jnp.broadcast_to(amount, leaves[i].numbers[variable].high.shape))
            return result

        return same_bits(
            always_true, evaluate, at, others, members(group, observations), members(group, records)
        )

    def step(
        self,
        at: PyTree,
        leaves: Sequence[ExactLeaf],
        tapes: Sequence[Sequence[Array]],
        observations: Sequence[Observed],
        always_true: Array,
        guarded: Array,
    ) -> Stepped:
        """One step on integers, and if it is guarded how coarse it was."""
        now = [ExactLeaf(dict(leaf.numbers), list(leaf.buffers)) for leaf in leaves]
        new_tapes = [list(leaf) for leaf in tapes]
        records: list[Record] = [{} for _ in leaves]
        coarse: list[dict[str, Array]] = [{} for _ in leaves]
        faded = [jnp.float64(1) for _ in leaves]
        wrong = jnp.zeros(2, jnp.int32)

        def look(valid: Array, trouble: Trouble, leaf: int) -> Array:
            code = jnp.array([self.troubles().index(trouble), leaf], jnp.int32)
            return jnp.where((wrong[0] == 0) & ~valid, code, wrong)

        programs = self.program(*at)
        for group in alike(programs):
            taped = 0
            for k, move in enumerate(programs[group[0]]):
                if isinstance(move, Remember | Total | Keep):
                    dtypes, given = (
                        members(group, self.dtypes),
                        (members(group, observations), members(group, records)),
                    )
                    with jax.enable_x64(self.x64):
                        floats = self.floats(always_true, members(group, now), dtypes=dtypes)
                        remembered = remember(k, members(group, programs), floats, *given, dtypes)
                    for i, record in zip(group, remembered):
                        records[i] = record
                        wrong = look(jnp.all(jnp.isfinite(record[move.name])), BAD_LOSS, i)
                if isinstance(move, Keep):
                    for i in group:
                        digit, known = _level(move.levels, records[i][move.name])
                        wrong = look(known, ("level", ""), i)
                        now[i].buffers[taped], new_tapes[i][taped] = exact.push(
                            digit, len(move.levels), now[i].buffers[taped], new_tapes[i][taped]
                        )
                    taped += 1
                elif isinstance(move, Scale):
                    v = move.variable
                    numerators = []
                    for i, n in zip(group, self.factors(k, group, at, now, records, always_true)):
                        wrong = look(exact.admissible(n), ("factor", v), i)
                        # A division by zero would trap, not tell.
                        numerators.append(jnp.maximum(n, jnp.ones_like(n)))
                        if v == PARAMS:
                            faded[i] *= jnp.max(n, initial=0).astype(jnp.float64) / exact.BASE
                    numbers = [now[i].numbers[v] for i in group]
                    buffers = [now[i].buffers[taped] for i in group]
                    written = [new_tapes[i][taped] for i in group]
                    scaled = bundles.scale(always_true, numbers, buffers, written, numerators)
                    for i, (number, buffer, tape) in zip(group, scaled):
                        now[i].numbers[v], now[i].buffers[taped], new_tapes[i][taped] = number, buffer, tape
                    taped += 1
                elif isinstance(move, Shift):
                    v = move.variable
                    amounts = self.amounts(k, group, at, now, observations, records, always_true)
                    moved = bundles.shift(always_true, [now[i].numbers[v] for i in group], amounts)
                    for i, more in zip(group, bundles.coarseness(guarded, moved, amounts, LARGEST_LOSS)):
                        coarse[i][v] = more if v not in coarse[i] else coarse[i][v] + more
                    for i, number in zip(group, moved):
                        now[i].numbers[v] = number
                        wrong = look(exact.fits(number), ("range", v), i)
        # What is kept stands on the tape; only scalars are recorded.
        kept = {move.name for moves in programs for move in moves if isinstance(move, Keep)}
        scalars = [{name: x for name, x in record.items() if name not in kept} for record in records]
        return Stepped(now, new_tapes, scalars, coarse, faded, wrong)

    def kept(
        self, at: PyTree, leaves: Sequence[ExactLeaf], tapes: Sequence[Sequence[Array]]
    ) -> tuple[list[ExactLeaf], list[Record]]:
        """What `Keep` has kept in the step that is to be undone, and the state without it on the tapes."""
        new, records = [], []
        for moves, leaf, tape, dtype in zip(self.program(*at), leaves, tapes, self.dtypes):
            buffers, record = list(leaf.buffers), {}
            taped = [move for move in moves if isinstance(move, Scale | Keep)]
            for k, move in enumerate(taped):
                if isinstance(move, Keep):
                    digit, buffers[k] = exact.pop(len(move.levels), buffers[k], tape[k])
                    record[move.name] = jnp.asarray(move.levels, dtype)[digit]
            new.append(ExactLeaf(leaf.numbers, buffers))
            records.append(record)
        return new, records

    def unstep(
        self,
        at: PyTree,
        leaves: Sequence[ExactLeaf],
        tapes: Sequence[Sequence[Array]],
        observations: Sequence[Observed] | None,
        records: Sequence[Record],
        always_true: Array,
    ) -> list[ExactLeaf]:
        """Undo a step, in two parts: the parameters are needed to find again what the moves have seen.

        Without that, undoes the moves from the first one of the parameters on; with it, the moves
        before that.
        """
        programs = self.program(*at)
        now = [ExactLeaf(dict(leaf.numbers), list(leaf.buffers)) for leaf in leaves]
        given: Sequence[Observed] = [{} for _ in leaves] if observations is None else observations
        for group in alike(programs):
            moves = programs[group[0]]
            cut = first_params_move(moves)
            start, end = (cut, len(moves)) if observations is None else (0, cut)
            taped = sum(isinstance(move, Scale | Keep) for move in moves[:end])
            for k in reversed(range(start, end)):
                move = moves[k]
                if isinstance(move, Keep):
                    taped -= 1
                elif isinstance(move, Scale):
                    v = move.variable
                    taped -= 1
                    numerators = self.factors(k, group, at, now, records, always_true)
                    numerators = [jnp.maximum(n, jnp.ones_like(n)) for n in numerators]
                    numbers = [now[i].numbers[v] for i in group]
                    buffers = [now[i].buffers[taped] for i in group]
                    read = [tapes[i][taped] for i in group]
                    for i, state in zip(
                        group, bundles.unscale(always_true, numbers, buffers, read, numerators)
                    ):
                        now[i].numbers[v], now[i].buffers[taped] = state
                elif isinstance(move, Shift):
                    v = move.variable
                    amounts = self.amounts(k, group, at, now, given, records, always_true)
                    numbers = [now[i].numbers[v] for i in group]
                    for i, number in zip(group, bundles.unshift(always_true, numbers, amounts)):
                        now[i].numbers[v] = number
        return now


def _level(levels: Sequence[float], value: Array) -> tuple[Array, Array]:
    """Which of the levels every element is, and whether all are one of them."""
    same = jnp.stack([value == level for level in levels])
    return jax.lax.argmax(same, 0, jnp.int32), jnp.all(jnp.any(same, axis=0))
