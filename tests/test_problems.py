"""The noisy quadratic model: recursions, closed forms and samples of each other."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import problems
from hypergrad.problems import NoisyQuadratic
from hypergrad.program import Assign, Optimizer, Variable

STEPS = 20
METHODS = {m.name: m for m in (
    problems.sgd(), problems.heavy_ball(), problems.iterate_average(), problems.transported_average()
)}  # fmt: skip
SECOND = {"heavy_ball()": "momentum", "iterate_average()": "decay", "transported_average()": "gain"}


def model(d: int = 5, dtype: Any = None) -> NoisyQuadratic:
    """A model with nothing equal to anything else."""
    rng = np.random.default_rng(1)
    return NoisyQuadratic(*(jnp.asarray(rng.uniform(0.2, 1.2, d), dtype) for _ in range(4)))


def schedules(method: str, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Hyperparameters that differ from step to step; the transported average's gain begins with 1."""
    rng = np.random.default_rng(2)
    hypers = {"learning_rate": rng.uniform(0.1, 1.0, steps)}
    if method in SECOND:
        hypers[SECOND[method]] = rng.uniform(0.2, 0.9, steps)
    if method == "transported_average()":
        hypers["gain"] = 1.0 / np.arange(1, steps + 1)
    return hypers


# The recursions as they are written in the papers, one moment after the other.


def written_sgd(problem: NoisyQuadratic, learning_rate: Any) -> list[np.ndarray]:
    h, c, A, _ = map(np.asarray, problem)
    path = [A]
    for a in learning_rate:
        path.append((1 - a * h) ** 2 * path[-1] + a**2 * c)
    return path


def written_heavy_ball(problem: NoisyQuadratic, learning_rate: Any, momentum: Any) -> list[np.ndarray]:
    h, c, A, _ = map(np.asarray, problem)
    C, V, path = 0 * A, 0 * A, [A]
    for a, b in zip(learning_rate, momentum):
        X = b * C + h * A
        V = b**2 * V + 2 * b * h * C + h**2 * A + c
        A, C = A - 2 * a * X + a**2 * V, X - a * V
        path.append(A)
    return path


def written_average(problem: NoisyQuadratic, learning_rate: Any, decay: Any) -> list[np.ndarray]:
    h, c, A, _ = map(np.asarray, problem)
    X, E, path = A, A, [A]
    for a, g in zip(learning_rate, decay):
        r = 1 - a * h
        A = r**2 * A + a**2 * c
        E = g**2 * E + 2 * g * (1 - g) * r * X + (1 - g) ** 2 * A
        X = g * r * X + (1 - g) * A
        path.append(E)
    return path


def written_transport(problem: NoisyQuadratic, learning_rate: Any, gain: Any) -> list[np.ndarray]:
    """With the sum of all noise, S, instead of its average, for the gain 1/(t + 1)."""
    h, c, A, _ = map(np.asarray, problem)
    X, W, path = 0 * A, 0 * A, [A]
    for t, a in enumerate(learning_rate):
        r, k, W = 1 - a * h, a / (t + 1), W + c
        A, X = r**2 * A - 2 * r * k * X + k**2 * W, r * X - k * W
        path.append(A)
    return path


WRITTEN: dict[str, Callable[..., list[np.ndarray]]] = dict(
    zip(METHODS, (written_sgd, written_heavy_ball, written_average, written_transport))
)


@pytest.mark.parametrize("name", METHODS)
def test_recursions_are_those_of_the_papers(name: str, x64: None) -> None:
    problem, hypers = model(), schedules(name)
    path = WRITTEN[name](problem, **hypers)
    found = problems.expect(METHODS[name], problem, hypers, steps=STEPS)
    losses = [0.5 * np.sum(np.asarray(problem.weight) * A) for A in path]
    np.testing.assert_allclose(found.losses, losses, rtol=1e-13)
    k = METHODS[name].output
    np.testing.assert_allclose(found.moments[k, k], path[-1], rtol=1e-13)


def transported() -> Optimizer:
    """The transported average as a user would write it."""

    def moves(h: Any, t: Any) -> list[Assign]:
        return [
            Assign("average", lambda s: s.average + h.gain * (s.gradient - s.average)),
            Assign("params", lambda s: s.params - h.learning_rate * s.average),
            Assign("average", lambda s: s.average - h.curvature * h.learning_rate * s.average),
        ]

    names = {"learning_rate": None, "gain": None, "curvature": None}
    return Optimizer("transported()", moves, {"average": Variable()}, names)


@pytest.mark.parametrize("name", METHODS)
def test_training_has_the_expected_losses(name: str) -> None:
    """The mean over many runs of `hg.train`, at every step, within its standard error."""
    problem, hypers = model(), schedules(name)
    expected = problems.expect(METHODS[name], problem, hypers, steps=STEPS).losses
    decays = jnp.asarray(hypers.get("decay", np.zeros(STEPS)), jnp.float32)
    given = {k: jnp.asarray(v, jnp.float32) for k, v in hypers.items() if k != "decay"}
    optimizer = {"heavy_ball()": hg.heavy_ball(), "transported_average()": transported()}.get(
        name, hg.sgd()
    )
    if name == "transported_average()":
        given["curvature"] = problem.curvature[None]

    def losses(key: Any) -> Any:
        params, normals = problems.sample(problem, key, STEPS)
        run = hg.train(
            problems.sampled_loss, params, given, problem, normals, steps=STEPS, optimizer=optimizer,
            adjoint=hg.Stored(), watch=lambda s: s.params,
        )  # fmt: skip
        path = jnp.concatenate([run.watched, run.params[None]])
        if name == "iterate_average()":
            average = lambda mean, now: 2 * (now[0] * mean + (1 - now[0]) * now[1],)  # noqa: E731
            path = jnp.stack([path[0], *jax.lax.scan(average, path[0], (decays, path[1:]))[1]])
        return jax.vmap(lambda theta: problems.expected_loss(problem, theta**2))(path)

    runs = 20_000
    sampled = jax.jit(jax.vmap(losses))(jax.random.split(jax.random.key(0), runs))
    error = jnp.std(sampled, axis=0) / runs**0.5
    assert jnp.max(error / expected) < 0.01  # a fault of a few per cent would show
    assert jnp.max(jnp.abs(sampled.mean(axis=0) - expected) / error) < 4.0


def constants(name: str) -> dict[str, float]:
    return {"learning_rate": 0.7} | ({SECOND[name]: 0.3} if name in SECOND else {})


@pytest.mark.parametrize("name", METHODS)
def test_steady_states_are_fixed_points(name: str, x64: None) -> None:
    method, problem, hypers = METHODS[name], model(), constants(name)
    update = method.update(problem, **hypers)
    n = len(method.start)
    fixed = np.empty((n, n, 5))
    for i in range(5):  # S = M S Mᵀ + c b bᵀ as one linear system
        M, b = np.asarray(update.transition[..., i]), np.asarray(update.response[:, i])
        source = float(problem.noise[i]) * np.outer(b, b).ravel()
        fixed[..., i] = np.linalg.solve(np.eye(n * n) - np.kron(M, M), source).reshape(n, n)
    after = problems.propagate(update, jnp.asarray(fixed), problem.noise)
    np.testing.assert_allclose(after, fixed, rtol=1e-13, atol=1e-15)
    k = method.output
    np.testing.assert_allclose(method.steady(problem, **hypers), fixed[k, k], rtol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_long_runs_end_in_the_steady_state(name: str, x64: None) -> None:
    method, problem, hypers = METHODS[name], model(), constants(name)
    found = problems.expect(method, problem, hypers, steps=500).losses[-1]
    expected = problems.expected_loss(problem, method.steady(problem, **hypers))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


SPECIAL = {  # curvature 1: contraction by 0 in one step, and the ends of stability
    "plain": 0.7, "contracting to 0": 1.0, "oscillating": 1.9, "almost unstable": 2 - 1e-9, "unstable": 2.3,
    "tiny": 1e-7,
}  # fmt: skip


@pytest.mark.parametrize("rate", SPECIAL.values(), ids=SPECIAL)
def test_sgd_after_is_the_recursion(rate: float, x64: None) -> None:
    problem = model()._replace(curvature=jnp.array([1.0, 0.5, 0.1, 1e-3, 1e-6]))

    def closed(rate: Any, problem: NoisyQuadratic) -> Any:
        return problems.expected_loss(problem, problems.sgd_after(problem, rate, STEPS))

    def recursion(rate: Any, problem: NoisyQuadratic) -> Any:
        return problems.expect(problems.sgd(), problem, {"learning_rate": rate}, steps=STEPS).losses[-1]

    found, slopes = jax.value_and_grad(closed, argnums=(0, 1))(rate, problem)
    expected, wanted = jax.value_and_grad(recursion, argnums=(0, 1))(rate, problem)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # Near the ends of stability some derivatives are differences of two numbers that are much larger: at
    # the upper one in the rate, at the lower one in the curvature.
    rtol = 1e-5 if rate == SPECIAL["almost unstable"] else 1e-12
    np.testing.assert_allclose(slopes[0], wanted[0], rtol=rtol)
    for a, b in zip(slopes[1], wanted[1]):
        np.testing.assert_allclose(a, b, rtol=max(rtol, 1e-10), atol=1e-12)


def test_sgd_after_at_the_end_of_stability(x64: None) -> None:
    problem = model()._replace(curvature=jnp.full(5, 0.5))
    expected = problem.variance + STEPS * 16.0 * problem.noise  # a random walk between ±θ
    np.testing.assert_allclose(problems.sgd_after(problem, 4.0, STEPS), expected, rtol=1e-12)


def test_sgd_after_keeps_all_digits_of_a_long_decay(x64: None) -> None:
    problem = model()
    problem = problem._replace(noise=0 * problem.noise)
    expected = (1 - 0.5 * problem.curvature) ** 400 * problem.variance
    assert jnp.max(expected) < 1e-16
    np.testing.assert_allclose(problems.sgd_after(problem, 0.5, 200), expected, rtol=1e-12)


def test_sgd_after_composes_at_real_numbers_of_steps(x64: None) -> None:
    problem, rate = model(), 1.8
    middle = problems.sgd_after(problem, rate, 2.4)
    in_two = problems.sgd_after(problem, rate, 0.35, middle)
    np.testing.assert_allclose(in_two, problems.sgd_after(problem, rate, 2.75), rtol=1e-12)


def test_closed_hypergradient_is_autodiff_of_the_recursion(x64: None) -> None:
    problem = problems.preconditioned(model(50), 0.4)
    rates = jnp.asarray(schedules("sgd()")["learning_rate"])

    def final(rates: Any) -> Any:
        return problems.expect(problems.sgd(), problem, {"learning_rate": rates}, steps=STEPS).losses[-1]

    expected = jax.grad(final)(rates)
    found = problems.sgd_hypergradient(problem, rates)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * float(jnp.linalg.norm(expected)))


def test_every_input_has_its_derivative(x64: None) -> None:
    for name, method in METHODS.items():
        n = len(method.start)
        start = jnp.asarray(np.random.default_rng(3).uniform(0.5, 1.0, (n, n, 5)))

        def final(everything: Any, method: Any = method) -> Any:
            problem, hypers, start = everything
            run = problems.expect(method, problem, hypers, steps=STEPS, moments=start)
            return run.losses[-1] + jnp.sum(run.moments)

        hypers = {k: jnp.asarray(v) for k, v in schedules(name).items()}
        everything = (model(), hypers, start)
        jax.test_util.check_grads(jax.jit(final), (everything,), order=1, modes=("rev",), rtol=1e-6)


@pytest.mark.parametrize("d", [1, 5])
def test_hypergradient_vanishes_at_the_optimal_schedule(d: int, x64: None) -> None:
    problem = model(d)
    rates = problems.optimal_learning_rates(problem, STEPS)

    def final(rates: Any) -> Any:
        return problems.expect(problems.sgd(), problem, {"learning_rate": rates}, steps=STEPS).losses[-1]

    assert jnp.max(jnp.abs(jax.grad(final)(rates))) < 1e-15
    np.testing.assert_allclose(final(rates), problems.least_loss(problem, STEPS), rtol=1e-13)
    if d == 1:
        assert jnp.max(jnp.abs(problems.sgd_hypergradient(problem, rates[:, 0]))) < 1e-15
    moved = rates * (1 + 0.1 * jax.random.normal(jax.random.key(0), rates.shape))
    assert final(moved) > final(rates)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_beats_the_least_loss(name: str, x64: None) -> None:
    problem = problems.preconditioned(problems.noisy_quadratic(30, batch_size=4.0), 0.5)
    least = jax.vmap(lambda t: problems.least_loss(problem, t))(jnp.arange(STEPS + 1))
    for scale in (0.1, 0.5, 1.0):
        hypers = schedules(name)
        hypers["learning_rate"] = scale * hypers["learning_rate"]
        losses = problems.expect(METHODS[name], problem, hypers, steps=STEPS).losses
        np.testing.assert_allclose(losses[0], least[0], rtol=1e-13)
        assert jnp.all(losses[1:] > least[1:])


def test_preconditioning_is_a_learning_rate_by_coordinate(x64: None) -> None:
    problem, rates = model(), schedules("sgd()")["learning_rate"]
    transformed = problems.preconditioned(problem, 0.6)
    h, c = problem.curvature, problem.noise
    np.testing.assert_allclose(transformed.curvature, h**0.4, rtol=1e-14)
    np.testing.assert_allclose(transformed.noise, c / h**1.2, rtol=1e-14)
    by_coordinate = jnp.asarray(rates)[:, None] * (h**-0.6)[None]
    expected = problems.expect(problems.sgd(), problem, {"learning_rate": by_coordinate}, steps=STEPS)
    found = problems.expect(problems.sgd(), transformed, {"learning_rate": rates}, steps=STEPS)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-13)
    for steps in (0.0, 7.0):
        np.testing.assert_allclose(
            problems.least_loss(transformed, steps), problems.least_loss(problem, steps), rtol=1e-13
        )


@pytest.mark.parametrize("power", [0.0, 0.5, 0.75])
def test_the_paper_s_model(power: float, x64: None) -> None:
    for batch_size in (16, 256, 16384):
        problem = problems.noisy_quadratic(batch_size=batch_size, preconditioning=power)
        assert float(problems.expected_loss(problem, problem.variance)) == pytest.approx(4.894, abs=5e-4)
        bound = float(problems.information_bound(problem, 0.01))
        assert bound == pytest.approx(10_000 / (2 * 0.01 * batch_size), rel=1e-12)
        # The prior tells a little: the bound with it is log((d + n) / n) / 2 = 0.01 for n = B T.
        with_prior = 10_000 / np.expm1(0.02) / batch_size
        assert float(problems.least_loss(problem, with_prior)) == pytest.approx(0.01, rel=1e-4)
        assert float(problems.least_loss(problem, bound)) < 0.01


def test_transported_average() -> None:
    problem, rate, gain = problems.noisy_quadratic(20), 1.0, 1.0 / np.arange(1, 4001)
    method = problems.transported_average()
    filtered = problems.expect(method, problem, {"learning_rate": rate, "gain": gain}, steps=4000)
    np.testing.assert_allclose(filtered.moments[1, 1], problem.noise / 4000, rtol=1e-3)  # counts all alike
    assert float(filtered.losses[4000] / filtered.losses[2000]) == pytest.approx(0.5, rel=0.01)  # O(1/t)
    plain = problems.expect(problems.sgd(), problem, {"learning_rate": rate}, steps=4000)
    assert float(plain.losses[4000] / plain.losses[2000]) == pytest.approx(1.0, rel=0.01)  # it stalls
    same = problems.expect(method, problem, {"learning_rate": rate, "gain": 1.0}, steps=4000)
    np.testing.assert_allclose(same.losses, plain.losses, rtol=1e-5)


def test_float32_is_float64_to_its_precision() -> None:
    def everything(dtype: Any) -> dict[str, Any]:
        made = problems.noisy_quadratic(10_000, 64, 0.5)
        problem = NoisyQuadratic(*(x.astype(dtype) for x in made))
        rates = jnp.geomspace(1.9, 0.05, STEPS, dtype=dtype)
        hypers = {"learning_rate": rates, "gain": 1 / jnp.arange(1, STEPS + 1, dtype=dtype)}
        return {
            "expected": problems.expect(METHODS["transported_average()"], problem, hypers, steps=STEPS),
            "after": problems.expected_loss(problem, problems.sgd_after(problem, rates[3], 1e4)),
            "hypergradient": problems.sgd_hypergradient(problem, rates),
            "optimal": problems.optimal_learning_rates(problem, 3),
            "bounds": (problems.least_loss(problem, 10), problems.information_bound(problem, 0.01)),
            "loss": problems.sampled_loss(problem.variance, problem, problem.weight),
        }

    with jax.enable_x64(True):
        double = jax.jit(lambda: everything(jnp.float64))()
    for x64_mode in (False, True):
        with jax.enable_x64(x64_mode):
            single = jax.jit(lambda: everything(jnp.float32))()
            one = NoisyQuadratic(*4 * [jnp.ones(3, jnp.float32)])
            sample = problems.sample(one, jax.random.key(0), 2)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((single, sample)))
        for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(double)):
            assert b.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.max(np.abs(b)))


SAMPLED = {
    "heavy ball, reversed": (hg.heavy_ball(), problems.heavy_ball(), hg.Reversible()),
    "gradient descent": (hg.sgd(), problems.sgd(), hg.Checkpointed()),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_hypergradients_average_to_the_exact_one(case: str) -> None:
    optimizer, method, adjoint = SAMPLED[case]
    problem, hypers = model(3), {"learning_rate": jnp.linspace(0.8, 0.2, 10)}
    if method.name == "heavy_ball()":
        hypers["momentum"] = jnp.linspace(0.5, 0.8, 10)

    def exact(hypers: Any, problem: NoisyQuadratic) -> Any:
        return problems.expect(method, problem, hypers, steps=10).losses[-1]

    def sampled(hypers: Any, problem: NoisyQuadratic, key: Any) -> Any:
        params, normals = problems.sample(problem, key, 10)
        trained = hg.train(
            problems.sampled_loss, params, hypers, problem, normals, steps=10, optimizer=optimizer,
            adjoint=adjoint,
        )  # fmt: skip
        return problems.expected_loss(problem, trained.params**2)

    runs = 10_000
    keys = jax.random.split(jax.random.key(0), runs)
    both = jax.jit(jax.vmap(jax.grad(sampled, argnums=(0, 1)), in_axes=(None, None, 0)))(
        hypers, problem, keys
    )
    expected = jax.grad(exact, argnums=(0, 1))(hypers, problem)
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(expected), strict=True):
        error = jnp.std(a, axis=0) / runs**0.5
        assert jnp.max(error) < 0.15 * jnp.max(jnp.abs(b))
        assert jnp.all(jnp.abs(a.mean(axis=0) - b) <= 4.0 * error)
    if method.name == "sgd()":
        closed = problems.sgd_hypergradient(problem, hypers["learning_rate"])
        np.testing.assert_allclose(closed, expected[0]["learning_rate"], rtol=1e-4, atol=1e-6)


def expect(**changes: Any) -> Any:
    arguments = {"problem": model(), "hypers": {"learning_rate": 0.1}, "steps": 6} | changes
    return problems.expect(problems.sgd(), **arguments)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dimensions of zero": (
        lambda: problems.noisy_quadratic(0),
        "noisy_quadratic(dimensions=0, batch_size=1.0): dimensions must be a whole number of at least 1",
    ),
    "a batch size of zero": (
        lambda: problems.noisy_quadratic(3, batch_size=0),
        "noisy_quadratic(dimensions=3, batch_size=0): batch_size must be above 0; for gradients without",
    ),
    "steps of zero": (lambda: expect(steps=0), "expect(sgd(), steps=0): steps must be a whole number"),
    "steps that are no number": (lambda: expect(steps=2.5), "expect(sgd(), steps=2.5): steps must be"),
    "fields that do not fit": (
        lambda: expect(problem=model()._replace(noise=jnp.ones(2))),
        "expect(sgd(), steps=6): all fields of problem must have the same shape (d,), not {'curv",
    ),
    "a missing hyperparameter": (
        lambda: expect(hypers={}),
        "expect(sgd(), steps=6): hypers must have the names ['learning_rate'], not []",
    ),
    "a schedule of another length": (
        lambda: expect(hypers={"learning_rate": np.ones(5)}),
        "hypers['learning_rate'] has shape [5]; it must be a number, (6,) or (6, 5)",
    ),
    "moments of another method": (
        lambda: expect(moments=jnp.ones((2, 2, 5))),
        "expect(sgd(), steps=6): moments has shape [2, 2, 5] where [1, 1, 5] is needed",
    ),
    "rates by coordinate": (
        lambda: problems.sgd_hypergradient(model(), jnp.ones((6, 5))),
        "learning_rate has shape [6, 5]; it must be (T,)",
    ),
    "an optimal schedule of no steps": (
        lambda: problems.optimal_learning_rates(model(), 0),
        "optimal_learning_rates(problem, steps=0): steps must be a whole number",
    ),
    "a sample of no steps": (
        lambda: problems.sample(model(), jax.random.key(0), 0),
        "sample(problem, key, steps=0): steps must be a whole number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
