"""Mesh axes over which arrays vary, inside ``jax.shard_map`` with ``check_vma=True``.

There JAX tracks in the type of every array over which axes of the mesh its values may differ.  A loop must
leave the types of its carry as they are, and both branches of a conditional must have the same types.  An
array that does not vary counts as varying only after a cast, which costs nothing, and whose transpose is a
sum over the axes.  Everywhere else no array varies, and the functions below do nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._base.explicit import explicit_mesh, on_mesh_of, spec_of
from hypergrad._base.rules import equations
from hypergrad._base.trees import PyTree


def axes_of(tree: PyTree) -> frozenset[str]:
    """The mesh axes over which any array in a tree varies; what is no array has none.

    >>> import jax.numpy as jnp
    >>> axes_of(jnp.ones(3))
    frozenset()
    """
    found: frozenset[str] = frozenset()
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.core.Tracer):
            x = jax.typeof(x)
        kind = getattr(x, "manual_axis_type", None)
        found = found if kind is None else found | kind.varying
    return found


def cast(tree: PyTree, axes: frozenset[str]) -> PyTree:
    """Arrays that count as varying over these axes too."""

    def wider(x: Array) -> Array:
        more = tuple(sorted(axes - axes_of(x)))
        return jax.lax.pcast(x, more, to="varying") if more else x

    return jax.tree.map(wider, tree) if axes else tree


def zeros_like(like: Any) -> Array:
    """Zeros of the type of an array, or of an array described by its shape."""
    zeros: Array = cast(jnp.zeros(like.shape, like.dtype), axes_of(like))
    return zeros if explicit_mesh([like]) is None else on_mesh_of(zeros, like, spec_of(like))


def tracked() -> bool:
    """Whether JAX tracks over which axes arrays vary: inside ``shard_map`` unless ``check_vma=False``."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return bool(manual) and bool(axes_of(cast(jnp.zeros(()), frozenset(manual))))


def collectives(jaxpr: Any) -> list[tuple[str, str]]:
    """The communication between devices in a program: names of operations, each with its mesh axis."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    found = []
    for eqn in equations(jaxpr) if manual else ():
        axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        axes = axes if isinstance(axes, tuple) else (axes,)
        silent = eqn.primitive.name in ("axis_index", "pvary")
        found += [] if silent else [(eqn.primitive.name, axis) for axis in axes if axis in manual]
    return found


def settled(function: Callable[[PyTree], PyTree], state: PyTree) -> PyTree:
    """The state, with axes such that the function of it has the same types."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return state
    while True:
        wider = jax.tree.map(lambda x, y: cast(x, axes_of(y)), state, jax.eval_shape(function, state))
        if all(x is y for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(wider))):
            return state
        state = wider
