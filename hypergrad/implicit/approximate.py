"""Hypergradients at approximate solutions, and HOAG, an outer loop that tightens them step by step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hypergrad._base.dtypes import lenient
from hypergrad._base.rules import has_custom_rule
from hypergrad._base.tracing import trace_once
from hypergrad._base.trees import PyTree, describe, floats, norm, shapes_of, sub
from hypergrad.implicit.condition import cast_like, is_scalar, names_of, refuse_point, shape_tree
from hypergrad.implicit.linear import GMRES, ConjugateGradients, LinearSolver, named, solve_or_refuse
from hypergrad.implicit.zeros import is_used, warn_of_zeros


class Hypergradient(NamedTuple):
    """The result of `hypergradient`.

    Attributes:
      value: ``g(w, θ)``, a scalar.
      gradient: ``dg/dθ``, a tree like the hyperparameters.
      adjoint: ``u``, a tree like the parameters; a start for the next linear system.
    """

    value: Array
    gradient: PyTree
    adjoint: PyTree


def hypergradient(
    objective: Callable[[PyTree, PyTree], Array],
    outer: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    hypers: PyTree,
    *,
    linear: LinearSolver | None = None,
    tolerance: float | Array = 1e-4,
    start: PyTree = None,
) -> Hypergradient:
    """The hypergradient at an approximate minimum: ``∂g/∂θ - ∂/∂θ ⟨∂f/∂w, u⟩``, ``∂²f/∂w² u = ∂g/∂w``.

    It equals the gradient through `minimizer`, and the adjoint is passed in and out for warm starts.

    Args:
      objective: ``f(params, hypers) -> scalar``, which the parameters minimize.
      outer: ``g(params, hypers) -> scalar``.
      params: ``w``, a tree of floats.
      hypers: ``θ``, a tree of floats; there may be millions, at the cost of one more gradient.
      linear: solver of the linear system, by default `ConjugateGradients`, or `GMRES` if the objective
        contains derivatives written by hand, as for `minimizer`.
      tolerance: above 0, the largest norm of ``∂f/∂w`` at which the parameters count as a minimum.
      start: start of the linear solver, a tree like the parameters, such as the adjoint at hyperparameters
        nearby; by default 0.

    Returns:
      A `Hypergradient`.  A `ZeroHypergradientWarning` announces hyperparameters without influence.

    Raises:
      ConvergenceError: if a residual is above its tolerance; see `root`.
      ValueError: if trees do not fit, or a function does not return a scalar.
      TypeError: if parameters or hyperparameters are not floats.

    Source: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, algorithm 1.

    >>> import jax.numpy as jnp
    >>> from hypergrad import implicit
    >>> objective, outer = lambda w, h: (w - h) ** 2 + w**2, lambda w, h: (w - 1) ** 2
    >>> float(implicit.hypergradient(objective, outer, 1.5, 3.0).gradient)
    0.5
    """
    shown = ConjugateGradients() if linear is None else linear
    call = f"hypergradient(objective, outer, params, hypers, linear={named(shown)})"
    params, hypers = floats(call, "params", params), floats(call, "hypers", hypers)
    by_hand = has_custom_rule(jax.make_jaxpr(objective)(params, hypers))
    if linear is None:
        linear = GMRES() if by_hand else shown
    objective, inner_shape = trace_once(objective, params, hypers)
    outer, outer_shape = trace_once(outer, params, hypers)
    for role, shape in {"objective": inner_shape, "outer": outer_shape}.items():
        if not is_scalar(shape):
            raise ValueError(f"{call}: {role} must return one scalar float, and returned {describe(shape)}")
    if start is not None and shapes_of(start) != shapes_of(params):
        raise ValueError(f"{call}: start must be like params, {describe(params)}, not {describe(start)}")
    structure: Any
    leaves, structure = jax.tree.flatten(hypers)

    def both(leaves: list[Array], w: PyTree) -> PyTree:
        theta = structure.unflatten(leaves)
        return jax.grad(objective)(w, theta), outer(w, theta)

    used = is_used(both, shape_tree(leaves), shape_tree(params))
    if not all(used):
        warn_of_zeros(call, [name for name, u in zip(names_of({"hypers": hypers}), used) if not u])
    matvec: Callable[[PyTree], PyTree]
    if by_hand:  # the matrix need not be symmetric, and its transpose is needed
        slope = jax.grad(objective)
        residual, pull_back = jax.vjp(slope, params, hypers)
        matvec = lambda u: pull_back(u)[0]  # noqa: E731
    else:
        residual, matvec = jax.linearize(lambda w: jax.grad(objective)(w, hypers), params)
    result = jax.value_and_grad(outer, argnums=(0, 1))(params, hypers)
    value, (to_params, direct) = refuse_point(call, result, norm(residual), tolerance)
    u = solve_or_refuse(call, linear, matvec, to_params, start)
    if by_hand:
        return Hypergradient(value, sub(direct, pull_back(u)[1]), u)
    # Forwards along u, then backwards: one gradient, whatever the number of hyperparameters.
    along = lambda h: jax.jvp(lambda w: objective(w, h), (params,), (u,))[1]  # noqa: E731
    return Hypergradient(value, sub(direct, jax.grad(along)(hypers)), u)


class Hoag(NamedTuple):
    """The result of `hoag` after ``K`` outer steps.

    Attributes:
      hypers: ``θ`` after the last step.
      params: ``w`` at the last step, for the hyperparameters before that step.
      adjoint: ``u`` at the last step, a tree like the parameters.
      values: ``(K,)``, ``g`` before every step.
    """

    hypers: PyTree
    params: PyTree
    adjoint: PyTree
    values: Array


def hoag(
    objective: Callable[[PyTree, PyTree], Array],
    outer: Callable[[PyTree, PyTree], Array],
    hypers: PyTree,
    init: PyTree,
    *,
    solve: Callable[[PyTree, PyTree, Array], PyTree],
    tolerances: Array,
    optimizer: optax.GradientTransformation,
    linear: LinearSolver | None = None,
) -> Hoag:
    """Hyperparameter optimization with approximate gradients, which become accurate only in the end.

    At step ``k`` both the minimum and the linear system are solved to ``ε_k``, starting from the solutions
    of step ``k - 1``; then the optimizer moves the hyperparameters.  It converges if ``Σ ε_k`` does.

    Args:
      objective: ``f(params, hypers) -> scalar``, the inner objective.
      outer: ``g(params, hypers) -> scalar``.
      hypers: ``θ`` at the start, a tree of floats, unconstrained.
      init: ``w`` at the start, a tree of floats.
      solve: ``solve(params, hypers, tolerance) -> params``, a JAX function (or `host` of a NumPy function)
        that iterates until ``|∂f/∂w| <= tolerance``, which is checked.
      tolerances: ``ε``, ``(K,)``, floats above 0, one for each outer step; for example
        ``0.1 * 0.9 ** arange(K)``.
      optimizer: optax optimizer of the hyperparameters.
      linear: solver of the linear system, by default as for `hypergradient`; its tolerance is replaced by
        ``ε_k``, relative to the right-hand side.  If it sets ``accept``, that is left as it is.

    Returns:
      A `Hoag`.

    Raises:
      ConvergenceError, ValueError, TypeError: as for `hypergradient`.

    Source: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, algorithm 1.

    >>> import jax, jax.numpy as jnp, optax
    >>> from hypergrad import implicit
    >>> objective, outer = lambda w, h: (w - h) ** 2 + w**2, lambda w, h: (w - 1) ** 2
    >>> def solve(w, h, tolerance):  # gradient descent
    ...     slope = lambda w: jax.grad(objective)(w, h)
    ...     return jax.lax.while_loop(lambda w: abs(slope(w)) > tolerance, lambda w: w - 0.1 * slope(w), w)
    >>> found = implicit.hoag(objective, outer, 0.0, 0.0, solve=solve,
    ...                       tolerances=0.1 * 0.8 ** jnp.arange(40), optimizer=optax.sgd(0.5))
    >>> bool(jnp.allclose(found.hypers, 2, atol=1e-3))
    True
    """
    call = "hoag(objective, outer, hypers, init)"
    hypers, init = floats(call, "hypers", hypers), floats(call, "init", init)
    tolerances = jnp.asarray(tolerances)
    if tolerances.ndim != 1 or not jnp.issubdtype(tolerances.dtype, jnp.floating):
        raise ValueError(
            f"{call}: tolerances must be floats (K,), one per step, not {describe(tolerances)}"
        )
    if not isinstance(tolerances, jax.core.Tracer) and not (tolerances > 0).all():
        raise ValueError(f"{call}: tolerances must be above 0, and the least is {tolerances.min()}")

    if linear is None:
        by_hand = has_custom_rule(jax.make_jaxpr(objective)(init, hypers))
        linear = GMRES() if by_hand else ConjugateGradients()

    def step(carry: tuple[PyTree, PyTree, PyTree, PyTree], tolerance: Array) -> tuple[Any, Array]:
        hypers, params, adjoint, state = carry
        params = cast_like(call, solve(params, hypers, tolerance), params)
        accurate: Any = replace(linear, tolerance=tolerance)  # type: ignore[type-var]
        found = hypergradient(
            objective, outer, params, hypers, linear=accurate, tolerance=tolerance, start=adjoint
        )
        with lenient():
            updates, state = optimizer.update(found.gradient, state, hypers)
            hypers = optax.apply_updates(hypers, updates)
        return (hypers, params, found.adjoint, state), found.value

    first = (hypers, init, jax.tree.map(jnp.zeros_like, init), optimizer.init(hypers))
    (hypers, params, adjoint, _), values = jax.lax.scan(step, first, tolerances)
    return Hoag(hypers, params, adjoint, values)
