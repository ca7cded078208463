"""The regression on features with a power-law spectrum, and schedules learned on it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from experiments import optimal_schedules as experiment
from experiments.common.statistics import standard_error
from hypergrad import problems


def small(**more: object) -> problems.PowerLaw:
    settings = {"capacity": 1.5, "source": 1.8, "noise": 0.3, "batch_size": 2, "groups": None}
    return problems.power_law(4, **{**settings, **more})  # type: ignore[arg-type]


def test_recursion_is_the_mean_of_sampled_training() -> None:
    """`hg.train` on samples, with the full matrix of moments in it, against the diagonal recursion."""
    problem, steps, runs = small(), 6, 3000
    loss, start = problems.sampled_power_law_loss, jnp.sqrt(problem.second_moment)
    rates = jnp.linspace(0.5, 0.1, steps)

    def one(key: jax.Array) -> jax.Array:
        batches = problems.sample_power_law(problem, key, steps)
        trained = hg.train(
            loss, start, {"learning_rate": rates}, problem, batches,
            steps=steps, optimizer=hg.sgd(), adjoint=hg.Stored(),
        )  # fmt: skip
        return problems.excess_loss(problem, trained.params**2)

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), runs)))
    expected = problems.expect_power_law(problem, rates)
    assert expected.shape == (steps + 1,)
    assert abs(found.mean() - expected[-1]) < 3.5 * standard_error(found)
    assert found.mean() < 0.9 * expected[0]


def test_recursion_by_hand() -> None:
    problem, rate = small(), 0.4
    lam, c, *_ = (np.asarray(x, np.float64) for x in problem)
    loss = 0.5 * np.sum(lam * c)
    after = (1 - rate * lam) ** 2 * c + rate**2 * lam * (lam * c + 2 * loss + 0.3**2) / 2
    losses = problems.expect_power_law(problem, jnp.array([rate]))
    np.testing.assert_allclose(losses, [loss, 0.5 * np.sum(lam * after)], rtol=1e-5)


def test_groups_of_features_train_as_all_of_them(x64: None) -> None:
    rates = jnp.full(40, 0.2)
    each, grouped = (
        problems.power_law(3000, capacity=1.5, source=1.8, noise=0.3, batch_size=2, groups=groups)
        for groups in (None, 200)
    )
    assert len(grouped.eigenvalue) < 200 and grouped.multiplicity.sum() == 3000
    np.testing.assert_allclose(
        problems.expect_power_law(grouped, rates), problems.expect_power_law(each, rates), rtol=1e-4
    )


def test_hypergradient_against_differences(x64: None) -> None:
    problem, rates = small(), jnp.linspace(0.5, 0.1, 6)
    final = lambda rates: problems.expect_power_law(problem, rates)[-1]  # noqa: E731
    gradient, h = jax.jit(jax.grad(final))(rates), 1e-5
    both = jax.jit(jax.vmap(final))(rates[None] + h * jnp.concatenate([jnp.eye(6), -jnp.eye(6)]))
    np.testing.assert_allclose(gradient, (both[:6] - both[6:]) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 1.0}, r"power_law\(features=4, capacity=1.0.*capacity and source must be above 1"),
        ({"source": 0.5}, "capacity and source must be above 1"),
        ({"noise": -1.0}, "noise must be at least 0, and batch_size above 0"),
        ({"batch_size": 0}, "noise must be at least 0, and batch_size above 0"),
        ({"groups": 0}, "features and groups must be whole numbers"),
    ],
)
def test_bad_problems_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"learning_rate has shape \[\]; it must be \(T,\)"):
        problems.expect_power_law(small(), jnp.float32(0.1))
    with pytest.raises(ValueError, match="in the hard phase, where source is not above capacity"):
        problems.best_shape(2.0, 1.5)
    with pytest.raises(ValueError, match=r"sample_power_law\(steps=0\): steps must be a whole number"):
        problems.sample_power_law(small(), jax.random.key(0), 0)


# Learned schedules.


@pytest.mark.slow
def test_writes_figure_and_record(tmp_path: Path) -> None:
    found = experiment.command(["--fast", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "optimal_schedules.json").read_text())
    assert record["xi"] == found["xi"] and len(record["easy"]) == 2
    assert (tmp_path / "optimal_schedules.png").stat().st_size > 10_000


def test_exponents_are_fitted_with_and_without_a_shift() -> None:
    steps = 500
    remaining = 1 - np.arange(steps) / steps
    place, knots = experiment.places(steps, 200)
    log_rates = np.interp(knots, place, np.log(0.7 * (remaining + 0.05) ** 1.5))
    learned = experiment.Learned(steps, log_rates, 0.0)
    shifted = experiment.fit(learned, True)
    assert shifted.delta == pytest.approx(1.5, rel=0.01) and shifted.shift == pytest.approx(0.05, rel=0.05)
    assert shifted.height == pytest.approx(0.7, rel=0.01)
    assert experiment.fit(learned, False).delta < 1.45


@pytest.mark.slow
def test_learned_rates_of_the_noisy_quadratic_are_the_known_ones(x64: None) -> None:
    known, learned = experiment.quadratic(10)
    np.testing.assert_allclose(learned, known, rtol=1e-4)


@pytest.mark.slow
def test_schedules_of_the_easy_phase_have_the_known_exponents(x64: None) -> None:
    config = experiment.Config(lengths=(4000, 16000))
    schedules, shape = experiment.easy(config), problems.best_shape(config.capacity, config.source)
    assert experiment.fit(schedules[-1], True).delta == pytest.approx(shape.delta, rel=0.05)
    assert experiment.xi_of(schedules) == pytest.approx(shape.xi, rel=0.1)


@pytest.mark.slow
def test_schedules_of_the_hard_phase_stay_and_decay(x64: None) -> None:
    found = experiment.hard(experiment.Config(hard_lengths=(250, 1000)))
    short, long = map(experiment.parts, found)
    for learned, (_, plateau, last, _) in zip(found, (short, long)):
        early = np.exp(learned.log_rates[learned.steps // 20 : learned.steps // 4])
        assert np.ptp(early) < 0.1 * plateau and last < 0.1 * plateau
    assert long[1] == pytest.approx(short[1], rel=0.15)  # the plateau does not fall with the length
    assert long[3] < 0.8 * short[3]  # and the decay takes a smaller part of the run


def test_the_record_keeps_what_the_page_says() -> None:
    figures = Path(experiment.__file__).parent.parent / "figures"
    record = json.loads((figures / "optimal_schedules.json").read_text())
    np.testing.assert_allclose(record["quadratic"]["learned"], record["quadratic"]["known"], rtol=1e-6)
    for steps in ("4000", "16000", "64000"):
        assert record["fits"][steps]["shifted"]["delta"] == pytest.approx(
            record["known"]["delta"], rel=0.05
        )
    assert record["fits"]["64000"]["plain"]["delta"] == pytest.approx(record["known"]["delta"], rel=0.05)
    assert record["xi"] == pytest.approx(record["known"]["xi"], rel=0.05)
    (first, plateau, last, decay), (_, longer_plateau, _, longer_decay) = record["parts"].values()
    assert first > plateau > 10 * last
    assert longer_plateau == pytest.approx(plateau, rel=0.1) and longer_decay < 0.8 * decay
