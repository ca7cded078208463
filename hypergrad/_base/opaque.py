"""Functions with a custom derivative, which no transformation of JAX looks into.

``jax.custom_jvp`` does the same, but is not preserved within ``jax.lax.scan``: when the loop is
differentiated backwards, JAX splits its body into what depends on the loop and what does not, and in doing
so replaces the rule by the function.  The second derivative is then that of the function itself, which for
integers is silently zero.  A primitive is left alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import ad, batching, mlir

from hypergrad._base.trees import PyTree

Flat = list[Array]
Rule = Callable[[Sequence[Array], Sequence[Array | None]], tuple[Flat, list[Array | None]]]


def with_rule(
    function: Callable[..., PyTree],
    rule: Callable[[Any, Any], tuple[PyTree, PyTree]],
    *,
    symbolic_zeros: bool = False,
    by_hand: bool = False,
) -> Any:
    """The function with a rule for its forward-mode derivative, from which JAX derives the others.

    Args:
      function: a function of trees of arrays; it may close over tracers only if they are not
        differentiated.
      rule: as for ``jax.custom_jvp``, from the arguments and their tangents (float0 for integers) to the
        result and its tangents.
      symbolic_zeros: whether the rule gets None for the tangents of what is not differentiated.
      by_hand: whether the rule may be the derivative of no function; see `hypergrad._base.rules`.

    Returns:
      A function of the same arguments.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad._base.opaque import with_rule
    >>> def rule(primals, tangents):
    ...     return rounded(*primals), tangents[0]
    >>> rounded = with_rule(jnp.round, rule)
    >>> repeated = lambda x: jax.lax.scan(lambda x, _: (x * rounded(x), None), x, length=2)[0]
    >>> float(jax.grad(jax.grad(repeated))(1.0))
    12.0
    """

    def call(*arguments: PyTree) -> PyTree:
        flat = jax.tree.leaves(arguments)
        structure: Any = jax.tree.structure(arguments)
        if not any(isinstance(x, jax.core.Tracer) for x in flat):
            return function(*arguments)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        first = len(closed.consts)
        out_structure: Any = jax.tree.structure(shapes)

        def flat_rule(primals: Any, tangents: Any) -> Any:
            given = tangents if symbolic_zeros else [*map(_instantiated, primals, tangents)]
            result, change = rule(*(structure.unflatten(x[first:]) for x in (list(primals), list(given))))
            changes = [None if x.dtype == jax.dtypes.float0 else x for x in jax.tree.leaves(change)]
            return jax.tree.leaves(result), changes

        names = closed.jaxpr.debug_info.with_unknown_names()
        inputs = [*closed.jaxpr.constvars, *closed.jaxpr.invars]
        jaxpr = closed.jaxpr.replace(constvars=[], invars=inputs, debug_info=names)
        program = jax.extend.core.ClosedJaxpr(jaxpr, [])
        results = OPAQUE.bind(*closed.consts, *flat, jaxpr=program, rule=flat_rule, by_hand=by_hand)
        return out_structure.unflatten(results)

    return call


def _instantiated(x: Array, tangent: Array | None) -> Array | np.ndarray:
    if tangent is not None:
        return tangent
    dtype, shape = jnp.result_type(x), jnp.shape(x)
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    with jax.enable_x64(True):  # constants of the program may be wider than what the user sees
        return jnp.zeros(shape, dtype) if inexact else np.zeros(shape, jax.dtypes.float0)


def _evaluated(*flat: Array, jaxpr: Any, rule: Rule, by_hand: bool) -> Flat:
    with jax.enable_x64(True):
        return jax.extend.core.jaxpr_as_fun(jaxpr)(*flat)


def _differentiated(primals: Any, tangents: Any, *, jaxpr: Any, rule: Rule, by_hand: bool) -> Any:
    given = [None if type(t) is ad.Zero else t for t in tangents]
    results, changes = rule(primals, given)
    return results, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if change is None else change
        for x, change in zip(results, changes)
    ]


def _batched(flat: Sequence[Array], axes: Sequence[Any], *, jaxpr: Any, rule: Rule, by_hand: bool) -> Any:
    given = list(axes)  # None where all share one
    mapped = set()

    def marked(k: int, x: Array) -> Array:
        """Record which results differ between lanes; the others are computed once."""

        @jax.custom_batching.custom_vmap
        def same(x: Array) -> Array:
            return x

        @same.def_vmap
        def noted(size: int, batched: Any, x: Array) -> Any:
            mapped.add(k)
            return x, True

        return same(x)

    def one(*flat: Array) -> Flat:
        return _evaluated(*flat, jaxpr=jaxpr, rule=rule, by_hand=by_hand)

    def probe(*flat: Array) -> Flat:
        return [marked(k, x) for k, x in enumerate(one(*flat))]

    with jax.enable_x64(True):
        jax.eval_shape(jax.vmap(probe, given), *flat)
        ends = [0 if k in mapped else None for k in range(len(jaxpr.out_avals))]
        closed = jax.make_jaxpr(jax.vmap(one, given, ends))(*flat)

    def rule_of_all(primals: Any, tangents: Any) -> Any:
        both = jax.vmap(rule, (given, given))(list(primals), list(tangents))
        return jax.tree.map(
            lambda x, end: x if x is None or end == 0 else x[0],
            both, (ends, ends), is_leaf=lambda x: x is None,
        )  # fmt: skip

    results = OPAQUE.bind(*closed.consts, *flat, jaxpr=closed, rule=rule_of_all, by_hand=by_hand)
    return results, ends


OPAQUE = jax.extend.core.Primitive("hypergrad_opaque")
OPAQUE.multiple_results = True
OPAQUE.def_impl(_evaluated)
OPAQUE.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
ad.primitive_jvps[OPAQUE] = _differentiated
batching.primitive_batchers[OPAQUE] = _batched
mlir.register_lowering(OPAQUE, mlir.lower_fun(_evaluated, multiple_results=True))
