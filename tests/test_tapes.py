"""How long tapes must be: by closed forms, and against what runs really use."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import hypergrad as hg
from hypergrad.adjoints.run import Constants, Inputs, Run, Solution
from hypergrad.adjoints.tapes import complete, destroyed_bits, known_lengths, taped_of

STEPS = 100


def loss(w: Any, meta: Any, step: Any) -> jax.Array:
    """A bowl."""
    return jnp.sum(w["a"] ** 2) + jnp.sum(w["b"] ** 2)


def captured(hypers: Any, optimizer: Any = None) -> tuple[Run, list[Any], Constants, Inputs]:
    """What an adjoint is given."""
    given: list[Any] = []

    def spy(*arguments: Any) -> Solution:
        given.append(arguments)
        return hg.Stored()(*arguments)

    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(5)}
    hg.train(loss, params, hypers, steps=STEPS, optimizer=optimizer, adjoint=spy)
    return given[0]


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99, 1.0 - 2.0**-20])
def test_one_factor_for_an_array_needs_its_logarithm(momentum: float) -> None:
    run, *arrays = captured({"learning_rate": 0.1, "momentum": momentum})
    taped = taped_of(run, *arrays)
    assert [[(x.variable, x.factor_shape) for x in leaf] for leaf in taped] == [[("velocity", ())]] * 2
    lengths = known_lengths(run, taped, STEPS, *arrays)
    assert complete(lengths)
    bits = STEPS * math.log2(1 / momentum)
    for (rows,) in lengths:
        assert rows is not None
        # A register holds 24 to 32 bits; a row is a byte of every element.
        assert bits - 32 <= 8 * rows <= bits + 16
    assert destroyed_bits(run, *arrays)["velocity"] <= math.log2(1 / momentum) + 16 / STEPS


def test_a_factor_for_every_element_needs_the_sum_of_logarithms() -> None:
    momentum = {"a": jnp.full((1, 2, 3), 0.5), "b": 0.5}
    run, *arrays = captured({"learning_rate": 0.1, "momentum": momentum})
    taped = taped_of(run, *arrays)
    assert [leaf[0].factor_shape for leaf in taped] == [(2, 3), ()]
    ((a,), (b,)) = known_lengths(run, taped, STEPS, *arrays)
    assert a is not None and b is not None
    assert 6 * (STEPS - 32) <= 8 * a <= 6 * (STEPS + 16)
    assert STEPS - 32 <= 8 * b <= STEPS + 16


def test_schedules_are_added_up_by_segment() -> None:
    rates = jnp.where(jnp.arange(STEPS) < 50, 0.5, 2.0**-0.5)
    run, *arrays = captured({"learning_rate": 0.1, "momentum": rates})
    taped = taped_of(run, *arrays)
    for length, bits in ((STEPS, 75), (25, 25)):
        ((rows,), _) = known_lengths(run, taped, length, *arrays)
        assert rows is not None and bits - 32 <= 8 * rows <= bits + 24, length


def test_what_is_kept_costs_the_logarithm_of_its_levels() -> None:
    run, *arrays = captured({"learning_rate": 0.1}, hg.lion())
    taped = taped_of(run, *arrays)
    (kept,) = [each for each in taped[0] if each.levels]
    assert kept.levels == 3 and kept.factor_shape == ()
    assert destroyed_bits(run, *arrays)[kept.variable] == pytest.approx(math.log2(3), abs=0.2)


def test_what_only_the_run_tells_is_not_known() -> None:
    run, *arrays = captured({"learning_rate": 0.1}, hg.lamb())
    taped = taped_of(run, *arrays)
    lengths = known_lengths(run, taped, STEPS, *arrays)
    known = {each.variable: need is not None for each, need in zip(taped[0], lengths[0])}
    assert known["mu"] and known["nu"]

    def inside(momentum: Any) -> Any:
        run, *arrays = captured({"learning_rate": 0.1, "momentum": momentum})
        assert not complete(known_lengths(run, taped_of(run, *arrays), STEPS, *arrays))
        return momentum

    jax.jit(inside)(0.5)


def test_a_program_that_overwrites_is_refused() -> None:
    run, *arrays = captured({"learning_rate": 0.1}, hg.sgd())
    with pytest.raises(
        hg.ReversalError, match=r"sgd\(\) overwrites 'params' in a way that cannot be undone"
    ):
        taped_of(run, *arrays)
