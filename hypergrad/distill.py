"""Dataset distillation: learn a few examples such that whoever trains on them does well on real ones.

======  =====================  ==========================================================
symbol  name                   meaning
======  =====================  ==========================================================
``x``   images                 learned images, ``(n, ...)``; what is learned is normalised
``y``   labels                 their labels, ``(n,)`` integers or ``(n, C)`` probabilities
``w``   params                 weights of the network ``f``
``α``   learning_rate          ``(T,)``, one for every step
``γ``   momentum               of the inner training
``λ``   l2                     penalty ``λ Σ w²`` of the inner training
``T``   steps                  of the inner training
======  =====================  ==========================================================

``w_0 ~ init,   v <- γ v - (1-γ) ∇_w [H(f(w, x), y) + λ Σ w²],   w <- w + α_t v``  for ``T`` steps, and
``minimise  E H(f(w_T, x_real), y_real)``  over all that is learned, where ``H`` is the cross-entropy.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from hypergrad import constraints, data, files, nets
from hypergrad.adjoints import Adjoint, Stored, Truncated
from hypergrad.augment import Augmentation
from hypergrad.errors import readable_errors
from hypergrad.meta import LBFGSB, Optimized, optimize
from hypergrad.optimizers.momentum import momentum as momentum_optimizer
from hypergrad.reversible import Reversible
from hypergrad.run import PyTree
from hypergrad.train import train

Network = tuple[Callable[[Array], PyTree], Callable[[PyTree, Array], Array]]

NUMBERS = {  # those of a recipe that can be learned, and where they stay
    "learning_rate": constraints.positive,
    "momentum": constraints.unit,
    "l2": constraints.positive,
}
_BASES = ("bases", "coefficients")
FORMAT = 1  # of saved sets
LONG = 40  # steps from which on chaos is looked for
LOOK_EVERY = 20  # meta-steps between two looks at the examples held out
_UNSEEN = 2**31  # runs from here on are for judging, those before it for learning


class ChaosWarning(RuntimeWarning):
    """The hypergradient grows with the length of the inner training."""


@dataclass(frozen=True)
class Recipe:
    """How to train on a small set of examples; a distilled set is worth little without its own.

    ``v <- γ v - (1-γ) g,  w <- w + α_t v``, which is ``optax.sgd(α_t (1-γ), momentum=γ)``.

    Args:
      steps: ``T``, at least 1.
      learning_rate: ``α``, a number or one for every step, > 0.
      momentum: ``γ``, in [0, 1).
      l2: ``λ`` of a penalty ``λ Σ w²`` on all parameters, >= 0.
      batch_size: examples in a step; None for all.
      shuffled: whether every epoch has an order of its own; else step ``t`` takes the next ``batch_size``
        rows, from the first on again after the last.
      augmentation: of the examples, at every step; None for none.
      inits: from how many initial weights a run draws its own: 1 always starts from the same, None from new
        ones every time.
      seed: of those initial weights; nothing to do with ``inits=None``.

    Raises:
      ValueError: for a setting out of its range.

    >>> Recipe(steps=3, learning_rate=0.5).rates().tolist()
    [0.5, 0.5, 0.5]
    """

    steps: int = 20
    learning_rate: Any = 0.1
    momentum: Any = 0.9
    l2: Any = 0.0
    batch_size: int | None = None
    shuffled: bool = False
    augmentation: Augmentation | None = None
    inits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "inits"):
            value = getattr(self, name)
            if name != "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"Recipe({name}={value!r}): it must be a whole number, at least 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer):
            raise ValueError(f"Recipe(seed={self.seed!r}): it must be a whole number")
        for name, low, high in (("learning_rate", 0, np.inf), ("momentum", 0, 1), ("l2", 0, np.inf)):
            value = getattr(self, name)
            if isinstance(value, jax.core.Tracer):
                continue
            shape = np.shape(value)
            if shape != () and not (name == "learning_rate" and shape == (self.steps,)):
                wanted = f"a number or of shape ({self.steps},)" if name == "learning_rate" else "a number"
                raise ValueError(f"Recipe({name}=...) of shape {shape}: it must be {wanted}")
            numbers = np.asarray(value)
            if not np.all((numbers >= low) & (numbers < high)) or (
                name == "learning_rate" and 0 in numbers
            ):
                domain = {"learning_rate": "above 0", "momentum": "in [0, 1)", "l2": "0 or more"}[name]
                raise ValueError(f"Recipe({name}={value!r}): it must be {domain}")

    def rates(self) -> Array:
        """``(T,)`` learning rates."""
        return jnp.broadcast_to(jnp.asarray(self.learning_rate, jnp.result_type(float)), (self.steps,))

    def rows(self, key: Array, examples: int) -> Array:
        """``(T, batch)`` int32 rows of the examples in every step.

        Args:
          key: PRNG key, for a shuffled order.
          examples: how many there are.
        """
        size = min(examples, self.batch_size or examples)
        if self.shuffled and size < examples:
            return data.minibatches(key, examples, size, self.steps)
        return (jnp.arange(self.steps * size, dtype=jnp.int32) % examples).reshape(self.steps, size)

    def weights(self, init: Callable[[Array], PyTree], key: Array) -> PyTree:
        """Initial weights for a run.

        Args:
          init: of a network, from a key.
          key: PRNG key of the run.
        """
        if self.inits is None:
            return init(key)
        member = 0 if self.inits == 1 else jax.random.randint(key, (), 0, self.inits)
        return init(jax.random.fold_in(jax.random.key(self.seed), member))

    def train(
        self, network: Network, inputs: Array, labels: Array, key: Array, adjoint: Adjoint | None = None
    ) -> PyTree:
        """Parameters of a network trained by this recipe.

        Args:
          network: ``(init, apply)``: from a key to parameters, and from parameters and inputs to logits.
          inputs: ``(n, ...)`` examples, normalised.
          labels: ``(n,)`` integers or ``(n, C)`` probabilities.
          key: PRNG key of the run: initial weights, order, augmentation.
          adjoint: how to differentiate it, by default with everything stored.
        """
        return _trained(self, network, inputs, labels, key, Stored() if adjoint is None else adjoint)

    def optax(self) -> optax.GradientTransformation:
        """The inner optimizer for plain optax; the penalty is part of it."""
        alpha = np.asarray(self.rates()) * (1 - float(self.momentum))
        return optax.chain(
            optax.add_decayed_weights(2 * float(self.l2)),
            optax.sgd(lambda t: jnp.asarray(alpha)[jnp.minimum(t, self.steps - 1)], float(self.momentum)),
        )


@dataclass(frozen=True)
class Distilled:
    """A distilled set, with all that is needed to use it.

    Attributes:
      images: ``(n, ...)`` in raw units, those of the data.
      labels: ``(n,)`` integers, or ``(n, C)`` probabilities.
      mean: of the normalisation ``(image - mean) / std``; broadcasts against an image.
      std: of the same.
      recipe: how to train on it.
      bases: ``(k, ...)`` images of which the images are combinations, normalised; None without.
      coefficients: ``(n, k)``; None without.
      history: of the learning: "loss" ``(m,)``, "gradient_norm" ``(m,)``, and "validation_error"
        ``(r, 2)``, meta-steps made and shares of errors then.
      about: what else to know, as JSON: initial weights, checksum of the data, how it was learned,
        versions, and "metrics", what `Evaluation.noted` added.
    """

    images: Any
    labels: Any
    mean: Any
    std: Any
    recipe: Recipe
    bases: Any = None
    coefficients: Any = None
    history: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> Array:
        """The images as a network sees them: normalised."""
        return self.normalised(self.images)

    def normalised(self, images: Array | np.ndarray) -> Array:
        """Any images as a network that was trained on this set wants to see them.

        Args:
          images: ``(m, ...)`` in raw units.
        """
        return jnp.asarray((np.asarray(images) - self.mean) / self.std)

    def batches(self, key: Array | None = None) -> tuple[Array, Array]:
        """What the recipe trains on, step by step: ``(T, batch, ...)`` inputs and labels, to scan over.

        Args:
          key: PRNG key, for a shuffled order.
        """
        rows = self.recipe.rows(jax.random.key(0) if key is None else key, len(self.images))
        return self.inputs[rows], jnp.asarray(self.labels)[rows]

    def optax(self) -> optax.GradientTransformation:
        """The recipe's optimizer for plain optax."""
        return self.recipe.optax()

    def train(self, network: Network, key: Array) -> PyTree:
        """Parameters of a network trained on this set by its own recipe.

        Args:
          network: ``(init, apply)``.
          key: PRNG key.
        """
        return self.recipe.train(network, self.inputs, jnp.asarray(self.labels), key)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.npz`` file that describes itself, atomically; `load_distilled` reads it.

        ``numpy.load(path)`` has the arrays under their names, and the rest as JSON under ``hypergrad``.

        Args:
          path: of the file; its folder must exist.

        Raises:
          ValueError: images, labels and the rest do not fit each other, so that no one could read it.
          OSError: the file cannot be written; an old one is as it was.
        """
        _refuse_set(f"Distilled.save({os.fspath(path)!r})", self)
        recipe, given = self.recipe, dataclasses.asdict(self.recipe)
        named = {name: getattr(self, name) for name in ("images", "labels", "mean", "std", *_BASES)}
        arrays = {name: np.asarray(x) for name, x in (named | _numbers(recipe)).items() if x is not None}
        files.save(
            path,
            arrays | ({"history": dict(self.history)} if self.history else {}),
            distilled=FORMAT,
            recipe={name: value for name, value in given.items() if name not in NUMBERS},
            optimizer="v <- momentum v - (1 - momentum) gradient, w <- w + learning_rate[t] v",
            normalisation="(image - mean) / std",
            about=dict(self.about),
        )


def load_distilled(path: str | os.PathLike[str]) -> Distilled:
    """Read a distilled set that `Distilled.save` wrote.

    Args:
      path: of the file.

    Returns:
      The `Distilled`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, is no distilled set, or is one of another format; or what it holds
        does not fit together.

    >>> import os, tempfile, numpy as np
    >>> made = Distilled(np.ones((2, 4)), np.arange(2), np.zeros(4), np.ones(4), Recipe(steps=3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made.save(os.path.join(folder, "set.npz"))
    ...     load_distilled(os.path.join(folder, "set.npz")).recipe.steps
    3
    """
    call = f"load_distilled({os.fspath(path)!r})"
    arrays, metadata = files.load(path)
    version = metadata.get("distilled")
    if version != FORMAT:
        reason = "is no distilled set" if version is None else f"has format {version}"
        raise ValueError(
            f"{call}: the file {reason}, and this version of hypergrad reads distilled sets of format "
            f"{FORMAT}; give one that Distilled.save wrote, or use the version that wrote this"
        )
    try:
        settings = dict(metadata["recipe"])
        augmentation = settings.pop("augmentation")
        numbers = {name: arrays.pop(name)[()] for name in NUMBERS}
        recipe = Recipe(**settings, **numbers, augmentation=augmentation and Augmentation(**augmentation))
        history = arrays.pop("history", {})
        made = Distilled(**arrays, recipe=recipe, history=history, about=metadata["about"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{call}: the file is damaged ({type(error).__name__}: {error})") from error
    _refuse_set(call, made)
    return made


def _refuse_set(call: str, made: Distilled) -> None:
    """Refuse a set whose parts do not fit each other."""
    shapes = {name: np.shape(getattr(made, name)) for name in ("images", "labels", "mean", "std", *_BASES)}
    dtypes = {name: np.asarray(getattr(made, name)).dtype for name in shapes}
    given = [name for name in shapes if getattr(made, name) is not None]
    image, count = shapes["images"][1:], shapes["images"][:1]
    whole = np.issubdtype(dtypes["labels"], np.integer)

    def spreads(shape: tuple[int, ...]) -> bool:
        try:
            return np.broadcast_shapes(shape, image) == image
        except ValueError:
            return False

    faults = {
        "images must be (n, ...) with n >= 1": len(shapes["images"]) > 1 and min(shapes["images"]) > 0,
        "labels must be one integer from 0 on, or a row of probabilities, for each image": (
            shapes["labels"][:1] == count
            and len(shapes["labels"]) == (1 if whole else 2)
            and (bool(np.all(np.asarray(made.labels) >= 0)))
        ),
        "mean and std must broadcast against an image": spreads(shapes["mean"]) and spreads(shapes["std"]),
        "std must not be 0": bool(np.all(np.asarray(made.std) != 0)),
        "bases (k, ...) and coefficients (n, k) come together": all(n not in given for n in _BASES)
        or (shapes["coefficients"] == (*count, *shapes["bases"][:1]) and shapes["bases"][1:] == image),
        "all numbers must be finite": all(
            dtypes[name].kind in "fiub" and bool(np.all(np.isfinite(getattr(made, name)))) for name in given
        ),
        "images must be floats": np.issubdtype(dtypes["images"], np.floating),
        "history and about must be dictionaries": isinstance(made.history, Mapping)
        and isinstance(made.about, Mapping),
    }
    wrong = [what for what, holds in faults.items() if not holds]
    if wrong:
        found = ", ".join(f"{name} {list(shapes[name])} of {dtypes[name]}" for name in given)
        raise ValueError(
            f"{call}: this is no whole distilled set: {'; '.join(wrong)}. It holds {found}; take one that "
            "hypergrad.distill made, or put this one right"
        )


def centred(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of every pixel, and 1: the normalisation of Maclaurin et al. 2015.

    Args:
      images: ``(n, ...)``.
    """
    return np.mean(images, axis=0), np.ones((), images.dtype)


def standardised(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over all pixels, for each channel of ``(n, height, width, channels)``.

    Args:
      images: ``(n, ...)``; one mean for all unless there are four axes.
    """
    axes = (0, 1, 2) if images.ndim == 4 else None
    return np.mean(images, axis=axes), np.std(images, axis=axes)


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
) -> Distilled:
    """Learn a few examples such that a network trained on them does well on real ones.

    The hypergradient of the loss on real examples after a whole training run, in all that is learned, is
    followed by a meta-optimizer.  Learning rates and the penalty stay positive, the momentum between 0 and
    1.  At recipes of 40 steps or more the first hypergradients are tested for chaos.

    Args:
      network: ``(init, apply)``: from a key to parameters, and from parameters and ``(n, ...)`` inputs to
        ``(n, C)`` logits; such as `hypergrad.nets.convnet` gives.
      images: ``(N, ...)`` real training images.
      labels: ``(N,)`` their integers in ``[0, C)``.
      recipe: of the inner training, where the learned of its numbers begin; by default ``Recipe()``.
      per_class: learned images for every class.
      learn: what is learned, of "images", "labels" (soft ones), "learning_rate" (one for every step),
        "momentum" and "l2".
      start: ``(per_class * C, ...)`` first images in raw units, image ``i`` of class ``i mod C``; by
        default real ones.
      bases: how many shared bases the images are learned as combinations of; None for free images.
      normalise: from the training images to the ``(mean, std)`` of ``(image - mean) / std``.
      window: only so many steps are differentiated, which end at a random step in ``[window, T]``; None for
        all ``T``.
      runs: inner trainings that each meta-step averages over, side by side.
      real_batch: real images in each meta-step; None for all.
      validation: how many real images are held out to choose, among the sets on the way, the one to return;
        by default a tenth of them, 0 for the last set.
      meta_steps: of the meta-optimizer.
      optimizer: of `hypergrad.meta.optimize`, by default Adam at ``0.02 / sqrt(1 + t / 100)`` in meta-step
        ``t``, which does not depend on how many there will be.
      adjoint: how the inner training is differentiated, by default `hypergrad.Reversible`.
      key: PRNG key, by default ``jax.random.key(0)``.
      checkpoint: file to resume from and to write as it goes; with a larger `meta_steps` it goes on to the
        same set as if that had been asked for at once.  Refused if it is of another network, recipe, data
        or other settings.
      progress: show a progress bar.

    Returns:
      The `Distilled` set.  If the hypergradient explodes, a warning and the last good one.

    Raises:
      ValueError: for arguments that do not fit each other, or a checkpoint of another call; before any
        work.
      ReversalError: where the first inner training cannot be reversed, as with a momentum of 0.
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
    recipe = Recipe() if recipe is None else recipe
    key = jax.random.key(0) if key is None else key
    images, labels = np.asarray(images), np.asarray(labels)
    held_out = len(images) // 10 if validation is None else validation
    call = f"distill(network, images, labels, {recipe}, per_class={per_class}, learn={tuple(learn)!r})"
    _refuse(call, images, labels, recipe, per_class, learn, start, bases, window, real_batch, held_out)
    classes = int(labels.max()) + 1
    found = _logits(network, images[:1]).shape
    if found != (1, classes):
        raise ValueError(
            f"{call}: for one image the network gives logits {found}, and the labels have {classes} "
            f"classes; pass a network that gives (1, {classes})"
        )
    count = per_class * classes

    mean, std = (np.asarray(x, images.dtype) for x in normalise(images))
    kept = len(images) - held_out
    start_key, shuffle_key, meta_key = jax.random.split(key, 3)
    order = np.asarray(jax.random.permutation(shuffle_key, len(images)))
    inputs, targets = (images[order] - mean) / std, labels[order].astype(np.int32)
    data.require_classes(
        f"{call}, validation={held_out}", "what is left to learn from", targets[:kept], classes
    )
    real = jnp.asarray(inputs[:kept]), jnp.asarray(targets[:kept])
    unseen = jnp.asarray(inputs[kept:]), jnp.asarray(targets[kept:])

    hard = np.arange(count, dtype=np.int32) % classes
    if start is None:
        fixed = real[0][rows_like(hard, targets[:kept], start_key)]
    else:
        fixed = jnp.asarray((np.asarray(start, images.dtype) - mean) / std)
    learned = _start(recipe, fixed, hard, learn, bases, *real)
    adjoint = Reversible() if adjoint is None else adjoint
    shorter = window if window is not None and window < recipe.steps else None
    if shorter is not None:
        adjoint = Truncated(shorter, adjoint)

    def assembled(learned: Mapping[str, Array]) -> tuple[Array, Array, Recipe]:
        """Images, labels and recipe from what is learned."""
        x = fixed
        if "coefficients" in learned:
            x = jnp.tensordot(learned["coefficients"], learned["bases"], 1)
        x = learned.get("images", x)
        y = jax.nn.softmax(learned["labels"]) if "labels" in learned else jnp.asarray(hard)
        return x, y, _with(recipe, {name: learned[name] for name in NUMBERS if name in learned})

    def objective(learned: Mapping[str, Array], key: Array, length: Array | None = None) -> Array:
        run_key, real_key, length_key = jax.random.split(key, 3)
        x, y, ours = assembled(learned)
        if shorter is not None and length is None:
            length = jax.random.randint(length_key, (), shorter, recipe.steps + 1)
        params = _trained(ours, network, x, y, run_key, adjoint, length)
        size = min(kept, real_batch or kept)
        # Rows in a row of an order that is random already: without replacement, and cheap.
        rows = (jax.random.randint(real_key, (), 0, kept) + jnp.arange(size)) % kept
        inputs, targets = (real[0][rows], real[1][rows]) if size < kept else real
        return nets.cross_entropy(network[1](params, inputs), targets)

    judges = jax.random.split(jax.random.fold_in(meta_key, _UNSEEN), 1 if recipe.inits == 1 else 4)

    def error(learned: Mapping[str, Array]) -> Array:
        x, y, ours = assembled(learned)

        def one(key: Array) -> Array:
            return nets.error_rate(network[1](ours.train(network, x, y, key), unseen[0]), unseen[1])

        return jnp.mean(jax.lax.map(one, judges))

    if recipe.steps >= LONG and (checkpoint is None or not os.path.exists(checkpoint)):
        guard: Any = contextlib.nullcontext()
        if checkpoint is not None:  # one that cannot be written is found before this work
            guard = files.locked(checkpoint, f"distill(checkpoint={os.fspath(checkpoint)!r})")
        with guard:
            _look_for_chaos(call, objective, learned, meta_key, recipe.steps)
    checksum = _checksum(images, labels)
    selects = held_out > 0 and not isinstance(optimizer, LBFGSB)
    result = optimize(
        objective,
        learned,
        optimizer=optax.adam(_meta_rate) if optimizer is None else optimizer,
        steps=meta_steps,
        constraints={name: NUMBERS.get(name, constraints.real) for name in learned},
        key=meta_key,
        seeds=runs,
        checkpoint=checkpoint,
        checkpoint_every=10,
        progress=progress,
        select=error if selects else None,
        select_every=LOOK_EVERY,
        about={
            "recipe": _in_words(recipe),
            "network": _shapes(network),
            "real data (sha256)": checksum[:16],
            "learn": ", ".join(sorted(learn)),
            "images learned": str(count),
            "bases": str(bases),
            "window": str(window),
            "real_batch": str(real_batch),
            "held out": str(held_out),
        },
    )
    x, y, ours = assembled(result.hypers)
    return Distilled(
        images=np.asarray(x) * std + mean,
        labels=np.asarray(y),
        mean=mean,
        std=std,
        recipe=_with(ours, _numbers(ours)),
        bases=_array(result.hypers.get("bases")),
        coefficients=_array(result.hypers.get("coefficients")),
        history=_history(result),
        about={
            "learned": list(learn),
            "initial weights": _described(network[0]),
            "data checksum (sha256)": checksum,
            "real examples": {"learned from": kept, "held out to choose": held_out},
            "meta_steps": len(result.history.loss),
            "runs": runs,
            "window": window,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "stopped": result.stopped,
            "versions": files.versions(),
        },
    )


def _meta_rate(t: Any) -> Any:
    return 0.02 / jnp.sqrt(1 + t / 100)


def _in_words(recipe: Recipe) -> str:
    """A recipe for people to compare; of a long schedule its ends."""
    parts = {**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}, **_numbers(recipe)}
    shown = {
        name: f"{x.flat[0]:g} ... {x.flat[-1]:g} {_checksum(x)[:8]}" if np.ndim(x) else str(x)
        for name, x in parts.items()
    }
    return ", ".join(f"{name} {x}" for name, x in shown.items())


def _shapes(network: Network) -> str:
    """The parameters of a network, in words."""
    params = jax.eval_shape(network[0], jax.random.key(0))
    return ", ".join(
        f"{jax.tree_util.keystr(path)} {x.dtype}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(params)
    )


def _with(recipe: Recipe, numbers: Mapping[str, Any]) -> Recipe:
    return dataclasses.replace(recipe, **numbers)


def _numbers(recipe: Recipe) -> dict[str, np.ndarray]:
    return {name: np.asarray(getattr(recipe, name)) for name in NUMBERS}


def _trained(
    recipe: Recipe,
    network: Network,
    inputs: Array,
    labels: Array,
    key: Array,
    adjoint: Adjoint,
    length: Array | None = None,
) -> PyTree:
    """Parameters after the recipe's steps, or after the first ``length`` of them.

    A traced length must not change the shape of the computation: the run then begins with ``T - length``
    steps that leave everything as it is, with ``γ = 1`` and ``α = 0``.
    """
    init, apply = network
    init_key, order_key, augment_key = jax.random.split(key, 3)
    steps = recipe.steps
    hypers = {"learning_rate": recipe.rates(), "momentum": recipe.momentum}
    optimizer = momentum_optimizer()
    rows = recipe.rows(order_key, len(inputs))
    keys = jax.random.split(augment_key, steps)
    if length is not None:
        t = jnp.arange(steps) - (steps - length)
        place = jnp.maximum(t, 0)
        hypers = {
            "learning_rate": jnp.where(t < 0, 0.0, hypers["learning_rate"][place]),
            "momentum": jnp.where(t < 0, 1.0, hypers["momentum"]),
        }
        still = (0.0, 1.0 + 1e-6)  # so that a momentum of 1 is admitted
        optimizer = dataclasses.replace(optimizer, domains={**optimizer.domains, "momentum": still})
        rows = rows[place]
    whole = rows.shape[1] == len(inputs)
    if jnp.ndim(labels) == 1:
        labels = jax.nn.one_hot(labels, _logits(network, inputs).shape[1], dtype=inputs.dtype)
    meta = inputs, labels, recipe.l2
    penalised = isinstance(recipe.l2, jax.core.Tracer) or recipe.l2 != 0

    def loss(params: PyTree, meta: tuple[Array, Array, Array], batch: tuple[Array, Array]) -> Array:
        (x, y, l2), (rows, key) = meta, batch
        if not whole:
            x, y = x[rows], y[rows]
        if recipe.augmentation is not None:
            x = recipe.augmentation(key, x)
        value = nets.cross_entropy(apply(params, x), y)
        if penalised:
            value += l2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return value

    return train(
        loss,
        recipe.weights(init, init_key),
        hypers,
        meta,
        (rows, keys),
        steps=steps,
        optimizer=optimizer,
        adjoint=adjoint,
    ).params


def _logits(network: Network, inputs: Any) -> jax.ShapeDtypeStruct:
    """Shape of what a network gives for inputs."""
    init, apply = network
    return jax.eval_shape(lambda key, x: apply(init(key), x), jax.random.key(0), inputs)


def rows_like(wanted: np.ndarray, real: np.ndarray, key: Array) -> np.ndarray:
    """Rows of random real examples with the wanted labels; none comes twice while there are enough.

    Args:
      wanted: ``(n,)`` integers.
      real: ``(N,)`` integers, the labels of the real examples.
      key: PRNG key.
    """
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    rows = np.empty(len(wanted), int)
    for c in np.unique(wanted):
        mine = np.flatnonzero(real == c)
        count = int(np.count_nonzero(wanted == c))
        rows[wanted == c] = generator.choice(mine, count, replace=count > len(mine))
    return rows


def class_means(images: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The mean image of every class, ``(classes, ...)``.

    Args:
      images: ``(N, ...)``.
      labels: ``(N,)`` integers from 0, every class at least once.
      classes: how many.
    """
    return np.stack([images[labels == c].mean(0) for c in range(classes)])


def _start(
    recipe: Recipe,
    fixed: Array,
    hard: np.ndarray,
    learn: Sequence[str],
    bases: int | None,
    inputs: Array,
    targets: Array,
) -> dict[str, Array]:
    """Where all that is learned begins."""
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


def _refuse(
    call: str,
    images: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
    per_class: int,
    learn: Sequence[str],
    start: Any,
    bases: int | None,
    window: int | None,
    real_batch: int | None,
    held_out: int,
) -> None:
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or images.ndim < 2:
        raise ValueError(
            f"{call} with images {images.shape} and labels {labels.shape} of {labels.dtype}: pass images "
            "(N, ...) and one integer label for each"
        )
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{call} with images of {images.dtype}: learned images are real numbers. Pass floats, such as "
            "images / 255"
        )
    if not np.isfinite(images).all():
        raise ValueError(f"{call}: the images hold numbers that are not finite; remove or replace them")
    classes = int(labels.max()) + 1
    empty = sorted(set(range(classes)) - set(labels.tolist()))
    if labels.min() < 0 or empty:
        raise ValueError(
            f"{call}: the labels must be 0, 1, ... without gaps; missing: {empty}, smallest: {labels.min()}"
        )
    learnable = ("images", "labels", *NUMBERS)
    if isinstance(learn, str) or not learn or not set(learn) <= set(learnable):
        raise ValueError(f"{call}: learn must hold one or more of {learnable}")
    if any(name in learn and not getattr(recipe, name) > 0 for name in ("l2", "momentum")):
        raise ValueError(
            f"{call}: what is learned as a positive number cannot begin at 0; give the recipe a positive "
            "start for it, such as l2=1e-4"
        )
    for name, value in (
        ("per_class", per_class),
        ("bases", bases),
        ("window", window),
        ("real_batch", real_batch),
    ):
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{call}: {name}={value!r} must be a whole number, at least 1")
    if window is not None and window > recipe.steps:
        raise ValueError(
            f"{call}: window={window} is longer than the {recipe.steps} steps of the recipe; pass a window "
            "from 1 to that, or None for all"
        )
    if bases is not None and (start is not None or "images" not in learn):
        raise ValueError(
            f"{call}: bases={bases} are learned for the images; learn them, and leave out start"
        )
    wanted = (per_class * classes, *images.shape[1:])
    if start is not None and np.shape(start) != wanted:
        raise ValueError(
            f"{call}: start has shape {np.shape(start)}, and the learned images have {wanted}: image i is "
            "of class i mod C"
        )
    if not 0 <= held_out <= len(images) // 2:
        raise ValueError(
            f"{call}: validation={held_out} of {len(images)} examples; hold out from 0 to half of them"
        )


def _look_for_chaos(call: str, objective: Any, learned: PyTree, key: Array, steps: int) -> None:
    """Warn where the hypergradient of a run is far larger than that of its first half."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def evaluated(learned: PyTree, length: Array) -> tuple[Array, Array]:
        loss, gradient = jax.value_and_grad(objective)(learned, key, length)
        return loss, optax.tree.norm(gradient)

    def at(length: int) -> tuple[float, float]:
        with readable_errors():
            loss, norm = jax.block_until_ready(evaluated(learned, jnp.int32(length)))
        return float(loss), float(norm)

    (first, half), (last, whole) = at(steps // 2), at(steps)
    if not (np.isfinite([first, half, last]).all() and half > 0):
        return  # it diverges or begins with nothing, and that is not chaos; `optimize` looks at it
    if not whole < 10 * half:
        warnings.warn(
            f"{call}: the hypergradient has the norm {half:.3g} after {steps // 2} steps and {whole:.3g} "
            f"after {steps}: training is chaotic, and what is learned will be noise. Begin with lower "
            "learning rates, or pass fewer steps or a window",
            ChaosWarning,
            stacklevel=3,
        )


def _history(result: Optimized) -> dict[str, np.ndarray]:
    errors = np.array(list(result.scores.items()), float).reshape(-1, 2)
    return {
        "loss": result.history.loss,
        "gradient_norm": result.history.gradient_norm,
        "validation_error": errors,
    }


def _array(x: Any) -> np.ndarray | None:
    return None if x is None else np.asarray(x)


def _described(init: Callable[[Array], PyTree]) -> list[str]:
    """Initial weights in words: where, which shape, mean and standard deviation in one draw."""
    return [
        f"{jax.tree_util.keystr(path)} {list(x.shape)}: {float(jnp.mean(x)):.3g} ± {float(jnp.std(x)):.3g}"
        for path, x in jax.tree.leaves_with_path(init(jax.random.key(0)))
    ]


def _checksum(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
