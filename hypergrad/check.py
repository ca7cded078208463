"""Whether a hypergradient can be trusted, on the user's own problem.

Every number ``z_i`` is moved in proportion to its size ``d_i``: its absolute value or the root mean square
of its array, whichever is larger.  So learning rates and images go by one measure.

======  ================  ==========================================================================
symbol  name              meaning
======  ================  ==========================================================================
``f``   value             the outer objective
``z``   leaves            everything that is differentiated, a list of arrays
``d``   sizes             of every number of ``z``
``g``   gradient          the hypergradient ``∂f/∂z`` that is checked
``u``   move              a direction, in units of ``d``
``r``   residual          ``f(z + s d u) - f(z) - g·(s d u)``: its slope at ``s = 0`` is the error of ``g``
``σ``   noise             standard deviation of the rounding error of ``f``
``T``   steps             length of the inner run
======  ================  ==========================================================================
"""

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from hypergrad.arguments import DomainError
from hypergrad.errors import readable_errors
from hypergrad.reversible import RECOVERED, ReversalError
from hypergrad.run import PyTree, hoist, split

Leaves = list[np.ndarray]
Move = dict[int, np.ndarray]  # by number of the leaf; the others stay
FAILURES = (ReversalError, DomainError)  # of a run at points next to the one that is checked
RESOLUTION = 0.02  # of a slope, relative, that finite differences must reach to confirm it


class Finding(NamedTuple):
    """What one check found.

    Attributes:
      name: of the check.
      verdict: ``"ok"``, ``"warning"``, ``"failed"`` or ``"not checked"``.
      numbers: what was measured, by name.
      meaning: what it means and what to do about it, in words.
    """

    name: str
    verdict: str
    numbers: dict[str, Any]
    meaning: str


class Report(NamedTuple):
    """What `check_hypergradient` found; ``str(report)`` is a readable table.

    Attributes:
      subject: what was checked, in words.
      finite_differences: the hypergradient against differences of the objective.
      recovery: whether the runs played backwards arrived at their starts.
      chaos: how the norm of the hypergradient grows with the length of the run.
      metasmoothness: whether the hypergradient describes the objective over a whole meta-step.
      precision: numbers of low precision on the way.
    """

    subject: str
    finite_differences: Finding
    recovery: Finding
    chaos: Finding
    metasmoothness: Finding
    precision: Finding

    @property
    def trusted(self) -> bool:
        """Whether finite differences confirm the hypergradient and no check failed."""
        return self.finite_differences.verdict == "ok" and all(f.verdict != "failed" for f in self[1:])

    def __str__(self) -> str:
        lines = [f"{self.subject}: {'trusted' if self.trusted else 'NOT TRUSTED'}"]
        for name, verdict, _, meaning in self[1:]:
            head = f"  {name:<20}{verdict:<13}"
            lines.append(textwrap.fill(head + meaning, 100, subsequent_indent=" " * len(head)))
        return "\n".join(lines)


class _Program(NamedTuple):
    """The objective as a function of the arrays of floats, compiled.

    Attributes:
      value: ``f``; NaN where the run fails.
      gradient: ``∂f/∂z`` in float64; raises one of `FAILURES` where the run fails.
      dtype: of the value.
      jaxpr: of the gradient.
    """

    value: Callable[[Leaves], float]
    gradient: Callable[[Leaves], Leaves]
    dtype: np.dtype
    jaxpr: Any


class _Point(NamedTuple):
    """Where the hypergradient is checked, and what it is there."""

    program: _Program
    names: list[str]
    leaves: Leaves
    sizes: Leaves
    start: float
    gradient: Leaves

    def moved(self, move: Move, s: float) -> Leaves:
        """``z + s d u``, rounded to the precision of ``z``."""
        moved = list(self.leaves)
        for k, u in move.items():
            x = self.leaves[k]
            moved[k] = np.asarray(x.astype(np.float64) + s * self.sizes[k] * u, x.dtype)
        return moved

    def linear(self, gradient: Leaves, moved: Leaves) -> float:
        """``gradient·(moved - z)``, of the change that rounding let happen, not of the one intended."""
        pairs = [(g, y, x) for g, y, x in zip(gradient, moved, self.leaves) if y is not x]
        return sum(float(np.vdot(g, y.astype(np.float64) - x.astype(np.float64))) for g, y, x in pairs)

    def residual(self, move: Move, s: float) -> float:
        """``r(s)``."""
        moved = self.moved(move, s)
        return self.program.value(moved) - self.start - self.linear(self.gradient, moved)


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
) -> Report:
    """Check the hypergradient ``∂ objective / ∂ everything`` in five ways.

    - Finite differences: along random directions of every array, its slope against central differences of
      fourth order.  Their step is chosen between truncation and rounding, which is measured; so an
      objective too rough to tell is not taken for a wrong hypergradient.
    - Exact recovery: runs under `hypergrad.Reversible` come back bit for bit.
    - Chaos: how its norm grows with the length of the run, as ``exp(rate T)`` or as ``T**exponent``.
    - Metasmoothness: whether it describes the objective over a meta-step ``-step d sign(g)``.
    - Precision: types of 16 bits or fewer among everything and in the program.

    It costs about ``8 directions`` evaluations of the objective for every array, three hypergradients,
    and one more for each of `steps`.  To see whether it is precision that blurs a result, call it within
    ``with jax.enable_x64(True):`` on float64 arrays, closed-over ones too.

    Args:
      objective: ``objective(everything) -> scalar``, a deterministic function that JAX differentiates, with
        any number of `hypergrad.train` in it.
      everything: any pytree.  Its arrays of real floats are checked; all else is held fixed.
      steps: three or more increasing lengths ``T >= 1`` of the inner run.  The objective is then called as
        ``objective(everything, T)``; chaos is measured over all lengths, the rest at the last one.  None
        leaves chaos unchecked.
      directions: at least 1; random directions for every array.
      step: positive; a meta-step, as a part of every number's size.
      tolerance: in (0, 1); error of a slope, relative to the typical slope of its array, that counts as
        agreement.  None is the fourth root of the machine epsilon: 0.019 for float32, 0.00012 for float64.
      key: for the directions, by default ``jax.random.key(0)``.
      quiet: do not print the report.

    Returns:
      A `Report`, printed unless `quiet`; `Report.trusted` sums it up.

    Raises:
      ValueError: where an argument cannot be meant as it is; before any work starts.
      TypeError: where the objective does not return one float.
      DomainError: a ValueError, where a hyperparameter itself is outside its domain; where only moving it
        leads there, that point is left out.

    Sources: noise from differences, Moré and Wild, "Estimating computational noise", SIAM J. Sci. Comput.,
    2011.  Metasmoothness after Engstrom et al., "Optimizing ML training with metagradient descent",
    arXiv:2503.13751, 2025, section 3: the curvature is their definition 1; their definition 2 compares
    signs of changes of the trained parameters, here signs of the hypergradient are compared.

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
    names, leaves, merge = _floats(call, everything)
    key = jax.random.key(0) if key is None else key

    def at(length: int | None) -> Callable[[Sequence[Any]], Any]:
        more = () if length is None else (length,)
        return lambda leaves: objective(merge(leaves), *more)

    program, gradient = None, None
    try:
        program = _program(call, at(None if steps is None else int(steps[-1])), leaves)
        gradient = program.gradient(leaves)
        point = _Point(program, names, leaves, [_sizes(x) for x in leaves], program.value(leaves), gradient)
    except ReversalError as error:
        recovery = Finding("exact recovery", "failed", {"runs": 0}, str(error))
        differences, smoothness = (
            Finding(name, "not checked", {}, "There is no hypergradient to check.")
            for name in ("finite differences", "metasmoothness")
        )
    else:
        recovery = _recovery(program.jaxpr)
        noise = _noise(point, key)
        differences = _finite_differences(point, noise, directions, tolerance, key)
        smoothness = _metasmoothness(point, noise, step)
    count = sum(x.size for x in leaves)
    kinds = " and ".join(sorted({str(x.dtype) for x in leaves}))
    report = Report(
        f"Hypergradient in {count:,} number{'s' * (count > 1)} of {kinds}",
        differences,
        recovery,
        _chaos(call, at, leaves, steps, gradient),
        smoothness,
        _precision(names, leaves, None if program is None else program.jaxpr),
    )
    if not quiet:
        print(report)
    return report


def _refuse(call: str, steps: Any, directions: Any, step: Any, tolerance: Any) -> None:
    def whole(n: Any) -> bool:
        return isinstance(n, int | np.integer) and not isinstance(n, bool) and bool(n >= 1)

    increasing = steps is None or (
        isinstance(steps, Sequence | np.ndarray)
        and len(steps) >= 3
        and all(whole(n) for n in steps)
        and all(a < b for a, b in itertools.pairwise(steps))
    )
    if not increasing:
        raise ValueError(
            f"{call}: steps must be three or more whole numbers that increase, such as (25, 50, 100); the "
            "objective is then called as objective(everything, steps)"
        )
    if not whole(directions):
        raise ValueError(f"{call}: directions must be a whole number of at least 1")
    if not (isinstance(step, float | int | np.floating) and 0 < step < math.inf):
        raise ValueError(
            f"{call}: step must be a positive number such as 0.01: by which part of its size a meta-step "
            "moves every number"
        )
    if tolerance is not None and not (isinstance(tolerance, float | np.floating) and 0 < tolerance < 1):
        raise ValueError(f"{call}: tolerance must lie in (0, 1), or be None to suit the precision")


def _floats(call: str, everything: PyTree) -> tuple[list[str], Leaves, Callable[[Sequence[Any]], PyTree]]:
    """Paths of the arrays of floats, the arrays, and a function that puts others in their place."""
    arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), everything)
    flags = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.size > 0, arrays)
    leaves, merge = split(flags, arrays)
    if not leaves:
        raise ValueError(
            f"{call}: everything has no floats in it, so there is nothing to differentiate; pass what "
            "jax.grad(objective) is taken at"
        )
    flagged, _ = jax.tree_util.tree_flatten_with_path(flags)
    names = [jax.tree_util.keystr(path) or "everything" for path, flag in flagged if flag]
    return names, [np.asarray(x) for x in leaves], merge


def _on_device(leaves: Leaves) -> list[jax.Array]:
    return [jnp.asarray(x) for x in leaves]


def _program(call: str, objective: Callable[[Sequence[Any]], Any], leaves: Leaves) -> _Program:
    """Trace the objective once and compile it on demand; refuses one that has no hypergradient."""
    with readable_errors():
        hoisted, constants, result = hoist(objective, _on_device(leaves))
    if not (isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()):
        what = f"{result.dtype}{list(result.shape)}" if hasattr(result, "shape") else type(result).__name__
        raise TypeError(f"{call}: the objective must return one scalar, and returned {what}")
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(f"{call}: the objective must return a float, and returned {result.dtype}")

    def evaluate(leaves: Sequence[Any], constants: Sequence[Any]) -> Any:
        return hoisted(constants, leaves)

    compiled, derivative = jax.jit(evaluate), jax.jit(jax.grad(evaluate))

    def value(leaves: Leaves) -> float:
        try:
            with readable_errors():
                return float(compiled(_on_device(leaves), constants))
        except FAILURES:
            return math.nan

    def gradient(leaves: Leaves) -> Leaves:
        at = _on_device(leaves)
        try:
            with readable_errors():
                found = jax.block_until_ready(derivative(at, constants))
        except ReversalError as error:
            if "would overflow" not in str(error):
                raise
            with readable_errors():  # without jit, buffers are as long as they must be
                found = jax.block_until_ready(jax.grad(objective)(at))
        return [np.asarray(g).astype(np.float64) for g in found]

    jaxpr = derivative.trace(_on_device(leaves), constants).jaxpr.jaxpr
    return _Program(value, gradient, result.dtype, jaxpr)


def _sizes(x: np.ndarray) -> np.ndarray:
    """Of every number, its own or the array's, whichever is larger; 1 in an array of zeros."""
    x = np.abs(x.astype(np.float64))
    whole = math.sqrt(np.mean(x**2))
    return np.maximum(x, whole) if whole > 0 else np.ones_like(x)


def _epsilon(*dtypes: Any) -> float:
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def _signs(point: _Point, key: jax.Array, *which: int) -> Move:
    """A random direction: a sign for every number of some leaves."""
    return {
        k: np.asarray(jax.random.rademacher(jax.random.fold_in(key, k), point.leaves[k].shape), np.float64)
        for k in which
    }


def _noise(point: _Point, key: jax.Array) -> float:
    """``σ² = (k!)² / (2k)! mean((Δᵏ f)²)``, of values close together.

    High differences of a smooth function vanish, and what is left is rounding.  The largest estimate of
    ``k = 4, 5, 6``, and no less than what rounding the value alone makes.
    """
    move = _signs(point, key, *range(len(point.leaves)))
    spacing = min(2.0**-8, math.sqrt(_epsilon(*(x.dtype for x in point.leaves))))
    for h in (spacing, spacing / 8, spacing / 64):  # a momentum of 0.999 has little room
        values = np.array([point.residual(move, h * i) for i in range(-4, 5)])
        if np.all(np.isfinite(values)):
            break
    else:
        return math.inf
    estimates = [
        math.sqrt(math.factorial(k) ** 2 / math.factorial(2 * k) * np.mean(np.diff(values, k) ** 2))
        for k in (4, 5, 6)
    ]
    return max(*estimates, 0.3 * _epsilon(point.program.dtype) * abs(point.start))


class _Slope(NamedTuple):
    """One slope ``g·(d u)``, and what finite differences say to it.

    Attributes:
      expected: the slope.
      error: by how much differences exceed it.
      uncertainty: by how much those may be wrong.
      typical: root mean square of such slopes of the same array, over all signs.
    """

    expected: float
    error: float
    uncertainty: float
    typical: float

    @property
    def scale(self) -> float:
        """What errors are relative to."""
        measured = abs(self.expected + self.error) if math.isfinite(self.uncertainty) else 0.0
        return max(self.typical, measured)

    def agrees(self, tolerance: float) -> bool:
        """Whether it is right, as far as differences can tell, and they can."""
        close = abs(self.error) <= max(tolerance * self.scale, self.uncertainty)
        return close and self.uncertainty <= max(tolerance, RESOLUTION) * self.scale

    @property
    def visible(self) -> bool:
        """Whether differences see it at all."""
        return self.uncertainty < self.scale

    def disagrees(self, tolerance: float) -> bool:
        """Whether it is wrong, beyond doubt: differences may agree with each other by chance."""
        return abs(self.error) > max(tolerance * self.scale, 10 * self.uncertainty)


def _slope(point: _Point, move: Move, noise: float, tolerance: float) -> _Slope:
    """The error of one slope: that of the residual, from central differences ``C``.

    ``D(h) = (16 C(h) - C(4h)) / 15`` is of fourth order.  Truncation is taken to be the change from
    ``D(4h)`` to ``D(h)``, an overestimate; rounding makes a standard deviation of ``0.75 σ/h``, and three
    of them are taken.  Steps shrink until rounding exceeds truncation, or all is clear.

    A chaotic objective looks smooth again to differences coarser than its structure.  So an error counts
    only as far as the hypergradient itself stays the same from ``-h`` to ``h``.  And one that is rounded on
    the way, as states are in exact arithmetic, is a staircase, flat to differences finer than its stairs:
    where the change from ``C(4h)`` to ``C(h)`` has grown, it is the height of a stair over ``h``, and an
    error counts only as far as it exceeds what such a one makes of a slope.
    """
    (k,) = move

    def derivative(gradient: Leaves) -> float:
        return float(np.vdot(gradient[k] * point.sizes[k], move[k]))

    def change(h: float) -> float:
        try:
            ends = [derivative(point.program.gradient(point.moved(move, s))) for s in (-h, h)]
        except FAILURES:
            return math.inf
        changes = [abs(end - expected) for end in ends]
        return max(changes) if all(map(math.isfinite, changes)) else math.inf

    expected = derivative(point.gradient)
    typical = float(np.linalg.norm(point.gradient[k] * point.sizes[k]))
    best = _Slope(expected, math.nan, math.inf, typical)
    coarse = before = math.nan
    stair, shift = 0.0, math.inf
    h = 4.0**-2
    while h >= max(4.0**-13, 64 * _epsilon(point.leaves[k].dtype)):
        central = (point.residual(move, h) - point.residual(move, -h)) / (2 * h)
        fourth = (16 * central - coarse) / 15
        now = abs(central - coarse)
        if now > 2 * shift:
            stair = max(stair, now * h)
        shift = now if math.isfinite(now) else math.inf
        if math.isfinite(fourth):
            truncation = abs(fourth - (before if math.isfinite(before) else coarse))
            rounding = 3 * 0.75 * noise / h
            if _Slope(expected, fourth, truncation + rounding, typical).disagrees(tolerance):
                truncation += change(h) + stair / h
            slope = _Slope(expected, fourth, truncation + rounding, typical)
            best = min(best, slope, key=lambda s: s.uncertainty)
            clear = slope.disagrees(tolerance) or slope.uncertainty <= 0.01 * tolerance * typical
            if clear or truncation <= rounding:
                break
        h, coarse, before = h / 4, central, fourth
    return best


def _finite_differences(
    point: _Point, noise: float, directions: int, tolerance: float | None, key: jax.Array
) -> Finding:
    name = "finite differences"
    broken = [n for n, g in zip(point.names, point.gradient) if not np.all(np.isfinite(g))]
    if broken or not math.isfinite(point.start):
        what = f"hypergradient in {_listed(broken)}" if broken else "objective"
        return Finding(name, "failed", {"not_finite": broken}, f"The {what} is NaN or infinite.")
    again = point.program.value(point.leaves)
    if again != point.start:
        meaning = (
            f"Cannot tell: the objective is {point.start:.8g}, and {again:.8g} when it is evaluated again. "
            "Fix its random keys and make it a pure function."
        )
        return Finding(name, "warning", {"values": [point.start, again]}, meaning)
    epsilon = _epsilon(point.program.dtype, *(x.dtype for x in point.leaves))
    tolerance = epsilon**0.25 if tolerance is None else tolerance
    slopes: dict[str, list[_Slope]] = {}
    for k, leaf in enumerate(point.names):
        moves = [_signs(point, jax.random.fold_in(key, 1 + i), k) for i in range(directions)]
        slopes[leaf] = [_slope(point, move, noise, tolerance) for move in moves]

    clear = [n for n, e in slopes.items() if all(s.agrees(tolerance) or s.disagrees(tolerance) for s in e)]
    suspect = [n for n, each in slopes.items() if any(s.disagrees(tolerance) for s in each)]
    wrong = [n for n in suspect if n in clear]
    unclear = [n for n in slopes if n not in clear]
    errors = {n: max(_part(abs(s.error), s.scale) for s in each) for n, each in slopes.items()}
    bounds = {n: max(_part(s.uncertainty, s.scale) for s in each) for n, each in slopes.items()}
    # What is unclear does no harm where it is, and can only be, a small part of the hypergradient.
    total = np.linalg.norm([each[0].typical for each in slopes.values()])
    rest = np.linalg.norm([max(max(s.scale, s.uncertainty) for s in slopes[n]) for n in unclear])
    share = _part(float(rest), float(total))
    # But what is large enough to be seen, and not to be resolved, is a part that nothing confirms.
    unconfirmed = [n for n in unclear if all(s.visible for s in slopes[n])]
    pairs = np.array([(s.expected, s.expected + s.error) for each in slopes.values() for s in each])
    cosine = _cosine(*pairs[np.isfinite(pairs[:, 1])].T)
    measured = {
        "relative_error": errors,
        "uncertainty": bounds,
        "cosine": cosine,
        "tolerance": tolerance,
        "noise": noise,
        "unclear": unclear,
        "unclear_share": share,
        "unconfirmed": unconfirmed,
    }
    if wrong:
        worst = max(wrong, key=errors.__getitem__)
        meaning = (
            f"Disagrees with finite differences by {errors[worst]:.2g} in {worst}, relative to its typical "
            f"slope, where those are certain to {bounds[worst]:.1g}; cosine over all {cosine:.4f}. "
            "Something on the way has a wrong derivative (a custom rule, a stop_gradient), or none here."
        )
        return Finding(name, "failed", measured, meaning)
    if share > 0.1 or suspect or unconfirmed:
        worst = max(unconfirmed or unclear, key=bounds.__getitem__)
        way_out = (
            "Shorten or calm the run."
            if epsilon < 1e-15
            else "Call the check within `with jax.enable_x64(True):`, on float64 arrays throughout."
        )
        meaning = (
            "Cannot tell: in this precision the objective is too rough or noisy, or the hypergradient too "
            f"small. Differences resolve the slope in {worst} to {bounds[worst]:.2g} of it only. {way_out}"
        )
        return Finding(name, "warning", measured, meaning)
    worst = max(clear, key=errors.__getitem__)
    meaning = (
        f"Agrees with finite differences: relative error at most {errors[worst]:.1e}, in {worst}, resolved "
        f"to {bounds[worst]:.1e}; cosine {cosine:.6f}."
    )
    if unclear:
        meaning += f" Too small to resolve: {_listed(unclear)}, at most {share:.1%} of the hypergradient."
    return Finding(name, "ok", measured, meaning)


def _part(x: float, whole: float) -> float:
    return 0.0 if x == 0 else x / whole if whole > 0 else math.inf


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    length = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / length) if length > 0 else math.nan


def _recovery(jaxpr: Any) -> Finding:
    """The hypergradient has been computed, so every run that is played backwards in it was recovered."""
    runs = sum(
        eqn.primitive.name == "name" and eqn.params["name"] == RECOVERED for eqn in _equations(jaxpr)
    )
    if runs == 0:
        meaning = "No differentiated run has adjoint=Reversible(), so none is played backwards."
        return Finding("exact recovery", "not checked", {"runs": 0}, meaning)
    what = "The run, played backwards, arrived at its" if runs == 1 else f"All {runs} runs arrived at their"
    return Finding("exact recovery", "ok", {"runs": runs}, f"{what} start bit for bit.")


def _chaos(
    call: str,
    at: Callable[[int | None], Callable[[Sequence[Any]], Any]],
    leaves: Leaves,
    steps: Sequence[int] | None,
    last: Leaves | None,
) -> Finding:
    """Fits of ``log |g|`` by ``rate T`` and by ``exponent log T``; `last` is ``g`` of the longest run."""
    name = "chaos"
    if steps is None:
        meaning = (
            "Pass steps=(25, 50, 100) and an objective(everything, steps), to see how the hypergradient "
            "grows with the length of the run."
        )
        return Finding(name, "not checked", {}, meaning)

    def norm(length: int) -> float:
        try:
            gradient = last if length == steps[-1] else _program(call, at(length), leaves).gradient(leaves)
        except ReversalError:
            gradient = None
        return math.nan if gradient is None else math.sqrt(sum(float(np.sum(g**2)) for g in gradient))

    lengths = [int(length) for length in steps]
    norms = [norm(length) for length in lengths]
    measured: dict[str, Any] = {"steps": lengths, "norms": norms}
    failed = [length for length, x in zip(lengths, norms) if not math.isfinite(x)]
    if failed:
        meaning = f"At T = {failed[0]} the run or its hypergradient diverges. Lower the learning rate."
        return Finding(name, "failed", measured, meaning)
    if min(norms) == 0:
        at_zero = lengths[norms.index(0.0)]
        meaning = f"At T = {at_zero} the hypergradient is zero, so its growth has no measure."
        return Finding(name, "not checked", measured, meaning)

    T, log_norms = np.array(lengths, float), np.log(norms)
    (rate, *_), exponential_misfit, *_ = np.polyfit(T, log_norms, 1, full=True)
    (exponent, *_), power_misfit, *_ = np.polyfit(np.log(T), log_norms, 1, full=True)
    folds = rate * (T[-1] - T[0])
    measured |= {"rate": float(rate), "exponent": float(exponent)}
    span = f"From T = {lengths[0]} to {lengths[-1]} the norm goes from {norms[0]:.2g} to {norms[-1]:.2g}"
    if folds > 3 and (exponent > 4 or np.sum(exponential_misfit) < np.sum(power_misfit)):
        meaning = (
            f"{span} and doubles every {math.log(2) / rate:.3g} steps: the run is chaotic, and its "
            "hypergradient true but useless. Lower the learning rate, or shorten the run."
        )
        return Finding(name, "failed", measured, meaning)
    if folds > 1 and exponent > 1.5:
        meaning = f"{span}, like T**{exponent:.2g}: growing. Longer runs may become chaotic; watch them."
        return Finding(name, "warning", measured, meaning)
    return Finding(name, "ok", measured, f"{span}, like T**{exponent:.2g}: stable.")


def _metasmoothness(point: _Point, noise: float, step: float) -> Finding:
    """Objective and hypergradient along ``z - s step d sign(g)``, ``0 <= s <= 1``."""
    name = "metasmoothness"
    move = {k: -step * np.sign(g) for k, g in enumerate(point.gradient)}
    end = point.moved(move, 1.0)
    predicted = point.linear(point.gradient, end)
    if not math.isfinite(predicted) or predicted == 0:
        return Finding(name, "not checked", {}, "The hypergradient gives no direction to go in.")
    size = f"A meta-step of {step:g} of every number's size"
    fractions = [0.25, 0.5, 0.75, 1.0]
    changes = [point.program.value(point.moved(move, s)) - point.start for s in fractions]
    measured: dict[str, Any] = {"predicted": predicted, "fractions": fractions, "changes": changes}
    try:
        middle, last = (point.program.gradient(point.moved(move, s)) for s in (0.5, 1.0))
    except FAILURES as error:
        return Finding(name, "warning", measured, f"{size} leads to where the run fails: {error}")
    slopes = [point.linear(g, end) for g in (point.gradient, middle, last)]
    measured["slopes"] = slopes
    if not np.all(np.isfinite([*changes, *slopes])):
        meaning = (
            f"{size} leads to where the objective or its hypergradient is NaN or infinite. Shorten it."
        )
        return Finding(name, "warning", measured, meaning)

    before, after = (
        np.concatenate([np.ravel(g * d) for g, d in zip(gradient, point.sizes)])
        for gradient in (point.gradient, last)
    )
    same, weights = np.sign(before) * np.sign(after), np.abs(before) + np.abs(after)
    length2 = sum(float(np.sum((d * move[k]) ** 2)) for k, d in enumerate(point.sizes))
    cosine, smooth = _cosine(before, after), float(np.sum(weights * same) / np.sum(weights))
    measured |= {
        "cosine": cosine,
        "same_signs": float(np.mean(same[weights > 0] > 0)),
        "metasmoothness": smooth,
        "curvature": abs(changes[3] - 2 * changes[1]) / (length2 / 4),
    }
    actual, added = changes[-1], (slopes[0] + 4 * slopes[1] + slopes[2]) / 6  # Simpson: exact for cubics
    followed = (
        f"{size} changes the objective by {actual:.2g}; {predicted:.2g} was predicted. Hypergradients "
        f"before and after it have a cosine of {cosine:.2f} and agree in sign by {smooth:.2f} (1 is all)."
    )
    if 3 * noise > 0.1 * abs(predicted):
        meaning = f"{size} changes the objective by little more than rounding does. Pass a larger step."
        return Finding(name, "warning", measured, meaning)
    if abs(actual - added) > 0.1 * max(map(abs, slopes)) + 3 * noise:
        meaning = (
            f"{followed} Hypergradients on the way add up to {added:.2g}: the objective is rough, and they "
            "do not describe a step of this length. Shorten it, or make training smoother (lower rates, "
            "wider nets)."
        )
        return Finding(name, "failed", measured, meaning)
    if abs(actual - predicted) > 0.25 * abs(predicted):
        meaning = f"{followed} Smooth, but curved over this step: shorten it."
        return Finding(name, "warning", measured, meaning)
    return Finding(name, "ok", measured, followed)


def _precision(names: list[str], leaves: Leaves, jaxpr: Any) -> Finding:
    """Types of 16 bits or fewer, and matrix products that round their arguments."""

    def low(dtype: Any) -> bool:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 16

    inputs = [f"{n} ({x.dtype})" for n, x in zip(names, leaves) if low(x.dtype)]
    inside: dict[str, int] = {}
    rounded = 0
    for eqn in () if jaxpr is None else _equations(jaxpr):
        dtypes = [v.aval.dtype for v in eqn.outvars if hasattr(v.aval, "dtype")]
        for dtype in {str(d) for d in dtypes if low(d)}:
            inside[dtype] = inside.get(dtype, 0) + 1
        if eqn.primitive.name in ("dot_general", "conv_general_dilated") and dtypes == [np.float32]:
            rounded += eqn.params["precision"] in (None, (jax.lax.Precision.DEFAULT,) * 2)
    backend = jax.default_backend()
    measured = {"inputs": inputs, "inside": inside, "backend": backend, "rounded_products": rounded}
    warnings = []
    if inputs:
        warnings.append(f"{_listed(inputs)}: the hypergradient is rounded to the same type. Pass float32.")
    if inside:
        found = ", ".join(f"{dtype} ({count} operations)" for dtype, count in sorted(inside.items()))
        warnings.append(
            f"The program computes in {found}; over a run its rounding errors grow like hypergradients do. "
            "Use float32 inside the run."
        )
    if rounded and backend in ("gpu", "tpu"):
        warnings.append(
            f"{rounded} float32 products may round their arguments on this {backend}; pass "
            "jax.default_matmul_precision('highest') to be sure."
        )
    if warnings:
        return Finding("precision", "warning", measured, " ".join(warnings))
    if jaxpr is None:
        return Finding("precision", "not checked", measured, "There is no program to look through.")
    return Finding("precision", "ok", measured, "Nothing is computed in 16 bits or fewer.")


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, and those of the programs in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _equations(inner)


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
