"""Evaluation of distilled sets: what is trained on what, and the table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import nets
from hypergrad.distillation.baselines import rows_like
from hypergrad.distillation.evaluation import Score, condensation_recipe, full_recipe, plain_recipe
from hypergrad.distillation.ranking import Ranking

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(3, 4, 4))


def sample(n):
    labels = np.arange(n) % 3
    return (CENTRES[labels] + 0.5 * RNG.normal(size=(n, 4, 4))).astype(np.float32), labels


TRAIN, TEST = sample(60), sample(30)
NETWORK = nets.mlp((16, 3))
RECIPE = hg.Recipe(steps=10, learning_rate=1.0, inits=1)
# A set that is as good as can be, and one that teaches every class as another.
GOOD = hg.Distilled(CENTRES.astype(np.float32), np.arange(3), np.float32(0), np.float32(1), RECIPE)
WRONG = dataclasses.replace(GOOD, labels=np.array([1, 2, 0]))


@pytest.fixture(scope="module")
def table():
    short = {"short": hg.Recipe(steps=3, learning_rate=0.5)}
    return hg.evaluate(
        [GOOD, WRONG],
        {"logistic": NETWORK},
        TRAIN,
        TEST,
        seeds=2,
        recipes=short,
        full_epochs=20,
        full_seeds=1,
        progress=False,
    )


@pytest.mark.slow
def test_every_set_is_trained_on_by_every_recipe(table):
    rows = [(s.examples, s.recipe.split()[0], s.inits, len(s.accuracies)) for s in table.scores]
    sets = ["distilled", "random real", "class means"]
    plans = [("own", "fixed"), ("own", "random"), ("short", "random")]
    assert rows == [*((s, *p, 4) for p in plans for s in sets), ("full data", "SGD", "random", 1)]


def test_accuracies_are_those_of_the_networks_trained(table):
    pooled = table.score("distilled", "own", inits="fixed").accuracies
    np.testing.assert_array_equal(pooled[:2], 1.0)
    np.testing.assert_array_equal(pooled[2:], 0.0)
    expected = GOOD.train(NETWORK, jax.random.key(0))  # the same for every key
    wrong = nets.error_rate(NETWORK[1](expected, jnp.asarray(TEST[0])), TEST[1])
    assert float(wrong) == 0
    assert table.score("class means", "own").mean > 0.9
    assert table.score("full data", table.scores[-1].recipe).mean > 0.9


def test_the_table_and_the_file_have_it_all(table, tmp_path):
    lines = str(table).splitlines()
    assert len(lines) == 1 + len(table.scores) + 1
    assert lines[-1] == str(table.rankings[0])
    assert lines[1].split() == ["logistic", "distilled", "own", "fixed", "50.00", "±", "50.00", "(4)"]
    table.noted(GOOD).save(tmp_path / "set.npz")
    about = hg.load_distilled(tmp_path / "set.npz").about
    assert about["metrics"][0]["accuracies"] == [1, 1, 0, 0]
    assert about["rankings"][0]["score"] == table.rankings[0].score
    with pytest.raises(KeyError, match="no score of any network on noise by own"):
        table.score("noise", "own")


def test_the_ranking_in_closed_form():
    """``(e^α - e^-1) / (e - e^-1)`` at its ends, in the middle, and as DD-Ranking computes it."""
    assert Ranking("n", recovery=-1.0, improvement=1.0).score == pytest.approx(1)
    assert Ranking("n", recovery=1.0, improvement=-1.0).score == pytest.approx(0, abs=1e-12)
    assert Ranking("n", recovery=0.2, improvement=0.2).score == pytest.approx(1 / (np.e + 1))
    found = Ranking("n", recovery=0.109, improvement=0.470)
    assert found.alpha == pytest.approx(0.5 * 0.470 - 0.5 * 0.109)
    expected = (np.exp(found.alpha) - np.exp(-1)) / (np.exp(1) - np.exp(-1))
    assert found.score == pytest.approx(expected)


def scored(*rows):
    return hg.Evaluation([Score("net", *row[:3], np.array(row[3])) for row in rows])


def test_the_ranking_takes_the_right_rows():
    rows = [
        ("distilled", "own", "fixed", [0.9]),
        ("random real", "own", "fixed", [0.3, 0.5]),
        ("distilled", "own", "random", [0.6]),
        ("random real", "own", "random", [0.1]),
        ("full data", "SGD at 1", "random", [1.0]),
    ]
    assert not scored(*rows[:-1]).rankings
    (own,) = scored(*rows).rankings
    assert own[1:] == (pytest.approx(0.4), pytest.approx(0.5), "own", "fixed", "own")
    rows[4:4] = [("distilled", "plain SGD", "random", [0.8]), ("distilled", "other", "random", [0.95])]
    (plain,) = scored(*rows).rankings
    assert (plain.recovery, plain.hard_recipe) == (pytest.approx(0.2), "plain SGD")
    rows[5:5] = [("hard labels", "plain SGD", "random", [0.7])]
    assert scored(*rows).rankings[0].recovery == pytest.approx(0.3)


@pytest.mark.slow
def test_soft_labels_are_made_hard_once():
    soft = np.full((3, 3), 0.3, np.float32) + 0.1 * np.eye(3, dtype=np.float32)
    made = dataclasses.replace(GOOD, labels=soft, recipe=hg.Recipe(steps=10, learning_rate=1.0))
    data = {"networks": {"net": NETWORK}, "train": TRAIN, "test": TEST, "progress": False}
    table = hg.evaluate(made, **data, seeds=1, recipes={}, full_epochs=20, full_seeds=1)
    assert [s.examples for s in table.scores].count("hard labels") == 1
    hard = dataclasses.replace(made, labels=np.arange(3))
    expected = hg.evaluate(hard, **data, seeds=1, recipes={}, full_epochs=20, full_seeds=1)
    found = table.score("hard labels", "own").accuracies
    np.testing.assert_array_equal(found, expected.score("distilled", "own").accuracies)
    assert table.rankings[0].recovery == expected.rankings[0].recovery


def test_mean_and_deviation_of_a_score():
    score = Score("n", "distilled", "own", "random", np.array([0.5, 0.7]))
    assert score.mean == pytest.approx(0.6)
    assert score.std == pytest.approx(0.1)


def test_random_real_examples_have_the_classes_and_do_not_repeat():
    labels = np.arange(30) % 3
    rows = rows_like(labels, TRAIN[1], jax.random.key(0))
    np.testing.assert_array_equal(TRAIN[1][rows], labels)
    assert len(set(rows.tolist())) == 30
    assert not np.array_equal(rows, rows_like(labels, TRAIN[1], jax.random.key(1)))


def test_the_protocols_are_the_published_ones():
    ten = condensation_recipe(10)
    assert (ten.steps, ten.batch_size, ten.momentum, ten.l2) == (300, 10, 0.9, 2.5e-4)
    np.testing.assert_allclose(0.1 * ten.rates()[np.array([0, 149, 150, 299])], [0.01, 0.01, 0.001, 0.001])
    many = condensation_recipe(600)
    assert (many.steps, many.batch_size, many.shuffled) == (600, 256, True)
    assert (plain_recipe(10).steps, plain_recipe(10).l2) == (300, 0)
    assert full_recipe(455, None, 0.5).steps == 300
    assert full_recipe(60_000, None, 0.5).steps == 5 * (60_000 // 256)
    full = full_recipe(1000, 2, 0.5)
    assert (full.steps, full.batch_size, float(full.rates()[0])) == (6, 256, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distilled": []}, r"with sets of \[\]"),
        ({"distilled": [GOOD, dataclasses.replace(GOOD, images=GOOD.images[:2])]}, "pooled over sets"),
        ({"networks": {}}, "pass one or more"),
        ({"seeds": 0}, r"seeds=0\)"),
        ({"train": (TRAIN[0][:, :2], TRAIN[1])}, r"evaluate\(train=...\) with images \(60, 2, 4\)"),
        ({"test": (TEST[0], TEST[1][:3])}, r"evaluate\(test=...\) .* 3 labels"),
        (
            {"train": (TRAIN[0].astype(np.uint8), TRAIN[1])},
            r"images of uint8: the set was made from floats",
        ),
    ],
    ids=["none", "sizes", "networks", "seeds", "train", "test", "bytes"],
)
def test_what_does_not_fit_is_refused(arguments, message):
    given = {"distilled": GOOD, "networks": {"net": NETWORK}, "train": TRAIN, "test": TEST} | arguments
    with pytest.raises(ValueError, match=message):
        hg.evaluate(**given)


def test_all_of_a_small_table_of_raw_numbers_is_learned():
    """Features of very different sizes, in order of the classes, whose last tenth holds one class only."""
    labels = np.repeat([0, 1], 40)
    rows = (RNG.normal(size=(80, 3)) + 2.5 * labels[:, None]) * np.array([1e-3, 1.0, 1e4]) + 50
    network = nets.mlp((3, 2))
    made = hg.Distilled(rows[[0, 40]], np.arange(2), rows.mean(0), rows.std(0), RECIPE)
    table = hg.evaluate(
        made,
        {"net": network},
        (rows, labels),
        (rows, labels),
        seeds=1,
        recipes={},
        full_seeds=1,
        progress=False,
    )
    assert table.scores[-1].examples == "full data"
    assert table.scores[-1].mean > 0.95


def test_tables_are_not_augmented():
    made = hg.Distilled(TRAIN[0][:3].reshape(3, 16), np.arange(3), np.float32(0), np.float32(1), RECIPE)
    rows = TRAIN[0].reshape(60, 16), TRAIN[1]
    turned = {"turned": hg.Recipe(augmentation=hg.Augmentation(degrees=5.0))}
    with pytest.raises(ValueError, match=r"turns and shifts pictures, and the inputs are \[3, 16\]"):
        hg.evaluate(made, {"net": NETWORK}, rows, rows, recipes=turned)
