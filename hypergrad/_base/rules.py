"""Detection of derivatives written by hand, for which second derivatives need not be symmetric.

Straight-through estimators, reversed and clipped gradients are not the derivatives of any function.  The
matrix of second derivatives ``J``, the derivative of such a "gradient", then differs from its transpose.
Reverse over reverse gives ``Jᵀ v``, which is what JAX's own ``jax.grad`` of a step of training needs;
forward over reverse gives ``J v``, which costs less, but is the same only without such rules, and does not
exist for those made by ``jax.custom_vjp``.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from hypergrad._base.opaque import OPAQUE
from hypergrad._base.trees import PyTree

ROOT = Path(jax.__file__).parent
# When differentiated, these call another function of the user's, which no jaxpr shows.
BY_USERS = ("_custom_root",)
UNKNOWN = ("custom_vjp_call", "custom_transpose_call", "linear_call", "call_hi_primitive")


def has_custom_rule(jaxpr: Any) -> bool:
    """Whether a program contains a differentiation rule that JAX does not define itself.

    Every jaxpr within is searched, except for the kernels of Pallas.  ``jax.custom_vjp``,
    ``jax.custom_gradient`` and transposes written by hand always count, and so does ``jax.custom_jvp``,
    except in JAX's own functions, such as ``jax.nn.relu`` or ``jnp.logaddexp``, whose rules agree with what
    they compute.  ``jax.lax.stop_gradient`` does not count: its argument is a constant at every order.

    Args:
      jaxpr: a ``ClosedJaxpr`` or ``Jaxpr`` of the function, not of its gradient, which no longer contains
        the rules.

    >>> import jax, jax.numpy as jnp
    >>> @jax.custom_jvp
    ... def sign(x):
    ...     return jnp.sign(x)
    >>> sign.defjvps(lambda dot, answer, x: dot)  # straight through
    >>> has_custom_rule(jax.make_jaxpr(lambda w: jnp.sum(sign(w) * w))(jnp.ones(3)))
    True
    >>> has_custom_rule(jax.make_jaxpr(lambda w: jnp.sum(jax.nn.relu(w)))(jnp.ones(3)))
    False
    """
    return any(_is_custom(eqn) for eqn in equations(jaxpr))


def linearized(function: Callable[[PyTree], PyTree], at: PyTree) -> tuple[PyTree, Callable[..., PyTree]]:
    """``jax.linearize`` also for functions with rules written by hand: value and products ``J v``.

    ``jax.custom_vjp`` says only what ``Jᵀ u`` is; ``J v`` is then the transpose of that linear map.

    Args:
      function: a function of one tree.
      at: the point, a tree of floats.

    Raises:
      ValueError: the result of a rule is not linear in the cotangent, so that there is no ``J``.

    >>> import jax, jax.numpy as jnp
    >>> @jax.custom_vjp
    ... def reverse(x):
    ...     return x
    >>> reverse.defvjp(lambda x: (x, None), lambda _, bar: (-bar,))
    >>> value, forwards = linearized(lambda x: 3 * reverse(x), jnp.float32(2.0))
    >>> float(value), float(forwards(1.0))
    (6.0, -3.0)
    """
    closed = jax.make_jaxpr(function)(at)
    if not any(eqn.primitive.name == "custom_vjp_call" for eqn in equations(closed)):
        return jax.linearize(function, at)
    value, pull_back = jax.vjp(function, at)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), value)
    transposed = jax.linear_transpose(lambda bar: pull_back(bar)[0], shapes)

    def forwards(tangent: PyTree) -> PyTree:
        try:
            return transposed(tangent)[0]
        except NotImplementedError as error:  # only linear operations can be transposed
            raise ValueError(
                "forward derivatives are wanted of a function with a jax.custom_vjp whose backward rule is "
                "not linear in the cotangent, as where gradients are clipped: it says what Jᵀ u is, and "
                "there is no matrix J; take such a rule out of what is differentiated forwards"
            ) from error

    return value, forwards


def equations(value: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those within it; anything else has none."""
    if hasattr(value, "eqns"):
        for eqn in value.eqns:
            yield eqn
            if "pallas" not in eqn.primitive.name:
                yield from equations(eqn.params)
    elif hasattr(value, "jaxpr"):
        yield from equations(value.jaxpr)
    elif isinstance(value, dict):
        yield from equations(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from equations(each)


def _is_custom(eqn: Any) -> bool:
    name = eqn.primitive.name
    if eqn.primitive is OPAQUE:
        return eqn.params["by_hand"]
    return name in UNKNOWN or (name == "custom_jvp_call" and not _is_of_jax(eqn.params))


def _is_of_jax(params: Any) -> bool:
    """Whether a ``custom_jvp_call`` is one of JAX's own functions; if in doubt, it is not.

    The source of the rule alone does not decide it: what ``defjvps`` makes belongs to JAX, whoever calls
    it.  And ``jax.custom_jvp`` of a JAX function is not JAX's own, but contains that function.
    """
    function, rule = _source(params["call_jaxpr"]), _source(params["jvp_jaxpr_fun"])
    if function is None or rule is None:
        return False
    (name, path), (_, path_of_rule) = function, rule
    if name in BY_USERS or not (path.is_relative_to(ROOT) and path_of_rule.is_relative_to(ROOT)):
        return False
    within = (e for e in equations(params["call_jaxpr"]) if e.primitive.name == "custom_jvp_call")
    if any(_source(eqn.params["call_jaxpr"]) == function for eqn in within):
        return False
    parts = path.relative_to(ROOT).with_suffix("").parts
    found = getattr(sys.modules.get(".".join([ROOT.name, *parts])), name, None)
    while found is not None and not isinstance(found, jax.custom_jvp):
        found = getattr(found, "__wrapped__", None)  # within a jit
    return found is not None


def _source(function: Any) -> tuple[str, Path] | None:
    """Name and file of the function that a jaxpr was traced from, or None if unknown."""
    function = getattr(function, "jaxpr", function)
    about = getattr(getattr(function, "debug_info", None), "func_src_info", None)
    name, at, where = (about or "").partition(" at ")
    path, colon, _ = where.rpartition(":")
    return (name, Path(path)) if at and colon else None
