"""Second moments that are smaller than the parameters: Adafactor and NovoGrad.

======  ====================  =============================================================================
symbol  name                  meaning
======  ====================  =============================================================================
``w``   params                parameters of one leaf
``g``   gradient              gradient at ``w`` before the step
``v``   nu                    running average of ``g²``, or of ``‖g‖²``
``r``   nu_row                running average of the means of ``g²`` over the longest axis
``c``   nu_column             running average of the means of ``g²`` over the second longest axis
``m``   velocity, mu          average or sum of preconditioned gradients, from 0
``α``   learning_rate         ``>= 0``
``β``   momentum, b1, b2      ``0 <= β < 1``; ``>= 2**-7`` to be reversed
``κ``   decay_rate            ``> 0``, in ``(0.012, ∞)`` to be reversed
``θ``   clipping_threshold    ``> 0``
``ε``   eps                   ``>= 0``
``λ``   weight_decay          ``>= 0``; of Adafactor weight_decay_rate
======  ====================  =============================================================================

Products are element by element.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base import trees
from hypergrad.optimizers import roots
from hypergrad.optimizers.adam_family import DOMAINS as ADAM_DOMAINS
from hypergrad.optimizers.scalars import number
from hypergrad.program import SQUARES, Move, Optimizer, Scale, Shift, Variable

SMALLEST_SIZE = 1e-3  # lower limit of the parameters' root mean square, as in optax
DOMAINS = {
    **ADAM_DOMAINS,
    "momentum": (0.0, 1.0),
    "decay_rate": (0.0, float("inf")),
    "clipping_threshold": (0.0, float("inf")),
    "weight_decay_rate": (0.0, float("inf")),
}


def novograd() -> Optimizer:
    """NovoGrad, momentum over gradients in units of their size in the layer.

    ``v <- β2 v + (1-β2) ‖g‖²``, in the first step ``v <- v + ‖g‖²``, from 0;
    ``m <- β1 m + g / (√v + ε) + λ w;  w <- w - α m``, for every leaf.

    Hyperparameters: ``learning_rate`` (α), ``b1`` (β1, default 0.9), ``b2`` (β2, default 0.25; a number for
    every leaf), ``eps`` (ε, default 1e-6) and ``weight_decay`` (λ, default 0), as in ``optax.novograd``.
    Variables: ``mu`` (m) and ``nu`` (v, one number for every leaf).  Reversible: costs ``log2(1 / β1)``
    bits per parameter and step, 0.152 at the defaults, and ``log2(1 / β2)`` per leaf.

    Raises:
      ValueError: ``b2`` differs within a leaf.

    Source: Ginsburg et al., "Stochastic gradient methods with layer-wise adaptive moments for training of
    deep networks", 2019, Algorithm 1.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2) / 2
    >>> hypers = {"learning_rate": 0.25, "eps": 0.0}
    >>> hg.train(square, jnp.ones(4), hypers, steps=1, optimizer=hg.novograd()).params
    Array([0.875, 0.875, 0.875, 0.875], dtype=float32)
    """

    def moves(h: Any, t: Array) -> Sequence[Move]:
        b2, first = number("novograd()", "b2", h.b2), t == 0
        return [
            Scale("nu", jnp.where(first, 1, b2)),
            Shift("nu", lambda s: jnp.where(first, 1, 1 - b2) * jnp.sum(s.gradient**2)),
            Scale("mu", h.b1),
            Shift("mu", lambda s: s.gradient / (roots.sqrt(s.nu) + h.eps) + h.weight_decay * s.params),
            Shift("params", lambda s: -h.learning_rate * s.mu),
        ]

    variables = {"mu": Variable(), "nu": SQUARES._replace(init=lambda leaf: jnp.zeros((), leaf.dtype))}
    hypers = {"learning_rate": None, "b1": 0.9, "b2": 0.25, "eps": 1e-6, "weight_decay": 0.0}
    return Optimizer("novograd()", moves, variables, hypers, DOMAINS)


def adafactor(min_dim_size_to_factor: int = 128, multiply_by_parameter_scale: bool = True) -> Optimizer:
    """Adafactor with momentum, with second moments kept only by row and by column.

    In step ``n`` from 1, with ``δ = n^-κ``, and the means of ``r`` and ``c`` taken over the axes named in
    the table::

        r <- (1-δ) r + δ mean(g² + ε);  c <- (1-δ) c + δ mean(g² + ε)
        u = g / √(r c / mean(r));  m <- β m + (1-β) α s u / max(1, rms(u) / θ)
        w <- (1 - λ) w - m

    with ``s = max(rms(w), 10⁻³)``.  A leaf whose second longest axis is shorter than
    ``min_dim_size_to_factor`` has ``v <- (1-δ) v + δ (g² + ε)`` and ``u = g / √v`` instead.

    Hyperparameters: ``learning_rate`` (α), ``decay_rate`` (κ, default 0.8; a number for every leaf),
    ``clipping_threshold`` (θ, default 1), ``momentum`` (β, default 0.9), ``weight_decay_rate`` (λ, default
    0; not multiplied by α) and ``eps`` (ε, default 1e-30), as in ``optax.adafactor(momentum=)``. Variables:
    ``velocity`` (m); ``nu_row`` (r) and ``nu_column`` (c), or ``nu`` (v), which are empty for a leaf that
    does not have them.  Reversible for ``λ <= 1 - 2**-7``: costs ``log2(1 / β) + log2(1 / (1 - λ))`` bits
    per parameter and step, 0.152 at the defaults, and ``log2(1 / (1-δ))`` per element of ``r``, ``c`` and
    ``v``.  Without momentum it is not reversible, since ``w`` then moves by a function of itself.

    In exact arithmetic ε has an effect only if the first gradients are not larger by too many digits (see
    `hypergrad.program.Variable`), and an element whose second moment is 0 does not move.

    Args:
      min_dim_size_to_factor: length of the second longest axis from which a leaf is factored, static.
      multiply_by_parameter_scale: whether ``s`` is as above; else it is 1.

    Raises:
      ValueError: ``decay_rate`` differs within a leaf.

    Source: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", ICML 2018,
    Algorithms 4 and 5.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "momentum": 0.5}
    >>> hg.train(square, jnp.ones((2, 2)), hypers, steps=1, optimizer=hg.adafactor(2)).params
    Array([[0.875, 0.875],
           [0.875, 0.875]], dtype=float32)
    """
    given = {
        "min_dim_size_to_factor": (min_dim_size_to_factor, 128),
        "multiply_by_parameter_scale": (multiply_by_parameter_scale, True),
    }
    changed = [f"{key}={value}" for key, (value, default) in given.items() if value != default]
    name = f"adafactor({', '.join(changed)})"

    axes = partial(_axes, min_dim_size_to_factor)

    def moves(h: Any, t: Array) -> Sequence[Move]:
        rate = number(name, "decay_rate", h.decay_rate)
        new = jnp.asarray(t + 1, rate.dtype) ** -rate
        old = jnp.where(t == 0, 1, 1 - new)  # there is nothing to forget yet

        def average(variable: str, leaf_mean: Any) -> list[Move]:
            return [Scale(variable, old), Shift(variable, lambda s: new * leaf_mean(s.gradient**2 + h.eps))]

        def mean(which: int) -> Any:
            def over(squares: Array) -> Array:
                found = axes(squares)
                return jnp.mean(squares, axis=found[which]) if found else _nothing(squares)

            return over

        def whole(squares: Array) -> Array:
            return _nothing(squares) if axes(squares) else squares

        def change(s: Any) -> Array:
            u = _normed(s, axes(s.gradient))
            size = jnp.maximum(_rms(s.params), SMALLEST_SIZE) if multiply_by_parameter_scale else 1
            clipped = u / jnp.maximum(1, _rms(u) / h.clipping_threshold)
            return (1 - h.momentum) * h.learning_rate * size * clipped

        return [
            *average("nu_row", mean(1)),
            *average("nu_column", mean(0)),
            *average("nu", whole),
            Scale("velocity", h.momentum),
            Shift("velocity", change),
            Scale("params", 1 - h.weight_decay_rate),
            Shift("params", lambda s: -s.velocity),
        ]

    variables = {
        "velocity": Variable(),
        "nu_row": SQUARES._replace(init=partial(_without, 1, axes)),
        "nu_column": SQUARES._replace(init=partial(_without, 0, axes)),
        "nu": SQUARES._replace(init=lambda leaf: _nothing(leaf) if axes(leaf) else jnp.zeros_like(leaf)),
    }
    hypers = {
        "learning_rate": None,
        "decay_rate": 0.8,
        "clipping_threshold": 1.0,
        "momentum": 0.9,
        "weight_decay_rate": 0.0,
        "eps": 1e-30,
    }
    return Optimizer(name, moves, variables, hypers, DOMAINS)


Axes = tuple[int, int] | None  # the second longest axis and the longest, of a leaf that is factored


def _axes(shortest: int, leaf: Any) -> Axes:
    order = np.argsort(leaf.shape, kind="stable")
    if leaf.ndim < 2 or leaf.shape[order[-2]] < shortest:
        return None
    return int(order[-2]), int(order[-1])


def _without(which: int, axes: Callable[[Any], Axes], leaf: Array) -> Array:
    """Zeros for means over one of the two axes; an empty array if the leaf is not factored."""
    found = axes(leaf)
    if found is None:
        return _nothing(leaf)
    return jnp.zeros([n for k, n in enumerate(leaf.shape) if k != found[which]], leaf.dtype)


def _normed(s: Any, axes: Axes) -> Array:
    """The gradient over the root of its second moment."""
    if axes is None:
        return s.gradient * _inverse_root(s.nu)
    second, longest = axes
    rows = jnp.mean(s.nu_row, axis=second - 1 if second > longest else second, keepdims=True)
    by_row = roots.sqrt(rows) * _inverse_root(s.nu_row)
    by_column = _inverse_root(s.nu_column)
    return s.gradient * jnp.expand_dims(by_row, longest) * jnp.expand_dims(by_column, second)


def _nothing(leaf: Array) -> Array:
    return jnp.zeros((0,), leaf.dtype)


def _rms(x: Array) -> Array:
    """Root of the mean square of all elements, whose derivative at 0 is 0."""
    return trees.norm(x) / math.sqrt(max(1, x.size))


def _inverse_root(x: Array) -> Array:
    """``1 / √x``, and 0 where ``x`` is 0."""
    positive = x > 0
    return jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, x, 1)), 0)
