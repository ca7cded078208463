"""`distill`: a few learned examples on which a network learns what it would learn from all data."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from hypergrad import constraints, files, nets
from hypergrad._base.checks import is_whole
from hypergrad._base.errors import outside, readable_errors
from hypergrad._base.notebook import short_traceback
from hypergrad._base.progress import Progress
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.strategies import Adjoint, Truncated
from hypergrad.distillation.baselines import rows_like
from hypergrad.distillation.distilled import (
    Distilled,
    array_or_none,
    checksum_of,
    described,
    shapes_in_words,
    standardised,
)
from hypergrad.distillation.examples import Examples, check_examples, check_network
from hypergrad.distillation.recipe import (
    NUMBERS,
    UNOPTIMIZED,
    Network,
    Recipe,
    numbers_of,
    train_with,
    with_numbers,
)
from hypergrad.distillation.trial import Trial
from hypergrad.meta.checkpoints import locked
from hypergrad.meta.lbfgsb import LBFGSB
from hypergrad.meta.outer_loop import check_settings, minimize
from hypergrad.meta.runs import Callback, Judge, Optimized, Settings, scorer

LONG = 40  # number of steps from which chaos is checked for
LOOK_EVERY = 20  # meta-steps between two evaluations on the held-out examples
_UNSEEN = 2**31  # run numbers from here on are for validation, those below it for learning


class ChaosWarning(RuntimeWarning):
    """The hypergradient grows with the length of the inner training."""


@short_traceback
def distill(
    network: Network,
    images: np.ndarray | Array,
    labels: np.ndarray | Array,
    recipe: Recipe | None = None,
    *,
    per_class: int = 1,
    learn: Sequence[str] = ("images", "learning_rate"),
    start: np.ndarray | Array | None = None,
    bases: int | None = None,
    normalise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = standardised,
    window: int | None = None,
    runs: int = 1,
    real_batch: int | None = 2000,
    validation: int | None = None,
    meta_steps: int = 500,
    optimizer: optax.GradientTransformation | LBFGSB | None = None,
    adjoint: Adjoint | None = None,
    key: Array | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> Distilled:
    """Learn a few examples such that a network trained on them does well on real ones.

    A meta-optimizer follows the hypergradient, in everything that is learned, of the loss on real examples
    after a whole training run.  Learning rates and the penalty stay positive, the momentum between 0 and 1.
    For recipes of 40 steps or more the first hypergradients are tested for chaos.  Images may be gray or in
    color, or rows of a table; what is said here of images holds for rows too.

    Args:
      network: ``(init, apply)``: from a key to parameters, and from parameters and ``(n, ...)`` inputs to
        ``(n, C)`` logits; such as `hypergrad.nets.convnet` returns.
      images: ``(N, ...)`` real training images: ``(N, height, width)``, ``(N, height, width, channels)``,
        or rows of a table, ``(N, features)``.
      labels: ``(N,)`` their classes, integers in ``[0, C)``.
      recipe: recipe of the inner training; those of its numbers that are learned begin there.  By default
        the one that `recipe_for` finds by a short trial.
      per_class: number of learned images for every class.
      learn: what is learned: any of "images" (or "inputs", which is the same), "labels" (soft ones),
        "learning_rate" (one for every step), "momentum" and "l2".
      start: ``(per_class * C, ...)`` first images in raw units, image ``i`` of class ``i mod C``; by
        default real ones.
      bases: number of shared bases, of which the images are learned as linear combinations; None for free
        images.
      normalise: function from the training images to the ``(mean, std)`` in ``(image - mean) / std``; by
        default those of every channel, and of every feature of a table.
      window: differentiate only this many steps, which end at a random step in ``[window, T]``; None for
        all ``T``.
      runs: inner training runs that each meta-step averages over, computed in parallel.
      real_batch: number of real images in each meta-step; None for all.
      validation: how many real images are held out to choose which of the sets along the way to return; by
        default a tenth of them, 0 to return the last set.
      meta_steps: number of steps of the meta-optimizer.
      optimizer: as for `hypergrad.meta.optimize`, by default Adam at ``0.02 / sqrt(1 + t / 100)`` in
        meta-step ``t``, which does not depend on their total number.
      adjoint: how the inner training is differentiated, by default `hypergrad.Reversible`.
      key: PRNG key, by default ``jax.random.key(0)``.
      checkpoint: file to resume from and to write during the run; a resumed run with larger ``meta_steps``
        reaches the same set as a single run of that length.  Refused if it belongs to another network,
        recipe, data or other settings.
      progress: say on stderr what is done and whether the recipe fits, and show a progress bar.
      callback: ``callback(step)``, called after every meta-step; see `hypergrad.meta.optimize`.

    Returns:
      The `Distilled` set.  If the hypergradient explodes, there is a warning, and the last good set is
      returned.

    Raises:
      ValueError: arguments do not fit each other, or the checkpoint is of another call; checked before any
        work starts.
      ReversalError: the first inner training cannot be reversed, as with a momentum of 0.
      KeyboardInterrupt, OSError: see `hypergrad.meta.optimize`.

    Source: D. Maclaurin, D. Duvenaud, R. P. Adams, 2015, section 3.3; T. Wang et al., "Dataset
    distillation", 2018; Z. Deng, O. Russakovsky, "Remember the past", 2022 (momentum, bases); Y. Feng et
    al., "Embarrassingly simple dataset distillation", 2024 (random windows).

    >>> import hypergrad as hg
    >>> digits = hg.data.digits()
    >>> made = hg.distill(
    ...     hg.nets.mlp((64, 10)),
    ...     digits.train_images,
    ...     digits.train_labels,
    ...     hg.Recipe(steps=5),
    ...     meta_steps=3,
    ...     progress=False,
    ... )
    >>> made.images.shape
    (10, 8, 8)
    """
    key = jax.random.key(0) if key is None else key
    images, labels, learn = np.asarray(images), np.asarray(labels), _names(learn)
    held_out = len(images) // 10 if validation is None else validation
    first = Recipe() if recipe is None else recipe  # what is chosen is no shorter
    call = f"distill(network, images, labels, {recipe}, per_class={per_class}, learn={learn!r})"
    classes = check_examples(call, images, labels, start, per_class, held_out)
    _check_learned(call, first, learn, bases, start)
    _check_numbers(call, first, per_class=per_class, bases=bases, window=window, real_batch=real_batch)
    check_network(call, network, first, images.shape, classes)
    start_key, shuffle_key, meta_key = jax.random.split(key, 3)
    settings = Settings(
        optimizer=optax.adam(_meta_rate) if optimizer is None else optimizer,
        steps=meta_steps,
        key=meta_key,
        seeds=runs,
        checkpoint=checkpoint,
        checkpoint_every=10,
        callback=callback,
    )
    check_settings(settings)

    examples = Examples.of(call, (images, labels), normalise, held_out, shuffle_key)
    hard, fixed = examples.start(per_class, start, start_key)
    teller = Progress("distill", progress and not _resumed(checkpoint))
    recipe = Trial(network, fixed, hard, examples.real, meta_key, teller).fitting(recipe)
    windowed = _windowed(adjoint or Reversible(), window, recipe.steps)
    task = _Task(network, recipe, fixed, hard, examples, real_batch, *windowed, meta_key)
    learned = _start(recipe, fixed, hard, learn, bases, *examples.real)
    _look_for_chaos_first(call, task, learned, meta_key, checkpoint)
    words = {"bases": bases, "window": window, "real_batch": real_batch, "held out": held_out}
    settings = settings._replace(
        constraints={name: NUMBERS.get(name, constraints.real) for name in learned},
        about=task.in_words(learn) | {name: str(x) for name, x in words.items()},
    )
    what = f"a meta-step: the hypergradient through {recipe.steps} steps"
    with Progress("distill", progress) as shown:
        result = minimize(task.objective, learned, settings, partial(task.judge, settings), shown, what)
    return task.distilled(result, {"learned": [*learn], "runs": runs, "window": window, "key": _bits(key)})


def _bits(key: Array) -> list[int]:
    """A key as numbers that JSON can hold."""
    bits: list[int] = np.asarray(jax.random.key_data(key)).tolist()
    return bits


class _Task(NamedTuple):
    """What is distilled, and from what.

    Attributes:
      network: the network to train on what is learned.
      recipe: recipe of that training, as far as it is not learned.
      fixed: the initial images, which do not change if only other things are learned.
      hard: their classes.
      examples: the real ones.
      real_batch: number of real examples in a meta-step; None for all.
      adjoint: adjoint of the inner training.
      shortest: the shortest inner training, if their length is random.
      key: PRNG key of the meta-steps.
    """

    network: Network
    recipe: Recipe
    fixed: Array
    hard: np.ndarray
    examples: Examples
    real_batch: int | None
    adjoint: Adjoint
    shortest: int | None
    key: Array

    def assembled(self, learned: Mapping[str, Array]) -> tuple[Array, Array, Recipe]:
        """Images, labels and recipe from what is learned."""
        x = self.fixed
        if "coefficients" in learned:
            x = jnp.tensordot(learned["coefficients"], learned["bases"], 1)
        x = learned.get("images", x)
        y = jax.nn.softmax(learned["labels"]) if "labels" in learned else jnp.asarray(self.hard)
        numbers = {name: learned[name] for name in NUMBERS if name in learned}
        return x, y, with_numbers(self.recipe, numbers)

    def objective(self, learned: Mapping[str, Array], key: Array, length: Array | None = None) -> Array:
        """The loss on real examples of a network trained on what is learned."""
        run_key, real_key, length_key = jax.random.split(key, 3)
        x, y, recipe = self.assembled(learned)
        if self.shortest is not None and length is None:
            length = jax.random.randint(length_key, (), self.shortest, self.recipe.steps + 1)
        params = train_with(recipe, self.network, x, y, run_key, self.adjoint, length)
        real = self.examples.real
        kept = len(real[0])
        size = min(kept, self.real_batch or kept)
        # Consecutive rows of an order that is already random: cheap sampling without replacement.
        rows = (jax.random.randint(real_key, (), 0, kept) + jnp.arange(size)) % kept
        inputs, targets = (x[rows] for x in real) if size < kept else real
        return nets.cross_entropy(self.network[1](params, inputs), targets)

    def error(self, learned: Mapping[str, Array]) -> Array:
        """The error on the held-out examples of networks trained on what is learned."""
        x, y, recipe = self.assembled(learned)
        inputs, targets = self.examples.unseen

        def one(key: Array) -> Array:
            params = recipe.train(self.network, x, y, key)
            return nets.error_rate(self.network[1](params, inputs), targets)

        key = jax.random.fold_in(self.key, _UNSEEN)
        return jnp.mean(jax.lax.map(one, jax.random.split(key, 1 if self.recipe.inits == 1 else 4)))

    def judge(self, settings: Settings, raw: PyTree) -> Judge | None:
        """What chooses the set that is returned; None for the last one."""
        if not len(self.examples.unseen[0]) or isinstance(settings.optimizer, LBFGSB):
            return None
        return Judge(*scorer(self.error, settings.constraints, raw), LOOK_EVERY)

    def in_words(self, learn: Sequence[str]) -> dict[str, str]:
        """What decides the result besides numbers, in words for people to compare."""
        return {
            "recipe": _compared(self.recipe),
            "network": shapes_in_words(self.network),
            "real data (sha256)": self.examples.checksum[:16],
            "learn": ", ".join(sorted(learn)),
            "images learned": str(len(self.hard)),
        }

    def distilled(self, result: Optimized, about: dict[str, Any]) -> Distilled:
        """The result, in the units of the images."""
        x, y, recipe = self.assembled(result.hypers)
        examples = self.examples
        counts = {
            "learned from": len(examples.real[0]),
            "held out to choose": len(examples.unseen[0]),
        }
        return Distilled(
            images=np.asarray(x) * examples.std + examples.mean,
            labels=np.asarray(y),
            mean=examples.mean,
            std=examples.std,
            recipe=with_numbers(recipe, numbers_of(recipe)),
            bases=array_or_none(result.hypers.get("bases")),
            coefficients=array_or_none(result.hypers.get("coefficients")),
            history=_history(result),
            about={
                **about,
                "initial weights": described(self.network[0]),
                "data checksum (sha256)": examples.checksum,
                "real examples": counts,
                "meta_steps": len(result.history.loss),
                "stopped": result.stopped,
                "versions": files.versions(),
            },
        )


def _windowed(adjoint: Adjoint, window: int | None, steps: int) -> tuple[Adjoint, int | None]:
    """The adjoint of a run of random length whose last steps are differentiated, and the least length."""
    if window is None or window >= steps:
        return adjoint, None
    return Truncated(window, adjoint), window


def _resumed(checkpoint: str | os.PathLike[str] | None) -> bool:
    """Whether there is a run to go on with."""
    return checkpoint is not None and os.path.exists(checkpoint)


def _look_for_chaos_first(
    call: str, task: _Task, learned: PyTree, key: Array, checkpoint: str | os.PathLike[str] | None
) -> None:
    """Look for chaos if a run is long and is not being resumed."""
    if task.recipe.steps < LONG or _resumed(checkpoint):
        return
    with locked("distill", checkpoint):  # finds one that cannot be written before this work
        _look_for_chaos(call, task.objective, learned, key, task.recipe.steps)


def _meta_rate(t: Any) -> Any:
    return 0.02 / jnp.sqrt(1 + t / 100)


def _compared(recipe: Recipe) -> str:
    """A recipe in words for people to compare; for a long schedule only its ends."""
    parts = {**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}, **numbers_of(recipe)}
    shown = {
        name: f"{x.flat[0]:g} ... {x.flat[-1]:g} {checksum_of(x)[:8]}" if np.ndim(x) else str(x)
        for name, x in parts.items()
    }
    return ", ".join(f"{name} {x}" for name, x in shown.items())


def _start(
    recipe: Recipe,
    fixed: Array,
    hard: np.ndarray,
    learn: Sequence[str],
    bases: int | None,
    inputs: Array,
    targets: Array,
) -> dict[str, Array]:
    """The initial values of everything that is learned."""
    learned: dict[str, Array] = {}
    key, classes = jax.random.key(recipe.seed), int(hard.max()) + 1
    if "images" in learn and bases is None:
        learned["images"] = fixed
    elif "images" in learn:
        assert bases is not None
        theirs = np.arange(bases) % classes
        learned["bases"] = inputs[rows_like(theirs, np.asarray(targets), key)]
        alike = hard[:, None] == theirs
        noise = jax.random.normal(key, alike.shape, fixed.dtype)
        learned["coefficients"] = alike / np.maximum(1, alike.sum(1, keepdims=True)) + 0.1 * noise
    if "labels" in learn:
        confident = jnp.log(0.9 * (classes - 1) / 0.1)  # the true class has nine tenths
        learned["labels"] = confident * jax.nn.one_hot(hard, classes, dtype=fixed.dtype)
    if "learning_rate" in learn:
        learned["learning_rate"] = recipe.rates()
    for name in ("momentum", "l2"):
        if name in learn:
            learned[name] = jnp.asarray(getattr(recipe, name), fixed.dtype)
    return learned


def _names(learn: Sequence[str]) -> tuple[str, ...]:
    """What is learned, by the names that are used inside."""
    names = (learn,) if isinstance(learn, str) else tuple(learn)
    return tuple("images" if name == "inputs" else name for name in names)


def _check_learned(call: str, recipe: Recipe, learn: Sequence[str], bases: Any, start: Any) -> None:
    """Refuse a request to learn what cannot be learned."""
    learnable = ("images", "labels", *NUMBERS)
    if not learn or not set(learn) <= set(learnable):
        raise ValueError(f"{call}: learn must hold one or more of {learnable}")
    if any(name in learn and not getattr(recipe, name) > 0 for name in ("l2", "momentum")):
        raise ValueError(
            f"{call}: what is learned as a positive number cannot begin at 0; give the recipe a positive "
            "start for it, such as l2=1e-4"
        )
    if bases is not None and (start is not None or "images" not in learn):
        raise ValueError(
            f"{call}: bases={bases} are learned for the images; learn them, and leave out start"
        )


def _check_numbers(call: str, recipe: Recipe, **numbers: int | None) -> None:
    """Refuse numbers that are not whole, and a window longer than the run."""
    for name, value in numbers.items():
        if value is not None and not is_whole(value):
            raise ValueError(f"{call}: {name}={value!r} must be a whole number, at least 1")
    window = numbers["window"]
    if window is not None and window > recipe.steps:
        raise ValueError(
            f"{call}: window={window} is longer than the {recipe.steps} steps of the recipe; pass a window "
            "from 1 to that, or None for all"
        )


def _look_for_chaos(call: str, objective: Any, learned: PyTree, key: Array, steps: int) -> None:
    """Warn if the hypergradient of a run is far larger than that of its first half."""

    @partial(jax.jit, compiler_options=UNOPTIMIZED)
    def evaluated(learned: PyTree, length: Array) -> tuple[Array, Array]:
        loss, gradient = jax.value_and_grad(objective)(learned, key, length)
        return loss, optax.tree.norm(gradient)

    def at(length: int) -> tuple[float, float]:
        with readable_errors():
            loss, norm = jax.block_until_ready(evaluated(learned, jnp.int32(length)))
        return float(loss), float(norm)

    (first, half), (last, whole) = at(steps // 2), at(steps)
    if not (np.isfinite([first, half, last]).all() and half > 0):
        return  # it diverges or starts at 0, which is not chaos; `optimize` reports that
    if not whole < 10 * half:
        warnings.warn(
            f"{call}: the hypergradient has the norm {half:.3g} after {steps // 2} steps and {whole:.3g} "
            f"after {steps}: training is chaotic, and what is learned will be noise. Begin with lower "
            "learning rates, or pass fewer steps or a window",
            ChaosWarning,
            stacklevel=outside(),
        )


def _history(result: Optimized) -> dict[str, np.ndarray]:
    errors = np.array(list(result.scores.items()), float).reshape(-1, 2)
    return {
        "loss": result.history.loss,
        "gradient_norm": result.history.gradient_norm,
        "validation_error": errors,
    }
