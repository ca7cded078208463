"""Functions traced once, with what they closed over as arguments; parts of jaxprs; symbolic zeros."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Var
from jax.tree_util import Partial

from hypergrad._base.dtypes import widened
from hypergrad._base.explicit import with_explicit_axes
from hypergrad._base.trees import PyTree
from hypergrad._base.varying import zeros_like

RECOVERED = "hypergrad: recovered"  # marks a program that plays a run backwards


@dataclass(frozen=True)
class Converted:
    """A function traced once, with what it closed over as an explicit list of arguments.

    Closed-over data thus enters a compiled program as an argument, and closed-over traced values can be
    differentiated.
    """

    jaxpr: Any
    out_tree: Any

    def __call__(self, consts: Sequence[Array], flat: Sequence[Array]) -> PyTree:
        """Evaluate on flat arguments; those that were `widened` are converted back."""
        variables = [*self.jaxpr.constvars, *self.jaxpr.invars]
        arrays = narrowed([*consts, *flat], variables)
        results = with_explicit_axes(self._evaluate, [v.aval for v in variables], *arrays)
        return jax.tree.unflatten(self.out_tree, results)

    def _evaluate(self, *arrays: Array) -> list[Array]:
        count = len(self.jaxpr.constvars)
        closed = jax.extend.core.ClosedJaxpr(self.jaxpr, arrays[:count])
        return jax.extend.core.jaxpr_as_fun(closed)(*arrays[count:])


def narrowed(arrays: Sequence[Array], variables: Sequence[Any]) -> list[Array]:
    """Arrays for the variables of a jaxpr; those that were `widened` are converted back."""
    return [x if x.dtype == v.aval.dtype else x.astype(v.aval.dtype) for x, v in zip(arrays, variables)]


def closure_convert(
    function: Callable[..., PyTree], *arguments: PyTree
) -> tuple[Converted, list[Array], Any]:
    """Trace a function once; return it closure-converted, what it closed over, and its result's shapes."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    consts = [widened(jnp.asarray(c) if not isinstance(c, jax.Array) else c) for c in closed.consts]
    return Converted(closed.jaxpr, jax.tree.structure(shapes)), consts, shapes


@jax.tree_util.register_static
@dataclass(frozen=True)
class Static:
    """A static value that travels through a pytree of arrays."""

    value: Any


def freeze(flags: PyTree) -> Static:
    """A tree of bools as a static value."""
    leaves, structure = jax.tree.flatten(flags)
    return Static((tuple(leaves), structure))


def thaw(static: Static) -> PyTree:
    """Undo `freeze`."""
    leaves, structure = static.value
    return structure.unflatten(leaves)


def perturbed(tree: PyTree) -> PyTree:
    """Which of a forward rule's arguments are differentiated, as a tree of bools; integers never are."""
    return jax.tree.map(lambda x: x.perturbed and jnp.issubdtype(x.value.dtype, jnp.inexact), tree)


def live(jaxpr: Any, outputs: Sequence[Any]) -> tuple[list[Any], set[Any]]:
    """The equations of a jaxpr from which outputs come, and the variables that these and they are made of.

    Args:
      jaxpr: in which the outputs are variables or literals.
      outputs: what is wanted.
    """
    needed, eqns = {v for v in outputs if isinstance(v, Var)}, list[Any]()
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            eqns.append(eqn)
            needed |= {v for v in eqn.invars if isinstance(v, Var)}
    return eqns[::-1], needed


def evaluated(
    closed: Any, arguments: Sequence[Any], equation: Callable[[Any, Callable[[Any], Any]], Any]
) -> list[Any]:
    """The results of a closed jaxpr.

    Args:
      closed: the jaxpr.
      arguments: flat.
      equation: evaluates an equation, given it and what reads the value of a variable or literal.
    """
    values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *arguments]))

    def read(v: Any) -> Any:
        return values[v] if isinstance(v, Var) else v.val

    for eqn in closed.jaxpr.eqns:
        with eqn.ctx.manager:
            found = equation(eqn, read)
        values.update(zip(eqn.outvars, found if isinstance(found, list | tuple) else [found]))
    return [read(v) for v in closed.jaxpr.outvars]


def bound(eqn: Any, operands: Sequence[Any]) -> Any:
    """The results of an equation for these operands."""
    return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))


def part(
    jaxpr: Any, inputs: list[Any], eqns: Iterable[Any], outputs: list[Any]
) -> Callable[..., list[Array]]:
    """Some of the equations of a jaxpr as a function."""
    return jax.extend.core.jaxpr_as_fun(closed_part(jaxpr, inputs, eqns, outputs))


def closed_part(jaxpr: Any, inputs: list[Any], eqns: Iterable[Any], outputs: list[Any]) -> Any:
    """Some of the equations of a jaxpr as another, closed one."""
    names = jaxpr.debug_info.with_unknown_names()
    part = jaxpr.replace(constvars=[], invars=inputs, eqns=list(eqns), outvars=outputs, debug_info=names)
    return jax.extend.core.ClosedJaxpr(part, [])


def instantiate(cotangents: PyTree) -> PyTree:
    """The cotangents with symbolic zeros made into arrays."""
    symbolic = jax.custom_derivatives.SymbolicZero
    return jax.tree.map(
        lambda x: zeros_like(x.aval) if isinstance(x, symbolic) else x,
        cotangents,
        is_leaf=lambda x: isinstance(x, symbolic),
    )


def mapped(chunk: int | None, function: Callable[..., PyTree], xs: PyTree) -> PyTree:
    """The function of every row, ``chunk`` rows at a time, or all at once."""
    return jax.vmap(function)(xs) if chunk is None else jax.lax.map(function, xs, batch_size=chunk)


def trace_once(function: Callable[..., PyTree], *arguments: PyTree) -> tuple[Any, PyTree]:
    """The function, traced on shapes, as a pytree of what it closes over; and the shapes of its result."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    converted, constants, result = closure_convert(function, *shapes)
    return Partial(partial(_evaluate, converted), constants), result


def _evaluate(converted: Any, constants: Sequence[Array], *arguments: PyTree) -> PyTree:
    return converted(constants, jax.tree.leaves(arguments))
