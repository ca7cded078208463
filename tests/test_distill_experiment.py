"""The experiment on distillation, at the size of its fast pass."""

import dataclasses

import numpy as np
import pytest

import hypergrad as hg
from experiments import distill as experiment
from hypergrad import data
from hypergrad.distillation.baselines import class_means


@pytest.fixture(scope="module")
def digits():
    return data.digits()


@pytest.mark.slow
def test_figures_and_files_are_written(tmp_path, digits):
    small = experiment.Config(model="logistic", meta_steps=3, seeds=1, steps=3, inits=1)
    outcome = experiment.main(small, output=str(tmp_path), full=False)
    assert {p.name for p in tmp_path.iterdir()} == {
        f"distill_digits_logistic_10.{kind}" for kind in ("png", "json", "npz")
    }
    saved = hg.load_distilled(tmp_path / "distill_digits_logistic_10.npz")
    np.testing.assert_array_equal(saved.images, outcome["distilled"].images)
    assert len(saved.about["metrics"]) == len(outcome["table"].scores)


def test_class_means_are_in_the_order_of_the_classes(digits):
    means = class_means(digits.train_images, digits.train_labels, digits.classes)
    assert means.shape == (10, 8, 8)
    np.testing.assert_allclose(means[3], digits.train_images[digits.train_labels == 3].mean(0), rtol=1e-6)


def test_every_model_takes_the_images(digits):
    import jax

    for model in ("logistic", "mlp", "convnet"):
        init, apply = experiment.network(model, (8, 8), 10)
        logits = jax.eval_shape(
            lambda x, i=init, a=apply: a(i(jax.random.key(0)), x), digits.train_images[:2]
        )
        assert logits.shape == (2, 10)


def test_the_gates_are_the_published_ones():
    assert {g.config.inits for g in experiment.GATES.values()} == {1, None}
    assert all(dataclasses.asdict(g.config)["seeds"] == 20 for g in experiment.GATES.values())
    assert [g.accuracy for g in experiment.GATES.values()] == [0.923, 0.84, 0.94, 0.85, 0.87]


@pytest.mark.parametrize("word", ["warm", "-1"])
def test_other_inits_are_refused(word, capsys):
    with pytest.raises(SystemExit):
        experiment.command([f"--init={word}"])
    assert "pass random, fixed, or a number" in capsys.readouterr().err
