"""Functions of Python that every device of a program calls, with what each of them holds.

``jax.pure_callback`` is called by the first device alone, and the others wait for its answer: if it raises
an error, they wait for ever.  And numbers that are alike to the compiler are not if something went wrong on
the way between devices.  How many devices there are is known only when the program is lowered, so this is
a primitive.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, PartitionSpec

AXIS = "every device"


def call_everywhere(call: Callable[..., np.ndarray], *numbers: Array) -> Array:
    """Call a function on every device.

    Args:
      call: a function of arrays ``(..., devices)``, which have what every device holds on the last axis, to
        bools ``(...)``.  If it raises an error, it does so on all devices.
      numbers: arrays ``(...)`` that are the same on all devices if nothing goes wrong, of one shape.

    Returns:
      What the function returned.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:  # in a shard_map, where every device is by itself
        return _alone(call, *numbers)
    if mesh.size > 1:
        return _together(call, mesh.axis_names)(*numbers)
    return EVERYWHERE.bind(*numbers, call=call)


def _alone(call: Callable[..., np.ndarray], *numbers: Array) -> Array:
    return _called(call, *(x[..., None] for x in numbers))


def _together(
    call: Callable[..., np.ndarray], axes: tuple[str, ...], mesh: AbstractMesh | None = None
) -> Callable[..., Array]:
    """On all devices of a mesh, by default of that around."""

    def every(*numbers: Array) -> Array:
        return _called(call, *(jax.lax.all_gather(x, axes, axis=x.ndim) for x in numbers))

    alike = PartitionSpec()
    return jax.shard_map(every, mesh=mesh, in_specs=alike, out_specs=alike, check_vma=False)


def _called(call: Callable[..., np.ndarray], *numbers: Array) -> Array:
    shape = jax.ShapeDtypeStruct(numbers[0].shape[:-1], bool)
    return jax.pure_callback(call, shape, *numbers, vmap_method="broadcast_all")


def _kind(*kinds: Any, call: Callable[..., np.ndarray]) -> Any:
    return jax.core.ShapedArray(kinds[0].shape, np.dtype(bool))


def _batched(numbers: Any, axes: Any, *, call: Callable[..., np.ndarray]) -> tuple[Array, int]:
    (size,) = {x.shape[axis] for x, axis in zip(numbers, axes) if axis is not None}
    rows = [
        jnp.broadcast_to(x, (size, *jnp.shape(x))) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(numbers, axes)
    ]
    return EVERYWHERE.bind(*rows, call=call), 0


def _lowered(context: Any, *numbers: Any, call: Callable[..., np.ndarray]) -> Any:
    count = getattr(context.module_context.axis_context, "num_devices", 1)
    mesh = AbstractMesh((count,), (AXIS,))
    function = partial(_alone, call) if count == 1 else _together(call, (AXIS,), mesh)
    return mlir.lower_fun(function, multiple_results=False)(context, *numbers)


EVERYWHERE = jax.extend.core.Primitive("call_everywhere")
EVERYWHERE.def_impl(jax.jit(lambda *x, call: EVERYWHERE.bind(*x, call=call), static_argnames="call"))
EVERYWHERE.def_abstract_eval(_kind)
batching.primitive_batchers[EVERYWHERE] = _batched
mlir.register_lowering(EVERYWHERE, _lowered, cacheable=False)
