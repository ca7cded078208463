"""Which adjoint to use for a run, under a memory budget.

The memory of one step is measured on short compiled runs; its growth with the steps is computed.

=======  ==========================================================================================
symbol   meaning
=======  ==========================================================================================
``T``    steps
``S``    segments of ``L = T / S`` steps
``w``    bytes that a short run takes, whatever its length
``m``    bytes that reverse mode keeps of one step, what the gradient computes included
``s``    bytes of the state in floats
``k``    bytes of the state in integers, with its buffers; see `hypergrad.Reversible.state_bytes`
``b``    bytes that one step sends to the information buffers
``f``    thousands of operations that a gradient takes
=======  ==========================================================================================

===========================  ==================  ==================  ==================================
adjoint                      memory              time, in trainings  what for
===========================  ==================  ==================  ==================================
``Stored()``                 ``w + T m``         2.6 + 0.024 m / f   forwards, products
``Reversible()``             ``w + T b``         3.75 + 0.045 s / f  that and the integer arithmetic
``Checkpointed(S)``          ``w + S s + L m``   3.65 + 0.025 s / f  forwards twice, products
``Reversible(segments=S)``   ``w + S k + L b``   4.9 + 0.06 s / f    forwards twice, backwards
===========================  ==================  ==================  ==================================

So a hypergradient takes longer, in plain trainings, where there is more to keep beside what there is to
compute: with small batches, and with Adam.  The constants are fitted to perceptrons, a transformer and a
ConvNet on an AMD EPYC, all of whose times are within a quarter of these (``benchmarks/time.py``); beyond
the densities measured there, the time stays what it is at their end.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.checks import checked_steps
from hypergrad._base.errors import ReversalError
from hypergrad._base.notebook import short_traceback
from hypergrad._base.trees import PyTree
from hypergrad._base.work import operations
from hypergrad.adjoints.joint import joined
from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.run import Constants, Inputs, Outputs, Run, Solution
from hypergrad.adjoints.strategies import Adjoint, Checkpointed, Stored
from hypergrad.adjoints.tapes import destroyed_bits
from hypergrad.program import AnyOptimizer, Leaf
from hypergrad.training.arguments import checked_call
from hypergrad.training.inner_loop import train
from hypergrad.training.problem import Problem, refuse_beside


class Cost(NamedTuple):
    """The time of an adjoint, in plain trainings: ``fixed + by_density`` times bytes per 1000 operations.

    Attributes:
      fixed: of what takes as long as gradients do.
      by_density: of what takes as long as memory is read and written.
      densest: the most bytes per 1000 operations that were measured.
    """

    fixed: float
    by_density: float
    densest: float


COSTS = {
    "Stored": Cost(2.6, 0.024, 190.0),
    "Reversible": Cost(3.75, 0.045, 45.0),
    "Checkpointed": Cost(3.65, 0.025, 45.0),
    "Reversible in segments": Cost(4.9, 0.06, 45.0),
}
SHORT = 4  # steps of the runs that are measured
SPARE = 1.1  # room in the buffers for factors that change while they are learned


class Estimate(NamedTuple):
    """The expected memory and time of a hypergradient.

    Attributes:
      adjoint: how it is differentiated.
      memory: bytes in addition to arguments and results.
      time: in units of one plain training run.
    """

    adjoint: Adjoint
    memory: int
    time: float


class Plan(NamedTuple):
    """The adjoints for a run, and which of them to use.

    Attributes:
      adjoint: the fastest that fits.
      estimates: those of all adjoints, fastest first; see `fastest` for another budget.
      budget: bytes.
    """

    adjoint: Adjoint
    estimates: tuple[Estimate, ...]
    budget: int

    def __str__(self) -> str:
        lines = [f"{'MiB':>10}  {'time':>5}  adjoint          (budget {self.budget / 2**20:.1f} MiB)"]
        for adjoint, memory, time in self.estimates:
            mark = " <-" if adjoint == self.adjoint else ""
            lines.append(f"{memory / 2**20:10.1f}  {time:5.1f}  {adjoint}{mark}")
        return "\n".join(lines)


@short_traceback
def plan(
    loss: Problem | Callable[..., Any],
    params: PyTree = None,
    hypers: Mapping[str, PyTree] | None = None,
    meta: PyTree = None,
    batches: PyTree = None,
    *,
    steps: int,
    optimizer: AnyOptimizer | None = None,
    model_state: PyTree = None,
    budget: float,
    wrt: tuple[str, ...] = ("hypers",),
) -> Plan:
    """Predict the memory and time of every adjoint for a run, and pick the fastest that fits.

    It compiles hypergradients of a few steps, and runs nothing.

    Args:
      loss: as for `hypergrad.train`, like the following arguments; or a `hypergrad.Problem`, which has all
        of them but ``hypers``.
      params: initial parameters.
      hypers: hyperparameters; their current values determine how many bits a step destroys.
      meta: passed to the loss.
      batches: batches by step.
      steps: ``T >= 1``.
      optimizer: the optimizer, by default `hypergrad.momentum`.
      model_state: start of what the loss changes by itself.
      budget: bytes of memory in addition to arguments and results.
      wrt: what will be differentiated: any of ``"params", "hypers", "meta", "batches"``.

    Returns:
      A `Plan`; print it for a table, and pass its ``adjoint`` to `hypergrad.train`.

    Raises:
      TypeError: parts of a problem are given beside a `hypergrad.Problem`.
      ValueError: no adjoint fits; the message says how much the smallest needs.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> loss = lambda w, meta, step: jnp.sum(jnp.tanh(w) ** 2)
    >>> hypers = {"learning_rate": 0.1, "momentum": 0.9}
    >>> hg.plan(loss, jnp.ones((100, 100)), hypers, steps=1000, budget=8e6).adjoint
    Reversible(bits=(('velocity', 0.181),), radix=(), segments=1)
    """
    call = f"plan(steps={steps!r}, budget={budget!r})"
    if isinstance(budget, bool) or not isinstance(budget, int | float | np.number) or not budget > 0:
        raise ValueError(f"{call}: budget must be a positive number of bytes, such as 1e9")
    if optimizer is not None:
        checked_call("plan", steps, optimizer, None)
    checked_steps(call, steps)
    parts = {"params", "hypers", "meta", "batches"}
    if isinstance(wrt, str) or not wrt or set(wrt) - parts:
        raise ValueError(
            f'{call}: wrt={wrt!r} must be some of {sorted(parts)}, in a tuple such as ("hypers",)'
        )
    captured: list[Any] = []

    def spy(run: Run, start: list[Leaf], constants: Constants, inputs: Inputs) -> Solution:
        captured.append((run, (start, constants, inputs)))
        return start, Outputs(jnp.zeros(run.steps), None)

    settings: Any = {"steps": steps, "optimizer": optimizer, "adjoint": spy}
    hypers = {} if hypers is None else hypers
    if isinstance(loss, Problem):
        refuse_beside(call, params, meta, batches, model_state)
        loss.train(hypers, **settings)
    else:
        train(loss, params, hypers, meta, batches, model_state=model_state, **settings)
    run, arrays = captured[0]
    sizes = _Sizes(run, arrays, wrt)
    estimates = [sizes.estimate(name, make) for name, make in _candidates(run, arrays)]
    estimates.sort(key=lambda estimate: estimate.time)
    return Plan(fastest(estimates, budget), tuple(estimates), int(budget))


def _candidates(run: Run, arrays: Any) -> list[tuple[str, Callable[[int], Any]]]:
    """The possible adjoints, as functions of the number of segments."""
    found: list[tuple[str, Callable[[int], Any]]] = [
        ("Stored", lambda segments: Stored()),
        ("Checkpointed", Checkpointed),
    ]
    with contextlib.suppress(ReversalError):  # not every program can be reversed
        joint = joined(run, *arrays)
        rates = destroyed_bits(joint, *joint.together(*arrays))
        bits = {
            name: min(7.0, round(float(f"{SPARE * rate:.2g}") + 1e-3, 6)) for name, rate in rates.items()
        }
        found += [
            ("Reversible", lambda segments: Reversible(bits)),
            ("Reversible in segments", lambda segments: Reversible(bits, segments=segments)),
        ]
    return found


class _Sizes:
    """The bytes that the adjoints of one run need: measured on a few steps, and extrapolated.

    Args:
      run: the user's.
      arrays: its start, constants and inputs.
      wrt: what will be differentiated.
    """

    def __init__(self, run: Run, arrays: Any, wrt: tuple[str, ...]):
        self.run, self.arrays, self.wrt = run, arrays, wrt
        start, _, inputs = arrays
        self.state = sum(x.nbytes for leaf in start for x in leaf.values())
        self.schedules = sum(x[0].nbytes for x in jax.tree.leaves(inputs.hypers)) if "hypers" in wrt else 0
        self.short = min(SHORT, run.steps)
        self.measured = functools.cache(self._measured)  # every measurement costs a compilation

    def _measured(self, adjoint: Adjoint, steps: int) -> int:
        return _temporary(adjoint, replace(self.run, steps=steps), self.arrays, self.wrt)

    @functools.cached_property
    def kept(self) -> int:
        """The bytes that `Stored` keeps of one step."""
        stored, half = self.measured(Stored(), self.short), self.short // 2
        return (stored - self.measured(Stored(), half)) // (self.short - half) if half else stored

    @functools.cached_property
    def integers(self) -> int:
        """The bytes of the state in integers, which no setting of `Reversible` here changes."""
        return Reversible().state_bytes(self.run, *self.arrays)

    def grows(self, adjoint: Adjoint, steps: int) -> int:
        """The bytes that depend on the steps."""
        if isinstance(adjoint, Stored):
            return steps * self.kept
        if isinstance(adjoint, Checkpointed):
            segments = adjoint.segments or 1
            return segments * self.state + -(-steps // segments) * self.kept
        assert isinstance(adjoint, Reversible)
        run = replace(self.run, steps=steps)
        tape, cotangents = adjoint.tape_bytes(run, *self.arrays), steps * self.schedules
        if adjoint.segments == 1:
            return tape + cotangents
        # Each segment has separate arrays for the cotangents of its schedules.
        own = adjoint.length(steps) * self.schedules
        return tape + cotangents + own + adjoint.segments * self.integers

    def estimate(self, name: str, make: Callable[[int], Any]) -> Estimate:
        """The best choice of an adjoint over all numbers of segments."""
        steps, short = self.run.steps, self.short
        choices = dict.fromkeys(make(S) for S in _divisions(steps))  # some ignore S
        best = min(choices, key=lambda adjoint: self.grows(adjoint, steps))
        few = make(2) if short > 1 else make(1)
        workspace = self.measured(few, short) - self.grows(few, short)
        return Estimate(best, workspace + self.grows(best, steps), self.time(name))

    def time(self, name: str) -> float:
        """The time that an adjoint takes, in plain trainings."""
        cost, moved = COSTS[name], self.kept if name == "Stored" else self.state
        return cost.fixed + cost.by_density * min(moved / self.operations, cost.densest)

    @functools.cached_property
    def operations(self) -> float:
        """Thousands of operations that a gradient takes."""
        start, constants, inputs = self.arrays
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs.batch)
        params = self.run.params_of(start)
        return operations(jax.make_jaxpr(self.run.plain_gradient)(params, constants.loss, batch)) / 1000


def fastest(estimates: Sequence[Estimate], budget: float) -> Adjoint:
    """The fastest adjoint that fits a budget in bytes.

    Raises:
      ValueError: none fits.

    >>> import hypergrad as hg
    >>> fastest([Estimate(hg.Stored(), 1000, 3.0), Estimate(hg.Reversible(), 10, 4.0)], 500)
    Reversible(bits=(), radix=(), segments=1)
    """
    fitting = [estimate for estimate in estimates if estimate.memory <= budget]
    if not fitting:
        least = min(estimates, key=lambda estimate: estimate.memory)
        raise ValueError(
            f"plan(budget={budget:g}): no adjoint fits; the smallest, {least.adjoint}, needs "
            f"{least.memory / 2**20:.1f} MiB. Allow more, take fewer steps, or differentiate only the last "
            "of them with Truncated(steps)"
        )
    return min(fitting, key=lambda estimate: estimate.time).adjoint


def _divisions(steps: int) -> list[int]:
    """Numbers of segments worth trying: one for every length up to a few percent."""
    count = min(steps, 200)
    return sorted({max(1, round(steps ** (k / count))) for k in range(count + 1)} - {1} or {1})


def _shared(function: Callable[[Array], Array], tree: PyTree) -> PyTree:
    """A function of every array of a tree, called once for one that is there several times."""
    found: dict[int, Array] = {}
    return jax.tree.map(lambda x: found.setdefault(id(x), function(x)), tree)


def _temporary(
    adjoint: Adjoint, run: Run, arrays: tuple[list[Leaf], Constants, Inputs], wrt: tuple[str, ...]
) -> int:
    """Bytes that a compiled hypergradient needs in addition to arguments and results."""
    start, constants, inputs = arrays

    def floats(part: str, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: part in wrt and jnp.issubdtype(x.dtype, jnp.floating), tree)

    inputs = _shared(lambda x: x[: run.steps], inputs)
    captured, meta = constants.loss[: run.captured], constants.loss[run.captured :]
    flags = (
        floats("params", start),
        Constants(
            [*floats("", captured), *floats("meta", meta)],
            floats("hypers", constants.hypers),
            floats("", constants.watch),
        ),
        Inputs(floats("batches", inputs.batch), floats("hypers", inputs.hypers), floats("", inputs.step)),
    )

    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten((start, constants, inputs))
    wanted = {id(x) for x, flag in zip(leaves, jax.tree.leaves(flags)) if flag}
    # An array that several leaves share is one array here too, and has one cotangent.
    different = {id(x): x for x in leaves}

    def hypergradient(arrays: dict[int, Array]) -> Any:
        def outer(changed: dict[int, Array]) -> Array:
            now = {**arrays, **changed}
            end, _ = adjoint(run, *structure.unflatten([now[id(x)] for x in leaves]))
            return sum((jnp.sum(x) for x in run.params_of(end)), start=jnp.zeros(()))

        return jax.grad(outer)({key: x for key, x in arrays.items() if key in wanted})

    shapes = ({key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in different.items()},)
    figures: Any = jax.jit(hypergradient).lower(*shapes).compile().memory_analysis()
    return figures.temp_size_in_bytes
