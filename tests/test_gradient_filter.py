"""The experiment on the curvature-aware gradient filter."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import gradient_filter as experiment
from experiments.gradient_filter import FAST, METHODS, Config, Judged, Learning


def judged(mean: float, **hypers: float) -> Judged:
    runs = np.random.default_rng(0).normal(size=(1, 16))
    learners = 0.01 * np.random.default_rng(round(1000 * mean)).normal(size=(4, 1))
    return Judged({k: np.array([x]) for k, x in hypers.items()}, mean + runs + learners, np.ones((4, 16)))


def check_quadratic(name: str, steps: int = 5000) -> experiment.Series:
    """Losses found once by another program from the same draws, to two digits."""
    optimizer, hypers, expected = METHODS[name]
    problem = experiment.quadratic(steps)
    if name.startswith("without"):
        problem = problem._replace(points=0 * problem.points)
    found = experiment.quadratic_run(problem, optimizer, hypers)
    if math.isfinite(expected):
        assert found.loss[-1] == pytest.approx(expected, rel=0.03), name
    return found


def test_filter_on_the_noisy_quadratic(x64: None) -> None:
    found = check_quadratic("filter, α = 0.5")
    ratio = np.mean(found.ratio[-500:])
    assert 200 < ratio < 300  # 247 by the other program, over a window that it does not tell
    t = np.arange(1, len(found.gain) + 1)
    np.testing.assert_allclose(found.gain[100:] * t[100:], 1, atol=0.1)  # the variance is estimated
    assert found.gain[-1] * t[-1] == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_table_of_the_noisy_quadratic(x64: None) -> None:
    for name in METHODS:
        found = check_quadratic(name)
    assert name == "filter, PI, β = 0.999"
    above = np.flatnonzero(~(found.loss <= found.loss[0]))
    assert 400 < above[0] < 420


def test_answer_tells_better_from_no_different() -> None:
    config = Config(steps=80, horizons=(1,))
    knobs = Learning(
        {0.1: judged(2.0, max_step=0.1), 0.2: judged(1.0, max_step=0.2)},
        {1: judged(3.0), 80: judged(1.0)},
        {"gradient descent": judged(0.5), "filter": judged(1.001)},
    )
    short, hand, descent, constant, so, then = experiment.answer(config, knobs)
    assert "learned over 80 steps: better than learned over 1 (" in short
    assert "as good as the best cap by hand (0.2) (+0.0000 ± 0.0000" in hand
    assert "worse than gradient descent" in descent
    assert "as good as filter at a constant rate" in constant
    assert (
        "there is a short-horizon bias, at horizons of 1 steps" in so
        and "are as good as constant ones" in then
    )
    learners = knobs.learned[80].log_losses.mean(1)
    assert knobs.learned[80].error == pytest.approx(np.std(learners, ddof=1) / 2)


@pytest.mark.slow
def test_writes_figure_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(FAST, horizons=(3,), rates=(0.3,))
    found: dict[str, Any] = experiment.main(config, str(tmp_path))
    printed = capsys.readouterr().out
    assert all(f"\n{part}. " in "\n" + printed for part in (1, 2, 3, 4))
    (constant,) = found["constant"]
    assert np.mean(constant.theirs[:, -50:]) > 5 * np.mean(constant.mine[:, -50:])
    record = json.loads((tmp_path / "gradient_filter.json").read_text())
    log_losses = record["knobs"]["learned, horizon 3"]["log losses"]
    assert np.shape(log_losses) == (config.learners, config.judged)
    assert (tmp_path / "gradient_filter.png").stat().st_size > 10_000
