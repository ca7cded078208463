"""Whether a recipe fits the data: short inner trainings on the images that learning starts from."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import nets
from hypergrad._base.errors import readable_errors
from hypergrad._base.notebook import short_traceback
from hypergrad._base.progress import Progress
from hypergrad.adjoints.strategies import Stored
from hypergrad.distillation.distilled import standardised
from hypergrad.distillation.examples import Examples, check_examples, check_network
from hypergrad.distillation.recipe import Network, Recipe, in_words, train_with, with_numbers

LENGTHS = (20, 40, 80)  # numbers of steps that are tried, one after the other
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
LEAST = 0.1  # share of its loss that training must take off at least, or else it hardly learns
NEAR = 0.05  # how much of the best gain a lower rate may miss
REAL = 1000  # real examples on which a trial is judged


class _Losses(NamedTuple):
    """Losses after training, for every rate that was tried; the first is that without training.

    Attributes:
      own: on the examples that were trained on.
      real: on real examples.
    """

    own: np.ndarray
    real: np.ndarray


class Trial(NamedTuple):
    """Inner trainings on given examples.

    Attributes:
      network: ``(init, apply)``.
      inputs: ``(n, ...)`` examples to train on, normalized.
      labels: ``(n,)`` their classes.
      real: inputs and labels of real examples, to judge by.
      key: PRNG key of the trainings.
      teller: says what comes out.
    """

    network: Network
    inputs: Array
    labels: np.ndarray
    real: tuple[Array, Array]
    key: Array
    teller: Progress

    def losses(self, recipe: Recipe, rates: np.ndarray) -> _Losses:
        """Losses after training by the recipe at ``(k, T)`` learning rates, compiled once."""

        @jax.jit
        def run(
            x: Array, y: Array, real: tuple[Array, Array], key: Array, rates: Array
        ) -> tuple[Array, Array]:
            def one(rates: Array) -> tuple[Array, Array]:
                tried = with_numbers(recipe, {"learning_rate": rates})
                params = train_with(tried, self.network, x, y, key, Stored())
                own, found = (nets.cross_entropy(self.network[1](params, a), b) for a, b in ((x, y), real))
                return own, found

            return jax.lax.map(one, rates)

        real = self.real[0][:REAL], self.real[1][:REAL]
        given = np.concatenate([np.zeros((1, recipe.steps)), rates])
        with readable_errors():
            own, found = run(
                self.inputs, jnp.asarray(self.labels), real, self.key, jnp.asarray(given, self.inputs.dtype)
            )
            return _Losses(np.asarray(own), np.asarray(found))

    def fitting(self, recipe: Recipe | None) -> Recipe:
        """The recipe as it is, or a `chosen` one; says whether it hardly learns or explodes."""
        if recipe is None:
            return self.chosen()
        if self.teller.shown:
            self._warn(recipe, self.losses(recipe, np.asarray(recipe.rates())[None]), 1)
        return recipe

    def chosen(self) -> Recipe:
        """The recipe that fits best; says which, and why."""
        for steps in LENGTHS:
            self.teller.say(f"no recipe is given: trying {len(RATES)} learning rates for {steps} steps")
            recipe = Recipe(steps=steps)
            losses = self.losses(recipe, np.repeat(np.array(RATES)[:, None], steps, axis=1))
            k = best_rate(losses.real)
            if not hardly_learns(losses.own[0], losses.own[k]):
                break
        if k == 0:
            raise ValueError(
                f"{self.teller.name}(network, images, labels): at all learning rates from {RATES[0]:g} "
                f"to {RATES[-1]:g} training explodes; look for infinite numbers in the network, or give "
                "distill a recipe with lower rates"
            )
        recipe = dataclasses.replace(recipe, learning_rate=RATES[k - 1])
        own, real = (f"{x[0]:.3g} to {x[k]:.3g}" for x in losses)
        self.teller.say(
            f"chose {in_words(recipe)}: training on the {len(self.inputs)} examples to start from takes "
            f"their loss from {own}, and that of real examples from {real}"
        )
        self._warn(recipe, losses, k)
        return recipe

    def _warn(self, recipe: Recipe, losses: _Losses, k: int) -> None:
        """Say so if the run at the ``k``-th rate hardly learned, or exploded."""
        own, real = ((x[0], x[k]) for x in losses)
        exploded = not np.isfinite([own, real]).all() or real[1] > 10 * real[0]
        before, after = real if exploded else own
        examples = "real examples" if exploded else f"the {len(self.inputs)} examples to start from"
        change = f"of {in_words(recipe)}: the loss on {examples} goes from {before:.3g} to {after:.3g}"
        if exploded:
            self.teller.say(f"the inner training explodes, {change}; lower learning_rate")
        elif hardly_learns(before, after):
            self.teller.say(f"the inner training hardly learns, {change}; raise learning_rate or steps")


def hardly_learns(before: float, after: float) -> bool:
    """Whether training took hardly anything off a loss."""
    return bool(after > (1 - LEAST) * before)


def best_rate(real: np.ndarray) -> int:
    """The lowest rate that gains nearly as much as the best; 0 if training explodes at all rates.

    Args:
      real: ``(1 + k,)`` losses without training and at ``k`` ascending rates.

    >>> best_rate(np.array([2.3, 2.2, 1.01, 1.0, np.nan]))
    2
    """
    gains = np.where(np.isfinite(real[1:]), real[0] - real[1:], -np.inf)
    best = gains.max()
    return 1 + int(np.argmax(gains >= best - NEAR * abs(best))) if np.isfinite(best) else 0


@short_traceback
def recipe_for(
    network: Network,
    images: np.ndarray | Array,
    labels: np.ndarray | Array,
    *,
    per_class: int = 1,
    normalise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = standardised,
    key: Array | None = None,
    progress: bool = True,
) -> Recipe:
    """A recipe that works for the data, found by a few short inner trainings on real examples.

    Of eight learning rates from 0.01 to 30, it is the lowest whose loss on real examples after training
    falls nearly as far as that of the best.  Training is longer than 20 steps, 40 or 80, only where it
    hardly learns otherwise.

    Args:
      network: ``(init, apply)``, as for `distill`.
      images: ``(N, ...)`` real training images, or rows of a table, as for `distill`.
      labels: ``(N,)`` their classes, integers in ``[0, C)``.
      per_class: number of images for every class that will be learned.
      normalise: as for `distill`.
      key: PRNG key, by default ``jax.random.key(0)``.
      progress: say on stderr what was chosen, and why.

    Returns:
      A `Recipe`.

    Raises:
      ValueError: arguments do not fit each other, or training explodes at all learning rates.

    >>> import hypergrad as hg
    >>> digits = hg.data.digits()
    >>> logistic = hg.nets.mlp((64, 10))
    >>> hg.recipe_for(logistic, digits.train_images, digits.train_labels, progress=False).steps
    20
    """
    key = jax.random.key(0) if key is None else key
    images, labels = np.asarray(images), np.asarray(labels)
    call = f"recipe_for(network, images, labels, per_class={per_class})"
    classes = check_examples(call, images, labels, None, per_class, 0)
    check_network(call, network, Recipe(), images.shape, classes)
    start_key, shuffle_key, run_key = jax.random.split(key, 3)
    examples = Examples.of(call, (images, labels), normalise, 0, shuffle_key)
    hard, start = examples.start(per_class, None, start_key)
    return Trial(network, start, hard, examples.real, run_key, Progress("recipe_for", progress)).chosen()
