"""A warning where a learned number that nothing constrains becomes negative and by its name must not."""

import warnings
from typing import Any

import jax
import numpy as np

from hypergrad._base.errors import outside
from hypergrad._base.trees import PyTree
from hypergrad.constraints import is_constraint, real
from hypergrad.optimizers.domains import never_negative


class NegativeWarning(RuntimeWarning):
    """A learning rate, or another number that by its name cannot be negative, became negative."""


class SignWatch:
    """Looks at the numbers that are learned without a constraint, and warns once.

    Args:
      call: the user's call, for the message.
      constraints: one for each of the hyperparameters, a tree like them.
      hypers: the hyperparameters at the start.
    """

    def __init__(self, call: str, constraints: PyTree, hypers: PyTree):
        limits = jax.tree.leaves(constraints, is_leaf=is_constraint)
        leaves = jax.tree.leaves_with_path(hypers)
        self._call = call
        self._watched = {
            k: _name(path)
            for k, ((path, x), limit) in enumerate(zip(leaves, limits, strict=True))
            if limit is real and _name(path) and np.all(np.asarray(x) >= 0)
        }

    def look(self, raw: PyTree) -> None:
        """Warn if a number has become negative."""
        if not self._watched:
            return
        leaves = jax.tree.leaves(raw)
        below = {name: np.min(leaves[k]) for k, name in self._watched.items() if np.any(leaves[k] < 0)}
        if not below:
            return
        self._watched = {}
        name, value = next(iter(below.items()))
        warnings.warn(
            f"{self._call}: {name!r} has become negative ({float(value):.3g}), because nothing constrains "
            f"it; pass constraints={{{name!r}: hypergrad.constraints.positive, ...}} (unit for numbers "
            "between 0 and 1), or learn the logarithm and take jnp.exp of it in the objective",
            NegativeWarning,
            stacklevel=outside(),
        )


def _name(path: Any) -> str:
    """The part of a path that names a number that cannot be negative; empty if there is none."""
    names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
    return next(filter(never_negative, names), "")
