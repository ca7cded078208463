"""A user's script, for a type checker: the types of the installed package are enough to check it."""

import jax
import jax.numpy as jnp
from jax import Array

import hypergrad as hg
from hypergrad import curvature, implicit, linear, meta, schedules


def loss(params: Array, meta: Array, batch: Array) -> Array:
    """Of a line through some points."""
    return jnp.mean((batch @ params - meta) ** 2)


def outer(rate: Array) -> Array:
    """After training."""
    trained: hg.Trained = hg.train(
        loss, jnp.zeros(3), {"learning_rate": rate}, jnp.ones(()), jnp.ones((5, 4, 3)), steps=5
    )
    return jnp.sum(trained.params**2) + trained.losses[-1]


gradient: Array = jax.grad(outer)(jnp.float32(0.1))
adjoint: hg.Adjoint = hg.Reversible(segments=2)
tuned: hg.Tuned = hg.tune(
    loss, jnp.zeros(3), {"learning_rate": 0.1}, jnp.ones(()), jnp.ones((5, 4, 3)), steps=5, meta_steps=2
)
report: hg.Report = hg.check_hypergradient(outer, jnp.float32(0.1), quiet=True)
best: meta.Optimized = meta.optimize(lambda x, key: jnp.sum(x**2), jnp.ones(2), steps=2, progress=False)
found: curvature.Spectrum = curvature.spectrum(
    lambda v: 2 * v, jnp.ones(3), jax.random.key(0), steps=2, samples=1
)
warm_up = schedules.WarmupCosine(0.0, 0.1, 2.0, 5.0)
rates: Array = schedules.values({"learning_rate": warm_up}, 5)["learning_rate"]
solver: implicit.LinearSolver = linear.ConjugateGradients(tolerance=1e-3)
