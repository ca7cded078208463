"""A distilled set with its images, labels and recipe, and how it is saved and loaded."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from hypergrad import files
from hypergrad._base.trees import PyTree
from hypergrad.distillation.augment import Augmentation
from hypergrad.distillation.recipe import (
    BASES,
    NUMBERS,
    UNOPTIMIZED,
    Network,
    Recipe,
    in_words,
    numbers_of,
)

FORMAT = 1  # of saved sets
RAREST = 20.0  # most standard deviations that a number of a table lies from the mean


@dataclass(frozen=True, repr=False)
class Distilled:
    """A distilled set, with everything that is needed to use it; prints as a few lines.

    Attributes:
      images: ``(n, ...)`` images, or rows of a table, in raw units, those of the data.
      labels: ``(n,)`` integers, or ``(n, C)`` probabilities.
      mean: the mean in the normalization ``(image - mean) / std``; broadcasts against an image or a row.
      std: the standard deviation in the same; broadcasts against an image or a row.
      recipe: how to train on it.
      bases: ``(k, ...)`` normalized images of which the images are linear combinations; None for free
        images.
      coefficients: ``(n, k)`` weights of the bases; None for free images.
      history: the history of the learning: "loss" ``(m,)``, "gradient_norm" ``(m,)``, and
        "validation_error" ``(r, 2)``, the number of meta-steps made and the error rate at that point.
      about: further facts, as JSON: initial weights, checksum of the data, how it was learned, versions,
        and "metrics", which `Evaluation.noted` adds.
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

    def __repr__(self) -> str:
        shape, labels = np.shape(self.images), np.asarray(self.labels)
        soft = labels.ndim == 2
        classes = labels.shape[1] if soft else len(np.unique(labels))
        what = "rows of a table" if len(shape) == 2 else "images"
        lines = [
            f"Distilled: {shape[0]} {what} {list(shape[1:])} of {classes} classes"
            f"{', with soft labels' if soft else ''}",
            f"  recipe: {in_words(self.recipe)}",
        ]
        if "learned" in self.about:
            lines.append(f"  learned: {', '.join(self.about['learned'])}")
        return "\n".join([*lines, *_history_in_words(self.history), *_scores_in_words(self.about)])

    @property
    def inputs(self) -> Array:
        """The images as network inputs, which are normalized."""
        return self.normalised(self.images)

    def normalised(self, images: Array | np.ndarray) -> Array:
        """Any images, normalized as a network that was trained on this set expects them.

        Args:
          images: ``(m, ...)`` in raw units.
        """
        return jnp.asarray((np.asarray(images) - self.mean) / self.std)

    def batches(self, key: Array | None = None) -> tuple[Array, Array]:
        """The batches of the recipe's steps: ``(T, batch, ...)`` inputs and labels, to scan over.

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
        """Write one self-describing ``.npz`` file, atomically; `load_distilled` reads it.

        ``numpy.load(path)`` gives the arrays under their names, and the rest as JSON under ``hypergrad``.

        Args:
          path: path of the file; its folder must exist.

        Raises:
          ValueError: images, labels and the rest do not fit each other, so that the file could not be read.
          OSError: the file cannot be written; an old file is unchanged.
        """
        check_set(f"Distilled.save({os.fspath(path)!r})", self)
        recipe, given = self.recipe, dataclasses.asdict(self.recipe)
        named = {name: getattr(self, name) for name in ("images", "labels", "mean", "std", *BASES)}
        arrays = {name: np.asarray(x) for name, x in (named | numbers_of(recipe)).items() if x is not None}
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
      path: path of the file.

    Returns:
      The `Distilled`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, is not a distilled set, or has another format; or its contents do not
        fit each other.

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
    check_set(call, made)
    return made


def _history_in_words(history: Mapping[str, Any]) -> list[str]:
    """How the loss and the error on held-out examples fell, in lines."""
    lines, loss = [], np.asarray(history.get("loss", ()))
    errors = np.asarray(history.get("validation_error", ())).reshape(-1, 2)
    if loss.size:
        lines.append(
            f"  loss on real examples: {loss[0]:.3g} at first, {loss[-1]:.3g} at meta-step {loss.size}"
        )
    if np.isfinite(errors).any(0).all():
        best = errors[np.nanargmin(errors[:, 1])]
        lines.append(
            f"  error on held-out examples: {100 * errors[0, 1]:.1f} % at first, {100 * best[1]:.1f} % "
            f"at meta-step {best[0]:.0f}"
        )
    return lines


def _scores_in_words(about: Mapping[str, Any]) -> list[str]:
    """What `Evaluation.noted` noted of networks trained on the set by its own recipe, in lines."""
    scores = [s for s in about.get("metrics", ()) if s["examples"] == "distilled" and s["recipe"] == "own"]
    return [
        f"  test accuracy of {s['network']}, inits {s['inits']}: {100 * np.mean(s['accuracies']):.1f} %"
        for s in scores
    ]


def check_set(call: str, made: Distilled) -> None:
    """Refuse a set whose parts do not fit each other."""
    shapes = {name: np.shape(getattr(made, name)) for name in ("images", "labels", "mean", "std", *BASES)}
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
        "bases (k, ...) and coefficients (n, k) come together": all(n not in given for n in BASES)
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
    """The mean of every pixel, and 1: the normalization of Maclaurin et al. (2015).

    Args:
      images: ``(n, ...)``.
    """
    return np.mean(images, axis=0), np.ones((), images.dtype)


def standardised(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the training images: of every channel; of every feature of a table.

    What is constant gets the standard deviation 1.  A feature that is nearly always the same gets a
    twentieth of its range, so that no number is more than 20 standard deviations from the mean.

    Args:
      images: ``(n, height, width)``, ``(n, height, width, channels)`` or ``(n, features)``; one mean and
        one standard deviation for all if it has other axes.
    """
    axes: Any = {2: 0, 4: (0, 1, 2)}.get(images.ndim)
    mean, std = (np.asarray(f(images, axis=axes, dtype=np.float64)) for f in (np.mean, np.std))
    spread = np.asarray(images.max(axis=axes) - images.min(axis=axes), np.float64)
    if images.ndim == 2:
        std = np.maximum(std, spread / RAREST)
    return mean, np.where(spread == 0, 1.0, std)


def shapes_in_words(network: Network) -> str:
    """The parameters of a network, in words."""
    params = jax.eval_shape(network[0], jax.random.key(0))
    return ", ".join(
        f"{jax.tree_util.keystr(path)} {x.dtype}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(params)
    )


def array_or_none(x: Any) -> np.ndarray | None:
    """The value as a NumPy array, or None."""
    return None if x is None else np.asarray(x)


def described(init: Callable[[Array], PyTree]) -> list[str]:
    """Initial weights in words: path, shape, and mean and standard deviation in one draw."""
    drawn = jax.device_get(jax.jit(init, compiler_options=UNOPTIMIZED)(jax.random.key(0)))
    return [
        f"{jax.tree_util.keystr(path)} {list(x.shape)}: {x.mean():.3g} ± {x.std():.3g}"
        for path, x in jax.tree.leaves_with_path(drawn)
    ]


def checksum_of(*arrays: np.ndarray) -> str:
    """SHA-256 over arrays, in hexadecimal digits."""
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
