"""Runs on many devices, against a plain scan and `jax.grad` under the same mesh, and on one device.

Nearly all of it needs eight devices, which ``pytest -m devices`` simulates.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hypergrad as hg

STEPS, MOMENTUM = 4, 0.7
ADJOINTS = [
    hg.Reversible(),
    hg.Reversible(segments=2),
    hg.Checkpointed(),
    hg.Stored(),
    hg.Truncated(9, hg.Reversible()),
    hg.Forward(),
]
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(16, 6)).astype("f")
TARGETS = RNG.normal(size=(16, 4)).astype("f")
PARAMS = {
    "first": (0.3 * RNG.normal(size=(6, 8))).astype("f"),
    "bias": np.zeros(8, "f"),
    "second": (0.3 * RNG.normal(size=(8, 4))).astype("f"),
}
RATE, META = np.float32(0.2), {"weight": np.float32(0.3), "decay": np.float32(0.05)}

Train = Callable[..., tuple[Any, Any]]  # (loss, params, rate, meta) to the parameters and the losses


def mesh_of(kind: AxisType, shape: tuple[int, ...] = (4,), names: tuple[str, ...] = ("data",)) -> Any:
    return jax.make_mesh(
        shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[: np.prod(shape)]
    )


def loss_of(w: Any, meta: Any, inputs: Any, targets: Any, out: Any = None) -> Any:
    hidden = jnp.tanh(inputs @ w["first"] + w["bias"][None])
    outputs = jnp.einsum("nh,ho->no", hidden, w["second"], out_sharding=out)
    penalty = sum(jnp.sum(x**2) for x in jax.tree.leaves(w))
    return jnp.mean(jnp.exp(meta["weight"]) * (outputs - targets) ** 2) + meta["decay"] * penalty


def plain(loss: Any, params: Any, rate: Any, meta: Any) -> tuple[Any, Any]:
    """The recursion of `hypergrad.momentum` as a scan."""

    def step(carry: Any, t: Any) -> Any:
        w, v = carry
        value, g = jax.value_and_grad(loss)(w, meta, t)
        v = jax.tree.map(lambda v, g: MOMENTUM * v - (1 - MOMENTUM) * g, v, g)
        return (jax.tree.map(lambda w, v: w + rate * v, w, v), v), value

    start = (params, jax.tree.map(jnp.zeros_like, params))
    (w, _), losses = jax.lax.scan(step, start, jnp.arange(STEPS))
    return w, losses


def trained(adjoint: Any) -> Train:
    def train(loss: Any, params: Any, rate: Any, meta: Any) -> tuple[Any, Any]:
        hypers = {"learning_rate": rate, "momentum": MOMENTUM}
        run = hg.train(loss, params, hypers, meta, steps=STEPS, adjoint=adjoint)
        return run.params, run.losses

    return train


def numbers(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def by_hand(train: Train, case: str, mesh: Any, check_vma: bool = True) -> Any:
    """Value and hypergradient inside ``shard_map``; every device has a part of the data."""

    def objective(params: Any, rate: Any, meta: Any, inputs: Any, targets: Any) -> Any:
        me = jax.lax.axis_index("data")
        if case == "rates":  # every device trains parameters of its own
            rate, params = rate * (1 + 0.1 * me), jax.lax.pcast(params, "data", to="varying")
        if case == "params":
            params = {**params, "first": params["first"] * (1 + 0.1 * me)}

        def loss(w: Any, meta: Any, step: Any) -> Any:
            own = loss_of(w, meta, inputs, targets)
            return jax.lax.pmean(own, "data") if case == "mean" else own

        w, losses = train(loss, params, rate, meta)
        value = loss_of(w, meta, inputs, targets) + jnp.sum(losses * (1 + me) * jnp.arange(1.0, STEPS + 1))
        return jax.lax.pmean(value, "data")

    specs = (P(), P(), P(), P("data"), P("data"))
    sharded = jax.shard_map(objective, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    wanted = (1, 2) if train is forwards else (0, 1, 2, 3)
    return jax.jit(jax.value_and_grad(sharded, wanted))(PARAMS, RATE, META, INPUTS, TARGETS)


forwards = trained(hg.Forward())


@pytest.mark.devices
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_loss_that_is_averaged_over_devices_in_shard_map(adjoint: Any) -> None:
    mesh = mesh_of(AxisType.Auto)
    ours = by_hand(forwards if isinstance(adjoint, hg.Forward) else trained(adjoint), "mean", mesh)
    theirs = by_hand(plain, "mean", mesh)
    theirs = (theirs[0], theirs[1][1:3]) if isinstance(adjoint, hg.Forward) else theirs
    np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=2e-5, atol=2e-6)


@pytest.mark.devices
@pytest.mark.parametrize("case", ["own", "rates", "params"])
@pytest.mark.parametrize("adjoint", [hg.Reversible(segments=2), hg.Checkpointed(), hg.Stored()], ids=repr)
def test_every_device_has_its_own_loss_rate_or_parameters(adjoint: Any, case: str) -> None:
    mesh = mesh_of(AxisType.Auto)
    ours, theirs = by_hand(trained(adjoint), case, mesh), by_hand(plain, case, mesh)
    np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=2e-5, atol=2e-6)


LAYOUTS = {
    "data": ({"first": P(), "bias": P(), "second": P()}, P("data", None)),
    "model": ({"first": P(None, "model"), "bias": P("model"), "second": P("model", None)}, P()),
    "both": ({"first": P(None, "model"), "bias": P("model"), "second": P("model", None)}, P("data", None)),
    "parts": ({"first": P(None, "data"), "bias": P(("data", "model")), "second": P("data", "model")}, P()),
}


def on_mesh(train: Train, layout: str, kind: AxisType, wanted: tuple[int, ...]) -> Any:
    """Value and hypergradient of arrays that are placed on a mesh."""
    mesh = mesh_of(kind, (4, 2), ("data", "model"))
    of_params, of_data = LAYOUTS[layout]
    params = {name: jax.device_put(x, NamedSharding(mesh, of_params[name])) for name, x in PARAMS.items()}
    inputs, targets = (jax.device_put(x, NamedSharding(mesh, of_data)) for x in (INPUTS, TARGETS))
    out = of_data if kind is AxisType.Explicit else None

    def loss(w: Any, meta: Any, step: Any) -> Any:
        return loss_of(w, meta, meta["inputs"], meta["targets"], out)

    def objective(params: Any, rate: Any, meta: Any, inputs: Any) -> Any:
        meta = {**meta, "inputs": inputs, "targets": targets}
        w, losses = train(loss, params, rate, meta)
        return loss(w, meta, 0) + jnp.sum(losses)

    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(objective, wanted))(params, RATE, META, inputs)


@pytest.mark.devices
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("layout", ["data", "both"])
def test_explicit_axes(adjoint: Any, layout: str) -> None:
    wanted = (1, 2) if isinstance(adjoint, hg.Forward) else (0, 1, 2, 3)
    ours = on_mesh(trained(adjoint), layout, AxisType.Explicit, wanted)
    theirs = on_mesh(plain, layout, AxisType.Explicit, wanted)
    np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=2e-5, atol=2e-6)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_automatic_axes(layout: str) -> None:
    ours = on_mesh(trained(hg.Reversible()), layout, AxisType.Auto, (0, 1, 2, 3))
    theirs = on_mesh(plain, layout, AxisType.Auto, (0, 1, 2, 3))
    np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=2e-5, atol=2e-6)


@pytest.mark.devices
def test_gradients_and_results_by_column_of_parameters_by_row() -> None:
    mesh = mesh_of(AxisType.Auto)
    rows, columns = NamedSharding(mesh, P("data", None)), NamedSharding(mesh, P(None, "data"))
    start = (0.1 * RNG.normal(size=(32, 16))).astype("f")
    inputs = RNG.normal(size=(8, 32)).astype("f")

    def evaluated(train: Train, params: Any, constrain: Any, **settings: Any) -> Any:
        def loss(w: Any, meta: Any, step: Any) -> Any:
            return jnp.mean(jnp.exp(meta) * (jnp.tanh(inputs @ constrain(w)) - 0.5) ** 2)

        def objective(params: Any, rate: Any) -> Any:
            w, losses = train(loss, params, rate, jnp.float32(0.2))
            return loss(w, 0.0, 0) + jnp.sum(losses)

        return jax.jit(jax.value_and_grad(objective, (0, 1)), **settings)(params, RATE)

    by_column = partial(jax.lax.with_sharding_constraint, shardings=columns)
    whole = NamedSharding(mesh, P())
    placed = {"out_shardings": (whole, (columns, whole))}
    ours = evaluated(trained(hg.Reversible()), jax.device_put(start, rows), by_column, **placed)
    theirs = evaluated(plain, start, lambda w: w)
    np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=2e-5, atol=2e-6)


# ---- messages


@pytest.mark.parametrize("adjoint", [hg.Reversible(), hg.Checkpointed()], ids=repr)
def test_a_sum_over_devices_that_jax_differentiates_wrongly_is_refused(adjoint: Any) -> None:
    mesh = mesh_of(AxisType.Auto, (1,))
    with pytest.raises(ValueError, match=r"train\(.*'data' \(psum or pmean\).*leave check_vma at True"):
        by_hand(trained(adjoint), "mean", mesh, check_vma=False)


@pytest.mark.devices
def test_rates_of_devices_for_parameters_of_all_are_refused() -> None:
    def run(inputs: Any) -> Any:
        rate = 0.1 * (1 + jax.lax.axis_index("data"))
        loss = partial(lambda inputs, w, meta, step: jnp.sum((inputs @ w) ** 2), inputs)
        return jax.lax.pmean(
            hg.train(loss, jnp.ones(6), {"learning_rate": rate}, steps=2).losses[-1], "data"
        )

    sharded = jax.shard_map(run, mesh=mesh_of(AxisType.Auto), in_specs=P("data"), out_specs=P())
    with pytest.raises(TypeError, match=r"train\(.*params vary over the mesh axis 'data'.*jax\.lax\.pcast"):
        jax.jit(sharded)(INPUTS)


@pytest.mark.devices
def test_forward_refuses_numbers_that_differ_between_devices() -> None:
    with pytest.raises(ValueError, match=r"differ between the devices.*adjoint=Reversible\(\)"):
        by_hand(trained(hg.Forward(limit=1000)), "mean", mesh_of(AxisType.Auto))


def test_an_axis_that_is_on_no_mesh_in_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\(.*shard='data'.*there are \[\]; compile and call within"):
        hg.train(
            lambda w, meta, step: jnp.sum(w**2),
            jnp.ones(3),
            {"learning_rate": 0.1},
            steps=2,
            adjoint=hg.Reversible(shard="data"),
        )


# ---- errors


@pytest.mark.devices
@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_run_that_diverges_is_an_error_on_every_device(kind: AxisType | None) -> None:
    """If one device alone raised it, the others would wait for that one until the process is ended."""
    mesh = mesh_of(kind or AxisType.Auto)
    inputs = jax.device_put(INPUTS, NamedSharding(mesh, P("data")))

    def objective(rate: Any, inputs: Any) -> Any:
        loss = lambda w, meta, step: jnp.mean((inputs @ w["first"]) ** 4)  # noqa: E731
        trained = hg.train(loss, {"first": PARAMS["first"]}, {"learning_rate": rate}, steps=20)
        return jnp.sum(trained.params["first"]) + jnp.mean(inputs)

    with nullcontext() if kind is None else jax.set_mesh(mesh), hg.readable_errors():
        compiled = jax.jit(jax.grad(objective))
        assert np.isfinite(jax.block_until_ready(compiled(1e-3, inputs)))
        with pytest.raises((hg.ReversalError, jax.errors.JaxRuntimeError), match="training has diverged"):
            jax.block_until_ready(compiled(1e3, inputs))


# ---- documentation


@pytest.mark.devices
def test_the_page_is_right_on_eight_devices() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", Path("docs/sharding.md").read_text(), re.DOTALL):
        exec(block, names)
    assert names["mesh"].size == 8


# ---- memory


@pytest.mark.devices
def test_integers_and_tapes_of_replicated_parameters_are_divided_over_the_data_axis() -> None:
    mesh = mesh_of(AxisType.Auto, (8,))
    inputs = jax.device_put(RNG.normal(size=(16, 128)).astype("f"), NamedSharding(mesh, P("data")))
    params = jax.device_put((0.1 * RNG.normal(size=(128, 256))).astype("f"), NamedSharding(mesh, P()))

    def evaluated(adjoint: Any) -> tuple[np.ndarray, int]:
        def objective(params: Any, rate: Any) -> Any:
            loss = lambda w, meta, step: jnp.mean((jnp.tanh(meta @ w) - 0.5) ** 2)  # noqa: E731
            hypers = {"learning_rate": rate, "momentum": 0.9}
            run = hg.train(loss, params, hypers, inputs, steps=20, adjoint=adjoint)
            return loss(run.params, inputs, 0)

        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.value_and_grad(objective, (0, 1))).lower(params, RATE).compile()
            return numbers(compiled(params, RATE)), compiled.memory_analysis().temp_size_in_bytes

    whole, most = evaluated(hg.Reversible())
    divided, least = evaluated(hg.Reversible(shard="data"))
    np.testing.assert_allclose(divided, whole, rtol=1e-5, atol=1e-8)
    assert least < 0.5 * most
