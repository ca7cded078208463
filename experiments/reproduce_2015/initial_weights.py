"""The distribution of the initial weights, learned as the bins of its inverse cumulative."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common import figures
from experiments.reproduce_2015 import authors
from experiments.reproduce_2015.authors import Arrays, Setting
from experiments.reproduce_2015.panels import panel

SIZES, STEPS = (784, 50, 10), 20


def compute(setting: Setting) -> Arrays:
    """Ten meta-iterations of gradient descent, after each of which the bins are sorted."""
    loss = authors.classifier(SIZES, last=jnp.tanh)
    stream = np.random.RandomState(2)
    stream.randn(authors.count(SIZES))  # the velocity
    uniform = stream.rand(authors.count(SIZES))

    def outer(bins: Array, uniform: Array, given: Any, rows: Array) -> Any:
        weights = jnp.interp(uniform, jnp.linspace(0, 1, len(bins)), bins)
        _, curve = authors.curve(loss, authors.layers(weights, SIZES), given, rows)
        return curve[-1], curve[1:]  # after steps 1 to 20

    evaluate = jax.jit(jax.value_and_grad(outer, has_aux=True))
    bins = np.linspace(-1, 1, 20) * np.exp(-3.0)
    run = (
        uniform,
        authors.examples(setting.digits, slice(1000), centred=False),
        authors.consecutive(STEPS, 250, 1000),
    )
    history, curves = [], []
    for _ in range(10):
        (_, curve), gradient = evaluate(bins, *run)
        history.append(bins)
        curves.append(np.asarray(curve))
        d = np.asarray(gradient)
        bins = bins - 0.002 * d
        bins[[0, 19]] -= 0.002 * d[[0, 1]]  # a slip of theirs: d[1] where d[19] was meant
        bins = np.sort(bins)
    named = {f"learning_curve_{k}": curves[k] for k in (0, 1, 2, 5, 9)}
    return {**named, "final_loss": np.stack(curves)[:, -1], "bins": np.stack(history)}


def draw(ours: Arrays, theirs: Arrays) -> Any:
    """The distribution before and after, and the learning curves."""
    figure, ((bins, curves),) = figures.figure(1, 2)
    words = ("Inverse cumulative distribution", "bin, of 20 with equally many weights", "initial weight")
    panel(bins, {"before": ours["bins"][0], "after 9 updates": ours["bins"][-1]}, theirs["bins"][-1], words)
    named = {
        "first meta-iteration": ours["learning_curve_0"],
        "last meta-iteration": ours["learning_curve_9"],
    }
    words = ("Learning curves", "steps after the first", "loss on 1000 images (nats)")
    panel(curves, named, theirs["learning_curve_9"], words)
    return figure
