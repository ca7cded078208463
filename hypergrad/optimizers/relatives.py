"""Newer relatives of Adam: AdaBelief, Yogi, ADOPT and AdEMAMix.

======  ===================  ==============================================================================
symbol  name                 meaning
======  ===================  ==============================================================================
``w``   params               parameters
``g``   gradient             gradient at ``w`` before the step
``m``   mu, m1               running average of ``g``, or of ``g`` in units of its size
``m2``  m2                   slow running average of ``g``, from 0
``v``   nu                   running average of ``g²``, or of another square
``n``                        number of the step, from 1: ``t + 1`` where moves count from 0
``m̂``                        ``m / (1 - β1^n)``; ``v̂`` and ``β2`` alike
``α``   learning_rate        ``>= 0``
``β``   b1, b2, b3           ``0 <= β < 1``; ``>= 2**-7`` to be reversed
``ε``   eps                  ``>= 0``, outside the root
``ε₂``  eps_root             ``>= 0``, inside the root
``λ``   weight_decay         ``>= 0``
======  ===================  ==============================================================================

All products are element by element.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad.optimizers import roots
from hypergrad.optimizers.adam_family import DOMAINS as ADAM_DOMAINS
from hypergrad.optimizers.adam_family import HYPERS, MOMENTS, decayed, direction, unbiased
from hypergrad.program import SQUARES, Keep, Move, Optimizer, Scale, Shift, Variable

START = 1e-6  # of Yogi's averages, as in optax
DOMAINS = {
    **ADAM_DOMAINS,
    "b3": (0.0, 1.0),
    "alpha": (0.0, float("inf")),
    "eps_root": (0.0, float("inf")),
}


def adabelief() -> Optimizer:
    """AdaBelief, `hypergrad.adam` with an average of ``(g - m)²`` in place of that of ``g²``.

    ``m <- β1 m + (1-β1) g;  v <- β2 v + (1-β2) (g - m)² + ε₂;  w <- w - α m̂ / (√v̂ + ε)``.

    Hyperparameters: ``learning_rate`` (α), ``b1``, ``b2``, ``eps`` (ε, default 1e-16) and ``eps_root``
    (ε₂, default 1e-16), as in ``optax.adabelief``.
    Variables: ``mu`` (m) and ``nu`` (v).  Reversible: costs ``log2(1 / β1) + log2(1 / β2)`` bits per
    parameter and step, 0.153 at the defaults.

    Source: Zhuang et al., "AdaBelief optimizer: adapting stepsizes by the belief in observed gradients",
    NeurIPS 2020, Algorithm 2.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "b1": 0.5}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.adabelief()).params
    Array([0.5, 0.5], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Scale("mu", h.b1),
            Shift("mu", lambda s: (1 - h.b1) * s.gradient),
            Scale("nu", h.b2),
            Shift("nu", lambda s: (1 - h.b2) * (s.gradient - s.mu) ** 2 + h.eps_root),
            Shift("params", lambda s: -h.learning_rate * direction(h, t, s.mu, s.nu)),
        ]

    hypers = {**HYPERS, "eps": 1e-16, "eps_root": 1e-16}
    return Optimizer("adabelief()", moves, MOMENTS, hypers, DOMAINS)


def yogi() -> Optimizer:
    """Yogi, `hypergrad.adam` whose ``v`` moves towards ``g²`` by steps of at most ``(1-β2) g²``.

    ``m <- β1 m + (1-β1) g;  v <- v - (1-β2) sign(v - g²) g²;  w <- w - α m̂ / (√v̂ + ε)``, with m and v
    from 1e-6, as in ``optax.yogi``.

    Hyperparameters: ``learning_rate`` (α), ``b1``, ``b2`` and ``eps`` (ε, default 1e-3).  Variables:
    ``mu`` (m) and ``nu`` (v).  Reversible: the sign is kept, and costs ``log2(3)`` bits per parameter and
    step, besides ``log2(1 / β1)``; 1.74 in all at the defaults.

    Source: Zaheer, Reddi, Sachan, Kale, Kumar, "Adaptive methods for nonconvex optimization", NeurIPS 2018,
    Algorithm 2; bias corrected and started as in optax.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "eps": 0.0}
    >>> end = hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.yogi()).params
    >>> [round(float(x), 3) for x in end]
    [0.75, 0.75]
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Scale("mu", h.b1),
            Shift("mu", lambda s: (1 - h.b1) * s.gradient),
            Keep("sign", lambda s: jnp.sign(s.nu - s.gradient**2), (-1.0, 0.0, 1.0)),
            Shift("nu", lambda s: -(1 - h.b2) * s.sign * s.gradient**2),
            Shift("params", lambda s: -h.learning_rate * direction(h, t, s.mu, s.nu)),
        ]

    variables = {
        name: kept._replace(init=lambda leaf: jnp.full_like(leaf, START)) for name, kept in MOMENTS.items()
    }
    return Optimizer("yogi()", moves, variables, {**HYPERS, "eps": 1e-3}, DOMAINS)


def adopt(use_clipping: bool = True) -> Optimizer:
    """ADOPT, which divides every gradient by the root of an average of earlier squares.

    From the second step on, with ``t`` counted from 0::

        m <- β1 m + (1-β1) clip(g / max(√v, ε), t^¼);  v <- β2 v + (1-β2) g²;  w <- w - α m

    where ``clip(x, c)`` is ``min(max(x, -c), c)``.  The first step is ``v <- v + g²`` and nothing else; in
    a run that starts with ``v = 0`` this is ``v <- g²``, as in ``optax.contrib.adopt``.

    Hyperparameters: ``learning_rate`` (α), ``b1`` (β1, default 0.9), ``b2`` (β2, default 0.9999) and
    ``eps`` (ε, default 1e-6).  Variables: ``mu`` (m) and ``nu`` (v).  Reversible: costs ``log2(1 / β1) +
    log2(1 / β2)`` bits per parameter and step, 0.152 at the defaults.

    Args:
      use_clipping: whether gradients in units of their size are clipped.

    Source: Taniguchi et al., "ADOPT: modified Adam can converge with any β2 with the optimal rate",
    NeurIPS 2024, Algorithm 2, and its clipping.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "b1": 0.0}
    >>> hg.train(square, jnp.ones(2), hypers, steps=2, optimizer=hg.adopt(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.75, 0.75], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        first = t == 0

        def normed(s: Any) -> Array:
            x = s.gradient / jnp.maximum(roots.sqrt(s.nu), h.eps)
            bound = jnp.asarray(t, x.dtype) ** 0.25
            return jnp.clip(x, -bound, bound) if use_clipping else x

        return [
            Scale("mu", jnp.where(first, 1, h.b1)),
            Shift("mu", lambda s: jnp.where(first, 0, (1 - h.b1) * normed(s))),
            Scale("nu", jnp.where(first, 1, h.b2)),
            Shift("nu", lambda s: jnp.where(first, 1, 1 - h.b2) * s.gradient**2),
            Shift("params", lambda s: -h.learning_rate * s.mu),
        ]

    hypers = {**HYPERS, "b2": 0.9999, "eps": 1e-6}
    name = f"adopt({'' if use_clipping else 'use_clipping=False'})"
    return Optimizer(name, moves, MOMENTS, hypers, DOMAINS)


def ademamix() -> Optimizer:
    """AdEMAMix, `hypergrad.adamw` with a second, slow average of gradients.

    ``m <- β1 m + (1-β1) g;  m2 <- β3 m2 + (1-β3) g;  v <- β2 v + (1-β2) g²;``
    ``w <- (1 - α λ) w - α (m̂ + a m2) / (√v̂ + ε)``.  The slow average is not corrected for its start at 0.

    Hyperparameters: ``learning_rate`` (α), ``b1``, ``b2``, ``b3`` (β3, default 0.9999), ``alpha`` (``a >=
    0``, default 5), ``eps`` and ``weight_decay`` (λ, default 0), as in ``optax.contrib.ademamix``; in the
    paper ``b3`` and ``alpha`` grow over the run, by schedules.  Variables: ``m1`` (m), ``m2`` and ``nu``
    (v).  Reversible for ``α λ <= 1 - 2**-7``: costs ``log2(1 / β1) + log2(1 / β2) + log2(1 / β3) +
    log2(1 / (1 - α λ))`` bits per parameter and step, 0.154 at the defaults.

    Source: Pagliardini, Ablin, Grangier, "The AdEMAMix optimizer: better, faster, older", ICLR 2025,
    Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "b3": 0.5, "alpha": 1.0}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.ademamix()).params
    Array([0.625, 0.625], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def step(s: Any) -> Array:
            average = unbiased(s.m1, h.b1, t) + h.alpha * s.m2
            return -h.learning_rate * average / (roots.sqrt(unbiased(s.nu, h.b2, t)) + h.eps)

        return [
            Scale("m1", h.b1),
            Shift("m1", lambda s: (1 - h.b1) * s.gradient),
            Scale("m2", h.b3),
            Shift("m2", lambda s: (1 - h.b3) * s.gradient),
            Scale("nu", h.b2),
            Shift("nu", lambda s: (1 - h.b2) * s.gradient**2),
            decayed(h),
            Shift("params", step),
        ]

    variables = {"m1": Variable(), "m2": Variable(), "nu": SQUARES}
    hypers = {**HYPERS, "b3": 0.9999, "alpha": 5.0, "weight_decay": 0.0}
    return Optimizer("ademamix()", moves, variables, hypers, DOMAINS)
