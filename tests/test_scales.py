"""Exact arithmetic on numbers of any size: what is right, what is refused, and by what words."""

import contextlib
import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import scales as bench

EXTREME = [(1.0, 1.0), (1e-4, 1e-9), (1e4, 1e-6), (1e-2, 1e3)]


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it():
    with jax.numpy_rank_promotion("allow"):
        yield


def not_right(rows: list[dict[str, Any]]) -> list[Any]:
    return [(r["experiment"], r["steps"], r.get("p"), r.get("g"), r["result"]) for r in rows if not good(r)]


def good(row: dict[str, Any]) -> bool:
    return row["result"] in (bench.RIGHT, bench.HARD)


def unscaled_adam(steps: int, dtype: Any = np.float64) -> Any:
    """Value and gradient of the ideal run, by a plain scan."""
    h = bench.OPTIMIZERS["adam"].hypers

    def outer(factors: Any) -> Any:
        rate, b1, b2, eps = (h[k] * factors[k] for k in ("learning_rate", "b1", "b2", "eps"))
        w = jax.tree.map(lambda x, f: jnp.asarray(x, dtype) * f, bench.start("adam"), factors["start"])
        zeros = jax.tree.map(jnp.zeros_like, w)

        def step(carry: Any, t: Any) -> Any:
            w, m, v = carry
            loss, g = jax.value_and_grad(bench.inner_loss)(w, (1.0, 1.0), t)
            m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
            v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, g)
            n = t + 1.0
            move = lambda w, m, v: w - rate * m / (1 - b1**n) / (jnp.sqrt(v / (1 - b2**n)) + eps)  # noqa: E731
            return (jax.tree.map(move, w, m, v), m, v), loss

        (w, _, _), losses = jax.lax.scan(step, (w, zeros, zeros), jnp.arange(steps))
        d = bench.data()
        return bench.cross_entropy(w, d.outer_x, d.outer_y) + 0.1 * jnp.mean(losses)

    return jax.value_and_grad(outer)(bench.ones("adam", dtype))


@pytest.mark.slow
def test_adam_is_right_in_all_units():
    rows = bench.measure("adam", 20, EXTREME)
    assert [r["result"] for r in rows] == [bench.RIGHT] * len(EXTREME)
    assert all(0 < max(r["errors"].values()) < 1e-3 for r in rows)
    line = bench.table(rows).splitlines()[1].split()
    assert line[:7] == ["adam", "20", "4", "4", "0", "0", "0"]


@pytest.mark.slow
def test_the_reference_is_a_plain_scan():
    with jax.enable_x64(True):
        value, gradient = unscaled_adam(5)
        adam = bench.OPTIMIZERS["adam"]
        cell = jax.tree.map(lambda x: x[0], bench.cells(adam, [(1e2, 1e-6)], 5, np.float64))
        found = jax.value_and_grad(lambda f: bench.outer("adam", 5, hg.Stored(), f, cell))(
            bench.ones("adam", np.float64)
        )
        np.testing.assert_allclose(found[0], value, rtol=1e-7)  # factors are multiples of 2**-32
        for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(gradient)):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-9)


def test_what_is_off_is_wrong_unless_floats_are_as_much():
    error = {"a": 2e-3, "b": 1e-5}
    assert bench.classify({"b": 1e-5}, None, False) == bench.RIGHT
    assert bench.classify(error, None, False) == bench.WRONG
    assert bench.classify(error, {"a": 1e-3, "b": 0.0}, False) == bench.HARD
    assert bench.classify(error, {"a": 1e-4, "b": 1.0}, False) == bench.WRONG
    assert bench.classify({"a": float("nan")}, {"a": 1.0}, False) == bench.WRONG
    assert bench.classify({"b": 0.0}, None, True) == bench.REFUSED


@pytest.mark.slow
def test_an_old_arithmetic_would_be_wrong():
    """With a radix of the kind that one choice for all runs makes, small gradients are refused or off."""
    adam = bench.OPTIMIZERS["adam"]
    coarse = hg.Reversible(bits=1, radix={"nu": 0})

    def run(adjoint: Any, dtype: Any) -> Any:
        adjoint = coarse if isinstance(adjoint, hg.Reversible) else adjoint
        with jax.enable_x64(dtype == np.float64):
            cell = bench.cells(adam, [(1.0, 1.0), (1.0, 1e-9)], 2, dtype)
            factors = bench.ones("adam", dtype)
        one = jax.value_and_grad(lambda f, c: bench.outer("adam", 2, adjoint, f, c))
        return bench.solve(jax.vmap(lambda c, f: one(f, c), in_axes=(0, None)), dtype, cell, factors)

    rows = bench.judge("adam", 2, run)
    assert [r["result"] for r in rows] in ([bench.RIGHT, bench.REFUSED], [bench.HARD, bench.REFUSED])
    assert "rounding took more than" in rows[1]["message"]


@pytest.mark.slow
def test_rows_of_very_different_size():
    (row,) = bench.measure_special("rows, adam", 20)
    assert good(row), row
    assert len([k for k in row["errors"] if k.startswith("learning_rate ")]) == len(bench.ROW_SIZES)


@pytest.mark.slow
def test_the_command_reports(tmp_path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = bench.main(["--only", "momentum", "--steps", "1", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("scales-*.json")
    report = json.loads(path.read_text())
    assert code == 0 and len(report["rows"]) == len(bench.PAIRS)
    assert "25 runs, 0 wrong or refused" in out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("steps", bench.STEPS)
@pytest.mark.parametrize("name", [*bench.OPTIMIZERS, *bench.SPECIAL])
def test_everything(name, steps):
    special = name in bench.SPECIAL
    rows = bench.measure_special(name, steps) if special else bench.measure(name, steps, bench.PAIRS)
    assert rows and not not_right(rows)


# ---- the guard


def end(
    loss: Any, params: Any, steps: int, optimizer: Any = None, adjoint: Any = None, **hypers: Any
) -> Any:
    def outer(hypers: Any) -> Any:
        trained = hg.train(loss, params, hypers, steps=steps, optimizer=optimizer, adjoint=adjoint)
        return sum(jnp.sum(x) for x in jax.tree.leaves(trained.params))

    return jax.value_and_grad(outer)(hypers)


def half_square(w: Any, meta: Any, step: Any) -> Any:
    return 0.5 * jnp.sum(w**2)


def test_a_row_that_is_too_small_is_refused_by_name():
    loss = lambda w, meta, step: jnp.sum(jnp.array([1.0, 1e-30]) * (w["emb"] - 2) ** 2)  # noqa: E731
    with pytest.raises(hg.ReversalError) as raised:
        end(loss, {"emb": jnp.array([1.0, 1.5])}, 3, learning_rate=0.1)
    message = str(raised.value)
    assert "train(steps=3, optimizer=momentum()" in message
    assert (
        "at step 0 rounding took more than 1e-03 of what was added to a row of 'velocity' of params"
        in message
    )
    assert "['emb']" in message and "Give them a leaf of their own" in message


def test_a_radix_that_is_too_coarse_is_refused_by_name():
    loss = lambda w, meta, step: 1e-9 * jnp.sum((w["a"] - 2) ** 2)  # noqa: E731
    with pytest.raises(hg.ReversalError) as raised:
        end(
            loss,
            {"a": jnp.ones(2)},
            3,
            hg.adam(),
            hg.Reversible(radix={"nu": 0}),
            learning_rate=0.1,
            eps=1e-8,
        )
    message = str(raised.value)
    assert "at step 0 rounding took" in message and "'nu' of params['a']" in message
    assert "a larger radix than 0" in message


def test_a_range_that_is_left_is_told_truly():
    sizes = jnp.array([1e-20, 1.0, 1.0])
    loss = lambda w, meta, step: sizes[step] * jnp.sum((w - 2) ** 2)  # noqa: E731
    with pytest.raises(hg.ReversalError) as raised:
        end(loss, jnp.ones(2), 3, learning_rate=0.1)
    message = str(raised.value)
    assert "at step 1 'velocity' of params became NaN or grew to 2**32 times the largest number" in message
    assert "it began with numbers that say nothing of later ones" in message
    # What the message advises helps: v is 0, 0.2, 0.2 * 0.9 + 0.1 * 2 * 0.98 after the steps.
    value, _ = end(loss, jnp.ones(2), 3, None, hg.Reversible(radix={"velocity": 58}), learning_rate=0.1)
    np.testing.assert_allclose(value, 2 * (1 + 0.1 * (0.2 + 0.376)), rtol=1e-6)


@pytest.mark.slow
def test_a_run_of_one_step_comes_back():
    """Its loops are no loops to the compiler, which knows the step; that must not undo what keeps bits."""
    assert not not_right(bench.measure("novograd", 1, bench.PAIRS))


@pytest.mark.slow
def test_weights_that_have_decayed_are_trained_by_steps_of_their_size():
    """Weights of 1 decay to 3e-52, then grow by steps of 1e-20: their unit has become smaller with them."""
    step = 1e-20
    early = jnp.arange(60) < 40
    hypers = {"learning_rate": jnp.where(early, 0.5, step), "weight_decay": jnp.where(early, 1.9, 0.0)}
    loss = lambda w, meta, t: jnp.where(t < 40, 0.0, -1.0) * jnp.sum(w)  # noqa: E731
    found, gradient = end(loss, jnp.ones(2), 60, hg.adamw(), **hypers)
    value, expected = end(loss, jnp.ones(2), 60, hg.adamw(), hg.Checkpointed(), **hypers)
    assert step < value < 2 * 20 * 2 * step
    np.testing.assert_allclose(found, value, rtol=1e-5)
    rates = (gradient["learning_rate"], expected["learning_rate"])
    np.testing.assert_allclose(*rates, rtol=1e-4, atol=1e-6 * float(jnp.max(jnp.abs(rates[1]))))


def test_a_run_that_converges_is_not_refused():
    value, gradient = end(half_square, jnp.ones(3), 1000, learning_rate=0.5, momentum=0.5)
    assert abs(value) < 1e-12 and abs(gradient["learning_rate"]) < 1e-12


def chained(rate: Any, steps: tuple[int, ...], optimizer: Any, whole: bool = True) -> Any:
    """Runs one after the other, each from where the last one ended."""
    params, state = jnp.array([1.0, -0.5]), None
    for count in steps:
        trained = hg.train(
            half_square, params, {"learning_rate": rate}, steps=count, optimizer=optimizer, state=state
        )
        params, state = trained.params, trained.state
    return jnp.sum(params * jnp.array([1.0, 2.0]))


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "rate"), [(hg.momentum(), 1.0), (hg.adam(), 0.05)])
def test_a_converged_run_that_goes_on_is_one_run(optimizer, rate):
    one, slope = jax.value_and_grad(lambda r: chained(r, (900,), optimizer))(rate)
    two, again = jax.value_and_grad(lambda r: chained(r, (700, 200), optimizer))(rate)
    assert abs(one) < 1e-10 and one == two
    np.testing.assert_allclose(again, slope, rtol=1e-4)


def test_a_step_that_was_lost_is_not_excused_by_what_came_of_it():
    """The small row's ``v`` rounds to 0: its step is a million, and gradients are large from then on."""
    loss = lambda w, meta, step: jnp.sum(jnp.array([1.0, 1e-12]) * (w - 2) ** 2)  # noqa: E731
    with pytest.raises(hg.ReversalError, match=r"at step 0 rounding took more than 1e-03 .* of 'nu'"):
        end(loss, jnp.array([1.0, 1.5]), 3, hg.adam(), learning_rate=0.1, eps=1e-20)


@pytest.mark.slow
def test_the_gradient_of_two_runs_in_a_row_is_that_of_one():
    def scanned(rate: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            w, v = carry
            v = 0.9 * v - 0.1 * w
            return (w + rate * v, v), None

        w = jnp.array([1.0, -0.5])
        (w, _), _ = jax.lax.scan(step, (w, jnp.zeros(2)), length=12)
        return jnp.sum(w * jnp.array([1.0, 2.1]))

    def two(rate: Any) -> Any:
        first = hg.train(half_square, jnp.array([1.0, -0.5]), {"learning_rate": rate}, steps=7)
        second = hg.train(half_square, first.params, {"learning_rate": rate}, steps=5, state=first.state)
        return jnp.sum(second.params * jnp.array([1.0, 2.1]))

    found, expected = (jax.value_and_grad(f)(0.3) for f in (two, scanned))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_truncated_works_where_training_has_ended():
    adjoint = hg.Truncated(50, hg.Reversible())
    value, gradient = end(half_square, jnp.ones(3), 1000, None, adjoint, learning_rate=0.5, momentum=0.5)
    assert abs(value) < 1e-12 and abs(gradient["learning_rate"]) < 1e-12


# A hundred thousand steps.


def long_run(adjoint: Any, noise: float) -> Any:
    """Value and derivatives of a run of Adam, with gradients that never die or soon do."""
    steps = 100_000

    def loss(w: Any, meta: Any, t: Any) -> Any:
        shaken = w - meta - noise * jnp.sin(1.7 * t * jnp.arange(1, 5))
        return jnp.sum(jnp.array([1.0, 0.1, 1e-3, 1e-5]) * jnp.square(shaken))

    def outer(rate: Any, meta: Any, b2: Any) -> Any:
        hypers = {"learning_rate": rate, "b2": b2}
        times = jnp.arange(steps, dtype=jnp.float32) % 1000
        start = jnp.array([0.3, 0.1, -0.2, 0.4])
        arguments = {"steps": steps, "optimizer": hg.adam(), "adjoint": adjoint}
        return jnp.sum(jnp.square(hg.train(loss, start, hypers, meta, times, **arguments).params - 0.9))

    return jax.value_and_grad(outer, argnums=(0, 1, 2))(1e-5, 1.0, 0.999)


@pytest.mark.slow
def test_a_hundred_thousand_steps_of_adam() -> None:
    found, expected = (long_run(adjoint, 0.3) for adjoint in (hg.Reversible(), hg.Checkpointed()))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


@pytest.mark.slow
def test_a_hypergradient_that_overflows_where_gradients_have_died_says_so() -> None:
    """At ``ε = 1e-8`` a step of Adam at a gradient of 0 multiplies what passes through it by hundreds."""
    message = r"the run was recovered.*became NaN or infinite.*have died away to rounding a larger eps"
    with pytest.raises(hg.ReversalError, match=message):
        long_run(hg.Reversible(), 0.0)
