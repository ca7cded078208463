"""A user's problem, read from a Python file."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from hypergrad.cli.refusals import RefusedError
from hypergrad.training.problem import Problem

DIGITS = "digits"  # in place of a file, for the problem that is built in
_PREFIX = "hypergrad_problem_"  # of the modules that the files become
EXAMPLE = "problem = hypergrad.Problem(init, loss, batches)"


class Loaded(NamedTuple):
    """A problem and where it is from.

    Attributes:
      problem: the problem.
      path: its file; None for the digits, which are built in.
      name: a short name, for folders and titles.
    """

    problem: Problem
    path: Path | None
    name: str


def file_digest(path: Path) -> str:
    """The SHA-256 of a file.

    Args:
      path: the file.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_problem(given: str, builtin: Callable[[], Problem]) -> Loaded:
    """The problem that a file defines.

    Args:
      given: ``problem.py``, ``problem.py:name``, or ``digits``.
      builtin: makes the problem for ``digits``.

    Raises:
      RefusedError: there is no such file, it fails, or it does not define one problem.
    """
    if given == DIGITS:
        return Loaded(builtin(), None, DIGITS)
    file, name = split_name(given)
    path = Path(file)
    if not path.is_file():
        raise RefusedError(
            f"{file}: there is no such file; give a Python file that defines {EXAMPLE!r}, or digits"
        )
    module = _executed(path)
    found = {key: x for key, x in vars(module).items() if isinstance(x, Problem)}
    if name:
        if name not in found:
            raise RefusedError(f"{given}: {name} is no hypergrad.Problem there; {_list_of(file, found)}")
        return Loaded(found[name], path, f"{path.stem}-{name}")
    if len({id(x) for x in found.values()}) != 1:
        raise RefusedError(f"{given}: {_list_of(file, found)}")
    return Loaded(next(iter(found.values())), path, path.stem)


def split_name(given: str) -> tuple[str, str]:
    """File and name in ``problem.py:name``; the name may be missing.

    >>> split_name("problem.py:mine"), split_name("problem.py")
    (('problem.py', 'mine'), ('problem.py', ''))
    """
    file, colon, name = given.rpartition(":")
    return (file, name) if colon and name.isidentifier() and file else (given, "")


def _list_of(file: str, found: dict[str, Problem]) -> str:
    if not found:
        return f"the file defines no hypergrad.Problem; add {EXAMPLE!r}"
    if len(found) == 1:
        return f"give {file}:{next(iter(found))}"
    return f"it defines {len(found)} problems; give {' or '.join(f'{file}:{name}' for name in found)}"


def _executed(path: Path) -> ModuleType:
    """The module of a file, which may import its neighbors as a script can."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = _PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RefusedError(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the types of their fields
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RefusedError(told(error)) from error
    return module


def told(error: BaseException) -> str:
    """An error in one line, with the place in the user's file where it was raised, if it was.

    Args:
      error: what was raised.
    """
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    theirs = {str(module.__file__) for name, module in sys.modules.items() if name.startswith(_PREFIX)}
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in theirs]
    if not places:
        return str(error)
    return f"{places[-1].filename}, line {places[-1].lineno}: {type(error).__name__}: {error}"
