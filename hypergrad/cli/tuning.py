"""``hypergrad tune``: the hyperparameters of an optimizer for a problem, learned by hypergradients."""

from dataclasses import dataclass
from functools import partial

from hypergrad.cli.learning import Learning, Task, check_learning, learn
from hypergrad.cli.problems import learnable_names, learned_names, prepared
from hypergrad.cli.runs import Job
from hypergrad.cli.settings import option

NAME = "tune"


@dataclass(frozen=True)
class Tune(Learning):
    """The settings of the command."""

    trials: int = option(16, "training runs that look for a better start of all that is learned")
    learn: str = option(
        "", "hyperparameters to learn, separated by commas (default all that begin inside their domains)"
    )


def prepare(settings: Tune) -> Job:
    """Check the settings.

    Args:
      settings: as the command line gives them.
    """
    check_learning(settings)
    p = prepared(settings)
    names = learned_names(settings.learn, p, learnable_names(p))
    name = f"{NAME}-{p.loaded.name}-{p.settings.optimizer}-{p.settings.steps}-steps"
    return Job(p.settings, p.digests, name, partial(learn, Task(p, names, dict)), p.loaded.path)
