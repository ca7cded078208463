"""Hypergradients at a solution, by the implicit function theorem: nothing of how it was found is needed.

Where ``F(w, θ) = 0`` determines ``w``, its derivative is ``dw = -A⁻¹ ∂F/∂θ dθ``.  Backwards that is one
linear system, whatever the number of hyperparameters: ``Aᵀ u = ∂g/∂w``, and the hypergradient is
``∂g/∂θ - (∂F/∂θ)ᵀ u``.

========  ================  ========================================================================
symbol    name              meaning
========  ================  ========================================================================
``w``     params            the solution, a tree of ``d`` numbers
``θ``     args, hypers      what it is differentiated in
``f``     objective         what ``w`` minimises; then ``F = ∂f/∂w``
``F``     optimality        a tree like ``w``; 0 at the solution
``A``     matvec            ``∂F/∂w``, ``(d, d)``; the Hessian of ``f``
``g``     outer             what is to be small at the solution, such as a validation loss
``u``     adjoint           ``A⁻ᵀ ∂g/∂w``
========  ================  ========================================================================

The linear systems are solved by one of `hypergrad.linear`, whose names are public here.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import partial_eval

from hypergrad.dtypes import lenient
from hypergrad.linear import (
    GMRES,
    ConjugateGradients,
    ConvergenceError,
    Direct,
    LinearSolver,
    Neumann,
    NormalEquations,
    Nystrom,
    Solved,
    linear_solve,
    named,
    norm,
    solve_or_refuse,
    sub,
)
from hypergrad.opaque import with_rule
from hypergrad.reversible import refuse_if
from hypergrad.rules import has_custom_rule, linearized
from hypergrad.run import Hoisted, hoist, split
from hypergrad.spectra import PyTree, describe, floats, shapes_of, trace_once

__all__ = [
    "GMRES",
    "ConjugateGradients",
    "ConvergenceError",
    "Direct",
    "Hoag",
    "Hypergradient",
    "LinearSolver",
    "Neumann",
    "NormalEquations",
    "Nystrom",
    "Solved",
    "ZeroHypergradientWarning",
    "hoag",
    "host",
    "hypergradient",
    "linear_solve",
    "minimizer",
    "root",
]


class ZeroHypergradientWarning(UserWarning):
    """A hypergradient is 0 because the solution does not depend on what it is taken in."""


# ---- solvers made differentiable


def root(
    optimality: Callable[..., PyTree], *, linear: LinearSolver | None = None, tolerance: float = 1e-4
) -> Callable[[Callable[..., PyTree]], Callable[..., PyTree]]:
    """Make a solver of ``F(w, θ) = 0`` differentiable: ``dw = -A⁻¹ ∂F/∂θ dθ``, ``A = ∂F/∂w``.

    A decorator of ``solve(init, *args, **settings) -> params``.  How it solves does not matter: loops and
    SciPy are never differentiated.  Solvers that are not JAX code run as they are outside of ``jit`` and
    ``vmap``, and inside with `host`.

    Args:
      optimality: ``optimality(params, *args) -> F``, a tree like the parameters; a JAX function.
      linear: solver of the linear system, by default `GMRES`.
      tolerance: the largest Euclidean norm of ``F`` at which a point counts as a solution.

    Returns:
      The decorator.  What it returns takes ``(init, *args, **settings)``, where ``init`` is like the
      parameters, ``args`` are pytrees of arrays that the optimality gets too, and ``settings`` are the
      solver's own.  What the optimality has a parameter for may be given by that keyword as well, and is
      then no setting.  Derivatives of any order, forward and reverse, go through ``args`` and through what
      the optimality closes over.  Those in ``init``, in ``settings`` and in arguments the optimality does
      not depend on are 0, which is announced by a `ZeroHypergradientWarning` before anything is solved.

      It raises ConvergenceError where the norm of ``F`` is above the tolerance, or the residual of the
      linear system above that of ``linear``; inside compiled code JAX raises a ``JaxRuntimeError`` that
      quotes it.  ValueError and TypeError, where trees do not fit or are not floats.

    Raises:
      ValueError: for a tolerance that is not above 0.

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
    """Make a minimiser of ``f(w, θ)`` differentiable: `root` of ``F = ∂f/∂w``, whose ``A`` is symmetric.

    Args:
      objective: ``objective(params, *args) -> scalar``, twice differentiable; a JAX function.
      linear: solver of the linear system, by default `ConjugateGradients`, for minima where the Hessian is
        positive definite; `GMRES` where the objective holds derivatives written by hand, such as a
        ``jax.custom_vjp``, since ``A`` then need not be symmetric.
      tolerance: the largest Euclidean norm of ``∂f/∂w`` at which a point counts as a minimum.

    Returns:
      A decorator of ``solve(init, *args, **settings) -> params``; see `root`, also for what raises.

    Raises:
      ValueError: for a tolerance that is not above 0.

    Source: as `root`; Bengio, "Gradient-based optimization of hyperparameters", Neural Computation 2000.

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
    """A solver in NumPy or SciPy as one that may be compiled and mapped, by a callback.

    Inside compiled code it should call no JAX functions: they may wait for the program that waits for them.

    Args:
      solve: ``solve(init, *args, **settings) -> params``; it gets NumPy arrays, and must return arrays of
        the shapes in ``init``.

    Returns:
      The same as a JAX function, without derivatives: decorate it further by `root` or `minimizer`.

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
        shapes = _shapes(init)

        def call(init: PyTree, arrays: Sequence[Any]) -> PyTree:
            plain: Any = [np.asarray(x) for x in arrays]
            given, keywords = structure.unflatten(merge(plain))
            found = solve(jax.tree.map(np.asarray, init), *given, **keywords)
            return jax.tree.map(lambda x, like: np.asarray(x, like.dtype), found, shapes)

        return jax.pure_callback(call, shapes, init, arrays, vmap_method="sequential")

    return wrapped


@dataclass(frozen=True, eq=False)
class _Condition:
    """An optimality condition, traced once.

    Attributes:
      call: the user's call, for messages.
      function: ``F``, or ``f``; of what it closes over, and of the parameters and arguments, flat.
      minimises: whether it is ``f``.
      symmetric: whether ``A`` is: that of ``f``, where all its derivatives are JAX's.
      captured: how many arrays it closes over, the first of the inputs ``θ``; the others are arguments.
      names: of the inputs, for messages.
      linear: the solver.
    """

    call: str
    function: Hoisted
    minimises: bool
    symmetric: bool
    captured: int
    names: tuple[str, ...]
    linear: LinearSolver

    def __call__(self, params: PyTree, inputs: Sequence[Array]) -> PyTree:
        """``F(w, θ)``."""
        captured, args = inputs[: self.captured], inputs[self.captured :]

        def at(params: PyTree) -> PyTree:
            return self.function(captured, [*jax.tree.leaves(params), *args])

        return jax.grad(at)(params) if self.minimises else at(params)


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
            named, settings = _by_name(function, len(args), settings)
            given: Any = jax.tree.map(jnp.asarray, (args, named))
            condition, captured = _condition(call, role, function, init, given, linear, minimises)

            # Flattened, a dictionary is sorted.
            names = [*condition.names, *_names({"init": init}), *_names(dict(sorted(settings.items())))]
            everything = [captured, given, init, settings]
            captured, given, init, settings = _announced(call, names, condition, _shapes(init), everything)
            start, (args, named), settings = jax.tree.map(_stopped, (init, given, settings))
            params = _like(call, solve(start, *args, **named, **settings), init)
            params = jax.lax.stop_gradient(params)
            inputs = [*captured, *jax.tree.leaves(given)]
            size = norm(condition(params, jax.lax.stop_gradient(inputs)))
            params, valid = _refuse_point(call, (params, jnp.ones(())), size, tolerance)
            return _implicit(condition, params, inputs, valid)

        return solved

    return decorate


def _condition(
    call: str,
    role: str,
    function: Callable[..., PyTree],
    params: PyTree,
    given: tuple[Sequence[PyTree], dict[str, PyTree]],
    linear: LinearSolver | None,
    minimises: bool,
) -> tuple[_Condition, list[Array]]:
    """The condition for an objective or an optimality, and what that closes over."""
    args, named = given
    _check_arguments(call, role, function, args, named)
    at = lambda params, given: function(params, *given[0], **given[1])  # noqa: E731
    hoisted, captured, result = hoist(at, *_shapes((params, given)))
    if minimises and not _is_scalar(result):
        raise ValueError(f"{call}: {role} must return one scalar float, and returned {describe(result)}")
    if not minimises and shapes_of(result) != shapes_of(params):
        raise ValueError(
            f"{call}: {role} must return a tree like init, {describe(params)}, and returned "
            f"{describe(result)}"
        )
    names = [f"an array of shape {list(x.shape)} that {role} closes over" for x in captured]
    names += _names(dict(zip(_parameters(function, len(args)), args)))
    names += _names(dict(sorted(named.items())))
    symmetric = minimises and not has_custom_rule(hoisted.jaxpr)
    if linear is None:
        linear = ConjugateGradients() if symmetric else GMRES()
    condition = _Condition(call, hoisted, minimises, symmetric, len(captured), tuple(names), linear)
    return condition, captured


def _by_name(
    function: Callable[..., Any], count: int, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is given by keyword: what the condition has parameters for, and the solver's own settings."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return {}, settings
    by_place = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known -= set(by_place[:count])
    named = {name: x for name, x in settings.items() if name in known}
    return named, {name: x for name, x in settings.items() if name not in known}


def _check_arguments(
    call: str, role: str, function: Callable[..., Any], args: Sequence[Any], named: dict[str, Any]
) -> None:
    """Refuse arguments that the condition has no parameters for, or too few."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, *args, **named)
    except TypeError as error:
        raise TypeError(
            f"{call}: the solver was called with init, {len(args)} more by place and {list(named)} by "
            f"keyword, and {role}{signature} cannot be called with the same: {error}. What the solution "
            f"depends on are parameters of {role}, in the same order or with the same names; other "
            "keywords are settings of the solver"
        ) from None


def _is_scalar(result: Any) -> bool:
    is_array = isinstance(result, jax.ShapeDtypeStruct)
    return is_array and result.shape == () and jnp.issubdtype(result.dtype, jnp.floating)


def _parameters(function: Callable[..., Any], count: int) -> list[str]:
    """Names of the arguments behind the first."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    return [positional[k] if k < len(positional) else f"args[{k}]" for k in range(count)]


def _names(trees: dict[str, PyTree]) -> list[str]:
    """A name for every leaf, in the order of flattening the trees one by one."""
    return [
        name + jax.tree_util.keystr(path)
        for name, tree in trees.items()
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def _stopped(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x


def _like(call: str, params: PyTree, init: PyTree) -> PyTree:
    """What a solver returned, in the dtypes of init."""
    found: Any = jax.tree.structure(params)
    wanted: Any = jax.tree.structure(init)
    fits = found == wanted and all(
        jnp.shape(x) == w.shape for x, w in zip(jax.tree.leaves(params), jax.tree.leaves(init))
    )
    if not fits:
        shapes = jax.tree.map(lambda x: list(jnp.shape(x)), params)
        raise ValueError(f"{call}: solve must return a tree like init, {describe(init)}, not {shapes}")
    return jax.tree.map(lambda x, w: jnp.asarray(x, w.dtype), params, init)


def _refuse_point(call: str, result: PyTree, size: Array, tolerance: Any) -> PyTree:
    """What was computed at a point, unless its condition is not met there."""

    def explain(size: float, tolerance: float) -> str | None:
        if size <= tolerance:
            return None
        return (
            f"{call}: the point is no solution: the norm of its optimality condition is {size:.3g}, above "
            f"the tolerance of {tolerance:.3g}. Solve more accurately, or accept it with a larger tolerance"
        )

    return refuse_if(explain, result, size, jnp.asarray(tolerance), error=ConvergenceError)


# ---- exact zeros


def _announced(
    call: str, names: Sequence[str], condition: _Condition, params: PyTree, trees: PyTree
) -> PyTree:
    """The trees as they are; where they are differentiated, leaves without influence are announced.

    Args:
      call: the user's call.
      names: of every leaf.
      condition: whose inputs are the first leaves.
      params: shapes.
      trees: what may be differentiated.
    """
    structure: Any
    leaves, structure = jax.tree.flatten(trees)
    inexact = [isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    inputs = _shapes(leaves[: len(condition.names)])

    def announce(differentiated: Sequence[bool]) -> None:
        wanted = dict(zip([k for k, flag in enumerate(inexact) if flag], differentiated))
        if not any(wanted.values()):
            return
        used = _used(lambda inputs, params: condition(params, inputs), inputs, params)
        zero = [names[k] for k, flag in wanted.items() if flag and not (k < len(used) and used[k])]
        if zero:
            _warn_of_zeros(call, zero)

    arrays, merge = split(inexact, leaves)
    return structure.unflatten(merge(_watched(announce, arrays)))


def _warn_of_zeros(call: str, names: Sequence[str]) -> None:
    warnings.warn(
        f"{call}: the hypergradient in {', '.join(names)} is exactly 0, because the solution does not "
        "depend on it. A solution does not know how it was found: to learn rates, momenta or starts, "
        "differentiate the training run itself, with hypergrad.train; to silence this, pass "
        "jax.lax.stop_gradient of it",
        ZeroHypergradientWarning,
        stacklevel=2,
    )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _watched(announce: Callable[[Sequence[bool]], None], arrays: list[Array]) -> list[Array]:
    return arrays


def _watched_jvp(announce: Callable[[Sequence[bool]], None], primals: Any, tangents: Any) -> Any:
    (dots,) = tangents
    announce([not isinstance(dot, SymbolicZero) for dot in dots])
    return primals[0], dots


_watched.defjvp(_watched_jvp, symbolic_zeros=True)


def _used(function: Callable[..., PyTree], leaves: Sequence[Any], params: PyTree) -> list[bool]:
    """Whether the derivative of ``function(leaves, params)`` in a leaf may differ from 0, by its jaxpr."""
    flags = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    moving, _ = split(flags, leaves)

    def change(dots: list[Array], leaves: list[Array], params: PyTree) -> PyTree:
        moving, merge = split(flags, leaves)
        return linearized(lambda moving: function(merge(moving), params), moving)[1](dots)

    jaxpr = jax.make_jaxpr(change)(moving, leaves, params).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    answers = iter(used[: len(moving)])
    return [flag and next(answers) for flag in flags]


# ---- the implicit function theorem


def _implicit(condition: _Condition, params: PyTree, inputs: list[Array], valid: Array) -> PyTree:
    """The solution, as a function of the inputs of its condition; NaN for ``valid`` makes derivatives NaN.

    They may not depend on the parameters, and without this a compiler would leave out the check of those.
    """
    rule = partial(_implicit_jvp, condition)
    solution = with_rule(lambda params, inputs, valid: params, rule, symbolic_zeros=True, by_hand=True)
    return solution(params, inputs, valid)


def _implicit_jvp(condition: _Condition, primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
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


# ---- approximate solutions and warm starts


class Hypergradient(NamedTuple):
    """What `hypergradient` returns.

    Attributes:
      value: ``g(w, θ)``.
      gradient: ``dg/dθ``, a tree like the hyperparameters.
      adjoint: ``u``, a tree like the parameters; where to start the next linear system.
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

    The same as through `minimizer`, with the adjoint handed in and out for warm starts.

    Args:
      objective: ``f(params, hypers) -> scalar``, what the parameters minimise.
      outer: ``g(params, hypers) -> scalar``.
      params: ``w``, a tree of floats.
      hypers: ``θ``, a tree of floats; there may be millions, at the cost of one more gradient.
      linear: solver of the linear system, by default `ConjugateGradients`; `GMRES` where the objective
        holds derivatives written by hand, as for `minimizer`.
      tolerance: the largest norm of ``∂f/∂w`` at which the parameters count as a minimum.
      start: of the linear system, such as the adjoint at hyperparameters nearby; by default 0.

    Returns:
      A `Hypergradient`.  A `ZeroHypergradientWarning` announces hyperparameters without influence.

    Raises:
      ConvergenceError: where a residual is above its tolerance; see `root`.
      ValueError, TypeError: where trees do not fit or are not floats.

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
        if not _is_scalar(shape):
            raise ValueError(f"{call}: {role} must return one scalar float, and returned {describe(shape)}")
    if start is not None and shapes_of(start) != shapes_of(params):
        raise ValueError(f"{call}: start must be like params, {describe(params)}, not {describe(start)}")
    structure: Any
    leaves, structure = jax.tree.flatten(hypers)

    def both(leaves: list[Array], w: PyTree) -> PyTree:
        theta = structure.unflatten(leaves)
        return jax.grad(objective)(w, theta), outer(w, theta)

    used = _used(both, _shapes(leaves), _shapes(params))
    if not all(used):
        _warn_of_zeros(call, [name for name, u in zip(_names({"hypers": hypers}), used) if not u])
    matvec: Callable[[PyTree], PyTree]
    if by_hand:  # the matrix is not symmetric, and its transpose is wanted
        slope = jax.grad(objective)
        residual, pull_back = jax.vjp(slope, params, hypers)
        matvec = lambda u: pull_back(u)[0]  # noqa: E731
    else:
        residual, matvec = jax.linearize(lambda w: jax.grad(objective)(w, hypers), params)
    result = jax.value_and_grad(outer, argnums=(0, 1))(params, hypers)
    value, (to_params, direct) = _refuse_point(call, result, norm(residual), tolerance)
    u = solve_or_refuse(call, linear, matvec, to_params, start)
    if by_hand:
        return Hypergradient(value, sub(direct, pull_back(u)[1]), u)
    # Along u first, backwards second: one gradient, whatever the number of hyperparameters.
    along = lambda h: jax.jvp(lambda w: objective(w, h), (params,), (u,))[1]  # noqa: E731
    return Hypergradient(value, sub(direct, jax.grad(along)(hypers)), u)


class Hoag(NamedTuple):
    """What `hoag` returns, ``K`` being the number of outer steps.

    Attributes:
      hypers: after the last step.
      params: the last solution, for the hyperparameters before that step.
      adjoint: the last ``u``, there.
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
    """Hyperparameter optimisation with approximate gradients: accurate only in the end, warm always.

    At step ``k`` both the minimum and the linear system are solved to ``ε_k``, from where they were at step
    ``k - 1``; then the optimizer moves the hyperparameters.  Converges where ``Σ ε_k`` does.

    Args:
      objective: ``f(params, hypers) -> scalar``, the inner objective.
      outer: ``g(params, hypers) -> scalar``.
      hypers: ``θ`` at the start, a tree of floats, unconstrained.
      init: ``w`` at the start.
      solve: ``solve(params, hypers, tolerance) -> params``, a JAX function (or `host` of one in NumPy) that
        goes on until ``|∂f/∂w| <= tolerance``, which is checked.
      tolerances: ``ε``, ``(K,)``, above 0, one outer step each; such as ``0.1 * 0.9 ** arange(K)``.
      optimizer: of the hyperparameters, by optax.
      linear: solver of the linear system, by default `ConjugateGradients`; its tolerance is replaced by
        ``ε_k``, relative to the right-hand side.  Where it sets ``accept``, that is left as it is.

    Returns:
      A `Hoag`.

    Raises:
      ConvergenceError, ValueError, TypeError: as `hypergradient`.

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
        params = _like(call, solve(params, hypers, tolerance), params)
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
