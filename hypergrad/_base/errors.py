"""Errors and warnings, and how they leave compiled code with their original messages."""

import builtins
import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.everywhere import call_everywhere
from hypergrad._base.notebook import in_ipython
from hypergrad._base.trees import PyTree


class ReversalError(ArithmeticError):
    """The run cannot be, or was not, reversed exactly; no hypergradient is returned."""


class DomainError(ValueError):
    """A hyperparameter is outside its domain, which only the running program could detect."""


class ConvergenceError(ArithmeticError):
    """A point is not a solution, or a linear system was not solved; no hypergradient is returned."""


class ZeroHypergradientWarning(UserWarning):
    """A hypergradient is 0 because the solution does not depend on the variable in question."""


class LaneWarning(RuntimeWarning):
    """Some of the runs under ``jax.vmap`` failed; their results are NaN."""


def error_if(
    explain: Callable[..., str | None],
    result: PyTree,
    *numbers: Array,
    error: type[Exception] = ReversalError,
) -> PyTree:
    """Return the result, or raise an error if the numbers call for one.

    It raises at once if the numbers are known, and otherwise from the running program, by a callback on
    which the result depends.  Of several runs under ``vmap``, those that failed return NaN, derivatives
    included, with a `LaneWarning` that names them; the error is raised only if all of them failed.

    Args:
      explain: function from the numbers, as Python scalars, to a message, or None if there is no error.
      result: a pytree of arrays.
      numbers: scalars.
      error: its class.
    """

    def check(*numbers: Any) -> np.ndarray:
        """Of every run, whether it failed, from what each of the devices says of it, on the last axis."""
        columns = np.broadcast_arrays(*numbers)
        shape = columns[0].shape[:-1]
        rows = zip(*(column.reshape(-1, columns[0].shape[-1]).tolist() for column in columns))
        told = [[explain(*said) for said in zip(*row)] for row in rows]
        messages = [next((x for x in each if x is not None), None) for each in told]
        failed = {k: message for k, message in enumerate(messages) if message is not None}
        if failed and len(failed) == len(messages):
            raise error(failed[0])
        for k, message in failed.items():
            lane = [int(i) for i in np.unravel_index(k, shape)]
            warnings.warn(LaneWarning(f"run {lane} of {list(shape)} under vmap: {message}"), stacklevel=2)
        return np.reshape([message is not None for message in messages], shape)

    if not numbers:
        return result
    if not any(isinstance(x, jax.core.Tracer) for x in numbers):
        check(*(np.reshape(x, 1) for x in numbers))
        return result
    refused = call_everywhere(check, *map(jnp.asarray, numbers))
    # A product, so that derivatives become NaN too.
    return jax.tree.map(
        lambda x: (
            x * jnp.where(refused, jnp.nan, 1.0).astype(x.dtype)
            if jnp.issubdtype(x.dtype, jnp.inexact)
            else x
        ),
        result,
    )


_OWN: dict[str, type[BaseException]] = {
    "DomainError": DomainError,
    "ReversalError": ReversalError,
    "ConvergenceError": ConvergenceError,
    "KeyboardInterrupt": KeyboardInterrupt,
}
# The lines of a traceback are indented; the error is below them.
_RAISED = re.compile(
    r"Traceback \(most recent call last\):\n(?:[ \t][^\n]*\n|\n)*([A-Za-z_][\w.]*)(?::[ ]?(.*))?\Z",
    re.DOTALL,
)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Let errors that callbacks raise inside compiled code surface with their own type.

    Within this context a `hypergrad.ReversalError`, a `hypergrad.implicit.ConvergenceError`, a
    KeyboardInterrupt or another of Python's own errors is raised with its type and message, from the
    ``JaxRuntimeError`` that hid it, and JAX's logging of a traceback for each is suppressed.  Everything
    else passes unchanged.

    JAX computes asynchronously: wait for the result inside, by ``jax.block_until_ready``, or the error is
    raised later, where the result is used.  It also works as a decorator.

    Returns:
      A context manager.

    Raises:
      ReversalError, ConvergenceError, KeyboardInterrupt, ArithmeticError, ValueError, ...: what the
        callback raised.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> from hypergrad import readable_errors
    >>> loss = lambda w, meta, step: jnp.sum(w**4)
    >>> outer = lambda rate: jnp.sum(hg.train(loss, jnp.ones(2), {"learning_rate": rate}, steps=30).params)
    >>> compiled = jax.jit(jax.grad(outer))
    >>> try:
    ...     with readable_errors():
    ...         jax.block_until_ready(compiled(100.0))
    ... except hg.ReversalError as error:
    ...     print("training failed")
    training failed
    """
    quiet = _Quiet()
    logger = logging.getLogger("jax._src.callback")
    logger.addFilter(quiet)
    try:
        yield
    except Exception as error:
        # If a result is used while it is still being computed, NumPy passes the message on as a ValueError.
        hidden = isinstance(error, jax.errors.JaxRuntimeError) or "CpuCallback error" in str(error)
        found = raised_inside(error) if hidden else None
        if found is None:
            raise
        raise found from None if in_ipython() else error  # a notebook would show both at full length
    finally:
        logger.removeFilter(quiet)


class _Quiet(logging.Filter):
    """Drops every record; there is one for each context, so that contexts of several threads do not mix."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        return False


def raised_inside(error: BaseException) -> BaseException | None:
    """The error that a callback raised inside compiled code; None if there was none or it is unknown.

    Args:
      error: a ``JaxRuntimeError``, or what passes its message on.
    """
    match = _RAISED.search(str(error).rstrip())
    if match is None:
        return None
    name, message = match.group(1).rpartition(".")[2], match.group(2) or ""
    if name in ("JaxRuntimeError", "XlaRuntimeError"):  # of a compiled program inside the callback
        return raised_inside(jax.errors.JaxRuntimeError(message))
    kind = _OWN.get(name, getattr(builtins, name, None))
    if not isinstance(kind, type) or not issubclass(kind, Exception | KeyboardInterrupt):
        return None
    if issubclass(kind, StopIteration | StopAsyncIteration):
        return None  # would mean something else to the code that catches it
    try:
        return kind(message)
    except TypeError:  # it needs more than a message
        return None


def outside() -> int:
    """The ``stacklevel`` with which a warning of the calling function points at the user's own line."""
    found, level = 1, 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # to the outermost, because SciPy may stand between ours
        if frame.f_globals.get("__name__", "").partition(".")[0] == "hypergrad":
            found = level + 1
        frame, level = frame.f_back, level + 1
    return found


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a device was not enough.

    Args:
      error: any error.

    >>> out_of_memory(MemoryError())
    True
    """
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
