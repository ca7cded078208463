"""A training run as a pure function: its loss, its steps, and segments that are computed again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.adjoints.linearize import Segments, gradient_of, in_segments
from hypergrad.adjoints.run import Constants, Inputs, Run, Solution

STEPS = 7
PARAMS = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(0.5)}
BATCHES = jnp.linspace(-1.0, 1.0, STEPS * 2).reshape(STEPS, 2)


def loss(w: Any, meta: Any, x: Any) -> jax.Array:
    """Something smooth."""
    return jnp.sum(jnp.sin(w["a"] * x + w["b"]) * meta)


def watch(snapshot: hg.Snapshot) -> Any:
    """Something of everything."""
    return {"w": snapshot.params["b"], "v": snapshot.state["velocity"]["b"], "g": snapshot.gradient["a"]}


def captured(**changes: Any) -> tuple[Run, list[Any], Constants, Inputs]:
    """What an adjoint is given."""
    given: list[Any] = []

    def spy(*arguments: Any) -> Solution:
        given.append(arguments)
        return hg.Stored()(*arguments)

    arguments = {"steps": STEPS, "adjoint": spy, "watch": watch} | changes
    hypers = {"learning_rate": jnp.linspace(0.1, 0.2, STEPS), "momentum": 0.5}
    hg.train(loss, PARAMS, hypers, jnp.array([1.0, 2.0]), BATCHES, **arguments)
    return given[0]


def plain(rates: Any) -> tuple[Any, Any]:
    """The same by hand."""

    def step(carry: Any, at: Any) -> Any:
        w, v = carry
        x, rate = at
        value, g = jax.value_and_grad(loss)(w, jnp.array([1.0, 2.0]), x)
        seen = {"w": w["b"], "v": v["b"], "g": g["a"]}
        v = jax.tree.map(lambda v, g: 0.5 * v - 0.5 * g, v, g)
        return (jax.tree.map(lambda w, v: w + rate * v, w, v), v), (value, seen)

    start = (PARAMS, jax.tree.map(jnp.zeros_like, PARAMS))
    return jax.lax.scan(step, start, (BATCHES, rates))


def test_loss_and_gradient_of_flat_parameters() -> None:
    run, start, constants, _ = captured()
    params, batch = run.params_of(start), [BATCHES[0]]
    expected, slope = jax.value_and_grad(loss)(PARAMS, jnp.array([1.0, 2.0]), BATCHES[0])
    np.testing.assert_allclose(run.loss_at(params, constants.loss, batch), expected)
    found, observations = run.plain_gradient(params, constants.loss, batch)
    np.testing.assert_allclose(found, expected)
    for leaf, g in zip(observations, jax.tree.leaves(slope)):
        np.testing.assert_allclose(leaf["gradient"], g)
    assert run.names == ("params['a']", "params['b']")
    assert jax.tree.structure(run.state_of(start)["velocity"]) == jax.tree.structure(PARAMS)


@pytest.mark.quick("1", "3", "50")
@pytest.mark.parametrize("segments", [1, 2, 3, 7, 50])
def test_segments_change_nothing(segments: int) -> None:
    """Of lengths that divide the steps and do not; values and derivatives, against a loop by hand."""
    run, start, constants, inputs = captured()

    def end(rates: Any) -> Any:
        scheduled = [leaf | {"learning_rate": rates} for leaf in inputs.hypers]
        leaves, outputs = in_segments(
            run, Segments(segments), start, constants, inputs._replace(hypers=scheduled)
        )
        return jnp.sum(run.params_of(leaves)[0] ** 2), (leaves, outputs)

    rates = jnp.linspace(0.1, 0.2, STEPS)
    _, (leaves, outputs) = end(rates)
    (w, v), (losses, seen) = plain(rates)
    np.testing.assert_allclose(leaves[1]["params"], w["b"], rtol=1e-6)
    np.testing.assert_allclose(leaves[1]["velocity"], v["b"], rtol=1e-6)
    np.testing.assert_allclose(outputs.loss, losses, rtol=1e-5, atol=1e-6)
    for name, x in seen.items():
        np.testing.assert_allclose(outputs.watched[name], x, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda rates: jnp.sum(plain(rates)[0][0]["a"] ** 2))(rates)
    np.testing.assert_allclose(jax.grad(lambda x: end(x)[0])(rates), slope, rtol=1e-4, atol=1e-6)


def test_one_step_by_either_gradient() -> None:
    run, start, constants, inputs = captured()
    first = jax.tree.map(lambda x: x[0], inputs)
    plainly = run.step(start, constants, first, run.plain_gradient)
    jax.tree.map(
        np.testing.assert_array_equal, run.step(start, constants, first, gradient_of(run)), plainly
    )


def test_an_optimizer_that_is_no_program_is_refused_where_one_is_needed() -> None:
    run, *_ = captured(watch=None)
    assert run.program is run.optimizer
    generic = hg.program.GenericOptimizer("plain()", lambda p: (), lambda *x: x, {})
    with pytest.raises(hg.ReversalError, match=r"train\(.*plain\(\) is no program"):
        _ = Run(run.call, generic, run.loss, None, run.layout, 1, 0, False).program
