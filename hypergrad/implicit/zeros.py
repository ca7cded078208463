"""Announces hyperparameters on which a solution does not depend."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import partial_eval

from hypergrad._base.errors import ZeroHypergradientWarning
from hypergrad._base.rules import linearized
from hypergrad._base.trees import PyTree, split
from hypergrad.implicit.condition import Condition, shape_tree


def stopped(x: Any) -> Any:
    """An array as a constant; anything else unchanged."""
    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x


def announced(
    call: str, names: Sequence[str], condition: Condition, params: PyTree, trees: PyTree
) -> PyTree:
    """The trees unchanged; if they are differentiated, leaves without influence are announced.

    Args:
      call: the user's call, for messages.
      names: of every leaf.
      condition: the optimality condition, whose inputs are the first leaves.
      params: shapes of the parameters.
      trees: what may be differentiated.
    """
    structure: Any
    leaves, structure = jax.tree.flatten(trees)
    inexact = [isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    inputs = shape_tree(leaves[: len(condition.names)])

    def announce(differentiated: Sequence[bool]) -> None:
        wanted = dict(zip([k for k, flag in enumerate(inexact) if flag], differentiated))
        if not any(wanted.values()):
            return
        used = is_used(lambda inputs, params: condition(params, inputs), inputs, params)
        zero = [names[k] for k, flag in wanted.items() if flag and not (k < len(used) and used[k])]
        if zero:
            warn_of_zeros(call, zero)

    arrays, merge = split(inexact, leaves)
    return structure.unflatten(merge(watched(announce, arrays)))


def warn_of_zeros(call: str, names: Sequence[str]) -> None:
    """Warn of leaves on which the solution does not depend."""
    warnings.warn(
        f"{call}: the hypergradient in {', '.join(names)} is exactly 0, because the solution does not "
        "depend on it. A solution does not know how it was found: to learn rates, momenta or starts, "
        "differentiate the training run itself, with hypergrad.train; to silence this, pass "
        "jax.lax.stop_gradient of it",
        ZeroHypergradientWarning,
        stacklevel=2,
    )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def watched(announce: Callable[[Sequence[bool]], None], arrays: list[Array]) -> list[Array]:
    """The arrays unchanged; if they are differentiated, `announce` is told in which of them."""
    return arrays


def watched_jvp(announce: Callable[[Sequence[bool]], None], primals: Any, tangents: Any) -> Any:
    """The rule of `watched`."""
    (dots,) = tangents
    announce([not isinstance(dot, SymbolicZero) for dot in dots])
    return primals[0], dots


def is_used(function: Callable[..., PyTree], leaves: Sequence[Any], params: PyTree) -> list[bool]:
    """Whether the derivative of ``function(leaves, params)`` in each leaf may be nonzero, by its jaxpr."""
    flags = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    moving, _ = split(flags, leaves)

    def change(dots: list[Array], leaves: list[Array], params: PyTree) -> PyTree:
        moving, merge = split(flags, leaves)
        return linearized(lambda moving: function(merge(moving), params), moving)[1](dots)

    jaxpr = jax.make_jaxpr(change)(moving, leaves, params).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    answers = iter(used[: len(moving)])
    return [flag and next(answers) for flag in flags]
