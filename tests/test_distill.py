"""Distillation: the hypergradient behind it, what is learned, the file, and what is refused."""

import dataclasses
import json
import pickle
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import nets
from hypergrad._base.progress import Progress
from hypergrad.distillation.distilled import centred, standardised
from hypergrad.distillation.outer_loop import _look_for_chaos
from hypergrad.distillation.recipe import train_with
from hypergrad.distillation.trial import Trial, best_rate

CLASSES = 3
RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(CLASSES, 4, 4))
LABELS = np.arange(90) % CLASSES
IMAGES = (CENTRES[LABELS] + 0.7 * RNG.normal(size=(90, 4, 4))).astype(np.float32)
LOGISTIC = nets.mlp((16, CLASSES))
QUICK = {"meta_steps": 3, "progress": False, "validation": 0}


def made(recipe=None, network=LOGISTIC, **settings):
    given = hg.Recipe(steps=4) if recipe is None else recipe
    return hg.distill(network, IMAGES, LABELS, given, **{**QUICK, **settings})


@pytest.fixture(scope="module")
def learned():
    """All that can be learned, by name, at once."""
    recipe = hg.Recipe(steps=6, learning_rate=0.3, momentum=0.8, l2=1e-3)
    names = ("images", "labels", "learning_rate", "momentum", "l2")
    return made(recipe, per_class=2, learn=names, meta_steps=60, runs=2, validation=9)


def accuracy(params):
    return 1 - float(nets.error_rate(LOGISTIC[1](params, standard(IMAGES)), LABELS))


def standard(images):
    mean, std = standardised(IMAGES)
    return (images - mean) / std


def test_learning_does_what_it_says(learned):
    history = learned.history
    assert history["loss"][-5:].mean() < 0.8 * history["loss"][:5].mean()
    assert history["validation_error"][:, 0].tolist() == [0, 20, 40, 60]
    assert accuracy(learned.train(LOGISTIC, jax.random.key(99))) > 0.9
    assert learned.images.shape == (6, 4, 4)
    assert learned.recipe.learning_rate.shape == (6,)
    assert np.ptp(learned.recipe.learning_rate) > 0
    assert learned.recipe.momentum != 0.8
    assert learned.recipe.l2 != 1e-3
    np.testing.assert_allclose(learned.labels.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(learned.labels.argmax(1), np.arange(6) % CLASSES)


def test_what_is_not_learned_stays_as_it_was():
    start = RNG.normal(size=(3, 4, 4)).astype(np.float32)
    images = made(learn=("images",), start=start)
    np.testing.assert_allclose(images.recipe.rates(), 0.1, rtol=1e-6)
    np.testing.assert_array_equal(images.labels, [0, 1, 2])
    assert images.recipe.momentum == 0.9
    moved = np.abs(images.images - start).max((1, 2))
    assert np.all((moved > 0.01) & (moved < 1))  # by Adam's three steps of at most 0.02 in units of std


def test_the_images_begin_as_real_ones_of_their_classes():
    begun = made(per_class=4, meta_steps=0)
    rows = [np.flatnonzero(np.abs(IMAGES - image).max((1, 2)) < 1e-5) for image in begun.images]
    assert [len(r) for r in rows] == [1] * 12
    assert len({int(r[0]) for r in rows}) == 12
    np.testing.assert_array_equal(LABELS[np.concatenate(rows)], begun.labels)


def objective(recipe, adjoint):
    """Loss on the real data after training, as a function of images, rates and momentum, in float64."""
    inputs = jnp.asarray(standard(IMAGES), jnp.float64)

    def value(x, rates, gamma):
        ours = dataclasses.replace(recipe, learning_rate=rates, momentum=gamma)
        params = ours.train(LOGISTIC, x, jnp.arange(6) % CLASSES, jax.random.key(0), adjoint)
        return nets.cross_entropy(LOGISTIC[1](params, inputs), jnp.asarray(LABELS))

    return value


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 4, "l2": 0.01},
        {"batch_size": 4, "shuffled": True, "augmentation": hg.Augmentation(shift=1.0, degrees=10.0)},
    ],
    ids=["in turn", "shuffled and augmented"],
)
def test_every_adjoint_gives_the_hypergradient_of_the_recipe(x64, settings):
    recipe = hg.Recipe(steps=5, **settings)
    point = jnp.asarray(RNG.normal(size=(6, 4, 4))), jnp.full(5, 0.3), jnp.asarray(0.8)
    values = {
        name: jax.jit(jax.value_and_grad(objective(recipe, adjoint), argnums=(0, 1, 2)))(*point)
        for name, adjoint in {"reversible": hg.Reversible(), "stored": hg.Stored()}.items()
    }
    exact, stored = values["reversible"][1], values["stored"][1]
    for a, b in zip(exact, stored):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9 * float(jnp.abs(b).max()))
    value = jax.jit(objective(recipe, hg.Stored()))
    direction = jnp.asarray(RNG.normal(size=(6, 4, 4)))
    h = 1e-5
    up, down = (value(point[0] + s * h * direction, *point[1:]) for s in (1, -1))
    np.testing.assert_allclose(jnp.vdot(stored[0], direction), (up - down) / (2 * h), rtol=1e-6)


def test_a_window_trains_on_for_a_random_number_of_steps():
    recipe = hg.Recipe(steps=6, learning_rate=np.linspace(0.1, 0.6, 6), momentum=0.7, batch_size=2)
    x = jnp.asarray(standard(IMAGES[:5]))
    key = jax.random.key(3)

    @jax.jit
    def after(length):
        return train_with(recipe, LOGISTIC, x, jnp.asarray(LABELS[:5]), key, hg.Stored(), length)

    for length in (1, 4, 6):
        first = hg.Recipe(length, recipe.learning_rate[:length], 0.7, batch_size=2)
        expected = first.train(LOGISTIC, x, jnp.asarray(LABELS[:5]), key)
        for a, b in zip(jax.tree.leaves(after(jnp.int32(length))), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


PLAIN = {  # a network and the shape of its inputs
    "color": (nets.convnet((4, 4, 3), CLASSES, width=2, depth=1), (4, 4, 3)),
    "table": (nets.mlp((5, CLASSES)), (5,)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_the_hypergradient_is_that_of_a_plain_scan(x64, kind):
    """Color images and tables, against jax.grad through jax.lax.scan in float64."""
    (init, apply), shape = PLAIN[kind]
    x, real = (jnp.asarray(RNG.normal(size=(n, *shape))) for n in (6, 9))
    y, targets = jnp.arange(6) % CLASSES, jnp.arange(9) % CLASSES
    recipe = hg.Recipe(steps=4, learning_rate=0.5, momentum=0.7, l2=0.01, inits=1)
    start = recipe.weights(init, jax.random.key(0))

    def ours(x, rates):
        given = dataclasses.replace(recipe, learning_rate=rates)
        params = given.train((init, apply), x, y, jax.random.key(0), hg.Reversible())
        return nets.cross_entropy(apply(params, real), targets)

    def plain(x, rates):
        def inner(w):
            penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
            return optax.softmax_cross_entropy_with_integer_labels(apply(w, x), y).mean() + 0.01 * penalty

        def step(carry, rate):
            w, v = carry
            v = jax.tree.map(lambda v, g: 0.7 * v - 0.3 * g, v, jax.grad(inner)(w))
            return (jax.tree.map(lambda w, v: w + rate * v, w, v), v), None

        (w, _), _ = jax.lax.scan(step, (start, jax.tree.map(jnp.zeros_like, start)), rates)
        return optax.softmax_cross_entropy_with_integer_labels(apply(w, real), targets).mean()

    found, expected = (jax.jit(jax.grad(f, (0, 1)))(x, jnp.full(4, 0.5)) for f in (ours, plain))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.slow
def test_a_table_is_learned_from_raw_numbers(capsys):
    """Features of very different sizes, of which one is constant, through all that a set can do."""
    scales, places = np.array([1e-3, 1.0, 1e4, 1.0]), np.array([5.0, 0.0, -1e5, 3.0])
    classes = np.arange(60) % 2
    unit = RNG.normal(size=(60, 4)) + 3 * classes[:, None]
    rows = places + scales * unit * np.array([1, 1, 1, 0])
    network = nets.mlp((4, 2))
    recipe = hg.Recipe(steps=10, learning_rate=3.0)
    settings = QUICK | {"learn": ("inputs",), "meta_steps": 1, "progress": True}
    given = hg.distill(network, rows, classes, recipe, **settings)
    said = "distill: compiling a meta-step: the hypergradient through 10 steps ...\ndistill: 1/1 iterations"
    assert capsys.readouterr().err.startswith(said)
    assert given.images.shape == (2, 4)
    assert np.abs(given.inputs).max() < 5
    np.testing.assert_allclose(given.images[:, 3], 3.0, atol=0.1)
    assert given.about["learned"] == ["images"]
    params = given.train(network, jax.random.key(1))
    wrong = nets.error_rate(network[1](params, given.normalised(rows)), classes)
    assert float(wrong) < 0.1
    assert [x.shape for x in given.batches()] == [(10, 2, 4), (10, 2)]
    assert str(given).startswith("Distilled: 2 rows of a table [4] of 2 classes")


def test_a_set_prints_as_a_few_lines_and_can_be_pickled(learned):
    lines = repr(learned).splitlines()
    assert lines[0] == "Distilled: 6 images [4, 4] of 3 classes, with soft labels"
    assert lines[1].startswith("  recipe: 6 steps, learning rates ")
    assert lines[2] == "  learned: images, labels, learning_rate, momentum, l2"
    assert lines[3].startswith("  loss on real examples: ") and lines[3].endswith(" at meta-step 60")
    assert lines[4].startswith("  error on held-out examples: ")
    assert len(repr(learned)) < 1000
    again = pickle.loads(pickle.dumps(learned))
    np.testing.assert_array_equal(again.inputs, learned.inputs)
    np.testing.assert_array_equal(again.recipe.rates(), learned.recipe.rates())
    assert again.about == learned.about


@pytest.mark.slow
def test_with_a_window_it_learns_too():
    windowed = made(hg.Recipe(steps=8, learning_rate=0.3), window=3, meta_steps=60)
    assert windowed.history["loss"][-10:].mean() < 0.8 * windowed.history["loss"][:5].mean()
    assert windowed.about["window"] == 3


def test_bases_are_shared():
    shared = made(per_class=2, bases=4, meta_steps=40, recipe=hg.Recipe(steps=4, learning_rate=0.3))
    assert shared.bases.shape == (4, 4, 4)
    assert shared.coefficients.shape == (6, 4)
    combined = np.tensordot(shared.coefficients, shared.bases, 1)
    np.testing.assert_allclose(shared.inputs, combined, atol=1e-5)
    assert np.linalg.matrix_rank(combined.reshape(6, 16), tol=1e-4) == 4
    assert shared.history["loss"][-1] < shared.history["loss"][0]


@pytest.mark.parametrize("inits", [1, 2, None])
def test_initial_weights_are_drawn_as_the_recipe_says(inits):
    recipe = hg.Recipe(inits=inits, seed=7)
    init = lambda key: jax.random.normal(key, (3,))  # noqa: E731
    drawn = {tuple(np.asarray(recipe.weights(init, jax.random.key(k))).tolist()) for k in range(12)}
    assert len(drawn) == (12 if inits is None else inits)


def test_rows_go_round_in_turn_or_shuffled():
    turn = hg.Recipe(steps=4, batch_size=2).rows(jax.random.key(0), 5)
    assert turn.tolist() == [[0, 1], [2, 3], [4, 0], [1, 2]]
    shuffled = hg.Recipe(steps=4, batch_size=2, shuffled=True).rows(jax.random.key(0), 4)
    assert sorted(np.asarray(shuffled[:2]).ravel().tolist()) == [0, 1, 2, 3]


def test_a_file_has_all_that_is_needed(learned, tmp_path):
    path = tmp_path / "set.npz"
    learned.save(path)
    loaded = hg.load_distilled(path)
    np.testing.assert_array_equal(loaded.inputs, learned.inputs)
    np.testing.assert_array_equal(loaded.labels, learned.labels)
    for name in ("steps", "inits", "seed", "batch_size", "shuffled", "augmentation", "momentum", "l2"):
        assert getattr(loaded.recipe, name) == getattr(learned.recipe, name), name
    np.testing.assert_array_equal(loaded.recipe.rates(), learned.recipe.rates())
    assert loaded.about == json.loads(json.dumps(learned.about))
    again = learned.train(LOGISTIC, jax.random.key(4)), loaded.train(LOGISTIC, jax.random.key(4))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *again))
    with np.load(path) as archive:  # without this library
        assert archive["images"].shape == (6, 4, 4)
        header = json.loads(str(archive["hypergrad"]))["metadata"]
    assert header["recipe"]["steps"] == 6
    assert set(header["about"]) >= {"initial weights", "data checksum (sha256)", "versions", "key"}


def test_an_augmentation_is_kept_in_the_file(tmp_path):
    recipe = hg.Recipe(steps=3, batch_size=2, shuffled=True, augmentation=hg.Augmentation(shift=1.0))
    made = hg.Distilled(IMAGES[:3], LABELS[:3], np.zeros(()), np.ones(()), recipe)
    made.save(tmp_path / "set.npz")
    assert hg.load_distilled(tmp_path / "set.npz").recipe.augmentation == hg.Augmentation(shift=1.0)


def test_plain_optax_trains_the_same_network(learned):
    params = start = learned.recipe.weights(LOGISTIC[0], jax.random.key(5))
    optimizer = learned.optax()
    state = optimizer.init(params)
    for inputs, labels in zip(*learned.batches()):
        gradient = jax.grad(lambda w, x, y: nets.cross_entropy(LOGISTIC[1](w, x), y))(
            params, inputs, labels
        )
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    fixed = (lambda key: start, LOGISTIC[1])
    expected = learned.train(fixed, jax.random.key(5))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_network_of_equinox_works_the_same_way():
    def build(key):
        return eqx.nn.MLP(16, CLASSES, 8, 1, key=key)

    _, static = eqx.partition(build(jax.random.key(0)), eqx.is_array)

    def init(key):
        return eqx.filter(build(key), eqx.is_array)

    def apply(params, inputs):
        return jax.vmap(eqx.combine(params, static))(inputs.reshape(len(inputs), 16))

    other = made(hg.Recipe(steps=4, learning_rate=0.5), (init, apply), meta_steps=30)
    assert other.history["loss"][-1] < other.history["loss"][0]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    settings = {"validation": 9}
    whole = made(meta_steps=23, **settings)
    made(meta_steps=7, checkpoint=tmp_path / "run", **settings)
    resumed = made(meta_steps=23, checkpoint=tmp_path / "run", **settings)
    np.testing.assert_array_equal(whole.images, resumed.images)
    for name, numbers in whole.history.items():
        np.testing.assert_array_equal(numbers, resumed.history[name])


@pytest.mark.slow
def test_a_checkpoint_of_another_call_is_refused_by_what_differs(tmp_path):
    given = {"checkpoint": tmp_path / "run", "meta_steps": 1}
    made(**given)
    init, apply = LOGISTIC
    for change, message in (
        ({"recipe": hg.Recipe(steps=5)}, "recipe there: steps 4, .*; here: steps 5, "),
        ({"recipe": hg.Recipe(steps=4, learning_rate=0.2)}, "learning_rate 0.1, .*learning_rate 0.2, "),
        ({"recipe": hg.Recipe(steps=4, momentum=0.8)}, "momentum 0.9, .*momentum 0.8, "),
        ({"network": nets.mlp((16, 2, CLASSES))}, r"network there: .*\[16, 3\].*; here: .*\[16, 2\]"),
        ({"network": (init, lambda w, x: 2 * apply(w, x))}, r"objective \(digest\) there"),
        ({"optimizer": optax.adam(0.1)}, r"optimizer \(digest\) there"),
        ({"real_batch": 50}, "real_batch there: 2000; here: 50"),
    ):
        with pytest.raises(ValueError, match=r"checkpoint=.*it holds another run \(.*" + message):
            made(**{**given, **change})
    with pytest.raises(ValueError, match=r"it holds another run \(real data"):
        hg.distill(LOGISTIC, IMAGES + 1, LABELS, hg.Recipe(steps=4), **{**QUICK, **given})


@pytest.mark.quick("3")
@pytest.mark.parametrize("steps", [3, 40])
def test_a_recipe_that_cannot_be_reversed_is_an_error(steps):
    with pytest.raises(hg.ReversalError, match=r"a factor of 'velocity' of params left"):
        made(hg.Recipe(steps=steps, momentum=0.0))


def test_divergence_gives_the_last_good_set():
    with pytest.warns(hg.meta.HypergradientExplosion):
        found = made(optimizer=optax.sgd(1e12), meta_steps=20)
    assert np.isfinite(found.images).all()
    assert "stopped at" in found.about["stopped"]


def trial(shown=True):
    x, y = jnp.asarray(standard(IMAGES), jnp.float32), jnp.asarray(LABELS)
    return Trial(LOGISTIC, x[:6], LABELS[:6], (x, y), jax.random.key(0), Progress("distill", shown))


def test_a_recipe_is_found_and_said(capsys):
    found = trial().fitting(None)
    assert found.steps == 20
    said = capsys.readouterr().err
    assert f"distill: chose 20 steps, learning rate {found.learning_rate:g}, momentum 0.9" in said
    assert "hardly learns" not in said
    params = found.train(LOGISTIC, trial().inputs, jnp.asarray(LABELS[:6]), jax.random.key(0))
    assert accuracy(params) > 0.8
    public = hg.recipe_for(LOGISTIC, IMAGES, LABELS, per_class=2, progress=False)
    assert (public.steps, capsys.readouterr().err) == (20, "")
    assert 0.01 < public.learning_rate < 30


@pytest.mark.parametrize(
    ("rate", "words"),
    [(1e-4, "hardly learns, .*raise learning_rate or steps"), (1e4, "explodes, .*lower learning_rate")],
)
def test_a_recipe_that_does_not_fit_is_named(capsys, rate, words):
    recipe = hg.Recipe(steps=5, learning_rate=rate)
    assert trial().fitting(recipe) is recipe
    assert re.search(rf"distill: the inner training {words}", capsys.readouterr().err)


def test_of_rates_the_lowest_that_is_nearly_best_is_taken():
    assert best_rate(np.array([2.0, 1.9, 1.04, 1.0, np.inf])) == 2
    assert best_rate(np.array([2.0, 2.5, 2.1, np.nan])) == 2
    assert best_rate(np.array([2.0, np.nan, np.inf])) == 0


def test_a_network_that_explodes_at_all_rates_is_refused():
    broken = (LOGISTIC[0], lambda w, x: jnp.nan * LOGISTIC[1](w, x))
    with pytest.raises(
        ValueError, match=r"distill\(network.*at all learning rates from 0.01 to 30 training"
    ):
        trial(shown=False)._replace(network=broken).fitting(None)


def test_chaos_is_announced():
    def growing(x, key, length):  # as the logistic map's, its derivative doubles at every step
        return jnp.sum(x) * 2.0**length

    with pytest.warns(
        hg.ChaosWarning, match="norm 181 after 7 steps and 2.32e\\+04 after 14: training is chaotic"
    ):
        _look_for_chaos("distill()", growing, jnp.ones(2), jax.random.key(0), 14)
    _look_for_chaos(
        "distill()", lambda x, key, length: jnp.sum(x) * length, jnp.ones(2), jax.random.key(0), 14
    )


def test_what_diverges_is_not_called_chaotic():
    def diverging(x, key, length):  # the test for chaos leaves it to `optimize`, which names it
        return jnp.where(length > 7, jnp.nan, jnp.sum(x))

    _look_for_chaos("distill()", diverging, jnp.ones(2), jax.random.key(0), 14)
    broken = lambda x, key, length: jnp.sum(x) * jnp.nan  # noqa: E731
    _look_for_chaos("distill()", broken, jnp.ones(2), jax.random.key(0), 14)


def test_normalisations():
    images = RNG.uniform(size=(5, 4, 4, 2)).astype(np.float32)
    mean, std = standardised(images)
    np.testing.assert_allclose(((images - mean) / std).std((0, 1, 2)), 1, rtol=1e-5)
    mean, std = centred(images)
    assert mean.shape == (4, 4, 2)
    assert std == 1
    table = RNG.normal(size=(2000, 3)) * np.array([1e-3, 1.0, 1e4]) + 7
    mean, std = standardised(table)
    np.testing.assert_allclose([mean, std], [table.mean(0), table.std(0)], rtol=1e-12)
    rare = np.stack([np.arange(2000) == 5, np.full(2000, 0.1)], axis=1)  # once; never
    mean, std = standardised(rare.astype(np.float32))
    np.testing.assert_allclose(std, [1 / 20, 1], rtol=1e-6)
    assert standardised(np.full((5, 4, 4), 0.1, np.float32))[1] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"Recipe\(steps=0\)"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"inits": 1.5}, r"inits=1.5"),
        ({"seed": 1.5}, r"seed=1.5\): it must be a whole number"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0\): it must be above 0"),
        ({"learning_rate": np.ones(3)}, r"learning_rate=...\) of shape \(3,\): .*\(20,\)"),
        ({"momentum": 1.0}, r"momentum=1.0\): it must be in \[0, 1\)"),
        ({"l2": -1.0}, r"l2=-1.0\): it must be 0 or more"),
    ],
)
def test_bad_recipes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hg.Recipe(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learn": ()}, "learn must hold one or more of"),
        ({"learn": ("pixels",)}, "learn must hold one or more of"),
        ({"learn": ("images", "l2")}, "cannot begin at 0"),
        ({"per_class": 0}, "per_class=0 must be a whole number"),
        ({"window": 9}, "window=9 is longer than the 4 steps"),
        ({"bases": 2, "learn": ("learning_rate",)}, "bases=2 are learned for the images"),
        ({"start": np.zeros((2, 4, 4))}, r"start has shape \(2, 4, 4\)"),
        ({"validation": 80}, "validation=80 of 90"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


def test_a_network_with_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"gives logits \(1, 4\), and the labels have 3 classes"):
        made(network=nets.mlp((16, 4)))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, LABELS[:5], "one integer label for each"),
        ((255 * IMAGES).astype(np.uint8), LABELS, "images of uint8"),
        (np.where(IMAGES[0, 0, 0] == IMAGES, np.nan, IMAGES), LABELS, "not finite"),
        (IMAGES, 2 * LABELS, r"missing: \[1, 3\]"),
        (np.ones((90, 16), int), LABELS, r"inputs of int64.*such as inputs.astype"),
        (IMAGES[:0], LABELS[:0], "one integer label for each"),
    ],
    ids=["labels", "bytes", "NaN", "gaps", "whole numbers", "nothing"],
)
def test_bad_data_is_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        hg.distill(LOGISTIC, images, labels, **QUICK)


def test_a_table_is_not_augmented():
    recipe = hg.Recipe(steps=2, augmentation=hg.Augmentation(shift=1.0))
    rows = IMAGES.reshape(90, 16)
    with pytest.raises(ValueError, match=r"turns and shifts pictures, and the inputs are \[90, 16\]"):
        hg.distill(LOGISTIC, rows, LABELS, recipe, **QUICK)


def test_other_files_are_refused(tmp_path, learned):
    path = tmp_path / "other.npz"
    hg.files.save(path, {"images": np.ones(2)})
    with pytest.raises(ValueError, match="is no distilled set"):
        hg.load_distilled(path)
    hg.files.save(path, {"images": np.ones(2)}, distilled=99)
    with pytest.raises(ValueError, match=r"has format 99, .* format 1"):
        hg.load_distilled(path)
    hg.files.save(path, {"images": np.ones(2)}, distilled=1, recipe={"augmentation": None})
    with pytest.raises(ValueError, match="the file is damaged"):
        hg.load_distilled(path)
    hg.files.save(path, [np.ones(2)], distilled=1, recipe={"augmentation": None})
    with pytest.raises(ValueError, match="the file is damaged"):
        hg.load_distilled(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a whole file"):
        hg.load_distilled(path)


WHOLE = {
    "images": IMAGES[:3],
    "labels": np.arange(3),
    "mean": np.zeros(()),
    "std": np.ones(()),
    "bases": None,
    "coefficients": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES[:2], "labels": np.arange(5)}, "one integer from 0 on, or a row"),
        ({"labels": np.array([0, 1, -1])}, "one integer from 0 on, or a row"),
        ({"labels": np.ones(3)}, "one integer from 0 on, or a row"),
        ({"labels": np.ones((3, 3), int)}, "one integer from 0 on, or a row"),
        ({"images": np.zeros((0, 4, 4)), "labels": np.zeros(0, int)}, r"images must be \(n, ...\)"),
        ({"images": np.ones(3)}, r"images must be \(n, ...\)"),
        ({"images": np.ones((3, 4, 4), np.uint8)}, "images must be floats"),
        ({"images": IMAGES[:3] * np.nan}, "must be finite"),
        ({"mean": np.zeros(5)}, "mean and std must broadcast against an image"),
        ({"std": np.ones((3, 4, 4))}, "mean and std must broadcast against an image"),
        ({"std": np.zeros(())}, "std must not be 0"),
        ({"bases": np.ones((2, 4, 4))}, r"bases \(k, ...\) and coefficients \(n, k\) come together"),
        ({"bases": np.ones((2, 4, 4)), "coefficients": np.ones((3, 3))}, "come together"),
    ],
)
def test_sets_that_do_not_fit_together_are_neither_read_nor_written(tmp_path, change, message):
    path = tmp_path / "set.npz"
    given = {name: x for name, x in (WHOLE | change).items() if x is not None}
    numbers = {"learning_rate": np.float32(0.1), "momentum": np.float32(0.9), "l2": np.float32(0.0)}
    settings = {"steps": 3, "augmentation": None}
    hg.files.save(path, given | numbers, distilled=1, recipe=settings, about={})
    with pytest.raises(ValueError, match=r"load_distilled\('.*set.npz'\): .*" + message):
        hg.load_distilled(path)
    with pytest.raises(ValueError, match=r"Distilled.save\('.*new.npz'\): .*" + message):
        hg.Distilled(**(WHOLE | change), recipe=hg.Recipe(steps=3)).save(tmp_path / "new.npz")


@pytest.mark.parametrize(
    "metadata",
    [{"recipe": [3], "about": {}}, {"recipe": {"augmentation": None, "steps": "3"}, "about": {}}, {}],
)
def test_damaged_metadata_is_refused(tmp_path, metadata):
    path = tmp_path / "set.npz"
    numbers = {"learning_rate": np.float32(0.1), "momentum": np.float32(0.9), "l2": np.float32(0.0)}
    given = {name: x for name, x in WHOLE.items() if x is not None}
    hg.files.save(path, given | numbers, distilled=1, **metadata)
    with pytest.raises(ValueError, match=r"load_distilled\('.*set.npz'\): the file is damaged"):
        hg.load_distilled(path)
