"""Roots with derivatives that stay finite where those of `jax.numpy` do not.

======  ===================  =================================================
symbol  shape                meaning
======  ===================  =================================================
``A``   (n, n)               symmetric, eigenvalues ``λ_i > 0``
``Q``   (n, n)               its orthonormal eigenvectors, in columns
``r``   (n,)                 ``λ_i^(1/p)``
``F``   (n, n)               divided differences of ``λ -> λ^(-1/p)``
``L``   (n, n)               Cholesky factor, ``L Lᵀ = A``, lower triangular
======  ===================  =================================================
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._base.trees import dot


def sqrt(x: Array) -> Array:
    """``√x``, whose derivative at 0 is 0; also 0 for ``x < 0``, which a sum of squares is only by rounding.

    A coordinate whose gradient is always 0 keeps a second moment of 0 whatever the hyperparameters are, so
    the derivative through its root is 0, and not the ``0 · ∞`` of the chain rule.

    >>> import jax
    >>> [float(jax.grad(sqrt)(x)) for x in (0.0, 0.25)]
    [0.0, 1.0]
    """
    dead = x <= 0  # and so not NaN
    return jnp.where(dead, 0, jnp.sqrt(jnp.where(dead, 1, x)))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def inverse_root(matrix: Array, p: int) -> Array:
    """``A^(-1/p)`` of a symmetric positive definite matrix.

    Its derivative is also correct for equal eigenvalues, where that of ``jnp.linalg.eigh`` is not finite.
    It uses the divided differences of ``λ^(-1/p)`` (Daleckii and Krein)::

        d(A^(-1/p)) = Q (F ∘ Qᵀ dA Q) Qᵀ,   F_ij = (1/r_i - 1/r_j) / (r_i^p - r_j^p)
                                                 = -1 / (r_i r_j Σ_k r_i^k r_j^(p-1-k)),  k = 0 ... p-1,

    whose second form has no difference in it.

    Args:
      matrix: ``A``, (n, n); its lower and upper triangle are averaged. Eigenvalues below the rounding error
        of the largest are replaced by that error.
      p: static, at least 1.

    Source: Higham, "Functions of Matrices", 2008, section 3.2.

    >>> import jax, jax.numpy as jnp
    >>> inverse_root(16.0 * jnp.eye(2), 4)
    Array([[0.5, 0. ],
           [0. , 0.5]], dtype=float32)
    >>> bool(jnp.isfinite(jax.jacobian(lambda a: inverse_root(a, 4))(jnp.eye(2))).all())
    True
    """
    root, Q = _eigen_root(matrix, p)
    return dot(Q / root[None], Q.T)


@inverse_root.defjvp
def _inverse_root_jvp(p: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root, Q = _eigen_root(primals[0], p)
    r, s = root[:, None], root[None]
    F = -1 / (r * s * sum(r**k * s ** (p - 1 - k) for k in range(p)))
    change = dot(dot(Q.T, (tangents[0] + tangents[0].T) / 2), Q)
    return dot(Q / s, Q.T), dot(dot(Q, F * change), Q.T)


@jax.custom_jvp
def inverse(matrix: Array) -> Array:
    """``A⁻¹ = L⁻ᵀ L⁻¹`` of a symmetric positive definite matrix, with ``d(A⁻¹) = -A⁻¹ dA A⁻¹``.

    ``L⁻¹`` is assembled from the inverses of diagonal blocks, which double in size each time::

        (P 0; Q R)⁻¹ = (P⁻¹ 0; -R⁻¹ Q P⁻¹ R⁻¹)

    by products of matrices only: on a busy CPU, LAPACK's threads have been a hundred times slower.

    Args:
      matrix: ``A``, (n, n); its lower and upper triangle are averaged.

    Source: Higham, "Accuracy and stability of numerical algorithms", 2002, section 14.2.

    >>> import jax.numpy as jnp
    >>> inverse(jnp.diag(jnp.array([4.0, 16.0])))
    Array([[0.25  , 0.    ],
           [0.    , 0.0625]], dtype=float32)
    """
    n = len(matrix)
    if not n:
        return matrix
    L = jnp.linalg.cholesky(matrix)
    size = 1 << (n - 1).bit_length()
    L = jnp.eye(size, dtype=L.dtype).at[:n, :n].set(L)
    inverses = (1 / jnp.diagonal(L))[:, None, None]
    while len(inverses) > 1:
        P, R = inverses[0::2], inverses[1::2]
        blocks, half = P.shape[:2]
        k = jnp.arange(blocks)
        Q = L.reshape(blocks, 2 * half, blocks, 2 * half)[k, half:, k, :half]
        lower = jnp.concatenate([-dot(dot(R, Q), P), R], axis=2)
        inverses = jnp.concatenate([jnp.concatenate([P, jnp.zeros_like(Q)], axis=2), lower], axis=1)
    whole = inverses[0, :n, :n]
    return dot(whole.T, whole)


@inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    B = inverse(primals[0])
    return B, -dot(dot(B, tangents[0]), B)


def _eigen_root(matrix: Array, p: int) -> tuple[Array, Array]:
    """``r`` and ``Q``."""
    if not matrix.size:
        return jnp.zeros(0, matrix.dtype), matrix
    eigenvalues, Q = jnp.linalg.eigh((matrix + matrix.T) / 2, symmetrize_input=False)
    rounding = jnp.finfo(matrix.dtype).eps * jnp.max(eigenvalues)
    return jnp.maximum(eigenvalues, rounding) ** (1 / p), Q
