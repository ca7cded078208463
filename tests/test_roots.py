"""Roots and inverses of matrices, and their derivatives, against SciPy, NumPy and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from hypergrad._base import trees
from hypergrad.optimizers import roots


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("eigenvalues", [[1.0, 2.0, 5.0], [2.0, 2.0, 2.0], [1e-6, 1e-6, 3.0]], ids=str)
@pytest.mark.usefixtures("x64")
def test_inverse_root(p: int, eigenvalues: list[float]) -> None:
    """Against SciPy; its derivative against differences, forwards, backwards and in a batch."""
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    A = jnp.asarray(Q @ np.diag(eigenvalues) @ Q.T)
    change = jnp.asarray(rng.normal(size=(3, 3)))
    change = (change + change.T) / 2
    expected = scipy.linalg.fractional_matrix_power(np.asarray(A), -1 / p)
    np.testing.assert_allclose(
        roots.inverse_root(A, p), expected, rtol=1e-9, atol=1e-9 * abs(expected).max()
    )

    _, forwards = jax.jvp(lambda a: roots.inverse_root(a, p), (A,), (change,))
    h = 1e-4 * min(eigenvalues)
    differences = (roots.inverse_root(A + h * change, p) - roots.inverse_root(A - h * change, p)) / (2 * h)
    scale = float(jnp.abs(forwards).max())
    np.testing.assert_allclose(forwards, differences, atol=1e-6 * scale)
    cotangent = jnp.asarray(rng.normal(size=(3, 3)))
    (backwards,) = jax.vjp(lambda a: roots.inverse_root(a, p), A)[1](cotangent)
    assert float(jnp.vdot(cotangent, forwards)) == pytest.approx(
        float(jnp.vdot(backwards, change)), rel=1e-9
    )
    batch = jax.vmap(lambda a: jax.jvp(lambda a: roots.inverse_root(a, p), (a,), (change,))[1])(
        jnp.stack([A, 2 * A])
    )
    np.testing.assert_allclose(batch[0], forwards, atol=1e-9 * scale)


def test_inverse_root_of_a_matrix_singular_up_to_rounding() -> None:
    g = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1)), jnp.float32)
    found, derivative = jax.value_and_grad(lambda g: jnp.sum(roots.inverse_root(g @ g.T, 4)))(1e3 * g)
    assert bool(jnp.isfinite(found)) and bool(jnp.all(jnp.isfinite(derivative)))


def test_root_and_norm_at_zero() -> None:
    for function in (roots.sqrt, lambda x: trees.norm(x[None])):
        value, slope = jax.value_and_grad(function)(jnp.float32(0.0))
        assert float(value) == 0.0 and float(slope) == 0.0
    assert float(jax.grad(roots.sqrt)(jnp.float32(4.0))) == 0.25
    np.testing.assert_allclose(jax.grad(trees.norm)(jnp.array([[3.0, 4.0]])), [[0.6, 0.8]], rtol=1e-6)


@pytest.mark.quick("0", "1", "7")
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 13])
@pytest.mark.usefixtures("x64")
def test_inverse_of_any_size(n: int) -> None:
    rng = np.random.default_rng(n)
    B = rng.normal(size=(n, n))
    A, change = B @ B.T + np.eye(n), rng.normal(size=(n, n))
    expected = np.linalg.inv(A) if n else A
    np.testing.assert_allclose(roots.inverse(jnp.asarray(A)), expected, rtol=1e-9, atol=1e-12)
    _, found = jax.jvp(roots.inverse, (jnp.asarray(A),), (jnp.asarray(change),))
    np.testing.assert_allclose(found, -expected @ change @ expected, rtol=1e-8, atol=1e-12)
