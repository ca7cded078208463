"""Smoothing where slopes are noise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import hypergrad as hg

INFLUENCES = 23  # of one parameter, of which 10 are positive
START = 0.5  # of that parameter


def influence(window: int, steps: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Influence balancing: a linear system whose first number feels the negative influences late.

    ``s <- ½ s + ½ shift(s) ± θ``, with the loss ``½ (s_0 - 1)²``, averaged over the run.
    """
    sign = jnp.where(jnp.arange(INFLUENCES) < 10, 1.0, -1.0)

    def start(theta: Array, key: Array) -> Array:
        return jnp.zeros(INFLUENCES)

    def unroll(theta: Array, state: Array, step: Array) -> tuple[Array, Array]:
        def one(s: Array, _: None) -> tuple[Array, Array]:
            s = 0.5 * s + 0.5 * jnp.append(s[1:], 0.0) + sign * theta
            return s, 0.5 * (s[0] - 1) ** 2

        state, losses = jax.lax.scan(one, state, length=window)
        return state, jnp.sum(losses) / steps

    return start, unroll


def exact_influence(steps: int) -> Array:
    """The derivative through the whole run."""
    start, unroll = influence(steps, steps)
    return jax.grad(lambda theta: unroll(theta, start(theta, jax.random.key(0)), 0)[1])(START)


def truncated_influence(window: int, steps: int) -> Array:
    """The sum of the derivatives through single windows."""
    start, unroll = influence(window, steps)

    def one(state: Array, _: None) -> tuple[Array, Array]:
        slope, state = jax.grad(lambda theta: unroll(theta, state, 0)[::-1], has_aux=True)(START)
        return state, slope

    state = start(START, jax.random.key(0))
    return jnp.sum(jax.lax.scan(one, state, length=steps // window)[1])


LENGTH = 100  # of the runs on the two-dimensional problem


def surface(w: Array, theta: Array, step: Array) -> Array:
    """``√(x² + 5) - √5 + sin²(y) exp(-5 x²) + ¼ |y - 100|``."""
    x, y = w[0], w[1]
    ripples = jnp.sin(y) ** 2 * jnp.exp(-5 * x**2)
    return jnp.sqrt(x**2 + 5) - jnp.sqrt(5.0) + ripples + 0.25 * jnp.abs(y - 100)


def rates(theta: Array, t: Array) -> Array:
    """From ``exp(θ_0)`` to ``exp(θ_1)``, linear in the logarithm."""
    return jnp.exp(theta[0] + (theta[1] - theta[0]) * t / (LENGTH - 1))


def regression(theta: Array, steps: int = LENGTH) -> Array:
    """The mean loss on the way down the surface from (1, 1)."""
    hypers = {"learning_rate": rates(theta, jnp.arange(steps))}
    trained = hg.train(
        surface, jnp.ones(2), hypers, steps=steps, optimizer=hg.sgd(), adjoint=hg.Stored()
    )  # fmt: skip
    return jnp.mean(trained.losses)
