"""A run that learns hyperparameters: the start, the meta-steps, and what came out of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hypergrad import schedules
from hypergrad._base.trees import PyTree
from hypergrad.cli.figures import draw
from hypergrad.cli.folders import CHECKPOINT, HISTORY, Journal
from hypergrad.cli.pasting import write_pastes
from hypergrad.cli.problems import Prepared, Training, completed
from hypergrad.cli.progress import Progress
from hypergrad.cli.runs import Outcome
from hypergrad.cli.settings import check_least, option
from hypergrad.cli.trials import Judged, Runs, judged
from hypergrad.cli.wording import parts_of, scores, summary_of
from hypergrad.meta.adaptive_rates import delta_bar_delta
from hypergrad.meta.runs import MetaStep
from hypergrad.meta.tuned import Tuned
from hypergrad.meta.tuning import tune

TIME = 4.0  # of a hypergradient, in plain training runs


@dataclass(frozen=True)
class Learning(Training):
    """The settings of commands that learn hyperparameters."""

    meta_steps: int = option(50, "steps of the learning, each of about four training runs")
    meta_rate: float = option(0.1, "length of the first of them; 0.1 changes a number by a tenth")
    seeds: int = option(1, "training runs that each of them averages over")
    judge: int = option(5, "training runs, with new seeds, that judge what was learned")
    trials: int = option(0, "training runs that look for a better start of all that is learned")


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
    check_least("--meta-steps", settings.meta_steps, 1)
    check_least("--meta-rate", settings.meta_rate, 0, above=True)
    check_least("--seeds", settings.seeds, 1)
    check_least("--judge", settings.judge, 1)
    check_least("--trials", settings.trials, 0)


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

    def values(hypers: Mapping[str, PyTree]) -> dict[str, PyTree]:
        return schedules.values(dict(hypers), settings.steps)

    numbers, told = completed(p, runs, lambda numbers: values(task.begin(numbers)), progress)
    start = task.begin(numbers)
    count = settings.judge if problem.random else 1
    before = judged(runs, values(start), p.key, count, progress, "the start")
    journal = Journal(folder / HISTORY)
    tuned = _tuned(task, start, folder / CHECKPOINT, journal, runs.seconds, progress)
    after = judged(runs, values(tuned.hypers), p.key, count, progress, "what was learned")
    lines = [
        *told,
        *str(tuned).splitlines(),
        *scores(before, after),
        *draw(folder, tuned, task.names, journal.rows, before, after),
        *write_pastes(folder, p.optimizer, tuned.hypers, settings.steps, p.params),
    ]
    last = {name: tuned.hypers[name] for name in task.names}
    return Outcome(_result(last, tuned, before, after), lines)


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
    total, trials = settings.meta_steps, settings.trials
    before = f"{trials} trials, then " if trials else ""
    progress.begin(
        f"{before}compiling the hypergradient through {settings.steps} training steps, and meta-step 1 of "
        f"{total}",
        (trials + TIME * total) * seconds,
    )

    def told(step: MetaStep) -> None:
        hypers = {name: summary_of(x) for name, x in step.hypers.items()}
        note(step, total, journal, progress, hypers=hypers)

    tuned = tune(
        p.loaded.problem,
        hypers=start,
        steps=settings.steps,
        optimizer=p.optimizer,
        learn=task.names,
        meta_steps=total,
        meta_optimizer=delta_bar_delta(settings.meta_rate),
        trials=trials,
        key=p.key,
        seeds=settings.seeds,
        checkpoint=checkpoint,
        progress=False,
        callback=told,
    )
    journal.complete(zip(tuned.history.loss, tuned.history.gradient_norm))
    return tuned


def note(step: MetaStep, total: int, journal: Journal, progress: Progress, **more: Any) -> None:
    """Write a meta-step down, and show how far they are.

    Args:
      step: as a callback is given it.
      total: number of meta-steps.
      journal: of the run.
      progress: where progress is shown.
      more: for the journal.
    """
    journal.add({"step": step.iteration, "loss": step.loss, "gradient_norm": step.gradient_norm} | more)
    made = step.iteration + 1
    progress.reached(f"meta-step {made} of {total}, loss {step.loss:.4g}", (total - made) * step.seconds)


def _result(
    learned: Mapping[str, PyTree], tuned: Tuned, before: Judged, after: Judged
) -> dict[str, PyTree]:
    """What is saved and compared."""
    return {
        "learned": parts_of(learned),
        "history": {"loss": tuned.history.loss, "gradient_norm": tuned.history.gradient_norm},
        "scores": {"before": before.scores, "after": after.scores},
        "losses": {"before": before.losses, "after": after.losses},
    }
