"""``hypergrad plan``: what memory and time the hypergradient of a problem takes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hypergrad.cli.problems import RATE, Prepared, Training, prepared
from hypergrad.cli.progress import Progress
from hypergrad.cli.refusals import RefusedError
from hypergrad.cli.runs import Job, Outcome
from hypergrad.cli.settings import option
from hypergrad.training.planner import plan

NAME = "plan"
UNITS = {"": 1, "B": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("KMGT", 1)
    for end, base in (("B", 1000), ("iB", 1024), ("", 1024))
}


@dataclass(frozen=True)
class PlanSettings(Training):
    """The settings of the command."""

    budget: str = option("8GiB", "memory for the hypergradient, such as 500MB or 8GiB")


def prepare(settings: PlanSettings) -> Job:
    """Check the settings.

    Args:
      settings: as the command line gives them.
    """
    budget = bytes_of(settings.budget)
    p = prepared(settings)
    name = f"{NAME}-{p.loaded.name}-{p.settings.optimizer}-{p.settings.steps}-steps"
    return Job(p.settings, p.digests, name, partial(_run, p, budget), p.loaded.path)


def bytes_of(given: str) -> float:
    """A number of bytes with a unit.

    Args:
      given: such as ``8GiB``, ``500 MB`` or ``1e9``.

    Raises:
      RefusedError: it is something else.

    >>> bytes_of("8GiB"), bytes_of("500 MB"), bytes_of("1e9")
    (8589934592.0, 500000000.0, 1000000000.0)
    """
    number = given.rstrip("BKMGTibkmgt ")
    unit = given[len(number) :].strip()
    units = {name.lower(): size for name, size in UNITS.items()}
    try:
        size = float(number) * units[unit.lower()]
    except (KeyError, ValueError):
        size = 0.0
    if not 0 < size < float("inf"):
        raise RefusedError(f"--budget {given}: it is not an amount of memory, such as 500MB or 8GiB")
    return size


def _run(p: Prepared, budget: float, folder: Path, progress: Progress) -> Outcome:
    steps = p.settings.steps
    hypers = {RATE: 1e-3, **p.given} if p.needs_rate else p.given  # its value changes no size
    progress.begin(f"compiling hypergradients of a few steps, to measure what {steps} take")
    found = plan(p.loaded.problem, hypers=hypers, steps=steps, optimizer=p.optimizer, budget=budget)
    lines = [
        *str(found).splitlines(),
        "memory comes on top of data and results; time is in plain training runs",
        f"in Python: adjoint=hypergrad.{found.adjoint}",
    ]
    sizes = np.asarray([each.memory for each in found.estimates])
    times = np.asarray([each.time for each in found.estimates])
    return Outcome({"memory": sizes, "time": times}, lines)
