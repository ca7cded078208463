"""Smoothed objectives, and the online estimators of their gradients."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from experiments import smoothing as experiment
from experiments.common.statistics import standard_error
from hypergrad.constraints import positive

KEY = jax.random.key(0)
X = jnp.array([0.5, -1.0, 2.0])


def cubic(x: Any, *more: Any) -> Any:
    return jnp.sum(x**3)


# `smoothed`.


def test_value_and_gradient_are_means_over_the_pairs() -> None:
    """Against the formulas, with the noise found from the points that the objective sees."""
    seen: list[np.ndarray] = []

    def watched(x: Any) -> Any:
        jax.debug.callback(lambda x: seen.append(np.asarray(x, np.float64)), x, ordered=False)
        return cubic(x)

    sigma = 0.3
    smooth = hg.smoothed(watched, sigma=sigma, pairs=3)
    value, gradient = jax.value_and_grad(smooth)(X)
    jax.effects_barrier()
    noise = np.unique(np.round(np.array(seen) - np.asarray(X), 5), axis=0)
    assert noise.shape == (6, 3)  # once each, and every one with both signs
    np.testing.assert_allclose(noise, -noise[::-1], atol=2e-5)
    f = np.sum((np.asarray(X, np.float64) + noise) ** 3, axis=1)
    assert value == pytest.approx(f.mean(), rel=1e-4)
    expected = (noise * f[:, None]).mean(axis=0) / sigma**2  # both signs, so that halves are in it
    np.testing.assert_allclose(gradient, expected, rtol=1e-3)


def test_gradient_is_unbiased_for_the_smoothed_objective() -> None:
    """``E Σ (x + σ ε)³ = Σ x³ + 3 σ² x``, whose slope is ``3 x² + 3 σ²``."""
    smooth = hg.smoothed(cubic, sigma=jnp.array([0.1, 0.2, 0.4]), pairs=20, fresh=True)
    keys = jax.random.split(KEY, 400)
    found = np.asarray(jax.jit(jax.vmap(jax.grad(smooth), (None, 0)))(X, keys))
    expected = 3 * np.asarray(X) ** 2 + 3 * np.array([0.1, 0.2, 0.4]) ** 2
    assert np.all(np.abs(found.mean(axis=0) - expected) < 3.5 * standard_error(found))
    assert np.all(found.std(axis=0) > 0)


def test_forward_mode_and_a_tree_of_scales() -> None:
    point = {"a": X, "b": jnp.float32(1.0)}
    objective = lambda p: jnp.sum(p["a"] ** 3) * p["b"]  # noqa: E731
    smooth = hg.smoothed(objective, sigma={"a": 0.1, "b": 0.01}, pairs=4)
    gradient = jax.jit(jax.grad(smooth))(point)
    direction = {"a": jnp.array([1.0, 2.0, -1.0]), "b": jnp.float32(0.5)}
    value, slope = jax.jit(lambda x, t: jax.jvp(smooth, (x,), (t,)))(point, direction)
    assert value == pytest.approx(float(jax.jit(smooth)(point)))
    expected = jnp.vdot(gradient["a"], direction["a"]) + gradient["b"] * direction["b"]
    assert slope == pytest.approx(float(expected), rel=1e-5)


def test_chunks_jit_and_vmap_change_nothing() -> None:
    plain = hg.smoothed(cubic, sigma=0.1, pairs=5)
    value, gradient = jax.jit(jax.value_and_grad(plain))(X)
    for chunk in (1, 4):
        found = jax.jit(jax.value_and_grad(hg.smoothed(cubic, sigma=0.1, pairs=5, chunk=chunk)))(X)
        np.testing.assert_allclose(found[0], value, rtol=1e-5)
        np.testing.assert_allclose(found[1], gradient, rtol=1e-5)
    mapped = jax.jit(jax.vmap(jax.grad(plain)))(jnp.stack([X, 2 * X]))
    np.testing.assert_allclose(mapped[0], gradient, rtol=1e-5)


def test_noise_is_fixed_or_fresh() -> None:
    fixed = hg.smoothed(cubic, sigma=0.1)
    assert fixed(X) == fixed(X, jax.random.key(7))
    assert fixed(X) != hg.smoothed(cubic, sigma=0.1, key=jax.random.key(1))(X)
    fresh = hg.smoothed(cubic, sigma=0.1, fresh=True)
    assert fresh(X, KEY) == fresh(X, KEY) != fresh(X, jax.random.key(1))


def test_the_derivative_of_the_objective_is_never_taken() -> None:
    @jax.custom_jvp
    def undifferentiable(x: Any) -> Any:
        return jnp.sum(x)

    @undifferentiable.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise AssertionError("differentiated")

    smooth = hg.smoothed(undifferentiable, sigma=0.1, pairs=2)
    assert np.all(np.isfinite(jax.jit(jax.grad(smooth))(X)))
    rounded = jax.grad(hg.smoothed(lambda x: jnp.sum(jnp.round(x)), sigma=1.0, pairs=2000))(X)
    np.testing.assert_allclose(rounded, 1.0, atol=0.15)  # flat steps have a slope if seen from afar


def test_noise_is_added_to_the_raw_values() -> None:
    smooth = hg.smoothed(lambda x: jnp.log(x), sigma=0.5, pairs=3, constraints=positive)
    assert smooth(jnp.float32(2.0)) == pytest.approx(math.log(2.0), rel=1e-5)  # linear in raw values
    weights = jax.grad(smooth)(jnp.float32(2.0)), jax.grad(smooth)(jnp.float32(4.0))
    assert weights[0] == pytest.approx(2 * float(weights[1]), rel=1e-4)  # by 1/x, from raw to values


def test_the_outer_loop_takes_it() -> None:
    rippled = lambda h, key: jnp.sum((h["x"] - 3) ** 2) + jnp.sum(jnp.sin(1e3 * h["x"]))  # noqa: E731
    start = {"x": jnp.array([1.0, 2.0])}
    settings = {"optimizer": optax.adam(0.1), "steps": 60, "progress": False, "constraints": positive}
    stuck = hg.meta.optimize(rippled, start, **settings)
    smooth = hg.smoothed(rippled, sigma=0.2, fresh=True, constraints=positive)
    best = hg.meta.optimize(smooth, start, seeds=2, **settings)
    assert np.max(np.abs(best.hypers["x"] - 3)) < 0.4 < np.max(np.abs(stuck.hypers["x"] - 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, r"smoothed\(sigma=0.0, pairs=16\): sigma must be positive and finite"),
        ({"sigma": {"a": -1.0}}, r"smoothed\(sigma=..., pairs=16\): sigma\['a'\] must be positive"),
        ({"sigma": math.inf}, "positive and finite"),
        ({"pairs": 0}, r"smoothed\(sigma=0.1, pairs=0\): pairs must be a whole number of at least 1"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1"),
        ({"ceiling": -math.inf}, "ceiling must be a number"),
        ({"ceiling": "high"}, "ceiling must be a number"),
        ({"sigma": {"a": 0.1}}, "no prefix of that of the hyperparameters"),
        ({"sigma": jnp.ones(4)}, r"sigma has shape \[4\], which does not broadcast"),
    ],
)
def test_bad_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hg.smoothed(cubic, **{"sigma": 0.1, **settings})(X)


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        (None, (X,), "objective is None; it must be a function"),
        (lambda x: x, (X,), r"must return one float, and it returns float32\[3\]; reduce it"),
        (lambda x: 3, (X,), r"must return one float, and it returns int32\[\]"),
        (lambda x: (jnp.sum(x), x), (X,), "must return one float, and it returns a tuple; leave out"),
        (cubic, (jnp.arange(3),), "hypers is int32; there are derivatives in real floats only"),
    ],
)
def test_bad_objectives_are_refused(objective: Any, arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        hg.smoothed(objective, sigma=0.1)(*arguments)


@pytest.mark.parametrize("arguments", [(), (3.0,), (KEY, 3.0)])
def test_fresh_noise_needs_a_key(arguments: Any) -> None:
    with pytest.raises(TypeError, match="with fresh=True the last argument must be one PRNG key"):
        hg.smoothed(cubic, sigma=0.1, fresh=True)(X, *arguments)


@pytest.mark.parametrize("derivative", [jax.hessian, lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x)))])
@pytest.mark.parametrize("loop", [False, True])
def test_second_derivatives_are_refused(derivative: Callable[..., Any], loop: bool) -> None:
    smooth = hg.smoothed(cubic, sigma=0.1, pairs=2)
    repeated = lambda x: jax.lax.scan(lambda s, _: (s + smooth(x), None), 0.0, length=2)[0]  # noqa: E731
    with pytest.raises(TypeError, match="an estimate of a gradient has no derivative"):
        derivative(repeated if loop else smooth)(X)


def test_derivatives_in_anything_else_are_refused() -> None:
    product = lambda x, y: jnp.sum(x * y)  # noqa: E731
    smooth = hg.smoothed(product, sigma=0.1, pairs=2)
    message = "differentiated in something else than the hyperparameters"
    with pytest.raises(TypeError, match=message):
        jax.grad(smooth, argnums=1)(X, X)
    with pytest.raises(TypeError, match=message):  # closed over
        jax.grad(lambda y: hg.smoothed(lambda x: product(x, y), sigma=0.1, pairs=2)(X))(X)
    with pytest.raises(TypeError, match=message):
        jax.grad(lambda s: hg.smoothed(cubic, sigma=s, pairs=2)(X))(0.1)
    held = jax.grad(lambda x: smooth(x, jax.lax.stop_gradient(x)))(X)
    np.testing.assert_allclose(held, jax.grad(smooth)(X, X), rtol=1e-6)


def cliff(x: Any) -> Any:
    return jnp.where(x > 1.0, jnp.nan, x)


def test_a_run_that_diverges_is_an_error_or_counts_as_the_ceiling() -> None:
    at = jnp.float32(0.9)
    with pytest.raises(FloatingPointError, match=r"of 16 runs gave NaN or infinity.*ceiling="):
        jax.grad(hg.smoothed(cliff, sigma=0.3, pairs=8))(at)
    with pytest.raises(FloatingPointError, match="ceiling="), hg.readable_errors():
        jax.block_until_ready(jax.jit(jax.grad(hg.smoothed(cliff, sigma=0.3, pairs=8)))(at))
    bounded = lambda x: jnp.where(x > 1.0, 5.0, x)  # noqa: E731
    found = jax.value_and_grad(hg.smoothed(cliff, sigma=0.3, pairs=8, ceiling=5.0))(at)
    np.testing.assert_allclose(found, jax.value_and_grad(hg.smoothed(bounded, sigma=0.3, pairs=8))(at))


# The outer objective of a training run.


@pytest.mark.parametrize("adjoint", [hg.Stored(), pytest.param(hg.Reversible(), marks=pytest.mark.slow)])
def test_training_in_either_adjoint(adjoint: Any) -> None:
    """The exact hypergradient, since the objective is smooth here; the rest is the mean of ``ε²``."""

    def outer(rate: Any, adjoint: Any) -> Any:
        loss = lambda w, meta, step: jnp.sum((w - 1) ** 2)  # noqa: E731
        hypers = {"learning_rate": rate, "momentum": 0.5}
        return jnp.sum((hg.train(loss, jnp.zeros(2), hypers, steps=3, adjoint=adjoint).params - 1) ** 2)

    exact = jax.grad(outer)(jnp.float32(0.1), hg.Stored())
    smooth = hg.smoothed(lambda rate: outer(rate, adjoint), sigma=1e-3, pairs=200)
    assert jax.jit(jax.grad(smooth))(jnp.float32(0.1)) == pytest.approx(float(exact), rel=0.3)


# Online estimators.


def episode(estimator: hg.smoothing.Estimator, theta: Any, windows: int, keys: jax.Array) -> np.ndarray:
    """Estimates by repetition and window."""

    def one(key: jax.Array) -> jax.Array:
        def window(particles: Any, _: None) -> Any:
            estimate, particles = estimator.step(theta, particles)
            return particles, estimate.gradient

        return jax.lax.scan(window, estimator.init(theta, key), length=windows)[1]

    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


@pytest.mark.parametrize("window", [pytest.param(1, marks=pytest.mark.slow), 10])
def test_influence_balancing(window: int) -> None:
    """Truncated windows of 1 and 10 steps step the wrong way, and the online estimates the right one."""
    steps, theta = 200, jnp.float32(0.5)
    start, unroll = experiment.influence(window, steps)
    exact = float(experiment.exact_influence(steps))
    assert exact > 0 > experiment.truncated_influence(window, steps)
    spread = {}
    for make in (hg.smoothing.nres, hg.smoothing.pes):
        estimator = make(start, unroll, window=window, steps=steps, sigma=0.1, pairs=1)
        found = episode(estimator, theta, steps // window, jax.random.split(KEY, 300))
        sums = found.sum(axis=1)
        assert abs(sums.mean() - exact) < 3 * standard_error(sums)
        spread[make.__name__] = np.mean(found.var(axis=0))
    assert spread["nres"] < spread["pes"]  # of one update


def test_the_next_episode_begins_anew() -> None:
    """In an episode of two windows, the third update is one of a new start with new noise."""
    start = lambda theta, key: jnp.zeros(())  # noqa: E731
    unroll = lambda theta, s, step: (s + theta, s + theta + step)  # noqa: E731
    for make, same in ((hg.smoothing.nres, True), (hg.smoothing.pes, False)):
        estimator = make(start, unroll, window=3, steps=6, sigma=0.5, pairs=2)
        first = estimator.init(1.0, KEY)
        estimate, second = estimator.step(1.0, first)
        assert estimate.loss == pytest.approx(1.0)
        assert bool(jnp.all(second.noise == first.noise)) is same
        np.testing.assert_allclose(second.states[:, 0], 1.0 + first.noise, rtol=1e-5)
        np.testing.assert_allclose(second.states[:, 1], 1.0 - first.noise, rtol=1e-5)
        summed = first.noise if same else first.noise + second.noise
        np.testing.assert_allclose(second.total, summed, rtol=1e-5)
        assert second.step.tolist() == [3, 3] and second.left.tolist() == [1, 1]
        estimate, third = estimator.step(1.0, second)
        assert estimate.loss == pytest.approx(2.0 + 3)
        assert not np.any(third.states) and third.step.tolist() == [0, 0]
        assert not np.any(third.noise == second.noise) and np.all(third.noise == third.total)


def test_staggered_pairs_begin_one_after_the_other() -> None:
    start = lambda theta, key: jnp.zeros(())  # noqa: E731
    unroll = lambda theta, s, step: (s, theta)  # noqa: E731
    settings = {"window": 1, "steps": 4, "sigma": 0.1, "pairs": 2}
    estimator = hg.smoothing.nres(start, unroll, staggered=True, **settings)
    particles = estimator.init(1.0, KEY)
    steps = []
    for _ in range(6):
        _, particles = estimator.step(1.0, particles)
        steps.append(particles.step.tolist())
    assert steps == [[1, 1], [2, 0], [3, 1], [0, 2], [1, 3], [2, 0]]


@pytest.mark.parametrize("optimizer", [hg.adam(), hg.from_optax(optax.adam, {"learning_rate": None})])
def test_windows_of_training_are_one_run(optimizer: Any) -> None:
    """Window after window, states and losses are those of one call of `train`."""
    steps, window, theta = 6, 2, jnp.float32(0.1)
    batches = jnp.linspace(0.0, 1.0, steps)
    loss = lambda w, theta, batch: jnp.sum((w - batch) ** 2) * theta  # noqa: E731
    hypers = lambda theta, t: {"learning_rate": theta / (1 + t)}  # noqa: E731
    start, unroll = hg.smoothing.training(
        loss,
        lambda theta, key: jnp.ones(2),
        hypers,
        batches,
        window=window,
        steps=steps,
        optimizer=optimizer,
    )
    state, total = start(theta, KEY), 0.0
    for step in range(0, steps, window):
        state, part = unroll(theta, state, jnp.int32(step))
        total += float(part)
    whole = hg.train(
        loss, jnp.ones(2), hypers(theta, jnp.arange(steps)), theta, batches,
        steps=steps, optimizer=optimizer, adjoint=hg.Stored(),
    )  # fmt: skip
    np.testing.assert_allclose(state[0], whole.params, rtol=1e-5)
    assert total == pytest.approx(float(jnp.mean(whole.losses)), rel=1e-5)


def test_online_estimates_refuse_what_they_cannot() -> None:
    start = lambda theta, key: jnp.zeros(())  # noqa: E731
    unroll = lambda theta, s, step: (s, theta**2)  # noqa: E731
    nres = hg.smoothing.nres
    with pytest.raises(ValueError, match=r"nres\(window=3, steps=4.*steps must be a multiple of window"):
        nres(start, unroll, window=3, steps=4, sigma=0.1)
    with pytest.raises(TypeError, match=r"unroll is called as unroll\(hypers, state, step\)"):
        nres(start, lambda theta: theta, window=1, steps=4, sigma=0.1)
    vector = nres(start, lambda theta, s, step: (s, jnp.ones(2)), window=1, steps=4, sigma=0.1)
    with pytest.raises(TypeError, match="must return \\(state, loss\\), the loss being one float"):
        vector.step(1.0, vector.init(1.0, KEY))
    estimator = nres(start, unroll, window=1, steps=4, sigma=0.1)
    particles = estimator.init(1.0, KEY)
    with pytest.raises(TypeError, match="an estimate of a gradient has no derivative"):
        jax.grad(lambda theta: estimator.step(theta, particles)[0].gradient)(1.0)
    broken = nres(start, lambda theta, s, step: (s, jnp.log(theta)), window=1, steps=4, sigma=0.1)
    with pytest.raises(FloatingPointError, match="of 32 runs gave NaN or infinity"):
        broken.step(-1.0, broken.init(-1.0, KEY))


# The advice of the report.


def chaotic(x: Any, steps: int) -> Any:
    """A bowl with ripples that are the shorter, the longer the run."""
    return jnp.sum((x - 1) ** 2) + 0.1 * jnp.sum(jnp.sin(2.0**steps * x))


def followed(report: hg.Report, objective: Any) -> Any:
    """What the report says to do, done literally."""
    found = re.search(r"hg\.smoothed\(objective, sigma=.*, pairs=\d+\)", report.chaos.meaning)
    assert found is not None, report.chaos.meaning
    return eval(found[0], {"hg": hg, "objective": objective, "report": report})


def test_the_report_says_how_to_smooth_a_chaotic_run() -> None:
    start = jnp.array([2.0, 3.0])
    report = hg.check_hypergradient(chaotic, start, steps=(6, 10, 14), directions=1, quiet=True)
    assert report.chaos.verdict == "failed" and "chaotic" in report.chaos.meaning
    assert 0.02 < report.chaos.numbers["sigma"] < 1.3
    smooth = followed(report, chaotic)
    settings = {"optimizer": optax.adam(0.1), "steps": 80, "progress": False}
    stuck = hg.meta.optimize(lambda x, key: chaotic(x, 14), start, **settings)
    best = hg.meta.optimize(lambda x, key: smooth(x, 14), start, **settings)
    bowl = lambda x: float(jnp.sum((x - 1) ** 2))  # noqa: E731
    assert bowl(best.hypers) < 0.1 * bowl(start) and bowl(best.hypers) < 0.2 * bowl(stuck.hypers)


def test_the_advice_names_a_scale_for_every_array() -> None:
    start = {"large": jnp.full(3, 300.0), "small": jnp.float32(0.02)}
    objective = lambda e, steps: chaotic(e["large"] / 100, steps) + chaotic(100 * e["small"], steps)  # noqa: E731
    report = hg.check_hypergradient(objective, start, steps=(6, 10, 14), directions=1, quiet=True)
    sigma = report.chaos.numbers["sigma"]
    assert sigma["large"] == pytest.approx(15_000 * sigma["small"], rel=0.1)
    gradient = jax.grad(followed(report, objective))(start, 14)
    assert np.all(gradient["large"] > 0) and gradient["small"] > 0


def test_no_noise_is_advised_where_none_helps() -> None:
    flat = lambda x, steps: jnp.sin(2.0**steps * x)  # noqa: E731
    report = hg.check_hypergradient(flat, jnp.float32(2.0), steps=(6, 10, 14), directions=1, quiet=True)
    assert report.chaos.verdict == "failed" and report.chaos.numbers["sigma"] is None
    assert "does not help, because the objective stays rough" in report.chaos.meaning
    linear = lambda x, steps: 2.0**steps * x  # noqa: E731
    report = hg.check_hypergradient(linear, jnp.float32(2.0), steps=(6, 10, 14), directions=1, quiet=True)
    assert "smooth at all scales that were tried" in report.chaos.meaning


@pytest.mark.slow
def test_following_the_advice_frees_a_chaotic_training_run() -> None:
    start = jnp.array([0.5, 0.5])
    objective = experiment.regression
    report = hg.check_hypergradient(objective, start, steps=(25, 50, 100), quiet=True)
    assert report.chaos.verdict == "failed"
    smooth = followed(report, objective)
    settings = {"optimizer": optax.adam(0.03), "steps": 300, "progress": False}
    stuck = hg.meta.optimize(lambda x, key: objective(x, 100), start, **settings)
    best = hg.meta.optimize(lambda x, key: smooth(x, 100), start, **settings)
    assert objective(best.hypers, 100) < 10 < 15 < objective(stuck.hypers, 100)


@pytest.mark.slow
def test_writes_figure_and_record(tmp_path: Path) -> None:
    found = experiment.command(["--fast", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "smoothing.json").read_text())
    assert record["influence"]["exact"] == found["influence"]["exact"]
    assert len(record["calm"]["exact"]) == 3 and len(record["calm"]["smoothed"]) == 2
    assert (tmp_path / "smoothing.png").stat().st_size > 10_000


def test_the_record_keeps_what_the_page_says() -> None:
    record = json.loads(
        (Path(experiment.__file__).parent.parent / "figures" / "smoothing.json").read_text()
    )
    found, truncated = record["influence"], record["influence"]["truncated"]
    assert truncated["1"] < 0 and truncated["10"] < 0 < truncated["100"]
    for nres, pes in zip(found["nres"], found["pes"]):
        for each in (nres, pes):
            assert abs(each["mean"] - found["exact"]) < 3 * each["standard_error"]
        assert nres["deviation"] < pes["deviation"]
    assert record["scatter"]["nres"] < record["scatter"]["pes"]
    assert record["regression"]["smoothed_end"] < 6 < 20 < record["regression"]["exact_end"]
    assert "chaotic" in record["report"]["meaning"]
    assert record["chaotic"]["smoothed_end"] < 0.6 * record["chaotic"]["exact_end"]
    assert record["share_of_runs"] < 0.1
