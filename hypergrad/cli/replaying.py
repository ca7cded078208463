"""``hypergrad replay``: a run again, from its configuration, and whether the numbers are the same."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hypergrad import files
from hypergrad.cli.folders import CONFIG, RESULT, Config, read_config, same_arrays
from hypergrad.cli.loading import file_digest, split_name
from hypergrad.cli.progress import Progress
from hypergrad.cli.refusals import RefusedError, meant
from hypergrad.cli.runs import Command, Outcome, carry_out
from hypergrad.cli.settings import option, settings_of

NAME = "replay"
WAY_OUT = "or give --anyway to replay with what is there now"


@dataclass(frozen=True)
class Replay:
    """The settings of the command."""

    config: str = option(dataclasses.MISSING, f"the {CONFIG} of a run, or its folder", positional=True)
    anyway: bool = option(False, "also if the problem or its data have changed")


def replay(
    settings: Replay, commands: Mapping[str, Command], out: str | None, progress: Progress
) -> Outcome:
    """Make a run again in another folder, and compare.

    Args:
      settings: as the command line gives them.
      commands: by name.
      out: the folder, if the user has named one.
      progress: where progress is shown.

    Raises:
      RefusedError: the run is not finished, or its problem or data have changed.
    """
    given = Path(settings.config)
    folder = (given if given.is_dir() else given.parent).resolve()
    config = read_config(given)
    if not (folder / RESULT).exists():
        raise RefusedError(
            f"{given}: the run is not finished, so there are no numbers to compare with; the command in "
            f"this file, with --out {folder}, goes on with it"
        )
    if config.command not in commands:
        raise RefusedError(
            f"{given}: there is no command {config.command!r}; {meant(config.command, commands)}"
        )
    command = commands[config.command]
    values = config.settings | {command.file: source(folder, config, command.file, settings.anyway)}
    job = command.prepare(settings_of(command.settings, values))
    if not settings.anyway and job.digests != config.digests:
        raise RefusedError(
            f"{given}: the data of {values[command.file]} are not those of this run (digest "
            f"{config.digests.get('data')} then, {job.digests['data']} now); put them back, {WAY_OUT}"
        )
    there, outcome = carry_out(config.command, job, out, progress, name=f"{folder.name}-replay")
    return _compared(folder, there, config, read_config(there), outcome)


def source(folder: Path, config: Config, field: str, anyway: bool) -> str:
    """The file that a run depends on: where it was, or the copy in the folder of the run if it is gone.

    Args:
      folder: of the run.
      config: of the run.
      field: name of the setting that holds the file.
      anyway: whether it may have changed.

    Raises:
      RefusedError: it has changed, or there is none.
    """
    given = str(config.settings.get(field, ""))
    if "file" not in config.digests:
        return given
    file, name = split_name(given)
    there, copy = Path(config.directory) / file, folder / Path(file).name
    path = there if there.exists() else copy
    if not path.exists():
        raise RefusedError(
            f"{there}: it is not there any more, nor is its copy {copy}; put one of them back"
        )
    if not anyway and file_digest(path) != config.digests["file"]:
        kept = "" if path == copy else f" (the folder of the run has a copy of then, {copy})"
        raise RefusedError(f"{path} has changed since this run; put it back as it was{kept}, {WAY_OUT}")
    return f"{path}:{name}" if name else str(path)


def _compared(folder: Path, there: Path, old: Config, new: Config, outcome: Outcome) -> Outcome:
    """The outcome of a replay, with what it says about the numbers of the run."""
    first, _ = files.load(folder / RESULT)
    second, _ = files.load(there / RESULT)
    differences = same_arrays(first, second)
    if not differences:
        told = [f"the same numbers as in {folder}, bit for bit"]
    else:
        told = [f"NOT the same numbers as in {folder}: {differences}"]
        changed = [
            f"{name} {old.versions.get(name)} then, {version} now"
            for name, version in new.versions.items()
            if old.versions.get(name) != version
        ]
        told += [f"perhaps because of other versions: {', '.join(changed)}"] if changed else []
    return outcome._replace(lines=[*outcome.lines, *told], failed=bool(differences))
