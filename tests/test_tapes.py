"""How long tapes must be: by closed forms, and against what runs really use."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import hypergrad as hg
from hypergrad import exact
from hypergrad.adjoints.joint import Joint, joined
from hypergrad.adjoints.run import Constants, Inputs, Solution
from hypergrad.adjoints.tapes import complete, destroyed_bits, known_lengths, taped_of

STEPS = 100


def loss(w: Any, meta: Any, step: Any) -> jax.Array:
    """A bowl."""
    return jnp.sum(w["a"] ** 2) + jnp.sum(w["b"] ** 2)


def captured(hypers: Any, optimizer: Any = None) -> tuple[Joint, list[Any], Constants, Inputs]:
    """What an adjoint is given, with leaves as they are."""
    given: list[Any] = []

    def spy(*arguments: Any) -> Solution:
        given.append(arguments)
        return hg.Stored()(*arguments)

    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(5)}
    hg.train(loss, params, hypers, steps=STEPS, optimizer=optimizer, adjoint=spy)
    return joined(*given[0], possible=False), *given[0][1:]


def rows_of(taped: Any, lengths: Any) -> list[dict[str, Any]]:
    """Lengths of tapes by variable, of every leaf."""
    return [
        {x.variable: n for x, n in zip(*each, strict=True)} for each in zip(taped, lengths, strict=True)
    ]


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99, 1.0 - 2.0**-20])
def test_one_factor_for_an_array_needs_its_logarithm(momentum: float) -> None:
    joint, *arrays = captured({"learning_rate": 0.1, "momentum": momentum})
    taped = taped_of(joint, *arrays)
    assert [[(x.variable, x.scales, x.buffer) for x in leaf] for leaf in taped] == [
        [("velocity", 1, None), ("params", 0, None)]
    ] * 2
    lengths = known_lengths(joint, taped, STEPS, *arrays[1:])
    assert complete(lengths)
    bits = STEPS * math.log2(1 / momentum)
    for each in rows_of(taped, lengths):
        # A row is a byte of every element; numbers may outgrow their first ones by some.
        assert bits <= 8 * (each["velocity"] - exact.BYTES) <= bits + 16
        assert each["params"] == exact.BYTES
    assert list(destroyed_bits(joint, *arrays)) == ["velocity"]
    assert destroyed_bits(joint, *arrays)["velocity"] <= math.log2(1 / momentum) + 16 / STEPS


def test_a_factor_for_every_element_needs_the_sum_of_logarithms() -> None:
    momentum = {"a": jnp.full((1, 2, 3), 0.5), "b": 0.5}
    joint, *arrays = captured({"learning_rate": 0.1, "momentum": momentum})
    taped = taped_of(joint, *arrays)
    assert [[(x.variable, x.factor_shape, x.buffer) for x in leaf] for leaf in taped] == [
        [("velocity", (2, 3), 0), ("params", (), None)],
        [("velocity", (), None), ("params", (), None)],
    ]
    a, b = (each["velocity"] for each in rows_of(taped, known_lengths(joint, taped, STEPS, *arrays[1:])))
    # A register holds 24 to 32 bits of an element.
    assert 6 * (STEPS - 32) <= 8 * a <= 6 * (STEPS + 16)
    assert STEPS <= 8 * (b - exact.BYTES) <= STEPS + 16


def test_schedules_are_added_up_by_segment() -> None:
    rates = jnp.where(jnp.arange(STEPS) < 50, 0.5, 2.0**-0.5)
    joint, *arrays = captured({"learning_rate": 0.1, "momentum": rates})
    taped = taped_of(joint, *arrays)
    for length, bits, more in ((STEPS, 75, exact.BYTES), (25, 25, 2 * exact.BYTES)):
        rows = rows_of(taped, known_lengths(joint, taped, length, *arrays[1:]))[0]["velocity"]
        assert bits <= 8 * (rows - more) <= bits + 16, length


def test_what_is_kept_costs_the_logarithm_of_its_levels() -> None:
    joint, *arrays = captured({"learning_rate": 0.1}, hg.lion())
    taped = taped_of(joint, *arrays)
    (kept,) = [each for each in taped[0] if each.levels]
    assert kept.levels == 3 and kept.factor_shape == ()
    assert destroyed_bits(joint, *arrays)[kept.variable] == pytest.approx(math.log2(3), abs=0.2)


def test_what_only_the_run_tells_is_not_known() -> None:
    joint, *arrays = captured({"learning_rate": 0.1}, hg.lamb())
    taped = taped_of(joint, *arrays)
    lengths = known_lengths(joint, taped, STEPS, *arrays[1:])
    known = {each.variable: need is not None for each, need in zip(taped[0], lengths[0])}
    assert known["mu"] and known["nu"]

    def inside(momentum: Any) -> Any:
        joint, *arrays = captured({"learning_rate": 0.1, "momentum": momentum})
        assert not complete(known_lengths(joint, taped_of(joint, *arrays), STEPS, *arrays[1:]))
        return momentum

    jax.jit(inside)(0.5)


def test_a_program_that_overwrites_is_refused() -> None:
    joint, *arrays = captured({"learning_rate": 0.1}, hg.sgd())
    with pytest.raises(
        hg.ReversalError, match=r"sgd\(\) overwrites 'params' in a way that cannot be undone"
    ):
        taped_of(joint, *arrays)
