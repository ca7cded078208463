"""`hypergrad.sums`: the bits of a sum do not depend on the order, and they are the right ones."""

import math
import random
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergrad import sums

KINDS = {"float32": (np.float32, 32), "float64": (np.float64, 64)}


def total(numbers: Any, dtype: Any) -> sums.Sum:
    with jax.enable_x64(True):
        xs = jnp.asarray(np.asarray(numbers, dtype))
        return jax.jit(
            lambda xs: jax.lax.scan(lambda s, x: (sums.add(s, x), None), sums.zero(xs[0]), xs)[0]
        )(xs)


def of(numbers: Any, dtype: Any) -> Any:
    return np.asarray(sums.value(total(numbers, dtype), dtype))


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_sums_are_exact_to_one_rounding_in_any_order(name: str, data: Any) -> None:
    dtype, width = KINDS[name]
    floats = st.floats(width=width, allow_nan=False, allow_infinity=False, allow_subnormal=False)
    numbers = data.draw(st.lists(floats, min_size=6, max_size=6))
    found = of(numbers, dtype)
    shuffled = numbers[:]
    random.Random(data.draw(st.integers(0, 9))).shuffle(shuffled)
    assert found.tobytes() == of(shuffled, dtype).tobytes()
    exact, largest = sum(map(Fraction, numbers)), max(map(abs, numbers))
    if abs(exact) > np.finfo(dtype).max or largest < 1e-30:
        return
    kept = 2.0 ** -(32 if width == 32 else 64)  # of the largest, what may be dropped
    most = 6 * kept * largest + 2 * np.finfo(dtype).eps * abs(float(exact)) + np.finfo(dtype).tiny
    assert abs(Fraction(float(found)) - exact) <= most


@pytest.mark.parametrize("name", KINDS)
def test_what_cancels_leaves_what_is_small(name: str) -> None:
    dtype, _ = KINDS[name]
    assert of([1.0, 3e-9, -1.0], dtype) == dtype(3e-9)
    assert of([1e30, 1.0, -1e30], np.float32) == 0  # a factor of 2**32 below the largest
    assert of([1e15, 1.0, -1e15], np.float64) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_finite_is_never_lost(name: str, bad: float) -> None:
    dtype, _ = KINDS[name]
    for numbers in ([bad, 1.0], [1.0, bad], [bad, -bad]):
        assert np.isnan(of(numbers, dtype))


def test_a_mean_is_rounded_once() -> None:
    numbers = np.random.default_rng(0).normal(size=(7, 1000)).astype(np.float32)
    found = np.asarray(sums.value(total(numbers, np.float32), np.float32, 7))
    right = (numbers.astype(np.float64).sum(0) / 7).astype(np.float32)
    assert np.array_equal(found, right)


def test_as_many_numbers_as_promised_do_not_overflow() -> None:
    largest = np.float32(2 - 2**-23) * np.float32(2.0**30)
    assert of([largest] * sums.MOST, np.float32) == np.float32(float(largest) * sums.MOST)
