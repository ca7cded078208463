"""The settings that commands about training problems share, checked and completed."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from hypergrad._base.checks import is_function
from hypergrad._base.errors import readable_errors
from hypergrad._base.fingerprint import digest
from hypergrad._base.modules import opened
from hypergrad._base.tracing import closure_convert
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.strategies import Stored
from hypergrad.cli.digits import digits_problem
from hypergrad.cli.loading import Loaded, file_digest, load_problem
from hypergrad.cli.optimizers import checked_inside, checked_names, is_inside, optimizer_by_name
from hypergrad.cli.progress import Progress
from hypergrad.cli.refusals import RefusedError
from hypergrad.cli.settings import assignments, check_least, option, words
from hypergrad.cli.trials import RATES, Runs, best_rate
from hypergrad.program import AnyOptimizer
from hypergrad.training.problem import Problem

STEPS = 100
RATE = "learning_rate"


@dataclass(frozen=True)
class Training:
    """What is trained, and how; see `--help`."""

    problem: str = option(
        "digits",
        "Python file that defines a hypergrad.Problem, as problem.py or problem.py:name",
        positional=True,
    )
    optimizer: str | None = option(None, "name of an optimizer, as in hypergrad (default adam)")
    steps: int | None = option(
        None, f"of one training run (default {STEPS}, or as many as the problem has batches)"
    )
    start: str = option(
        "",
        "initial hyperparameters, such as learning_rate=0.1,weight_decay=1e-3; the others begin at the "
        f"optimizer's defaults, and a learning rate without one at the best of {len(RATES)}",
    )
    seed: int = option(0, "of the initial parameters and batches")


class Prepared(NamedTuple):
    """A training problem with its optimizer, checked.

    Attributes:
      loaded: the problem and where it is from.
      optimizer: the optimizer.
      settings: with all settings filled in.
      given: initial hyperparameters by name: those of the user, and the optimizer's defaults.
      params: those of the first run that are trained; None in the places of what is static in a module.
      digests: of file and data.
    """

    loaded: Loaded
    optimizer: AnyOptimizer
    settings: Any
    given: dict[str, float]
    params: PyTree
    digests: dict[str, str]

    @property
    def needs_rate(self) -> bool:
        """Whether the learning rate is to be found by trial."""
        return RATE in self.optimizer.hypers and RATE not in self.given

    @property
    def key(self) -> jax.Array:
        """PRNG key of the run."""
        return jax.random.key(self.settings.seed)


def prepared(settings: Any) -> Prepared:
    """Check the settings of a command about a training problem, and fill in what is left out.

    Args:
      settings: an instance of `Training`.

    Raises:
      RefusedError: they do not fit each other, or the problem.
    """
    settings = replace(settings, optimizer=settings.optimizer or "adam")
    optimizer = optimizer_by_name(settings.optimizer)
    given = assignments("--start", settings.start)
    checked_names("--start", given, optimizer)
    check_least("--steps", settings.steps, 1)
    loaded = load_problem(settings.problem, digits_problem)
    settings = replace(settings, steps=_steps(loaded, settings.steps))
    defaults = {name: x for name, x in optimizer.hypers.items() if x is not None}
    start, _ = loaded.problem.start(jax.random.key(settings.seed))
    params = opened(f"hypergrad {settings.problem}", start).params
    file = {} if loaded.path is None else {"file": file_digest(loaded.path)}
    digests = file | {"data": _data_digest(loaded.problem, optimizer, settings.steps)}
    return Prepared(loaded, optimizer, settings, {**defaults, **given}, params, digests)


def _data_digest(problem: Problem, optimizer: AnyOptimizer, steps: int) -> str:
    """A digest of the arrays that a run depends on, also of those that the user's functions close over."""

    def run(key: jax.Array) -> jax.Array:
        missing = {name: 1.0 for name, value in optimizer.hypers.items() if value is None}
        trained = problem.train(missing, key, steps=steps, optimizer=optimizer, adjoint=Stored())
        return problem.score(trained)

    with readable_errors():
        _, arrays, _ = closure_convert(run, jax.random.key(0))
    return digest(arrays)


def _steps(loaded: Loaded, steps: int | None) -> int:
    """The number of steps, which batches that are arrays decide."""
    batches = loaded.problem.batches
    if batches is None or is_function(batches):
        return STEPS if steps is None else steps
    held = {np.shape(x)[:1] for x in jax.tree.leaves(batches)}
    if len(held) != 1 or held == {()}:
        raise RefusedError(
            f"{loaded.path}: the batches of the problem must be arrays with the step as leading axis, all "
            "of one length"
        )
    ((count,),) = held
    if steps not in (None, count):
        raise RefusedError(
            f"--steps {steps}: the problem has batches for {count} steps; leave it out, or make batches a "
            "function batches(key, steps)"
        )
    return int(count)


def learned_names(flag_value: str, p: Prepared, default: list[str]) -> list[str]:
    """The names that ``--learn`` gives.

    Args:
      flag_value: what follows the flag.
      p: the problem.
      default: the names without the flag.
    """
    names = words(flag_value) or default
    checked_names("--learn", names, p.optimizer)
    checked_inside("--learn", {name: p.given[name] for name in names if name in p.given}, p.optimizer)
    return names


def learnable_names(p: Prepared) -> list[str]:
    """The hyperparameters that begin inside their domains, and so can be learned.

    Args:
      p: the problem.
    """
    return [
        name
        for name in p.optimizer.hypers
        if name not in p.given or is_inside(p.given[name], name, p.optimizer)
    ]


def completed(
    p: Prepared, runs: Runs, start_at: Any, progress: Progress
) -> tuple[dict[str, float], list[str]]:
    """The initial hyperparameters with a learning rate found by trial, if there is none; and what was done.

    Args:
      p: the problem.
      runs: its training runs.
      start_at: from all hyperparameters to those of a run.
      progress: where progress is shown.
    """
    if not p.needs_rate:
        return dict(p.given), []
    rate = best_rate(runs, lambda rate: start_at({**p.given, RATE: rate}), p.key, progress)
    return {**p.given, RATE: rate}, [f"{RATE} begins at {rate:.3g}, the best of {len(RATES)} tried"]
