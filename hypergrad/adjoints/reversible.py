"""`Reversible`: the adjoint that plays the run backwards, bit for bit.

First derivatives are found this way.  Derivatives of these, of any order and in any nesting, are those of
the same run in floats (`in_floats`), in segments that are computed again.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from hypergrad import exact
from hypergrad._base.checks import is_whole
from hypergrad._base.compiler import always_true, compiled_once, hidden
from hypergrad._base.explicit import spec_of, with_automatic_axes
from hypergrad._base.notebook import short_traceback
from hypergrad._base.opaque import with_rule
from hypergrad._base.tracing import RECOVERED, Static, freeze, instantiate, perturbed, thaw
from hypergrad._base.trees import PyTree, scatter, split
from hypergrad.adjoints.failures import Broken, Failures, Health, unbroken
from hypergrad.adjoints.guards import Guards
from hypergrad.adjoints.integers import Exact
from hypergrad.adjoints.joint import Joint, joined
from hypergrad.adjoints.linearize import Segments, in_segments
from hypergrad.adjoints.playback import Backwards, Cotangents, Flags, Player, inexact_leaves
from hypergrad.adjoints.run import Constants, Inputs, Outputs, Run, Solution, closures_refused
from hypergrad.adjoints.segments import Recorded, Strategy, strategy_of
from hypergrad.adjoints.starts import Start, packed
from hypergrad.adjoints.tapes import Taped, complete, covers_run, held_whole, known_lengths, taped_of
from hypergrad.program import EXACT, PARAMS, Leaf


def in_floats(run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
    """The whole run in floats and in segments, differentiated by JAX alone: for higher derivatives."""
    return in_segments(run, Segments(math.isqrt(run.steps)), start, constants, inputs, run.plain_gradient)


def _by_variable(name: str, given: Any) -> dict[str, Any]:
    """A setting of `Reversible` as a dictionary by variable."""
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
    Before a hypergradient is returned, the recovered start is compared with the real one; if a single bit
    differs, a `ReversalError` is raised.

    With several segments only their starts are kept, as integers, and every segment is played forwards
    again before it is played backwards.  At the cost of one more training run, memory falls from ``T b``
    bits per parameter to ``S k + T b / S``, with ``b`` bits destroyed per step and ``k`` bits of state (64
    for the parameters and for every variable, 32 more for squares; 64 more where a factor differs from
    element to element).  It is least for ``S = √(T b / k)``.  The bits of the run are the same for every
    ``S``.

    Derivatives of the hypergradient (Hessian-vector products of the outer objective by ``jax.jvp`` of
    ``jax.grad``, ``jax.hessian``, a `train` within a trained loss) are right in every nesting.  They are
    those of the run in floats, with the memory of `Checkpointed` for ``jax.jvp``.

    Args:
      bits: room in the information buffers, in bits per element and step for every `Scale` of the
        optimizer, in (0, 7]; one number, or one by variable (``{"velocity": 0.2}``); by default 1.  The run
        needs the mean of ``log2(1 / factor)``.  Used only if the factors (momentum) are not known before
        the run, that is, under ``jit``; otherwise the need is computed.
      radix: by variable, such as ``{"params": 40}``: values must stay below ``2**(62 - radix)``, and the
        largest radix for which they do rounds least.  By default it is chosen for every array when it
        receives its first numbers, with room to outgrow them by ``2**32`` (squares by ``2**50``).
      segments: number of segments in which the run is played back, in ``[1, T]``.
      shard: an axis of the mesh in context (``jax.set_mesh``) over which integers, tapes and cotangents are
        divided, while every device holds all parameters, as in data-parallel training; arrays of fewer
        than 16384 elements stay whole.  By default they are placed as the compiler chooses.
      offload: keep the starts of segments in the memory of the host, from where each is fetched once.

    Raises:
      ReversalError: if the run fails or its start is not recovered; at the call or, under ``jit``, from the
        running program.
      ValueError: if an argument is invalid.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015, Algorithms 2 and 3.

    >>> import hypergrad as hg
    >>> hg.Reversible(segments=10)
    Reversible(bits=(), radix=(), segments=10)
    """

    bits: float | Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    radix: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    segments: int = 1
    shard: str | None = None
    offload: bool = False

    def __repr__(self) -> str:
        more = "" if self.shard is None else f", shard={self.shard!r}"
        more += ", offload=True" if self.offload else ""
        return f"Reversible(bits={self.bits!r}, radix={self.radix!r}, segments={self.segments!r}{more})"

    def __post_init__(self) -> None:
        bits = {"all": self.bits} if isinstance(self.bits, int | float) else _by_variable("bits", self.bits)
        if not all(isinstance(b, int | float | np.number) and 0 < b <= 7 for b in bits.values()):
            raise ValueError(f"Reversible(bits={self.bits}): bits per step must lie in (0, 7]")
        radix = _by_variable("radix", self.radix).values()
        if not all(is_whole(r, 0) for r in radix):
            raise ValueError(
                f"Reversible(radix={self.radix!r}): binary digits after the point are whole numbers from 0"
            )
        if not is_whole(self.segments):
            raise ValueError(
                f"Reversible(segments={self.segments!r}): there must be at least one segment, and a whole "
                "number of them"
            )
        # Hashable, as what is static must be.
        object.__setattr__(self, "radix", tuple(dict(self.radix).items()))
        if not isinstance(self.bits, int | float):
            object.__setattr__(self, "bits", tuple(dict(self.bits).items()))

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `hypergrad.Adjoint`."""
        mesh = jax.sharding.get_abstract_mesh()
        possible = [*mesh.auto_axes, *mesh.explicit_axes]
        if self.shard is not None and self.shard not in possible:
            raise ValueError(
                f"{run.call}: shard names the axis of a mesh in context, of which there are {possible}; "
                "compile and call within jax.set_mesh(mesh), and outside jax.shard_map, where every device "
                "has only its part already"
            )
        specs = partial(_specs, run, start)
        return with_automatic_axes(partial(self._solve, run), specs, start, constants, inputs)

    def _solve(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        one_way, (start, constants, inputs) = self._joined(run, start, constants, inputs)
        taped = one_way.beginning.taped
        self._check_names(run, taped)
        length = self.length(run.steps)
        lengths_of = partial(known_lengths, one_way.joint, taped, length)
        known = lengths_of(constants, inputs)

        @jax.custom_vjp
        def solve(start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
            return one_way.forward()(start, constants, inputs)[0]

        def forward(*arguments: Any) -> Any:
            flags = Flags(*perturbed(arguments[1:]))
            arguments = jax.tree.map(lambda x: x.value, arguments)
            # Values that are traced outside may be known here: `jax.grad` without `jit` unwraps them.
            now_known = known if complete(known) else lengths_of(*arguments[1:])
            lengths = self._allot(taped, now_known, length, covers_run(run, constants, length))
            told = [[need is not None for need in leaf] for leaf in now_known]
            playback = one_way._replace(flags=flags, lengths=lengths, known=told)
            solution, record = playback.forward()(*arguments)
            return solution, (arguments, record, freeze(flags), Static((lengths, told)))

        @short_traceback
        def backward(saved: Any, cotangents: Any) -> Any:
            arguments, record, frozen, static = saved
            flags, (lengths, told) = thaw(frozen), static.value
            playback = one_way._replace(flags=flags, lengths=lengths, known=told)
            end, outputs = cotangents
            given = Cotangents(instantiate(end), _present([outputs.loss]), _present(outputs.watched))
            with closures_refused(run.call):
                of_start, wanted = playback.backward()(arguments, record, given)
            fixed = sum(jax.tree.leaves(flags.constants))
            return of_start, scatter(flags.constants, wanted[:fixed]), scatter(flags.inputs, wanted[fixed:])

        solve.defvjp(forward, backward, symbolic_zeros=True)
        with closures_refused(run.call):
            return solve(start, constants, inputs)

    def _joined(
        self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs
    ) -> tuple["_Playback", tuple[list[Leaf], Constants, Inputs]]:
        """The playback of a run, without a way back, and its arrays by joint leaf."""
        for possible in (self.shard is None, False):
            joint = joined(run, start, constants, inputs, possible)
            arrays = joint.together(start, constants, inputs)
            taped = taped_of(joint, *arrays)
            playback = _Playback.of(self, joint, taped, [leaf[PARAMS].dtype for leaf in arrays[0]])
            # Integers of an earlier run may be those of leaves that were not joined.
            if playback.beginning.goes_on(arrays[0], constants.exact):
                return playback, arrays
        raise ValueError(
            f"{run.call}: state[{EXACT!r}] holds the integers of another run: its parameters, optimizer, "
            "model_state, or which factors (momentum, decay) differ from leaf to leaf or from element to "
            "element are not as here. Leave them out to go on from the floats: "
            f"{{k: x for k, x in state.items() if k != {EXACT!r}}}"
        )

    def _check_names(self, run: Run, taped: Sequence[Sequence[Taped]]) -> None:
        """Refuse settings for variables that do not exist."""
        variables = [PARAMS, *run.program.variables]
        kept = [each.variable for leaf in taped for each in leaf if each.levels]
        bits: Mapping[str, float] = {} if isinstance(self.bits, int | float) else dict(self.bits)
        for name, given, possible in (
            ("radix", [*dict(self.radix)], variables),
            ("bits", [*bits], [*variables, *dict.fromkeys(kept)]),
        ):
            unknown = sorted(set(given) - set(possible))
            if unknown:
                raise ValueError(f"{run.call}: {name} has {unknown}; the variables are {possible}")

    def length(self, steps: int) -> int:
        """Steps of a segment in a run with this many steps; the last segment may be shorter."""
        return -(-steps // min(self.segments, steps))

    def _allot(
        self, taped: Sequence[Sequence[Taped]], known: list[list[int | None]], length: int, whole: bool
    ) -> list[list[int]]:
        """Length of every tape: the need if it is known, else what `bits` reserves.

        Args:
          taped: what is taped of every leaf.
          known: the needs.
          length: steps of a segment.
          whole: whether a segment is a whole run.
        """

        def room(each: Taped) -> int:
            if each.buffer is None:
                bits = each.scales * self.bits_of(each.variable) * length
                return exact.outgrown(whole) + math.ceil(bits / 8)
            bits = exact.MARGIN + self.bits_of(each.variable) * length
            rows = max(0, math.ceil((bits - exact.DIGITS) / 8)) + 1
            return rows * math.prod(each.factor_shape)

        return [
            [room(each) if need is None else need for need, each in zip(*leaf)]
            for leaf in zip(known, taped)
        ]

    def tape_bytes(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> int:
        """Bytes of tape that are reserved under ``jit``, when no factor is known."""
        playback, _ = self._joined(run, start, constants, inputs)
        taped = playback.beginning.taped
        length = self.length(run.steps)
        unknown: list[list[int | None]] = [[None] * len(leaf) for leaf in taped]
        lengths = self._allot(taped, unknown, length, covers_run(run, constants, length))
        return sum(
            (n + (each.buffer is not None)) * math.prod(each.shape if each.factor_shape == () else ())
            for each, n in zip(itertools.chain(*taped), itertools.chain(*lengths))
        )

    def state_bytes(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> int:
        """Bytes of the integers and buffers between two steps."""
        playback, arrays = self._joined(run, start, constants, inputs)
        with jax.enable_x64(True):
            leaves, _ = jax.eval_shape(lambda *x: playback.player(*x).begin(), *arrays)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaves))

    def bits_of(self, variable: str) -> float:
        """Room that is reserved for a variable, in bits per element and step."""
        return self.bits if isinstance(self.bits, int | float) else dict(self.bits).get(variable, 1.0)


def _specs(run: Run, start: list[Leaf], solution: Solution) -> Solution:
    """How the end of a run is sharded, if that is in its type: like the parameters."""
    end, outputs = solution

    def like(leaf: Leaf, tree: PyTree) -> PyTree:
        kind = jax.typeof(leaf[PARAMS])

        def spec(x: Array) -> PartitionSpec:
            more = x.ndim - len(kind.shape)
            alike = more >= 0 and x.shape[more:] == kind.shape
            return PartitionSpec(*[None] * more, *spec_of(kind)) if alike else PartitionSpec()

        return jax.tree.map(spec, tree)

    watched: Any = jax.tree.structure(outputs.watched)
    of_watched = [] if run.watch is None else [v.aval for v in run.watch.jaxpr.outvars]
    by_step = watched.unflatten([PartitionSpec(None, *spec_of(kind)) for kind in of_watched])
    exact_like = None if outputs.exact is None else [*map(like, start, outputs.exact)]
    return [*map(like, start, end)], Outputs(PartitionSpec(), by_step, exact_like)


def _present(cotangents: PyTree) -> list[Array] | None:
    """Cotangents of the arrays that have derivatives; None if all are symbolically zero."""
    leaves = inexact_leaves(cotangents)
    if all(isinstance(x, SymbolicZero) for x in leaves):
        return None
    return instantiate(leaves)


def _zero_tangents(tree: PyTree) -> PyTree:
    """Zero tangents for a tree of arrays of any dtype."""

    def zero(x: Array) -> Any:
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.zeros_like(x) if inexact else np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


class _Record(NamedTuple):
    """What a run forwards leaves for the way back."""

    recorded: Recorded
    health: Health


class _Playback(NamedTuple):
    """The static part of playing one run, forwards and backwards.

    Attributes:
      joint: the run to be played, and its joint leaves, which are meant by "leaf" from here on.
      integers: its exact arithmetic.
      beginning: how its integers begin.
      strategy: plays it in one segment or in many.
      settings: as given by the user.
      flags: what will be differentiated on the way back; None if there will be no way back.
      lengths: of the tapes, in rows or bytes; None if there will be no way back.
      known: whether these are what the factors cost, and not what was reserved.
    """

    joint: Joint
    integers: Exact
    beginning: Start
    strategy: Strategy
    settings: Reversible
    flags: Flags | None = None
    lengths: list[list[int]] | None = None
    known: list[list[bool]] | None = None

    @property
    def run(self) -> Run:
        """The run to be played."""
        return self.joint.run

    @staticmethod
    def of(
        settings: Reversible, joint: Joint, taped: Sequence[Sequence[Taped]], dtypes: list[Any]
    ) -> "_Playback":
        """The playback, without a way back, of a run whose leaves have these dtypes."""
        run = joint.run
        variables = [PARAMS, *run.program.variables]
        whole = [held_whole(leaf) for leaf in taped]
        integers = Exact(joint.moves, variables, dtypes, whole, run.x64, run.shards is not None)
        owners = [joint.leaves_of_rows(k) if joint.is_joined(k) else None for k in range(len(taped))]
        beginning = Start(run.program, dict(settings.radix), taped, owners)
        return _Playback(
            joint,
            integers,
            beginning,
            strategy_of(run.steps, settings.length(run.steps), settings.offload),
            settings,
        )

    def player(self, start: list[Leaf], constants: Constants, inputs: Inputs) -> Player:
        """The run on these arrays."""
        flags = self.flags
        if flags is None:
            flags = Flags(*jax.tree.map(lambda _: False, (constants, inputs)))
        arrays = (start, constants, inputs)
        if self.run.shards is not None:  # programs for one device and for many are optimized differently
            arrays = hidden(arrays)
        static = (self.joint, self.integers, self.beginning, flags, self.lengths)
        known_later = always_true(*arrays)
        return Player(*static, *arrays, known_later, self.joint.starts(known_later), self.settings.shard)

    def refuse(self, result: PyTree, health: Health) -> PyTree:
        """Pass the result on, or raise a `ReversalError` if the run failed."""
        failures = Failures(
            self.run.call,
            self.joint.names,
            self.run.names,
            self.beginning.growth_of,
            self.integers.troubles(),
            self.beginning.taped,
            self.lengths,
            self.known,
            self.beginning.radix,
            (self.settings.bits_of, self.settings.length(self.run.steps)),
        )
        return failures.refuse(result, health)

    # ---- forwards

    def forward(self) -> Callable[..., tuple[Solution, _Record]]:
        """The run forwards, whose derivative in forward mode is that of the run in floats."""

        def rule(arguments: Any, tangents: Any) -> Any:
            solution, record = played(*arguments)
            _, (end, outputs) = jax.jvp(self._in_floats, arguments, tangents)
            outputs = outputs._replace(exact=_zero_tangents(solution[1].exact))
            return (solution, record), ((end, outputs), _zero_tangents(record))

        played = with_rule(self._forward, rule)
        return played

    def _in_floats(self, *arguments: Any) -> Solution:
        return in_floats(self.run, *self.joint.apart(*arguments))

    def _forward(self, *arguments: Any) -> tuple[Solution, _Record]:
        with jax.enable_x64(True):
            # Compiled as one program even if the caller does not use jit.
            solution, record = compiled_once(self._forward_unchecked, *arguments)
        return self.refuse(solution, record.health), record

    def _forward_unchecked(self, *arguments: Any) -> tuple[Solution, _Record]:
        """The run forwards; failures are only noted."""
        player = self.player(*arguments)
        with jax.enable_x64(True):
            recorded, outputs, needed = self.strategy.forwards(player)
            now = recorded.last.now
            floats = self.integers.floats(player.always_true, now.leaves)
            end = self.joint.split_leaves(floats, player.starts)
            state = packed(now.leaves, now.guards)
        health = Health(now.failed, needed, jnp.asarray(True), unbroken(jnp.asarray(True)))
        last = recorded.last._replace(now=now._replace(guards=Guards.of([])), outputs=Outputs(None, None))
        return (end, outputs._replace(exact=state)), _Record(recorded._replace(last=last), health)

    # ---- backwards

    def backward(self) -> Callable[..., tuple[list[Leaf], list[Array]]]:
        """The run backwards, whose derivative in forward mode is that of the run in floats backwards."""

        def of_floats(arguments: Any, cotangents: Cotangents) -> Any:
            start, *arrays = arguments
            assert self.flags is not None
            wanted, merge = split(tuple(self.flags), tuple(arrays))

            def solution(start: list[Leaf], wanted: list[Array]) -> Cotangents:
                end, outputs = self._in_floats(start, *merge(wanted))
                loss = None if cotangents.loss is None else [outputs.loss]
                watched = None if cotangents.watched is None else inexact_leaves(outputs.watched)
                return Cotangents(end, loss, watched)

            _, pull = jax.vjp(solution, start, wanted)
            return pull(cotangents)

        def rule(primals: Any, tangents: Any) -> Any:
            arguments, _, cotangents = primals
            result = pulled(*primals)
            _, change = jax.jvp(of_floats, (arguments, cotangents), (tangents[0], tangents[2]))
            return result, change

        pulled = with_rule(self._backward, rule)
        return pulled

    def _backward(self, *given: Any) -> tuple[list[Leaf], list[Array]]:
        with jax.enable_x64(True):
            result, health = compiled_once(self._backward_unchecked, *given)
        # Failures of the run forwards are raised here too: under jit the compiler drops a check if only an
        # unused value depends on it, and without jit nobody may have looked at the result.
        return self.refuse(result, health)

    def _backward_unchecked(
        self, arguments: Any, record: _Record, cotangents: Cotangents
    ) -> tuple[tuple[list[Leaf], list[Array]], Health]:
        """Cotangents of the start and of the wanted constants and inputs; failures are only noted."""
        player = self.player(*arguments)
        if self.run.shards is not None:
            record, cotangents = hidden((record, cotangents))
        flags, constants = player.flags.constants, player.constants
        fixed, _ = split(
            (flags.loss, flags.hypers, flags.watch), (constants.loss, constants.hypers, constants.watch)
        )
        behind = self.joint.join_leaves(cotangents.end)
        given = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(behind)]))
        with jax.enable_x64(True):
            end = record.recorded.last.now.leaves
            now = Backwards(end, behind, [jnp.zeros_like(x) for x in fixed], unbroken(given))
            now, steps, recovered = self.strategy.backwards(player, record.recorded, now, cotangents)
        recovered = checkpoint_name(recovered, RECOVERED)
        of_batch, of_scheduled = steps
        found = [*now.sums, *of_batch, *of_scheduled]
        numbers = jnp.all(jnp.stack([jnp.asarray(True), *(jnp.all(jnp.isfinite(x)) for x in found)]))
        in_result = jnp.array([Broken.IN_RESULT, 0], jnp.int32)
        broken = jnp.where((now.broken[0] == Broken.NOWHERE) & ~numbers, in_result, now.broken)
        return (now.cotangents, found), record.health._replace(recovered=recovered, broken=broken)
