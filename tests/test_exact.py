"""The integer arithmetic, on random inputs, against Python's big integers."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from hypergrad import bundles, exact

hypothesis.settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("ci")


def fixed(high: Any, low: Any, radix: int) -> exact.Fixed:
    """A number with so many digits of `high` after the point."""
    with jax.enable_x64(True):
        top = jnp.max(jnp.abs(high), initial=0)
        exponent = jnp.int64(radix * exact.BIT)
        return exact.Fixed(jnp.asarray(high), tuple(low), exponent, exponent, top, jnp.int32(0))


def radix_of(number: exact.Fixed) -> int:
    """Digits of `high` after the point."""
    assert int(number.exponent) % exact.BIT == 0
    return int(number.exponent) // exact.BIT


def coarseness(radix: int, words: int, amount: Any, part: float, wanted: Any) -> Any:
    """`bundles.coarseness_so_far` of one amount."""
    number = exact.zero(amount.shape, words, radix)
    (once,) = bundles.coarseness([number], [amount], part)
    with jax.enable_x64(True):
        nothing = jnp.zeros_like(once)
    (so_far,) = bundles.coarseness_so_far(wanted, [nothing], None, [number], [amount], part)
    assert jnp.array_equal(so_far, once if wanted else nothing)
    return so_far


FACTORS = st.one_of(
    st.floats(2.0**-7, 1.0),
    st.sampled_from([1.0, 2.0**-7, 0.5, 0.9, 0.999, 1 - 2.0**-32, 1 - 2.0**-20, 0.75]),
)
SHAPES = st.sampled_from([(), (3, 1, 2)])
WORDS = st.sampled_from([1, 2])  # of what has a register
ANY_WORDS = st.sampled_from([0, 1, 2])
RADIX = 40
TRUE = jnp.asarray(True)

# Compiled once for every shape: one by one, the operations of these take most of the time.
scale, unscale, shift, unshift = map(jax.jit, (exact.scale, exact.unscale, exact.shift, exact.unshift))
push, pop = jax.jit(exact.push, static_argnums=1), jax.jit(exact.pop, static_argnums=0)
bound_of, cost = jax.jit(exact._bound), jax.jit(exact.cost)


def integers(shape: tuple[int, ...], seed: int, words: int = 1, bits: int = 61) -> exact.Fixed:
    """Numbers of all sizes and both signs, random to their last digit."""
    rng = np.random.default_rng(seed)
    size = rng.integers(0, bits, size=shape)
    with jax.enable_x64(True):
        high = jnp.asarray(rng.integers(-(1 << bits), 1 << bits, size=shape) >> size)
        low = tuple(jnp.asarray(rng.integers(0, 1 << 32, size=shape), jnp.uint32) for _ in range(words))
        return fixed(high, low, RADIX)


def big(number: exact.Fixed) -> Any:
    """The numbers in units of their last digit, as Python integers."""
    total = np.asarray(number.high).astype(object)
    for word in number.low:
        total = total * 2**32 + np.asarray(word).astype(object)
    return np.asarray(total, object)


def tape_for(shape: tuple[int, ...], numerators: list[Any]) -> tuple[exact.Buffer, Any, int]:
    """An empty buffer, a tape with room for what scaling by these numerators needs, and that length."""
    with jax.enable_x64(True):
        factor_shape = jnp.broadcast_shapes(*(n.shape for n in numerators))
        bits = exact.empty_bits(factor_shape) + sum(cost(n) for n in numerators)
        length = int(exact.tape_length(bits))
    room = -(-length // 256) * 256  # few lengths, few programs to compile
    return exact.empty(shape, factor_shape), exact.blank_tape(shape, factor_shape, room), length


def same(a: Any, b: Any) -> bool:
    """Whether all bits are the same, of numbers apart from their exponents and bounds."""
    digits = lambda x: x[:2] if isinstance(x, exact.Fixed) else x  # noqa: E731
    a, b = (jax.tree.map(digits, x, is_leaf=lambda x: isinstance(x, exact.Fixed)) for x in (a, b))
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(bool(jnp.array_equal(x, y)) for x, y in pairs)


def bounds(bits: Any) -> Any:
    """``I``, of a scalar or of every element, as Python integers."""
    with jax.enable_x64(True):
        return np.asarray(bound_of(bits)).astype(object)


# ---- there and back


@hypothesis.given(SHAPES, WORDS, st.lists(FACTORS, min_size=1, max_size=12), st.integers(0, 2**31))
def test_scales_and_shifts_are_undone_bit_for_bit(
    shape: Any, words: int, factors: list[float], seed: int
) -> None:
    start = integers(shape, seed, words, 58)
    numerators = [exact.numerator(f) for f in factors]
    first, tape, _ = tape_for(shape, numerators)
    rng = np.random.default_rng(seed + 1)
    amounts = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in factors]
    x, buffer, history = start, first, []
    for n, amount in zip(numerators, amounts):
        history.append((x, buffer))
        x, buffer, tape = scale(x, buffer, tape, n)
        x = shift(x, amount)
    for n, amount in zip(reversed(numerators), reversed(amounts)):
        x = unshift(x, amount)
        x, buffer = unscale(x, buffer, tape, n)
        assert same((x, buffer), history.pop())
    assert same((x, buffer), (start, exact.empty(shape, ())))


@hypothesis.given(st.sampled_from([1, 7]), WORDS, st.integers(1, 20), st.integers(0, 2**31))
def test_factors_by_element_are_undone_bit_for_bit(size: int, words: int, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    start = integers((size,), seed, words)
    numerators = [exact.numerator(2.0 ** -rng.uniform(0, 7, size)) for _ in range(steps)]
    first, tape, length = tape_for((size,), numerators)
    x, buffer = start, first
    for n in numerators:
        x, buffer, tape = scale(x, buffer, tape, n)
    with jax.enable_x64(True):
        assert int(exact.tape_length(buffer.bits)) == length
    assert not np.any(tape[length:])
    for n in reversed(numerators):
        x, buffer = unscale(x, buffer, tape, n)
    assert same((x, buffer), (start, first))


@pytest.mark.quick("False-factors2", "True-factors2")
@pytest.mark.parametrize("factors", [(0.9,), (2.0**-7,), (0.99, 0.3), (1 - 2.0**-32,)])
@pytest.mark.parametrize("by_element", [False, True])
def test_hundreds_of_scales_are_undone_bit_for_bit(factors: Any, by_element: bool) -> None:
    steps = 200
    ns = [exact.numerator(np.full(5, f) if by_element else f) for f in factors]
    start = integers((5,), 3)
    first, tape, _ = tape_for((5,), [ns[k % len(ns)] for k in range(steps)])
    amount = jnp.linspace(-1e6, 1e6, 5)

    @jax.jit
    def there_and_back(x: Any, buffer: Any, tape: Any) -> Any:
        with jax.enable_x64(True):
            stacked = jnp.stack([ns[k % len(ns)] for k in range(steps)])

            def forwards(carry: Any, n: Any) -> Any:
                x, buffer, tape = scale(*carry, n)
                return (shift(x, amount), buffer, tape), None

            def backwards(carry: Any, n: Any) -> Any:
                x, buffer = carry
                return unscale(unshift(x, amount), buffer, tape, n), None

            (x, buffer, tape), _ = jax.lax.scan(forwards, (x, buffer, tape), stacked)
            return x, jax.lax.scan(backwards, (x, buffer), stacked, reverse=True)[0]

    end, back = there_and_back(start, first, tape)
    assert not same(end, start)
    assert same(back, (start, first))


@hypothesis.given(
    ANY_WORDS, st.integers(-(2**61), 2**61), st.integers(0, 2**64 - 1), st.floats(-(2.0**20), 2.0**20)
)
def test_a_shift_adds_the_nearest_integer(words: int, high: int, digits: int, amount: float) -> None:
    """Carries and borrows over words, against big integers and exact fractions."""
    low = [(digits >> (32 * k)) & (2**32 - 1) for k in range(words)]
    with jax.enable_x64(True):
        x = fixed(jnp.int64(high), [jnp.uint32(w) for w in low], RADIX)
        wide = jnp.float64(amount)
    y = shift(x, wide)
    unit = Fraction(2) ** (RADIX + 32 * words)
    added = int(big(y)) - int(big(x))
    assert abs(added - Fraction(amount) * unit) <= Fraction(1, 2)
    assert same(unshift(y, wide), x)


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_carry_runs_through_all_words(words: int, sign: int) -> None:
    full = 2**32 - 1 if sign > 0 else 0
    with jax.enable_x64(True):
        x = fixed(jnp.int64(7), [jnp.uint32(full)] * words, 0)
        unit = jnp.float64(sign * 2.0 ** (-32 * words))
    y = shift(x, unit)
    assert int(big(y)) == int(big(x)) + sign
    assert int(y.high) == 7 + (sign if sign > 0 else -1)
    assert same(unshift(y, unit), x)


# ---- one scale, against its formula


@hypothesis.given(
    WORDS,
    FACTORS,
    st.integers(-(2**62) + 1, 2**62 - 1),
    st.integers(0, 2**64 - 1),
    st.floats(0, 1),
    st.floats(0, 60),
)
def test_a_scale_is_its_formula(
    words: int, factor: float, high: int, digits: int, share: float, spent: float
) -> None:
    """``c``, ``i``, ``I`` and the byte on the tape, by big integers, wherever the buffer stands."""
    d, n = 2**32, int(exact.numerator(factor))
    low = [(digits >> (32 * k)) & (d - 1) for k in range(words)]
    with jax.enable_x64(True):
        before = exact.empty_bits(()) + int(spent * exact.BIT)
        bound = int(bound_of(before))
        register = min(int(share * bound), bound - 1)
        number = fixed(jnp.int64(high), [jnp.uint32(w) for w in low], RADIX)
        out = int(exact.spilled(before))
        tape = exact.blank_tape((), (), 12)
        given = exact.Buffer(jnp.uint32(register), before)
        after, buffer, tape = scale(number, given, tape, exact.numerator(factor))
        c, spills = int(big(number)), int(exact.spilled(buffer.bits)) - out
        new = int(bound_of(buffer.bits)) << (8 * spills)
    r, c = c % d, c // d
    q = r * bound + register
    assert spills in (0, 1)
    assert int(big(after)) == c * n + q // new
    assert q // new < n
    i = int(buffer.register) << (8 * spills)
    assert i + (int(tape[out]) if spills else 0) == q % new
    back, once = unscale(after, buffer, tape, exact.numerator(factor))
    assert same((back, once), (number, given))


@hypothesis.given(st.lists(FACTORS, min_size=1, max_size=20), st.integers(0, 2**62))
def test_bounds_grow_enough_for_every_factor(factors: list[float], start: int) -> None:
    """``I' n >= d I``, so that what comes back from the register is below ``n``, and ``I <= 2**bits``."""
    for k, factor in enumerate(factors):
        n = exact.numerator(factor)
        with jax.enable_x64(True):
            before = exact.empty_bits(()) + (start * (k + 1)) % (100 * exact.BIT)
            after = before + cost(n)
            full = int(exact.spilled(after) - exact.spilled(before))
            register = (int(before) - 8 * exact.BIT * int(exact.spilled(before))) / exact.BIT
        old, new = int(bounds(before)), int(bounds(after)) << (8 * full)
        assert new * int(n) >= 2**32 * old
        assert 2**exact.MARGIN - 1 <= old <= 2**32  # rounded down
        assert 2.0**register * (1 - 2.0**-22) <= old <= 2.0**register * (1 + 2.0**-45)


def test_bounds_never_shrink_and_stay_near_powers_of_two() -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        bits = jnp.sort(jnp.asarray(rng.integers(24 * exact.BIT, 32 * exact.BIT, 2000)))
    found = bounds(bits).astype(np.float64)
    power = 2.0 ** (np.asarray(bits) / exact.BIT)
    assert np.all(np.diff(found) >= 0)
    assert np.all(found <= power * (1 + 2.0**-45)) and np.all(found >= power * (1 - 2.0**-22))
    with jax.enable_x64(True):
        whole = jnp.arange(24, 33) * exact.BIT
    powers = np.array([2.0**k for k in range(24, 33)])
    below = 1 - np.asarray(bounds(whole), float) / powers
    assert np.all(below >= 0) and np.all(below <= 2.0**-23)


@hypothesis.given(FACTORS, WORDS, st.integers(0, 2**31))
def test_a_scale_is_accurate_to_its_last_digit(factor: float, words: int, seed: int) -> None:
    """``c n / d`` to the floor, and to ``2**-21`` of a low word times the factor."""
    x = integers((50,), seed, words)
    n = exact.numerator(factor)
    buffer, tape, _ = tape_for((50,), [n])
    scaled, _, _ = scale(x, buffer, tape, n)
    for a, b in zip(big(x).tolist(), big(scaled).tolist()):
        error = abs(b - Fraction(a * int(n), 2**32))
        assert error <= 1 + Fraction(int(n), 2**21)


@pytest.mark.parametrize("factor", [0.3, 0.9, 0.99, 0.9999])
def test_registers_stay_below_their_bounds(factor: float) -> None:
    """Of random data, which comes near them."""
    n = exact.numerator(factor)
    x, worst = integers((2000,), 0), 0.0
    buffer, tape, _ = tape_for((2000,), [n] * 60)
    for _ in range(60):
        x, buffer, tape = scale(x, buffer, tape, n)
        bound, register = int(bounds(buffer.bits)), int(np.max(np.asarray(buffer.register)))
        assert register < bound <= 2**32
        worst = max(worst, register / bound)
    assert worst > 0.99


# ---- what it costs


@hypothesis.given(st.lists(FACTORS, min_size=1, max_size=400))
def test_buffer_needs_no_more_than_the_bits_destroyed(factors: list[float]) -> None:
    """Bytes on the tape: at most log2(1/factor) bits a step.  The register is the one word besides."""
    with jax.enable_x64(True):
        padded = np.asarray(factors + [1.0] * (400 - len(factors)))
        n = exact.numerator(padded)
        bits = exact.empty_bits(()) + jnp.sum(cost(n))
        destroyed = np.sum(np.log2(2.0**32 / np.asarray(n, np.float64)))
        assert 8 * int(exact.tape_length(bits)) <= destroyed + len(factors) * exact.ROUNDING + 1e-9
        assert int(cost(exact.numerator(1.0))) == 0


def test_factor_one_changes_nothing_and_costs_nothing() -> None:
    x = integers((5,), 0)
    n = exact.numerator(1.0)
    buffer, tape, length = tape_for((5,), [n] * 1000)
    y, after, _ = scale(x, buffer, tape, n)
    assert same((y, after), (x, buffer)) and length == 0


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from([2, 3, 16]), FACTORS), min_size=1, max_size=12), SHAPES
)
def test_digits_are_kept_beside_scales(steps: list[tuple[int, float]], shape: Any) -> None:
    rng = np.random.default_rng(len(steps))
    digits = [jnp.asarray(rng.integers(0, levels, shape)) for levels, _ in steps]
    x, first = integers(shape, 5), exact.empty(shape, ())
    buffer, tape, start = first, exact.blank_tape(shape, (), 30), x
    for digit, (levels, factor) in zip(digits, steps):
        buffer, tape = push(digit, levels, buffer, tape)
        x, buffer, tape = scale(x, buffer, tape, exact.numerator(factor))
    with jax.enable_x64(True):
        assert int(exact.tape_length(buffer.bits)) <= 30
        used = sum(math.log2(levels) - math.log2(int(exact.numerator(f)) / 2**32) for levels, f in steps)
        assert (
            0 <= (int(buffer.bits) / exact.BIT - exact.MARGIN) - used <= len(steps) * exact.ROUNDING + 1e-9
        )
    for digit, (levels, factor) in zip(reversed(digits), reversed(steps)):
        x, buffer = unscale(x, buffer, tape, exact.numerator(factor))
        found, buffer = pop(levels, buffer, tape)
        assert np.array_equal(found, digit)
    assert same((x, buffer), (start, first))


@pytest.mark.parametrize("by_element", [False, True])
def test_a_buffer_goes_on_without_its_tape(by_element: bool) -> None:
    """What is torn off keeps its register and its bound, and is undone to where it was torn off."""
    n = exact.numerator(np.linspace(0.1, 0.9, 6) if by_element else 0.3)
    x = integers((6,), 1)
    buffer, tape, _ = tape_for((6,), [n] * 30)
    for _ in range(30):
        x, buffer, tape = scale(x, buffer, tape, n)
    torn = exact.torn_off(buffer)
    with jax.enable_x64(True):
        assert int(exact.tape_length(buffer.bits)) > 0 == int(exact.tape_length(torn.bits))
    assert np.array_equal(bounds(torn.bits), bounds(buffer.bits))
    assert np.all(np.asarray(torn.register) < bounds(torn.bits))
    assert same(torn.register, buffer.register) and same(exact.torn_off(torn), torn)
    ended = x
    with jax.enable_x64(True):
        tape = exact.blank_tape((6,), torn.bits.shape, int(exact.tape_length(torn.bits + 30 * cost(n))))
    buffer = torn
    for _ in range(30):
        x, buffer, tape = scale(x, buffer, tape, n)
    for _ in range(30):
        x, buffer = unscale(x, buffer, tape, n)
    assert same((x, buffer), (ended, torn))


# ---- floats


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 3e7, 1e30])
@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip_of_floats_of_every_size(dtype: str, words: int, size: float) -> None:
    """Numbers down to ``2**-20`` of the largest come back to the last bit; all to half a unit."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(size * rng.uniform(-1, 1, 200) * 2.0 ** rng.uniform(-7, 0, 200), dtype)
    number = shift(exact.zero((200,), words), x)
    assert int(number.exponent) < exact.UNSET and exact.fits(number)
    back = exact.to_float(number, dtype)
    with jax.enable_x64(True):
        assert back.dtype == dtype
    unit = Fraction(2) ** -(radix_of(number) + 32 * words)
    for a, b in zip(np.asarray(x, np.float64).tolist(), big(number).tolist()):
        assert abs(Fraction(a) - b * unit) <= unit / 2
    if dtype == "float32" or words == 2:
        assert np.array_equal(back, x)
    else:  # 62 + 32 - 32 digits behind the largest
        np.testing.assert_allclose(back, x, rtol=1e-15, atol=size * 2.0**-61)


@hypothesis.given(st.floats(-(2.0**17), 2.0**17), st.integers(0, 44), ANY_WORDS)
def test_the_nearest_fixed_point_number(value: float, radix: int, words: int) -> None:
    with jax.enable_x64(True):
        number = exact.to_fixed(jnp.float64(value), radix, words)
        back = exact.to_float(number, jnp.float64)
    unit = Fraction(2) ** -(radix + 32 * words)
    assert abs(int(big(number)) * unit - Fraction(value)) <= unit / 2
    assert (
        abs(Fraction(float(back)) - Fraction(value)) <= unit / 2 + Fraction(abs(value)) * Fraction(2) ** -51
    )


@hypothesis.given(
    st.integers(-(2**62), 2**62), st.integers(0, 2**64 - 1), st.integers(-100, 100), ANY_WORDS
)
def test_the_nearest_float(high: int, digits: int, radix: int, words: int) -> None:
    """In float64 to rounding twice."""
    low = [(digits >> (32 * k)) & (2**32 - 1) for k in range(words)]
    with jax.enable_x64(True):
        x = fixed(jnp.int64(high), [jnp.uint32(w) for w in low], radix)
    found = Fraction(float(exact.to_float(x, jnp.float64)))
    value = int(big(x)) * Fraction(2) ** -(radix + 32 * words)
    assert abs(found - value) <= abs(value) * Fraction(2) ** -51


# ---- the exponent


@pytest.mark.parametrize(("words", "whole"), [(1, False), (2, False), (0, True), (1, True)])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1000.0, 1e30])
def test_the_exponent_leaves_headroom_above_the_largest_number(
    size: float, words: int, whole: bool
) -> None:
    number = shift(exact.zero((3,), words, whole=whole), jnp.asarray([0.0, -size, size / 3]))
    room = 62 - radix_of(number) - (math.frexp(float(jnp.float32(size)))[1])
    assert room == exact.headroom(words, whole)
    assert int(number.exponent - number.floor) == (8 * exact.BYTES * exact.BIT if whole else 0)
    assert room + 8 * exact.BYTES * whole == exact.GROWTH[words - (not whole)]
    with jax.enable_x64(True):
        largest = jnp.asarray([size * 2.0 ** (room - 1)])
        assert exact.fits(exact.to_fixed(0.49 * largest, radix_of(number), words))
        assert not exact.fits(exact.to_fixed(4.01 * largest, radix_of(number), words))
    assert not exact.fits(exact.to_fixed(jnp.asarray([np.inf]), radix_of(number), words))


def test_an_exponent_is_chosen_once_and_by_numbers_alone() -> None:
    zero = jnp.zeros(3)
    assert radix_of(shift(exact.zero((3,), 1, 7), jnp.ones(3))) == 7
    for useless in (zero, jnp.full(3, jnp.nan), jnp.full(3, jnp.inf)):
        assert int(shift(exact.zero((3,), 1), useless).exponent) >= exact.UNSET
    number = shift(exact.zero((3,), 1), zero)
    assert int(number.exponent) >= exact.UNSET and not np.any(exact.to_float(number, jnp.float32))
    first = shift(number, jnp.full(3, 2.0))
    second = shift(first, jnp.full(3, 1e-4))
    assert int(first.exponent) == int(second.exponent)
    # On the way back the exponent stays, and zeros stand for themselves with it.
    back = unshift(unshift(second, jnp.full(3, 1e-4)), jnp.full(3, 2.0))
    assert not np.any(big(back)) and int(back.exponent) == int(first.exponent)
    assert same(unshift(back, zero), number)


@pytest.mark.parametrize("words", [0, 1])
def test_an_empty_array_has_an_exponent_too(words: int) -> None:
    empty = shift(exact.zero((0,), words, whole=words == 0), jnp.zeros(0))
    assert empty.high.shape == (0,) and exact.fits(empty) and int(empty.exponent) >= exact.UNSET


# ---- what drops bytes

STEPS = st.lists(
    st.tuples(FACTORS, st.integers(-30, 9), st.floats(-1, 1)), min_size=1, max_size=12
)  # factor, size of what is added, and its first element


@partial(jax.jit, static_argnums=3)
def whole_step(number: Any, tape: Any, n: Any, scaled: bool, amount: Any) -> Any:
    """A scale and a shift of one number that drops bytes."""
    if scaled:
        (number,) = bundles.scale_whole(TRUE, [number], [n])
    return bundles.shift(TRUE, [number], [amount], [tape])[0]


@partial(jax.jit, static_argnums=3)
def whole_unstep(number: Any, tape: Any, n: Any, scaled: bool, amount: Any, drop: Any) -> Any:
    """Undo `whole_step`."""
    (number,) = bundles.unshift(TRUE, [number], [amount], [tape], [drop])
    return bundles.unscale_whole(TRUE, [number], [n])[0] if scaled else number


@hypothesis.given(STEPS, st.sampled_from([0, 1]), SHAPES, st.booleans())
def test_what_drops_bytes_is_undone_bit_for_bit_and_keeps_its_value(
    steps: Any, words: int, shape: Any, scaled: bool
) -> None:
    """Of amounts of all sizes, against fractions; and nothing ever leaves 64 bits unnoticed."""
    number, tape = exact.zero(shape, words, whole=True), jnp.zeros((64, *shape), jnp.uint8)
    rng = np.random.default_rng(len(steps))
    value, error, history = Fraction(0), Fraction(0), []
    for factor, size, first in steps:
        amount = jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32).ravel().at[0].set(first)
        amount = (amount * 10.0**size).reshape(shape)
        n = exact.numerator(factor)
        before = number
        number, tape, drop = whole_step(number, tape, n, scaled, amount)
        if not exact.fits(number):  # it grew too far, which is told
            assert max(np.abs(np.asarray(amount)).max(), 0) > 0
            break
        history.append((before, n, amount, drop))
        ratio = Fraction(int(n), 2**32) if scaled else Fraction(1)
        value = value * ratio + Fraction(float(amount.ravel()[0]))
        assert np.max(np.abs(np.asarray(number.high).astype(object)), initial=0) <= int(number.top) < 2**62
        if int(number.exponent) < exact.UNSET:
            unit = Fraction(2.0 ** (-int(number.exponent) / exact.BIT)) / 2 ** (32 * words)
            # Half a unit for what is added, one for what is dropped, and the rounding of powers of two.
            error = error * ratio + 2 * unit + Fraction(2) ** -48 * abs(Fraction(float(amount.ravel()[0])))
            error += Fraction(2) ** -39 * abs(value)
            found = Fraction(int(big(number).ravel()[0])) * unit
            assert abs(found - value) <= error + abs(value) * Fraction(2) ** -48
    assert int(number.rows) == sum(int(drop) for *_, drop in history)
    if history and not exact.fits(number):
        number = whole_unstep(number, tape, n, scaled, amount, drop)
    for before, n, amount, drop in reversed(history):
        number = whole_unstep(number, tape, n, scaled, amount, drop)
        assert same(number, before) and int(number.rows) == int(before.rows)
    assert not np.any(big(number))


@hypothesis.given(st.sampled_from([0, 1, 2]), SHAPES, st.integers(0, 2**31))
def test_a_byte_that_is_dropped_is_the_last_one(words: int, shape: Any, seed: int) -> None:
    number = integers(shape, seed, words)
    shorter, byte = exact.dropped(number[:2])
    assert byte.dtype == np.uint8
    left = big(number._replace(high=shorter[0], low=shorter[1]))
    assert np.array_equal(left * 256 + np.asarray(byte).astype(object), big(number))
    assert same(exact.regained(shorter, byte), number[:2])


def test_numbers_of_many_sizes_drop_bytes_when_each_of_them_has_to() -> None:
    """Several arrays at a time, of which one grows by 2**30 and one does not."""
    numbers = [exact.zero((3,), 0, whole=True) for _ in range(2)]
    tapes: list[Any] = [jnp.zeros((4, 3), jnp.uint8) for _ in range(2)]
    first = [jnp.asarray([1.0, -0.7, 0.3]), jnp.asarray([1e-3, 2e-3, -5e-4])]
    second = [jnp.full(3, 2.0**30), first[1]]
    moved = bundles.shift(TRUE, numbers, first, tapes)
    once = [number for number, _, _ in moved]
    moved = bundles.shift(TRUE, once, second, [tape for _, tape, _ in moved])
    drops = [drop for _, _, drop in moved]
    assert [int(x) for x in drops] == [3, 0]
    assert all(exact.fits(number) for number, _, _ in moved)
    np.testing.assert_allclose(exact.to_float(moved[0][0], jnp.float32), first[0] + 2.0**30, rtol=1e-7)
    back = bundles.unshift(TRUE, [x for x, _, _ in moved], second, [tape for _, tape, _ in moved], drops)
    assert same(back, once)
    too_far = bundles.shift(TRUE, once, [jnp.full(3, 2.0**34), first[1]], tapes)
    assert [bool(exact.fits(number)) for number, _, _ in too_far] == [False, True]


@pytest.mark.parametrize("words", [0, 1, 2])
def test_numbers_are_compared_with_floats_by_their_own_exponents(words: int) -> None:
    """What `shift` makes of floats is found again; with another exponent, or one digit more, it is not."""
    rng = np.random.default_rng(words)
    floats = [jnp.asarray(10.0**k * rng.normal(size=(40,)), jnp.float32) for k in (-12, 0, 9)]
    floats.append(jnp.zeros(3))
    zeros = [exact.zero(x.shape, words, whole=words == 0) for x in floats]
    numbers = bundles.rounded(TRUE, zeros, floats)
    moved = bundles.shift(TRUE, zeros, floats, [None] * len(floats))
    assert same(numbers, [number for number, _, _ in moved]) and all(exact.fits(x) for x in numbers)
    assert [int(x.exponent) for x in numbers] == [int(x.exponent) for x, _, _ in moved]
    assert same(numbers, bundles.rounded_like(TRUE, numbers, floats))
    for number, x in zip(numbers[:-1], floats):
        with jax.enable_x64(True):
            longer = number._replace(exponent=number.exponent + 1)
            larger = number._replace(high=number.high.at[7].add(1))
        for other in (longer, larger):
            assert not same([other], bundles.rounded_like(TRUE, [other], [x]))
    limit = exact.zero((2,), words, radix=50)
    fit = [exact.fits(bundles.rounded(TRUE, [limit], [jnp.full(2, x)])[0]) for x in (1000.0, 2.0**12)]
    assert [bool(x) for x in fit] == [True, False]


def test_what_decays_for_ever_stays_a_number() -> None:
    """``2**-3000`` of a first number: no power of two overflows, and it comes back."""
    n, steps = exact.numerator(0.5), 3000
    start = shift(exact.zero((2,), 0, whole=True), jnp.asarray([1.0, -0.3]))
    nothing, tape = jnp.zeros(2), jnp.zeros((400, 2), jnp.uint8)

    @jax.jit
    def there_and_back(number: Any) -> Any:
        def forwards(carry: Any, _: Any) -> Any:
            number, tape, drop = whole_step(*carry, n, True, nothing)
            return (number, tape), (drop, exact.to_float(number, jnp.float32), exact.fits(number))

        def backwards(number: Any, drop: Any) -> Any:
            return whole_unstep(number, tape_at_end, n, True, nothing, drop), None

        (end, tape_at_end), (drops, floats, fine) = jax.lax.scan(forwards, (number, tape), length=steps)
        back, _ = jax.lax.scan(backwards, end, drops, reverse=True)
        return back, floats, jnp.all(fine), end.rows

    back, floats, fine, rows = there_and_back(start)
    assert same(back, start) and fine and 250 < int(rows) < 400
    powers = 0.5 ** np.arange(1, 101)
    np.testing.assert_allclose(floats[:100, 0], powers, rtol=1e-6)
    assert not np.any(floats[200:])


def test_powers_of_two_are_those_of_exact_arithmetic() -> None:
    rng = np.random.default_rng(0)
    exponents = [*rng.integers(-900 * exact.BIT, 900 * exact.BIT, 300).tolist(), 0, exact.BIT, 1, -1]
    with jax.enable_x64(True):
        found = np.asarray(exact.power(jnp.asarray(exponents))).tolist()
    with localcontext() as context:
        context.prec = 60
        for exponent, power in zip(exponents, found):
            right = Decimal(2) ** (Decimal(exponent) / exact.BIT)
            assert abs(Decimal(power) / right - 1) < Decimal(2) ** -50
    assert found[-4:-2] == [1.0, 2.0]


def test_an_exponent_grows_by_the_logarithm_of_the_factor() -> None:
    factors = np.array([1.0, 0.9, 0.999, 0.5, 2.0**-7, 1 - 2.0**-31])
    n = exact.numerator(factors)
    with jax.enable_x64(True):
        grown = np.asarray(exact.decay(n)).tolist()
        ratios = np.asarray(n).tolist()
    with localcontext() as context:
        context.prec = 40
        for found, ratio in zip(grown, ratios):
            bits = 32 - Decimal(ratio).ln() / Decimal(2).ln()
            assert abs(found - bits * exact.BIT) < 1
    assert grown[0] == 0 and grown[3] == exact.BIT


# ---- what rounding takes


@pytest.mark.parametrize("part", [2.0**-10, 0.25])
def test_coarseness_is_what_rounding_takes_beyond_a_part(part: float) -> None:
    """Against the sum in float64, row by row; and nothing where nothing is wanted."""
    amount = jnp.asarray(np.random.default_rng(0).normal(size=(40, 20)) * 2.0 ** -np.arange(40)[:, None])
    radix = -20
    size = np.abs(np.asarray(amount, np.float64))
    half = 2.0 ** (20 - 33)
    expected = np.sum(np.minimum(size, half) - part * size, axis=1)
    found = coarseness(radix, 1, amount, part, jnp.asarray(True))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.max(np.abs(expected)))
    assert np.any(expected > 0) and np.any(expected < 0)
    assert not np.any(coarseness(radix, 1, amount, part, jnp.asarray(False)))
    # Rows that are many and narrow are added up in parts, and a wide radix takes nothing.
    narrow = coarseness(radix, 1, jnp.tile(amount.reshape(-1, 1), (8, 1)), part, jnp.asarray(True))
    assert narrow.shape == (bundles.ROWS,)
    np.testing.assert_allclose(np.sum(np.asarray(narrow)), 8 * np.sum(expected), rtol=1e-5)
    assert np.all(np.asarray(coarseness(80, 2, amount, part, jnp.asarray(True))) <= 0)


def test_what_is_lost_counts_next_to_the_number_itself() -> None:
    number = exact.to_fixed(jnp.full((2, 200), 1.0), RADIX)
    lost = lambda x: bool(bundles.matters([jnp.asarray([0.0, x])], [number], 0.5, 100)[0])  # noqa: E731
    limit = 0.5 * 2.0**-30 * 100 * 200
    assert lost(1.01 * limit) and not lost(0.99 * limit) and not lost(-1.0)


# ---- what cannot be


@pytest.mark.parametrize("words", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 2.0**22, -(2.0**22)])
def test_what_does_not_fit_is_seen(value: float, words: int) -> None:
    assert not exact.fits(exact.to_fixed(jnp.array([0.0, value]), RADIX, words))
    assert exact.fits(exact.to_fixed(jnp.array([0.0, 2.0**21 * 0.999]), RADIX, words))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("start", [-2e6, 0.0, 2e6])
@pytest.mark.parametrize("words", [0, 1, 2])
def test_a_shift_out_of_range_is_seen_wherever_it_starts(start: float, value: float, words: int) -> None:
    x = exact.to_fixed(jnp.array(start), RADIX, words)
    y = shift(x, jnp.array(value))
    assert not exact.fits(y)
    assert same(unshift(y, jnp.array(value)), x)


@pytest.mark.parametrize("factor", [0.0, 2.0**-8, 1.0001, -0.5, np.nan, np.inf])
def test_factors_that_cannot_be_undone_are_seen(factor: float) -> None:
    assert not exact.admissible(exact.numerator(factor))
    assert not exact.admissible(exact.numerator(np.array([0.5, factor])))


def test_ratio_is_the_nearest() -> None:
    factors = np.random.default_rng(0).uniform(0.01, 1, 1000)
    with jax.enable_x64(True):
        ratios = np.asarray(exact.quantized(jnp.asarray(factors), exact.numerator(factors)))
    assert np.max(np.abs(ratios - factors)) <= 2.0**-33


def test_complement_is_the_nearest_ratio_to_one_minus_a_product() -> None:
    a, b = np.random.default_rng(0).uniform(0, 0.9, (2, 1000))
    b[0], b[1] = 1e-12, 0.0
    with jax.enable_x64(True):
        n = np.asarray(exact.complement(jnp.asarray(a), jnp.asarray(b))).tolist()
    for x, y, found in zip(a.tolist(), b.tolist(), n):
        assert abs(found - (1 - Fraction(x) * Fraction(y)) * 2**32) <= Fraction(1, 2) + Fraction(1, 2**20)
    assert n[:2] == [2**32, 2**32]


def test_works_with_vmap_and_jit_with_64_bit_mode_off() -> None:
    assert not jax.config.jax_enable_x64

    def there_and_back(x: Any, factor: Any) -> Any:
        n = exact.numerator(factor)
        number = shift(exact.zero(x.shape, 1), x)
        buffer, tape = exact.empty(x.shape, ()), exact.blank_tape(x.shape, (), 8)
        y, buffer, tape = scale(number, buffer, tape, n)
        z, buffer = unscale(y, buffer, tape, n)
        return exact.to_float(y, jnp.float32), exact.to_float(z, jnp.float32)

    x = jnp.linspace(-3, 3, 12).reshape(3, 4)
    factors = jnp.array([0.2, 0.9, 0.999])
    scaled, back = jax.jit(jax.vmap(there_and_back))(x, factors)
    np.testing.assert_allclose(scaled, x * factors[:, None], rtol=1e-6)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("bits", [8, 31, 40, 52, 62])
def test_quotients_are_exact_for_divisors_of_every_size(bits: int) -> None:
    rng = np.random.default_rng(bits)
    divisors = [int(x) % 2**bits + 2 ** (bits - 1) for x in rng.integers(1, 2**62, 500)]
    divisors = [min(x, 2**62 - 1) for x in divisors]
    quotients = [min(int(q), (2**64 - 1) // v) for q, v in zip(rng.integers(0, 2**32, 500), divisors)]
    over = [(0, v - 1, v // 2)[k % 3] for k, v in enumerate(divisors)]
    dividends = [min(q * v + r, 2**64 - 1) for q, v, r in zip(quotients, divisors, over)]
    with jax.enable_x64(True):
        found = exact._quotient(*(jnp.asarray(np.array(x, np.uint64)) for x in (dividends, divisors)))
    assert np.asarray(found).tolist() == [a // b for a, b in zip(dividends, divisors)]
