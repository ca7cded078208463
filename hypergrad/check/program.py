"""What the traced program shows: whether runs are played back, and at what precision it computes."""

from collections.abc import Iterator
from typing import Any

import jax.extend.core
import jax.numpy as jnp
import numpy as np

from hypergrad._base.tracing import RECOVERED
from hypergrad.check.objective import Leaves, listed
from hypergrad.check.report import Finding


def recovery_of(jaxpr: Any) -> Finding:
    """Report recovery: every run that the computed hypergradient plays backwards has been recovered."""
    runs = sum(
        eqn.primitive.name == "name" and eqn.params["name"] == RECOVERED for eqn in equations_of(jaxpr)
    )
    if runs == 0:
        meaning = "No differentiated run has adjoint=Reversible(), so none is played backwards."
        return Finding("exact recovery", "not checked", {"runs": 0}, meaning)
    what = "The run, played backwards, arrived at its" if runs == 1 else f"All {runs} runs arrived at their"
    return Finding("exact recovery", "ok", {"runs": runs}, f"{what} start bit for bit.")


def low_precision(names: list[str], leaves: Leaves, jaxpr: Any) -> Finding:
    """Types of 16 bits or fewer, and matrix products that round their arguments."""

    def low(dtype: Any) -> bool:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 16

    inputs = [f"{n} ({x.dtype})" for n, x in zip(names, leaves) if low(x.dtype)]
    inside: dict[str, int] = {}
    rounded = 0
    for eqn in () if jaxpr is None else equations_of(jaxpr):
        dtypes = [v.aval.dtype for v in eqn.outvars if hasattr(v.aval, "dtype")]
        for dtype in {str(d) for d in dtypes if low(d)}:
            inside[dtype] = inside.get(dtype, 0) + 1
        if eqn.primitive.name in ("dot_general", "conv_general_dilated") and dtypes == [np.float32]:
            rounded += eqn.params["precision"] in (None, (jax.lax.Precision.DEFAULT,) * 2)
    backend = jax.default_backend()
    measured = {"inputs": inputs, "inside": inside, "backend": backend, "rounded_products": rounded}
    warnings = []
    if inputs:
        warnings.append(f"{listed(inputs)}: the hypergradient is rounded to the same type. Pass float32.")
    if inside:
        found = ", ".join(f"{dtype} ({count} operations)" for dtype, count in sorted(inside.items()))
        warnings.append(
            f"The program computes in {found}; over a run its rounding errors grow like hypergradients do. "
            "Use float32 inside the run."
        )
    if rounded and backend in ("gpu", "tpu"):
        warnings.append(
            f"{rounded} float32 products may round their arguments on this {backend}; pass "
            "jax.default_matmul_precision('highest') to be sure."
        )
    if warnings:
        return Finding("precision", "warning", measured, " ".join(warnings))
    if jaxpr is None:
        return Finding("precision", "not checked", measured, "There is no program to look through.")
    return Finding("precision", "ok", measured, "Nothing is computed in 16 bits or fewer.")


def equations_of(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, and those of the programs in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations_of(inner)
