"""Meshes with explicit axes, where JAX has the sharding of every array in its type.

Exact arithmetic lays arrays of many layers end to end and reads single elements, which has no sharding that
follows from the types.  So it is done with the same axes automatic, where the compiler decides, while the
user's functions see the mesh and the types with which they were traced.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from hypergrad._base.trees import PyTree


def explicit_mesh(types: Sequence[Any]) -> AbstractMesh | None:
    """The first mesh with explicit axes in the types of some arrays, if there is one."""
    meshes = [_mesh_of(kind) for kind in types]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _mesh_of(kind: Any) -> AbstractMesh:
    """The mesh in the type of an array; that around it if it has none."""
    mesh = getattr(getattr(kind, "sharding", None), "mesh", None)
    return jax.sharding.get_abstract_mesh() if mesh is None else mesh


def spec_of(kind: Any) -> PartitionSpec:
    """How the type of an array says it is sharded."""
    return kind.sharding.spec


def on_mesh_of(x: jax.Array, like: Any, spec: PartitionSpec | None = None) -> jax.Array:
    """An array on the mesh that the type of another names, if that has explicit axes; whole by default."""
    if explicit_mesh([jax.typeof(x), like]) is None:
        return x
    with jax.sharding.use_abstract_mesh(_mesh_of(like)):
        return jax.sharding.reshard(x, PartitionSpec() if spec is None else spec)


def with_automatic_axes(
    function: Callable[..., PyTree], specs: Callable[[PyTree], PyTree], *arguments: PyTree
) -> PyTree:
    """``function(*arguments)`` with explicit axes made automatic.

    Args:
      function: of the arguments.
      specs: from the result to how each of its arrays is to be sharded.
      arguments: trees of arrays.
    """
    mesh = explicit_mesh([jax.typeof(x) for x in jax.tree.leaves(arguments)])
    if mesh is None:
        return function(*arguments)
    automatic = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(automatic):
        result = function(*jax.sharding.reshard(arguments, PartitionSpec()))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.reshard(result, specs(result))


def with_explicit_axes(function: Callable[..., PyTree], types: Sequence[Any], *arrays: jax.Array) -> PyTree:
    """``function(*arrays)`` with axes explicit where they are so in the types with which it was traced."""
    mesh = explicit_mesh(types)
    if mesh is None or not set(mesh.explicit_axes) <= set(jax.sharding.get_abstract_mesh().auto_axes):
        return function(*arrays)
    specs = tuple(spec_of(kind) for kind in types)
    explicit = jax.sharding.explicit_axes(function, axes=mesh.explicit_axes, in_sharding=specs)
    return explicit(*arrays)
