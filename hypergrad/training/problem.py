"""`Problem`: what is trained, on what, and how the result is judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._base.checks import check_callable, is_function
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.shards import Shards
from hypergrad.adjoints.strategies import Adjoint
from hypergrad.program import AnyOptimizer
from hypergrad.training.inner_loop import Trained, train


@dataclass(frozen=True)
class Problem:
    """A training problem of a user's own, as the command line and `hypergrad.tune` take it.

    Attributes:
      init: start of the parameters, or a function from a key to one.
      loss: ``loss(params, meta, batch) -> scalar``, as for `hypergrad.train`.
      batches: ``batches(key, steps)`` -> arrays with leading axis ``steps``; or such arrays, for that
        number of steps only; or None, with which the loss is given the number of the step.
      validation: ``validation(params) -> scalar``, minimized by what is learned; by default the mean of the
        training losses of the last tenth of the run.
      meta: passed to the loss.
      model_state: start of what the loss changes by itself, or a function from a key to it, as for
        `hypergrad.train`; then it is ``loss(params, meta, batch, state) -> (scalar, state)`` and
        ``validation(params, state)``.
      shards: into how many parts the batch of a step is cut, or how (`hypergrad.Shards`), as for
        `hypergrad.train`.

    Raises:
      TypeError: a function cannot be called with these arguments.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> problem = hg.Problem(jnp.ones(3), lambda w, meta, step: jnp.sum(w**2))
    >>> trained = problem.train({"learning_rate": 0.1}, steps=20)
    >>> round(float(problem.score(trained)), 3)
    0.163
    """

    init: PyTree | Callable[[Array], PyTree]
    loss: Callable[..., Any]
    batches: PyTree | Callable[[Array, int], PyTree] = None
    validation: Callable[..., Array] | None = None
    meta: PyTree = None
    model_state: PyTree | Callable[[Array], PyTree] = None
    shards: Shards | int | None = None

    def __post_init__(self) -> None:
        call = "Problem(init, loss, batches, validation)"
        state = () if self.model_state is None else ("state",)
        check_callable(call, "loss", self.loss, "params", "meta", "batch", *state)
        for name in ("init", "model_state"):
            if is_function(getattr(self, name)):
                check_callable(call, name, getattr(self, name), "key")
        if is_function(self.batches):
            check_callable(call, "batches", self.batches, "key", "steps")
        if self.validation is not None:
            check_callable(call, "validation", self.validation, "params", *state)

    @property
    def random(self) -> bool:
        """Whether runs depend on their keys."""
        return any(map(is_function, (self.init, self.batches, self.model_state)))

    def start(self, key: Array) -> tuple[PyTree, PyTree]:
        """The parameters and the state of the model at the start of a run.

        Args:
          key: PRNG key of the run.
        """
        key = jax.random.split(key)[0]
        params, state = (x(key) if is_function(x) else x for x in (self.init, self.model_state))
        return params, state

    def train(
        self,
        hypers: Mapping[str, PyTree],
        key: Array | None = None,
        *,
        steps: int,
        optimizer: AnyOptimizer | None = None,
        adjoint: Adjoint | None = None,
    ) -> Trained:
        """One run from the initial parameters, differentiable like `hypergrad.train`.

        Args:
          hypers: hyperparameters of the optimizer by name.
          key: PRNG key of the run, by default ``jax.random.key(0)``.
          steps: ``T >= 1``.
          optimizer: as for `hypergrad.train`.
          adjoint: as for `hypergrad.train`.
        """
        key = jax.random.key(0) if key is None else key
        batches = self.batches
        if is_function(batches):
            batches = batches(jax.random.split(key)[1], steps)
        params, state = self.start(key)
        return train(
            self.loss,
            params,
            hypers,
            self.meta,
            batches,
            steps=steps,
            optimizer=optimizer,
            adjoint=adjoint,
            model_state=state,
            shards=self.shards,
        )

    def score(self, trained: Trained) -> Array:
        """What is to become small: the validation of a run, or its last training losses.

        Args:
          trained: a run of this problem.
        """
        if self.validation is None:
            return jnp.mean(trained.losses[-max(1, len(trained.losses) // 10) :])
        state = () if self.model_state is None else (trained.model_state,)
        return self.validation(trained.params, *state)

    def objective(self, **settings: Any) -> Callable[[Mapping[str, PyTree], Array], Array]:
        """The score as a function of hyperparameters and a key, as `hypergrad.meta.optimize` takes it.

        Args:
          settings: of `train`: steps, optimizer, adjoint.
        """
        return lambda hypers, key: self.score(self.train(hypers, key, **settings))


def refuse_beside(call: str, *given: PyTree) -> None:
    """Refuse parts of a problem that are given beside one.

    Args:
      call: the user's call.
      given: the parts, None where they are not given.

    Raises:
      TypeError: one is given.
    """
    if any(part is not None for part in given):
        raise TypeError(
            f"{call}: a Problem has its own init, meta, batches, validation, model_state and shards; pass "
            "them to hypergrad.Problem, or give a loss instead of a Problem"
        )
