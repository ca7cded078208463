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


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Compile with little effort what is lowered and compiled by hand, as `meta.optimize` does."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    with pytest.MonkeyPatch.context() as patch:
        thorough = jax.stages.Lowered.compile
        patch.setattr(jax.stages.Lowered, "compile", lambda self: thorough(self, options))
        yield
