"""A strict session: implicit rank promotion is an error, as warnings are (see pyproject.toml)."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test in 64-bit mode, and leave the mode as it was."""
    with jax.enable_x64(True):
        yield
