"""`check_hypergradient`: every check, one after the other."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core
import numpy as np

from hypergrad._base.checks import is_whole
from hypergrad._base.errors import ReversalError
from hypergrad._base.notebook import short_traceback
from hypergrad._base.progress import Progress
from hypergrad._base.trees import PyTree
from hypergrad.check.chaos import look_for_chaos
from hypergrad.check.finite_differences import compare_with_differences
from hypergrad.check.metasmoothness import metasmoothness
from hypergrad.check.objective import Leaves, Point, float_leaves, noise_of, program_of, sizes_of
from hypergrad.check.program import low_precision, recovery_of
from hypergrad.check.report import Finding, Report
from hypergrad.check.roughness import Advice, advise


@short_traceback
def check_hypergradient(
    objective: Callable[..., Any],
    everything: PyTree,
    *,
    steps: Sequence[int] | None = None,
    directions: int = 3,
    step: float = 0.01,
    tolerance: float | None = None,
    key: jax.Array | None = None,
    quiet: bool = False,
    progress: bool | None = None,
) -> Report:
    """Check the hypergradient ``∂ objective / ∂ everything`` in five ways.

    - Finite differences: its slopes along random directions of every array, against central differences of
      fourth order.  Their step balances truncation against rounding, which is measured, so an objective
      too rough to tell is not mistaken for a wrong hypergradient.
    - Exact recovery: runs under `hypergrad.Reversible` return to their start bit for bit.
    - Chaos: how its norm grows with the length of the run, as ``exp(rate T)`` or as ``T**exponent``; and
      if exponentially, with what ``sigma`` `hypergrad.smoothed` helps.
    - Metasmoothness: whether it describes the objective over a meta-step ``-step d sign(g)``.
    - Precision: types of 16 bits or fewer in ``everything`` and in the program.

    It costs about ``8 directions`` evaluations of the objective for every array, three hypergradients, and
    one more for each of `steps`; where a run is chaotic, up to 400 evaluations more.  To see whether
    limited precision blurs a result, call it within ``with jax.enable_x64(True):`` on float64 arrays,
    including those the objective closes over.

    Args:
      objective: ``objective(everything) -> scalar``, a deterministic function that JAX differentiates, with
        any number of `hypergrad.train` in it.
      everything: any pytree.  Its arrays of real floats are checked; everything else is held fixed.
      steps: three or more increasing lengths ``T >= 1`` of the inner run.  The objective is then called as
        ``objective(everything, T)``; chaos is measured over all lengths, the rest at the last one.  None
        leaves chaos unchecked.
      directions: number of random directions for every array, at least 1.
      step: size of a meta-step, > 0, as a fraction of every number's size.
      tolerance: error of a slope, relative to the typical slope of its array, that counts as agreement; in
        (0, 1).  None is the fourth root of the machine epsilon: 0.019 for float32, 0.00012 for float64.
      key: PRNG key of the directions, by default ``jax.random.key(0)``.
      quiet: do not print the report.
      progress: show on stderr what is compiled, and a bar with the time left; by default unless ``quiet``.

    Returns:
      A `Report`, printed unless ``quiet``; ``Report.verdict`` summarizes it: trusted, not trusted, or that
      nobody can tell.

    Raises:
      ValueError: an argument is invalid; checked before any work starts.
      TypeError: the objective does not return one float.
      DomainError: a hyperparameter itself is outside its domain (a ValueError); if only moving it leads
        outside, that point is left out.

    Source: for noise from differences, Moré and Wild, "Estimating computational noise", SIAM J. Sci.
    Comput., 2011.  For metasmoothness, Engstrom et al., "Optimizing ML training with metagradient descent",
    arXiv:2503.13751, 2025, section 3: the curvature is their definition 1; their definition 2 compares
    signs of changes of the trained parameters, whereas signs of the hypergradient are compared here.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, meta, step: jnp.sum((w - 1.0) ** 2)
    >>> def outer(rates, steps):
    ...     hypers = {"learning_rate": rates[:steps], "momentum": 0.5}
    ...     return jnp.sum(hg.train(loss, jnp.zeros(3), hypers, steps=steps).params ** 2)
    >>> report = hg.check_hypergradient(outer, jnp.full(20, 0.05), steps=(5, 10, 20), quiet=True)
    >>> report.trusted, report.chaos.verdict
    (True, 'ok')
    """
    call = (
        f"check_hypergradient(steps={steps}, directions={directions}, step={step}, tolerance={tolerance})"
    )
    _refuse(call, steps, directions, step, tolerance)
    names, leaves, merge = float_leaves(call, everything)
    key = jax.random.key(0) if key is None else key

    def at(length: int | None) -> Callable[[Sequence[Any]], Any]:
        more = () if length is None else (length,)
        return lambda leaves: objective(merge(leaves), *more)

    with Progress("check_hypergradient", not quiet if progress is None else progress) as shown:
        shown.say("compiling the objective and its hypergradient ...")
        report = _inspected(
            call, at, (names, leaves, merge), (steps, directions, step, tolerance), key, shown
        )
    if not quiet:
        print(report)
    return report


def _inspected(
    call: str,
    at: Callable[[int | None], Callable[[Sequence[Any]], Any]],
    named: tuple[list[str], Leaves, Callable[[Sequence[Any]], PyTree]],
    settings: tuple[Sequence[int] | None, int, float, float | None],
    key: jax.Array,
    shown: Progress,
) -> Report:
    """Every check."""
    (names, leaves, merge), (steps, directions, step, tolerance) = named, settings
    program, gradient, point = None, None, None

    def advice() -> Advice:
        assert point is not None  # a run without hypergradients is not called chaotic
        return advise(point, merge, key)

    try:
        program = program_of(call, at(None if steps is None else int(steps[-1])), leaves)
        gradient = program.gradient(leaves)
        point = Point(
            program, names, leaves, [sizes_of(x) for x in leaves], program.value(leaves), gradient
        )
    except ReversalError as error:
        recovery = Finding("exact recovery", "failed", {"runs": 0}, str(error))
        differences, smoothness = (
            Finding(name, "not checked", {}, "There is no hypergradient to check.")
            for name in ("finite differences", "metasmoothness")
        )
    else:
        recovery = recovery_of(program.jaxpr)
        shown.begin(2 + directions * len(leaves) + len(steps or ()), "check")
        noise = noise_of(point, key)
        shown.advance("noise")
        differences = compare_with_differences(point, noise, directions, tolerance, key, shown.advance)
        smoothness = metasmoothness(point, noise, step)
        shown.advance("metasmoothness")
    count = sum(x.size for x in leaves)
    kinds = " and ".join(sorted({str(x.dtype) for x in leaves}))
    return Report(
        f"Hypergradient in {count:,} number{'s' * (count > 1)} of {kinds}",
        differences,
        recovery,
        look_for_chaos(call, at, leaves, steps, gradient, advice, shown.advance),
        smoothness,
        low_precision(names, leaves, None if program is None else program.jaxpr),
    )


def _refuse(call: str, steps: Any, directions: Any, step: Any, tolerance: Any) -> None:
    increasing = steps is None or (
        isinstance(steps, Sequence | np.ndarray)
        and len(steps) >= 3
        and all(is_whole(n) for n in steps)
        and all(a < b for a, b in itertools.pairwise(steps))
    )
    if not increasing:
        raise ValueError(
            f"{call}: steps must be three or more whole numbers that increase, such as (25, 50, 100); the "
            "objective is then called as objective(everything, steps)"
        )
    if not is_whole(directions):
        raise ValueError(f"{call}: directions must be a whole number of at least 1")
    if not (isinstance(step, float | int | np.floating) and 0 < step < math.inf):
        raise ValueError(
            f"{call}: step must be a positive number such as 0.01: by which part of its size a meta-step "
            "moves every number"
        )
    if tolerance is not None and not (isinstance(tolerance, float | np.floating) and 0 < tolerance < 1):
        raise ValueError(f"{call}: tolerance must lie in (0, 1), or be None to suit the precision")
