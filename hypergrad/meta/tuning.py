"""Meta-tuning: the hyperparameters of an optimizer, learned by hypergradients on a user's own loss."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from hypergrad import files
from hypergrad._base.checks import check_callable, check_whole, checked_steps, is_function
from hypergrad._base.errors import DomainError, readable_errors
from hypergrad._base.notebook import short_traceback
from hypergrad._base.progress import Progress
from hypergrad._base.tracing import trace_once
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.strategies import Adjoint, Checkpointed
from hypergrad.constraints import constrain, is_constraint
from hypergrad.meta.adaptive_rates import delta_bar_delta
from hypergrad.meta.lbfgsb import LBFGSB
from hypergrad.meta.outer_loop import check_settings, minimize
from hypergrad.meta.ranges import SMALLEST_FACTOR, entered, limits_of, lowest, shifted
from hypergrad.meta.runs import Callback, Judge, Optimized, Settings
from hypergrad.meta.trials import Shifts, pattern_search, race, rounds_of
from hypergrad.meta.tuned import Tuned, advice_on, chaos_in, mean_values, still_moving
from hypergrad.optimizers.adam_family import adam
from hypergrad.optimizers.domains import is_rate
from hypergrad.program import AnyOptimizer, with_defaults
from hypergrad.schedules import is_schedule
from hypergrad.training.arguments import checked_call
from hypergrad.training.problem import Problem, refuse_beside

HELD_KEYS = 6  # by which scores are compared, if starts or batches are drawn at random
LOOKS = 8  # how often scores are computed then
RETRIES = 4
FEW = 8  # numbers; so many constants are searched for everywhere, if runs are random
FEWEST = 4  # trials with which that is worth while


@short_traceback
def tune(
    loss: Problem | Callable[[PyTree, PyTree, PyTree], Array],
    params: PyTree = None,
    hypers: Mapping[str, PyTree] | None = None,
    meta: PyTree = None,
    batches: PyTree = None,
    *,
    steps: int,
    optimizer: AnyOptimizer | None = None,
    validation: Callable[[PyTree], Array] | None = None,
    learn: Sequence[str] | None = None,
    meta_steps: int = 50,
    meta_optimizer: optax.GradientTransformation | LBFGSB | None = None,
    trials: int = 16,
    adjoint: Adjoint | None = None,
    key: Array | None = None,
    seeds: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> Tuned:
    """Tune an optimizer's hyperparameters by hypergradients through whole training runs.

    ``minimize validation(train(loss, params, hypers)) over hypers``, in coordinates without bounds: the
    logarithm of what is positive, the logit of what is between 0 and 1.  Trial runs look for a better
    start, by shifts of these coordinates; hypergradients are followed from the best, and what is returned
    are the best values on the way.  The score that decides is the validation: of the same keys every time
    if `params` or `batches` are drawn from keys.

    A hyperparameter that does not affect the validation, or only through a function of slope 0 (``b1`` in
    ``optax.lion``, which is inside a sign), cannot be learned in this way; the first meta-step warns about
    it.

    Args:
      loss: ``loss(params, meta, batch) -> scalar``, as for `hypergrad.train`; or a `hypergrad.Problem`,
        which has ``params``, ``meta``, ``batches`` and ``validation`` too.
      params: start, or a function from a key to a start.
      hypers: initial values, by name; numbers, ``(T, ...)`` arrays, schedules or trees of them, each of
        which is learned in the form given.  A schedule of `hypergrad.schedules` is learned in all its
        parameters: values inside the domain, lengths between 0 and ``2 T``; those that begin at an end,
        such as a final value of 0, are held.  A function of the step, such as an optax schedule, shows no
        parameters and is learned at every step, as a `hypergrad.schedules.PerStep` that begins at its
        values (a thousandth of the largest in place of 0).  The others begin at the optimizer's defaults.
      meta: passed to the loss, not learned.
      batches: batches by step, as for `hypergrad.train`, or a function from a key to them.
      steps: ``T``, the number of steps of each training run.
      optimizer: the optimizer to tune, by default `hypergrad.adam`.
      validation: ``validation(params) -> scalar``, minimized after training; by default the mean of the
        training losses of the last tenth of the run.
      learn: names of the hyperparameters to learn; by default all that begin inside their domain, which a
        weight decay of 0 does not.
      meta_steps: number of meta-iterations.
      meta_optimizer: as the ``optimizer`` of `hypergrad.meta.optimize`; by default
        `hypergrad.meta.delta_bar_delta`, which adapts a rate for every coordinate.  A meta-step after which
        a run fails is halved up to four times.
      trials: how many scores, each of runs without a hypergradient, look for a better start, one name
        after the other; 0 begins at `hypers`.  Up to 8 constants of random runs race in as many runs: the
        better of many places are run with more keys.
      adjoint: how to differentiate, by default `Reversible` if that is possible, otherwise `Checkpointed`.
      key: PRNG key; by default ``jax.random.key(0)``.
      seeds: how many runs, each with its own key, a meta-step averages over.
      checkpoint: file to resume from and to write during the run.
      progress: show on stderr what is compiled, and progress bars.
      callback: ``callback(step)``, called after every meta-step; see `hypergrad.meta.optimize`.

    Returns:
      A `Tuned`; ``tuned.optax()`` is an optax optimizer.  A `hypergrad.implicit.ZeroHypergradientWarning`
      names the hyperparameters in which the first hypergradient is exactly 0.

    Raises:
      ValueError: a name is not one of the optimizer's hyperparameters, or has no domain; or a start is
        outside its domain.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> narrow = lambda w, meta, step: jnp.sum(jnp.array([0.05, 1.0]) * w**2)
    >>> tuned = hg.tune(narrow, jnp.ones(2), {"learning_rate": 1e-3}, steps=30, progress=False)
    >>> optimizer = tuned.optax()
    >>> bool(tuned.score < 1e-3 * tuned.trials[0])
    True
    """
    optimizer = adam() if optimizer is None else optimizer
    call = checked_call("tune", steps, optimizer, adjoint)
    steps = checked_steps(call, steps)
    check_whole(call, "trials", trials, 0, None)
    problem = _problem(call, loss, params, meta, batches, validation)
    hypers = {} if hypers is None else hypers
    settings = Settings(
        optimizer=delta_bar_delta() if meta_optimizer is None else meta_optimizer,
        steps=meta_steps,
        key=jax.random.key(0) if key is None else key,
        seeds=seeds,
        has_aux=True,
        checkpoint=checkpoint,
        retries=0 if isinstance(meta_optimizer, LBFGSB) else RETRIES,
        callback=callback,
    )
    check_settings(settings)
    given = with_defaults(call, optimizer, hypers)
    start = {name: entered(value, steps) for name, value in given.items()}
    inside = {name: _inside(optimizer, name, value, steps) for name, value in start.items()}
    learn = [name for name in start if inside[name] or name in hypers] if learn is None else learn
    _check_learned(call, optimizer, given, inside, learn)
    with Progress("tune", progress) as shown:
        begun = _Begun(_Run(problem, steps, optimizer, adjoint), start, list(learn))
        score = _Scores(begun, settings)
        shifts, tried = _trials(begun, score, settings, trials, shown)
        begun = begun.shifted(shifts)
        words = {"trials": json.dumps([trials, shifts, tried])} if trials else None
        scale = abs(tried[0]) if tried and math.isfinite(tried[0]) else 0.0
        settings = settings._replace(constraints=begun.limits, about=words, scale=scale)
        result = minimize(
            begun.objective(begun.adjoint),
            begun.learned,
            settings,
            lambda raw: score.judge(begun.limits),
            shown,
            "the training run and its " + ("reversal" if _reverses(begun.adjoint) else "derivative"),
        )
    return _tuned(begun, start, np.asarray(tried), result)


class _Run(NamedTuple):
    """A training run whose hyperparameters are tuned; see `tune`."""

    problem: Problem
    steps: int
    optimizer: AnyOptimizer
    adjoint: Adjoint | None


class _Begun(NamedTuple):
    """Where tuning begins.

    Attributes:
      run: the training run.
      start: all hyperparameters by name, as `entered` returns them.
      names: of those that are learned.
    """

    run: _Run
    start: dict[str, PyTree]
    names: list[str]

    @property
    def limits(self) -> dict[str, PyTree]:
        """Constraints of what is learned; None for a parameter of a schedule that is held."""
        optimizer, steps = self.run.optimizer, self.run.steps
        return {name: _limits(optimizer, name, self.start[name], steps) for name in self.names}

    @property
    def learned(self) -> dict[str, PyTree]:
        """The values of what is learned, and None where the limits have it."""
        kept = {name: self.start[name] for name in self.names}
        return jax.tree.map(
            lambda limit, x: None if limit is None else x, self.limits, kept, is_leaf=_is_end
        )

    def shifted(self, shifts: Shifts) -> "_Begun":
        """The same, with other values."""
        moved = {name: shifted(self.start[name], self.limits[name], x) for name, x in shifts.items() if x}
        return self._replace(start=self.start | moved)

    def whole(self, learned: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """All hyperparameters, with those that are learned in their places."""
        parts = {
            name: jax.tree.map(
                lambda x, held: held if x is None else x, x, self.start[name], is_leaf=_is_none
            )
            for name, x in learned.items()
        }
        return self.start | parts

    @property
    def adjoint(self) -> Adjoint:
        """How a run is differentiated."""
        given, optimizer = self.run.adjoint, self.run.optimizer
        return _adjoint(optimizer, self.start, self.run.steps) if given is None else given

    def objective(self, adjoint: Adjoint) -> Callable[[PyTree, Array], tuple[Array, PyTree]]:
        """The validation of a run, and what is watched of it."""
        run = self.run
        tenth = max(1, run.steps // 10)

        def objective(learned: PyTree, key: Array) -> tuple[Array, PyTree]:
            settings: Any = {"steps": run.steps, "optimizer": run.optimizer, "adjoint": adjoint}
            trained = run.problem.train(self.whole(learned), key, **settings)
            first, last = jnp.mean(trained.losses[:tenth]), jnp.mean(trained.losses[-tenth:])
            value = run.problem.score(trained)
            return value, {"losses": (first, last), "values": mean_values(learned)}

        return objective


class _Scores:
    """The score of hyperparameters, compiled when it is first needed.

    Args:
      begun: where tuning begins.
      settings: of the tuning.
    """

    def __init__(self, begun: _Begun, settings: Settings):
        self._begun, self._settings = begun, settings
        self.random = begun.run.problem.random
        self._looks = max(1, settings.steps // LOOKS)
        self._compiled: Any = None

    def keys(self, number: int) -> list[Array]:
        """Keys that no meta-step uses, of one of two groups; any key if runs do not depend on it."""
        key = self._settings.key
        if not self.random:
            return [key]
        held = max(HELD_KEYS, self._settings.seeds)
        return list(jax.random.split(jax.random.fold_in(key, np.uint32(2**32 - number)), held))

    def each(self, learned: PyTree, keys: Sequence[Array]) -> Iterator[float]:
        """The validation after a run of each of these keys; infinite where it fails."""
        if self._compiled is None:
            objective = self._begun.objective(Checkpointed())  # in floats
            traced, _ = trace_once(lambda learned, key: objective(learned, key)[0], learned, keys[0])
            self._compiled = partial(jax.jit(lambda traced, *inputs: traced(*inputs)), traced)
        for key in keys:
            try:
                with readable_errors():
                    found = float(self._compiled(learned, key))
            except (ArithmeticError, DomainError):
                found = math.inf
            yield found if math.isfinite(found) else math.inf

    def judge(self, limits: PyTree) -> Judge | None:
        """What chooses the result; the loss itself if that does not depend on keys."""
        if isinstance(self._settings.optimizer, LBFGSB):
            return None
        if not self.random:
            return Judge(None, "loss", 1)
        keys = self.keys(2)

        def score(raw: PyTree) -> float:
            return float(np.mean(list(self.each(constrain(limits, raw), keys))))

        return Judge(score, f"{len(keys)} held keys", self._looks)


def _trials(
    begun: _Begun, score: _Scores, settings: Settings, trials: int, shown: Progress
) -> tuple[Shifts, list[float]]:
    """The shifts that trials have found, and their scores; from the checkpoint, if it has them."""
    if trials == 0:
        return {}, []
    if (known := _trials_in(settings.checkpoint, trials)) is not None:
        return known
    shown.say("compiling the training run, for trials of where to begin ...")
    kinds, keys = _kinds(begun), score.keys(1)
    numbers = sum(np.size(x) for x in jax.tree.leaves(begun.learned))
    if trials >= FEWEST and len(keys) > 1 and len(kinds) > 1 and numbers <= FEW:
        return race(_alone(begun, score, keys, shown), kinds, trials, len(keys))
    return pattern_search(_with_all_keys(begun, score, keys, trials, shown), rounds_of(kinds), trials)


def _alone(
    begun: _Begun, score: _Scores, keys: Sequence[Array], shown: Progress
) -> Callable[[Shifts, int], float]:
    """The score of shifts with a single key, by its number."""

    def tried(shifts: Shifts, number: int) -> float:
        (found,) = score.each(begun.shifted(shifts).learned, keys[number : number + 1])
        shown.advance(f"score {found:.4g}")
        return found

    shown.begin(None, "trial")
    return tried


def _with_all_keys(
    begun: _Begun, score: _Scores, keys: Sequence[Array], trials: int, shown: Progress
) -> Callable[[Shifts], float]:
    """The mean score of shifts over all keys, or of the first two if these show that it is not the best."""
    best: list[float] = []

    def tried(shifts: Shifts) -> float:
        nonlocal best
        found: list[float] = []
        for x in score.each(begun.shifted(shifts).learned, keys):
            found.append(x)
            if len(found) == 2 and best and all(a > b for a, b in zip(found, best)):
                break  # it is not going to be the best
        mean = float(np.mean(found))
        if not best:
            shown.begin(trials, "trial")
        else:
            shown.advance(f"score {mean:.4g}")
        if len(found) < len(keys):
            return max(mean, float(np.mean(best)))
        if not best or mean < np.mean(best):
            best = found
        return mean

    return tried


def _kinds(begun: _Begun) -> dict[str, str]:
    """What is shifted in trials, and its kind; any real number has no natural length."""
    kinds, domains = {}, begun.run.optimizer.domains
    for name in begun.names:
        low, high = domains[name]
        if math.isfinite(low) or math.isfinite(high):
            both = math.isfinite(low) and math.isfinite(high)
            kinds[name] = "share" if both else "rate" if is_rate(name) else "other"
    return kinds


def _trials_in(path: str | os.PathLike[str] | None, trials: int) -> tuple[Shifts, list[float]] | None:
    """What trials found for the checkpoint, so that a run that is resumed begins there too."""
    if path is None or not os.path.exists(path):
        return None
    try:
        number, shifts, scores = json.loads(files.load(path)[1]["fingerprint"]["trials"])
    except (KeyError, OSError, TypeError, ValueError):
        return None  # it is refused where it is resumed from
    return (shifts, scores) if number == trials else None


def _tuned(begun: _Begun, start: dict[str, PyTree], tried: np.ndarray, result: Optimized) -> Tuned:
    """The result, and what is to be said about it."""
    run, history = begun.run, result.history
    losses, watched = history.loss, history.aux
    scores = result.scores
    if not scores:  # without a judge, or without meta-steps
        best = int(np.nanargmin(losses)) if len(losses) else 0
        scores = {best: float(losses[best] if len(losses) else min(tried, default=math.nan))}
    moving, advice = {}, ""
    if len(losses):
        values = {name: x[:, 0] for name, x in watched["values"].items()}
        moving = still_moving(values, begun.limits)
        row = min(min(scores, key=lambda made: np.nan_to_num(scores[made], nan=np.inf)), len(losses) - 1)
        first, last = (float(np.mean(x[row])) for x in watched["losses"])
        advice = advice_on((first, last), run.steps)
        if not advice and len(tried) > 1:  # without trials, nobody knows how far the loss could change
            seen = np.concatenate([tried[tried <= tried[0]], losses])
            advice = chaos_in(np.asarray(history.gradient_norm), seen)
    return Tuned(
        hypers=begun.whole(result.hypers),
        optimizer=run.optimizer,
        history=history._replace(aux=None),
        stopped=result.stopped,
        steps=run.steps,
        start=start,
        scores=scores,
        trials=tried,
        moving=moving,
        advice=advice,
    )


def _reverses(adjoint: Adjoint) -> bool:
    return isinstance(adjoint, Reversible)


def _is_none(x: Any) -> bool:
    return x is None


def _is_end(x: Any) -> bool:
    return x is None or is_constraint(x)


def _problem(call: str, loss: Any, params: Any, meta: Any, batches: Any, validation: Any) -> Problem:
    """What is trained, checked."""
    if isinstance(loss, Problem):
        refuse_beside(call, params, meta, batches, validation)
        return loss
    if is_function(batches):
        check_callable(call, "batches", batches, "key")
        of_key = batches
        batches = lambda key, steps: of_key(key)  # noqa: E731
    if validation is not None:
        check_callable(call, "validation", validation, "params")
    if is_function(params):
        check_callable(call, "params", params, "key")
    return Problem(params, loss, batches, validation, meta)


def _check_learned(
    call: str,
    optimizer: AnyOptimizer,
    given: Mapping[str, PyTree],
    inside: Mapping[str, bool],
    learn: Sequence[str],
) -> None:
    """Refuse to learn what does not exist, has no domain, or begins outside of it."""
    if unknown := sorted(set(learn) - set(given)):
        raise ValueError(f"{call}: learn={learn!r}, but {unknown} are none of {list(given)}")
    if nowhere := [name for name in learn if name not in optimizer.domains]:
        rest = [name for name in learn if name not in nowhere]
        domains = ", ".join(f"{name!r}: (0.0, math.inf)" for name in nowhere)
        raise ValueError(
            f"{call}: {nowhere} have no domain, so tuning could carry them anywhere, also below 0; give "
            f"them one where the optimizer is made, domains={{{domains}}} ((-math.inf, math.inf) if any "
            f"number will do), or leave them out, learn={rest}"
        )
    outside = [name for name in learn if not inside[name]]
    if outside:
        raise ValueError(
            f"{call}: {outside} cannot be learned from {[given[name] for name in outside]}, at the end of "
            "or outside the domain; begin inside it, or leave them out with learn=[...]"
        )


def _limits(optimizer: AnyOptimizer, name: str, value: PyTree, steps: int) -> PyTree:
    """The constraints that keep a hyperparameter inside its domain."""
    domain = optimizer.domains.get(name, (-math.inf, math.inf))
    return limits_of(value, domain, lowest(value, steps) if optimizer.reversible else -math.inf, steps)


def _inside(optimizer: AnyOptimizer, name: str, value: PyTree, steps: int) -> bool:
    """Whether every number, and something of every schedule, can be learned."""

    def some(node: Any, limit: Any) -> bool:
        return bool(jax.tree.leaves(limit, is_leaf=is_constraint))

    parts = jax.tree.map(some, value, _limits(optimizer, name, value, steps), is_leaf=is_schedule)
    return all(jax.tree.leaves(parts))


def _adjoint(optimizer: AnyOptimizer, start: Mapping[str, PyTree], steps: int) -> Adjoint:
    """Exact reversal if possible, with room for the smallest factors that can occur."""
    if not optimizer.reversible:
        return Checkpointed()
    domains = {name: domain for name, domain in optimizer.domains.items() if name in start}
    factors = [lowest(start[name], steps) for name, (_, high) in domains.items() if np.isfinite(high)]
    return Reversible(bits=min(7.0, 0.1 - math.log2(min([SMALLEST_FACTOR, *factors]))))
