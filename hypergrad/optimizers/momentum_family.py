"""Gradient descent with and without momentum.

======  ==================  ===========================================
symbol  name                meaning
======  ==================  ===========================================
``w``   params              parameters
``v``   velocity            running average (or sum) of gradients
``g``   gradient            gradient at ``w`` before the step
``α``   learning_rate       ``>= 0``
``γ``   momentum            ``0 <= γ < 1``; ``γ >= 2**-7`` to be reversed
======  ==================  ===========================================
"""

from collections.abc import Sequence
from typing import Any

from jax import Array

from hypergrad.program import Assign, Move, Optimizer, Scale, Shift, Variable

DOMAINS = {"learning_rate": (0.0, float("inf")), "momentum": (0.0, 1.0)}


def momentum() -> Optimizer:
    """Momentum with averaged gradients, ``v <- γ v - (1 - γ) g;  w <- w + α v``.

    Hyperparameters: ``learning_rate`` (α) and ``momentum`` (γ, default 0.9).  Variable: ``velocity``.
    Reversible: costs ``log2(1 / γ)`` bits per parameter and step.

    Source: Maclaurin, Duvenaud, Adams (2015), Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1, "momentum": 0.5}
    >>> hg.train(square, jnp.ones(2), hypers, steps=2, optimizer=hg.momentum()).params
    Array([0.76, 0.76], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Scale("velocity", h.momentum),
            Shift("velocity", lambda s: -(1 - h.momentum) * s.gradient),
            Shift("params", lambda s: h.learning_rate * s.velocity),
        ]

    hypers = {"learning_rate": None, "momentum": 0.9}
    return Optimizer("momentum()", moves, {"velocity": Variable()}, hypers, DOMAINS)


def heavy_ball() -> Optimizer:
    """Polyak's heavy ball, ``v <- γ v + g;  w <- w - α v``, as in ``optax.sgd(α, momentum=γ)``.

    For constant γ it equals `momentum` with its rate times ``1 - γ``.  Hyperparameters:
    ``learning_rate`` (α) and ``momentum`` (γ, default 0.9).  Variable: ``velocity``.  Reversible: costs
    ``log2(1 / γ)`` bits per parameter and step.

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1, "momentum": 0.5}
    >>> hg.train(square, jnp.ones(2), hypers, steps=2, optimizer=hg.heavy_ball()).params
    Array([0.54, 0.54], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Scale("velocity", h.momentum),
            Shift("velocity", lambda s: s.gradient),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    hypers = {"learning_rate": None, "momentum": 0.9}
    return Optimizer("heavy_ball()", moves, {"velocity": Variable()}, hypers, DOMAINS)


def nesterov() -> Optimizer:
    """Nesterov's momentum, ``v <- γ v + g;  w <- w - α (γ v + g)``, as ``optax.sgd(α, γ, nesterov=True)``.

    Hyperparameters: ``learning_rate`` (α) and ``momentum`` (γ, default 0.9).  Variable: ``velocity``.
    Not reversible, since its step contains a plain gradient step: differentiate with ``Checkpointed()``
    or ``Stored()``.

    Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep
    learning", ICML 2013.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1, "momentum": 0.5}
    >>> hg.train(square, jnp.ones(2), hypers, steps=2, optimizer=hg.nesterov(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.44, 0.44], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Scale("velocity", h.momentum),
            Shift("velocity", lambda s: s.gradient),
            Assign("params", lambda s: s.params - h.learning_rate * (h.momentum * s.velocity + s.gradient)),
        ]

    hypers = {"learning_rate": None, "momentum": 0.9}
    return Optimizer("nesterov()", moves, {"velocity": Variable()}, hypers, DOMAINS)


def sgd() -> Optimizer:
    """Gradient descent, ``w <- w - α g``.

    Hyperparameter: ``learning_rate`` (α).  Not reversible, since ``w`` moves by a function of itself:
    differentiate with ``Checkpointed()`` or ``Stored()``.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hg.train(square, jnp.ones(2), {"learning_rate": 0.1}, steps=2, optimizer=hg.sgd(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.64, 0.64], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [Assign("params", lambda s: s.params - h.learning_rate * s.gradient)]

    return Optimizer("sgd()", moves, {}, {"learning_rate": None}, DOMAINS)
