"""Where arrays are: on the devices of another, or divided among those of a mesh with automatic axes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from hypergrad._base.trees import PyTree

SMALL = 1 << 14  # arrays with fewer elements stay whole: they are laid end to end


def divided(axis: str | None, tree: PyTree) -> PyTree:
    """Arrays divided over a mesh axis, each along its last dimension that can be; None leaves them be.

    How other axes of the mesh divide them is left to the compiler.
    """
    if axis is None:
        return tree
    count = jax.sharding.get_abstract_mesh().shape[axis]

    def divide(x: Array) -> Array:
        places = [k for k, size in enumerate(x.shape) if size % count == 0]
        if x.size < SMALL or not places:
            return x
        spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
        return jax.lax.with_sharding_constraint(
            x, PartitionSpec(*spec[: places[-1]], axis, *spec[places[-1] + 1 :])
        )

    return jax.tree.map(divide, tree)


def whole(axis: str | None, tree: PyTree) -> PyTree:
    """Undo `divided`: every device gets all of every array."""
    if axis is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def on_host(offload: bool, tree: PyTree) -> PyTree:
    """Arrays in the memory of the host, if they are to be offloaded; inside of a compiled program."""
    return jax.device_put(tree, jax.memory.Space.Host) if offload else tree


def on_device(offload: bool, tree: PyTree) -> PyTree:
    """Undo `on_host`."""
    return jax.device_put(tree, jax.memory.Space.Device) if offload else tree


def placed_like(x: Any, old: Array) -> Array:
    """An array on the devices of another; on those of what it is used with if that is on none for good."""
    return jax.device_put(x, old.sharding) if getattr(old, "committed", True) else jnp.asarray(x)
