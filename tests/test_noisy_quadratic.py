"""The experiment on the noisy quadratic model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import noisy_quadratic as experiment
from experiments.noisy_quadratic import Config
from hypergrad import problems

# Steps to a loss of 0.01, best rate and best schedule, by batch size and power: found once by another
# program, to half a per cent.  The schedules are local optima, so that less is no fault.
TABLE = {
    16: {0.0: (378_919, 53_328), 0.5: (87_148, 37_242), 0.75: (65_729, 33_355)},
    64: {0.0: (95_977, 17_216), 0.5: (21_829, 9_316), 0.75: (16_403, 8_318)},
    256: {0.0: (25_797, 9_405), 0.5: (5_447, 2_330), 0.75: (4_108, 2_080)},
    1024: {0.0: (10_353, 7_688), 0.5: (1_364, 586), 0.75: (1_025, 520)},
    16384: {0.0: (7_169, 6_864), 0.5: (106, 98), 0.75: (64, 34)},
}


def check(rows: list[experiment.Row]) -> None:
    for row in rows:
        fixed, scheduled = TABLE[row.batch_size][row.power]
        assert row.fixed.steps <= 1.01 * fixed and row.scheduled.steps <= 1.01 * scheduled, row
        assert row.scheduled.steps > 0.98 * row.bound, row  # the prior is worth less than 2 per cent


def test_search_finds_the_optimal_schedule(x64: None) -> None:
    problem = problems.noisy_quadratic(1)
    least = float(problems.least_loss(problem, 6))
    excess, log_rates = experiment.search(problem, 6.0, 0.9 * least, 2.0, [np.full(6, -3.0)])
    assert math.exp(excess) == pytest.approx(1 / 0.9, rel=1e-9)
    np.testing.assert_allclose(
        np.exp(log_rates), problems.optimal_learning_rates(problem, 6)[:, 0], rtol=1e-3
    )


def test_search_stops_at_the_target_and_keeps_the_limit(x64: None) -> None:
    problem = problems.noisy_quadratic(10, batch_size=1e4)
    excess, log_rates = experiment.search(problem, 20.0, 0.5, 1.5, [np.full(2, 3.0)])
    assert excess <= 0 and np.exp(log_rates).max() <= 1.5 * (1 + 1e-12)


@pytest.mark.slow
def test_one_row_of_the_table(x64: None) -> None:
    check([experiment.row(Config(tolerance=0.005), 1024, 0.75, [])])


@pytest.mark.slow
def test_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = experiment.main(Config(sampled_runs=100))
    assert len(found["rows"]) == 15
    check(found["rows"])


@pytest.mark.slow
def test_writes_figure_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config((16, 64), (0.5,), 50, tolerance=0.05, pieces=3, sampled_steps=10, sampled_runs=400)
    found: dict[str, Any] = experiment.main(config, str(tmp_path))
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 2 + 2 + 1
    record = json.loads((tmp_path / "noisy_quadratic.json").read_text())
    assert [row["scheduled"]["steps"] for row in record["rows"]] == [
        r.scheduled.steps for r in found["rows"]
    ]
    for row in found["rows"]:
        assert row.scheduled.steps < row.fixed.steps
    sampled = found["sampled"]
    assert np.all(np.abs(sampled.mean - sampled.exact) < 4.0 * sampled.standard_error)
    assert (tmp_path / "noisy_quadratic.png").stat().st_size > 10_000
