"""The curvature-aware gradient filter, the rules for its step, and hypergradients through it."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import hypergrad as hg
from hypergrad.optimizers.kalman_filter import (
    Average,
    Belief,
    averaged,
    correct,
    filter_loss,
    predict,
    value,
)
from hypergrad.optimizers.step_rules import (
    Improvement,
    expected_improvement,
    law,
    probability_of_improvement,
    quadratic,
)
from tests.problems import relative_error

STEPS, EXAMPLES, SIZE = 30, 6, 4
RULES = {"none": None, "PI": probability_of_improvement, "EI": expected_improvement, "quadratic": quadratic}
HYPERS = {
    "learning_rate": 0.9,
    "gradient_decay": 0.9,
    "gradient_inflation": 1.2,
    "curvature_inflation": 0.8,
    "initial_variance": 2.0,
    "eps": 1e-2,
    "max_step": 3.0,  # reached at some steps
    "step_decay": 0.8,
    "loss_decay": 0.7,
    "loss_inflation": 0.9,
}


START = np.linspace(-0.5, 1.0, SIZE)


def logistic(w: Array, scale: Any, batch: Array) -> Array:
    """Not quadratic; its Hessian differs from example to example."""
    return jnp.mean(jax.nn.softplus(-batch @ w) + scale * jnp.sum(batch**2, 1) * jnp.sum(w**4))


def logistic_batches(steps: int = STEPS) -> Array:
    return jnp.asarray(np.random.default_rng(0).normal(0.5, 1.0, (steps, EXAMPLES, SIZE)))


def paraboloid(w: Array, curvature: Any, batch: Array) -> Array:
    return 0.5 * jnp.mean(jnp.sum(curvature * (w[None] - batch) ** 2, 1))


def run(optimizer: Any, hypers: Any, **changes: Any) -> hg.Trained:
    batches = logistic_batches(changes.get("steps", STEPS))
    arguments = {"steps": STEPS, "adjoint": hg.Stored(), "meta": 0.01, "batches": batches} | changes
    loss = arguments.pop("loss", logistic)
    return hg.train(loss, START, hypers, optimizer=optimizer, **arguments)


# ---- the filter


def test_gain_is_that_of_a_mean(x64: None) -> None:
    rng = np.random.default_rng(0)
    deviations = rng.normal(size=(1, 8, SIZE))  # the same at every step: so is the variance
    batches = jnp.asarray(deviations + rng.normal(size=(STEPS, 1, SIZE)))
    h = jnp.asarray(rng.uniform(0.1, 1.0, (1, SIZE)))
    t = np.arange(STEPS)
    for start in (1e-3, 1e4, 1e13):
        trained = run(
            hg.filtered(),
            {"learning_rate": 0.5, "initial_variance": start},
            loss=paraboloid,
            meta=h,
            batches=batches,
            watch=lambda s: s.state["state"].diagnosis.gain,
        )
        variance = np.mean(np.var(np.asarray(h * deviations[0]), axis=0, ddof=1)) / 8
        gains = np.append(trained.watched[1:], trained.state["state"].diagnosis.gain)
        np.testing.assert_allclose(1 / gains, t + 1 + variance / start, rtol=1e-9)
    np.testing.assert_allclose(gains, 1 / (t + 1), rtol=1e-9)


def test_filter_is_the_dense_kalman_filter(x64: None) -> None:
    """Against matrices, means and variances in NumPy, on examples whose Hessians differ."""
    batches = logistic_batches()
    hypers = {
        "learning_rate": 0.3,
        "gradient_decay": 0.8,
        "gradient_inflation": 1.5,
        "curvature_inflation": 2.0,
    }
    trained = run(hg.filtered(), hypers, watch=lambda s: (s.params, s.state["state"]))
    places, states = trained.watched
    gradient = jax.jit(jax.vmap(lambda w, x: jax.grad(logistic)(w, 0.01, x[None]), (None, 0)))
    hessian = jax.jit(jax.vmap(lambda w, x: jax.hessian(logistic)(w, 0.01, x[None]), (None, 0)))

    eye = np.eye(SIZE)
    m, P, weighted, weights, δ = np.zeros(SIZE), 1e4 * eye, 0.0, 0.0, np.zeros(SIZE)
    for t in range(STEPS - 1):
        g = np.asarray(gradient(places[t], batches[t]))
        h = np.asarray(hessian(places[t], batches[t])) @ δ
        of_mean = lambda x: np.var(x, axis=0, ddof=1).mean() / EXAMPLES  # noqa: E731
        weighted, weights = 0.8 * weighted + 0.2 * of_mean(g), 0.8 * weights + 0.2
        Σ, Q = 1.5 * weighted / weights * eye, 2.0 * of_mean(h) * eye
        m, P = m + h.mean(0), P + Q
        K = P @ np.linalg.inv(P + Σ)
        m = m + K @ (g.mean(0) - m)
        P = (eye - K) @ P @ (eye - K).T + K @ Σ @ K.T
        δ = -0.3 * m
        after = jax.tree.map(lambda x, t=t: np.asarray(x[t + 1]), states)
        np.testing.assert_allclose(after.gradient.mean, m, rtol=1e-9)
        np.testing.assert_allclose(after.gradient.variance, P[0, 0], rtol=1e-9)
        np.testing.assert_allclose(after.diagnosis.gain, K[0, 0], rtol=1e-9)
        np.testing.assert_allclose(after.diagnosis.gradient_variance, EXAMPLES * of_mean(g), rtol=1e-9)
        before = np.asarray(states.displacement[t])
        if t:
            along = before @ np.asarray(hessian(places[t], batches[t])).mean(0) @ before / (before @ before)
            np.testing.assert_allclose(after.diagnosis.curvature, along, rtol=1e-9)
        np.testing.assert_allclose(places[t + 1], places[t] + δ, rtol=1e-9)


def test_pieces_of_the_filter() -> None:
    belief, gain = correct(
        predict(Belief(jnp.array([1.0, 2.0]), 1.0), jnp.array([1.0, 0.0]), 2.0), jnp.zeros(2), 1.0
    )
    np.testing.assert_allclose(gain, 0.75)
    np.testing.assert_allclose(belief.mean, [0.5, 0.5])
    np.testing.assert_allclose(belief.variance, 0.75)
    certain, gain = correct(Belief(jnp.float32(1.0), jnp.float32(0.0)), jnp.float32(3.0), jnp.float32(0.0))
    assert (certain.mean, certain.variance, gain) == (3.0, 0.0, 1.0)
    average = Average(0.0, 0.0)
    for x, expected in ((2.0, 2.0), (4.0, (0.5 * 2 + 4) / 1.5)):
        average = averaged(average, x, 0.5)
        assert value(average) == pytest.approx(expected)


@pytest.mark.parametrize(("observed", "added"), [(1.5, 0.0), (9.0, 43.5)])
def test_loss_filter(observed: float, added: float) -> None:
    """Where the surprise exceeds its variance, the process noise makes up the difference."""
    u, s = filter_loss(Belief(jnp.float32(2.0), 1.0), -0.5, 3.0, jnp.float32(observed), 8.75)
    innovation = 1.0 + 3.0 + 8.75
    assert max((observed - 1.5) ** 2 - innovation, 0.0) == added
    before = 4.0 + added
    gain = before / (before + 8.75)
    assert float(u) == pytest.approx(1.5 + gain * (observed - 1.5))
    assert float(s) == pytest.approx((1 - gain) ** 2 * before + gain**2 * 8.75)


# ---- rules for the step


def draws(count: int) -> Array:
    """Slopes, curvatures of either sign and variances over many orders of magnitude, ``(count, 5)``."""
    rng = np.random.default_rng(0)
    a, p, q, c = np.exp(3 * rng.normal(size=(4, count)))
    b = rng.choice([-1, 1], count) * np.exp(2 * rng.normal(size=count))
    return jnp.stack([jnp.asarray(x) for x in (a, b, p, q, c)], axis=1)


def on_grid(numbers: Array, grid: Array) -> tuple[Array, Array]:
    """Probability, as its quantile, and expectation of the improvement, each ``(count, len(grid))``."""
    mean, variance = jax.vmap(lambda x: law(Improvement(*x), grid))(numbers)
    deviation = jnp.sqrt(variance)
    z = -mean / deviation
    return z, deviation * (z * jax.scipy.stats.norm.cdf(z) + jax.scipy.stats.norm.pdf(z))


@pytest.mark.slow
def test_most_probable_improvement_is_the_maximum(x64: None) -> None:
    numbers = draws(200)
    found = jax.jit(jax.vmap(lambda x: probability_of_improvement(Improvement(*x), 1e12)))(numbers)
    grid = jnp.geomspace(1e-7, 1e9, 20_001)
    best = grid[jnp.argmax(on_grid(numbers, grid)[0], axis=1)]
    inside = (best > grid[0]) & (best < grid[-1])
    assert inside.sum() > 190
    np.testing.assert_allclose(jnp.log(found / best)[inside], 0, atol=2e-3)  # the grid's resolution
    a, b, p, q, c = numbers.T
    terms = jnp.stack([a * q / 4 * found**4, b * p / 2 * found**3, c * b * found, -c * a])
    np.testing.assert_array_less(jnp.abs(terms.sum(0)), 1e-13 * jnp.abs(terms).sum(0))
    assert jnp.all(found[b > 0] <= (a / b)[b > 0])


def test_most_probable_improvement_in_float32() -> None:
    numbers = np.asarray(draws(300), np.float32)
    solve = lambda x: probability_of_improvement(Improvement(*x), 1e12)  # noqa: E731
    found = jax.jit(jax.vmap(solve))(numbers)
    with jax.enable_x64(True):
        exact = jax.jit(jax.vmap(solve))(jnp.asarray(numbers, jnp.float64))
    np.testing.assert_allclose(found, exact, rtol=1e-4)
    tiny = Improvement(*(jnp.float32(x) for x in (1e-20, 1e-20, 1e-30, 1e-30, 1e-30)))
    assert 0 < probability_of_improvement(tiny, 1e3) < 1  # where a q would underflow


def test_first_maximum_of_the_expected_improvement(x64: None) -> None:
    numbers = draws(200)
    limit = 100.0
    found = jax.jit(jax.vmap(lambda x: expected_improvement(Improvement(*x), limit)))(numbers)
    grid = jnp.geomspace(1e-7, limit, 20_001)
    expected = on_grid(numbers, grid)[1]
    falls = expected[:, 1:] < expected[:, :-1] * (1 - 1e-14)
    first = jnp.where(falls.any(1), grid[jnp.argmax(falls, axis=1)], limit)
    np.testing.assert_allclose(jnp.log(found / first), 0, atol=3e-3)
    assert (found < limit).sum() > 30
    a, b, *_ = numbers.T
    inside = (b > 0) & (a / b < limit)
    assert jnp.all(found[inside] >= (a / b)[inside] * (1 - 1e-12))


@pytest.mark.parametrize("rule", ["PI", "EI", "quadratic"])
def test_rules_are_differentiated_as_implicit_functions(rule: str, x64: None) -> None:
    numbers = draws(200)
    function = jax.jit(jax.vmap(lambda x: RULES[rule](Improvement(*x), 30.0)))
    both = jax.jit(jax.vmap(jax.value_and_grad(lambda x: RULES[rule](Improvement(*x), 30.0))))
    found, gradient = both(numbers)
    inside = (found > 0) & (found < 29)
    assert inside.sum() > 30
    for k in range(5):
        h = 1e-4 * jnp.abs(numbers) * jnp.eye(5)[k][None]
        coarse = (function(numbers + 2 * h) - function(numbers - 2 * h)) / 4e-4
        fine = (function(numbers + h) - function(numbers - h)) / 2e-4
        elasticity = gradient[:, k] * jnp.abs(numbers[:, k])
        error = (elasticity - (4 * fine - coarse) / 3) / found
        np.testing.assert_allclose(error[inside], 0, atol=1e-7)


@pytest.mark.slow
def test_the_derivative_of_a_search_is_another_number(x64: None) -> None:
    """What bisection returns depends on its bracket only, and so does its derivative."""
    along = Improvement(*(jnp.float64(x) for x in (2.0, 3.0, 1.0, 1.0, 0.1)))

    def bisected(b: Array) -> Array:
        a, _, p, q, c = along
        low, high = 0.0 * b, a / b
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = a * q / 4 * middle**4 + b * p / 2 * middle**3 + c * b * middle < c * a
            low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
        return low

    implicit = lambda b: probability_of_improvement(along._replace(curvature=b), 10.0)  # noqa: E731
    b, h = along.curvature, 1e-5
    differences = (bisected(b + h) - bisected(b - h)) / (2 * h)
    assert float(bisected(b)) == pytest.approx(float(implicit(b)), rel=1e-12)
    assert float(jax.grad(implicit)(b)) == pytest.approx(float(differences), rel=1e-7)
    assert abs(float(jax.grad(bisected)(b)) / float(differences) - 1) > 0.5


LIMITS = {  # a, b, p, q, c; PI, EI, quadratic; the largest step is 5
    "certain slope and curvature": ((2, 4, 0, 0, 1), (0.5, 0.5, 0.5)),
    "nothing uncertain": ((2, 4, 0, 0, 0), (0.5, 0.5, 0.5)),
    "uncertain loss": ((2, 4, 1, 1, 1e14), (0.5, 0.5, 0.5)),
    "certain loss": ((2, 4, 1, 1, 0), (0, None, 0.5)),
    "certain loss, concave": ((2, -3, 1, 1, 0), (3, 5, 5)),
    "certain curvature, concave": ((2, -3, 1, 0, 1), (5, 5, 5)),
    "straight and certain": ((2, 0, 1, 0, 1), (5, 5, 5)),
    "straight": ((2, 0, 1, 4, 1), (1, 5, 5)),
    "nearly flat": ((2, 0.1, 0, 0, 1), (5, 5, 5)),
    "uphill": ((-1, 4, 1, 1, 1), (0, 0, 0)),
    "level": ((0, 0, 0, 0, 1), (0, 0, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LIMITS)
def test_limits_of_the_rules(case: str, x64: None) -> None:
    numbers, expected = LIMITS[case]
    at = jnp.asarray(numbers, float)
    for rule, step in zip((probability_of_improvement, expected_improvement, quadratic), expected):
        found, slopes = jax.value_and_grad(lambda x, rule=rule: rule(Improvement(*x), 5.0))(at)
        assert step is None or float(found) == pytest.approx(step, abs=1e-6)
        assert jnp.all(jnp.isfinite(slopes))


# ---- the optimizer


FAST = [("none", False), ("PI", True)]
REST = [(rule, p) for rule in RULES for p in (False, True) if (rule, p) not in FAST]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "preconditioned"), [*FAST, *(pytest.param(*x, marks=pytest.mark.slow) for x in REST)]
)
def test_hypergradients_agree_with_finite_differences(rule: str, preconditioned: bool, x64: None) -> None:
    optimizer = hg.filtered(RULES[rule], preconditioned=preconditioned)
    hypers = {name: jnp.asarray(HYPERS[name]) for name in optimizer.hypers}
    if preconditioned:
        hypers["learning_rate"] *= 0.1
        if rule != "none":
            hypers["max_step"] *= 0.2
    batches = logistic_batches()
    noise_free = batches.reshape(-1, SIZE)

    def objective(everything: Any, adjoint: Any) -> Array:
        hypers, scale, batches = everything
        trained = run(optimizer, hypers, adjoint=adjoint, meta=scale, batches=batches)
        return logistic(trained.params, 0.01, noise_free) + 0.1 * jnp.mean(trained.losses)

    at = (hypers, jnp.asarray(0.01), batches)
    gradient = jax.jit(jax.grad(lambda x: objective(x, hg.Stored())))(at)
    checkpointed = jax.jit(jax.grad(lambda x: objective(x, hg.Checkpointed())))(at)
    assert max(relative_error(checkpointed, gradient).values()) < 1e-9

    plain = jax.jit(lambda x: objective(x, hg.Stored()))
    direction = (
        dict.fromkeys(hypers, 0.0),
        0.01,
        0.01 * np.random.default_rng(1).normal(size=batches.shape),
    )
    moves = [({**direction[0], name: float(x)}, 0.0, 0.0) for name, x in hypers.items()]
    moves += [(direction[0], 0.01, 0.0), (direction[0], 0.0, direction[2])]
    unused = {"EI": [], "PI": [], "none": [], "quadratic": ["loss_decay", "loss_inflation"]}[rule]
    for name, move in zip([*hypers, "meta", "batches"], moves):

        def along(h: float, move: Any = move) -> float:
            return float(plain(jax.tree.map(lambda x, y: x + h * y, at, move)))

        h = 1e-4
        expected = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        found = float(sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(move))))
        assert (expected == 0) == (name in unused), name
        assert abs(found - expected) <= 1e-5 * abs(expected), (name, found, expected)


@pytest.mark.parametrize("rule", ["none", pytest.param("PI", marks=pytest.mark.slow)])
def test_forward_mode_agrees(rule: str, x64: None) -> None:
    optimizer = hg.filtered(RULES[rule])
    hypers = {name: jnp.asarray(HYPERS[name]) for name in optimizer.hypers}

    def end(hypers: Any, adjoint: Any) -> Array:
        return jnp.sum(run(optimizer, hypers, adjoint=adjoint, steps=8).params ** 2)

    forward, reverse = (
        jax.jit(jax.grad(lambda h, a=a: end(h, a)))(hypers) for a in (hg.Forward(), hg.Stored())
    )
    assert max(relative_error(forward, reverse).values()) < 1e-10


def test_a_loss_is_a_mean_over_examples_and_traced_once() -> None:
    calls = []

    def loss(w: Any, meta: Any, batch: Any) -> Array:
        calls.append(batch.shape)
        return logistic(w, 0.01, batch)

    batches = logistic_batches(3)
    trained = run(
        hg.filtered(),
        {"learning_rate": 0.5},
        loss=loss,
        batches=batches,
        steps=3,
        watch=lambda s: s.gradient,
    )
    assert calls == [(1, SIZE)]
    plain = run(
        hg.sgd(), {"learning_rate": 0.5}, loss=loss, batches=batches, steps=3, watch=lambda s: s.gradient
    )
    # Of the first gradient all is believed.
    np.testing.assert_allclose(trained.losses[:2], plain.losses[:2], rtol=1e-5)
    np.testing.assert_allclose(trained.watched[:2], plain.watched[:2], rtol=1e-4)
    assert not np.allclose(trained.losses[2], plain.losses[2], rtol=1e-4)


def test_a_run_may_be_cut_and_examples_taken_in_chunks(x64: None) -> None:
    rates, batches, half = jnp.linspace(0.5, 0.2, 10), logistic_batches(10), 5

    def end(rates: Array, batches: Array, params: Any, state: Any, chunk: Any = None) -> hg.Trained:
        hypers, optimizer = {"max_step": 3.0, "learning_rate": rates}, hg.filtered(quadratic, chunk=chunk)
        options = {"steps": len(rates), "optimizer": optimizer, "adjoint": hg.Stored(), "state": state}
        return hg.train(logistic, params, hypers, 0.01, batches, **options)

    compiled = jax.jit(end)
    whole = jax.jit(lambda *x: end(*x, None, 4))(rates, batches, START)
    state = {"state": hg.filtered(quadratic).init(jnp.asarray(START))}
    first = compiled(rates[:half], batches[:half], START, state)
    second = compiled(rates[half:], batches[half:], *first[:2])
    for a, b in zip(jax.tree.leaves(second[:2]), jax.tree.leaves(whole[:2])):
        np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("rule", ["EI", "quadratic"])  # PI stands still where rounding is all the noise
def test_without_noise_the_rules_are_exact_line_searches(rule: str, x64: None) -> None:
    """All examples alike: no variance is left, and nothing is divided by zero, also not in derivatives."""
    h = jnp.array([[1.0, 2.0, 5.0, 10.0]])
    hypers = {"max_step": jnp.asarray(10.0), "step_decay": jnp.asarray(0.0)}

    def end(hypers: Any) -> tuple[Array, Array]:
        same = jnp.ones((4, 8, SIZE))  # whose mean is exact: of 6 alike it is not, and rounding is noise
        trained = run(hg.filtered(RULES[rule]), hypers, loss=paraboloid, meta=h, batches=same, steps=4)
        return trained.losses[-1], trained.losses

    (_, losses), gradient = jax.jit(jax.value_and_grad(end, has_aux=True))(hypers)
    w, expected = START, []
    for _ in range(4):
        g = np.asarray(h)[0] * (w - 1)
        expected.append(0.5 * np.sum(np.asarray(h)[0] * (w - 1) ** 2))
        w = w - (g @ g) / (g @ (np.asarray(h)[0] * g)) * g
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert all(np.isfinite(x) for x in gradient.values())


def test_tune_learns_the_filter() -> None:
    tuned = hg.tune(
        logistic,
        jnp.asarray(START, jnp.float32),
        {"learning_rate": 0.05, "gradient_inflation": 1.0},
        0.01,
        logistic_batches(10),
        steps=10,
        optimizer=hg.filtered(),
        learn=["learning_rate", "gradient_inflation"],
        meta_steps=5,
        progress=False,
    )
    assert tuned.hypers["learning_rate"] > 0.05 and tuned.hypers["gradient_inflation"] != 1.0
    assert tuned.history.loss[-1] < tuned.history.loss[0]
    with pytest.raises(ValueError, match=r"filtered\(\) looks at single examples.*hypergrad\.train"):
        tuned.optax()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "reversal": (
        {"adjoint": hg.Reversible()},
        r"filtered\(\).*Checkpointed",
    ),
    "no batches": ({"batches": None}, r"batches must be arrays \(T, n, \.\.\.\).*shapes \[\[\]\]"),
    "one example": ({"batches": np.zeros((STEPS, 1, SIZE))}, r"the same n >= 2 examples.*\[\[1, 4\]\]"),
    "unequal examples": (
        {"batches": (np.zeros((STEPS, 3, SIZE)), np.zeros((STEPS, 2)))},
        r"the same n >= 2 examples.*\[\[3, 4\], \[2\]\]",
    ),
    "a loss by example": (
        {"loss": lambda w, meta, batch: batch @ w},
        r"the loss must return one scalar, and returned float32\[1\]",
    ),
    "no rate": ({"hypers": {}}, r"missing: \['learning_rate'\]"),
    "a cap without a rule": (
        {"hypers": {"learning_rate": 1.0, "max_step": 1.0}},
        r"unknown: \['max_step'\]",
    ),
    "a rule without a cap": (
        {"optimizer": hg.filtered(quadratic), "hypers": {}},
        r"missing: \['max_step'\]",
    ),
    "an average for ever": (
        {"hypers": {"learning_rate": 1.0, "gradient_decay": 1.0}},
        r"hypers\['gradient_decay'\].*must lie in \[0, 1\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    changes, message = REFUSED[case]
    arguments = {"optimizer": hg.filtered(), "hypers": {"learning_rate": 1.0}} | changes
    with pytest.raises((ValueError, hg.ReversalError)) as raised:
        run(**arguments)
    assert re.search(message, str(raised.value)), raised.value


def test_a_hand_written_optimizer_of_single_examples() -> None:
    """Any `GenericOptimizer` may look at examples: here their median gradient."""
    from hypergrad.program import Examples, GenericOptimizer

    def update(h: Any, examples: Examples, state: Any, params: Any, here: Any) -> Any:
        gradients = jax.vmap(lambda x: jax.grad(examples.loss)(params, jax.tree.map(lambda x: x[None], x)))
        moved = params - h["learning_rate"] * jnp.median(gradients(examples.batch), axis=0)
        return moved, state

    median = GenericOptimizer(
        "median()", lambda params: (), update, {"learning_rate": None}, per_example=True
    )
    batches = np.zeros((1, 3, SIZE), np.float32) + np.array([1.0, 2.0, 30.0], np.float32)[None, :, None]
    found = run(
        median, {"learning_rate": 1.0}, loss=lambda w, meta, x: jnp.mean(x @ w), batches=batches, steps=1
    )
    np.testing.assert_allclose(found.params, START - 2.0)
    assert dataclasses.replace(median, per_example=False).reversible is False
