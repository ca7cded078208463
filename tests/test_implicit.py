"""Hypergradients at a solution: closed forms, finite differences, unrolled training, refusals."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax import Array

import hypergrad as hg
from hypergrad import implicit

SOLVERS = {
    "conjugate gradients": implicit.ConjugateGradients(tolerance=1e-12),
    "normal equations": implicit.NormalEquations(tolerance=1e-12),
    "neumann": implicit.Neumann(step=0.5, terms=200, tolerance=1e-12),
    "gmres": implicit.GMRES(restart=12, tolerance=1e-12),
    "nystrom": implicit.Nystrom(rank=3, damping=0.1, tolerance=1e-12),
    "direct": implicit.Direct(tolerance=1e-12),
}
UNSYMMETRIC = {name: SOLVERS[name] for name in ("normal equations", "neumann", "gmres", "direct")}


class Ridge(NamedTuple):
    """Ridge regression, and an outer loss on other data."""

    X: Array
    y: Array
    X_outer: Array
    y_outer: Array

    def objective(self, w: Array, penalty: Array, y: Array) -> Array:
        return jnp.mean((self.X @ w - y) ** 2) / 2 + penalty * jnp.sum(w**2) / 2

    def hessian(self, penalty: Array) -> Array:
        return self.X.T @ self.X / len(self.X) + penalty * jnp.eye(self.X.shape[1])

    def minimum(self, penalty: Array, y: Array) -> Array:
        return jnp.linalg.solve(self.hessian(penalty), self.X.T @ y / len(self.X))

    def outer(self, w: Array) -> Array:
        return jnp.mean((self.X_outer @ w - self.y_outer) ** 2)

    def closed_form(self, penalty: Array, y: Array, damping: float = 0.0) -> tuple[Array, Array]:
        """The hypergradient in penalty and targets."""
        w = self.minimum(penalty, y)
        to_w = 2 * self.X_outer.T @ (self.X_outer @ w - self.y_outer) / len(self.X_outer)
        u = jnp.linalg.solve(self.hessian(penalty + damping), to_w)
        return -jnp.vdot(u, w), self.X @ u / len(self.X)


def ridge(d: int = 12, n: int = 30) -> Ridge:
    rng = np.random.default_rng(0)
    return Ridge(*(jnp.asarray(rng.normal(size=shape)) for shape in ((n, d), n, (n, d), n)))


@pytest.mark.quick("conjugate gradients", "gmres")
@pytest.mark.parametrize("name", SOLVERS)
def test_ridge_regression_agrees_with_its_closed_form(x64: None, name: str) -> None:
    problem, penalty = ridge(), jnp.asarray(0.3)

    @implicit.minimizer(problem.objective, linear=SOLVERS[name])
    def fit(init: Array, penalty: Array, y: Array) -> Array:
        return problem.minimum(penalty, y)

    gradient = jax.grad(lambda *args: problem.outer(fit(jnp.zeros(12), *args)), argnums=(0, 1))
    for found, expected in zip(
        jax.jit(gradient)(penalty, problem.y), problem.closed_form(penalty, problem.y)
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


def quadratic_bilevel(theta: Any, params: Any) -> tuple[Callable[..., Array], Callable[..., Array], Any]:
    """Objectives over trees, ``½ wᵀ H w - wᵀ(B θ + c)`` and ``½ |w - t|² + ½ |θ|²``; and ``dg/dθ``."""
    rng = np.random.default_rng(1)
    flat_w, to_params = jax.flatten_util.ravel_pytree(params)
    flat_theta, to_theta = jax.flatten_util.ravel_pytree(theta)
    d, h = flat_w.size, flat_theta.size
    Q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    H = jnp.asarray(Q @ np.diag(np.linspace(0.5, 2, d)) @ Q.T)
    B, c, t = (jnp.asarray(rng.normal(size=shape)) for shape in ((d, h), d, d))
    flat = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]  # noqa: E731

    def objective(w: Any, theta: Any) -> Array:
        return flat(w) @ H @ flat(w) / 2 - flat(w) @ (B @ flat(theta) + c)

    def outer(w: Any, theta: Any) -> Array:
        return jnp.sum((flat(w) - t) ** 2) / 2 + jnp.sum(flat(theta) ** 2) / 2

    def answer(theta: Any) -> Any:
        w = jnp.linalg.solve(H, B @ flat(theta) + c)
        return to_params(w), to_theta(B.T @ jnp.linalg.solve(H, w - t) + flat(theta))

    return objective, outer, answer


TREES = (
    {"bias": np.ones(()), "scale": [np.linspace(-1, 1, 6).reshape(2, 3)]},
    ({"weights": np.zeros((3, 3))}, np.zeros(3)),
)


@pytest.mark.parametrize("name", SOLVERS)
def test_quadratic_bilevel_problems_of_trees_agree_with_their_closed_form(x64: None, name: str) -> None:
    theta, params = jax.tree.map(jnp.asarray, TREES)
    objective, outer, answer = quadratic_bilevel(theta, params)
    minimum, expected = answer(theta)
    start = jax.tree.map(jnp.ones_like, params)
    found = jax.jit(
        lambda theta: implicit.hypergradient(
            objective, outer, minimum, theta, linear=SOLVERS[name], start=start
        )
    )(theta)
    assert jax.tree.structure(found.gradient) == jax.tree.structure(theta)
    for a, b in zip(jax.tree.leaves(found.gradient), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.value, outer(minimum, theta))


def test_damping_solves_the_damped_system(x64: None) -> None:
    problem, penalty = ridge(), jnp.asarray(0.3)
    damped = implicit.ConjugateGradients(tolerance=1e-12, damping=0.7)
    fit = implicit.minimizer(problem.objective, linear=damped)(lambda init, *args: problem.minimum(*args))
    found = jax.jit(jax.grad(lambda x: problem.outer(fit(jnp.zeros(12), x, problem.y))))(penalty)
    np.testing.assert_allclose(found, problem.closed_form(penalty, problem.y, damping=0.7)[0], rtol=1e-9)
    A = jnp.asarray(np.random.default_rng(2).normal(size=(5, 5)))
    b = jnp.arange(1.0, 6)
    x = implicit.linear_solve(
        lambda v: A @ v, b, linear=implicit.NormalEquations(tolerance=1e-12, damping=0.7)
    )
    np.testing.assert_allclose(x, jnp.linalg.solve(A.T @ A + 0.7 * jnp.eye(5), A.T @ b), rtol=1e-9)


@pytest.mark.parametrize("name", UNSYMMETRIC)
def test_unsymmetric_systems_and_their_transposes(x64: None, name: str) -> None:
    """A root of ``w + tanh(C w) / 2 = θ``, whose Jacobian is not symmetric, against finite differences."""
    C = jnp.asarray(np.random.default_rng(3).normal(size=(5, 5))) / 3

    def optimality(w: Array, theta: Array) -> Array:
        return w + jnp.tanh(C @ w) / 2 - theta

    @implicit.root(optimality, linear=UNSYMMETRIC[name])
    def solve(init: Array, theta: Array) -> Array:
        return jax.lax.fori_loop(0, 200, lambda _, w: w - 0.5 * optimality(w, theta), init)

    theta, direction, to_w = jnp.linspace(-1, 1, 5), jnp.linspace(1, 2, 5), jnp.linspace(2, -1, 5)
    at = lambda theta: solve(jnp.zeros(5), theta)  # noqa: E731

    @jax.jit
    def both(theta: Array) -> tuple[Array, Array]:
        return jax.jvp(at, (theta,), (direction,))[1], jax.vjp(at, theta)[1](to_w)[0]

    expected = (at(theta + 1e-5 * direction) - at(theta - 1e-5 * direction)) / 2e-5
    forwards, backwards = both(theta)
    np.testing.assert_allclose(forwards, expected, rtol=1e-7)
    np.testing.assert_allclose(backwards @ direction, to_w @ expected, rtol=1e-7)


# ---- solvers of any kind


def logistic(w: Array, log_penalty: Array, weights: Array) -> Array:
    """Logistic regression on fixed data, with one weight per example."""
    rng = np.random.default_rng(4)
    X, labels = rng.normal(size=(20, 4)), np.sign(rng.normal(size=20))
    return jnp.mean(weights * jax.nn.softplus(-labels * (X @ w))) + jnp.exp(log_penalty) * jnp.sum(w**2)


def by_scipy(init: Any, *args: Any) -> Any:
    args = tuple(np.asarray(x) for x in args)
    both = jax.jit(jax.value_and_grad(logistic))
    return scipy.optimize.minimize(both, np.asarray(init), args, jac=True, tol=1e-9).x


def by_optax(init: Any, *args: Any) -> Any:
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(lambda w: logistic(w, *args))

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        value, gradient = value_and_grad(w, state=state)
        updates, state = optimizer.update(
            gradient, state, w, value=value, grad=gradient, value_fn=lambda w: logistic(w, *args)
        )
        return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, (init, optimizer.init(init)), length=30)[0][0]


def by_while_loop(init: Any, *args: Any) -> Any:
    slope = jax.grad(logistic)
    going = lambda w: jnp.linalg.norm(slope(w, *args)) > 1e-10  # noqa: E731
    return jax.lax.while_loop(going, lambda w: w - 2 * slope(w, *args), init)


def by_training(init: Any, *args: Any) -> Any:
    loss = lambda w, args, _: logistic(w, *args)  # noqa: E731
    hypers = {"learning_rate": 1.0, "momentum": 0.5}
    return hg.train(loss, init, hypers, args, steps=400, adjoint=hg.Checkpointed()).params


AT = (np.array(-3.0), np.linspace(0.5, 1.5, 20))  # penalty, weights


def outer(w: Array) -> Array:
    return jnp.sum((w - 1) ** 4)


@pytest.fixture(scope="module")
def unrolled() -> Any:
    """The hypergradient through a training run to convergence."""
    with jax.enable_x64(True):
        gradient = jax.grad(lambda *args: outer(by_training(jnp.zeros(4), *args)), argnums=(0, 1))
        return jax.device_get(jax.jit(gradient)(*map(jnp.asarray, AT)))


@pytest.mark.parametrize("solve", [by_scipy, by_optax, by_while_loop])
def test_any_solver_gives_what_unrolled_training_gives(x64: None, unrolled: Any, solve: Any) -> None:
    linear = implicit.ConjugateGradients(tolerance=1e-12)
    fit = implicit.minimizer(logistic, linear=linear, tolerance=1e-6)(solve)
    gradient = jax.grad(lambda *args: outer(fit(jnp.zeros(4), *args)), argnums=(0, 1))
    found = (gradient if solve is by_scipy else jax.jit(gradient))(*map(jnp.asarray, AT))
    assert fit.__name__ == solve.__name__
    for a, b in zip(found, unrolled):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_scipy_inside_compiled_and_mapped_code(x64: None) -> None:
    seen = []

    @implicit.root(lambda w, x, scale: {"w": scale * w["w"] ** 2 - x})
    @implicit.host
    def square_root(init: Any, x: Any, scale: Any, *, method: str) -> Any:
        seen.append((type(x), method))
        found = scipy.optimize.root(lambda w: scale * w**2 - x, init["w"], method=method, tol=1e-12)
        return {"w": found.x}

    init, scale = {"w": jnp.ones(2)}, 0.5
    x = jnp.array([[2.0, 8.0], [4.5, 0.5]])
    slopes = jax.vmap(jax.grad(lambda x: square_root(init, x, scale, method="hybr")["w"].sum()))
    np.testing.assert_allclose(jax.jit(slopes)(x), 1 / jnp.sqrt(2 * x), rtol=1e-6)
    assert set(seen) == {(np.ndarray, "hybr")}
    np.testing.assert_allclose(square_root(init, x[0], scale, method="hybr")["w"], [2, 4])


def test_higher_derivatives_and_mapped_linear_systems(x64: None) -> None:
    @implicit.root(lambda w, x: w**2 - x, linear=implicit.Direct(), tolerance=1e-8)
    def square_root(init: Array, x: Array) -> Array:
        return jnp.sqrt(x)

    f = lambda x: square_root(jnp.ones(()), x)  # noqa: E731
    x = jnp.array([1.0, 4.0])
    both = jax.jit(jax.vmap(lambda x: (jax.grad(jax.grad(f))(x), jax.jacfwd(jax.grad(f))(x))))
    for found in both(x):
        np.testing.assert_allclose(found, -(x**-1.5) / 4, rtol=1e-10)


def test_what_the_objective_closes_over_is_differentiated(x64: None) -> None:
    def minimum(target: Array) -> Array:
        @implicit.minimizer(lambda w: jnp.sum((w - target) ** 2) + jnp.sum(w**2))
        def solve(init: Array) -> Array:
            return target / 2

        return jnp.sum(solve(jnp.zeros(3)) ** 2)

    np.testing.assert_allclose(jax.grad(minimum)(jnp.arange(3.0)), jnp.arange(3.0) / 2)
    np.testing.assert_allclose(jax.jit(jax.grad(minimum))(jnp.arange(3.0)), jnp.arange(3.0) / 2)


# ---- exact zeros


def test_rates_settings_and_starts_are_announced_before_any_work() -> None:
    solved = []

    @implicit.minimizer(lambda w, hypers, momentum: (w - hypers["target"]) ** 2 + momentum)
    def solve(init: Array, hypers: Any, momentum: Array, *, schedule: Array) -> Array:
        solved.append(1)
        return hypers["target"]

    def value(init: Array, hypers: Any, momentum: Array, schedule: Array) -> Array:
        return solve(init, hypers, momentum, schedule=schedule)

    arguments = jnp.ones(()), {"rate": jnp.ones(()), "target": jnp.ones(())}, jnp.ones(()), jnp.ones(3)
    names = r"hypers\['rate'\], momentum, init, schedule is exactly 0.*hypergrad\.train"
    gradient = jax.grad(value, argnums=(0, 1, 2, 3))
    for function in (gradient, jax.jit(gradient), jax.grad(jax.jit(value), argnums=(0, 1, 2, 3))):
        solved.clear()
        with pytest.raises(implicit.ZeroHypergradientWarning, match=names):
            function(*arguments)  # warnings are errors here
        assert solved == [] or function is not gradient
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", implicit.ZeroHypergradientWarning)
        found = gradient(*arguments)
    assert found[1] == {"rate": 0, "target": 1}
    assert found[0] == found[2] == 0 and not found[3].any()
    still = jax.lax.stop_gradient(arguments[1]["rate"])  # as the message says
    target = lambda x: value(arguments[0], {"rate": still, "target": x}, *arguments[2:])  # noqa: E731
    assert jax.grad(target)(jnp.ones(())) == 1
    assert value(*arguments) == 1  # not differentiated, nothing to announce


def test_hypers_without_influence_are_announced_by_hypergradient() -> None:
    objective = lambda w, h: (w - h["target"]) ** 2 + jnp.sign(h["rate"]) * w**2  # noqa: E731
    at = {"rate": jnp.ones(()), "target": jnp.ones(()), "direct": jnp.ones(())}
    outer = lambda w, h: w * h["direct"]  # noqa: E731
    with pytest.warns(implicit.ZeroHypergradientWarning, match=r"in hypers\['rate'\] is exactly 0"):
        found = implicit.hypergradient(objective, outer, 0.5, at)
    assert found.gradient == {"rate": 0, "target": 0.5, "direct": 0.5}


# ---- approximate solutions and warm starts


def test_hoag_needs_no_promotion_of_types() -> None:
    def found() -> implicit.Hoag:
        return implicit.hoag(
            lambda w, h: (w - h) ** 2 + w**2,
            lambda w, h: (w - 1) ** 2,
            jnp.float32(0.5),
            jnp.float32(0.0),
            solve=lambda w, h, tolerance: h / 2,
            tolerances=jnp.full(3, 1e-3),
            optimizer=optax.adam(0.3),
        )

    expected = found()
    with jax.numpy_dtype_promotion("strict"):
        jax.tree.map(np.testing.assert_array_equal, found(), expected)
    assert expected.hypers > 0.5


def test_hoag_arrives_where_the_accurate_hypergradient_is_zero(x64: None) -> None:
    problem = ridge()
    objective = lambda w, log_penalty: problem.objective(w, jnp.exp(log_penalty), problem.y)  # noqa: E731
    outer = lambda w, _: problem.outer(w)  # noqa: E731
    count = []

    def solve(w: Array, log_penalty: Array, tolerance: Array) -> Array:
        slope = lambda w: jax.grad(objective)(w, log_penalty)  # noqa: E731
        going = lambda w: jnp.linalg.norm(slope(w)) > tolerance  # noqa: E731
        count.append(1)
        return jax.lax.while_loop(going, lambda w: w - 0.2 * slope(w), w)

    found = jax.jit(
        lambda start: implicit.hoag(
            objective,
            outer,
            start,
            jnp.zeros(12),
            solve=solve,
            tolerances=0.1 * 0.8 ** jnp.arange(80),
            optimizer=optax.adam(0.3),
        )
    )(jnp.asarray(0.0))
    best = scipy.optimize.minimize_scalar(
        lambda x: float(problem.outer(problem.minimum(np.exp(x), problem.y))), bounds=(-5, 5)
    )
    np.testing.assert_allclose(found.hypers, best.x, atol=1e-2)
    np.testing.assert_allclose(found.values[-1], best.fun, rtol=1e-4)
    assert found.values.shape == (80,) and len(count) == 1  # traced once


def test_a_warm_start_at_the_solution_needs_no_iterations(x64: None) -> None:
    problem, penalty = ridge(), jnp.asarray(0.3)
    matvec = lambda v: problem.hessian(penalty) @ v  # noqa: E731
    b = jnp.linspace(1, 2, 12)
    x = jnp.linalg.solve(problem.hessian(penalty), b)
    for one_step in (
        implicit.ConjugateGradients(iterations=1, tolerance=1e-8),
        implicit.NormalEquations(iterations=1, tolerance=1e-8),
        implicit.Neumann(step=0.1, terms=1, tolerance=1e-8),
        implicit.Nystrom(rank=1, damping=0.1, iterations=1, tolerance=1e-8),
    ):
        solve = jax.jit(
            lambda start, linear=one_step: implicit.linear_solve(matvec, b, start, linear=linear)
        )
        np.testing.assert_allclose(solve(x), x, rtol=1e-9)
        with pytest.raises(Exception, match="relative residual"):
            solve(jnp.zeros(12)).block_until_ready()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_right_hand_side_of_zero_or_of_tiny_numbers(name: str) -> None:
    linear: Any = replace(SOLVERS[name], tolerance=1e-3)
    matvec = lambda v: jnp.array([0.5, 1.0, 2.0]) * v  # noqa: E731
    solve = jax.jit(lambda b: implicit.linear_solve(matvec, b, jnp.ones(3), linear=linear))
    b = jnp.array([1e-30, -2e-30, 1e-30])  # whose squares are 0
    np.testing.assert_allclose(solve(b), b / jnp.array([0.5, 1, 2]), rtol=1e-2)
    assert not solve(jnp.zeros(3)).any()


def test_nystrom_alone_is_the_damped_inverse_of_a_matrix_of_low_rank(x64: None) -> None:
    low = jnp.asarray(np.random.default_rng(5).normal(size=(9, 3)))
    alone = implicit.Nystrom(rank=3, damping=0.1, iterations=0, accept=math.inf)
    b = jnp.linspace(1, 2, 9)
    found = jax.jit(lambda b: implicit.linear_solve(lambda v: low @ (low.T @ v), b, linear=alone))(b)
    np.testing.assert_allclose(found, jnp.linalg.solve(low @ low.T + 0.1 * jnp.eye(9), b), rtol=1e-8)


def test_one_hyperparameter_per_example_costs_one_gradient() -> None:
    """Two million weights, and no matrix with as many rows."""
    n = 2_000_000
    x = jnp.linspace(-1, 1, n)

    def objective(w: Array, weights: Array) -> Array:
        return jnp.mean(weights * (w - x) ** 2)

    @implicit.minimizer(objective)
    def weighted_mean(init: Array, weights: Array) -> Array:
        return jnp.sum(weights * x) / jnp.sum(weights)

    found = jax.jit(jax.grad(weighted_mean, argnums=1))(jnp.zeros(()), jnp.ones(n))
    np.testing.assert_allclose(n * found, x, atol=1e-4)


# ---- what is refused


def test_a_point_that_is_no_solution_is_refused() -> None:
    @implicit.minimizer(lambda w, x: (w - x) ** 2, tolerance=1e-3)
    def solve(init: Array, x: Array) -> Array:
        return x + 1

    message = r"minimizer\(objective, .*tolerance=0.001\): the point is no solution.*is 2, above.*of 0.001"
    with pytest.raises(implicit.ConvergenceError, match=message):
        jax.grad(solve, argnums=1)(0.0, 3.0)
    with pytest.raises(Exception, match=message):
        jax.jit(jax.grad(solve, argnums=1))(0.0, 3.0)  # which does not depend on the point


BAD_SYSTEMS = {
    "indefinite": (implicit.ConjugateGradients(iterations=2), [1.0, -1.0, 3.0, 7.0], "use GMRES"),
    "few": (implicit.ConjugateGradients(iterations=1), [1.0, 2.0, 3.0, 4.0], "more iterations"),
    "singular": (implicit.Direct(), [1.0, 0.0, 1.0, 1.0], r"NormalEquations\(damping"),
    "normal": (implicit.NormalEquations(), [1.0, 0.0, 1.0, 1.0], "add damping"),
    "diverges": (implicit.Neumann(step=1.0, terms=50), [1.0, 2.0, 3.0, 4.0], "largest eigenvalue"),
    "gmres": (implicit.GMRES(restart=2, cycles=1), [1.0, 2.0, 3.0, 4.0], "longer restart"),
    "nystrom": (
        implicit.Nystrom(rank=2, damping=0.1, iterations=0),
        [1.0, 2.0, 3.0, 4.0],
        "higher rank",
    ),
    "not semidefinite": (
        implicit.Nystrom(rank=4, damping=0.1),
        [1.0, -2.0, 3.0, 4.0],
        "positive semidefinite",
    ),
}


@pytest.mark.parametrize("name", BAD_SYSTEMS)
def test_a_system_that_is_not_solved_is_refused(name: str) -> None:
    linear, diagonal, way_out = BAD_SYSTEMS[name]
    matvec = lambda v: jnp.array(diagonal) * v  # noqa: E731
    solve = jax.jit(lambda b: implicit.linear_solve(matvec, b, linear=linear))
    with pytest.raises(Exception, match=rf"left a relative residual of.*{way_out}.*accept=math.inf"):
        solve(jnp.array([1.0, 2.0, 1.0, 2.0])).block_until_ready()


def test_an_approximate_hypergradient_is_accepted_by_its_tolerance() -> None:
    """Ten terms of the Neumann series are the unrolled derivative of ten steps of gradient descent."""
    few = implicit.Neumann(step=0.1, terms=10, accept=0.5)
    fit = implicit.minimizer(lambda w, x: (w - x) ** 2 / 2, linear=few)(lambda init, x: x)
    np.testing.assert_allclose(jax.grad(fit, argnums=1)(0.0, 3.0), 1 - 0.9**10, rtol=1e-5)
    strict = implicit.minimizer(lambda w, x: (w - x) ** 2 / 2, linear=implicit.Neumann(0.1, 10))
    for gradient in (jax.grad, lambda *a, **k: jax.jit(jax.grad(*a, **k))):
        with pytest.raises(
            Exception, match=r"Neumann.*residual of 0.35, above the 0.00035 that it accepts"
        ):
            gradient(strict(lambda init, x: x), argnums=1)(0.0, 3.0)


def quadratic(w: Any, x: Any) -> Any:
    return jnp.sum((w - x) ** 2)


def decorated(function: Any, solve: Any = lambda init, x: init, make: Any = implicit.minimizer) -> Any:
    return make(function)(solve)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: implicit.ConjugateGradients(iterations=0), r"ConjugateGradients\(iterations=0.*least 1"),
        (lambda: implicit.ConjugateGradients(damping=-1.0), "damping must be at least 0"),
        (lambda: implicit.NormalEquations(tolerance=-1.0), "tolerance must be at least 0"),
        (lambda: implicit.ConjugateGradients(tolerance=10), r"tolerance=10.*below 1.*accept=math.inf"),
        (lambda: implicit.GMRES(tolerance=math.inf), "tolerance must be below 1"),
        (lambda: implicit.NormalEquations(tolerance=1.0), "tolerance must be below 1"),
        (lambda: implicit.Nystrom(1, 0.1, tolerance=1.0), "tolerance must be below 1"),
        (lambda: implicit.Direct(accept=0.0), "accept must be above 0; math.inf accepts"),
        (lambda: implicit.Neumann(step=-1.0, terms=1), "step must be at least 0"),
        (lambda: implicit.GMRES(restart=0), "restart must be at least 1"),
        (lambda: implicit.Nystrom(rank=2, damping=0.0), "damping must be above 0"),
        (lambda: implicit.Direct(largest=0), "largest must be at least 1"),
        (
            lambda: implicit.linear_solve(lambda v: v, jnp.ones(9), linear=implicit.Direct(largest=8)),
            r"Direct\(largest=8.*9 unknowns.*use ConjugateGradients",
        ),
        (lambda: implicit.linear_solve(lambda v: v, jnp.ones(2), jnp.ones(3)), "start must be like b"),
        (lambda: implicit.linear_solve(lambda v: v, jnp.arange(2)), "b is int32"),
        (lambda: implicit.minimizer(quadratic, tolerance=0.0), "tolerance must be above 0"),
        (lambda: decorated(lambda w, x: w - x)(jnp.ones(2), 1.0), r"objective must return one scalar"),
        (lambda: decorated(quadratic)(jnp.arange(2), 1.0), "init is int32"),
        (
            lambda: decorated(lambda w, x: w[:1], make=implicit.root)(jnp.ones(2), 1.0),
            r"optimality must return a tree like init, float32\[2\], and returned float32\[1\]",
        ),
        (
            lambda: decorated(quadratic, lambda init, x: init[:1])(jnp.ones(2), 1.0),
            r"solve must return a tree like init, float32\[2\], not \[1\]",
        ),
        (
            lambda: implicit.hypergradient(quadratic, lambda w, h: w, jnp.ones(2), jnp.ones(2)),
            "outer must return one scalar float",
        ),
        (
            lambda: implicit.hypergradient(
                quadratic, quadratic, jnp.ones(2), jnp.ones(2), start=jnp.ones(3)
            ),
            "start must be like params",
        ),
        (
            lambda: implicit.hypergradient(quadratic, quadratic, jnp.ones(2), jnp.zeros(2)),
            "the point is no solution",
        ),
        (
            lambda: implicit.hoag(
                quadratic, quadratic, 1.0, 1.0, solve=quadratic, tolerances=0.1, optimizer=optax.sgd(0.1)
            ),
            r"tolerances must be floats \(K,\)",
        ),
        (
            lambda: implicit.hoag(
                quadratic,
                quadratic,
                1.0,
                1.0,
                solve=quadratic,
                tolerances=jnp.zeros(2),
                optimizer=optax.sgd(0.1),
            ),
            "tolerances must be above 0",
        ),
    ],
    ids=range(25),
)
def test_messages(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, implicit.ConvergenceError), match=message):
        call()
