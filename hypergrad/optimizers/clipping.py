"""Gradient clipping, for any optimizer: its gradients are clipped before its moves see them.

======  =====================  ==========================
symbol  name                   meaning
======  =====================  ==========================
``g``   gradient               gradient before the step
``c``   max_delta, max_norm    ``> 0``, the bound
======  =====================  ==========================
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad._base.trees import norm
from hypergrad.program import Optimizer

Transform = Callable[[Sequence[Any], Sequence[Array]], list[Array]]


def clip(optimizer: Optimizer) -> Optimizer:
    """Clip every element of the gradient, ``g <- min(max(g, -c), c)``, as `optax.clip` does.

    Adds the hyperparameter ``max_delta`` (c, no default), which like any other may be a schedule or differ
    by leaf, and can be learned.  Reversible if the optimizer is.

    Args:
      optimizer: whose gradients are clipped.

    Returns:
      An optimizer with the same variables.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> steep = lambda w, meta, step: 100.0 * jnp.sum(w)
    >>> hypers = {"learning_rate": 0.1, "momentum": 0.5, "max_delta": 1.0}
    >>> hg.train(steep, jnp.ones(2), hypers, steps=1, optimizer=hg.clip(hg.heavy_ball())).params
    Array([0.9, 0.9], dtype=float32)
    """

    def transform(hypers: Sequence[Any], gradient: Sequence[Array]) -> list[Array]:
        return [jnp.clip(g, -h.max_delta, h.max_delta) for h, g in zip(hypers, gradient)]

    return _with(optimizer, "clip", "max_delta", transform)


def clip_by_global_norm(optimizer: Optimizer) -> Optimizer:
    """Shorten a gradient that is too long, ``g <- g min(1, c / ‖g‖)``, with the norm over all leaves.

    As `optax.clip_by_global_norm`.  Adds the hyperparameter ``max_norm`` (c, no default), which like any
    other may be a schedule or differ by leaf, and can be learned.  Reversible if the optimizer is.

    Args:
      optimizer: whose gradients are clipped.

    Returns:
      An optimizer with the same variables.

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> steep = lambda w, meta, step: 3.0 * w[0] + 4.0 * w[1]
    >>> hypers = {"learning_rate": 0.1, "momentum": 0.5, "max_norm": 1.0}
    >>> clipped = hg.clip_by_global_norm(hg.heavy_ball())
    >>> hg.train(steep, jnp.ones(2), hypers, steps=1, optimizer=clipped).params
    Array([0.94, 0.92], dtype=float32)
    """

    def transform(hypers: Sequence[Any], gradient: Sequence[Array]) -> list[Array]:
        size = norm(list(gradient))
        clipped = []
        for h, g in zip(hypers, gradient):
            short = size <= h.max_norm
            # Divided first, because the factor itself may be too small for a float.
            by, to = jnp.where(short, 1.0, size), jnp.where(short, 1.0, h.max_norm)
            clipped.append((g / by.astype(g.dtype)) * to.astype(g.dtype))
        return clipped

    return _with(optimizer, "clip_by_global_norm", "max_norm", transform)


def _with(optimizer: Optimizer, name: str, hyper: str, transform: Transform) -> Optimizer:
    inner = optimizer.transform

    def outer(hypers: Sequence[Any], gradient: Sequence[Array]) -> Sequence[Array]:
        clipped = transform(hypers, gradient)
        return clipped if inner is None else inner(hypers, clipped)

    return replace(
        optimizer,
        name=f"{name}({optimizer.name})",
        hypers={**optimizer.hypers, hyper: None},
        domains={**optimizer.domains, hyper: (0.0, float("inf"))},
        transform=outer,
        parts={"": optimizer},
    )
