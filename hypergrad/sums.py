"""Sums of floats whose bits do not depend on the order in which they are added.

Floats are cut at fixed places of the number line, and what lies between two places is added up as
integers.  Integers are associative, so one device and eight, or two machines, find the same sum.  A sum
keeps only the part around its largest number, and which part that is does not depend on the order either:
the part moves up when a larger number comes, and never down.

==========  ============  ==========================================================================
symbol      name          meaning
==========  ============  ==========================================================================
``x``       number        ``± m 2**(e - bias)``, with the ``p`` bits of ``m`` and the exponent ``e >= 1``
``b``       bin           ``e div 32``: where the number stands
``B``       top           the highest bin of all numbers so far, for each element
``v``       limbs         ``m 2**(e mod 32)``, in units of its bin; 24 bits of ``m`` to a limb
``K``       bins kept     2 for float32 and 3 for float64: ``B, B - 1, ...``
==========  ============  ==========================================================================

A number below the bins that are kept is dropped.  It is smaller than the largest one by a factor of
``2**-32`` for float32, and ``2**-64`` for float64.

Source: Demmel and Nguyen, "Parallel reproducible summation", IEEE Transactions on Computers 2015, with
integers in the bins.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32, Int64

from hypergrad._base.dtypes import power_of_two

WIDTH = 32  # exponents in a bin
LIMB = 24  # bits of a mantissa in a limb; shifted by an exponent in a bin, it has 55
MOST = 1 << (63 - LIMB - WIDTH + 1)  # numbers in a sum, so that no limb overflows

Limbs = tuple[Int64[Array, "*leaf"], ...]


class Kind(NamedTuple):
    """How the floats of a dtype are cut.

    Attributes:
      bits: of a float.
      fraction: bits of its fraction.
      limbs: of its mantissa.
      bins: how many are kept.
    """

    bits: int
    fraction: int
    limbs: int
    bins: int

    @property
    def bias(self) -> int:
        """A float is ``m 2**(e - bias)``."""
        return (1 << (self.bits - self.fraction - 2)) - 1 + self.fraction

    @property
    def exponents(self) -> int:
        """How many exponents there are; the last one belongs to what is not finite."""
        return 1 << (self.bits - self.fraction - 1)


KINDS = {jnp.dtype("float32"): Kind(32, 23, 1, 2), jnp.dtype("float64"): Kind(64, 52, 3, 3)}


class Sum(NamedTuple):
    """A sum of arrays of one shape.

    Attributes:
      top: int32, ``B``, for each element; one more than any finite number has if one was not finite.
      limbs: int64, of the bins ``B, B - 1, ...``, the highest first, and of each the lowest limb first.
    """

    top: Int32[Array, "*leaf"]
    limbs: tuple[Limbs, ...]


def zero(like: Float[Array, "*leaf"]) -> Sum:
    """The sum of no arrays, of the shape and dtype of another one.

    Args:
      like: floats, or their shape and dtype.
    """
    kind = KINDS[jnp.dtype(like.dtype)]
    with jax.enable_x64(True):
        nothing = jnp.zeros(like.shape, jnp.int64)
        return Sum(jnp.zeros(like.shape, jnp.int32), ((nothing,) * kind.limbs,) * kind.bins)


def add(total: Sum, x: Float[Array, "*leaf"]) -> Sum:
    """Add an array to a sum.

    Args:
      total: the sum so far.
      x: floats.

    >>> import jax.numpy as jnp
    >>> from hypergrad import sums
    >>> total = sums.zero(jnp.zeros(()))
    >>> for x in (1.0, 2.0**-30, -1.0):
    ...     total = sums.add(total, jnp.float32(x))
    >>> float(sums.value(total, jnp.float32)) == 2.0**-30
    True
    """
    with jax.enable_x64(True):
        bin, limbs = _cut(x)
        top = jnp.maximum(total.top, bin)
        moved = _moved(total, top)
        return Sum(
            top,
            tuple(
                tuple(jnp.where(top - bin == k, new, 0) + old for old, new in zip(kept, limbs))
                for k, kept in enumerate(moved)
            ),
        )


def merged(total: Sum, axes: tuple[str, ...]) -> tuple[Sum, Bool[Array, ""]]:
    """The sum of the sums of all devices, inside of ``jax.shard_map``.

    Args:
      total: the sum of one device.
      axes: of the mesh.

    Returns:
      The sum, the same on all devices, and whether what was sent adds up to what was received.
    """
    with jax.enable_x64(True):
        top = jax.lax.pmax(total.top, axes)
        mine = _moved(total, top)
        everyone = _exchanged(mine, axes)
        # Integers wrap in any order alike, so the sum of all elements is a check of every one of them.
        sent = jax.lax.psum(_trace(mine), axes)
        agreed = jax.lax.psum(_trace(top), axes) == jax.lax.psum(1, axes) * _trace(top)
        sound = agreed & (sent == _trace(everyone)) & jnp.all(top >= total.top)
        everywhere = jax.lax.psum(sound.astype(jnp.int32), axes) == jax.lax.psum(1, axes)
        return Sum(top, everyone), everywhere


def value(
    total: Sum, dtype: jax.typing.DTypeLike, divisor: float | Float[Array, ""] = 1
) -> Float[Array, "*leaf"]:
    """The float nearest to a sum, over a divisor, except that it is rounded twice.

    Args:
      total: the sum.
      dtype: of the arrays that were added.
      divisor: of the sum, a positive number; for a mean, how many arrays were added.

    Returns:
      Floats; NaN where one of those that were added was not finite.
    """
    kind = KINDS[jnp.dtype(dtype)]
    with jax.enable_x64(True):
        # Every product is by a power of two, so a fused multiply-add rounds alike.
        result = jnp.zeros(total.top.shape, jnp.float64)
        for k, kept in enumerate(total.limbs):
            for i in reversed(range(kind.limbs)):
                result += kept[i].astype(jnp.float64) * 2.0 ** (LIMB * i - WIDTH * k)
        exponent = WIDTH * total.top - kind.bias
        half = exponent >> 1
        result = result / divisor * power_of_two(half) * power_of_two(exponent - half)
        return jnp.where(total.top > _highest(kind), jnp.nan, result).astype(dtype)


def _cut(x: Float[Array, "*leaf"]) -> tuple[Int32[Array, "*leaf"], Limbs]:
    """The bins of floats, and their limbs."""
    kind = KINDS[jnp.dtype(x.dtype)]
    bits = jax.lax.bitcast_convert_type(x, jnp.int32 if kind.bits == 32 else jnp.int64)
    field = ((bits >> kind.fraction) & (kind.exponents - 1)).astype(jnp.int32)
    fraction = (bits & ((1 << kind.fraction) - 1)).astype(jnp.int64)
    mantissa = jnp.where(field > 0, fraction | (1 << kind.fraction), fraction)
    exponent = jnp.maximum(field, 1)
    shift = (exponent & (WIDTH - 1)).astype(jnp.int64)
    sign = jnp.where(bits < 0, jnp.int64(-1), jnp.int64(1))
    limbs = tuple(sign * ((mantissa >> (LIMB * i) & ((1 << LIMB) - 1)) << shift) for i in range(kind.limbs))
    finite = field < kind.exponents - 1
    bin = jnp.where(finite, exponent // WIDTH, _highest(kind) + 1)
    # Nothing stands in the lowest bin, wherever the sum is.
    return jnp.where(mantissa == 0, 0, bin), limbs


def _highest(kind: Kind) -> int:
    """The highest bin of a finite number."""
    return (kind.exponents - 2) // WIDTH


def _moved(total: Sum, top: Int32[Array, "*leaf"]) -> tuple[Limbs, ...]:
    """The limbs of a sum as they stand in bins whose highest is another one, not lower."""
    up = top - total.top
    return tuple(
        tuple(
            sum(
                (jnp.where(up == k - j, total.limbs[j][i], 0) for j in range(k)),
                start=jnp.where(up == 0, total.limbs[k][i], 0),
            )
            for i in range(len(total.limbs[k]))
        )
        for k in range(len(total.limbs))
    )


def _exchanged(limbs: tuple[Limbs, ...], axes: tuple[str, ...]) -> tuple[Limbs, ...]:
    """The sums of the integers of all devices."""
    return jax.lax.psum(limbs, axes)


def _trace(arrays: object) -> Int64[Array, ""]:
    """The sum of all elements of integer arrays, each weighed by an odd number of its own array."""
    leaves = jax.tree.leaves(arrays)
    parts = [(2 * k + 1) * jnp.sum(x, dtype=jnp.int64) for k, x in enumerate(leaves)]
    return sum(parts, start=jnp.zeros((), jnp.int64))
