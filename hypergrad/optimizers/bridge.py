"""Optimizers from optax, and ours for optax."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.extend.core import Var

from hypergrad import program
from hypergrad.program import PARAMS, Here, Optimizer, Whole, with_defaults
from hypergrad.run import part

PyTree = Any


def from_optax(
    build: Callable[..., optax.GradientTransformation],
    hypers: Mapping[str, float | None],
    domains: Mapping[str, tuple[float, float]] | None = None,
) -> Whole:
    """Any optax optimizer, differentiable in the hyperparameters it is built from.

    Not reversible: differentiate with ``Checkpointed()`` or ``Stored()``.  Optimizers of this library are
    programs of moves instead; many of those are.  Square roots are given the derivative 0 at 0, so that
    coordinates whose gradients are always zero do not make hypergradients NaN.

    Args:
      build: from keyword arguments, one scalar for each of `hypers`, to an optax transformation; traced at
        every step with the hyperparameters of that step.  Its state must not depend on them in its shapes.
      hypers: names and default values; None marks one that must be given to `hypergrad.train`.  They are
        numbers or ``(T,)`` schedules, and the same for all parameters.
      domains: for each hyperparameter, lower and upper end of the half-open range ``[low, high)``.

    Returns:
      An optimizer for `hypergrad.train`.

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

    def built(h: Mapping[str, Array]) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(build(**h))

    def init(params: PyTree) -> PyTree:
        # The state may not depend on hyperparameters, so any values will do.
        some = {k: 0.5 if value is None else value for k, value in hypers.items()}
        return built({k: jnp.asarray(x, jnp.result_type(float)) for k, x in some.items()}).init(params)

    def update(
        h: Mapping[str, Array], gradient: PyTree, state: PyTree, params: PyTree, here: Here
    ) -> tuple[PyTree, PyTree]:
        def step(h: Any, gradient: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
            updates, state = built(h).update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        return _with_safe_roots(step)(dict(h), gradient, state, params)

    return Whole(f"from_optax({name})", init, update, dict(hypers), dict(domains or {}))


def _with_safe_roots(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The same function, in which the derivative of a square root at 0 is 0 instead of infinite."""

    def evaluate(jaxpr: Any, consts: Any, arguments: Any) -> list[Any]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments]))
        for eqn in jaxpr.eqns:
            inputs = [values[x] if isinstance(x, Var) else x.val for x in eqn.invars]
            if eqn.primitive.name == "sqrt":
                zero = inputs[0] == 0
                outputs: Any = [jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, inputs[0])))]
            elif eqn.primitive.name in {"jit", "pjit"}:
                inner = eqn.params["jaxpr"]
                outputs = evaluate(inner.jaxpr, inner.consts, inputs)
            else:
                read = {x: value for x, value in zip(eqn.invars, inputs) if isinstance(x, Var)}
                outputs = part(jaxpr, list(read), [eqn], eqn.outvars)(*read.values())
            values |= dict(zip(eqn.outvars, outputs))
        return [values[x] if isinstance(x, Var) else x.val for x in jaxpr.outvars]

    def safe(*arguments: PyTree) -> PyTree:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return safe


class ProgramState(NamedTuple):
    """State of an optimizer as an optax transformation: the step, and the variables by name."""

    step: Array
    variables: dict[str, PyTree]


def as_optax(
    optimizer: Optimizer | Whole, hypers: Mapping[str, PyTree]
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of `hypergrad.train`, with its learned hyperparameters, as an optax transformation.

    Args:
      optimizer: a program of moves, reversible or not, or what `from_optax` returned.
      hypers: as given to `hypergrad.train`: by name, trees that are prefixes of the parameters, of numbers
        or ``(T, ...)`` schedules; the last value of a schedule is held after its end.

    Returns:
      An optax transformation, for use inside the user's own ``jit``, whose ``update(gradient, state,
      params)`` needs ``params``.  An optimizer that looks at the network (`hypergrad.kfac`) also needs what
      its network takes, ``update(..., meta=, batch=)``; and one that tries out steps
      (`hypergrad.adaptive_kfac`) ``value_fn=``, the loss as a function of the parameters.

    Raises:
      ValueError: for hyperparameters that the optimizer does not have, or that are missing; for an
        optimizer that looks at single examples; from ``update`` where something it needs is missing.

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
    values = with_defaults(f"as_optax({optimizer.name}, hypers)", optimizer, hypers)
    if isinstance(optimizer, Whole) and optimizer.per_example:
        raise ValueError(
            f"as_optax({optimizer.name}, hypers): {optimizer.name} looks at single examples, and optax has "
            "only their mean gradient for it; use it with hypergrad.train"
        )

    blocks = optimizer.blocks if isinstance(optimizer, Optimizer) else None

    def merge(params: PyTree) -> PyTree:
        return params if blocks is None else blocks.merge(params)

    def init(params: PyTree) -> ProgramState:
        step = jnp.zeros((), jnp.int32)
        if isinstance(optimizer, Whole):
            return ProgramState(step, {"state": optimizer.init(params)})
        names = optimizer.variables.items()
        return ProgramState(step, {name: jax.tree.map(kept.init, merge(params)) for name, kept in names})

    def update(
        gradient: PyTree,
        state: ProgramState,
        params: PyTree = None,
        *,
        meta: PyTree = None,
        batch: PyTree = None,
        value_fn: Callable[[PyTree], Array] | None = None,
        **_: Any,
    ) -> tuple[PyTree, ProgramState]:
        call = f"as_optax({optimizer.name}, hypers)"
        if params is None:
            raise ValueError(f"{call}: call update(gradient, state, params)")
        merged = merge(params)
        leaves = jax.tree.leaves(merged)
        structure: Any = jax.tree.structure(merged)

        def at_step(value: PyTree) -> list[Array]:
            spread = map(jnp.asarray, jax.tree.leaves(jax.tree.broadcast(value, merged)))
            return [x if x.ndim == 0 else x[jnp.minimum(state.step, x.shape[0] - 1)] for x in spread]

        now = {name: at_step(value) for name, value in values.items()}
        if isinstance(optimizer, Whole):
            first = {name: x[0] for name, x in now.items()}  # the same for all parameters
            here = _here(call, params, meta, batch, value_fn)
            new, inner = optimizer.update(first, gradient, state.variables["state"], params, here)
            updates = jax.tree.map(jnp.subtract, new, params)
            return updates, ProgramState(optax.safe_increment(state.step), {"state": inner})
        hypers = [SimpleNamespace(**{k: x[i] for k, x in now.items()}) for i in range(len(leaves))]
        gradients = jax.tree.leaves(merge(gradient))
        if optimizer.transform is not None:
            gradients = list(optimizer.transform(hypers, gradients))
        observed: Mapping[str, PyTree] = {}
        if optimizer.observe is not None:
            observed = optimizer.observe(params, meta, batch, state.step)
        trees = {name: jax.tree.leaves(tree) for name, tree in observed.items()} | {"gradient": gradients}
        variables = {name: jax.tree.leaves(tree) for name, tree in state.variables.items()}
        start = [
            {PARAMS: leaf} | {name: x[i] for name, x in variables.items()} for i, leaf in enumerate(leaves)
        ]
        seen = [{name: x[i] for name, x in trees.items()} for i in range(len(leaves))]
        moves = [optimizer.moves(h, state.step) for h in hypers]
        moved = program.step(moves, start, seen)
        updates = structure.unflatten([new[PARAMS] - old for new, old in zip(moved, leaves)])
        if blocks is not None:
            updates = blocks.split(updates, params)
        kept = {name: structure.unflatten([new[name] for new in moved]) for name in variables}
        return updates, ProgramState(optax.safe_increment(state.step), kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _here(
    call: str, params: PyTree, meta: PyTree, batch: PyTree, value_fn: Callable[[PyTree], Array] | None
) -> Here:
    """What an update was given besides the gradient."""

    def missing(params: PyTree) -> Array:
        raise ValueError(f"{call}: the optimizer tries out steps; call update(..., value_fn=loss)")

    if value_fn is None:
        return Here(missing, jnp.zeros(()), meta, batch)
    return Here(value_fn, value_fn(params), meta, batch)
