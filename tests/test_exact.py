"""The integer arithmetic, on random inputs, against Python's big integers."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from hypergrad import exact

hypothesis.settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("ci")

FACTORS = st.one_of(
    st.floats(2.0**-7, 1.0),
    st.sampled_from([1.0, 2.0**-7, 0.5, 0.9, 0.999, 1 - 2.0**-32, 1 - 2.0**-20, 0.75]),
)
SHAPES = st.sampled_from([(), (1,), (4,), (3, 1, 2)])


def integers(shape: tuple[int, ...], seed: int, bits: int = 61) -> Any:
    rng = np.random.default_rng(seed)
    size = rng.integers(0, bits, size=shape)
    with jax.enable_x64(True):
        return jnp.asarray(rng.integers(-(1 << bits), 1 << bits, size=shape) >> size)


def tape_for(shape: tuple[int, ...], numerators: list[Any]) -> tuple[exact.Buffer, Any, int]:
    """An empty buffer and a tape of exactly the length that scaling by these numerators needs."""
    with jax.enable_x64(True):
        factor_shape = jnp.broadcast_shapes(*(n.shape for n in numerators))
        bits = exact.empty_bits(factor_shape) + sum(exact.cost(n) for n in numerators)
        length = int(exact.tape_length(bits))
    return exact.empty(shape, factor_shape), exact.blank_tape(shape, factor_shape, length), length


def same(a: Any, b: Any) -> bool:
    return all(bool(jnp.array_equal(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@hypothesis.given(SHAPES, st.lists(FACTORS, min_size=1, max_size=12), st.integers(0, 2**31))
def test_scales_and_shifts_are_undone_bit_for_bit(shape: Any, factors: list[float], seed: int) -> None:
    start = integers(shape, seed)
    numerators = [exact.numerator(f) for f in factors]
    first, tape, _ = tape_for(shape, numerators)
    rng = np.random.default_rng(seed + 1)
    amounts = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in factors]
    x, buffer, history = start, first, []
    for n, amount in zip(numerators, amounts):
        history.append((x, buffer))
        x, buffer, tape = exact.scale(x, buffer, tape, n)
        x = exact.shift(x, amount, 48)
    for n, amount in zip(reversed(numerators), reversed(amounts)):
        x = exact.unshift(x, amount, 48)
        x, buffer = exact.unscale(x, buffer, tape, n)
        assert same((x, buffer), history.pop())
    assert same(x, start)
    assert exact.is_empty(buffer)


@hypothesis.given(st.sampled_from([1, 3, 12]), st.integers(1, 20), st.integers(0, 2**31))
def test_factors_by_element_are_undone_bit_for_bit(size: int, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    start = integers((size,), seed)
    numerators = [exact.numerator(2.0 ** -rng.uniform(0, 7, size)) for _ in range(steps)]
    first, tape, length = tape_for((size,), numerators)
    x, buffer = start, first
    for n in numerators:
        x, buffer, tape = exact.scale(x, buffer, tape, n)
    assert int(exact.tape_length(buffer.bits)) == length == tape.size - 1
    for n in reversed(numerators):
        x, buffer = exact.unscale(x, buffer, tape, n)
    assert same((x, buffer), (start, first))


@hypothesis.given(
    FACTORS, st.integers(-(2**62) + 1, 2**62 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**24 - 1)
)
def test_is_algorithm_3(factor: float, c: int, low: int, register: int) -> None:
    """One scale against the paper's pseudo-code on Python integers, before any byte leaves the register."""
    d, n = 2**32, int(exact.numerator(factor))
    i, value = register, c * d + low
    i = i * d + value % d
    value = (value // d) * n + i % n
    i = i // n
    with jax.enable_x64(True):
        buffer = exact.Buffer(jnp.uint64((register << 32) + low), exact.empty_bits(()))
        tape = exact.blank_tape((), (), 1)
        high, after, tape = exact.scale(jnp.int64(c), buffer, tape, exact.numerator(factor))
    out = int(exact.spilled(after.bits))
    register, digits = divmod(int(after.information), d)
    assert int(high) * d + digits == value
    assert (register << (8 * out)) + sum(int(byte) for byte in tape[:out]) == i


@hypothesis.given(st.lists(FACTORS, min_size=1, max_size=400))
def test_buffer_needs_no_more_than_the_bits_destroyed(factors: list[float]) -> None:
    """Bytes on the tape: at most log2(1/factor) bits a step.  The register is the one word besides."""
    with jax.enable_x64(True):
        n = exact.numerator(np.asarray(factors))
        bits = exact.empty_bits(()) + jnp.sum(exact.cost(n))
        destroyed = np.sum(np.log2(2.0**32 / np.asarray(n, np.float64)))
    assert 8 * int(exact.tape_length(bits)) <= destroyed + len(factors) * exact.ROUNDING + 1e-9


@pytest.mark.parametrize("factor", [0.3, 0.9, 0.99, 0.9999])
def test_register_stays_below_its_bound(factor: float) -> None:
    """The bound counts on the worst case; random data comes within a few bits of it and never above."""
    n = exact.numerator(factor)
    x, worst = integers((2000,), 0), 0
    buffer, tape, _ = tape_for((2000,), [n] * 60)
    for _ in range(60):
        x, buffer, tape = exact.scale(x, buffer, tape, n)
        with jax.enable_x64(True):
            x = x + integers((2000,), 1, 40)
            bound = 2.0 ** (float(buffer.bits) / exact.BIT - 8 * int(exact.spilled(buffer.bits)))
        register = int(np.max(np.asarray(buffer.information))) >> 32
        assert register < bound <= 2.0**32
        worst = max(worst, register)
    assert worst > 0


@hypothesis.given(FACTORS, st.integers(0, 2**31))
def test_scale_is_accurate_to_one_unit_in_the_last_place(factor: float, seed: int) -> None:
    x = integers((50,), seed)
    n = exact.numerator(factor)
    buffer, tape, _ = tape_for((50,), [n])
    scaled, _, _ = exact.scale(x, buffer, tape, n)
    for a, b in zip(np.asarray(x).tolist(), np.asarray(scaled).tolist()):
        assert abs(b * 2**32 - a * int(n)) <= 2**32 + int(n)


def test_factor_one_changes_nothing_and_costs_nothing() -> None:
    x = integers((5,), 0)
    n = exact.numerator(1.0)
    buffer, tape, length = tape_for((5,), [n] * 1000)
    y, after, _ = exact.scale(x, buffer, tape, n)
    assert same(x, y) and exact.is_empty(after) and length == 0


def test_works_with_vmap_and_jit_with_64_bit_mode_off() -> None:
    assert not jax.config.jax_enable_x64

    def there_and_back(x: Any, factor: Any) -> Any:
        n = exact.numerator(factor)
        high = exact.to_fixed(x, 40)
        buffer, tape = exact.empty(x.shape, ()), exact.blank_tape(x.shape, (), 8)
        y, buffer, tape = exact.scale(high, buffer, tape, n)
        z, buffer = exact.unscale(y, buffer, tape, n)
        return exact.to_float(y, 40, jnp.float32), exact.to_float(z, 40, jnp.float32)

    x = jnp.linspace(-3, 3, 12).reshape(3, 4)
    factors = jnp.array([0.2, 0.9, 0.999])
    scaled, back = jax.jit(jax.vmap(there_and_back))(x, factors)
    np.testing.assert_allclose(scaled, x * factors[:, None], rtol=1e-6)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 2.0**14])
def test_what_does_not_fit_is_seen(value: float) -> None:
    assert not exact.fits(exact.to_fixed(jnp.array([0.0, value]), 48))
    assert exact.fits(exact.to_fixed(jnp.array([0.0, 2.0**14 * 0.999]), 48))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("start", [-16000.0, 0.0, 16000.0])
def test_a_shift_out_of_range_is_seen_wherever_it_starts(start: float, value: float) -> None:
    x = exact.to_fixed(jnp.array(start), 48)
    y = exact.shift(x, jnp.array(value), 48)
    assert not exact.fits(y)
    assert same(exact.unshift(y, jnp.array(value), 48), x)


@pytest.mark.parametrize("factor", [0.0, 2.0**-8, 1.0001, -0.5, np.nan, np.inf])
def test_factors_that_cannot_be_undone_are_seen(factor: float) -> None:
    assert not exact.admissible(exact.numerator(factor))
    assert not exact.admissible(exact.numerator(np.array([0.5, factor])))


def test_ratio_is_the_nearest() -> None:
    factors = np.random.default_rng(0).uniform(0.01, 1, 1000)
    with jax.enable_x64(True):
        ratios = np.asarray(exact.quantised(jnp.asarray(factors), exact.numerator(factors)))
    assert np.max(np.abs(ratios - factors)) <= 2.0**-33


@hypothesis.given(st.floats(-16000, 16000), st.integers(0, 48))
def test_fixed_point_round_trip(value: float, radix: int) -> None:
    with jax.enable_x64(True):
        back = exact.to_float(exact.to_fixed(jnp.float64(value), radix), radix, jnp.float64)
    assert abs(float(back) - value) <= 2.0 ** -(radix + 1)
