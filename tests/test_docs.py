"""Every example in README, docs and docstrings runs, and is right where it says what it gives."""

import doctest
import importlib
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hypergrad

ROOT = Path(__file__).parent.parent
MODULES = ["hypergrad", *(m.name for m in pkgutil.walk_packages(hypergrad.__path__, "hypergrad."))]
pytestmark = pytest.mark.docs
README = (ROOT / "README.md").read_text()
PAGES = [str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/**/*.md"))]


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
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: None)
    names: dict[str, object] = {}
    for k, block in enumerate(blocks((ROOT / page).read_text())):
        exec(compile(block, f"{page} block {k}", "exec"), names)
    assert names


def test_first_steps_are_short() -> None:
    steps = blocks((ROOT / "docs" / "first-steps.md").read_text())
    assert len(steps) == 3
    for step in steps:
        assert sum(map(bool, step.splitlines())) <= 10


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_index_lists_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", index.read_text())
    listed = {(index.parent / target).resolve() for target in linked}
    assert not {ROOT / page for page in PAGES} - {index} - listed


def test_layout_lists_every_file() -> None:
    """Each source file has one line, under the heading of its folder."""
    listed, folder = set(), ""
    for line in (ROOT / "docs" / "layout.md").read_text().splitlines():
        if line.startswith("##"):
            folder = "".join(re.findall(r"^### `(hypergrad/.*)`$", line))
        if folder:
            listed |= {folder + name for name in re.findall(r"^\| `(\S+\.py)` \|", line)}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "hypergrad").rglob("*.py")}
    inner = {file for file in files if file.count("/") > 1 and file.endswith("/__init__.py")}
    assert listed == files - inner


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES])
def test_anchors_are_headings(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", (ROOT / page).read_text()):
        text = ((ROOT / page).parent / target if target else ROOT / page).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_spelling_is_american(page: str) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", (ROOT / page).read_text(), flags=re.DOTALL)
    stems = "optimis|minimis|maximis|normalis|regularis|linearis|behaviour|colour|favour|centre|licence"
    assert re.findall(rf"\w*(?:{stems})\w*", prose, re.IGNORECASE) == []


def committed(pattern: str) -> list[str]:
    """Files that git knows, and not what lies beside them; none outside a checkout."""
    if shutil.which("git") is None:
        return []
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.splitlines()


def test_every_committed_figure_is_in_the_gallery() -> None:
    shown = re.findall(r"\(\.\./(figures/[^)]+)\)", (ROOT / "docs" / "gallery.md").read_text())
    drawn = committed("figures/*.png")
    if not drawn:
        pytest.skip("not a checkout of git")
    assert sorted(shown) == sorted(drawn)


def test_recipe_packs_omniglot(tmp_path: Path) -> None:
    """From drawings in the published layout to what `omniglot` reads."""
    drawings = {"images_background/Greek/character01": 0, "images_evaluation/ULOG/character01": 1}
    rng, ink = np.random.default_rng(0), {}
    for name, part in drawings.items():
        folder = tmp_path / "published" / name
        folder.mkdir(parents=True)
        ink[part] = rng.random((20, 105, 105)) < 0.3
        for k, drawing in enumerate(ink[part]):
            Image.fromarray(~drawing).save(folder / f"{part:04d}_{k + 1:02d}.png")  # ink is black
    names: dict[str, Any] = {}
    exec(blocks((ROOT / "docs" / "data.md").read_text())[0], names)
    names["pack"](tmp_path / "published", tmp_path / "omniglot" / "omniglot_28.npz")
    read = hypergrad.data.omniglot(tmp_path)
    assert read.names == ("Greek", "ULOG") and read.evaluation.tolist() == [False, True]
    assert read.images.shape == (2, 20, 28, 28)
    for part, images in enumerate(read.images):
        np.testing.assert_allclose(images[:, 0, 0], ink[part][:, :4, :4].mean(axis=(1, 2)), atol=0.005)
        np.testing.assert_allclose(images[:, -1, -1], ink[part][:, -4:, -4:].mean(axis=(1, 2)), atol=0.005)


def test_every_public_name_has_a_docstring_and_is_there() -> None:
    for name in hypergrad.__all__:
        assert getattr(hypergrad, name).__doc__, name
