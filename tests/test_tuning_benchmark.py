"""The comparison with searches: its ranges, its budgets, and what it concludes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import tuning
from hypergrad import nets


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("learning_rate", 0.0, 1e-4),
        ("learning_rate", 0.5, 1e-2),
        ("weight_decay", 1.0, 1.0),
        ("b1", 0.0, 0.999),
        ("b2", 1 / 3, 0.99),
        ("b1", 1.0, 0.0),
    ],
)
def test_ranges_are_logarithmic(name: str, place: float, value: float) -> None:
    np.testing.assert_allclose(tuning.valued(name, place), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("layers", "counts"), [(4, [4, 30, 404]), (2, [4, 30, 402])])
def test_the_sizes_and_their_middles(layers: int, counts: list[int]) -> None:
    spaces = tuning.spaces(layers)
    assert [space.count for space in spaces] == counts
    for space in spaces:
        middle = space.hypers(jnp.full(space.count, 0.5))
        assert jax.tree.structure(middle) == jax.tree.structure(space.start)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), middle, space.start)


def test_knots_are_joined_by_lines_in_logarithms() -> None:
    space = tuning.Space(
        {"learning_rate": np.array([0.1, 0.001]), "b1": np.array([0.0, 0.99])}, {"eps": 1e-8}
    )
    whole = space.whole(space.start, 3)
    np.testing.assert_allclose(whole["learning_rate"], [0.1, 0.01, 0.001], rtol=1e-5)
    np.testing.assert_allclose(whole["b1"], [0.0, 0.9, 0.99], rtol=1e-5, atol=1e-7)
    assert whole["eps"] == 1e-8


def small_task() -> tuning.Task:
    rng = np.random.default_rng(0)
    init, apply = nets.mlp((3, 2))
    rows = (jnp.asarray(rng.normal(size=(20, 3)), jnp.float32), jnp.arange(20) % 2)
    return tuning.Task(init, lambda params, x, y: nets.cross_entropy(apply(params, x), y), [rows] * 3, 5)


def test_a_problem_in_knots_is_trained_with_their_values_at_every_step() -> None:
    task, steps = small_task(), 6
    space = tuning.spaces(task.layers)[1]
    problem = task.problem(space)
    settings: Any = {"steps": steps, "optimizer": hg.adamw(), "adjoint": hg.Stored()}
    found = problem.train(space.start, **settings)
    plain = hg.Problem(problem.init, problem.loss, problem.batches).train(
        space.fixed | {"learning_rate": np.full(steps, 1e-2, np.float32)}, **settings
    )
    np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-5)


def trials(scores: list[float]) -> list[tuning.Trial]:
    return [tuning.Trial(np.float32(k), x, k + 1, 1.0 * (k + 1)) for k, x in enumerate(scores)]


def test_a_budget_pays_for_its_trials_and_for_running_the_best_again() -> None:
    runs = tuning.Runs(lambda place, key: float(place), lambda hypers, key: 0.0, 1.0, 3.0)
    again = tuning.AGAIN * tuning.KEYS
    scores = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    # With all six trials the last five are run again, of which the second trial has the least place.
    assert tuning.best_of(trials(scores), runs, (6 + again, np.inf)) == 1
    assert tuning.best_of(trials(scores), runs, (2 + again, np.inf)) == 0
    assert tuning.best_of(trials(scores), runs, (np.inf, 3.0 + again)) == 0


@pytest.mark.parametrize(("runs", "done"), [(3, False), (4, True), (7, True)])
def test_a_search_whose_time_is_over_still_makes_as_many_runs_as_tune(runs: int, done: bool) -> None:
    made = trials([0.0] * runs)
    assert tuning._spent(made, (4, 9.0), (40, 2.0)) is done
    assert not tuning._spent(made, (4, 9.0), (40, 20.0))
    assert tuning._spent(made, (4, 2.5), (40, 2.0))  # its patience is over as well


def row(count: int, better: float) -> dict[str, Any]:
    """Hypergradients are better by so much than all but Sobol, which does not reach the end."""
    ours = np.linspace(0.5, 0.6, 20)
    theirs = ours + better + 1e-3 * np.cos(np.arange(20))
    losses: dict[str, Any] = {tuning.TUNE: [ours]}
    for name in tuning.SEARCHES:
        losses |= {f"{name}, {budget}": [theirs] for budget in tuning.BUDGETS}
    losses["Sobol, many times"] = [None]
    return {
        "hyperparameters": count, "losses": losses, "runs": [100.0], "start": [1.0],
        "seconds_of_a_run": 0.01, "runs_of_a_hypergradient": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("better", "first"), [([0.1, 0.1, 0.1], 4), ([-0.1, 0.1, 0.1], 30), ([0.1, 0.1, 0.0], None)]
)
def test_from_where_on_hypergradients_win(better: list[float], first: int | None) -> None:
    rows = {f"net, size {k}": row(count, x) for k, (count, x) in enumerate(zip((4, 30, 404), better))}
    assert tuning.wins_from(rows, "net", "equal runs") == first
    assert tuning.wins_from(rows, "net", "many times") == first
    said = tuning.table(rows)
    assert "30 hyperparameters, 100 runs of 10.0 ms" in said and "Sobol (did not get there)" in said


def test_tables_for_the_documentation() -> None:
    said = tuning.markdown({"net, size 0": row(4, 0.1)}, "many times").splitlines()
    assert len(said) == 3 and said[0].count("|") == said[1].count("|") == said[2].count("|")
    assert said[2].startswith("| net, 4 | 0.550 ± 0.007 | -0.100 ± 0.000 |") and said[2].endswith("|  |")
