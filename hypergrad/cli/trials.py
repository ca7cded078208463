"""Plain training runs of a problem, to find a learning rate and to judge what was learned."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.errors import readable_errors
from hypergrad._base.tracing import trace_once
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.strategies import Stored
from hypergrad.cli.progress import Progress
from hypergrad.program import AnyOptimizer
from hypergrad.training.problem import Problem

RATES = tuple(float(f"{rate:.2g}") for rate in np.geomspace(1e-4, 10.0, 11))
BEST, AGAIN = 3, 2  # the best rates are tried with more seeds
# Keys of runs that nothing is learned from: meta-steps take their keys from small numbers.
_TRIAL, _JUDGE = 2**31, 2**31 + 1


class RunError(ArithmeticError):
    """A run cannot go on; the message says why and what to do."""


class Judged(NamedTuple):
    """What plain runs found.

    Attributes:
      scores: ``(n,)``, one for every seed.
      losses: ``(T,)``, those of the first seed.
    """

    scores: np.ndarray
    losses: np.ndarray


class Runs:
    """Training runs of a problem without derivatives, compiled once for each form of hyperparameters.

    Args:
      problem: the problem.
      optimizer: its optimizer.
      steps: of a run.
    """

    def __init__(self, problem: Problem, optimizer: AnyOptimizer, steps: int):
        self.problem, self.optimizer, self.steps = problem, optimizer, steps
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.seconds = 0.0  # of the last run, without compilation

    def __call__(self, hypers: Mapping[str, PyTree], key: Array) -> tuple[float, np.ndarray]:
        """The score of a run and its losses.

        Args:
          hypers: hyperparameters as `hypergrad.train` takes them.
          key: of the run.
        """
        hypers = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), dict(hypers))
        form = str(jax.tree.map(jnp.shape, hypers))
        if form not in self.compiled:
            self.compiled[form] = self._compiled(hypers, key)
        begun = time.monotonic()
        with readable_errors():
            score, losses = jax.device_get(self.compiled[form](hypers, key))
        self.seconds = time.monotonic() - begun
        return float(score), np.asarray(losses)

    def _compiled(self, hypers: Mapping[str, PyTree], key: Array) -> Callable[..., Any]:
        def run(hypers: Mapping[str, PyTree], key: Array) -> tuple[Array, Array]:
            # Floats may overflow here: a run that diverges only loses.
            trained = self.problem.train(
                hypers, key, steps=self.steps, optimizer=self.optimizer, adjoint=Stored()
            )
            return self.problem.score(trained), trained.losses

        with readable_errors():
            traced, _ = trace_once(run, hypers, key)
        function = jax.jit(lambda traced, *arguments: traced(*arguments))
        return partial(function.lower(traced, hypers, key).compile(), traced)


def best_rate(
    runs: Runs, hypers_at: Callable[[float], Mapping[str, PyTree]], key: Array, progress: Progress
) -> float:
    """The learning rate of `RATES` with the smallest score after a run.

    Args:
      runs: of the problem.
      hypers_at: from a learning rate to all hyperparameters.
      key: of the run.
      progress: where progress is shown.

    Raises:
      RunError: all of them diverge.
    """
    progress.begin(f"compiling a training run of {runs.steps} steps, to try {len(RATES)} learning rates")
    keys = jax.random.split(jax.random.fold_in(key, _TRIAL), AGAIN + 1 if runs.problem.random else 1)
    scores = {rate: [math.inf] for rate in RATES}
    for k, rate in enumerate(RATES):
        scores[rate] = [_finite(runs(hypers_at(rate), keys[0])[0])]
        left = (len(RATES) - k - 1 + BEST * AGAIN) * runs.seconds
        progress.reached(f"trying learning rates: {k + 1} of {len(RATES)}", left)
    best = sorted(RATES, key=lambda rate: scores[rate])[:BEST]
    for k in keys[1:]:  # one run may be lucky
        for rate in best:
            scores[rate].append(_finite(runs(hypers_at(rate), k)[0]))
    means = {rate: sum(scores[rate]) / len(scores[rate]) for rate in best}
    if not math.isfinite(min(means.values())):
        raise RunError(
            f"training gives no finite score with any of the learning rates {RATES[0]:g} to {RATES[-1]:g}: "
            "look for NaN in the data and in the loss, or give one with --start learning_rate=..."
        )
    return min(best, key=means.__getitem__)


def _finite(score: float) -> float:
    return score if math.isfinite(score) else math.inf


def judged(
    runs: Runs, hypers: Mapping[str, PyTree], key: Array, count: int, progress: Progress, what: str
) -> Judged:
    """Scores of runs from seeds that were not learned from.

    Args:
      runs: of the problem.
      hypers: all hyperparameters.
      key: of the command's run.
      count: number of seeds.
      progress: where progress is shown.
      what: is judged, in words.
    """
    progress.begin(f"judging {what}: {count} training run{'s' * (count > 1)}")
    keys = jax.random.split(jax.random.fold_in(key, _JUDGE), count)
    found = []
    for k in range(count):
        found.append(runs(hypers, keys[k]))
        progress.reached(f"judging {what}: run {k + 1} of {count}", (count - k - 1) * runs.seconds)
    return Judged(np.asarray([score for score, _ in found]), found[0][1])
