"""Penalties, initial scales, rates and momenta, learned together by steps of 0.05 up or down."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from experiments.common import figures
from experiments.reproduce_2015 import authors
from experiments.reproduce_2015.authors import Arrays, Setting
from experiments.reproduce_2015.panels import panel

SIZES, STEPS = (784, 200, 10), 50
LEAVES = ("784 × 200", "200 biases", "200 × 10", "10 biases")


def parts(hyper: Any) -> list[Any]:
    """Log penalties and log scales (4,) of weights and biases; log rates and logits of momenta (50,)."""
    return jnp.split(hyper, [4, 8, 8 + STEPS], axis=-1)


def compute(setting: Setting) -> Arrays:
    """Two hundred meta-iterations; of every fifth all is kept."""
    loss = authors.classifier(SIZES)

    def outer(hyper: Array, i: Array, normal: Array, rows: Array, splits: Sequence[Any]) -> Any:
        log_penalty, log_scale, log_alpha, logit_beta = parts(hyper)
        draws = authors.layers(normal, SIZES)
        trained = authors.train(
            authors.penalised(SIZES),
            jax.tree.map(lambda s, w: jnp.exp(s) * w, authors.by_leaf(log_scale, draws), draws),
            jnp.exp(log_alpha),
            jax.nn.sigmoid(logit_beta),
            (splits[0], authors.by_leaf(jnp.exp(log_penalty), draws)),
            rows,
            watch=lambda snapshot: jax.lax.cond(  # only where the authors' numbers are
                (snapshot.step == 45) | ((i == 0) & (snapshot.step % 5 == 0)),
                lambda: loss(snapshot.params, splits[0]),
                lambda: jnp.nan,
            ),
        )
        measured = authors.judged(SIZES, trained.params, splits) | {"hyper": hyper}
        return measured["valid_loss"], (measured, trained.watched[::5])

    evaluate = jax.jit(jax.value_and_grad(outer, has_aux=True))
    examples = authors.splits(setting.digits, 1000, 1000, 1000)
    start = [np.full(4, -6.0), np.full(4, -3.0), np.full(STEPS, -1.0), np.full(STEPS, authors.logit(0.9))]
    hyper, stored, curves = np.concatenate(start), [], []
    for i in tqdm(range(6 if setting.fast else 200), desc="sign steps", leave=False):
        normal = np.random.RandomState(i).randn(authors.count(SIZES))
        rows = np.stack([np.random.RandomState(1000 * i + j).randint(1000, size=5) for j in range(STEPS)])
        (_, (measured, curve)), gradient = evaluate(hyper, i, normal, rows, examples)
        stored.append(measured)
        curves.append(curve)
        hyper = hyper - 0.05 * np.sign(gradient)
    curves = {"learning_curve_0": curves[0], "learning_curve_final": np.stack(curves)[:, -1]}
    return authors.stacked(stored[::5]) | curves


def draw(ours: Arrays, theirs: Arrays) -> Any:
    """The losses, and what was learned; circles for the first loss, the first scale, the last schedules."""
    figure, axes = figures.figure(2, 2)
    (progress, scales), schedules = axes
    named = {"training": "train_loss", "validation": "valid_loss", "test": "tests_loss"}
    losses = {word: ours[name] for word, name in named.items()}
    panel(
        progress, losses, theirs["train_loss"], ("Progress", "meta-iteration", "loss after training (nats)")
    )
    mine, saved = ([np.asarray(x) for x in parts(hyper["hyper"])] for hyper in (ours, theirs))
    words = ("Scales of the initial weights", "meta-iteration", "log of standard deviation")
    panel(scales, dict(zip(LEAVES, mine[1].T)), saved[1][:, 0], words)
    for place in (progress, scales):
        place.xaxis.set_major_formatter(lambda x, _: f"{5 * x:g}")
    last = len(mine[0]) - 1
    titles = ("Step sizes", "step", "log step size"), ("Momenta", "step", "logit of momentum")
    for place, words, values, circles in zip(schedules, titles, mine[2:], saved[2:]):
        curves = {f"meta-iteration {5 * k}": values[k] for k in sorted({0, last // 2, last})}
        panel(place, curves, circles[last], words)
    return figure
