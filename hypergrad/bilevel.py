"""Bilevel problems ``min_θ g(w*(θ), θ)``, ``w*(θ) = argmin_w f(w, θ)``, by solvers that move both at once.

Such a solver moves the hyperparameters long before the parameters have converged.  All of them work on one
description, a `Problem`, and each is a pair of functions, as optimizers of optax are; `solve` runs it.

================  =====================================  ============  ====================================
solver            ``u`` in the step of ``θ``             work          use it
================  =====================================  ============  ====================================
`saba`            as `soba`, with less and less noise    3             **Recommended**, if its tables fit
`soba`            ``u <- u - β (A u - ∂g/∂w)``           3             **Recommended** otherwise
`amortized`       the same, after more steps of ``w``    T + 2 U + 3   Situational: hard inner problems
`f2sa`            none; off by ``O(1/λ)``                3 T + 3       Situational: no second derivatives
`unrolled`        ``α Σ_{k<T} (I - α A)^k ∂g/∂w``        3 T + 1       Situational: runs that stop early
`truncated`       its first ``K`` terms                  T + 2 K + 1   Situational: cheaper, and biased
`t1_t2`           ``α ∂g/∂w``                            T + 3         Situational: cheap, most biased
`darts`           ``ξ ∂g/∂w``                            5             Situational: the same
`darts(order=1)`  0                                      2             Not recommended: direct effects only
================  =====================================  ============  ====================================

They follow ``∂g/∂θ - M u`` downwards, and at the solution ``u = A⁻¹ ∂g/∂w``.  Work is that of a step with
minibatches of one example.  A gradient, in parameters and hyperparameters together, is 1.  A product with
second derivatives is 2, as usual, even where the gradient in it was kept and not computed again; but
``∂f/∂w``, ``A u`` and ``M u`` come out of one pass, and are not counted apart, as calls in papers are.

Where ``f`` holds derivatives written by hand (``jax.custom_vjp`` and ``jax.custom_jvp``: straight-through,
reversed, clipped gradients), ``∂f/∂w`` is what JAX gives, and ``A`` is the derivative of that, which need
not be symmetric: ``Aᵀ`` stands in the place of ``A`` above.

========  ==============  ==================================================================
symbol    name            meaning
========  ==============  ==================================================================
``w``     params          inner variables, a tree of ``d`` numbers
``θ``     hypers          outer variables, a tree of ``h`` numbers, unconstrained
``f``     inner           what ``w`` minimises, a mean over examples
``g``     outer           what ``θ`` is to minimise at the minimum, a mean over examples
``A``                     ``∂²f/∂w²``, ``(d, d)``
``M``                     ``∂²f/∂θ∂w``, ``(h, d)``
``u``     adjoint         approximation of ``A⁻¹ ∂g/∂w``, a tree like ``w``
``α``     rate            step size of ``w``
``β``     linear_rate     step size of ``u``
``γ``     hyper_rate      step size of ``θ``
``ξ``     lookahead       step size of the step of ``w`` that `darts` looks ahead
``T``     inner_steps     steps of ``w`` for one of ``θ``
``U``     linear_steps    steps of ``u`` for one of ``θ``
``K``     window          the last steps of ``w`` that are differentiated
``λ``     penalty         weight of ``f`` beside ``g``
========  ==============  ==================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad.adjoints import Adjoint, Stored, Truncated
from hypergrad.linear import sub
from hypergrad.optimizers.momentum import sgd
from hypergrad.program import Optimizer
from hypergrad.rules import has_custom_rule
from hypergrad.spectra import PyTree, check_whole, describe, floats
from hypergrad.train import train

Rate = float | Array | Callable[[Array], Array]  # a number, or a schedule: count -> number


# ---- the problem


@dataclass(frozen=True)
class Problem:
    """Two functions of parameters, hyperparameters and rows of data, each a mean over its rows.

    ``f(w, θ) = mean_i inner(w, θ, [i])`` over ``inner_size`` examples, and ``g`` likewise.  The rows are
    cut into blocks of ``batch_size`` neighbours, of which a step draws some at random; without a batch size
    there is one block.  Shuffle the data before: neighbours stay together.

    Args:
      inner: ``inner(params, hypers, rows) -> scalar``, a JAX function, ``rows`` being ``(b,)`` int32.
      outer: ``outer(params, hypers, rows) -> scalar``, on examples of its own.
      inner_size: number of examples of the inner function; None if it does not look at the rows.  Rows
        beyond the arrays it looks into would be read as the last, as JAX does: give their length.
      outer_size: number of examples of the outer function, likewise.
      batch_size: rows of a minibatch, of either kind; it divides both numbers.  None for all of them.

    Raises:
      ValueError: for numbers that are not whole, or not at least 1, and a batch size that does not divide.

    >>> import jax.numpy as jnp
    >>> from hypergrad import bilevel
    >>> X = jnp.arange(12.0).reshape(6, 2)
    >>> inner = lambda w, log_penalty, rows: (
    ...     jnp.mean((X[rows] @ w - 1) ** 2) + jnp.exp(log_penalty) * jnp.sum(w**2))
    >>> outer = lambda w, log_penalty, rows: jnp.mean((X[3:][rows] @ w - 2) ** 2)
    >>> bilevel.Problem(inner, outer, inner_size=6, outer_size=3, batch_size=3).inner_blocks
    2
    """

    inner: Callable[[PyTree, PyTree, Array], Array]
    outer: Callable[[PyTree, PyTree, Array], Array]
    inner_size: int | None = None
    outer_size: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        call, sizes = str(self), {"inner_size": self.inner_size, "outer_size": self.outer_size}
        for name, number in (sizes | {"batch_size": self.batch_size}).items():
            if number is not None:
                check_whole(call, name, number, 1, None)
        for name, size in sizes.items():
            if self.batch_size is not None and size is not None and size % self.batch_size:
                raise ValueError(
                    f"{call}: batch_size must divide {name}, or the mean over blocks is not that over "
                    f"examples; leave out {size % self.batch_size} of the examples, or take another one"
                )

    def __str__(self) -> str:
        sizes = f"inner_size={self.inner_size}, outer_size={self.outer_size}, batch_size={self.batch_size}"
        return f"Problem(inner, outer, {sizes})"

    @property
    def inner_batch(self) -> int:
        """Rows in a block of the inner function."""
        return 1 if self.inner_size is None else self.batch_size or self.inner_size

    @property
    def outer_batch(self) -> int:
        """Rows in a block of the outer function."""
        return 1 if self.outer_size is None else self.batch_size or self.outer_size

    @property
    def inner_blocks(self) -> int:
        """Number of blocks of the inner function."""
        return (self.inner_size or 1) // self.inner_batch

    @property
    def outer_blocks(self) -> int:
        """Number of blocks of the outer function."""
        return (self.outer_size or 1) // self.outer_batch

    def inner_rows(self, block: Array) -> Array:
        """Rows of a block of the inner function, ``(b,)`` int32."""
        return block * self.inner_batch + jnp.arange(self.inner_batch, dtype=jnp.int32)

    def outer_rows(self, block: Array) -> Array:
        """Rows of a block of the outer function, ``(b,)`` int32."""
        return block * self.outer_batch + jnp.arange(self.outer_batch, dtype=jnp.int32)

    def draw(self, key: Array, inner: int, outer: int) -> tuple[Array, Array]:
        """Blocks, ``(inner,)`` and ``(outer,)`` int32, independent and uniform."""
        inner_key, outer_key = jax.random.split(key)
        return (
            jax.random.randint(inner_key, (inner,), 0, self.inner_blocks, jnp.int32),
            jax.random.randint(outer_key, (outer,), 0, self.outer_blocks, jnp.int32),
        )


class State(NamedTuple):
    """Where a solver is.

    Attributes:
      step: how many were made, int32.
      params: ``w``.
      hypers: ``θ``.
      memory: what else the solver keeps, such as ``u``.
    """

    step: Array
    params: PyTree
    hypers: PyTree
    memory: PyTree


class Work(NamedTuple):
    """Evaluations of gradients of single examples.

    Attributes:
      start: before the first step.
      step: at every step.
    """

    start: int
    step: int


class Solver(NamedTuple):
    """A bilevel method: two functions, as for an optimizer of optax, and what they cost.

    Attributes:
      name: as the user would call it.
      init: ``init(problem, params, hypers) -> State``.
      step: ``step(problem, state, key) -> State``, with a key of its own for every step.
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
      evaluations: ``(steps / every + 1,)`` int64 in NumPy: gradients of single examples up to there.
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
      steps: at least 1.
      key: of all minibatches.
      record: ``record(state) -> pytree``, called at the start and after every ``every`` steps.
      every: divides ``steps``.

    Returns:
      A `Solution`.

    Raises:
      ValueError, TypeError: where an argument cannot be meant as it is; before any work starts.

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


# ---- solvers that keep the solution of the linear system


def soba(*, rate: Rate, hyper_rate: Rate, linear_rate: Rate | None = None) -> Solver:
    """Stochastic, single loop: ``w``, ``u`` and ``θ`` all take a step at once.

    ``w <- w - α ∂f/∂w;  u <- u - β (A u - ∂g/∂w);  θ <- θ - γ (∂g/∂θ - M u)``

    On minibatches it comes as near as the rates are small; they may decrease.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      linear_rate: ``β``, a number or a schedule; by default ``α``.

    Returns:
      The solver.

    Raises:
      ValueError: for a rate that is not above 0.

    Source: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic
    and global variance reduction algorithms", NeurIPS 2022 (SOBA); its ``v`` is ``-u``.

    >>> from hypergrad import bilevel
    >>> bilevel.soba(rate=0.1, hyper_rate=lambda count: 0.1 / (1 + count) ** 0.5).name
    'soba(rate=0.1, hyper_rate=<schedule>, linear_rate=0.1)'
    """
    linear_rate = rate if linear_rate is None else linear_rate
    name = _called("soba", rate=rate, hyper_rate=hyper_rate, linear_rate=linear_rate)

    def step(problem: Problem, state: State, key: Array) -> State:
        (i,), (j,) = problem.draw(key, 1, 1)
        inner = _second(problem.inner, state, problem.inner_rows(i), state.memory)
        outer = _first(problem.outer, state, problem.outer_rows(j))
        return _move_all(state, state.memory, inner, outer, (rate, linear_rate, hyper_rate))

    def work(problem: Problem) -> Work:
        return Work(0, 2 * problem.inner_batch + problem.outer_batch)

    return Solver(name, _starting(_zeros), step, work)


class Averages(NamedTuple):
    """Variance reduction by SAGA, for a tree that is a mean over blocks.

    Attributes:
      table: what every block gave when it was last drawn, a tree with the blocks as leading axis.
      mean: of the table.
      block: the next to be drawn, int32.  It is drawn a step ahead, and read after the table was written,
        so that the table changes in place; a loop would else copy it at every step.
      entry: that of the table for this block.
    """

    table: PyTree
    mean: PyTree
    block: Array
    entry: PyTree


class Reduced(NamedTuple):
    """What `saba` keeps.

    Attributes:
      adjoint: ``u``.
      inner: averages of ``(∂f/∂w, A u, M u)``.
      outer: averages of ``(∂g/∂w, ∂g/∂θ)``.
    """

    adjoint: PyTree
    inner: Averages
    outer: Averages


def saba(*, rate: Rate, hyper_rate: Rate, linear_rate: Rate | None = None) -> Solver:
    """`soba` with variance reduction: constant rates on minibatches; linear convergence where ``h`` allows.

    It is linear where ``h(θ) = g(w*(θ), θ)`` satisfies the Polyak-Łojasiewicz inequality, for rates that
    are small enough; larger ones diverge, sometimes late.

    Each of ``∂f/∂w``, ``A u``, ``M u``, ``∂g/∂w`` and ``∂g/∂θ`` is replaced by
    ``x_i - table_i + mean(table)``, where ``x_i`` is that of the block drawn; then ``table_i <- x_i``.
    The tables hold ``blocks (2 d + h)`` and ``blocks (d + h)`` numbers, and start with one pass over the
    data.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      linear_rate: ``β``, a number or a schedule; by default ``α``.

    Returns:
      The solver.

    Raises:
      ValueError: for a rate that is not above 0.

    Source: as `soba` (SABA), with a table entry for a block of examples; Defazio, Bach, Lacoste-Julien,
    "SAGA: a fast incremental gradient method", NeurIPS 2014.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad import bilevel
    >>> targets = jnp.array([0.0, 1.0, 2.0])
    >>> inner = lambda w, h, rows: jnp.mean((w - h - targets[rows]) ** 2)
    >>> outer = lambda w, h, rows: jnp.mean((w - 3 * targets[rows]) ** 2)
    >>> problem = bilevel.Problem(inner, outer, inner_size=3, outer_size=3, batch_size=1)
    >>> solver = bilevel.saba(rate=0.1, hyper_rate=0.05)
    >>> found = bilevel.solve(problem, 0.0, 0.0, solver, steps=1000, key=jax.random.key(0))
    >>> round(float(found.hypers), 3)
    2.0
    """
    linear_rate = rate if linear_rate is None else linear_rate
    name = _called("saba", rate=rate, hyper_rate=hyper_rate, linear_rate=linear_rate)

    def init(problem: Problem, params: PyTree, hypers: PyTree) -> State:
        zero = _zeros(params)
        state = State(jnp.int32(0), params, hypers, None)
        inner = _averages(
            problem.inner_blocks,
            lambda i: _second(problem.inner, state, problem.inner_rows(i), zero),
        )
        outer = _averages(
            problem.outer_blocks, lambda j: _first(problem.outer, state, problem.outer_rows(j))
        )
        return state._replace(memory=Reduced(zero, inner, outer))

    def step(problem: Problem, state: State, key: Array) -> State:
        u, inner, outer = state.memory
        (i,), (j,) = problem.draw(key, 1, 1)  # for the next step
        new = _second(problem.inner, state, problem.inner_rows(inner.block), u)
        to_inner, inner = _reduced(inner, new, i)
        to_outer, outer = _reduced(outer, _first(problem.outer, state, problem.outer_rows(outer.block)), j)
        moved = _move_all(state, u, to_inner, to_outer, (rate, linear_rate, hyper_rate))
        return moved._replace(memory=Reduced(moved.memory, inner, outer))

    def work(problem: Problem) -> Work:
        return Work(
            2 * problem.inner_blocks * problem.inner_batch + problem.outer_blocks * problem.outer_batch,
            2 * problem.inner_batch + problem.outer_batch,
        )

    return Solver(name, init, step, work)


def amortized(
    *, rate: Rate, hyper_rate: Rate, inner_steps: int, linear_steps: int, linear_rate: Rate | None = None
) -> Solver:
    """Alternating, warm-started: ``T`` steps of ``w``, ``U`` steps of ``u``, one of ``θ``.

    The steps are those of `soba`, each on its own minibatch of ``f`` and all on one of ``g``; ``w`` and
    ``u`` go on from where they were.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      inner_steps: ``T >= 1``.
      linear_steps: ``U >= 1``.
      linear_rate: ``β``, a number or a schedule; by default ``α``.

    Returns:
      The solver.

    Raises:
      ValueError: for a rate that is not above 0, and numbers of steps below 1.

    Source: Arbel and Mairal, "Amortized implicit differentiation for stochastic bilevel optimization",
    ICLR 2022 (AmIGO); Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced
    design", ICML 2021.

    >>> from hypergrad import bilevel
    >>> bilevel.amortized(rate=0.1, hyper_rate=0.5, inner_steps=10, linear_steps=5).name
    'amortized(rate=0.1, hyper_rate=0.5, linear_rate=0.1, inner_steps=10, linear_steps=5)'
    """
    linear_rate = rate if linear_rate is None else linear_rate
    rates = {"rate": rate, "hyper_rate": hyper_rate, "linear_rate": linear_rate}
    name = _called("amortized", **rates, whole={"inner_steps": inner_steps, "linear_steps": linear_steps})

    def step(problem: Problem, state: State, key: Array) -> State:
        blocks, (j,) = problem.draw(key, inner_steps + linear_steps + 1, 1)
        state = state._replace(params=_descended(problem, state, rate, blocks[:inner_steps]))
        to_params, direct = _first(problem.outer, state, problem.outer_rows(j))

        def improve(u: PyTree, i: Array) -> tuple[PyTree, None]:
            _, Au, _ = _second(problem.inner, state, problem.inner_rows(i), u)
            return _moved(u, linear_rate, state.step, sub(Au, to_params)), None

        u, _ = jax.lax.scan(improve, state.memory, blocks[inner_steps:-1])
        _, _, Mu = _second(problem.inner, state, problem.inner_rows(blocks[-1]), u)
        hypers = _moved(state.hypers, hyper_rate, state.step, sub(direct, Mu))
        return State(state.step + 1, state.params, hypers, u)

    def work(problem: Problem) -> Work:
        inner = inner_steps + 2 * linear_steps + 2
        return Work(0, inner * problem.inner_batch + problem.outer_batch)

    return Solver(name, _starting(_zeros), step, work)


# ---- solvers that differentiate steps


def unrolled(
    *,
    rate: Rate,
    hyper_rate: Rate,
    inner_steps: int,
    optimizer: Optimizer | None = None,
    adjoint: Adjoint | None = None,
    restart: bool = False,
) -> Solver:
    """Alternating: a training run of ``T`` steps, and one step of ``θ`` along its hypergradient.

    ``w' = train(w, θ);  θ <- θ - γ d g(w', θ) / dθ;  w <- w'``

    With gradient descent on all the data it ends where ``u = α Σ_{k<T} (I - α A)^k ∂g/∂w``, and so off by
    ``(I - α A)^T``.  The state of the optimizer starts anew every time.

    Args:
      rate: ``α``, the learning rate, a number or a schedule over the steps of ``θ``.
      hyper_rate: ``γ``, a number or a schedule.
      inner_steps: ``T >= 1``.
      optimizer: of `hypergrad.train`, by default `hypergrad.sgd`; its other hyperparameters have their
        defaults.
      adjoint: how the run is differentiated, by default `hypergrad.Stored`.
      restart: whether every run starts from the first parameters, and ``w`` is only where it ended.

    Returns:
      The solver.  What an adjoint computes again is not counted.

    Raises:
      ValueError: for a rate that is not above 0, and fewer than 1 step.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015; warm-started, Franceschi et al., "Bilevel programming for hyperparameter
    optimization and meta-learning", ICML 2018.

    >>> import hypergrad as hg
    >>> solver = hg.bilevel.unrolled(rate=0.1, hyper_rate=1.0, inner_steps=100, optimizer=hg.momentum(),
    ...                              adjoint=hg.Reversible(), restart=True)
    """
    optimizer = sgd() if optimizer is None else optimizer
    adjoint = Stored() if adjoint is None else adjoint
    name = _called("unrolled", rate=rate, hyper_rate=hyper_rate, whole={"inner_steps": inner_steps})

    def step(problem: Problem, state: State, key: Array) -> State:
        blocks, (j,) = problem.draw(key, inner_steps, 1)
        start = state.memory if restart else state.params
        alpha = {"learning_rate": _at(rate, state.step)}
        settings: Any = {"steps": inner_steps, "optimizer": optimizer, "adjoint": adjoint}
        rows = jax.vmap(problem.inner_rows)(blocks)

        def outer(hypers: PyTree) -> tuple[Array, PyTree]:
            params = train(problem.inner, start, alpha, hypers, rows, **settings).params
            return problem.outer(params, hypers, problem.outer_rows(j)), params

        slope, params = jax.grad(outer, has_aux=True)(state.hypers)
        hypers = _moved(state.hypers, hyper_rate, state.step, slope)
        return State(state.step + 1, params, hypers, state.memory)

    def work(problem: Problem) -> Work:
        window = adjoint.steps if isinstance(adjoint, Truncated) else inner_steps
        inner = inner_steps + 2 * min(window, inner_steps)
        return Work(0, inner * problem.inner_batch + problem.outer_batch)

    return Solver(name, _starting(lambda params: params if restart else None), step, work)


def truncated(*, rate: Rate, hyper_rate: Rate, inner_steps: int, window: int) -> Solver:
    """`unrolled`, warm-started, where only the last ``K`` of ``T`` steps are differentiated.

    ``u = α Σ_{k<K} (I - α A)^k ∂g/∂w`` where it ends, for gradient descent on all the data.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      inner_steps: ``T >= 1``.
      window: ``K``, in ``[1, T]``.

    Returns:
      The solver.

    Raises:
      ValueError: for a rate that is not above 0, and numbers of steps out of range.

    Source: Shaban, Cheng, Hatch, Boots, "Truncated back-propagation for bilevel optimization", AISTATS
    2019.

    >>> from hypergrad import bilevel
    >>> bilevel.truncated(rate=0.1, hyper_rate=0.5, inner_steps=20, window=5).name
    'truncated(rate=0.1, hyper_rate=0.5, inner_steps=20, window=5)'
    """
    whole = {"inner_steps": inner_steps, "window": window}
    name = _called("truncated", rate=rate, hyper_rate=hyper_rate, whole=whole)
    if window > inner_steps:
        raise ValueError(f"{name}: window must be at most inner_steps; there are no more to differentiate")
    settings: Any = {"rate": rate, "hyper_rate": hyper_rate, "inner_steps": inner_steps}
    return unrolled(**settings, adjoint=Truncated(window))._replace(name=name)


def t1_t2(*, rate: Rate, hyper_rate: Rate, inner_steps: int = 1) -> Solver:
    """`truncated` to the last step: the inverse of ``A`` is replaced by ``α``, ``u = α ∂g/∂w``.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      inner_steps: ``T >= 1``, steps on the training set (T1 in the paper) for one on the other (T2).

    Returns:
      The solver.

    Raises:
      ValueError: for a rate that is not above 0, and fewer than 1 step.

    Source: Luketina, Berglund, Greff, Raiko, "Scalable gradient-based tuning of continuous regularization
    hyperparameters", ICML 2016.

    >>> from hypergrad import bilevel
    >>> bilevel.t1_t2(rate=0.1, hyper_rate=0.5).name
    't1_t2(rate=0.1, hyper_rate=0.5, inner_steps=1)'
    """
    name = _called("t1_t2", rate=rate, hyper_rate=hyper_rate, whole={"inner_steps": inner_steps})
    solver = truncated(rate=rate, hyper_rate=hyper_rate, inner_steps=inner_steps, window=1)
    return solver._replace(name=name)


def darts(*, rate: Rate, hyper_rate: Rate, order: int = 2, lookahead: Rate | None = None) -> Solver:
    """One-level: a step of ``θ`` as if ``w`` were to take one more step, then one step of ``w``.

    ``θ <- θ - γ d/dθ g(w - ξ ∂f/∂w, θ);  w <- w - α ∂f/∂w``, the first on its own minibatches.  The first
    order has ``ξ = 0``, and sees ``θ`` only where ``g`` depends on it directly.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      order: 1 or 2.
      lookahead: ``ξ``, a number or a schedule, for the second order; by default ``α``.

    Returns:
      The solver.

    Raises:
      ValueError: for a rate that is not above 0, another order, and a lookahead at the first order.

    Source: Liu, Simonyan, Yang, "DARTS: differentiable architecture search", ICLR 2019, algorithm 1 and
    equation 7; the product with second derivatives is exact here.

    >>> from hypergrad import bilevel
    >>> bilevel.darts(rate=0.1, hyper_rate=0.5, order=1).name
    'darts(rate=0.1, hyper_rate=0.5, order=1)'
    """
    ahead: dict[str, Any] = {} if lookahead is None else {"lookahead": lookahead}
    name = _called("darts", rate=rate, hyper_rate=hyper_rate, **ahead, whole={"order": order})
    if order > 2 or (order == 1 and ahead):
        raise ValueError(f"{name}: order must be 1, without lookahead, or 2")
    xi = rate if lookahead is None else lookahead

    def step(problem: Problem, state: State, key: Array) -> State:
        (i, k), (j,) = problem.draw(key, 2, 1)
        at = state
        if order == 2:
            at = state._replace(params=_descended(problem, state, xi, i[None]))
        to_params, slope = _first(problem.outer, at, problem.outer_rows(j))
        if order == 2:
            _, _, Mg = _second(problem.inner, state, problem.inner_rows(i), to_params)
            slope = _moved(slope, xi, state.step, Mg)
        state = state._replace(hypers=_moved(state.hypers, hyper_rate, state.step, slope))
        params = _descended(problem, state, rate, k[None])
        return state._replace(step=state.step + 1, params=params)

    def work(problem: Problem) -> Work:
        return Work(0, (1 if order == 1 else 4) * problem.inner_batch + problem.outer_batch)

    return Solver(name, _starting(lambda params: None), step, work)


# ---- by a penalty


def f2sa(*, rate: Rate, hyper_rate: Rate, penalty: Rate, inner_steps: int = 1) -> Solver:
    """By a penalty, without second derivatives: ``min_{θ,y} g(y, θ) + λ (f(y, θ) - min_z f(z, θ))``.

    ``z <- z - α ∂f(z)/∂w;  y <- y - α (∂f(y)/∂w + ∂g(y)/∂w / λ)``, ``T`` times, and then
    ``θ <- θ - γ (∂g(y)/∂θ + λ (∂f(y)/∂θ - ∂f(z)/∂θ))``.

    For a constant ``λ`` the end is off by ``O(1/λ)``; let it grow slowly, such as linearly.  On minibatches
    ``λ`` also multiplies what noise is left in the difference, of which both parts see the same examples.

    Args:
      rate: ``α``, a number or a schedule; the paper's rate of ``y``, times ``λ``.
      hyper_rate: ``γ``, a number or a schedule.
      penalty: ``λ``, a number or a schedule.
      inner_steps: ``T >= 1``.

    Returns:
      The solver; its ``params`` are ``z``, the minimum of ``f``, and its memory is ``y``.

    Raises:
      ValueError: for a rate or penalty that is not above 0, and fewer than 1 step.

    Source: Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel optimization",
    ICML 2023, algorithm 1 (F2SA).

    >>> import jax
    >>> from hypergrad import bilevel
    >>> problem = bilevel.Problem(lambda w, h, rows: (w - h) ** 2 + w**2, lambda w, h, rows: (w - 1) ** 2)
    >>> solver = bilevel.f2sa(rate=0.1, hyper_rate=0.1, penalty=lambda count: 1 + 0.1 * count)
    >>> found = bilevel.solve(problem, 0.0, 0.0, solver, steps=500, key=jax.random.key(0))
    >>> round(float(found.hypers), 2)
    2.0
    """
    rates = {"rate": rate, "hyper_rate": hyper_rate, "penalty": penalty}
    name = _called("f2sa", **rates, whole={"inner_steps": inner_steps})

    def step(problem: Problem, state: State, key: Array) -> State:
        inner, outer = problem.draw(key, inner_steps + 1, inner_steps + 1)
        weight = _at(penalty, state.step)

        def slopes(z: PyTree, y: PyTree, i: Array, j: Array) -> tuple[PyTree, PyTree, PyTree]:
            """Gradients of ``f`` at ``z`` and at ``y``, and of ``g`` at ``y``."""
            rows = problem.inner_rows(i)
            f_z = _first(problem.inner, state._replace(params=z), rows)
            f_y = _first(problem.inner, state._replace(params=y), rows)
            return f_z, f_y, _first(problem.outer, state._replace(params=y), problem.outer_rows(j))

        def descend(zy: tuple[PyTree, PyTree], ij: tuple[Array, Array]) -> tuple[Any, None]:
            z, y = zy
            (f_z, _), (f_y, _), (g_y, _) = slopes(z, y, *ij)
            penalised = jax.tree.map(lambda f, g: f + (g / weight).astype(g.dtype), f_y, g_y)
            return (_moved(z, rate, state.step, f_z), _moved(y, rate, state.step, penalised)), None

        (z, y), _ = jax.lax.scan(descend, (state.params, state.memory), (inner[:-1], outer[:-1]))
        (_, f_z), (_, f_y), (_, g_y) = slopes(z, y, inner[-1], outer[-1])
        slope = jax.tree.map(lambda g, fy, fz: g + (weight * (fy - fz)).astype(g.dtype), g_y, f_y, f_z)
        return State(state.step + 1, z, _moved(state.hypers, hyper_rate, state.step, slope), y)

    def work(problem: Problem) -> Work:
        return Work(0, (inner_steps + 1) * (2 * problem.inner_batch + problem.outer_batch))

    return Solver(name, _starting(lambda params: params), step, work)


# ---- parts


def _starting(memory: Callable[[PyTree], PyTree]) -> Callable[[Problem, PyTree, PyTree], State]:
    """The ``init`` of a solver whose memory starts as a function of the parameters."""
    return lambda problem, params, hypers: State(jnp.int32(0), params, hypers, memory(params))


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def _first(function: Callable[..., Array], state: State, rows: Array) -> tuple[PyTree, PyTree]:
    """Gradients in parameters and hyperparameters; the work is 1."""
    return jax.grad(function, argnums=(0, 1))(state.params, state.hypers, rows)


def _second(
    inner: Callable[..., Array], state: State, rows: Array, u: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """``∂f/∂w``, ``A u`` and ``M u``; the work is 2.

    Forward over reverse, as second derivatives are symmetric.  Those of functions with derivatives written
    by hand are not: reverse over reverse gives ``Aᵀ u``, and ``M u`` of the gradient that ``w`` follows.
    """
    if has_custom_rule(jax.make_jaxpr(inner)(state.params, state.hypers, rows)):
        slope_at = lambda w, h: jax.grad(inner)(w, h, rows)  # noqa: E731
        slope, pull_back = jax.vjp(slope_at, state.params, state.hypers)
        return slope, *pull_back(u)

    def gradient(params: PyTree) -> tuple[PyTree, PyTree]:
        return _first(inner, state._replace(params=params), rows)

    (slope, _), (Au, Mu) = jax.jvp(gradient, (state.params,), (u,))
    return slope, Au, Mu


def _descended(problem: Problem, state: State, rate: Rate, blocks: Array) -> PyTree:
    """``w`` after a step of gradient descent on every one of the blocks."""

    def step(params: PyTree, i: Array) -> tuple[PyTree, None]:
        slope, _ = _first(problem.inner, state._replace(params=params), problem.inner_rows(i))
        return _moved(params, rate, state.step, slope), None

    return jax.lax.scan(step, state.params, blocks)[0]


def _move_all(state: State, u: PyTree, inner: Any, outer: Any, rates: tuple[Rate, Rate, Rate]) -> State:
    """The step of `soba`, from ``(∂f/∂w, A u, M u)`` and ``(∂g/∂w, ∂g/∂θ)``; the memory is ``u``."""
    (slope, Au, Mu), (to_params, direct), t = inner, outer, state.step
    return State(
        step=t + 1,
        params=_moved(state.params, rates[0], t, slope),
        hypers=_moved(state.hypers, rates[2], t, sub(direct, Mu)),
        memory=_moved(u, rates[1], t, sub(Au, to_params)),
    )


def _averages(blocks: int, value: Callable[[Array], PyTree]) -> Averages:
    table = jax.lax.map(value, jnp.arange(blocks, dtype=jnp.int32))
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), table)
    return Averages(table, mean, jnp.int32(0), jax.tree.map(lambda x: x[0], table))


def _reduced(averages: Averages, new: PyTree, block: Array) -> tuple[PyTree, Averages]:
    """The estimate of the mean over blocks from that of one, and the averages for the next block."""
    table, mean, now, entry = averages
    write = partial(jax.lax.dynamic_update_index_in_dim, index=now, axis=0)
    read = partial(jax.lax.dynamic_index_in_dim, index=block, keepdims=False)
    change, blocks = sub(new, entry), len(jax.tree.leaves(table)[0])
    direction = jax.tree.map(jnp.add, mean, change)
    mean = jax.tree.map(lambda mean, change: mean + change / blocks, mean, change)
    table = jax.tree.map(write, table, new)
    return direction, Averages(table, mean, block, jax.tree.map(read, table))


def _at(rate: Rate, count: Array) -> Any:
    return rate(count) if callable(rate) else rate


def _moved(x: PyTree, rate: Rate, count: Array, direction: PyTree) -> PyTree:
    """``x - rate direction``."""
    size = _at(rate, count)
    return jax.tree.map(lambda x, d: (x - size * d).astype(x.dtype), x, direction)


def _called(name: str, *, whole: dict[str, int] | None = None, **rates: Rate) -> str:
    """The user's call for messages, after its numbers have been checked."""
    whole = {} if whole is None else whole
    shown = [f"{key}={_shown(rate)}" for key, rate in rates.items()]
    call = f"{name}({', '.join([*shown, *(f'{key}={number!r}' for key, number in whole.items())])})"
    for key, rate in rates.items():
        # Of a schedule, and of a number under jit, only shape and type are known.
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
