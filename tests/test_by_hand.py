"""Losses with derivatives written by hand, which are those of no function: what JAX itself gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import hypergrad as hg
from hypergrad import bilevel, curvature, implicit, layers, nets

C = jnp.array([[1.0, 0.3, -0.2], [0.1, 0.8, 0.4], [0.0, -0.3, 1.2]])


@jax.custom_vjp
def reversed_gradient(x: Array) -> Array:
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, bar: (-0.5 * bar,))


@jax.custom_jvp
def one_sided(x: Array) -> Array:
    """A product whose second factor counts as a constant, but only once."""
    return x * jnp.roll(x, 1)


one_sided.defjvps(lambda dot, answer, x: dot * jnp.roll(x, 1))


@jax.custom_vjp
def clipped(x: Array) -> Array:
    return x


clipped.defvjp(lambda x: (x, None), lambda _, bar: (jnp.clip(bar, -0.3, 0.3),))


def through(rule: Any) -> Any:
    """A loss whose "gradient" has a matrix of derivatives that is not symmetric."""

    def loss(w: Array, theta: Array, rows: Any = None) -> Array:
        z = w - theta
        return jnp.sum(rule(jnp.sin(C @ z)) * z) / 4 + jnp.sum(w**2) + 0.3 * jnp.sum(jnp.roll(w, 1) * z)

    return loss


def outer(w: Array, theta: Array, rows: Any = None) -> Array:
    return jnp.sum((w - 0.7) ** 2) + 0.1 * jnp.sum(theta**2)


RULES = [reversed_gradient, one_sided, clipped]
W, THETA, U = jnp.array([0.3, -0.5, 0.2]), jnp.array([0.1, 0.4, -0.3]), jnp.array([1.0, -2.0, 0.5])
ids = lambda rule: rule.__name__  # noqa: E731


def matrices(loss: Any) -> tuple[Array, Array, Array]:
    """``∂f/∂w``, and its derivatives in ``w`` and in ``θ``, by plain JAX."""
    slope = jax.grad(loss)
    return slope(W, THETA), jax.jacrev(slope)(W, THETA), jax.jacrev(slope, argnums=1)(W, THETA)


def hypergradient_by_hand(loss: Any, w: Array, theta: Array) -> np.ndarray:
    """Where plain JAX's gradient vanishes, by its dense derivatives in float64."""
    A = jax.jacrev(jax.grad(loss))(w, theta)
    M = jax.jacrev(jax.grad(loss), argnums=1)(w, theta)
    to_w, direct = jax.grad(outer, argnums=(0, 1))(w, theta)
    return np.asarray(direct - M.T @ np.linalg.solve(A.T, to_w))


def descended(loss: Any, theta: Array) -> Array:
    step = lambda w, _: (w - 0.2 * jax.grad(loss)(w, theta), None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros(3), length=200)[0]


# ---- bilevel


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_one_step_of_every_bilevel_solver_is_that_of_plain_jax(x64: None, rule: Any) -> None:
    loss = through(rule)
    problem = bilevel.Problem(loss, outer)
    w, theta, u = (jnp.asarray(x, jnp.float64) for x in (W, THETA, U))
    slope, A, M = matrices(loss)
    if rule is not clipped:
        assert jnp.abs(A - A.T).max() > 0.05
    to_w, direct = jax.grad(outer, argnums=(0, 1))(w, theta)
    state, key = bilevel.State(jnp.int32(0), w, theta, u), jax.random.key(0)

    found = jax.jit(lambda state: bilevel.soba(rate=0.1, hyper_rate=0.3).step(problem, state, key))(state)
    np.testing.assert_allclose(found.params, w - 0.1 * slope, rtol=1e-6)
    np.testing.assert_allclose(found.memory, u - 0.1 * (A.T @ u - to_w), rtol=1e-6)
    np.testing.assert_allclose(found.hypers, theta - 0.3 * (direct - M.T @ u), rtol=1e-6)

    def looked_ahead(theta: Array) -> Array:
        return outer(w - 0.2 * jax.grad(loss)(w, theta), theta)

    darts = bilevel.darts(rate=0.1, hyper_rate=0.3, lookahead=0.2)
    found = jax.jit(lambda state: darts.step(problem, state, key))(state)
    np.testing.assert_allclose(found.hypers, theta - 0.3 * jax.grad(looked_ahead)(theta), rtol=1e-6)


@pytest.mark.parametrize("name", ["soba", "saba", "amortized", "unrolled"])
def test_bilevel_solvers_end_where_the_hypergradient_of_plain_jax_vanishes(x64: None, name: str) -> None:
    loss = through(one_sided)
    solver = {
        "soba": bilevel.soba(rate=0.2, hyper_rate=0.2),
        "saba": bilevel.saba(rate=0.2, hyper_rate=0.2),
        "amortized": bilevel.amortized(rate=0.2, hyper_rate=0.3, inner_steps=2, linear_steps=2),
        "unrolled": bilevel.unrolled(rate=0.2, hyper_rate=0.3, inner_steps=50),
    }[name]
    arguments: Any = {"steps": 1500, "key": jax.random.key(0)}
    found = bilevel.solve(bilevel.Problem(loss, outer), jnp.zeros(3), jnp.zeros(3), solver, **arguments)
    np.testing.assert_allclose(jax.grad(loss)(found.params, found.hypers), 0, atol=1e-6)
    np.testing.assert_allclose(hypergradient_by_hand(loss, found.params, found.hypers), 0, atol=1e-6)


# ---- solutions


@pytest.mark.quick("reversed_gradient")
@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_hypergradients_at_a_solution_are_those_of_plain_jax(x64: None, rule: Any) -> None:
    loss, theta = through(rule), jnp.asarray(THETA, jnp.float64)
    w = descended(loss, theta)
    expected = hypergradient_by_hand(loss, w, theta)
    strict: Any = {"linear": implicit.GMRES(tolerance=1e-12), "tolerance": 1e-6}

    def final(theta: Array) -> Array:
        fit = implicit.minimizer(loss, **strict)(lambda init, theta: descended(loss, theta))
        return outer(fit(jnp.zeros(3), theta), theta)

    both = jax.jit(lambda d: (jax.grad(final)(theta), jax.jvp(final, (theta,), (d,))[1]))
    backwards, forwards = both(U.astype(jnp.float64))
    np.testing.assert_allclose(backwards, expected, rtol=1e-8)
    np.testing.assert_allclose(forwards, expected @ np.asarray(U, np.float64), rtol=1e-8)
    found = implicit.hypergradient(loss, outer, w, theta, **strict)
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-8)
    # And plain JAX gives the same through all steps of descent.
    unrolled = jax.jit(jax.grad(lambda theta: outer(descended(loss, theta), theta)))(theta)
    np.testing.assert_allclose(expected, unrolled, rtol=1e-8)


@pytest.mark.slow
def test_a_matrix_that_is_not_symmetric_is_solved_by_gmres_unless_told_otherwise(x64: None) -> None:
    loss, theta = through(one_sided), jnp.asarray(THETA, jnp.float64)
    fit = implicit.minimizer(loss, tolerance=1e-6)(lambda init, theta: descended(loss, theta))
    slope = jax.grad(lambda theta: outer(fit(jnp.zeros(3), theta), theta))(theta)
    expected = hypergradient_by_hand(loss, descended(loss, theta), theta)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)
    found = implicit.hypergradient(loss, outer, descended(loss, theta), theta)
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-6)


def test_roots_of_functions_with_a_custom_vjp(x64: None) -> None:
    """``F = 3 w + ρ(sin(C w)) - θ``, where what ``ρ`` does to gradients is to multiply them by -1/2."""

    def optimality(w: Array, theta: Array) -> Array:
        return 3 * w + reversed_gradient(jnp.sin(C @ w)) - theta

    @implicit.root(optimality, linear=implicit.Direct(tolerance=1e-12), tolerance=1e-8)
    def solve(init: Array, theta: Array) -> Array:
        return jax.lax.fori_loop(0, 300, lambda _, w: w - 0.2 * optimality(w, theta), init)

    theta = jnp.asarray(THETA, jnp.float64)
    w = solve(jnp.zeros(3), theta)
    A = 3 * np.eye(3) - 0.5 * np.cos(C @ w)[:, None] * np.asarray(C)
    found = jax.jit(jax.jacrev(lambda theta: solve(jnp.zeros(3), theta)))(theta)
    np.testing.assert_allclose(found, np.linalg.inv(A), rtol=1e-7)
    found = jax.jit(jax.jacfwd(lambda theta: solve(jnp.zeros(3), theta)))(theta)
    np.testing.assert_allclose(found, np.linalg.inv(A), rtol=1e-7)


def test_a_rule_that_is_not_linear_has_no_forward_derivative() -> None:
    solve = implicit.root(lambda w, theta: w - clipped(theta))(lambda init, theta: theta)
    with pytest.raises(ValueError, match=r"custom_vjp whose backward rule is not linear.*no matrix J"):
        jax.grad(lambda theta: jnp.sum(solve(jnp.zeros(3), theta)))(THETA)


# ---- curvature


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_curvature_of_such_losses_is_jax_own(x64: None, rule: Any) -> None:
    loss, w, theta = through(rule), W.astype(jnp.float64), THETA.astype(jnp.float64)
    matvec = curvature.hessian(loss, w, theta)
    A = jax.hessian(loss)(w, theta)
    np.testing.assert_allclose(curvature.dense(matvec, w), A, rtol=1e-6)
    if rule is not clipped:
        assert curvature.asymmetry(matvec, w, jax.random.key(0)) > 1e-3


def test_gauss_newton_of_a_network_with_a_custom_vjp(x64: None) -> None:
    apply = lambda w, x: reversed_gradient(jnp.tanh(x @ w))  # noqa: E731
    error = lambda z, y: jnp.mean((z - y) ** 2)  # noqa: E731
    x, y, w = C.astype(jnp.float64), jnp.zeros(3), W.astype(jnp.float64)
    J = jax.jacrev(lambda w: apply(w, x))(w)
    np.testing.assert_allclose(
        curvature.dense(curvature.gauss_newton(apply, error, w, x, y), w), J.T @ J * 2 / 3, rtol=1e-8
    )
    np.testing.assert_allclose(
        curvature.dense(curvature.fisher(apply, curvature.bernoulli(), w, x), w),
        sum(p * (1 - p) * np.outer(j, j) for p, j in zip(jax.nn.sigmoid(apply(w, x)), np.asarray(J))) / 3,
        rtol=1e-8,
    )


# ---- keywords


def test_hyperparameters_by_keyword(x64: None) -> None:
    seen = {}

    @implicit.minimizer(lambda w, target, scale: jnp.sum(scale * (w - target) ** 2 + w**2))
    def fit(init: Array, target: Array, *, scale: Array, method: str) -> Array:
        seen[method] = scale
        return scale * target / (1 + scale)

    def final(target: Array, scale: Array) -> Array:
        return jnp.sum(fit(jnp.zeros(3), target, scale=scale, method="closed"))

    slopes = jax.grad(final, argnums=(0, 1))(jnp.ones(3), jnp.asarray(3.0))
    np.testing.assert_allclose(slopes[0], 3 / 4, rtol=1e-6)
    np.testing.assert_allclose(slopes[1], 3 / 16, rtol=1e-6)
    assert list(seen) == ["closed"]
    both = jax.grad(lambda s: jnp.sum(fit(jnp.zeros(3), target=jnp.ones(3), scale=s, method="closed")))
    np.testing.assert_allclose(both(jnp.asarray(3.0)), 3 / 16, rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda fit: fit(1.0, penalty=2.0), r"by keyword, and objective\(w, x\) cannot be called.*missing"),
        (lambda fit: fit(1.0), r"minimizer\(objective.*init, 0 more by place.*same names"),
        (lambda fit: fit(1.0, 2.0, 3.0), "2 more by place.*too many"),
    ],
)
def test_arguments_that_the_objective_does_not_take(call: Any, message: str) -> None:
    fit = implicit.minimizer(lambda w, x: (w - x) ** 2)(lambda init, *args, **settings: init)
    with pytest.raises(TypeError, match=message):
        call(fit)


# ---- probes


def forgetful(kind: str) -> Any:
    """A network of two layers that does not add the probe of one of them."""

    def network(w: Any, meta: Any, x: Array, probes: Any) -> Any:
        first = x @ w["a"]["w"] + w["a"]["b"][None]
        if kind == "stopped":
            first = first + jax.lax.stop_gradient(probes["a"])
        if kind != "absent":
            first = first + (0 if kind in ("stopped", "first") else probes["a"])
        hidden = jnp.tanh(first)
        return hidden @ w["b"] + probes["b"], {"a": x, "b": hidden}

    return jax.jit(network)


@pytest.mark.parametrize("kind", ["first", "stopped", "absent", "none"])
@pytest.mark.parametrize("make", [hg.kfac, hg.adaptive_kfac])
def test_a_network_that_forgets_a_probe_is_refused(kind: str, make: Any) -> None:
    params = {"a": {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}, "b": jnp.ones((2, 2))}
    x, y = jnp.ones((4, 3)), jnp.array([0, 1, 0, 1])
    network: Any = lambda w, meta, step, probes: forgetful(kind)(w, meta, x, probes)  # noqa: E731
    loss = lambda w, meta, step: nets.cross_entropy(network(w, None, None, layers.no_probes(w))[0], y)  # noqa: E731
    hypers = {"learning_rate": 0.1} if make is hg.kfac else {}
    optimizer = make(network, curvature.categorical())

    def trained() -> Any:
        return jax.eval_shape(
            lambda: hg.train(loss, params, hypers, steps=1, optimizer=optimizer, adjoint=hg.Stored()).params
        )

    if kind == "none":
        assert jax.tree.map(jnp.shape, trained()) == jax.tree.map(jnp.shape, params)
        return
    with pytest.raises(
        ValueError, match=r"kfac\(.*depend on the layer params\['a'\], and not on its probe"
    ):
        trained()


@pytest.mark.slow
def test_a_layer_that_is_not_used_or_frozen_needs_no_probe() -> None:
    params = {"frozen": jnp.ones((3, 2)), "unused": jnp.ones((3, 2)), "used": jnp.ones((3, 2))}
    x, y = jnp.ones((4, 3)), jnp.array([0, 1, 0, 1])

    def network(w: Any, meta: Any, step: Any, probes: Any) -> Any:
        z = x @ w["used"] + probes["used"] + jax.lax.stop_gradient(x @ w["frozen"])
        return z, {"frozen": x, "unused": x, "used": x}

    loss = lambda w, meta, step: nets.cross_entropy(network(w, None, None, layers.no_probes(w))[0], y)  # noqa: E731
    optimizer = hg.kfac(network, curvature.categorical())
    trained = hg.train(loss, params, {"learning_rate": 0.1}, steps=1, optimizer=optimizer)
    assert jnp.all(trained.params["frozen"] == 1) and jnp.all(jnp.isfinite(trained.params["used"]))
