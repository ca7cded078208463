"""How a training run is differentiated.

An adjoint is one function from a run and its arrays to the end of the run, whose derivative it arranges.

=================  ===========================================  ============================
adjoint            memory beside the parameters                 time, in plain trainings
=================  ===========================================  ============================
`Reversible`       ``log2(1/γ)`` bits per parameter and step    about 3 to 4
`Stored`           everything, every step                       about 3
`Checkpointed`     ``2 √T`` copies of the state                 about 4
`Truncated(k)`     that of another adjoint over ``k`` steps     1, and that over ``k`` steps
`Forward`          one copy of the state per number             1 to 2 per number
=================  ===========================================  ============================
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from hypergrad.program import Leaf
from hypergrad.run import Constants, Inputs, Run, Solution


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


def in_segments(
    run: Run,
    segments: int,
    start: list[Leaf],
    constants: Constants,
    inputs: Inputs,
    gradient_of: Callable[..., Any] | None = None,
) -> Solution:
    """A run in so many segments, each of which is computed again on the way back; see `Run.step`."""
    length = -(-run.steps // max(1, min(segments, run.steps)))
    whole = run.steps // length

    @partial(jax.checkpoint, prevent_cse=False)
    def segment(leaves: list[Leaf], x: Inputs) -> Solution:
        return jax.lax.scan(lambda leaves, x: run.step(leaves, constants, x, gradient_of), leaves, x)

    cut = jax.tree.map(lambda x: x[: whole * length].reshape(whole, length, *x.shape[1:]), inputs)
    leaves, outputs = jax.lax.scan(segment, start, cut)
    outputs = jax.tree.map(lambda x: x.reshape(whole * length, *x.shape[2:]), outputs)
    if whole * length == run.steps:
        return leaves, outputs
    leaves, rest = segment(leaves, jax.tree.map(lambda x: x[whole * length :], inputs))
    return leaves, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, rest)


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
        return in_segments(run, segments, start, constants, inputs)


@dataclass(frozen=True)
class Truncated:
    """Only the last steps are differentiated; what went in before them counts as constant.

    The hypergradient is biased: it leaves out what the end of the run owes to earlier steps, and its
    derivatives in the start of the run and in the schedules of earlier steps are zero.

    Args:
      steps: how many of the last steps are differentiated, at least 1.
      adjoint: how, by default `Stored`.

    Source: Shaban, Cheng, Hatch, Boots, "Truncated back-propagation for bilevel optimization",
    AISTATS 2019.

    >>> import hypergrad as hg
    >>> hg.Truncated(20)
    Truncated(steps=20, adjoint=Stored())
    """

    steps: int
    adjoint: Adjoint = field(default_factory=Stored)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Truncated(steps={self.steps}): at least one step must be differentiated")

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `Adjoint`."""
        before = run.steps - self.steps
        if before <= 0:
            return self.adjoint(run, start, constants, inputs)
        early, late = (
            jax.tree.map(lambda x, part=part: x[part], inputs)
            for part in (slice(before), slice(before, None))
        )
        held = jax.lax.stop_gradient((start, constants, early))
        leaves, outputs = self.adjoint(replace(run, steps=before), *held)
        # The integers behind the end of the first part are the second's start.
        constants = constants._replace(exact=outputs.exact)
        leaves, rest = self.adjoint(
            replace(run, steps=self.steps), jax.lax.stop_gradient(leaves), constants, late
        )
        early, late = (each._replace(exact=None) for each in (jax.lax.stop_gradient(outputs), rest))
        outputs = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), early, late)
        return leaves, outputs._replace(exact=rest.exact)


@dataclass(frozen=True)
class Forward:
    """Forward mode: derivatives are carried along with the run, one copy of the state for each number.

    Memory does not grow with the steps.  For a handful of numbers, such as constant hyperparameters; also
    the only adjoint that `jax.jvp` and `jax.jacfwd` can differentiate.

    Args:
      limit: how many numbers may be differentiated before the call is refused.

    Raises:
      ValueError: if more are.

    Source: Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based hyperparameter
    optimization", ICML 2017, section 3.2.

    >>> import hypergrad as hg
    >>> hg.Forward()
    Forward(limit=64)
    """

    limit: int = 64

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `Adjoint`."""

        everything = (start, constants, inputs)
        arrays = jax.tree.leaves(everything)
        structure: Any = jax.tree.structure(everything)
        # A hyperparameter is given to many leaves: it is one number, to be carried once.
        once = {id(x): x for x in arrays}
        place = {key: k for k, key in enumerate(once)}
        places = [place[id(x)] for x in arrays]

        def plain(*distinct: Array) -> Solution:
            start, constants, inputs = structure.unflatten([distinct[k] for k in places])

            def step(leaves: list[Leaf], x: Inputs) -> Solution:
                return run.step(leaves, constants, x, run.plain_gradient)

            return jax.lax.scan(step, start, inputs)

        def rule(flat: Any, given: Any) -> Any:
            wanted = [k for k, x in enumerate(given) if not isinstance(x, SymbolicZero)]
            sizes = [flat[k].size for k in wanted]
            if sum(sizes) > self.limit:
                raise ValueError(
                    f"{run.call}: {sum(sizes)} numbers are differentiated, and Forward carries a copy of "
                    f"the state for each of at most limit={self.limit}; pass adjoint=Reversible() or "
                    "Checkpointed(), or a higher limit"
                )

            def end(values: list[Array]) -> Solution:
                replaced = dict(zip(wanted, values))
                return plain(*(replaced.get(k, x) for k, x in enumerate(flat)))

            point = [flat[k] for k in wanted]

            def column(k: Array) -> Any:
                """Derivative of the end in the ``k``-th number."""
                parts = np.split(jnp.arange(sum(sizes)) == k, np.cumsum(sizes)[:-1])
                units = [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, point)]
                return jax.jvp(end, (point,), (units,))

            solution, columns = jax.vmap(column, out_axes=(None, 0))(jnp.arange(sum(sizes)))
            direction = jnp.concatenate([jnp.ravel(given[k]) for k in wanted])
            return solution, jax.tree.map(lambda x: _combined(direction, x), columns)

        solve = jax.custom_jvp(plain)
        solve.defjvp(rule, symbolic_zeros=True)
        return solve(*once.values())


def _combined(weights: Array, columns: Array) -> Array | np.ndarray:
    """``Σ_k weights_k columns_k``; integers have no derivative."""
    if columns.dtype == jax.dtypes.float0:
        return np.zeros(columns.shape[1:], jax.dtypes.float0)
    return jnp.tensordot(weights, columns, 1, precision="highest").astype(columns.dtype)
