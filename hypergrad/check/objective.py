"""The user's objective, traced once, and slopes of it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.extend.core
import jax.numpy as jnp
import numpy as np

from hypergrad._base.errors import DomainError, ReversalError, readable_errors
from hypergrad._base.tracing import closure_convert
from hypergrad._base.trees import PyTree, split

RESOLUTION = 0.02  # relative accuracy of a slope that finite differences must reach to confirm it

Leaves = list[np.ndarray]
Move = dict[int, np.ndarray]  # by number of the leaf; the others stay
FAILURES = (ReversalError, DomainError)  # of a run at points next to the one that is checked


class Program(NamedTuple):
    """The objective as a function of the arrays of floats, compiled.

    Attributes:
      value: ``f``; NaN where the run fails.
      gradient: ``∂f/∂z`` in float64; raises one of `FAILURES` where the run fails.
      dtype: the dtype of the value.
      jaxpr: the jaxpr of the gradient.
    """

    value: Callable[[Leaves], float]
    gradient: Callable[[Leaves], Leaves]
    dtype: np.dtype
    jaxpr: Any


class Point(NamedTuple):
    """The point where the hypergradient is checked, and its value there."""

    program: Program
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
        """``gradient·(moved - z)``, of the change that is left after rounding, not of the one intended."""
        pairs = [(g, y, x) for g, y, x in zip(gradient, moved, self.leaves) if y is not x]
        return sum(float(np.vdot(g, y.astype(np.float64) - x.astype(np.float64))) for g, y, x in pairs)

    def residual(self, move: Move, s: float) -> float:
        """``r(s)``."""
        moved = self.moved(move, s)
        return self.program.value(moved) - self.start - self.linear(self.gradient, moved)


def float_leaves(
    call: str, everything: PyTree
) -> tuple[list[str], Leaves, Callable[[Sequence[Any]], PyTree]]:
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


def program_of(call: str, objective: Callable[[Sequence[Any]], Any], leaves: Leaves) -> Program:
    """Trace the objective once and compile it on demand; refuse one that has no hypergradient."""
    with readable_errors():
        converted, constants, result = closure_convert(objective, _on_device(leaves))
    if not (isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()):
        what = f"{result.dtype}{list(result.shape)}" if hasattr(result, "shape") else type(result).__name__
        raise TypeError(f"{call}: the objective must return one scalar, and returned {what}")
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(f"{call}: the objective must return a float, and returned {result.dtype}")

    def evaluate(leaves: Sequence[Any], constants: Sequence[Any]) -> Any:
        return converted(constants, leaves)

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
    return Program(value, gradient, result.dtype, jaxpr)


def sizes_of(x: np.ndarray) -> np.ndarray:
    """The size of every number, its own or the array's, whichever is larger; 1 in an array of zeros."""
    x = np.abs(x.astype(np.float64))
    whole = math.sqrt(np.mean(x**2))
    return np.maximum(x, whole) if whole > 0 else np.ones_like(x)


def machine_epsilon(*dtypes: Any) -> float:
    """The largest of the machine epsilons of some types."""
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def random_signs(point: Point, key: jax.Array, *which: int) -> Move:
    """A random direction: a sign for every number of some leaves."""
    return {
        k: np.asarray(jax.random.rademacher(jax.random.fold_in(key, k), point.leaves[k].shape), np.float64)
        for k in which
    }


def noise_of(point: Point, key: jax.Array) -> float:
    """``σ² = (k!)² / (2k)! mean((Δᵏ f)²)``, of values close together.

    High-order differences of a smooth function vanish, and what is left is rounding.  The result is the
    largest estimate of ``k = 4, 5, 6``, and no less than the error of rounding the value alone.
    """
    move = random_signs(point, key, *range(len(point.leaves)))
    spacing = min(2.0**-8, math.sqrt(machine_epsilon(*(x.dtype for x in point.leaves))))
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
    return max(*estimates, 0.3 * machine_epsilon(point.program.dtype) * abs(point.start))


class Slope(NamedTuple):
    """One slope ``g·(d u)``, compared with finite differences.

    Attributes:
      expected: the slope.
      error: by how much finite differences exceed it.
      uncertainty: by how much finite differences may be wrong.
      typical: root mean square of such slopes of the same array, over all signs.
      zero: whether the hypergradient in the array is exactly 0, and the objective the same at all points.
    """

    expected: float
    error: float
    uncertainty: float
    typical: float
    zero: bool = False

    @property
    def scale(self) -> float:
        """The scale that errors are relative to."""
        measured = abs(self.expected + self.error) if math.isfinite(self.uncertainty) else 0.0
        return max(self.typical, measured)

    def agrees(self, tolerance: float) -> bool:
        """Whether differences are accurate enough to confirm the slope, and confirm it."""
        close = abs(self.error) <= max(tolerance * self.scale, self.uncertainty)
        return close and self.uncertainty <= max(tolerance, RESOLUTION) * self.scale

    @property
    def visible(self) -> bool:
        """Whether differences can detect the slope at all."""
        return self.uncertainty < self.scale

    def disagrees(self, tolerance: float) -> bool:
        """Whether it is wrong beyond doubt, given that differences may agree with each other by chance."""
        return abs(self.error) > max(tolerance * self.scale, 10 * self.uncertainty)


def slope_along(point: Point, move: Move, noise: float, tolerance: float) -> Slope:
    """The error of one slope: that of the residual, from central differences ``C``.

    ``D(h) = (16 C(h) - C(4h)) / 15`` is of fourth order.  Truncation is taken to be the change from
    ``D(4h)`` to ``D(h)``, an overestimate; rounding has a standard deviation of ``0.75 σ/h``, of which
    three are taken.  Steps shrink until rounding exceeds truncation, or the slope is resolved.

    A chaotic objective looks smooth again to differences coarser than its structure, so an error counts
    only as far as the hypergradient itself stays the same from ``-h`` to ``h``.  An objective that is
    rounded on the way, as states are in exact arithmetic, is a staircase, flat to differences finer than
    its stairs.  If the change from ``C(4h)`` to ``C(h)`` has grown, it is the height of a stair over ``h``,
    and an error counts only as far as it exceeds the effect of such a stair on a slope.
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
    best = Slope(expected, math.nan, math.inf, typical)
    zero = not np.any(point.gradient[k])
    coarse = before = math.nan
    stair, shift = 0.0, math.inf
    h = 4.0**-2
    while h >= max(4.0**-13, 64 * machine_epsilon(point.leaves[k].dtype)):
        ends = point.residual(move, h), point.residual(move, -h)
        zero = zero and ends == (0.0, 0.0)
        central = (ends[0] - ends[1]) / (2 * h)
        fourth = (16 * central - coarse) / 15
        now = abs(central - coarse)
        if now > 2 * shift:
            stair = max(stair, now * h)
        shift = now if math.isfinite(now) else math.inf
        if math.isfinite(fourth):
            truncation = abs(fourth - (before if math.isfinite(before) else coarse))
            rounding = 3 * 0.75 * noise / h
            if Slope(expected, fourth, truncation + rounding, typical).disagrees(tolerance):
                truncation += change(h) + stair / h
            slope = Slope(expected, fourth, truncation + rounding, typical)
            best = min(best, slope, key=lambda s: s.uncertainty)
            clear = slope.disagrees(tolerance) or slope.uncertainty <= 0.01 * tolerance * typical
            if clear or truncation <= rounding:
                break
        h, coarse, before = h / 4, central, fourth
    return best._replace(zero=zero)


def fraction(x: float, whole: float) -> float:
    """``x / whole``; 0 for 0, and infinite where only the whole is 0."""
    return 0.0 if x == 0 else x / whole if whole > 0 else math.inf


def cosine_of(x: np.ndarray, y: np.ndarray) -> float:
    """The cosine between two vectors."""
    length = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / length) if length > 0 else math.nan


def listed(names: list[str], most: int = 4) -> str:
    """Some names, as words for a message, up to a maximum number."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
