"""The documentation as a site is built without a warning, and nothing on it comes from elsewhere."""

import importlib.util
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import hypergrad

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LOADED = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\"> ]+)")


def build(folder: Path) -> None:
    """The command of docs/README.md, into another folder; it runs the notebooks."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs pip install -e '.[docs]'")
    found = re.search(r"mkdocs (build .*)", (ROOT / "docs" / "README.md").read_text())
    assert found is not None
    command = [sys.executable, "-m", "mkdocs", *found[1].split(), "--site-dir", str(folder)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]


def paths(name: str) -> set[str]:
    """Under which a public name may be listed: its own, or that of the place where it is defined."""
    thing = getattr(hypergrad, name)
    defined = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
    return {f"hypergrad.{name}", defined, getattr(thing, "__name__", "")}


@pytest.mark.docs
def test_site(tmp_path: Path) -> None:
    build(tmp_path)
    listing = zlib.decompress((tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    listed = {line.split()[0] for line in listing.splitlines()}
    assert not [name for name in hypergrad.__all__ if not paths(name) & listed]
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html")}
    assert not {address for text in pages.values() for address in LOADED.findall(text)}
    for notebook in NOTEBOOKS:
        page = pages[(tmp_path / notebook.relative_to(ROOT)).with_suffix(".html")]
        assert "data:image/png" in page, notebook.name  # it was run, and shows its figures


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_results(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
