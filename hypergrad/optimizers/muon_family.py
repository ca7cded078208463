"""Momentum whose matrices are made orthogonal: Muon, NorMuon and AdaMuon.

======  ===================  ==============================================================================
symbol  name                 meaning
======  ===================  ==============================================================================
``w``   params               a leaf, ``(n_in, n_out)``, as in ``x w``
``g``   gradient             gradient at ``w`` before the step
``m``   mu                   running average of ``g``, from 0
``m̂``                        ``m / (1 - β^n)``, in step ``n`` from 1
``O``                        ``m̂``, its singular values brought near 1 (see `newton_schulz`)
``v``   nu                   running average of squares of ``O``, from 0
``α``   learning_rate        ``>= 0``
``β``   beta                 ``0 <= β < 1``, default 0.95; ``>= 2**-7`` to be reversed
``β2``  b2                   ``0 <= β2 < 1``, default 0.95; ``>= 2**-7`` to be reversed
``ε``   eps                  ``> 0``, default 1e-8; beside the norm of ``m̂``, and beside ``√v``
``λ``   weight_decay         ``>= 0``
======  ===================  ==============================================================================

All are without Nesterov's momentum.  With it ``O`` would be computed from ``β m + (1-β) g``: the parameters
would move by a function of the gradient itself, which cannot be undone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad._base import trees
from hypergrad.optimizers import roots
from hypergrad.optimizers.adam_family import decayed, unbiased
from hypergrad.optimizers.scalars import number
from hypergrad.program import SQUARES, Move, Optimizer, Scale, Shift, Variable

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
DOMAINS = {
    "learning_rate": (0.0, float("inf")),
    "beta": (0.0, 1.0),
    "b2": (0.0, 1.0),
    "eps": (0.0, float("inf")),
    "weight_decay": (0.0, float("inf")),
}


def newton_schulz(
    matrix: Array,
    steps: int = 5,
    eps: Array | float = 1e-8,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
) -> Array:
    """A matrix whose singular values are brought near 1, by a polynomial of odd powers, step by step.

    ``X = M / (‖M‖ + ε);  X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X``.  At the coefficients of Muon, five steps
    bring singular values above 0.002 of the norm to between 0.68 and 1.21, and not to 1.

    Args:
      matrix: ``M``, with two axes.
      steps: number of iterations, at least 1.
      eps: ε, in units of ``M``.
      coefficients: ``a, b, c``.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.

    >>> import jax.numpy as jnp
    >>> made = newton_schulz(jnp.diag(jnp.array([2.0, 0.1])))
    >>> [round(float(x), 2) for x in jnp.diagonal(made)]
    [0.7, 0.76]
    """
    a, b, c = coefficients
    X = matrix / (trees.norm(matrix) + eps)
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    for _ in range(steps):
        A = trees.dot(X, X.T)
        X = a * X + trees.dot(b * A + c * trees.dot(A, A), X)
    return X.T if tall else X


def muon(ns_steps: int = 5, consistent_rms: float | None = None) -> Optimizer:
    """Muon without Nesterov's momentum, ``m <- β m + (1-β) g;  w <- (1 - α λ) w - α s O``, for matrices.

    ``s = √max(1, n_out / n_in)``.  As in ``optax.contrib.muon(nesterov=False)``.  Every leaf must be a
    matrix; optax uses AdamW for the others.

    Hyperparameters: ``learning_rate`` (α), ``beta`` (β, default 0.95), ``eps`` (ε, default 1e-8) and
    ``weight_decay`` (λ, default 0).  Variable: ``mu`` (m).  Reversible for ``α λ <= 1 - 2**-7``: costs
    ``log2(1 / β) + log2(1 / (1 - α λ))`` bits per parameter and step, 0.074 at the defaults.

    Args:
      ns_steps: iterations of `newton_schulz`, static.
      consistent_rms: ``r``, for ``s = r √max(n_in, n_out)``, which makes the elements of steps similar in
        size for all shapes; 0.2 matches AdamW.

    Raises:
      ValueError: a leaf is not a matrix.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; consistent size:
    Liu et al., "Muon is scalable for LLM training", 2025.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.1}
    >>> end = hg.train(square, jnp.ones((1, 1)), hypers, steps=1, optimizer=hg.muon()).params
    >>> round(float(end[0, 0]), 3)
    0.93
    """
    name = f"muon({_arguments(ns_steps, consistent_rms=consistent_rms)})"

    def moves(h: Any, t: Array) -> Sequence[Move]:
        def step(s: Any) -> Array:
            n_in, n_out = s.mu.shape
            size = math.sqrt(max(1, n_out / n_in))
            if consistent_rms is not None:
                size = math.sqrt(max(n_in, n_out)) * consistent_rms
            return -h.learning_rate * size * newton_schulz(unbiased(s.mu, h.beta, t), ns_steps, h.eps)

        return [*_average(h), decayed(h), Shift("params", step)]

    hypers = {"learning_rate": None, "beta": 0.95, "eps": 1e-8, "weight_decay": 0.0}
    return Optimizer(name, moves, {"mu": Variable(_of_matrices(name))}, hypers, DOMAINS)


def normuon(ns_steps: int = 5) -> Optimizer:
    """NorMuon without Nesterov's momentum: Muon whose columns are scaled to one size.

    With ``v`` of one number for every output, the mean of ``O²`` over the inputs::

        m <- β m + (1-β) g;  v <- β2 v + (1-β2) mean(O²);  D = O / (√v + ε)
        w <- (1 - α λ) w - 0.2 α √(n_in n_out) D / ‖D‖

    Hyperparameters: ``learning_rate`` (α), ``beta`` (β, default 0.95), ``b2`` (β2, default 0.95; a number
    for every leaf), ``eps`` (ε, default 1e-8) and ``weight_decay`` (λ, default 0).  Variables: ``mu`` (m)
    and ``nu`` (v, ``(1, n_out)``).  Reversible for ``α λ <= 1 - 2**-7``: costs what `muon` costs, 0.074
    bits per parameter and step at the defaults, and ``log2(1 / β2)`` per column.

    Args:
      ns_steps: iterations of `newton_schulz`, static.

    Raises:
      ValueError: a leaf is not a matrix, or ``b2`` differs within a leaf.

    Source: Li et al., "NorMuon: making Muon more efficient and scalable", 2025, Algorithm 1, where weights
    are the transpose of those here.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.5}
    >>> hg.train(square, jnp.ones((1, 1)), hypers, steps=1, optimizer=hg.normuon()).params
    Array([[0.9]], dtype=float32)
    """
    name = f"normuon({_arguments(ns_steps)})"

    def squares(X: Array) -> Array:
        return jnp.mean(X * X, axis=0, keepdims=True)

    columns = SQUARES._replace(init=lambda leaf: jnp.zeros((1, leaf.shape[1]), leaf.dtype))
    return _adaptive(name, columns, squares, lambda m: m, ns_steps)


def adamuon(ns_steps: int = 5, sign: bool = True) -> Optimizer:
    """AdaMuon without Nesterov's momentum: Muon whose elements are scaled to one size, as Adam's are.

    With ``O`` of ``sign(m)``::

        m <- β m + (1-β) g;  v <- β2 v + (1-β2) O²;  D = O / (√v + ε)
        w <- (1 - α λ) w - 0.2 α √(n_in n_out) D / ‖D‖

    The published method has one β for both averages.

    Hyperparameters: ``learning_rate`` (α), ``beta`` (β, default 0.95), ``b2`` (β2, default 0.95), ``eps``
    (ε, default 1e-8) and ``weight_decay`` (λ, default 0).  Variables: ``mu`` (m) and ``nu`` (v).
    Reversible for ``α λ <= 1 - 2**-7``: costs ``log2(1 / β) + log2(1 / β2) + log2(1 / (1 - α λ))`` bits per
    parameter and step, 0.148 at the defaults.

    Args:
      ns_steps: iterations of `newton_schulz`, static.
      sign: whether ``O`` is computed from the sign of ``m``, as published.  The hypergradients of β and of
        the gradients are then exactly 0; otherwise ``O`` is computed from ``m̂``, as in the first version
        of the paper.

    Raises:
      ValueError: a leaf is not a matrix.

    Source: Si, Zhang, Shen, "AdaMuon: adaptive Muon optimizer", 2025, Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.5}
    >>> hg.train(square, jnp.ones((1, 1)), hypers, steps=1, optimizer=hg.adamuon()).params
    Array([[0.9]], dtype=float32)
    """
    name = f"adamuon({_arguments(ns_steps, sign=None if sign else False)})"
    view: Callable[[Array], Array] = jnp.sign if sign else lambda m: m
    return _adaptive(name, SQUARES, lambda X: X * X, view, ns_steps)


def _adaptive(
    name: str,
    nu: Variable,
    squares: Callable[[Array], Array],
    view: Callable[[Array], Array],
    ns_steps: int,
) -> Optimizer:
    """NorMuon or AdaMuon.

    Args:
      name: name of the call.
      nu: the average of squares.
      squares: function from ``O`` to what ``nu`` averages.
      view: function from ``m̂`` to the matrix that is made orthogonal.
      ns_steps: number of iterations.
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        b2 = h.b2 if nu.init is jnp.zeros_like else number(name, "b2", h.b2)

        def orthogonal(s: Any) -> Array:
            return newton_schulz(view(unbiased(s.mu, h.beta, t)), ns_steps, h.eps)

        def step(s: Any) -> Array:
            D = orthogonal(s) / (roots.sqrt(s.nu) + h.eps)
            norm = trees.norm(D)
            still = norm == 0
            size = 0.2 * math.sqrt(D.size) / jnp.where(still, 1, norm)
            return -h.learning_rate * size * D

        return [
            *_average(h),
            Scale("nu", b2),
            Shift("nu", lambda s: (1 - b2) * squares(orthogonal(s))),
            decayed(h),
            Shift("params", step),
        ]

    hypers = {"learning_rate": None, "beta": 0.95, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
    return Optimizer(name, moves, {"mu": Variable(_of_matrices(name)), "nu": nu}, hypers, DOMAINS)


def _average(h: Any) -> list[Move]:
    """``m <- β m + (1-β) g``."""
    return [Scale("mu", h.beta), Shift("mu", lambda s: (1 - h.beta) * s.gradient)]


def _of_matrices(name: str) -> Callable[[Array], Array]:
    """The start of ``m``; refuses leaves that are not matrices."""

    def init(leaf: Array) -> Array:
        if jnp.ndim(leaf) != 2:
            raise ValueError(
                f"{name}: a leaf of params has shape {list(jnp.shape(leaf))}, and only matrices can be "
                "made orthogonal; reshape it inside the loss, or train such leaves with another optimizer, "
                'such as hypergrad.partition({"matrices": hypergrad.muon(), "others": hypergrad.adamw()}, '
                "labels)"
            )
        return jnp.zeros_like(leaf)

    return init


def _arguments(ns_steps: int, **others: Any) -> str:
    """The arguments as the user would write them, without those at their defaults."""
    given = {"ns_steps": None if ns_steps == 5 else ns_steps, **others}
    return ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
