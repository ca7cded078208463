"""Steps whose length is a share of the layer's own: LARS.  A layer is a leaf of the parameters.

======  ===================  =================================================================
symbol  name                 meaning
======  ===================  =================================================================
``w``   params               parameters of one leaf
``g``   gradient             gradient at ``w`` before the step
``v``   velocity             momentum's sum
``α``   learning_rate        ``>= 0``
``γ``   momentum             ``0 <= γ < 1``; ``γ >= 2**-7`` to be reversed
``λ``   weight_decay         ``>= 0``
``η``   trust_coefficient    ``>= 0``
======  ===================  =================================================================
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad.optimizers import roots
from hypergrad.program import Move, Optimizer, Scale, Shift, Variable

DOMAINS = {
    "learning_rate": (0.0, float("inf")),
    "momentum": (0.0, 1.0),
    "weight_decay": (0.0, float("inf")),
    "trust_coefficient": (0.0, float("inf")),
}


def ratio(numerator: Array, denominator: Array) -> Array:
    """Of two lengths; 1 where either is 0."""
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
            size = roots.norm(s.params)
            trust = ratio(h.trust_coefficient * size, roots.norm(s.gradient) + h.weight_decay * size)
            return trust * (s.gradient + h.weight_decay * s.params)

        return [
            Scale("velocity", h.momentum),
            Shift("velocity", change),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    hypers = {"learning_rate": None, "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.001}
    return Optimizer("lars()", moves, {"velocity": Variable()}, hypers, DOMAINS)
