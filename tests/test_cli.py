"""The command line: runs in folders, killed and resumed, replayed; and every error in one line."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.cli import entry, figures, learning, settings
from hypergrad.cli.folders import Config, Journal, folder_for, same_arrays
from hypergrad.cli.progress import Progress
from hypergrad.cli.trials import Judged

PROBLEM = """
import jax.numpy as jnp
import hypergrad as hg

scales = jnp.array([0.5, 1.0])
problem = hg.Problem(
    {"w": jnp.ones(2), "b": jnp.ones(())},
    lambda params, meta, step: jnp.sum(scales * params["w"] ** 2) + params["b"] ** 2,
)
"""
SHORT = ["--optimizer", "sgd", "--steps", "6", "--start", "learning_rate=0.05"]
LEARN = ["learn-schedule", "problem.py", *SHORT, "--meta-steps", "3", "--quiet"]
FILES = {
    "checkpoint.npz",
    "config.toml",
    "figure.png",
    "history.jsonl",
    "learned.json",
    "paste_optax.py",
    "paste_torch.py",
    "problem.py",
    "result.npz",
    "summary.txt",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a problem in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "problem.py").write_text(PROBLEM)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one line with which a command ends that cannot be carried out."""
    assert entry.main([*arguments, "--quiet"]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


def numbers(folder: Path) -> Any:
    return hg.files.load(folder / "result.npz")[0]


def test_learns_a_schedule_and_leaves_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The score after learning is what optax reaches with what is there to paste."""
    assert entry.main([*LEARN, "--by", "leaf"]) == 0
    folder = here / "learn-schedule-problem-sgd-6-steps-per-step-by-leaf"
    said = capsys.readouterr().out
    assert {x.name for x in folder.iterdir()} == FILES
    assert said == (folder / "summary.txt").read_text() and "score of one run" in said

    config = tomllib.loads((folder / "config.toml").read_text())
    assert config["settings"]["steps"] == 6 and config["settings"]["seed"] == 0
    assert set(config["versions"]) == {"hypergrad", "jax", "numpy", "device"}
    assert set(config["digests"]) == {"file", "data"}
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["hypers"]["learning_rate"] == pytest.approx({"mean": 0.05, "min": 0.05, "max": 0.05})

    found = numbers(folder)
    assert found["history"]["loss"].tolist() == pytest.approx([row["loss"] for row in rows])
    assert found["learned"]["learning_rate.w"].shape == (6,)
    pasted: dict[str, Any] = {}
    exec((folder / "paste_optax.py").read_text(), pasted)
    optimizer = next(x for x in pasted.values() if isinstance(x, optax.GradientTransformation))
    params = {"w": jnp.ones(2), "b": jnp.ones(())}
    state, losses = optimizer.init(params), []

    def loss(p: Any) -> Any:
        return jnp.sum(jnp.array([0.5, 1.0]) * p["w"] ** 2) + p["b"] ** 2

    for _ in range(6):
        losses.append(float(loss(params)))
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found["losses"]["after"], losses, rtol=1e-4)
    assert found["scores"]["after"] == pytest.approx([losses[-1]], rel=1e-4)
    assert found["scores"]["after"] < found["scores"]["before"]


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entry.main([*LEARN, "--out", "whole"]) == 0

    class Cut(Journal):
        def add(self, row: Any) -> None:
            if row["step"] == 1:  # after its checkpoint, and before its line
                raise KeyboardInterrupt
            super().add(row)

    monkeypatch.setattr(learning, "Journal", Cut)
    assert entry.main([*LEARN, "--out", "cut"]) == 130
    assert "goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    os.chdir(here)
    with open("cut/history.jsonl", "a") as file:
        file.write('{"step": 1, "lo')  # killed in the middle of a line
    assert entry.main([*LEARN, "--out", "cut"]) == 0
    assert same_arrays(numbers(here / "whole"), numbers(here / "cut")) == ""
    whole, cut = (
        [json.loads(line) for line in (here / name / "history.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    )
    assert [row["step"] for row in cut] == [0, 1, 2]
    assert [row["loss"] for row in cut] == [row["loss"] for row in whole]
    assert cut[2] == whole[2] and "hypers" not in cut[1]

    # Finished, it is only told again; and with a number of the same name it is another run.
    before = (here / "cut" / "result.npz").stat().st_mtime_ns
    assert entry.main([*LEARN, "--out", "cut"]) == 0
    assert (here / "cut" / "result.npz").stat().st_mtime_ns == before
    capsys.readouterr()
    message = refused(capsys, *LEARN[:-1], "--out", "cut", "--meta-rate", "0.2")
    assert "holds another run (meta_rate is 0.1 there and 0.2 here)" in message


def test_replays_to_the_same_numbers_or_says_why_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([*LEARN, "--out", "run"]) == 0
    capsys.readouterr()
    assert entry.main(["replay", "run/config.toml", "--quiet"]) == 0
    assert "the same numbers as in" in capsys.readouterr().out
    assert numbers(here / "run-replay")["learned"].keys() == {"learning_rate"}

    changed = PROBLEM.replace("0.5", "0.6")
    (here / "problem.py").write_text(changed)
    message = refused(capsys, "replay", "run")
    assert "problem.py has changed since this run; put it back as it was (the folder of the run" in message
    assert entry.main(["replay", "run", "--anyway", "--out", "other", "--quiet"]) == 1
    assert "NOT the same numbers" in capsys.readouterr().out

    (here / "problem.py").unlink()  # then the copy is taken
    assert entry.main(["replay", "run", "--out", "again", "--quiet"]) == 0
    capsys.readouterr()
    (here / "run" / "problem.py").write_text(changed)
    assert "put it back" in refused(capsys, "replay", "run")
    (here / "run" / "problem.py").unlink()
    assert "nor is its copy" in refused(capsys, "replay", "run")


def test_replay_refuses_other_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("scales.npy", np.array([0.5, 1.0]))
    text = PROBLEM.replace("jnp.array([0.5, 1.0])", "jnp.asarray(__import__('numpy').load('scales.npy'))")
    (here / "problem.py").write_text(text)
    assert entry.main([*LEARN, "--meta-steps", "1", "--out", "run"]) == 0
    capsys.readouterr()
    np.save("scales.npy", np.array([0.5, 2.0]))
    assert "the data of" in refused(capsys, "replay", "run/config.toml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ("knots:3", {"learning_rate.positions", "learning_rate.values"}),
        ("warmup-cosine", {"learning_rate.peak_value", "learning_rate.warmup_steps"}),
    ],
)
def test_learns_shapes(here: Path, shape: str, names: set[str]) -> None:
    assert entry.main([*LEARN, "--shape", shape, "--out", "run"]) == 0
    tree = numbers(here / "run")["learned"]["learning_rate"]
    assert names <= {f"learning_rate.{name}" for name in tree}


def test_tunes_from_a_learning_rate_found_by_trial(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "problem.py", "--optimizer", "sgd", "--steps", "6", "--trials", "2"]
    assert entry.main([*command, "--meta-steps", "2", "--out", "run", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"learning_rate begins at [\d.e-]+, the best of 11 tried", said)
    assert numbers(here / "run")["learned"].keys() == {"learning_rate"}


def test_checks_a_problem(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", "problem.py", *SHORT[:2], "--steps", "2", *SHORT[4:], "--directions", "1"]
    assert entry.main([*arguments, "--quiet"]) == 0
    assert "Hypergradient in 1 number of float32: trusted" in capsys.readouterr().out


@pytest.mark.slow
def test_distills(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.arange(40) % 2
    images = np.zeros((40, 4, 4), np.uint8)
    images[labels == 1, :2] = 200
    images += np.random.default_rng(0).integers(0, 40, images.shape, np.uint8)
    np.savez("images.npz", images=images, labels=labels)
    command = ["distill", "images.npz", "--network", "logistic", "--steps", "3", "--meta-steps", "2"]
    assert entry.main([*command, "--judge", "2", "--out", "run", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "learned: 2 examples in place of 32" in said
    assert re.search(
        r"^ranking: logistic: HLR -?[\d.]+ points \(plain SGD\), IOR .* LRS 0\.\d+$", said, re.M
    )
    assert hg.load_distilled("run/distilled.npz").images.shape == (2, 4, 4)
    pasted = (here / "run" / "paste_use.py").read_text()
    names: dict[str, Any] = {}
    exec(pasted.partition("# Without this library")[2].partition("\n")[2], names)
    assert names["examples"].shape == (2, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["photos", "fruit.csv"])
def test_distills_a_folder_of_color_images_and_a_table(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Photos of two sizes, and a table with a column of kinds whose classes are not in the last column."""
    rng = np.random.default_rng(0)
    if kind == "photos":
        image = pytest.importorskip("PIL.Image")
        for k in range(20):
            folder, tone = here / "photos" / ("sea", "wood")[k % 2], ((0, 0, 200), (0, 200, 0))[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 50, (8 + 2 * (k % 3), 8, 3))
            image.fromarray((noise + tone).astype(np.uint8)).save(folder / f"{k}.png")
        flags, shape = ["--size", "4x4"], (2, 4, 4, 3)
    else:
        kinds, colors = ("apple", "cherry"), ("red", "green")
        grams = np.where(np.arange(40) % 2, 8, 150) + rng.normal(size=40)
        rows = [f"{kinds[k % 2]},{grams[k]:.1f},{rng.choice(colors)}" for k in range(40)]
        (here / "fruit.csv").write_text("\n".join(["fruit,grams,color", *rows]))
        flags, shape = ["--label", "fruit", "--one-hot", "color"], (2, 3)
    command = ["distill", kind, *flags, "--network", "logistic", "--meta-steps", "5", "--judge", "2"]
    assert entry.main([*command, "--out", "run", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"test accuracy of 2 new networks: .* 100.0 ± 0.0 % on the learned examples", said)
    assert "ranking: logistic: HLR " in said
    assert hg.load_distilled("run/distilled.npz").images.shape == shape


FAULTS = [
    (["learn-schedul", "problem.py"], "did you mean 'learn-schedule'|invalid choice"),
    (["tune", "problem.py", "--stepz", "3"], "unrecognized arguments: --stepz 3; see hypergrad"),
    (["tune", "problem.py", "--steps", "0"], "--steps 0: it must be at least 1"),
    (["tune", "problem.py", "--meta-rate", "0"], "--meta-rate 0.0: it must be above 0"),
    (["tune", "problem.py", "--optimizer", "adamv"], "--optimizer adamv: unknown; did you mean adam or "),
    (["tune", "problem.py", "--optimizer", "kfac"], "--optimizer kfac: it needs arguments of its own"),
    (["tune", "problem.py", "--learn", "betas"], "--learn betas: adam() has no hyperparameter of that"),
    (["tune", "problem.py", "--start", "lr=1"], "--start lr: adam() has no hyperparameter of that name"),
    (["tune", "problem.py", "--start", "eps"], "--start 'eps': 'eps' is not name=number, such as"),
    (
        ["tune", "problem.py", "--optimizer", "grams", "--learn", "weight_decay"],
        "--learn weight_decay: it begins at 0, and must begin above 0 and below inf to be learned; give "
        "--start weight_decay=...",
    ),
    (["tune", "missing.py"], "missing.py: there is no such file; give a Python file that defines"),
    (["tune", "empty.py"], "empty.py: the file defines no hypergrad.Problem; add 'problem = "),
    (["tune", "two.py"], "two.py: it defines 2 problems; give two.py:one or two.py:other"),
    (["tune", "two.py:none"], "two.py:none: none is no hypergrad.Problem there; it defines 2 problems"),
    (["tune", "broken.py"], "broken.py, line 2: ZeroDivisionError: division by zero"),
    (["tune", "unfinished.py"], "unfinished.py, line 1: SyntaxError: "),
    (["tune", "text.txt"], "text.txt: not a Python file; its name must end in .py"),
    (["tune", "batches.py", "--steps", "9"], "--steps 9: the problem has batches for 4 steps; leave it"),
    (["learn-schedule", "problem.py", "--shape", "knots:1"], "--shape knots:1: give a number of knots"),
    (["learn-schedule", "problem.py", "--shape", "knot"], "--shape knot: did you mean knots:10?"),
    (
        ["learn-schedule", "problem.py", "--shape", "warmup-cosine", "--steps", "3"],
        "--shape warmup-cosine: a run of 3 steps is too short; take 4 steps or more",
    ),
    (
        ["learn-schedule", "problem.py", "--shape", "warmup-cosine", "--learn", "b1"],
        "it is a shape for the learning rate only",
    ),
    (["learn-schedule", "one.py", "--by", "layer"], "--by layer: the parameters are one array; use --by"),
    (["plan", "problem.py", "--budget", "8 apples"], "--budget 8 apples: it is not an amount of memory"),
    (["tune", "problem.py", "--out", "problem.py"], "--out problem.py: it is a file; give a folder"),
    (["tune", "problem.py", "--out", "."], "--out .: the folder holds other things than a run; give"),
    (["replay", "nothing.toml"], "nothing.toml: there is no such file; give the config.toml"),
    (["replay", "problem.py"], "problem.py: cannot be read as TOML ("),
    (["replay", "other.toml"], "other.toml: 'name' is missing or not what a run writes"),
    (["distill", "text.txt"], "text.txt: a text has no classes; give images or a table with labels"),
    (["distill", "rows.npz", "--network", "convnet"], "the data are rows of a table; take mlp or logistic"),
    (["distill", "rows.npz", "--size", "4"], "--size 4: it is not HEIGHTxWIDTH, such as 32x32"),
    (["distill", "rows.npz", "--label", "kind"], "read_npz reads this, which does not take 'label'"),
    (["distill", "rows.npz", "--full", "-1"], "--full -1: it must be at least 0"),
    (["distill", "nowhere"], "there is no such file or folder"),
]


@pytest.mark.parametrize(("arguments", "words"), FAULTS, ids=lambda x: " ".join(x)[:40])
def test_errors_are_one_line_with_a_way_out(
    arguments: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = "hg.Problem(jnp.ones(2), lambda w, m, step: jnp.sum(w**2))"
    head = "import jax.numpy as jnp, hypergrad as hg\n"
    (here / "empty.py").write_text("")
    (here / "one.py").write_text(f"{head}problem = {one}\n")
    (here / "two.py").write_text(f"{head}one = {one}\nother = {one}\n")
    (here / "broken.py").write_text("zero = 0\n1 / zero\n")
    (here / "unfinished.py").write_text("problem = (\n")
    (here / "text.txt").write_text("words of a text " * 100)
    batches = "hg.Problem(jnp.ones(2), lambda w, m, x: jnp.sum((w - x) ** 2), jnp.ones((4, 2)))"
    (here / "batches.py").write_text(f"{head}problem = {batches}\n")
    (here / "other.toml").write_text('command = "make"\n')
    np.savez(here / "rows.npz", inputs=np.random.default_rng(0).random((20, 3)), labels=np.arange(20) % 2)
    message = refused(capsys, *arguments)
    assert message.startswith(f"hypergrad {arguments[0]}: ")
    assert re.search(words, message) if "|" in words else words in message, message


def test_errors_of_the_users_functions_name_the_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "problem.py").write_text(PROBLEM.replace('params["b"]', 'params["c"]'))
    message = refused(capsys, "tune", "problem.py")
    assert re.search(r"problem.py, line 8: KeyError: 'c'; --traceback shows where", message)
    with pytest.raises(KeyError):
        entry.main(["tune", "problem.py", "--quiet", "--traceback"])
    assert not [x for x in here.iterdir() if x.is_dir() and x.name.startswith("tune")]


def test_a_run_that_fails_ends_with_status_1(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "problem.py").write_text(PROBLEM.replace('params["b"] ** 2', 'jnp.nan * params["b"]'))
    message = refused(capsys, "tune", "problem.py", "--steps", "3", "--optimizer", "momentum", status=1)
    assert "training gives no finite score with any of the learning rates 0.0001 to 10" in message


def test_the_default_folder_is_that_of_the_same_run_or_a_new_one(here: Path) -> None:
    def config(**settings: Any) -> Config:
        return Config.of("tune", learning.Learning(**settings), {"data": "0"})

    def made(config: Config) -> Path:
        folder = folder_for(config, "tune-it", None)
        folder.mkdir(exist_ok=True)
        config.write(folder, learning.Learning())
        return folder

    assert made(config()).name == "tune-it"
    assert made(config(seed=1)).name == "tune-it-2"
    assert made(config(seed=2)).name == "tune-it-3"
    assert folder_for(config(seed=1), "tune-it", None).name == "tune-it-2"
    assert folder_for(config(seed=1, meta_steps=99), "tune-it", None).name == "tune-it-4"


def test_without_matplotlib_the_figure_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    run = Judged(np.ones(1), np.ones(3))
    words = figures.draw(tmp_path, None, [], [], run, run)
    assert words == ["no figure, because matplotlib is not installed: pip install matplotlib"]
    assert list(tmp_path.iterdir()) == []


class Terminal:
    """A stream that is, or is not, a terminal."""

    def __init__(self, terminal: bool):
        self.terminal, self.text = terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_seen_at_once_and_while_it_lasts(terminal: bool) -> None:
    stream: Any = Terminal(terminal)
    with Progress(stream, every=0.02) as progress:
        progress.begin("compiling", expected=90.0)
        assert "compiling ..., about 90 s left" in stream.text
        time.sleep(0.1)
        progress.reached("meta-step 1 of 2", 200.0)
        time.sleep(0.1)
        progress.say("a line that stays")
    assert "meta-step 1 of 2 ..., about 3.3 min left" in stream.text
    assert "a line that stays\n" in stream.text
    assert ("\r" in stream.text) == terminal
    assert stream.text.count("compiling") > 1


def test_a_journal_survives_damage(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 1}\nnonsense\n')
    journal = Journal(path)
    journal.add({"step": 2, "loss": 9.0})  # is there already
    journal.add({"step": 3, "loss": float("nan")})
    assert path.read_text().splitlines()[1:] == ['{"step": 2, "loss": 0.5}', '{"step": 3, "loss": null}']
    journal.complete([(1.0, 1.0), (0.75, 2.0), (0.5, 1.0), (0.25, 1.0)])
    assert [row["step"] for row in journal.rows] == [0, 1, 2, 3]
    assert json.loads(path.read_text().splitlines()[1]) == {"step": 1, "loss": 0.75, "gradient_norm": 2.0}


def test_differences_of_results_are_said() -> None:
    one = {"a": np.array([1.0, np.nan]), "b": np.arange(3)}
    assert same_arrays(one, {**one}) == ""
    assert same_arrays(one, {"a": one["a"]}) == "the results do not hold the same arrays"
    assert same_arrays({"a": np.ones(2)}, {"a": np.array([1.0, 1.5])}) == "a differs by 0.5 of its size"
    assert "int64[3] there and int64[2]" in same_arrays({"b": np.arange(3)}, {"b": np.arange(2)})


def test_settings_are_those_of_their_dataclass() -> None:
    with pytest.raises(ValueError, match=r"settings\.stepz is unknown; did you mean steps"):
        settings.settings_of(learning.Learning, {"stepz": 3})
    with pytest.raises(ValueError, match=r"settings\.steps = 'x' is not of type int"):
        settings.settings_of(learning.Learning, {"steps": "x"})
    made = settings.settings_of(learning.Learning, {"problem": "p.py", "steps": 3, "meta_rate": 1})
    assert settings.as_command("tune", made) == "hypergrad tune p.py --steps 3 --meta-rate 1"


@pytest.mark.slow
def test_the_command_in_a_log_file(here: Path) -> None:
    """The real program: its status, and lines instead of a bar."""
    command = [sys.executable, "-m", "hypergrad"]
    root = Path(__file__).parent.parent
    run = [*command, *LEARN[:-1]]
    with open("log", "w") as log:
        status = subprocess.run(run, stderr=log, stdout=log, env={**os.environ, "PYTHONPATH": str(root)})
    text = Path("log").read_text()
    assert status.returncode == 0 and "\r" not in text
    assert text.startswith("reading problem.py ...\n") and "score of one run" in text


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_numbers(here: Path) -> None:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "hypergrad", *LEARN, "--meta-steps", "40"]
    assert subprocess.run([*command, "--out", "whole"], env=environment).returncode == 0
    history = here / "cut" / "history.jsonl"
    for made in (5, 17, 31):
        process = subprocess.Popen([*command, "--out", "cut"], env=environment)
        while not (history.exists() and history.read_bytes().count(b"\n") > made):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert subprocess.run([*command, "--out", "cut"], env=environment).returncode == 0
    assert len(history.read_text().splitlines()) == 40
    assert same_arrays(numbers(here / "whole"), numbers(here / "cut")) == ""
