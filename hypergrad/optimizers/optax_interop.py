"""Optimizers from optax, and ours for optax."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hypergrad._base.dtypes import lenient
from hypergrad._base.trees import PyTree
from hypergrad.optimizers.domains import usual_domains
from hypergrad.optimizers.safe_roots import finite
from hypergrad.program import (
    PARAMS,
    AnyOptimizer,
    Examples,
    FloatStep,
    GenericOptimizer,
    StepContext,
    with_defaults,
)


def from_optax(
    build: Callable[..., optax.GradientTransformation],
    hypers: Mapping[str, float | None],
    domains: Mapping[str, tuple[float, float]] | None = None,
) -> GenericOptimizer:
    """Any optax optimizer, differentiable in the hyperparameters it is built from.

    ``w, s <- step_h(g, s, w),  s_0 = init_h(w_0)`` with the hyperparameters ``h`` of the step, and of the
    first step in ``s_0``; differentiated in both.  Not reversible: differentiate with ``Checkpointed()`` or
    ``Stored()``.  Optimizers of this library are programs of moves instead, many of them reversible.

    Its update gets what an optax update may ask for: ``value`` (the loss before the step), ``grad``,
    ``value_fn``, ``obj_fn`` and ``grad_fn``, on the batch of the step.  A line search that is a loop of
    unknown length has derivatives with ``Forward()`` only.

    An elementwise slope that is not finite counts as 0 (see `hypergrad.optimizers.safe_roots`): the square
    root of a gradient that is always 0, and the branch of a `jax.numpy.where` that is not taken, do not
    make hypergradients NaN.

    Args:
      build: function from keyword arguments, one scalar for each of `hypers`, to an optax transformation;
        traced at every step with the hyperparameters of that step.  Its state must not depend on them in
        its shapes. With a schedule, what optax stores in the state at the start (the ``learning_rate`` of
        ``optax.rprop``, an ``initial_accumulator_value``) has the first value; what
        `optax.inject_hyperparams` stores there has the value of the step.
      hypers: names and default values; None marks one that must be given to `hypergrad.train`.  They are
        numbers or ``(T,)`` schedules, and the same for all parameters.
      domains: for each hyperparameter, lower and upper end of the half-open range ``[low, high)``.  Names
        that optax uses have theirs by default, such as ``[0, inf)`` for ``learning_rate`` and ``[0, 1)``
        for ``b1``; `hypergrad.tune` learns another name only if you give its domain here.

    Returns:
      An optimizer for `hypergrad.train`.

    Raises:
      TypeError: `build` must know a hyperparameter before the run, or its update needs what a
        training run does not have.
      ValueError: a loop of unknown length, such as a line search, is differentiated in reverse.

    >>> import hypergrad as hg
    >>> import jax, jax.numpy as jnp, optax
    >>> sign = hg.from_optax(optax.sign_sgd, {"learning_rate": None})
    >>> square = lambda w, meta, step: jnp.sum(w**2)
    >>> def end(rate):
    ...     options = {"steps": 4, "optimizer": sign, "adjoint": hg.Stored()}
    ...     return hg.train(square, jnp.ones(2), {"learning_rate": rate}, **options).params
    >>> end(0.125)
    Array([0.5, 0.5], dtype=float32)
    >>> float(jax.grad(lambda rate: end(rate).sum())(0.125))
    -8.0
    """
    name = getattr(build, "__name__", type(build).__name__)
    built = Built(f"from_optax({name})", name, build, tuple(hypers))
    return GenericOptimizer(
        built.call,
        built.init,
        built.update,
        dict(hypers),
        usual_domains(build, hypers) | dict(domains or {}),
        init_from_hypers=True,
    )


@dataclass(frozen=True)
class Built:
    """What an optax optimizer is built by; no closure, so that it can be pickled.

    Attributes:
      call: the user's call, for messages.
      name: of the function.
      build: from hyperparameters to an optax transformation.
      names: of the hyperparameters.
    """

    call: str
    name: str
    build: Callable[..., optax.GradientTransformation]
    names: tuple[str, ...]

    def transformation(self, h: Mapping[str, Array]) -> optax.GradientTransformationExtraArgs:
        """The transformation with these hyperparameters."""
        try:
            return optax.with_extra_args_support(self.build(**h))
        except jax.errors.ConcretizationTypeError as error:
            raise TypeError(
                f"{self.call}: {self.name} must know one of {list(self.names)} before it runs, and so has "
                "no derivative in it; leave that one out of hypers, and fix it with functools.partial. "
                f"{str(error).splitlines()[0]}"
            ) from error

    def init(self, h: Mapping[str, Array], params: PyTree) -> PyTree:
        """The state before the first step."""
        with lenient():
            return self.transformation(h).init(params)

    def update(
        self,
        h: Mapping[str, Array],
        gradient: PyTree,
        state: PyTree,
        params: PyTree,
        context: StepContext,
    ) -> tuple[PyTree, PyTree]:
        """Parameters and state after a step."""

        def value_fn(params: PyTree, obj_fn: Any = None, grad_fn: Any = None) -> Array:
            return context.loss(params)  # a line search refuses arguments that this function does not take

        def step(h: Any, gradient: PyTree, state: PyTree, params: PyTree, value: Any) -> Any:
            transformation = self.transformation(h)
            more = {
                "value": value,
                "grad": gradient,
                "value_fn": value_fn,
                "obj_fn": context.loss,
                "grad_fn": lambda params, i: jax.grad(context.loss)(params),
            }
            if value is None:
                del more["value"]
            if _injected(state):
                state = _refreshed(state, transformation.init(params))
            updates, state = _updated(self.call, transformation, gradient, state, params, more)
            return optax.apply_updates(params, updates), state

        with lenient():
            return finite(step, self.call)(dict(h), gradient, state, params, context.value)


def _updated(
    call: str,
    transformation: optax.GradientTransformationExtraArgs,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
    more: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    """An optax update, called with those of the available arguments that it accepts."""
    try:
        return transformation.update(gradient, state, params, **more)
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused and refused[1] in more:
            fewer = {name: x for name, x in more.items() if name != refused[1]}
            return _updated(call, transformation, gradient, state, params, fewer)
        if missing := re.search(r"missing \d+ required .*argument.*", str(error)):
            raise TypeError(
                f"{call}: its update is {missing[0]}; there is only {list(more)}. In optax's own loop the "
                "loss must be handed on: update(gradient, state, params, value=..., value_fn=...)"
            ) from error
        raise


def _is_injected(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "hyperparams") and hasattr(node, "inner_state")


def _injected(state: PyTree) -> bool:
    """Whether `optax.inject_hyperparams` keeps hyperparameters in the state."""
    return any(map(_is_injected, jax.tree.leaves(state, is_leaf=_is_injected)))


def _refreshed(state: PyTree, fresh: PyTree) -> PyTree:
    """The state, with the hyperparameters that `optax.inject_hyperparams` keeps in it updated."""

    def renew(old: Any, new: Any) -> Any:
        if not _is_injected(old):
            return old
        return old._replace(
            hyperparams=new.hyperparams, inner_state=_refreshed(old.inner_state, new.inner_state)
        )

    return jax.tree.map(renew, state, fresh, is_leaf=_is_injected)


class ProgramState(NamedTuple):
    """State of an optimizer as an optax transformation: the step, and the variables by name."""

    step: Array
    variables: dict[str, PyTree]


def as_optax(
    optimizer: AnyOptimizer, hypers: Mapping[str, PyTree]
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of `hypergrad.train`, with its learned hyperparameters, as an optax transformation.

    Args:
      optimizer: a program of moves, reversible or not, or what `from_optax` returned.
      hypers: as given to `hypergrad.train`: by name, trees that are prefixes of the parameters, of numbers
        or ``(T, ...)`` schedules; the last value of a schedule is held after its end.

    Returns:
      An optax transformation, for use inside the user's own ``jit``, whose ``update(gradient, state,
      params)`` needs ``params``.  An optimizer that looks at the network (`hypergrad.kfac`) also needs what
      its network takes, ``update(..., meta=, batch=)``; one that tries out steps
      (`hypergrad.adaptive_kfac`) ``value_fn=``, the loss as a function of the parameters; and one of optax
      that looks at the loss (``optax.polyak_sgd``) ``value=`` or ``value_fn=``.

    Raises:
      ValueError: a hyperparameter is unknown or missing; the optimizer looks at single examples; or, from
        ``update``, something it needs is missing.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp, optax
    >>> transformation = hg.as_optax(hg.adam(), {"learning_rate": jnp.array([0.1, 0.05])})
    >>> w = jnp.ones(2)
    >>> state = transformation.init(w)
    >>> updates, state = transformation.update(2 * w, state, w)
    >>> updates
    Array([-0.10000002, -0.10000002], dtype=float32)

    K-FAC, whose network is given the batch at every update:

    >>> import jax
    >>> from hypergrad import curvature, layers
    >>> def network(w, meta, x, probes):
    ...     return x @ w + probes, x
    >>> loss = lambda w, x: 0.5 * jnp.mean(jnp.sum((x @ w - 1) ** 2, axis=1))
    >>> optimizer = hg.kfac(network, curvature.normal(), fisher=layers.exact())
    >>> transformation = hg.as_optax(optimizer, {"learning_rate": 0.2, "momentum": 0.5})
    >>> @jax.jit
    ... def step(w, state, x):
    ...     gradient = jax.grad(loss)(w, x)
    ...     updates, state = transformation.update(gradient, state, w, batch=x)
    ...     return optax.apply_updates(w, updates), state
    >>> w, x = jnp.zeros((2, 2)), jnp.eye(2)
    >>> state = transformation.init(w)
    >>> for _ in range(20):
    ...     w, state = step(w, state, x)
    >>> bool(loss(w, x) < 0.1)
    True
    """
    call = f"as_optax({optimizer.name}, hypers)"
    values = with_defaults(call, optimizer, hypers)
    if optimizer.per_example:
        raise ValueError(
            f"{call}: {optimizer.name} looks at single examples, and optax has "
            "only their mean gradient for it; use it with hypergrad.train"
        )
    stepper = _Stepper(call, optimizer, values)

    def init(params: PyTree) -> ProgramState:
        step, merged = jnp.zeros((), jnp.int32), stepper.merged(params)
        hypers = stepper.hypers(step, merged)
        start, layout = optimizer.start(call, None, hypers[0] if hypers else {}, merged)
        return ProgramState(step, optimizer.state_of(start, layout))

    def update(
        gradient: PyTree,
        state: ProgramState,
        params: PyTree = None,
        *,
        meta: PyTree = None,
        batch: PyTree = None,
        value: Array | None = None,
        value_fn: Callable[[PyTree], Array] | None = None,
        **_: Any,
    ) -> tuple[PyTree, ProgramState]:
        if params is None:
            raise ValueError(f"{call}: call update(gradient, state, params)")
        after = optax.safe_increment(state.step)
        context = _context(call, params, (meta, batch), value, value_fn)
        updates, variables = stepper.updates(gradient, state, params, context)
        return updates, ProgramState(after, variables)

    return optax.GradientTransformationExtraArgs(init, update)


class _Stepper(NamedTuple):
    """An optimizer with its hyperparameters, which makes one step at a time.

    Attributes:
      call: the user's call, for messages.
      optimizer: an optimizer of either kind.
      values: its hyperparameters by name; schedules have the step as their leading axis.
    """

    call: str
    optimizer: AnyOptimizer
    values: Mapping[str, PyTree]

    def merged(self, params: PyTree) -> PyTree:
        """The tree that the optimizer moves."""
        blocks = self.optimizer.blocks
        return params if blocks is None else blocks.merge(params)

    def hypers(self, step: Array, merged: PyTree) -> list[dict[str, Array]]:
        """The hyperparameters of a step, by leaf."""

        def at(x: Array) -> Array:
            x = jnp.asarray(x)
            return x if x.ndim == 0 else x[jnp.minimum(step, x.shape[0] - 1)]

        like, _ = self.optimizer.shape_of_hypers(merged, [])
        count = len(jax.tree.leaves(like))
        now = {
            name: [at(x) for x in jax.tree.leaves(jax.tree.broadcast(tree, like))]
            for name, tree in self.values.items()
        }
        return [{name: x[i] for name, x in now.items()} for i in range(count)]

    def updates(
        self, gradient: PyTree, state: ProgramState, params: PyTree, context: StepContext
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """What to add to the parameters, and the optimizer's variables after the step."""
        optimizer, merged = self.optimizer, self.merged(params)
        hypers = self.hypers(state.step, merged)
        if not hypers:  # every leaf is masked
            return gradient, state.variables
        start, layout = optimizer.flat(self.call, state.variables, merged)
        by_leaf = [SimpleNamespace(**h, label=None) for h in hypers]
        for h, label in zip(by_leaf, layout.labels or []):
            h.label = label
        gradients = jax.tree.leaves(self.merged(gradient))
        if optimizer.transform is not None:
            gradients = list(optimizer.transform(by_leaf, gradients))
        trees: dict[str, PyTree] = {}
        if optimizer.observe is not None:
            trees = dict(optimizer.observe(params, context.meta, context.batch, state.step))
        observed = {name: jax.tree.leaves(tree) for name, tree in trees.items()} | {"gradient": gradients}
        at = FloatStep(
            start,
            context.value,
            [{name: x[i] for name, x in observed.items()} for i in range(len(gradients))],
            lambda: [optimizer.program(self.call).moves(h, state.step) for h in by_leaf],
            hypers[0],
            lambda: Examples(lambda params, batch: context.loss(params), context.batch),
            lambda: context,
        )
        new = optimizer.advance(at, layout)
        moved = layout.params.unflatten([leaf[PARAMS] for leaf in new[: layout.params.num_leaves]])
        updates = jax.tree.map(jnp.subtract, moved, merged)
        if optimizer.blocks is not None:
            updates = optimizer.blocks.split(updates, params)
        return updates, optimizer.state_of(new, layout)


def _context(
    call: str,
    params: PyTree,
    data: tuple[PyTree, PyTree],
    value: Any,
    value_fn: Callable[[PyTree], Array] | None,
) -> StepContext:
    """What an update got besides the gradient; the value is None if it was not given."""

    def missing(params: PyTree) -> Array:
        raise ValueError(f"{call}: the optimizer tries out steps; call update(..., value_fn=loss)")

    if value is None and value_fn is not None:
        value = value_fn(params)
    return StepContext(missing if value_fn is None else value_fn, value, *data)
