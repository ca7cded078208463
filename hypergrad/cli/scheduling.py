"""``hypergrad learn-schedule``: a schedule for a problem, learned by hypergradients."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hypergrad._base.trees import PyTree
from hypergrad.cli.learning import Learning, Task, check_learning, learn
from hypergrad.cli.loading import DIGITS
from hypergrad.cli.problems import RATE, Prepared, learned_names, prepared
from hypergrad.cli.refusals import RefusedError
from hypergrad.cli.runs import Job
from hypergrad.cli.settings import option
from hypergrad.cli.shapes import BY, Shape, shape_of, spread

NAME = "learn-schedule"
# On the digits as in Maclaurin, Duvenaud and Adams, 2015.
ON_DIGITS = {"optimizer": "momentum", "by": "layer"}
ELSEWHERE = {"optimizer": "adam", "by": "all"}


@dataclass(frozen=True)
class LearnSchedule(Learning):
    """The settings of the command."""

    shape: str = option("per-step", "per-step, knots:K for lines between K knots, or warmup-cosine")
    by: str | None = option(
        None, "one schedule for all parameters, or for each layer or leaf (default all)", choices=BY
    )
    learn: str = option(RATE, "hyperparameters that get a schedule, separated by commas")


def prepare(settings: LearnSchedule) -> Job:
    """Check the settings.

    Args:
      settings: as the command line gives them.
    """
    check_learning(settings)
    defaults = ON_DIGITS if settings.problem == DIGITS else ELSEWHERE
    given: dict[str, Any] = {name: getattr(settings, name) or value for name, value in defaults.items()}
    settings = replace(settings, **given)
    p = prepared(settings)
    shape = shape_of(settings.shape, p.settings.steps)
    names = learned_names(settings.learn, p, [RATE])
    if settings.shape == "warmup-cosine" and names != [RATE]:
        raise RefusedError(
            f"--shape warmup-cosine --learn {settings.learn}: it is a shape for the learning rate only"
        )
    spread(str(settings.by), 0.0, p.params)  # refused before any work, if the parameters have no layers
    name = f"{NAME}-{p.loaded.name}-{p.settings.optimizer}-{p.settings.steps}-steps-{settings.shape}"
    name = name.replace(":", "-") + ("" if settings.by == "all" else f"-by-{settings.by}")
    task = Task(p, names, partial(_begin, p, shape, names))
    return Job(p.settings, p.digests, name, partial(learn, task), p.loaded.path)


def _begin(p: Prepared, shape: Shape, names: list[str], numbers: Mapping[str, float]) -> dict[str, PyTree]:
    """All hyperparameters; those in names as schedules that begin at their numbers."""
    learned = {name: spread(p.settings.by, shape.begin(numbers[name]), p.params) for name in names}
    return {**numbers, **learned}
