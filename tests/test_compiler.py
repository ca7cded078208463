"""What the compiler does by itself, and that each means of `hypergrad._base.compiler` keeps it from that.

Every test looks at both: without the means, too, so that one that is no longer needed is noticed.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad._base import compiler
from hypergrad.adjoints import integers, linearize

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


@pytest.mark.parametrize("evaluate", [plainly, compiler.noinline, compiler.same_bits])
def test_floats_get_the_same_bits_in_every_lane_of_vmap(evaluate: Callable[..., Any]) -> None:
    """Though what makes the condition unknown to the compiler is another number in every lane."""

    def alone(*x: Any) -> Any:
        return evaluate(compiler.always_true(*x), multiply_add, *x)

    def among_others(*x: Any) -> Any:
        return alone(*x), jnp.sum(x[0] * x[1])

    lanes = [x.reshape(10, 100) for x in (A, B, C)]
    first, (second, _) = (jax.jit(jax.vmap(f))(*lanes) for f in (alone, among_others))
    different = int(jnp.sum(first != second))
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


def test_what_is_seldom_wanted_is_computed_only_then() -> None:
    """A loop that hardly ever turns is not enough: what does not depend on the turn is taken out of it."""

    def largest(x: Any) -> Any:
        return jnp.max(jnp.abs(x))

    def in_a_loop(wanted: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, wanted.astype(jnp.int32), lambda _, __: largest(x), jnp.int32(7))

    def apart(wanted: Any, x: Any) -> Any:
        return compiler.seldom(wanted, largest, jnp.int32(7), x)

    x = jnp.arange(-5000, 3000, dtype=jnp.int32)
    for run, kept in ((in_a_loop, False), (apart, True)):
        compiled = jax.jit(run).lower(TRUE, x).compile()
        always = compiled.as_text().split("ENTRY")[1]
        assert ("s32[8000]{0} fusion(" not in always and "abs(" not in always) == kept, run
        assert (int(compiled(TRUE, x)), int(compiled(~TRUE, x))) == (5000, 7)
    several = jax.vmap(apart, (0, None))(jnp.array([False, True]), x)
    assert several.tolist() == [7, 5000]
    lanes = jax.vmap(jax.vmap(apart, (None, 0)), (0, None))(jnp.array([False, True]), jnp.stack([x, 2 * x]))
    assert lanes.tolist() == [[7, 7], [5000, 10000]]


def test_instructions_are_the_same_for_numbers_that_are_not_known() -> None:
    starts = [3 * k for k in range(60)]

    def parts(x: Any, starts: Any) -> Any:
        return [jax.lax.dynamic_slice_in_dim(x, s, 10, allow_negative_indices=False) for s in starts]

    def different(run: Callable[..., Any]) -> int:
        text = jax.jit(run).lower(A).compile().as_text()
        bodies = re.findall(r"\n%[^\n]*\{\n(.*?)\n\}", text, re.DOTALL)
        return len({re.sub(r", metadata=.*|%[\w.]+", "", body) for body in bodies})

    known = different(lambda x: parts(x, starts))
    unknown = different(lambda x: parts(x, compiler.unknown(compiler.always_true(x), starts)))
    assert known >= len(starts) and unknown < len(starts) / 2
    found = jax.jit(lambda x: parts(x, compiler.unknown(compiler.always_true(x), starts)))(A)
    np.testing.assert_array_equal(found, parts(A, starts))


def compiled_in(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and how many programs it compiled."""
    found: list[str] = []

    def listen(name: str, *_: Any, **__: Any) -> None:
        found.extend([name] if "backend_compile" in name else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return call(), len(found)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_equal_programs_are_compiled_once() -> None:
    def scaled(factor: float, add: bool) -> Any:
        return lambda x, y: {"sum": factor * (x + y)} if add else {"sum": factor * x}

    def evaluate(factor: float, add: bool, x: Any = A) -> Any:
        return jax.block_until_ready(compiler.compiled_once(scaled(factor, add), x, B)["sum"])

    compiler._COMPILED.clear()
    for factor, add, expected in [(3.0, True, 1), (3.0, True, 0), (5.0, True, 1), (3.0, False, 1)]:
        found, count = compiled_in(lambda factor=factor, add=add: evaluate(factor, add))
        np.testing.assert_array_equal(found, factor * (A + B) if add else factor * A)
        assert count == expected
    # Only one argument is used, and it is another one.
    other, count = compiled_in(lambda: compiler.compiled_once(lambda x, y: {"sum": 3.0 * y}, A, B)["sum"])
    np.testing.assert_array_equal(other, 3.0 * B)
    assert count == 1
    for constant in (np.arange(5000.0), 2 * np.arange(5000.0), jnp.arange(5000.0)):
        shifted = compiler.compiled_once(lambda x, c=constant: x + jnp.float32(c), jnp.zeros(5000))
        np.testing.assert_array_equal(shifted, constant)
    for k in range(compiler.MOST_COMPILED):
        evaluate(10.0 + k, True)
    assert len(compiler._COMPILED) == compiler.MOST_COMPILED


def test_a_program_that_calls_python_is_its_own() -> None:
    def calling(number: float) -> Any:
        answer = lambda x: np.float32(number) * x  # noqa: E731
        return lambda x: jax.pure_callback(answer, jax.ShapeDtypeStruct((), jnp.float32), x)

    one = jnp.float32(1)
    assert [float(compiler.compiled_once(calling(k), one)) for k in (2.0, 3.0)] == [2.0, 3.0]


@pytest.mark.slow
def test_a_hypergradient_outside_of_jit_is_compiled_once() -> None:
    def outer(rate: Any) -> Any:
        loss = lambda w, meta, step: jnp.sum(jnp.tanh(w) ** 2)  # noqa: E731
        return jnp.sum(hg.train(loss, A, {"learning_rate": rate, "momentum": 0.9}, steps=5).params)

    first, compiled = compiled_in(lambda: jax.grad(outer)(0.1))
    again, none = compiled_in(lambda: jax.grad(outer)(0.1))
    assert compiled > 0 and none == 0 and first == again
    other, _ = compiled_in(lambda: jax.grad(lambda rate: outer(2 * rate))(0.05))
    assert float(other) == pytest.approx(2 * float(first))


@pytest.mark.slow
def test_integers_stay_where_they_are() -> None:
    """Bytes per parameter of a hypergradient through Adam, whose integers and buffers are 56."""

    def outer(rates: Any, params: Any, x: Any) -> Any:
        loss = lambda w, x, t: jnp.mean(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) ** 2)  # noqa: E731
        hypers = {"learning_rate": rates}
        return jnp.sum(hg.train(loss, params, hypers, x, steps=50, optimizer=hg.adam()).params[0])

    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((400, 300), (300, 300))]
    others = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((50,), (5, 400))]
    compiled = jax.jit(jax.grad(outer)).lower(others[0], params, others[1]).compile()
    per_parameter = compiled.memory_analysis().temp_size_in_bytes / (700 * 300)
    assert per_parameter < 110


# ---- amounts that are evaluated where they are used, and sums of products


@pytest.mark.parametrize(
    ("make", "rule", "expected"),
    [
        ("momentum", optax.chain(optax.scale(0.1), optax.trace(0.9)), {"velocity": True, "params": True}),
        ("heavy_ball", optax.trace(0.9), {"velocity": True, "params": True}),
        ("adam", optax.scale_by_adam(), {"mu": True, "nu": True, "params": False}),
    ],
)
def test_large_amounts_are_evaluated_where_they_are_subtracted(
    make: str, rule: Any, expected: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are where they round alike everywhere; the hypergradients are those of a plain scan."""
    later: dict[str, bool] = {}
    known = integers._Step.amount_later

    def spy(self: Any, i: int, k: int) -> Any:
        found = known(self, i, k)
        later[self.programs[i][k].variable] = found is not None
        return found

    monkeypatch.setattr(integers._Step, "amount_later", spy)
    rng, steps = np.random.default_rng(0), 12
    params = jnp.float32(0.1 * rng.normal(size=(128, 130)))
    batches = jnp.float32(rng.normal(size=(steps, 4, 128)))
    optimizer = getattr(hg, make)()

    def loss(w: Any, meta: Any, x: Any) -> Any:
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    def outer(rates: Any, adjoint: Any) -> Any:
        hypers = {"learning_rate": rates}
        trained = hg.train(
            loss, params, hypers, batches=batches, steps=steps, optimizer=optimizer, adjoint=adjoint
        )
        return loss(trained.params, None, batches[0])

    def by_hand(rates: Any) -> Any:
        def step(carry: Any, at: Any) -> Any:
            (w, state), (rate, x) = carry, at
            update, state = rule.update(jax.grad(loss)(w, None, x), state, w)
            return (w - rate * update, state), None

        (w, _), _ = jax.lax.scan(step, (params, rule.init(params)), (rates, batches))
        return loss(w, None, batches[0])

    rates = jnp.full(steps, 0.05, jnp.float32)
    found = jax.jit(jax.grad(lambda rates: outer(rates, hg.Reversible())))(rates)
    expected_gradient = jax.jit(jax.grad(by_hand))(rates)
    assert later == expected
    scale = float(jnp.max(jnp.abs(expected_gradient)))
    np.testing.assert_allclose(found, expected_gradient, atol=1e-3 * scale)


def test_sums_of_products_are_not_transposed() -> None:
    """A transposed sum is a sum of transposed terms, which compilers take for products themselves."""
    rng = np.random.default_rng(0)
    a, b, c = (jnp.float32(rng.normal(size=(3, 4))) for _ in range(3))

    def function(a: Any, b: Any, c: Any) -> Any:
        sum_of_products = (a.T @ b + b.T @ c + a.T @ c + 1.0).T
        return {"sum": sum_of_products, "alone": jnp.transpose(a), "other": a + b}

    again = linearize._sums_last(function, a, b, c)
    for x, y in zip(jax.tree.leaves(function(a, b, c)), jax.tree.leaves(again(a, b, c)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    jaxpr = jax.make_jaxpr(again)(a, b, c).jaxpr
    sums = {v for eqn in jaxpr.eqns if eqn.primitive.name == "add" for v in eqn.outvars}
    transposed = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "transpose"]
    assert transposed and not any(eqn.invars[0] in sums for eqn in transposed)
