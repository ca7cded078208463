"""What is different where IPython or a notebook is running."""

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])
OWN = str(Path(__file__).parents[1]), contextlib.__file__  # the frames of readable_errors are in the latter


def in_ipython() -> bool:
    """Whether IPython or a notebook is running.

    >>> in_ipython()
    False
    """
    return _shell() is not None


def in_notebook() -> bool:
    """Whether a notebook is running, where a line can be written again and figures are shown.

    >>> in_notebook()
    False
    """
    return "IPKernelApp" in getattr(_shell(), "config", ())


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def short_traceback(function: F) -> F:
    """Let IPython leave the library's own frames out of the traceback of an error that leaves a function.

    IPython always shows the last frame, and says how many it leaves out.  With
    ``jax.config.update("jax_traceback_filtering", "off")``, which shows those of JAX too, all are shown.

    Args:
      function: a function that users call.

    >>> short_traceback(lambda x: 2 * x)(1)
    2
    """

    @functools.wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        try:
            return function(*arguments, **settings)
        except Exception as error:
            if in_ipython() and getattr(jax.config, "jax_traceback_filtering", "auto") != "off":
                for frame, _ in traceback.walk_tb(error.__traceback__):
                    if frame.f_code.co_filename.startswith(OWN):
                        frame.f_locals["__tracebackhide__"] = True
            raise

    return call  # type: ignore[return-value]
