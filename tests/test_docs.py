"""Every example in README, docs and docstrings runs, and is right where it says what it gives."""

import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import hypergrad

ROOT = Path(__file__).parent.parent
MODULES = ["hypergrad", *(m.name for m in pkgutil.walk_packages(hypergrad.__path__, "hypergrad."))]
README = (ROOT / "README.md").read_text()
PAGES = [str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/**/*.md"))]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Compile with little effort."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    results = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert results.failed == 0


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("k", range(len(blocks(README))))
def test_readme(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(compile(blocks(README)[k], f"README block {k}", "exec"), names)
    assert names


@pytest.mark.parametrize("page", [page for page in PAGES if blocks((ROOT / page).read_text())])
def test_page(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other; a later one may use the names of those before it."""
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for k, block in enumerate(blocks((ROOT / page).read_text())):
        exec(compile(block, f"{page} block {k}", "exec"), names)
    assert names


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_every_figure_is_in_the_gallery() -> None:
    shown = re.findall(r"\(\.\./figures/([^)]+)\)", (ROOT / "docs" / "gallery.md").read_text())
    drawn = (ROOT / "figures").glob("**/*.png")
    assert sorted(shown) == sorted(str(figure.relative_to(ROOT / "figures")) for figure in drawn)


def test_every_public_name_has_a_docstring_and_is_there() -> None:
    for name in hypergrad.__all__:
        assert getattr(hypergrad, name).__doc__, name
