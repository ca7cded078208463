"""Derivatives of hypergradients, in every nesting, against plain JAX: `jax.lax.scan` and `jax.grad`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import hypergrad as hg
from hypergrad import curvature, implicit

STEPS = 3
ADJOINTS = [
    hg.Reversible(),
    hg.Reversible(segments=3),
    hg.Reversible(segments=2),  # of 2 steps and of 1
    hg.Stored(),
    hg.Checkpointed(),
    hg.Truncated(STEPS, hg.Reversible()),
]
RATE, DECAY = 0.1, 0.5


def each(*adjoints: Any, slow: Any = ()) -> Any:
    """A test for these adjoints, and for some that take too long for every day."""
    later = [pytest.param(adjoint, marks=pytest.mark.slow) for adjoint in slow]
    return pytest.mark.parametrize("adjoint", [*adjoints, *later], ids=repr)


every = each(ADJOINTS[0], slow=ADJOINTS[1:])
typical = each(ADJOINTS[0], slow=[ADJOINTS[1], hg.Stored()])


def plain(loss: Any, start: Any, rate: Any, meta: Any, steps: int = STEPS, decay: Any = DECAY) -> Any:
    """Momentum as the library defines it, by `jax.lax.scan`."""

    def step(carry: Any, x: Any) -> Any:
        (w, v), (t, rate) = carry, x
        value, slope = jax.value_and_grad(loss)(w, meta, t)
        v = decay * v - (1 - decay) * slope
        return (w + rate * v, v), value

    start = jnp.asarray(start, float)
    rates = jnp.broadcast_to(jnp.asarray(rate, float), (steps,))
    (w, _), losses = jax.lax.scan(step, (start, jnp.zeros_like(start)), (jnp.arange(steps), rates))
    return w, losses


def ours(adjoint: Any) -> Any:
    """The same by the library."""

    def train(loss: Any, start: Any, rate: Any, meta: Any, steps: int = STEPS, decay: Any = DECAY) -> Any:
        hypers = {"learning_rate": rate, "momentum": decay}
        start = jnp.asarray(start, float)
        trained = hg.train(loss, start, hypers, meta, steps=steps, adjoint=adjoint)
        return trained.params, trained.losses

    return train


def square(w: Array, q: Array, t: Any) -> Array:
    return (w - q) ** 2


def quartic(w: Array, meta: Any, t: Any) -> Array:
    return w**4 / 4


def wavy(w: Array, meta: Any, t: Any) -> Array:
    """With third derivatives in everything, and the step in it."""
    return jnp.cos(2 * w + 0.1 * t) + meta * w**2 + jnp.sin(meta) * w


# ---- problems: each is a function of how to train, and gives a function of numbers


def of_target(train: Any) -> Any:
    """``w_T**3`` of ``(w - q)**2``, whose second derivative is easily lost: the hypergradient of ``w_T`` is
    constant."""
    return lambda q: train(square, 0.3, 0.5, q)[0] ** 3


def of_rate(train: Any) -> Any:
    return lambda rate: train(quartic, 1.0, rate, None)[0]


def of_all(train: Any) -> Any:
    """In the start, the momentum, a schedule and what the loss takes, of the end and the losses."""

    def objective(x: Any) -> Array:
        w, losses = train(wavy, x[0], jnp.exp(x[2:5]), x[1], decay=jax.nn.sigmoid(x[5]))
        return w**2 + 0.3 * jnp.sum(losses**2)

    return objective


POINT = np.array([0.4, 0.3, -1.0, -0.7, -1.4, 0.2])
ALONG = np.array([1.0, -0.5, 0.3, 0.8, -0.2, 0.6])


@each(*ADJOINTS[:2], *ADJOINTS[3:5], slow=[ADJOINTS[2], ADJOINTS[5]])
def test_a_gradient_of_a_gradient(x64: None, adjoint: Any) -> None:
    q = 0.7
    twice = lambda f: jax.jit(jax.grad(jax.grad(f)))(q)  # noqa: E731
    found, expected = twice(of_target(ours(adjoint))), twice(of_target(plain))
    # In closed form the end is linear in q.
    slope = plain(square, 0.0, 0.5, 1.0)[0]
    np.testing.assert_allclose(expected, 6 * slope**2 * plain(square, 0.3, 0.5, q)[0], rtol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@every
def test_a_hessian_in_a_constant_rate(x64: None, adjoint: Any) -> None:
    found, expected = (jax.jit(jax.hessian(of_rate(train)))(RATE) for train in (ours(adjoint), plain))
    assert abs(expected) > 1
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.quick("Reversible(bits=(), radix=(), segments=3)")
@each(ADJOINTS[1], slow=[a for a in ADJOINTS if a != ADJOINTS[1]])
def test_hessian_vector_products_in_everything(x64: None, adjoint: Any) -> None:
    """Forward over reverse, reverse over reverse, and a third derivative."""
    x, u = jnp.asarray(POINT), jnp.asarray(ALONG)

    @jax.jit
    def forwards(x: Array) -> Any:
        return jax.jvp(jax.grad(of_all(ours(adjoint))), (x,), (u,))

    expected, by_plain = jax.jit(lambda x: (jax.hessian(of_all(plain))(x), jax.grad(of_all(plain))(x)))(x)
    slope, product = forwards(x)
    np.testing.assert_allclose(slope, by_plain, rtol=1e-7)
    np.testing.assert_allclose(product, expected @ u, rtol=1e-6)
    backwards = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(of_all(ours(adjoint)))(x), u)))
    np.testing.assert_allclose(backwards(x), expected @ u, rtol=1e-6)


@pytest.mark.slow
@typical
def test_outside_jit(x64: None, adjoint: Any) -> None:
    found = jax.grad(jax.grad(of_target(ours(adjoint))))(0.7)
    np.testing.assert_allclose(found, jax.grad(jax.grad(of_target(plain)))(0.7), rtol=1e-7)


@each(hg.Stored(), slow=ADJOINTS[:2])
def test_third_derivatives(x64: None, adjoint: Any) -> None:
    thrice = lambda f: jax.jit(jax.grad(jax.grad(jax.grad(f))))(0.7)  # noqa: E731
    of_meta = lambda train: lambda meta: train(wavy, 0.4, 0.2, meta)[0] ** 2  # noqa: E731
    np.testing.assert_allclose(thrice(of_meta(ours(adjoint))), thrice(of_meta(plain)), rtol=1e-6)


@pytest.mark.slow
@typical
def test_under_vmap(x64: None, adjoint: Any) -> None:
    """Of the second derivative, and the second derivative of many runs at once."""
    qs = jnp.array([0.7, -0.2, 1.5])
    expected = jax.vmap(jax.grad(jax.grad(of_target(plain))))(qs)
    found = jax.jit(jax.vmap(jax.grad(jax.grad(of_target(ours(adjoint))))))(qs)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    total = lambda qs: jnp.sum(jax.vmap(of_target(ours(adjoint)))(qs))  # noqa: E731
    found = jax.jit(lambda qs: jax.jvp(jax.grad(total), (qs,), (jnp.ones(3),))[1])(qs)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.slow
@typical
def test_a_run_within_the_loss_of_a_run(x64: None, adjoint: Any) -> None:
    """Meta-learning in a run that is tuned: the inner run starts at the parameters of the outer one."""

    def tuned(train: Any) -> Any:
        def of_start(w: Array, rate: Array, t: Any) -> Array:
            adapted, _ = train(wavy, w, rate, 0.3, steps=2)
            return (adapted - 1) ** 2 + 0.1 * w**2

        return lambda rate: train(of_start, 0.2, 0.3, rate, steps=2)[0] ** 2

    found, expected = (jax.jit(jax.grad(tuned(train)))(RATE) for train in (ours(adjoint), plain))
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.slow
@typical
def test_a_rate_of_meta_steps_is_learned(x64: None, adjoint: Any) -> None:
    """The outer run learns the rate of the inner one; its own rate is differentiated."""

    def learned(train: Any) -> Any:
        outer = lambda log_rate, _, t: train(wavy, 0.4, jnp.exp(log_rate), 0.3)[0] ** 2  # noqa: E731
        return lambda meta_rate: train(outer, -1.0, meta_rate, None, steps=2)[0]

    for derivative in (jax.grad, lambda f: jax.grad(jax.grad(f))):
        found, expected = (jax.jit(derivative(learned(train)))(0.5) for train in (ours(adjoint), plain))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@typical
def test_the_curvature_of_an_outer_objective(x64: None, adjoint: Any) -> None:
    x, u = jnp.asarray(POINT), jnp.asarray(ALONG)
    product = jax.jit(lambda x: curvature.hessian(of_all(ours(adjoint)), x)(u))(x)
    np.testing.assert_allclose(product, jax.jit(jax.hessian(of_all(plain)))(x) @ u, rtol=1e-6)


@pytest.mark.slow
@typical
def test_an_implicit_minimizer_over_hypergradients(x64: None, adjoint: Any) -> None:
    """``argmin_meta (w_T(meta) - y)**2 + meta**2``, differentiated in ``y``."""

    def objective(train: Any) -> Any:
        return lambda meta, y: (train(wavy, 0.4, 0.2, meta)[0] - y) ** 2 + meta**2

    def minimum(train: Any) -> Any:
        slope = jax.grad(objective(train))
        return lambda y: jax.lax.fori_loop(0, 100, lambda _, m: m - 0.3 * slope(m, y), jnp.asarray(0.0))

    fit = implicit.minimizer(objective(ours(adjoint)), tolerance=1e-6)(lambda _, y: minimum(plain)(y))
    found = jax.jit(jax.grad(lambda y: fit(jnp.asarray(0.0), y)))(0.5)
    m = minimum(plain)(0.5)
    A = jax.grad(jax.grad(objective(plain)))(m, 0.5)
    M = jax.grad(jax.grad(objective(plain)), argnums=1)(m, 0.5)
    np.testing.assert_allclose(found, -M / A, rtol=1e-6)


@typical
def test_derivatives_in_what_a_loss_closes_over(x64: None, adjoint: Any) -> None:
    def objective(train: Any) -> Any:
        return lambda c: train(lambda w, _, t: wavy(w, jnp.sin(c), t), 0.4, 0.2, None)[0] ** 3

    found, expected = (jax.jit(jax.hessian(objective(train)))(0.6) for train in (ours(adjoint), plain))
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize(
    "optimizer", [hg.adam(), pytest.param(hg.sgd(), marks=pytest.mark.slow)], ids=lambda o: o.name
)
def test_other_optimizers(x64: None, optimizer: Any) -> None:
    adjoint = hg.Reversible() if optimizer.reversible else hg.Checkpointed()

    def by_library(rate: Array) -> Array:
        hypers = {"learning_rate": rate}
        w0 = jnp.asarray(0.4)
        return hg.train(wavy, w0, hypers, 0.3, steps=4, optimizer=optimizer, adjoint=adjoint).params ** 2

    def by_hand(rate: Array) -> Array:
        w, m, v = jnp.asarray(0.4), 0.0, 0.0
        for t in range(4):
            g = jax.grad(wavy)(w, 0.3, t)
            if optimizer.name == "sgd()":
                w = w - rate * g
                continue
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            w -= rate * m / (1 - 0.9 ** (t + 1)) / (jnp.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        return w**2

    found, expected = (jax.jit(jax.hessian(f))(0.2) for f in (by_library, by_hand))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@every
def test_what_is_watched_has_second_derivatives(x64: None, adjoint: Any) -> None:
    def watched(meta: Array) -> Array:
        hypers = {"learning_rate": 0.2, "momentum": DECAY}
        watch = lambda s: (s.step, s.params**2 + s.gradient * s.loss, s.params > 0)  # noqa: E731
        start = jnp.asarray(0.4)
        run = hg.train(wavy, start, hypers, meta, steps=STEPS, adjoint=adjoint, watch=watch)
        return jnp.sum(run.watched[1] * run.watched[0])

    def by_hand(meta: Array) -> Array:
        w, v, total = jnp.asarray(0.4), 0.0, 0.0
        for t in range(STEPS):
            value, g = jax.value_and_grad(wavy)(w, meta, t)
            total += t * (w**2 + g * value)
            v = DECAY * v - (1 - DECAY) * g
            w = w + 0.2 * v
        return total

    for derivative in (jax.grad, jax.hessian):
        found, expected = (jax.jit(derivative(f))(0.3) for f in (watched, by_hand))
        np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.slow
def test_truncated_differentiates_twice_what_it_differentiates_once(x64: None) -> None:
    """The last two steps from a start that counts as constant."""

    def by_hand(meta: Array) -> Array:
        w, v = jnp.asarray(0.4), 0.0
        for t in range(STEPS):
            used = meta if t >= 1 else jax.lax.stop_gradient(meta)
            v = DECAY * v - (1 - DECAY) * jax.grad(wavy)(w, used, t)
            w = w + 0.2 * v
        return w**3

    expected = jax.hessian(by_hand)(0.3)
    for inner in (hg.Reversible(), hg.Stored()):
        train = ours(hg.Truncated(STEPS - 1, inner))
        found = jax.jit(jax.hessian(lambda meta, train=train: train(wavy, 0.4, 0.2, meta)[0] ** 3))(0.3)
        np.testing.assert_allclose(found, expected, rtol=1e-7)


# ---- rules of derivatives within an outer loop by `jax.lax.scan`, which JAX may lose at second order


def chained(train: Any) -> Any:
    """Every run starts where the one before ended."""

    def objective(x: Array) -> Array:
        def body(w: Array, _: None) -> Any:
            end = train(wavy, w, 0.2, x)[0]
            return end, end**2

        w, losses = jax.lax.scan(body, 0.4 + x, None, length=2)
        return w**3 + jnp.sum(losses)

    return objective


@pytest.mark.parametrize("derivative", ["grad of grad", "hessian", "forwards only"])
def test_forward_in_a_loop(x64: None, derivative: str) -> None:
    of = {
        "grad of grad": lambda f: jax.grad(jax.grad(f)),
        "hessian": jax.hessian,
        "forwards only": lambda f: jax.jacfwd(jax.jacfwd(f)),
    }[derivative]
    found, expected = (jax.jit(of(chained(train)))(0.3) for train in (ours(hg.Forward()), plain))
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def coupled(w: Array, h: Array) -> Array:
    return 0.25 * jnp.sum(w**4) + 0.5 * jnp.sum((w - jnp.sin(h)) ** 2) + 0.1 * w[0] * w[1] * h[0]


def by_newton(w: Array, h: Array) -> Array:
    step = lambda w, _: (w - jnp.linalg.solve(jax.hessian(coupled)(w, h), jax.grad(coupled)(w, h)), None)  # noqa: E731
    return jax.lax.scan(step, w, length=8)[0]


STRICT: Any = {"tolerance": 1e-6, "linear": implicit.GMRES(tolerance=1e-13)}


def repeated(solve: Any) -> Any:
    """Solutions of solutions."""

    def objective(x: Array) -> Array:
        def body(h: Array, _: None) -> Any:
            w = solve(jnp.zeros(2), h)
            return jnp.cos(w) + 0.3 * h, jnp.sum(w**2)

        h, losses = jax.lax.scan(body, jnp.stack([x, x**2]), None, length=2)
        return jnp.sum(h**3) + jnp.sum(losses)

    return objective


def learned(solve: Any) -> Any:
    """Meta-steps along the gradients of solutions."""

    def objective(x: Array) -> Array:
        def body(m: Array, _: None) -> Any:
            fit = lambda m: jnp.sum((solve(jnp.zeros(2), jnp.stack([m, x])) - 0.7) ** 2)  # noqa: E731
            g = jax.grad(fit)(m)
            return m - 0.3 * g, g

        m, slopes = jax.lax.scan(body, x, None, length=2)
        return m**2 + jnp.sum(slopes**2)

    return objective


SECOND = {"grad of grad": lambda f: jax.grad(jax.grad(f)), "hessian": jax.hessian}


@pytest.mark.slow
@pytest.mark.quick("root-repeated-hessian")
@pytest.mark.parametrize("derivative", SECOND)
@pytest.mark.parametrize("problem", [repeated, learned], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "decorate",
    [implicit.minimizer(coupled, **STRICT), implicit.root(jax.grad(coupled), **STRICT)],
    ids=["minimizer", "root"],
)
def test_implicit_solutions_in_a_loop(x64: None, decorate: Any, problem: Any, derivative: str) -> None:
    """Against plain JAX through Newton's steps."""
    found, expected = (
        jax.jit(SECOND[derivative](problem(solve)))(0.3) for solve in (decorate(by_newton), by_newton)
    )
    assert abs(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.quick("probability_of_improvement")
@pytest.mark.parametrize(
    "rule", [hg.optimizers.probability_of_improvement, hg.optimizers.expected_improvement]
)
def test_steps_that_are_roots(x64: None, rule: Any) -> None:
    """Against finite differences of the first derivative, which is tested elsewhere."""
    batches = jnp.asarray(np.random.default_rng(0).normal(0.5, 1.0, (4, 6, 3)))

    def loss(w: Array, meta: Any, batch: Array) -> Array:
        return jnp.mean(jax.nn.softplus(-batch @ w) + 0.01 * jnp.sum(batch**2, 1) * jnp.sum(w**4))

    def objective(inflation: Array) -> Array:
        hypers = {"max_step": 3.0, "curvature_inflation": inflation, "step_decay": 0.8}
        optimizer = hg.filtered(rule)
        start = jnp.array([-0.5, 0.2, 1.0])
        run = hg.train(
            loss, start, hypers, None, batches, steps=4, optimizer=optimizer, adjoint=hg.Stored()
        )
        return jnp.sum(run.params**2)

    slope, h = jax.jit(jax.grad(objective)), 1e-5
    expected = (slope(0.8 + h) - slope(0.8 - h)) / (2 * h)
    assert abs(expected) > 1e-4
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(objective)))(0.8), expected, rtol=1e-5)
