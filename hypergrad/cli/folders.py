"""The folder of a run: its configuration, its history as it goes, and its result."""

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tomli_w

from hypergrad import files
from hypergrad.cli.refusals import RefusedError
from hypergrad.cli.settings import as_command

CONFIG, SUMMARY, RESULT = "config.toml", "summary.txt", "result.npz"
HISTORY, CHECKPOINT = "history.jsonl", "checkpoint.npz"


class Config(NamedTuple):
    """What a configuration file says.

    Attributes:
      command: name of the command.
      settings: its settings by name.
      digests: of the problem's file and of its data.
      directory: where the command was given.
      versions: of the libraries, and the kind of device.
    """

    command: str
    settings: dict[str, Any]
    digests: dict[str, str]
    directory: str
    versions: dict[str, str]

    @staticmethod
    def of(command: str, settings: Any, digests: Mapping[str, str]) -> "Config":
        """The configuration of a run that begins here and now.

        Args:
          command: name of the command.
          settings: an instance of its dataclass.
          digests: of file and data.
        """
        given = {name: x for name, x in dataclasses.asdict(settings).items() if x is not None}
        versions = files.versions() | {"device": jax.default_backend()}
        return Config(command, given, dict(digests), os.getcwd(), versions)

    def continues(self, other: "Config") -> bool:
        """Whether this is the same run as another.

        Args:
          other: the configuration of the other run.
        """
        mine, theirs = ((x.command, x.settings, x.digests) for x in (self, other))
        return mine == theirs

    def differences(self, other: "Config") -> str:
        """What differs from another run, in words.

        Args:
          other: the configuration of the other run.
        """
        mine = {"command": self.command} | self.settings | self.digests
        theirs = {"command": other.command} | other.settings | other.digests
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return ", ".join(f"{name} is {theirs.get(name)} there and {mine.get(name)} here" for name in names)

    def write(self, folder: Path, settings: Any) -> None:
        """Write the configuration file.

        Args:
          folder: of the run.
          settings: the instance of the dataclass.
        """
        content = {
            "command": as_command(self.command, settings),
            "name": self.command,
            "directory": self.directory,
            "settings": self.settings,
            "digests": self.digests,
            "versions": self.versions,
        }
        files.replace_file(folder / CONFIG, tomli_w.dumps(content).encode())


def read_config(path: Path) -> Config:
    """Read the configuration of a run.

    Args:
      path: of the file.

    Raises:
      RefusedError: there is none, or it is not one that `Config.write` wrote.
    """
    if path.is_dir():
        path = path / CONFIG
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise RefusedError(
            f"{path}: there is no such file; give the {CONFIG} in the folder of a run"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RefusedError(
            f"{path}: cannot be read as TOML ({error}); give the {CONFIG} of a run"
        ) from error
    parts = {"name": str, "directory": str, "settings": dict, "digests": dict, "versions": dict}
    for name, kind in parts.items():
        if not isinstance(content.get(name), kind):
            raise RefusedError(
                f"{path}: {name!r} is missing or not what a run writes; give the {CONFIG} of a run"
            )
    return Config(*(content[name] for name in ("name", "settings", "digests", "directory", "versions")))


def folder_for(config: Config, name: str, out: str | None) -> Path:
    """The folder of a run: one that holds the same run, in which it goes on, or else a new one.

    Args:
      config: of the run.
      name: by default; if other runs have folders of that name, a number is added.
      out: the folder that the user wants, if any.

    Raises:
      RefusedError: the folder that the user wants holds another run, or other things.
    """
    if out is not None:
        path = Path(out)
        if path.exists() and not path.is_dir():
            raise RefusedError(f"--out {out}: it is a file; give a folder")
        if path.is_dir() and any(x.name != ".run.lock" for x in path.iterdir()):
            if not (path / CONFIG).is_file():
                raise RefusedError(
                    f"--out {out}: the folder holds other things than a run; give an empty or new one"
                )
            held = read_config(path)
            if not config.continues(held):
                raise RefusedError(
                    f"--out {out}: the folder holds another run ({config.differences(held)}); give another "
                    "folder, or delete this one"
                )
        return path
    for path in _numbered(name):
        if not path.exists() or ((path / CONFIG).is_file() and config.continues(read_config(path))):
            return path
    raise AssertionError


def _numbered(name: str) -> Iterator[Path]:
    yield Path(name)
    k = 2
    while True:
        yield Path(f"{name}-{k}")
        k += 1


class Journal:
    """A file with one JSON object in each line, numbered by "step", which a kill cannot spoil.

    Args:
      path: of the file; what is in it is kept, up to a line that is not whole.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = whole_rows(path)
        lines = _lines(self.rows)
        if path.exists() and path.read_text(errors="replace") != lines:
            files.replace_file(path, lines.encode())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, unless the file has it already.

        Args:
          row: with its number under "step", larger than those before it.
        """
        if self.rows and row["step"] <= self.rows[-1]["step"]:
            return
        self.rows.append(dict(row))
        with open(self.path, "a") as file:
            file.write(_lines([row]))

    def complete(self, history: Iterable[tuple[Any, Any]]) -> None:
        """Write the rows again that a kill between a checkpoint and its line has cost.

        Args:
          history: loss and norm of the hypergradient at every step.
        """
        known = {row["step"]: row for row in self.rows}
        rows = [
            known.get(step) or {"step": step, "loss": float(loss), "gradient_norm": float(norm)}
            for step, (loss, norm) in enumerate(history)
        ]
        if rows != self.rows:
            self.rows = rows
            files.replace_file(self.path, _lines(rows).encode())


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_finite(row)) + "\n" for row in rows)


def _finite(x: Any) -> Any:
    """Without NaN and infinity, which JSON does not have: null in their place."""
    if isinstance(x, Mapping):
        return {name: _finite(part) for name, part in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal up to the first that is damaged or out of order.

    Args:
      path: of the file, which may be missing.
    """
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        after = rows[-1]["step"] if rows else -1
        if not (line.endswith("\n") and isinstance(row, dict) and row.get("step", -1) > after):
            break
        rows.append(row)
    return rows


def same_arrays(one: Any, other: Any) -> str:
    """How the numbers of two results differ, in words; empty if they are the same bit for bit.

    Args:
      one: a tree of arrays.
      other: another.
    """
    first, second = dict(jax.tree.leaves_with_path(one)), dict(jax.tree.leaves_with_path(other))
    if first.keys() != second.keys():
        return "the results do not hold the same arrays"
    told = []
    for path, x in first.items():
        y, where = second[path], jax.tree_util.keystr(path, simple=True, separator=".")
        if x.shape != y.shape or x.dtype != y.dtype:
            told.append(f"{where} is {x.dtype}{list(x.shape)} there and {y.dtype}{list(y.shape)} here")
        elif not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
            size = np.max(np.abs(x - y)) / max(float(np.max(np.abs(x))), np.finfo(float).tiny)
            told.append(f"{where} differs by {size:.2g} of its size")
    return "; ".join(told)
