"""What the site is made of: files at the same places as in the repository, and notebooks that are run."""

import base64
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert.exporters import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = "docs/notebooks/*.ipynb"
SHOWN = (
    "*.md",
    "LICENSE",
    "CITATION.cff",
    "docs/**/*.md",
    "docs/**/*.css",
    "docs/**/*.png",
    "figures/**/*.png",
)
PAGES: dict[str, str] = {}  # the text of those that are notebooks


class Notebook(File):
    """A notebook, which is a page."""

    def is_documentation_page(self) -> bool:
        """Asked by mkdocs."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the repository that are shown, after those of the theme."""
    place = (str(ROOT), config.site_dir, config.use_directory_urls)
    theme = [file for file in files if file.src_dir != config.docs_dir]
    shown = [File(name, *place) for pattern in SHOWN for name in _names(pattern)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        PAGES.update(zip(_names(NOTEBOOKS), pool.map(_page, _names(NOTEBOOKS))))
    return Files([*theme, *shown, *(Notebook(name, *place) for name in PAGES)])


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """The text of a page that is a notebook."""
    return PAGES.get(page.file.src_uri)


def _names(pattern: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(pattern))]


def _page(name: str) -> str:
    """A notebook in Markdown, with its results, and with its figures in the text."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    if os.environ.get("EXECUTE") != "false":
        os.environ.pop("MPLBACKEND", None)  # figures are shown below their cells
        NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}).execute()
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})  # of a bar, the end
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for figure, content in resources["outputs"].items():
        text = text.replace(
            f"]({figure})", f"](data:image/png;base64,{base64.b64encode(content).decode()})"
        )
    return re.sub(r"\n{3,}", "\n\n", text)
