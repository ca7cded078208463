"""Every example in README and docstrings runs, and is right where it says what it gives."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import hypergrad

ROOT = Path(__file__).parent.parent
MODULES = ["hypergrad", *(m.name for m in pkgutil.walk_packages(hypergrad.__path__, "hypergrad."))]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    results = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert results.failed == 0


@pytest.mark.parametrize("k", range(len(BLOCKS)))
def test_readme(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(compile(BLOCKS[k], f"README block {k}", "exec"), names)
    assert names


def test_every_public_name_has_a_docstring_and_is_there() -> None:
    for name in hypergrad.__all__:
        assert getattr(hypergrad, name).__doc__, name
