"""A run that learns hyperparameters: the start, the meta-steps, and what came out of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from hypergrad import schedules
from hypergrad._base.trees import PyTree
from hypergrad.cli.figures import draw
from hypergrad.cli.folders import HISTORY, Journal
from hypergrad.cli.pasting import write_pastes
from hypergrad.cli.problems import Prepared, Training, completed
from hypergrad.cli.progress import Progress
from hypergrad.cli.runs import Outcome
from hypergrad.cli.settings import check_least, option
from hypergrad.cli.trials import Judged, Runs, draws, judged
from hypergrad.cli.wording import changes, moving, scores, summary_of
from hypergrad.meta.tuning import Tuned, tune

CHECKPOINT = "checkpoint.npz"


@dataclass(frozen=True)
class Learning(Training):
    """The settings of commands that learn hyperparameters."""

    meta_steps: int = option(50, "steps of the learning, each of which takes about four training runs")
    meta_rate: float = option(
        0.1, "learning rate of Adam, which makes the meta-steps in logarithms and logits"
    )
    seeds: int = option(1, "training runs that each meta-step averages over")
    judge: int = option(5, "training runs, with new seeds, that judge what was learned")


class Task(NamedTuple):
    """What is learned.

    Attributes:
      prepared: the problem.
      names: of the hyperparameters to learn.
      begin: from initial numbers by name to all hyperparameters, with schedules where those are learned.
    """

    prepared: Prepared
    names: list[str]
    begin: Callable[[Mapping[str, float]], dict[str, PyTree]]


def check_learning(settings: Learning) -> None:
    """Refuse numbers that are out of range.

    Args:
      settings: as the command line gives them.
    """
    for flag, value in (
        ("--meta-steps", settings.meta_steps),
        ("--seeds", settings.seeds),
        ("--judge", settings.judge),
    ):
        check_least(flag, value, 1)
    check_least("--meta-rate", settings.meta_rate, 0, above=True)


def learn(task: Task, folder: Path, progress: Progress) -> Outcome:
    """Learn, judge, draw and tell.

    Args:
      task: what is learned.
      folder: of the run.
      progress: where progress is shown.
    """
    p = task.prepared
    settings, problem = p.settings, p.loaded.problem
    runs = Runs(problem, p.optimizer, settings.steps)

    def values(hypers: Mapping[str, PyTree]) -> Any:
        return schedules.values(dict(hypers), settings.steps)

    numbers, told = completed(p, runs, lambda numbers: values(task.begin(numbers)), progress)
    start = task.begin(numbers)
    count = settings.judge if draws(problem) else 1
    before = judged(runs, values(start), p.key, count, progress, "the start")
    journal = Journal(folder / HISTORY)
    tuned = _tuned(task, start, folder / CHECKPOINT, journal, runs.seconds, progress)
    after = judged(runs, values(tuned.hypers), p.key, count, progress, "what was learned")
    first, last = ({name: hypers[name] for name in task.names} for hypers in (start, tuned.hypers))
    return Outcome(
        _result(last, tuned, before, after),
        [
            *told,
            *changes(first, last),
            *scores(before, after),
            *(
                [f"stopped early: {tuned.stopped}"]
                if tuned.stopped
                else moving(journal.rows, settings.meta_steps)
            ),
            *draw(folder, first, last, journal.rows, before, after),
            *write_pastes(folder, p.optimizer, tuned.hypers, settings.steps, p.params),
        ],
    )


def _tuned(
    task: Task,
    start: Mapping[str, PyTree],
    checkpoint: Path,
    journal: Journal,
    seconds: float,
    progress: Progress,
) -> Tuned:
    """Follow the hypergradients, with a line in the journal for every meta-step."""
    p = task.prepared
    settings = p.settings
    progress.begin(f"compiling the hypergradient through {settings.steps} training steps")
    tuned = tune(
        p.loaded.problem,
        hypers=start,
        steps=settings.steps,
        optimizer=p.optimizer,
        learn=task.names,
        meta_steps=settings.meta_steps,
        meta_optimizer=optax.adam(settings.meta_rate),
        key=p.key,
        seeds=settings.seeds,
        checkpoint=checkpoint,
        progress=False,
    )
    for k, (loss, norm) in enumerate(zip(tuned.history.loss, tuned.history.gradient_norm)):
        journal.add(
            {
                "step": k,
                "loss": float(loss),
                "gradient_norm": float(norm),
                "hypers": {n: summary_of(tuned.hypers[n]) for n in task.names},
            }
        )
    return tuned


def _result(
    learned: Mapping[str, PyTree], tuned: Tuned, before: Judged, after: Judged
) -> dict[str, PyTree]:
    """What is saved and compared: the learned hyperparameters as they are used, the history and the scores."""
    return {
        "learned": jax.tree.map(lambda x: x, dict(learned)),
        "history": {"loss": tuned.history.loss, "gradient_norm": tuned.history.gradient_norm},
        "scores": {"before": before.scores, "after": after.scores},
        "losses": {"before": before.losses, "after": after.losses},
    }
