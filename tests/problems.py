"""The table of small training problems that feeds the tests of every adjoint."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hypergrad as hg

STEPS = 30
OPTIMIZERS = {"momentum": hg.momentum(), "heavy_ball": hg.heavy_ball()}


class Layer(NamedTuple):
    weights: Array
    biases: Array


class Problem(NamedTuple):
    """An outer objective, a function of everything that can be differentiated at once."""

    objective: Callable[..., Array]
    everything: dict[str, Any]


def network(params: tuple[Layer, ...], inputs: Array) -> Array:
    for layer in params[:-1]:
        inputs = jnp.tanh(inputs @ layer.weights + layer.biases[None])
    return inputs @ params[-1].weights + params[-1].biases[None]


def classification(optimizer: str = "momentum", dtype: Any = None, steps: int = STEPS) -> Problem:
    """A small network on random data, with everything learned, schedules of all granularities."""
    rng = np.random.default_rng(0)
    dtype = jnp.float64 if dtype is None else dtype

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    def between(low: float, high: float, *shape: int) -> Array:
        return jnp.asarray(rng.uniform(low, high, size=shape), dtype)

    data, labels = normal(40, 6), jnp.asarray(rng.integers(0, 3, 40))
    rows = jnp.asarray(rng.integers(0, 40, (steps, 10)))
    sizes = [6, 5, 3]
    params = tuple(
        Layer(normal(a, b, scale=a**-0.5), jnp.zeros(b, dtype)) for a, b in itertools.pairwise(sizes)
    )
    rate = 0.5 if optimizer == "momentum" else 0.1

    def loss(params: Any, meta: Any, batch: Any) -> Array:
        rows, noise = batch
        logits = network(params, (meta["data"] + 0.0)[rows] + noise)
        penalty = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[rows][:, None], 1)
        return -jnp.mean(chosen) + jnp.exp(meta["log_penalty"]) * penalty

    def objective(everything: dict[str, Any], adjoint: Any) -> Array:
        trained = hg.train(
            loss,
            everything["params"],
            everything["hypers"],
            everything["meta"],
            (rows, everything["noise"]),
            steps=steps,
            optimizer=OPTIMIZERS[optimizer],
            adjoint=adjoint,
            state={"velocity": everything["velocity"]},
        )
        outputs = network(trained.params, data)
        end = jnp.mean(outputs**2) - jnp.mean(outputs[:, 0])
        velocity = sum(jnp.sum(v**2) for v in jax.tree.leaves(trained.state["velocity"]))
        return end + 0.1 * velocity + 0.3 * jnp.mean(trained.losses)

    everything = {
        "params": params,
        "velocity": jax.tree.map(lambda w: 0.1 * jnp.ones_like(w), params),
        "hypers": {
            # by layer: a schedule, and a constant; by leaf: schedules, a constant, and by weight
            "learning_rate": (between(0.5 * rate, rate, steps), jnp.asarray(rate, dtype)),
            "momentum": (
                Layer(between(0.3, 0.95, steps), jnp.asarray(0.7, dtype)),
                Layer(between(0.5, 0.95, steps, 5, 3), between(0.5, 0.95, 1, 3)),
            ),
        },
        "meta": {"data": data, "log_penalty": jnp.asarray(-5.0, dtype)},
        "noise": normal(steps, 10, 6, scale=0.1),
    }
    return Problem(objective, everything)


def relative_error(found: Any, expected: Any) -> dict[str, float]:
    """Relative error of every leaf, in the Euclidean norm, by path."""
    paths, _ = jax.tree_util.tree_flatten_with_path(expected)
    return {
        jax.tree_util.keystr(path): float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, (path, b) in zip(jax.tree.leaves(found), paths)
    }
