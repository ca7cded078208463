"""What `train` accepts and refuses; exactness on a whole network."""

import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import nets


def square(w: Any, meta: Any, step: Any) -> Any:
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(w))


START = {"a": jnp.ones((4, 3)), "b": {"c": jnp.ones(3), "d": jnp.ones(3)}}
HYPERS = {"learning_rate": 0.1, "momentum": 0.5}


def train(**changes: Any) -> hg.Trained:
    arguments = {"loss": square, "params": START, "hypers": HYPERS, "steps": 6} | changes
    return hg.train(**arguments)


REFUSED = {
    "steps of zero": ({"steps": 0}, ValueError, r"train\(steps=0, .*steps must be a whole number"),
    "steps that are no number": ({"steps": 2.5}, ValueError, r"steps must be a whole number"),
    "no parameters": ({"params": {}}, ValueError, r"params has no arrays"),
    "half precision": (
        {"params": {"a": jnp.ones(2, jnp.bfloat16)}},
        TypeError,
        r"params\['a'\] is bfloat16; .*noise below float32.*Pass float32",
    ),
    "integers": ({"params": jnp.ones(2, jnp.int32)}, TypeError, r"params is int32"),
    "hypers that are no dictionary": (
        {"hypers": 0.1},
        ValueError,
        r"hypers must be a dictionary.*learning_rate",
    ),
    "an unknown hyperparameter": ({"hypers": HYPERS | {"lr": 1.0}}, ValueError, r"unknown: \['lr'\]"),
    "a missing hyperparameter": (
        {"hypers": {"momentum": 0.5}},
        ValueError,
        r"missing: \['learning_rate'\]",
    ),
    "momentum of one": (
        {"hypers": HYPERS | {"momentum": 1.0}},
        ValueError,
        r"hypers\['momentum'\] for params\['a'\] is 1.0; it must lie in \[0, 1\)",
    ),
    "momentum below zero in a schedule": (
        {"hypers": HYPERS | {"momentum": np.array([0.5, 0.5, -0.1, 0.5, 0.5, 0.5])}},
        ValueError,
        r"is -0.1.* at index \[2\]",
    ),
    "a learning rate that is NaN": (
        {"hypers": HYPERS | {"learning_rate": np.nan}},
        ValueError,
        r"is nan; it must lie",
    ),
    "a schedule of the wrong length": (
        {"hypers": HYPERS | {"learning_rate": np.ones(5)}},
        ValueError,
        r"\['learning_rate'\] for params\['a'\] has shape \[5\].*length steps=6",
    ),
    "a factor by weight that does not fit": (
        {"hypers": HYPERS | {"learning_rate": np.ones((6, 7))}},
        ValueError,
        r"has shape \[6, 7\]; behind the step axis it must broadcast to the leaf's \[4, 3\]",
    ),
    "a tree that is no prefix": (
        {"hypers": HYPERS | {"learning_rate": {"a": 0.1}}},
        ValueError,
        r"hypers\['learning_rate'\] must be one number or array, or a tree of them that is a prefix",
    ),
    "a hyperparameter that is no number": (
        {"hypers": HYPERS | {"learning_rate": "fast"}},
        ValueError,
        r"must be a real number",
    ),
    "an unknown state": (
        {"state": {"speed": START}},
        ValueError,
        r"state has \['speed'\]; momentum\(\) keeps",
    ),
    "a state of another structure": (
        {"state": {"velocity": {"a": 0.0}}},
        ValueError,
        r"state\['velocity'\] has the tree",
    ),
    "a state of another shape": (
        {"state": {"velocity": jax.tree.map(lambda x: jnp.ones(2), START)}},
        ValueError,
        r"leaf of shape \[2\] where \[4, 3\] is needed",
    ),
    "batches of another length": (
        {"batches": {"rows": np.ones((5, 2))}},
        ValueError,
        r"batches\['rows'\] has shape \[5, 2\].*length steps=6",
    ),
    "a loss that is no scalar": (
        {"loss": lambda w, m, b: w["a"]},
        ValueError,
        r"must return one scalar, and returned float32\[4, 3\]",
    ),
    "a loss that is a pair": ({"loss": lambda w, m, b: (1.0, 2.0)}, ValueError, r"returned a tuple"),
    "a loss of integers": ({"loss": lambda w, m, b: jnp.int32(1)}, TypeError, r"must return a float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as raised:
        train(**changes)
    assert re.match(r"train\(steps=.*, optimizer=momentum\(\), adjoint=Reversible\(", str(raised.value))


def test_refuses_known_values_even_under_jit() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        jax.jit(lambda rate: train(hypers={"learning_rate": rate, "momentum": 1.5}).losses)(0.1)


@pytest.mark.quick("by weight")
@pytest.mark.parametrize(
    "rate",
    [
        0.1,
        np.full(6, 0.1),
        {"a": 0.1, "b": np.full(6, 0.1)},
        {"a": np.full((6, 4, 3), 0.1), "b": {"c": np.full((1, 3), 0.1), "d": np.full((6, 1), 0.1)}},
        jax.tree.map(lambda x: 0.1, START),
    ],
    ids=["number", "schedule", "by layer", "by weight", "by leaf"],
)
def test_hyperparameters_of_every_granularity_mean_the_same(rate: Any) -> None:
    expected = train()
    found = train(hypers={"learning_rate": rate, "momentum": 0.5})
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params)):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_result_has_the_types_and_structure_of_the_start() -> None:
    trained = train(watch=lambda s: s.loss)
    assert jax.tree.structure(trained.params) == jax.tree.structure(START)
    assert jax.tree.structure(trained.state["velocity"]) == jax.tree.structure(START)
    floats = trained.params, trained.state["velocity"], trained.losses
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(floats))
    assert int(trained.state["step"]) == trained.losses.size
    np.testing.assert_array_equal(trained.watched, trained.losses)
    assert float(trained.losses[0]) == 18.0 and trained.losses[-1] < trained.losses[0]


def test_a_result_prints_in_a_few_words_and_can_be_pickled() -> None:
    trained = train()
    assert (
        str(trained)
        == repr(trained)
        == (
            "Trained: 18 parameters in 3 arrays, 6 steps, loss 18 to "
            f"{trained.losses[-1]:.4g}; state: velocity, step, exact"
        )
    )
    assert "loss" not in repr(jax.eval_shape(train))
    again = pickle.loads(pickle.dumps(trained))
    assert jax.tree.structure(again) == jax.tree.structure(trained)
    np.testing.assert_array_equal(again.losses, trained.losses)


def test_changes_no_global_configuration() -> None:
    before = jnp.zeros(1, float).dtype
    jax.jit(jax.grad(lambda r: square(train(hypers=HYPERS | {"learning_rate": r}).params, None, 0)))(0.1)
    assert jnp.zeros(1, float).dtype == before == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("precision", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_ten_thousand_steps_return_to_the_start_bit_for_bit(precision: Any) -> None:
    """784-50-50-50-10, momentum varying by step and layer.  `Reversible` itself compares every bit."""
    with jax.enable_x64(precision == jnp.float64):
        steps, rng = 10_000, np.random.default_rng(0)
        init, apply = nets.mlp([784, 50, 50, 50, 10])
        params = jax.tree.map(lambda x: x.astype(precision), init(jax.random.key(0)))
        images = jnp.asarray(rng.normal(size=(1000, 784)), precision)
        labels = jnp.asarray(rng.integers(0, 10, 1000), jnp.int32)
        momenta = tuple(jnp.asarray(rng.uniform(0.3, 0.98, steps), precision) for _ in params)
        velocity = jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), params)
        rows = jnp.asarray(rng.integers(0, 1000, (steps, 50)), jnp.int32)

        def outer(hypers: Any, velocity: Any, data: Any) -> Any:
            loss = lambda w, meta, rows: nets.cross_entropy(apply(w, data[0][rows]), data[1][rows])  # noqa: E731
            trained = hg.train(loss, params, hypers, None, rows, steps=steps, state={"velocity": velocity})
            return trained.losses[-1]

        hypers = {"learning_rate": jnp.full(steps, 0.05, precision), "momentum": momenta}
        gradient = jax.jit(jax.grad(lambda *a: outer(*a[:2], a[2:]), argnums=(0, 1)))
        found = jax.block_until_ready(gradient(hypers, velocity, images, labels))
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))
        assert all(x.dtype == precision for x in jax.tree.leaves(found))


def test_a_problem_is_trained_and_judged_like_its_parts():
    def loss(w, meta, rows):
        return jnp.sum(meta * (w - jnp.mean(rows)) ** 2)

    def batches(key, steps):
        return jax.random.normal(key, (steps, 4))

    def validation(w):
        return jnp.sum((w - 1) ** 4)

    problem = hg.Problem(lambda key: jax.random.normal(key, (3,)), loss, batches, validation, jnp.ones(3))
    hypers, key = {"learning_rate": jnp.full(5, 0.1), "momentum": 0.5}, jax.random.key(3)
    of_init, of_batches = jax.random.split(key)

    def by_hand(rates):
        w, v = jax.random.normal(of_init, (3,)), jnp.zeros(3)
        for rate, rows in zip(rates, batches(of_batches, 5)):
            v = 0.5 * v - 0.5 * 2 * (w - jnp.mean(rows))
            w = w + rate * v
        return validation(w)

    def through_problem(rates):
        return problem.objective(steps=5)({**hypers, "learning_rate": rates}, key)

    value, gradient = jax.value_and_grad(through_problem)(hypers["learning_rate"])
    expected, slope = jax.value_and_grad(by_hand)(hypers["learning_rate"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4)
    plain = hg.Problem(jnp.ones(3), lambda w, meta, step: jnp.sum(w**2))
    trained = plain.train({"learning_rate": 0.1}, steps=30)
    np.testing.assert_allclose(plain.score(trained), jnp.mean(trained.losses[-3:]))


def test_a_problem_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match=r"Problem\(.*: batches is called as batches\(key, steps\)"):
        hg.Problem(jnp.ones(3), lambda w, meta, batch: jnp.sum(w), lambda key: None)
    problem = hg.Problem(jnp.ones(3), lambda w, meta, batch: jnp.sum(w**2))
    with pytest.raises(TypeError, match=r"tune\(.*: a Problem has its own init"):
        hg.tune(problem, jnp.ones(3), {"learning_rate": 0.1}, steps=3)
