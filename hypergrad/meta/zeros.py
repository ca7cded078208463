"""Warnings that name the hyperparameters whose hypergradient is exactly 0."""

import warnings

import jax
import numpy as np

from hypergrad._base.errors import ZeroHypergradientWarning, outside
from hypergrad._base.trees import PyTree


def zeros(hypergradient: PyTree) -> list[str]:
    """The names of the leaves of a hypergradient in which every element is exactly 0.

    Args:
      hypergradient: a tree of arrays whose values are known, such as `jax.grad` returns outside ``jit``.

    >>> import jax.numpy as jnp
    >>> zeros({"b1": jnp.zeros(3), "learning_rate": (jnp.ones(3), jnp.zeros(()))})
    ["['b1']", "['learning_rate'][1]"]
    """
    return [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(hypergradient)
        if np.size(leaf) and not np.any(np.asarray(leaf))
    ]


def announce_zeros(call: str, hypergradient: PyTree) -> None:
    """Warn with a `ZeroHypergradientWarning` about hyperparameters whose hypergradient is exactly 0.

    Args:
      call: the user's call, for the message.
      hypergradient: as for `zeros`, with respect to hyperparameters by name.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     announce_zeros("tune(...)", {"b1": 0.0, "learning_rate": 1.0})
    >>> str(caught[0].message).partition(",")[0]
    "tune(...): the hypergradient in hypers['b1'] is exactly 0"
    """
    if found := zeros(hypergradient):
        warnings.warn(
            f"{call}: the hypergradient in {', '.join('hypers' + name for name in found)} is exactly 0, "
            "and following it changes nothing. The objective does not depend on it, or only through a "
            "function whose slope is 0, such as the sign in optax.lion and optax.sign_sgd; leave it out of "
            "what is learned (of tune, with learn=[...]), search for it, or use an optimizer without one",
            ZeroHypergradientWarning,
            stacklevel=outside(),
        )
