"""Learned schedules as optax schedules, and the other way round."""

import jax
import jax.numpy as jnp
import optax


def as_optax(values: jax.typing.ArrayLike) -> optax.Schedule:
    """A learned schedule as an optax schedule, `count -> values[min(count, T - 1)]`.

    Args:
        values: shape `(T,)`, T >= 1, one value for each step; or a scalar, held for ever.

    Returns:
        The schedule: it takes an integer count, which may be traced, and returns the value; the
        last value is held after the end. Differentiable in `values`.

    Raises:
        ValueError: `values` is empty or has more than one axis.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> schedule = as_optax(jnp.array([0.5, 0.25]))
        >>> [float(schedule(count)) for count in range(4)]
        [0.5, 0.25, 0.25, 0.25]
        >>> optimizer = optax.sgd(schedule)
    """
    array = jnp.asarray(values)
    if array.ndim > 1 or array.size == 0:
        raise ValueError(
            f"as_optax(values of shape {array.shape}): a schedule has shape (T,) with T >= 1, "
            "or is a scalar; give one schedule for each hyperparameter"
        )
    steps = array.ravel()
    return lambda count: steps[jnp.clip(count, 0, steps.size - 1)]


def from_optax(schedule: optax.Schedule, steps: int) -> jax.Array:
    """The values of an optax schedule, to start learning from: `schedule(0..steps-1)`.

    Args:
        schedule: count -> scalar; it must accept a traced count, as all of optax's do.
        steps: how many values, at least 1.

    Returns:
        Floating-point array of shape `(steps,)`, differentiable in whatever the schedule closes
        over.

    Raises:
        ValueError: `steps` is below 1, or the schedule does not return scalars.

    Example:
        >>> import optax
        >>> from_optax(optax.linear_schedule(1.0, 0.0, 4), 3).tolist()
        [1.0, 0.75, 0.5]
    """
    if steps < 1:
        raise ValueError(f"from_optax(steps={steps!r}): a schedule has at least 1 step")
    values = jax.vmap(lambda count: jnp.asarray(schedule(count)))(jnp.arange(steps))
    if values.ndim != 1:
        raise ValueError(
            f"from_optax(schedule): it returned an array of shape {values.shape[1:]} for one "
            "count; a schedule returns a scalar"
        )
    return values.astype(jnp.result_type(values, float))
