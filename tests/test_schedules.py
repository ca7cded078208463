import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypergrad import schedules


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
