"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped.

======  ===================  ==============================================================================
symbol  name                 meaning
======  ===================  ==============================================================================
``w``   params               parameters
``g``   gradient             gradient at ``w`` before the step
``d``   curvature            an estimate of the diagonal of the Hessian at ``w``, before the step
``m``   mu                   running average of ``g``, from 0
``m̂``                        ``m / (1 - β1^n)``, in step ``n`` from 1
``h``   nu                   running average of ``d``, from 0, refreshed every ``k`` steps
``α``   learning_rate        ``>= 0``
``β``   b1, b2               ``0 <= β < 1``; ``>= 2**-7`` to be reversed
``γ``   gamma                ``>= 0``
``ε``   eps                  ``> 0``
``ρ``   clip_threshold       ``> 0``
``λ``   weight_decay         ``>= 0``
======  ===================  ==============================================================================

All products are element by element.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.curvature.likelihoods import Likelihood
from hypergrad.optimizers.adam_family import DOMAINS as ADAM_DOMAINS
from hypergrad.optimizers.adam_family import decayed, unbiased
from hypergrad.program import SQUARES, Move, Optimizer, Scale, Shift, Variable

PyTree = Any
Diagonal = Callable[[PyTree, PyTree, PyTree, Array], PyTree]  # of params, meta, batch, step
DOMAINS = {**ADAM_DOMAINS, "gamma": (0.0, float("inf")), "clip_threshold": (0.0, float("inf"))}


def hutchinson(loss: Callable[[PyTree, PyTree, PyTree], Array], seed: int = 0) -> Diagonal:
    """Hutchinson's estimate of the Hessian's diagonal, ``r · (H r)``, with a random sign for every element.

    Its expectation is the diagonal.  Costs about two gradients.

    Args:
      loss: ``loss(params, meta, batch)``, the loss of the run.
      seed: seed of the signs, whose key is the seed's, folded with the step: they are the same in every
        run, and when it is played backwards.

    Returns:
      A function of ``(params, meta, batch, step)`` for `sophia`.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
    splines", 1990; Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, meta, step: jnp.sum(meta * w**2)
    >>> hutchinson(loss)(jnp.ones(2), jnp.array([1.0, 3.0]), None, jnp.int32(0))
    Array([2., 6.], dtype=float32)
    """

    def diagonal(params: PyTree, meta: PyTree, batch: PyTree, step: Array) -> PyTree:
        leaves: list[Array]
        structure: Any
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), len(leaves))
        signs = structure.unflatten(
            [jax.random.rademacher(key, x.shape, x.dtype) for key, x in zip(keys, leaves)]
        )
        _, product = jax.jvp(jax.grad(lambda w: loss(w, meta, batch)), (params,), (signs,))
        return jax.tree.map(jnp.multiply, signs, product)

    return diagonal


def gauss_newton_bartlett(
    network: Callable[[PyTree, PyTree, PyTree], Array], likelihood: Likelihood, seed: int = 0
) -> Diagonal:
    """The Gauss-Newton-Bartlett estimate of the Hessian's diagonal, ``n ĝ²``, which is never negative.

    ``ĝ`` is the gradient of the mean loss of ``n`` examples at targets drawn from the network's own
    predictive distribution.  The expectation is the diagonal of the Fisher matrix, which for the
    likelihoods of `hypergrad.curvature` is Gauss-Newton's.  Costs one gradient.

    Args:
      network: ``network(params, meta, batch) -> outputs``, the examples of the batch as leading axis.
      likelihood: the likelihood of the outputs, one of `hypergrad.curvature`, such that the loss is the
        mean of its negative logarithm.
      seed: seed of the targets, whose key is the seed's, folded with the step: they are the same in every
        run, and when it is played backwards.  They count as constants in differentiation.

    Returns:
      A function of ``(params, meta, batch, step)`` for `sophia`.

    Source: Liu, Li, Hall, Liang, Ma, "Sophia: a scalable stochastic second-order optimizer for language
    model pre-training", ICLR 2024, Algorithm 2.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> network = lambda w, x, step: x[:, None] * w[None]
    >>> diagonal = gauss_newton_bartlett(network, curvature.bernoulli())
    >>> diagonal(jnp.zeros(1), jnp.array([2.0]), None, jnp.int32(0))
    Array([1.], dtype=float32)
    """

    def diagonal(params: PyTree, meta: PyTree, batch: PyTree, step: Array) -> PyTree:
        def loss(w: PyTree) -> tuple[Array, int]:
            outputs = network(w, meta, batch)
            n = outputs.shape[0]
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), n)
            targets = jax.vmap(likelihood.sample)(keys, jax.lax.stop_gradient(outputs))
            drawn = jax.lax.stop_gradient(targets)
            return jnp.mean(jax.vmap(likelihood.loss)(outputs, drawn)), n

        gradient, n = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda g: n * g * g, gradient)

    return diagonal


def sophia(diagonal: Diagonal, update_interval: int = 10) -> Optimizer:
    """Sophia, with an estimate of the Hessian's diagonal every ``k`` steps.

    ``m <- β1 m + (1-β1) g;  h <- β2 h + (1-β2) d`` in steps 0, k, 2k, ...;
    ``w <- (1 - α λ) w - α clip(m̂ / max(γ h, ε), ρ)``, where ``clip(x, c)`` is ``min(max(x, -c), c)``.
    ``optax.contrib.sophia`` refreshes ``h`` after the parameters have moved, so that its steps use the old
    one, and the first step no curvature at all; the paper refreshes it before, as here.  (The other order
    could not be undone: ``d`` is computed at parameters that cannot be recovered without it.)

    Hyperparameters: ``learning_rate`` (α), ``b1`` (β1, default 0.965), ``b2`` (β2, default 0.99), ``eps``
    (ε, default 1e-8), ``gamma`` (γ, default 0.01), ``clip_threshold`` (ρ, default 1) and ``weight_decay``
    (λ, default 1e-4), as in optax.  Variables: ``mu`` (m) and ``nu`` (h).  Reversible for ``α λ <= 1 -
    2**-7``: costs ``log2(1 / β1) + log2(1 / β2) / k + log2(1 / (1 - α λ))`` bits per parameter and step,
    0.053 at the defaults.

    Args:
      diagonal: `hypergrad.hutchinson` or `hypergrad.gauss_newton_bartlett`.
      update_interval: ``k >= 1``, static.

    Raises:
      ValueError: the interval is below 1.

    Source: Liu, Li, Hall, Liang, Ma, "Sophia: a scalable stochastic second-order optimizer for language
    model pre-training", ICLR 2024, Algorithm 3; ``m̂`` as in optax.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "b2": 0.0, "gamma": 2.0, "weight_decay": 0.0}
    >>> run = {"steps": 1, "optimizer": hg.sophia(hg.hutchinson(square)), "adjoint": hg.Checkpointed()}
    >>> [round(float(x), 3) for x in hg.train(square, jnp.ones(2), hypers, **run).params]
    [0.875, 0.875]
    """
    name = f"sophia({'' if update_interval == 10 else f'update_interval={update_interval}'})"
    if update_interval < 1:
        raise ValueError(f"{name}: update_interval must be a whole number of at least 1")

    def observe(params: PyTree, meta: PyTree, batch: PyTree, step: Array) -> Mapping[str, PyTree]:
        found = jax.lax.cond(
            step % update_interval == 0,
            lambda: diagonal(params, meta, batch, step),
            lambda: jax.tree.map(jnp.zeros_like, params),
        )
        return {"curvature": found}

    def moves(h: Any, t: Array) -> Sequence[Move]:
        refreshed = t % update_interval == 0

        def step(s: Any) -> Array:
            x = unbiased(s.mu, h.b1, t) / jnp.maximum(h.gamma * s.nu, h.eps)
            return -h.learning_rate * jnp.clip(x, -h.clip_threshold, h.clip_threshold)

        return [
            Scale("mu", h.b1),
            Shift("mu", lambda s: (1 - h.b1) * s.gradient),
            Scale("nu", jnp.where(refreshed, h.b2, 1)),
            Shift("nu", lambda s: jnp.where(refreshed, 1 - h.b2, 0) * s.curvature),
            decayed(h),
            Shift("params", step),
        ]

    hypers = {
        "learning_rate": None,
        "b1": 0.965,
        "b2": 0.99,
        "eps": 1e-8,
        "gamma": 0.01,
        "clip_threshold": 1.0,
        "weight_decay": 1e-4,
    }
    return Optimizer(name, moves, {"mu": Variable(), "nu": SQUARES}, hypers, DOMAINS, observe=observe)
