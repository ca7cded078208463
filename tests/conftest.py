"""A strict session: implicit rank promotion is an error, as warnings are (see pyproject.toml)."""

import gc
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src import compiler

jax.config.update("jax_numpy_rank_promotion", "raise")
# Nearly all of a test's time goes to tracing and compiling: little effort is put into it, and what has been
# traced is not looked through again and again for what could be freed.
jax.config.update("jax_disable_most_optimizations", True)
LITTLE_EFFORT = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
gc.set_threshold(200_000, 20, 100)

as_configured = compiler.get_compile_options  # JAX has no public setting that reaches every program


def with_little_effort(*arguments: Any, env_options_overrides: Any = None, **others: Any) -> Any:
    effort = LITTLE_EFFORT if jax.config.read("jax_disable_most_optimizations") else {}
    return as_configured(*arguments, env_options_overrides=effort | (env_options_overrides or {}), **others)


compiler.get_compile_options = with_little_effort


def pytest_configure(config: pytest.Config) -> None:
    """Tests of many devices get them; all others run on one, as most users do."""
    if config.getoption("markexpr").startswith("devices"):
        jax.config.update("jax_num_cpu_devices", 8)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is `quick` in some cases, the others are slow."""
    for item in items:
        quick = item.get_closest_marker("quick")
        if quick is not None and item.name[len(item.originalname) + 1 : -1] not in quick.args:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What has been imported is there to stay."""
    gc.freeze()


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
