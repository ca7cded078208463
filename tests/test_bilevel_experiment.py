"""The comparison of bilevel solvers, at its smallest."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from experiments import bilevel as experiment

CLEANING, REGULARISATION = experiment.FAST


def test_labels_are_replaced_and_the_sets_are_the_same_for_all_seeds() -> None:
    wrong, right = (
        experiment.examples(replace(CLEANING, wrong=share), None, seed=1) for share in (0.5, 0.0)
    )
    assert np.mean(wrong.labels != right.labels) == pytest.approx(0.45, abs=0.05)  # a tenth hits by chance
    np.testing.assert_array_equal(wrong.outer_labels, right.outer_labels)
    a, b = (experiment.examples(REGULARISATION, None, seed) for seed in (0, 1))
    assert not np.array_equal(a.inputs, b.inputs)
    for name in ("inputs", "outer_inputs"):
        np.testing.assert_allclose(getattr(a, name).sum(0), getattr(b, name).sum(0), atol=1e-3)
    assert set(np.unique(a.labels)) == {0, 1}


def test_the_inner_problem_is_solved_for_every_point() -> None:
    task = experiment.regularisation(REGULARISATION)
    e = experiment.examples(REGULARISATION, None, 0)
    w, theta = task.start(e)
    solved = experiment.minimum(task.inner, e, w, theta)
    slope = jax.grad(lambda w: task.inner(e, w, theta, jnp.arange(len(e.labels))))(solved)
    assert jnp.linalg.norm(slope) < 1e-5


@pytest.mark.slow
def test_figure_and_record(tmp_path: Path) -> None:
    small: Any = {"points": 2, "budget": 20_000, "examples": (400, 200)}
    configs = [
        replace(CLEANING, **small, methods=("SABA",)),
        replace(REGULARISATION, **small, methods=("F2SA",)),
    ]
    record = experiment.main(configs, output=str(tmp_path))
    written = json.loads((tmp_path / "bilevel.json").read_text())
    assert written["regularisation"]["methods"] == record["regularisation"]["methods"]
    assert (tmp_path / "bilevel.png").stat().st_size > 10_000
    for config, method in zip(configs, ("SABA", "F2SA")):
        found = record[config.task]["methods"][method]
        assert 0.9 * 20_000 < found["evaluations"][-1] <= 20_000
        assert 0 <= found["median"][-1] < found["median"][0]
        assert found["rates"][0] in config.rates and found["rates"][1] in config.hyper_rates


def test_every_method_runs_at_its_fastest() -> None:
    assert {*CLEANING.methods, *REGULARISATION.methods} == set(experiment.ALL)
    assert all(set(experiment.methods(config)) == set(config.methods) for config in experiment.FAST)


def test_a_run_that_diverged_loses_and_other_errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    task = experiment.cleaning(CLEANING)
    run = experiment.runner(CLEANING, task, experiment.METHODS["SOBA"])
    e = experiment.examples(CLEANING, None, 0)
    message = "INTERNAL: ReversalError: too large"

    def solve(*args: Any, **settings: Any) -> None:
        raise ValueError(message)

    monkeypatch.setattr(experiment.bilevel, "solve", solve)
    diverged = run(e, (0.1, 1.0), 0)
    assert diverged.tuned == np.inf and np.isnan(diverged.shown).all()
    message = "something else"
    with pytest.raises(ValueError, match="something else"):
        run(e, (0.1, 1.0), 0)


def test_rates_that_diverge_for_another_seed_are_not_chosen() -> None:
    def timed(e: Any, pair: tuple[float, float], seed: int, whole: bool) -> experiment.Curve:
        diverged = pair[1] == 1e3 and seed == experiment.TUNED_ON[-1]
        return experiment.Curve(np.zeros(1), np.zeros(1), np.zeros(1), np.inf if diverged else pair[1])

    assert experiment.tune(CLEANING, {"SOBA": timed}, None)["SOBA"].pair == (0.1, 3e3)


def test_a_run_without_numbers_diverged() -> None:
    for config, task in ((CLEANING, experiment.cleaning), (REGULARISATION, experiment.regularisation)):
        e = experiment.examples(config, None, 0)
        run = experiment.runner(replace(config, budget=20_000), task(config), experiment.METHODS["SOBA"])
        diverged = run(e, (1e4, 1e4), 0)
        assert diverged.tuned == np.inf
        assert np.isfinite(diverged.shown[0]) and np.isnan(diverged.shown[-1])


def test_training_on_the_clean_examples_alone_is_at_its_minimum() -> None:
    config = replace(CLEANING, penalty=0.1)
    e = experiment.examples(config, None, 0)
    (error,) = experiment.cleaning(config).references(e).values()
    model = LogisticRegression(C=1 / (0.1 * len(e.outer_labels)), tol=1e-8, max_iter=1000)
    model.fit(e.outer_inputs, e.outer_labels)
    assert error == pytest.approx(
        1 - model.score(e.test_inputs, e.test_labels), abs=0.5 / len(e.test_labels)
    )


def test_runs_that_diverge_count_as_infinite() -> None:
    places = np.arange(2)
    curves = [experiment.Curve(places, places, np.array([1.0, x]), 0.0) for x in (0.5, np.nan, 0.3)]
    tuned = experiment.Tuned((0.1, 1.0), (0.1,), (1.0,))
    result = experiment.Result({"SOBA": tuned}, {"SOBA": curves}, 0.1, {"clean": [0.3, 0.1, 0.2]})
    record = experiment.summary(CLEANING, result)
    assert record["references"] == {"clean": 0.2}
    found = record["methods"]["SOBA"]
    assert found["median"] == [0.9, 0.4] and found["quartiles"][1] == [0.9, None]
    assert found["diverged"] == 1
