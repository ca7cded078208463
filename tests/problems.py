"""The table of small training problems that feeds the tests of every adjoint and every optimizer."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hypergrad as hg
from hypergrad.program import Optimizer, Scale

STEPS = 30
TABLE = [  # with learning rates at which a run neither diverges nor stands still
    (hg.momentum(), 0.5),
    (hg.heavy_ball(), 0.1),
    (hg.sgd(), 0.3),
    (hg.nesterov(), 0.1),
    (hg.adagrad(), 0.1),
    (hg.adagrad_momentum(), 0.03),
    (hg.adadelta(), 1.0),
    (hg.rmsprop(), 0.03),
    (hg.rmsprop(centered=True), 0.03),
    (hg.rmsprop_momentum(), 0.01),
    (hg.rmsprop_momentum(centered=True), 0.01),
    (hg.sm3(), 0.1),
    (hg.adam(), 0.05),
    (hg.adamw(), 0.05),
    (hg.adamax(), 0.05),
    (hg.nadam(), 0.05),
    (hg.amsgrad(), 0.05),
    (hg.radam(), 0.05),
    (hg.lars(), 1.0),
    (hg.lamb(), 0.1),
    (hg.shampoo(), 0.05),
]
RANGES = {
    "momentum": (0.5, 0.95),
    "decay": (0.5, 0.95),
    "rho": (0.5, 0.95),
    "b1": (0.5, 0.95),
    "b2": (0.8, 0.99),
    "eps": (1e-3, 1e-2),
    "weight_decay": (0.1, 0.5),
    "trust_coefficient": (0.02, 0.05),
}
BY_WEIGHT = {"momentum", "decay", "rho", "b1", "b2"}  # the others: by layer
OPTIMIZERS = {optimizer.name.removesuffix("()"): optimizer for optimizer, _ in TABLE}
RATES = {optimizer.name.removesuffix("()"): rate for optimizer, rate in TABLE}
TYPICAL = ["momentum", "adam"]  # for the tests of adjoints, each of which takes seconds to compile
EVERY_ADJOINT = [hg.Reversible(), hg.Reversible(segments=3), hg.Checkpointed()]  # for every optimizer
ADJOINTS = [*EVERY_ADJOINT, hg.Checkpointed(segments=1), hg.Checkpointed(segments=7)]


REVERSIBLE = [name for name, optimizer in OPTIMIZERS.items() if optimizer.reversible]


def admissible(optimizer: str) -> list[Any]:
    """The adjoints that an optimizer can be differentiated with."""
    return [a for a in EVERY_ADJOINT if optimizer in REVERSIBLE or not isinstance(a, hg.Reversible)]


def unrounded(optimizer: Optimizer) -> Optimizer:
    """The same program, whose factors have no numerators and so are used as they are."""

    def moves(h: Any, t: Array) -> list[Any]:
        without = lambda factor: jnp.zeros(jnp.shape(factor), jnp.uint32)  # noqa: E731
        return [m._replace(numerator=without) if isinstance(m, Scale) else m for m in optimizer.moves(h, t)]

    return dataclasses.replace(optimizer, moves=moves)


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


def classification(
    optimizer: str = "momentum",
    dtype: Any = None,
    steps: int = STEPS,
    sizes: tuple[int, ...] = (6, 5, 3),
    rounded: bool = True,
) -> Problem:
    """A small network on random data, with everything learned, schedules of all granularities.

    The first input is always 0, as pixels at the edge of images are: the gradients of its weights are
    exactly 0 at every step, and so are their variables.  Unless rounded, factors are not multiples of
    ``2**-32``, so that the objective is smooth in them.
    """
    rng = np.random.default_rng(0)
    dtype = jnp.float64 if dtype is None else dtype

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    def between(low: float, high: float, *shape: int) -> Array:
        return jnp.asarray(rng.uniform(low, high, size=shape), dtype)

    program = OPTIMIZERS[optimizer] if rounded else unrounded(OPTIMIZERS[optimizer])

    def inputs(*shape: int, scale: float = 1.0) -> Array:
        return normal(*shape, sizes[0], scale=scale).at[..., 0].set(0)

    data, labels = inputs(40), jnp.asarray(rng.integers(0, sizes[-1], 40))
    rows = jnp.asarray(rng.integers(0, 40, (steps, 10)))
    params = tuple(
        Layer(normal(a, b, scale=a**-0.5), normal(b, scale=0.1)) for a, b in itertools.pairwise(sizes)
    )

    def mixed(name: str) -> Any:
        """A hyperparameter: by layer a schedule or a constant, or by leaf schedules, and by weight."""
        low, high = RANGES.get(name, (0.5 * RATES[optimizer], RATES[optimizer]))
        if name not in BY_WEIGHT:
            return (*(between(low, high, steps) for _ in params[1:]), between(low, high))
        last = Layer(between(low, high, steps, *sizes[-2:]), between(low, high, 1, sizes[-1]))
        return (*(Layer(between(low, high, steps), between(low, high)) for _ in params[1:]), last)

    def loss(params: Any, meta: Any, batch: Any) -> Array:
        rows, noise = batch
        logits = network(params, (meta["data"] + 0.0)[rows] + noise)
        penalty = sum(jnp.sum(w[1:] ** 2) for w in jax.tree.leaves(params))
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
            optimizer=program,
            adjoint=adjoint,
            state=everything["state"],
        )
        outputs = network(trained.params, data)
        end = jnp.mean(outputs**2) - jnp.mean(outputs[:, 0])
        state = sum(
            jnp.sum(v**2) for name in program.variables for v in jax.tree.leaves(trained.state[name])
        )
        return end + 0.1 * state + 0.3 * jnp.mean(trained.losses)

    everything = {
        "params": params,
        "state": {
            name: jax.tree.map(lambda w, v=variable: _start(v.init(w)), params)
            for name, variable in program.variables.items()
        },
        "hypers": {name: mixed(name) for name in program.hypers},
        "meta": {"data": data, "log_penalty": jnp.asarray(-5.0, dtype)},
        "noise": inputs(steps, 10, scale=0.1),
    }
    return Problem(objective, everything)


def _start(variable: Array) -> Array:
    """A state that is 0 only in its first row, where the first input's weights have theirs."""
    if variable.ndim == 2 and variable.shape[0] == variable.shape[1]:
        return 0.1 * jnp.eye(len(variable), dtype=variable.dtype).at[:1].set(0)
    values = jnp.linspace(0.1, 0.2, variable.size, dtype=variable.dtype)
    return values.reshape(variable.shape).at[:1].set(0)


def relative_error(found: Any, expected: Any) -> dict[str, float]:
    """Relative error of every leaf, in the Euclidean norm, by path."""
    paths, _ = jax.tree_util.tree_flatten_with_path(expected)
    return {
        jax.tree_util.keystr(path): float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, (path, b) in zip(jax.tree.leaves(found), paths)
        if b.size
    }


def assert_agrees_with_finite_differences(value: Callable[[Any], Array], at: Any, gradient: Any) -> None:
    """Along a random direction for every leaf by itself, by changes in proportion to what is there.

    What is 0 thus stays 0.  Differences of fourth order.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(at)
    leaves = [x for _, x in paths]
    rng = np.random.default_rng(1)
    for k, (x, g) in enumerate(zip(leaves, jax.tree.leaves(gradient))):
        direction = x * rng.normal(size=x.shape)

        def along(h: float, k: int = k, x: Any = x, direction: Any = direction) -> float:
            return float(value(structure.unflatten([*leaves[:k], x + h * direction, *leaves[k + 1 :]])))

        h = 1e-5
        coarse = (along(2 * h) - along(-2 * h)) / (4 * h)
        fine = (along(h) - along(-h)) / (2 * h)
        found, expected = float(jnp.vdot(g, direction)), (4 * fine - coarse) / 3
        tolerance = 1e-6 * abs(expected) + 1e-9
        assert abs(found - expected) <= tolerance, (jax.tree_util.keystr(paths[k][0]), found, expected)


def assert_reversed_hypergradients_agree(objective: Callable[..., Array], everything: Any) -> None:
    """Of a run that is reversed, in everything; against `Stored`, and that against finite differences.

    The objective is a function of everything, the adjoint, and a change to make to its optimizer.
    """

    def both(e: Any) -> Any:
        return [jax.grad(objective)(e, adjoint) for adjoint in (hg.Stored(), hg.Reversible(bits=2))]

    expected, found = jax.jit(both)(everything)
    errors = relative_error(found, expected)
    assert max(errors.values()) < 1e-9, errors
    value = jax.jit(lambda e: objective(e, hg.Stored(), unrounded))
    assert_agrees_with_finite_differences(value, everything, expected)
