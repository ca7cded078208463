"""Traces and eigenvalues of matrices that are known."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import curvature

D = 10


def symmetric(seed: int = 0) -> Any:
    a = np.random.default_rng(seed).normal(size=(D, D))
    return jnp.asarray(a + a.T)


def split(v: Any) -> dict[str, Any]:
    """A tree of the same numbers, in the same order."""
    return {"a": v[:4].reshape(2, 2), "b": v[4], "c": v[5:]}


def joined(tree: Any) -> Any:
    return jnp.concatenate([tree["a"].reshape(-1), tree["b"][None], tree["c"]])


def on_trees(matrix: Any) -> Any:
    return lambda tree: split(matrix @ joined(tree))


def start() -> Any:
    return split(jnp.linspace(1.0, 2.0, D))


def test_dense_gives_the_matrix(x64: None) -> None:
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(D, D)))  # not symmetric
    dense = lambda v: [curvature.dense(on_trees(matrix), v, chunk=chunk) for chunk in (None, 3)]  # noqa: E731
    np.testing.assert_allclose(jax.jit(dense)(start()), [matrix] * 2, rtol=1e-14)


def test_lanczos_with_all_steps_is_the_whole_decomposition(x64: None) -> None:
    A = symmetric()
    found = jax.jit(lambda A, v: curvature.lanczos(on_trees(A), v, steps=D))(A, start())
    values, vectors = np.linalg.eigh(A)
    np.testing.assert_allclose(found.values, values, atol=1e-10)
    unit = joined(start()) / np.linalg.norm(joined(start()))
    np.testing.assert_allclose(found.weights, (vectors.T @ unit) ** 2, atol=1e-10)
    np.testing.assert_allclose(found.residuals, 0, atol=1e-10)
    rows = jax.vmap(joined)(found.vectors)
    np.testing.assert_allclose(np.abs(rows @ vectors), np.eye(D), atol=1e-8)


def test_a_few_steps_give_a_quadrature_bounds_and_ritz_vectors(x64: None) -> None:
    A, k = symmetric(1), 4
    found = jax.jit(lambda A, v: curvature.lanczos(on_trees(A), v, steps=k))(A, start())
    unit = joined(start()) / np.linalg.norm(joined(start()))
    for power in range(2 * k):  # exact for polynomials of degree 2k - 1
        expected = unit @ np.linalg.matrix_power(A, power) @ unit
        np.testing.assert_allclose(np.sum(found.weights * found.values**power), expected, rtol=1e-10)
    x = np.asarray(jax.vmap(joined)(found.vectors))
    np.testing.assert_allclose(x @ x.T, np.eye(k), atol=1e-12)
    residuals = np.linalg.norm(x @ A - found.values[:, None] * x, axis=1)
    np.testing.assert_allclose(found.residuals, residuals, atol=1e-10)
    distance = np.abs(np.linalg.eigvalsh(A)[None] - np.asarray(found.values)[:, None]).min(1)
    assert np.all(distance <= residuals + 1e-12) and residuals.min() > 1e-3


SPECTRA = {
    "zero": np.zeros(D),
    "one value": np.full(D, 2.0),
    "two values": np.repeat([1.0, 5.0], 5),
    "wide": np.logspace(-6, 6, D),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_exhausted_space_is_left(dtype: str, x64: None) -> None:
    """The number of distinct eigenvalues is all that one start can see; the others come with no weight."""

    @jax.jit
    def find(diagonal: Any) -> Any:
        return curvature.lanczos(lambda v: diagonal * v, jnp.ones(D, dtype), steps=D)

    for name, eigenvalues in SPECTRA.items():
        found = find(jnp.asarray(eigenvalues, dtype))
        tolerance = 20 * np.finfo(dtype).eps * max(1.0, eigenvalues.max())
        np.testing.assert_allclose(found.values, eigenvalues, rtol=0, atol=tolerance, err_msg=name)
        assert float(jnp.sum(found.weights)) == pytest.approx(1, rel=1e-5)
        mean = float(jnp.sum(found.weights * found.values))
        assert mean == pytest.approx(eigenvalues.mean(), rel=1e-5)


def test_vectors_stay_orthogonal_in_float32() -> None:
    """One large eigenvalue and many small ones: without orthogonalisation the large one is found again."""
    eigenvalues = jnp.concatenate([jnp.linspace(0, 1, 99), jnp.array([1000.0])])
    find = jax.jit(lambda v: curvature.lanczos(lambda v: eigenvalues * v, v, steps=60))
    found = find(jnp.ones(100))
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(60), atol=1e-5)
    assert np.sum(found.values > 2) == 1


def test_eigenvalues_can_be_differentiated(x64: None) -> None:
    A, B = symmetric(2), symmetric(3)

    def largest(t: Any) -> Any:
        return curvature.lanczos(on_trees(A + t * B), start(), steps=D).values[-1]

    def leaving_the_space(t: Any) -> Any:
        return curvature.lanczos(lambda v: t * v, jnp.ones(2), steps=2).values[1]

    top = np.linalg.eigh(A)[1][:, -1]
    found, scale = jax.jit(lambda t: (jax.grad(largest)(t), jax.grad(leaving_the_space)(t + 3)))(0.0)
    assert float(found) == pytest.approx(float(top @ B @ top), rel=1e-8)
    assert float(scale) == pytest.approx(1)


def test_the_spectrum_gives_traces_of_functions(x64: None) -> None:
    eigenvalues = jnp.repeat(jnp.array([1.0, 4.0]), 50)

    @jax.jit
    def find(v: Any) -> Any:
        matvec = lambda v: eigenvalues * v  # noqa: E731
        return curvature.spectrum(matvec, v, jax.random.key(0), steps=2, samples=40, chunk=7)

    found = find(jnp.ones(100))
    assert found.values.shape == found.weights.shape == (40, 2)
    np.testing.assert_allclose(found.values, [[1.0, 4.0]] * 40, rtol=1e-10)
    np.testing.assert_allclose(jnp.mean(found.weights, 0), [0.5, 0.5], atol=0.03)
    points = jnp.linspace(-5, 10, 1501)
    density = curvature.density(found, points, 0.5)
    assert float(jnp.sum(density) * 0.01) == pytest.approx(1)
    ratio = found.weights.mean(0)[0] / found.weights.mean(0)[1]
    assert float(density[600] / density[900]) == pytest.approx(float(ratio), rel=1e-6)


def test_the_trace_of_a_diagonal_matrix_is_exact(x64: None) -> None:
    A = jnp.diag(jnp.arange(D) * 1.0)
    found = curvature.trace(on_trees(A), start(), jax.random.key(0), samples=2)
    np.testing.assert_allclose(found, (45.0, 0.0), atol=1e-12)


def test_the_trace_is_unbiased_and_knows_its_error(x64: None) -> None:
    """Over all keys of many: the mean is the trace, and the spread is what the standard errors say."""
    A = symmetric(4)
    for rank in (0, 2):
        one = partial(curvature.trace, on_trees(A), start(), samples=8, rank=rank)
        found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 500))
        spread = float(jnp.std(found.value))
        assert abs(float(jnp.mean(found.value)) - float(jnp.trace(A))) < 4 * spread / 500**0.5
        assert float(jnp.sqrt(jnp.mean(found.standard_error**2))) == pytest.approx(spread, rel=0.15)
        if rank == 0:  # 2 Σ_{i≠j} a_ij², the variance of a sample
            exact = (2 * float(jnp.sum(A**2) - jnp.sum(jnp.diag(A) ** 2)) / 8) ** 0.5
            assert spread == pytest.approx(exact, rel=0.15)


def test_the_trace_of_a_matrix_of_low_rank_is_exact_with_that_rank(x64: None) -> None:
    u = jnp.asarray(np.random.default_rng(0).normal(size=(2, D)))
    A = u.T @ u

    def estimate(t: Any, **settings: Any) -> curvature.Trace:
        return curvature.trace(on_trees(t * A), start(), jax.random.key(0), **settings)

    @jax.jit
    def found(t: Any) -> Any:
        slope = jax.grad(lambda t: estimate(t, samples=3, rank=2).value)(t)
        exact = [estimate(t, samples=3, rank=2, chunk=chunk) for chunk in (None, 2)]
        return exact, slope, estimate(t, samples=7)

    exact, slope, plain = found(2.0)
    for trace in exact:
        assert float(trace.value) == pytest.approx(2 * float(jnp.sum(u**2)), rel=1e-12)
        assert float(trace.standard_error) < 1e-12
    assert float(slope) == pytest.approx(float(jnp.sum(u**2)), rel=1e-10)
    assert float(plain.standard_error) > 0.1


def test_matvecs_are_traced_once(x64: None) -> None:
    calls = []

    def matvec(v: Any) -> Any:
        calls.append(None)
        return 2 * v

    v, key = jnp.ones(4), jax.random.key(0)
    uses = [
        partial(curvature.lanczos, steps=3),
        partial(curvature.trace, key=key, samples=3, rank=2, chunk=2),
        partial(curvature.spectrum, key=key, steps=2, samples=2),
        curvature.dense,
    ]
    for k, use in enumerate(uses):
        jax.eval_shape(lambda v, use=use: use(lambda v: matvec(v), v), v)
        assert len(calls) == k + 1


V = np.ones(3, np.float32)


def same(v: Any) -> Any:
    return v


REFUSED = {
    "another shape": (
        lambda key: curvature.lanczos(lambda v: v[0], V, steps=1),
        r"lanczos\(matvec, start, steps=1\): matvec must return a tree like start, float32\[3\], and "
        r"returned float32\[\]",
    ),
    "another tree": (lambda key: curvature.dense(lambda v: [v], V), r"dense\(matvec, like\): matvec must"),
    "no arrays": (lambda key: curvature.dense(same, ()), "like has no arrays in it"),
    "integers": (lambda key: curvature.dense(same, np.ones(2, int)), "like is int32"),
    "chunk": (lambda key: curvature.dense(same, V, chunk=0), "chunk must be a whole number of at least 1"),
    "no steps": (
        lambda key: curvature.lanczos(same, V, steps=0),
        "steps must be a whole number of at least 1 and at most 3, the number of parameters",
    ),
    "too many steps": (
        lambda key: curvature.spectrum(same, V, key, steps=4, samples=1),
        r"spectrum\(matvec, like, key, steps=4, samples=1\): steps must .* at most 3",
    ),
    "no samples": (
        lambda key: curvature.spectrum(same, V, key, steps=1, samples=0),
        "samples must be a whole number of at least 1",
    ),
    "zero": (
        lambda key: curvature.lanczos(same, 0 * V, steps=1),
        "start is zero, which spans nothing; pass a random tree",
    ),
    "one sample": (
        lambda key: curvature.trace(same, V, key, samples=1),
        r"trace\(matvec, like, key, samples=1, rank=0\): samples must be a whole number of at least 2",
    ),
    "rank": (
        lambda key: curvature.trace(same, V, key, samples=2, rank=4),
        "rank must be a whole number of at least 0 and at most 3",
    ),
    "points": (
        lambda key: curvature.density(curvature.Spectrum(V[None], V[None]), V[None], 1.0),
        r"density\(found, points, width\): points must be \(p,\), not \[1, 3\]",
    ),
    "width": (
        lambda key: curvature.density(curvature.Spectrum(V[None], V[None]), V, 0.0),
        r"density\(found, points, width=0.0\): width must be above 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call(jax.random.key(0))
