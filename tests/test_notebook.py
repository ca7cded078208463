"""In a notebook: bars, figures, and errors that can be read."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import hypergrad

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parent.parent
CELLS = {
    "import": "import hypergrad as hg, jax, jax.numpy as jnp, numpy as np",
    "figure": 'hg.plots.losses({"a": np.ones(3), "b": np.zeros(3)})',
    "tune": """
loss = lambda w, meta, step: jnp.sum((w - 1) ** 2)
short = {"steps": 5, "optimizer": hg.momentum()}
_ = hg.tune(loss, jnp.zeros(3), {"learning_rate": 0.1}, trials=2, meta_steps=2, **short)
""",
    "optimize": "_ = hg.meta.optimize(lambda x, key: (x - 1) ** 2, 0.5, steps=3)",
    "distill": """
images, labels = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32), np.arange(40) % 2
_ = hg.distill(hg.nets.mlp((6, 2)), images, labels, hg.Recipe(steps=3), meta_steps=2)
""",
    "refused": 'hg.tune(loss, jnp.zeros(3), {"learning_rat": 0.1}, **short)',
    "own": """
def wrong(w, meta, step):
    return jnp.sum(w @ jnp.ones(4))
hg.tune(wrong, jnp.zeros(3), {"learning_rate": 0.1}, **short)
""",
    "diverged": """
def outer(rate):
    return jnp.sum(hg.train(loss, jnp.zeros(3), {"learning_rate": rate}, **short).params)
jax.grad(outer)(1e30)
""",
    "followed": 'hg.tune(loss, jnp.zeros(3), {"learning_rate": 1e30}, trials=0, **short)',
}


@pytest.fixture(scope="module")
def outputs() -> dict[str, list[Any]]:
    """What each cell shows."""
    if importlib.util.find_spec("nbclient") is None:
        pytest.skip("needs pip install -e '.[docs]'")
    import nbformat
    from nbclient import NotebookClient

    cells = [nbformat.v4.new_code_cell(code.strip()) for code in CELLS.values()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": str(ROOT)}}).execute()
    return {name: cell.outputs for name, cell in zip(CELLS, cells)}


def told(outputs: list[Any]) -> str:
    assert {each.get("name") for each in outputs if each.output_type == "stream"} <= {"stderr"}
    return "".join(each.get("text", "") for each in outputs)


def traceback_in(outputs: list[Any]) -> str:
    (error,) = [each for each in outputs if each.output_type == "error"]
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))


def test_an_import_says_nothing(outputs: dict[str, list[Any]]) -> None:
    assert outputs["import"] == []


def test_a_figure_is_shown(outputs: dict[str, list[Any]]) -> None:
    (shown,) = outputs["figure"]
    assert "image/png" in shown.data


@pytest.mark.parametrize(
    ("name", "bars"),
    [
        ("tune", ["tune:.* 2/2 .*trial", "tune:.* 2/2 .*iteration"]),
        ("optimize", ["optimize:.* 3/3 .*iteration"]),
        ("distill", ["distill:.* 2/2 .*iteration"]),
    ],
)
def test_bars_are_shown_without_a_warning(
    outputs: dict[str, list[Any]], name: str, bars: list[str]
) -> None:
    shown = "".join([told(outputs[name]), *(str(each.get("data", "")) for each in outputs[name])])
    for bar in bars:
        assert re.search(bar if importlib.util.find_spec("ipywidgets") is None else bar[:8], shown), shown
    assert "Warning" not in shown


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "refused",
            "hg.tune(loss",
            "ValueError: tune(steps=5, optimizer=momentum()): hypers must have the",
        ),
        ("own", "return jnp.sum(w @", "TypeError: dot_general requires contracting dimensions"),
        ("diverged", "return jnp.sum(hg.train(loss", "ReversalError: train(steps=5, optimizer=momentum()"),
        ("followed", "hg.tune(loss", "ReversalError: train(steps=5, optimizer=momentum()"),
    ],
)
def test_errors_show_the_line_of_the_user_and_end_with_the_message(
    outputs: dict[str, list[Any]], name: str, line: str, message: str
) -> None:
    shown = traceback_in(outputs[name])
    assert re.search(rf"^-+> \d+ .*{re.escape(line)}", shown, re.MULTILINE), shown
    assert shown.rstrip().splitlines()[-1].startswith(message), shown
    ours = re.findall(
        rf"^File {re.escape(str(Path(hypergrad.__file__).parent))}\S*\.py", shown, re.MULTILINE
    )
    assert len(ours) <= 1, shown  # where it was raised
