"""Pictures: what is drawn where, and what is refused."""

import importlib

import numpy as np
import pytest

import hypergrad as hg

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


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"not installed; pip install 'hypergrad-jax\[plots\]'"):
        hg.plots.images(distilled((2, 5, 5), np.arange(2)))
