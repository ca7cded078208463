"""A running average of the parameters, kept alongside any optimizer.

======  ===================  ==========================================================
symbol  name                 meaning
======  ===================  ==========================================================
``w``   params               parameters after the step
``a``   average              running average of ``w``, from the parameters at the start
``d``   ema_decay            ``0 <= d < 1``; ``>= 2**-7`` to be reversed
======  ===================  ==========================================================
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jax import Array

from hypergrad.program import Move, Optimizer, Scale, Shift, Variable, is_optimizer

DOMAIN = (0.0, 1.0)


def with_average(optimizer: Optimizer) -> Optimizer:
    """Keep a running average of the parameters, ``a <- d a + (1-d) w``, alongside any program of moves.

    It does not change the run; it is in ``Trained.state["average"]``, and may be differentiated like the
    parameters.  Adds the hyperparameter ``ema_decay`` (d, default 0.999), which like any other may be a
    schedule or differ by leaf, and can be learned.  Reversible if the optimizer is: costs ``log2(1 / d)``
    bits more per parameter and step, 0.0014 at the default.

    Args:
      optimizer: the optimizer whose parameters are averaged.

    Returns:
      An optimizer with one more variable, ``average``.

    Raises:
      TypeError: the optimizer is not a program of moves, such as `hypergrad.from_optax` returns.
      ValueError: the optimizer keeps an average already.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; with
    exponential weights, as is usual now.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> hypers = {"learning_rate": 0.25, "momentum": 0.5, "ema_decay": 0.5}
    >>> trained = hg.train(square, jnp.ones(2), hypers, steps=1, optimizer=hg.with_average(hg.heavy_ball()))
    >>> trained.params, trained.state["average"]
    (Array([0.5, 0.5], dtype=float32), Array([0.75, 0.75], dtype=float32))
    """
    if not (is_optimizer(optimizer) and optimizer.by_moves):
        name = getattr(optimizer, "name", type(optimizer).__name__)
        raise TypeError(
            f"with_average({name}): {name} is no program of moves, to which one could be added; average "
            "the parameters that hypergrad.train(..., watch=lambda snapshot: snapshot.params) returns"
        )
    if "average" in optimizer.variables or "ema_decay" in optimizer.hypers:
        raise ValueError(f"with_average({optimizer.name}): {optimizer.name} keeps an average already")
    inner = optimizer.moves

    def moves(h: Any, t: Array) -> Sequence[Move]:
        return [
            *inner(h, t),
            Scale("average", h.ema_decay),
            Shift("average", lambda s: (1 - h.ema_decay) * s.params),
        ]

    labels = optimizer.labels
    if labels is not None:
        having = {label: names | {"average"} for label, names in labels.variables.items()}
        labels = labels._replace(variables=having)
    return replace(
        optimizer,
        name=f"with_average({optimizer.name})",
        moves=moves,
        variables={**optimizer.variables, "average": Variable(init=_itself)},
        hypers={**optimizer.hypers, "ema_decay": 0.999},
        domains={**optimizer.domains, "ema_decay": DOMAIN},
        labels=labels,
        parts={"": optimizer},
    )


def _itself(leaf: Array) -> Array:
    return leaf
