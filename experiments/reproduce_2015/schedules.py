"""Section 3.1 of the paper: rates and momenta of every step and layer, and initial scales, on MNIST."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import hypergrad as hg
from experiments.common import figures
from experiments.common.statistics import standard_error
from experiments.reproduce_2015 import authors
from experiments.reproduce_2015.authors import Arrays, Setting
from experiments.reproduce_2015.panels import CIRCLES, panel

SIZES, STEPS, GROUPS = (784, 50, 50, 50, 10), 100, 8
LAYERS = ("784 × 50", "50 × 50, first", "50 × 50, second", "50 × 10")


def start(beta: float) -> np.ndarray:
    """(1608,) log initial scales (8,), log rates (100, 8), logits of momenta (100, 8)."""
    shape = (STEPS, GROUPS)
    parts = [np.full(GROUPS, -3.0), np.full(shape, -1.0), np.full(shape, authors.logit(beta))]
    return np.concatenate([x.ravel() for x in parts])


def parts(hyper: Any) -> tuple[Any, Any, Any]:
    """Initial scales (8,), rates (100, 8) and momenta (100, 8) out of the long vector."""
    scale, rate, momentum = hyper[:GROUPS], *hyper[GROUPS:].reshape(2, STEPS, GROUPS)
    return scale, rate, momentum


@functools.cache
def scheduled() -> Callable[..., Any]:
    """Train with schedules: ``(hyper, normal, rows, splits) -> ((train loss, measured), hypergradient)``.

    hyper: (1608,) as `start` gives it.
    normal: (44860,) standard normal draws, to become the initial weights.
    rows: (100, 200) of the training split.
    splits: ``(images, labels)`` to train, validate and test on.
    """

    def outer(hyper: Array, normal: Array, rows: Array, splits: Sequence[Any]) -> Any:
        log_scale, log_alpha, logit_beta = parts(hyper)
        draws = authors.layers(normal, SIZES)
        trained = authors.train(
            authors.classifier(SIZES),
            jax.tree.map(lambda s, w: jnp.exp(s) * w, authors.by_leaf(log_scale, draws), draws),
            authors.by_leaf(jnp.exp(log_alpha).T, draws),
            authors.by_leaf(jax.nn.sigmoid(logit_beta).T, draws),
            splits[0],
            rows,
            adjoint=hg.Reversible(bits=2),
        )
        measured = authors.judged(SIZES, trained.params, splits)
        return measured["train_loss"], (measured, trained.losses)

    return jax.jit(jax.value_and_grad(outer, has_aux=True))


def learn(setting: Setting) -> Arrays:
    """Learn them with the authors' Adam."""
    iterations, (b1, b2, eps, lam, step) = 3 if setting.fast else 50, (0.1, 0.01, 1e-4, 1e-4, 0.04)
    examples = authors.splits(setting.digits, 10_000, 10_000, 10_000)
    hyper, m, v = start(0.9), np.zeros(1608), np.zeros(1608)
    history, gradients, stored, curves = [hyper], [], [], []
    for i in tqdm(range(iterations), desc="schedule", leave=False):
        draws = authors.seeded(0, i).randn(authors.count(SIZES)), authors.random_rows(i, STEPS)
        (_, (measured, losses)), gradient = scheduled()(hyper, *draws, examples)
        g = np.asarray(gradient)
        b1_now = 1 - (1 - b1) * lam**i
        m, v = b1_now * g + (1 - b1_now) * m, b2 * g**2 + (1 - b2) * v
        m_hat, v_hat = m / (1 - (1 - b1) ** (i + 1)), v / (1 - (1 - b2) ** (i + 1))
        hyper = hyper - step * m_hat / (np.sqrt(v_hat) + eps)
        history.append(hyper)
        gradients.append(g)
        curves.append(losses)
        stored.append(measured)
    end = {} if setting.fast else {"final_hyper": hyper}
    return {
        **authors.stacked(stored),
        **end,
        "log_scales": np.stack(history)[:, :GROUPS],
        "hypergrad_norm": np.linalg.norm(gradients, axis=1),
        "initial_hypergrad": gradients[0],
        "hyper_after_3": history[3],
        "batch_losses": np.stack(curves),
    }


def average(setting: Setting) -> Arrays:
    """The hypergradient of the schedules at one place, averaged over starts and orders of the data.

    The authors saved the mean over 50; we go on to 100, for its standard error.  A mean cannot be had from
    fewer; the fast pass computes one hypergradient that the authors saved.
    """
    beta, seeds = (0.9, 1) if setting.fast else (0.5, 100)
    examples, found = authors.splits(setting.digits, 10_000, 10_000, 10_000), []
    for i in tqdm(range(seeds), desc="mean of seeds", leave=False):
        draws = authors.seeded(0, i).randn(authors.count(SIZES)), authors.random_rows(i, STEPS)
        found.append(np.asarray(scheduled()(start(beta), *draws, examples)[1]))
    if setting.fast:
        return {"initial_hypergrad": found[0]}
    return {
        "mean_hypergradient": np.mean(found[:50], axis=0),
        "of_one_seed": found[0],
        "mean_of_100": np.mean(found, axis=0),
        "standard_error_of_100": standard_error(found),
    }


def roughness(values: np.ndarray) -> float:
    """``sqrt(mean (x[t-1] - 2 x[t] + x[t+1])² / (6 mean x²))``: 1 for white noise, 0 for straight lines.

    values: hypergradients ``x``, (steps, layers).
    """
    return float(np.sqrt(np.mean(np.diff(values, 2, axis=0) ** 2) / 6 / np.mean(values**2)))


def draw_learned(ours: Arrays, theirs: Arrays) -> Any:
    """Learning curves, progress, initial scales and schedules; circles for one curve of each."""
    figure, ((curves, progress), scales, (rates, momenta)) = figures.figure(3, 2)
    figures.lines(
        curves, {f"{k} meta-iteration": ours["batch_losses"][i] for k, i in (("first", 0), ("last", -1))}
    )
    curves.set(title="Learning curves", xlabel="step", ylabel="loss of the minibatch (nats)")
    losses = {"training": ours["train_loss"], "validation": ours["valid_loss"]}
    words = ("Progress", "meta-iteration", "loss after training (nats)")
    panel(progress, losses, theirs["valid_loss"], words)
    name = "final_hyper" if "final_hyper" in ours else "hyper_after_3"
    (_, rate, logits), (scale, their_rate, their_logits) = parts(ours[name]), parts(theirs[name])
    for group, (place, what) in enumerate(zip(scales, ("weights", "biases"))):
        figures.lines(place, dict(zip(LAYERS, ours["log_scales"][:, group::2].T)))
        last = len(ours["log_scales"]) - 1
        place.plot(np.full(4, last), scale[group::2], **CIRCLES, label="authors, 2015")
        words = f"Scales of the initial {what} of each layer", "meta-iteration", "log of standard deviation"
        place.set(title=words[0], xlabel=words[1], ylabel=words[2])
        place.legend(fontsize="small")
    for inputs in sorted(set(SIZES[:-1])):
        height = -0.5 * np.log(inputs)
        scales[0].axhline(height, color="0.5", lw=0.8)
        scales[0].annotate(f"1/√{inputs}", (0, height), fontsize="small", va="bottom")
    words = ("Learned step sizes, weights of each layer", "step", "log step size")
    panel(rates, dict(zip(LAYERS, rate.T[::2])), their_rate[:, 0], words, every=3)
    momentum, their_momentum = (1 / (1 + np.exp(-x)) for x in (logits, their_logits))
    words = ("Learned momenta, weights of each layer", "step", "momentum")
    panel(momenta, dict(zip(LAYERS, momentum.T[::2])), their_momentum[:, 0], words, every=3)
    return figure


def draw_average(ours: Arrays, theirs: Arrays) -> Any:
    """The hypergradient along the steps, of one seed and averaged; circles for the first layer."""
    saved = next(iter(ours))
    names = {
        "of_one_seed": "One seed",
        saved: "Mean of 50 seeds",
        "mean_of_100": "Mean of 100, ± 2 std. errors",
    }
    names = names if len(ours) > 1 else {saved: "One seed"}
    figure, axes = figures.figure(2, len(names), width=4.8)
    for k, hyper in enumerate(("log step size", "logit of momentum")):
        for place, (name, what) in zip(axes[k], names.items()):
            values = parts(ours[name])[k + 1][:, ::2]
            figures.lines(place, dict(zip(LAYERS, values.T)))
            if name == saved:
                circles = parts(theirs[name])[k + 1][:, 0]
                place.plot(circles, **CIRCLES, markevery=3, label="authors, 2015")
            if name == "mean_of_100":
                for middle, error in zip(values.T, parts(ours["standard_error_of_100"])[k + 1][:, ::2].T):
                    ends = middle - 2 * error, middle + 2 * error
                    place.fill_between(range(STEPS), *ends, color="0.5", alpha=0.25, lw=0)
            place.set(title=f"{what}: roughness {roughness(values):.3f}", xlabel="step")
            place.set(ylabel=f"d loss / d {hyper} (nats)")
            place.ticklabel_format(axis="y", scilimits=(-3, 4))
            place.get_legend().remove()
        low, high = zip(*(place.get_ylim() for place in axes[k]))
        for place in axes[k]:
            place.set_ylim(min(low), max(high))
    axes[1, len(names) // 2].legend(fontsize="small", loc="lower center", ncols=2)
    return figure
