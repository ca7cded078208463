"""Very large and very small numbers in float32, and leaves without elements, against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import curvature, nets
from hypergrad._base import trees
from hypergrad._base.trees import norm, power
from hypergrad.optimizers import roots

SIZES = [1e-30, 1e-20, 1e-10, 1.0, 1e19, 1e30]
RNG = np.random.default_rng(0)
X = RNG.normal(size=6)
MATRIX = (lambda A: A + A.T)(RNG.normal(size=(6, 6)))


def times(size: float) -> Any:
    A = jnp.asarray(MATRIX * size, jnp.float32)
    return lambda v: jnp.matmul(A, v, precision="highest")


@pytest.mark.parametrize("size", SIZES)
def test_norms_and_their_derivatives(size: float) -> None:
    x = jnp.asarray(X * size, jnp.float32)
    exact = np.linalg.norm(X)
    np.testing.assert_allclose(np.float64(norm(x)) / size, exact, rtol=1e-6)
    np.testing.assert_allclose(np.float64(norm({"a": x[:2], "b": x[2:]})) / size, exact, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(norm)(x), X / exact, rtol=1e-5, atol=1e-6)
    hessian = (np.eye(6) - np.outer(X, X) / exact**2) / exact
    np.testing.assert_allclose(jax.hessian(norm)(x) * np.float32(size), hessian, atol=1e-5)


def test_norms_of_nothing_of_zero_and_of_what_is_not_finite() -> None:
    assert trees.norm is norm
    assert float(norm(jnp.zeros((3, 0)))) == 0 and float(norm(jnp.zeros(3))) == 0
    assert jax.grad(norm)(jnp.zeros(3)).tolist() == [0, 0, 0]
    assert np.isnan(norm(jnp.array([1.0, jnp.nan]))) and np.isinf(norm(jnp.array([1.0, jnp.inf])))
    assert np.isnan(roots.sqrt(jnp.float32(jnp.nan)))
    assert float(power([jnp.zeros(0)])) == 1


def test_norms_of_ordinary_numbers_are_the_plain_ones_bit_for_bit() -> None:
    x = jnp.asarray(RNG.normal(size=(20, 7)), jnp.float32)
    plain = jax.vmap(lambda x: jnp.sqrt(jnp.sum(x * x)))(x)
    assert (jax.vmap(norm)(x) == plain).all()


@pytest.mark.quick("1e-30", "1.0", "1e+30")
@pytest.mark.parametrize("size", SIZES)
def test_eigenvalues_and_traces(size: float) -> None:
    start = jnp.asarray(X, jnp.float32)
    found = jax.jit(lambda start: curvature.lanczos(times(size), start, steps=6))(start)
    exact = np.linalg.eigvalsh(MATRIX)
    np.testing.assert_allclose(np.float64(found.values) / size, exact, atol=2e-5)
    vectors = np.asarray(found.vectors, np.float64)
    np.testing.assert_allclose(MATRIX @ vectors.T, exact * vectors.T, atol=1e-4)
    # Fewer steps than dimensions: the residuals are the true ones.
    few = curvature.lanczos(times(size), start * np.float32(1e-30), steps=3)
    vectors, values = np.asarray(few.vectors, np.float64), np.asarray(few.values, np.float64) / size
    true = np.linalg.norm(MATRIX @ vectors.T - values * vectors.T, axis=0)
    np.testing.assert_allclose(np.asarray(few.residuals, np.float64) / size, true, rtol=1e-3)

    one = curvature.trace(times(1.0), start, jax.random.key(0), samples=5, rank=2)
    same = curvature.trace(times(size), start, jax.random.key(0), samples=5, rank=2)
    assert one.standard_error > 0.01
    np.testing.assert_allclose(np.float64(same.value) / size, one.value, rtol=1e-4)
    np.testing.assert_allclose(np.float64(same.standard_error) / size, one.standard_error, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_asymmetry(size: float) -> None:
    key, like = jax.random.key(1), jnp.zeros(6)
    assert curvature.asymmetry(times(size), like, key) < 1e-6
    A = jnp.asarray(np.triu(MATRIX) * size, jnp.float32)
    found = curvature.asymmetry(lambda v: A @ v, like, key)
    u, v = np.asarray(jax.random.normal(key, (2, 6)), np.float64)
    u, v, B = u / np.linalg.norm(u), v / np.linalg.norm(v), np.triu(MATRIX)
    expected = abs(u @ B @ v - v @ B @ u) / np.hypot(np.linalg.norm(B @ u), np.linalg.norm(B @ v))
    assert expected > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert curvature.asymmetry(jnp.zeros_like, like, key) == 0


@pytest.mark.quick("1e-30", "1e+25")
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e25])
def test_lars_and_clipping_of_gradients_of_any_size(size: float) -> None:
    slope, w = jnp.asarray(X, jnp.float32), jnp.asarray(X[::-1].copy(), jnp.float32)
    loss = lambda w, meta, step: jnp.float32(size) * jnp.vdot(slope, w)  # noqa: E731
    hypers = {"learning_rate": 1.0, "trust_coefficient": 0.1, "momentum": 0.5}
    found = hg.train(loss, w, hypers, steps=1, optimizer=hg.lars()).params
    expected = X[::-1] - 0.1 * np.linalg.norm(X) * X / np.linalg.norm(X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    if size < 1:
        return
    clipped = hg.clip_by_global_norm(hg.heavy_ball())
    hypers = {"learning_rate": 1.0, "momentum": 0.5, "max_norm": 0.1}
    found = hg.train(loss, w, hypers, steps=1, optimizer=clipped).params
    np.testing.assert_allclose(found, X[::-1] - 0.1 * X / np.linalg.norm(X), rtol=1e-4, atol=1e-5)


def test_trust_ratios_of_weights_of_any_size() -> None:
    """LAMB moves a leaf by the rate times its length, whatever that is."""
    w = jnp.asarray(X * 1e-6, jnp.float32)
    hypers = {"learning_rate": 0.1, "eps": 1e-12}
    tiny = lambda w, meta, step: jnp.float32(1e-4) * jnp.sum(w)  # noqa: E731
    found = hg.train(tiny, w, hypers, steps=1, optimizer=hg.lamb()).params
    np.testing.assert_allclose(jnp.linalg.norm(found - w), 0.1 * np.linalg.norm(X) * 1e-6, rtol=1e-3)


# ---- leaves without elements

EMPTY = {
    "none": jnp.zeros(0),
    "rows": jnp.zeros((3, 0)),
    "columns": jnp.zeros((0, 2)),
    "w": jnp.ones((2, 2)),
}


def bowl(w: Any, meta: Any, step: Any) -> Any:
    return sum(jnp.sum((x - 0.5) ** 2) for x in jax.tree.leaves(w))


@pytest.mark.quick("lamb()")
@pytest.mark.parametrize(
    "optimizer",
    [hg.sm3(), hg.shampoo(), hg.shampoo(limit=1), hg.lars(), hg.lamb(), hg.clip_by_global_norm(hg.sgd())],
    ids=lambda optimizer: optimizer.name,
)
def test_leaves_without_elements_change_nothing(optimizer: Any) -> None:
    hypers: dict[str, Any] = {"learning_rate": 0.1}
    if "max_norm" in optimizer.hypers:
        hypers["max_norm"] = 0.3
    settings = {"steps": 2, "optimizer": optimizer, "adjoint": hg.Checkpointed()}

    def final(start: Any, rate: Any) -> Any:
        trained = hg.train(bowl, start, {**hypers, "learning_rate": rate}, **settings)
        return bowl(trained.params, None, None)

    slope = jax.jit(jax.value_and_grad(final, argnums=1))
    with_empty, without = slope(EMPTY, 0.1), slope({"w": EMPTY["w"]}, 0.1)
    np.testing.assert_allclose(with_empty, without, rtol=1e-6)


def test_kfac_and_spectra_of_leaves_without_elements() -> None:
    init, apply = nets.mlp((3, 2))
    x, y = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32), jnp.arange(5) % 2
    start = init(jax.random.key(0))
    gains = {"layers": start, "gain": jnp.ones(0), "columns": jnp.ones((2, 0))}

    def network(w: Any, meta: Any, step: Any, probes: Any) -> Any:
        outputs, inputs = apply(w["layers"], x, probes["layers"])
        return outputs, {"layers": inputs, "gain": jnp.zeros((5, 0)), "columns": jnp.zeros((5, 2))}

    def trained(w: Any, network: Any, apply: Any) -> Any:
        loss = lambda w, meta, step: nets.cross_entropy(apply(w), y)  # noqa: E731
        optimizer = hg.kfac(network, curvature.categorical())
        settings = {"steps": 2, "optimizer": optimizer, "adjoint": hg.Stored()}
        return hg.train(loss, w, {"learning_rate": 0.1}, **settings).params

    found = trained(gains, network, lambda w: apply(w["layers"], x))["layers"]
    plain = trained(start, lambda w, meta, step, probes: apply(w, x, probes), lambda w: apply(w, x))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, rtol=1e-5)

    like = {"none": jnp.zeros((3, 0)), "some": jnp.asarray(X, jnp.float32)}
    matvec = lambda v: {"none": v["none"], "some": times(1.0)(v["some"])}  # noqa: E731
    ritz = curvature.lanczos(matvec, like, steps=6)
    np.testing.assert_allclose(ritz.values, np.linalg.eigvalsh(MATRIX), atol=2e-5)
    assert curvature.dense(matvec, like).shape == (6, 6)
    H = curvature.hessian(lambda w: jnp.sum(w["some"] ** 2) + jnp.sum(w["none"]), like)
    assert H(like)["none"].shape == (3, 0)


# ---- Shampoo's long axes


def shampoo_by_hand(
    gradients: Any, w: np.ndarray, limit: int, rate: float, momentum: float, eps: float
) -> Any:
    """Algorithm 1 in NumPy, with the diagonal only of factors of more than so many rows."""

    def root(factor: np.ndarray, p: int, long: bool) -> np.ndarray:
        if long:
            return np.diag((np.diag(factor) + eps) ** (-1 / p))
        values, Q = np.linalg.eigh(factor + eps * np.eye(len(factor)))
        return (Q * values ** (-1 / p)) @ Q.T

    rows, columns = w.shape if w.ndim == 2 else (w.size, 0)
    L, R, m = np.zeros((rows, rows)), np.zeros((columns, columns)), np.zeros_like(w)
    for _ in range(3):
        G = gradients(w)
        if w.ndim == 2:
            L, R = L + G @ G.T, R + G.T @ G
            step = root(L, 4, rows > limit) @ G @ root(R, 4, columns > limit)
        else:
            L = L + np.outer(G, G)
            step = root(L, 2, rows > limit) @ G
        m = momentum * m + step
        w = w - rate * m
    return w


@pytest.mark.quick("shape0")
@pytest.mark.parametrize("shape", [(5, 2), (5,)])
def test_shampoo_keeps_the_diagonal_of_long_axes(x64: None, shape: Any) -> None:
    target, start = RNG.normal(size=shape), RNG.normal(size=shape)
    loss = lambda w, meta, step: jnp.sum((w - target) ** 2 * (1 + w**2))  # noqa: E731
    hypers = {"learning_rate": 0.1, "momentum": 0.5, "eps": 1e-3}
    settings = {"steps": 3, "optimizer": hg.shampoo(limit=3)}
    expected = shampoo_by_hand(
        lambda w: np.asarray(jax.grad(lambda w: loss(w, None, None))(jnp.asarray(w))),
        start,
        3,
        0.1,
        0.5,
        1e-3,
    )

    def final(rate: Any) -> Any:
        trained = hg.train(loss, jnp.asarray(start), {**hypers, "learning_rate": rate}, **settings)
        return jnp.sum(trained.params**2), (trained.params, trained.state)

    at = lambda rate: np.sum(  # noqa: E731
        shampoo_by_hand(
            lambda w: np.asarray(jax.grad(lambda w: loss(w, None, None))(jnp.asarray(w))),
            start, 3, rate, 0.5, 1e-3,
        ) ** 2
    )  # fmt: skip
    # Reversible refuses unless all comes back bit for bit.
    slope, (params, state) = jax.jit(jax.grad(final, has_aux=True))(jnp.asarray(0.1))
    np.testing.assert_allclose(params, expected, rtol=1e-8)
    assert state["left"].shape == (5,)
    np.testing.assert_allclose(slope, (at(0.1 + 1e-5) - at(0.1 - 1e-5)) / 2e-5, rtol=1e-6)


def test_shampoo_of_a_long_vector_takes_no_matrix() -> None:
    state = jax.eval_shape(
        lambda w: hg.train(bowl, w, {"learning_rate": 0.1}, steps=1, optimizer=hg.shampoo()).state,
        jax.ShapeDtypeStruct((5000,), jnp.float32),
    )
    assert state["left"].shape == (5000,)
    with pytest.raises(ValueError, match=r"shampoo\(limit=-1\): limit must be at least 0"):
        hg.shampoo(limit=-1)


def test_clipping_is_optax_own_at_ordinary_sizes() -> None:
    tree = [jnp.asarray(X, jnp.float32), jnp.ones(2)]
    clipped, _ = optax.clip_by_global_norm(0.7).update(tree, optax.EmptyState())
    transform = hg.clip_by_global_norm(hg.sgd()).transform
    assert transform is not None
    h = type("H", (), {"max_norm": jnp.float32(0.7)})()
    for a, b in zip(transform([h, h], tree), clipped):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_norms_of_mixed_types_in_a_strict_session(x64: None) -> None:
    tree = [jnp.full(2, 3.0, jnp.float32), jnp.full(2, 4.0, jnp.float64), jnp.zeros(1, jnp.float16)]
    with jax.numpy_dtype_promotion("strict"):
        found, slopes = jax.value_and_grad(trees.norm)(tree)
    assert found.dtype == jnp.float64 and float(found) == pytest.approx(50**0.5, rel=1e-12)
    assert [x.dtype for x in slopes] == [x.dtype for x in tree]
