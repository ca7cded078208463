"""Optimizers from optax and for optax, and gradient clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.problems import relative_error

STEPS = 40
LAYERS = (jnp.array([1.0, -2.0, 0.5]), jnp.array([[0.3], [-0.7]]))


def loss(params: Any, meta: Any, step: Any) -> Any:
    """Steep in places, and one coordinate whose gradient is always zero."""
    first, second = params
    mask = jnp.array([1.0, 1.0, 0.0], first.dtype)
    return meta * jnp.sum(mask * jnp.cos(2 * first) + 0.1 * mask * first**4) + 3 * jnp.sum(second**2)


def end(everything: Any, optimizer: Any, adjoint: Any) -> Any:
    params = jax.tree.map(lambda x: x.astype(everything["meta"].dtype), LAYERS)
    trained = hg.train(
        loss,
        params,
        everything["hypers"],
        everything["meta"],
        steps=STEPS,
        optimizer=optimizer,
        adjoint=adjoint,
    )
    return sum(jnp.sum(x**3) for x in trained.params) + jnp.mean(trained.losses)


def by_optax(transformation: Any, params: Any, steps: int = STEPS) -> Any:
    state = transformation.init(params)
    for t in range(steps):
        gradient = jax.grad(loss)(params, 1.0, t)
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def chained(learning_rate: Any, b1: Any, max_norm: Any) -> Any:
    """Needs the norm over all parameters, and keeps a count."""
    return optax.chain(
        optax.clip_by_global_norm(max_norm), optax.nadam(optax.constant_schedule(learning_rate), b1=b1)
    )


OPTAX = {
    "adamw": hg.from_optax(optax.adamw, {"learning_rate": None, "b1": 0.9, "weight_decay": 1e-4}),
    "adan": hg.from_optax(optax.adan, {"learning_rate": None, "b1": 0.98, "eps": 1e-8}),
    "chained": hg.from_optax(chained, {"learning_rate": None, "b1": 0.9, "max_norm": None}),
}
HYPERS = {
    "adamw": {"learning_rate": 0.05, "b1": 0.8, "weight_decay": 0.1},
    "adan": {"learning_rate": 0.05, "b1": 0.9, "eps": 1e-6},
    "chained": {"learning_rate": 0.05, "b1": 0.8, "max_norm": 0.5},
}
BUILD = {"adamw": optax.adamw, "adan": optax.adan, "chained": chained}


@pytest.mark.parametrize("name", OPTAX)
def test_trains_as_optax_does(name: str) -> None:
    trained = hg.train(
        loss, LAYERS, HYPERS[name], 1.0, steps=STEPS, optimizer=OPTAX[name], adjoint=hg.Stored()
    )
    expected = by_optax(BUILD[name](**HYPERS[name]), LAYERS)
    for found, other in zip(trained.params, expected):
        np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-6)


@pytest.mark.quick("adamw")
@pytest.mark.parametrize("name", OPTAX)
@pytest.mark.usefixtures("x64")
def test_hypergradients_through_optax(name: str) -> None:
    """Against finite differences, with a coordinate whose gradient is zero; and every adjoint alike."""
    hypers = {key: jnp.asarray(value) for key, value in HYPERS[name].items()}
    everything = {"hypers": hypers, "meta": jnp.asarray(1.0)}

    @jax.jit
    def value(e: Any) -> Any:
        return end(e, OPTAX[name], hg.Stored())

    expected = jax.jit(jax.grad(value))(everything)
    leaves, structure = jax.tree.flatten(everything)
    for k, (x, g) in enumerate(zip(leaves, jax.tree.leaves(expected))):
        h = 1e-4 * abs(x)

        def along(s: Any, k: int = k, x: Any = x) -> Any:
            return value(structure.unflatten([*leaves[:k], x + s, *leaves[k + 1 :]]))

        differences = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        assert float(g) == pytest.approx(float(differences), rel=1e-5, abs=1e-8)
    for adjoint in (hg.Checkpointed(), hg.Forward()):
        found = jax.jit(jax.grad(lambda e, a=adjoint: end(e, OPTAX[name], a)))(everything)
        assert max(relative_error(found, expected).values()) < 1e-9


def test_an_optax_run_continues_from_its_state() -> None:
    options: dict[str, Any] = {"optimizer": OPTAX["adamw"], "adjoint": hg.Checkpointed()}
    whole = hg.train(loss, LAYERS, HYPERS["adamw"], 1.0, steps=20, **options)
    half = hg.train(loss, LAYERS, HYPERS["adamw"], 1.0, steps=10, **options)
    rest = hg.train(loss, half.params, HYPERS["adamw"], 1.0, steps=10, state=half.state, **options)
    for a, b in zip(whole.params, rest.params):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert int(jax.tree.leaves(rest.state)[0]) == 20  # optax's own count


def test_schedules_reach_optax_step_by_step() -> None:
    rates = jnp.linspace(0.1, 0.01, STEPS)
    optimizer = hg.from_optax(optax.sgd, {"learning_rate": None, "momentum": 0.9})
    trained = hg.train(
        loss,
        LAYERS,
        {"learning_rate": rates, "momentum": 0.5},
        1.0,
        steps=STEPS,
        optimizer=optimizer,
        adjoint=hg.Stored(),
    )
    expected = by_optax(optax.sgd(hg.schedules.PerStep(rates), momentum=0.5), LAYERS)
    for found, other in zip(trained.params, expected):
        np.testing.assert_allclose(found, other, rtol=1e-5)


def test_watch_sees_the_state_of_an_optax_optimizer() -> None:
    trained = hg.train(
        loss,
        LAYERS,
        HYPERS["adamw"],
        1.0,
        steps=5,
        optimizer=OPTAX["adamw"],
        adjoint=hg.Stored(),
        watch=lambda snapshot: snapshot.state["state"][0].count,
    )
    np.testing.assert_array_equal(trained.watched, np.arange(5))


def test_reversible_refuses_an_optax_optimizer() -> None:
    with pytest.raises(hg.ReversalError, match=r"from_optax\(adamw\) is no program.*adjoint=Checkpointed"):
        hg.train(loss, LAYERS, HYPERS["adamw"], 1.0, steps=5, optimizer=OPTAX["adamw"])


def test_refuses_hyperparameters_of_optax_that_differ_by_leaf() -> None:
    hypers = {"learning_rate": (0.1, 0.2)}
    with pytest.raises(ValueError, match=r"hypers\['learning_rate'\] must be one number or array"):
        hg.train(loss, LAYERS, hypers, 1.0, steps=5, optimizer=OPTAX["adamw"], adjoint=hg.Checkpointed())


def test_refuses_a_state_that_the_optax_optimizer_does_not_keep() -> None:
    options: dict[str, Any] = {"optimizer": OPTAX["adamw"], "adjoint": hg.Checkpointed()}
    with pytest.raises(ValueError, match=r"state has \['velocity'\]; from_optax\(adamw\) keeps"):
        hg.train(loss, LAYERS, HYPERS["adamw"], 1.0, steps=5, state={"velocity": LAYERS}, **options)
    with pytest.raises(ValueError, match=r"state\['state'\] has the tree structure"):
        hg.train(loss, LAYERS, HYPERS["adamw"], 1.0, steps=5, state={"state": LAYERS}, **options)


def test_ours_as_an_optax_transformation() -> None:
    """A learned schedule by layer, clipping, and optax's own loop: the same run."""
    hypers = {"learning_rate": (jnp.linspace(0.1, 0.01, STEPS), 0.05), "momentum": 0.8, "max_norm": 1.0}
    optimizer = hg.clip_by_global_norm(hg.heavy_ball())
    trained = hg.train(loss, LAYERS, hypers, 1.0, steps=STEPS, optimizer=optimizer)
    found = by_optax(hg.as_optax(optimizer, hypers), LAYERS)
    for a, b in zip(trained.params, found):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    transformation = hg.as_optax(optimizer, hypers)
    state = transformation.init(LAYERS)._replace(step=jnp.int32(1000))  # the last rate is held
    updates, _ = transformation.update(LAYERS, state, LAYERS)
    np.testing.assert_allclose(updates[0], -0.01 * LAYERS[0] / optax.tree.norm(LAYERS), rtol=1e-5)


def test_refuses_hyperparameters_that_ours_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"as_optax\(heavy_ball\(\), hypers\).*unknown: \['rate'\]"):
        hg.as_optax(hg.heavy_ball(), {"rate": 0.1})
    transformation = hg.as_optax(hg.heavy_ball(), {"learning_rate": 0.1})
    with pytest.raises(ValueError, match=r"call update\(gradient, state, params\)"):
        transformation.update(LAYERS, transformation.init(LAYERS))


@pytest.mark.parametrize(
    ("wrap", "bound", "theirs"),
    [(hg.clip, "max_delta", optax.clip), (hg.clip_by_global_norm, "max_norm", optax.clip_by_global_norm)],
)
def test_clipping_is_that_of_optax(wrap: Any, bound: str, theirs: Any) -> None:
    hypers = {"learning_rate": 0.05, "momentum": 0.8, bound: 0.4}
    trained = hg.train(loss, LAYERS, hypers, 1.0, steps=STEPS, optimizer=wrap(hg.heavy_ball()))
    expected = by_optax(optax.chain(theirs(0.4), optax.sgd(0.05, momentum=0.8)), LAYERS)
    unclipped = by_optax(optax.sgd(0.05, momentum=0.8), LAYERS)
    for found, other, far in zip(trained.params, expected, unclipped):
        np.testing.assert_allclose(found, other, rtol=1e-5)
        assert float(jnp.max(jnp.abs(found - far))) > 1e-3


CLIPPED = [
    pytest.param(hg.clip, id="value", marks=pytest.mark.slow),
    pytest.param(hg.clip_by_global_norm, id="norm"),
]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", CLIPPED)
@pytest.mark.usefixtures("x64")
def test_clipping_with_dropout_in_every_adjoint(wrap: Any) -> None:
    """The bound is learned too; keys of the dropout are in meta, closed over, and folded from the step."""
    outside = jax.random.key(1)
    bound = "max_delta" if wrap is hg.clip else "max_norm"

    def dropped(params: Any, meta: Any, step: Any) -> Any:
        inner = jax.random.fold_in(meta["key"], step), jax.random.fold_in(outside, step)
        keep = [jax.random.bernoulli(key, 0.7, (3,)) for key in inner]
        return loss((params[0] * keep[0] * keep[1], params[1]), meta["scale"], step)

    def objective(everything: Any, adjoint: Any) -> Any:
        params = jax.tree.map(lambda x: x.astype(jnp.float64), LAYERS)
        meta = {"scale": everything["scale"], "key": jax.random.key(0)}
        trained = hg.train(
            dropped,
            params,
            everything["hypers"],
            meta,
            steps=STEPS,
            optimizer=wrap(hg.heavy_ball()),
            adjoint=adjoint,
        )
        return sum(jnp.sum(x**3) for x in trained.params)

    everything = {
        "scale": jnp.asarray(1.0),
        "hypers": {
            "learning_rate": jnp.asarray(0.05),
            "momentum": jnp.asarray(0.8),
            bound: jnp.asarray(0.5),
        },
    }
    expected = jax.jit(jax.grad(lambda e: objective(e, hg.Stored())))(everything)
    assert abs(float(expected["hypers"][bound])) > 1e-3
    for adjoint in (hg.Reversible(), hg.Reversible(segments=3), hg.Checkpointed(), hg.Forward()):
        found = jax.jit(jax.grad(lambda e, a=adjoint: objective(e, a)))(everything)
        assert max(relative_error(found, expected).values()) < 1e-9


def test_a_zero_gradient_is_clipped_without_nan() -> None:
    def outer(bound: Any) -> Any:
        hypers = {"learning_rate": 0.1, "momentum": 0.5, "max_norm": bound}
        flat = lambda w, meta, step: jnp.sum(0.0 * w)  # noqa: E731
        optimizer = hg.clip_by_global_norm(hg.heavy_ball())
        return jnp.sum(hg.train(flat, jnp.ones(2), hypers, steps=5, optimizer=optimizer).params)

    assert float(jax.grad(outer)(1.0)) == 0.0


def test_an_update_neither_begins_again_nor_judges_its_state() -> None:
    """It is on the path of every step: what `train` checks once of a state is not checked there."""
    begun = []

    def init(params: Any) -> Any:
        begun.append(1)
        return jnp.zeros(())

    optimizer = hg.program.GenericOptimizer(
        "counted()", init, lambda h, g, s, w, context: (w - h["rate"] * g, s + 1), {"rate": 0.5}
    )
    transformation = hg.as_optax(optimizer, {})
    state, w = transformation.init(jnp.ones(2)), jnp.ones(2)
    for _ in range(3):
        updates, state = transformation.update(w, state, w)
    assert len(begun) == 1 and float(state.variables["state"]) == 3.0
    np.testing.assert_allclose(updates, -0.5 * w)

    adam = hg.as_optax(hg.adam(), {"learning_rate": 0.1})
    _, state = adam.update(jnp.full(2, jnp.nan), adam.init(w), w)
    updates, _ = adam.update(w, state, w)  # diverged, and so are those that follow
    assert bool(jnp.all(jnp.isnan(updates)))
