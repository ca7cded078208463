"""Steps that use signs: Signum, Lion, Grams and Cautious AdamW.

======  ===================  ==============================================================================
symbol  name                 meaning
======  ===================  ==============================================================================
``w``   params               parameters
``g``   gradient             gradient at ``w`` before the step
``m``   mu                   running average of ``g``, from 0
``c``   sign                 a sign of every element, -1, 0 or 1
``k``   mask                 0 or 1 for every element
``α``   learning_rate        ``>= 0``
``β``   beta, b1, b2         ``0 <= β < 1``; of averages ``>= 2**-7`` to be reversed
``λ``   weight_decay         ``>= 0``
======  ===================  ==============================================================================

All products are element by element.  ``u = m̂ / (√v̂ + ε)`` is the direction of
`hypergrad.optimizers.adam`.  The derivative of a sign is 0: a quantity that enters a step only through a
sign has a hypergradient of exactly 0, and cannot be learned by following it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad.optimizers.adam_family import DOMAINS as ADAM_DOMAINS
from hypergrad.optimizers.adam_family import HYPERS, MOMENTS, decayed, direction, moments
from hypergrad.program import Keep, Move, Optimizer, Scale, Shift, Variable

SIGN = (-1.0, 0.0, 1.0)
MASK = (0.0, 1.0)
DOMAINS = {**ADAM_DOMAINS, "beta": (0.0, 1.0)}


def signum() -> Optimizer:
    """Signum, ``m <- β m + (1-β) g;  w <- (1 - α λ) w - α sign(m)``, as in ``optax.signum``.

    The hypergradients of β and of the gradients are exactly 0, those of α and λ are not.

    Hyperparameters: ``learning_rate`` (α), ``beta`` (β, default 0.9) and ``weight_decay`` (λ, default 0,
    which is ``optax.signum``).  Variable: ``mu`` (m).  Reversible for ``α λ <= 1 - 2**-7``: costs
    ``log2(1 / β) + log2(1 / (1 - α λ))`` bits per parameter and step, 0.152 at the defaults.

    Source: Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: compressed optimisation for non-convex
    problems", ICML 2018, Algorithm 2.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25}
    >>> hg.train(square, jnp.array([1.0, -2.0]), hypers, steps=1, optimizer=hg.signum()).params
    Array([ 0.75, -1.75], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Scale("mu", h.beta),
            Shift("mu", lambda s: (1 - h.beta) * s.gradient),
            decayed(h),
            Shift("params", lambda s: -h.learning_rate * jnp.sign(s.mu)),
        ]

    hypers = {"learning_rate": None, "beta": 0.9, "weight_decay": 0.0}
    return Optimizer("signum()", moves, {"mu": Variable()}, hypers, DOMAINS)


def lion() -> Optimizer:
    """Lion, ``c = sign(β1 m + (1-β1) g);  m <- β2 m + (1-β2) g;  w <- (1 - α λ) w - α c``.

    As in ``optax.lion``.  The hypergradients of β1, β2 and of the gradients are exactly 0, those of α and λ
    are not.

    Hyperparameters: ``learning_rate`` (α), ``b1`` (β1, default 0.9), ``b2`` (β2, default 0.99) and
    ``weight_decay`` (λ, default 1e-3).  Variable: ``mu`` (m).  Reversible for ``α λ <= 1 - 2**-7``: the
    sign is kept, and costs ``log2(3)`` bits per parameter and step, besides ``log2(1 / β2) +
    log2(1 / (1 - α λ))``; 1.6 in all.

    Source: Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, Algorithm 2.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "weight_decay": 0.0}
    >>> hg.train(square, jnp.array([1.0, -2.0]), hypers, steps=1, optimizer=hg.lion()).params
    Array([ 0.75, -1.75], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Keep("sign", lambda s: jnp.sign(h.b1 * s.mu + (1 - h.b1) * s.gradient), SIGN),
            Scale("mu", h.b2),
            Shift("mu", lambda s: (1 - h.b2) * s.gradient),
            decayed(h),
            Shift("params", lambda s: -h.learning_rate * s.sign),
        ]

    hypers = {"learning_rate": None, "b1": 0.9, "b2": 0.99, "weight_decay": 1e-3}
    return Optimizer("lion()", moves, {"mu": Variable()}, hypers, DOMAINS)


def grams() -> Optimizer:
    """Grams, the size of Adam's step with the gradient's sign: ``w <- (1 - α λ) w - α sign(g) |u|``.

    Hyperparameters: those of `hypergrad.adam`, and ``weight_decay`` (λ, default 0).  Variables: ``mu`` and
    ``nu``.  Reversible for ``α λ <= 1 - 2**-7``: the sign is kept, and costs ``log2(3)`` bits per parameter
    and step, besides what `hypergrad.adamw` costs; 1.74 in all at the defaults.

    Source: Cao, Li, Song, "Grams: gradient descent with adaptive momentum scaling", 2024, Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25}
    >>> hg.train(square, jnp.array([1.0, -2.0]), hypers, steps=1, optimizer=hg.grams()).params
    Array([ 0.75, -1.75], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def step(s: Any) -> Array:
            return -h.learning_rate * s.sign * jnp.abs(direction(h, t, s.mu, s.nu))

        keep = Keep("sign", lambda s: jnp.sign(s.gradient), SIGN)
        return [keep, *moments(h), decayed(h), Shift("params", step)]

    return Optimizer("grams()", moves, MOMENTS, {**HYPERS, "weight_decay": 0.0}, DOMAINS)


def cautious_adamw() -> Optimizer:
    """AdamW that moves only where its average and the gradient agree in sign.

    ``k = 1 where m g > 0, else 0;  w <- (1 - α λ) w - α k u / max(mean(k), 10⁻³)``, with the mean over the
    leaf.  Weight decay comes first, as in `hypergrad.adamw`.

    Hyperparameters: those of `hypergrad.adam`, and ``weight_decay`` (λ, default 1e-4).  Variables: ``mu``
    and ``nu``.  Reversible for ``α λ <= 1 - 2**-7``: the mask is kept, and costs 1 bit per parameter and
    step, besides what `hypergrad.adamw` costs; 1.15 in all at the defaults.

    Source: Liang, Chen, Liu, Liu, "Cautious optimizers: improving training with one line of code", 2024,
    with the normalization of its code.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "weight_decay": 0.0}
    >>> hg.train(square, jnp.array([1.0, -2.0]), hypers, steps=1, optimizer=hg.cautious_adamw()).params
    Array([ 0.75, -1.75], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def step(s: Any) -> Array:
            share = jnp.maximum(jnp.mean(s.mask), 1e-3)
            return -h.learning_rate * s.mask / share * direction(h, t, s.mu, s.nu)

        agree = Keep("mask", lambda s: (s.mu * s.gradient > 0).astype(s.mu.dtype), MASK)
        return [*moments(h), agree, decayed(h), Shift("params", step)]

    return Optimizer("cautious_adamw()", moves, MOMENTS, {**HYPERS, "weight_decay": 1e-4}, DOMAINS)
