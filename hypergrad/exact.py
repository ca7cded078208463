"""Exactly invertible arithmetic on fixed-point numbers.

A float array ``x`` is held as integers: ``x = 2**-e (high + low_1 2**-32 + low_2 2**-64 ...)``.  Two
moves act on them, and both can be undone bit for bit:

* a **shift** adds an integer, and is undone by subtracting it;
* a **scale** multiplies by a ratio ``n / 2**32`` in (0, 1], which destroys ``log2(2**32 / n)`` bits of
  every element.

If one ratio scales the whole array, the integers stay as they are, and ``e`` grows by that logarithm.
What is added afterwards is larger in units of ``2**-e``, so the integers grow, and from time to time every
element has to drop its last byte, which becomes a row of a tape: then ``e`` falls by 8.  On the way back
the byte is put back where it was.  So the bits that scales destroy are kept, as in Algorithm 3 of
Maclaurin, Duvenaud, Adams (2015), but nothing is multiplied or divided, and numbers may grow and shrink.

If every element has a ratio of its own, that is Algorithm 3: the bits go to an information buffer, whose
big integer is cut into bytes.

===============  =====================  ==================================================================
symbol           shape and type         meaning
===============  =====================  ==================================================================
``high``         leaf, int64            the number, in units of ``2**-e``
``low``          leaf, uint32, some     its next digits, 32 to a word, most significant word first
                 words or none
``e``            scalar, int64          the ``exponent``, in units of ``2**-40``; see `fitted`
``i``            leaf, uint32           top of the information buffer, ``register`` in the code
``I``            scalar or leaf,        bound of ``i``: ``i < I``, with ``2**24 < I <= 2**32``
                 uint64
``tape``         bytes, uint8           bytes that were dropped or left ``i``, oldest first
``bits``         scalar or leaf, int64  upper bound of log2(buffer), in units of ``2**-40`` bits
``n``            scalar or leaf,        numerator of the factor, in ``[2**25, 2**32]``
                 uint64
===============  =====================  ==================================================================

An array drops a byte when it must, which depends on its numbers; how many it has dropped is noted at
every step, and read on the way back.  ``bits`` bounds a buffer from the factors alone, never from the data,
so both directions know when its bytes move.  ``e`` and ``bits`` are plain running sums of integers and
therefore invertible themselves.

All functions work with JAX's 64-bit mode switched off; none of them changes it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float64, Int32, Int64, Integer, UInt8, UInt32, UInt64

from hypergrad._base.dtypes import power_of_two

# Shapes: "*leaf" is the shape of an array; "*factor" is the same, or () if the whole array has one factor.
Floats = Float[Array, "*leaf"]
Words = UInt32[Array, "*leaf"]
Bytes = UInt8[Array, "*leaf"]
Factors = Float[Array, "*factor"]
Numerators = UInt64[Array, "*factor"]
Bits = Int64[Array, "*factor"]
Flags = Bool[Array, "*factor"]
Digits = tuple[Int64[Array, "*leaf"], tuple[Words, ...]]  # of a number
Exponents = tuple[Int64[Array, "..."], Int64[Array, "..."]]  # an exponent and its floor
Tape = UInt8[Array, "..."]  # (rows, *leaf) if the array has one factor, (bytes,) if every element has one

DIGITS = 32  # binary digits of a factor, and of a low word
BASE = 1 << DIGITS  # common denominator of all factors
SMALLEST_FACTOR = 2.0**-7  # so that at most one byte leaves the register per scale
LIMIT = 1 << 62  # |high| stays below; one addition of two such numbers cannot wrap
MARGIN = 24  # the register's bound never falls below 2**24, so rounding it costs < 2**-23 bit
BIT = 1 << 40  # resolution of exponents and of `Buffer.bits`
ROUNDING = 2.0**-21  # bits per scale: more than rounding costs in `_bound` and in the quotients
UNSET = 1 << 60  # the exponent of an array of zeros, for which none has been chosen yet
LATER = -(1 << 20)  # the offset of an array of zeros, for which none has been chosen yet
NOTHING = -1022  # the `size` of zeros
LARGEST_OFFSET = 850  # of the unit of a part, alone or with the exponent
LARGEST_RADIX = 900  # so that 2**e and its neighbors are normal float64 numbers

# How far an array may outgrow the largest number it held when its exponent was chosen, in binary digits, by
# the number of its low words.  An array that drops no bytes has one more word for the same.
GROWTH = {0: 32, 1: 50}
MOST_BYTES = 100  # that a number may drop at once, if it has become as small and outgrows itself then
BYTES = 3  # that a number may drop, besides those that its factors cost, because it outgrows its headroom


def growth_of(words: int, whole: bool) -> int:
    """How far an array with so many low words may outgrow its first numbers, in binary digits."""
    return GROWTH[min(words - (not whole), 1)]


def headroom(words: int, whole: bool) -> int:
    """How far below the end of the range the largest number of an array is at first, in binary digits."""
    return growth_of(words, whole) - 8 * BYTES * whole


def _headrooms(words: int | Sequence[int], whole: bool) -> Array:
    """`headroom` of several arrays; those without words are all held whole."""
    found = [headroom(n, whole or n == 0) for n in np.ravel(words).tolist()]
    return jnp.asarray(found, jnp.int64).reshape(np.shape(words))


class Parts(NamedTuple):
    """How the rows of an array ``(rows, n)`` that is made of several differ: their unit is ``2**-(e + o)``.

    Attributes:
      owner: int32, ``(rows,)``, of which array every row is.
      offset: ``o``, int32, ``(rows, 1)``; `LATER` as long as all numbers of its array are zero.
    """

    owner: Int32[Array, " rows"]
    offset: Int32[Array, "rows 1"]


class Fixed(NamedTuple):
    """Fixed-point numbers of one array, ``2**-e (high + low_1 2**-32 + ...)``.

    Attributes:
      high: int64, the shape of the array.
      low: uint32 words of the shape of the array, most significant word first.
      exponent: ``e``, int64 scalar in units of ``2**-40``; from `UNSET` on as long as the array is zero and
        has none.
      floor: int64 scalar, the exponent below which it must not fall: that is how far numbers may grow.
      top: int64 scalar, a bound: ``|high| <= top``; kept forwards only.
      rows: int32 scalar, how many bytes of every element are on the tape.
      parts: of an array that is made of several; else None.
    """

    high: Int64[Array, "*leaf"]
    low: tuple[Words, ...]
    exponent: Int64[Array, ""]
    floor: Int64[Array, ""]
    top: Int64[Array, ""]
    rows: Int32[Array, ""]
    parts: Parts | None = None


def with_digits(number: Fixed, digits: Digits) -> Fixed:
    """A number with other digits."""
    return number._replace(high=digits[0], low=digits[1])


class Buffer(NamedTuple):
    """Information buffer of one array: what scaling it has destroyed.

    Attributes:
      register: ``i``, uint32, the shape of the array.
      bits: int64, upper bound of the buffer's length in units of ``2**-40`` bits; a scalar if the whole
        array has one factor, else the shape of the array.
    """

    register: Words
    bits: Bits


def size(x: Floats, by_row: bool = False) -> Int64[Array, "..."]:
    """The least ``s`` with ``|x| < 2**s``, of all elements; more than 1023 if one is NaN or infinite.

    Args:
      x: floats of any shape; ``(rows, n)`` if the size of each row is wanted, ``(rows, 1)``.
      by_row: whether it is.
    """
    with jax.enable_x64(True):
        axis = 1 if by_row else None
        largest = jnp.max(jnp.abs(x), axis=axis, keepdims=by_row, initial=0).astype(jnp.float64)
        return ((jax.lax.bitcast_convert_type(largest, jnp.int64) >> 52) & 2047) + NOTHING


def fitted(
    exponents: Exponents, top: Array, size: Int64[Array, "..."], words: int | Sequence[int]
) -> Exponents:
    """Choose the exponent of arrays that are all zero so far, now that numbers are added to them.

    The largest number is then `headroom` digits below the end of the range.  Zeros are the same with every
    exponent, so on the way back the one with which an array ended serves down to its start.

    Args:
      exponents: exponent and floor, of one array or of several.
      top: int64, their bounds; zeros whose exponent is set may lower it as far as the floor.
      size: int64, the `size` of what is added to each array.
      words: number of low words, one for each array.

    Returns:
      Exponents and floors; arrays that already have them keep them.
    """
    with jax.enable_x64(True):
        exponent, floor = exponents
        usable = (exponent >= UNSET) & (size > NOTHING) & (size <= 1023)
        free = _free(exponents, words)
        best = BIT * jnp.clip(62 - free - size, -LARGEST_RADIX, LARGEST_RADIX)
        new = jnp.where(usable, best, exponent), jnp.where(usable, best - (exponent - floor), floor)
        lower = jnp.clip(BIT * (61 - size), new[1], new[0])
        return jnp.where((top > 0) | (new[0] >= UNSET), new[0], lower), new[1]


def _free(exponents: Exponents, words: int | Sequence[int]) -> Int64[Array, "..."]:
    """The `headroom` of arrays, which are held whole if the exponent may fall."""
    exponent, floor = exponents
    return jnp.where(floor < exponent, _headrooms(words, True), _headrooms(words, False))


def with_offsets(parts: Parts, exponents: Exponents, sizes: Int64[Array, "rows 1"], words: int) -> Parts:
    """Choose the offsets of the parts that are all zero so far, now that numbers are added to them.

    Args:
      parts: of an array.
      exponents: its exponent and floor.
      sizes: of what is added, by row.
      words: number of its low words.

    Returns:
      Parts that have an offset keep it.  The others get that with which their numbers have the `headroom`
      of an array by itself.
    """
    with jax.enable_x64(True):
        exponent, (owner, offset) = exponents[0], parts
        # Counted anew: an array may be the last of many, and of fewer rows than there are arrays.
        part = jnp.cumsum(jnp.diff(owner, prepend=owner[:1]) != 0, dtype=jnp.int32)
        largest = jax.ops.segment_max(sizes[:, 0], part, len(owner), indices_are_sorted=True)
        size = largest.at[part].get(mode="promise_in_bounds")[:, None]
        free = _free(exponents, words)
        place = (exponent + BIT - 1) >> 40
        best = jnp.clip(62 - free - size - place, -LARGEST_OFFSET, LARGEST_OFFSET)
        best = jnp.minimum(best, LARGEST_OFFSET - place).astype(jnp.int32)
        usable = (offset == LATER) & (size > NOTHING) & (size <= 1023) & (exponent < UNSET)
        return Parts(owner, jnp.where(usable, best, offset))


def offsets(parts: Parts) -> Int32[Array, "rows 1"]:
    """The offsets of parts; 0 for those that have none, which are zero."""
    return jnp.where(parts.offset == LATER, 0, parts.offset)


def size_in_units(parts: Parts, size: Int64[Array, "rows 1"]) -> Int64[Array, "rows 1"]:
    """The `size` of what is added to parts in units of ``2**-e``; too large if they have no offset yet."""
    offset = jnp.where(parts.offset == LATER, -LATER, parts.offset).astype(jnp.int64)
    return jnp.where(size > NOTHING, size + offset, NOTHING)


def raised(parts: Parts | None, power: Float64[Array, ""], sign: int) -> Float64[Array, "..."]:
    """A power of two, ``2**(sign e)`` of a number, as one for each of its parts, if it has any."""
    with jax.enable_x64(True):
        return power if parts is None else power * power_of_two(sign * offsets(parts))


class Room(NamedTuple):
    """What makes room for a shift, of several arrays.

    Attributes:
      drop: int32, how many bytes the numbers drop.
      top: int64, the bound of the numbers after the shift; `LIMIT` if nothing makes enough room.
    """

    drop: Int32[Array, "..."]
    top: Int64[Array, "..."]


def _added(exponent: Int64[Array, "..."], size: Int64[Array, "..."]) -> Int64[Array, "..."]:
    """The least ``s`` such that all that is added is at most ``2**s``, in units of ``high``.

    To a number without an exponent, only zeros are added.
    """
    return jnp.where(exponent >= UNSET, 0, jnp.maximum(size + ((exponent + BIT - 1) >> 40), 0))


def room_as_is(top: Array, exponent: Array, size: Array, largest: Array) -> tuple[Room, Flags]:
    """The room for a shift if nothing is dropped, and whether it suffices; see `room_made`."""
    with jax.enable_x64(True):
        added = _added(exponent, size)
        after = top + (jnp.int64(1) << jnp.minimum(added, 62))
        enough = (added < 62) & (after < LIMIT) & ((exponent <= largest) | (exponent >= UNSET))
        return Room(jnp.zeros(top.shape, jnp.int32), after), enough


def room_made(top: Array, exponents: Exponents, size: Array, largest: Array, most: int) -> Room:
    """The room for a shift if as few bytes are dropped as possible.

    Args:
      top: int64, the largest ``|high|`` of each array.
      exponents: exponent and floor of each array.
      size: int64, of what is added.
      largest: int64, up to where exponents may be.
      most: how many bytes may be dropped.
    """
    with jax.enable_x64(True):
        top, exponent, floor, size, largest = (
            jnp.broadcast_to(x, (most + 1, *x.shape)) for x in (top, *exponents, size, largest)
        )
        counts = np.arange(most + 1).reshape(-1, *[1] * (top.ndim - 1))
        k = jnp.broadcast_to(jnp.asarray(counts), top.shape)
        lower = exponent - 8 * BIT * k
        after, enough = room_as_is((top >> jnp.minimum(8 * k, 63)) + (k > 0), lower, size, largest)
        enough &= (k == 0) | (lower >= floor)
        drop = jax.lax.argmax(enough, 0, jnp.int32)
        chosen = enough & (k == jnp.broadcast_to(drop, k.shape))
        return Room(drop, jnp.min(jnp.where(chosen, after.top, LIMIT), axis=0))


def magnitude(x: Int64[Array, "*leaf"]) -> Int64[Array, ""]:
    """The largest ``|x|`` of integers; 0 if there are no elements."""
    return jnp.max(jnp.abs(x), initial=0)


@lru_cache(maxsize=1)
def _powers() -> np.ndarray:
    """``2**(j 1024**-k)``, for ``k`` from 1 to 4 and in each ``j`` from 0 to 1023, rounded correctly."""
    rows, root = list[list[float]](), 2 << 160
    for _ in range(4):
        for _ in range(10):
            root = math.isqrt(root << 160)
        power, row = 1 << 160, list[float]()
        for _ in range(1024):
            row.append(power / (1 << 160))
            power = power * root >> 160
        rows.append(row)
    return np.array(rows).ravel()


def power(exponent: Int64[Array, "..."]) -> Float64[Array, "..."]:
    """``2**exponent`` in float64, of an exponent in units of ``2**-40``, inside ``[-1000, 1000]``.

    It is a product of numbers from tables.  Both directions must find the same one, and sums of products
    are not always rounded alike.
    """
    with jax.enable_x64(True):
        held = jnp.clip(exponent, -1000 * BIT, 1000 * BIT)
        places = jnp.stack([1024 * k + ((held >> 30 - 10 * k) & 1023) for k in range(4)])
        a, b, c, d = jnp.asarray(_powers()).at[places.astype(jnp.int32)].get(mode="promise_in_bounds")
        return ((a * b) * (c * d)) * power_of_two(held >> 40)


MAGIC = 1.5 * 2.0**52  # the last bit of a float of this size counts ones


def _to_integer(x: Float64[Array, "..."]) -> Int64[Array, "..."]:
    """The integer nearest to a float64 below ``2**51`` in size, as int64.

    Compilers and processors convert 64-bit words one by one; this is one addition and one subtraction.
    """
    ones = jax.lax.bitcast_convert_type(x + MAGIC, jnp.int64)
    return ones - int(np.float64(MAGIC).view(np.int64))


def _to_long(x: Float64[Array, "..."]) -> Int64[Array, "..."]:
    """The integer nearest to a float64 below ``2**63`` in size, as int64, by halves; see `_to_integer`."""
    upper = x / BASE
    return (_to_integer(upper) << DIGITS) + _to_integer((upper - jnp.round(upper)) * BASE)


def _from_integer(x: Int64[Array, "..."]) -> Float64[Array, "..."]:
    """An int64 below ``2**51`` in size as float64: the inverse of `_to_integer`."""
    return jax.lax.bitcast_convert_type(x + int(np.float64(MAGIC).view(np.int64)), jnp.float64) - MAGIC


def _from_word(x: Integer[Array, "..."]) -> Float64[Array, "..."]:
    """The float64 nearest to a 64-bit integer, signed or unsigned."""
    upper = _from_integer((x >> DIGITS).astype(jnp.int64))
    return upper * BASE + _from_integer(_lower(x).astype(jnp.int64))


def _digits(
    x: Floats, up: Float64[Array, "..."], words: int
) -> tuple[Int64[Array, "*leaf"], tuple[Words, ...]]:
    """``x up`` rounded to ``high + low_1 2**-32 + ...``; NaN and overflow saturate."""
    wide = x.astype(jnp.float64) * up
    # A NaN is not below the limit and saturates too.  And no compiler contracts through a choice: what
    # follows would be other bits if it took the product before it was rounded.
    limit = 2.0 * LIMIT - 1024
    rest = jnp.where(wide < limit, wide, limit)
    rest = jnp.where(rest > -limit, rest, -limit)
    high, below, low = _to_long(rest), list[Array](), list[Array]()
    for _ in range(words):
        rest = (rest - jnp.round(rest)) * BASE  # exact: both floats begin with the same digits
        below.append(_to_integer(rest))
    carry = jnp.int64(0)
    for digit in reversed(below):
        digit += carry
        low.insert(0, digit.astype(jnp.uint32))
        carry = digit >> DIGITS
    return high + carry, tuple(low)


def zero(
    shape: tuple[int, ...],
    words: int,
    radix: int | None = None,
    whole: bool = False,
    owner: Int32[np.ndarray, " rows"] | None = None,
) -> Fixed:
    """Zeros in fixed point.

    Args:
      shape: of the array.
      words: number of low words, from 0 to 2.
      radix: binary digits of ``high`` after the point when no more bytes may be dropped; by default chosen
        when numbers are added.
      whole: whether they may drop bytes to grow; without low words they must, if they are to grow far.
      owner: of an array ``(rows, n)`` that is made of several, of which every row is.
    """
    with jax.enable_x64(True):
        floor = jnp.int64(UNSET if radix is None else radix * BIT)
        exponent = floor + 8 * BYTES * BIT if whole else floor
        low = (jnp.zeros(shape, jnp.uint32),) * words
        parts = None
        if owner is not None:
            offset = jnp.full((len(owner), 1), LATER if radix is None else 0, jnp.int32)
            parts = Parts(jnp.asarray(owner), offset)
        return Fixed(jnp.zeros(shape, jnp.int64), low, exponent, floor, jnp.int64(0), jnp.int32(0), parts)


def to_fixed(x: Floats, radix: int, words: int = 1) -> Fixed:
    """The fixed-point number nearest to ``x``; NaN and overflow saturate.

    Args:
      x: floats of any shape.
      radix: binary digits of ``high`` after the point.
      words: number of low words, from 0 to 2.
    """
    return shift(zero(jnp.shape(x), words, radix), jnp.asarray(x))


def to_float(number: Fixed, dtype: jax.typing.DTypeLike) -> Floats:
    """The float nearest to a fixed-point number, except that it is rounded a few times.

    Args:
      number: fixed-point numbers of any shape.
      dtype: of the floats that are returned.
    """
    return float_of(number[:2], raised(number.parts, power(-number.exponent), -1), dtype)


def float_of(digits: Digits, down: Float64[Array, "..."], dtype: jax.typing.DTypeLike) -> Floats:
    """`to_float` of words, given ``2**-e``."""
    with jax.enable_x64(True):
        high, low = digits
        total = high.astype(jnp.float64)
        for k, word in enumerate(low, start=1):
            total += word.astype(jnp.float64) * 2.0 ** (-DIGITS * k)
        return (total * down).astype(dtype)


def fits(number: Fixed) -> Bool[Array, ""]:
    """Whether every element lies inside the range: ``all(|high| < 2**62)``."""
    with jax.enable_x64(True):
        return number.top < LIMIT


def shift(number: Fixed, amount: Floats) -> Fixed:
    """Add the fixed-point number nearest to the amount; `unshift` undoes it, even after overflow.

    A number that has no exponent yet is zero and takes the one that suits the amount.

    Args:
      number: to which the amount is added.
      amount: floats of the same shape.
    """
    with jax.enable_x64(True):
        most = size(amount)
        exponents = fitted((number.exponent, number.floor), number.top, most, len(number.low))
        largest = jnp.int64(LARGEST_RADIX * BIT)
        room = room_made(magnitude(number.high), exponents, most, largest, most=0)
        new = number._replace(exponent=exponents[0], floor=exponents[1], top=room.top)
        return with_digits(new, plus(number[:2], amount, power(exponents[0])))


def unshift(number: Fixed, amount: Floats) -> Fixed:
    """Undo `shift` by the same amount."""
    return with_digits(number, minus(number[:2], amount, power(number.exponent)))


def plus(digits: Digits, amount: Floats, up: Float64[Array, "..."]) -> Digits:
    """`shift` of words, given ``2**e``."""
    with jax.enable_x64(True):
        old_high, old_low = digits
        high, low = _digits(amount, up, len(old_low))
        carry = jnp.asarray(False)
        sums: list[Array] = []
        # Carries are read off the new words, so that these can be written over the old ones.
        for old, new in reversed([*zip(old_low, low)]):
            sums.insert(0, old + new + carry.astype(jnp.uint32))
            carry = (sums[0] < new) | (carry & (sums[0] == new))
        return old_high + high + carry.astype(jnp.int64), tuple(sums)


def minus(digits: Digits, amount: Floats, up: Float64[Array, "..."]) -> Digits:
    """Undo `plus`."""
    with jax.enable_x64(True):
        old_high, old_low = digits
        high, low = _digits(amount, up, len(old_low))
        borrow = jnp.asarray(False)
        rests: list[Array] = []
        for old, new in reversed([*zip(old_low, low)]):
            rests.insert(0, old - new - borrow.astype(jnp.uint32))
            borrow = (rests[0] > ~new) | (borrow & (rests[0] == ~new))
        return old_high - high - borrow.astype(jnp.int64), tuple(rests)


def coarseness(down: Float64[Array, "..."], words: int, amount: Floats, part: float) -> Floats:
    """By how much rounding exceeds the part of an amount that it may take: ``min(|a|, u/2) - part |a|``.

    Args:
      down: ``2**-e`` of the number to which the amount is added; its last digit has the unit ``u``.
      words: number of its low words.
      amount: ``a``, as given to `shift`.
      part: of the amount that rounding may take, in (0, 1).

    Returns:
      Floats, the shape of the amount; negative if rounding takes less.
    """
    with jax.enable_x64(True):
        half = (down * 0.5 ** (DIGITS * words + 1)).astype(amount.dtype)
        size = jnp.abs(amount)
        return jnp.minimum(size, half) - part * size


# ---- one factor for a whole array


def decay(n: Numerators) -> Int64[Array, "..."]:
    """By how much an exponent grows in one scale: ``log2(2**32 / n)``, in ``2**-40`` bits."""
    with jax.enable_x64(True):
        bits = DIGITS - jnp.log2(jnp.maximum(n, jnp.uint64(1)).astype(jnp.float64))
        return jnp.where(n >= jnp.uint64(BASE), 0.0, jnp.round(bits * BIT)).astype(jnp.int64)


def lowered(exponent: Int64[Array, "..."], grown: Int64[Array, "..."]) -> Int64[Array, "..."]:
    """An exponent that grows by so much, if it is set."""
    with jax.enable_x64(True):
        return jnp.where(exponent >= UNSET, exponent, exponent + grown)


def dropped(digits: Digits) -> tuple[Digits, Bytes]:
    """Numbers without their last byte, and that byte."""
    with jax.enable_x64(True):
        high, low = digits
        words = [high.astype(jnp.uint32), *low]
        shorter = [(word >> 8) | (above << 24) for above, word in zip(words, low)]
        return (high >> 8, tuple(shorter)), words[-1].astype(jnp.uint8)


def regained(digits: Digits, byte: Bytes) -> Digits:
    """Undo `dropped`."""
    with jax.enable_x64(True):
        high, low = digits
        below = [word >> 24 for word in low] + [byte.astype(jnp.uint32)]
        longer = [(word << 8) | more for word, more in zip(low, below[1:])]
        return (high << 8) | below[0].astype(jnp.int64), tuple(longer)


# ---- a factor for every element: Algorithm 3


def numerator(factor: Array) -> Numerators:
    """The numerator ``n`` of the ratio ``n / 2**32`` nearest to a factor, as uint64.

    Factors outside ``[2**-7, 1]`` give 0, which `scale` must not be given; check with `admissible`.

    Args:
      factor: floats of any shape.
    """
    with jax.enable_x64(True):
        wide = jnp.round(jnp.asarray(factor, jnp.float64) * BASE)
        inside = (wide >= BASE * SMALLEST_FACTOR) & (wide <= BASE)
        return jnp.where(inside, wide, 0.0).astype(jnp.uint64)


def complement(a: Factors, b: Factors) -> Numerators:
    """The numerator of the ratio nearest to ``1 - a b``, which floats would round if ``a b`` is small.

    The difference is taken in integers, so that no compiler changes its bits by fusing ``1 - a b``.

    Args:
      a: floats, such as a learning rate.
      b: floats, such as a weight decay.

    Returns:
      uint64; 0 if the ratio is outside ``[2**-7, 1]``, as for `numerator`.
    """
    with jax.enable_x64(True):
        wide = BASE - jnp.round(jnp.asarray(a, jnp.float64) * jnp.asarray(b, jnp.float64) * BASE)
        inside = (wide >= BASE * SMALLEST_FACTOR) & (wide <= BASE)
        return jnp.where(inside, wide, 0.0).astype(jnp.uint64)


def spread(n: Array, shape: tuple[int, ...]) -> Numerators:
    """A numerator as `scale` expects it: a scalar for the whole array, or one for every element."""
    n = jnp.asarray(n)
    return n.reshape(()) if n.size == 1 else jnp.broadcast_to(n, shape)


def admissible(n: Numerators) -> Bool[Array, ""]:
    """Whether all numerators are usable: ``2**25 <= n <= 2**32``."""
    with jax.enable_x64(True):
        return jnp.all((n >= jnp.uint64(BASE * SMALLEST_FACTOR)) & (n <= jnp.uint64(BASE)))


def quantized(factor: Factors, n: Numerators) -> Factors:
    """The factor that a numerator stands for, ``n / 2**32``, in the dtype of the factor.

    Args:
      factor: floats; returned as they are where ``n`` is 0, that is, where the factor cannot be undone.
      n: uint64, from `numerator`.
    """
    with jax.enable_x64(True):
        ratio = (n.astype(jnp.float64) * (1.0 / BASE)).astype(factor.dtype)
        return jnp.where(n > 0, ratio, factor)


def cost(n: Numerators) -> Bits:
    """Growth of the buffer per element in one scale by ``n``: ``log2(2**32 / n)``, in ``2**-40`` bits."""
    with jax.enable_x64(True):
        bits = DIGITS - jnp.log2(jnp.maximum(n, jnp.uint64(1)).astype(jnp.float64)) + ROUNDING
        # Scaling by one moves nothing into the buffer and must cost nothing.
        return jnp.where(n >= jnp.uint64(BASE), 0.0, jnp.ceil(bits * BIT)).astype(jnp.int64)


def cost_of_levels(levels: int) -> int:
    """Growth of the buffer per element in one `push`, in ``2**-40`` bits."""
    return math.ceil(math.log2(levels) * BIT)


def spilled(bits: Bits) -> Int32[Array, "*factor"]:
    """Bytes per element that have left the register when the buffer's bound stands at ``bits``.

    The result is int32, since 64-bit indices do not survive ``vmap`` and ``jit`` if JAX's 64-bit mode is
    off.
    """
    with jax.enable_x64(True):
        return jnp.maximum(0, -((DIGITS * BIT - bits) // (8 * BIT))).astype(jnp.int32)


def outgrown(whole: bool) -> int:
    """Bytes that a number may drop for growth, in a whole run or in a part of one.

    In a part, what has become small since numbers began may grow again.
    """
    return BYTES if whole else 2 * BYTES


def tape_length(bits: Bits) -> Int64[Array, ""]:
    """Length of tape that ``bits`` needs: in rows (one factor per array) or bytes (one per element)."""
    with jax.enable_x64(True):
        return jnp.sum(spilled(bits).astype(jnp.int64))


def empty_bits(shape: tuple[int, ...]) -> Bits:
    """Bound of an empty buffer, for factors of the given shape."""
    with jax.enable_x64(True):
        return jnp.full(shape, MARGIN * BIT, jnp.int64)


def empty(shape: tuple[int, ...], factor_shape: tuple[int, ...]) -> Buffer:
    """An empty information buffer; see `blank_tape` for its tape.

    Args:
      shape: of the array.
      factor_shape: ``()`` if one factor scales the whole array, else ``shape``.
    """
    with jax.enable_x64(True):
        return Buffer(jnp.zeros(shape, jnp.uint32), empty_bits(factor_shape))


def torn_off(buffer: Buffer) -> Buffer:
    """A buffer without its tape: what is still in the register, to continue on a new tape."""
    with jax.enable_x64(True):
        return Buffer(buffer.register, buffer.bits - 8 * BIT * spilled(buffer.bits).astype(jnp.int64))


def blank_tape(shape: tuple[int, ...], factor_shape: tuple[int, ...], length: int) -> Tape:
    """A tape of zeros for the bytes of an array's buffer.

    Args:
      shape: of the array.
      factor_shape: ``()`` if one factor scales the whole array, else ``shape``.
      length: in rows or bytes, from `tape_length`.
    """
    # A row is written at every step: one row of slack takes a row that will not stay.
    return jnp.zeros((length + 1, *(shape if factor_shape == () else ())), jnp.uint8)


# 2**f for f in [0, 1) as a polynomial, to a relative 3e-9, in units of 2**-32; then lowered by 2**-26.
_POWER = np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[0, 1]).convert(
    kind=np.polynomial.Polynomial
)
_COEFFICIENTS = [round(float(c) * BASE) for c in np.asarray(_POWER.coef, float)]
_COEFFICIENTS[0] -= 64


def _bound(bits: Bits) -> Numerators:
    """``I = floor(2**bits)`` of a register, to a relative ``2**-23`` and never above; by integers alone.

    Both directions must find the same number, which floating-point exponentials do not guarantee.
    """
    register = bits - 8 * BIT * spilled(bits).astype(jnp.int64)
    exponent, fraction = register // BIT, (register & (BIT - 1)) >> 8
    power, f = jnp.uint64(_COEFFICIENTS[-1]), fraction.astype(jnp.uint64)
    for c in reversed(_COEFFICIENTS[:-1]):
        power = jnp.uint64(c) + (power * f >> DIGITS)
    return power >> (DIGITS - exponent).astype(jnp.uint64)


class Ratio(NamedTuple):
    """The ratio by which an array is scaled, and how its registers change.

    Attributes:
      n: uint64, the numerator.
      full: bool, whether a byte leaves the register.
      old: ``I``, uint64, the bound of the register before.
      new: ``I'``, uint64, the bound after, before the byte has left.
    """

    n: Numerators
    full: Flags
    old: Numerators
    new: Numerators


class Growth(NamedTuple):
    """How the buffer of an array grows when the array is scaled.

    Attributes:
      before: the buffer's ``bits`` before.
      after: the buffer's ``bits`` after.
      ratio: by which the array is scaled.
    """

    before: Bits
    after: Bits
    ratio: Ratio


def growth(bits: Bits, n: Numerators, undo: bool = False) -> Growth:
    """How a buffer grows in one scale.

    Args:
      bits: of the buffer before the scale; after it, if the scale is to be undone.
      n: uint64, the numerator.
      undo: whether the scale is to be undone.
    """
    with jax.enable_x64(True):
        before, after = (bits - cost(n), bits) if undo else (bits, bits + cost(n))
        full = spilled(after) > spilled(before)
        new = _bound(after)
        return Growth(before, after, Ratio(n, full, _bound(before), jnp.where(full, new << 8, new)))


def scale(number: Fixed, buffer: Buffer, tape: Tape, n: Numerators) -> tuple[Fixed, Buffer, Tape]:
    """Multiply by ``n / 2**32`` exactly, keeping in the buffer what is destroyed.

    With ``c`` the number in units of its last digit, ``d = 2**32`` and ``i < I`` the buffer::

        r <- c mod d;   q <- r I + i;   c <- (c div d) n + q div I';   i <- q mod I'

    and ``I <- I'``, which is ``d I / n`` and a little more, so that ``q div I' < n``.  As in Algorithm 3,
    ``c`` loses a digit to ``i`` and gains another from it.  There the new digit of ``c`` is any number,
    ``(i d + r) mod n``; here it is ``r n / d`` to one part in ``2**21``, so that the number is scaled
    correctly down to its last digit.

    Args:
      number: to be scaled.
      buffer: its information buffer.
      tape: where the buffer's bytes go when its register is full.
      n: uint64, ``2**25 <= n <= 2**32``; a scalar or the shape of the array, like ``buffer.bits``.

    Returns:
      The scaled array, the buffer and the tape.  Writing beyond the end of the tape destroys it: compare
      `tape_length` of the final ``buffer.bits`` with the length with which the tape was made.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015, Algorithm 3.

    >>> import jax.numpy as jnp
    >>> from hypergrad import exact
    >>> x = exact.to_fixed(jnp.array([1.0, -2.0]), radix=48)
    >>> n, tape = exact.numerator(0.9), exact.blank_tape((2,), (), length=0)
    >>> y, buffer, tape = exact.scale(x, exact.empty((2,), ()), tape, n)
    >>> exact.to_float(y, jnp.float32)
    Array([ 0.9, -1.8], dtype=float32)
    >>> back, _ = exact.unscale(y, buffer, tape, n)
    >>> bool((exact.to_float(back, jnp.float32) == jnp.array([1.0, -2.0])).all())
    True
    """
    grown = growth(buffer.bits, n)
    digits, register, byte = scaled(number[:2], buffer.register, grown.ratio)
    number = with_digits(number, digits)
    return number, Buffer(register, grown.after), written(tape, byte, grown.ratio.full, grown.before)


def unscale(number: Fixed, buffer: Buffer, tape: Tape, n: Numerators) -> tuple[Fixed, Buffer]:
    """Undo `scale` by the same ``n``, bit for bit.

    Args:
      number: after the scale.
      buffer: after the scale.
      tape: to which the scale has written.
      n: uint64, as given to `scale`.

    Returns:
      The array and the buffer as they were before the scale.
    """
    grown = growth(buffer.bits, n, undo=True)
    byte = read(tape, grown.ratio.full, grown.before, buffer.register.shape)
    digits, register = unscaled(number[:2], buffer.register, byte, grown.ratio)
    return with_digits(number, digits), Buffer(register, grown.before)


def scaled(digits: Digits, register: Words, ratio: Ratio) -> tuple[Digits, Words, Bytes]:
    """`scale` without the tape: the number, the register, and the byte that left it, if one did."""
    # A compiler computes anew, in the loop for each array, what several arrays come from, unless it is one
    # of them and made of two.  So what is costly is computed for one array alone, and read off that for
    # the others, modulo 2**32.
    with jax.enable_x64(True):
        n, full, old, new = ratio
        n32, (high, low) = n.astype(jnp.uint32), digits
        q = low[-1].astype(jnp.uint64) * old + register.astype(jnp.uint64)
        # The upper digits times n, plus the new digit; carry + word * n < 2**64, and the carry is below n.
        carry, found, words = _quotient(q, new), list[Array](), list[Array]()
        for word in reversed([high.astype(jnp.uint32), *low[:-1]]):
            words.insert(0, word * n32 + carry)
            found.append(words[0] - word * n32)
            carry = _upper(word.astype(jnp.uint64) * n + found[-1].astype(jnp.uint64))
        high = (high >> DIGITS) * n.astype(jnp.int64) + carry.astype(jnp.int64)
        byte = (q.astype(jnp.uint32) - found[0] * new.astype(jnp.uint32)).astype(jnp.uint8)
        register = _cut(q - found[0].astype(jnp.uint64) * new, full)
        return (high, tuple(words)), register, byte


def unscaled(digits: Digits, register: Words, byte: Bytes, ratio: Ratio) -> tuple[Digits, Words]:
    """Undo `scaled`."""
    with jax.enable_x64(True):
        n, full, old, new = ratio
        n32, (old_high, old_low) = n.astype(jnp.uint32), digits
        # Long division by n, in base 2**32.  The top digit of the scaled number is below n in size and
        # hence its own remainder, or its remainder minus n.
        top = old_high >> DIGITS
        remainder = jnp.where(top < 0, top + n.astype(jnp.int64), top).astype(jnp.uint32)
        word = old_high.astype(jnp.uint32)
        first = _quotient(_word(remainder, word), n)
        second = _quotient(_word(word - first * n32, old_low[0]), n)
        high = (first.astype(jnp.int64) << DIGITS) | second.astype(jnp.int64)
        # What remains is read off the new words, as in `scaled`.
        last, low = old_low[0] - high.astype(jnp.uint32) * n32, list[Array]()
        for word in old_low[1:]:
            low.append(_quotient(_word(last, word), n))
            last = word - low[-1] * n32
        long = _uncut(register, byte, full)
        q = last.astype(jnp.uint64) * new + long
        low.append(_quotient(q, old))
        register = q.astype(jnp.uint32) - low[-1] * old.astype(jnp.uint32)
        return (high, tuple(low)), register


def push(digit: Int32[Array, "*leaf"], levels: int, buffer: Buffer, tape: Tape) -> tuple[Buffer, Tape]:
    """Keep one digit of every element in the buffer: ``i <- i levels + digit``.

    Args:
      digit: int32, ``0 ... levels - 1``, the shape of the array.
      levels: how many values a digit may take.
      buffer: in which the digits are kept.
      tape: where the buffer's bytes go when its register is full.

    >>> import jax.numpy as jnp
    >>> from hypergrad import exact
    >>> tape = exact.blank_tape((2,), (), length=1)
    >>> buffer, tape = exact.push(jnp.array([2, 0]), 3, exact.empty((2,), ()), tape)
    >>> exact.pop(3, buffer, tape)[0]
    Array([2, 0], dtype=int32)
    """
    with jax.enable_x64(True):
        bits = buffer.bits + cost_of_levels(levels)
        full = spilled(bits) > spilled(buffer.bits)
        longer = buffer.register.astype(jnp.uint64) * levels + digit.astype(jnp.uint64)
        tape = written(tape, longer.astype(jnp.uint8), full, buffer.bits)
        return Buffer(_cut(longer, full), bits), tape


def pop(levels: int, buffer: Buffer, tape: Tape) -> tuple[Int32[Array, "*leaf"], Buffer]:
    """Undo `push`.

    Args:
      levels: as given to `push`.
      buffer: after the push.
      tape: to which the push has written.

    Returns:
      The digit, int32, and the buffer as it was.
    """
    with jax.enable_x64(True):
        bits = buffer.bits - cost_of_levels(levels)
        full = spilled(buffer.bits) > spilled(bits)
        longer = _uncut(buffer.register, read(tape, full, bits, buffer.register.shape), full)
        register = longer // levels
        return (longer - register * levels).astype(jnp.int32), Buffer(register.astype(jnp.uint32), bits)


def _quotient(dividend: UInt64[Array, "*leaf"], divisor: Numerators) -> Words:
    """A quotient below ``2**32`` of unsigned 64-bit integers, with a divisor below ``2**62``.

    Processors have no fast integer division.  The quotient of floats, rounded to the nearest integer, is
    the right one or one more.
    """
    quotient = _to_integer(_from_word(dividend) / divisor.astype(jnp.float64))
    remainder = dividend.astype(jnp.int64) - quotient * divisor.astype(jnp.int64)  # wraps twice: right
    return quotient.astype(jnp.uint32) - (remainder < 0).astype(jnp.uint32)


def _word(upper: Words, lower: Words) -> UInt64[Array, "*leaf"]:
    """The 64-bit word of two halves."""
    return (upper.astype(jnp.uint64) << DIGITS) | lower.astype(jnp.uint64)


def _upper(word: UInt64[Array, "..."]) -> Words:
    """The upper half of a word."""
    return (word >> DIGITS).astype(jnp.uint32)


def _lower(word: UInt64[Array, "..."]) -> UInt64[Array, "..."]:
    """The lower 32 bits of a word, as uint64."""
    return word.astype(jnp.uint64) & jnp.uint64(BASE - 1)


def _cut(register: UInt64[Array, "*leaf"], full: Flags) -> Words:
    """Cut the last byte off registers that have become too long."""
    return jnp.where(full, register >> 8, register).astype(jnp.uint32)


def _uncut(register: Words, byte: Bytes, full: Flags) -> Words:
    """Undo `_cut`: the long register as it was."""
    register = register.astype(jnp.uint64)
    return jnp.where(full, (register << 8) | byte.astype(jnp.uint64), register)


def written(
    tape: Tape,
    byte: Bytes,
    full: Flags,
    before: Bits,
) -> Tape:
    """The tape with the bytes that left the registers.

    Args:
      tape: on which the bytes are written.
      byte: uint8, the last byte of every register.
      full: bool, whether it left the register.
      before: the buffer's ``bits`` before the bytes left.
    """
    start = spilled(before)
    if before.ndim == 0:
        # The row is always written; unless the registers were full, the next row overwrites it.
        return jax.lax.dynamic_update_slice_in_dim(tape, byte[None], start, axis=0)
    # If the register was not full, the place is out of range and the write is dropped.
    place = jnp.where(full.ravel(), _places(start, full), jnp.int32(tape.size))
    return tape.at[place].set(byte.ravel(), mode="drop")


def read(
    tape: Tape,
    full: Flags,
    before: Bits,
    shape: tuple[int, ...],
) -> Bytes:
    """The bytes that `written` wrote.

    Args:
      tape: from which they are read.
      full: as given to `written`.
      before: as given to `written`.
      shape: of the array.
    """
    start = spilled(before)
    if before.ndim == 0:
        return jax.lax.dynamic_index_in_dim(tape, start, axis=0, keepdims=False)
    return tape.at[_places(start, full)].get(mode="fill", fill_value=0).reshape(shape)


def _places(start: Int32[Array, ""], full: Flags) -> Int32[Array, "*leaf"]:
    """Places on a dense tape for the bytes of the full registers, after all earlier bytes."""
    return jnp.sum(start, dtype=jnp.int32) + jnp.cumsum(full.ravel(), dtype=jnp.int32) - 1
