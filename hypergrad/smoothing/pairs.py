"""What all estimates share: noise, members that diverge, and derivatives that there are not."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.checks import check_chunk, check_whole, known_value
from hypergrad._base.errors import error_if
from hypergrad._base.opaque import with_rule
from hypergrad._base.trees import PyTree


def check_noise(call: str, sigma: PyTree, pairs: Any, ceiling: Any, chunk: Any) -> None:
    """Refuse settings that are out of range, before any work."""
    check_whole(call, "pairs", pairs, 1, None)
    check_chunk(call, chunk)
    for path, x in jax.tree_util.tree_flatten_with_path(sigma)[0]:
        known = known_value(x)
        if known is not None and not (np.all(np.asarray(known) > 0) and np.all(np.isfinite(known))):
            raise ValueError(
                f"{call}: sigma{jax.tree_util.keystr(path)} must be positive and finite; it is the "
                "standard deviation of the noise in every number. Close over what is to have no noise"
            )
    if not (isinstance(ceiling, float | int | np.floating) and ceiling > -math.inf):
        raise ValueError(
            f"{call}: ceiling must be a number, the value at which runs count that diverge or are above it"
        )


def scales(call: str, sigma: PyTree, hypers: PyTree) -> PyTree:
    """``σ`` for every leaf of the hyperparameters, broadcast to its shape."""
    try:
        spread = jax.tree.broadcast(sigma, hypers)
    except ValueError:
        raise ValueError(
            f"{call}: sigma has the tree structure {jax.tree.structure(sigma)}, which is no prefix of that "
            f"of the hyperparameters, {jax.tree.structure(hypers)}; give one number for all, or a tree "
            "with one for every leaf or for every subtree that shares it"
        ) from None

    def like(path: Any, x: Array, s: Any) -> Array:
        try:
            fits = np.broadcast_shapes(np.shape(s), x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{call}: sigma{jax.tree_util.keystr(path)} has shape {list(np.shape(s))}, which does not "
                f"broadcast to that of its hyperparameters, {list(x.shape)}; give one number for the leaf"
            )
        return jnp.broadcast_to(jnp.asarray(s, x.dtype), x.shape)

    return jax.tree.map_with_path(like, hypers, spread)


def draw(key: Array, sigma: PyTree) -> PyTree:
    """One ``σ ε``, a tree like ``σ``."""
    leaves, structure = jax.tree.flatten(sigma)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [s * jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, leaves)]
    )


def both_signs(hypers: PyTree, noise: PyTree) -> PyTree:
    """``θ + σ ε`` and ``θ - σ ε``, as a leading axis of 2."""
    return jax.tree.map(lambda x, e: jnp.stack([x + e, x - e]), hypers, noise)


def several(chunk: int | None, function: Callable[..., PyTree], xs: PyTree) -> PyTree:
    """The function of every row: all at once, so many at a time, or one by one without ``vmap``."""
    if chunk is None:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=None if chunk == 1 else chunk)


def finite(call: str, values: Array, ceiling: float) -> Array:
    """The members' values, where those that diverge count as the ceiling; without one they are an error."""
    values = jnp.minimum(jnp.where(jnp.isnan(values), jnp.inf, values), ceiling)
    broken = jnp.sum(~jnp.isfinite(values))

    def explain(broken: int) -> str | None:
        if not broken:
            return None
        return (
            f"{call}: {broken} of {values.size} runs gave NaN or infinity, and so would their mean. Use a "
            "smaller sigma or lower learning rates, or pass ceiling=, the value at which such runs count"
        )

    return error_if(explain, values, broken, error=FloatingPointError)


def slope(noise: PyTree, differences: Array, sigma: PyTree) -> PyTree:
    """``mean σ ε (f(θ + σ ε) - f(θ - σ ε)) / (2 σ²)`` over pairs, the leading axis."""

    def of_leaf(e: Array, s: Array) -> Array:
        weights = differences.astype(e.dtype).reshape(-1, *[1] * s.ndim)
        return jnp.mean(e * weights, axis=0) / (2 * s**2)

    return jax.tree.map(of_leaf, noise, sigma)


def without_derivative(call: str, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The function, which refuses to be differentiated."""

    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            f"{call}: an estimate of a gradient has no derivative that is worth anything, since it would "
            "be that of the objective before smoothing. Only first derivatives in the hyperparameters are "
            "estimated; use methods that need no others"
        )

    return with_rule(function, refuse, symbolic_zeros=True)
