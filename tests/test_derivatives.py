"""First derivatives where they are easily wrong: rules by hand, narrow and complex numbers, NaN, memory.

Against plain JAX, `jax.lax.scan` and `jax.grad`, or closed forms.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import hypergrad as hg
from hypergrad import bilevel
from hypergrad._base.errors import LaneWarning, readable_errors

STEPS = 4
W = jnp.array([0.3, -0.5])
HYPERS = {"learning_rate": 0.1, "momentum": 0.5}
REVERSE = [hg.Reversible(), hg.Stored(), hg.Checkpointed()]
every = pytest.mark.parametrize("adjoint", [*REVERSE, hg.Forward()], ids=repr)
reverse = pytest.mark.parametrize("adjoint", REVERSE, ids=repr)


def plain(loss: Any, start: Any, meta: Any, steps: int = STEPS) -> tuple[Array, Array]:
    """Momentum as the library defines it, by `jax.lax.scan`: the end, and the losses."""

    def step(carry: Any, t: Any) -> Any:
        w, v = carry
        value, slope = jax.value_and_grad(loss)(w, meta, t)
        v = 0.5 * v - 0.5 * slope
        return (w + 0.1 * v, v), value

    (w, _), losses = jax.lax.scan(step, (start, jnp.zeros_like(start)), jnp.arange(steps))
    return w, losses


def trained(loss: Any, start: Any, meta: Any, adjoint: Any, steps: int = STEPS, **more: Any) -> Any:
    return hg.train(loss, start, HYPERS, meta, steps=steps, adjoint=adjoint, **more)


# ---- rules by hand


@jax.custom_vjp
def reversed_gradient(x: Array, strength: Array) -> Array:
    return x


reversed_gradient.defvjp(
    lambda x, strength: (x, strength), lambda strength, bar: (-strength * bar, jnp.zeros_like(strength))
)


@jax.custom_jvp
def straight_through(x: Array) -> Array:
    return jnp.round(x)


straight_through.defjvps(lambda dot, answer, x: dot)


@jax.custom_vjp
def clipped(x: Array) -> Array:
    return x


clipped.defvjp(lambda x: (x, None), lambda _, bar: (jnp.clip(bar, -0.3, 0.3),))


@jax.custom_jvp
def scaled(x: Array) -> Array:
    return x


scaled.defjvp(lambda primals, tangents: (primals[0], 0.5 * tangents[0]))


@jax.custom_vjp
def calls_itself(x: Array) -> Array:
    return jnp.sin(x)


calls_itself.defvjp(lambda x: (calls_itself(x), x), lambda x, bar: (2 * bar * jnp.cos(x),))


@jax.custom_vjp
def nested(x: Array) -> Array:
    return reversed_gradient(jnp.sin(x), jnp.asarray(0.5, x.dtype))


def _nested_forward(x: Array) -> Any:
    return jax.vjp(lambda x: reversed_gradient(jnp.sin(x), jnp.asarray(0.5, x.dtype)), x)


nested.defvjp(_nested_forward, lambda pull, bar: (2 * pull(bar)[0],))


def by_hand(rule: str) -> Any:
    rules = {
        "reversed": lambda w, m: jnp.sum(reversed_gradient(jnp.sin(w), m) * w),
        "straight through": lambda w, m: jnp.sum(straight_through(3 * w * m) * w),
        "clipped": lambda w, m: 2 * jnp.sum(clipped(w * m) ** 2),
        "scaled": lambda w, m: jnp.sum(scaled(jnp.sin(w * m)) ** 2),
        "calls itself": lambda w, m: jnp.sum(calls_itself(w * m) * w),
        "nested": lambda w, m: jnp.sum(nested(w * m) * w),
    }
    return lambda w, m, t=None: rules[rule](w, m) + 0.3 * m * jnp.sum(w**2)


NAMES = ["reversed", "straight through", "clipped", "scaled", "calls itself", "nested"]


@pytest.mark.quick("scaled", "calls itself")
@pytest.mark.parametrize("rule", NAMES)
def test_rules_by_hand_are_those_of_plain_jax(x64: None, rule: str) -> None:
    loss, m, start = by_hand(rule), jnp.asarray(0.7, jnp.float64), W.astype(jnp.float64)
    expected = jax.grad(lambda m: jnp.sum(plain(loss, start, m)[0] ** 3))(m)
    forwards = [] if rule == "calls itself" else [hg.Forward()]
    adjoints = [*REVERSE, *forwards]

    @jax.jit
    def all_of_them(m: Array) -> list[Array]:
        ends = [lambda m, a=a: jnp.sum(trained(loss, start, m, a).params ** 3) for a in adjoints]
        return [jax.grad(end)(m) for end in ends]

    found = all_of_them(m)
    assert abs(expected) > 1e-3 and len(found) >= 3
    np.testing.assert_allclose(found, np.full(len(found), expected), rtol=1e-7)


def test_the_strength_of_a_reversed_gradient_has_a_slope(x64: None) -> None:
    """In closed form: of ``ρ(w) `` alone, ``w`` grows by ``(1 + α λ)`` at every step without momentum."""
    loss = lambda w, strength, t: reversed_gradient(w**2 / 2, strength)  # noqa: E731

    def end(strength: Array, adjoint: Any) -> Array:
        start, hypers = jnp.asarray(2.0), {"learning_rate": 0.1}
        run = hg.train(loss, start, hypers, strength, steps=3, optimizer=hg.sgd(), adjoint=adjoint)
        return run.params

    for adjoint in (hg.Stored(), hg.Checkpointed()):
        found = jax.grad(functools.partial(end, adjoint=adjoint))(jnp.asarray(0.5))
        np.testing.assert_allclose(found, 2 * 3 * 1.05**2 * 0.1, rtol=1e-12)


def test_forward_names_the_way_out_where_jax_has_no_forward_derivative() -> None:
    loss = by_hand("calls itself")
    message = r"train\(.*Forward needs forward derivatives.*jax\.custom_vjp.*pass adjoint=Reversible\(\)"
    with pytest.raises(TypeError, match=message):
        jax.grad(lambda m: jnp.sum(trained(loss, W, m, hg.Forward()).params))(0.7)


@pytest.mark.parametrize("rule", ["reversed", "calls itself"])
def test_unrolled_bilevel_solvers_with_rules_by_hand(x64: None, rule: str) -> None:
    """One step of each, from 0, against plain JAX."""
    loss, m, start = by_hand(rule), jnp.asarray(0.7, jnp.float64), W.astype(jnp.float64)
    outer = lambda w, m: jnp.sum(w**3) + 0.1 * m**2  # noqa: E731
    problem = bilevel.Problem(lambda w, m, rows=None: loss(w, m), lambda w, m, rows=None: outer(w, m))

    def descended(m: Array, steps: int, kept: int) -> Array:
        w = start
        for t in range(steps):
            w = w - 0.1 * jax.grad(loss)(w, m if t >= steps - kept else jax.lax.stop_gradient(m))
        return w

    for solver, kept in (
        (bilevel.unrolled(rate=0.1, hyper_rate=0.2, inner_steps=3), 3),
        (bilevel.truncated(rate=0.1, hyper_rate=0.2, inner_steps=3, window=2), 2),
    ):
        expected = jax.grad(lambda m, kept=kept: outer(descended(m, 3, kept), m))(m)
        found = bilevel.solve(problem, start, m, solver, steps=1, key=jax.random.key(0))
        np.testing.assert_allclose(found.hypers, m - 0.2 * expected, rtol=1e-7)


# ---- what is not used is not touched


@reverse
def test_a_step_that_is_masked_may_have_no_derivative(x64: None, adjoint: Any) -> None:
    """``∂L/∂meta`` is NaN at step 0, whose loss counts 0 times; in closed form, by the other steps."""
    loss = lambda w, meta, t: jnp.sum(w**2) + jnp.sqrt(meta * t)  # noqa: E731
    mask = jnp.array([0.0, 1.0, 1.0, 1.0])

    def total(meta: Array) -> Array:
        return jnp.sum(mask * trained(loss, W.astype(jnp.float64), meta, adjoint).losses)

    found = jax.jit(jax.grad(total))(jnp.asarray(4.0))
    np.testing.assert_allclose(found, sum(np.sqrt([1, 2, 3])) / 4, rtol=1e-9)


@reverse
def test_losses_nobody_uses_have_no_say(x64: None, adjoint: Any) -> None:
    """The end, or what is watched, alone is differentiated; the loss has no derivative in meta at all."""
    loss = lambda w, meta, t: meta * jnp.sum(w**2) + jnp.sqrt(0.0 * (meta - 0.7))  # noqa: E731
    smooth = lambda w, meta, t: meta * jnp.sum(w**2)  # noqa: E731
    start = W.astype(jnp.float64)

    def total(meta: Array) -> Array:
        run = trained(loss, start, meta, adjoint, watch=lambda s: jnp.sum(s.params))
        return jnp.sum(run.params**2) + 0.0 * jnp.sum(run.losses) + run.watched[-1]

    def expected(meta: Array) -> Array:
        return jnp.sum(plain(smooth, start, meta)[0] ** 2) + jnp.sum(plain(smooth, start, meta, 3)[0])

    found = jax.jit(jax.grad(total))(jnp.asarray(0.7))
    np.testing.assert_allclose(found, jax.grad(expected)(jnp.asarray(0.7)), rtol=1e-8)


@pytest.mark.quick("1.0")
@pytest.mark.optimized
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_stored_keeps_of_the_weights_of_examples_no_more_than_plain_jax(weight: float) -> None:
    n, steps = 100_000, 50
    keys = jax.random.split(jax.random.key(0))
    data = jax.random.normal(keys[0], (n, 3))
    rows = jax.random.randint(keys[1], (steps, 100), 0, n)

    def loss(w: Array, weights: Array, rows: Array) -> Array:
        return jnp.mean(weights[rows] * (data[rows] @ w - 1) ** 2)

    def stored(weights: Array) -> Array:
        run = hg.train(loss, jnp.zeros(3), HYPERS, weights, rows, steps=steps, adjoint=hg.Stored())
        return jnp.sum(run.params**2) + weight * jnp.sum(run.losses)

    def oracle(weights: Array) -> Array:
        def step(carry: Any, rows: Array) -> Any:
            w, v = carry
            value, slope = jax.value_and_grad(loss)(w, weights, rows)
            v = 0.5 * v - 0.5 * slope
            return (w + 0.1 * v, v), value

        (w, _), losses = jax.lax.scan(step, (jnp.zeros(3), jnp.zeros(3)), rows)
        return jnp.sum(w**2) + weight * jnp.sum(losses)

    ours, theirs = (jax.jit(jax.grad(f)).lower(jnp.ones(n)).compile() for f in (stored, oracle))
    memory = [f.memory_analysis().temp_size_in_bytes for f in (ours, theirs)]
    assert memory[0] < memory[1] + 2**20, memory  # and not 4 n T, 19 MiB
    np.testing.assert_allclose(ours(jnp.ones(n)), theirs(jnp.ones(n)), rtol=1e-3, atol=1e-7)


# ---- narrow numbers


@pytest.mark.quick(*(f"bfloat16-{adjoint}" for adjoint in [*REVERSE, hg.Forward()]), "float16-Stored()")
@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_of_16_bits_are_added_up_in_32(adjoint: Any, dtype: str) -> None:
    """What enters linearly at 400 steps: as ``meta``, in a closure, and as a rate."""
    steps, x = 400, jnp.asarray([0.7, 0.3, 0.011], dtype)

    def end(x: Array, run: Any) -> Array:
        closed = x[1]
        loss = lambda w, meta, t: w * (meta - closed + 0.001 * t)  # noqa: E731
        return run(loss, x[0], x[2])

    def library(loss: Any, meta: Array, rate: Array) -> Array:
        hypers = {"learning_rate": rate, "momentum": 0.5}
        return hg.train(loss, jnp.asarray(0.3), hypers, meta, steps=steps, adjoint=adjoint).params

    def oracle(loss: Any, meta: Array, rate: Array) -> Array:
        def step(carry: Any, t: Array) -> Any:
            w, v = carry
            v = 0.5 * v - 0.5 * jax.grad(loss)(w, meta, t.astype(jnp.float32))
            return (w + rate * v, v), None

        return jax.lax.scan(step, (jnp.float32(0.3), jnp.float32(0)), jnp.arange(steps))[0][0]

    expected = jax.grad(end)(x.astype(jnp.float32), oracle)
    found = jax.jit(jax.grad(lambda x: end(x, library)))(x)
    assert found.dtype == x.dtype
    # A rounding each of the loss's numbers and of the result.
    digits = 2.0 ** -(8 if dtype == "bfloat16" else 11)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=3 * digits)


# ---- complex numbers


@every
def test_complex_numbers_in_the_loss(x64: None, adjoint: Any) -> None:
    z = jnp.asarray([0.3 + 0.4j, -0.2 + 0.1j])

    def loss(w: Array, z: Array, t: Any) -> Array:
        return jnp.sum(jnp.abs(jnp.exp(1j * w) * z - w * z**2 + 0.5) ** 2)

    def library(z: Array) -> Array:
        run = trained(loss, W.astype(jnp.float64), z, adjoint)
        return jnp.sum(run.params**2) + jnp.sum(run.losses**2)

    def oracle(z: Array) -> Array:
        w, losses = plain(loss, W.astype(jnp.float64), z)
        return jnp.sum(w**2) + jnp.sum(losses**2)

    expected = jax.grad(oracle)(z)
    assert jnp.all(jnp.abs(expected.real) > 1e-3) and jnp.all(jnp.abs(expected.imag) > 1e-3)
    np.testing.assert_allclose(jax.jit(jax.grad(library))(z), expected, rtol=1e-7)


# ---- what is watched


@pytest.mark.parametrize(
    "adjoint",
    [
        pytest.param(hg.Reversible(), marks=pytest.mark.slow),
        *REVERSE[1:],
        hg.Reversible(segments=3),
        hg.Forward(),
        hg.Truncated(STEPS),
    ],
    ids=repr,
)
def test_what_is_watched_is_differentiated(x64: None, adjoint: Any) -> None:
    """Floats among integers and bools, and what the watch closes over."""
    start = W.astype(jnp.float64)
    loss = lambda w, meta, t: jnp.sum(jnp.cos(w) + meta * w**2)  # noqa: E731

    def library(x: Array) -> Array:
        def watch(s: Any) -> Any:
            size = x[1] * jnp.sum(s.params**2) + s.loss * jnp.sum(s.gradient)
            return {"step": s.step, "size": size, "up": s.gradient > 0, "v": s.state["velocity"]}

        seen = trained(loss, start, x[0], adjoint, watch=watch).watched
        assert seen["up"].dtype == bool and jnp.issubdtype(seen["step"].dtype, jnp.integer)
        return jnp.sum(seen["size"] * (1 + seen["step"])) + jnp.sum(seen["v"] ** 2)

    def oracle(x: Array) -> Array:
        w, v, total = start, jnp.zeros(2), 0.0
        for t in range(STEPS):
            value, g = jax.value_and_grad(loss)(w, x[0], t)
            total += (1 + t) * (x[1] * jnp.sum(w**2) + value * jnp.sum(g)) + jnp.sum(v**2)
            v = 0.5 * v - 0.5 * g
            w = w + 0.1 * v
        return total

    x = jnp.asarray([0.3, 0.7])
    np.testing.assert_allclose(jax.jit(jax.grad(library))(x), jax.grad(oracle)(x), rtol=1e-7)


# ---- NaN, and lanes


@pytest.mark.quick("True-2")
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_that_are_no_numbers_are_named(compiled: bool, segments: int) -> None:
    """``|w|**1.5`` at 0: its slope is 0 there, its second derivative is not."""

    def loss(w: Any, meta: Any, t: Any) -> Array:
        bent = lambda b: jnp.sum(jnp.abs(b) ** 1.5)  # noqa: E731
        return jnp.sum((w["a"] - 1) ** 2) + meta * jax.lax.cond(
            t == 1, bent, lambda b: 0.0 * jnp.sum(b), w["b"]
        )

    def outer(meta: Array) -> Array:
        start = {"a": jnp.ones(2), "b": jnp.zeros(2)}
        end = trained(loss, start, meta, hg.Reversible(segments=segments)).params
        return jnp.sum(end["a"]) + jnp.sum(end["b"])

    hypergradient = jax.jit(jax.grad(outer)) if compiled else jax.grad(outer)
    message = r"(?s)the derivative of step 1 in params\['b'\] became NaN.*a norm or a root at 0"
    if compiled:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(hypergradient(0.3))
    with pytest.raises(hg.ReversalError, match=message), readable_errors():
        jax.block_until_ready(hypergradient(0.3))


def test_a_hypergradient_that_overflows_by_itself_is_an_error() -> None:
    """Adam's direction next to an ε of 1e-30 is finite, and its derivative in ε is not."""

    def outer(eps: Array) -> Array:
        loss = lambda w, meta, t: 1e-25 * jnp.sum(w)  # noqa: E731
        hypers = {"learning_rate": 0.1, "eps": eps}
        return jnp.sum(hg.train(loss, jnp.ones(2), hypers, steps=5, optimizer=hg.adam()).params)

    with pytest.raises(hg.ReversalError, match="derivative in a hyperparameter, meta or batch became NaN"):
        jax.grad(outer)(1e-30)


@pytest.mark.quick("1")
@pytest.mark.parametrize("segments", [1, 2])
def test_one_run_of_three_that_diverges_is_named_and_left_out(segments: int) -> None:
    loss = lambda w, meta, t: jnp.sum(w**4) / 4  # noqa: E731

    def end(rate: Array) -> Array:
        hypers, adjoint = {"learning_rate": rate, "momentum": 0.5}, hg.Reversible(segments=segments)
        return jnp.sum(hg.train(loss, W, hypers, steps=12, adjoint=adjoint).params ** 2)

    def oracle(rate: Array) -> Array:
        def step(carry: Any, _: Any) -> Any:
            w, v = carry
            v = 0.5 * v - 0.5 * w**3
            return (w + rate * v, v), None

        return jnp.sum(jax.lax.scan(step, (W, jnp.zeros(2)), length=12)[0][0] ** 2)

    many = jax.jit(jax.vmap(jax.grad(end)))
    with pytest.warns(LaneWarning, match=r"run \[1\] of \[3\] under vmap: .*at step \d+"):
        found = jax.block_until_ready(many(jnp.array([0.1, 1e4, 0.3])))
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[::2], jax.vmap(jax.grad(oracle))(jnp.array([0.1, 0.3])), rtol=1e-4)
    with pytest.raises(hg.ReversalError, match="at step"), readable_errors():
        jax.block_until_ready(many(jnp.array([1e4, 1e5, 1e6])))
