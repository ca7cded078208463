"""An optimizer as a list of moves: what moves may read, how they are grouped, a step in floats."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import program
from hypergrad.program import (
    Assign,
    FloatStep,
    GenericOptimizer,
    Keep,
    Layout,
    Optimizer,
    Remember,
    Scale,
    Shift,
    Total,
    Variable,
)

W, V, G = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25]), jnp.array([3.0, 4.0])


def step(*moves: program.Move) -> dict[str, jax.Array]:
    """One leaf after one step."""
    (leaf,) = program.step([moves], [{"params": W, "velocity": V}], [{"gradient": G}])
    return leaf


def test_moves_are_made_one_after_the_other() -> None:
    leaf = step(
        Scale("velocity", 0.5),
        Shift("velocity", lambda s: -s.gradient),
        Shift("params", lambda s: 0.1 * s.velocity),
    )
    np.testing.assert_allclose(leaf["velocity"], 0.5 * V - G)
    np.testing.assert_allclose(leaf["params"], W + 0.1 * (0.5 * V - G), rtol=1e-6)


def test_what_is_remembered_is_read_by_later_moves() -> None:
    leaf = step(
        Remember("size", lambda s: jnp.sum(s.gradient**2)),
        Total("sum", lambda s: jnp.sum(s.gradient)),
        Keep("sign", lambda s: jnp.sign(s.gradient), (-1.0, 0.0, 1.0)),
        Scale("velocity", lambda s: s.size / 100),
        Shift("params", lambda s: s.sign * s.sum),
    )
    np.testing.assert_allclose(leaf["velocity"], 0.25 * V)
    np.testing.assert_allclose(leaf["params"], W + 7.0)


REFUSED = {
    "itself": (Shift("params", lambda s: s.params), "reads 'params' itself"),
    "gradient": (Shift("velocity", lambda s: s.gradient), "reads the gradient after or while"),
    "factor": (Scale("velocity", lambda s: s.params), "can read only what Remember"),
    "unknown": (Shift("velocity", lambda s: s.speed), "a move reads 'speed', but there is only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_move_may_not_read_what_could_not_be_undone(name: str) -> None:
    move, message = REFUSED[name]
    with pytest.raises(AttributeError, match=message):
        step(Shift("params", lambda s: s.velocity), move)


def test_an_assignment_may_read_everything() -> None:
    leaf = step(Shift("params", lambda s: s.velocity), Assign("params", lambda s: s.params + s.gradient))
    np.testing.assert_allclose(leaf["params"], W + V + G)


def test_the_derivative_of_a_factor_is_that_of_the_number_itself() -> None:
    def end(factor: jax.Array) -> jax.Array:
        return jnp.sum(step(Scale("velocity", factor))["velocity"])

    value, slope = jax.value_and_grad(end)(jnp.float32(0.3))
    quantized = np.round(np.float32(0.3) * 2.0**32) / 2**32
    np.testing.assert_allclose(value, quantized * 0.75, rtol=1e-7)
    np.testing.assert_allclose(slope, 0.75, rtol=1e-7)


def test_leaves_with_the_same_moves_are_moved_together() -> None:
    a = [Scale("velocity", 0.5), Shift("params", lambda s: s.velocity)]
    b = [Scale("velocity", 0.9), Shift("params", lambda s: -s.velocity)]
    assert program.alike([a, [], b, []]) == [[0, 2], [1, 3]]


def test_defaults() -> None:
    complete = program.with_defaults("call", hg.momentum(), {"learning_rate": 1.0})
    assert complete == {"learning_rate": 1.0, "momentum": 0.9}
    with pytest.raises(
        ValueError, match=r"call: hypers must .* unknown: \['rate'\], missing: \['learning_rate'\]"
    ):
        program.with_defaults("call", hg.momentum(), {"rate": 1.0})


def average(h: Any, gradient: Any, state: Any, params: Any, context: Any) -> Any:
    """Descent along the mean of two gradients."""
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradient, state)
    return jax.tree.map(lambda w, g: w - h["learning_rate"] * g, params, mean), gradient


GENERIC = GenericOptimizer(
    "average()", lambda params: jax.tree.map(jnp.zeros_like, params), average, {"learning_rate": None}
)
MOVES = Optimizer(
    "descent()",
    lambda h, t: [
        Assign("last", lambda s: s.gradient),
        Shift("params", lambda s: -h.learning_rate * s.last),
    ],
    {"last": Variable()},
    {"learning_rate": None},
)


@pytest.mark.parametrize("optimizer", [GENERIC, MOVES], ids=lambda optimizer: optimizer.name)
def test_both_kinds_of_optimizer_have_one_interface(optimizer: program.AnyOptimizer) -> None:
    params = {"a": W, "b": V}
    h = {"learning_rate": jnp.float32(0.5)}
    leaves, layout = optimizer.start("call", None, h, params)
    again, _ = optimizer.start("call", optimizer.state_of(leaves, layout), h, params)
    jax.tree.map(np.testing.assert_array_equal, leaves, again)
    at = FloatStep(
        leaves,
        jnp.float32(0.0),
        [{"gradient": G}, {"gradient": 2 * G}],
        lambda: [optimizer.program("call").moves(SimpleNamespace(**h), jnp.int32(0)) for _ in params],
        h,
        lambda: pytest.fail("there are no examples"),
        lambda: pytest.fail("nothing is evaluated anew") if optimizer is MOVES else None,
    )
    new = optimizer.advance(at, layout)
    part = 0.5 if optimizer is GENERIC else 1.0
    np.testing.assert_allclose(new[0]["params"], W - 0.5 * part * G)
    np.testing.assert_allclose(new[1]["params"], V - part * G)
    assert layout == Layout(jax.tree.structure(params), layout.state)
    assert not (optimizer.reversible or optimizer.per_example or optimizer.blocks or optimizer.observe)
    assert program.is_optimizer(optimizer) and not program.is_optimizer(average)


def test_only_a_program_can_be_played_back() -> None:
    assert MOVES.program("call") is MOVES
    with pytest.raises(hg.ReversalError, match=r"call: average\(\) is no program of invertible moves"):
        GENERIC.program("call")
