"""A step of an optimizer's program on integers, and its exact undoing.

Forwards, a `Shift` adds, and a `Scale` destroys bits, which go to a tape: at once to a buffer if every
element has a factor of its own, else when a later `Shift` needs their room (see `hypergrad.exact`).
Backwards, a `Shift` subtracts, and the bits are read again.  Both directions evaluate factors and amounts
from the same arrays, which the move itself does not change, and therefore to the same bits.

For gradient descent with momentum, the moves are the lines of Algorithm 1 in Maclaurin, Duvenaud, Adams
(2015), and their inverses, read upwards, those of Algorithm 2::

    v <- γ v                   Scale  (bits to the tape)     v <- v / γ   (bits from the tape)
    v <- v - (1 - γ) ∇L(w)     Shift                         v <- v + (1 - γ) ∇L(w)
    w <- w + α v               Shift                         w <- w - α v

==============  ====================  =====================================================================
symbol          name                  meaning
==============  ====================  =====================================================================
``w, v``        numbers               parameters and the optimizer's variables, as integers
``f``           factor, numerator     factor of a `Scale`, ``n / 2**32``
``u``           amount                amount of a `Shift`, a float that is rounded once
==============  ====================  =====================================================================

Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
learning", ICML 2015, Algorithms 1 to 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hypergrad import bundles, exact
from hypergrad._base.compiler import round_alike, same_bits, same_bits_everywhere
from hypergrad._base.tracing import live, part
from hypergrad._base.trees import Flag, PyTree, Step
from hypergrad._base.varying import axes_of
from hypergrad.exact import Fixed, Floats, Numerators
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

# A run is refused if rounding takes a larger part of what is added to a row of a variable.
LARGEST_LOSS = 2.0**-10


class ExactLeaf(NamedTuple):
    """Exact state of one leaf.

    Attributes:
      numbers: parameters and the optimizer's variables, by name.
      buffers: one for every `Keep` of the leaf's program and every `Scale` of what is not held whole.
    """

    numbers: dict[str, exact.Fixed]
    buffers: list[exact.Buffer]


Drops = Array | list[Array]  # by leaf of a group
Tapes = dict[str, Array]  # of one leaf, by the variables that are held whole, and by `buffer_name`
Totals = list[dict[str, Float[Array, " rows"]]]  # by leaf and variable
Trouble = tuple[str, str]  # a kind and a variable
NO_TROUBLE = ("", "")
BAD_LOSS = ("loss", "")
BAD_LEVEL = ("level", "")


class Moment(NamedTuple):
    """A step of a run and its hyperparameters.

    Attributes:
      fixed: for every leaf, the constant hyperparameters by name.
      scheduled: for every leaf, the scheduled hyperparameters of this step by name.
      step: int32, the number of the step.
      always_true: see `hypergrad._base.compiler`.
    """

    fixed: Sequence[dict[str, Array]]
    scheduled: Sequence[dict[str, Array]]
    step: Step
    always_true: Flag


class Stepped(NamedTuple):
    """The result of a step on integers.

    Attributes:
      leaves: the new state.
      tapes: of every leaf, by name.
      drops: how many bytes the numbers of a group dropped, int8, for every `Shift` of every group.
      records: the scalars that were remembered, by leaf.
      totals: how coarse the shifts have been; see `Guards` in `hypergrad.adjoints.guards`.
      faded: the part of the parameters that is left since they were last added up, by leaf: the product of
        their largest factors.
      wrong: ``(2,)``, what went wrong first, an index into `Exact.troubles` or 0, and in which leaf.
    """

    leaves: list[ExactLeaf]
    tapes: list[Tapes]
    drops: list[Drops]
    records: list[Record]
    totals: Totals
    faded: list[Array]
    wrong: Int[Array, "2"]


def buffer_name(place: int) -> str:
    """The name of the tape of a buffer."""
    return f"buffer {place}"


def buffer_place(moves: Sequence[Move], k: int, whole: frozenset[str]) -> int:
    """How many moves before ``k`` have a buffer: every `Keep`, and `Scale` of what is not held whole."""
    return sum(
        isinstance(move, Keep) or (isinstance(move, Scale) and move.variable not in whole)
        for move in moves[:k]
    )


class Exact(NamedTuple):
    """The exact arithmetic of an optimizer, on all leaves at once.

    Attributes:
      program: from the hyperparameters and the step to the moves of every leaf.
      variables: names of the variables, the parameters first.
      dtypes: of the floats that the moves see, by leaf.
      whole: by leaf, the variables that are held whole: every factor that scales them is one for the array.
      x64: whether the user's code runs in JAX's 64-bit mode; it must see that mode unchanged.
      everywhere: whether other programs, such as one for several devices, must find the same bits.
    """

    program: Callable[..., Sequence[Sequence[Move]]]
    variables: Sequence[str]
    dtypes: Sequence[Any]
    whole: Sequence[frozenset[str]]
    x64: bool
    everywhere: bool = False

    def alike(self, always_true: Flag, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
        """Evaluate floats to the same bits forwards and backwards."""
        if self.everywhere:
            return same_bits_everywhere(always_true, function, *arguments)
        return same_bits(always_true, function, *arguments)

    def troubles(self) -> list[Trouble]:
        """What can go wrong in a step; `Stepped.wrong` is an index into this list."""
        kinds = ("range", "factor", "rounding")
        return [NO_TROUBLE, BAD_LOSS, BAD_LEVEL, *((kind, v) for kind in kinds for v in self.variables)]

    def floats(self, always_true: Flag, leaves: Sequence[ExactLeaf], *names: str) -> list[Leaf]:
        """The float state that the integers stand for: all variables, or only those named."""
        return _floats(always_true, leaves, self.dtypes, *names)

    def step(
        self,
        at: Moment,
        leaves: Sequence[ExactLeaf],
        tapes: Sequence[Tapes],
        observations: Sequence[Observed],
        so_far: tuple[Totals, Sequence[Array]],
        guarded: Flag,
    ) -> Stepped:
        """One step on integers.

        Args:
          at: the step and its hyperparameters.
          leaves: the state before the step.
          tapes: of every leaf.
          observations: the gradient and whatever else is observed, by leaf.
          so_far: how coarse the shifts have been, and the part of the parameters that is left since; see
            `Stepped`.
          guarded: whether to measure how coarse the shifts are.
        """
        nothing: list[Record] = [{} for _ in leaves]
        doing = _Forwards(self, at, leaves, tapes, observations, nothing, so_far=so_far, guarded=guarded)
        for group in alike(doing.programs):
            for k, move in enumerate(doing.programs[group[0]]):
                if isinstance(move, Remember | Total | Keep):
                    doing.remember(group, k)
                if isinstance(move, Keep):
                    doing.keep(group, k)
                elif isinstance(move, Scale):
                    doing.scale(group, k)
                elif isinstance(move, Shift):
                    doing.shift(group, k)
        return doing.done()

    def kept(
        self, at: Moment, leaves: Sequence[ExactLeaf], tapes: Sequence[Tapes]
    ) -> tuple[list[ExactLeaf], list[Record]]:
        """Read from the tapes what `Keep` kept in the step that is to be undone.

        Args:
          at: the step and its hyperparameters.
          leaves: the state after the step.
          tapes: of every leaf.

        Returns:
          The state with that taken off its buffers, and what was kept, by leaf.
        """
        new, records = [], []
        for i, (moves, leaf, tape, dtype) in enumerate(
            zip(self.program(*at[:3]), leaves, tapes, self.dtypes)
        ):
            buffers, record = list(leaf.buffers), {}
            for k, move in enumerate(moves):
                if isinstance(move, Keep):
                    place = buffer_place(moves, k, self.whole[i])
                    digit, buffers[place] = exact.pop(
                        len(move.levels), buffers[place], tape[buffer_name(place)]
                    )
                    record[move.name] = jnp.asarray(move.levels, dtype)[digit]
            new.append(ExactLeaf(leaf.numbers, buffers))
            records.append(record)
        return new, records

    def unstep(
        self,
        at: Moment,
        leaves: Sequence[ExactLeaf],
        tapes: Sequence[Tapes],
        observations: Sequence[Observed] | None,
        records: list[Record],
        drops: Sequence[Drops],
    ) -> list[ExactLeaf]:
        """Undo a step, in two calls: observations can be evaluated again only at the old parameters.

        Without observations, undo the moves from the first one of the parameters on, in Algorithm 2
        ``w <- w - α v``; with them, undo the moves before it, ``v <- [v + (1 - γ) g] / γ``.

        Args:
          at: the step and its hyperparameters.
          leaves: the state after the moves that are to be undone.
          tapes: of every leaf.
          observations: the gradient and whatever else is observed, by leaf; None in the first call.
          records: what was remembered or kept in the step, by leaf.
          drops: as in `Stepped`.

        Returns:
          The state before these moves.
        """
        nothing: list[Observed] = [{} for _ in leaves]
        doing = _Step(self, at, leaves, tapes, nothing if observations is None else observations, records)
        told = iter(drops)
        for group in alike(doing.programs):
            moves = doing.programs[group[0]]
            dropped = {k: next(told) for k, move in enumerate(moves) if isinstance(move, Shift)}
            cut = first_params_move(moves)
            # First call: undo the position update.  Second, with the gradient: undo the velocity update.
            start, end = (cut, len(moves)) if observations is None else (0, cut)
            for k in reversed(range(start, end)):
                if isinstance(moves[k], Scale):
                    doing.unscale(group, k)
                elif isinstance(moves[k], Shift):
                    doing.unshift(group, k, dropped[k])
        return doing.now


@dataclass
class _Step:
    """A step in progress: what its moves read, and the state that they change.

    Attributes:
      exact: the arithmetic.
      at: the step and its hyperparameters.
      leaves: the state before the first move, in either direction.
      tapes: of every leaf.
      observations: the gradient and whatever else is observed, by leaf.
      records: what has been remembered or kept in this step, by leaf.
      now: the state after the moves made so far.
      programs: the moves of every leaf.
    """

    exact: Exact
    at: Moment
    leaves: Sequence[ExactLeaf]
    tapes: Sequence[Tapes]
    observations: Sequence[Observed]
    records: list[Record]
    now: list[ExactLeaf] = field(init=False)
    programs: Sequence[Sequence[Move]] = field(init=False)

    def __post_init__(self) -> None:
        self.now = [ExactLeaf(dict(leaf.numbers), list(leaf.buffers)) for leaf in self.leaves]
        self.programs = self.exact.program(*self.at[:3])

    def factors(self, group: Sequence[int], k: int) -> list[Numerators]:
        """The numerators by which move ``k``, a `Scale`, multiplies the leaves of a group."""

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
        for i, factor in zip(group, self.exact.alike(self.at.always_true, evaluate, self.at[:3], scalars)):
            move = self.programs[i][k]
            assert isinstance(move, Scale)
            shape = self.now[i].numbers[move.variable].high.shape
            numerators.append(exact.spread(move.numerator(factor), shape))
        return numerators

    def amounts(self, group: Sequence[int], k: int) -> list[Floats]:
        """The amounts that move ``k``, a `Shift`, adds to the leaves of a group."""
        if not group:
            return []
        variable = moved_variable(self.programs[group[0]][k])
        others = [
            ExactLeaf({v: x for v, x in self.now[i].numbers.items() if v != variable}, []) for i in group
        ]
        dtypes, always_true = members(group, self.exact.dtypes), self.at.always_true

        def evaluate(at: PyTree, others: list[ExactLeaf], observations: Any, records: Any) -> list[Array]:
            result, programs = [], self.exact.program(*at)
            floats = _floats(always_true, others, dtypes)
            for i, leaf, observed, record in zip(group, floats, observations, records):
                result.append(self.amount(i, k, programs[i], leaf, observed, record))
            return result

        given = (members(group, self.observations), members(group, self.records))
        return self.exact.alike(always_true, evaluate, self.at[:3], others, *given)

    def amount(
        self, i: int, k: int, moves: Sequence[Move], leaf: Leaf, observed: Observed, record: Record
    ) -> Floats:
        """The amount that move ``k`` of leaf ``i``, a `Shift`, adds, given what it may read."""
        move = moves[k]
        assert isinstance(move, Shift)
        with jax.enable_x64(self.exact.x64):
            amount = jnp.asarray(move.amount(view_of(move, k, moves, leaf, observed, record)))
        return jnp.broadcast_to(amount, self.now[i].numbers[move.variable].high.shape)

    def amount_later(self, i: int, k: int) -> bundles.Later | None:
        """What move ``k`` adds to a large leaf, to be evaluated in the computation that adds it.

        Returns:
          None if the leaf is small or if the amount might then have other bits.
        """
        numbers, dtype = self.now[i].numbers, self.exact.dtypes[i]
        if numbers[PARAMS].high.size < bundles.SMALL or self.exact.everywhere:
            return None

        def evaluate(leaf: Leaf, *given: Any) -> Array:
            at, observed, record = given
            return self.amount(i, k, self.exact.program(*at)[i], leaf, observed, record)

        given = (self.at[:3], self.observations[i], self.records[i])
        moved = moved_variable(self.programs[i][k])
        others = {name: x for name, x in numbers.items() if name != moved}
        leaf = {name: jax.ShapeDtypeStruct(x.high.shape, dtype) for name, x in others.items()}
        closed = jax.make_jaxpr(evaluate)(leaf, *given)
        jaxpr, names = closed.jaxpr, sorted(leaf)
        equations, needed = live(jaxpr, jaxpr.outvars)
        read = [name for name, v in zip(names, jaxpr.invars) if v in needed]
        if not round_alike(equations) or any(numbers[v].low or numbers[v].parts for v in read):
            return None
        variables = [*jaxpr.invars[len(names) :], *jaxpr.constvars]
        used = {v: x for v, x in zip(variables, [*jax.tree.leaves(given), *closed.consts]) if v in needed}
        of_read = [v for name, v in zip(names, jaxpr.invars) if name in read]
        rest = part(jaxpr, [*of_read, *used], equations, jaxpr.outvars)

        def amount(digits: list[exact.Digits], down: list[Array], *used: Array) -> Array:
            floats = [exact.float_of(*each, dtype) for each in zip(digits, down)]
            return rest(*floats, *used)[0]

        found = [numbers[name] for name in read]
        down = bundles.scales(found, -1) if found else []
        return bundles.Later(amount, ([x[:2] for x in found], down, *used.values()))

    def held(self, variable: str, leaves: Sequence[int]) -> list[Fixed]:
        """A variable of some leaves, as it is now."""
        return [self.now[i].numbers[variable] for i in leaves]

    def hold(self, variable: str, leaves: Sequence[int], numbers: Sequence[Fixed]) -> None:
        """Set a variable of some leaves."""
        for i, number in zip(leaves, numbers):
            self.now[i].numbers[variable] = number

    def by_holding(self, group: Sequence[int], k: int) -> tuple[list[int], list[int]]:
        """The leaves of a group whose variable that move ``k`` moves is held whole, and the others."""
        variable = moved_variable(self.programs[group[0]][k])
        whole = [i for i in group if variable in self.exact.whole[i]]
        return whole, [i for i in group if i not in whole]

    def buffer(self, i: int, k: int) -> int:
        """The place of the buffer of move ``k`` among those of leaf ``i``."""
        return buffer_place(self.programs[i], k, self.exact.whole[i])

    def unscale(self, group: Sequence[int], k: int) -> None:
        """Undo a `Scale`, with the bits on its tape if it has one: ``v <- v / γ``."""
        variable = moved_variable(self.programs[group[0]][k])
        numerators = {i: _at_least_one(n) for i, n in zip(group, self.factors(group, k))}
        whole, others = self.by_holding(group, k)
        if whole:
            numbers, ns = self.held(variable, whole), members(whole, numerators)
            self.hold(variable, whole, bundles.unscale_whole(self.at.always_true, numbers, ns))
        if others:
            numbers = self.held(variable, others)
            places = [self.buffer(i, k) for i in others]
            buffers = [self.now[i].buffers[place] for i, place in zip(others, places)]
            read = [self.tapes[i][buffer_name(place)] for i, place in zip(others, places)]
            ns = members(others, numerators)
            states = bundles.unscale(self.at.always_true, numbers, buffers, read, ns)
            for i, place, (number, buffer) in zip(others, places, states):
                self.now[i].numbers[variable], self.now[i].buffers[place] = number, buffer

    def unshift(self, group: Sequence[int], k: int, dropped: Drops) -> None:
        """Undo a `Shift`: subtract the same amounts, and take back the bytes that were dropped for them."""
        variable = moved_variable(self.programs[group[0]][k])
        numbers = self.held(variable, group)
        tapes = [self.tapes[i].get(variable) for i in group]
        drops = [dropped[j].astype(jnp.int32) for j in range(len(group))]
        later = {i: x for i in group if (x := self.amount_later(i, k)) is not None}
        now = [i for i in group if i not in later]
        amounts: dict[int, Any] = {**later, **dict(zip(now, self.amounts(now, k)))}
        before = bundles.unshift(self.at.always_true, numbers, members(group, amounts), tapes, drops)
        self.hold(variable, group, before)


@dataclass
class _Forwards(_Step):
    """A step forwards: also what it writes to the tapes and what it checks; see `Stepped`."""

    so_far: tuple[Totals, Sequence[Array]] = field(kw_only=True)
    guarded: Flag = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.written = [dict(leaf) for leaf in self.tapes]
        self.drops: list[Drops] = []
        self.totals, self.faded = [dict(leaf) for leaf in self.so_far[0]], [*self.so_far[1]]
        self.looked: list[tuple[Flag, int, int]] = []

    def look(self, valid: Flag, trouble: Trouble, leaf: int) -> None:
        """Note a trouble, unless valid."""
        self.looked.append((valid, self.exact.troubles().index(trouble), leaf))

    def wrong(self) -> Int[Array, "2"]:
        """The first trouble."""
        if not self.looked:
            return jnp.zeros(2, jnp.int32)
        valid = jnp.stack([flag for flag, *_ in self.looked])
        codes = jnp.array([code for _, *code in self.looked], jnp.int32)
        return jnp.where(jnp.all(valid), 0, codes[jax.lax.argmax(~valid, 0, jnp.int32)])

    def remember(self, group: Sequence[int], k: int) -> None:
        """Put on record what move ``k`` remembers or keeps."""
        dtypes = members(group, self.exact.dtypes)
        given = (members(group, self.observations), members(group, self.records))
        with jax.enable_x64(self.exact.x64):
            floats = _floats(self.at.always_true, members(group, self.now), dtypes)
            programs = members(group, self.programs)

            def evaluate(floats: Any, observations: Any, before: Any, programs: Any = programs) -> Any:
                return remember(k, programs, floats, observations, before, dtypes)

            arguments = (floats, *given)
            if self.exact.everywhere:
                records = self.exact.alike(self.at.always_true, evaluate, *arguments)
            else:
                records = evaluate(*arguments)
        for i, record in zip(group, records):
            move = self.programs[i][k]
            assert isinstance(move, Remember | Total | Keep)
            self.records[i] = record
            self.look(jnp.all(jnp.isfinite(record[move.name])), BAD_LOSS, i)

    def keep(self, group: Sequence[int], k: int) -> None:
        """Write to the tape of a `Keep` which of its levels every element is."""
        for i in group:
            move = self.programs[i][k]
            assert isinstance(move, Keep)
            digit, known = _level(move.levels, self.records[i][move.name])
            self.look(known, BAD_LEVEL, i)
            place = self.buffer(i, k)
            name, buffers = buffer_name(place), self.now[i].buffers
            buffers[place], self.written[i][name] = exact.push(
                digit, len(move.levels), buffers[place], self.written[i][name]
            )

    def scale(self, group: Sequence[int], k: int) -> None:
        """Make a `Scale`, ``v <- γ v``; the bits that it destroys go to its tape, sooner or later."""
        variable = moved_variable(self.programs[group[0]][k])
        numerators = {}
        for i, n in zip(group, self.factors(group, k)):
            self.look(exact.admissible(n), ("factor", variable), i)
            numerators[i] = _at_least_one(n)
            if variable == PARAMS:
                self.faded[i] *= jnp.max(n, initial=0).astype(jnp.float64) / exact.BASE
        whole, others = self.by_holding(group, k)
        if whole:
            numbers, ns = self.held(variable, whole), members(whole, numerators)
            self.hold(variable, whole, bundles.scale_whole(self.at.always_true, numbers, ns))
        if others:
            numbers = self.held(variable, others)
            places = [self.buffer(i, k) for i in others]
            buffers = [self.now[i].buffers[place] for i, place in zip(others, places)]
            tapes = [self.written[i][buffer_name(place)] for i, place in zip(others, places)]
            ns = members(others, numerators)
            states = bundles.scale(self.at.always_true, numbers, buffers, tapes, ns)
            for i, place, (number, buffer, tape) in zip(others, places, states):
                self.now[i].numbers[variable], self.now[i].buffers[place] = number, buffer
                self.written[i][buffer_name(place)] = tape

    def shift(self, group: Sequence[int], k: int) -> None:
        """Make a `Shift`, ``v <- v + u``, and measure how coarse it was."""
        variable = moved_variable(self.programs[group[0]][k])
        amounts = self.amounts(group, k)
        numbers = self.held(variable, group)
        tapes = [self.written[i].get(variable) for i in group]
        moved = bundles.shift(self.at.always_true, numbers, amounts, tapes)
        numbers = [number for number, _, _ in moved]
        fades = variable == PARAMS and any(
            isinstance(move, Scale) and move.variable == PARAMS for move in self.programs[group[0]]
        )
        left = members(group, self.faded) if fades else None
        before = [self.totals[i][variable] for i in group]
        totals = bundles.coarseness_so_far(self.guarded, before, left, numbers, amounts, LARGEST_LOSS)
        for i, total in zip(group, totals):
            self.totals[i][variable] = total
            if fades:
                self.faded[i] = jnp.where(self.guarded, 1.0, self.faded[i])
        self.hold(variable, group, numbers)
        for i, (number, tape, _) in zip(group, moved):
            if tape is not None:
                self.written[i][variable] = tape
            self.look(exact.fits(number), ("range", variable), i)
        drops = [drop.astype(jnp.int8) for _, _, drop in moved]
        # In one array, each would vary over the mesh axes of all.
        self.drops.append(drops if any(map(axes_of, drops)) else jnp.stack(drops))

    def done(self) -> Stepped:
        """The result of the step.  What was kept is on the tape; only scalars are recorded."""
        kept = {move.name for moves in self.programs for move in moves if isinstance(move, Keep)}
        scalars = [{name: x for name, x in each.items() if name not in kept} for each in self.records]
        return Stepped(self.now, self.written, self.drops, scalars, self.totals, self.faded, self.wrong())


def _floats(
    always_true: Flag, leaves: Sequence[ExactLeaf], dtypes: Sequence[Any], *names: str
) -> list[Leaf]:
    """The floats, of these dtypes, that the integers of some leaves stand for."""
    result: list[Leaf] = [{} for _ in leaves]
    for v in names or leaves[0].numbers:
        numbers = [leaf.numbers[v] for leaf in leaves]
        for leaf, x in zip(result, bundles.floats(always_true, numbers, dtypes)):
            leaf[v] = x
    return result


def _at_least_one(n: Numerators) -> Numerators:
    """A numerator that can be divided by: a division by zero would trap, without a message."""
    return jnp.maximum(n, jnp.ones_like(n))


def _level(levels: Sequence[float], value: Float[Array, "*leaf"]) -> tuple[Int[Array, "*leaf"], Flag]:
    """The index of each element among the levels, and whether all elements are among them."""
    same = jnp.stack([value == level for level in levels])
    return jax.lax.argmax(same, 0, jnp.int32), jnp.all(jnp.any(same, axis=0))
