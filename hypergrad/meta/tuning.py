"""Meta-tuning: the hyperparameters of an optimizer, learned by hypergradients on a user's own loss."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from hypergrad._base.checks import check_callable, checked_steps, is_function
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.strategies import Adjoint, Checkpointed
from hypergrad.constraints import Constraint, interval, positive, real
from hypergrad.meta.lbfgsb import LBFGSB
from hypergrad.meta.outer_loop import optimize
from hypergrad.meta.runs import History
from hypergrad.optimizers.adam_family import adam
from hypergrad.optimizers.optax_interop import as_optax
from hypergrad.program import AnyOptimizer, with_defaults
from hypergrad.training.arguments import checked_call
from hypergrad.training.problem import Problem

# A learned factor stays above this, or above half of its start; the buffers have room for that.
SMALLEST_FACTOR = 0.25


class Tuned(NamedTuple):
    """What `tune` returns.

    Attributes:
      hypers: all hyperparameters by name, learned or not, as `hypergrad.train` takes them.
      optimizer: the optimizer that they belong to.
      history: loss and norm of the hypergradient at every meta-step.
      stopped: why tuning ended early, in words; empty if it did not.
    """

    hypers: dict[str, PyTree]
    optimizer: AnyOptimizer
    history: History
    stopped: str

    def optax(self) -> optax.GradientTransformation:
        """The tuned optimizer as an optax transformation; a schedule holds its last value after its end."""
        return as_optax(self.optimizer, self.hypers)


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
    adjoint: Adjoint | None = None,
    key: Array | None = None,
    seeds: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Tuned:
    """Tune an optimizer's hyperparameters by hypergradients through whole training runs.

    ``minimize validation(train(loss, params, hypers)) over hypers``, in coordinates without bounds: the
    logarithm of what is positive, the logit of what is between 0 and 1.  A hyperparameter that does not
    affect the validation, or only through a function of slope 0 (``b1`` in ``optax.lion``, which is inside
    a sign), cannot be learned in this way; the first meta-step warns about it.

    Args:
      loss: ``loss(params, meta, batch) -> scalar``, as for `hypergrad.train`; or a `hypergrad.Problem`,
        which has ``params``, ``meta``, ``batches`` and ``validation`` too.
      params: start, or a function from a key to a start.
      hypers: initial values, by name; numbers, ``(T, ...)`` schedules or trees of them, each of which is
        learned in the form given.  The others begin at the optimizer's defaults.
      meta: passed to the loss, not learned.
      batches: batches by step, as for `hypergrad.train`, or a function from a key to them.
      steps: ``T``, the number of steps of each training run.
      optimizer: the optimizer to tune, by default `hypergrad.adam`.
      validation: ``validation(params) -> scalar``, minimized after training; by default the mean of the
        training losses of the last tenth of the run.
      learn: names of the hyperparameters to learn; by default all that begin inside their domain, which a
        weight decay of 0 does not.
      meta_steps: number of meta-iterations.
      meta_optimizer: as the ``optimizer`` of `hypergrad.meta.optimize`; by default ``optax.adam(0.1)``.
      adjoint: how to differentiate, by default `Reversible` if that is possible, otherwise `Checkpointed`.
      key: PRNG key; by default ``jax.random.key(0)``.
      seeds: how many runs, each with its own key, a meta-step averages over.
      checkpoint: file to resume from and to write during the run.
      progress: show a progress bar.

    Returns:
      A `Tuned`; ``tuned.optax()`` is an optax optimizer.  A `hypergrad.implicit.ZeroHypergradientWarning`
      names the hyperparameters in which the first hypergradient is exactly 0.

    Raises:
      ValueError: a name is not one of the optimizer's hyperparameters, or a start is outside its domain.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> narrow = lambda w, meta, step: jnp.sum(jnp.array([0.05, 1.0]) * w**2)
    >>> tuned = hg.tune(narrow, jnp.ones(2), {"learning_rate": 1e-3}, steps=30, progress=False)
    >>> optimizer = tuned.optax()
    >>> bool(tuned.history.loss[-1] < 0.1 * tuned.history.loss[0])
    True
    """
    optimizer = adam() if optimizer is None else optimizer
    call = checked_call("tune", steps, optimizer, adjoint)
    checked_steps(call, steps)
    problem = _problem(call, loss, params, meta, batches, validation)
    hypers = {} if hypers is None else hypers
    start = with_defaults(call, optimizer, hypers)
    learn = _learned(call, optimizer, start, hypers if learn is None else None, learn or ())
    constraints = {name: _constraint(optimizer, name, start[name]) for name in learn}
    if adjoint is None:
        adjoint = _adjoint(optimizer, start)
    held = {name: value for name, value in start.items() if name not in learn}
    dtype = jnp.result_type(float)
    begin = {name: jax.tree.map(lambda x: jnp.asarray(x, dtype), start[name]) for name in learn}

    score = problem.objective(steps=steps, optimizer=optimizer, adjoint=adjoint)

    def objective(learned: dict[str, PyTree], key: Array) -> Array:
        return score({**held, **learned}, key)

    result = optimize(
        objective,
        begin,
        optimizer=optax.adam(0.1) if meta_optimizer is None else meta_optimizer,
        steps=meta_steps,
        constraints=constraints,
        key=key,
        seeds=seeds,
        checkpoint=checkpoint,
        progress=progress,
    )
    return Tuned({**held, **result.hypers}, optimizer, result.history, result.stopped)


def _problem(call: str, loss: Any, params: Any, meta: Any, batches: Any, validation: Any) -> Problem:
    """What is trained, checked."""
    if isinstance(loss, Problem):
        if any(given is not None for given in (params, meta, batches, validation)):
            raise TypeError(
                f"{call}: a Problem has its own init, meta, batches and validation; pass them to "
                "hypergrad.Problem, or to tune a loss instead of a Problem"
            )
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


def _learned(
    call: str,
    optimizer: AnyOptimizer,
    start: Mapping[str, PyTree],
    given: Mapping[str, PyTree] | None,
    wanted: Sequence[str],
) -> list[str]:
    """The names to learn: those wanted or, if none are given, all that can be learned."""
    if unknown := sorted(set(wanted) - set(start)):
        raise ValueError(f"{call}: learn={wanted!r}, but {unknown} are none of {list(start)}")
    inside = {name: _inside(optimizer.domains.get(name), value) for name, value in start.items()}
    learn = list(wanted) if given is None else [name for name in start if inside[name] or name in given]
    outside = [name for name in learn if not inside[name]]
    if outside:
        raise ValueError(
            f"{call}: {outside} cannot be learned from {[start[name] for name in outside]}, at the end of "
            "or outside the domain; begin inside it, or leave them out with learn=[...]"
        )
    return learn


def _lowest(value: PyTree) -> float:
    """The lower limit of a factor while it is learned."""
    return min(SMALLEST_FACTOR, 0.5 * min(float(np.min(x)) for x in jax.tree.leaves(value)))


def _constraint(optimizer: AnyOptimizer, name: str, value: PyTree) -> Constraint:
    """The constraint that keeps a hyperparameter inside its domain."""
    low, high = optimizer.domains.get(name, (-np.inf, np.inf))
    if not np.isfinite(low):
        return real if not np.isfinite(high) else _beyond(high, -1)
    if not np.isfinite(high):
        return positive if low == 0 else _beyond(low, 1)
    return interval(max(low, _lowest(value)) if optimizer.reversible else low, high)


def _beyond(end: float, side: int) -> Constraint:
    """Values above an end (side 1) or below it (side -1): ``value = end + side exp(raw)``."""

    def to_constrained(raw: Array) -> Array:
        # Rounding in the sum may land on the end itself.
        nearest = jnp.nextafter(jnp.asarray(end, raw.dtype), jnp.asarray(side * np.inf, raw.dtype))
        value = end + side * positive.to_constrained(raw)
        return jnp.maximum(value, nearest) if side > 0 else jnp.minimum(value, nearest)

    words = f"x > {end:g}" if side > 0 else f"x < {end:g}"
    return Constraint(
        to_constrained, lambda value: jnp.log(side * (value - end)), f"beyond({words})", words
    )


def _adjoint(optimizer: AnyOptimizer, start: Mapping[str, PyTree]) -> Adjoint:
    """Exact reversal if possible, with room for the smallest factors that can occur."""
    if not optimizer.reversible:
        return Checkpointed()
    domains = {name: domain for name, domain in optimizer.domains.items() if name in start}
    factors = [_lowest(start[name]) for name, (_, high) in domains.items() if np.isfinite(high)]
    return Reversible(bits=min(7.0, 0.1 - math.log2(min([SMALLEST_FACTOR, *factors]))))


def _inside(domain: tuple[float, float] | None, value: PyTree) -> bool:
    low, high = (-np.inf, np.inf) if domain is None else domain
    return all(np.all((np.asarray(x) > low) & (np.asarray(x) < high)) for x in jax.tree.leaves(value))
