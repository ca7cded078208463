"""How a training run is differentiated.

An adjoint is one function from a run and its arrays to the end of the run, whose derivative it arranges.

================  ===========================================  ============================
adjoint           memory beside the parameters                 time, in plain trainings
================  ===========================================  ============================
`Reversible`      ``log2(1/γ)`` bits per parameter and step    about 3 to 4
`Stored`          everything, every step                       about 3
`Checkpointed`    ``2 √T`` copies of the state                 about 4
================  ===========================================  ============================
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp

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
        length = -(-run.steps // max(1, min(segments, run.steps)))
        whole = run.steps // length

        @partial(jax.checkpoint, prevent_cse=False)
        def segment(leaves: list[Leaf], x: Inputs) -> Solution:
            return jax.lax.scan(lambda leaves, x: run.step(leaves, constants, x), leaves, x)

        cut = jax.tree.map(lambda x: x[: whole * length].reshape(whole, length, *x.shape[1:]), inputs)
        leaves, outputs = jax.lax.scan(segment, start, cut)
        outputs = jax.tree.map(lambda x: x.reshape(whole * length, *x.shape[2:]), outputs)
        if whole * length == run.steps:
            return leaves, outputs
        leaves, rest = segment(leaves, jax.tree.map(lambda x: x[whole * length :], inputs))
        return leaves, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, rest)
