"""Types of numbers, also under JAX's strict promotion, which promotes none implicitly."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float64, Int


def lenient() -> AbstractContextManager[None]:
    """A context in which types are promoted, for foreign code: optax multiplies floats and counts."""
    return jax.numpy_dtype_promotion("standard")


def promoted(*numbers: Any) -> np.dtype:
    """The type to which JAX promotes numbers, arrays and types under standard promotion.

    >>> import jax, jax.numpy as jnp
    >>> with jax.numpy_dtype_promotion("strict"):
    ...     promoted(float, jnp.arange(2), jnp.bfloat16)
    dtype(bfloat16)
    """
    with lenient():
        return jnp.result_type(*numbers)


def widened(x: Array) -> Array:
    """Floats of 16 bits or fewer converted to 32 bits, in which derivatives are summed over the steps."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if narrow else x


def power_of_two(exponent: Int[Array, "..."]) -> Float64[Array, "..."]:
    """``2**exponent`` in float64, for ``|exponent| < 1023``, assembled from its bits.

    It is called where JAX's 64-bit mode is on.
    """
    biased = (exponent.astype(jnp.int64) + 1023) << 52
    return jax.lax.bitcast_convert_type(biased, jnp.float64)
