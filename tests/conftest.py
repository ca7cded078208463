"""A strict session: implicit rank promotion is an error, as warnings are (see pyproject.toml)."""

import os
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Nearly all of a test's time goes to compiling: little effort is put into it, by child processes too.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is `quick` in some cases, the others are slow."""
    for item in items:
        quick = item.get_closest_marker("quick")
        if quick is not None and item.name[len(item.originalname) + 1 : -1] not in quick.args:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test in 64-bit mode, and leave the mode as it was."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def effort(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile as users do where it counts, and always in slow tests."""
    thorough = any(request.node.get_closest_marker(name) for name in ("optimized", "slow"))
    jax.config.update("jax_disable_most_optimizations", not thorough)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
