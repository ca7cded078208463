"""Linear systems ``A x = b`` from products with their matrices, with a residual that is always measured.

=====================  =======================================  =======================================
solver                 for                                      use it
=====================  =======================================  =======================================
`ConjugateGradients`   symmetric positive definite ``A``        **Recommended** for minimizers
`GMRES`                any ``A``; keeps ``restart`` trees       **Recommended** for roots
`Direct`               any ``A``, ``d`` up to thousands         **Recommended** if it fits
`Nystrom`              few large eigenvalues, many small        Situational: ill-conditioned minimizers
`NormalEquations`      any ``A``; squares the condition         Situational: indefinite or singular
`Neumann`              eigenvalues in ``(0, 2/α)``              Not recommended: the slowest
=====================  =======================================  =======================================

Every solver measures the residual that it leaves, relative to the right-hand side, and two numbers decide
what follows.  Below ``tolerance``, iterations stop; with 0 all of them are made.  Above ``accept``, the
result is an error; by default that is the tolerance, and with infinity every finite residual is accepted.
To stop early on purpose, as implicit MAML does after five steps of conjugate gradients, use
``ConjugateGradients(iterations=5, tolerance=0, accept=math.inf)``.

========  ================  ==========================================
symbol    name              meaning
========  ================  ==========================================
``A``     matvec            ``(d, d)``, a linear function of trees
``b``     b                 right-hand side, a tree of ``d`` numbers
``x``     x                 solution, a tree like ``b``
``ρ``     damping           added to the diagonal
``α``     step              step of the Neumann series
========  ================  ==========================================
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse import linalg
from jaxtyping import Float

from hypergrad._base.errors import ConvergenceError, error_if
from hypergrad._base.trees import PyTree, Scalar, describe, dot, floats, norm, power, shapes_of, sub
from hypergrad.curvature.spectra import Matvec, dense


class Solved(NamedTuple):
    """The result of a linear solver.

    Attributes:
      x: the solution, a tree like the right-hand side.
      residual: scalar, ``|b - A x| / |b|`` of the equation that the solver solves; ``|A x|`` if ``b`` is 0.
    """

    x: PyTree
    residual: Scalar

    def over(self, scale: Scalar) -> "Solved":
        """The solution divided by the scale by which the matrix was divided before."""
        return Solved(_times(1 / scale, self.x), self.residual)


class LinearSolver(Protocol):
    """A solver of ``A x = b``: a function from a matvec, ``b`` and a start to `Solved`.

    Unless ``b`` is 0, it is scaled so that its largest entry is 1 in size, and the start is scaled with it.
    A start that is worse than 0 is replaced by 0.
    """

    @property
    def tolerance(self) -> float | Array | None:
        """The residual at which iterations stop; None is the square root of the machine epsilon."""

    @property
    def accept(self) -> float | Array | None:
        """The largest residual that is not an error; None is the tolerance, but never 0."""

    @property
    def advice(self) -> str:
        """What to do if the residual is larger, for messages."""

    def __call__(self, matvec: Matvec, b: PyTree, start: PyTree) -> Solved:
        """Solve.

        Args:
          matvec: ``A``, a linear function from trees like ``b`` to such trees.
          b: right-hand side, a tree of floats.
          start: where iterations start, a tree like ``b``.
        """


@dataclass(frozen=True)
class ConjugateGradients:
    """Conjugate gradients for ``(A + ρ I) x = b``, with ``A + ρ I`` symmetric positive definite.

    The residual is that of the damped system: how damping changes the solution is not measured.

    Args:
      iterations: most iterations, at least 1; each is one product with ``A``.
      tolerance: in [0, 1), the residual at which to stop, relative to ``b``; None is the square root of the
        machine epsilon, 0.00035 in float32 and 1.5e-8 in float64.  With 0 all iterations are made.
      damping: ``ρ``, at least 0.
      accept: above 0, the largest residual that is not an error; ``math.inf`` for any.  None is the
        tolerance, or the square root of the machine epsilon if the tolerance is 0.

    Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952; for
    hypergradients Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016; damped,
    Rajeswaran et al., "Meta-learning with implicit gradients", NeurIPS 2019.

    >>> import jax.numpy as jnp
    >>> from hypergrad import implicit
    >>> matvec = lambda v: jnp.array([1.0, 4.0]) * v
    >>> x = implicit.linear_solve(matvec, jnp.array([1.0, 2.0]), linear=implicit.ConjugateGradients())
    >>> jnp.round(x, 4)
    Array([1. , 0.5], dtype=float32)
    """

    iterations: int = 1000
    tolerance: float | Array | None = None
    damping: float = 0.0
    accept: float | Array | None = None

    advice: ClassVar[str] = (
        "allow more iterations; where the matrix is not symmetric positive definite, as at saddle points, "
        "add damping or use GMRES() or NormalEquations()"
    )

    def __post_init__(self) -> None:
        _check(self, iterations=(self.iterations, 1), damping=(self.damping, 0))
        _check_stop(self)

    def __call__(self, matvec: Matvec, b: PyTree, start: PyTree) -> Solved:
        """See `LinearSolver`."""
        scale, product = _unscaled(_damped(matvec, self.damping), b)
        # The running residual of the iteration is not exactly the true one, hence half the tolerance.
        settings = {"tol": _tolerance(self, b) / 2, "maxiter": self.iterations}
        x, _ = linalg.cg(product, b, _times(scale, start), **settings)
        return _measured(product, b, x).over(scale)


@dataclass(frozen=True)
class NormalEquations:
    """Conjugate gradients for ``(A Aᵀ + ρ I) y = b``, ``x = Aᵀ y``, for any square ``A`` (Craig's method).

    Without damping, the residual is that of ``A x = b``.  With damping, ``x`` minimizes
    ``|A x - b|² + ρ |x - start|²``.

    Args:
      iterations: most iterations, at least 1; each is one product with ``A`` and one with ``Aᵀ``.
      tolerance: as for `ConjugateGradients`.
      damping: ``ρ``, at least 0; needed if ``A`` is singular.
      accept: as for `ConjugateGradients`.

    Source: Saad, "Iterative methods for sparse linear systems", 2nd edition, section 8.3.

    >>> import jax.numpy as jnp
    >>> from hypergrad import implicit
    >>> matvec = lambda v: jnp.array([1.0, -4.0]) * v
    >>> x = implicit.linear_solve(matvec, jnp.array([1.0, 2.0]), linear=implicit.NormalEquations())
    >>> jnp.round(x, 4)
    Array([ 1. , -0.5], dtype=float32)
    """

    iterations: int = 1000
    tolerance: float | Array | None = None
    damping: float = 0.0
    accept: float | Array | None = None

    advice: ClassVar[str] = "allow more iterations; where the matrix is singular, add damping"

    def __post_init__(self) -> None:
        _check(self, iterations=(self.iterations, 1), damping=(self.damping, 0))
        _check_stop(self)

    def __call__(self, matvec: Matvec, b: PyTree, start: PyTree) -> Solved:
        """See `LinearSolver`."""
        scale, product = _unscaled(matvec, b)
        transposed, start = jax.linear_transpose(product, b), _times(scale, start)
        squared = _damped(lambda y: product(transposed(y)[0]), self.damping / scale / scale)
        rest = sub(b, product(start))
        limit = _tolerance(self, b) / 2 * norm(b)
        y, _ = linalg.cg(squared, rest, tol=0.0, atol=limit, maxiter=self.iterations)
        x = jax.tree.map(jnp.add, start, transposed(y)[0])
        return Solved(x, norm(sub(rest, squared(y))) / _or_one(norm(b))).over(scale)


@dataclass(frozen=True)
class Neumann:
    """The Neumann series, ``x = α Σ_{k<K} (I - α A)^k b``.

    It converges if all eigenvalues of ``α A`` lie less than 1 from 1.  At the solution, it equals the
    result of differentiating the last ``K`` steps of gradient descent with the learning rate ``α``.

    Args:
      step: ``α``, at least 0; for a Hessian below ``2 / its largest eigenvalue``.
      terms: ``K``, at least 1; each is one product with ``A``.
      tolerance: the default of ``accept``, as for `ConjugateGradients`; nothing stops early.
      accept: above 0, the largest residual that is not an error; ``math.inf`` for any.

    Source: Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS 2020, section 3.

    >>> import jax.numpy as jnp
    >>> from hypergrad import implicit
    >>> matvec, neumann = lambda v: jnp.array([1.0, 2.0]) * v, implicit.Neumann(step=0.5, terms=20)
    >>> x = implicit.linear_solve(matvec, jnp.array([1.0, 2.0]), linear=neumann)
    >>> bool(jnp.allclose(x, 1, atol=1e-3))
    True
    """

    step: float
    terms: int
    tolerance: float | Array | None = None
    accept: float | Array | None = None

    advice: ClassVar[str] = (
        "take more terms; if it grows with them, step is above 2 / (largest eigenvalue), or there are "
        "eigenvalues that are not positive"
    )

    def __post_init__(self) -> None:
        _check(self, terms=(self.terms, 1), step=(self.step, 0))

    def __call__(self, matvec: Matvec, b: PyTree, start: PyTree) -> Solved:
        """See `LinearSolver`."""

        def add(_: Any, x: PyTree) -> PyTree:
            return jax.tree.map(lambda x, b, y: x + self.step * (b - y), x, b, matvec(x))

        return _measured(matvec, b, jax.lax.fori_loop(0, self.terms, add, start))


@dataclass(frozen=True)
class GMRES:
    """Generalized minimal residuals, ``min |A x - b|`` over Krylov spaces, for any square ``A``.

    Args:
      restart: at least 1, the dimension of a space, and how many trees are kept; with ``d`` the solution is
        exact.
      cycles: most spaces, at least 1; each takes ``restart`` products with ``A``.
      tolerance: as for `ConjugateGradients`.
      accept: as for `ConjugateGradients`.

    Source: Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric
    linear systems", SIAM J. Sci. Stat. Comput. 1986; for hypergradients Blondel et al., "Efficient and
    modular implicit differentiation", NeurIPS 2022.

    >>> import jax.numpy as jnp
    >>> from hypergrad import implicit
    >>> x = implicit.linear_solve(lambda v: jnp.roll(v, 1), jnp.arange(3.0), linear=implicit.GMRES())
    >>> bool(jnp.allclose(x, jnp.array([1.0, 2.0, 0.0]), atol=1e-3))
    True
    """

    restart: int = 20
    cycles: int = 50
    tolerance: float | Array | None = None
    accept: float | Array | None = None

    advice: ClassVar[str] = "use a longer restart, or more cycles; Direct() where the matrix is small"

    def __post_init__(self) -> None:
        _check(self, restart=(self.restart, 1), cycles=(self.cycles, 1))
        _check_stop(self)

    def __call__(self, matvec: Matvec, b: PyTree, start: PyTree) -> Solved:
        """See `LinearSolver`."""
        scale, product = _unscaled(matvec, b)
        settings = {"restart": self.restart, "maxiter": self.cycles, "solve_method": "incremental"}
        x, _ = linalg.gmres(product, b, _times(scale, start), tol=_tolerance(self, b) / 2, **settings)
        return _measured(product, b, x).over(scale)


@dataclass(frozen=True)
class Nystrom:
    """A Nyström approximation of a positive semidefinite ``A``, refined by conjugate gradients.

    ``P = Uᵀ diag(1/(λ + ρ)) U + (I - Uᵀ U)/ρ``, with the eigenvalues ``λ`` and eigenvectors ``U`` of
    ``A Ω (Ωᵀ A Ω)⁻¹ Ωᵀ A`` for a random ``Ω``, ``(d, rank)``.  Conjugate gradients for ``A x = b``,
    preconditioned by ``P``, start from ``x = P b``; the residual is that of ``A x = b``.

    Args:
      rank: at least 1, the number of products with ``A`` for the approximation, and of trees that are kept.
      damping: ``ρ``, above 0: the size of the eigenvalues that are not among the largest ``rank``.
      iterations: most iterations of the refinement, each one product; 0 for the approximation alone.
      tolerance: as for `ConjugateGradients`.
      seed: of ``Ω``, a whole number.
      accept: as for `ConjugateGradients`.

    Source: Hataya and Yamada, "Nyström method for accurate and scalable implicit differentiation", AISTATS
    2023; Frangella, Tropp, Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 2023.

    >>> import jax.numpy as jnp
    >>> from hypergrad import implicit
    >>> matvec, nystrom = lambda v: jnp.array([1e4, 1.0, 1.0]) * v, implicit.Nystrom(rank=1, damping=1.0)
    >>> x = implicit.linear_solve(matvec, jnp.array([1e4, 1.0, 2.0]), linear=nystrom)
    >>> bool(jnp.allclose(x, jnp.array([1.0, 1.0, 2.0]), atol=1e-2))
    True
    """

    rank: int
    damping: float
    iterations: int = 1000
    tolerance: float | Array | None = None
    seed: int = 0
    accept: float | Array | None = None

    advice: ClassVar[str] = (
        "use a higher rank or more iterations; the matrix must be symmetric positive semidefinite"
    )

    def __post_init__(self) -> None:
        _check(self, rank=(self.rank, 1), iterations=(self.iterations, 0), damping=(self.damping, 0))
        if self.damping == 0:
            raise ValueError(f"{self!r}: damping must be above 0, since P divides by it")
        _check_stop(self)

    def __call__(self, matvec: Matvec, b: PyTree, start: PyTree) -> Solved:
        """See `LinearSolver`."""
        scale, unscaled = _unscaled(matvec, b)
        flat, product, unravel = _flat(unscaled, b)
        damping = self.damping / scale
        shape = (flat.size, min(self.rank, flat.size))
        random = jax.random.normal(jax.random.key(self.seed), shape, flat.dtype)
        omega = jnp.linalg.qr(random)[0].T  # rows from here on
        sketch = jax.lax.map(product, omega)
        # A little is added to the diagonal for the Cholesky factor, and subtracted from the eigenvalues.
        shift = jnp.finfo(flat.dtype).eps * norm(sketch)
        sketch = sketch + shift * omega
        lower = jnp.linalg.cholesky(dot(omega, sketch.T))
        half = jax.scipy.linalg.solve_triangular(lower, sketch, lower=True)
        _, sizes, U = jnp.linalg.svd(half, full_matrices=False)
        eigenvalues = jnp.maximum(sizes**2 - shift, 0)

        def inverse(v: Array) -> Array:
            inside, rest = dot(U, v), 1 / damping
            return dot(inside * (1 / (eigenvalues + damping) - rest), U) + v * rest

        first = ravel_pytree(_times(scale, start))[0]
        x = first + inverse(flat - product(first))
        if self.iterations:
            settings = {"tol": _tolerance(self, b) / 2, "maxiter": self.iterations, "M": inverse}
            x, _ = linalg.cg(product, flat, x, **settings)
        return _measured(unscaled, b, unravel(x)).over(scale)


@dataclass(frozen=True)
class Direct:
    """LU factors of the matrix itself, ``(d, d)`` in memory, for any ``A``.

    Args:
      largest: at least 1, the largest ``d`` that is not refused.
      tolerance: the default of ``accept``, as for `ConjugateGradients`.
      accept: above 0, the largest residual that is not an error; ``math.inf`` for any.

    >>> import jax.numpy as jnp
    >>> from hypergrad import implicit
    >>> implicit.linear_solve(lambda v: v[::-1] * 2, jnp.array([2.0, 4.0]), linear=implicit.Direct())
    Array([2., 1.], dtype=float32)
    """

    largest: int = 5000
    tolerance: float | Array | None = None
    accept: float | Array | None = None

    advice: ClassVar[str] = "the matrix is singular or nearly so; use NormalEquations(damping=...)"

    def __post_init__(self) -> None:
        _check(self, largest=(self.largest, 1))

    def __call__(self, matvec: Matvec, b: PyTree, start: PyTree) -> Solved:
        """See `LinearSolver`."""
        flat, _, unravel = _flat(matvec, b)
        if flat.size > self.largest:
            raise ValueError(
                f"{self!r}: there are {flat.size} unknowns, whose matrix takes "
                f"{flat.size**2 * flat.dtype.itemsize / 2**20:,.0f} MiB; use ConjugateGradients() or "
                "GMRES(), or allow it with Direct(largest=...)"
            )
        return _measured(matvec, b, unravel(jnp.linalg.solve(dense(matvec, b), flat)))


def linear_solve(
    matvec: Matvec, b: PyTree, start: PyTree = None, *, linear: LinearSolver | None = None
) -> PyTree:
    """The solution of ``A x = b``, or an error; not to be differentiated.

    Args:
      matvec: ``A``, a linear function from trees like `b` to such trees.
      b: right-hand side, a tree of floats.
      start: where iterations start, a tree like `b`; by default 0.
      linear: the solver, by default `ConjugateGradients`.

    Returns:
      ``x``, a tree like `b`.

    Raises:
      ConvergenceError: if the residual is above what the solver accepts, or not finite.  Inside compiled
        code JAX raises a ``JaxRuntimeError`` that quotes it.
      ValueError: if the trees do not fit.
      TypeError: if the trees are not floats.

    >>> import jax.numpy as jnp
    >>> from hypergrad import implicit
    >>> implicit.linear_solve(lambda v: 2 * v, jnp.array([2.0, 4.0]))
    Array([1., 2.], dtype=float32)
    """
    linear = ConjugateGradients() if linear is None else linear
    call = f"linear_solve(linear={named(linear)})"
    b = floats(call, "b", b)
    if start is not None and shapes_of(floats(call, "start", start)) != shapes_of(b):
        raise ValueError(f"{call}: start must be like b, {describe(b)}, and is {describe(start)}")
    return solve_or_refuse(call, linear, matvec, b, start)


def solve_or_refuse(
    call: str, linear: LinearSolver, matvec: Matvec, b: PyTree, start: PyTree = None
) -> PyTree:
    """`linear_solve` without the checks of its arguments.

    Args:
      call: the user's call, for messages.
      linear: the solver.
      matvec: as for `linear_solve`.
      b: as for `linear_solve`.
      start: as for `linear_solve`.
    """
    # The largest entry of b is scaled to 1: the squares of small numbers are 0 in float32.
    sizes = [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(b) if x.size]
    scale = _or_one(jnp.max(jnp.stack(sizes))) if sizes else jnp.ones(())
    b, zero = jax.tree.map(lambda x: (x / scale).astype(x.dtype), b), jax.tree.map(jnp.zeros_like, b)
    if start is None:
        start = zero
    else:
        start = jax.tree.map(lambda x: (x / scale).astype(x.dtype), start)
        better = norm(sub(b, matvec(start))) <= norm(b)  # than 0
        start = jax.tree.map(lambda x, zero: jnp.where(better, x, zero), start, zero)
    x, residual = linear(matvec, b, start)

    def explain(residual: float, accepted: float) -> str | None:
        if residual <= accepted and residual < math.inf:  # and so not NaN
            return None
        return (
            f"{call}: {type(linear).__name__} left a relative residual of {residual:.2g}, above the "
            f"{accepted:.2g} that it accepts: {linear.advice}; or accept more with accept=..., and what is "
            "cut short on purpose with tolerance=0, accept=math.inf"
        )

    x = jax.tree.map(lambda x: (scale * x).astype(x.dtype), x)
    return error_if(explain, x, residual, jnp.asarray(_accepted(linear, b)), error=ConvergenceError)


def named(linear: LinearSolver) -> str:
    """The solver as text for messages, without numbers that are traced."""
    numbers = {"tolerance": linear.tolerance, "accept": getattr(linear, "accept", None)}
    traced = {name: None for name, x in numbers.items() if isinstance(x, jax.core.Tracer)}
    return repr(replace(linear, **traced)) if traced else repr(linear)  # type: ignore[type-var]


def _tolerance(linear: LinearSolver, b: PyTree) -> Any:
    return _strict(b) if linear.tolerance is None else linear.tolerance


def _strict(b: PyTree) -> float:
    """The square root of the machine epsilon."""
    return max(float(jnp.finfo(x.dtype).eps) ** 0.5 for x in jax.tree.leaves(b))


def _accepted(linear: LinearSolver, b: PyTree) -> Any:
    accept = getattr(linear, "accept", None)  # a user's own solver need not have it
    if accept is not None:
        return accept
    tolerance = _tolerance(linear, b)
    return jnp.where(jnp.asarray(tolerance) == 0, _strict(b), tolerance)


def _known(number: Any) -> bool:
    return number is not None and not isinstance(number, jax.core.Tracer)


def _check_stop(solver: Any) -> None:
    """Refuse a tolerance that stops before the first iteration."""
    if _known(solver.tolerance) and not solver.tolerance < 1:
        raise ValueError(
            f"{solver!r}: tolerance must be below 1: 0 is a solution with the residual 1, where iterations "
            "would stop at once; to make all iterations and accept what comes out, use tolerance=0, "
            "accept=math.inf"
        )


def _check(solver: Any, **numbers: tuple[Any, float]) -> None:
    """Refuse settings of a solver below the smallest that make sense."""
    if _known(solver.tolerance) and not solver.tolerance >= 0:
        raise ValueError(f"{solver!r}: tolerance must be at least 0")
    if _known(solver.accept) and not solver.accept > 0:
        raise ValueError(f"{solver!r}: accept must be above 0; math.inf accepts anything that is finite")
    for name, (number, least) in numbers.items():
        if isinstance(number, jax.core.Tracer) or number >= least:
            continue
        raise ValueError(f"{solver!r}: {name} must be at least {least}")


def _damped(matvec: Matvec, damping: float | Array) -> Matvec:
    return lambda v: jax.tree.map(lambda y, x: (y + damping * x).astype(x.dtype), matvec(v), v)


def _unscaled(matvec: Matvec, b: PyTree) -> tuple[Array, Matvec]:
    """A power of two near the size of a matrix, and the matvec of that matrix divided by it.

    Iterations square products, and the squares for a matrix of size 1e-20 would be 0 in float32.
    """
    scale = power(matvec(b))
    return scale, lambda v: _times(1 / scale, matvec(v))


def _times(factor: Scalar, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def _measured(matvec: Matvec, b: PyTree, x: PyTree) -> Solved:
    return Solved(x, norm(sub(b, matvec(x))) / _or_one(norm(b)))


def _or_one(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)


def _flat(
    matvec: Matvec, b: PyTree
) -> tuple[
    Float[Array, " n"], Callable[[Float[Array, " n"]], Float[Array, " n"]], Callable[[Array], PyTree]
]:
    flat, unravel = ravel_pytree(b)
    return flat, lambda v: ravel_pytree(matvec(unravel(v)))[0], unravel
