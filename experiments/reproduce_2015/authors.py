"""What the authors' experiments share: their momentum, random streams, data, and order of the weights."""

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hypergrad as hg
from hypergrad import data, nets
from hypergrad.program import Move, Optimizer, Scale, Shift

Arrays = dict[str, np.ndarray]
Params = tuple[nets.Dense, ...]
Examples = tuple[Array, Array]  # images (n, 784) and labels (n,)
EVERYTHING = slice(None)


class Digits(NamedTuple):
    """MNIST as bytes, for a float32 divided by 255 has only seven digits.

    pixels: (n, 784) uint8.
    labels: (n,) int32.
    mean: (784,) float64, the mean of the 60,000 training images, between 0 and 1.
    """

    pixels: np.ndarray
    labels: np.ndarray
    mean: np.ndarray


class Setting(NamedTuple):
    """How much of an experiment to run, and on what."""

    fast: bool
    all_points: bool = False
    digits: Digits | None = None
    tests: Digits | None = None


# ---- training


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


def train(
    loss: Any, start: Any, learning_rate: Any, momentum: Any, given: Any, rows: Any, **more: Any
) -> hg.Trained:
    """`hypergrad.train` by the authors' rule, one step for each of the rows."""
    hypers = {"learning_rate": learning_rate, "momentum": momentum}
    return hg.train(loss, start, hypers, given, rows, steps=len(rows), optimizer=maclaurin_2015(), **more)


def curve(loss: Any, start: Any, given: Any, rows: Any) -> tuple[Any, Array]:
    """Weights after training with α = 1 and β = 0.9, and the loss on everything from before to after."""
    trained = train(loss, start, 1.0, 0.9, given, rows, watch=lambda seen: loss(seen.params, given))
    return trained.params, jnp.append(trained.watched, loss(trained.params, given))


def stacked(stored: Sequence[Mapping[str, Any]]) -> Arrays:
    """What was stored at every meta-iteration, one array for each name."""
    return {name: np.stack([x[name] for x in stored]) for name in stored[0]}


def logit(momentum: float) -> float:
    """The number whose logistic is a momentum, written as the authors wrote it."""
    return -math.log(1 / momentum - 1)


# ---- random streams


def seeded(*what: Any) -> np.random.RandomState:
    """The authors' random stream of anything that prints: ``(0, iteration, step)``, or one word."""
    text = str(what if len(what) > 1 else what[0])
    digest = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    return np.random.RandomState(int(digest[:8], 16))


def consecutive(steps: int, size: int, among: int) -> np.ndarray:
    """(steps, size) the old runs' batches: slices of the first `among` rows in order, again and again."""
    return np.arange(steps * size).reshape(steps, size) % among


def random_rows(seed: int, steps: int) -> np.ndarray:
    """(steps, 200) the later runs' batches out of the first 10,000 rows."""
    return np.stack([seeded(0, seed, t).randint(10_000, size=200) for t in range(steps)])


def second_draw(sizes: Sequence[int], log_scale: float) -> Params:
    """Initial weights of the runs that drew a velocity first, and scaled it by 0."""
    stream = np.random.RandomState(0)
    stream.randn(count(sizes))
    return layers(stream.randn(count(sizes)) * np.exp(log_scale), sizes)


# ---- data and networks


def read_digits(folder: str | None) -> tuple[Digits, Digits]:
    """The two halves of MNIST, to train on and to test on."""
    mnist = data.mnist(folder)
    train, tests = (
        np.rint(x.reshape(len(x), -1) * 255).astype(np.uint8)
        for x in (mnist.train_images, mnist.test_images)
    )
    mean = train.mean(axis=0, dtype=np.float64) / 255
    return Digits(train, mnist.train_labels, mean), Digits(tests, mnist.test_labels, mean)


def examples(digits: Digits, rows: Any = EVERYTHING, centred: bool = True) -> Examples:
    """Images in float64, pixels divided by 255 and, if centred, less the mean image; and their labels."""
    images = digits.pixels[rows] / 255
    return jnp.asarray(images - digits.mean if centred else images), jnp.asarray(digits.labels[rows])


def splits(digits: Digits, *sizes: int) -> list[Examples]:
    """Consecutive examples to train, validate and test on."""
    ends = np.cumsum(sizes)
    return [examples(digits, slice(end - size, end)) for end, size in zip(ends, sizes)]


def layers(flat: Any, sizes: Sequence[int]) -> Params:
    """Weights and biases out of one vector, in the authors' order."""
    result, start = [], 0
    for inputs, outputs in itertools.pairwise(sizes):
        middle, end = start + inputs * outputs, start + (inputs + 1) * outputs
        result.append(nets.Dense(flat[start:middle].reshape(inputs, outputs), flat[middle:end]))
        start = end
    return tuple(result)


def by_leaf(numbers: Any, params: Params) -> Params:
    """A tree like the parameters with one of the numbers at each leaf."""
    return jax.tree.unflatten(jax.tree.structure(params), list(numbers))


def count(sizes: Sequence[int]) -> int:
    """How many weights and biases a network has."""
    return sum((a + 1) * b for a, b in itertools.pairwise(sizes))


def classifier(sizes: Sequence[int], last: Callable[[Array], Array] | None = None) -> Callable[..., Array]:
    """``loss(params, examples, rows)``: mean cross-entropy of a network on some or all rows, in nats."""
    apply = nets.mlp(sizes)[1]

    def loss(params: Params, examples: Examples, rows: Any = EVERYTHING) -> Array:
        images, labels = (x[rows] for x in examples)
        outputs = apply(params, images)
        return nets.cross_entropy(last(outputs) if last else outputs, labels)

    return loss


def penalised(sizes: Sequence[int]) -> Callable[..., Array]:
    """``loss(params, (examples, λ), rows)``: cross-entropy plus ``Σ λ w²``; λ may be a prefix tree."""
    loss = classifier(sizes)

    def whole(params: Params, given: tuple[Examples, Any], rows: Any = EVERYTHING) -> Array:
        examples, penalties = given
        penalties = jax.tree.broadcast(penalties, params)
        squares = jax.tree.map(lambda strength, w: jnp.sum(strength * w**2), penalties, params)
        return loss(params, examples, rows) + sum(jax.tree.leaves(squares))

    return whole


def judged(sizes: Sequence[int], params: Params, splits: Sequence[Examples]) -> dict[str, Array]:
    """Losses on examples to train, validate and test on, and the error rate on the last."""
    names, loss = ("train_loss", "valid_loss", "tests_loss"), classifier(sizes)
    losses = {name: loss(params, split) for name, split in zip(names, splits)}
    images, labels = splits[-1]
    return losses | {"test_err": nets.error_rate(nets.mlp(sizes)[1](params, images), labels)}
