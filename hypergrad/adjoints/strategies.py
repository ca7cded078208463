"""How a training run is differentiated.

An adjoint is a function from a run and its arrays to the end of the run, whose derivative it defines.

=================  ===========================================  ============================
adjoint            memory in addition to the parameters         time, in plain training runs
=================  ===========================================  ============================
`Reversible`       ``log2(1/γ)`` bits per parameter and step    about 3 to 4
`Stored`           everything, every step                       about 3
`Checkpointed`     ``2 √T`` copies of the state                 about 4
`Truncated(k)`     that of another adjoint over ``k`` steps     1, plus that of ``k`` steps
`Forward`          one copy of the state per number             1 to 2 per number
=================  ===========================================  ============================
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from hypergrad._base.checks import check_adjoint, is_whole
from hypergrad._base.trees import of_real_parts, real_parts, tensordot
from hypergrad._base.varying import axes_of, collectives, tracked
from hypergrad.adjoints.linearize import Segments, gradient_of, in_segments
from hypergrad.adjoints.run import Constants, Inputs, Run, Solution, closures_refused
from hypergrad.program import Leaf


class Adjoint(Protocol):
    """A differentiation strategy: a function from the arrays of a run to its end."""

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """Run to the end.

        Args:
          run: the static part of the run.
          start: for every leaf of the parameters, its float variables by name.
          constants: what is the same at every step.
          inputs: what differs from step to step.

        Returns:
          The end, like the start; and the outputs of all steps.
        """


@dataclass(frozen=True)
class Stored:
    """Reverse mode through the loop, with everything stored: the reference for the other adjoints.

    Every step adds to memory everything that it computes.

    >>> import hypergrad as hg
    >>> hg.Stored()
    Stored()
    """

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `Adjoint`."""
        gradient = gradient_of(run)
        return jax.lax.scan(lambda leaves, x: run.step(leaves, constants, x, gradient), start, inputs)


@dataclass(frozen=True)
class Checkpointed:
    """Reverse mode through segments that are run again on the way back (rematerialization).

    Args:
      segments: number of segments, whose starts are kept, in ``[1, T]``; None for ``√T``, which takes the
        least memory.
      offload: keep the starts of segments in the memory of the host, from where each is fetched once.

    Raises:
      ValueError: if segments is not a whole number of at least 1.

    Source: Griewank and Walther, "Evaluating derivatives", 2008, chapter 12 (one level).

    >>> import hypergrad as hg
    >>> hg.Checkpointed(segments=10)
    Checkpointed(segments=10)
    """

    segments: int | None = None
    offload: bool = False

    def __repr__(self) -> str:
        return f"Checkpointed(segments={self.segments!r}{', offload=True' if self.offload else ''})"

    def __post_init__(self) -> None:
        if self.segments is not None and not is_whole(self.segments):
            raise ValueError(
                f"Checkpointed(segments={self.segments!r}): there must be at least one segment, and a "
                "whole number of them, or None for √T"
            )

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `Adjoint`."""
        segments = math.isqrt(run.steps) if self.segments is None else self.segments
        return in_segments(run, Segments(segments, self.offload), start, constants, inputs)


@dataclass(frozen=True)
class Truncated:
    """Only the last steps are differentiated; everything before them counts as constant.

    The hypergradient is biased: it leaves out what the end of the run owes to earlier steps, and it is zero
    in the start of the run and in the schedules of earlier steps.

    Args:
      steps: how many of the last steps are differentiated, at least 1.
      adjoint: how they are differentiated, by default `Stored`.

    Raises:
      ValueError: if steps is not a whole number of at least 1.

    Source: Shaban, Cheng, Hatch, Boots, "Truncated back-propagation for bilevel optimization",
    AISTATS 2019.

    >>> import hypergrad as hg
    >>> hg.Truncated(20)
    Truncated(steps=20, adjoint=Stored())
    """

    steps: int
    adjoint: Adjoint = field(default_factory=Stored)

    def __post_init__(self) -> None:
        if not is_whole(self.steps):
            raise ValueError(
                f"Truncated(steps={self.steps!r}): at least one step must be differentiated, and a whole "
                "number of them"
            )
        check_adjoint(f"Truncated(steps={self.steps})", self.adjoint)

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
        # The integers behind the end of the first part are the start of the second.
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

    Memory does not grow with the number of steps.  Use it for a handful of numbers, such as constant
    hyperparameters.  It is also the only adjoint that `jax.jvp` and `jax.jacfwd` can differentiate.

    Args:
      limit: most numbers that may be differentiated, at least 1.

    Raises:
      ValueError: if limit is invalid, or more numbers are differentiated.
      TypeError: if the loss contains a ``jax.custom_vjp``, which JAX cannot differentiate forwards.

    Source: Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based hyperparameter
    optimization", ICML 2017, section 3.2.

    >>> import hypergrad as hg
    >>> hg.Forward()
    Forward(limit=64)
    """

    limit: int = 64

    def __post_init__(self) -> None:
        if not is_whole(self.limit):
            raise ValueError(f"Forward(limit={self.limit!r}): limit must be a whole number of at least one")

    def __call__(self, run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        """See `Adjoint`."""

        everything = (start, constants, inputs)
        arrays = jax.tree.leaves(everything)
        structure: Any = jax.tree.structure(everything)
        # A hyperparameter of many leaves is one number, to be carried once.
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
            # A complex number counts as two: the end is not a holomorphic function of it.
            point = [part for k in wanted for part in real_parts(flat[k])]
            sizes = [part.size for part in point]
            if sum(sizes) > self.limit:
                raise ValueError(
                    f"{run.call}: {sum(sizes)} numbers are differentiated, and Forward carries a copy of "
                    f"the state for each of at most limit={self.limit}; pass adjoint=Reversible() or "
                    "Checkpointed(), or a higher limit"
                )

            if axes_of(point) or (collectives(run.loss.jaxpr) and not tracked()):
                raise ValueError(
                    f"{run.call}: numbers are differentiated that may differ between the devices of a mesh "
                    "inside jax.shard_map, and Forward carries one derivative for all of them; pass "
                    "adjoint=Reversible() or Checkpointed()"
                )

            def end(values: list[Array]) -> Solution:
                parts = iter(values)
                replaced = {k: of_real_parts([next(parts) for _ in real_parts(flat[k])]) for k in wanted}
                return plain(*(replaced.get(k, x) for k, x in enumerate(flat)))

            def column(k: Array) -> Any:
                """Derivative of the end in number ``k``."""
                parts = np.split(jnp.arange(sum(sizes)) == k, np.cumsum(sizes)[:-1])
                units = [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, point)]
                return jax.jvp(end, (point,), (units,))

            try:
                with closures_refused(run.call):
                    solution, columns = jax.vmap(column, out_axes=(None, 0))(jnp.arange(sum(sizes)))
            except TypeError as error:
                if "forward-mode" not in str(error):
                    raise
                raise TypeError(
                    f"{run.call}: Forward needs forward derivatives, and the loss, or what is watched, "
                    "holds a jax.custom_vjp, whose rule JAX cannot differentiate forwards; pass "
                    "adjoint=Reversible() or Checkpointed(), or give it a jax.custom_jvp"
                ) from error
            direction = jnp.concatenate([jnp.ravel(part) for k in wanted for part in real_parts(given[k])])
            return solution, jax.tree.map(lambda x: _combined(direction, x), columns)

        solve = jax.custom_jvp(plain)
        solve.defjvp(rule, symbolic_zeros=True)
        with closures_refused(run.call):
            return solve(*once.values())


def _combined(weights: Array, columns: Array) -> Array | np.ndarray:
    """``Σ_k weights_k columns_k``; integers have no derivative."""
    if columns.dtype == jax.dtypes.float0:
        return np.zeros(columns.shape[1:], jax.dtypes.float0)
    return tensordot(weights, columns, 1).astype(columns.dtype)
