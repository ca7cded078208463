"""Figure 1 of the paper: rates and momenta of every step, learned for two weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common import figures
from experiments.reproduce_2015 import authors
from experiments.reproduce_2015.authors import Arrays, Setting
from experiments.reproduce_2015.panels import panel

STEPS = 50


def valley(w: Array, given: Any = None, step: Any = None) -> Array:
    """A valley that bends, squashed."""
    r = 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2 + 200 * w[0]
    return 800 * jax.nn.sigmoid(r / 500)


def compute(setting: Setting) -> Arrays:
    """Three meta-iterations of gradient descent with momentum."""

    def objective(log_alpha: Array, logit_beta: Array) -> Any:
        trained = authors.train(
            valley,
            jnp.array([1.4, 3.9]),
            jnp.exp(log_alpha),
            jax.nn.sigmoid(logit_beta),
            None,
            np.arange(STEPS),
            watch=lambda snapshot: snapshot.params,
        )
        return valley(trained.params), {"learning_curves": trained.losses, "params": trained.watched}

    evaluate = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    hypers = [np.full(STEPS, -4.5), np.full(STEPS, authors.logit(0.99))]
    velocity = [np.zeros(STEPS), np.zeros(STEPS)]
    stored: list[Arrays] = []
    for _ in range(3):
        (loss, curves), hypergradient = evaluate(*hypers)
        stored.append({"train_loss": loss, "log_alphas": hypers[0], "invlogit_betas": hypers[1], **curves})
        velocity = [0.9 * u - (1 - 0.9) * np.asarray(g) for u, g in zip(velocity, hypergradient)]
        hypers = [h + 0.010 * u for h, u in zip(hypers, velocity)]
    return authors.stacked(stored)


def draw(ours: Arrays, theirs: Arrays) -> Any:
    """The paths over the loss surface, and the loss along them."""
    figure, ((paths, curves),) = figures.figure(1, 2)
    w1, w2 = np.meshgrid(np.linspace(-2.4, 2.4, 241), np.linspace(-0.5, 4.5, 201))
    surface = paths.contourf(w1, w2, valley(jnp.stack([w1, w2])), 16, cmap="Greys_r", alpha=0.5)
    figure.colorbar(surface, ax=paths, label="loss")
    names = [f"meta-iteration {i + 1}" for i in range(3)]
    for k, (name, path) in enumerate(zip(names, ours["params"])):
        paths.plot(*path.T, **figures.look(k, marker="os^"[k], markevery=7, markersize=5, label=name))
    paths.plot(1.4, 3.9, "k*", ms=11, label="start")
    paths.set(title="Paths of the weights", xlabel="first weight", ylabel="second weight")
    paths.legend(fontsize="small")
    words = ("Learning curves", "step", "loss")
    panel(curves, dict(zip(names, ours["learning_curves"])), theirs["learning_curves"][2], words, every=3)
    return figure
