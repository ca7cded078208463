"""Images in a grid: where each stands, and on what scale."""

import numpy as np
import pytest

from hypergrad import plots


def drawn(array, **options):
    made, axes = plots.figure()
    plots.images(axes[0, 0], array, **options)
    made.draw_without_rendering()
    return axes[0, 0].get_images()[0], axes[0, 0]


def test_images_stand_in_rows_apart_by_an_empty_pixel():
    array = np.arange(1.0, 19.0).reshape(3, 2, 3)
    image, axes = drawn(array, columns=2, names="ab")
    mosaic = image.get_array().filled(np.nan)
    assert mosaic.shape == (5, 7)
    np.testing.assert_array_equal(mosaic[:2, :3], array[0])
    np.testing.assert_array_equal(mosaic[:2, 4:], array[1])
    np.testing.assert_array_equal(mosaic[3:, :3], array[2])
    assert np.isnan(mosaic[2]).all() and np.isnan(mosaic[3:, 3:]).all()
    assert axes.get_xticks().tolist() == [1.0, 5.0]  # the middle of each column


def test_scale_is_symmetric_and_as_large_as_the_images_or_the_limit():
    array = np.array([[[-3.0, 1.0]]])
    assert drawn(array)[0].get_clim() == (-3, 3)
    assert drawn(array, limit=0.5)[0].get_clim() == (-0.5, 0.5)


@pytest.mark.parametrize("array", [np.ones((2, 2)), np.zeros((1, 2, 2)), np.full((1, 2, 2), np.nan)])
def test_what_is_no_stack_of_images_is_refused(array):
    with pytest.raises(ValueError, match=r"images\(axes, array, limit=None\).*pass finite images"):
        drawn(array)
