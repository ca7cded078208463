"""Exactly invertible arithmetic on fixed-point numbers.

A float array ``x`` is held as integers ``high`` with ``x = high * 2**-radix``.  Two moves act on them
and both can be undone bit for bit:

* a **shift** adds an integer, and is undone by subtracting it;
* a **scale** multiplies by a ratio ``n / 2**32`` in (0, 1].  That would destroy ``log2(2**32 / n)``
  bits of every element; they are kept in an information buffer instead (Algorithm 3 of Maclaurin,
  Duvenaud, Adams 2015, with the buffer's big integer cut into bytes).

===============  =====================  ============================================================
symbol           shape and type         meaning
===============  =====================  ============================================================
``high``         leaf, int64            the number, in units of ``2**-radix``
``information``  leaf, uint64           32 bits ``i``, the top of the information buffer, above 32 digits
                                        of the number below the radix: ``i d + (c mod d)`` of the paper
``tape``         bytes, uint8           bytes that left ``i``, oldest first
``bits``         scalar or leaf, int64  upper bound of log2(buffer), in units of ``2**-40`` bit
``n``            scalar or leaf,        numerator of the factor, in ``[2**25, 2**32]``
                 uint64
===============  =====================  ============================================================

The digits shuffled by a scale lie *below* the radix, so that a scale is also accurate to one unit in the
last place of ``high``.  When a whole array shares one factor, its registers fill in lock-step and a byte
of every element is spilled at the same step, as one row of the tape.  When every element has its own
factor the bytes are packed densely in the order in which they come.

``bits`` bounds the buffer from the factors alone, never from the data, so both directions know when bytes
move.  It is a plain running sum, hence invertible itself.

All functions work with JAX's 64-bit mode switched off; none of them changes it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

DIGITS = 32  # binary digits of a factor
BASE = 1 << DIGITS  # common denominator of all factors
SMALLEST_FACTOR = 2.0**-7  # so that at most one byte leaves the register per scale
LIMIT = 1 << 62  # |high| stays below; one addition of two such numbers cannot wrap
MARGIN = 24  # the register's bound never falls below 2**24, so rounding it up costs < 2**-23 bit
BIT = 1 << 40  # resolution of `Buffer.bits`
ROUNDING = 2.0**-23  # bits per scale: log2(1 + 2**-24), rounded up


class Buffer(NamedTuple):
    """Information buffer of one array: what scaling it has destroyed (see the table above)."""

    information: Array
    bits: Array


def to_fixed(x: Array, radix: int) -> Array:
    """Nearest fixed-point number: ``round(x * 2**radix)``, as int64; NaN and overflow saturate."""
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64) * 2.0**radix
        # A NaN must be seen as an overflow by `fits`, and not pass as the zero it would convert to.
        wide = jnp.where(jnp.isnan(wide), jnp.inf, jnp.round(wide))
        return jnp.clip(wide, -2.0 * LIMIT, 2.0 * LIMIT - 1024).astype(jnp.int64)


def to_float(high: Array, radix: int, dtype: jax.typing.DTypeLike) -> Array:
    """The float nearest to ``high * 2**-radix``."""
    with jax.enable_x64(True):
        return high.astype(dtype) * jnp.asarray(2.0**-radix, dtype)


def fits(high: Array) -> Array:
    """Whether every element is inside the range: ``all(|high| < 2**62)``."""
    with jax.enable_x64(True):
        return jnp.all((high < LIMIT) & (high > -LIMIT))


def shift(high: Array, amount: Array, radix: int) -> Array:
    """Add ``round(amount * 2**radix)``.  Wraps around, so that `unshift` undoes it whatever happens."""
    with jax.enable_x64(True):
        return high + to_fixed(amount, radix)


def unshift(high: Array, amount: Array, radix: int) -> Array:
    """Undo `shift` by the same amount."""
    with jax.enable_x64(True):
        return high - to_fixed(amount, radix)


def numerator(factor: Array) -> Array:
    """``n`` such that ``n / 2**32`` is the ratio nearest to ``factor``, as uint64.

    Factors outside ``[2**-7, 1]`` give 0, which `scale` must not be given; check with `admissible`.
    """
    with jax.enable_x64(True):
        wide = jnp.round(jnp.asarray(factor, jnp.float64) * BASE)
        inside = (wide >= BASE * SMALLEST_FACTOR) & (wide <= BASE)
        return jnp.where(inside, wide, 0.0).astype(jnp.uint64)


def complement(a: Array, b: Array) -> Array:
    """The numerator of the ratio nearest to ``1 - a b``, which floats would round when ``a b`` is small.

    Its sum is one of integers, so that no compiler changes its bits by rounding ``1 - a b`` only once.
    """
    with jax.enable_x64(True):
        wide = BASE - jnp.round(jnp.asarray(a, jnp.float64) * jnp.asarray(b, jnp.float64) * BASE)
        inside = (wide >= BASE * SMALLEST_FACTOR) & (wide <= BASE)
        return jnp.where(inside, wide, 0.0).astype(jnp.uint64)


def spread(n: Array, shape: tuple[int, ...]) -> Array:
    """A numerator as `scale` wants it: a scalar for the whole array, or one for every element."""
    n = jnp.asarray(n)
    return n.reshape(()) if n.size == 1 else jnp.broadcast_to(n, shape)


def admissible(n: Array) -> Array:
    """Whether all numerators are usable: ``2**25 <= n <= 2**32``."""
    with jax.enable_x64(True):
        return jnp.all((n >= jnp.uint64(BASE * SMALLEST_FACTOR)) & (n <= jnp.uint64(BASE)))


def quantised(factor: Array, n: Array) -> Array:
    """The factor that a numerator stands for, ``n / 2**32``, in the type of the factor.

    Where the factor cannot be undone and has no numerator, it is the factor itself.
    """
    with jax.enable_x64(True):
        ratio = (n.astype(jnp.float64) * (1.0 / BASE)).astype(factor.dtype)
        return jnp.where(n > 0, ratio, factor)


def cost(n: Array) -> Array:
    """Growth of the buffer per element in one scale by ``n``: ``log2(2**32 / n)``, in ``2**-40`` bits."""
    with jax.enable_x64(True):
        bits = DIGITS - jnp.log2(jnp.maximum(n, jnp.uint64(1)).astype(jnp.float64)) + ROUNDING
        # Scaling by one moves nothing into the buffer and must cost nothing.
        return jnp.where(n >= jnp.uint64(BASE), 0.0, jnp.ceil(bits * BIT)).astype(jnp.int64)


def spilled(bits: Array) -> Array:
    """Bytes per element that have left the register when the buffer's bound stands at ``bits``.

    As int32: indices of 64 bits do not survive ``vmap`` and ``jit`` with JAX's 64-bit mode off.
    """
    with jax.enable_x64(True):
        return jnp.maximum(0, -((DIGITS * BIT - bits) // (8 * BIT))).astype(jnp.int32)


def tape_length(bits: Array) -> Array:
    """Length of tape that ``bits`` needs: rows (one factor per array) or bytes (one per element)."""
    with jax.enable_x64(True):
        return jnp.sum(spilled(bits).astype(jnp.int64))


def empty_bits(shape: tuple[int, ...]) -> Array:
    """Bound of an empty buffer, for factors of the given shape."""
    with jax.enable_x64(True):
        return jnp.full(shape, MARGIN * BIT, jnp.int64)


def empty(shape: tuple[int, ...], factor_shape: tuple[int, ...]) -> Buffer:
    """An empty information buffer for an array of this shape; see `blank_tape` for its tape.

    Args:
      shape: of the array.
      factor_shape: ``()`` if one factor scales the whole array, else ``shape``.
    """
    with jax.enable_x64(True):
        return Buffer(jnp.zeros(shape, jnp.uint64), empty_bits(factor_shape))


def blank_tape(shape: tuple[int, ...], factor_shape: tuple[int, ...], length: int) -> Array:
    """A tape for the bytes of an array's buffer; ``length`` in rows or bytes, from `tape_length`."""
    # A row is written at every step: one row of slack takes what will not stay.
    return jnp.zeros((length + 1, *(shape if factor_shape == () else ())), jnp.uint8)


def is_empty(buffer: Buffer) -> Array:
    """Whether nothing is left in the buffer, which is so exactly at the start of a run."""
    with jax.enable_x64(True):
        return jnp.all(buffer.information == 0) & jnp.all(buffer.bits == MARGIN * BIT)


def scale(high: Array, buffer: Buffer, tape: Array, n: Array) -> tuple[Array, Buffer, Array]:
    """Multiply by ``n / 2**32`` exactly, keeping what is destroyed in the buffer.

    With ``c = high * 2**32 + low``, ``d = 2**32`` and the buffer ``i``, Algorithm 3 reads::

        i <- i d + (c mod d);   c <- (c div d) n + (i mod n);   i <- i div n

    Args:
      high: int64 array.
      buffer: its information buffer.
      tape: where the buffer's bytes go when its register is full.
      n: uint64, ``2**25 <= n <= 2**32``, a scalar or of the array's shape, like ``buffer.bits``.

    Returns:
      The scaled array, the buffer and the tape.  Writing beyond the end of the tape destroys it;
      compare `tape_length` of the final ``buffer.bits`` with the length it was made with.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015, Algorithm 3.

    >>> import jax.numpy as jnp
    >>> from hypergrad import exact
    >>> x = exact.to_fixed(jnp.array([1.0, -2.0]), radix=48)
    >>> n, tape = exact.numerator(0.9), exact.blank_tape((2,), (), length=0)
    >>> y, buffer, tape = exact.scale(x, exact.empty((2,), ()), tape, n)
    >>> exact.to_float(y, 48, jnp.float32)
    Array([ 0.9, -1.8], dtype=float32)
    >>> bool((exact.unscale(y, buffer, tape, n)[0] == x).all())
    True
    """
    with jax.enable_x64(True):
        quotient = jax.lax.optimization_barrier(buffer.information // n)
        bits = buffer.bits + cost(n)
        register, tape = _spill(quotient, tape, buffer.bits, bits)
        # The number (high, low) times n, plus the digit; lower * n + digit < 2**64.
        digit = buffer.information - quotient * n
        information = _join(register, _lower(high) * n + digit)
        # The digit once more, from what is new: the old information can be overwritten in place.
        product = _lower(high) * n
        product += _lower(information - product)
        new_high = (high >> DIGITS) * n.astype(jnp.int64) + (product >> DIGITS).astype(jnp.int64)
        return new_high, Buffer(information, bits), tape


def unscale(high: Array, buffer: Buffer, tape: Array, n: Array) -> tuple[Array, Buffer]:
    """Undo `scale` by the same ``n``: the array and the buffer as they were, bit for bit."""
    with jax.enable_x64(True):
        bits = buffer.bits - cost(n)
        # Long division of the 96-bit number (high, low) by n, in base 2**32; its top digit is signed.
        dividend = _join((high >> DIGITS) % n.astype(jnp.int64), high)
        upper_digit = jax.lax.optimization_barrier(dividend // n)
        lower_digit = _join(dividend - upper_digit * n, buffer.information) // n
        old_high = jax.lax.optimization_barrier(_join(upper_digit, lower_digit).astype(jnp.int64))
        # The remainder, below n <= 2**32, from its lowest 32 bits.
        digit = _lower(buffer.information - old_high.astype(jnp.uint64) * n)
        quotient = _unspill(buffer.information >> DIGITS, tape, bits, buffer.bits)
        return old_high, Buffer(quotient * n + digit, bits)


def _lower(word: Array) -> Array:
    """The low 32 bits of a word."""
    return word.astype(jnp.uint64) & jnp.uint64(BASE - 1)


def _join(upper: Array, lower: Array) -> Array:
    """The low 32 bits of two words as one."""
    return (upper.astype(jnp.uint64) << DIGITS) | _lower(lower)


def _spill(quotient: Array, tape: Array, before: Array, after: Array) -> tuple[Array, Array]:
    """Move a byte to the tape from registers that have become too long."""
    start = spilled(before)
    full = spilled(after) > start
    byte = quotient.astype(jnp.uint8)
    register = jnp.where(full, quotient >> 8, quotient)
    if before.ndim == 0:
        # The row is always written; unless registers were full the next one overwrites it.
        return register, jax.lax.dynamic_update_slice_in_dim(tape, byte[None], start, axis=0)
    # Out of range, hence dropped, where the register was not full.
    place = jnp.where(full.ravel(), _places(start, full), jnp.int32(tape.size))
    return register, tape.at[place].set(byte.ravel(), mode="drop")


def _unspill(register: Array, tape: Array, before: Array, after: Array) -> Array:
    """Undo `_spill`: the long register as it was."""
    start = spilled(before)
    full = spilled(after) > start
    if before.ndim == 0:
        byte = jax.lax.dynamic_index_in_dim(tape, start, axis=0, keepdims=False)
    else:
        byte = tape.at[_places(start, full)].get(mode="fill", fill_value=0).reshape(register.shape)
    return jnp.where(full, (register << 8) | byte.astype(jnp.uint64), register)


def _places(start: Array, full: Array) -> Array:
    """Where on a dense tape the bytes of the full registers stand, behind all earlier ones."""
    return jnp.sum(start, dtype=jnp.int32) + jnp.cumsum(full.ravel(), dtype=jnp.int32) - 1
