"""Every adjoint against `Stored`, finite differences, and the memory it may take."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad._base.tracing import closure_convert
from hypergrad.adjoints.linearize import linearize
from hypergrad.adjoints.run import Run
from hypergrad.program import Assign, Layout, Optimizer, Scale, Shift, Variable
from tests.problems import (
    ADJOINTS,
    STEPS,
    TYPICAL,
    assert_agrees_with_finite_differences,
    classification,
    relative_error,
)


def square(w: Any, meta: Any, step: Any) -> Any:
    return jnp.sum((w - 1.0) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.usefixtures("x64")
def test_agrees_with_stored_in_float64(optimizer: str) -> None:
    """By every adjoint, under jit."""
    objective, everything = classification(optimizer)
    expected = jax.jit(jax.grad(lambda e: objective(e, hg.Stored())))(everything)
    for adjoint in ADJOINTS:
        found = jax.jit(jax.grad(lambda e, a=adjoint: objective(e, a)))(everything)
        errors = relative_error(found, expected)
        assert max(errors.values()) < 1e-9, (adjoint, errors)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", TYPICAL)
@pytest.mark.usefixtures("x64")
def test_agrees_with_stored_without_jit(optimizer: str) -> None:
    """Where the factors are known."""
    objective, everything = classification(optimizer)
    expected = jax.jit(jax.grad(lambda e: objective(e, hg.Stored())))(everything)
    found = jax.grad(lambda e: objective(e, hg.Reversible()))(everything)
    assert max(relative_error(found, expected).values()) < 1e-9


@pytest.mark.quick("momentum")
@pytest.mark.parametrize("optimizer", TYPICAL)
@pytest.mark.usefixtures("x64")
def test_agrees_with_finite_differences(optimizer: str) -> None:
    objective, everything = classification(optimizer)
    gradient = jax.jit(jax.grad(lambda e: objective(e, hg.Reversible())))(everything)
    smooth = classification(optimizer, rounded=False).objective
    value = jax.jit(lambda e: smooth(e, hg.Stored()))
    assert_agrees_with_finite_differences(value, everything, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", TYPICAL)
def test_agrees_with_stored_in_float32(optimizer: str) -> None:
    objective, everything = classification(optimizer, jnp.float32, steps=100)
    gradients = [
        jax.jit(jax.grad(lambda e, a=adjoint: objective(e, a)))(everything)
        for adjoint in (hg.Reversible(), hg.Stored())
    ]
    errors = relative_error(*gradients)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients[0]))
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.slow
def test_vmap_over_seeds_and_hyperparameters() -> None:
    rng = np.random.default_rng(0)
    starts = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    rates = jnp.full(100, 0.05)

    def outer(rates: Any, momentum: Any, start: Any) -> Any:
        hypers = {"learning_rate": rates, "momentum": momentum}
        loss = lambda w, meta, step: square(w, meta, step) + jnp.sum(jnp.sin(3 * w))  # noqa: E731
        return jnp.sum(hg.train(loss, start, hypers, steps=100).params ** 2)

    gradient = jax.jit(jax.grad(outer, argnums=(0, 1)))
    for shape in [(100,), (100, 3)]:
        momenta = jnp.asarray(rng.uniform(0.5, 0.95, (4, *shape)), jnp.float32)
        found = jax.jit(jax.vmap(gradient, (None, 0, 0)))(rates, momenta, starts)
        for i in range(4):
            expected = gradient(rates, momenta[i], starts[i])
            np.testing.assert_allclose(found[0][i], expected[0], rtol=1e-3, atol=1e-9)
            np.testing.assert_allclose(found[1][i], expected[1], rtol=1e-3, atol=1e-9)


@pytest.mark.optimized
@pytest.mark.parametrize("optimizer", ["heavy_ball", "adamw", "lion"])
def test_runs_side_by_side_are_those_one_by_one(optimizer: str) -> None:
    """Under vmap over starts and batches; the gradient is a sum of products, which fusion would round."""
    steps, make = 40, getattr(hg, optimizer)()
    curvature = jnp.geomspace(1.0, 0.01, 50)

    def outer(rates: Any, key: Any, adjoint: Any) -> Any:
        start, noise = jax.random.normal(key, (50,)), jax.random.normal(key, (steps, 50))
        loss = lambda w, h, xi: jnp.sum(0.5 * h * w**2 + jnp.sqrt(h) * xi * w)  # noqa: E731
        hypers = {"learning_rate": rates}
        trained = hg.train(
            loss, start, hypers, curvature, noise, steps=steps, optimizer=make, adjoint=adjoint
        )
        return jnp.sum(trained.params**2)

    rates, keys = jnp.geomspace(0.05, 0.01, steps), jax.random.split(jax.random.key(0), 3)
    one = jax.jit(jax.grad(partial(outer, adjoint=hg.Reversible())))
    found = jax.jit(jax.vmap(one, (None, 0)))(rates, keys)
    plain = jax.jit(jax.vmap(jax.grad(partial(outer, adjoint=hg.Stored())), (None, 0)))(rates, keys)
    for expected in (jnp.stack([one(rates, key) for key in keys]), plain):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(plain))))


def test_loss_may_close_over_traced_values() -> None:
    def outer(target: Any, adjoint: Any) -> Any:
        loss = lambda w, meta, step: jnp.sum((w - target) ** 2)  # noqa: E731
        hypers = {"learning_rate": 0.1, "momentum": 0.5}
        watch = lambda snapshot: snapshot.loss + jnp.sum(target)  # noqa: E731
        trained = hg.train(loss, jnp.zeros(3), hypers, steps=20, adjoint=adjoint, watch=watch)
        return jnp.sum(trained.params**3), trained.watched

    target = jnp.array([1.0, 2.0, 3.0])
    for wrap in (lambda f: f, jax.jit):
        found, watched = wrap(jax.grad(lambda x: outer(x, hg.Reversible()), has_aux=True))(target)
        expected, _ = wrap(jax.grad(lambda x: outer(x, hg.Stored()), has_aux=True))(target)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert float(jnp.linalg.norm(expected)) > 1
        assert watched.shape == (20,)


@pytest.mark.parametrize("adjoint", [hg.Reversible(), hg.Stored(), hg.Checkpointed()], ids=str)
def test_traces_the_loss_a_fixed_number_of_times(adjoint: Any) -> None:
    counts = []
    for steps in (3, 300):
        calls = []

        def loss(w: Any, meta: Any, step: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            return square(w, meta, step)

        def outer(rate: Any, loss: Any = loss, steps: int = steps) -> Any:
            return jnp.sum(
                hg.train(loss, jnp.ones(2), {"learning_rate": rate}, steps=steps, adjoint=adjoint).params
            )

        jax.jit(jax.grad(outer))(jnp.float32(0.1))
        counts.append(len(calls))
    assert counts == [1, 1]


def test_compiles_once_for_different_values() -> None:
    gradient = jax.jit(jax.grad(lambda h: jnp.sum(hg.train(square, jnp.zeros(2), h, steps=20).params)))
    for momentum in (0.5, 0.6, 0.97):
        gradient({"learning_rate": jnp.float32(0.1), "momentum": jnp.full(20, momentum)})
    assert gradient._cache_size() == 1


def temporary_memory(adjoint: Any, steps: int, width: int = 300) -> int:
    """Bytes of temporary memory of a hypergradient in a schedule, on a square weight matrix."""

    def loss(w: Any, meta: Any, row: Any) -> Any:
        return jnp.mean(jnp.tanh(meta[row] @ w) ** 2)

    def outer(rates: Any, data: Any, rows: Any) -> Any:
        hypers = {"learning_rate": rates, "momentum": 0.9}
        start = jnp.ones((width, width)) / width
        return jnp.sum(hg.train(loss, start, hypers, data, rows, steps=steps, adjoint=adjoint).params)

    rows = jnp.zeros((steps, 2), jnp.int32)
    compiled = jax.jit(jax.grad(outer)).lower(jnp.full(steps, 0.1), jnp.ones((50, width)), rows).compile()
    constants = re.findall(r"= f32\[50,300\]\S* constant", compiled.as_text())
    assert not constants  # the data is an argument, not part of the program
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.optimized
def test_memory_of_reversible_grows_by_the_bits_that_momentum_destroys() -> None:
    short, long = (temporary_memory(hg.Reversible(), steps) for steps in (1000, 4000))
    bits = 8 * (long - short) / (3000 * 300 * 300)
    assert 0.9 * np.log2(1 / 0.9) < bits < 1.1 * np.log2(1 / 0.9)


@pytest.mark.slow
@pytest.mark.optimized
def test_memory_of_checkpointed_grows_with_the_square_root() -> None:
    short, long = (temporary_memory(hg.Checkpointed(), steps) for steps in (1000, 4000))
    assert long < 2.3 * short
    assert long > 5 * temporary_memory(hg.Reversible(), 4000)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_against_the_dense_hessian() -> None:
    """Products of `linearize` with Hessian and mixed derivative, and with the cotangent of the loss."""
    rng = np.random.default_rng(0)
    w, c, u = (jnp.asarray(rng.normal(size=n)) for n in (4, 3, 4))

    def loss(w: Any, c: Any, batch: Any) -> Any:
        return jnp.sum(jnp.sin(jnp.outer(w, c))) + jnp.prod(w) * batch

    run = make_run(loss, w, c, jnp.asarray(2.0))
    at = linearize(run, [w], ([c], [jnp.asarray(2.0)]), ([True], [False]))
    found = at.transposed(jnp.asarray(0.5), [u])
    hessian = jax.hessian(loss)(w, c, 2.0)
    mixed = jax.jacobian(jax.grad(loss), argnums=1)(w, c, 2.0)
    first = jax.grad(loss, argnums=(0, 1))(w, c, 2.0)
    np.testing.assert_allclose(found.params[0], hessian @ u + 0.5 * first[0], rtol=1e-12)
    np.testing.assert_allclose(found.wanted[0], mixed.T @ u + 0.5 * first[1], rtol=1e-12)


def make_run(loss: Any, *example: Any) -> Run:
    converted, captured, _ = closure_convert(loss, *example)
    structure = jax.tree.structure(example[0])
    return Run("train()", hg.momentum(), converted, None, Layout(structure), 1, len(captured), True)


def test_heavy_ball_is_optax_sgd_with_momentum() -> None:
    w = jnp.array([1.0, -2.0, 0.5])
    loss = lambda w, meta, step: jnp.sum(jnp.cos(w) + 0.1 * w**4)  # noqa: E731
    rates = jnp.linspace(0.05, 0.01, 50)
    hypers = {"learning_rate": rates, "momentum": 0.8}
    trained = hg.train(loss, w, hypers, steps=50, optimizer=hg.heavy_ball())
    transformation = optax.sgd(hg.schedules.PerStep(rates), momentum=0.8)
    state = transformation.init(w)
    for t in range(50):
        assert float(trained.losses[t]) == pytest.approx(float(loss(w, None, t)), rel=1e-5)
        updates, state = transformation.update(jax.grad(loss)(w, None, t), state, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(trained.params, w, rtol=1e-5)


def test_momentum_is_optax_ema_for_a_schedule_of_momenta() -> None:
    w = jnp.array([1.0, -2.0, 0.5])
    loss = lambda w, meta, step: jnp.sum(jnp.cos(w) + 0.1 * w**4)  # noqa: E731
    momenta = jnp.linspace(0.3, 0.95, 40)
    trained = hg.train(loss, w, {"learning_rate": 0.1, "momentum": momenta}, steps=40)
    transformation = optax.inject_hyperparams(lambda decay: optax.ema(decay, debias=False))(
        decay=hg.schedules.PerStep(momenta)
    )
    state = transformation.init(w)
    for t in range(40):
        average, state = transformation.update(jax.grad(loss)(w, None, t), state, w)
        w = w - 0.1 * average
    np.testing.assert_allclose(trained.params, w, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_gradient_descent_on_a_quadratic_in_closed_form() -> None:
    """``w_T = w_0 (1 - α h)^T``, hence ``dw_T/dα_t = -h w_0 (1 - α h)^(T-1)`` for every t."""
    h, rate, steps = jnp.array([1.0, 0.5, 0.1]), 0.3, 25
    loss = lambda w, h, step: 0.5 * jnp.sum(h * w**2)  # noqa: E731

    def end(rates: Any) -> Any:
        hypers = {"learning_rate": rates}
        return hg.train(
            loss, jnp.ones(3), hypers, h, steps=steps, optimizer=hg.sgd(), adjoint=hg.Checkpointed()
        ).params

    np.testing.assert_allclose(end(jnp.full(steps, rate)), (1 - rate * h) ** steps, rtol=1e-12)
    found = jax.grad(lambda rates: jnp.sum(end(rates)))(jnp.full(steps, rate))
    expected = -jnp.sum(h * (1 - rate * h) ** (steps - 1))
    np.testing.assert_allclose(found, jnp.full(steps, expected), rtol=1e-10)


def test_momenta_too_small_to_be_undone_are_exact_in_floats() -> None:
    for momentum in (0.0, 0.005):
        hypers = {"learning_rate": 0.1, "momentum": momentum}
        trained = hg.train(square, jnp.zeros(2), hypers, steps=2, adjoint=hg.Stored())
        v = 2 * (1 - momentum)
        w = 0.1 * v
        v = momentum * v - (1 - momentum) * 2 * (w - 1)
        np.testing.assert_allclose(trained.params, w + 0.1 * v, rtol=1e-6)


def test_watch_sees_every_step_before_its_moves() -> None:
    def watch(snapshot: hg.Snapshot) -> Any:
        return {
            "step": snapshot.step,
            "norm": jnp.linalg.norm(snapshot.params),
            "velocity": snapshot.state["velocity"],
            "gradient": snapshot.gradient,
        }

    for adjoint in (hg.Reversible(), hg.Stored(), hg.Checkpointed()):
        trained = hg.train(
            square, jnp.zeros(3), {"learning_rate": 0.1}, steps=12, adjoint=adjoint, watch=watch
        )
        watched = trained.watched
        np.testing.assert_array_equal(watched["step"], np.arange(12))
        assert watched["norm"][0] == 0 and watched["norm"][-1] > 0
        np.testing.assert_allclose(watched["gradient"][0], -2 * np.ones(3))
        np.testing.assert_allclose(watched["velocity"][1], 0.2 * np.ones(3), rtol=1e-6)
        assert trained.losses.shape == (12,)
        assert float(trained.losses[0]) == 3.0


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_same_run() -> None:
    """`Trained.state` starts another run where the first one ended."""
    hypers = {"learning_rate": 0.1, "momentum": 0.7}
    whole = hg.train(square, jnp.zeros(3), hypers, steps=20)
    half = hg.train(square, jnp.zeros(3), hypers, steps=10)
    rest = hg.train(square, half.params, hypers, steps=10, state=half.state)
    np.testing.assert_allclose(rest.params, whole.params, rtol=1e-6)


def test_dropout_keys_and_integers_pass_through() -> None:
    keys = jax.random.split(jax.random.key(0), STEPS)

    def loss(w: Any, meta: Any, batch: Any) -> Any:
        key, row = batch
        keep = jax.random.bernoulli(key, 0.5, w.shape)
        return jnp.sum(jnp.where(keep, (w - meta[row]) ** 2, 0.0))

    def outer(rate: Any, adjoint: Any) -> Any:
        data = jnp.arange(12.0).reshape(4, 3)
        batches = (keys, jnp.arange(STEPS) % 4)
        hypers = {"learning_rate": rate, "momentum": 0.5}
        return jnp.sum(
            hg.train(loss, jnp.zeros(3), hypers, data, batches, steps=STEPS, adjoint=adjoint).params
        )

    rate = jnp.full(STEPS, 0.2)
    found, expected = (
        jax.jit(jax.grad(lambda r, a=a: outer(r, a)))(rate) for a in (hg.Reversible(), hg.Stored())
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert float(jnp.linalg.norm(found)) > 1e-2


@pytest.mark.slow
def test_second_scale_of_a_program_has_its_own_buffer() -> None:
    """Weight decay as a scale of the parameters: two buffers per leaf."""
    decayed = Optimizer(
        "decayed()",
        lambda h, t: [
            Scale("velocity", h.momentum),
            Shift("velocity", lambda s: -s.gradient),
            Scale("params", 1 - h.decay),
            Shift("params", lambda s: h.learning_rate * s.velocity),
        ],
        {"velocity": Variable()},
        {"learning_rate": None, "momentum": 0.9, "decay": 0.01},
    )

    def outer(hypers: Any, adjoint: Any) -> Any:
        start = jnp.array([3.0, -1.0])
        loss = lambda w, meta, step: jnp.sum(jnp.cos(w))  # noqa: E731
        return jnp.sum(
            hg.train(loss, start, hypers, steps=200, optimizer=decayed, adjoint=adjoint).params ** 2
        )

    hypers = {
        "learning_rate": 0.02 * jnp.ones(200),
        "momentum": jnp.float32(0.8),
        "decay": jnp.float32(0.02),
    }
    found, expected = (jax.grad(outer)(hypers, a) for a in (hg.Reversible(), hg.Stored()))
    errors = relative_error(found, expected)
    assert max(errors.values()) < 1e-3, errors


# What is refused, one test per message.


def messages(function: Any, *arguments: Any) -> str:
    """The message with which a function fails, eagerly and under jit."""
    with pytest.raises(hg.ReversalError) as eager:
        jax.block_until_ready(function(*arguments))
    # Under jit the running program fails; how the runtime wraps the error depends on the call path.
    with pytest.raises(Exception, match="ReversalError") as compiled:
        jax.block_until_ready(jax.jit(function)(*arguments))
    assert str(eager.value)[:60] in str(compiled.value)
    return str(eager.value)


def end(hypers: Any, adjoint: Any = None, loss: Any = square, steps: int = 50) -> Any:
    adjoint = hg.Reversible() if adjoint is None else adjoint
    return jnp.sum(hg.train(loss, jnp.zeros(2), hypers, steps=steps, adjoint=adjoint).params)


def test_refuses_an_optimizer_that_cannot_be_reversed() -> None:
    with pytest.raises(hg.ReversalError, match=r"sgd\(\) overwrites 'params'.*adjoint=Checkpointed\(\)"):
        hg.train(square, jnp.zeros(2), {"learning_rate": 0.1}, steps=3, optimizer=hg.sgd())


def test_refuses_a_run_that_diverges() -> None:
    message = messages(jax.grad(end), {"learning_rate": 9.0, "momentum": 0.5 * jnp.ones(50)})
    assert re.search(
        r"train\(steps=50.*at step \d+ 'velocity' of params became NaN or grew to 2\*\*32 times .*"
        r"training has diverged, which a lower learning rate cures",
        message,
    )
    messages(end, {"learning_rate": jnp.float32(90.0)})  # not differentiated, and yet not silent


def test_refuses_a_loss_that_is_nan() -> None:
    loss = lambda w, meta, step: jnp.sum(jnp.where(step == 7, jnp.nan, w))  # noqa: E731
    message = messages(jax.grad(lambda h: end(h, loss=loss)), {"learning_rate": jnp.float32(0.1)})
    assert "at step 7 the loss" in message


def test_refuses_a_momentum_of_zero() -> None:
    message = messages(jax.grad(end), {"learning_rate": 0.1, "momentum": jnp.zeros(50)})
    assert "a factor of 'velocity' of params left [2**-7, 1]" in message and "sgd()" in message


def test_refuses_a_buffer_that_is_too_small() -> None:
    slope = lambda w, meta, step: jnp.sum(w)  # noqa: E731
    gradient = jax.jit(jax.grad(lambda h: end(h, hg.Reversible(bits=0.1), slope, steps=200)))
    hypers = {"learning_rate": jnp.full(200, 0.1), "momentum": jnp.full(200, 0.5)}
    with pytest.raises(
        Exception,
        match=r"(?s)buffer of 'velocity' would overflow.*pass Reversible\(bits={'velocity': 1.0\d?}\)",
    ):
        jax.block_until_ready(gradient(hypers))
    # Where the momenta are known before the run, as they are without jit, the need is computed.
    jax.grad(lambda h: end(h, hg.Reversible(bits=0.1), slope, steps=200))(hypers)


def test_refuses_a_run_that_did_not_return_to_its_start() -> None:
    """A loss whose gradient is another one at every evaluation."""
    calls = []

    def drift() -> np.ndarray:
        calls.append(1)
        return np.float32(1e-3 * len(calls))

    def loss(w: Any, meta: Any, step: Any) -> Any:
        return jnp.sum(w**2) + jnp.sum(w) * jax.pure_callback(drift, jax.ShapeDtypeStruct((), jnp.float32))

    message = messages(jax.grad(lambda h: end(h, loss=loss)), {"learning_rate": jnp.float32(0.1)})
    assert "did not arrive at its start" in message and "adjoint=Checkpointed()" in message


@pytest.mark.parametrize("bits", [0, -1.0, 8])
def test_refuses_bits_that_make_no_sense(bits: float) -> None:
    with pytest.raises(ValueError, match=r"Reversible\(bits=.*must lie in \(0, 7\]"):
        hg.Reversible(bits=bits)


def test_refuses_a_radix_of_no_variable() -> None:
    with pytest.raises(
        ValueError, match=r"radix has \['weights'\]; the variables are \['params', 'velocity'\]"
    ):
        end({"learning_rate": 0.1}, hg.Reversible(radix={"weights": 40}))


def test_refuses_no_segments() -> None:
    with pytest.raises(ValueError, match=r"Checkpointed\(segments=0\)"):
        hg.Checkpointed(segments=0)


def test_refuses_a_move_that_reads_its_own_variable() -> None:
    wrong = Optimizer("wrong()", lambda h, t: [Shift("params", lambda s: -s.params)])
    with pytest.raises(AttributeError, match=r"reads 'params' itself"):
        hg.train(square, jnp.zeros(2), {}, steps=2, optimizer=wrong)


def test_refuses_a_gradient_that_could_not_be_found_again() -> None:
    wrong = Optimizer("wrong()", lambda h, t: [Shift("params", lambda s: -s.gradient)])
    with pytest.raises(AttributeError, match=r"reads the gradient after or while"):
        hg.train(square, jnp.zeros(2), {}, steps=2, optimizer=wrong)


def test_refuses_a_move_that_reads_what_there_is_not() -> None:
    wrong = Optimizer("wrong()", lambda h, t: [Assign("params", lambda s: s.momentum)])
    with pytest.raises(AttributeError, match=r"reads 'momentum'"):
        hg.train(square, jnp.zeros(2), {}, steps=2, optimizer=wrong, adjoint=hg.Stored())


def far(w: Any, meta: Any, step: Any) -> Any:
    return jnp.sum((w - 1e5) ** 2)


def test_the_range_is_chosen_from_the_first_numbers_and_can_be_moved() -> None:
    hypers = {"learning_rate": 0.2, "momentum": 0.5}
    assert float(end(hypers, loss=far)) == pytest.approx(2e5, rel=1e-3)
    message = messages(lambda h: end(h, hg.Reversible(radix={"params": 48}), far), hypers)
    assert "|params| < 2**14, that radix={'params': 48} asks for; leave the radix to be chosen" in message
    wide = hg.Reversible(radix={"params": 36, "velocity": 36})
    assert float(end(hypers, wide, far)) == pytest.approx(2e5, rel=1e-3)


def test_first_numbers_that_say_nothing_of_later_ones_are_refused_until_a_radix_is_given() -> None:
    """The first change of the weights, ``1e-12 1e5``, is ``2**40`` times smaller than where they go."""
    hypers = {"learning_rate": jnp.full(50, 0.2).at[0].set(1e-12), "momentum": 0.5}
    message = messages(lambda h: end(h, loss=far), hypers)
    assert "params became NaN or grew to 2**32 times the largest number that was first in it" in message
    assert "radix={'params': r}) with the largest r for which |params| < 2**(62 - r)" in message
    moved = hg.Reversible(radix={"params": 40})  # below 2**22
    assert float(end(hypers, moved, far)) == pytest.approx(2e5, rel=1e-3)


@pytest.mark.parametrize("adjoint", [pytest.param(hg.Reversible, marks=pytest.mark.slow), hg.Checkpointed])
def test_starts_of_segments_may_wait_on_the_host(adjoint: Any) -> None:
    """Where there is such a memory; on a processor it is the same, and so are the numbers."""

    def outer(rates: Any, offload: bool) -> Any:
        hypers = {"learning_rate": rates, "momentum": 0.9}
        return jnp.sum(end(hypers, adjoint(segments=3, offload=offload)) ** 3)

    rates = jnp.full(50, 0.05)
    slopes = [jax.jit(jax.grad(outer), static_argnums=1)(rates, offload) for offload in (False, True)]
    assert np.any(slopes[0] != 0)
    np.testing.assert_array_equal(*slopes)
    moved = [
        str(jax.make_jaxpr(jax.grad(outer), static_argnums=1)(rates, x)).count("<host>")
        for x in (False, True)
    ]
    assert moved[0] == 0 and moved[1] > 0
