import json
import math

import jax
import pytest

from benchmarks import curvature as bench


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it():
    precision = jax.config.jax_default_matmul_precision
    with jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_default_matmul_precision", precision)  # which `main` sets


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "MOST", 1)
        return bench.measure("mlp", bench.FAST["mlp"], 4, list(bench.CONTESTANTS), 1, math.inf)


@pytest.mark.slow
def test_contestants_agree(rows):
    assert [r["contestant"] for r in rows] == list(bench.CONTESTANTS)
    for row in rows:
        same = bench.CONTESTANTS[row["contestant"]].same
        assert row["skipped"] is None and row["seconds"] > 0 and len(row["times"]) == 1
        assert row["parameters"] == 8 * 4 + 4 + 4 * 10 + 10
        if same is None:
            assert row["difference"] is None
        else:
            assert row["difference"] < 1e-5
    assert rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1


@pytest.mark.slow
def test_times_are_by_vector_and_memory_is_of_all(rows):
    of = {r["contestant"]: r for r in rows}
    eight, unit = of["hessian, 8 vectors"], of["gradient"]
    assert eight["time_ratio"] == pytest.approx(eight["seconds"] / 8 / unit["seconds"])
    assert eight["memory_ratio"] == pytest.approx(eight["bytes"] / unit["bytes"])
    assert eight["bytes"] > of["hessian"]["bytes"]


def test_what_does_not_fit_is_not_called(rows, monkeypatch):
    monkeypatch.setattr(bench, "MOST", 1)
    network, names = bench.FAST["mlp"], ["gradient", "gauss_newton, 8"]
    (row,) = bench.measure("mlp", network, 4, names, 1, limit=1)
    assert row["skipped"].startswith("skipped: would need") and row["times"] == []
    some = bench.measure("mlp", network, 4, names, 1, limit=rows[0]["bytes"])
    assert [bool(r["skipped"]) for r in some] == [False, True]
    assert some[1]["skipped"] in bench.table(some)


def test_networks_grow_until_they_do_not_fit(monkeypatch, capsys, tmp_path):
    widths = []

    def measure(name, network, width, names, repeats, limit):
        widths.append(width)
        known = {
            "network": name,
            "width": width,
            "parameters": width,
            "batch": 1,
            "vectors": 1,
            "times": [],
        }
        known |= {"contestant": "gradient", "seconds": 1.0, "time_ratio": 1.0, "memory_ratio": 1.0}
        known |= {"bytes": width, "temp_bytes": 0, "difference": None}
        return [known | {"skipped": "skipped: would need 1 GiB" if width > limit else None}]

    monkeypatch.setattr(bench, "measure", measure)
    arguments = ["--networks", "mlp", "--budget-gib", str(300 / bench.GIB), "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    assert widths == [64, 128, 256, 512]
    assert "products agree: yes" in capsys.readouterr().out
    (path,) = tmp_path.glob("curvature-*.json")
    report = json.loads(path.read_text())
    assert [r["width"] for r in report["rows"]] == widths and report["machine"]["name"]
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_disagreement_is_reported(rows, monkeypatch, capsys):
    wrong = [r | {"difference": 0.1} for r in rows]
    monkeypatch.setattr(bench, "measure", lambda *_: wrong)
    assert bench.main(["--fast", "--networks", "mlp"]) == 1
    assert "products agree: NO (largest difference 1.0e-01)" in capsys.readouterr().out
