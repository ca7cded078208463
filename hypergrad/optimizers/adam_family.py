"""Adam and its relatives: a running average of gradients over the root of one of their squares.

======  ===================  ====================================================================
symbol  name                 meaning
======  ===================  ====================================================================
``w``   params               parameters
``g``   gradient             gradient at ``w`` before the step
``m``   mu                   running average of ``g``, from 0
``v``   nu                   running average of ``g²``, from 0
``u``   nu_max, largest      largest ``v``, or largest ``|g|`` with decay, so far
``n``                        number of the step, from 1: ``t + 1`` where moves count from 0
``m̂``                        ``m / (1 - β1^n)``, with the current ``β1``
``v̂``                        ``v / (1 - β2^n)``, with the current ``β2``
``α``   learning_rate        ``>= 0``
``β1``  b1                   ``0 <= β1 < 1``, default 0.9; ``>= 2**-7`` to be reversed
``β2``  b2                   ``0 <= β2 < 1``, default 0.999; ``>= 2**-7`` to be reversed
``ε``   eps                  ``>= 0``, in units of ``|g|``, default 1e-8: it stands outside the root
``λ``   weight_decay         ``>= 0``
======  ===================  ====================================================================

All products are element by element.

In exact arithmetic the size of the first numbers in an array sets its range (see
`hypergrad.program.Variable`).  ``v`` may outgrow the first ``(1-β2) g²`` of its leaf by ``2**50``, hence
gradients those of the first step by ``2**25``, and resolves ``2**-68`` of it.  A run in which ``v`` leaves
that range, or in which rounding takes a larger part than ``2**-10`` of what is added to it, is refused.
Ratios are multiples of ``2**-32``: one such step of β2 is 1e-6 of ``1 - β2`` at 0.9998.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad import exact
from hypergrad.optimizers import roots
from hypergrad.program import SQUARES, Assign, Move, Optimizer, Scale, Shift, Variable

MOMENTS = {"mu": Variable(), "nu": SQUARES}
HYPERS = {"learning_rate": None, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
DOMAINS = {
    "learning_rate": (0.0, float("inf")),
    "b1": (0.0, 1.0),
    "b2": (0.0, 1.0),
    "eps": (0.0, float("inf")),
    "weight_decay": (0.0, float("inf")),
}


def moments(h: Any) -> list[Move]:
    """``m <- β1 m + (1-β1) g;  v <- β2 v + (1-β2) g²``."""
    return [
        Scale("mu", h.b1),
        Shift("mu", lambda s: (1 - h.b1) * s.gradient),
        Scale("nu", h.b2),
        Shift("nu", lambda s: (1 - h.b2) * (s.gradient * s.gradient)),
    ]


def weight(decay: Array, n: Array) -> Array:
    """``1 - decay^n``, the total weight in a running average, computed without cancellation.

    >>> import jax.numpy as jnp
    >>> float(weight(jnp.float32(0.5), 2))
    0.75
    """
    # Floats of 32 bits keep three digits of the difference at a decay of 0.9999, and `radam` fewer still.
    # Near 0 the logarithm has no derivative.
    large = decay > 0.25
    n = jnp.asarray(n, jnp.result_type(decay))
    return jnp.where(
        large, -jnp.expm1(n * jnp.log(jnp.where(large, decay, 0.5))), 1 - jnp.where(large, 0.5, decay) ** n
    )


def unbiased(average: Array, decay: Array, t: Array) -> Array:
    """``average / (1 - decay^n)``: a running average that started at 0, corrected for that bias."""
    return average / weight(decay, t + 1)


def direction(h: Any, t: Array, mu: Array, nu: Array) -> Array:
    """``m̂ / (√v̂ + ε)``."""
    return unbiased(mu, h.b1, t) / (roots.sqrt(unbiased(nu, h.b2, t)) + h.eps)


def decayed(h: Any) -> Scale:
    """``w <- (1 - α λ) w``."""
    # Written this way because αλ may be below the rounding error of 1.
    kept = 1 - h.learning_rate * h.weight_decay
    return Scale("params", kept, lambda _: exact.complement(h.learning_rate, h.weight_decay))


def adam() -> Optimizer:
    """Adam, ``m <- β1 m + (1-β1) g;  v <- β2 v + (1-β2) g²;  w <- w - α m̂ / (√v̂ + ε)``.

    Hyperparameters: ``learning_rate`` (α), ``b1``, ``b2`` and ``eps`` (ε), as in ``optax.adam``.
    Variables: ``mu`` (m) and ``nu`` (v).  Reversible: costs ``log2(1 / β1) + log2(1 / β2)`` bits per
    parameter and step, 0.153 at the defaults.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hg.train(square, jnp.ones(2), {"learning_rate": 0.1}, steps=1, optimizer=hg.adam()).params
    Array([0.9, 0.9], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        step = Shift("params", lambda s: -h.learning_rate * direction(h, t, s.mu, s.nu))
        return [*moments(h), step]

    return Optimizer("adam()", moves, MOMENTS, HYPERS, DOMAINS)


def adamw() -> Optimizer:
    """Adam with decoupled weight decay: ``w <- (1 - α λ) w`` before the step of `adam`.

    Hyperparameters: those of `adam`, and ``weight_decay`` (λ, default 1e-4), as in ``optax.adamw``.
    Variables: ``mu`` and ``nu``.  Reversible for ``α λ <= 1 - 2**-7``: costs ``log2(1 / β1) +
    log2(1 / β2) + log2(1 / (1 - α λ))`` bits per parameter and step.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, Algorithm 2.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1, "weight_decay": 1.0}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.adamw()).params
    Array([0.8, 0.8], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        step = Shift("params", lambda s: -h.learning_rate * direction(h, t, s.mu, s.nu))
        return [*moments(h), decayed(h), step]

    return Optimizer("adamw()", moves, MOMENTS, {**HYPERS, "weight_decay": 1e-4}, DOMAINS)


def adamax() -> Optimizer:
    """AdaMax, ``u <- max(β2 u, |g|);  w <- w - α m̂ / (u + ε)``.

    Hyperparameters: those of `adam`.  Variables: ``mu`` (m) and ``largest`` (u).  ``optax.adamax`` adds ε
    inside the maximum.  Not reversible, since the maximum forgets.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, Algorithm 2.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hg.train(square, jnp.ones(2), {"learning_rate": 0.1}, steps=1, optimizer=hg.adamax(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.9, 0.9], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        average, correct, *_ = moments(h)
        return [
            average,
            correct,
            Assign("largest", lambda s: jnp.maximum(h.b2 * s.largest, jnp.abs(s.gradient))),
            Shift("params", lambda s: -h.learning_rate * unbiased(s.mu, h.b1, t) / (s.largest + h.eps)),
        ]

    return Optimizer("adamax()", moves, {"mu": Variable(), "largest": Variable()}, HYPERS, DOMAINS)


def nadam() -> Optimizer:
    """Adam with Nesterov's momentum: `adam` with ``β1 m + (1-β1) g`` in place of ``m`` in its last line.

    Both terms are divided by ``1 - β1^n``.  With this one correction the method contains `nesterov` in the
    limit of large ε; ``optax.nadam`` corrects the first term by ``1 - β1^(n+1)``, and so does not contain
    it.

    Hyperparameters: those of `adam`.  Variables: ``mu`` and ``nu``.  Not reversible, since ``w`` moves by
    a function of itself.

    Source: Dozat, "Incorporating Nesterov momentum into Adam", 2016, in the form of Choi, Shallue, Nado,
    Lee, Maddison, Dahl, "On empirical comparisons of optimizers for deep learning", 2019.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hg.train(square, jnp.ones(2), {"learning_rate": 0.1}, steps=1, optimizer=hg.nadam(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.81, 0.81], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def ahead(s: Any) -> Array:
            return h.b1 * s.mu + (1 - h.b1) * s.gradient

        step = Assign("params", lambda s: s.params - h.learning_rate * direction(h, t, ahead(s), s.nu))
        return [*moments(h), step]

    return Optimizer("nadam()", moves, MOMENTS, HYPERS, DOMAINS)


def amsgrad() -> Optimizer:
    """AMSGrad, `adam` with ``u <- max(u, v)`` in place of ``v`` in its last line.

    The maximum is of the uncorrected ``v``, as published; then ``m`` and ``u`` are corrected like ``m``
    and ``v`` in `adam`.  ``optax.amsgrad`` takes the maximum of the corrected ``v̂``.

    Hyperparameters: those of `adam`.  Variables: ``mu``, ``nu`` and ``nu_max`` (u).  Not reversible,
    since the maximum forgets.

    Source: Reddi, Kale, Kumar, "On the convergence of Adam and beyond", ICLR 2018, Algorithm 2.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hg.train(square, jnp.ones(2), {"learning_rate": 0.1}, steps=1, optimizer=hg.amsgrad(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.9, 0.9], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            *moments(h),
            Assign("nu_max", lambda s: jnp.maximum(s.nu_max, s.nu)),
            Shift("params", lambda s: -h.learning_rate * direction(h, t, s.mu, s.nu_max)),
        ]

    return Optimizer("amsgrad()", moves, {**MOMENTS, "nu_max": Variable()}, HYPERS, DOMAINS)


def radam() -> Optimizer:
    """RAdam, `adam` whose step is rectified for the variance of ``1 / √v̂``.

    With ``ρ∞ = 2 / (1-β2) - 1`` and ``ρ = ρ∞ - 2 n β2^n / (1 - β2^n)``::

        w <- w - α r m̂ / (√v̂ + ε),  r = √((ρ-4) (ρ-2) ρ∞ / ((ρ∞-4) (ρ∞-2) ρ)),   if ρ > 4,
        w <- w - α m̂,                                                          otherwise.

    Hyperparameters: those of `adam`.  Variables: ``mu`` and ``nu``.  ``optax.radam`` has the threshold 5
    by default.  Reversible, at the cost of `adam`.

    Source: Liu et al., "On the variance of the adaptive learning rate and beyond", ICLR 2020, Algorithm 2.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hg.train(square, jnp.ones(2), {"learning_rate": 0.1}, steps=1, optimizer=hg.radam()).params
    Array([0.8, 0.8], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def step(s: Any) -> Array:
            summed = weight(h.b2, t + 1)
            n = jnp.asarray(t + 1, summed.dtype)
            longest = 2 / (1 - h.b2) - 1
            length = longest - 2 * n * (1 - summed) / summed
            rectified = length > 4
            # Where not rectified, any numbers with real roots will do, because derivatives pass through
            # both branches.
            P, p = jnp.where(rectified, longest, 6.0), jnp.where(rectified, length, 5.0)
            r = jnp.sqrt((p - 4) * (p - 2) * P / ((P - 4) * (P - 2) * p))
            adaptive = r * direction(h, t, s.mu, s.nu)
            return jnp.where(rectified, adaptive, unbiased(s.mu, h.b1, t))

        return [*moments(h), Shift("params", lambda s: -h.learning_rate * step(s))]

    return Optimizer("radam()", moves, MOMENTS, HYPERS, DOMAINS)
