"""Solvers that move parameters, hyperparameters and the linear system's solution together."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._base.trees import PyTree, sub
from hypergrad.bilevel.problem import Problem
from hypergrad.bilevel.steps import (
    Rate,
    Solver,
    State,
    Work,
    checked_call,
    descended,
    first_derivatives,
    move_all,
    second_derivatives,
    starting_from,
    stepped,
    zeros_like,
)


def soba(*, rate: Rate, hyper_rate: Rate, linear_rate: Rate | None = None) -> Solver:
    """Stochastic, single loop: ``w``, ``u`` and ``θ`` all take a step at once.

    ``w <- w - α ∂f/∂w;  u <- u - β (A u - ∂g/∂w);  θ <- θ - γ (∂g/∂θ - M u)``

    On minibatches the distance to the solution depends on how small the rates are; they may decrease.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      linear_rate: ``β``, a number or a schedule; by default ``α``.

    Returns:
      The solver.

    Raises:
      ValueError: a rate is not above 0.

    Source: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic
    and global variance reduction algorithms", NeurIPS 2022 (SOBA); its ``v`` is ``-u``.

    >>> from hypergrad import bilevel
    >>> bilevel.soba(rate=0.1, hyper_rate=lambda count: 0.1 / (1 + count) ** 0.5).name
    'soba(rate=0.1, hyper_rate=<schedule>, linear_rate=0.1)'
    """
    linear_rate = rate if linear_rate is None else linear_rate
    name = checked_call("soba", rate=rate, hyper_rate=hyper_rate, linear_rate=linear_rate)

    def step(problem: Problem, state: State, key: Array) -> State:
        (i,), (j,) = problem.draw(key, 1, 1)
        inner = second_derivatives(problem.inner, state, problem.inner_rows(i), state.memory)
        outer = first_derivatives(problem.outer, state, problem.outer_rows(j))
        return move_all(state, state.memory, inner, outer, (rate, linear_rate, hyper_rate))

    def work(problem: Problem) -> Work:
        return Work(0, 2 * problem.inner_batch + problem.outer_batch)

    return Solver(name, starting_from(zeros_like), step, work)


class Averages(NamedTuple):
    """Variance reduction by SAGA, for a tree that is a mean over blocks.

    Attributes:
      table: what every block gave when it was last drawn, a tree with the blocks as leading axis.
      mean: the mean of the table.
      block: the block of the next step, int32.  It is drawn a step ahead and read after the table was
        written, so that the table changes in place; otherwise a loop would copy it at every step.
      entry: the table's entry for this block.
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

    Convergence is linear if ``h(θ) = g(w*(θ), θ)`` satisfies the Polyak-Łojasiewicz inequality and the
    rates are small enough; with larger rates it diverges, sometimes late.

    Each of ``∂f/∂w``, ``A u``, ``M u``, ``∂g/∂w`` and ``∂g/∂θ`` is replaced by
    ``x_i - table_i + mean(table)``, where ``x_i`` is its value on the drawn block; then ``table_i <- x_i``.
    The tables hold ``blocks (2 d + h)`` and ``blocks (d + h)`` numbers, and start with one pass over the
    data.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      linear_rate: ``β``, a number or a schedule; by default ``α``.

    Returns:
      The solver.

    Raises:
      ValueError: a rate is not above 0.

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
    name = checked_call("saba", rate=rate, hyper_rate=hyper_rate, linear_rate=linear_rate)

    def init(problem: Problem, params: PyTree, hypers: PyTree) -> State:
        zero = zeros_like(params)
        state = State(jnp.int32(0), params, hypers, None)
        inner = _averages(
            problem.inner_blocks,
            lambda i: second_derivatives(problem.inner, state, problem.inner_rows(i), zero),
        )
        outer = _averages(
            problem.outer_blocks, lambda j: first_derivatives(problem.outer, state, problem.outer_rows(j))
        )
        return state._replace(memory=Reduced(zero, inner, outer))

    def step(problem: Problem, state: State, key: Array) -> State:
        u, inner, outer = state.memory
        (i,), (j,) = problem.draw(key, 1, 1)  # for the next step
        new = second_derivatives(problem.inner, state, problem.inner_rows(inner.block), u)
        to_inner, inner = _reduced(inner, new, i)
        to_outer, outer = _reduced(
            outer, first_derivatives(problem.outer, state, problem.outer_rows(outer.block)), j
        )
        moved = move_all(state, u, to_inner, to_outer, (rate, linear_rate, hyper_rate))
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
    ``u`` continue from their last values.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      inner_steps: ``T >= 1``.
      linear_steps: ``U >= 1``.
      linear_rate: ``β``, a number or a schedule; by default ``α``.

    Returns:
      The solver.

    Raises:
      ValueError: a rate is not above 0, or a number of steps is below 1.

    Source: Arbel and Mairal, "Amortized implicit differentiation for stochastic bilevel optimization",
    ICLR 2022 (AmIGO); Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced
    design", ICML 2021.

    >>> from hypergrad import bilevel
    >>> bilevel.amortized(rate=0.1, hyper_rate=0.5, inner_steps=10, linear_steps=5).name
    'amortized(rate=0.1, hyper_rate=0.5, linear_rate=0.1, inner_steps=10, linear_steps=5)'
    """
    linear_rate = rate if linear_rate is None else linear_rate
    rates = {"rate": rate, "hyper_rate": hyper_rate, "linear_rate": linear_rate}
    name = checked_call(
        "amortized", **rates, whole={"inner_steps": inner_steps, "linear_steps": linear_steps}
    )

    def step(problem: Problem, state: State, key: Array) -> State:
        blocks, (j,) = problem.draw(key, inner_steps + linear_steps + 1, 1)
        state = state._replace(params=descended(problem, state, rate, blocks[:inner_steps]))
        to_params, direct = first_derivatives(problem.outer, state, problem.outer_rows(j))

        def improve(u: PyTree, i: Array) -> tuple[PyTree, None]:
            _, Au, _ = second_derivatives(problem.inner, state, problem.inner_rows(i), u)
            return stepped(u, linear_rate, state.step, sub(Au, to_params)), None

        u, _ = jax.lax.scan(improve, state.memory, blocks[inner_steps:-1])
        _, _, Mu = second_derivatives(problem.inner, state, problem.inner_rows(blocks[-1]), u)
        hypers = stepped(state.hypers, hyper_rate, state.step, sub(direct, Mu))
        return State(state.step + 1, state.params, hypers, u)

    def work(problem: Problem) -> Work:
        inner = inner_steps + 2 * linear_steps + 2
        return Work(0, inner * problem.inner_batch + problem.outer_batch)

    return Solver(name, starting_from(zeros_like), step, work)


def _averages(blocks: int, value: Callable[[Array], PyTree]) -> Averages:
    table = jax.lax.map(value, jnp.arange(blocks, dtype=jnp.int32))
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), table)
    return Averages(table, mean, jnp.int32(0), jax.tree.map(lambda x: x[0], table))


def _reduced(averages: Averages, new: PyTree, block: Array) -> tuple[PyTree, Averages]:
    """The estimate of the mean over blocks from one block, and the averages for the next one."""
    table, mean, now, entry = averages
    write = partial(jax.lax.dynamic_update_index_in_dim, index=now, axis=0)
    read = partial(jax.lax.dynamic_index_in_dim, index=block, keepdims=False)
    change, blocks = sub(new, entry), len(jax.tree.leaves(table)[0])
    direction = jax.tree.map(jnp.add, mean, change)
    mean = jax.tree.map(lambda mean, change: mean + change / blocks, mean, change)
    table = jax.tree.map(write, table, new)
    return direction, Averages(table, mean, block, jax.tree.map(read, table))
