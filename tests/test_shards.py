"""`train(..., shards=)`: a step in parts.

The oracle is a loop in plain JAX on whole batches in float64; what must be the same bits is compared as
bytes.  What needs several devices runs in processes of its own.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks.shards import elsewhere

STEPS, ROWS = 4, 12
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)}
BATCHES = {"x": RNG.normal(size=(STEPS, ROWS, 3)), "y": RNG.normal(size=(STEPS, ROWS, 2))}
RATES = np.linspace(0.1, 0.3, STEPS)
ADJOINTS = [hg.Reversible(), hg.Checkpointed(), hg.Stored(), hg.Forward()]


def loss(params: Any, meta: Any, batch: Any) -> Any:
    out = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    penalty = jnp.exp(meta) * sum(jnp.sum(x**2) for x in params.values())
    return jnp.mean((out - batch["y"]) ** 2) + penalty


def plain(rates: Any, params: Any, meta: Any, batches: Any) -> Any:
    """Gradient descent with momentum on whole batches, in plain JAX."""

    def step(carry: Any, x: Any) -> Any:
        (params, velocity), (rate, batch) = carry, x
        value, gradient = jax.value_and_grad(loss)(params, meta, batch)
        velocity = jax.tree.map(lambda v, g: 0.9 * v - 0.1 * g, velocity, gradient)
        return (jax.tree.map(lambda p, v: p + rate * v, params, velocity), velocity), value

    start = (params, jax.tree.map(jnp.zeros_like, params))
    (params, _), losses = jax.lax.scan(step, start, (rates, batches))
    return sum(jnp.sum(x**3) for x in params.values()) + jnp.mean(losses)


def sharded(adjoint: Any, shards: Any) -> Any:
    def outer(rates: Any, params: Any, meta: Any, batches: Any) -> Any:
        hypers = {"learning_rate": rates, "momentum": 0.9}
        settings: Any = {"steps": STEPS, "adjoint": adjoint, "shards": shards}
        trained = hg.train(loss, params, hypers, meta, batches, **settings)
        return sum(jnp.sum(x**3) for x in trained.params.values()) + jnp.mean(trained.losses)

    return outer


def arguments(dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (RATES, PARAMS, np.float64(-3), BATCHES))


def test_a_problem_says_how_its_batches_are_cut() -> None:
    """For `tune` and `plan` too; against a loop on whole batches, and `train` with the same parts."""
    rates, params, meta, batches = arguments(jnp.float32)
    whole, cut = (hg.Problem(params, loss, batches, meta=meta, shards=shards) for shards in (None, 4))
    hypers = {"learning_rate": rates, "momentum": 0.9}
    found = cut.train(hypers, steps=STEPS)
    same = hg.train(loss, params, hypers, meta, batches, steps=STEPS, shards=4)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), found.params, same.params)))
    other = hg.train(loss, params, hypers, meta, batches, steps=STEPS, shards=2).params
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), found.params, other)))
    settings: Any = {"steps": STEPS, "meta_steps": 3, "trials": 0, "progress": False}
    tuned = [hg.tune(x, hypers={"learning_rate": 0.1}, **settings) for x in (whole, cut)]
    learned = [float(x.hypers["learning_rate"]) for x in tuned]
    assert learned[0] != 0.1
    np.testing.assert_allclose(*learned, rtol=1e-4)
    assert hg.plan(cut, hypers=hypers, steps=STEPS, budget=1e9).adjoint is not None


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_hypergradients_are_those_of_whole_batches(adjoint: Any) -> None:
    wanted = (0, 1, 2) if isinstance(adjoint, hg.Forward) else (0, 1, 2, 3)
    with jax.enable_x64(True):
        given = arguments(np.float64)
        right = jax.grad(plain, wanted)(*given)
        found = jax.jit(jax.grad(sharded(adjoint, 3), wanted))(*given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right)):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_second_derivatives_are_those_of_whole_batches() -> None:
    with jax.enable_x64(True):
        given = arguments(np.float64)
        right = jax.hessian(plain)(*given)
        found = jax.hessian(sharded(hg.Reversible(), 3))(*given)
    np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-9)


def test_parts_may_come_in_any_order() -> None:
    """The same rows, in other parts of the same rows: float sums would differ in the last bits."""
    rates, params, meta, batches = arguments(np.float32)
    turned = jax.tree.map(lambda x: jnp.roll(x, ROWS // 4, axis=1), batches)
    run = jax.jit(
        lambda b: hg.train(loss, params, {"learning_rate": rates}, meta, b, steps=STEPS, shards=4)
    )
    one, other = run(batches), run(turned)
    for a, b in zip(
        jax.tree.leaves((one.params, one.losses)), jax.tree.leaves((other.params, other.losses))
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_part_has_random_keys_of_its_own() -> None:
    seen = lambda w, meta, key: w * jax.random.normal(jax.random.wrap_key_data(jax.random.key_data(key)))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 2)
    trained = hg.train(seen, jnp.zeros(()), {"learning_rate": 1.0}, None, keys, steps=2, shards=2)
    mean = lambda key: np.mean([float(jax.random.normal(jax.random.fold_in(key, k))) for k in range(2)])  # noqa: E731
    gradients = [mean(key) for key in keys]
    velocity = -0.1 * gradients[0]
    right = velocity + 0.9 * velocity - 0.1 * gradients[1]
    np.testing.assert_allclose(trained.params, right, rtol=1e-6)


@pytest.mark.slow
def test_the_memory_is_that_of_one_part() -> None:
    """The widest array of the loss has a row of 10,000 numbers for every example."""
    wide = lambda w, meta, x: jnp.mean(jnp.tanh(x[:, None] * jnp.arange(10_000.0)[None] * w) ** 2)  # noqa: E731
    batches = jnp.ones((2, 64))

    def bytes_of(shards: Any) -> int:
        def outer(rate: Any) -> Any:
            hypers = {"learning_rate": rate}
            return hg.train(wide, jnp.ones(()), hypers, None, batches, steps=2, shards=shards).params

        return int(jax.jit(jax.grad(outer)).lower(0.1).compile().memory_analysis().temp_size_in_bytes)

    assert bytes_of(16) < bytes_of(None) / 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shards": 5}, r"shards=5 cuts the second axis of batches\['x'\], of shape \[4, 12, 3\]"),
        ({"shards": 0}, r"Shards\(0\): the number of parts is a whole number from 1 to 256"),
        (
            {"shards": 3, "batches": None},
            r"shards=3 cuts the batch of every step, and there are no batches",
        ),
        ({"shards": hg.Shards(3, over="data")}, r"the mesh has the axes \[\] and not \['data'\]"),
        (
            {"shards": 3, "optimizer": hg.sophia(hg.hutchinson(loss))},
            r"looks at more of a batch than its gradient",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(change: Any, says: str) -> None:
    rates, params, meta, batches = arguments(np.float32)
    given: Any = {"batches": batches, "steps": STEPS} | change
    with pytest.raises(ValueError, match=says):
        hg.train(loss, params, {"learning_rate": rates}, meta, **given)


def test_axes_are_names() -> None:
    with pytest.raises(TypeError, match=r"Shards\(2, over=3\): over takes names of axes of the mesh"):
        hg.Shards(2, over=3)  # type: ignore[arg-type]


def test_a_state_of_the_model_is_refused() -> None:
    counted = lambda w, meta, batch, state: (jnp.mean((batch - w) ** 2), state + 1)  # noqa: E731
    with pytest.raises(ValueError, match="shards=2: the model has a state, which every part would change"):
        hg.train(
            counted, jnp.zeros(()), {"learning_rate": 0.1}, None, jnp.ones((3, 4)),
            steps=3, shards=2, model_state=jnp.zeros(()),
        )  # fmt: skip


printed = functools.cache(elsewhere)  # what one device finds is compared with several others


@pytest.mark.devices
@pytest.mark.parametrize(
    ("model", "optimizer", "devices"),
    [
        ("mlp", "adamw", 2),
        ("mlp", "adamw", 8),
        ("transformer", "momentum", 2),
        pytest.param("mlp", "momentum", 8, marks=pytest.mark.slow),
        pytest.param("transformer", "adamw", 4, marks=pytest.mark.slow),
    ],
)
def test_training_and_its_reversal_have_the_same_bits_on_any_number_of_devices(
    model: str, optimizer: str, devices: int
) -> None:
    one = printed(1, model, optimizer)
    assert len(one) == 7
    assert elsewhere(devices, model, optimizer) == one


@pytest.mark.devices
def test_two_processes_find_the_same_bits() -> None:
    assert elsewhere(2, "mlp", "adamw", "--processes", "2") == printed(1, "mlp", "adamw")


@pytest.mark.devices
def test_a_run_goes_on_with_the_same_bits_on_other_devices(tmp_path: Path) -> None:
    run, state = ("mlp", "momentum", "--forward"), str(tmp_path / "state.npz")
    elsewhere(8, *run, "--until", "7", "--state", state)
    one, two = (elsewhere(devices, *run, "--since", "7", "--state", state) for devices in (1, 2))
    assert one == two and one[0] == elsewhere(1, *run)[0]


# Of 2 devices and 12 steps, the way forwards has 24 collectives; each step back has 2 for the gradient and
# then 2 for its products.  Without a check, a wrong gradient is found because the start is not recovered.
@pytest.mark.devices
@pytest.mark.parametrize(
    "flags", [["10"], pytest.param(["31"], marks=pytest.mark.slow), ["29", "--unchecked"]], ids=" ".join
)
def test_one_wrong_collective_is_a_reversal_error(flags: list[str]) -> None:
    (said,) = elsewhere(2, "mlp", "momentum", "--spoil", *flags)
    assert said.startswith("ReversalError: ")
