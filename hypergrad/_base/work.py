"""How many operations of arithmetic a traced function takes."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def operations(jaxpr: Any) -> int:
    """Additions and multiplications of a jaxpr, one for every element of what is not a product of matrices.

    A ``while`` loop counts as one turn, a conditional as its costliest branch.

    >>> import jax, jax.numpy as jnp
    >>> operations(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5))))
    60
    """
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(eqn: Any) -> int:
    inner = [x for p in eqn.params.values() for x in (p if isinstance(p, tuple | list) else [p])]
    found = [operations(x) for x in inner if isinstance(x, Jaxpr | ClosedJaxpr)]
    if eqn.primitive.name == "cond":
        return max(found)
    if found:
        return int(eqn.params.get("length", 1)) * sum(found)
    size = sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * size * math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        return 2 * size * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    return size
