"""The comparison of bilevel solvers, at its smallest."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bilevel as experiment

CLEANING, REGULARISATION = experiment.FAST


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, since each is compiled."""
    methods = {"F2SA": experiment.METHODS["F2SA"], "SABA": experiment.METHODS["SABA"]}
    monkeypatch.setattr(experiment, "methods", lambda config: methods)


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


def test_figure_and_record(few: None, tmp_path: Path) -> None:
    small = {"seeds": 2, "points": 2, "budget": 20_000, "examples": (400, 200)}
    configs = [replace(CLEANING, **small), replace(REGULARISATION, **small)]
    record = experiment.main(configs, output=str(tmp_path))
    assert json.loads((tmp_path / "bilevel.json").read_text())["regularisation"]["methods"].keys() == {
        "F2SA",
        "SABA",
    }
    assert (tmp_path / "bilevel.png").stat().st_size > 10_000
    for each in record.values():
        for found in each["methods"].values():
            assert 0.8 * 20_000 < found["evaluations"][-1] <= 20_000
            assert found["median"][-1] < found["median"][0]
            assert found["rates"][1] in each["config"]["hyper_rates"]
    assert min(min(found["median"]) for found in record["regularisation"]["methods"].values()) >= 0
