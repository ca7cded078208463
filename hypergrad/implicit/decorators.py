"""`root` and `minimizer`: solvers made differentiable by the conditions that their solutions meet."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.opaque import with_rule
from hypergrad._base.rules import linearized
from hypergrad._base.trees import PyTree, floats, norm, split
from hypergrad.implicit.condition import (
    Condition,
    arguments_by_name,
    cast_like,
    condition_of,
    names_of,
    refuse_point,
    shape_tree,
)
from hypergrad.implicit.linear import GMRES, ConjugateGradients, LinearSolver, named, solve_or_refuse
from hypergrad.implicit.zeros import announced, stopped, watched, watched_jvp


def root(
    optimality: Callable[..., PyTree], *, linear: LinearSolver | None = None, tolerance: float = 1e-4
) -> Callable[[Callable[..., PyTree]], Callable[..., PyTree]]:
    """Make a solver of ``F(w, θ) = 0`` differentiable: ``dw = -A⁻¹ ∂F/∂θ dθ``, ``A = ∂F/∂w``.

    This is a decorator for ``solve(init, *args, **settings) -> params``.  How it solves does not matter:
    loops and SciPy are never differentiated.  Solvers that are not JAX code run unchanged outside of
    ``jit`` and ``vmap``; inside they need `host`.

    Args:
      optimality: ``optimality(params, *args) -> F``, a JAX function; ``F`` is a tree like the parameters.
      linear: solver of the linear system, by default `GMRES`.
      tolerance: above 0, the largest Euclidean norm of ``F`` at which a point counts as a solution.

    Returns:
      The decorator.  The decorated solver takes ``(init, *args, **settings)``, where ``init`` is a tree
      like the parameters, ``args`` are pytrees of arrays that the optimality receives too, and ``settings``
      are for the solver alone.  A keyword for which the optimality has a parameter is an argument, not a
      setting.  Derivatives of any order, forward and reverse, go through ``args`` and through what the
      optimality closes over.  Derivatives in ``init``, in ``settings`` and in arguments on which the
      optimality does not depend are 0, which a `ZeroHypergradientWarning` announces before anything is
      solved.

      The decorated solver raises a ConvergenceError if the norm of ``F`` is above the tolerance, or the
      residual of the linear system above what ``linear`` accepts; inside compiled code JAX raises a
      ``JaxRuntimeError`` that quotes it.  It raises a ValueError if trees do not fit, and a TypeError if
      they are not floats or the optimality cannot be called with the same arguments.

    Raises:
      ValueError: if tolerance is not above 0.

    Source: Blondel et al., "Efficient and modular implicit differentiation", NeurIPS 2022.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad import implicit
    >>> @implicit.root(lambda w, x: w**2 - x)
    ... def square_root(init, x):
    ...     return jax.lax.fori_loop(0, 20, lambda _, w: (w + x / w) / 2, init)
    >>> jax.grad(square_root, argnums=1)(1.0, 4.0)
    Array(0.25, dtype=float32)
    """
    return _decorator("root(optimality", "optimality", optimality, linear, tolerance, minimises=False)


def minimizer(
    objective: Callable[..., Array], *, linear: LinearSolver | None = None, tolerance: float = 1e-4
) -> Callable[[Callable[..., PyTree]], Callable[..., PyTree]]:
    """Make a minimizer of ``f(w, θ)`` differentiable: `root` of ``F = ∂f/∂w``, whose ``A`` is symmetric.

    Args:
      objective: ``objective(params, *args) -> scalar``, a JAX function that is twice differentiable.
      linear: solver of the linear system, by default `ConjugateGradients`, for minima where the Hessian is
        positive definite; or `GMRES` if the objective contains derivatives written by hand, such as a
        ``jax.custom_vjp``, since ``A`` then need not be symmetric.
      tolerance: above 0, the largest Euclidean norm of ``∂f/∂w`` at which a point counts as a minimum.

    Returns:
      A decorator for ``solve(init, *args, **settings) -> params``; see `root`, also for what the decorated
      solver raises.

    Raises:
      ValueError: if tolerance is not above 0.

    Source: see `root`; Bengio, "Gradient-based optimization of hyperparameters", Neural Computation 2000.

    >>> import jax, scipy.optimize
    >>> from hypergrad import implicit
    >>> objective = lambda w, target: (w - target) ** 2 + w**4
    >>> @implicit.minimizer(objective)
    ... def minimum(init, target):
    ...     return scipy.optimize.minimize_scalar(objective, args=(float(target),)).x
    >>> slope = jax.grad(minimum, argnums=1)(0.0, 3.0)  # 1 / (1 + 6 w²) at w = 1
    >>> round(float(slope), 3)
    0.143
    """
    return _decorator("minimizer(objective", "objective", objective, linear, tolerance, minimises=True)


def host(solve: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Turn a solver in NumPy or SciPy into a function that can be compiled and mapped, by a callback.

    Inside compiled code it should call no JAX functions: they may wait for the program that waits for them.

    Args:
      solve: ``solve(init, *args, **settings) -> params``; it receives NumPy arrays, and must return arrays
        with the shapes in ``init``.

    Returns:
      The solver as a JAX function without derivatives; decorate it with `root` or `minimizer`.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from hypergrad import implicit
    >>> @implicit.root(lambda w, x: w**2 - x)
    ... @implicit.host
    ... def square_root(init, x):
    ...     return np.sqrt(x)
    >>> jax.jit(jax.grad(square_root, argnums=1))(jnp.float32(1), jnp.float32(4))
    Array(0.25, dtype=float32)
    """

    @functools.wraps(solve)
    def wrapped(init: PyTree, *args: PyTree, **settings: Any) -> PyTree:
        structure: Any
        leaves, structure = jax.tree.flatten((args, settings))
        flags = [isinstance(x, jax.Array) for x in leaves]
        arrays, merge = split(flags, leaves)
        shapes = shape_tree(init)

        def call(init: PyTree, arrays: Sequence[Any]) -> PyTree:
            plain: Any = [np.asarray(x) for x in arrays]
            given, keywords = structure.unflatten(merge(plain))
            found = solve(jax.tree.map(np.asarray, init), *given, **keywords)
            return jax.tree.map(lambda x, like: np.asarray(x, like.dtype), found, shapes)

        return jax.pure_callback(call, shapes, init, arrays, vmap_method="sequential")

    return wrapped


def _decorator(
    start: str,
    role: str,
    function: Callable[..., PyTree],
    linear: LinearSolver | None,
    tolerance: float,
    *,
    minimises: bool,
) -> Callable[[Callable[..., PyTree]], Callable[..., PyTree]]:
    shown: LinearSolver = (ConjugateGradients() if minimises else GMRES()) if linear is None else linear
    call = f"{start}, linear={named(shown)}, tolerance={tolerance})"
    if not tolerance > 0:
        raise ValueError(f"{call}: tolerance must be above 0")

    def decorate(solve: Callable[..., PyTree]) -> Callable[..., PyTree]:
        @functools.wraps(solve)
        def solved(init: PyTree, *args: PyTree, **settings: Any) -> PyTree:
            init = floats(call, "init", init)
            named, settings = arguments_by_name(function, len(args), settings)
            given: Any = jax.tree.map(jnp.asarray, (args, named))
            condition, captured = condition_of(call, role, function, init, given, linear, minimises)

            # Flattening sorts the keys of a dictionary.
            names = [*condition.names, *names_of({"init": init}), *names_of(dict(sorted(settings.items())))]
            everything = [captured, given, init, settings]
            captured, given, init, settings = announced(
                call, names, condition, shape_tree(init), everything
            )
            start, (args, named), settings = jax.tree.map(stopped, (init, given, settings))
            params = cast_like(call, solve(start, *args, **named, **settings), init)
            params = jax.lax.stop_gradient(params)
            inputs = [*captured, *jax.tree.leaves(given)]
            size = norm(condition(params, jax.lax.stop_gradient(inputs)))
            params, valid = refuse_point(call, (params, jnp.ones(())), size, tolerance)
            return _implicit(condition, params, inputs, valid)

        return solved

    return decorate


watched.defjvp(watched_jvp, symbolic_zeros=True)


def _implicit(condition: Condition, params: PyTree, inputs: list[Array], valid: Array) -> PyTree:
    """The solution as a function of the inputs of its condition.

    Derivatives are multiplied by ``valid``, since they may not depend on the parameters: otherwise a
    compiler would drop the check that these are a solution.

    Args:
      condition: which the solution meets.
      params: the solution.
      inputs: of the condition.
      valid: the scalar 1, or NaN to make derivatives NaN.
    """
    rule = partial(_implicit_jvp, condition)
    solution = with_rule(lambda params, inputs, valid: params, rule, symbolic_zeros=True, by_hand=True)
    return solution(params, inputs, valid)


def _implicit_jvp(condition: Condition, primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
    params, inputs, valid = primals
    params = _implicit(condition, params, inputs, valid)  # for derivatives of this derivative
    flags = [dot is not None for dot in tangents[1]]
    moving, merge = split(flags, inputs)
    dots = [dot for dot, flag in zip(tangents[1], flags) if flag]
    change = linearized(lambda moving: condition(params, merge(moving)), moving)[1](dots)
    matvec = linearized(lambda w: condition(w, inputs), params)[1]
    solve = partial(solve_or_refuse, condition.call, condition.linear)
    minus = jax.lax.custom_linear_solve(matvec, change, solve, solve, symmetric=condition.symmetric)
    return params, jax.tree.map(lambda x: -valid.astype(x.dtype) * x, minus)
