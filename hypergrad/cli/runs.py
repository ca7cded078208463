"""What all commands share: a run in a folder, from its configuration to its summary."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypergrad import files
from hypergrad._base.trees import PyTree
from hypergrad.cli.folders import CONFIG, RESULT, SUMMARY, Config, folder_for, read_config
from hypergrad.cli.progress import Progress


class Outcome(NamedTuple):
    """What a run found.

    Attributes:
      result: a tree of arrays, which a replay compares.
      lines: what the user is told.
      failed: whether the program ends with status 1.
    """

    result: PyTree
    lines: list[str]
    failed: bool = False


class Job(NamedTuple):
    """A run that has been prepared: its arguments are checked, and nothing has been computed.

    Attributes:
      settings: its settings, with everything filled in.
      digests: of its file and of its data.
      name: of its folder, by default.
      run: computes the outcome in a folder.
      source: the file that it depends on, of which the folder keeps a copy.
    """

    settings: Any
    digests: dict[str, str]
    name: str
    run: Callable[[Path, Progress], Outcome]
    source: Path | None = None


class Command(NamedTuple):
    """A command.

    Attributes:
      about: what it does, in a line.
      settings: the dataclass of its settings.
      prepare: checks them.
      file: name of the setting that holds the file that a run depends on.
    """

    about: str
    settings: type
    prepare: Callable[[Any], Job]
    file: str = "problem"


def carry_out(
    command: str, job: Job, out: str | None, progress: Progress, name: str = ""
) -> tuple[Path, Outcome]:
    """Do a job in its folder, or go on with it, or tell its outcome again if it is finished.

    Args:
      command: name of the command.
      job: what is to be done.
      out: the folder, if the user has named one.
      progress: where progress is shown.
      name: of the folder by default, in place of that of the job.
    """
    config = Config.of(command, job.settings, job.digests)
    folder = folder_for(config, name or job.name, out)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / "run", f"hypergrad {command} --out {folder}"):
        held = read_config(folder) if (folder / CONFIG).exists() else None
        summary = folder / SUMMARY
        if held is not None and summary.exists():
            progress.say(f"{folder} holds this run already, finished; delete the folder to run it again")
            tree, about = files.load(folder / RESULT)
            return folder, Outcome(tree, summary.read_text().splitlines(), about["failed"])
        if held is None:
            config.write(folder, job.settings)
        if job.source is not None:
            shutil.copyfile(job.source, folder / job.source.name)
        if held is not None:
            progress.say(f"going on with the run in {folder}")
        outcome = job.run(folder, progress)
        lines = [*outcome.lines, f"files: {folder} ({', '.join(_listed(folder))})"]
        files.save(folder / RESULT, outcome.result, failed=outcome.failed)
        files.replace_file(summary, ("\n".join(lines) + "\n").encode())
    return folder, outcome._replace(lines=lines)


def _listed(folder: Path) -> list[str]:
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return sorted(names | {RESULT, SUMMARY})
