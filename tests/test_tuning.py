"""Meta-tuning in three lines."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.meta import tuning
from hypergrad.meta.zeros import announce_zeros, zeros

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


@pytest.mark.quick("float32")
@pytest.mark.parametrize("precision", [jnp.float32, jnp.float64])
def test_needs_no_promotion_of_types(precision: Any) -> None:
    with jax.enable_x64(precision == jnp.float64):
        target = jnp.ones(3, precision)

        def distance(params: Any, meta: Any, batch: Any) -> Any:
            return jnp.sum((params - target) ** 2)

        def tuned() -> hg.Tuned:
            settings = {"steps": 4, "optimizer": hg.momentum(), "meta_steps": 2, "seeds": 2}
            return hg.tune(
                distance, jnp.zeros(3, precision), {"learning_rate": 0.1}, progress=False, **settings
            )

        expected = tuned()
        with jax.numpy_dtype_promotion("strict"):
            found = tuned()
        np.testing.assert_array_equal(found.history.loss, expected.history.loss)
        jax.tree.map(np.testing.assert_array_equal, found.hypers, expected.hypers)
        assert found.history.loss[-1] < found.history.loss[0]


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


def test_announces_by_name_what_is_inside_of_a_sign() -> None:
    optimizer = hg.from_optax(optax.lion, {"learning_rate": None, "b1": 0.9, "weight_decay": 1e-3})
    with pytest.warns(
        hg.implicit.ZeroHypergradientWarning, match=r"in hypers\['b1'\] is exactly 0"
    ) as caught:
        tuned = hg.tune(
            loss,
            jnp.zeros(3),
            {"learning_rate": 1e-2},
            steps=10,
            optimizer=optimizer,
            meta_steps=3,
            progress=False,
        )
    assert len(caught) == 1  # once, and not at every meta-step
    assert float(tuned.hypers["b1"]) == pytest.approx(0.9, rel=1e-6)
    assert float(tuned.hypers["learning_rate"]) != pytest.approx(1e-2, rel=1e-3)


def test_zeros_are_whole_leaves() -> None:
    hypergradient = {"a": np.zeros(3), "b": (np.array([0.0, 1e-30]), 0.0), "c": np.nan, "d": np.zeros(0)}
    assert zeros(hypergradient) == ["['a']", "['b'][1]"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        announce_zeros("tune", {"b": np.array([0.0, 1.0])})


@pytest.mark.parametrize(
    ("build", "hypers"),
    [(optax.sgd, {"learning_rate": 1e-3, "momentum": 0.5}), (optax.rprop, {"eta_plus": 1.001})],
    ids=["sgd", "rprop"],
)
def test_what_is_learned_of_optax_stays_in_its_usual_domain(build: Any, hypers: Any) -> None:
    """Meta-steps that would carry plain numbers far outside."""
    optimizer = hg.from_optax(build, {"learning_rate": 1e-3} | dict.fromkeys(hypers))
    tuned = hg.tune(
        loss,
        jnp.zeros(3),
        hypers,
        steps=10,
        optimizer=optimizer,
        learn=list(hypers),
        validation=lambda w: -loss(w, None, None),  # the worse, the better: rates shrink
        meta_steps=5,
        meta_optimizer=optax.sgd(1e4),
        progress=False,
    )
    for name in hypers:
        low, high = {"learning_rate": (0, np.inf), "momentum": (0, 1), "eta_plus": (1, np.inf)}[name]
        assert low < float(tuned.hypers[name]) < high
        assert float(tuned.hypers[name]) != hypers[name]


def test_domains_of_the_user_win() -> None:
    names: dict[str, Any] = {"learning_rate": None, "b1": 0.9, "alpha": 1.0}
    optimizer = hg.from_optax(
        lambda learning_rate, b1, alpha: optax.adam(alpha * learning_rate, b1=b1),
        names,
        {"b1": (-1.0, 0.5)},
    )
    assert optimizer.domains == {"learning_rate": (0.0, np.inf), "b1": (-1.0, 0.5)}
    with pytest.raises(ValueError, match=r"hypers\['b1'\].*it must lie in \[-1, 0.5\)"):
        hg.tune(loss, jnp.zeros(3), {"learning_rate": 0.1}, steps=3, optimizer=optimizer, learn=["alpha"])


@pytest.mark.parametrize(("domain", "start"), [((1.0, np.inf), 1.2), ((-np.inf, -0.5), -0.7)])
def test_half_lines_that_do_not_begin_at_zero(domain: Any, start: float) -> None:
    optimizer = hg.from_optax(optax.sgd, {"learning_rate": None}, {"learning_rate": domain})
    constraint = tuning._constraint(optimizer, "learning_rate", start)
    raw = constraint.to_raw(jnp.float32(start))
    assert float(constraint.to_constrained(raw)) == pytest.approx(start, rel=1e-6)
    ends = constraint.to_constrained(jnp.array([-1e4, -50.0, 50.0]))
    assert all(domain[0] < float(x) < domain[1] for x in ends)
    h = 1e-2
    slope = (constraint.to_constrained(raw + h) - constraint.to_constrained(raw - h)) / (2 * h)
    assert float(jax.grad(constraint.to_constrained)(raw)) == pytest.approx(float(slope), rel=1e-3)
