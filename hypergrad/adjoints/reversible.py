"""`Reversible`: the adjoint that plays the run backwards, bit for bit."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from hypergrad import exact
from hypergrad._base.opaque import with_rule
from hypergrad._base.tracing import Static, freeze, instantiate, perturbed, thaw
from hypergrad._base.trees import PyTree, scatter, split
from hypergrad.adjoints.integers import Exact
from hypergrad.adjoints.playback import Cotangents, Flags, Playback, Recorded, inexact_leaves
from hypergrad.adjoints.run import Constants, Inputs, Run, Solution, closures_refused, in_segments
from hypergrad.adjoints.tapes import Taped, complete, known_lengths, taped_of
from hypergrad.program import PARAMS, Leaf, Optimizer


def twin(run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
    """The whole run in floats, for derivatives of derivatives: by JAX alone, in segments."""
    return in_segments(run, math.isqrt(run.steps), start, constants, inputs, run.plain_gradient)


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
    parameter to ``S k + T b / S``, with ``b`` bits destroyed per step and ``k`` bits of state (96 for the
    parameters and for every variable, 32 more for squares and for every `Scale`).  It is least for
    ``S = √(T b / k)``.  The bits of the run are the same for every ``S``.

    Derivatives of the hypergradient (Hessian-vector products of the outer objective by ``jax.jvp`` of
    ``jax.grad``, ``jax.hessian``, a `train` within a trained loss) are right in every nesting.  They are
    those of the run in floats, with the memory of `Checkpointed` for ``jax.jvp``.

    Args:
      bits: room of the information buffers, in bits per element and step for every `Scale` of the
        optimizer, in (0, 7]; one number, or by variable (``{"velocity": 0.2}``).  The mean of
        ``log2(1 / factor)`` over the run is needed.  It counts only where the factors (momentum) are not
        known before the run, that is under ``jit``; else the need is computed.  By default 1.
      radix: binary digits before the low words, by variable (``{"params": 40}``): values must stay below
        ``2**(62 - radix)``, and the largest radix for which they do rounds least.  By default chosen for
        every array, when the first numbers come into it, with room to outgrow them by ``2**32`` (squares
        ``2**50``).
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
        """See `hypergrad.Adjoint`."""
        taped = taped_of(run, start, constants, inputs)
        assert isinstance(run.optimizer, Optimizer)
        variables = [PARAMS, *run.optimizer.variables]
        kept = [each.variable for leaf in taped for each in leaf if each.levels]
        bits: Mapping[str, float] = {} if isinstance(self.bits, int | float) else dict(self.bits)
        for name, given, possible in (
            ("radix", [*dict(self.radix)], variables),
            ("bits", [*bits], [*variables, *dict.fromkeys(kept)]),
        ):
            unknown = sorted(set(given) - set(possible))
            if unknown:
                raise ValueError(f"{run.call}: {name} has {unknown}; the variables are {possible}")
        integers = Exact(run.moves, variables, [leaf[PARAMS].dtype for leaf in start], run.x64)
        length = self.length(run.steps)
        known = known_lengths(run, taped, start, constants, inputs, length)
        nothing = Flags(*jax.tree.map(lambda _: False, (constants, inputs)))

        @jax.custom_vjp
        def solve(start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
            playback = Playback(self, run, integers, taped, nothing, None)
            return _forward(playback)(start, constants, inputs)[0]

        def forward(*arguments: Any) -> Any:
            flags = Flags(*perturbed(arguments[1:]))
            arguments = jax.tree.map(lambda x: x.value, arguments)
            # Values that are traced outside may be known here: `jax.grad` without `jit` unwraps them.
            now_known = known
            if not complete(known):
                start, constants, inputs = arguments
                now_known = known_lengths(run, taped, start, constants, inputs, length)
            lengths = self._allot(taped, now_known, length)
            solution, record = _forward(Playback(self, run, integers, taped, flags, lengths))(*arguments)
            return solution, (arguments, record, freeze(flags), Static(lengths))

        def backward(saved: Any, cotangents: Any) -> Any:
            arguments, record, frozen, lengths = saved
            flags = thaw(frozen)
            playback = Playback(self, run, integers, taped, flags, lengths.value)
            end, outputs = cotangents
            given = Cotangents(instantiate(end), _present([outputs.loss]), _present(outputs.watched))
            with closures_refused(run.call):
                leaf_cotangents, wanted = _backward(playback)(arguments, record, given)
            fixed = sum(jax.tree.leaves(flags.constants))
            return (
                leaf_cotangents,
                scatter(flags.constants, wanted[:fixed]),
                scatter(flags.inputs, wanted[fixed:]),
            )

        solve.defvjp(forward, backward, symbolic_zeros=True)
        with closures_refused(run.call):
            return solve(start, constants, inputs)

    def length(self, steps: int) -> int:
        """Steps of a segment, of a run of so many; the last may be shorter."""
        return -(-steps // min(self.segments, steps))

    def _allot(
        self, taped: list[list[Taped]], known: list[list[int | None]], length: int
    ) -> list[list[int]]:
        """Length of every tape: what is needed where that is known, else from `bits`."""

        def room(each: Taped) -> int:
            bits = exact.MARGIN + self.bits_of(each.variable) * length
            rows = max(0, math.ceil((bits - exact.DIGITS) / 8)) + 1
            return rows * math.prod(each.factor_shape)

        return [
            [room(each) if need is None else need for need, each in zip(*leaf)]
            for leaf in zip(known, taped)
        ]

    def tape_bytes(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> int:
        """Bytes of tape that are reserved under ``jit`` when no factor is known."""
        taped = taped_of(run, start, constants, inputs)
        length = self.length(run.steps)
        lengths = self._allot(taped, [[None] * len(leaf) for leaf in taped], length)
        return sum(
            (n + 1) * math.prod(each.shape if each.factor_shape == () else ())
            for each, n in zip(itertools.chain(*taped), itertools.chain(*lengths))
        )

    def bits_of(self, variable: str) -> float:
        """Room that is reserved for a variable, in bits per element and step."""
        return self.bits if isinstance(self.bits, int | float) else dict(self.bits).get(variable, 1.0)


def _present(cotangents: PyTree) -> list[Array] | None:
    """Cotangents of what has derivatives; None where all are zero by structure."""
    leaves = inexact_leaves(cotangents)
    if all(isinstance(x, SymbolicZero) for x in leaves):
        return None
    return instantiate(leaves)


def _zero_tangents(tree: PyTree) -> PyTree:
    """Of any arrays."""

    def zero(x: Array) -> Any:
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.zeros_like(x) if inexact else np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def _forward(playback: Playback) -> Callable[..., tuple[Solution, Recorded]]:
    """`Playback.forward`, whose derivative in forward mode is that of the float twin."""

    def rule(arguments: Any, tangents: Any) -> Any:
        solution, record = played(*arguments)
        _, (end, outputs) = jax.jvp(lambda *x: twin(playback.run, *x), arguments, tangents)
        outputs = outputs._replace(exact=_zero_tangents(solution[1].exact))
        return (solution, record), ((end, outputs), _zero_tangents(record))

    played = with_rule(playback.forward, rule)
    return played


def _backward(playback: Playback) -> Callable[..., tuple[list[Leaf], list[Array]]]:
    """`Playback.backward`, whose derivative in forward mode is that of the float twin played backwards."""

    def backward(arguments: Any, record: Recorded, cotangents: Cotangents) -> Any:
        start, constants, inputs = arguments
        return playback.backward(start, constants, inputs, record, cotangents)

    def of_twin(arguments: Any, cotangents: Cotangents) -> Any:
        start, *arrays = arguments
        wanted, merge = split(tuple(playback.flags), tuple(arrays))

        def solution(start: list[Leaf], wanted: list[Array]) -> Cotangents:
            end, outputs = twin(playback.run, start, *merge(wanted))
            loss = None if cotangents.loss is None else [outputs.loss]
            return Cotangents(
                end, loss, None if cotangents.watched is None else inexact_leaves(outputs.watched)
            )

        _, pull = jax.vjp(solution, start, wanted)
        return pull(cotangents)

    def rule(primals: Any, tangents: Any) -> Any:
        arguments, _, cotangents = primals
        result = pulled(*primals)
        _, change = jax.jvp(of_twin, (arguments, cotangents), (tangents[0], tangents[2]))
        return result, change

    pulled = with_rule(backward, rule)
    return pulled
