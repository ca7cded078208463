"""L2 penalties of a logistic regression: one for every weight (Fig. 4 of the paper), or pooled."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from experiments.common import figures
from experiments.reproduce_2015 import authors
from experiments.reproduce_2015.authors import Arrays, Params, Setting
from experiments.reproduce_2015.panels import panel
from hypergrad import nets

SIZES = (784, 10)
START = np.log(0.01) + 1  # log penalty of every weight


def per_weight(setting: Setting) -> Arrays:
    """Ten meta-iterations of gradient descent on the log penalty of every weight."""
    loss, regularised = authors.classifier(SIZES), authors.penalised(SIZES)

    def outer(log_penalties: Array, start: Params, rows: Array, splits: Sequence[Any]) -> Any:
        given = splits[0], authors.layers(jnp.exp(log_penalties), SIZES)
        trained, curve = authors.curve(regularised, start, given, rows)
        valid, tests = (loss(trained, split) for split in splits[1:])
        return valid, {
            "learning_curve": curve,
            "valid_loss": valid,
            "test_loss": tests,
            "L2": given[1][0].weights,
        }

    evaluate = jax.jit(jax.value_and_grad(outer, has_aux=True))
    run = (
        authors.second_draw(SIZES, -4.0),
        authors.consecutive(50, 100, 10_000),
        authors.splits(setting.digits, 10_000, 10_000, 1000),
    )
    log_penalties, stored = np.full(authors.count(SIZES), START), []
    for _ in tqdm(range(2 if setting.fast else 10), desc="penalties", leave=False):
        (_, measured), gradient = evaluate(log_penalties, *run)
        stored.append(measured)
        log_penalties = log_penalties - 100 * np.asarray(gradient)
    result = authors.stacked(stored)
    penalties = result.pop("L2")
    last = {"L2" if setting.fast else "L2_last": penalties[-1]}
    return result | last | {"L2_norm_by_iter": np.linalg.norm(penalties, axis=(1, 2))}


def pooled(setting: Setting) -> Arrays:
    """From 200 images: 10 meta-iterations on one log penalty, then 5 by layer, then 3 by input pixel."""
    loss, steps = authors.classifier(SIZES), 200
    order = authors.seeded(0, "top_rs").permutation(60_000)
    fitted, tests = (
        authors.examples(setting.digits, order[part]) for part in (slice(200), slice(200, 1200))
    )

    def outer(log_penalties: Array, start: Params, fitted: Any, rows: Array, held: Any) -> Array:
        given = fitted, authors.layers(jnp.exp(log_penalties), SIZES)
        return loss(authors.train(authors.penalised(SIZES), start, 1.0, 0.8, given, rows).params, held)

    def rows(among: int) -> np.ndarray:
        return np.stack([authors.seeded(0, t, "primal").randint(among, size=50) for t in range(steps)])

    evaluate, differentiate = jax.jit(outer), jax.jit(jax.grad(outer))
    stages = [(stage, h) for stage, length in enumerate((10, 5, 3)) for h in range(length)]
    log_penalties, losses, history = np.full(authors.count(SIZES), -6.0), [], []
    for stage, h in tqdm(stages[:3] if setting.fast else stages, desc="pooled", leave=False):
        (draws,) = authors.layers(
            authors.seeded(0, stage, h, "hyperloss").randn(authors.count(SIZES)), SIZES
        )
        start = (nets.Dense(draws.weights / np.sqrt(784), draws.biases),)
        history.append(log_penalties[:7840:10])
        losses.append(evaluate(log_penalties, start, fitted, rows(200), tests))
        mixed = authors.seeded(0, stage, h, "hyperloss").permutation(200)
        inner, held = (tuple(x[part] for x in fitted) for part in (mixed[:100], mixed[100:]))
        (gradient,) = authors.layers(differentiate(log_penalties, start, inner, rows(100), held), SIZES)
        axis = 1 if stage == 2 else None  # all outputs of a pixel, or all weights
        mean = np.mean(gradient.weights, axis=axis, keepdims=True)
        step = np.broadcast_to(mean, (784, 10)).ravel(), np.zeros(10)  # the biases keep theirs
        log_penalties = log_penalties - 10_000 * np.concatenate(step)
    return {"test_loss": np.stack(losses), "reg": np.stack(history, axis=1)}


def draw_per_weight(ours: Arrays, theirs: Arrays) -> Any:
    """The penalties as ten images, and the losses."""
    figure, ((images,), (losses,)) = figures.figure(2, 1, width=10, height=2.6)
    penalties = ours["L2_last" if "L2_last" in ours else "L2"]
    change = np.log(penalties).T.reshape(10, 28, 28) - START
    limit = min(0.5, np.max(np.abs(change)))
    digits = [str(digit) for digit in range(10)]
    figures.images(images, change, names=digits, limit=limit, label="log ratio\nto the start")
    images.set(title="L2 penalty of each weight", xlabel="digit that the weights are for")
    named = {"validation": ours["valid_loss"], "test": ours["test_loss"]}
    panel(losses, named, theirs["valid_loss"], ("Progress", "meta-iteration", "loss after training (nats)"))
    return figure


def draw_pooled(ours: Arrays, theirs: Arrays) -> Any:
    """The losses of the three stages, and the penalties of the pixels."""
    figure, ((losses, images),) = figures.figure(1, 2)
    words = ("Penalties pooled in three stages", "meta-iteration", "test loss (nats)")
    panel(losses, {"reversible engine": ours["test_loss"]}, theirs["test_loss"], words)
    for start, word in ((0, "all weights"), (10, "by layer"), (15, "by pixel")):
        if start < len(ours["test_loss"]):
            losses.axvline(start - 0.5, color="k", lw=1, ls=":")  # where it begins
            losses.annotate(word, (start - 0.3, 0.93), xycoords=("data", "axes fraction"), fontsize="small")
    losses.legend(fontsize="small", loc="center left")
    change = ours["reg"][:, -1].reshape(1, 28, 28) + 6
    figures.images(images, change, label="log ratio of penalty to the start")
    images.set(title="Learned penalty of each pixel")
    return figure
