"""The experiment with one weight per training example."""

import json
from pathlib import Path

import pytest

from experiments import data_weights as experiment


@pytest.mark.slow
def test_wrong_labels_are_found(tmp_path: Path) -> None:
    found = experiment.command(["--fast", "--output", str(tmp_path)])
    assert found.area["hypergradient"] > 0.85 and found.area["training loss"] > 0.95
    assert found.outer_loss[-1] < 0.8 * found.outer_loss[0]
    record = json.loads((tmp_path / "data_weights_digits.json").read_text())
    assert record["area"] == found.area
    assert (tmp_path / "data_weights_digits.png").stat().st_size > 10_000
