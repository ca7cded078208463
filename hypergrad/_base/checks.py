"""Checks of what a user passed, and descriptions of it for error messages."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad._base.explicit import explicit_mesh
from hypergrad._base.trees import PyTree
from hypergrad._base.varying import axes_of


def is_function(x: Any) -> bool:
    """Whether something is a function, such as a schedule, and not a tree that happens to be callable.

    A module, such as Equinox's, is a tree of arrays that can be called; a function is a leaf of any tree.
    `jax.tree_util.Partial`, a function with its arguments as leaves, counts as a function too.

    >>> is_function(lambda count: 0.1), is_function({"rate": 0.1})
    (True, False)
    """
    leaf = jax.tree_util.all_leaves([x]) or isinstance(x, jax.tree_util.Partial)
    return callable(x) and leaf


def is_whole(x: Any, least: int = 1) -> bool:
    """Whether something is a whole number of at least ``least``.

    >>> is_whole(3), is_whole(2.5), is_whole(True), is_whole(0)
    (True, False, False, False)
    """
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and bool(x >= least)


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and type that JAX would give an array, a NumPy array or a number."""
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    kind = jax.typeof(x)
    if not axes_of(x) and explicit_mesh([kind]) is None:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=kind.sharding, manual_axis_type=kind.manual_axis_type
    )


def describe(tree: PyTree) -> str:
    """A description of something, for a message."""
    if isinstance(tree, jax.ShapeDtypeStruct):
        return f"{tree.dtype}{list(tree.shape)}"
    if isinstance(tree, str):
        return f"the string {tree!r}"
    if isinstance(tree, type):
        return f"the class {tree.__name__}"
    if isinstance(tree, optax.GradientTransformation):  # also those with extra arguments
        return "an optax transformation"
    if tree is None:
        return "None"
    if inspect.isroutine(tree):
        return f"the function {tree.__name__}"
    name = type(tree).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def quoted(x: Any) -> str:
    """An argument of the wrong type, as text for a quoted call."""
    if isinstance(x, str):
        return repr(x)
    return x.__name__ if isinstance(x, type) or inspect.isroutine(x) else f"<{type(x).__name__}>"


def is_no_adjoint(adjoint: Any) -> bool:
    return isinstance(adjoint, type) or not callable(adjoint)


def check_adjoint(call: str, adjoint: Any) -> None:
    """Refuse what is not an adjoint."""
    if isinstance(adjoint, type):
        raise TypeError(
            f"{call}: adjoint is {describe(adjoint)}, not one of its instances: add brackets, "
            f"adjoint={adjoint.__name__}()"
        )
    if is_no_adjoint(adjoint):
        raise TypeError(
            f"{call}: adjoint is {describe(adjoint)}; pass hypergrad.Reversible(), Checkpointed(), "
            "Stored(), Truncated(steps) or Forward()"
        )


def check_callable(call: str, name: str, function: Any, *arguments: str) -> None:
    """Refuse what cannot be called with the given arguments, before it is called.

    Args:
      call: the user's call.
      name: the name of the argument that holds the function.
      function: the user's.
      arguments: names of the arguments that it will be called with.

    Raises:
      TypeError: the function cannot be called with them.
    """
    called = f"{name}({', '.join(arguments)})"
    if not callable(function):
        raise TypeError(f"{call}: {name} is {describe(function)}; it must be a function, {called}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # functions that are not written in Python may have no signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{call}: {name} is called as {called}, and takes {signature} ({error}). Give it these "
            f"arguments, or pass a function that has them, lambda {', '.join(arguments)}: ..."
        ) from None


def checked_steps(call: str, steps: Any) -> int:
    """The number of steps, checked to be whole."""
    if not is_whole(steps):
        raise ValueError(f"{call}: steps must be a whole number of at least 1")
    return int(steps)


def check_chunk(call: str, chunk: int | None) -> None:
    """Refuse a chunk that is neither None nor a number of rows."""
    if chunk is not None:
        check_whole(call, "chunk", chunk, 1, None)


def check_whole(call: str, name: str, value: Any, least: int, most: int | None) -> None:
    """Refuse a value that is not a whole number in a range."""
    if not is_whole(value, least) or (most is not None and value > most):
        limit = "" if most is None else f" and at most {most}, the number of parameters"
        raise ValueError(f"{call}: {name} must be a whole number of at least {least}{limit}")


def called(start: str, chunk: int | None) -> str:
    """The user's call, for messages, with the chunk if there is one."""
    return f"{start})" if chunk is None else f"{start}, chunk={chunk!r})"


def why_no_array(x: Any) -> str:
    """Why JAX cannot make an array of something; empty if it can."""
    try:
        shape_of(x)
    except (TypeError, ValueError, OverflowError) as error:
        return f"{describe(x)}, not an array" if not isinstance(x, int) else f"{x} ({error})"
    return ""


def check_arrays(call: str, name: str, tree: PyTree) -> None:
    """Refuse a tree with a leaf that is not an array: a string, a function, an object."""
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if why := why_no_array(x):
            raise TypeError(
                f"{call}: {name}{jax.tree_util.keystr(path)} is {why}. Pass arrays, numbers and None in "
                f"{name}; what else the loss needs it may close over, as lambda params, meta, batch: "
                "loss(params, meta, batch, other)"
            )


def known_value(x: Any) -> Any:
    """The numbers of an array if they are known, as in ``jax.grad`` outside ``jit``; otherwise None."""
    if not isinstance(x, jax.core.Tracer):
        return x
    primal = jax.lax.stop_gradient(x)
    return None if isinstance(primal, jax.core.Tracer) else primal


def check_finite(call: str, name: str, x: Any) -> None:
    """Refuse NaN and infinity if the numbers are known."""
    known = known_value(x)
    if known is None:
        return
    if isinstance(known, jax.Array):
        with jax.ensure_compile_time_eval():  # otherwise jit would trace it
            finite = bool(jnp.all(jnp.isfinite(known)))
    else:
        finite = bool(np.all(np.isfinite(known)))
    if not finite:
        raise ValueError(
            f"{call}: {name} has NaN or infinity in it at the start, from where nothing can be learned; "
            "look at how it was made (by a run that diverged?)"
        )


def check_state(call: str, state: Any, names: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{call}: state is {describe(state)}; it must be a dictionary with some of the names "
            f"{list(names)}, such as the state of what train returned"
        )
