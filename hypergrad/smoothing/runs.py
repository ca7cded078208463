"""``training``: a run of `hypergrad.train` as `nres` and `pes` need it, window by window."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import schedules
from hypergrad._base.checks import check_callable, check_whole
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.strategies import Stored
from hypergrad.optimizers.momentum_family import momentum
from hypergrad.program import STEP, AnyOptimizer
from hypergrad.training.arguments import checked_batches, checked_call, flat_hypers, flat_params
from hypergrad.training.inner_loop import train


def training(
    loss: Callable[..., Array],
    params: Callable[[PyTree, Array], PyTree],
    hypers: Callable[[PyTree, Array], Mapping[str, PyTree]],
    batches: PyTree = None,
    *,
    window: int,
    steps: int,
    optimizer: AnyOptimizer | None = None,
    judge: Callable[[PyTree, PyTree], Array] | None = None,
) -> tuple[Callable[..., PyTree], Callable[..., tuple[PyTree, Array]]]:
    """A training run as the two functions that `nres` and `pes` take.

    The objective is the mean inner loss over the run, ``(1/T) Σ_t loss_t``, or the mean over windows of
    what ``judge`` says at their ends.

    Args:
      loss: ``loss(params, theta, batch) -> scalar``, where ``theta`` is what is learned.
      params: ``params(theta, key) -> tree``, the initial parameters.
      hypers: ``hypers(theta, t) -> {name: values}``, the hyperparameters of the optimizer at the steps
        ``t``, ``(K,)`` int32: each as for `hypergrad.train` with ``steps=K``.
      batches: a pytree of arrays with leading axis ``T``, as for `hypergrad.train`; None gives the loss the
        number of the step.
      window: ``K >= 1``.
      steps: ``T``, a multiple of ``K``.
      optimizer: a program of moves, by default `hypergrad.momentum`, or one made by `hypergrad.from_optax`.
      judge: ``judge(params, theta) -> scalar``.

    Returns:
      ``start`` and ``unroll``.

    Raises:
      ValueError, TypeError: as for `hypergrad.train`.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> start, unroll = hg.smoothing.training(
    ...     lambda w, theta, step: jnp.sum(w**2),
    ...     lambda theta, key: jnp.ones(3),
    ...     lambda theta, t: {"learning_rate": jnp.exp(theta), "momentum": 0.5},
    ...     window=5,
    ...     steps=20,
    ... )
    >>> online = hg.smoothing.nres(start, unroll, window=5, steps=20, sigma=0.1)
    >>> estimate, particles = online.step(-3.0, online.init(-3.0, jax.random.key(0)))
    >>> bool(estimate.gradient < 0)  # a higher rate lowers the loss
    True
    """
    optimizer = momentum() if optimizer is None else optimizer
    call = checked_call("training", steps, optimizer, Stored())
    for name, given in {"window": window, "steps": steps}.items():
        check_whole(call, name, given, 1, None)
    check_callable(call, "params", params, "theta", "key")
    check_callable(call, "hypers", hypers, "theta", "t")
    if batches is not None:
        batches = jax.tree.map(jnp.asarray, checked_batches(call, batches, steps))
    share = window / steps

    def start(theta: PyTree, key: Array) -> PyTree:
        at = params(theta, key)
        at = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), at)
        now = hypers(theta, jnp.arange(window, dtype=jnp.int32))
        return at, _first_state(call, optimizer, at, now, window)

    def unroll(theta: PyTree, state: PyTree, step: Array) -> tuple[PyTree, Array]:
        at, kept = state
        t = step + jnp.arange(window, dtype=jnp.int32)
        slices = t if batches is None else jax.tree.map(lambda x: _rows(x, step, window), batches)
        state = kept | ({STEP: step} if optimizer.by_moves else {})
        trained = train(
            loss, at, hypers(theta, t), theta, slices,
            steps=window, optimizer=optimizer, adjoint=Stored(), state=state,
        )  # fmt: skip
        found = {name: x for name, x in trained.state.items() if name != STEP}
        value = jnp.mean(trained.losses) if judge is None else judge(trained.params, theta)
        return (trained.params, found), share * value

    return start, unroll


def _rows(x: Array, step: Array, window: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, step, window)


def _first_state(
    call: str, optimizer: AnyOptimizer, params: PyTree, hypers: Mapping[str, PyTree], steps: int
) -> dict[str, PyTree]:
    """The optimizer's variables before the first step."""
    at = params if optimizer.blocks is None else optimizer.blocks.merge(params)
    names = flat_params(call, at)[2]
    fixed, scheduled = flat_hypers(call, optimizer, schedules.values(hypers, steps), at, names, steps)
    first = {**fixed[0], **{name: x[0] for name, x in scheduled[0].items()}}
    leaves, layout = optimizer.start(call, None, first, at)
    return optimizer.state_of(leaves, layout)
