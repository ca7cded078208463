import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import hypergradient as bench

STEPS = 12
TINY = bench.Problem(sizes=(8, 6, 4), rows=40, batch=5, outer_rows=10)


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it():
    """With JAX's own settings: the rivals are not written for the strict session of these tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def measured():
    rows, gradients = bench.measure(TINY, list(bench.CONTESTANTS), [STEPS], repeats=1, limit=math.inf)
    bench.compare(rows, gradients)
    return rows, gradients


def test_all_contestants_agree(measured):
    rows, gradients = measured
    assert [r["contestant"] for r in rows] == list(bench.CONTESTANTS)
    reference = gradients["Stored", STEPS]
    assert reference.shape == (STEPS,) and np.linalg.norm(reference) > 0
    for row in rows:
        name = row["contestant"]
        if name.startswith("treeverse") and importlib.util.find_spec("equinox") is None:
            assert row["skipped"] == "skipped: equinox not installed"
            continue
        assert row["skipped"] is None
        assert row["seconds"] > 0 and row["temp_bytes"] > 0
        if name != bench.PLAIN:
            assert row["difference"] < 1e-4
            np.testing.assert_allclose(gradients[name, STEPS], reference, rtol=1e-4, atol=1e-7)


def test_hypergradient_is_the_finite_difference(measured):
    rates, arrays = bench.make_arrays(TINY, STEPS)
    direction = np.random.default_rng(3).normal(size=STEPS).astype(np.float32)
    step = 0.01 * direction

    def outer(rates):
        params = bench.scanned(rates, arrays)
        return float(bench.outer_loss(params, arrays.outer_inputs, arrays.outer_labels))

    difference = (outer(rates + step) - outer(rates - step)) / 0.02
    assert measured[1]["Reversible", STEPS] @ direction == pytest.approx(difference, rel=0.02)


def test_report_round_trips(measured, tmp_path):
    rows, _ = measured
    aims = bench.verdict(rows, parameters=82)
    report = {"machine": bench.describe_machine(), "versions": bench.versions(), "rows": rows}
    report |= {"verdict": aims, "config": TINY._asdict() | {"sizes": list(TINY.sizes)}}
    path = tmp_path / "new" / "report.json"
    bench.save(report, path)
    assert bench.load(path) == report
    bench.save(report | {"rows": []}, path)
    assert json.loads(path.read_text())["rows"] == []
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_plot_and_texts(measured, tmp_path):
    rows, _ = measured
    bench.plot({"rows": rows, "machine": {"name": "here"}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    lines = bench.table(rows).splitlines()
    whole = [line for line in lines if "skipped" not in line]  # as one is where Equinox is not installed
    assert len(lines) == len(rows) + 1 and len({len(line) for line in whole}) == 1
    text = bench.verdict_text(bench.verdict(rows, parameters=82))
    assert "not measured" in text and "not judged" in text and "MISSED" not in text


def test_verdict_compares_with_the_aims():
    def row(name, steps, seconds, temp_bytes):
        return bench.new_row(name, steps) | {"seconds": seconds, "temp_bytes": temp_bytes}

    rows = [row("plain training", 1000, 1.0, 10), row("Reversible", 1000, 2.5, 1000)]
    rows += [row("Reversible", 4000, 10.0, 1750), row("sqrt-T remat", 4000, 8.0, 17500)]
    aims = {a["what"]: a for a in bench.verdict(rows, parameters=10)}
    assert aims["time: Reversible / plain training, T=1000"]["met"] is True
    assert aims["time: Reversible / sqrt-T remat, T=4000"] == {
        "what": "time: Reversible / sqrt-T remat, T=4000",
        "value": 1.25,
        "at_most": 1,
        "met": False,
    }
    assert aims["memory: sqrt-T remat / Reversible, T=4000"]["met"] is True
    assert aims["time: Reversible / Checkpointed, T=4000"]["met"] is None
    bits = 750 * 8 / (10 * 3000)
    assert bench.bits_per_step(rows, 10) == pytest.approx(bits)
    assert aims["bits per parameter and step / log2(1/γ)"]["value"] == pytest.approx(bits / -math.log2(0.9))


def test_a_contestant_that_needs_too_much_memory_is_skipped():
    rows, gradients = bench.measure(TINY, ["plain training"], [STEPS], repeats=1, limit=1)
    assert rows[0]["skipped"].startswith("skipped: would need") and gradients == {}
    assert rows[0]["skipped"] in bench.table(rows)


def test_torch_contestants_are_skipped_by_name_where_missing(monkeypatch):
    monkeypatch.setattr(bench, "_installed", lambda module: module == "torch")
    row, gradient = bench.measure_torch(
        TINY, "TorchOpt", STEPS, 1, bench.new_row("Stored", STEPS), math.inf
    )
    assert row["skipped"] == "skipped: torchopt not installed" and gradient is None
    assert bench.missing("treeverse 8") == "skipped: equinox not installed"
    assert bench.missing("Reversible") is None


def test_exactness():
    result = bench.check_exactness(TINY, STEPS)
    assert result["bit_exact"] is True and result["message"] is None and result["steps"] == STEPS


def test_exactness_is_not_claimed_where_reversal_fails(monkeypatch):
    def refused(*_, **__):
        raise bench.hg.ReversalError("not recovered")

    monkeypatch.setattr(bench.hg, "train", refused)
    result = bench.check_exactness(TINY, STEPS)
    assert result["bit_exact"] is False and result["message"] == "not recovered"

    def other(*_, **__):
        raise jax.errors.JaxRuntimeError("out of memory")

    monkeypatch.setattr(bench.hg, "train", other)
    with pytest.raises(jax.errors.JaxRuntimeError):
        bench.check_exactness(TINY, STEPS)
