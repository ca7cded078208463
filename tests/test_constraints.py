import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergrad import constraints

interval = constraints.interval(-2.0, 5.0)
finite = st.floats(-60.0, 60.0, width=32)
anything = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None)
@given(finite)
def test_positive_round_trip(raw):
    value = constraints.constrain(constraints.positive, jnp.float32(raw))
    np.testing.assert_allclose(
        constraints.unconstrain(constraints.positive, value), raw, rtol=1e-6, atol=1e-6
    )


@settings(max_examples=30, deadline=None)
@given(st.floats(2**-90, 1 - 2**-20, width=32))
def test_unit_round_trip(value):
    raw = constraints.unconstrain(constraints.unit, value)
    np.testing.assert_allclose(constraints.constrain(constraints.unit, raw), value, rtol=3e-5)


@settings(max_examples=30, deadline=None)
@given(st.floats(-1.999755859375, 4.99951171875, width=32))
def test_interval_round_trip(value):
    raw = constraints.unconstrain(interval, value)
    np.testing.assert_allclose(constraints.constrain(interval, raw), value, rtol=1e-6, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(anything)
def test_every_raw_value_lands_inside_the_domain_with_a_finite_derivative(raw):
    narrow = constraints.interval(1000.0, 1000.01)
    for constraint in (constraints.real, constraints.positive, constraints.unit, interval, narrow):
        value, slope = jax.value_and_grad(constraint.to_constrained)(jnp.float32(raw))
        assert np.isfinite(constraints.unconstrain(constraint, value))  # refuses what is outside
        assert np.isfinite(slope)


def test_maps_are_the_documented_formulas():
    raw = jnp.linspace(-3, 3, 7)
    logistic = 1 / (1 + np.exp(-np.asarray(raw)))
    np.testing.assert_array_equal(constraints.constrain(constraints.real, raw), raw)
    np.testing.assert_allclose(constraints.constrain(constraints.positive, raw), np.exp(raw), 1e-6)
    np.testing.assert_allclose(constraints.constrain(constraints.unit, raw), logistic, 1e-6)
    np.testing.assert_allclose(constraints.constrain(interval, raw), -2 + 7 * logistic, 1e-5, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_maps_keep_dtypes_and_ends_in_low_precision(dtype):
    for constraint in (constraints.positive, constraints.unit, interval):
        value = constraints.constrain(constraint, jnp.asarray([-1e4, 0, 1e4], dtype))
        assert value.dtype == dtype
        assert constraints.unconstrain(constraint, value).dtype == dtype


@settings(max_examples=30, deadline=None)
@given(st.lists(finite, min_size=6, max_size=6))
def test_ascending_round_trip(raw):
    value = constraints.constrain(constraints.ascending, jnp.asarray(raw, jnp.float32))
    assert (np.diff(value) >= 0).all()
    again = constraints.constrain(
        constraints.ascending, constraints.unconstrain(constraints.ascending, value)
    )
    np.testing.assert_allclose(again, value, rtol=1e-5, atol=1e-5 * np.abs(value).max())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=6, max_size=6))
def test_ascending_never_leaves_its_domain(raw):
    raw = jnp.asarray(raw, jnp.float32)
    value, pull = jax.vjp(constraints.ascending.to_constrained, raw)
    constraints.unconstrain(constraints.ascending, value)  # refuses what is outside
    assert np.isfinite(pull(jnp.ones_like(raw))[0]).all()


def test_ascending_is_the_documented_formula():
    value = constraints.constrain(constraints.ascending, jnp.array([-2.0, 0.0, 1.0]))
    np.testing.assert_allclose(value, [-2, -1, -1 + np.e], rtol=1e-6)
    with pytest.raises(ValueError, match=r"holds 1.0, outside the domain of ascending \(x_1 <="):
        constraints.unconstrain(constraints.ascending, jnp.array([0.0, 2.0, 1.0]))


def test_ascending_refuses_what_is_no_sequence():
    with pytest.raises(ValueError, match=r"ascending for a value of shape \(\): an order needs an ar"):
        constraints.unconstrain(constraints.ascending, 1.0)


def test_constraints_are_a_prefix_of_the_values():
    values = {"model": [jnp.array([0.5]), jnp.array([0.25])], "rate": jnp.array(0.1)}
    raw = constraints.unconstrain({"model": constraints.unit, "rate": constraints.positive}, values)
    np.testing.assert_allclose(raw["model"][1], np.log(1 / 3), rtol=1e-6)
    np.testing.assert_allclose(raw["rate"], np.log(0.1), rtol=1e-6)
    raw = jax.jit(lambda values: constraints.unconstrain(constraints.positive, values))(values)
    np.testing.assert_allclose(raw["model"][1], np.log(0.25), rtol=1e-6)


def test_a_mismatched_prefix_is_refused():
    with pytest.raises(ValueError, match=r"constrain\(constraints=\{'rat': 'unit'\}\): not a pre"):
        constraints.constrain({"rat": constraints.unit}, {"rate": 0.0})


def test_a_leaf_that_is_no_constraint_is_refused():
    with pytest.raises(TypeError, match=r"unconstrain\(constraints=...\): the leaf 'positive' is"):
        constraints.unconstrain("positive", 0.5)


def test_values_outside_the_domain_are_refused():
    values = {"rates": [jnp.ones(3), jnp.array([0.1, -0.5])]}
    message = r"\['rates'\]\[1\] holds -0.5, outside the domain of positive \(x > 0\)"
    with pytest.raises(ValueError, match=message):
        constraints.unconstrain(constraints.positive, values)
    for constraint, value in (
        (constraints.real, np.inf),
        (constraints.positive, 0.0),
        (constraints.unit, 1.0),
        (interval, -2.0),
        (interval, 5.5),
    ):
        with pytest.raises(ValueError, match=r"the value holds .*outside the domain"):
            constraints.unconstrain(constraint, value)


def test_integer_values_are_refused():
    with pytest.raises(TypeError, match="the value has dtype int32; hyperparameters are float"):
        constraints.unconstrain(constraints.real, 3)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, float("inf"))])
def test_an_interval_with_bad_ends_is_refused(ends):
    with pytest.raises(ValueError, match=r"interval\(low=.*finite with low < high"):
        constraints.interval(*ends)
