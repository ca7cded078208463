"""Several processes, joined by ``jax.distributed.initialize``, that all make the same calls.

All compute together; the first one alone writes files and shows progress.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def several() -> bool:
    """Whether this process is one of several that are joined.

    >>> several(), is_first()
    (False, True)
    """
    return bool(jax.distributed.is_initialized()) and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return not several() or jax.process_index() == 0


def wait_for_all(place: str) -> None:
    """Wait until all processes are at this place."""
    if several():
        multihost_utils.sync_global_devices(f"hypergrad: {place}")


def on_host(x: Any) -> np.ndarray:
    """A whole array as a NumPy array, also if other processes hold parts of it; all must ask for it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
