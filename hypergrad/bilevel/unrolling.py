"""Solvers that differentiate through some steps of gradient descent."""

from typing import Any

import jax
from jax import Array

from hypergrad._base.trees import PyTree
from hypergrad.adjoints.strategies import Adjoint, Stored, Truncated
from hypergrad.bilevel.problem import Problem
from hypergrad.bilevel.steps import (
    Rate,
    Solver,
    State,
    Work,
    checked_call,
    descended,
    first_derivatives,
    rate_at,
    second_derivatives,
    starting_from,
    stepped,
)
from hypergrad.optimizers.momentum_family import sgd
from hypergrad.program import Optimizer
from hypergrad.training.inner_loop import train


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

    With gradient descent on all the data it ends where ``u = α Σ_{k<T} (I - α A)^k ∂g/∂w``, and is thus off
    by ``(I - α A)^T``.  The state of the optimizer is reset every time.

    Args:
      rate: ``α``, the learning rate, a number or a schedule over the steps of ``θ``.
      hyper_rate: ``γ``, a number or a schedule.
      inner_steps: ``T >= 1``.
      optimizer: as for `hypergrad.train`, by default `hypergrad.sgd`; its other hyperparameters have their
        defaults.
      adjoint: how the run is differentiated, by default `hypergrad.Stored`.
      restart: whether every run starts from the initial parameters, so that ``w`` only reports where it
        ended.

    Returns:
      The solver.  What an adjoint recomputes is not counted as work.

    Raises:
      ValueError: a rate is not above 0, or there is fewer than 1 step.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015; warm-started, Franceschi et al., "Bilevel programming for hyperparameter
    optimization and meta-learning", ICML 2018.

    >>> import hypergrad as hg
    >>> solver = hg.bilevel.unrolled(rate=0.1, hyper_rate=1.0, inner_steps=100, optimizer=hg.momentum(),
    ...                              adjoint=hg.Reversible(), restart=True)
    """
    optimizer = sgd() if optimizer is None else optimizer
    adjoint = Stored() if adjoint is None else adjoint
    name = checked_call("unrolled", rate=rate, hyper_rate=hyper_rate, whole={"inner_steps": inner_steps})

    def step(problem: Problem, state: State, key: Array) -> State:
        blocks, (j,) = problem.draw(key, inner_steps, 1)
        start = state.memory if restart else state.params
        alpha = {"learning_rate": rate_at(rate, state.step)}
        settings: Any = {"steps": inner_steps, "optimizer": optimizer, "adjoint": adjoint}
        rows = jax.vmap(problem.inner_rows)(blocks)

        def outer(hypers: PyTree) -> tuple[Array, PyTree]:
            params = train(problem.inner, start, alpha, hypers, rows, **settings).params
            return problem.outer(params, hypers, problem.outer_rows(j)), params

        slope, params = jax.grad(outer, has_aux=True)(state.hypers)
        hypers = stepped(state.hypers, hyper_rate, state.step, slope)
        return State(state.step + 1, params, hypers, state.memory)

    def work(problem: Problem) -> Work:
        window = adjoint.steps if isinstance(adjoint, Truncated) else inner_steps
        inner = inner_steps + 2 * min(window, inner_steps)
        return Work(0, inner * problem.inner_batch + problem.outer_batch)

    return Solver(name, starting_from(lambda params: params if restart else None), step, work)


def truncated(*, rate: Rate, hyper_rate: Rate, inner_steps: int, window: int) -> Solver:
    """`unrolled`, warm-started, with only the last ``K`` of ``T`` steps differentiated.

    For gradient descent on all the data it ends with ``u = α Σ_{k<K} (I - α A)^k ∂g/∂w``.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      inner_steps: ``T >= 1``.
      window: ``K``, in ``[1, T]``.

    Returns:
      The solver.

    Raises:
      ValueError: a rate is not above 0, or a number of steps is out of range.

    Source: Shaban, Cheng, Hatch, Boots, "Truncated back-propagation for bilevel optimization", AISTATS
    2019.

    >>> from hypergrad import bilevel
    >>> bilevel.truncated(rate=0.1, hyper_rate=0.5, inner_steps=20, window=5).name
    'truncated(rate=0.1, hyper_rate=0.5, inner_steps=20, window=5)'
    """
    whole = {"inner_steps": inner_steps, "window": window}
    name = checked_call("truncated", rate=rate, hyper_rate=hyper_rate, whole=whole)
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
      ValueError: a rate is not above 0, or there is fewer than 1 step.

    Source: Luketina, Berglund, Greff, Raiko, "Scalable gradient-based tuning of continuous regularization
    hyperparameters", ICML 2016.

    >>> from hypergrad import bilevel
    >>> bilevel.t1_t2(rate=0.1, hyper_rate=0.5).name
    't1_t2(rate=0.1, hyper_rate=0.5, inner_steps=1)'
    """
    name = checked_call("t1_t2", rate=rate, hyper_rate=hyper_rate, whole={"inner_steps": inner_steps})
    solver = truncated(rate=rate, hyper_rate=hyper_rate, inner_steps=inner_steps, window=1)
    return solver._replace(name=name)


def darts(*, rate: Rate, hyper_rate: Rate, order: int = 2, lookahead: Rate | None = None) -> Solver:
    """One-level: a step of ``θ`` as if ``w`` were about to take a step, then a step of ``w``.

    ``θ <- θ - γ d/dθ g(w - ξ ∂f/∂w, θ);  w <- w - α ∂f/∂w``, the first on its own minibatches.  At first
    order ``ξ = 0``, and only the direct dependence of ``g`` on ``θ`` counts.

    Args:
      rate: ``α``, a number or a schedule.
      hyper_rate: ``γ``, a number or a schedule.
      order: 1 or 2.
      lookahead: ``ξ``, a number or a schedule, for the second order; by default ``α``.

    Returns:
      The solver.

    Raises:
      ValueError: a rate is not above 0, the order is another, or a lookahead is given at first order.

    Source: Liu, Simonyan, Yang, "DARTS: differentiable architecture search", ICLR 2019, algorithm 1 and
    equation 7; the product with second derivatives is exact here.

    >>> from hypergrad import bilevel
    >>> bilevel.darts(rate=0.1, hyper_rate=0.5, order=1).name
    'darts(rate=0.1, hyper_rate=0.5, order=1)'
    """
    ahead: dict[str, Any] = {} if lookahead is None else {"lookahead": lookahead}
    name = checked_call("darts", rate=rate, hyper_rate=hyper_rate, **ahead, whole={"order": order})
    if order > 2 or (order == 1 and ahead):
        raise ValueError(f"{name}: order must be 1, without lookahead, or 2")
    xi = rate if lookahead is None else lookahead

    def step(problem: Problem, state: State, key: Array) -> State:
        (i, k), (j,) = problem.draw(key, 2, 1)
        at = state
        if order == 2:
            at = state._replace(params=descended(problem, state, xi, i[None]))
        to_params, slope = first_derivatives(problem.outer, at, problem.outer_rows(j))
        if order == 2:
            _, _, Mg = second_derivatives(problem.inner, state, problem.inner_rows(i), to_params)
            slope = stepped(slope, xi, state.step, Mg)
        state = state._replace(hypers=stepped(state.hypers, hyper_rate, state.step, slope))
        params = descended(problem, state, rate, k[None])
        return state._replace(step=state.step + 1, params=params)

    def work(problem: Problem) -> Work:
        return Work(0, (1 if order == 1 else 4) * problem.inner_batch + problem.outer_batch)

    return Solver(name, starting_from(lambda params: None), step, work)
