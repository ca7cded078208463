"""The command ``hypergrad``: its arguments, its errors and its exit status."""

import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax

from hypergrad.cli import checking, distilling, planning, replaying, scheduling, tuning
from hypergrad.cli.loading import told
from hypergrad.cli.progress import Progress
from hypergrad.cli.refusals import RefusedError
from hypergrad.cli.replaying import Replay, replay
from hypergrad.cli.runs import Command, carry_out
from hypergrad.cli.settings import Parser, add_flags

COMMANDS = {
    scheduling.NAME: Command(
        "learn a schedule of the learning rate, or of other hyperparameters, for a problem",
        scheduling.LearnSchedule,
        scheduling.prepare,
    ),
    tuning.NAME: Command(
        "learn the hyperparameters of an optimizer for a problem", tuning.Tune, tuning.prepare
    ),
    distilling.NAME: Command(
        "learn a few examples that train a network as a whole data set does",
        distilling.Distill,
        distilling.prepare,
        file="data",
    ),
    checking.NAME: Command(
        "check the hypergradient of a problem: finite differences, recovery, chaos, smoothness, precision",
        checking.Check,
        checking.prepare,
    ),
    planning.NAME: Command(
        "predict memory and time of every way to differentiate a problem",
        planning.PlanSettings,
        planning.prepare,
    ),
}
# A run that was well-formed, and failed; everything else can be put right by the user.
FAILURES = (ArithmeticError, MemoryError, jax.errors.JaxRuntimeError, OSError)
REFUSALS = (BlockingIOError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      arguments: the words after ``hypergrad``; by default those of this process.

    Returns:
      The exit status: 0, 1 for a run that failed, 2 for what the user can put right, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    called = " ".join(["hypergrad", *arguments[:1]])
    try:
        return _carried_out(arguments)
    except KeyboardInterrupt as error:
        if "--traceback" in arguments:
            raise
        _complain(called, str(error) or "interrupted; the same command goes on from where it was")
        return 130
    except Exception as error:
        if "--traceback" in arguments:
            raise
        more = "" if isinstance(error, RefusedError) else "; --traceback shows where"
        _complain(called, told(error) + more)
        return 1 if isinstance(error, FAILURES) and not isinstance(error, REFUSALS) else 2


def _complain(called: str, message: str) -> None:
    """Write an error in one line."""
    print(f"{called}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="hypergrad",
        description="Hypergradients for your own problem. Every run is a folder; killed at any moment, the "
        "same command goes on to the same numbers.",
    )
    parser.add_argument("--version", action="version", version=f"hypergrad {version('hypergrad-jax')}")
    kinds = parser.add_subparsers(dest="command", metavar="command", required=True)
    about = {name: (command.about, command.settings) for name, command in COMMANDS.items()}
    about[replaying.NAME] = ("run again from a configuration, and compare the numbers", Replay)
    for name, (words, settings) in about.items():
        sub = kinds.add_parser(name, help=words, description=f"{words[:1].upper()}{words[1:]}.")
        add_flags(sub, settings)
        sub.add_argument("--out", help="folder of the run (default a readable name in this folder)")
        sub.add_argument("--quiet", action="store_true", help="show no progress")
        sub.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


def _carried_out(arguments: list[str]) -> int:
    try:
        given = vars(_parser().parse_args(arguments))
    except SystemExit as end:  # after --help and --version
        return int(end.code or 0)
    name, out, quiet, _ = (given.pop(key) for key in ("command", "out", "quiet", "traceback"))
    with Progress(quiet=quiet) as progress, warnings.catch_warnings():
        _warn_by(progress)
        if name == replaying.NAME:
            outcome = replay(Replay(**given), COMMANDS, out, progress)
        else:
            command = COMMANDS[name]
            progress.begin(f"reading {given[command.file]}")
            job = command.prepare(command.settings(**given))
            _, outcome = carry_out(name, job, out, progress)
    print("\n".join(outcome.lines), flush=True)
    return int(outcome.failed)


def _warn_by(progress: Progress) -> None:
    """Show warnings as lines, until they are caught otherwise."""

    def show(message: Any, *place: Any) -> None:
        progress.say(f"warning: {' '.join(str(message).split())}")

    warnings.showwarning = show  # type: ignore[assignment]
