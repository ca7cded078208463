"""What the library says to the compiler: which computations to keep apart.

Compilers fuse what stands side by side, compute again what is used twice, and round ``a * b + c`` once
where they can.  That changes bits, and costs memory and time to compile.  Loops and conditionals whose
number of turns and whose condition they do not know are compiled apart.

=============  =================================================================================
`in_place`     integers that change stay where they are
`computed`     what many use is computed once
`isolated`     floats get the same bits wherever they are computed
`same_bits`    the same, but for arithmetic that gives them anyway
=============  =================================================================================
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Var

from hypergrad._base.trees import PyTree


def in_place(
    always_true: Array, function: Callable[..., PyTree], state: PyTree, *arguments: PyTree
) -> PyTree:
    """``function(state, *arguments)``, a state like the old one, in a computation of its own.

    Compilers would rather compute integers anew from the old state wherever they are used than keep them,
    so that old and new state of all leaves are in memory at the same time.  The body of a loop is compiled
    apart, and what it carries stays where it is; this one is run once.  What does not depend on its count
    would be moved out of it again: all arguments are made to.

    Args:
      always_true: a scalar that is true, which the compiler must not know.
      function: a pure function.
      state: what it changes.
      arguments: what else it needs.
    """

    def tied(count: Array, x: Array) -> Array:
        number = jnp.issubdtype(x.dtype, jnp.floating) or (x.dtype == jnp.int32 and x.ndim == 0)
        return x + count.astype(x.dtype) if number else x

    def body(count: Array, state: PyTree) -> PyTree:
        return function(state, *jax.tree.map(lambda x: tied(count, x), arguments))

    with jax.enable_x64(True):
        return jax.lax.fori_loop(0, always_true.astype(jnp.int32), body, state)


def computed(always_true: Array, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """``function(*arguments)`` as arrays in memory.

    Compilers put what is cheap to compute into everything that uses it.  Of a computation on many arrays
    laid end to end, that is as many copies, each with the instructions of all.

    Args:
      always_true: a scalar that is true, which the compiler must not know.
      function: a pure function of its arguments, whose results are numbers.
      arguments: pytrees of arrays.
    """
    with jax.enable_x64(True):
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))
        return in_place(always_true, lambda _, *given: function(*given), blank, *arguments)


def noinline(always_true: Array, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Evaluate a function in a compiled computation of its own.

    The same instructions then give the same bits wherever it is called.  A compiler fuses arithmetic
    with what stands around it, and contracts ``a * b + c`` to one rounding where it can: forwards and
    backwards it would not always do so alike.  A branch of a conditional is compiled apart.

    Args:
      always_true: a scalar that is true, which the compiler must not know.
      function: a pure function of its arguments.
      arguments: pytrees of arrays.
    """
    shapes = jax.eval_shape(function, *arguments)

    def never(*_: PyTree) -> PyTree:
        return jax.tree.map(_zeros, shapes)

    return jax.lax.cond(always_true, function, never, *arguments)


# Each is one correctly rounded operation for every element, and nothing to fuse changes its bits.
ROUNDED_ALONE = {
    "abs", "broadcast_in_dim", "convert_element_type", "copy", "div", "max", "min", "mul", "neg", "reshape",
    "select_n", "sign", "sqrt", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip


def _rounds_alike(function: Callable[..., PyTree], *arguments: PyTree) -> bool:
    """Whether a function gives the same bits however it is compiled, so that it need not stand apart.

    So it is if it consists of single roundings, and adds or subtracts scalars only, or nothing that a
    multiplication gave; ``a * b + c`` in one rounding would differ.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    products = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name not in ROUNDED_ALONE | {"add", "sub"}:
            return False
        from_product = any(v in products for v in eqn.invars if isinstance(v, Var))
        if name in {"add", "sub"} and from_product:
            return False
        if name == "mul" or from_product:
            products.update(eqn.outvars)
    return True


def _zeros(like: Any) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        key = jax.random.key(0, impl=str(jax.random.key_impl(like)))
        return jnp.broadcast_to(key, like.shape)
    return jnp.zeros(like.shape, like.dtype)


def same_bits(always_true: Array, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Evaluate a function so that the same bits come out wherever it is called."""
    if _rounds_alike(function, *arguments):
        return function(*arguments)
    return noinline(always_true, function, *arguments)
