"""An optimality condition, traced once, and its inputs; for symbols see `hypergrad.implicit`."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._base.errors import ConvergenceError, error_if
from hypergrad._base.rules import has_custom_rule
from hypergrad._base.tracing import Converted, closure_convert
from hypergrad._base.trees import PyTree, Scalar, describe, shapes_of
from hypergrad.implicit.linear import GMRES, ConjugateGradients, LinearSolver


@dataclass(frozen=True, eq=False)
class Condition:
    """An optimality condition, traced once.

    Attributes:
      call: the user's call, for messages.
      function: ``F`` or ``f`` after closure conversion: a function of the arrays that it closes over and of
        parameters and arguments, flat.
      minimises: whether the function is ``f``.
      symmetric: whether ``A`` is symmetric: it is for ``f``, if all its derivatives are JAX's own.
      captured: how many arrays it closes over; these are the first of the inputs ``θ``, followed by the
        arguments.
      names: of the inputs, for messages.
      linear: solver of the linear system.
    """

    call: str
    function: Converted
    minimises: bool
    symmetric: bool
    captured: int
    names: tuple[str, ...]
    linear: LinearSolver

    def __call__(self, params: PyTree, inputs: Sequence[Array]) -> PyTree:
        """``F(w, θ)``, a tree like the parameters.

        Args:
          params: ``w``, a tree.
          inputs: ``θ``, flat: what the function closes over, then the arguments.
        """
        captured, args = inputs[: self.captured], inputs[self.captured :]

        def at(params: PyTree) -> PyTree:
            return self.function(captured, [*jax.tree.leaves(params), *args])

        return jax.grad(at)(params) if self.minimises else at(params)


def condition_of(
    call: str,
    role: str,
    function: Callable[..., PyTree],
    params: PyTree,
    given: tuple[Sequence[PyTree], dict[str, PyTree]],
    linear: LinearSolver | None,
    minimises: bool,
) -> tuple[Condition, list[Array]]:
    """The condition of an objective or an optimality, and the arrays that it closes over.

    Args:
      call: the user's call, for messages.
      role: what the function is called there, "objective" or "optimality".
      function: ``f`` or ``F``.
      params: ``w``, or an array tree like it.
      given: arguments by position and by name.
      linear: solver of the linear system; None for the default.
      minimises: whether the function is ``f``.

    Raises:
      TypeError: if the function cannot be called with these arguments.
      ValueError: if it does not return a scalar or a tree like the parameters, respectively.
    """
    args, named = given
    _check_arguments(call, role, function, args, named)
    at = lambda params, given: function(params, *given[0], **given[1])  # noqa: E731
    converted, captured, result = closure_convert(at, *shape_tree((params, given)))
    if minimises and not is_scalar(result):
        raise ValueError(f"{call}: {role} must return one scalar float, and returned {describe(result)}")
    if not minimises and shapes_of(result) != shapes_of(params):
        raise ValueError(
            f"{call}: {role} must return a tree like init, {describe(params)}, and returned "
            f"{describe(result)}"
        )
    names = [f"an array of shape {list(x.shape)} that {role} closes over" for x in captured]
    names += names_of(dict(zip(_parameters(function, len(args)), args)))
    names += names_of(dict(sorted(named.items())))
    symmetric = minimises and not has_custom_rule(converted.jaxpr)
    if linear is None:
        linear = ConjugateGradients() if symmetric else GMRES()
    condition = Condition(call, converted, minimises, symmetric, len(captured), tuple(names), linear)
    return condition, captured


def arguments_by_name(
    function: Callable[..., Any], count: int, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide keywords into arguments of the condition and settings of the solver.

    Args:
      function: the condition.
      count: number of arguments given by position, besides the parameters.
      settings: everything that was given by keyword.

    Returns:
      Those for which the condition has a parameter, and the others.
    """
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
    """Refuse too few arguments, and those for which the condition has no parameter."""
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


def is_scalar(result: Any) -> bool:
    """Whether a result is one real float."""
    is_array = isinstance(result, jax.ShapeDtypeStruct)
    return is_array and result.shape == () and jnp.issubdtype(result.dtype, jnp.floating)


def _parameters(function: Callable[..., Any], count: int) -> list[str]:
    """Names of the arguments after the first."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    return [positional[k] if k < len(positional) else f"args[{k}]" for k in range(count)]


def names_of(trees: dict[str, PyTree]) -> list[str]:
    """A name for every leaf, in the order of flattening the trees one by one."""
    return [
        name + jax.tree_util.keystr(path)
        for name, tree in trees.items()
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def shape_tree(tree: PyTree) -> PyTree:
    """Shapes and dtypes of a tree of arrays and numbers."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def cast_like(call: str, params: PyTree, init: PyTree) -> PyTree:
    """What a solver returned, in the dtypes of init; refused if structure or shapes differ."""
    found: Any = jax.tree.structure(params)
    wanted: Any = jax.tree.structure(init)
    fits = found == wanted and all(
        jnp.shape(x) == w.shape for x, w in zip(jax.tree.leaves(params), jax.tree.leaves(init))
    )
    if not fits:
        shapes = jax.tree.map(lambda x: list(jnp.shape(x)), params)
        raise ValueError(f"{call}: solve must return a tree like init, {describe(init)}, not {shapes}")
    return jax.tree.map(lambda x, w: jnp.asarray(x, w.dtype), params, init)


def refuse_point(call: str, result: PyTree, size: Scalar, tolerance: Any) -> PyTree:
    """Pass on what was computed at a point, or raise if the optimality condition is not met there.

    Args:
      call: the user's call, for messages.
      result: what was computed.
      size: norm of ``F`` at the point.
      tolerance: the largest norm that counts as a solution.

    Raises:
      ConvergenceError: if the norm is above the tolerance or NaN.
    """

    def explain(size: float, tolerance: float) -> str | None:
        if size <= tolerance:
            return None
        return (
            f"{call}: the point is no solution: the norm of its optimality condition is {size:.3g}, above "
            f"the tolerance of {tolerance:.3g}. Solve more accurately, or accept it with a larger tolerance"
        )

    return error_if(explain, result, size, jnp.asarray(tolerance), error=ConvergenceError)
