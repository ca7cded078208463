"""Foreign functions, with derivatives that stay finite where the original ones are ``0 · ∞``.

Optimizers are written to be run, not to be differentiated.  Two common patterns make derivatives NaN:

- roots of sums of squares, ``√(g²)``, at coordinates whose gradient is 0;
- ``where(usual, f(x), g(x))``, in which the branch that is not taken has no value, such as ``√(negative)``
  or ``0 / 0``: what comes back to it is 0, and its slope is not finite.

JAX multiplies the two and gets NaN.  Here an elementwise slope that is not finite counts as 0.  A value
that is itself not finite stays visible, because values are not changed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Var
from jax.interpreters import ad, batching, mlir

from hypergrad._base.tracing import part
from hypergrad._base.trees import PyTree

# The nonlinear operations in which every element of the result depends on one element of each argument.
ELEMENTWISE = {
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "digamma", "div",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "integer_pow", "lgamma", "log", "log1p", "logistic",
    "pow", "rem", "rsqrt", "sin", "sinh", "sqrt", "square", "tan", "tanh",
}  # fmt: skip
BILINEAR = {"conv_general_dilated", "dot_general", "mul"}
CALLS = {"closed_call": "call_jaxpr", "core_call": "call_jaxpr", "jit": "jaxpr", "pjit": "jaxpr"}


def finite(function: Callable[..., PyTree], call: str) -> Callable[..., PyTree]:
    """The same function, in which the slope of an elementwise operation that is not finite counts as 0.

    This also applies inside ``jit``, ``cond``, ``scan``, ``while`` and ``checkpoint``.  A function with a
    custom derivative (``custom_jvp``, ``custom_vjp``) keeps it.

    Args:
      function: a function from pytrees of arrays to a pytree of arrays.
      call: the call that the function belongs to, for the message that a ``while`` has no reverse-mode
        derivative.

    >>> import jax, jax.numpy as jnp
    >>> length = lambda x: jnp.sqrt(jnp.sum(x * x))
    >>> jax.grad(length)(jnp.zeros(2)), jax.grad(finite(length, "length"))(jnp.zeros(2))
    (Array([nan, nan], dtype=float32), Array([0., 0.], dtype=float32))
    """

    def safe(*arguments: PyTree) -> PyTree:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _evaluate(call, closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return safe


def _evaluate(call: str, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments]))

    def read(x: Any) -> Any:
        return values[x] if isinstance(x, Var) else jnp.asarray(x.val, x.aval.dtype)

    for eqn in jaxpr.eqns:
        inputs = [read(x) for x in eqn.invars]
        outputs = _entered(call, eqn, inputs)
        if outputs is None:
            if eqn.primitive.name in ELEMENTWISE | BILINEAR and _moves(eqn.outvars[0]):
                outputs = [_tamed(eqn)(*inputs)]
            else:
                given = list(dict.fromkeys(x for x in eqn.invars if isinstance(x, Var)))
                outputs = part(jaxpr, given, [eqn], eqn.outvars)(*(values[x] for x in given))
        values |= dict(zip(eqn.outvars, outputs))
    return [read(x) for x in jaxpr.outvars]


def _entered(call: str, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """The result of an operation that contains others; None for one that does not."""
    name, params = eqn.primitive.name, eqn.params

    def function(closed: Any) -> Callable[..., list[Any]]:
        return lambda *arguments: _evaluate(call, closed.jaxpr, closed.consts, arguments)

    if name in CALLS:
        inner = params[CALLS[name]]
        return function(inner)(*inputs)
    if name in {"checkpoint", "remat2"}:
        inner = jax.extend.core.ClosedJaxpr(params["jaxpr"], ())
        again = jax.checkpoint(function(inner), prevent_cse=params["prevent_cse"], policy=params["policy"])
        return again(*inputs)
    if name == "cond":
        return jax.lax.switch(inputs[0], [function(branch) for branch in params["branches"]], *inputs[1:])
    if name == "scan":
        held, kept = params["num_consts"], params["num_consts"] + params["num_carry"]

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            outputs = function(params["jaxpr"])(*inputs[:held], *carry, *x)
            return outputs[: kept - held], outputs[kept - held :]

        settings = {key: params[key] for key in ("length", "reverse", "unroll")}
        carry, stacked = jax.lax.scan(body, inputs[held:kept], inputs[kept:], **settings)
        return [*carry, *stacked]
    if name == "while":
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        results = jax.lax.while_loop(
            lambda carry: function(params["cond_jaxpr"])(*inputs[:first], *carry)[0],
            lambda carry: function(params["body_jaxpr"])(*inputs[first:second], *carry),
            inputs[second:],
        )
        return [_forward_only.bind(x, call=call) if _moves(x) else x for x in results]
    return None


def _tamed(eqn: Any) -> Callable[..., Array]:
    """A nonlinear operation, with a derivative that is finite."""
    name = eqn.primitive.name
    plain = partial(eqn.primitive.bind, **eqn.params)

    def differentiate(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[Array, Array]:
        moving = [k for k, dot in enumerate(tangents) if not isinstance(dot, SymbolicZero)]
        held = [_where_finite(x) for x in primals] if name in BILINEAR else list(primals)
        points, dots = [held[k] for k in moving], [tangents[k] for k in moving]

        def of_moving(*points: Array) -> Array:
            new = dict(zip(moving, points))
            return plain(*(new.get(k, x) for k, x in enumerate(held)))

        if name in BILINEAR:
            return evaluate(*primals), jax.jvp(of_moving, points, dots)[1]
        if name == "div":  # JAX would square the denominator, which overflows where the slope does not
            both = (lambda x, y: 1 / y, lambda x, y: -(x / y) / y)
            slopes = [both[k](*primals) for k in moving]
        else:
            slopes = _slopes(of_moving, points)
        return evaluate(*primals), sum(_where_finite(slope) * dot for slope, dot in zip(slopes, dots))

    evaluate = jax.custom_jvp(plain)
    evaluate.defjvp(differentiate, symbolic_zeros=True)
    return evaluate


def _slopes(function: Callable[..., Array], points: list[Array]) -> list[Array]:
    """The derivatives of every element of the result in the elements of the arguments it depends on."""
    ones = [jnp.ones_like(x) for x in points]
    return [
        jax.jvp(function, points, [one if j == k else jnp.zeros_like(one) for j, one in enumerate(ones)])[1]
        for k in range(len(points))
    ]


def _where_finite(x: Any) -> Any:
    return jnp.where(jnp.isfinite(x), x, 0) if _moves(x) else x


def _moves(x: Any) -> bool:
    """Whether an array can have a derivative."""
    return jnp.issubdtype(getattr(x, "aval", x).dtype, jnp.inexact)


def _refuse(cotangent: Any, x: Any, *, call: str) -> Any:
    raise ValueError(
        f"{call}: it searches in a loop of unknown length (lax.while_loop), through which there are no "
        "derivatives in reverse; use adjoint=Forward() for a handful of hyperparameters, or an optimizer "
        "without a line search"
    )


_forward_only = jax.extend.core.Primitive("forward_only")
_forward_only.def_impl(lambda x, call: x)
_forward_only.def_abstract_eval(lambda x, call: x)
mlir.register_lowering(_forward_only, lambda context, x, call: [x])
batching.defvectorized(_forward_only)
ad.deflinear2(_forward_only, _refuse)
