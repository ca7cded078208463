"""``hypergrad check``: whether the hypergradient of a problem can be trusted."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.checks import is_function
from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.strategies import Checkpointed
from hypergrad.check.inspection import check_hypergradient
from hypergrad.check.report import Report
from hypergrad.cli.problems import RATE, Prepared, Training, completed, learned_names, prepared
from hypergrad.cli.progress import Progress
from hypergrad.cli.runs import Job, Outcome
from hypergrad.cli.settings import check_least, option
from hypergrad.cli.trials import Runs

NAME = "check"
LENGTHS = (4, 2, 1)  # chaos is looked for over the whole run, half of it, and a quarter


@dataclass(frozen=True)
class Check(Training):
    """The settings of the command."""

    learn: str = option(RATE, "hyperparameters to check the hypergradient in, separated by commas")
    directions: int = option(3, "random directions for each of them")


def prepare(settings: Check) -> Job:
    """Check the settings.

    Args:
      settings: as the command line gives them.
    """
    check_least("--directions", settings.directions, 1)
    p = prepared(settings)
    names = learned_names(settings.learn, p, [RATE])
    name = f"{NAME}-{p.loaded.name}-{p.settings.optimizer}-{p.settings.steps}-steps"
    return Job(p.settings, p.digests, name, partial(_run, p, names), p.loaded.path)


def _run(p: Prepared, names: list[str], folder: Path, progress: Progress) -> Outcome:
    problem, steps = p.loaded.problem, p.settings.steps
    runs = Runs(problem, p.optimizer, steps)
    start, lines = completed(p, runs, lambda hypers: hypers, progress)
    adjoint = Reversible() if p.optimizer.reversible else Checkpointed()

    def objective(learned: Mapping[str, Array], length: int = steps) -> Array:
        hypers = {**start, **learned}
        trained = problem.train(hypers, p.key, steps=length, optimizer=p.optimizer, adjoint=adjoint)
        return problem.score(trained)

    lengths = sorted({max(1, steps // part) for part in LENGTHS})
    any_length = problem.batches is None or is_function(problem.batches)
    progress.begin(f"checking the hypergradient through {steps} steps")
    report = check_hypergradient(
        objective,
        {name: jnp.asarray(start[name], jnp.result_type(float)) for name in names},
        steps=lengths if any_length and len(lengths) == len(LENGTHS) else None,
        directions=p.settings.directions,
        key=p.key,
        quiet=True,
    )
    told = [*lines, *str(report).splitlines()]
    return Outcome({"start": start, "numbers": _numbers(report)}, told, failed=not report.trusted)


def _numbers(report: Report) -> dict[str, np.ndarray]:
    """What was measured, as far as it is numbers, by name."""
    found = {finding.name: dict(finding.numbers) for finding in report[1:]}
    named = {jax.tree_util.keystr(path, simple=True): x for path, x in jax.tree.leaves_with_path(found)}
    return {name: np.asarray(x, float) for name, x in named.items() if isinstance(x, float | int)}
