"""`check_leave_out` on problems in which the effect of leaving examples out is known."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import hypergrad as hg
from hypergrad.check import leave_out

N = 40
ONES = np.ones(N, np.float32)
SLOPES = np.random.default_rng(0).normal(size=N).astype(np.float32)


def check(objective: Any, hypergradient: Any = None, weights: Any = ONES, **settings: Any) -> Any:
    return hg.check_leave_out(objective, weights, hypergradient, **{"quiet": True, **settings})


def ridge(c: Any, numbers: Any = jnp) -> Any:
    """Squared error at new points of the ridge regression with weights ``c``, in closed form."""
    rng = np.random.default_rng(1)
    X, new = rng.normal(size=(N, 3)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    y = (X @ np.ones(3) + rng.normal(size=N)).astype(np.float32)
    w = numbers.linalg.solve((X * c[:, None]).T @ X + 2 * numbers.eye(3), (X * c[:, None]).T @ y)
    return numbers.sum((new @ (w - 2.0)) ** 2)


def test_ridge_regression_has_its_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
    report = hg.check_leave_out(ridge, ONES)
    assert report.trusted and report.noise.verdict == report.metasmoothness.verdict == "not checked"
    text = capsys.readouterr().out
    assert text == f"{report}\n" and text.startswith("Leaving out 50% of 40 examples: trusted\n")
    assert max(map(len, text.splitlines())) <= 100
    numbers = report.prediction.numbers
    g, runs = np.asarray(jax.grad(ridge)(ONES)), numbers["runs"]
    assert runs <= 12
    for k in range(runs):
        out = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(0), k), N))[: N // 2]
        left = np.where(np.isin(np.arange(N), out), 0.0, 1.0)
        assert numbers["real"][k] == pytest.approx(ridge(left, np), rel=1e-4)
        assert numbers["predicted"][k] == pytest.approx(-g @ (1 - left), rel=1e-4)
    expected = stats.spearmanr(numbers["predicted"], numbers["real"])[0]
    assert numbers["correlation"] == pytest.approx(expected) and expected > 0.8


def test_a_linear_objective_is_predicted_exactly_in_six_runs() -> None:
    numbers = check(lambda c: SLOPES @ c, SLOPES).prediction.numbers
    assert numbers["correlation"] == 1.0 and numbers["runs"] == 6
    assert 0.7 < numbers["interval"][0] < numbers["interval"][1] < 1


def test_weights_count_in_predictions() -> None:
    weights = np.linspace(0.5, 2.0, N).astype(np.float32)
    numbers = check(lambda c: SLOPES @ c, SLOPES, weights, share=0.25).prediction.numbers
    lost = np.asarray(numbers["real"]) - SLOPES @ weights
    assert np.asarray(numbers["predicted"]) == pytest.approx(lost, abs=1e-4)


def logistic_map(c: Any) -> Any:
    """A chaotic run that starts where the weighted mean of the slopes says."""
    start = 0.3 + 0.1 * jnp.tanh(jnp.mean(SLOPES * c))
    return jax.lax.fori_loop(0, 25, lambda _, w: 3.9 * w * (1 - w), start)


def test_chaos_is_flagged() -> None:
    report = check(logistic_map)
    assert report.verdict == "NOT TRUSTED" and report.prediction.verdict == "failed"
    assert abs(report.prediction.numbers["correlation"]) < 0.7
    assert report.metasmoothness.verdict == "failed" and "Raise Adam's ε" in report.metasmoothness.meaning
    assert report.noise.verdict == "not checked" and "training_key=" in report.noise.meaning


def test_effects_that_do_not_add_up_are_flagged_as_such() -> None:
    other = np.random.default_rng(2).normal(size=N).astype(np.float32)
    report = check(lambda c: SLOPES @ (c - 1) + 0.4 * (other @ (c - 1)) ** 2, SLOPES)
    assert report.verdict in ("NOT TRUSTED", "cannot tell")
    assert report.metasmoothness.verdict == "warning" and "do not add up" in report.metasmoothness.meaning


def noisy(size: float) -> Any:
    return lambda c, key: SLOPES @ c + size * jax.random.normal(key)


def test_noise_of_the_keys_is_told_from_the_rest() -> None:
    key = jax.random.key(4)
    calm = check(noisy(0.1), SLOPES, training_key=key)
    assert calm.trusted and len(set(calm.prediction.numbers["real"])) == calm.prediction.numbers["runs"]
    loud = check(noisy(100.0), SLOPES, training_key=key)
    assert loud.verdict == "NOT TRUSTED"
    assert loud.noise.verdict == "warning" and "Turn dropout off" in loud.noise.meaning
    share = np.var(loud.noise.numbers["values"], ddof=1) / np.var(loud.prediction.numbers["real"], ddof=1)
    assert loud.noise.numbers["share"] == pytest.approx(min(1.0, share))
    assert loud.metasmoothness.verdict == "ok" and loud.metasmoothness.numbers["relative_error"] < 1e-2


def test_the_hypergradient_is_that_of_the_training_key() -> None:
    def objective(c: Any, key: Any) -> Any:
        return c @ (SLOPES + jax.random.normal(key, (N,)))

    key = jax.random.key(3)
    found = check(objective, training_key=key).prediction.numbers
    given = check(objective, jax.grad(objective)(ONES, key), training_key=key).prediction.numbers
    assert found["predicted"] == given["predicted"] and found["real"] == given["real"]


@pytest.mark.parametrize(
    ("correlation", "share_trusted"), [(0.0, 0.0), (0.2, 0.01), (0.9, 0.97), (0.97, 1.0)]
)
def test_the_sequential_test_makes_few_mistakes(correlation: float, share_trusted: float) -> None:
    """Of Gaussian pairs, whose rank correlation is ``6/π arcsin(ρ/2)``."""
    rng = np.random.default_rng(4)
    ρ, trusted, runs, n = 2 * math.sin(math.pi / 6 * correlation), 0, 0, 150
    for _ in range(n):
        x = rng.normal(size=24)
        y = ρ * x + math.sqrt(1 - ρ**2) * rng.normal(size=24)
        decisions = [leave_out.decided(x[:k], y[:k]) for k in range(6, 25)]
        first = next((k for k, decision in enumerate(decisions) if decision), len(decisions) - 1)
        trusted += decisions[first] > 0
        runs += 6 + first
    assert trusted / n == pytest.approx(share_trusted, abs=3.5 * math.sqrt(0.01 / n))
    assert runs / n < 13


def test_ranks_are_those_of_scipy_with_ties_too() -> None:
    rng = np.random.default_rng(5)
    for y in (rng.normal(size=20), rng.integers(0, 4, 20)):
        x = rng.integers(0, 6, 20) + 0.5 * y
        assert leave_out.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


def test_undecided_between_the_two_correlations() -> None:
    report = check(noisy(4.0), SLOPES, training_key=jax.random.key(0), probes=6)
    assert report.verdict == "cannot tell" and "neither clearly above 0.2" in report.prediction.meaning


def test_a_run_that_fails_is_not_trusted() -> None:
    def objective(c: Any) -> Any:
        raise hg.ReversalError("training has diverged")

    report = check(objective, SLOPES)
    assert report.verdict == "NOT TRUSTED" and report.prediction.numbers["runs"] == 1
    assert report.prediction.meaning == "A run without 50% of the examples fails. Lower the learning rate."


@pytest.mark.parametrize(
    ("hypergradient", "message"),
    [(SLOPES * np.nan, "is NaN or infinite"), (ONES, "predicts the same effect")],
    ids=["NaN", "constant"],
)
def test_a_useless_hypergradient_costs_no_run(hypergradient: Any, message: str) -> None:
    calls: list[int] = []
    report = check(calls.append, hypergradient)
    assert report.verdict == "NOT TRUSTED" and message in report.prediction.meaning and not calls


def test_an_objective_without_differences_cannot_be_told() -> None:
    report = check(lambda c: 1.0, SLOPES)
    assert report.verdict == "cannot tell" and "whichever examples" in report.prediction.meaning


def test_progress_counts_runs(capsys: pytest.CaptureFixture[str]) -> None:
    check(lambda c: SLOPES @ c, SLOPES, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and re.search(r"check_leave_out: 6/24 runs", shown.err)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a matrix": ({"weights": np.ones((4, 4))}, r"weights are float64\[4, 4\]; pass one finite float"),
    "few": ({"weights": np.ones(5)}, r"of 8 or more"),
    "integers": ({"weights": np.ones(9, int)}, r"weights are int64\[9\]"),
    "infinite": ({"weights": np.full(9, np.inf)}, r"pass one finite float"),
    "all": ({"share": 1.0}, r"share=1\.0.*share must lie in \(0, 1\)"),
    "none": ({"share": 0.001}, r"leaves out 0 of 40 examples"),
    "few probes": ({"probes": 5}, r"probes=5.*a whole number of at least 6"),
    "another shape": ({"hypergradient": np.ones(3)}, r"the hypergradient has the shape \(3,\) and the w"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    changes, message = REFUSED[case]
    calls: list[int] = []
    with pytest.raises(ValueError, match=message) as raised:
        check(calls.append, **{"hypergradient": SLOPES} | changes)
    assert str(raised.value).startswith("check_leave_out(share=") and not calls
