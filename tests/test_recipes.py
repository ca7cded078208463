"""What is usual around an optimizer, against a training loop in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg

STEPS, PIECES, SIZE = 12, 3, 4
EVERY = 3  # how often the validation loss is watched


def data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    params = {"weights": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    return jax.tree.map(jnp.asarray, (params, rng.normal(size=(STEPS, PIECES, SIZE, 3))))


def piece_loss(w: Any, meta: Any, batch: Any) -> Any:
    """Of a microbatch, with dropout."""
    x, key = batch
    keep = jax.random.bernoulli(key, 0.75, x.shape)
    return jnp.mean(
        jnp.cos((x * keep / 0.75) @ w["weights"] + w["bias"][None]) + meta * jnp.sum(w["bias"] ** 2)
    )


def validation(w: Any) -> Any:
    """Smallest at some distance from the start, hence inside the run."""
    distance = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), w, data()[0])
    return (sum(jax.tree.leaves(distance)) - 3.0) ** 2


def keys() -> Any:
    return jax.random.split(jax.random.key(0), (STEPS, PIECES))


def ours(everything: Any, adjoint: Any) -> Any:
    params, batches = data()
    h = everything["hypers"]
    decay = jax.tree.map(lambda x: h["decay"] if x.ndim == 2 else 0.0, params)
    hypers = {
        "learning_rate": h["rate"],
        "weight_decay": decay,
        "max_norm": h["norm"],
        "ema_decay": h["ema"],
    }

    def watch(snapshot: Any) -> Any:
        average = snapshot.state["average"]
        return jax.lax.cond(snapshot.step % EVERY == 0, validation, lambda w: jnp.inf, average)

    trained = hg.train(
        hg.accumulated(piece_loss),
        params,
        hypers,
        everything["meta"],
        (batches, keys()),
        steps=STEPS,
        optimizer=hg.with_average(hg.clip_by_global_norm(hg.adamw())),
        adjoint=adjoint,
        watch=watch,
    )
    return jnp.min(jnp.append(trained.watched, validation(trained.state["average"])))


def plain(everything: Any) -> Any:
    """The same by a scan in plain JAX."""
    params, batches = data()
    h, meta = everything["hypers"], everything["meta"]

    def step(carry: Any, inputs: Any) -> Any:
        w, m, v, average = carry
        rate, batch, t = inputs
        seen = jnp.where(t % EVERY == 0, validation(average), jnp.inf)
        pieces = jax.vmap(jax.grad(piece_loss), (None, None, 0))(w, meta, batch)
        g = jax.tree.map(lambda x: jnp.mean(x, axis=0), pieces)
        size = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x: x * jnp.minimum(1.0, h["norm"] / size), g)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)

        def moved(w: Any, m: Any, v: Any) -> Any:
            decay = h["decay"] if w.ndim == 2 else 0.0
            corrected = jnp.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8
            return w - rate * decay * w - rate * (m / (1 - 0.9 ** (t + 1))) / corrected

        w = jax.tree.map(moved, w, m, v)
        average = jax.tree.map(lambda a, w: h["ema"] * a + (1 - h["ema"]) * w, average, w)
        return (w, m, v, average), seen

    zeros = jax.tree.map(jnp.zeros_like, params)
    inputs = h["rate"], (batches, keys()), jnp.arange(STEPS)
    (_, _, _, average), seen = jax.lax.scan(step, (params, zeros, zeros, params), inputs)
    return jnp.min(jnp.append(seen, validation(average)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_everything_at_once() -> None:
    """Accumulation, clipping, decay of matrices, an average, early stopping and dropout, reversed."""
    hypers = {"rate": jnp.linspace(0.3, 0.6, STEPS), "decay": 0.1, "norm": 0.2, "ema": 0.5}
    everything = jax.tree.map(jnp.asarray, {"hypers": hypers, "meta": 0.5})
    expected, slopes = jax.jit(jax.value_and_grad(plain))(everything)
    found, ours_slopes = jax.jit(jax.value_and_grad(lambda e: ours(e, hg.Reversible())))(everything)
    assert found == pytest.approx(float(expected), rel=1e-6)
    stop = int(np.max(np.flatnonzero(slopes["hypers"]["rate"]))) + 1
    assert 0 < stop < STEPS and stop % EVERY == 0  # the best step is inside the run
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), ours_slopes, slopes)
    assert all((x != 0).any() for x in jax.tree.leaves(slopes))


@pytest.mark.usefixtures("x64")
def test_microbatches_are_one_batch() -> None:
    """A run over microbatches, reversed, against one over whole batches in plain JAX."""
    params, batches = data()
    distance = lambda w, meta, x: jnp.mean((x @ w["weights"] + w["bias"][None] - meta) ** 2)  # noqa: E731

    def by_us(rate: Any, meta: Any) -> Any:
        hypers = {"learning_rate": rate, "momentum": 0.5}
        trained = hg.train(hg.accumulated(distance), params, hypers, meta, batches, steps=STEPS)
        return jnp.sum(trained.params["weights"] ** 3) + jnp.mean(trained.losses)

    def plain(rate: Any, meta: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            w, v = carry
            value, g = jax.value_and_grad(distance)(w, meta, x.reshape(-1, 3))
            v = jax.tree.map(lambda v, g: 0.5 * v - 0.5 * g, v, g)
            return (jax.tree.map(lambda w, v: w + rate * v, w, v), v), value

        (w, _), losses = jax.lax.scan(step, (params, jax.tree.map(jnp.zeros_like, params)), batches)
        return jnp.sum(w["weights"] ** 3) + jnp.mean(losses)

    found = jax.jit(jax.value_and_grad(by_us, (0, 1)))(0.1, 0.25)
    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(0.1, 0.25)
    np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=1e-9)


@pytest.mark.slow
def test_masks_differ_between_steps() -> None:
    """The loss of parameters that do not move is another one at every step."""
    params, batches = data()
    same = jnp.broadcast_to(batches[:1], batches.shape)
    still = {"learning_rate": 0.0, "momentum": 0.5}
    loss = hg.accumulated(piece_loss)
    losses = hg.train(loss, params, still, 0.5, (same, keys()), steps=STEPS).losses
    assert len(set(losses.tolist())) == STEPS
    fixed = jnp.broadcast_to(keys()[:1], (STEPS, PIECES))
    assert len(set(hg.train(loss, params, still, 0.5, (same, fixed), steps=STEPS).losses.tolist())) == 1


@pytest.mark.parametrize("shapes", [[[]], [[3, 2], [2, 2]]], ids=str)
def test_accumulation_needs_microbatches(shapes: Any) -> None:
    batches = [jnp.ones((2, *shape)) for shape in shapes]
    loss = hg.accumulated(lambda w, meta, batch: jnp.sum(w))
    with pytest.raises(ValueError, match=r"accumulated\(loss\): the arrays of a batch need a leading axis"):
        hg.train(loss, jnp.ones(2), {"learning_rate": 0.1}, None, batches, steps=2)


def test_accumulation_leaves_the_loss_to_be_checked() -> None:
    loss = hg.accumulated(lambda w, meta, batch: w)
    with pytest.raises(ValueError, match="the loss must return one scalar"):
        hg.train(loss, jnp.ones(2), {"learning_rate": 0.1}, None, jnp.ones((2, 3, 4)), steps=2)
