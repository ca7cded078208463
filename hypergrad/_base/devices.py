"""Independent work, such as that of different layers, on different devices.

Inside a compiled program all devices of a mesh run the same code.  What only one of them should compute is
a branch that the others do not take.  The result, zero elsewhere, is then summed over all devices, which
gives every device exactly the bits that the one computed.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from hypergrad._base.trees import PyTree

Job = Callable[[], PyTree]
Evaluate = Callable[[Sequence[Job]], Sequence[PyTree]]


def in_turn(jobs: Sequence[Job]) -> list[PyTree]:
    """Run one job after the other, on the same device as everything else.

    >>> in_turn([lambda: 1, lambda: 2])
    [1, 2]
    """
    return [job() for job in jobs]


def spread(mesh: Mesh, owners: Sequence[int]) -> Evaluate:
    """Run jobs on the devices of a mesh, assigned to the owners in turn.

    The cost is the communication of every result to all devices.  Differentiable, inside or outside
    ``jax.jit``.

    Args:
      mesh: a mesh with one or more axes.
      owners: indices of devices in the flattened mesh.

    Returns:
      A function from jobs, which are pure functions without arguments that return trees of arrays, to their
      results.

    >>> import jax, jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("workers",))
    >>> spread(mesh, [0])([lambda: jnp.float32(1), lambda: jnp.float32(2)])
    [Array(1., dtype=float32), Array(2., dtype=float32)]
    """

    # Automatic axes, because jobs may close over what was on the mesh before, which the explicit axes of
    # `jax.make_mesh` forbid.
    mesh = Mesh(mesh.devices, mesh.axis_names)

    def evaluate(jobs: Sequence[Job]) -> list[PyTree]:
        def of_one_device() -> list[PyTree]:
            me = jax.lax.axis_index(mesh.axis_names)
            results = []
            for k, job in enumerate(jobs):
                shapes = jax.eval_shape(job)

                def nothing(shapes: PyTree = shapes) -> PyTree:
                    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

                results.append(jax.lax.cond(me == owners[k % len(owners)], job, nothing))
            return jax.lax.psum(results, mesh.axis_names)

        whole = PartitionSpec()
        return jax.shard_map(of_one_device, mesh=mesh, in_specs=(), out_specs=whole, check_vma=False)()

    return evaluate
