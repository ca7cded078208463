"""One training run, without a hypergradient."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common import figures
from experiments.reproduce_2015 import authors
from experiments.reproduce_2015.authors import Arrays, Setting
from experiments.reproduce_2015.panels import panel
from experiments.reproduce_2015.schedules import SIZES, STEPS


def norm(tree: Any) -> Array:
    """Euclidean norm of a whole tree."""
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def compute(setting: Setting) -> Arrays:
    """What the authors measured along the run, and at its end."""
    loss = authors.classifier(SIZES)

    def whole(normal: Array, splits: Sequence[Any], rows: Array) -> Any:
        trained = authors.train(
            loss,
            authors.layers(np.exp(-1.63) * normal, SIZES),
            np.exp(0.887),
            1 / (1 + np.exp(-0.403)),
            splits[0],
            rows,
            watch=lambda snapshot: {
                "learning_curve": loss(snapshot.params, splits[0]),
                "grad_norm": norm(snapshot.gradient),
                "weight_norm": norm(snapshot.params),
                "velocity_norm": norm(snapshot.state["velocity"]),
            },
        )
        return {
            **trained.watched,
            **authors.judged(SIZES, trained.params, splits),
            "final_weights_first_50": trained.params[0].weights.ravel()[:50],
            "final_weight_norm": norm(trained.params),
        }

    examples = authors.splits(setting.digits, 10_000, 10_000, 10_000)
    run = authors.seeded(0, 1).randn(authors.count(SIZES)), examples, authors.random_rows(1, STEPS)
    return {name: np.asarray(x) for name, x in jax.jit(whole)(*run).items()}


def draw(ours: Arrays, theirs: Arrays) -> Any:
    """What was measured along the run."""
    figure, axes = figures.figure(2, 2)
    about = {
        "learning_curve": ("Loss on 10,000 images", "step", "loss (nats)"),
        "grad_norm": ("Gradient of the minibatch", "step", "norm (nats)"),
        "weight_norm": ("Weights", "step", "norm"),
        "velocity_norm": ("Velocity", "step", "norm (nats)"),
    }
    for place, (name, words) in zip(axes.ravel(), about.items()):
        panel(place, {"reversible engine": ours[name]}, theirs[name], words, every=3)
    return figure
