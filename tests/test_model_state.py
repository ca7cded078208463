"""State of a model that is not learned by gradients, against plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

STEPS = 4
X = jax.random.normal(jax.random.key(0), (STEPS, 6, 3))
Y = jax.random.normal(jax.random.key(1), (STEPS, 6))
W = {
    "a": jax.random.normal(jax.random.key(2), (3, 4)),
    "b": jax.random.normal(jax.random.key(3), (4,)),
}
STATE = {
    "mean": jnp.full(4, 0.2),
    "count": jnp.uint32(0),
    "key": jax.random.key(7),
    "fixed": jnp.full(4, 0.9),
}


def loss(w: Any, meta: Any, batch: Any, s: Any) -> Any:
    """A network with dropout, whose hidden values are centered by the batch; the mean of that is kept."""
    inputs, targets = batch
    hidden = inputs @ w["a"]
    mean = jnp.mean(hidden, 0)
    key = jax.random.fold_in(s["key"], s["count"])
    hidden = jnp.tanh((hidden - mean[None]) * s["fixed"][None]) * jax.random.bernoulli(
        key, 0.8, hidden.shape
    )
    value = meta * jnp.mean((hidden @ w["b"] - targets) ** 2)
    return value, {**s, "mean": 0.75 * s["mean"] + 0.25 * mean, "count": s["count"] + 1}


def carried(w: Any, meta: Any, batch: Any, s: Any) -> Any:
    """The loss reads the average, which then is none that can be undone."""
    value, after = loss(w, meta, batch, s)
    return value + jnp.sum((s["mean"] - w["b"]) ** 2), after


def scanned(loss: Any, rates: Any, meta: Any, w: Any, state: Any) -> Any:
    """Heavy ball in plain JAX."""

    def step(carry: Any, x: Any) -> Any:
        w, v, state = carry
        rate, batch = x
        (_, state), g = jax.value_and_grad(loss, has_aux=True)(w, meta, batch, state)
        v = jax.tree.map(lambda v, g: 0.5 * v - g, v, g)
        return (jax.tree.map(lambda w, v: w + rate * v, w, v), v, state), state["mean"]

    start = (w, jax.tree.map(jnp.zeros_like, w), state)
    (w, _, state), means = jax.lax.scan(step, start, (rates, (X, Y)))
    return judged(w, state), means


def judged(w: Any, state: Any) -> Any:
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(w)) + jnp.sum(state["mean"] ** 3)


def derivatives(function: Any) -> Any:
    """Of a function of rates, meta, weights and the mean at the start."""
    arguments = (jnp.full(STEPS, 0.2), jnp.float32(1.5), W, STATE["mean"])
    return jax.jit(jax.value_and_grad(function, (0, 1, 2, 3)))(*arguments)


def check(loss: Any, **settings: Any) -> None:
    def ours(rates: Any, meta: Any, w: Any, mean: Any) -> Any:
        hypers = {"learning_rate": rates, "momentum": 0.5}
        settings.setdefault("optimizer", hg.heavy_ball())
        trained = hg.train(
            loss, w, hypers, meta, (X, Y), steps=STEPS, model_state={**STATE, "mean": mean}, **settings
        )
        return judged(trained.params, trained.model_state)

    def plain(rates: Any, meta: Any, w: Any, mean: Any) -> Any:
        return scanned(loss, rates, meta, w, {**STATE, "mean": mean})[0]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 2e-6), derivatives(ours), derivatives(plain)
    )


@pytest.mark.quick("one", "floats")
@pytest.mark.parametrize(
    "adjoint",
    [hg.Reversible(), hg.Reversible(segments=2), hg.Checkpointed()],
    ids=["one", "segments", "floats"],
)
def test_hypergradients_are_those_of_a_plain_scan(adjoint: Any) -> None:
    check(loss, adjoint=adjoint)


def test_a_state_that_the_loss_reads_is_trained_in_floats() -> None:
    check(carried, adjoint=hg.Checkpointed())
    with pytest.raises(
        hg.ReversalError, match=r"state\['mean'\] is no running average .* in a way that cannot"
    ):
        check(carried, adjoint=hg.Reversible())


def test_the_state_is_bound_to_the_parameters_in_blocks_and_labels_and_with_transforms() -> None:
    """The same run by an optimizer whose gradients are clipped and whose leaves have labels."""
    parts = hg.partition({"all": hg.heavy_ball()}, "all")
    hypers = {"all.learning_rate": 0.2, "all.momentum": 0.5, "max_norm": 1e6}
    trained = hg.train(
        loss,
        W,
        hypers,
        1.5,
        (X, Y),
        steps=STEPS,
        optimizer=hg.clip_by_global_norm(parts),
        model_state=STATE,
        watch=lambda s: (
            s.model_state["mean"],
            s.model_state["count"],
            s.gradient["b"],
            s.state["all.velocity"]["b"],
        ),
    )
    value, means = jax.jit(lambda: scanned(loss, jnp.full(STEPS, 0.2), 1.5, W, STATE))()
    np.testing.assert_allclose(judged(trained.params, trained.model_state), value, rtol=1e-5)
    np.testing.assert_allclose(trained.watched[0][1:], means[:-1], rtol=1e-5)
    np.testing.assert_array_equal(trained.watched[1], range(STEPS))
    assert trained.watched[2].shape == trained.watched[3].shape == (STEPS, 4)
    assert int(trained.model_state["count"]) == STEPS and list(trained.state) == [
        "all.velocity",
        "step",
        "exact",
    ]


def test_optax_trains_beside_a_state() -> None:
    optimizer = hg.from_optax(
        lambda learning_rate: optax.sgd(learning_rate, momentum=0.5), {"learning_rate": None}
    )

    def ours(rate: Any) -> Any:
        options = {"steps": STEPS, "optimizer": optimizer, "adjoint": hg.Stored(), "model_state": STATE}
        trained = hg.train(loss, W, {"learning_rate": rate}, 1.5, (X, Y), **options)
        return judged(trained.params, trained.model_state)

    def plain(rate: Any) -> Any:
        return scanned(loss, jnp.full(STEPS, rate), 1.5, W, STATE)[0]

    results = (jax.jit(jax.value_and_grad(f))(0.2) for f in (ours, plain))
    np.testing.assert_allclose(*map(np.array, results), rtol=2e-5)


def averaged(w: Any, meta: Any, step: Any, s: Any) -> Any:
    """A quadratic, with an average of what the parameters have been."""
    return jnp.sum(w**2), {"mean": 0.99 * s["mean"] + 0.01 * w, "count": s["count"] + 1}


@pytest.mark.slow
def test_two_runs_are_one_bit_for_bit() -> None:
    start = {"mean": jnp.ones(2), "count": 0}
    hypers = {"learning_rate": 0.1, "momentum": 0.5}
    whole = hg.train(averaged, jnp.ones(2), hypers, steps=6, model_state=start)
    first = hg.train(averaged, jnp.ones(2), hypers, steps=3, model_state=start)
    second = hg.train(
        averaged, first.params, hypers, steps=3, state=first.state, model_state=first.model_state
    )
    jax.tree.map(np.testing.assert_array_equal, whole[::4], second[::4])


@pytest.mark.slow
def test_an_average_over_a_hundred_steps_is_undone_bit_for_bit() -> None:
    """The library compares the start; value and slope are those of the sum in closed form."""

    def final(start: Any) -> Any:
        hypers = {"learning_rate": 0.0, "momentum": 0.5}
        state = {"mean": jnp.zeros(1), "count": 0}
        trained = hg.train(averaged, start, hypers, steps=100, model_state=state)
        return jnp.sum(trained.model_state["mean"])

    value, slope = jax.value_and_grad(final)(jnp.full(1, 2.0))
    weight = 1 - 0.99**100
    np.testing.assert_allclose((value, slope[0]), (2 * weight, weight), rtol=1e-5)


@pytest.mark.parametrize(
    ("after", "error", "match"),
    [
        (lambda v, s: v, ValueError, r"a loss with a state must return \(value, state\), and returned"),
        (lambda v, s: (v, {"a": s["a"]}), ValueError, r"returned one with .*; return the whole state"),
        (
            lambda v, s: (v, {**s, "a": s["a"][:1]}),
            ValueError,
            r"state\['a'\] is float32\[2\], and the loss returned float32\[1\] for it",
        ),
        (
            lambda v, s: (v, {**s, "n": s["n"] + jnp.int32(v)}),
            TypeError,
            r"state\['n'\] is int32 and depends on parameters or batch",
        ),
    ],
    ids=["no state", "less", "shape", "an integer"],
)
def test_a_state_is_refused(after: Any, error: Any, match: str) -> None:
    def stateful(w: Any, meta: Any, step: Any, s: Any) -> Any:
        return after(jnp.sum(w**2), s)

    start = {"a": jnp.zeros(2), "n": jnp.int32(0)}
    with pytest.raises(error, match=r"train\(steps=2, .*" + match):
        hg.train(stateful, jnp.ones(2), {"learning_rate": 0.1}, steps=2, model_state=start)


def test_single_examples_have_no_state() -> None:
    with pytest.raises(TypeError, match="looks at single examples, and a model with a state"):
        hg.train(
            loss,
            W,
            {"learning_rate": 0.1},
            1.0,
            (X, Y),
            steps=STEPS,
            model_state=STATE,
            optimizer=hg.filtered(),
        )


def test_integers_of_a_run_with_another_state_are_refused() -> None:
    """Of one without a state in a run with it, and the reverse; of other sizes, optimizers and tapes."""
    hypers = {"learning_rate": 0.1, "momentum": 0.9}

    def run(size: int = 3, given: Any = None, loss: Any = None, **settings: Any) -> hg.training.Trained:
        loss = (lambda w, meta, step: jnp.sum(w**2)) if loss is None else loss
        given = {"steps": 2, "state": given, "hypers": hypers} | settings
        traced = jax.eval_shape(lambda: hg.train(loss, jnp.ones(size), **given))  # nothing is compiled
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), traced)

    def averaged(w: Any, meta: Any, step: Any, state: Any) -> Any:
        return jnp.sum(w**2), 0.5 * state + 0.5 * jnp.mean(w)

    beside = {"loss": averaged, "model_state": jnp.zeros(())}
    ours, with_state, adam = run(), run(**beside), run(hypers={"learning_rate": 0.1}, optimizer=hg.adam())
    only = {"velocity": jnp.zeros(4), "exact": ours.state["exact"]}
    by_element = {"hypers": hypers | {"momentum": jnp.full((1, 3), 0.9)}}
    others = [
        (3, ours.state, beside),
        (3, with_state.state, {}),
        (4, only, {}),
        (3, ours.state | {"exact": adam.state["exact"]}, {}),
        (3, ours.state, by_element),
        (3, ours.state | {"exact": 1}, {}),
    ]
    for size, given, settings in others:
        with pytest.raises(
            ValueError, match=r"state\['exact'\] holds the integers of another run: .* Leave"
        ):
            run(size, given, **settings)
    assert run(given=ours.state).params.shape == (3,)
    assert run(given=with_state.state, **beside).params.shape == (3,)
