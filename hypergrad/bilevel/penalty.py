"""F2SA: bilevel optimization by first derivatives only, with a penalty on the inner loss."""

from typing import Any

import jax
from jax import Array

from hypergrad._base.trees import PyTree
from hypergrad.bilevel.problem import Problem
from hypergrad.bilevel.steps import (
    Rate,
    Solver,
    State,
    Work,
    checked_call,
    first_derivatives,
    rate_at,
    starting_from,
    stepped,
)


def f2sa(*, rate: Rate, hyper_rate: Rate, penalty: Rate, inner_steps: int = 1) -> Solver:
    """By a penalty, without second derivatives: ``min_{θ,y} g(y, θ) + λ (f(y, θ) - min_z f(z, θ))``.

    ``z <- z - α ∂f(z)/∂w;  y <- y - α (∂f(y)/∂w + ∂g(y)/∂w / λ)``, ``T`` times, and then
    ``θ <- θ - γ (∂g(y)/∂θ + λ (∂f(y)/∂θ - ∂f(z)/∂θ))``.

    For a constant ``λ`` the end point is off by ``O(1/λ)``; let ``λ`` grow slowly, for example linearly.
    On minibatches ``λ`` also multiplies the noise that is left in the difference, both parts of which use
    the same examples.

    Args:
      rate: ``α``, a number or a schedule; the paper's rate of ``y``, times ``λ``.
      hyper_rate: ``γ``, a number or a schedule.
      penalty: ``λ``, a number or a schedule.
      inner_steps: ``T >= 1``.

    Returns:
      The solver; its ``params`` are ``z``, the minimum of ``f``, and its memory is ``y``.

    Raises:
      ValueError: a rate or the penalty is not above 0, or there is fewer than 1 step.

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
    name = checked_call("f2sa", **rates, whole={"inner_steps": inner_steps})

    def step(problem: Problem, state: State, key: Array) -> State:
        inner, outer = problem.draw(key, inner_steps + 1, inner_steps + 1)
        weight = rate_at(penalty, state.step)

        def slopes(z: PyTree, y: PyTree, i: Array, j: Array) -> tuple[PyTree, PyTree, PyTree]:
            """Gradients of ``f`` at ``z`` and at ``y``, and of ``g`` at ``y``."""
            rows = problem.inner_rows(i)
            f_z = first_derivatives(problem.inner, state._replace(params=z), rows)
            f_y = first_derivatives(problem.inner, state._replace(params=y), rows)
            return (
                f_z,
                f_y,
                first_derivatives(problem.outer, state._replace(params=y), problem.outer_rows(j)),
            )

        def descend(zy: tuple[PyTree, PyTree], ij: tuple[Array, Array]) -> tuple[Any, None]:
            z, y = zy
            (f_z, _), (f_y, _), (g_y, _) = slopes(z, y, *ij)
            penalised = jax.tree.map(lambda f, g: f + (g / weight).astype(g.dtype), f_y, g_y)
            return (stepped(z, rate, state.step, f_z), stepped(y, rate, state.step, penalised)), None

        (z, y), _ = jax.lax.scan(descend, (state.params, state.memory), (inner[:-1], outer[:-1]))
        (_, f_z), (_, f_y), (_, g_y) = slopes(z, y, inner[-1], outer[-1])
        slope = jax.tree.map(lambda g, fy, fz: g + (weight * (fy - fz)).astype(g.dtype), g_y, f_y, f_z)
        return State(state.step + 1, z, stepped(state.hypers, hyper_rate, state.step, slope), y)

    def work(problem: Problem) -> Work:
        return Work(0, (inner_steps + 1) * (2 * problem.inner_batch + problem.outer_batch))

    return Solver(name, starting_from(lambda params: params), step, work)
