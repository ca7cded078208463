"""Errors from inside compiled code, as what they are.

What a callback raises inside a compiled program comes out of JAX as a ``jax.errors.JaxRuntimeError`` whose
message ends in a traceback: a `hypergrad.ReversalError` in ``jax.jit(jax.grad(outer))``, and Ctrl-C too if
it arrives while a callback runs.
"""

import builtins
import contextlib
import logging
import re
from collections.abc import Iterator

import jax

from hypergrad.arguments import DomainError
from hypergrad.linear import ConvergenceError
from hypergrad.program import ReversalError

_OWN: dict[str, type[BaseException]] = {
    "DomainError": DomainError,
    "ReversalError": ReversalError,
    "ConvergenceError": ConvergenceError,
    "KeyboardInterrupt": KeyboardInterrupt,
}
# The lines of a traceback are indented; the error stands below them.
_RAISED = re.compile(
    r"Traceback \(most recent call last\):\n(?:[ \t][^\n]*\n|\n)*([A-Za-z_][\w.]*)(?::[ ]?(.*))?\Z",
    re.DOTALL,
)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Let errors that callbacks raise inside compiled code out as what they are.

    Within it a `hypergrad.ReversalError`, a `hypergrad.linear.ConvergenceError`, a KeyboardInterrupt or
    another of Python's own errors is raised with its type and message, from the ``JaxRuntimeError`` that
    hid it; that JAX logs a traceback for each is suppressed.  All else passes unchanged.

    JAX computes asynchronously: wait for the result inside, by ``jax.block_until_ready``, or the error
    comes later, where the result is used.  May be used as a decorator too.

    Returns:
      A context manager.

    Raises:
      ReversalError, ConvergenceError, KeyboardInterrupt, ArithmeticError, ValueError, ...: what the
        callback raised.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> from hypergrad.errors import readable_errors
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
        # Where a result is used that was still being computed, NumPy passes the message on as a ValueError.
        hidden = isinstance(error, jax.errors.JaxRuntimeError) or "CpuCallback error" in str(error)
        found = raised_inside(error) if hidden else None
        if found is None:
            raise
        raise found from error
    finally:
        logger.removeFilter(quiet)


class _Quiet(logging.Filter):
    """Drops every record.  One for each context, so that contexts of several threads do not mix."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        return False


def raised_inside(error: BaseException) -> BaseException | None:
    """The error that a callback raised inside compiled code, or None if there was none or it is unknown.

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
        return None  # would mean something else to who catches it
    try:
        return kind(message)
    except TypeError:  # it wants more than a message
        return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a device, was not enough.

    >>> out_of_memory(MemoryError())
    True

    Args:
      error: any.
    """
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
