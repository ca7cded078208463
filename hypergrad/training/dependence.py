"""What the results of a traced loss depend on, found by looking through its jaxpr once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

# Calls of another jaxpr with the same arguments and results.  Those with derivative rules of their own are
# not affine, whatever they compute.
_CALLS = ("jit", "pjit", "closed_call", "remat", "checkpoint")
_CALLS_WITH_RULES = ("custom_jvp_call", "custom_vjp_call")
_SAME_ELEMENTS = ("convert_element_type", "copy", "reshape", "squeeze", "broadcast_in_dim", "expand_dims")


class Form(NamedTuple):
    """How a value depends on the state ``s`` and on what differs from step to step.

    Attributes:
      state: numbers of the arrays of the state that it depends on.
      moving: whether it depends on the parameters or the batch.
      affine: ``(k, a)`` if it is ``a s_k + u`` element by element, with a known number ``a``, and ``u``
        does not depend on ``s_k``.
      stopped: whether its derivative is stopped, and it has not been computed with since.
      number: its value, if it is one known number.
    """

    state: frozenset[int] = frozenset()
    moving: bool = False
    affine: tuple[int, float] | None = None
    stopped: bool = False
    number: float | None = None


def forms_of(jaxpr: Any, inputs: Sequence[Form]) -> list[Form]:
    """The forms of the results of a jaxpr, given those of its arguments.

    Args:
      jaxpr: without closed-over values in it, whose ``constvars`` do not differ from step to step.
      inputs: for every argument.
    """
    forms: dict[Any, Form] = dict.fromkeys(jaxpr.constvars, Form()) | dict(zip(jaxpr.invars, inputs))

    def of(v: Any) -> Form:
        if not isinstance(v, Literal):
            return forms[v]
        known = np.ndim(v.val) == 0 and jnp.issubdtype(jnp.result_type(v.val), jnp.floating)
        return Form(number=float(v.val) if known else None)

    for eqn in jaxpr.eqns:
        forms.update(zip(eqn.outvars, _results(eqn, [of(v) for v in eqn.invars])))
    return [of(v) for v in jaxpr.outvars]


def _results(eqn: Any, given: list[Form]) -> list[Form]:
    """The forms of the results of one equation."""
    name = eqn.primitive.name
    plain = Form(frozenset().union(*(x.state for x in given)), any(x.moving for x in given))
    if name in (*_CALLS, *_CALLS_WITH_RULES):
        inner = next(iter(jax.extend.core.jaxprs_in_params(eqn.params)), None)
        if inner is not None and len(inner.invars) == len(given):
            found = forms_of(inner, given)
            return found if name in _CALLS else [x._replace(affine=None, number=None) for x in found]
    affine = _AFFINE.get(name)
    if affine is None or len(eqn.outvars) != 1:
        return [plain for _ in eqn.outvars]
    if name in _SAME_ELEMENTS and given[0].number is None and not _keeps_all(eqn):
        return [plain]
    if any(x.stopped for x in given) and name not in _SAME_ELEMENTS:
        return [plain]
    return [affine(plain, *given)]


def _keeps_all(eqn: Any) -> bool:
    """Whether the result of an equation has the elements of its argument, in order and not rounded."""
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    return before.size == after.size and jnp.promote_types(before.dtype, after.dtype) == after.dtype


def _added(sign: float) -> Callable[..., Form]:
    def form(plain: Form, x: Form, y: Form) -> Form:
        factors: dict[int, float] = {}
        for each, by in ((x, 1.0), (y, sign)):
            if each.affine is not None:
                k, a = each.affine
                factors[k] = factors.get(k, 0.0) + by * a
        if len(factors) != 1:
            return plain
        (k,) = factors
        free = all(each.affine is not None or k not in each.state for each in (x, y))
        return plain._replace(affine=(k, factors[k])) if free else plain

    return form


def _times(plain: Form, x: Form, y: Form) -> Form:
    if y.affine is not None:
        x, y = y, x
    return _scaled(plain, x, y.number)


def _scaled(plain: Form, x: Form, by: float | None) -> Form:
    if x.affine is None or by is None:
        return plain
    return plain._replace(affine=(x.affine[0], x.affine[1] * by))


def _over(plain: Form, x: Form, y: Form) -> Form:
    return _scaled(plain, x, 1 / y.number if y.number else None)


def _itself(plain: Form, x: Form, *shape: Form) -> Form:
    return x


_AFFINE: Mapping[str, Callable[..., Form]] = {
    "add": _added(1.0),
    "add_any": _added(1.0),
    "sub": _added(-1.0),
    "neg": lambda plain, x: _scaled(plain, x, -1.0),
    "mul": _times,
    "div": _over,
    "stop_gradient": lambda plain, x: x._replace(stopped=True, number=None),
    **dict.fromkeys(_SAME_ELEMENTS, _itself),
}
