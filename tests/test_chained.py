"""A run that goes on from the end of another: the same bits, and the same derivatives, as one run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.problems import OPTIMIZERS, RANGES, RATES

STEPS, HALF = 40, 20
START = {"matrix": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "vector": jnp.array([0.5, -1.0, 0.0])}

# Name, optimizer, and its hyperparameters.
OPTIMIZERS_OF_TODAY: dict[str, tuple[Any, dict[str, float]]] = {
    "adabelief": (hg.adabelief(), {"learning_rate": 0.05, "b1": 0.9, "b2": 0.95}),
    "ademamix": (hg.ademamix(), {"learning_rate": 0.05}),
    "adopt": (hg.adopt(), {"learning_rate": 0.05}),
    "cautious_adamw": (hg.cautious_adamw(), {"learning_rate": 0.05}),
    "grams": (hg.grams(), {"learning_rate": 0.05}),
    "lion": (hg.lion(), {"learning_rate": 0.01}),
    "madgrad": (hg.madgrad(), {"learning_rate": 0.05}),
    "novograd": (hg.novograd(), {"learning_rate": 0.05}),
    "dadapt_adamw": (hg.dadapt_adamw(), {"learning_rate": 1.0}),
    "prodigy": (hg.prodigy(), {"learning_rate": 1.0}),
    "signum": (hg.signum(), {"learning_rate": 0.01}),
    "yogi": (hg.yogi(), {"learning_rate": 0.05}),
}


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    rng = np.random.default_rng(0)
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, optimizer in OPTIMIZERS.items():
        ranges = RANGES | {"learning_rate": (0.3 * RATES[name], 0.6 * RATES[name])}
        found[name] = (optimizer, {key: float(rng.uniform(*ranges[key])) for key in optimizer.hypers})
    return found | OPTIMIZERS_OF_TODAY


CASES = cases()


def every(*quick: str) -> Any:
    """Every optimizer, these every day."""
    marks = {name: [] if name in quick else [pytest.mark.slow] for name in CASES}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in CASES])


def waves(w: Any, meta: Any, step: Any) -> Any:
    """Gradients of all sizes and signs, and one that is always zero."""
    mask = jnp.array([1.0, 1.0, 0.0], w["vector"].dtype)
    terms = [w["matrix"], mask * w["vector"]]
    return meta * sum(jnp.sum(jnp.cos(3 * x + step) - jnp.cos(step) + 0.3 * x**2) for x in terms)


def start() -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.result_type(float)), START)


def one(optimizer: Any, adjoint: Any, hypers: Any, meta: Any, **more: Any) -> Any:
    return hg.train(waves, start(), hypers, meta, steps=STEPS, optimizer=optimizer, adjoint=adjoint, **more)


def two(optimizer: Any, adjoints: Any, hypers: Any, meta: Any, change: Any = lambda w: w) -> Any:
    """The same in two runs: schedules are split, and parameters may be changed in between."""

    def part(of: slice) -> Any:
        return {k: x[of] if jnp.ndim(x) else x for k, x in hypers.items()}

    adjoints = adjoints if isinstance(adjoints, tuple) else (adjoints, adjoints)
    first = hg.train(
        waves, start(), part(slice(HALF)), meta, steps=HALF, optimizer=optimizer, adjoint=adjoints[0]
    )
    return hg.train(
        waves, change(first.params), part(slice(HALF, None)), meta,
        steps=STEPS - HALF, optimizer=optimizer, adjoint=adjoints[1], state=first.state,
    )  # fmt: skip


def floats(trained: Any) -> Any:
    """Parameters and the optimizer's variables, but for the integers behind them."""
    return trained.params, {name: x for name, x in trained.state.items() if name != "exact"}


def assert_same_bits(found: Any, expected: Any) -> None:
    paths, _ = jax.tree_util.tree_flatten_with_path(expected)
    for x, (path, y) in zip(jax.tree.leaves(found), paths, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def assert_same_but_for_rounding(found: Any, expected: Any) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def adjoints_of(optimizer: Any) -> list[Any]:
    return [hg.Reversible(), hg.Stored()] if optimizer.reversible else [hg.Stored(), hg.Checkpointed()]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
@every("adam")
def test_two_runs_are_one_bit_for_bit(name: str, which: int) -> None:
    """By `Reversible`; the floats of other adjoints the compiler may fuse one way here, another there."""
    optimizer, hypers = CASES[name]
    adjoint, meta = adjoints_of(optimizer)[which], jnp.float32(1.0)
    whole, parts = (jax.jit(lambda m, f=f: f(optimizer, adjoint, hypers, m)) for f in (one, two))
    expected, found = whole(meta), parts(meta)
    same = assert_same_bits if isinstance(adjoint, hg.Reversible) else assert_same_but_for_rounding
    same(floats(found), floats(expected))
    same(found.losses, expected.losses[HALF:])
    assert not np.array_equal(expected.params["matrix"], START["matrix"])
    assert int(found.state["step"]) == STEPS


def end(trained: Any) -> Any:
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(trained.params)) + jnp.mean(trained.losses[-HALF:])


@pytest.mark.quick("sgd")
@every("momentum", "sgd")
@pytest.mark.usefixtures("x64")
def test_the_hypergradient_of_two_runs_is_that_of_one(name: str) -> None:
    """Against JAX's own derivative of one run; in everything that is constant in the runs."""
    optimizer, given = CASES[name]
    hypers = {key: jnp.asarray(x) for key, x in given.items()}
    given_adjoints = [*adjoints_of(optimizer), hg.Reversible(segments=3)]
    adjoints = [a for a in given_adjoints if optimizer.reversible or not isinstance(a, hg.Reversible)]
    meta = jnp.asarray(1.0)
    expected = jax.jit(jax.grad(lambda x: end(one(optimizer, hg.Stored(), *x))))((hypers, meta))
    for adjoint in adjoints:
        found = jax.jit(jax.grad(lambda x, a=adjoint: end(two(optimizer, a, *x))))((hypers, meta))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9)


MOMENTUM = {"learning_rate": 0.2, "momentum": 0.8}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_schedule_split_in_two() -> None:
    """Rates that are learned at every step, against plain JAX."""

    def plain(rates: Any, meta: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            w, v = carry
            t, rate = x
            value, g = jax.value_and_grad(waves)(w, meta, t)
            v = jax.tree.map(lambda v, g: 0.8 * v - 0.2 * g, v, g)
            return (jax.tree.map(lambda w, v: w + rate * v, w, v), v), value

        zeros = jax.tree.map(jnp.zeros_like, start())
        (w, _), losses = jax.lax.scan(step, (start(), zeros), (jnp.arange(STEPS), rates))
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(w)) + jnp.mean(losses[-HALF:])

    rates, meta = jnp.linspace(0.3, 0.05, STEPS), jnp.asarray(0.9)
    expected = jax.grad(plain, argnums=(0, 1))(rates, meta)

    def chained(rates: Any, meta: Any) -> Any:
        hypers = {"learning_rate": rates, "momentum": 0.8}
        return end(two(hg.momentum(), hg.Reversible(), hypers, meta))

    found = jax.jit(jax.grad(chained, argnums=(0, 1)))(rates, meta)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


@pytest.mark.slow
def test_parameters_changed_between_the_runs_are_honoured() -> None:
    """The variables go on; the parameters begin where they are put, though integers came with them."""
    change = lambda w: w | {"matrix": w["matrix"] + 0.25}  # noqa: E731
    ends = [two(hg.momentum(), a, MOMENTUM, 1.0, change) for a in (hg.Reversible(), hg.Stored())]
    np.testing.assert_allclose(ends[0].params["matrix"], ends[1].params["matrix"], rtol=1e-4)
    # In closed form, where there is no gradient: what was put there, and what the velocity still adds.
    flat = lambda w, meta, t: 0.0 * jnp.sum(w)  # noqa: E731
    first = hg.train(flat, jnp.ones(2), MOMENTUM, steps=1, state={"velocity": jnp.full(2, 0.5)})
    second = hg.train(flat, jnp.full(2, 7.0), MOMENTUM, steps=2, state=first.state)
    np.testing.assert_allclose(second.params, 7 + 0.2 * 0.5 * (0.8**2 + 0.8**3), rtol=1e-6)


@pytest.mark.quick("adam")
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_state_goes_from_one_adjoint_to_another(name: str) -> None:
    optimizer, hypers = CASES[name]
    expected = one(optimizer, hg.Stored(), hypers, 1.0)
    for adjoints in ((hg.Reversible(), hg.Stored()), (hg.Stored(), hg.Reversible())):
        found = two(optimizer, adjoints, hypers, 1.0)
        for x, y in zip(jax.tree.leaves(floats(found)), jax.tree.leaves(floats(expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5)


@pytest.mark.slow
def test_integers_count_only_where_the_floats_are_still_the_same() -> None:
    """A state whose parameters were changed to those of a third run continues that run."""
    first, third = (one(hg.momentum(), hg.Reversible(), MOMENTUM, m) for m in (1.0, 0.5))
    given = first.state | {"velocity": third.state["velocity"]}
    mixed, pure = (
        hg.train(waves, third.params, MOMENTUM, 1.0, steps=5, state=state)
        for state in (given, {k: x for k, x in third.state.items() if k != "exact"})
    )
    assert_same_bits(floats(mixed), floats(pure))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("segments", [2, 3, 40])
def test_segments_do_not_change_the_bits(segments: int) -> None:
    for name in ("momentum", "adam"):
        optimizer, hypers = CASES[name]
        expected = one(optimizer, hg.Reversible(), hypers, 1.0)
        found = one(optimizer, hg.Reversible(segments=segments), hypers, 1.0)
        assert_same_bits(found, expected)


@pytest.mark.parametrize("make", [optax.adam, optax.rmsprop], ids=lambda f: f.__name__)
def test_optimizers_of_optax_chain_too(make: Any) -> None:
    """Against optax itself."""
    found = two(
        hg.from_optax(make, {"learning_rate": None}), hg.Checkpointed(), {"learning_rate": 0.05}, 1.0
    )
    transformation, params = make(0.05), START
    state = transformation.init(params)

    @jax.jit
    def step(params: Any, state: Any, t: Any) -> Any:
        updates, state = transformation.update(jax.grad(waves)(params, 1.0, t), state, params)
        return optax.apply_updates(params, updates), state

    for t in range(STEPS):
        # The loss is given the number of the step, which begins anew where a state of optax's goes on.
        params, state = step(params, state, t % HALF)
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
