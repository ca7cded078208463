"""How good a distilled set is: new networks trained on it and on baselines that need no learning."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import nets
from hypergrad._base.errors import readable_errors
from hypergrad._base.notebook import short_traceback
from hypergrad._base.progress import Progress
from hypergrad.distillation.augment import refuse_without_pictures
from hypergrad.distillation.baselines import class_means, rows_like
from hypergrad.distillation.distilled import Distilled
from hypergrad.distillation.ranking import Ranking
from hypergrad.distillation.recipe import Network, Recipe, in_words, numbers_of, with_numbers

FULL_BATCH = 256
FULL_RATES = (0.1, 0.3, 1.0, 3.0)  # candidates for SGD on all the data
FULL_EPOCHS = 5
FULL_STEPS = 300  # the least, for few data


class Score(NamedTuple):
    """Test accuracies of networks that were trained in the same way.

    Attributes:
      network: its name.
      examples: what it was trained on: "distilled", "hard labels" (the distilled images, each with its most
        probable label), "random real", "class means" or "full data".
      recipe: the name of the recipe.
      inits: origin of the initial weights: "fixed", "pool of n" or "random".
      accuracies: shares in [0, 1], one for every training run.
    """

    network: str
    examples: str
    recipe: str
    inits: str
    accuracies: np.ndarray

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Standard deviation over the training runs, not that of the mean."""
        return float(self.accuracies.std())


class Evaluation(NamedTuple):
    """What `evaluate` returns; prints as a table in percent, with the ranking of every network below.

    Attributes:
      scores: one for every network, training set and recipe.
    """

    scores: list[Score]

    def __str__(self) -> str:
        width = max(len(score.network) for score in self.scores)
        lines = [f"{'network':<{width}}  {'trained on':<12} {'recipe':<13} {'inits':<11} test accuracy, %"]
        for s in self.scores:
            number = f"{100 * s.mean:.2f} ± {100 * s.std:.2f} ({len(s.accuracies)})"
            lines.append(f"{s.network:<{width}}  {s.examples:<12} {s.recipe:<13} {s.inits:<11} {number}")
        return "\n".join([*lines, *map(str, self.rankings)])

    @property
    def rankings(self) -> list[Ranking]:
        """The label-robust score on every network that was also trained on the full data.

        Hard labels are learned by the first recipe that is not the set's own, plain SGD by default, from
        new initial weights; by the set's own if there is no other.
        """
        found = []
        for full in (s for s in self.scores if s.examples == "full data"):
            own, random = (self.score(x, "own", full.network) for x in ("distilled", "random real"))
            mine = [s for s in self.scores if s.network == full.network]
            hard = [s for s in mine if s.examples == "hard labels"]
            hard = hard or [s for s in mine if s.examples == "distilled"]
            chosen = next((s for s in hard if s.recipe != "own"), hard[-1])
            recovery, improvement = full.mean - chosen.mean, own.mean - random.mean
            found.append(Ranking(full.network, recovery, improvement, "own", own.inits, chosen.recipe))
        return found

    def score(
        self, examples: str, recipe: str, network: str | None = None, inits: str | None = None
    ) -> Score:
        """The first score with these names.

        Args:
          examples: see `Score`.
          recipe: see `Score`.
          network: any, if None.
          inits: any, if None.

        Raises:
          KeyError: there is no such score.
        """
        for s in self.scores:
            asked = (examples, recipe, network or s.network, inits or s.inits)
            if asked == (s.examples, s.recipe, s.network, s.inits):
                return s
        raise KeyError(f"no score of {network or 'any network'} on {examples} by {recipe}:\n{self}")

    def noted(self, distilled: Distilled) -> Distilled:
        """The distilled set with these scores among its metrics, ready to be saved.

        Args:
          distilled: the set.
        """
        metrics = [
            s._asdict() | {"accuracies": np.asarray(s.accuracies, float).tolist()} for s in self.scores
        ]
        rankings = [r._asdict() | {"alpha": r.alpha, "score": r.score} for r in self.rankings]
        noted = {"metrics": metrics, "rankings": rankings}
        return dataclasses.replace(distilled, about={**distilled.about, **noted})


def plain_recipe(examples: int) -> Recipe:
    """Ordinary SGD: 300 steps at 0.01 with momentum 0.9, all examples at once up to 256.

    Args:
      examples: in the training set.
    """
    batch = min(examples, FULL_BATCH)
    return Recipe(steps=300, learning_rate=0.01 / (1 - 0.9), batch_size=batch, shuffled=batch < examples)


def condensation_recipe(examples: int) -> Recipe:
    """The protocol of dataset condensation: 300 epochs of SGD.

    Learning rate 0.01, a tenth of it from the middle on, momentum 0.9, weight decay 5e-4, batches of 256.

    Args:
      examples: in the training set.

    Source: B. Zhao, K. Mopuri, H. Bilen, "Dataset condensation with gradient matching", ICLR 2021.
    """
    batch = min(examples, FULL_BATCH)
    steps = 300 * (examples // batch)
    rates = np.where(np.arange(steps) < steps // 2, 0.01, 0.001) / (1 - 0.9)
    return Recipe(
        steps=steps, learning_rate=rates, l2=5e-4 / 2, batch_size=batch, shuffled=batch < examples
    )


def full_recipe(examples: int, epochs: int | None, learning_rate: float) -> Recipe:
    """SGD on all the data: batches of 256, momentum 0.9, cosine decay.

    Args:
      examples: in the training set.
      epochs: passes over the data; None for 5, and for 300 steps at least.
      learning_rate: ``α`` at first; optax's is a tenth of it.
    """
    batch = min(examples, FULL_BATCH)
    steps = (FULL_EPOCHS if epochs is None else epochs) * (examples // batch)
    steps = max(steps, FULL_STEPS) if epochs is None else steps
    rates = learning_rate * np.cos(0.5 * np.pi * np.arange(steps) / steps) ** 2
    return Recipe(steps=steps, learning_rate=rates, batch_size=batch, shuffled=True)


@short_traceback
def evaluate(
    distilled: Distilled | Sequence[Distilled],
    networks: Mapping[str, Network],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    seeds: int = 20,
    recipes: Mapping[str, Recipe] | None = None,
    full_epochs: int | None = None,
    full_seeds: int = 3,
    key: Array | None = None,
    progress: bool = True,
) -> Evaluation:
    """Train new networks on a distilled set and on baselines that need no learning, and test them.

    Every network is trained by the set's own recipe (and, if that starts from fixed weights, by the same
    recipe from new ones too), by 300 steps of plain SGD, and by the protocol of dataset condensation.  Each
    of these uses the distilled images, random real ones with the same labels (different ones in every
    training run), and the class means with the same labels.  Every network is also trained on the full data
    by SGD, at the best of four rates on a held-out tenth.  From these come the scores of the field, hard
    label recovery and improvement over random; soft labels are made hard for the first of them.

    Args:
      distilled: a set, or several of the same size and recipe, whose scores are pooled.
      networks: ``(init, apply)`` by name.
      train: real ``(images, labels)``, for the baselines, or rows of a table and labels; in raw units, for
        everything is normalized here as the set says.
      test: ``(images, labels)`` to test on, in the same form; use them only once.
      seeds: training runs on every set, from keys that were not used in learning.
      recipes: recipes by name, in place of plain SGD and condensation's.
      full_epochs: number of epochs on the full data; by default 5, or as many as make 300 steps.
      full_seeds: training runs on the full data, 0 for none, and for no `Evaluation.rankings`.
      key: PRNG key, by default ``jax.random.key(1)``.
      progress: say on stderr what is trained.

    Returns:
      An `Evaluation`, to be printed.

    Raises:
      ValueError: the sets differ in size, or the data does not fit them.

    Source: for the protocol, B. Zhao, K. Mopuri, H. Bilen, ICLR 2021; for the ranking, see `Ranking`.

    >>> import hypergrad as hg
    >>> digits = hg.data.digits()
    >>> train = digits.train_images, digits.train_labels
    >>> logistic = hg.nets.mlp((64, 10))
    >>> made = hg.distill(logistic, *train, hg.Recipe(steps=5), meta_steps=100, progress=False)
    >>> test = digits.test_images, digits.test_labels
    >>> table = evaluate(
    ...     made, {"logistic": logistic}, train, test, seeds=3, recipes={}, full_seeds=0, progress=False
    ... )
    >>> table.score("distilled", "own").mean > table.score("random real", "own").mean
    True
    """
    sets = [distilled] if isinstance(distilled, Distilled) else list(distilled)
    _refuse(sets, networks, train, test, seeds, recipes)
    first, key = sets[0], jax.random.key(1) if key is None else key
    count = len(first.images)
    others = recipes
    if others is None:
        others = {"plain SGD": plain_recipe(count), "condensation": condensation_recipe(count)}
    # New networks by the set's own recipe, and also from its own initial weights if these are few.
    own = [first.recipe] if first.recipe.inits is None else [first.recipe, _anew(first.recipe)]
    plans = [*(("own", recipe) for recipe in own), *((n, r) for n, r in others.items())]
    labels = _probabilities(first.labels, train[1])
    test_inputs, test_labels = first.normalised(test[0]), jnp.asarray(test[1])
    keys = jax.random.split(key, seeds * len(sets))

    rows = [rows_like(labels.argmax(1), np.asarray(train[1]), jax.random.fold_in(k, 1)) for k in keys]
    means = class_means(np.asarray(train[0]), np.asarray(train[1]), labels.shape[1])
    repeated = lambda inputs: jnp.broadcast_to(inputs[None], (len(keys), *inputs.shape))  # noqa: E731
    learned = jnp.concatenate([jnp.stack([d.inputs] * seeds) for d in sets])
    own_labels = jnp.concatenate([jnp.stack([_probabilities(d.labels, train[1])] * seeds) for d in sets])
    compared = {
        "distilled": (learned, own_labels),
        "random real": (jnp.stack([first.normalised(train[0][r]) for r in rows]), repeated(labels)),
        "class means": (
            repeated(first.normalised(means[labels.argmax(1)].astype(np.float32))),
            repeated(labels),
        ),
    }
    hard = {"hard labels": (learned, jax.nn.one_hot(own_labels.argmax(-1), labels.shape[1]))}
    soft = any(np.ndim(d.labels) == 2 for d in sets)

    full = first.normalised(train[0]), jnp.asarray(train[1])
    teller = Progress("evaluate", progress)
    scores = []
    for name, network in networks.items():
        trainer = _Trainer(network, (test_inputs, test_labels), {})
        for k, (recipe_name, recipe) in enumerate(plans):
            # Those by which `rankings` judges hard labels: the last of the own ones, and the others.
            these = compared | (hard if soft and k >= len(own) - 1 else {})
            runs = f"{len(these)} x {len(keys)} trainings: {in_words(recipe)}"
            teller.say(f"{name}, recipe {recipe_name!r}, {runs}")
            for examples, given in these.items():
                found = trainer.accuracies(recipe, *given, keys)
                scores.append(Score(name, examples, recipe_name, _inits(recipe), found))
        if full_seeds:
            teller.say(
                f"{name}, all {len(full[0])} real examples, {len(FULL_RATES)} + {full_seeds} trainings"
            )
            found, rate = _on_all(trainer, full, full_epochs, jax.random.split(key, full_seeds))
            scores.append(Score(name, "full data", f"SGD at {rate:g}", "random", found))
    return Evaluation(scores)


class _Trainer(NamedTuple):
    """Trains a network and tests it.

    Attributes:
      network: ``(init, apply)``.
      test: inputs and labels to test on.
      compiled: what was compiled, by all of a recipe that is not a number, and so shared by recipes that
        differ only in numbers.
    """

    network: Network
    test: tuple[Array, Array]
    compiled: dict[Recipe, Callable[..., tuple[Array, Array]]]

    def accuracies(self, recipe: Recipe, *given: Array) -> np.ndarray:
        """Test accuracies of networks trained on ``(k, n, ...)`` inputs and their labels by ``k`` keys."""
        return self.results(recipe, *given)[0]

    def results(self, recipe: Recipe, *given: Array) -> tuple[np.ndarray, np.ndarray]:
        """`accuracies`, and the test losses."""
        alike = with_numbers(recipe, {"learning_rate": 0.1, "momentum": 0.5, "l2": 0.0})
        if alike not in self.compiled:
            self.compiled[alike] = _tested(self.network, alike)
        numbers = {**numbers_of(recipe), "learning_rate": recipe.rates()}
        with readable_errors():
            run = self.compiled[alike]
            right, loss = jax.device_get(run(jax.tree.map(jnp.asarray, numbers), self.test, *given))
        return right / len(self.test[1]), loss


def _tested(network: Network, alike: Recipe) -> Callable[..., tuple[Array, Array]]:
    """How many test examples trained networks get right, and their test losses, as a compiled function.

    Of the numbers of a recipe, test inputs and labels, ``(k, n, ...)`` inputs, their labels and ``k`` keys.
    """

    @jax.jit
    def run(numbers: dict[str, Array], test: tuple[Array, Array], *given: Array) -> tuple[Array, Array]:
        recipe = with_numbers(alike, numbers)

        def one(given: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            params = recipe.train(network, *given)
            logits = jax.lax.map(lambda x: network[1](params, x[None])[0], test[0], batch_size=1000)
            return jnp.sum(jnp.argmax(logits, axis=1) == test[1]), nets.cross_entropy(logits, test[1])

        return jax.lax.map(one, given)

    return run


def _on_all(
    trainer: _Trainer, full: tuple[Array, Array], epochs: int | None, keys: Array
) -> tuple[np.ndarray, float]:
    """Test accuracies after training on all the data, and the rate: that with the best held-out tenth.

    Of rates with the same accuracy there, which is common where few are held out, that of the least loss.
    """
    order = jax.random.permutation(jax.random.fold_in(keys[0], 2), len(full[0]))
    held = max(1, len(order) // 10)
    kept, unseen = ((full[0][rows], full[1][rows]) for rows in (order[held:], order[:held]))
    judge = trainer._replace(test=unseen, compiled={})
    given = (kept[0][None], kept[1][None], keys[:1])

    def quality(rate: float) -> tuple[float, float]:
        accuracy, loss = judge.results(full_recipe(len(kept[0]), epochs, rate), *given)
        return accuracy.item(), -np.nan_to_num(loss, nan=np.inf).item()

    rate = max(FULL_RATES, key=quality)
    recipe = full_recipe(len(order), epochs, rate)
    accuracies = [trainer.accuracies(recipe, *(x[None] for x in full), key[None]) for key in keys]
    return np.concatenate(accuracies), rate


def _anew(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, inits=None)


def _inits(recipe: Recipe) -> str:
    return {None: "random", 1: "fixed"}.get(recipe.inits, f"pool of {recipe.inits}")


def _probabilities(labels: Any, real: Any) -> np.ndarray:
    labels = np.asarray(labels)
    return labels if labels.ndim == 2 else np.eye(int(np.max(real)) + 1, dtype=np.float32)[labels]


def _refuse(
    sets: list[Distilled],
    networks: Mapping[str, Network],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    seeds: int,
    recipes: Mapping[str, Recipe] | None,
) -> None:
    if not sets or len({np.shape(d.images) for d in sets}) > 1 or len({d.recipe.steps for d in sets}) > 1:
        shapes = [np.shape(d.images) for d in sets]
        raise ValueError(
            f"evaluate(distilled=...) with sets of {shapes}: scores are pooled over sets that were made "
            "alike. Pass one set, or several of the same shape and steps"
        )
    if not networks:
        raise ValueError('evaluate(networks={}): pass one or more, as {"name": (init, apply)}')
    if seeds < 1:
        raise ValueError(f"evaluate(seeds={seeds}): at least one training is needed")
    shape = np.shape(sets[0].images)[1:]
    what = "inputs" if len(shape) == 1 else "images"
    for recipe in (sets[0].recipe, *(recipes or {}).values()):
        refuse_without_pictures("evaluate(distilled, ...)", recipe.augmentation, np.shape(sets[0].images))
    for name, (images, labels) in (("train", train), ("test", test)):
        if np.shape(images)[1:] != shape or len(images) != len(labels):
            raise ValueError(
                f"evaluate({name}=...) with {what} {np.shape(images)} and {len(labels)} labels: the set's "
                f"{what} are {shape}. Pass the data it was made from, in the same raw units"
            )
        if not np.issubdtype(np.asarray(images).dtype, np.floating):
            raise ValueError(
                f"evaluate({name}=...) with {what} of {np.asarray(images).dtype}: the set was made from "
                f"floats. Pass the {what} in the units that distill was given"
            )
