"""Augmentation: what each setting does to an image, and that gradients pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad.distillation import augment as augmenting
from hypergrad.distillation.augment import Augmentation

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 8, 8)), jnp.float32)
KEY = jax.random.key(0)
moved = jax.jit(augmenting.moved)


def apply(augmentation, images, key=KEY):
    return np.asarray(jax.jit(augmentation)(key, images))


def test_without_settings_nothing_changes():
    np.testing.assert_array_equal(Augmentation()(KEY, IMAGES), IMAGES)


def test_turning_and_shifting_by_whole_pixels_loses_none():
    quarter = jnp.array([[0.0, -1.0], [1.0, 0.0]])
    turned = moved(IMAGES[0], quarter, jnp.zeros(2))
    np.testing.assert_allclose(turned, np.rot90(IMAGES[0], -1), atol=1e-6)
    shifted = moved(IMAGES[0], jnp.eye(2), jnp.array([2.0, -1.0]))
    np.testing.assert_allclose(shifted[:6, 1:], IMAGES[0, 2:, :7], atol=1e-6)
    np.testing.assert_array_equal(shifted[6:], 0)
    np.testing.assert_array_equal(shifted[:, :1], 0)


def test_between_pixels_it_is_linear():
    ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None], (8, 8))
    half = moved(ramp, jnp.eye(2), jnp.array([0.5, 0.0]))
    np.testing.assert_allclose(half[:7], ramp[:7] + 0.5, atol=1e-6)


def test_cutout_clears_about_its_share_and_leaves_the_rest():
    changed = apply(Augmentation(cutout=0.5), IMAGES + 1.0)
    cleared = changed == 0
    np.testing.assert_array_equal(changed[~cleared], np.asarray(IMAGES + 1.0)[~cleared])
    shares = cleared.mean((1, 2))
    assert np.all((shares > 0) & (shares <= 16 / 64))  # at most 4 by 4 of 8 by 8 pixels


def test_flip_mirrors_some_images_and_only_mirrors():
    many = jnp.tile(IMAGES[:1], (20, 1, 1))
    flipped = apply(Augmentation(flip=True), many)
    same = np.array([np.allclose(x, many[0], atol=1e-6) for x in flipped])
    mirrored = np.array([np.allclose(x, np.asarray(many[0])[:, ::-1], atol=1e-6) for x in flipped])
    assert np.all(same ^ mirrored)
    assert 0 < same.sum() < 20


def test_gradients_pass_and_every_image_has_draws_of_its_own(x64):
    images = jnp.asarray(IMAGES, jnp.float64)
    augment = Augmentation(shift=1.5, degrees=20.0, scale=0.2, contrast=0.3, cutout=0.3)
    value = jax.jit(lambda x: jnp.sum(augment(KEY, x) ** 2))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(augment(KEY, x) ** 2)))(images)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=images.shape))
    h = 1e-6
    difference = (value(images + h * direction) - value(images - h * direction)) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), difference, rtol=1e-7)
    alike = jnp.tile(images[:1], (4, 1, 1))
    assert np.abs(np.diff(apply(augment, alike), axis=0)).max((1, 2)).min() > 1e-3


def test_channels_are_moved_together():
    coloured = jnp.stack([IMAGES, 2 * IMAGES], axis=-1)
    augmentation = Augmentation(shift=2.0, degrees=30.0, cutout=0.3)
    changed = apply(augmentation, coloured)
    np.testing.assert_allclose(changed[..., 1], 2 * changed[..., 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(changed[..., 0], apply(augmentation, IMAGES), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": -1.0}, r"Augmentation\(shift=-1.0\): it must be 0 or more"),
        ({"degrees": float("nan")}, r"degrees=nan"),
        ({"scale": 1.0}, r"scale=1.0\): it must lie in \[0, 1\)"),
        ({"contrast": -0.1}, r"contrast=-0.1"),
        ({"cutout": 1.0}, r"cutout=1.0\): it must lie in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_rows_of_pixels_are_refused():
    with pytest.raises(ValueError, match=r"images of shape \(6, 64\): it turns and shifts pictures"):
        Augmentation(shift=1.0)(KEY, IMAGES.reshape(6, 64))
