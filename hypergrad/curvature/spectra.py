"""What matvecs reveal about their matrices: dense matrices, traces, eigenvalues.

A *matvec* is any linear function ``v -> A v`` from trees to trees like them, such as those of
`hypergrad.curvature`, where the names of this module are public.

======  ===========  ===========================================================
symbol  shape        meaning
======  ===========  ===========================================================
``A``   ``(d, d)``   the matrix, symmetric; ``d`` is how many numbers a tree has
``Q``   ``(k, d)``   orthonormal rows
``T``   ``(k, k)``   ``Q A Qᵀ``, tridiagonal after ``k`` steps of Lanczos
``θ``   ``(k,)``     its eigenvalues, the Ritz values
``S``   ``(k, k)``   its eigenvectors, in columns
======  ===========  ===========================================================
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Float

from hypergrad._base.checks import called, check_chunk, check_whole
from hypergrad._base.tracing import mapped, trace_once
from hypergrad._base.trees import Key, PyTree, Scalar, describe, dot, floats, norm, power, shapes_of

Matvec = Callable[[PyTree], PyTree]
# Products are taken with `dot`: an accelerator's default keeps too few digits for orthogonal vectors.


def batched(matvec: Matvec, *, chunk: int | None = None) -> Matvec:
    """A matvec for stacks of vectors: trees whose arrays have one more axis, in front.

    Whatever does not depend on the vectors, such as the forward pass, is done once for all vectors that are
    computed together.  Without a chunk this is ``jax.vmap``.

    Args:
      matvec: for single vectors.
      chunk: vectors at a time, at least 1; by default all at once.

    Returns:
      The matvec for stacks.

    Raises:
      ValueError: if chunk is below 1.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> matvec = curvature.hessian(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]))
    >>> curvature.batched(matvec)(jnp.eye(2))
    Array([[4., 2.],
           [2., 0.]], dtype=float32)
    """
    check_chunk(called("batched(matvec", chunk), chunk)
    return Partial(partial(mapped, chunk), matvec)


def dense(matvec: Matvec, like: PyTree, *, chunk: int | None = None) -> Float[Array, "n n"]:
    """The matrix of a matvec, ``(d, d)``, in the order of ``jax.flatten_util.ravel_pytree``.

    Args:
      matvec: a linear function from trees like `like` to such trees.
      like: a tree like the parameters.
      chunk: columns at a time, at least 1; by default all at once.

    Raises:
      ValueError: if chunk is below 1, or matvec does not return a tree like `like`.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> w = jnp.array([1.0, 2.0])
    >>> curvature.dense(curvature.hessian(lambda w: w[0] ** 2 * w[1], w), w)
    Array([[4., 2.],
           [2., 0.]], dtype=float32)
    """
    call = called("dense(matvec, like", chunk)
    check_chunk(call, chunk)
    flat, product, _ = _flat(call, matvec, like)
    return mapped(chunk, product, jnp.eye(flat.size, dtype=flat.dtype)).T


def asymmetry(matvec: Matvec, like: PyTree, key: Key) -> Scalar:
    """How far a matrix is from symmetric, from two products: ``|uᵀA v - vᵀA u| / √(|A v|² + |A u|²)``.

    The vectors ``u`` and ``v`` are random, of length 1.  For symmetric matrices the result is rounding,
    about 1e-7 in float32; for others it is about ``|A - Aᵀ| / |A| / √d``, in Frobenius norms.  `lanczos`
    and conjugate gradients assume symmetry, which a loss with derivatives written by hand may lack.

    Args:
      matvec: a linear function from trees like `like` to such trees.
      like: a tree like the parameters.
      key: a JAX random key.

    Returns:
      A scalar, at least 0 and at most about 1.4; 0 for a matrix of zeros.

    Raises:
      ValueError: if matvec does not return a tree like `like`.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> rotation = lambda v: jnp.array([v[1], -v[0]])
    >>> bool(curvature.asymmetry(rotation, jnp.zeros(2), jax.random.key(0)) > 0.1)
    True
    """
    flat, product, _ = _flat("asymmetry(matvec, like, key)", matvec, like)
    u, v = (x / norm(x) for x in jax.random.normal(key, (2, flat.size), flat.dtype))
    Au, Av = product(u), product(v)
    scale = power([Au, Av])
    Au, Av = Au / scale, Av / scale
    size = norm([Au, Av])
    return jnp.abs(dot(u, Av) - dot(v, Au)) / jnp.where(size == 0, 1, size)


class Trace(NamedTuple):
    """An estimate of a trace.

    Attributes:
      value: the estimate, a scalar; unbiased.
      standard_error: of the value, a scalar estimated from the samples.
    """

    value: Scalar
    standard_error: Scalar


def trace(
    matvec: Matvec, like: PyTree, key: Key, *, samples: int, rank: int = 0, chunk: int | None = None
) -> Trace:
    """The trace of a matrix from products with random signs, ``tr A ≈ 1/m Σ_s g_sᵀ A g_s``.

    With a rank, the products with that many random vectors span a space with the basis ``Q``, on which the
    trace is computed exactly; only the rest is estimated: ``tr Q A Qᵀ + tr (I - QᵀQ) A (I - QᵀQ)``
    (Hutch++).  That pays if few eigenvalues are large, as in networks.  In total it takes ``samples +
    2 rank`` products.

    Args:
      matvec: a linear function from trees like `like` to such trees.
      like: a tree like the parameters.
      key: a JAX random key.
      samples: ``m``, at least 2.
      rank: of ``Q``, in ``[0, d]``; static.
      chunk: vectors at a time, at least 1; by default all at once.

    Returns:
      A `Trace`; exact for diagonal matrices, since signs square to 1.

    Raises:
      ValueError: if a number is out of range, or matvec does not return a tree like `like`.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989; Meyer, Musco,
    Musco, Woodruff, "Hutch++: Optimal stochastic trace estimation", SOSA 2021, algorithm 1.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> w = jnp.array([1.0, 2.0])
    >>> matvec = curvature.hessian(lambda w: jnp.sum(w**3), w)
    >>> curvature.trace(matvec, w, jax.random.key(0), samples=2)
    Trace(value=Array(18., dtype=float32), standard_error=Array(0., dtype=float32))
    """
    call = called(f"trace(matvec, like, key, samples={samples}, rank={rank}", chunk)
    check_chunk(call, chunk)
    flat, product, _ = _flat(call, matvec, like)
    check_whole(call, "samples", samples, 2, None)
    check_whole(call, "rank", rank, 0, flat.size)
    sketch_key, sample_key = jax.random.split(key)
    basis = jnp.zeros((0, flat.size), flat.dtype)
    known = jnp.zeros((), flat.dtype)
    if rank:
        sketch = jax.random.rademacher(sketch_key, (rank, flat.size), flat.dtype)
        # The estimate is unbiased for any fixed basis, and so is its derivative with the basis constant.
        products = jax.lax.stop_gradient(mapped(chunk, product, sketch))
        basis = jnp.linalg.qr((products / power(products)).T)[0].T
        known = jnp.sum(basis * mapped(chunk, product, basis))

    def sample(key: Key) -> Array:
        g = _without(basis, jax.random.rademacher(key, flat.shape, flat.dtype))
        return dot(g, product(g))

    rest = mapped(chunk, sample, jax.random.split(sample_key, samples))
    scale = power(rest)  # a standard deviation squares
    return Trace(known + jnp.mean(rest), scale * jnp.std(rest / scale, ddof=1) / math.sqrt(samples))


class Ritz(NamedTuple):
    """Eigenvalues of a symmetric matrix as ``k`` steps of Lanczos find them, in ascending order.

    Values and weights are the nodes and weights of Gauss quadrature for
    ``startᵀ f(A) start / startᵀ start``.

    Attributes:
      values: Ritz values ``θ_i``, ``(k,)``.
      weights: ``(k,)``, squared components of the normalized start along the Ritz vectors; their sum is 1.
      residuals: ``(k,)``, ``|A x_i - θ_i x_i|``; there is an eigenvalue no farther from ``θ_i`` than this.
      vectors: Ritz vectors ``x_i`` of length 1, a tree like the start with ``k`` as leading axis.
    """

    values: Float[Array, " steps"]
    weights: Float[Array, " steps"]
    residuals: Float[Array, " steps"]
    vectors: PyTree


def lanczos(matvec: Matvec, start: PyTree, *, steps: int) -> Ritz:
    """Extreme eigenvalues and eigenvectors of a symmetric matrix: ``Q A Qᵀ = T``, ``T = S diag(θ) Sᵀ``.

    ``Q`` spans ``start, A start, ..., A^(k-1) start``; every row is made orthogonal to all earlier rows,
    twice.  If that space is exhausted before the last step, the iteration continues from a random vector,
    and what it finds then has no weight.

    Args:
      matvec: a symmetric linear function from trees like `start` to such trees.
      start: a tree of floats that is not zero, usually random.
      steps: ``k``, from 1 to ``d``; all of ``Q`` is kept.

    Returns:
      A `Ritz`.  With ``k = d`` it holds all eigenvalues.

    Raises:
      ValueError: if steps is out of range, start is zero, or matvec does not return a tree like `start`.

    Source: Golub and Van Loan, "Matrix computations", 4th edition, section 10.1.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> found = curvature.lanczos(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.ones(3), steps=3)
    >>> jnp.round(found.values, 4)
    Array([1., 2., 5.], dtype=float32)
    >>> jnp.round(found.weights, 4)
    Array([0.3333, 0.3333, 0.3333], dtype=float32)
    """
    call = f"lanczos(matvec, start, steps={steps})"
    flat, product, unravel = _flat(call, matvec, start, "start")
    check_whole(call, "steps", steps, 1, flat.size)
    if not isinstance(flat, jax.core.Tracer) and not flat.any():
        raise ValueError(f"{call}: start is zero, which spans nothing; pass a random tree")
    return _lanczos(product, flat, unravel, steps)


def _lanczos(
    product: Callable[[Array], Array], start: Array, unravel: Callable[[Array], PyTree], steps: int
) -> Ritz:
    d, eps = start.size, jnp.finfo(start.dtype).eps

    def step(carry: tuple[Array, Array, Array], k: Array) -> tuple[Any, Any]:
        basis, q, scale = carry  # later rows of the basis are still 0
        basis = basis.at[k].set(q)
        w = product(q)
        a = dot(q, w)
        w = _without(basis, w)
        b = norm(w)
        scale = jnp.maximum(scale, jnp.abs(a))
        spent = b <= 10 * eps * scale

        def again() -> Array:
            random = jax.random.normal(jax.random.fold_in(jax.random.key(0), k), (d,), q.dtype)
            fresh = jax.lax.stop_gradient(_without(basis, random))
            return fresh / jnp.linalg.norm(fresh)

        q = jax.lax.cond(spent, again, lambda: w / jnp.where(spent, 1, b))
        b = jnp.where(spent, 0, b)
        return (basis, q, jnp.maximum(scale, b)), (a, b)

    empty = jnp.zeros((steps, d), start.dtype)
    start = start / norm(start)
    (basis, _, _), (a, b) = jax.lax.scan(
        step, (empty, start, jnp.zeros((), start.dtype)), jnp.arange(steps)
    )
    T = jnp.diag(a) + jnp.diag(b[:-1], 1) + jnp.diag(b[:-1], -1)
    size = power(T)
    values, S = jnp.linalg.eigh(T / size)
    return Ritz(size * values, S[0] ** 2, jnp.abs(b[-1] * S[-1]), jax.vmap(unravel)(dot(S.T, basis)))


class Spectrum(NamedTuple):
    """Gauss quadratures of the eigenvalue distribution of a symmetric matrix, from several starts.

    The trace of a function is ``tr f(A) ≈ d · mean over starts of Σ_i weights_i f(values_i)``.

    Attributes:
      values: nodes, ``(samples, steps)``.
      weights: ``(samples, steps)``; the sum of every row is 1.
    """

    values: Float[Array, "samples steps"]
    weights: Float[Array, "samples steps"]


def spectrum(
    matvec: Matvec, like: PyTree, key: Key, *, steps: int, samples: int, chunk: int | None = None
) -> Spectrum:
    """The distribution of the eigenvalues of a symmetric matrix, by `lanczos` from random starts.

    Args:
      matvec: a symmetric linear function from trees like `like` to such trees.
      like: a tree like the parameters.
      key: a JAX random key.
      steps: of Lanczos, from 1 to ``d``.
      samples: number of starts, at least 1.
      chunk: starts at a time, at least 1; by default all at once.  Each takes ``steps`` trees of memory.

    Returns:
      A `Spectrum`; see `density`.

    Raises:
      ValueError: if a number is out of range, or matvec does not return a tree like `like`.

    Source: Ghorbani, Krishnan, Xiao, "An investigation into neural net optimization via Hessian eigenvalue
    density", ICML 2019.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> A = lambda v: 2 * v
    >>> found = curvature.spectrum(A, jnp.zeros(3), jax.random.key(0), steps=1, samples=2)
    >>> jnp.round(found.values, 4).tolist(), found.weights.tolist()
    ([[2.0], [2.0]], [[1.0], [1.0]])
    """
    call = called(f"spectrum(matvec, like, key, steps={steps}, samples={samples}", chunk)
    check_chunk(call, chunk)
    flat, product, unravel = _flat(call, matvec, like)
    check_whole(call, "steps", steps, 1, flat.size)
    check_whole(call, "samples", samples, 1, None)

    def one(key: Key) -> Spectrum:
        found = _lanczos(product, jax.random.normal(key, flat.shape, flat.dtype), unravel, steps)
        return Spectrum(found.values, found.weights)

    return mapped(chunk, one, jax.random.split(key, samples))


def density(found: Spectrum, points: Float[Array, " p"], width: float | Scalar) -> Float[Array, " p"]:
    """The smoothed density of eigenvalues, ``ρ(t) = Σ_i weights_i N(t; values_i, width²)``.

    Args:
      found: a `Spectrum`.
      points: ``t``, ``(p,)``.
      width: standard deviation of the smoothing, above 0.

    Returns:
      ``ρ``, ``(p,)``, the mean over all starts; its integral over all ``t`` is 1.

    Raises:
      ValueError: if points is not ``(p,)``, or width is not above 0.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> found = curvature.Spectrum(jnp.zeros((1, 1)), jnp.ones((1, 1)))
    >>> jnp.round(curvature.density(found, jnp.array([0.0, 1.0]), 1.0), 4)
    Array([0.3989, 0.242 ], dtype=float32)
    """
    points = jnp.asarray(points)
    if points.ndim != 1:
        raise ValueError(f"density(found, points, width): points must be (p,), not {list(points.shape)}")
    if not isinstance(width, jax.core.Tracer) and not np.all(np.asarray(width) > 0):
        raise ValueError(f"density(found, points, width={width}): width must be above 0")
    from_value = points[:, None, None] - found.values[None]
    bells = jnp.exp(-0.5 * (from_value / width) ** 2) / (math.sqrt(2 * math.pi) * width)
    return jnp.mean(jnp.sum(found.weights[None] * bells, axis=2), axis=1)


def _without(basis: Float[Array, "k n"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """``(I - QᵀQ) v``, twice: the second time removes what rounding left of the components."""
    for _ in range(2):
        vector = vector - dot(dot(basis, vector), basis)
    return vector


def _flat(
    call: str, matvec: Matvec, like: PyTree, name: str = "like"
) -> tuple[Array, Callable[[Array], Array], Callable[[Array], PyTree]]:
    """A tree as one vector, the matvec on such vectors, traced once, and the way back to trees."""
    like = floats(call, name, like)
    flat, unravel = ravel_pytree(like)
    traced, result = trace_once(matvec, like)
    if shapes_of(result) != shapes_of(like):
        raise ValueError(
            f"{call}: matvec must return a tree like {name}, {describe(like)}, and returned "
            f"{describe(result)}"
        )
    return flat, lambda v: ravel_pytree(traced(unravel(v)))[0], unravel
