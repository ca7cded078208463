"""``train``: a whole training run as one differentiable JAX function."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import schedules
from hypergrad._base.checks import check_callable, checked_steps, shape_of
from hypergrad._base.dtypes import widened
from hypergrad._base.rules import has_custom_rule
from hypergrad._base.tracing import Converted, closure_convert
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.run import Constants, Inputs, Run, Snapshot
from hypergrad.adjoints.strategies import Adjoint
from hypergrad.optimizers.momentum import momentum
from hypergrad.program import GenericOptimizer, Optimizer, labels_of
from hypergrad.training.arguments import (
    EXACT,
    STEP,
    check_arrays,
    check_examples,
    check_scalar,
    checked_batches,
    checked_call,
    continued,
    flat_hypers,
    flat_params,
    start_of,
    start_of_whole,
)


class Trained(NamedTuple):
    """The end of a training run.

    Attributes:
      params: trained parameters, a tree like those given.
      state: the optimizer's variables by name, each a tree like the parameters, and how many steps were
        made, ``step``; passed to another call of `train`, it goes on as if the two runs were one, bit for
        bit.  For that `Reversible` adds ``exact``, the integers behind the floats, which count only where
        the floats are still the same.  An optimizer of optax has one entry, ``state``.
      losses: ``(T,)``, the inner loss at every step, before its update; differentiable.
      watched: what ``watch`` returned, every array with the steps as its leading axis.
    """

    params: PyTree
    state: dict[str, PyTree]
    losses: Array
    watched: PyTree


def train(
    loss: Callable[[PyTree, PyTree, PyTree], Array],
    params: PyTree,
    hypers: Mapping[str, PyTree],
    meta: PyTree = None,
    batches: PyTree = None,
    *,
    steps: int,
    optimizer: Optimizer | GenericOptimizer | None = None,
    adjoint: Adjoint | None = None,
    state: Mapping[str, PyTree] | None = None,
    watch: Callable[[Snapshot], PyTree] | None = None,
) -> Trained:
    """Train for a number of steps; differentiable in everything that goes in.

    ``w_{t+1} = step(w_t, ∇ loss(w_t, meta, batches[t]), hypers[t])``.  Composes with ``jax.grad``,
    ``jax.jit`` and ``jax.vmap``; reverse mode only.  Everything that is an array of floats can be
    differentiated, and what the loss closes over too; only what is costs anything.

    Args:
      loss: ``loss(params, meta, batch) -> scalar``, a JAX function; traced once.  An optimizer that looks
        at single examples gives it batches of one, and minimises the mean.
      params: start, a pytree of float32 or float64 arrays.
      hypers: hyperparameters of the optimizer by name.  Each is a tree that is a prefix of ``params`` (a
        number for all, or one per layer, or one per leaf) of numbers, of schedules (optax's or those of
        `hypergrad.schedules`), or of ``(T, ...)`` arrays, the leading axis being the step and the others
        broadcasting against the leaf.
      meta: any pytree, passed to the loss: regularisation, data, labels, scales.
      batches: a pytree of arrays with leading axis ``T``; slice ``t`` is given to the loss at step
        ``t``.  Row indices keep the data out of it: see `hypergrad.data.minibatches`.  None gives the
        loss the step number, int32, which goes on from ``state``.  For an optimizer that looks at single
        examples, the axis behind the step is the example.
      steps: ``T >= 1``.
      optimizer: a program of moves, by default `hypergrad.momentum`, or one made by `hypergrad.from_optax`.
      adjoint: how to differentiate, by default `hypergrad.Reversible`.
      state: start of the optimizer's variables by name, such as ``{"velocity": tree}``, zeros if absent; or
        ``state`` of another `Trained`.
      watch: ``watch(snapshot) -> pytree``, called before every step (see `Snapshot`); differentiable.

    Returns:
      A `Trained`.

    Raises:
      ValueError: where an argument cannot be meant as it is; before any work starts.  Under ``jit`` the
        running program raises `hypergrad.errors.DomainError`, a ValueError, for a hyperparameter that left
        its domain.
      TypeError: for what is no array, function, optimizer or adjoint where one must be, for parameters of a
        dtype in which a hypergradient would be noise, and for an optimizer that closes over traced values.
      ReversalError: where the run could not be, or was not, reversed exactly.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, target, step: jnp.sum((w - target) ** 2)
    >>> def outer(rate):
    ...     hypers = {"learning_rate": rate, "momentum": 0.5}
    ...     return jnp.sum(hg.train(loss, jnp.zeros(3), hypers, 1.0, steps=20).params)
    >>> jax.grad(outer)(jnp.full(20, 0.1)).shape
    (20,)
    """
    optimizer = momentum() if optimizer is None else optimizer
    adjoint = Reversible() if adjoint is None else adjoint
    call = checked_call("train", steps, optimizer, adjoint)
    steps = checked_steps(call, steps)
    check_callable(call, "loss", loss, "params", "meta", "batch")
    check_arrays(call, "meta", meta)
    leaves, structure, names = flat_params(call, params)
    given, split = params, lambda merged: merged
    if isinstance(optimizer, Optimizer) and optimizer.blocks is not None:
        # The run is one of blocks; the user's functions are shown what they gave.
        like, blocks = jax.tree.map(shape_of, given), optimizer.blocks
        params, split = blocks.merge(given), lambda merged: blocks.split(merged, like)
        leaves, structure, names = flat_params(call, params)
    if isinstance(hypers, Mapping):
        hypers = schedules.values(dict(hypers), steps)
    fixed, scheduled = flat_hypers(call, optimizer, hypers, params, leaves, names, steps)
    labels = labels_of(call, optimizer, params, leaves)
    if isinstance(optimizer, GenericOptimizer):
        at_start = {**fixed[0], **{name: x[0] for name, x in scheduled[0].items()}}
        start, kept_structure = start_of_whole(call, optimizer, at_start, state, params, leaves)
        first, exact = np.int32(0), None
    else:
        start, kept_structure = start_of(call, optimizer, state, leaves, structure, labels), None
        first, exact = continued(call, state)
    numbers = first + np.arange(steps, dtype=np.int32)
    if batches is None:
        batches = numbers
    batches = checked_batches(call, batches, steps)
    observes = isinstance(optimizer, Optimizer) and optimizer.observe is not None
    if observes:
        batches = (batches, numbers)
    batch = jax.tree.map(lambda x: x[0], batches)
    if isinstance(optimizer, GenericOptimizer) and optimizer.per_example:
        check_examples(call, optimizer, batch)
        batch = jax.tree.map(lambda x: x[:1], batch)

    def loss_of(merged: PyTree, meta: PyTree, batch: PyTree) -> Any:
        return loss(split(merged), meta, batch[0] if observes else batch)

    # The user's functions are traced here, once, on shapes alone; only their jaxprs are used below.
    shapes = jax.tree.map(shape_of, (params, meta, batch))
    converted, captured, result = closure_convert(loss_of, *shapes)
    check_scalar(call, result)
    observe = None
    if observes:
        observe, more = _hoist_observe(optimizer, split, *shapes)
        captured = [*captured, *more]
    run = Run(
        call=call,
        optimizer=optimizer,
        loss=converted,
        watch=None,
        structure=structure,
        state=kept_structure,
        steps=steps,
        captured=len(captured),
        x64=jnp.result_type(float) == jnp.float64,
        arguments=jax.tree.structure(shapes[1:]),
        observe=observe,
        names=tuple(names),
        labels=labels,
        custom=has_custom_rule(converted.jaxpr),
    )
    watch_consts: list[Array] = []
    if watch is not None:
        check_callable(call, "watch", watch, "snapshot")
        number: Any = jax.ShapeDtypeStruct((), np.dtype("int32"))
        scalar: Any = result
        variables = run.state_of(jax.tree.map(shape_of, start))
        snapshot = Snapshot(number, shapes[0], variables, scalar, shapes[0])

        def show(snapshot: Snapshot) -> PyTree:
            shown = {"params": split(snapshot.params), "gradient": split(snapshot.gradient)}
            return watch(snapshot._replace(**shown))

        converted, watch_consts, _ = closure_convert(show, snapshot)
        run = replace(run, watch=converted)
    meta_leaves = [widened(jnp.asarray(x)) for x in jax.tree.leaves(meta)]
    constants = Constants([*captured, *meta_leaves], fixed, watch_consts, exact)
    batch_leaves = [jnp.asarray(x) for x in jax.tree.leaves(batches)]
    inputs = Inputs(batch_leaves, scheduled, jnp.asarray(numbers))
    end, outputs = adjoint(run, start, constants, inputs)
    trained = split(structure.unflatten(run.params_of(end)))
    ended = run.state_of(end)
    if isinstance(optimizer, Optimizer):
        ended |= {STEP: jnp.asarray(first + np.int32(steps))}
        ended |= {} if outputs.exact is None else {EXACT: outputs.exact}
    return Trained(trained, ended, outputs.loss, outputs.watched)


def _hoist_observe(
    optimizer: Any, split: Callable[[PyTree], PyTree], params: PyTree, meta: PyTree, batch: PyTree
) -> tuple[Converted, list[Array]]:
    """What the optimizer observes, hoisted as the loss is, and what it closes over."""

    def observe(merged: PyTree, meta: PyTree, batch: PyTree) -> PyTree:
        return dict(optimizer.observe(split(merged), meta, *batch))

    converted, captured, _ = closure_convert(observe, params, meta, batch)
    return converted, captured
