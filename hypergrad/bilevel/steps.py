"""A solver as a pure step, the loop around it, and the parts that steps are made of.

Symbols: see `hypergrad.bilevel`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.checks import check_whole
from hypergrad._base.rules import has_custom_rule
from hypergrad._base.trees import PyTree, describe, floats, sub
from hypergrad.bilevel.problem import Problem

Rate = float | Array | Callable[[Array], Array]  # a number, or a schedule: count -> number


class State(NamedTuple):
    """The state of a solver.

    Attributes:
      step: the number of steps made, int32.
      params: ``w``.
      hypers: ``θ``.
      memory: what else the solver keeps, such as ``u``.
    """

    step: Array
    params: PyTree
    hypers: PyTree
    memory: PyTree


class Work(NamedTuple):
    """The number of gradient evaluations on single examples.

    Attributes:
      start: before the first step.
      step: at every step.
    """

    start: int
    step: int


class Solver(NamedTuple):
    """A bilevel method: two functions, as in an optax optimizer, and their cost.

    Attributes:
      name: the call that makes it.
      init: ``init(problem, params, hypers) -> State``.
      step: ``step(problem, state, key) -> State``, with a different key for every step.
      work: ``work(problem) -> Work``.
    """

    name: str
    init: Callable[[Problem, PyTree, PyTree], State]
    step: Callable[[Problem, State, Array], State]
    work: Callable[[Problem], Work]


class Solution(NamedTuple):
    """What `solve` returns.

    Attributes:
      params: ``w`` after the last step.
      hypers: ``θ`` after the last step.
      state: the last state, from which the solver's ``step`` goes on.
      recorded: what ``record`` returned, with a leading axis of ``steps / every + 1``, the start first.
      evaluations: ``(steps / every + 1,)`` int64 in NumPy: gradients of single examples up to that point.
    """

    params: PyTree
    hypers: PyTree
    state: State
    recorded: PyTree
    evaluations: np.ndarray


def solve(
    problem: Problem,
    params: PyTree,
    hypers: PyTree,
    solver: Solver,
    *,
    steps: int,
    key: Array,
    record: Callable[[State], PyTree] | None = None,
    every: int = 1,
) -> Solution:
    """Run a solver for a number of steps, in one compiled loop.

    Args:
      problem: the two levels.
      params: ``w`` at the start, a tree of floats.
      hypers: ``θ`` at the start, a tree of floats.
      solver: such as `soba`.
      steps: number of steps, at least 1.
      key: PRNG key of all minibatches.
      record: ``record(state) -> pytree``, called at the start and after every ``every`` steps.
      every: number of steps between two records; it divides ``steps``.

    Returns:
      A `Solution`.

    Raises:
      ValueError, TypeError: an argument is invalid; checked before any work starts.

    >>> import jax
    >>> from hypergrad import bilevel
    >>> problem = bilevel.Problem(lambda w, h, rows: (w - h) ** 2 + w**2, lambda w, h, rows: (w - 1) ** 2)
    >>> solver = bilevel.soba(rate=0.1, hyper_rate=0.3)
    >>> found = bilevel.solve(problem, 0.0, 0.0, solver, steps=200, key=jax.random.key(0))
    >>> round(float(found.hypers), 3), int(found.evaluations[-1])
    (2.0, 600)
    """
    call = f"solve(problem, params, hypers, {solver.name}, steps={steps}, every={every})"
    check_whole(call, "steps", steps, 1, None)
    check_whole(call, "every", every, 1, None)
    if steps % every:
        raise ValueError(f"{call}: every must divide steps, so that the end is recorded")
    if not isinstance(key, Array) or key.ndim != (not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"{call}: key must be one key, such as jax.random.key(0)")
    params, hypers = floats(call, "params", params), floats(call, "hypers", hypers)
    for role, function, batch, size in (
        ("inner", problem.inner, problem.inner_batch, problem.inner_size),
        ("outer", problem.outer, problem.outer_batch, problem.outer_size),
    ):
        rows = jnp.zeros(batch, jnp.int32)
        closed, result = jax.make_jaxpr(function, return_shape=True)(params, hypers, rows)
        scalar = isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()
        if not scalar or not jnp.issubdtype(result.dtype, jnp.floating):
            raise ValueError(
                f"{call}: {role} must return one scalar float, and returned {describe(result)}"
            )
        looked_at = any(closed.jaxpr.invars[-1] is v for eqn in closed.jaxpr.eqns for v in eqn.invars)
        if size is None and looked_at:
            raise ValueError(
                f"{call}: {role} looks at its rows, and {problem} does not say how many there are; give "
                f"{role}_size, the number of its examples"
            )

    def step(state: State, _: None) -> tuple[State, None]:
        return solver.step(problem, state, jax.random.fold_in(key, state.step)), None

    def segment(state: State, _: None) -> tuple[State, PyTree]:
        state, _ = jax.lax.scan(step, state, length=every)
        return state, look(state)

    look: Callable[[State], PyTree] = record or (lambda state: None)
    state = solver.init(problem, params, hypers)
    first = look(state)
    state, rest = jax.lax.scan(segment, state, length=steps // every)
    recorded = jax.tree.map(lambda x, xs: jnp.concatenate([jnp.asarray(x)[None], xs]), first, rest)
    work = solver.work(problem)
    evaluations = work.start + work.step * np.arange(0, steps + 1, every, dtype=np.int64)
    return Solution(state.params, state.hypers, state, recorded, evaluations)


def starting_from(memory: Callable[[PyTree], PyTree]) -> Callable[[Problem, PyTree, PyTree], State]:
    """The ``init`` of a solver whose memory starts as a function of the parameters."""
    return lambda problem, params, hypers: State(jnp.int32(0), params, hypers, memory(params))


def zeros_like(tree: PyTree) -> PyTree:
    """A tree of zeros."""
    return jax.tree.map(jnp.zeros_like, tree)


def first_derivatives(function: Callable[..., Array], state: State, rows: Array) -> tuple[PyTree, PyTree]:
    """Gradients in parameters and hyperparameters; the work is 1."""
    return jax.grad(function, argnums=(0, 1))(state.params, state.hypers, rows)


def second_derivatives(
    inner: Callable[..., Array], state: State, rows: Array, u: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """``∂f/∂w``, ``A u`` and ``M u``; the work is 2.

    Forward over reverse, since second derivatives are symmetric.  Those of functions with derivatives
    written by hand are not: for them reverse over reverse gives ``Aᵀ u``, and ``M u`` of the gradient that
    ``w`` follows.
    """
    if has_custom_rule(jax.make_jaxpr(inner)(state.params, state.hypers, rows)):
        slope_at = lambda w, h: jax.grad(inner)(w, h, rows)  # noqa: E731
        slope, pull_back = jax.vjp(slope_at, state.params, state.hypers)
        return slope, *pull_back(u)

    def gradient(params: PyTree) -> tuple[PyTree, PyTree]:
        return first_derivatives(inner, state._replace(params=params), rows)

    (slope, _), (Au, Mu) = jax.jvp(gradient, (state.params,), (u,))
    return slope, Au, Mu


def descended(problem: Problem, state: State, rate: Rate, blocks: Array) -> PyTree:
    """``w`` after one step of gradient descent on each of the blocks."""

    def step(params: PyTree, i: Array) -> tuple[PyTree, None]:
        slope, _ = first_derivatives(problem.inner, state._replace(params=params), problem.inner_rows(i))
        return stepped(params, rate, state.step, slope), None

    return jax.lax.scan(step, state.params, blocks)[0]


def move_all(state: State, u: PyTree, inner: Any, outer: Any, rates: tuple[Rate, Rate, Rate]) -> State:
    """The step of `soba`, from ``(∂f/∂w, A u, M u)`` and ``(∂g/∂w, ∂g/∂θ)``; the memory is ``u``."""
    (slope, Au, Mu), (to_params, direct), t = inner, outer, state.step
    return State(
        step=t + 1,
        params=stepped(state.params, rates[0], t, slope),
        hypers=stepped(state.hypers, rates[2], t, sub(direct, Mu)),
        memory=stepped(u, rates[1], t, sub(Au, to_params)),
    )


def rate_at(rate: Rate, count: Array) -> Any:
    """A rate, or its schedule's value at an iteration."""
    return rate(count) if callable(rate) else rate


def stepped(x: PyTree, rate: Rate, count: Array, direction: PyTree) -> PyTree:
    """``x - rate direction``."""
    size = rate_at(rate, count)
    return jax.tree.map(lambda x, d: (x - size * d).astype(x.dtype), x, direction)


def checked_call(name: str, *, whole: dict[str, int] | None = None, **rates: Rate) -> str:
    """The user's call for messages, after its numbers have been checked."""
    whole = {} if whole is None else whole
    shown = [f"{key}={_shown(rate)}" for key, rate in rates.items()]
    call = f"{name}({', '.join([*shown, *(f'{key}={number!r}' for key, number in whole.items())])})"
    for key, rate in rates.items():
        # For a schedule, or a number under jit, only shape and type are known.
        value: Any = jax.eval_shape(rate, jnp.int32(0)) if callable(rate) else rate
        known = isinstance(value, int | float | np.generic | np.ndarray | Array | jax.ShapeDtypeStruct)
        kinds = (jnp.floating, jnp.integer)
        one = (
            known and jnp.ndim(value) == 0 and any(jnp.issubdtype(jnp.result_type(value), k) for k in kinds)
        )
        unknown = callable(rate) or isinstance(rate, jax.core.Tracer)
        if not one or not (unknown or 0 < value < np.inf):
            raise ValueError(f"{call}: {key} must be one number above 0, or a schedule: count -> number")
    for key, number in whole.items():
        check_whole(call, key, number, 1, None)
    return call


def _shown(rate: Rate) -> str:
    if callable(rate):
        return "<schedule>"
    return "<traced>" if isinstance(rate, jax.core.Tracer) else f"{rate}"
