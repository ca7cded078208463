import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergrad import schedules

interval = schedules.interval(-2.0, 5.0)
finite = st.floats(-60.0, 60.0, width=32)
anything = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None)
@given(finite)
def test_positive_round_trip(raw):
    value = schedules.constrain(schedules.positive, jnp.float32(raw))
    np.testing.assert_allclose(schedules.unconstrain(schedules.positive, value), raw, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.floats(2**-90, 1 - 2**-20, width=32))
def test_unit_round_trip(value):
    raw = schedules.unconstrain(schedules.unit, value)
    np.testing.assert_allclose(schedules.constrain(schedules.unit, raw), value, rtol=3e-5)


@settings(max_examples=30, deadline=None)
@given(st.floats(-1.999755859375, 4.99951171875, width=32))
def test_interval_round_trip(value):
    raw = schedules.unconstrain(interval, value)
    np.testing.assert_allclose(schedules.constrain(interval, raw), value, rtol=1e-6, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(anything)
def test_every_raw_value_lands_inside_the_domain_with_a_finite_derivative(raw):
    narrow = schedules.interval(1000.0, 1000.01)
    for constraint in (schedules.real, schedules.positive, schedules.unit, interval, narrow):
        value, slope = jax.value_and_grad(constraint.to_constrained)(jnp.float32(raw))
        assert np.isfinite(schedules.unconstrain(constraint, value))  # refuses what is outside
        assert np.isfinite(slope)


def test_maps_are_the_documented_formulas():
    raw = jnp.linspace(-3, 3, 7)
    logistic = 1 / (1 + np.exp(-np.asarray(raw)))
    np.testing.assert_array_equal(schedules.constrain(schedules.real, raw), raw)
    np.testing.assert_allclose(schedules.constrain(schedules.positive, raw), np.exp(raw), 1e-6)
    np.testing.assert_allclose(schedules.constrain(schedules.unit, raw), logistic, 1e-6)
    np.testing.assert_allclose(schedules.constrain(interval, raw), -2 + 7 * logistic, 1e-5, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_maps_keep_dtypes_and_ends_in_low_precision(dtype):
    for constraint in (schedules.positive, schedules.unit, interval):
        value = schedules.constrain(constraint, jnp.asarray([-1e4, 0, 1e4], dtype))
        assert value.dtype == dtype
        assert schedules.unconstrain(constraint, value).dtype == dtype


def test_constraints_are_a_prefix_of_the_values():
    values = {"model": [jnp.array([0.5]), jnp.array([0.25])], "rate": jnp.array(0.1)}
    raw = schedules.unconstrain({"model": schedules.unit, "rate": schedules.positive}, values)
    np.testing.assert_allclose(raw["model"][1], np.log(1 / 3), rtol=1e-6)
    np.testing.assert_allclose(raw["rate"], np.log(0.1), rtol=1e-6)
    raw = jax.jit(lambda values: schedules.unconstrain(schedules.positive, values))(values)
    np.testing.assert_allclose(raw["model"][1], np.log(0.25), rtol=1e-6)


def test_a_mismatched_prefix_is_refused():
    with pytest.raises(ValueError, match=r"constrain\(constraints=\{'rat': 'unit'\}\): not a pre"):
        schedules.constrain({"rat": schedules.unit}, {"rate": 0.0})


def test_a_leaf_that_is_no_constraint_is_refused():
    with pytest.raises(TypeError, match=r"unconstrain\(constraints=...\): the leaf 'positive' is"):
        schedules.unconstrain("positive", 0.5)


def test_values_outside_the_domain_are_refused():
    values = {"rates": [jnp.ones(3), jnp.array([0.1, -0.5])]}
    message = r"\['rates'\]\[1\] holds -0.5, outside the domain of positive \(x > 0\)"
    with pytest.raises(ValueError, match=message):
        schedules.unconstrain(schedules.positive, values)
    for constraint, value in (
        (schedules.real, np.inf),
        (schedules.positive, 0.0),
        (schedules.unit, 1.0),
        (interval, -2.0),
        (interval, 5.5),
    ):
        with pytest.raises(ValueError, match=r"the value holds .*outside the domain"):
            schedules.unconstrain(constraint, value)


def test_integer_values_are_refused():
    with pytest.raises(TypeError, match="the value has dtype int32; hyperparameters are float"):
        schedules.unconstrain(schedules.real, 3)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, float("inf"))])
def test_an_interval_with_bad_ends_is_refused(ends):
    with pytest.raises(ValueError, match=r"interval\(low=.*finite with low < high"):
        schedules.interval(*ends)


def test_as_optax_drives_an_optimiser_and_holds_the_last_value():
    rates = jnp.array([0.5, 0.25, 0.125])
    schedule = schedules.as_optax(rates)
    assert jax.vmap(schedule)(jnp.arange(5)).tolist() == [0.5, 0.25, 0.125, 0.125, 0.125]
    assert schedules.as_optax(0.5)(7) == 0.5
    assert jax.grad(lambda x: schedules.as_optax(x)(9))(rates).tolist() == [0, 0, 1]

    optimizer = optax.sgd(schedule)
    state, seen = optimizer.init(jnp.float32(0)), []
    for _ in range(4):
        updates, state = jax.jit(optimizer.update)(jnp.float32(-1), state)
        seen.append(float(updates))
    assert seen == [0.5, 0.25, 0.125, 0.125]


@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_as_optax_refuses_what_is_no_schedule(shape):
    with pytest.raises(ValueError, match=r"as_optax\(values of shape .*\(T,\) with T >= 1"):
        schedules.as_optax(jnp.ones(shape))


def test_from_optax_gives_the_values_and_their_derivatives():
    def values(peak):
        return schedules.from_optax(optax.cosine_decay_schedule(peak, 10), 5)

    expected = [optax.cosine_decay_schedule(2.0, 10)(count) for count in range(5)]
    np.testing.assert_allclose(values(2.0), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jacobian(values)(2.0), np.array(expected) / 2, rtol=1e-6)
    assert schedules.from_optax(optax.constant_schedule(1), 2).dtype == jnp.float32
    np.testing.assert_array_equal(schedules.from_optax(schedules.as_optax(values(2.0)), 5), values(2.0))


def test_from_optax_refuses_no_steps():
    with pytest.raises(ValueError, match=r"from_optax\(steps=0\): a schedule has at least 1"):
        schedules.from_optax(optax.constant_schedule(1.0), 0)


def test_from_optax_refuses_vector_schedules():
    with pytest.raises(ValueError, match=r"from_optax\(schedule\): .*shape \(2,\) for one count"):
        schedules.from_optax(lambda count: jnp.ones(2) * count, 3)
