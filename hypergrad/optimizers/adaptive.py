"""Steps divided by the size of past gradients: AdaGrad, AdaDelta, RMSProp and SM3.

======  ===================  ==================================================================
symbol  name                 meaning
======  ===================  ==================================================================
``w``   params               parameters
``g``   gradient             gradient at ``w`` before the step
``s``   sum_of_squares       sum of ``g²``
``v``   nu                   running average of ``g²``
``b``   mu                   running average of ``g``
``d``   step_nu              running average of the squared steps
``m``   velocity             momentum's sum (or average) of preconditioned gradients
``c``   covers               for every index of every axis, a bound on the ``s`` behind it
``α``   learning_rate        ``>= 0``
``γ``   momentum             ``0 <= γ < 1``; ``γ >= 2**-7`` to be reversed
``ρ``   decay, rho           ``0 <= ρ < 1``; ``ρ >= 2**-7`` to be reversed
``ε``   eps                  ``>= 0``, in units of ``g²``: it stands inside the root by default
======  ===================  ==================================================================

All products are element by element.  In exact arithmetic the size of the first numbers in an array sets its
range (see `hypergrad.program.Variable`): ``s``, ``v`` and ``d`` may outgrow the first ``g²`` of their leaf
by ``2**50`` and resolve ``2**-68`` of it.  A run in which one leaves that range, or in which rounding takes
a larger part than ``2**-10`` of what is added to it, is refused.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad.optimizers import roots
from hypergrad.program import SQUARES, Assign, Move, Optimizer, Scale, Shift, Variable

DOMAINS = {
    "learning_rate": (0.0, float("inf")),
    "momentum": (0.0, 1.0),
    "decay": (0.0, 1.0),
    "rho": (0.0, 1.0),
    "eps": (0.0, float("inf")),
}


def adagrad() -> Optimizer:
    """AdaGrad, ``s <- s + g²;  w <- w - α g / √(s + ε)``.

    Hyperparameters: ``learning_rate`` (α) and ``eps`` (ε, default 1e-7).  Variable: ``sum_of_squares``,
    from 0; ``optax.adagrad`` starts it at 0.1.  Not reversible, since ``w`` moves by a function of
    itself; `adagrad_momentum` is.

    Source: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and stochastic
    optimization", JMLR 2011.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hg.train(square, jnp.ones(2), {"learning_rate": 0.1}, steps=1, optimizer=hg.adagrad(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.9, 0.9], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Shift("sum_of_squares", lambda s: s.gradient * s.gradient),
            Assign("params", lambda s: s.params - h.learning_rate * _adagrad_direction(h, s)),
        ]

    hypers = {"learning_rate": None, "eps": 1e-7}
    return Optimizer("adagrad()", moves, {"sum_of_squares": SQUARES}, hypers, DOMAINS)


def adagrad_momentum() -> Optimizer:
    """AdaGrad with momentum, ``s <- s + g²;  m <- γ m + α g / √(s + ε);  w <- w - m``.

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (γ, default 0.9) and ``eps`` (ε, default 1e-7).
    Variables: ``sum_of_squares``, from 0, and ``velocity`` (m).  Reversible: costs ``log2(1 / γ)`` bits
    per parameter and step; the sum costs nothing.

    Source: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and stochastic
    optimization", JMLR 2011; momentum as in `rmsprop_momentum`.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.adagrad_momentum()).params
    Array([0.9, 0.9], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            Shift("sum_of_squares", lambda s: s.gradient * s.gradient),
            Scale("velocity", h.momentum),
            Shift("velocity", lambda s: h.learning_rate * _adagrad_direction(h, s)),
            Shift("params", lambda s: -s.velocity),
        ]

    variables = {"sum_of_squares": SQUARES, "velocity": Variable()}
    hypers = {"learning_rate": None, "momentum": 0.9, "eps": 1e-7}
    return Optimizer("adagrad_momentum()", moves, variables, hypers, DOMAINS)


def _adagrad_direction(h: Any, s: Any) -> Array:
    return s.gradient / jnp.sqrt(s.sum_of_squares + h.eps)


def adadelta() -> Optimizer:
    """AdaDelta, ``v <- ρ v + (1-ρ) g²;  Δ = -√((d+ε) / (v+ε)) g;  d <- ρ d + (1-ρ) Δ²;  w <- w + α Δ``.

    Hyperparameters: ``learning_rate`` (α, default 1, which is the method as published), ``rho`` (ρ,
    default 0.9) and ``eps`` (ε, default 1e-6).  Variables: ``nu`` (v) and ``step_nu`` (d).  Not
    reversible, since ``w`` moves by a function of itself.

    Source: Zeiler, "ADADELTA: an adaptive learning rate method", 2012, Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "rho": 0.75, "eps": 1 / 3}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.adadelta(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.75, 0.75], dtype=float32)
    """

    def step(h: Any, s: Any) -> Array:
        # Roots of both: the square of the denominator, in the derivative of the ratio, may be too small.
        return -(roots.sqrt(s.step_nu + h.eps) / jnp.sqrt(s.nu + h.eps)) * s.gradient

    def moves(h: Any, t: Array) -> Sequence[Move]:
        # The parameters move first, because the step uses the old average of squared steps.
        return [
            Scale("nu", h.rho),
            Shift("nu", lambda s: (1 - h.rho) * (s.gradient * s.gradient)),
            Assign("params", lambda s: s.params + h.learning_rate * step(h, s)),
            Assign("step_nu", lambda s: h.rho * s.step_nu + (1 - h.rho) * step(h, s) ** 2),
        ]

    variables = {"nu": Variable(), "step_nu": Variable()}
    hypers = {"learning_rate": 1.0, "rho": 0.9, "eps": 1e-6}
    return Optimizer("adadelta()", moves, variables, hypers, DOMAINS)


def rmsprop(centered: bool = False, eps_in_sqrt: bool = True) -> Optimizer:
    """RMSProp, ``v <- ρ v + (1-ρ) g²;  w <- w - α g / √(v + ε)``.

    Hyperparameters: ``learning_rate`` (α), ``decay`` (ρ, default 0.9) and ``eps`` (ε, default 1e-8).
    Variables: ``nu`` (v), and ``mu`` (b) where centered.  Not reversible, since ``w`` moves by a function
    of itself; `rmsprop_momentum` is.

    Args:
      centered: divide by a standard deviation: ``b <- ρ b + (1-ρ) g``, and ``v - b²`` in place of ``v``.
      eps_in_sqrt: whether to divide by ``√(v + ε)``, as optax does, and not by ``√v + ε``, as PyTorch does.

    Source: Tieleman and Hinton, "Neural networks for machine learning", lecture 6.5, 2012; centered:
    Graves, "Generating sequences with recurrent neural networks", 2013.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1, "decay": 0.75}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.rmsprop(),
    ...          adjoint=hg.Checkpointed()).params
    Array([0.8, 0.8], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def step(s: Any) -> Array:
            return s.params - h.learning_rate * _rmsprop_direction(h, s, centered, eps_in_sqrt)

        return [*_rmsprop_averages(h, centered), Assign("params", step)]

    hypers = {"learning_rate": None, "decay": 0.9, "eps": 1e-8}
    name = f"rmsprop({_rmsprop_options(centered, eps_in_sqrt)})"
    return Optimizer(name, moves, _rmsprop_variables(centered), hypers, DOMAINS)


def rmsprop_momentum(centered: bool = False, eps_in_sqrt: bool = True) -> Optimizer:
    """RMSProp with momentum, ``v <- ρ v + (1-ρ) g²;  m <- γ m + α g / √(v + ε);  w <- w - m``.

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (γ, default 0.9), ``decay`` (ρ, default 0.9) and
    ``eps`` (ε, default 1e-8).  Variables: ``nu`` (v), ``velocity`` (m), and ``mu`` (b) where centered.
    Reversible: costs ``log2(1 / γ) + log2(1 / ρ)`` bits per parameter and step, with ``log2(1 / ρ)`` more
    where centered.

    Args:
      centered: divide by a standard deviation: ``b <- ρ b + (1-ρ) g``, and ``v - b²`` in place of ``v``.
      eps_in_sqrt: whether to divide by ``√(v + ε)``, as optax does, and not by ``√v + ε``, as PyTorch does.

    Source: Tieleman and Hinton, "Neural networks for machine learning", lecture 6.5, 2012; centered, with
    momentum: Graves, "Generating sequences with recurrent neural networks", 2013.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1, "decay": 0.75}
    >>> hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.rmsprop_momentum()).params
    Array([0.8, 0.8], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def step(s: Any) -> Array:
            return h.learning_rate * _rmsprop_direction(h, s, centered, eps_in_sqrt)

        return [
            *_rmsprop_averages(h, centered),
            Scale("velocity", h.momentum),
            Shift("velocity", step),
            Shift("params", lambda s: -s.velocity),
        ]

    variables = {**_rmsprop_variables(centered), "velocity": Variable()}
    hypers = {"learning_rate": None, "momentum": 0.9, "decay": 0.9, "eps": 1e-8}
    name = f"rmsprop_momentum({_rmsprop_options(centered, eps_in_sqrt)})"
    return Optimizer(name, moves, variables, hypers, DOMAINS)


def _rmsprop_options(centered: bool, eps_in_sqrt: bool) -> str:
    return ", ".join(["centered=True"] * centered + ["eps_in_sqrt=False"] * (not eps_in_sqrt))


def _rmsprop_variables(centered: bool) -> dict[str, Variable]:
    return {"nu": SQUARES, **({"mu": Variable()} if centered else {})}


def _rmsprop_averages(h: Any, centered: bool) -> list[Move]:
    squares: list[Move] = [
        Scale("nu", h.decay),
        Shift("nu", lambda s: (1 - h.decay) * (s.gradient * s.gradient)),
    ]
    if not centered:
        return squares
    return [*squares, Scale("mu", h.decay), Shift("mu", lambda s: (1 - h.decay) * s.gradient)]


def _rmsprop_direction(h: Any, s: Any, centered: bool, eps_in_sqrt: bool) -> Array:
    # Rounding may bring the variance below zero.
    variance = jnp.maximum(s.nu - s.mu * s.mu, 0) if centered else s.nu
    return s.gradient / (jnp.sqrt(variance + h.eps) if eps_in_sqrt else roots.sqrt(variance) + h.eps)


def sm3() -> Optimizer:
    """SM3, AdaGrad with sums kept only by row and by column.

    With ``k`` over the axes and ``i`` over the elements of a leaf::

        s_i = min_k c_k[i_k] + g_i²;   m <- γ m + (1-γ) g / √(s + ε)
        c_k[j] <- max of s_i over i_k = j;   w <- w - α m

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (γ, default 0.9) and ``eps`` (ε, default 1e-8).
    Variables: ``velocity`` (m), and ``covers``, one vector for every leaf, in which the ``c_k`` of all axes
    are concatenated: ``a + b`` numbers for a leaf of shape ``(a, b)``.  Not reversible, since the maximum
    forgets.

    Source: Anil, Gupta, Koren, Singer, "Memory-efficient adaptive optimization", NeurIPS 2019, SM3-II;
    as in ``optax.sm3``.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1, "momentum": 0.5}
    >>> trained = hg.train(square, jnp.ones((2, 3)), hypers, steps=1, optimizer=hg.sm3(),
    ...                    adjoint=hg.Checkpointed())
    >>> trained.state["covers"]
    Array([4., 4., 4., 4., 4.], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def direction(s: Any) -> Array:
            return s.gradient / jnp.sqrt(_covered(s.covers, s.gradient) + h.eps)

        return [
            Scale("velocity", h.momentum),
            Shift("velocity", lambda s: (1 - h.momentum) * direction(s)),
            Assign("covers", lambda s: _cover(_covered(s.covers, s.gradient))),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    covers = Variable(init=lambda leaf: jnp.zeros(sum(leaf.shape) if leaf.ndim else 1, leaf.dtype))
    hypers = {"learning_rate": None, "momentum": 0.9, "eps": 1e-8}
    return Optimizer("sm3()", moves, {"velocity": Variable(), "covers": covers}, hypers, DOMAINS)


def _covered(covers: Array, gradient: Array) -> Array:
    """``s``, of the gradient's shape."""
    if gradient.ndim == 0:
        return covers.reshape(()) + gradient * gradient
    ends = [0, *itertools.accumulate(gradient.shape)]
    bounds = jnp.full(gradient.shape, math.inf, covers.dtype)
    for axis, (start, end) in enumerate(itertools.pairwise(ends)):
        others = [k for k in range(gradient.ndim) if k != axis]
        bounds = jnp.minimum(bounds, jnp.expand_dims(covers[start:end], others))
    return bounds + gradient * gradient


def _cover(s: Array) -> Array:
    """All ``c_k``, concatenated; 0 for rows and columns without elements."""
    if s.ndim == 0:
        return s[None]
    if not s.size:
        return jnp.zeros(sum(s.shape), s.dtype)
    axes = range(s.ndim)
    return jnp.concatenate([jnp.max(s, axis=[k for k in axes if k != axis]) for axis in axes])
