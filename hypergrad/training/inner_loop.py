"""``train``: a whole training run as one differentiable JAX function."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import schedules
from hypergrad._base.checks import check_arrays, check_callable, checked_steps, shape_of
from hypergrad._base.dtypes import widened
from hypergrad._base.modules import Opened, opened
from hypergrad._base.notebook import short_traceback
from hypergrad._base.rules import has_custom_rule
from hypergrad._base.tracing import Converted, closure_convert
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.run import Constants, Inputs, Outputs, Run, Snapshot
from hypergrad.adjoints.shards import Shards
from hypergrad.adjoints.strategies import Adjoint
from hypergrad.optimizers.momentum_family import momentum
from hypergrad.program import EXACT, STEP, AnyOptimizer, Layout
from hypergrad.training.arguments import (
    check_collectives,
    check_examples,
    check_scalar,
    checked_batches,
    checked_call,
    checked_shards,
    continued,
    flat_hypers,
    flat_params,
)
from hypergrad.training.model_state import RUNNING, ModelState, with_state


class Trained(NamedTuple):
    """The end of a training run.

    Attributes:
      params: trained parameters, a tree like those given.
      state: the optimizer's variables by name, each a tree like the parameters, and ``step``, the number of
        steps made.  Passed to another call of `train`, it continues as if the two runs were one, bit for
        bit.  For this, `Reversible` adds ``exact``, the integers behind the floats, which are used only
        where the floats are unchanged.  An optax optimizer has one entry, ``state``.
      losses: ``(T,)``, the inner loss at every step, before its update; differentiable.
      watched: what ``watch`` returned, every array with the steps as its leading axis.
      model_state: the state of the model after the run; None if none was given.
    """

    params: PyTree
    state: dict[str, PyTree]
    losses: Array
    watched: PyTree
    model_state: PyTree = None

    def __repr__(self) -> str:
        arrays = jax.tree.leaves(self.params)
        count, steps = sum(np.size(x) for x in arrays), np.shape(self.losses)[-1]
        known = isinstance(self.losses, jax.Array | np.ndarray) and np.ndim(self.losses) == 1
        known = known and not isinstance(self.losses, jax.core.Tracer)
        losses = f", loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}" if known else ""
        kept = f"state: {', '.join(self.state)}"
        return f"Trained: {count:,} parameters in {len(arrays)} arrays, {steps} steps{losses}; {kept}"


@short_traceback
def train(
    loss: Callable[..., Array | tuple[Array, PyTree]],
    params: PyTree,
    hypers: Mapping[str, PyTree],
    meta: PyTree = None,
    batches: PyTree = None,
    *,
    steps: int,
    optimizer: AnyOptimizer | None = None,
    adjoint: Adjoint | None = None,
    state: Mapping[str, PyTree] | None = None,
    model_state: PyTree = None,
    watch: Callable[[Snapshot], PyTree] | None = None,
    shards: Shards | int | None = None,
) -> Trained:
    """Train for a number of steps; differentiable in all its inputs.

    ``w_{t+1} = step(w_t, ∇ loss(w_t, meta, batches[t]), hypers[t])``.  Composes with ``jax.grad``,
    ``jax.jit`` and ``jax.vmap``; reverse mode only.  Every array of floats can be differentiated, including
    those the loss closes over; only those that are differentiated cost anything.

    Args:
      loss: ``loss(params, meta, batch) -> scalar``, a JAX function; traced once.  With ``model_state``,
        ``loss(params, meta, batch, state) -> (scalar, state)``.  An optimizer that looks at single examples
        passes it batches of one, and minimizes the mean.
      params: initial parameters, a pytree of float32 or float64 arrays, or with modules in it, such as
        Equinox's, of which the arrays of floats are trained and all else is static.  Of a Flax NNX module,
        variables of type ``nnx.Param`` are trained, and the others are its state.
      hypers: hyperparameters of the optimizer by name.  Each is a tree that is a prefix of ``params`` (a
        number for all, or one per layer, or one per leaf) of numbers, of schedules (optax's or those of
        `hypergrad.schedules`), or of ``(T, ...)`` arrays, the leading axis being the step and the others
        broadcasting against the leaf.
      meta: any pytree, passed to the loss: regularization, data, labels, scales.
      batches: a pytree of arrays with leading axis ``T``; slice ``t`` is passed to the loss at step ``t``.
        Row indices keep the data out of it: see `hypergrad.data.minibatches`.  With None the loss gets the
        step number, int32, which continues from ``state``.  For an optimizer that looks at single examples,
        the second axis is the example.
      steps: ``T >= 1``.
      optimizer: a program of moves, by default `hypergrad.momentum`, or one made by `hypergrad.from_optax`.
      adjoint: how to differentiate, by default `hypergrad.Reversible`.
      state: start of the optimizer's variables by name, such as ``{"velocity": tree}``, zeros if absent; or
        ``state`` of another `Trained`.
      model_state: start of what the loss changes by itself: running statistics of batch normalization,
        counters, random streams; any pytree of arrays.  Everything is reversible but a state that depends
        on parameters or batches and is not a running average with a constant decay, unread by the loss.
      watch: ``watch(snapshot) -> pytree``, called before every step (see `Snapshot`); differentiable.
      shards: ``V``, or a `Shards`: the batch of a step is cut into ``V`` parts of equal size, one after the
        other or on several devices; the inner loss is the mean of their losses.  Gradients are summed
        exactly, so that the run has the same bits for every arrangement of the parts.  The loss is given
        a part of the rows of every array ``(T, n, ...)``; an array ``(T,)`` is given to all parts, and a
        random key folded with the number of the part.

    Returns:
      A `Trained`.

    Raises:
      ValueError: an argument is invalid; checked before any work starts.  Under ``jit`` the running program
        raises `hypergrad.errors.DomainError`, a ValueError, for a hyperparameter outside its domain.
      TypeError: an argument is not an array, function, optimizer or adjoint where one is required, the
        parameters have a dtype in which a hypergradient would be noise, or the optimizer closes over traced
        values.
      ReversalError: the run could not be, or was not, reversed exactly.

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
    arguments = ["params", "meta", "batch", *([] if model_state is None else ["state"])]
    check_callable(call, "loss", loss, *arguments)
    check_arrays(call, "meta", meta)
    first, exact = continued(call, state)
    numbers = first + np.arange(steps, dtype=np.int32)
    given = batches
    batches = checked_batches(call, numbers if batches is None else batches, steps)
    task = _task(call, _Parts(loss, params, meta, batches, optimizer), model_state, numbers)
    shards = checked_shards(call, shards, task.optimizer, given, task.state is not None)
    params, split = _in_blocks(task)
    names = task.names if task.optimizer.blocks is None else flat_params(call, params)[2]
    if isinstance(hypers, Mapping):
        hypers = {name: task.opened.like(tree) for name, tree in hypers.items()}
        hypers = schedules.values(hypers, steps)
    fixed, scheduled = flat_hypers(call, task.optimizer, hypers, params, names, steps)
    at_start = {**fixed[0], **{name: x[0] for name, x in scheduled[0].items()}}
    start, layout = task.optimizer.start(call, state, at_start, params)
    batches, batch = _batches(call, task.optimizer, task.parts.batches, numbers, shards)

    shapes = jax.tree.map(shape_of, (params, task.parts.meta, batch))
    with nullcontext() if shards is None else shards.without_mesh():
        run, captured, value = _traced(call, task, split, shapes, (layout, steps, names))
    run = replace(run, shards=shards)
    meta_leaves = [widened(jnp.asarray(x)) for x in jax.tree.leaves(task.parts.meta)]
    constants = Constants([*captured, *meta_leaves], fixed, [], exact)
    batch_leaves = [jnp.asarray(x) for x in jax.tree.leaves(batches)]
    inputs = Inputs(batch_leaves, scheduled, jnp.asarray(numbers))
    start = run.settled(start, constants, inputs)
    if watch is not None:
        variables = run.state_of(jax.tree.map(shape_of, start))
        run, of_watch = _trace_watch(run, watch, _shown(task, split), (shapes[0], variables, value))
        constants = constants._replace(watch=of_watch)
    end, outputs = adjoint(run, start, constants, inputs)
    last = first + np.int32(steps)
    trained = task.users(split(layout.params.unflatten(run.params_of(end))), run.state_of(end), last)
    told = _told(last, outputs) if optimizer.by_moves else {}
    return Trained(trained.params, trained.state | told, outputs.loss, outputs.watched, trained.model_state)


def _told(step: Any, outputs: Outputs) -> dict[str, PyTree]:
    """The entries of a state besides the optimizer's variables: the next step, and the exact integers."""
    return {STEP: jnp.asarray(step)} | ({} if outputs.exact is None else {EXACT: outputs.exact})


class _Parts(NamedTuple):
    """What is trained: by the user's words, or by those of the run."""

    loss: Callable[..., Any]
    params: PyTree
    meta: PyTree
    batches: PyTree
    optimizer: AnyOptimizer


class _Users(NamedTuple):
    """Where a run is, in the user's words."""

    params: PyTree
    state: dict[str, PyTree]
    model_state: PyTree


class _Task(NamedTuple):
    """What is trained, after modules have been opened and a model's state has been put beside them.

    Attributes:
      parts: those of the run.
      names: of the leaves of its parameters, for messages.
      opened: the user's parameters.
      state: of the model; None if it has none.
    """

    parts: _Parts
    names: list[str]
    opened: Opened
    state: ModelState | None

    @property
    def optimizer(self) -> AnyOptimizer:
        """The optimizer of the run."""
        return self.parts.optimizer

    def users(self, params: PyTree, variables: Mapping[str, PyTree], step: Any) -> _Users:
        """The parameters, the optimizer's variables and the state of the model as the user knows them."""
        if self.state is None:
            return _Users(self.opened.close(params), dict(variables), None)
        own = {name: x for name, x in variables.items() if name != RUNNING}
        after = self.state.at(params, variables.get(RUNNING, []), step)
        if self.opened.state is None:
            return _Users(self.opened.close(params[0]), own, after)
        return _Users(self.opened.close(params[0], after), own, None)


def _task(call: str, parts: _Parts, model_state: PyTree, numbers: Any) -> _Task:
    """Open modules, and put the state of the model beside the parameters."""
    loss, params = parts.loss, parts.params
    opening = opened(call, params)
    leaves, structure, names = flat_params(call, opening.params)
    params = structure.unflatten(leaves)
    if opening.state is not None:
        if model_state is not None:
            raise TypeError(
                f"{call}: the module in params has a state of its own, so model_state must be left out"
            )
        model_state = opening.state

    def of_arrays(params: PyTree, meta: PyTree, batch: PyTree, *state: PyTree) -> Any:
        module = opening.close(params, *(() if opening.state is None else state))
        if opening.state is None:
            return loss(module, meta, batch, *state)
        return loss(module, meta, batch), opening.state_of(module)

    if model_state is None:
        return _Task(parts._replace(loss=of_arrays, params=params), names, opening, None)
    found, state = with_state(
        call, of_arrays, (params, parts.meta, parts.batches), model_state, numbers, parts.optimizer
    )
    return _Task(_Parts(state.value, *found), [*names, *state.names], opening, state)


Split = Callable[[PyTree], PyTree]  # from what the optimizer moves to the parameters of the task


def _in_blocks(task: _Task) -> tuple[PyTree, Split]:
    """What the optimizer moves, and the map back to the parameters, for the user's functions."""
    blocks, params = task.optimizer.blocks, task.parts.params
    if blocks is None:
        return params, lambda merged: merged
    like = jax.tree.map(shape_of, params)
    return blocks.merge(params), lambda merged: blocks.split(merged, like)


def _batches(
    call: str, optimizer: AnyOptimizer, batches: PyTree, numbers: np.ndarray, shards: Shards | None
) -> tuple[PyTree, PyTree]:
    """The batches by step, and one on which the user's functions are traced."""
    batches = checked_batches(call, numbers if batches is None else batches, len(numbers))
    if optimizer.observe is not None:
        batches = (batches, numbers)
    batch = jax.tree.map(lambda x: x[0], batches)
    if optimizer.per_example:
        check_examples(call, optimizer, batch)
        batch = jax.tree.map(lambda x: x[:1], batch)
    if shards is not None:
        batch = jax.tree.map(lambda x: x[: len(x) // shards.count] if x.ndim else x, batch)
    return batches, batch


def _traced(
    call: str, task: _Task, split: Split, shapes: Any, settings: tuple[Layout, int, list[str]]
) -> tuple[Run, list[Array], Any]:
    """The run without a watch function; what it closes over; and the shape of the loss.

    The user's functions are traced only once, here, on shapes alone; only their jaxprs are used later.
    """
    optimizer, (layout, steps, names) = task.optimizer, settings

    def loss(merged: PyTree, meta: PyTree, batch: PyTree) -> Any:
        return task.parts.loss(split(merged), meta, batch if optimizer.observe is None else batch[0])

    converted, captured, value = closure_convert(loss, *shapes)
    check_scalar(call, value)
    check_collectives(call, converted.jaxpr)
    observe, more = _trace_observe(optimizer, split, shapes)
    run = Run(
        call=call,
        optimizer=optimizer,
        loss=converted,
        watch=None,
        layout=layout,
        steps=steps,
        captured=len(captured) + len(more),
        x64=jnp.result_type(float) == jnp.float64,
        arguments=jax.tree.structure(shapes[1:]),
        observe=observe,
        names=tuple(names),
        custom=has_custom_rule(converted.jaxpr),
    )
    return run, [*captured, *more], value


def _trace_observe(
    optimizer: AnyOptimizer, split: Split, shapes: Any
) -> tuple[Converted | None, list[Array]]:
    """What the optimizer observes, and what that closes over."""
    if optimizer.observe is None:
        return None, []
    function = optimizer.observe

    def observe(merged: PyTree, meta: PyTree, batch: PyTree) -> PyTree:
        return dict(function(split(merged), meta, *batch))

    converted, captured, _ = closure_convert(observe, *shapes)
    return converted, captured


def _shown(task: _Task, split: Split) -> Callable[[Snapshot], Snapshot]:
    """A function from what the run sees of a step to what the user sees."""

    def show(snapshot: Snapshot) -> Snapshot:
        users = task.users(split(snapshot.params), snapshot.state, snapshot.step)
        gradient = split(snapshot.gradient)
        gradient = gradient if task.state is None else gradient[0]
        return snapshot._replace(**users._asdict(), gradient=gradient)

    return show


def _trace_watch(
    run: Run, watch: Callable[..., Any], shown: Callable[[Snapshot], Snapshot], shapes: Any
) -> tuple[Run, list[Array]]:
    """The run with the watch function, and what that closes over."""
    check_callable(run.call, "watch", watch, "snapshot")
    params, variables, value = shapes
    number: Any = jax.ShapeDtypeStruct((), np.dtype("int32"))
    snapshot = Snapshot(number, params, variables, value, params)
    converted, captured, _ = closure_convert(lambda snapshot: watch(shown(snapshot)), snapshot)
    return replace(run, watch=converted), captured
