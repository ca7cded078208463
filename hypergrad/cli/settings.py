"""Flags of the command line, made from the frozen dataclasses that hold the settings of a command."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from hypergrad.cli.refusals import RefusedError, meant


def option(default: Any, about: str, **how: Any) -> Any:
    """A field of the settings of a command, with the help text of its flag.

    Args:
      default: its value without the flag.
      about: help text.
      how: ``positional=True`` for a word without a flag; ``choices`` as argparse takes them.
    """
    return dataclasses.field(default=default, metadata={"help": about, **how})


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `RefusedError`, one line each."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise RefusedError(f"{message[:1].lower()}{message[1:]}; see {self.prog} --help")


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add a flag for every field of a settings dataclass.

    Args:
      parser: of the command.
      settings: its dataclass; fields are numbers, words, truth values, or one of these or None.
    """
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        how = {name: x for name, x in field.metadata.items() if name != "positional"}
        kind = _kind(hints[field.name])
        if field.default not in (None, "") and "default" not in how["help"]:
            how["help"] += f" (default {field.default})"
        how["help"] = how["help"].replace("%", "%%")
        if field.metadata.get("positional"):
            more = {} if field.default is dataclasses.MISSING else {"nargs": "?", "default": field.default}
            parser.add_argument(field.name, **more, **how)
        elif kind is bool:
            parser.add_argument(_flag(field.name), action="store_true", **how)
        else:
            parser.add_argument(_flag(field.name), type=kind, default=field.default, **how)


def settings_of(settings: type, values: dict[str, Any]) -> Any:
    """The settings with these values, as a configuration file has them.

    Args:
      settings: the dataclass.
      values: by the names of its fields.

    Raises:
      RefusedError: a name or a type is not that of a field.
    """
    hints = typing.get_type_hints(settings)
    for name, value in values.items():
        if name not in hints:
            raise RefusedError(f"settings.{name} is unknown; {meant(name, hints)}")
        kind = _kind(hints[name])
        if not isinstance(value, (int, float) if kind is float else kind) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise RefusedError(f"settings.{name} = {value!r} is not of type {kind.__name__}")
    try:
        return settings(**values)
    except TypeError as error:
        raise RefusedError(f"settings: {error}") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _kind(hint: Any) -> Any:
    """The type of a value, if there is one."""
    if isinstance(hint, types.UnionType):
        return next(x for x in typing.get_args(hint) if x is not types.NoneType)
    return hint


def words(given: str) -> list[str]:
    """The words between commas.

    >>> words("learning_rate, momentum")
    ['learning_rate', 'momentum']
    """
    return [word.strip() for word in given.split(",") if word.strip()]


def assignments(flag: str, given: str) -> dict[str, float]:
    """Numbers by name, from ``name=number`` between commas.

    Args:
      flag: for messages.
      given: what follows it.

    Raises:
      RefusedError: it is something else.

    >>> assignments("--start", "learning_rate=0.1, momentum=0.9")
    {'learning_rate': 0.1, 'momentum': 0.9}
    """
    found = {}
    for word in words(given):
        name, equals, number = (part.strip() for part in word.partition("="))
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not (name and equals):
            raise RefusedError(f"{flag} {given!r}: {word!r} is not name=number, such as learning_rate=0.1")
    return found


def check_least(flag: str, value: int | float | None, least: float, above: bool = False) -> None:
    """Refuse a number below a limit, or at it if it must be above.

    Args:
      flag: for the message.
      value: what follows it; None if it is not given.
      least: the limit.
      above: whether the limit itself is refused.
    """
    if value is not None and not (value > least if above else value >= least):
        raise RefusedError(f"{flag} {value}: it must be {'above' if above else 'at least'} {least:g}")


def as_command(name: str, settings: Any) -> str:
    """The command that has these settings.

    Args:
      name: of the command.
      settings: an instance of its dataclass.
    """
    parts = ["hypergrad", name]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata.get("positional"):
            parts.append(str(value))
        elif value != field.default:
            parts += [_flag(field.name)] if value is True else [_flag(field.name), str(value)]
    return " ".join(parts)


def check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of several.

    Args:
      flag: for the message.
      value: what follows it.
      choices: the words.
    """
    if value not in choices:
        raise RefusedError(f"{flag} {value}: {meant(value, choices)}")
