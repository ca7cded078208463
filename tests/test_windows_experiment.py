"""The experiment on windows, at the size of its fast pass."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import windows as experiment


@pytest.mark.slow
def test_cosines_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = experiment.command(["--fast", "--output", str(tmp_path)])
    saved = json.loads((tmp_path / "windows_digits.json").read_text())["cosines"]
    assert list(saved) == ["real images", "after learning"]
    for state, found in record["cosines"].items():
        assert [each.window for each in found] == [4]
        np.testing.assert_allclose(found[0].same_end[:, 0], 1, rtol=1e-4)
        np.testing.assert_array_equal(saved[state][0]["whole_run"], found[0].whole_run)
    assert (tmp_path / "windows_digits.png").stat().st_size > 10_000
    assert "after learning: gradient of a window of 4 steps" in capsys.readouterr().out
