"""Gradients of windows of a run and exact ones, against plain `jax.lax.scan` and `jax.grad` in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import nets
from hypergrad.distillation import window_cosines

RNG = np.random.default_rng(0)
NETWORK = nets.mlp((5, 3))
RECIPE = hg.Recipe(steps=6, learning_rate=np.linspace(2.0, 4.0, 6), momentum=0.6, inits=1)
SET = hg.Distilled(RNG.normal(size=(6, 5)), np.arange(6) % 3, np.ones(5), np.full(5, 2.0), RECIPE)
REAL = RNG.normal(size=(30, 5)), np.arange(30) % 3


def plain(window):
    """Gradients of windows that end after steps 2 and 6, and exact ones."""
    init, apply = NETWORK
    start, x = RECIPE.weights(init, jax.random.key(0)), SET.inputs
    inputs, targets = SET.normalised(REAL[0]), jnp.asarray(REAL[1])

    def loss(w, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(w, x), y).mean()

    def outer(x, end, window):
        def step(carry, rate):
            w, v = carry
            v = jax.tree.map(
                lambda v, g: 0.6 * v - 0.4 * g, v, jax.grad(loss)(w, x, jnp.asarray(SET.labels))
            )
            return (jax.tree.map(lambda w, v: w + rate * v, w, v), v), None

        rates = jnp.asarray(RECIPE.learning_rate[:end])
        carry = start, jax.tree.map(jnp.zeros_like, start)
        if end > window:
            carry, _ = jax.lax.scan(step, carry, rates[: end - window])
        (w, _), _ = jax.lax.scan(step, jax.lax.stop_gradient(carry), rates[-window:])
        return loss(w, inputs, targets)

    both = [
        np.array(
            [jnp.ravel(jax.jit(jax.grad(outer), static_argnums=(1, 2))(x, end, w)) for end in (2, 6)],
            np.float64,
        )
        for w in (window, 6)
    ]
    return both


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.quick("Stored")
@pytest.mark.parametrize("adjoint", [hg.Stored, hg.Reversible], ids=lambda each: each.__name__)
def test_windows_are_compared_with_exact_gradients(x64, adjoint):
    found, longer = window_cosines(NETWORK, SET, REAL, [2, 5], ends=2, adjoint=adjoint())
    short, whole = plain(2)
    assert found.ends.tolist() == [2, 6]
    expected = [cosine(a, b) for a, b in zip(short, whole)]
    np.testing.assert_allclose(found.same_end, [expected], rtol=1e-6)
    np.testing.assert_allclose(found.whole_run, [[cosine(a, whole[-1]) for a in short]], rtol=1e-6)
    np.testing.assert_allclose(
        found.size[0], np.linalg.norm(short, axis=1) / np.linalg.norm(whole, axis=1), rtol=1e-6
    )
    np.testing.assert_allclose(found.average, [cosine(short.mean(0), whole.mean(0))], rtol=1e-6)
    assert expected[0] == pytest.approx(1) and max(expected[1:]) < 0.999  # so that something is left out
    np.testing.assert_allclose(longer.same_end[0, 0], 1, rtol=1e-6)  # it ends before it is full
    assert longer.same_end[0, 1] == pytest.approx(longer.average[0]) and longer.average[0] < 0.9999
    lines = str(found).splitlines()
    assert len(lines) == 6 and lines[3].split() == ["2", "1.000", f"{found.whole_run[0, 0]:.3f}", "1.000"]


@pytest.mark.slow
def test_the_whole_run_as_a_window_leaves_nothing_out():
    new = dataclasses.replace(SET, recipe=dataclasses.replace(RECIPE, inits=None))
    (found,) = window_cosines(NETWORK, new, REAL, [6], ends=2, runs=2, adjoint=hg.Stored())
    assert found.ends.tolist() == [6]
    for name in ("same_end", "whole_run", "size"):
        np.testing.assert_allclose(getattr(found, name), np.ones((2, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"windows": [2, 7]}, r"windows=\[2, 7\], .* from 1 to the 6 of the recipe"),
        ({"windows": [2.5]}, r"windows=\[2.5\], .*: pass one or more windows, whole numbers"),
        ({"ends": 1}, "ends=1, .*: ends must be a whole number, at least 2"),
        ({"runs": 0}, r"runs=0\): ends must .* and runs at least 1"),
        (
            {"real": (REAL[0][:, :2], REAL[1])},
            r"with inputs \(30, 2\) and 30 labels: the set's are \(5,\)",
        ),
    ],
    ids=["long", "fraction", "ends", "runs", "data"],
)
def test_what_cannot_be_compared_is_refused(given, message):
    with pytest.raises(ValueError, match="window_cosines.*" + message):
        window_cosines(**{"network": NETWORK, "distilled": SET, "real": REAL, "windows": [2]} | given)
