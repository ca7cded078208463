"""Flags of the command line, made from the frozen dataclass that configures an experiment."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

C = TypeVar("C")
FLAGS = {
    "data_dir": "folder of the data sets, see docs/data.md (default $HYPERGRAD_DATA)",
    "checkpoint": "file to save progress to and resume from",
    "checkpoints": "folder to save progress to and resume from",
    "reference": "folder of the authors' results (default $HYPERGRAD_REFERENCE)",
}


class Run(argparse.Namespace):
    """What the command line says beside the configuration, as attributes: other flags by their names too.

    Attributes:
      fast: only see that it runs.
      output: folder for what is written, if anything is.
      error: ends the program with a message, as flags that cannot be read do.
    """

    fast: bool
    output: str | None
    error: Callable[[str], NoReturn]


def option(default: Any, about: str, **how: Any) -> Any:
    """A field of a configuration, with the help text of its flag and anything else for argparse.

    `flag` gives the flag another name than the field has.
    """
    return dataclasses.field(default=default, metadata={"help": about, **how})


def parse(
    name: str,
    about: str | None,
    config: C | Mapping[str, C],
    arguments: Sequence[str] | None,
    *,
    fast: Callable[[C], C],
    flags: Sequence[str] = (),
    output: str = "figures",
    **more: Mapping[str, Any],
) -> tuple[C, Run]:
    """The configuration that the command line asks for, and the options of the run.

    Every field of the configuration that is a number, a word, a truth value or a tuple of those has a flag.
    What is given there counts more than what `--fast` makes of the others.

    Args:
      name: of the experiment.
      about: the text before the flags.
      config: where flags begin, or one for every value of `--data`, the first of which is the default.
      arguments: of the command line; None stands for those of the program.
      fast: makes a configuration small.
      flags: further ones, of those in `FLAGS`.
      output: where `--output` points by default, but with `--fast`.
      more: flags of this experiment alone, by name: what argparse is to know of them.
    """
    presets: dict[Any, C] = dict(config) if isinstance(config, Mapping) else {None: config}
    first = next(iter(presets.values()))
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields = _fields(first)
    if len(presets) > 1:
        fields["data"][1]["choices"] = tuple(presets)
    for field, (flag, how) in fields.items():
        parser.add_argument(flag, dest=field, default=argparse.SUPPRESS, **how)
    for other, settings in {**{flag: {"help": FLAGS[flag]} for flag in flags}, **more}.items():
        parser.add_argument(f"--{other.replace('_', '-')}", **settings)
    parser.add_argument("--fast", action="store_true", help="small and short, to see that it runs")
    parser.add_argument("--output", help=f"folder to write to (default {output}, none with --fast)")
    run = parser.parse_args(arguments, Run())
    given = {k: tuple(x) if isinstance(x, list) else x for k, x in vars(run).items() if k in fields}
    chosen = presets.get(given.get("data"), first)
    chosen = fast(chosen) if run.fast else chosen
    run.output = run.output or (None if run.fast else output)
    run.error = parser.error
    return (dataclasses.replace(chosen, **given) if given else chosen), run  # type: ignore[type-var]


def _fields(config: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """The flag of every field that can have one, and what argparse is to know of it."""
    hints, found = typing.get_type_hints(type(config)), {}
    for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        how = _kind(hints[field.name]) | dict(field.metadata)
        if {"type", "action"} & how.keys():
            how["help"] = _help(how.get("help", ""), getattr(config, field.name))
            found[field.name] = f"--{how.pop('flag', field.name)}".replace("_", "-"), how
    return found


def _kind(hint: Any) -> dict[str, Any]:
    """What argparse is to know of a type; nothing for a type of which there is no flag."""
    if isinstance(hint, types.UnionType):
        hint = next(x for x in typing.get_args(hint) if x is not types.NoneType)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    inside = typing.get_args(hint) if typing.get_origin(hint) is tuple else (hint,)
    if inside[0] not in (int, float, str):
        return {}
    length = {} if hint is inside[0] else {"nargs": "+" if inside[-1] is ... else len(inside)}
    return {"type": inside[0]} | length


def _help(about: str, default: Any) -> str:
    """The help text of a flag with its default, unless it has that already."""
    words = " ".join(map(str, default)) if isinstance(default, tuple) else default
    told = "default" in about or default is None
    return (about if told else f"{about} (default {words})").strip().replace("%", "%%")
