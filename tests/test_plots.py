"""Pictures: what is drawn where, and what is refused."""

import importlib
import pickle

import numpy as np
import pytest

import hypergrad as hg
from hypergrad.meta import History, MetaStep, Optimized, Tuned

RNG = np.random.default_rng(0)


def distilled(shape, labels):
    return hg.Distilled(RNG.uniform(size=shape), labels, np.zeros(()), np.ones(()), hg.Recipe())


def drawn(figure):
    return [axes.get_images()[0].get_array() for axes in figure.axes if axes.get_images()]


def test_color_images_are_drawn_in_color():
    made = distilled((4, 5, 6, 3), np.array([0, 1, 0, 1]))
    figure = hg.plots.images(made, names=["ship", "car"], limits=(0.0, 1.0))
    assert [axes.get_title() for axes in figure.axes] == ["ship", "car", "ship", "car"]
    for found, image in zip(drawn(figure), made.images):
        np.testing.assert_allclose(found, image)


@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 5, 6, 1)])
def test_gray_images_have_a_scale(shape):
    made = distilled(shape, np.eye(3)[[2, 0, 1]])  # soft labels
    figure = hg.plots.images(made, columns=2)
    assert [axes.get_title() for axes in figure.axes] == [
        "2",
        "0",
        "1",
        "",
        "",
    ]  # a grid of 4, and the scale
    for found, image in zip(drawn(figure), made.images):
        np.testing.assert_array_equal(found, image.reshape(5, 6))
    assert figure.axes[0].get_images()[0].get_clim() == tuple(np.percentile(made.images, (1, 99)))


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 5), {}, r"holds \[2, 5\], which are no gray or color images"),
        ((2, 5, 5, 4), {}, r"holds \[2, 5, 5, 4\]"),
        ((2, 5, 5), {"columns": 0}, "columns=0, .*whole number"),
        ((2, 5, 5), {"names": ["a"]}, "there are 1 names and 2 classes"),
        ((2, 5, 5), {"limits": (1.0, 0.0)}, "two numbers, the lower first"),
    ],
)
def test_what_cannot_be_drawn_is_refused(shape, settings, message):
    with pytest.raises(ValueError, match=r"plots.images\(made, .*" + message):
        hg.plots.images(distilled(shape, np.arange(2)), **settings)


def curves(axes):
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axes.get_lines()}


def tuned(hypers, start, steps=4, losses=(3.0, 1.0, 2.0), scores=None, trials=()):
    n = len(losses)
    history = History(np.asarray(losses), np.ones(n), None, np.zeros((n, 1), bool))
    scores = dict(enumerate(losses)) if scores is None else scores
    return Tuned(hypers, hg.adam(), history, "", steps, start, scores, np.asarray(trials), {}, "")


def test_what_has_changed_is_drawn_from_its_start():
    rates = {"first": np.array([4.0, 3.0, 2.0, 1.0]), "last": np.float32(0.5)}
    start = {"learning_rate": {"first": 1.0, "last": 1.0}, "b1": 0.9}
    figure = hg.plots.schedules(tuned({"learning_rate": rates, "b1": 0.9}, start))
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "learning rate")
    found = curves(axes)
    assert list(found) == ["start", "first", "last"]
    np.testing.assert_array_equal(found["start"], np.ones(4))  # one, as both begin there
    np.testing.assert_array_equal(found["first"], rates["first"])
    np.testing.assert_array_equal(found["last"], np.full(4, 0.5))
    assert axes.get_legend() is not None
    assert len({line.get_linestyle() for line in axes.get_lines()[1:]}) == 2  # readable in gray


def test_schedules_are_drawn_by_their_values_and_weights_as_a_band():
    warmup = hg.schedules.WarmupCosine(0.0, 1.0, warmup_steps=2.0, decay_steps=4.0)
    decay = np.arange(8.0).reshape(4, 2)
    names = ["learning_rate", "weight_decay"]
    figure = hg.plots.schedules({"learning_rate": warmup, "weight_decay": decay, "b1": 0.9}, names=names)
    first, second = figure.axes
    np.testing.assert_allclose(curves(first)["learned"], [0, 0.5, 1, 0.5])
    np.testing.assert_allclose(curves(second)["learned"], decay.mean(1))
    (band,) = second.collections
    assert band.get_datalim(second.transData).bounds[1::2] == (0.0, 7.0)


def test_of_many_parts_some_are_drawn_and_it_is_said():
    many = {f"layer{k:02}": np.full(3, 1.0 + k) for k in range(12)}
    (axes,) = hg.plots.schedules({"learning_rate": many}).axes
    assert len(axes.get_lines()) == 8 and axes.get_title() == "8 of 12 parts"
    assert axes.get_yscale() == "linear"  # from 1 to 8


def test_large_factors_are_drawn_on_a_logarithmic_axis():
    (axes,) = hg.plots.schedules({"learning_rate": np.array([1.0, 0.1])}).axes
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"rate": np.ones(3)}, {"names": ["b1"]}, r"\['b1'\] are none of \['rate'\]"),
        ({"rate": np.ones(3)}, {"steps": 0}, "steps must be a whole number"),
        ({"rate": np.ones(3)}, {"steps": 4}, r"'rate' has an array of shape \[3\]; .* of length 4 or 1"),
        ({"rate": 0.1}, {}, "there is no array, so the number of steps is unknown; give steps="),
        ({"a": np.ones(3), "b": np.ones(2)}, {}, r"the arrays have the lengths \[2, 3\]"),
    ],
)
def test_schedules_that_cannot_be_drawn_are_refused(given, settings, message):
    with pytest.raises(ValueError, match=r"plots.schedules\(learned, .*" + message):
        hg.plots.schedules(given, **settings)


def test_what_is_no_result_is_refused():
    with pytest.raises(
        TypeError, match=r"plots.schedules.* learned is a ndarray; give what hypergrad.tune"
    ):
        hg.plots.schedules(np.ones(3))
    with pytest.raises(TypeError, match=r"plots.history.* made is a dict; give what hypergrad.tune"):
        hg.plots.history({"loss": np.ones(3)})
    with pytest.raises(ValueError, match=r"plots.losses\(runs of \{'a': \[\]\}\): give \(T,\) losses"):
        hg.plots.losses({"a": 1.0})


def test_the_history_shows_what_was_chosen():
    (axes,) = hg.plots.history(tuned({}, {})).axes
    assert list(curves(axes)) == ["loss", "chosen"]  # the loss decides
    assert axes.get_lines()[1].get_xydata().tolist() == [[1, 1]]
    (axes,) = hg.plots.history(tuned({}, {}, scores={0: 5.0, 3: 4.0, 1: np.inf})).axes
    found = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert found["score"] == [[0, 5], [3, 4]] and found["chosen"] == [[3, 4]]


def test_the_scores_of_trials_are_drawn_before_those_of_meta_steps():
    trials, loss = hg.plots.history(tuned({}, {}, trials=[4.0, np.inf, 3.0])).axes
    np.testing.assert_array_equal(curves(trials)["score"], [4, np.nan, 3])
    far = hg.plots.history(tuned({}, {}, trials=[4.0, 1e8, 3.0])).axes[0]
    assert far.get_ylim()[1] == 5
    assert list(curves(loss)) == ["loss", "chosen"]


def test_the_path_of_hyperparameters_is_drawn_by_their_means():
    history = History(np.array([2.0, 1.0]), np.ones(2), None, np.zeros((2, 1), bool))
    path = [MetaStep(k, 1.0, 1.0, {"rate": np.array([k, 1.0]), "b1": 0.5 + k}, 0.1) for k in (0, 1)]
    loss, rate, b1 = hg.plots.history(Optimized({}, {}, history, "", {}), path).axes
    assert list(curves(loss)) == ["loss"]
    np.testing.assert_array_equal(curves(rate)["mean"], [0.5, 1.0])
    np.testing.assert_array_equal(curves(b1)["mean"], [0.5, 1.5])


def test_the_history_of_a_distilled_set_has_its_error():
    history = {"loss": np.array([2.0, 1.0]), "validation_error": np.array([[0, 0.5], [2, 0.25]])}
    made = hg.Distilled(
        np.ones((2, 5)), np.arange(2), np.zeros(()), np.ones(()), hg.Recipe(), history=history
    )
    loss, error = hg.plots.history(made).axes
    np.testing.assert_array_equal(curves(loss)["loss"], [2, 1])
    np.testing.assert_array_equal(curves(error)["error on held-out examples, %"], [50, 25])
    assert error.get_ylabel().endswith("%")


def test_parts_of_a_figure_are_drawn_in():
    from matplotlib.figure import Figure

    figure = Figure()
    upper, lower = figure.subfigures(2, 1)
    assert hg.plots.losses({"a": np.ones(3), "b": np.zeros(4)}, part=upper) is figure
    assert hg.plots.images(distilled((2, 5, 5), np.arange(2)), part=lower) is figure
    assert len(upper.axes) == 1 and len(lower.axes) == 3


def test_a_notebook_gets_a_picture_and_it_can_be_pickled():
    figure = hg.plots.losses({"a": np.ones(3)})
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"not installed; pip install 'hypergrad-jax\[plots\]'"):
        hg.plots.images(distilled((2, 5, 5), np.arange(2)))
