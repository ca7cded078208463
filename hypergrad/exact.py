"""Exactly invertible arithmetic on fixed-point numbers.

A float array ``x`` is held as integers: ``x = 2**-radix (high + low_1 2**-32 + low_2 2**-64 ...)``.  Two
moves act on them and both can be undone bit for bit:

* a **shift** adds an integer, and is undone by subtracting it;
* a **scale** multiplies by a ratio ``n / 2**32`` in (0, 1].  That would destroy ``log2(2**32 / n)``
  bits of every element; they are kept in an information buffer instead (Algorithm 3 of Maclaurin,
  Duvenaud, Adams 2015, with the buffer's big integer cut into bytes).

===============  =====================  ============================================================
symbol           shape and type         meaning
===============  =====================  ============================================================
``high``         leaf, int64            the number, in units of ``2**-radix``
``low``          leaf, uint32, one or   its next digits, 32 to a word, most significant word first
                 more words
``radix``        scalar, int32          chosen once, for the whole array: see `settled`
``i``            leaf, uint32           top of the information buffer, ``register`` in the code
``I``            scalar or leaf,        bound of it: ``i < I``, with ``2**24 < I <= 2**32``
                 uint64
``tape``         bytes, uint8           bytes that left ``i``, oldest first
``bits``         scalar or leaf, int64  upper bound of log2(buffer), in units of ``2**-40`` bit
``n``            scalar or leaf,        numerator of the factor, in ``[2**25, 2**32]``
                 uint64
===============  =====================  ============================================================

When a whole array shares one factor, its registers fill in lock-step and a byte of every element is spilled
at the same step, as one row of the tape.  When every element has its own factor the bytes are packed
densely in the order in which they come.

``bits`` bounds the buffer from the factors alone, never from the data, so both directions know when bytes
move.  It is a plain running sum, hence invertible itself.

All functions work with JAX's 64-bit mode switched off; none of them changes it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64, Integer, UInt8, UInt32, UInt64

# Shapes: "*leaf" is that of an array, "*factor" that or (), where one factor is for the whole array.
Floats = Float[Array, "*leaf"]
Words = UInt32[Array, "*leaf"]
Bytes = UInt8[Array, "*leaf"]
Factors = Float[Array, "*factor"]
Numerators = UInt64[Array, "*factor"]
Bits = Int64[Array, "*factor"]
Flags = Bool[Array, "*factor"]
Tape = UInt8[Array, "..."]  # (rows, *leaf) for one factor, (bytes,) for one for every element

DIGITS = 32  # binary digits of a factor, and of a low word
BASE = 1 << DIGITS  # common denominator of all factors
SMALLEST_FACTOR = 2.0**-7  # so that at most one byte leaves the register per scale
LIMIT = 1 << 62  # |high| stays below; one addition of two such numbers cannot wrap
MARGIN = 24  # the register's bound never falls below 2**24, so rounding it costs < 2**-23 bit
BIT = 1 << 40  # resolution of `Buffer.bits`
ROUNDING = 2.0**-21  # bits per scale: more than `_bound` is rounded by, and the quotients
UNSET = 1 << 20  # the radix of an array of zeros, for which none has been chosen yet
LARGEST_RADIX = 900  # so that 2**radix and its neighbours are normal numbers of 64 bits

# How far an array may outgrow the largest number it held when its radix was chosen, in binary digits, by
# the number of its low words.  What is left of 62 + 32 words lies below that number.
HEADROOM = {1: 32, 2: 50}


class Fixed(NamedTuple):
    """Fixed-point numbers of one array (see the table above)."""

    high: Int64[Array, "*leaf"]
    low: tuple[Words, ...]
    radix: Int32[Array, ""]


class Buffer(NamedTuple):
    """Information buffer of one array: what scaling it has destroyed (see the table above)."""

    register: Words
    bits: Bits


def fitted(radix: Int32[Array, "..."], largest: Float64[Array, "..."], words: int) -> Int32[Array, "..."]:
    """The radix of arrays that are all zero so far, now that numbers are added; others keep theirs.

    The largest ``|x|`` is then `HEADROOM` below the end of the range.  An array of zeros stands for itself
    in every radix, so that on the way back the one in which it ended serves all along.

    Args:
      radix: int32, of one array or several.
      largest: the largest ``|x|`` that is added to each, float64.
      words: low words.
    """
    with jax.enable_x64(True):
        usable = (radix == UNSET) & (largest > 0) & jnp.isfinite(largest)
        exponent = (jax.lax.bitcast_convert_type(largest, jnp.int64) >> 52) - 1022
        best = jnp.clip(62 - HEADROOM[words] - exponent, -LARGEST_RADIX, LARGEST_RADIX)
        return jnp.where(usable, best.astype(jnp.int32), radix)


def largest(x: Floats) -> Float64[Array, ""]:
    """The largest ``|x|`` in float64; 0 of no elements."""
    with jax.enable_x64(True):
        return jnp.max(jnp.abs(x), initial=0).astype(jnp.float64)


def _power(exponent: Int[Array, "..."]) -> Float64[Array, "..."]:
    """``2**exponent`` in float64, for ``|exponent| < 1023``, from its bits."""
    biased = (exponent.astype(jnp.int64) + 1023) << 52
    return jax.lax.bitcast_convert_type(biased, jnp.float64)


MAGIC = 1.5 * 2.0**52  # the last bit of a float of this size counts ones


def _to_integer(x: Float64[Array, "..."]) -> Int64[Array, "..."]:
    """The integer nearest to a float64 below ``2**51`` in size, as int64.

    Compilers and processors convert words of 64 bits one by one; this is an addition, and a subtraction.
    """
    ones = jax.lax.bitcast_convert_type(x + MAGIC, jnp.int64)
    return ones - int(np.float64(MAGIC).view(np.int64))


def _from_integer(x: Int64[Array, "..."]) -> Float64[Array, "..."]:
    """An int64 below ``2**51`` in size as float64: `_to_integer` the other way."""
    return jax.lax.bitcast_convert_type(x + int(np.float64(MAGIC).view(np.int64)), jnp.float64) - MAGIC


def _from_word(x: Integer[Array, "..."]) -> Float64[Array, "..."]:
    """The float64 nearest to an integer of 64 bits, signed or not."""
    upper = _from_integer((x >> DIGITS).astype(jnp.int64))
    return upper * BASE + _from_integer(_lower(x).astype(jnp.int64))


def _digits(
    x: Floats, radix: Int32[Array, ""], words: int
) -> tuple[Int64[Array, "*leaf"], tuple[Words, ...]]:
    """``x`` rounded to ``(high + low_1 2**-32 + ...) 2**-radix``; NaN and overflow saturate."""
    wide = jnp.asarray(x, jnp.float64) * _power(jnp.where(radix == UNSET, 0, radix))
    # A NaN is not below the limit either: `fits` must see it.
    limit = 2.0 * LIMIT - 1024
    wide = jnp.maximum(jnp.where(wide < limit, wide, limit), -limit)
    signed, wide = [], wide * (1.0 / BASE)
    for _ in range(words + 1):
        whole = jnp.trunc(wide)
        signed.append(_to_integer(whole))
        wide = (wide - whole) * BASE  # exact: floats that begin with the same digits
    carry = _to_integer(wide)
    low: list[Array] = []
    for digit in reversed(signed[1:]):
        low.insert(0, carry.astype(jnp.uint32))
        carry = digit + (carry >> DIGITS)
    return (signed[0] << DIGITS) + carry, tuple(low)


def zero(shape: tuple[int, ...], words: int, radix: int = UNSET) -> Fixed:
    """Zeros, by default of a radix that is yet to be chosen."""
    with jax.enable_x64(True):
        low = (jnp.zeros(shape, jnp.uint32),) * words
        return Fixed(jnp.zeros(shape, jnp.int64), low, jnp.int32(radix))


def to_fixed(x: Floats, radix: Int32[Array, ""] | int, words: int = 1) -> Fixed:
    """The nearest fixed-point number with so many low words; NaN and overflow saturate."""
    with jax.enable_x64(True):
        radix = jnp.asarray(radix, jnp.int32)
        return Fixed(*_digits(x, radix, words), radix)


def to_float(number: Fixed, dtype: jax.typing.DTypeLike) -> Floats:
    """The float nearest to a fixed-point number, but for rounding twice."""
    with jax.enable_x64(True):
        radix = jnp.where(number.radix == UNSET, 0, number.radix)
        total = _from_word(number.high)
        for k, word in enumerate(number.low, start=1):
            total += _from_integer(word.astype(jnp.int64)) * 2.0 ** (-DIGITS * k)
        return (total * _power(-radix)).astype(dtype)


def fits(number: Fixed) -> Bool[Array, ""]:
    """Whether every element is inside the range: ``all(|high| < 2**62)``."""
    with jax.enable_x64(True):
        return jnp.all((number.high < LIMIT) & (number.high > -LIMIT))


def shift(number: Fixed, amount: Floats) -> Fixed:
    """Add the fixed-point number nearest to the amount; `unshift` undoes it, whatever happens.

    A number that has no radix yet is zero and takes the one that suits the amount.
    """
    radix = fitted(number.radix, largest(amount), len(number.low))
    return shift_settled(number._replace(radix=radix), amount)


def shift_settled(number: Fixed, amount: Floats) -> Fixed:
    """`shift` of a number that has its radix."""
    with jax.enable_x64(True):
        high, low = _digits(amount, number.radix, len(number.low))
        carry = jnp.asarray(False)
        sums: list[Array] = []
        # Carries are told from what is new, so that it can be written over what was.
        for old, new in reversed([*zip(number.low, low)]):
            sums.insert(0, old + new + carry.astype(jnp.uint32))
            carry = (sums[0] < new) | (carry & (sums[0] == new))
        return Fixed(number.high + high + carry.astype(jnp.int64), tuple(sums), number.radix)


def unshift(number: Fixed, amount: Floats) -> Fixed:
    """Undo `shift` by the same amount."""
    with jax.enable_x64(True):
        high, low = _digits(amount, number.radix, len(number.low))
        borrow = jnp.asarray(False)
        rests: list[Array] = []
        for old, new in reversed([*zip(number.low, low)]):
            rests.insert(0, old - new - borrow.astype(jnp.uint32))
            borrow = (rests[0] > ~new) | (borrow & (rests[0] == ~new))
        high = number.high - high - borrow.astype(jnp.int64)
        return Fixed(high, tuple(rests), number.radix)


def coarseness(radix: Int32[Array, ""], words: int, amount: Floats, part: float) -> Float64[Array, "*leaf"]:
    """By how much rounding takes more than a part of what is added, ``min(|a|, u/2) - part |a|``.

    Args:
      radix: of the number to which it is added, whose last digit has the unit ``u``.
      words: its low words.
      amount: as given to `shift`.
      part: of the amount that rounding may take.
    """
    with jax.enable_x64(True):
        half = _power(-jnp.where(radix == UNSET, 0, radix)) * 0.5 ** (DIGITS * words + 1)
        size = jnp.abs(amount.astype(jnp.float64))
        return jnp.minimum(size, half) - part * size


def numerator(factor: Array) -> Numerators:
    """``n`` such that ``n / 2**32`` is the ratio nearest to ``factor``, as uint64.

    Factors outside ``[2**-7, 1]`` give 0, which `scale` must not be given; check with `admissible`.
    """
    with jax.enable_x64(True):
        wide = jnp.round(jnp.asarray(factor, jnp.float64) * BASE)
        inside = (wide >= BASE * SMALLEST_FACTOR) & (wide <= BASE)
        return jnp.where(inside, wide, 0.0).astype(jnp.uint64)


def complement(a: Factors, b: Factors) -> Numerators:
    """The numerator of the ratio nearest to ``1 - a b``, which floats would round when ``a b`` is small.

    Its sum is one of integers, so that no compiler changes its bits by rounding ``1 - a b`` only once.
    """
    with jax.enable_x64(True):
        wide = BASE - jnp.round(jnp.asarray(a, jnp.float64) * jnp.asarray(b, jnp.float64) * BASE)
        inside = (wide >= BASE * SMALLEST_FACTOR) & (wide <= BASE)
        return jnp.where(inside, wide, 0.0).astype(jnp.uint64)


def spread(n: Array, shape: tuple[int, ...]) -> Numerators:
    """A numerator as `scale` wants it: a scalar for the whole array, or one for every element."""
    n = jnp.asarray(n)
    return n.reshape(()) if n.size == 1 else jnp.broadcast_to(n, shape)


def admissible(n: Numerators) -> Bool[Array, ""]:
    """Whether all numerators are usable: ``2**25 <= n <= 2**32``."""
    with jax.enable_x64(True):
        return jnp.all((n >= jnp.uint64(BASE * SMALLEST_FACTOR)) & (n <= jnp.uint64(BASE)))


def quantized(factor: Factors, n: Numerators) -> Factors:
    """The factor that a numerator stands for, ``n / 2**32``, in the type of the factor.

    Where the factor cannot be undone and has no numerator, it is the factor itself.
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

    As int32: indices of 64 bits do not survive ``vmap`` and ``jit`` with JAX's 64-bit mode off.
    """
    with jax.enable_x64(True):
        return jnp.maximum(0, -((DIGITS * BIT - bits) // (8 * BIT))).astype(jnp.int32)


def tape_length(bits: Bits) -> Int64[Array, ""]:
    """Length of tape that ``bits`` needs: rows (one factor per array) or bytes (one per element)."""
    with jax.enable_x64(True):
        return jnp.sum(spilled(bits).astype(jnp.int64))


def empty_bits(shape: tuple[int, ...]) -> Bits:
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
        return Buffer(jnp.zeros(shape, jnp.uint32), empty_bits(factor_shape))


def torn_off(buffer: Buffer) -> Buffer:
    """A buffer whose tape was taken away: what is still in the register, to go on with on a new tape."""
    with jax.enable_x64(True):
        return Buffer(buffer.register, buffer.bits - 8 * BIT * spilled(buffer.bits).astype(jnp.int64))


def blank_tape(shape: tuple[int, ...], factor_shape: tuple[int, ...], length: int) -> Tape:
    """A tape for the bytes of an array's buffer; ``length`` in rows or bytes, from `tape_length`."""
    # A row is written at every step: one row of slack takes what will not stay.
    return jnp.zeros((length + 1, *(shape if factor_shape == () else ())), jnp.uint8)


# 2**f for f in [0, 1) as a polynomial, to 3e-9 of itself, in units of 2**-32; then lowered by 2**-26.
_POWER = np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[0, 1]).convert(
    kind=np.polynomial.Polynomial
)
_COEFFICIENTS = [round(float(c) * BASE) for c in np.asarray(_POWER.coef, float)]
_COEFFICIENTS[0] -= 64


def _bound(bits: Bits) -> Numerators:
    """``I = floor(2**bits)`` of a register, to 2**-23 of itself and never above; by integers alone.

    Both directions must find the same, which exponentials of floats do not promise.
    """
    register = bits - 8 * BIT * spilled(bits).astype(jnp.int64)
    exponent, fraction = register // BIT, (register & (BIT - 1)) >> 8
    power, f = jnp.uint64(_COEFFICIENTS[-1]), fraction.astype(jnp.uint64)
    for c in reversed(_COEFFICIENTS[:-1]):
        power = jnp.uint64(c) + (power * f >> DIGITS)
    return power >> (DIGITS - exponent).astype(jnp.uint64)


class Ratio(NamedTuple):
    """By what an array is scaled, and how its registers change.

    Attributes:
      n: the numerator, uint64.
      full: whether a byte leaves the register.
      old: ``I``, uint64.
      new: ``I'``, when the byte has not left yet.
    """

    n: Numerators
    full: Flags
    old: Numerators
    new: Numerators


class Growth(NamedTuple):
    """How the buffer of an array grows when the array is scaled.

    Attributes:
      before: the buffer's ``bits`` before.
      after: and after.
      ratio: by what it is scaled.
    """

    before: Bits
    after: Bits
    ratio: Ratio


def growth(bits: Bits, n: Numerators, undo: bool = False) -> Growth:
    """How a buffer with these bits grows by a scale; to undo that, how it has grown."""
    with jax.enable_x64(True):
        before, after = (bits - cost(n), bits) if undo else (bits, bits + cost(n))
        full = spilled(after) > spilled(before)
        new = _bound(after)
        return Growth(before, after, Ratio(n, full, _bound(before), jnp.where(full, new << 8, new)))


def scale(number: Fixed, buffer: Buffer, tape: Tape, n: Numerators) -> tuple[Fixed, Buffer, Tape]:
    """Multiply by ``n / 2**32`` exactly, keeping what is destroyed in the buffer.

    With ``c`` the number in units of its last digit, ``d = 2**32`` and ``i < I`` the buffer::

        r <- c mod d;   q <- r I + i;   c <- (c div d) n + q div I';   i <- q mod I'

    and ``I <- I'``, which is ``d I / n`` and a little more, so that ``q div I' < n``.  As in Algorithm 3
    there is one digit less in ``c`` and one more in ``i``, or the other way round.  There the new digit of
    ``c`` is any number, ``(i d + r) mod n``; here it is ``r n / d`` to one part in ``2**21``, so that the
    number is scaled to its last digit.

    Args:
      number: to be scaled.
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
    >>> exact.to_float(y, jnp.float32)
    Array([ 0.9, -1.8], dtype=float32)
    >>> back, _ = exact.unscale(y, buffer, tape, n)
    >>> bool((exact.to_float(back, jnp.float32) == jnp.array([1.0, -2.0])).all())
    True
    """
    grown = growth(buffer.bits, n)
    number, register, byte = scaled(number, buffer.register, grown.ratio)
    return number, Buffer(register, grown.after), written(tape, byte, grown.ratio.full, grown.before)


def unscale(number: Fixed, buffer: Buffer, tape: Tape, n: Numerators) -> tuple[Fixed, Buffer]:
    """Undo `scale` by the same ``n``: the array and the buffer as they were, bit for bit."""
    grown = growth(buffer.bits, n, undo=True)
    byte = read(tape, grown.ratio.full, grown.before, buffer.register.shape)
    number, register = unscaled(number, buffer.register, byte, grown.ratio)
    return number, Buffer(register, grown.before)


def scaled(number: Fixed, register: Words, ratio: Ratio) -> tuple[Fixed, Words, Bytes]:
    """`scale` without the tape: the number, the register, and the byte that left it if one did."""
    with jax.enable_x64(True):
        n, full, old, new = ratio
        q = number.low[-1].astype(jnp.uint64) * old + register.astype(jnp.uint64)
        digit = _quotient(q, new)
        register, byte = _cut(q - digit * new, full)
        # Upper digits times n, plus the new one; carry + word * n < 2**64.
        carry = digit
        low: list[Array] = []
        for word in reversed([_lower(number.high), *(w.astype(jnp.uint64) for w in number.low[:-1])]):
            total = word * n + carry
            low.insert(0, total.astype(jnp.uint32))
            carry = (total - low[0].astype(jnp.uint64)) >> DIGITS  # of what is new, as in `shift`
        high = (number.high >> DIGITS) * n.astype(jnp.int64) + carry.astype(jnp.int64)
        return Fixed(high, tuple(low), number.radix), register, byte


def unscaled(number: Fixed, register: Words, byte: Bytes, ratio: Ratio) -> tuple[Fixed, Words]:
    """Undo `scaled`."""
    with jax.enable_x64(True):
        n, full, old, new = ratio
        # Long division by n, in base 2**32.  The top digit of what was scaled is below n in size and hence
        # its own remainder, or n more.
        top = number.high >> DIGITS
        remainder = jnp.where(top < 0, top + n.astype(jnp.int64), top).astype(jnp.uint64)
        quotients = []
        for word in [_lower(number.high), *(w.astype(jnp.uint64) for w in number.low)]:
            dividend = (remainder << DIGITS) | word
            quotients.append(_quotient(dividend, n))
            remainder = dividend - quotients[-1] * n
        high = (quotients[0] << DIGITS | quotients[1]).astype(jnp.int64)
        # The remainder once more, from what is new.
        lowest = [high, *quotients[2:]][-1].astype(jnp.uint32)
        last = number.low[-1] - lowest * n.astype(jnp.uint32)
        q = last.astype(jnp.uint64) * new + _uncut(register, byte, full)
        word = _quotient(q, old)
        low = (*(q.astype(jnp.uint32) for q in quotients[2:]), word.astype(jnp.uint32))
        return Fixed(high, low, number.radix), (q - word * old).astype(jnp.uint32)


def push(digit: Int32[Array, "*leaf"], levels: int, buffer: Buffer, tape: Tape) -> tuple[Buffer, Tape]:
    """Keep a digit ``0 ... levels - 1`` of every element: ``i <- i levels + digit``.

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
        register, byte = _cut(longer, full)
        return Buffer(register, bits), written(tape, byte, full, buffer.bits)


def pop(levels: int, buffer: Buffer, tape: Tape) -> tuple[Int32[Array, "*leaf"], Buffer]:
    """Undo `push`: the digit, int32, and the buffer as it was."""
    with jax.enable_x64(True):
        bits = buffer.bits - cost_of_levels(levels)
        full = spilled(buffer.bits) > spilled(bits)
        longer = _uncut(buffer.register, read(tape, full, bits, buffer.register.shape), full)
        register = longer // levels
        return (longer - register * levels).astype(jnp.int32), Buffer(register.astype(jnp.uint32), bits)


def _quotient(dividend: UInt64[Array, "*leaf"], divisor: Numerators) -> UInt64[Array, "*leaf"]:
    """A quotient below ``2**32`` of unsigned 64-bit numbers, the divisor below ``2**62``.

    By floats, whose quotient is out by one at most, and then put right: processors have no fast division of
    integers.
    """
    quotient = _to_integer(_from_word(dividend) / divisor.astype(jnp.float64))
    signed = divisor.astype(jnp.int64)
    remainder = dividend.astype(jnp.int64) - quotient * signed  # wraps twice, hence not at all
    quotient += (remainder >= signed).astype(jnp.int64) - (remainder < 0).astype(jnp.int64)
    return quotient.astype(jnp.uint64)


def _lower(word: UInt64[Array, "..."]) -> UInt64[Array, "..."]:
    """The low 32 bits of a word."""
    return word.astype(jnp.uint64) & jnp.uint64(BASE - 1)


def _cut(register: Words, full: Flags) -> tuple[Array, Array]:
    """Take a byte off registers that have become too long; and the byte."""
    byte = register.astype(jnp.uint8)
    return jnp.where(full, register >> 8, register).astype(jnp.uint32), byte


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
    """The tape with the byte that left the registers."""
    start = spilled(before)
    if before.ndim == 0:
        # The row is always written; unless registers were full the next one overwrites it.
        return jax.lax.dynamic_update_slice_in_dim(tape, byte[None], start, axis=0)
    # Out of range, hence dropped, where the register was not full.
    place = jnp.where(full.ravel(), _places(start, full), jnp.int32(tape.size))
    return tape.at[place].set(byte.ravel(), mode="drop")


def read(
    tape: Tape,
    full: Flags,
    before: Bits,
    shape: tuple[int, ...],
) -> Bytes:
    """The byte that `written` wrote, for an array of this shape."""
    start = spilled(before)
    if before.ndim == 0:
        return jax.lax.dynamic_index_in_dim(tape, start, axis=0, keepdims=False)
    return tape.at[_places(start, full)].get(mode="fill", fill_value=0).reshape(shape)


def _places(start: Int32[Array, ""], full: Flags) -> Int32[Array, "*leaf"]:
    """Where on a dense tape the bytes of the full registers stand, behind all earlier ones."""
    return jnp.sum(start, dtype=jnp.int32) + jnp.cumsum(full.ravel(), dtype=jnp.int32) - 1
