"""What the compiler does by itself, and that each means of `hypergrad._base.compiler` keeps it from that.

Every test looks at both: without the means, too, so that one that is no longer needed is noticed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import bundles
from hypergrad._base import compiler
from hypergrad.adjoints import guards, starts

pytestmark = pytest.mark.optimized

A, B, C = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).normal(size=(3, 1000)))
TRUE = jnp.asarray(True)


def plainly(always_true: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """None of the means."""
    return function(*arguments)


def multiply_add(a: Any, b: Any, c: Any) -> Any:
    """One rounding, or two."""
    return a * b + c


def among_others(evaluate: Callable[..., Any]) -> jax.Array:
    """The same, where the product is used elsewhere too."""
    run = lambda t, a, b, c: (evaluate(t, multiply_add, a, b, c), jnp.sum(a * b))  # noqa: E731
    return jax.jit(run)(TRUE, A, B, C)[0]


@pytest.mark.parametrize("evaluate", [plainly, compiler.noinline, compiler.same_bits])
def test_floats_get_the_same_bits_wherever_they_are_computed(evaluate: Callable[..., Any]) -> None:
    alone = jax.jit(lambda t, *x: evaluate(t, multiply_add, *x))(TRUE, A, B, C)
    different = int(jnp.sum(alone != among_others(evaluate)))
    assert (different > 0) if evaluate is plainly else (different == 0)


@pytest.mark.parametrize("kept", [False, True])
def test_what_goes_unused_is_computed_all_the_same(kept: bool) -> None:
    """Of a computation that stands apart, an unused part is left out, which makes it another."""

    def both(a: Any, b: Any, c: Any) -> Any:
        return multiply_add(a, b, c), jnp.sum(a * b)

    def run(t: Any, *x: Any) -> Any:
        result, total = compiler.noinline(t, both, *x)
        return compiler.prevent_dce(t, total, result) if kept else result

    used = jax.jit(lambda t, *x: compiler.noinline(t, both, *x))(TRUE, A, B, C)[0]
    different = int(jnp.sum(jax.jit(run)(TRUE, A, B, C) != used))
    assert (different == 0) if kept else (different > 0)


@pytest.mark.parametrize("evaluate", [plainly, compiler.computed])
def test_what_many_use_is_computed_once(evaluate: Callable[..., Any]) -> None:
    def run(t: Any, a: Any) -> Any:
        shared = evaluate(t, lambda a: jnp.sin(3 * jnp.cos(a)), a)
        return [k * shared for k in range(1, 9)]

    sines = jax.jit(run).lower(TRUE, A).compile().as_text().count(" sine(")
    assert (sines > 1) if evaluate is plainly else (sines == 1)


@pytest.mark.slow
@pytest.mark.parametrize("apart", [True, False])
def test_integers_stay_where_they_are(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes per parameter of a hypergradient through Adam, whose integers and buffers are 56."""
    if not apart:
        for module in (bundles, guards, starts, compiler):
            monkeypatch.setattr(module, "in_place", plainly)

    def outer(rates: Any, params: Any, x: Any) -> Any:
        loss = lambda w, x, t: jnp.mean(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) ** 2)  # noqa: E731
        hypers = {"learning_rate": rates}
        return jnp.sum(hg.train(loss, params, hypers, x, steps=50, optimizer=hg.adam()).params[0])

    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((400, 300), (300, 300))]
    others = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((50,), (5, 400))]
    compiled = jax.jit(jax.grad(outer)).lower(others[0], params, others[1]).compile()
    per_parameter = compiled.memory_analysis().temp_size_in_bytes / (700 * 300)
    assert (per_parameter < 110) if apart else (per_parameter > 130)
