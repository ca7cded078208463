"""Reversal in segments, what a step remembers, and the adjoints that leave something out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.program import Optimizer, Remember, Scale, Shift, Variable
from tests.problems import OPTIMIZERS, RANGES, RATES, relative_error

STEPS = 24
START = {"matrix": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "vector": jnp.array([0.5, -1.0, 0.0])}


def waves(w: Any, meta: Any, step: Any) -> Any:
    """Gradients of all sizes and signs, and one that is always zero."""
    mask = jnp.array([1.0, 1.0, 0.0], w["vector"].dtype)
    terms = [w["matrix"], mask * w["vector"]]
    return meta * sum(jnp.sum(jnp.cos(3 * x + step) - jnp.cos(step) + 0.3 * x**2) for x in terms)


def end(hypers: Any, meta: Any, optimizer: Any, adjoint: Any, steps: int = STEPS) -> Any:
    params = jax.tree.map(lambda x: x.astype(meta.dtype), START)
    trained = hg.train(waves, params, hypers, meta, steps=steps, optimizer=optimizer, adjoint=adjoint)
    return sum(jnp.sum(x**3) for x in jax.tree.leaves(trained.params)) + jnp.mean(trained.losses)


def hypers_of(name: str, *shape: int) -> dict[str, Any]:
    ranges = RANGES | {"learning_rate": (0.5 * RATES[name], RATES[name])}
    rng = np.random.default_rng(0)
    return {key: jnp.asarray(rng.uniform(*ranges[key], shape)) for key in OPTIMIZERS[name].hypers}


DIFFERENT = {"momentum", "adam", "lamb", "shampoo", "sm3"}
EACH = [pytest.param(name, marks=[] if name in DIFFERENT else pytest.mark.slow) for name in OPTIMIZERS]


@pytest.mark.quick("momentum")
@pytest.mark.parametrize("name", EACH)
@pytest.mark.usefixtures("x64")
def test_forward_and_truncated_for_every_optimizer(name: str) -> None:
    """Forward in all constant hyperparameters; Truncated gives the ends of all schedules alone."""
    optimizer, meta = OPTIMIZERS[name], jnp.asarray(1.0)

    def gradient(hypers: Any, adjoint: Any) -> Any:
        objective = jax.grad(lambda h, m: end(h, m, optimizer, adjoint), argnums=(0, 1))
        return jax.jit(objective)(hypers, meta)

    constants = hypers_of(name)
    expected, found = gradient(constants, hg.Stored()), gradient(constants, hg.Forward())
    assert max(relative_error(found, expected).values()) < 1e-9

    kept = 7
    schedules = hypers_of(name, STEPS)
    full, _ = gradient(schedules, hg.Stored())
    short, _ = gradient(schedules, hg.Truncated(kept))
    for key in schedules:
        assert not jnp.any(short[key][:-kept])
        np.testing.assert_allclose(short[key][-kept:], full[key][-kept:], rtol=1e-9, atol=1e-14)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_forward_composes_with_jvp_and_jacfwd() -> None:
    hypers, meta = hypers_of("adam"), jnp.asarray(1.0)
    objective = lambda h: end(h, meta, hg.adam(), hg.Forward())  # noqa: E731
    by_columns = jax.jacfwd(objective)(hypers)
    expected = jax.grad(lambda h: end(h, meta, hg.adam(), hg.Stored()))(hypers)
    assert max(relative_error(by_columns, expected).values()) < 1e-9


def test_memory_of_forward_does_not_grow() -> None:
    def memory(steps: int) -> int:
        gradient = jax.grad(lambda h, m: end(h, m, hg.adam(), hg.Forward(), steps))
        compiled = jax.jit(gradient).lower(hypers_of("adam"), jnp.float32(1.0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # The losses and their derivatives in 4 numbers, a few times; states would be 25 times as much.
    assert memory(4000) - memory(1000) < 3000 * 4 * 5 * 4


def test_forward_refuses_more_than_a_handful() -> None:
    with pytest.raises(ValueError, match=r"96 numbers are differentiated.*at most limit=64; pass adjoint="):
        jax.grad(lambda h: end(h, jnp.float32(1.0), hg.adam(), hg.Forward()))(hypers_of("adam", STEPS))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_truncated_through_another_adjoint() -> None:
    hypers = hypers_of("adam", STEPS)

    def gradient(adjoint: Any) -> Any:
        return jax.jit(jax.grad(lambda m: end(hypers, m, hg.adam(), adjoint)))(jnp.asarray(1.0))

    found, expected = (gradient(adjoint) for adjoint in (hg.Truncated(5, hg.Reversible()), hg.Truncated(5)))
    assert float(found) == pytest.approx(float(expected), rel=1e-9)
    whole = gradient(hg.Stored())
    assert abs(float(whole) - float(expected)) > 1e-3 * abs(float(whole))
    longer = gradient(hg.Truncated(1000))
    assert float(longer) == pytest.approx(float(whole), rel=1e-12)


def test_truncated_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match=r"Truncated\(steps=0\): at least one step"):
        hg.Truncated(0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_number_of_segments_that_does_not_divide_the_steps() -> None:
    """With factors for all weights and by weight, outside of jit, where tapes are cut to measure."""
    hypers, meta = hypers_of("momentum", STEPS), jnp.asarray(1.0)
    by_weight = hypers["momentum"][:, None, None] * jnp.ones((1, 4, 3))
    hypers["momentum"] = {"matrix": by_weight, "vector": 0.8}

    def gradient(adjoint: Any, hypers: Any = hypers) -> Any:
        return jax.grad(lambda h: end(h, meta, hg.momentum(), adjoint))(hypers)

    expected = jax.jit(lambda h: gradient(hg.Stored(), h))(hypers)
    errors = relative_error(gradient(hg.Reversible(segments=5)), expected)
    assert max(errors.values()) < 1e-9


@pytest.mark.slow
@pytest.mark.optimized
def test_segments_take_less_memory_than_either_pure_strategy() -> None:
    steps, width = 20_000, 100

    def memory(adjoint: Any) -> int:
        def outer(rates: Any, data: Any) -> Any:
            loss = lambda w, meta, step: jnp.mean(jnp.tanh(meta @ w) ** 2)  # noqa: E731
            hypers = {"learning_rate": rates}
            start = jnp.ones((width, width)) / width
            options = {"steps": steps, "optimizer": hg.adam(), "adjoint": adjoint}
            return jnp.sum(hg.train(loss, start, hypers, data, **options).params)

        arguments = jnp.full(steps, 1e-3), jnp.ones((5, width))
        compiled = jax.jit(jax.grad(outer)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    segmented = memory(hg.Reversible(segments=3))
    assert segmented < 0.9 * memory(hg.Reversible())
    assert segmented < 0.2 * memory(hg.Checkpointed())


def test_a_changing_gradient_is_noticed_in_segments() -> None:
    calls = []

    def drift() -> Any:
        calls.append(1)
        return np.float32(1e-3 * len(calls))

    def impure(w: Any, meta: Any, step: Any) -> Any:
        noise = jax.pure_callback(drift, jax.ShapeDtypeStruct((), jnp.float32))
        return jnp.sum(w**2) + jnp.sum(w) * noise

    def outer(rate: Any) -> Any:
        options = {"steps": 10, "adjoint": hg.Reversible(segments=3)}
        return jnp.sum(hg.train(impure, jnp.ones(2), {"learning_rate": rate}, **options).params)

    with pytest.raises(hg.ReversalError, match="did not arrive at its start"):
        jax.grad(outer)(jnp.float32(0.1))


def test_refuses_less_than_one_segment() -> None:
    with pytest.raises(ValueError, match=r"Reversible\(segments=0\): there must be at least one"):
        hg.Reversible(segments=0)


def test_refuses_bits_of_no_variable() -> None:
    adjoint = hg.Reversible(bits={"speed": 0.2})
    with pytest.raises(
        ValueError, match=r"bits has \['speed'\]; the variables are \['params', 'velocity'\]"
    ):
        hg.train(lambda w, meta, t: w @ w, jnp.ones(2), {"learning_rate": 0.1}, steps=2, adjoint=adjoint)


def test_says_which_variable_left_its_range_and_how_to_widen_it() -> None:
    """The first gradient says nothing of the later ones."""
    steep = lambda w, meta, step: jnp.where(step == 0, 1e-12, 1.0) * jnp.sum(w)  # noqa: E731
    options: dict[str, Any] = {"steps": 5, "optimizer": hg.adam()}
    message = r"at step 1 'mu' of params became NaN or grew to 2\*\*32 times.*radix={'mu': r}"
    with pytest.raises(hg.ReversalError, match=message):
        hg.train(steep, jnp.ones(2), {"learning_rate": 0.1}, **options)
    wide = hg.Reversible(radix={"mu": 58, "nu": 58})
    trained = hg.train(steep, jnp.ones(2), {"learning_rate": 0.1}, **options, adjoint=wide)
    expected = hg.train(steep, jnp.ones(2), {"learning_rate": 0.1}, **options, adjoint=hg.Checkpointed())
    np.testing.assert_allclose(trained.params, expected.params, rtol=1e-4)


def test_a_variable_has_no_word_or_one() -> None:
    message = r"^Optimizer\(name='sums\(\)'\): 'sum' is Variable\(words=2\); there are 0 or 1 words"
    with pytest.raises(ValueError, match=message):
        Optimizer("sums()", lambda h, t: [], {"sum": Variable(words=2)})


def test_a_factor_reads_only_what_a_step_has_remembered() -> None:
    def moves(h: Any, t: Any) -> Any:
        return [Scale("params", lambda s: 1 / (1 + s.velocity))]

    wrong = Optimizer("wrong()", moves, {"velocity": Variable()})
    with pytest.raises(
        AttributeError, match=r"factor of Scale\('params', ...\) can read only what Remember"
    ):
        hg.train(lambda w, meta, t: w @ w, jnp.ones(2), {}, steps=2, optimizer=wrong, adjoint=hg.Stored())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_step_may_shrink_by_its_own_norm() -> None:
    """``w <- w / (1 + λ ‖w‖) - α v``: in closed form for one element, and against `Stored`."""

    def moves(h: Any, t: Any) -> Any:
        return [
            Scale("velocity", h.momentum),
            Shift("velocity", lambda s: s.gradient),
            Remember("shrink", lambda s: 1 / (1 + h.decay * jnp.sqrt(jnp.sum(s.params**2)))),
            Scale("params", lambda s: s.shrink),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    hypers = {"learning_rate": 0.0, "momentum": 0.9, "decay": 0.1}
    program = Optimizer("shrinking()", moves, {"velocity": Variable()}, hypers)
    flat = lambda w, meta, step: 0.0 * jnp.sum(w)  # noqa: E731
    trained = hg.train(flat, jnp.array([2.0]), {}, steps=STEPS, optimizer=program)
    np.testing.assert_allclose(trained.params, [1 / (1 / 2 + 0.1 * STEPS)], rtol=1e-9)

    learned = {"learning_rate": jnp.asarray(0.02), "decay": jnp.asarray(0.01)}
    meta = jnp.asarray(1.0)
    expected = jax.grad(lambda h: end(h, meta, program, hg.Stored()))(learned)
    for adjoint in (hg.Reversible(), hg.Reversible(segments=4)):
        found = jax.grad(lambda h, a=adjoint: end(h, meta, program, a))(learned)
        assert max(relative_error(found, expected).values()) < 1e-9


@pytest.mark.slow
def test_gradients_are_the_same_where_only_the_loss_needs_a_logarithm() -> None:
    """On the way back nobody uses the loss; its logarithm must be computed all the same."""
    x = jax.random.normal(jax.random.key(0), (500, 64))
    y = jax.random.randint(jax.random.key(1), (500,), 0, 10)
    start = 0.1 * jax.random.normal(jax.random.key(2), (64, 10))

    def final(rate: Any, adjoint: Any) -> Any:
        def loss(w: Any, meta: Any, step: Any) -> Any:
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ w), y[:, None], axis=1))

        hypers = {"learning_rate": rate, "momentum": 0.9}
        return hg.train(loss, start, hypers, steps=10, adjoint=adjoint).losses[-1]

    expected, found = (jax.grad(final)(0.1, adjoint) for adjoint in (hg.Stored(), hg.Reversible()))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
