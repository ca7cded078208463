"""Steps measured by the distance from the start: MADGRAD, D-Adaptation and Prodigy.

======  ===================  ==============================================================================
symbol  name                 meaning
======  ===================  ==============================================================================
``w``   params               parameters
``w₀``  start                parameters at the start of the run
``g``   gradient             gradient at ``w`` before the step
``s``   grad_sum             weighted sum of gradients, from 0
``G``   grad_sum_sq          weighted sum of ``g²``, from 0
``m``   mu                   running average of scaled gradients, from 0
``v``   nu                   running average of their squares, from 0
``d``   estim_lr             estimate of the distance to the solution, or of a rate, one for all leaves
``q``   numerator            of that estimate
``n``                        number of the step, from 1
``α``   learning_rate        ``>= 0``
``β``   momentum, b1, b2     ``0 <= β < 1``; ``>= 2**-7`` to be reversed
``ε``   eps                  ``>= 0``
``λ``   weight_decay         ``>= 0``
======  ===================  ==============================================================================

Products are element by element; ``⟨a, b⟩`` and ``‖a‖₁`` are sums over all elements of all leaves.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad.optimizers import roots
from hypergrad.optimizers.adam_family import DOMAINS as ADAM_DOMAINS
from hypergrad.optimizers.adam_family import weight
from hypergrad.optimizers.scalars import number
from hypergrad.program import SQUARES, Move, Optimizer, Remember, Scale, Shift, Total, Variable

DOMAINS = {**ADAM_DOMAINS, "momentum": (0.0, 1.0), "estim_lr_coef": (0.0, float("inf"))}


def madgrad() -> Optimizer:
    """MADGRAD, dual averaging with momentum over AdaGrad's cube root.

    With ``a = (α + ε) √n`` and ``G, s`` from 0::

        G <- G + a (g + λ w)²;  s <- s + a (g + λ w)
        w <- β w + (1-β) (w₀ - s / (∛G + ε))

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (β, default 0.9), ``weight_decay`` (λ, default 0)
    and ``eps`` (ε, default 1e-6), as in ``optax.contrib.madgrad``.  Variables: ``grad_sum`` (s),
    ``grad_sum_sq`` (G) and ``start`` (w₀).  Reversible: costs ``log2(1 / β)`` bits per parameter and step,
    0.152 at the defaults; the sums cost nothing.

    Source: Defazio and Jelassi, "Adaptivity without compromise: a momentumized, adaptive, dual averaged
    gradient method for stochastic optimization", JMLR 2022, Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: 4 * jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.125, "momentum": 0.5, "eps": 0.0}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.madgrad(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.75, 0.75], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        a = (h.learning_rate + h.eps) * jnp.sqrt(jnp.asarray(t + 1, jnp.result_type(h.learning_rate)))

        def gradient(s: Any) -> Array:
            return s.gradient + h.weight_decay * s.params

        def target(s: Any) -> Array:
            denominator = _cbrt(s.grad_sum_sq) + h.eps
            return s.start - s.grad_sum / jnp.where(denominator > 0, denominator, 1)

        return [
            Shift("grad_sum_sq", lambda s: a * gradient(s) ** 2),
            Shift("grad_sum", lambda s: a * gradient(s)),
            Scale("params", h.momentum),
            Shift("params", lambda s: (1 - h.momentum) * target(s)),
        ]

    variables = {"grad_sum": Variable(), "grad_sum_sq": SQUARES, "start": Variable(_itself)}
    hypers = {"learning_rate": None, "momentum": 0.9, "weight_decay": 0.0, "eps": 1e-6}
    return Optimizer("madgrad()", moves, variables, hypers, DOMAINS)


def dadapt_adamw(estim_lr0: float = 1e-6) -> Optimizer:
    """AdamW by D-Adaptation, which finds its own rate from how the gradients accumulate.

    With ``δ = d α √(1 - β2^n) / (1 - β1^n)``, ``β3 = √β2``, and ``d`` from ``d₀``::

        q <- β3 q + (1-β3) δ ⟨g, s / (√v + ε)⟩
        m <- β1 m + (1-β1) δ g;  v <- β2 v + (1-β2) g²;  s <- β3 s + (1-β3) δ g
        d <- max(d, q / ((1-β3) ‖s‖₁));  w <- (1 - δ λ) w - m / (√v + ε)

    where ``δ`` is found before ``d`` changes.  The rates of all leaves must be one.

    Hyperparameters, numbers for every leaf: ``learning_rate`` (α, default 1), ``b1`` (β1, default 0.9),
    ``b2`` (β2, default 0.999) and ``weight_decay`` (λ, default 0); and ``eps`` (ε, default 1e-8); as in
    ``optax.contrib.dadapt_adamw``.  Variables: ``mu`` (m), ``nu`` (v), ``grad_sum`` (s), and for every leaf
    the same two numbers, ``estim_lr`` (d) and ``numerator`` (q).  Reversible for ``δ λ <= 1 - 2**-7``, at
    the cost of `prodigy`.

    Args:
      estim_lr0: ``d₀ > 0``.

    Raises:
      ValueError: a number for every leaf differs within one.

    Source: Defazio and Mishchenko, "Learning-rate-free learning by D-Adaptation", ICML 2023, Algorithm 5.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> run = {"steps": 100, "optimizer": hg.dadapt_adamw(1e-2), "adjoint": hg.Checkpointed()}
    >>> trained = hg.train(square, jnp.full(2, 3.0), {}, **run)
    >>> bool(trained.losses[-1] < trained.losses[0]), bool(trained.state["estim_lr"] > 0.1)
    (True, True)
    """
    name = "dadapt_adamw()" if estim_lr0 == 1e-6 else f"dadapt_adamw(estim_lr0={estim_lr0})"

    def moves(h: Any, t: Array) -> Sequence[Move]:
        numbers = ("learning_rate", "b1", "b2", "weight_decay")
        rate, b1, b2, decay = (number(name, key, getattr(h, key)) for key in numbers)
        b3 = roots.sqrt(b2)
        correction = jnp.sqrt(weight(b2, t + 1)) / weight(b1, t + 1)

        def denominator(s: Any) -> Array:
            return roots.sqrt(s.nu) + h.eps

        def direction(s: Any) -> Array:
            some = denominator(s) > 0
            return jnp.where(some, s.grad_sum / jnp.where(some, denominator(s), 1), 0)

        return [
            Remember("delta", lambda s: s.estim_lr * rate * correction),
            Total("overlap", lambda s: jnp.sum(s.gradient * direction(s))),
            Scale("mu", b1),
            Shift("mu", lambda s: (1 - b1) * s.delta * s.gradient),
            Scale("nu", b2),
            Shift("nu", lambda s: (1 - b2) * s.gradient**2),
            Scale("grad_sum", b3),
            Shift("grad_sum", lambda s: (1 - b3) * s.delta * s.gradient),
            Scale("numerator", b3),
            Shift("numerator", lambda s: (1 - b3) * s.delta * s.overlap),
            Total("size", lambda s: (1 - b3) * jnp.sum(jnp.abs(s.grad_sum))),
            Remember("growth", lambda s: _growth(s, s.numerator)),
            Shift("estim_lr", lambda s: s.growth),
            Scale("params", lambda s: 1 - s.delta * decay),
            Shift("params", lambda s: -s.mu / denominator(s)),
        ]

    variables = {
        "mu": Variable(),
        "nu": SQUARES,
        "grad_sum": Variable(words=1),  # grows with d
        **_estimate(estim_lr0),
    }
    hypers = {"learning_rate": 1.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    return Optimizer(name, moves, variables, hypers, DOMAINS)


def prodigy(estim_lr0: float = 1e-6, safeguard_warmup: bool = False) -> Optimizer:
    """Prodigy, AdamW that estimates its own rate from how far the run has come.

    With ``δ = d α √(1 - β2^n) / (1 - β1^n)``, ``β3 = √β2``, and ``d`` from ``d₀``::

        q <- β3 q + (d / d₀) δ ⟨g, w₀ - w⟩;  s <- β3 s + (d / d₀) δ g
        m <- β1 m + (1-β1) d g;  v <- β2 v + (1-β2) (d g)²
        d <- max(d, c q / ‖s‖₁);  w <- (1 - δ λ) w - δ m / (√v + d ε)

    where ``δ`` is found before ``d`` changes.  The rates of all leaves must be one.

    Hyperparameters, numbers for every leaf: ``learning_rate`` (α, default 1), ``b1`` (β1, default 0.9),
    ``b2`` (β2, default 0.999), ``estim_lr_coef`` (c, default 1) and ``weight_decay`` (λ, default 0); and
    ``eps`` (ε, default 1e-8); as in ``optax.contrib.prodigy``.  Variables: ``mu`` (m), ``nu`` (v),
    ``grad_sum`` (s), ``start`` (w₀), and for every leaf the same two numbers, ``estim_lr`` (d) and
    ``numerator`` (q).  Reversible for ``δ λ <= 1 - 2**-7``: costs ``log2(1 / β1) + 1.5 log2(1 / β2)`` bits
    per parameter and step, 0.154 at the defaults, and four numbers for every leaf; and ``log2(1 / (1 - δ
    λ))``, which is not known before the run, so that ``Reversible(bits=...)`` is reserved for it.

    ``q`` grows with ``d³``, from the default ``d₀`` by more orders of magnitude than exact arithmetic
    provides by default: start with a larger ``d₀``, or pass ``Reversible(radix={"numerator": 40})`` for
    ``|q|`` below ``2**22``.

    Args:
      estim_lr0: ``d₀ > 0``.
      safeguard_warmup: whether ``s`` gathers ``(d² / d₀) g`` instead.

    Raises:
      ValueError: a number for every leaf differs within one.

    Source: Mishchenko and Defazio, "Prodigy: an expeditiously adaptive parameter-free learner", ICML 2024,
    Algorithm 4.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> run = {"steps": 30, "optimizer": hg.prodigy(1e-2), "adjoint": hg.Checkpointed()}
    >>> trained = hg.train(square, jnp.full(2, 3.0), {}, **run)
    >>> bool(trained.losses[-1] < trained.losses[0]), bool(trained.state["estim_lr"] > 0.1)
    (True, True)
    """
    given = {"estim_lr0": (estim_lr0, 1e-6), "safeguard_warmup": (safeguard_warmup, False)}
    changed = [f"{key}={value}" for key, (value, default) in given.items() if value != default]
    name = f"prodigy({', '.join(changed)})"

    def moves(h: Any, t: Array) -> Sequence[Move]:
        numbers = ("learning_rate", "b1", "b2", "estim_lr_coef", "weight_decay")
        rate, b1, b2, coefficient, decay = (number(name, key, getattr(h, key)) for key in numbers)
        b3 = roots.sqrt(b2)
        correction = jnp.sqrt(weight(b2, t + 1)) / weight(b1, t + 1)

        def gathered(s: Any) -> Array:
            return s.estim_lr / estim_lr0 * (s.estim_lr if safeguard_warmup else s.delta) * s.gradient

        return [
            Remember("delta", lambda s: s.estim_lr * rate * correction),
            Total("overlap", lambda s: jnp.sum(s.gradient * (s.start - s.params))),
            Scale("mu", b1),
            Shift("mu", lambda s: (1 - b1) * s.estim_lr * s.gradient),
            Scale("nu", b2),
            Shift("nu", lambda s: (1 - b2) * (s.estim_lr * s.gradient) ** 2),
            Scale("grad_sum", b3),
            Shift("grad_sum", gathered),
            Scale("numerator", b3),
            Shift("numerator", lambda s: s.estim_lr / estim_lr0 * s.delta * s.overlap),
            Total("size", lambda s: jnp.sum(jnp.abs(s.grad_sum))),
            Remember("growth", lambda s: _growth(s, coefficient * s.numerator)),
            Shift("estim_lr", lambda s: s.growth),
            Scale("params", lambda s: 1 - s.delta * decay),
            Shift("params", lambda s: -s.delta * s.mu / (roots.sqrt(s.nu) + s.estim_lr * h.eps)),
        ]

    variables = {
        "mu": Variable(),
        "nu": SQUARES,
        "grad_sum": Variable(words=1),  # grows with d²
        "start": Variable(_itself),
        **_estimate(estim_lr0),
    }
    hypers = {
        "learning_rate": 1.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "estim_lr_coef": 1.0,
        "weight_decay": 0.0,
    }
    return Optimizer(name, moves, variables, hypers, DOMAINS)


def _estimate(start: float) -> dict[str, Variable]:
    """The two variables that determine the rate, the same for all leaves."""
    return {
        "estim_lr": Variable(lambda leaf: jnp.full((), start, leaf.dtype)),
        "numerator": Variable(lambda leaf: jnp.zeros((), leaf.dtype), words=1),  # grows with powers of d
    }


def _growth(s: Any, numerator: Array) -> Array:
    """``max(d, numerator / size) - d``."""
    some = s.size > 0
    estimate = jnp.where(some, numerator / jnp.where(some, s.size, 1), 0)
    return jnp.maximum(estimate - s.estim_lr, 0)


def _itself(leaf: Array) -> Array:
    return leaf


def _cbrt(x: Array) -> Array:
    """``∛x``, whose derivative at 0 is 0."""
    some = x != 0
    return jnp.where(some, jnp.cbrt(jnp.where(some, x, 1)), 0)
