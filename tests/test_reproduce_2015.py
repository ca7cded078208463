"""The 2015 authors' numbers; those tests need HYPERGRAD_REFERENCE and, some, HYPERGRAD_DATA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from experiments.reproduce_2015 import __main__ as reproduce
from experiments.reproduce_2015 import authors, distill
from experiments.reproduce_2015.compare import FLOOR, compare, rounding
from experiments.reproduce_2015.schedules import roughness
from hypergrad import files

FIGURE1 = "figure1_toy_2d"
LEARNED = [
    "distill_logistic_30_images",
    "per_weight_L2_logistic",
    "L2_granularity_logistic",
    "optimize_all_sign_steps",
]
needs_reference = pytest.mark.skipif(
    not os.environ.get("HYPERGRAD_REFERENCE"), reason="HYPERGRAD_REFERENCE is not set"
)
needs_data = pytest.mark.skipif(not os.environ.get("HYPERGRAD_DATA"), reason="HYPERGRAD_DATA is not set")


def test_authors_numerator():
    n = authors.authors_numerator(np.array([0.9, 0.5, 1 - 1e-9]))
    assert n.dtype == jnp.uint64
    # floor(65536 * 0.9) is 58982: the reference's own example.
    assert n.tolist() == [58983 * 65536, 32769 * 65536, 2**32]


def test_optimizer_rounds_like_the_authors_and_differentiates_the_exact_factor(x64):
    def end(momentum, adjoint):
        hypers = {"learning_rate": 0.1, "momentum": momentum}

        def loss(w, meta, step):
            return jnp.sum(w**2)

        optimizer = authors.maclaurin_2015()
        trained = hg.train(loss, jnp.ones(1), hypers, steps=2, optimizer=optimizer, adjoint=adjoint)
        return trained.params[0]

    momentum, ratio = 0.9, 58983 / 65536
    # By hand: v1 = -(1 - β) 2;  w1 = 1 + v1 / 10;  v2 = r v1 - (1 - β) 2 w1;  w2 = w1 + v2 / 10.
    v1 = -2 * (1 - momentum)
    w1 = 1 + 0.1 * v1
    v2 = ratio * v1 - (1 - momentum) * 2 * w1
    # Derivatives in β, of the formula with β and not r: v1' = 2, v2' = v1 + β v1' + 2 w1 - (1 - β) 2 w1'.
    v2_slope = v1 + momentum * 2 + 2 * w1 - (1 - momentum) * 2 * 0.2
    for adjoint in (hg.Reversible(), hg.Stored()):
        value, slope = jax.value_and_grad(end)(momentum, adjoint)
        assert float(value) == pytest.approx(w1 + 0.1 * v2, abs=1e-13)
        assert float(slope) == pytest.approx(0.2 + 0.1 * v2_slope, abs=1e-13)


def test_rounding_is_half_a_unit_in_the_sixth_digit():
    numbers = np.array([[1.23456, 999.999], [0.001, -4.5e-7], [0.0, 100000.0]])
    expected = [[5e-6, 5e-4], [5e-9, 5e-13], [0.0, 0.5]]
    np.testing.assert_allclose(rounding(numbers), expected, rtol=1e-12)


def test_compare_grants_rounding_and_nothing_else():
    exact = np.array([1.2345649, -0.012345651, 0.0])
    saved = np.array([float(f"{x:.5e}") for x in exact])
    row = compare("array", exact, saved)
    assert row.agrees is True and row.beyond == 0 and row.agreeing == 1
    assert not compare("array", exact * (1 + 1e-5), saved).agrees
    assert not compare("array", np.array([1.2345649, np.nan, 0.0]), saved).agrees
    # Measured each by itself, small numbers are held to their own digits.
    off = saved[:2] + np.array([0.0, 5e-8 + 0.5 * FLOOR])
    assert compare("array", off, saved[:2]).agrees
    assert not compare("array", off, saved[:2], apart=True).agrees


def test_compare_takes_the_beginning_of_a_shorter_run():
    row = compare("array", np.array([1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert row.numbers == 2 and row.agrees
    theirs = np.arange(12.0).reshape(3, 4)
    row = compare("array", theirs[:, :2], theirs)
    assert row.numbers == 6 and row.agrees


def test_compare_grants_what_is_asked():
    ours, theirs = np.array([2.00008, -1.0]), np.array([2.0, -1.0])
    assert compare("array", ours, theirs, granted=1e-4).agrees
    assert not compare("array", ours, theirs, granted=np.array([1e-5, 1.0])).agrees


def test_distillation_is_compared_to_six_digits_before_its_transient():
    theirs = {
        "valid_loss": np.linspace(96.0, 44.0, 100).round(4),
        "test_err": np.linspace(0.9, 0.6, 100).round(4),
    }

    def wrong(name, iteration, by):
        ours = {key: x.copy() for key, x in theirs.items()}
        ours[name][iteration] += by
        return [row.array for row in distill.compare_regions(ours, theirs) if not row.agrees]

    assert wrong("valid_loss", 11, 1.4e-4) == ["valid_loss, meta-iterations 1 to 12"]
    assert wrong("valid_loss", 12, 1.4e-4) == []
    assert wrong("valid_loss", 99, 2e-4) == ["valid_loss, meta-iterations 30 to 100"]
    assert wrong("test_err", 28, 4e-4) == []
    assert wrong("test_err", 29, 4e-4) == ["test_err, meta-iterations 30 to 100"]


def test_penalty_has_no_half_and_counts_biases(x64):
    params = authors.layers(jnp.arange(1.0, 7.0), (2, 2))
    examples = jnp.ones((3, 2)), jnp.array([0, 1, 1])
    plain = authors.classifier((2, 2))(params, examples)
    loss = authors.penalised((2, 2))
    assert float(loss(params, (examples, 0.5)) - plain) == pytest.approx(0.5 * 91)
    by_leaf = authors.by_leaf([2.0, 0.0], params)  # Σ w² is 30 for the weights, 61 for the biases
    assert float(loss(params, (examples, by_leaf)) - plain) == pytest.approx(2 * 30)


def test_roughness_of_a_line_an_alternation_and_noise():
    steps = np.arange(1000.0)[:, None]
    assert roughness(3 - 2 * steps) == pytest.approx(0, abs=1e-12)
    assert roughness((-1) ** steps) == pytest.approx((16 / 6) ** 0.5)
    noise = np.random.default_rng(0).normal(size=(1000, 4))
    assert roughness(noise) == pytest.approx(1, rel=0.05)


def test_curve_has_the_loss_before_every_step_and_at_the_end(x64):
    rows = np.zeros((3, 1), int)
    params, curve = authors.curve(lambda w, c, rows=0: c * jnp.sum(w**2), jnp.ones(2), 0.5, rows)
    # By hand, with α = 1: v1 = -0.1, w1 = 0.9, v2 = r v1 - 0.1 w1, and so on.
    w, v, expected = 1.0, 0.0, [1.0]
    for _ in rows:
        v = v * 58983 / 65536 - (1 - 0.9) * w
        w = w + v
        expected.append(w**2)
    np.testing.assert_allclose(curve, expected, rtol=1e-12)
    np.testing.assert_allclose(params, w, rtol=1e-12)


def test_without_the_reference_status_two_and_the_variable(monkeypatch, capsys):
    monkeypatch.delenv("HYPERGRAD_REFERENCE", raising=False)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--fast"])
    assert stop.value.code == 2
    assert "HYPERGRAD_REFERENCE" in capsys.readouterr().err


def test_reference_folder_without_the_files(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--only", FIGURE1, "--reference", str(tmp_path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert FIGURE1 in message and "HYPERGRAD_REFERENCE" in message


@needs_reference
def test_figure1_agrees_through_the_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    results = reproduce.main(["--only", FIGURE1, "--output", str(tmp_path)])
    params = results[FIGURE1].ours["params"]
    assert params.shape == (3, 50, 2)
    assert "NO" not in capsys.readouterr().out
    rows = json.loads((tmp_path / f"{FIGURE1}.json").read_text())["comparisons"]
    assert set(rows) == {"train_loss", "learning_curves", "params", "log_alphas", "invlogit_betas"}
    assert all(row["agrees"] for row in rows.values())
    np.testing.assert_array_equal(files.load(tmp_path / f"{FIGURE1}.npz")[0]["params"], params)
    assert (tmp_path / f"{FIGURE1}.png").stat().st_size > 10_000


@needs_reference
def test_plain_momentum_disagrees_and_the_status_says_so(monkeypatch, capsys):
    monkeypatch.setattr(authors, "maclaurin_2015", hg.momentum)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--fast", "--only", FIGURE1])
    assert stop.value.code == 1
    assert f"{FIGURE1}/train_loss" in capsys.readouterr().out


@needs_reference
def test_fast_without_data_names_what_it_skips(monkeypatch, capsys):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    assert list(reproduce.main(["--fast"])) == [FIGURE1]
    printed = capsys.readouterr().out
    assert all(f"skipped {name}" in printed for name in reproduce.EXPERIMENTS if name != FIGURE1)


@needs_reference
def test_without_data_status_two_and_the_variable(monkeypatch, capsys):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--only", "init_distribution_1"])
    assert stop.value.code == 2
    assert "HYPERGRAD_DATA" in capsys.readouterr().err


@pytest.fixture(scope="module")
def digits():
    return authors.read_digits(None)


def disagreeing(name, digits, fast):
    theirs = reproduce.read_reference(Path(os.environ["HYPERGRAD_REFERENCE"]), name)
    result = reproduce.run(name, authors.Setting(fast, False, *digits), theirs)
    assert fast or {row.array.split(", ")[0] for row in result.comparisons} == set(theirs)
    return [row for row in result.comparisons if not row.agrees]


@pytest.mark.slow
@pytest.mark.quick("per_weight_L2_logistic")
@needs_reference
@needs_data
@pytest.mark.parametrize("name", LEARNED)
def test_first_meta_iterations_agree_through_the_engine(name, digits):
    assert disagreeing(name, digits, fast=True) == []


@pytest.mark.slow
@needs_reference
@needs_data
@pytest.mark.parametrize("name", LEARNED)
def test_all_meta_iterations_agree_through_the_engine(name, digits):
    assert disagreeing(name, digits, fast=False) == []


@pytest.mark.slow
@needs_reference
@needs_data
def test_fast_pass_agrees(tmp_path):
    command = [sys.executable, "-m", "experiments.reproduce_2015", "--fast", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.png"))) == len(reproduce.EXPERIMENTS)
