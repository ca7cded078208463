import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import hypergradient as bench
from benchmarks import time as times

STEPS = 12
TINY = bench.Problem(sizes=(8, 4), rows=40, batch=5, outer_rows=10)


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it():
    """With JAX's own settings: the rivals are not written for the strict session of these tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def measured():
    rows, gradients = bench.measure(
        TINY, list(bench.OPTIMIZERS), list(bench.CONTESTANTS), [STEPS], repeats=1, limit=math.inf
    )
    bench.compare(rows, gradients)
    return rows, gradients


@pytest.mark.slow
def test_all_contestants_agree(measured):
    rows, gradients = measured
    expected = [(o, c) for o in bench.OPTIMIZERS for c in bench.CONTESTANTS]
    assert [(r["optimizer"], r["contestant"]) for r in rows] == expected
    for row in rows:
        key = bench.key_of(row)
        reference = gradients[key._replace(contestant="Stored")]
        assert reference.shape == (STEPS,) and np.linalg.norm(reference) > 0
        if key.contestant.startswith("treeverse") and importlib.util.find_spec("equinox") is None:
            assert row["skipped"] == "skipped: equinox not installed"
            continue
        assert row["skipped"] is None
        assert row["seconds"] > 0 and row["temp_bytes"] > 0
        if key.contestant != bench.PLAIN:
            assert row["difference"] < 1e-4
            scale = np.abs(reference).max()
            np.testing.assert_allclose(gradients[key] / scale, reference / scale, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", bench.OPTIMIZERS)
def test_hypergradient_is_the_finite_difference(measured, optimizer):
    training = bench.OPTIMIZERS[optimizer]
    rates, arrays = bench.make_arrays(TINY, training.rate, STEPS)
    direction = np.random.default_rng(3).normal(size=STEPS).astype(np.float32)
    step = 0.05 * training.rate

    def outer(rates):
        params = bench.scanned(training, rates, arrays)
        return float(bench.outer_loss(params, arrays.outer_inputs, arrays.outer_labels))

    difference = (outer(rates + step * direction) - outer(rates - step * direction)) / (2 * step)
    gradient = measured[1][bench.Key(optimizer, "Reversible", STEPS)]
    assert gradient @ direction == pytest.approx(difference, rel=0.02)


def test_a_coordinate_without_gradient_leaves_the_written_adam_finite():
    def moved(rate):
        w, m, v = bench.adam_update(rate, 1, *np.zeros(4, np.float32))
        return w + m + v

    def twice(g):
        w, m, v = bench.adam_update(0.1, 1, g, *np.zeros(3, np.float32))
        return bench.adam_update(0.1, 2, g, w, m, v)[0]

    assert jax.grad(moved)(0.1) == 0
    assert np.isfinite(jax.grad(twice)(0.0))


@pytest.mark.parametrize("steps", [12, 1000, 20_000])
def test_the_number_of_segments_takes_the_least_memory(steps):
    segments = {}
    for name, training in bench.OPTIMIZERS.items():
        rates, arrays = bench.make_arrays(TINY, training.rate, steps)
        S = segments[name] = bench.in_segments(training, rates, arrays).segments
        state, rows = 16 if name == "momentum" else 24, 4 * TINY.batch
        best = max(2, math.sqrt(steps * (0.153 * 36 / 8 + rows) / (36 * state)))  # √(T b / k)
        assert steps % S == 0 and best / 2 <= S <= 2 * best
    assert segments["adam"] <= segments["momentum"]  # a start of Adam is larger


def test_where_the_run_is_long_only_some_are_called(monkeypatch):
    monkeypatch.setattr(bench, "AFFORDABLE", STEPS - 1)
    rows, gradients = bench.measure(
        TINY, ["momentum"], ["plain training", "optax"], [STEPS], repeats=3, limit=math.inf
    )
    assert [len(r["times"]) for r in rows] == [1, 0]
    assert rows[1]["skipped"] == "not called: too long" and rows[1]["temp_bytes"] > 0
    assert [key.contestant for key in gradients] == ["plain training"]


@pytest.mark.slow
def test_plot_and_texts(measured, tmp_path):
    rows, _ = measured
    report = {"machine": bench.describe_machine(), "rows": rows, "verdict": bench.verdict(rows, 36)}
    bench.figures.save(bench.draw(rows, "here"), tmp_path / "plot.png", report)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    saved = json.loads((tmp_path / "plot.json").read_text())
    assert saved["rows"] == rows and saved["verdict"] == report["verdict"]
    lines = bench.table(rows).splitlines()
    whole = [line for line in lines if "skipped" not in line]  # as one is where Equinox is not installed
    assert len(lines) == len(rows) + 1 and len({len(line) for line in whole}) == 1
    text = bench.verdict_text(report["verdict"])
    assert text.count("not measured") == len(report["verdict"]) == len(bench.AIMS) + 2


def test_verdict_compares_with_the_aims():
    def row(name, steps, seconds, temp_bytes, optimizer="momentum"):
        key = bench.Key(optimizer, name, steps)
        return bench.new_row(key) | {"seconds": seconds, "temp_bytes": temp_bytes}

    rows = [row("plain training", 1000, 1.0, 10), row("Reversible", 1000, 2.5, 1000)]
    rows += [row("Reversible", 4000, 10.0, 1750), row("sqrt-T remat", 4000, 8.0, 17500)]
    rows += [row("Reversible", 1000, 1.0, 10, "adam"), row("sqrt-T remat", 1000, 1.0, 79, "adam")]
    aims = {a["what"]: a for a in bench.verdict(rows, parameters=10)}
    assert aims["time: Reversible / plain training, momentum, T=1000"]["met"] is True
    assert aims["time: Reversible / sqrt-T remat, momentum, T=4000"] == {
        "what": "time: Reversible / sqrt-T remat, momentum, T=4000",
        "value": 1.25,
        "side": "<=",
        "limit": 1,
        "met": False,
    }
    assert aims["memory: sqrt-T remat / Reversible, momentum, T=4000"]["met"] is True
    assert aims["memory: sqrt-T remat / Reversible, adam, T=1000"]["met"] is False
    assert aims["time: Reversible / Checkpointed, momentum, T=4000"]["met"] is None
    bits = 750 * 8 / (10 * 3000)
    assert bench.bits_per_step(rows, "momentum", 10) == pytest.approx(bits)
    kept = aims["bits that Reversible keeps / bits destroyed, momentum"]
    assert kept["value"] == pytest.approx(bits / -math.log2(0.9))


def test_a_contestant_that_needs_too_much_memory_is_skipped():
    rows, gradients = bench.measure(TINY, ["adam"], ["plain training"], [STEPS], repeats=1, limit=1)
    assert rows[0]["skipped"].startswith("skipped: would need") and gradients == {}
    assert rows[0]["skipped"] in bench.table(rows)


def test_torch_contestants_are_skipped_by_name_where_missing(monkeypatch):
    monkeypatch.setattr(bench, "_installed", lambda module: module == "torch")
    assert bench.missing("TorchOpt") == "skipped: torchopt not installed"
    assert bench.missing("treeverse 8") == "skipped: equinox not installed"
    assert bench.missing("Reversible") is None


@pytest.mark.slow
@pytest.mark.quick("momentum")
@pytest.mark.optimized
@pytest.mark.parametrize("name", bench.EXACT)
def test_exactness(name):
    result = bench.check_exactness(TINY, name, STEPS)
    assert result["bit_exact"] is True and result["message"] is None
    assert result["hypergradient_norm"] > 0
    assert (result["optimizer"], result["steps"]) == (name, STEPS)


@pytest.mark.optimized
def test_exactness_is_not_claimed_where_reversal_fails(monkeypatch):
    def refused(*_, **__):
        raise bench.hg.ReversalError("not recovered")

    monkeypatch.setattr(bench.hg, "train", refused)
    result = bench.check_exactness(TINY, "momentum", STEPS)
    assert result["bit_exact"] is False and result["message"] == "not recovered"

    def other(*_, **__):
        raise jax.errors.JaxRuntimeError("out of memory")

    monkeypatch.setattr(bench.hg, "train", other)
    with pytest.raises(jax.errors.JaxRuntimeError):
        bench.check_exactness(TINY, "momentum", STEPS)


@pytest.mark.slow
def test_times_are_compared_with_plain_training_and_the_rival():
    work = times.FAST["64-30-10, batch 20"]
    everyone = times.runners("small", work, "momentum", brief=False)
    times.timed(everyone, rounds=2)
    rows = [runner.row for runner in everyone]
    times.compared(rows)
    names = [row["contestant"] for row in rows]
    assert names[:3] == [bench.PLAIN, bench.REMAT, bench.REVERSIBLE] and len(names) == len(set(names)) == 6
    assert [row["promised"] is None for row in rows] == [True, True, False, False, False, False]
    for row in rows:
        assert row["seconds"] == min(row["times"]) > 0 and len(row["times"]) == 2
        assert row["time_ratio"] == pytest.approx(row["seconds"] / rows[0]["seconds"])
    assert rows[1]["rival_ratio"] == rows[1]["compile_ratio"] == 1
    assert len(times.table(rows).splitlines()) == 7
    found = [np.asarray(runner.call(*runner.arguments)) for runner in everyone[1:]]
    for gradient in found[1:]:
        np.testing.assert_allclose(gradient, found[0], rtol=0, atol=1e-4 * np.abs(found[0]).max())
