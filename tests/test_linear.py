"""Linear solvers that are cut short, and systems of very large and very small numbers, against NumPy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from hypergrad import implicit

ANY: Any = {"tolerance": 0, "accept": math.inf}
RNG = np.random.default_rng(0)
SQUARE = RNG.normal(size=(8, 8))
POSITIVE = SQUARE @ SQUARE.T + np.eye(8)
B = RNG.normal(size=8)


def solved(matrix: np.ndarray, b: Any, linear: Any, start: Any = None) -> Array:
    A = jnp.asarray(matrix)
    return jax.jit(lambda b: implicit.linear_solve(lambda v: A @ v, b, start, linear=linear))(
        jnp.asarray(b)
    )


def conjugate_gradients(A: np.ndarray, b: np.ndarray, steps: int, x: np.ndarray) -> np.ndarray:
    """Hestenes and Stiefel's, as in the textbook."""
    r = b - A @ x
    p = r
    for _ in range(steps):
        alpha = (r @ r) / (p @ A @ p)
        x, old = x + alpha * p, r
        r = r - alpha * A @ p
        p = r + (r @ r) / (old @ old) * p
    return x


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_conjugate_gradients_cut_short_are_so_many_plain_steps(x64: None, steps: int) -> None:
    zero = np.zeros(8)
    found = solved(POSITIVE, B, implicit.ConjugateGradients(iterations=steps, **ANY))
    np.testing.assert_allclose(found, conjugate_gradients(POSITIVE, B, steps, zero), rtol=1e-9)
    damped = solved(POSITIVE, B, implicit.ConjugateGradients(iterations=steps, damping=0.5, **ANY))
    expected = conjugate_gradients(POSITIVE + 0.5 * np.eye(8), B, steps, zero)
    np.testing.assert_allclose(damped, expected, rtol=1e-9)
    normal = solved(SQUARE, B, implicit.NormalEquations(iterations=steps, **ANY))
    expected = SQUARE.T @ conjugate_gradients(SQUARE @ SQUARE.T, B, steps, zero)
    np.testing.assert_allclose(normal, expected, rtol=1e-8)


def test_conjugate_gradients_cut_short_start_where_they_are_told(x64: None) -> None:
    start = np.linalg.solve(POSITIVE, B) + 0.01
    found = solved(POSITIVE, B, implicit.ConjugateGradients(iterations=3, **ANY), jnp.asarray(start))
    np.testing.assert_allclose(found, conjugate_gradients(POSITIVE, B, 3, start), rtol=1e-9)


@pytest.mark.parametrize("terms", [1, 4])
def test_a_neumann_series_cut_short_is_its_first_terms(x64: None, terms: int) -> None:
    step = 1 / np.linalg.norm(POSITIVE, 2)
    power, total = B, np.zeros(8)
    for _ in range(terms):
        total = total + step * power
        power = power - step * POSITIVE @ power
    found = solved(POSITIVE, B, implicit.Neumann(step=step, terms=terms, accept=math.inf))
    np.testing.assert_allclose(found, total, rtol=1e-10)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_gmres_cut_short_is_the_least_residual_in_the_krylov_space(x64: None, size: int) -> None:
    krylov = np.stack([np.linalg.matrix_power(SQUARE, k) @ B for k in range(size)], axis=1)
    basis = np.linalg.qr(krylov)[0]
    expected = basis @ np.linalg.lstsq(SQUARE @ basis, B)[0]
    found = solved(SQUARE, B, implicit.GMRES(restart=size, cycles=1, **ANY))
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_nystrom_cut_short_is_so_many_preconditioned_steps(x64: None) -> None:
    # Of full rank its preconditioner is (A + ρ)⁻¹, whatever the random vectors.
    P = np.linalg.inv(POSITIVE + 2.0 * np.eye(8))
    x = P @ B
    r = B - POSITIVE @ x
    z = p = P @ r
    for _ in range(2):
        alpha = (r @ z) / (p @ POSITIVE @ p)
        x, r_new = x + alpha * p, r - alpha * POSITIVE @ p
        z_new = P @ r_new
        p, r, z = z_new + (r_new @ z_new) / (r @ z) * p, r_new, z_new
    found = solved(POSITIVE, B, implicit.Nystrom(rank=8, damping=2.0, iterations=2, **ANY))
    np.testing.assert_allclose(found, x, rtol=1e-7)


def test_truncated_conjugate_gradients_in_a_hypergradient(x64: None) -> None:
    """Implicit MAML's hypergradient: five steps for the adjoint, whatever the residual."""
    A = jnp.asarray(POSITIVE)
    linear = implicit.ConjugateGradients(iterations=3, **ANY)
    fit = implicit.minimizer(lambda w, theta: w @ A @ w / 2 - w @ theta, linear=linear)(
        lambda init, theta: jnp.linalg.solve(A, theta)
    )
    found = jax.grad(lambda theta: jnp.sum(fit(jnp.zeros(8), theta)))(jnp.asarray(B))
    np.testing.assert_allclose(found, conjugate_gradients(POSITIVE, np.ones(8), 3, np.zeros(8)), rtol=1e-9)
    assert np.abs(found - np.linalg.solve(POSITIVE, np.ones(8))).max() > 1e-2


def test_early_stops_and_acceptance_are_two_numbers(x64: None) -> None:
    loose = implicit.ConjugateGradients(tolerance=0.5)  # stops early, and is accepted
    assert 1e-3 < np.linalg.norm(B - POSITIVE @ solved(POSITIVE, B, loose)) / np.linalg.norm(B) <= 0.5
    exact = implicit.ConjugateGradients(iterations=8, tolerance=0)  # all steps, and as strict as ever
    np.testing.assert_allclose(solved(POSITIVE, B, exact), np.linalg.solve(POSITIVE, B), rtol=1e-6)
    for strict in (
        implicit.ConjugateGradients(tolerance=0.5, accept=1e-6),
        implicit.ConjugateGradients(iterations=2, tolerance=0),
    ):
        with pytest.raises(implicit.ConvergenceError, match="that it accepts"):
            implicit.linear_solve(lambda v: POSITIVE @ v, jnp.asarray(B), linear=strict)


def test_what_is_not_finite_is_never_accepted() -> None:
    linear = implicit.Neumann(step=1e3, terms=50, accept=math.inf)
    with pytest.raises(implicit.ConvergenceError, match=r"residual of (inf|nan), above"):
        implicit.linear_solve(lambda v: 10 * v, jnp.ones(3), linear=linear)


def test_a_solver_of_the_users_own_needs_no_accept() -> None:
    class Halves:
        tolerance = 1e-3
        advice = "none"

        def __call__(self, matvec: Any, b: Any, start: Any) -> implicit.Solved:
            return implicit.Solved(b / 2, jnp.asarray(0.0))

    found = implicit.linear_solve(lambda v: 2 * v, jnp.ones(3), linear=Halves())  # type: ignore[arg-type]
    assert found.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.quick("1e-30-1e-30", "1e+30-1e+30")
@pytest.mark.parametrize("of_matrix, of_b", [(1e-30, 1e-30), (1e-20, 1e10), (1e19, 1e-10), (1e30, 1e30)])
def test_systems_of_any_size_in_float32(of_matrix: float, of_b: float) -> None:
    expected = np.linalg.solve(POSITIVE, B) * (of_b / of_matrix)
    for linear in (
        implicit.ConjugateGradients(),
        implicit.NormalEquations(),
        implicit.GMRES(),
        implicit.Nystrom(rank=4, damping=of_matrix),
        implicit.Neumann(step=1 / of_matrix / np.linalg.norm(POSITIVE, 2), terms=300),
        implicit.Direct(),
    ):
        A = jnp.asarray(POSITIVE * of_matrix, jnp.float32)
        found = implicit.linear_solve(
            lambda v: jnp.matmul(A, v, precision="highest"),  # noqa: B023
            jnp.asarray(B * of_b, jnp.float32),
            linear=linear,
        )
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(
            np.asarray(found, np.float64) / (of_b / of_matrix),
            expected / (of_b / of_matrix),
            rtol=2e-2,
            atol=1e-3,
        )


@pytest.mark.slow
def test_trees_with_leaves_of_no_elements() -> None:
    b = {"none": jnp.zeros((3, 0)), "some": jnp.ones(2)}
    for linear in (
        implicit.ConjugateGradients(),
        implicit.NormalEquations(),
        implicit.GMRES(),
        implicit.Nystrom(rank=2, damping=0.1),
        implicit.Neumann(step=0.5, terms=20),
        implicit.Direct(),
    ):
        twice = lambda v: jax.tree.map(lambda x: 2 * x, v)  # noqa: E731
        found = implicit.linear_solve(twice, b, linear=linear)
        assert found["none"].shape == (3, 0)
        np.testing.assert_allclose(found["some"], 0.5, rtol=1e-3)
    assert implicit.linear_solve(lambda v: v, jnp.zeros(0)).shape == (0,)
