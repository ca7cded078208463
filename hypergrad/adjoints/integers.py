"""A step of an optimizer's program on integers, and its exact undoing.

Forwards a `Scale` writes the bits that it destroys to a tape, and a `Shift` adds; backwards a `Scale`
reads them, and a `Shift` subtracts.  Both evaluate factors and amounts anew, from what the other moves of
the step have left as it was, and so to the same bits.

==============  ====================  =====================================================================
symbol          name                  meaning
==============  ====================  =====================================================================
``w, v``        numbers               parameters and the optimizer's variables, as integers
``f``           factor, numerator     of a `Scale`: ``n / 2**32``
``u``           amount                of a `Shift`, a float that is rounded once
==============  ====================  =====================================================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hypergrad import bundles, exact
from hypergrad._base.compiler import same_bits
from hypergrad._base.trees import Flag, PyTree, Step
from hypergrad.exact import Floats, Numerators
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
BAD_LEVEL = ("level", "")


class Moment(NamedTuple):
    """A step of a run, and the hyperparameters there.

    Attributes:
      fixed: by leaf, the constant hyperparameters by name.
      scheduled: by leaf, those of this step.
      step: its number.
      always_true: see `hypergrad._base.compiler`.
    """

    fixed: Sequence[dict[str, Array]]
    scheduled: Sequence[dict[str, Array]]
    step: Step
    always_true: Flag


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
    wrong: Int[Array, "2"]


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
        return [NO_TROUBLE, BAD_LOSS, BAD_LEVEL, *((kind, v) for kind in kinds for v in self.variables)]

    def floats(self, always_true: Flag, leaves: Sequence[ExactLeaf], *names: str) -> list[Leaf]:
        """The float state that the integers stand for: all variables, or those named."""
        return _floats(always_true, leaves, self.dtypes, *names)

    def step(
        self,
        at: Moment,
        leaves: Sequence[ExactLeaf],
        tapes: Sequence[Sequence[Array]],
        observations: Sequence[Observed],
        guarded: Flag,
    ) -> Stepped:
        """One step on integers, and if it is guarded how coarse it was."""
        doing = _Forwards(self, at, leaves, tapes, observations, [{} for _ in leaves], guarded=guarded)
        for group in alike(doing.programs):
            taped = 0
            for k, move in enumerate(doing.programs[group[0]]):
                if isinstance(move, Remember | Total | Keep):
                    doing.remember(group, k)
                if isinstance(move, Keep):
                    doing.keep(group, k, taped)
                elif isinstance(move, Scale):
                    doing.scale(group, k, taped)
                elif isinstance(move, Shift):
                    doing.shift(group, k)
                taped += isinstance(move, Scale | Keep)
        return doing.done()

    def kept(
        self, at: Moment, leaves: Sequence[ExactLeaf], tapes: Sequence[Sequence[Array]]
    ) -> tuple[list[ExactLeaf], list[Record]]:
        """What `Keep` has kept in the step that is to be undone, and the state without it on the tapes."""
        new, records = [], []
        for moves, leaf, tape, dtype in zip(self.program(*at[:3]), leaves, tapes, self.dtypes):
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
        at: Moment,
        leaves: Sequence[ExactLeaf],
        tapes: Sequence[Sequence[Array]],
        observations: Sequence[Observed] | None,
        records: list[Record],
    ) -> list[ExactLeaf]:
        """Undo a step, in two parts: the parameters are needed to find again what the moves have seen.

        Without that, undoes the moves from the first one of the parameters on; with it, the moves
        before that.
        """
        nothing: list[Observed] = [{} for _ in leaves]
        doing = _Step(self, at, leaves, tapes, nothing if observations is None else observations, records)
        for group in alike(doing.programs):
            moves = doing.programs[group[0]]
            cut = first_params_move(moves)
            start, end = (cut, len(moves)) if observations is None else (0, cut)
            taped = sum(isinstance(move, Scale | Keep) for move in moves[:end])
            for k in reversed(range(start, end)):
                taped -= isinstance(moves[k], Scale | Keep)
                if isinstance(moves[k], Scale):
                    doing.unscale(group, k, taped)
                elif isinstance(moves[k], Shift):
                    doing.unshift(group, k)
        return doing.now


@dataclass
class _Step:
    """A step under way: what its moves read, and the state that they change.

    Attributes:
      exact: the arithmetic.
      at: which step.
      leaves: the state before.
      tapes: of every leaf.
      observations: gradient and what is observed, of every leaf.
      records: what has been remembered or kept in this step, by leaf.
      now: the state as far as it has moved.
      programs: the moves of every leaf.
    """

    exact: Exact
    at: Moment
    leaves: Sequence[ExactLeaf]
    tapes: Sequence[Sequence[Array]]
    observations: Sequence[Observed]
    records: list[Record]
    now: list[ExactLeaf] = field(init=False)
    programs: Sequence[Sequence[Move]] = field(init=False)

    def __post_init__(self) -> None:
        self.now = [ExactLeaf(dict(leaf.numbers), list(leaf.buffers)) for leaf in self.leaves]
        self.programs = self.exact.program(*self.at[:3])

    def factors(self, group: Sequence[int], k: int) -> list[Numerators]:
        """The numerators by which scale ``k`` of the programs multiplies the leaves of a group."""

        def evaluate(at: PyTree, records: Sequence[Record]) -> list[Array]:
            result, programs = [], self.exact.program(*at)
            for i, record in zip(group, records):
                move = programs[i][k]
                assert isinstance(move, Scale)
                names: Leaf = dict.fromkeys(self.now[i].numbers, jnp.zeros(()))  # may not be read
                view = view_of(move, k, programs[i], names, {}, record)
                with jax.enable_x64(self.exact.x64):
                    result.append(jnp.asarray(factor_of(move, view)))
            return result

        scalars = [{name: x for name, x in self.records[i].items() if x.ndim == 0} for i in group]
        numerators = []
        for i, factor in zip(group, same_bits(self.at.always_true, evaluate, self.at[:3], scalars)):
            move = self.programs[i][k]
            assert isinstance(move, Scale)
            shape = self.now[i].numbers[move.variable].high.shape
            numerators.append(exact.spread(move.numerator(factor), shape))
        return numerators

    def amounts(self, group: Sequence[int], k: int) -> list[Floats]:
        """By how much shift ``k`` of the programs moves the leaves of a group."""
        variable = moved_variable(self.programs[group[0]][k])
        others = [
            ExactLeaf({v: x for v, x in self.now[i].numbers.items() if v != variable}, []) for i in group
        ]
        dtypes, always_true = members(group, self.exact.dtypes), self.at.always_true

        def evaluate(at: PyTree, others: list[ExactLeaf], observations: Any, records: Any) -> list[Array]:
            result, programs = [], self.exact.program(*at)
            floats = _floats(always_true, others, dtypes)
            for i, leaf, observed, record in zip(group, floats, observations, records):
                move = programs[i][k]
                assert isinstance(move, Shift)
                with jax.enable_x64(self.exact.x64):
                    view = view_of(move, k, programs[i], leaf, observed, record)
                    amount = jnp.asarray(move.amount(view))
                result.append(jnp.broadcast_to(amount, self.now[i].numbers[variable].high.shape))
            return result

        given = (members(group, self.observations), members(group, self.records))
        return same_bits(always_true, evaluate, self.at[:3], others, *given)

    def unscale(self, group: Sequence[int], k: int, taped: int) -> None:
        """Undo a `Scale`, from the bits on its tape."""
        variable = moved_variable(self.programs[group[0]][k])
        numerators = [_at_least_one(n) for n in self.factors(group, k)]
        numbers = [self.now[i].numbers[variable] for i in group]
        buffers = [self.now[i].buffers[taped] for i in group]
        read = [self.tapes[i][taped] for i in group]
        states = bundles.unscale(self.at.always_true, numbers, buffers, read, numerators)
        for i, (number, buffer) in zip(group, states):
            self.now[i].numbers[variable], self.now[i].buffers[taped] = number, buffer

    def unshift(self, group: Sequence[int], k: int) -> None:
        """Undo a `Shift`: the same amounts, subtracted."""
        variable = moved_variable(self.programs[group[0]][k])
        numbers = [self.now[i].numbers[variable] for i in group]
        before = bundles.unshift(self.at.always_true, numbers, self.amounts(group, k))
        for i, number in zip(group, before):
            self.now[i].numbers[variable] = number


@dataclass
class _Forwards(_Step):
    """A step forwards: what it writes and what it looks out for, besides; see `Stepped`."""

    guarded: Flag = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.written = [list(leaf) for leaf in self.tapes]
        self.coarse: list[dict[str, Array]] = [{} for _ in self.leaves]
        self.faded = [jnp.float64(1) for _ in self.leaves]
        self.wrong = jnp.zeros(2, jnp.int32)

    def look(self, valid: Flag, trouble: Trouble, leaf: int) -> None:
        """Note what goes wrong first."""
        code = jnp.array([self.exact.troubles().index(trouble), leaf], jnp.int32)
        self.wrong = jnp.where((self.wrong[0] == 0) & ~valid, code, self.wrong)

    def remember(self, group: Sequence[int], k: int) -> None:
        """What move ``k`` remembers or keeps, put on record."""
        dtypes = members(group, self.exact.dtypes)
        given = (members(group, self.observations), members(group, self.records))
        with jax.enable_x64(self.exact.x64):
            floats = _floats(self.at.always_true, members(group, self.now), dtypes)
            records = remember(k, members(group, self.programs), floats, *given, dtypes)
        for i, record in zip(group, records):
            move = self.programs[i][k]
            assert isinstance(move, Remember | Total | Keep)
            self.records[i] = record
            self.look(jnp.all(jnp.isfinite(record[move.name])), BAD_LOSS, i)

    def keep(self, group: Sequence[int], k: int, taped: int) -> None:
        """Write which of its levels every element of a `Keep` is."""
        for i in group:
            move = self.programs[i][k]
            assert isinstance(move, Keep)
            digit, known = _level(move.levels, self.records[i][move.name])
            self.look(known, BAD_LEVEL, i)
            self.now[i].buffers[taped], self.written[i][taped] = exact.push(
                digit, len(move.levels), self.now[i].buffers[taped], self.written[i][taped]
            )

    def scale(self, group: Sequence[int], k: int, taped: int) -> None:
        """A `Scale`; the bits that it destroys go to its tape."""
        variable = moved_variable(self.programs[group[0]][k])
        numerators = []
        for i, n in zip(group, self.factors(group, k)):
            self.look(exact.admissible(n), ("factor", variable), i)
            numerators.append(_at_least_one(n))
            if variable == PARAMS:
                self.faded[i] *= jnp.max(n, initial=0).astype(jnp.float64) / exact.BASE
        numbers = [self.now[i].numbers[variable] for i in group]
        buffers = [self.now[i].buffers[taped] for i in group]
        tapes = [self.written[i][taped] for i in group]
        scaled = bundles.scale(self.at.always_true, numbers, buffers, tapes, numerators)
        for i, (number, buffer, tape) in zip(group, scaled):
            self.now[i].numbers[variable], self.now[i].buffers[taped] = number, buffer
            self.written[i][taped] = tape

    def shift(self, group: Sequence[int], k: int) -> None:
        """A `Shift`, and how coarse it was."""
        variable = moved_variable(self.programs[group[0]][k])
        amounts = self.amounts(group, k)
        numbers = [self.now[i].numbers[variable] for i in group]
        moved = bundles.shift(self.at.always_true, numbers, amounts)
        for i, more in zip(group, bundles.coarseness(self.guarded, moved, amounts, LARGEST_LOSS)):
            so_far = self.coarse[i].get(variable)
            self.coarse[i][variable] = more if so_far is None else so_far + more
        for i, number in zip(group, moved):
            self.now[i].numbers[variable] = number
            self.look(exact.fits(number), ("range", variable), i)

    def done(self) -> Stepped:
        """What the step gives.  What is kept stands on the tape; only scalars are recorded."""
        kept = {move.name for moves in self.programs for move in moves if isinstance(move, Keep)}
        scalars = [{name: x for name, x in each.items() if name not in kept} for each in self.records]
        return Stepped(self.now, self.written, scalars, self.coarse, self.faded, self.wrong)


def _floats(
    always_true: Flag, leaves: Sequence[ExactLeaf], dtypes: Sequence[Any], *names: str
) -> list[Leaf]:
    """The floats, of these types, that the integers of some leaves stand for."""
    result: list[Leaf] = [{} for _ in leaves]
    for v in names or leaves[0].numbers:
        numbers = [leaf.numbers[v] for leaf in leaves]
        for leaf, x in zip(result, bundles.floats(always_true, numbers, dtypes)):
            leaf[v] = x
    return result


def _at_least_one(n: Numerators) -> Numerators:
    """A numerator to divide by: a division by zero would trap, not tell."""
    return jnp.maximum(n, jnp.ones_like(n))


def _level(levels: Sequence[float], value: Float[Array, "*leaf"]) -> tuple[Int[Array, "*leaf"], Flag]:
    """Which of the levels every element is, and whether all are one of them."""
    same = jnp.stack([value == level for level in levels])
    return jax.lax.argmax(same, 0, jnp.int32), jnp.all(jnp.any(same, axis=0))
