"""The numbers that the authors of 2015 saved, computed again by the exactly reversible engine.

Maclaurin, Duvenaud and Adams kept the results of their runs.  Six of their experiments are run here anew
through ``hg.train(..., adjoint=hg.Reversible())`` in float64, and every array that comes out is compared
with theirs, number by number, to the six digits that their files carry.

    export HYPERGRAD_REFERENCE=...  HYPERGRAD_DATA=...   # their results; the folder that holds mnist/
    python -m experiments.reproduce_2015                 # ten minutes on two cores
    python -m experiments.reproduce_2015 --fast          # a minute, writes nothing

===================================  ======================================================  =====
experiment                           what is learned                                         steps
===================================  ======================================================  =====
figure1_toy_2d                       rates and momenta of every step, for two weights        50
schedule_beta_0.9_meta_step_0.04     rates, momenta and initial scales of every layer        100
mean_initial_hypergradient_50_seeds  nothing: the first hypergradient of those, averaged     100
chaos_learning_rate_wiggle           nothing: loss and hypergradient at up to 1000 rates     50
init_distribution_1                  the distribution of the initial weights                 20
train_short_whetlab_init             nothing: one run                                        100
===================================  ======================================================  =====

The exit status is 1 where an array disagrees and 2 where the files are missing.

Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
learning", ICML 2015, and the results in the authors' repository.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jax import Array
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import hypergrad as hg
from hypergrad import data, nets
from hypergrad.files import replace_file
from hypergrad.program import Move, Optimizer, Scale, Shift

Arrays = dict[str, np.ndarray]
Params = tuple[nets.Dense, ...]

# Half a unit in the sixth digit is what rounding did to the authors' numbers.  Beyond it, this much of an
# array's largest number is granted for the last bits of float64, in which sums in another order differ.
# Fifty steps of Adam, which divides by small numbers, take up half of it; all else stays below 1e-12.
DIGITS = 6
FLOOR = 1e-9


class Digits(NamedTuple):
    """One half of MNIST: what it is trained on, or tested on.

    pixels: (n, 784) uint8.
    labels: (n,) int32.
    mean: (784,) float64, the mean of the 60,000 training images, pixels divided by 255.
    """

    pixels: np.ndarray
    labels: np.ndarray
    mean: np.ndarray


class Setting(NamedTuple):
    """How much of an experiment to run, and on what."""

    fast: bool
    all_points: bool
    digits: Digits | None
    tests: Digits | None


class Comparison(NamedTuple):
    """Our numbers beside the authors'.

    array: its name, with the region where only a part is meant.
    numbers: how many.
    difference: the largest absolute one.
    relative: that over the largest of the authors' numbers, or each over its own.
    beyond: the largest part of a difference that their rounding does not explain, over the same.
    agreeing: the share of numbers that are ours rounded to six digits, with nothing granted.
    agrees: the verdict; None where none is due.
    """

    array: str
    numbers: int
    difference: float
    relative: float
    beyond: float
    agreeing: float
    agrees: bool | None


# ---- what all experiments share


def authors_numerator(momentum: Array) -> Array:
    """The authors' ratio for a momentum, ``(floor(65536 β) + 1) / 65536``, in units of ``2**-32``.

    >>> int(authors_numerator(jnp.float32(0.5))) / 2**32 - 0.5 == 2**-16
    True
    """
    with jax.enable_x64(True):
        whole = jnp.floor(65536 * jnp.asarray(momentum, jnp.float64)) + 1
        return whole.astype(jnp.uint64) * jnp.uint64(65536)


def maclaurin_2015() -> Optimizer:
    """`hypergrad.momentum` with the authors' rounding of β: it decides between four digits and ten."""

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Scale("velocity", h.momentum, numerator=authors_numerator),
            Shift("velocity", lambda s: -(1 - h.momentum) * s.gradient),
            Shift("params", lambda s: h.learning_rate * s.velocity),
        ]

    library = hg.momentum()
    return Optimizer("maclaurin_2015()", moves, library.variables, library.hypers, library.domains)


def seeded(*what: Any) -> np.random.RandomState:
    """The authors' random stream of anything that prints, such as ``(0, iteration, step)``."""
    digest = hashlib.md5(str(what).encode(), usedforsecurity=False).hexdigest()
    return np.random.RandomState(int(digest[:8], 16))


def cyclic_rows(steps: int) -> np.ndarray:
    """(steps, 250) the old runs' batches: slices of the first 1000 rows, in order, again and again."""
    return (250 * (np.arange(steps) % 4))[:, None] + np.arange(250)[None]


def random_rows(seed: int, steps: int) -> np.ndarray:
    """(steps, 200) the later runs' batches out of the first 10,000 rows."""
    return np.stack([seeded(0, seed, t).randint(10_000, size=200) for t in range(steps)])


def layers(flat: Any, sizes: Sequence[int]) -> Params:
    """Weights and biases out of one vector, in the authors' order."""
    result, start = [], 0
    for inputs, outputs in itertools.pairwise(sizes):
        middle, end = start + inputs * outputs, start + (inputs + 1) * outputs
        result.append(nets.Dense(flat[start:middle].reshape(inputs, outputs), flat[middle:end]))
        start = end
    return tuple(result)


def count(sizes: Sequence[int]) -> int:
    """How many weights and biases a network has."""
    return sum((a + 1) * b for a, b in itertools.pairwise(sizes))


def examples_of(digits: Digits, rows: Any, centred: bool = True) -> tuple[Array, Array]:
    """Images in float64, from 0 to 1 or less the mean image, and their labels."""
    images = digits.pixels[rows] / 255
    return jnp.asarray(images - digits.mean if centred else images), jnp.asarray(digits.labels[rows])


def second_draw(sizes: Sequence[int], log_scale: float) -> Params:
    """Initial weights of the runs that drew a velocity first, and scaled it by 0."""
    stream = np.random.RandomState(0)
    stream.randn(count(sizes))
    return layers(stream.randn(count(sizes)) * np.exp(log_scale), sizes)


def classifier(
    sizes: Sequence[int], last: Callable[[Array], Array] = lambda logits: logits
) -> Callable[[Params, tuple[Array, Array], Any], Array]:
    """The mean cross-entropy of a network on some rows of ``(images, labels)``, in nats."""
    apply = nets.mlp(sizes)[1]

    def loss(params: Params, examples: tuple[Array, Array], rows: Any) -> Array:
        images, labels = (x[rows] for x in examples)
        return nets.cross_entropy(last(apply(params, images)), labels)

    return loss


def penalised(loss: Callable[..., Array]) -> Callable[..., Array]:
    """The loss with ``Σ λ w²`` added, for ``(examples, λ)``; λ may be a tree that is a prefix of the weights."""

    def whole(params: Params, given: tuple[Any, Any], rows: Any) -> Array:
        examples, penalties = given
        pairs = zip(jax.tree.leaves(jax.tree.broadcast(penalties, params)), jax.tree.leaves(params))
        return loss(params, examples, rows) + sum(jnp.sum(strength * w**2) for strength, w in pairs)

    return whole


def norm(tree: Any) -> Array:
    """Euclidean norm of a whole tree."""
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def logit(momentum: float) -> float:
    """The number whose logistic is a momentum, written as the authors wrote it."""
    return -math.log(1 / momentum - 1)


# ---- figure1_toy_2d


def toy(w: Array, meta: Any = None, step: Any = None) -> Array:
    """A valley that bends, squashed."""
    r = 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2 + 200 * w[0]
    return 800 * jax.nn.sigmoid(r / 500)


def figure1(setting: Setting) -> Arrays:
    """Three meta-iterations of gradient descent with momentum on the schedules of a toy problem."""
    steps = 50

    def objective(log_alpha: Array, logit_beta: Array) -> Any:
        hypers = {"learning_rate": jnp.exp(log_alpha), "momentum": jax.nn.sigmoid(logit_beta)}
        trained = hg.train(
            toy,
            jnp.array([1.4, 3.9]),
            hypers,
            steps=steps,
            optimizer=maclaurin_2015(),
            adjoint=hg.Reversible(),
            watch=lambda snapshot: snapshot.params,
        )
        return toy(trained.params), {"learning_curves": trained.losses, "params": trained.watched}

    evaluate = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    hypers = [np.full(steps, -4.5), np.full(steps, logit(0.99))]
    velocity = [np.zeros(steps), np.zeros(steps)]
    stored: list[Arrays] = []
    for _ in range(3):
        (loss, curves), hypergradient = evaluate(*hypers)
        stored.append({"train_loss": loss, "log_alphas": hypers[0], "invlogit_betas": hypers[1], **curves})
        velocity = [0.9 * u - (1 - 0.9) * np.asarray(g) for u, g in zip(velocity, hypergradient)]
        hypers = [h + 0.010 * u for h, u in zip(hypers, velocity)]
    return {name: np.stack([x[name] for x in stored]) for name in stored[0]}


# ---- schedule_beta_0.9_meta_step_0.04 and mean_initial_hypergradient_50_seeds

SIZES, STEPS, GROUPS = (784, 50, 50, 50, 10), 100, 8


def schedules(beta: float) -> np.ndarray:
    """(1608,) the start: log initial scales (8,), log rates (100, 8), logits of momenta (100, 8)."""
    shape = (STEPS, GROUPS)
    parts = [np.full(GROUPS, -3.0), np.full(shape, -1.0), np.full(shape, logit(beta))]
    return np.concatenate([x.ravel() for x in parts])


@functools.cache
def scheduled() -> Callable[..., Any]:
    """Train with schedules: ``(hyper, normal, rows, splits) -> ((train loss, measured), hypergradient)``.

    hyper: (1608,) as `schedules` gives it.
    normal: (44860,) standard normal draws, to become the initial weights.
    rows: (100, 200) of the training split.
    splits: ``(images, labels)`` to train, validate and test on.
    """
    loss, apply, everything = classifier(SIZES), nets.mlp(SIZES)[1], slice(None)

    def outer(hyper: Array, normal: Array, rows: Array, splits: Sequence[Any]) -> Any:
        log_scale, log_alpha, logit_beta = jnp.split(hyper, [GROUPS, GROUPS + GROUPS * STEPS])
        weights, structure = jax.tree.flatten(layers(normal, SIZES))
        start = structure.unflatten([jnp.exp(s) * w for s, w in zip(log_scale, weights)])
        by_group = [x.reshape(STEPS, GROUPS).T for x in (jnp.exp(log_alpha), jax.nn.sigmoid(logit_beta))]
        rates, momenta = (structure.unflatten(list(x)) for x in by_group)
        trained = hg.train(
            loss,
            start,
            {"learning_rate": rates, "momentum": momenta},
            splits[0],
            rows,
            steps=STEPS,
            optimizer=maclaurin_2015(),
            adjoint=hg.Reversible(bits=2),
        )
        train, valid, tests = (loss(trained.params, split, everything) for split in splits)
        error = nets.error_rate(apply(trained.params, splits[2][0]), splits[2][1])
        measured = {"train_loss": train, "valid_loss": valid, "tests_loss": tests, "test_err": error}
        return train, (measured, trained.losses)

    return jax.jit(jax.value_and_grad(outer, has_aux=True))


def splits(digits: Digits) -> list[tuple[Array, Array]]:
    """Rows to train, validate and test on, 10,000 each."""
    return [examples_of(digits, slice(k, k + 10_000)) for k in range(0, 30_000, 10_000)]


def schedule(setting: Setting) -> Arrays:
    """Learn rates and momenta of every step and layer, and initial scales, with the authors' Adam."""
    iterations, (b1, b2, eps, lam, step) = 3 if setting.fast else 50, (0.1, 0.01, 1e-4, 1e-4, 0.04)
    examples = splits(setting.digits)
    hyper, m, v = schedules(0.9), np.zeros(1608), np.zeros(1608)
    history, gradients, stored, curves = [hyper], [], [], []
    for i in tqdm(range(iterations), desc="schedule", leave=False):
        draws = seeded(0, i).randn(count(SIZES)), random_rows(i, STEPS)
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
    return {
        **{name: np.stack([x[name] for x in stored]) for name in stored[0]},
        "hypergrad_norm": np.linalg.norm(gradients, axis=1),
        "initial_hypergrad": gradients[0],
        "hyper_after_3": history[3],
        ("latest_hyper" if setting.fast else "final_hyper"): hyper,
        "batch_losses": np.stack(curves),
    }


def mean_hypergradient(setting: Setting) -> Arrays:
    """The hypergradient of the schedules at one place, averaged over 50 starts and orders of the data.

    A mean cannot be had from fewer; the fast pass computes one hypergradient that the authors saved.
    """
    beta, seeds, name = (0.9, 1, "initial_hypergrad") if setting.fast else (0.5, 50, "mean_hypergradient")
    examples, total = splits(setting.digits), np.zeros(1608)
    for i in tqdm(range(seeds), desc="mean of seeds", leave=False):
        draws = seeded(0, i).randn(count(SIZES)), random_rows(i, STEPS)
        total += scheduled()(schedules(beta), *draws, examples)[1]
    return {name: total / seeds}


# ---- chaos_learning_rate_wiggle


def chaos(setting: Setting) -> Arrays:
    """Final loss and its derivative in the log of the step size, at many step sizes."""
    sizes, steps = (784, 200, 50, 10), 50
    loss = classifier(sizes)
    start, examples = second_draw(sizes, -2.0), examples_of(setting.digits, slice(1000), centred=False)

    def outer(log_alpha: Array, start: Params, examples: Any, rows: Array) -> Array:
        trained = hg.train(
            loss,
            start,
            {"learning_rate": jnp.exp(log_alpha), "momentum": 0.9},
            examples,
            rows,
            steps=steps,
            optimizer=maclaurin_2015(),
            adjoint=hg.Reversible(),
        )
        return loss(trained.params, examples, slice(None))

    evaluate = jax.jit(jax.value_and_grad(outer))
    step = 1 if setting.all_points else 66 if setting.fast else 4
    points = np.union1d(np.arange(0, 1000, step), [] if setting.fast else [999]).astype(int)
    log_alpha = np.linspace(0.5, 2.5, 1000)[points]
    rows = cyclic_rows(steps)
    pairs = [evaluate(x, start, examples, rows) for x in tqdm(log_alpha, desc="chaos", leave=False)]
    losses, hypergradients = (np.array(x) for x in zip(*pairs))
    return {"point": points, "log_alpha": log_alpha, "loss": losses, "dloss_dlogalpha": hypergradients}


# ---- init_distribution_1


def init_distribution(setting: Setting) -> Arrays:
    """Learn the distribution of the initial weights, as the bins of its inverse cumulative."""
    sizes, steps, everything = (784, 50, 10), 20, slice(None)
    loss = classifier(sizes, last=jnp.tanh)
    stream = np.random.RandomState(2)
    stream.randn(count(sizes))  # the velocity
    uniform = stream.rand(count(sizes))
    examples = examples_of(setting.digits, slice(1000), centred=False)

    def outer(bins: Array, uniform: Array, examples: Any, rows: Array) -> Any:
        weights = jnp.interp(uniform, jnp.linspace(0, 1, len(bins)), bins)
        trained = hg.train(
            loss,
            layers(weights, sizes),
            {"learning_rate": 1.0, "momentum": 0.9},
            examples,
            rows,
            steps=steps,
            optimizer=maclaurin_2015(),
            adjoint=hg.Reversible(),
            watch=lambda snapshot: loss(snapshot.params, examples, everything),
        )
        final = loss(trained.params, examples, everything)
        return final, jnp.append(trained.watched[1:], final)  # after steps 1 to 20

    evaluate = jax.jit(jax.value_and_grad(outer, has_aux=True))
    bins = np.linspace(-1, 1, 20) * np.exp(-3.0)
    history, curves = [], []
    for _ in range(10):
        (_, curve), gradient = evaluate(bins, uniform, examples, cyclic_rows(steps))
        history.append(bins)
        curves.append(np.asarray(curve))
        d = np.asarray(gradient)
        bins = bins - 0.002 * d
        bins[[0, 19]] -= 0.002 * d[[0, 1]]  # a slip of theirs: d[1] where d[19] was meant
        bins = np.sort(bins)
    named = {f"learning_curve_{k}": curves[k] for k in (0, 1, 2, 5, 9)}
    return {**named, "final_loss": np.stack(curves)[:, -1], "bins": np.stack(history)}


# ---- train_short_whetlab_init


def train_short(setting: Setting) -> Arrays:
    """One run, without a hypergradient."""
    loss, apply, everything = classifier(SIZES), nets.mlp(SIZES)[1], slice(None)

    def whole(normal: Array, splits: Sequence[Any], rows: Array) -> Any:
        trained = hg.train(
            loss,
            layers(np.exp(-1.63) * normal, SIZES),
            {"learning_rate": np.exp(0.887), "momentum": 1 / (1 + np.exp(-0.403))},
            splits[0],
            rows,
            steps=STEPS,
            optimizer=maclaurin_2015(),
            adjoint=hg.Reversible(),
            watch=lambda snapshot: {
                "learning_curve": loss(snapshot.params, splits[0], everything),
                "grad_norm": norm(snapshot.gradient),
                "weight_norm": norm(snapshot.params),
                "velocity_norm": norm(snapshot.state["velocity"]),
            },
        )
        train, valid, tests = (loss(trained.params, split, everything) for split in splits)
        return {
            **trained.watched,
            "train_loss": train,
            "valid_loss": valid,
            "tests_loss": tests,
            "test_err": nets.error_rate(apply(trained.params, splits[2][0]), splits[2][1]),
            "final_weights_first_50": trained.params[0].weights.ravel()[:50],
            "final_weight_norm": norm(trained.params),
        }

    draws = seeded(0, 1).randn(count(SIZES)), splits(setting.digits), random_rows(1, STEPS)
    return {name: np.asarray(x) for name, x in jax.jit(whole)(*draws).items()}


# ---- distill_logistic_30_images


def distill(setting: Setting) -> Arrays:
    """Learn 30 training images, three of each digit, and the L2 penalty under which to train on them."""
    sizes, steps, everything = (784, 10), 20, slice(None)
    loss, apply = classifier(sizes), nets.mlp(sizes)[1]
    regularised, labels = penalised(loss), jnp.arange(30) % 10
    rows = (10 * (np.arange(steps) % 3))[:, None] + np.arange(10)[None]
    valid, tests = examples_of(setting.digits, slice(10_000)), examples_of(setting.tests, everything)

    def outer(learned: tuple[Array, Array], start: Params, valid: Any, tests: Any) -> Any:
        log_penalty, images = learned
        given = (images, labels), jnp.exp(log_penalty)
        trained = hg.train(
            regularised,
            start,
            {"learning_rate": 1.0, "momentum": 0.9},
            given,
            rows,
            steps=steps,
            optimizer=maclaurin_2015(),
            watch=lambda snapshot: regularised(snapshot.params, given, everything),
        )
        objective = loss(trained.params, valid, everything) + 0.001 * jnp.sum(images**2)
        return objective, {
            "learning_curve": jnp.append(trained.watched, regularised(trained.params, given, everything)),
            "valid_loss": objective,
            "test_loss": loss(trained.params, tests, everything),
            "test_err": nets.error_rate(apply(trained.params, tests[0]), tests[1]),
            "fake_scale": jnp.std(images) / jnp.std(valid[0]),
            "L2": jnp.exp(log_penalty),
        }

    evaluate = jax.jit(jax.value_and_grad(outer, has_aux=True))
    start = second_draw(sizes, -14.0)
    log_penalty, images = np.log(0.01), np.random.RandomState(0).randn(30, 784) * 2
    stored = []
    for _ in tqdm(range(4 if setting.fast else 100), desc="distill", leave=False):
        (_, measured), gradient = evaluate((log_penalty, images), start, valid, tests)
        stored.append(measured)
        log_penalty, images = (x - 2.0 * np.asarray(g) for x, g in zip((log_penalty, images), gradient))
    arrays = {name: np.stack([x[name] for x in stored]) for name in stored[0]}
    ended = {
        "final_fake_data_rows_0_1": images[:2],
        "final_fake_data_norm": np.linalg.norm(images),
        "final_fake_data_row_norms": np.linalg.norm(images, axis=1),
        "final_fake_data_row_means": images.mean(axis=1),
    }
    curves = {"learning_curve_first10": arrays.pop("learning_curve")[:10], "images": images}
    return arrays | curves | ({} if setting.fast else ended)


# ---- per_weight_L2_logistic


def per_weight(setting: Setting) -> Arrays:
    """Learn an L2 penalty for every weight of a logistic regression: Fig. 4 of the paper."""
    sizes, steps, everything = (784, 10), 50, slice(None)
    loss, rows = classifier(sizes), np.arange(100 * steps).reshape(steps, 100)
    regularised = penalised(loss)
    bounds = (0, 10_000), (10_000, 20_000), (20_000, 21_000)
    examples = [examples_of(setting.digits, slice(*pair)) for pair in bounds]

    def outer(log_penalties: Array, start: Params, splits: Sequence[Any]) -> Any:
        given = splits[0], layers(jnp.exp(log_penalties), sizes)
        trained = hg.train(
            regularised,
            start,
            {"learning_rate": 1.0, "momentum": 0.9},
            given,
            rows,
            steps=steps,
            optimizer=maclaurin_2015(),
            watch=lambda snapshot: regularised(snapshot.params, given, everything),
        )
        valid, tests = (loss(trained.params, split, everything) for split in splits[1:])
        penalties = given[1][0].weights
        return valid, {
            "learning_curve": jnp.append(trained.watched, regularised(trained.params, given, everything)),
            "valid_loss": valid,
            "test_loss": tests,
            "L2": penalties,
            "L2_norm_by_iter": norm(penalties),
        }

    evaluate = jax.jit(jax.value_and_grad(outer, has_aux=True))
    log_penalties, start, stored = np.full(count(sizes), np.log(0.01) + 1), second_draw(sizes, -4.0), []
    for _ in tqdm(range(2 if setting.fast else 10), desc="penalties", leave=False):
        (_, measured), gradient = evaluate(log_penalties, start, examples)
        stored.append(measured)
        log_penalties = log_penalties - 100 * np.asarray(gradient)
    arrays = {name: np.stack([x[name] for x in stored]) for name in stored[0]}
    last = arrays.pop("L2")[-1]
    return arrays | {("L2" if setting.fast else "L2_last"): last}


# ---- L2_granularity_logistic


def granularity(setting: Setting) -> Arrays:
    """Learn log L2 penalties from 200 images: one for all weights, then by layer, then by input pixel."""
    sizes, steps, everything = (784, 10), 200, slice(None)
    loss = classifier(sizes)
    order = seeded(0, "top_rs").permutation(60_000)
    train, tests = (examples_of(setting.digits, order[part]) for part in (slice(200), slice(200, 1200)))

    def outer(log_penalty: Array, start: Params, train: Any, rows: Array, judged: Any) -> Array:
        trained = hg.train(
            penalised(loss),
            start,
            {"learning_rate": 1.0, "momentum": 0.8},
            (train, layers(jnp.exp(log_penalty), sizes)),
            rows,
            steps=steps,
            optimizer=maclaurin_2015(),
        )
        return loss(trained.params, judged, everything)

    def rows(among: int) -> np.ndarray:
        return np.stack([seeded(0, t, "primal").randint(among, size=50) for t in range(steps)])

    evaluate, differentiate = jax.jit(outer), jax.jit(jax.grad(outer))
    stages = [(stage, h) for stage, length in enumerate((10, 5, 3)) for h in range(length)]
    log_penalty, losses, history = np.full(count(sizes), -6.0), [], []
    for stage, h in tqdm(stages[:3] if setting.fast else stages, desc="granularity", leave=False):
        draws = layers(seeded(0, stage, h, "hyperloss").randn(count(sizes)), sizes)
        start = (nets.Dense(draws[0].weights / np.sqrt(784), draws[0].biases),)
        history.append(log_penalty[:7840:10])
        losses.append(evaluate(log_penalty, start, train, rows(200), tests))
        mixed = seeded(0, stage, h, "hyperloss").permutation(200)
        fitted, valid = (tuple(x[part] for x in train) for part in (mixed[:100], mixed[100:]))
        gradient = np.asarray(differentiate(log_penalty, start, fitted, rows(100), valid))
        weights = gradient[:7840].reshape(784, 10)
        pooled = weights.mean(axis=1, keepdims=True) if stage == 2 else weights.mean()
        pooled = np.broadcast_to(pooled, (784, 10)).ravel()
        log_penalty = log_penalty - 10_000 * np.concatenate([pooled, np.zeros(10)])
    return {"test_loss": np.stack(losses), "reg": np.stack(history, axis=1)}


# ---- optimize_all_sign_steps


def sign_steps(setting: Setting) -> Arrays:
    """Learn penalties, initial scales, rates and momenta together, by steps of 0.05 either way."""
    sizes, steps, everything = (784, 200, 10), 50, slice(None)
    loss = classifier(sizes)
    examples = [examples_of(setting.digits, slice(k, k + 1000)) for k in (0, 1000, 2000)]

    def outer(hyper: Array, i: Array, normal: Array, rows: Array, splits: Sequence[Any]) -> Any:
        log_penalty, log_scale, log_alpha, logit_beta = jnp.split(hyper, [4, 8, 8 + steps])
        weights, structure = jax.tree.flatten(layers(normal, sizes))
        trained = hg.train(
            penalised(loss),
            structure.unflatten([jnp.exp(s) * w for s, w in zip(log_scale, weights)]),
            {"learning_rate": jnp.exp(log_alpha), "momentum": jax.nn.sigmoid(logit_beta)},
            (splits[0], structure.unflatten(list(jnp.exp(log_penalty)))),
            rows,
            steps=steps,
            optimizer=maclaurin_2015(),
            watch=lambda snapshot: jax.lax.cond(
                (snapshot.step == 45) | ((i == 0) & (snapshot.step % 5 == 0)),
                lambda: loss(snapshot.params, splits[0], everything),
                lambda: jnp.nan,
            ),
        )
        train, valid, tests = (loss(trained.params, split, everything) for split in splits)
        measured = {"train_loss": train, "valid_loss": valid, "tests_loss": tests, "hyper": hyper}
        return valid, (measured, trained.watched[::5])

    evaluate = jax.jit(jax.value_and_grad(outer, has_aux=True))
    starts = [np.full(4, -6.0), np.full(4, -3.0), np.full(steps, -1.0), np.full(steps, logit(0.9))]
    hyper, stored, curves = np.concatenate(starts), [], []
    for i in tqdm(range(6 if setting.fast else 200), desc="sign steps", leave=False):
        normal = np.random.RandomState(i).randn(count(sizes))
        rows = np.stack([np.random.RandomState(1000 * i + j).randint(1000, size=5) for j in range(steps)])
        (_, (measured, curve)), gradient = evaluate(hyper, i, normal, rows, examples)
        stored.append(measured)
        curves.append(curve)
        hyper = hyper - 0.05 * np.sign(gradient)
    arrays = {name: np.stack([x[name] for x in stored[::5]]) for name in stored[0]}
    return arrays | {"learning_curve_0": curves[0], "learning_curve_final": np.stack(curves)[:, -1]}


# ---- comparison


def rounding(theirs: np.ndarray) -> np.ndarray:
    """Half a unit in the last of six significant digits of every number: what rounding may have done."""
    exponents = [int(f"{abs(x):e}".split("e")[1]) if np.isfinite(x) else 0 for x in theirs.ravel()]
    halves = 0.5 * 10.0 ** (np.array(exponents) - (DIGITS - 1.0))
    return np.where(theirs == 0, 0.0, halves.reshape(theirs.shape))


def compare(name: str, ours: np.ndarray, theirs: np.ndarray, apart: bool = False) -> Comparison:
    """Compare number by number; ours may be the beginning only.

    With `apart`, every number is measured by itself and not by the largest of its array.
    """
    theirs = np.atleast_1d(np.asarray(theirs, np.float64))
    ours = np.atleast_1d(np.asarray(ours, np.float64))
    theirs = theirs[tuple(map(slice, ours.shape))]
    difference = np.abs(ours - theirs)
    scale = np.abs(theirs) if apart else np.max(np.abs(theirs))
    beyond = np.maximum(difference - rounding(theirs), 0) / scale
    beyond = np.where(np.isnan(beyond), np.inf, beyond)  # a NaN agrees with nothing
    agreeing, agrees = float(np.mean(beyond == 0)), bool(np.all(beyond <= FLOOR))
    largest, relative = float(np.max(difference)), float(np.max(difference / scale))
    return Comparison(name, theirs.size, largest, relative, float(np.max(beyond)), agreeing, agrees)


def compare_all(ours: Arrays, theirs: Mapping[str, np.ndarray]) -> list[Comparison]:
    """Compare every array that the authors saved."""
    return [compare(name, ours[name], theirs[name]) for name in theirs if name in ours]


# Ends of the regions of log α, and what the reference's advice asks for there: nobody's arithmetic follows
# the others' beyond.  The loss is compared absolutely, the hypergradient relatively.
CHAOS_REGIONS = (
    (0.5, 1.5, True),
    (1.5, 1.85, True),
    (1.85, 2.1, False),
    (2.1, 2.2, False),
    (2.2, 2.6, False),
)
CHAOS_LOSS, CHAOS_GRADIENT = 1e-6, 1e-4
CHAOS_NOT_FINITE = 997  # the authors' hypergradients from this point on are not numbers


def compare_chaos(ours: Arrays, theirs: Mapping[str, np.ndarray]) -> list[Comparison]:
    """Compare region by region."""
    points = ours["point"]
    result = [compare("log_alpha", ours["log_alpha"], np.asarray(theirs["log_alpha"])[points])]
    for low, high, judged in CHAOS_REGIONS:
        for name in ("loss", "dloss_dlogalpha"):
            inside = (ours["log_alpha"] >= low) & (ours["log_alpha"] < high)
            inside &= (name == "loss") | (points < CHAOS_NOT_FINITE)
            if not inside.any():
                continue
            a, b = ours[name][inside], np.asarray(theirs[name])[points[inside]]
            row = compare(f"{name}, log α in [{low}, {high})", a, b, apart=True)
            difference = np.abs(a - b) - rounding(b)
            asked = CHAOS_LOSS if name == "loss" else CHAOS_GRADIENT * np.abs(b)
            result.append(row._replace(agrees=bool(np.all(difference <= asked)) if judged else None))
    return result


HEADER = ("array", "numbers", "difference", "of scale", "beyond rounding", "six digits", "agrees")


def table(comparisons: Mapping[str, Sequence[Comparison]]) -> str:
    """The comparisons in words and numbers."""
    lines = [f"{HEADER[0]:46}" + "".join(f"{x:>16}" for x in HEADER[1:])]
    for name, rows in comparisons.items():
        lines.append(name)
        for row in rows:
            verdict = {True: "yes", False: "NO", None: "not asked"}[row.agrees]
            numbers = "".join(f"{x:16.1e}" for x in (row.difference, row.relative, row.beyond))
            lines.append(f"  {row.array:44}{row.numbers:16d}{numbers}{row.agreeing:16.1%}{verdict:>16}")
    return "\n".join(lines)


# ---- figures

LAYERS = ("784 × 50", "50 × 50, first", "50 × 50, second", "50 × 10")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(linestyle=["-", "--", "-.", ":"])
    + plt.cycler(color=["#000000", "#c04000", "#0060b0", "#808080"]),
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "axes.formatter.limits": (-3, 4),
    "lines.linewidth": 1.4,
    "savefig.dpi": 150,
}
# Colour and line style are both given, so that the cycle of the other lines does not move on.
AUTHORS = {"linestyle": "none", "color": "0.45", "marker": "o", "mfc": "none", "ms": 4}


def label(ax: plt.Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    """Title, labels of the axes, and a legend."""
    ax.set(title=title, xlabel=x, ylabel=y)
    if x in ("step", "meta-iteration"):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if legend:
        ax.legend()


def draw_figure1(axes: Sequence[plt.Axes], ours: Arrays, theirs: Arrays) -> None:
    """The paths over the loss surface, and the loss along them."""
    w1, w2 = np.meshgrid(np.linspace(-2.4, 2.4, 241), np.linspace(-0.5, 4.5, 201))
    surface = axes[0].contourf(w1, w2, toy(jnp.stack([w1, w2])), 16, cmap="Greys_r", alpha=0.5)
    axes[0].figure.colorbar(surface, ax=axes[0], label="loss")
    for i, marker in enumerate("os^"):
        about = {"marker": marker, "markevery": 7, "ms": 5, "label": f"meta-iteration {i + 1}"}
        axes[0].plot(*ours["params"][i].T, **about)
        axes[1].plot(ours["learning_curves"][i], **about)
        words = "authors, 2015" if i == 2 else None
        axes[1].plot(theirs["learning_curves"][i], **AUTHORS | {"ms": 3}, markevery=(2, 3), label=words)
    axes[0].plot(1.4, 3.9, "k*", ms=11, label="start")
    label(axes[0], "Paths of the weights", "first weight", "second weight")
    label(axes[1], "Learning curves", "step", "loss")


def layer_lines(ax: plt.Axes, values: np.ndarray, what: str) -> None:
    """One line over the steps for every layer's "weights" or "biases", out of (100, 8)."""
    for layer, name in enumerate(LAYERS):
        ax.plot(values[:, 2 * layer + ("weights", "biases").index(what)], label=name)


def parts(hyper: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Initial scales (8,), rates (100, 8) and momenta (100, 8) out of the long vector."""
    scale, rate, momentum = np.split(hyper, [GROUPS, GROUPS + GROUPS * STEPS])
    return scale, rate.reshape(STEPS, GROUPS), momentum.reshape(STEPS, GROUPS)


def draw_schedule(axes: Sequence[plt.Axes], ours: Arrays, theirs: Arrays) -> None:
    """Learning curves before and after, progress, and the learned schedules."""
    axes[0].plot(ours["batch_losses"][0], label="first meta-iteration")
    axes[0].plot(ours["batch_losses"][-1], label="last meta-iteration")
    iterations = np.arange(1, len(ours["train_loss"]) + 1)
    for name, words in (("train_loss", "training"), ("valid_loss", "validation")):
        axes[1].plot(iterations, ours[name], label=words)
    axes[1].plot(iterations, theirs["valid_loss"][: len(iterations)], **AUTHORS, label="authors, 2015")
    _, rate, momentum = parts(ours["final_hyper" if "final_hyper" in ours else "latest_hyper"])
    layer_lines(axes[2], rate, "weights")
    layer_lines(axes[3], 1 / (1 + np.exp(-momentum)), "weights")
    label(axes[0], "Learning curves", "step", "loss of the minibatch (nats)")
    label(axes[1], "Progress", "meta-iteration", "loss after training (nats)")
    label(axes[2], "Learned step sizes, weights of each layer", "step", "log step size")
    label(axes[3], "Learned momenta, weights of each layer", "step", "momentum", legend=False)


def draw_mean(axes: Sequence[plt.Axes], ours: Arrays, theirs: Arrays) -> None:
    """The hypergradient along the steps, layer by layer."""
    name = next(iter(ours))
    for k, hyper in ((0, "log step size"), (1, "logit of momentum")):
        values, authors = parts(ours[name])[k + 1], parts(theirs[name])[k + 1]
        for group, (ax, what) in enumerate(zip(axes[k::2], ("weights", "biases"))):
            layer_lines(ax, values, what)
            ax.plot(authors[:, group], **AUTHORS | {"ms": 3}, label=f"authors, {LAYERS[0]}")
            title = f"{hyper[0].upper()}{hyper[1:]}, {what}"
            label(ax, title, "step", f"d loss / d {hyper} (nats)", legend=False)
    handles = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(*handles, loc="outside lower center", ncols=5)


def draw_chaos(axes: Sequence[plt.Axes], ours: Arrays, theirs: Arrays) -> None:
    """Loss and hypergradient against the step size."""
    about = (
        ("loss", "Final loss", "loss"),
        ("dloss_dlogalpha", "Hypergradient", "|d loss / d log step size|"),
    )
    for ax, (name, title, words) in zip(axes, about):
        end = CHAOS_NOT_FINITE if name == "dloss_dlogalpha" else None
        authors = theirs["log_alpha"][:end], np.abs(theirs[name])[:end]
        ax.plot(*authors, color="0.6", lw=1, ls="-", label="authors, 2015")
        ax.plot(ours["log_alpha"], np.abs(ours[name]), "k.", ms=4, label="reversible engine")
        ax.set(yscale="log", xlim=(0.5, 2.5))
        ax.axvspan(2.2, 2.5, color="0.88", zorder=0, label="chaotic")
        ax.axvline(1.85, color="k", lw=1, ls=":", label="compared up to here")
        label(ax, title, "log step size", f"{words} (nats)")


def draw_init(axes: Sequence[plt.Axes], ours: Arrays, theirs: Arrays) -> None:
    """The distribution before and after, and the learning curves."""
    share, steps = np.linspace(0, 1, 20), np.arange(1, 21)
    axes[0].plot(share, ours["bins"][0], label="before")
    axes[0].plot(share, ours["bins"][-1], label="after 9 updates")
    axes[0].plot(share, theirs["bins"][-1], **AUTHORS, label="authors, 2015")
    for k, words in ((0, "first meta-iteration"), (9, "last meta-iteration")):
        axes[1].plot(steps, ours[f"learning_curve_{k}"], label=words)
    axes[1].plot(steps, theirs["learning_curve_9"], **AUTHORS, label="authors, 2015")
    label(axes[0], "Inverse cumulative distribution", "share of the weights below", "initial weight")
    label(axes[1], "Learning curves", "step", "loss on 1000 images (nats)")


def draw_short(axes: Sequence[plt.Axes], ours: Arrays, theirs: Arrays) -> None:
    """What was measured along the run."""
    about = {
        "learning_curve": ("Loss on 10,000 images", "loss (nats)"),
        "grad_norm": ("Gradient of the minibatch", "norm (nats)"),
        "weight_norm": ("Weights", "norm"),
        "velocity_norm": ("Velocity", "norm (nats)"),
    }
    for ax, (name, (title, words)) in zip(axes, about.items()):
        ax.plot(theirs[name], **AUTHORS, markevery=3, label="authors, 2015")
        ax.plot(ours[name], color="k", ls="-", label="reversible engine")
        label(ax, title, "step", words)


# ---- the table of experiments


class Experiment(NamedTuple):
    """One of the authors' experiments.

    compute: from a setting to our arrays, those of theirs under the same names.
    draw: fills the panels of its figure from our arrays and theirs.
    panels: rows and columns of the figure.
    needs_data: whether MNIST is needed.
    compare: from our arrays and theirs to rows of the table.
    also: other reference files with arrays to compare with.
    """

    compute: Callable[[Setting], Arrays]
    draw: Callable[[Sequence[plt.Axes], Arrays, Arrays], None]
    panels: tuple[int, int] = (1, 2)
    needs_data: bool = True
    compare: Callable[[Arrays, Arrays], list[Comparison]] = compare_all
    also: tuple[str, ...] = ()


SCHEDULE = "schedule_beta_0.9_meta_step_0.04"
EXPERIMENTS = {
    "figure1_toy_2d": Experiment(figure1, draw_figure1, needs_data=False),
    SCHEDULE: Experiment(schedule, draw_schedule, (2, 2)),
    "mean_initial_hypergradient_50_seeds": Experiment(
        mean_hypergradient, draw_mean, (2, 2), also=(SCHEDULE,)
    ),
    "chaos_learning_rate_wiggle": Experiment(chaos, draw_chaos, (2, 1), compare=compare_chaos),
    "init_distribution_1": Experiment(init_distribution, draw_init),
    "train_short_whetlab_init": Experiment(train_short, draw_short, (2, 2)),
    "distill_logistic_30_images": Experiment(distill, draw_short, (2, 2)),
    "per_weight_L2_logistic": Experiment(per_weight, draw_short, (2, 2)),
    "L2_granularity_logistic": Experiment(granularity, draw_short, (2, 2)),
    "optimize_all_sign_steps": Experiment(sign_steps, draw_short, (2, 2)),
}


def read_reference(folder: Path, name: str) -> Arrays:
    """The arrays that the authors saved of an experiment, and of those that it also refers to."""
    names = (*EXPERIMENTS[name].also, name)
    saved = [json.loads((folder / f"{x}.json").read_text())["reference"] for x in names]
    return {key: np.asarray(x) for part in saved for key, x in part.items()}


def read_digits(folder: str | None) -> tuple[Digits, Digits]:
    """MNIST as bytes: a float32 divided by 255 has only seven digits."""
    mnist = data.mnist(folder)
    train, test = (
        np.rint(x.reshape(len(x), -1) * 255).astype(np.uint8) for x in (mnist.train_images, mnist.test_images)
    )
    mean = train.mean(axis=0, dtype=np.float64) / 255
    return Digits(train, mnist.train_labels, mean), Digits(test, mnist.test_labels, mean)


def write(folder: Path, config: dict[str, Any], results: Mapping[str, tuple[float, Arrays, Any]]) -> None:
    """Write numbers and arrays, keeping those in the files of experiments that did not run this time."""
    numbers, arrays = folder / "reproduce_2015.json", folder / "reproduce_2015.npz"
    record = json.loads(numbers.read_text())["experiments"] if numbers.exists() else {}
    kept = dict(np.load(arrays)) if arrays.exists() else {}
    for name, (seconds, ours, comparisons) in results.items():
        rows = {c.array: {k: x for k, x in c._asdict().items() if k != "array"} for c in comparisons}
        record[name] = {"config": config, "seconds": round(seconds, 1), "comparisons": rows}
        kept = {k: x for k, x in kept.items() if not k.startswith(f"{name}/")}
        kept |= {f"{name}/{k}": x for k, x in ours.items()}
    head = {
        "digits": DIGITS,
        "floor": FLOOR,
        "experiments": {k: record[k] for k in EXPERIMENTS if k in record},
    }
    packed = io.BytesIO()
    np.savez_compressed(packed, **{k: kept[k] for k in sorted(kept)})
    replace_file(numbers, (json.dumps(head, indent=1, ensure_ascii=False) + "\n").encode())
    replace_file(arrays, packed.getvalue())


def draw(folder: Path, name: str, ours: Arrays, theirs: Arrays) -> None:
    """Draw the figure of an experiment."""
    rows, columns = EXPERIMENTS[name].panels
    with plt.rc_context(STYLE):
        size = (4.6 * columns if columns > 1 else 7, 3.4 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        EXPERIMENTS[name].draw(axes.ravel(), ours, theirs)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        replace_file(folder / f"reproduce_2015_{name}.png", picture.getvalue())
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Arrays]:
    """Run, compare, print and write; return our arrays by experiment.

    Raises SystemExit with status 1 where an array disagrees and 2 where a file is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce_2015", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--fast", action="store_true", help="a sixteenth of the work; writes nothing")
    parser.add_argument("--all-points", action="store_true", help="all 1000 step sizes, not every 4th")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--data-dir", help="folder that holds mnist/ (default: HYPERGRAD_DATA)")
    parser.add_argument("--reference", help="folder of the authors' results (default: HYPERGRAD_REFERENCE)")
    parser.add_argument("--output", help="folder to write to (default: figures; with --fast nothing)")
    options = parser.parse_args(arguments)
    reference = options.reference or os.environ.get("HYPERGRAD_REFERENCE")
    if not reference:
        parser.error("the authors' results are needed: pass --reference or set HYPERGRAD_REFERENCE")
    names = [name for name in EXPERIMENTS if name in options.only]
    folder = options.data_dir or os.environ.get("HYPERGRAD_DATA")
    if options.fast and not folder:
        for name in [name for name in names if EXPERIMENTS[name].needs_data]:
            print(f"skipped {name}: it needs MNIST (pass --data-dir or set HYPERGRAD_DATA)")
            names.remove(name)
        if not names:
            parser.error("nothing is left to run without HYPERGRAD_DATA")
    try:
        theirs = {name: read_reference(Path(reference), name) for name in names}
        needed = any(EXPERIMENTS[name].needs_data for name in names)
        digits = read_digits(folder) if needed else (None, None)
    except OSError as error:
        parser.error(f"{error}; --reference or HYPERGRAD_REFERENCE must be the folder of the results")
    except data.DataError as error:
        parser.error(f"{error} (or pass --data-dir)")

    setting = Setting(options.fast, options.all_points, *digits)
    results: dict[str, tuple[float, Arrays, list[Comparison]]] = {}
    for name in names:
        start = time.perf_counter()
        with jax.enable_x64(True):
            ours = {key: np.asarray(x) for key, x in EXPERIMENTS[name].compute(setting).items()}
        seconds = time.perf_counter() - start
        results[name] = seconds, ours, EXPERIMENTS[name].compare(ours, theirs[name])
        print(f"{name}: {seconds:.1f} s", flush=True)
    comparisons = {name: rows for name, (_, _, rows) in results.items()}
    print(table(comparisons))

    output = options.output or (None if options.fast else "figures")
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        versions = {"hypergrad": hg.__version__, "jax": jax.__version__, "numpy": np.__version__}
        config = {"fast": options.fast, "all_points": options.all_points, **versions}
        write(Path(output), config, results)
        for name, (_, ours, _) in results.items():
            draw(Path(output), name, ours, theirs[name])
    wrong = [
        f"{name}/{row.array}" for name, rows in comparisons.items() for row in rows if row.agrees is False
    ]
    if wrong:
        print("does not agree: " + ", ".join(wrong))
        raise SystemExit(1)
    return {name: ours for name, (_, ours, _) in results.items()}


if __name__ == "__main__":
    main()
