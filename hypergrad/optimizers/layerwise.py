"""Steps whose length is relative to the layer's norm: LARS and LAMB.  A layer is a leaf of the parameters.

======  ===================  =================================================================
symbol  name                 meaning
======  ===================  =================================================================
``w``   params               parameters of one leaf
``g``   gradient             gradient at ``w`` before the step
``v``   velocity             momentum's sum
``ρ``   ratio                ``‖w‖ / ‖r‖``, a scalar for every leaf
``α``   learning_rate        ``>= 0``
``γ``   momentum             ``0 <= γ < 1``; ``γ >= 2**-7`` to be reversed
``λ``   weight_decay         ``>= 0``
``η``   trust_coefficient    ``>= 0``
======  ===================  =================================================================

LAMB's averages, and ``β1``, ``β2`` and ``ε``, are those of `hypergrad.optimizers.adam`.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad._base import trees
from hypergrad.optimizers.adam_family import DOMAINS as ADAM_DOMAINS
from hypergrad.optimizers.adam_family import HYPERS, MOMENTS, direction, moments
from hypergrad.program import Move, Optimizer, Remember, Scale, Shift, Variable

DOMAINS = {**ADAM_DOMAINS, "momentum": (0.0, 1.0), "trust_coefficient": (0.0, float("inf"))}


def ratio(numerator: Array, denominator: Array) -> Array:
    """The ratio of two lengths; 1 where either is 0."""
    both = (numerator > 0) & (denominator > 0)
    return jnp.where(both, numerator / jnp.where(both, denominator, 1), 1)


def lars() -> Optimizer:
    """LARS, ``v <- γ v + η (‖w‖ / (‖g‖ + λ ‖w‖)) (g + λ w);  w <- w - α v``, for every leaf.

    Where ``‖w‖`` or the denominator is 0, as for biases that start at 0, the factor of ``g + λ w`` is 1,
    as in ``optax.lars``, whose denominator is ``‖g + λ w‖``.

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (γ, default 0.9), ``weight_decay`` (λ, default 0)
    and ``trust_coefficient`` (η, default 0.001).  Variable: ``velocity``.  Reversible: costs
    ``log2(1 / γ)`` bits per parameter and step.

    Source: You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017, Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 1.0, "trust_coefficient": 0.1}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.lars()).params
    Array([0.9, 0.9], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def change(s: Any) -> Array:
            size = trees.norm(s.params)
            trust = ratio(h.trust_coefficient * size, trees.norm(s.gradient) + h.weight_decay * size)
            return trust * (s.gradient + h.weight_decay * s.params)

        return [
            Scale("velocity", h.momentum),
            Shift("velocity", change),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    hypers = {"learning_rate": None, "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.001}
    return Optimizer("lars()", moves, {"velocity": Variable()}, hypers, DOMAINS)


def lamb() -> Optimizer:
    """LAMB, ``r = m̂ / (√v̂ + ε) + λ w;  w <- w - α (‖w‖ / ‖r‖) r``, for every leaf.

    If a norm is 0, the ratio is 1, as in ``optax.lamb``.

    Hyperparameters: ``learning_rate`` (α), ``b1``, ``b2``, ``eps`` (ε, default 1e-6) and
    ``weight_decay`` (λ, default 0).  Variables: ``mu`` (m) and ``nu`` (v).  Reversible for
    ``α λ ‖w‖ / ‖r‖ <= 1 - 2**-7``: the ratio is remembered for every step and leaf.  Besides that it costs
    ``log2(1 / β1) + log2(1 / β2) + log2(1 / (1 - α λ ‖w‖ / ‖r‖))`` bits per parameter and step; the last
    term is not known before the run, so that ``Reversible(bits=...)`` is reserved for it.

    Source: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes",
    ICLR 2020, Algorithm 2.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.5, "weight_decay": 1.0}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.lamb()).params
    Array([0.5, 0.5], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def trust(s: Any) -> Array:
            r = direction(h, t, s.mu, s.nu) + h.weight_decay * s.params
            return ratio(trees.norm(s.params), trees.norm(r))

        return [
            *moments(h),
            Remember("ratio", trust),
            Scale("params", lambda s: 1 - h.learning_rate * s.ratio * h.weight_decay),
            Shift("params", lambda s: -h.learning_rate * s.ratio * direction(h, t, s.mu, s.nu)),
        ]

    hypers = {**HYPERS, "eps": 1e-6, "weight_decay": 0.0}
    return Optimizer("lamb()", moves, MOMENTS, hypers, DOMAINS)
