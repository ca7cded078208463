"""Meta-tuning in three lines."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

STEPS = 40
CURVATURE = jnp.array([0.1, 1.0, 10.0])


def loss(params: Any, meta: Any, batch: Any) -> Any:
    return 0.5 * jnp.sum(CURVATURE * (params - 1.0) ** 2)


def trained_by_optax(transformation: Any) -> float:
    params = jnp.zeros(3)
    state = transformation.init(params)
    for _ in range(STEPS):
        updates, state = transformation.update(jax.grad(loss)(params, None, 0), state, params)
        params = optax.apply_updates(params, updates)
    return float(loss(params, None, 0))


@pytest.mark.parametrize("optimizer", [hg.adam(), hg.nesterov()], ids=lambda x: x.name)
def test_the_tuned_optimizer_trains_better_in_optax(optimizer: Any) -> None:
    start = {"learning_rate": 2e-3}
    tuned = hg.tune(loss, jnp.zeros(3), start, steps=STEPS, optimizer=optimizer, progress=False)
    assert set(tuned.hypers) == set(optimizer.hypers)
    before = trained_by_optax(hg.as_optax(optimizer, start))
    after = trained_by_optax(tuned.optax())
    assert after < 0.5 * before
    assert tuned.history.loss[-1] < 0.5 * tuned.history.loss[0]
    for name, (low, high) in optimizer.domains.items():
        assert name not in tuned.hypers or low <= tuned.hypers[name] < high


def test_learns_schedules_by_leaf_and_an_optax_optimizer() -> None:
    """A schedule stays one, and so does a tree; what is not named stays as it was."""
    optimizer = hg.from_optax(optax.sgd, {"learning_rate": None, "momentum": 0.9}, hg.momentum().domains)
    tuned = hg.tune(
        loss,
        jnp.zeros(3),
        {"learning_rate": jnp.full(STEPS, 1e-3)},
        steps=STEPS,
        optimizer=optimizer,
        learn=["learning_rate"],
        meta_steps=20,
        progress=False,
    )
    assert tuned.hypers["learning_rate"].shape == (STEPS,)
    assert float(jnp.std(tuned.hypers["learning_rate"])) > 0
    assert tuned.hypers["momentum"] == 0.9
    assert trained_by_optax(tuned.optax()) < trained_by_optax(optax.sgd(1e-3, momentum=0.9))


def test_draws_starts_and_batches_from_keys_and_validates_elsewhere() -> None:
    def start(key: Any) -> Any:
        return jax.random.normal(key, (3,))

    def batches(key: Any) -> Any:
        return 0.1 * jax.random.normal(key, (STEPS, 3))

    def noisy(params: Any, meta: Any, noise: Any) -> Any:
        return loss(params, None, None) + jnp.sum(noise * params) + meta

    tuned = hg.tune(
        noisy,
        start,
        {"learning_rate": 1e-3, "momentum": 0.5},
        jnp.float32(1.0),
        batches,
        steps=STEPS,
        optimizer=hg.momentum(),
        validation=lambda params: loss(params, None, None),
        seeds=2,
        meta_steps=15,
        progress=False,
    )
    assert tuned.stopped == ""
    assert tuned.history.loss[-1] < tuned.history.loss[0]
    assert np.ndim(tuned.hypers["learning_rate"]) == 0


def test_refuses_names_that_the_optimizer_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"tune\(.*have the names \['learning_rate'.*unknown: \['lr'\]"):
        hg.tune(loss, jnp.zeros(3), {"lr": 0.1}, steps=STEPS)
    with pytest.raises(ValueError, match=r"learn=\['lr'\], but \['lr'\] are none of"):
        hg.tune(loss, jnp.zeros(3), {"learning_rate": 0.1}, steps=STEPS, learn=["lr"])


def test_refuses_to_begin_nowhere() -> None:
    with pytest.raises(ValueError, match=r"tune\(.*missing: \['learning_rate'\]"):
        hg.tune(loss, jnp.zeros(3), {}, steps=STEPS)


def test_refuses_to_begin_at_the_end_of_a_domain() -> None:
    hypers = {"learning_rate": 0.1, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"\['weight_decay'\] cannot be learned from \[0.0\]"):
        hg.tune(loss, jnp.zeros(3), hypers, steps=STEPS, optimizer=hg.adamw())
