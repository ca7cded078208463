"""Equinox and Flax NNX modules as parameters, against plain JAX with the tools of each."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hypergrad as hg

STEPS = 4
X = jax.random.normal(jax.random.key(0), (STEPS, 6, 3))
Y = jax.random.normal(jax.random.key(1), (STEPS, 6, 2))
RATES = jnp.linspace(0.2, 0.5, STEPS)


class Normalized(eqx.Module):
    """With a state, an integer and a function in it."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear
    activation: Callable[..., Any]
    power: int
    table: jax.Array

    def __init__(self, key: Any):
        first, last = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, key=first)
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch", momentum=0.9)
        self.last = eqx.nn.Linear(4, 2, key=last)
        self.activation = jax.nn.tanh
        self.power = 1
        self.table = jnp.arange(2)

    def __call__(self, x: Any, state: Any) -> Any:
        x, state = self.norm(self.first(x), state)
        return self.last(self.activation(x)) ** self.power, state


def outputs(module: Any, inputs: Any, state: Any) -> Any:
    return jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(inputs, state)


def equinox_loss(module: Any, meta: Any, batch: Any, state: Any) -> Any:
    found, state = outputs(module, batch[0], state)
    return jnp.mean((found - batch[1]) ** 2), state


def equinox_final(module: Any, state: Any) -> Any:
    return jnp.mean((outputs(eqx.nn.inference_mode(module), X[0], state)[0] - Y[0]) ** 2)


def heavy_ball(gradient_of: Any, params: Any, state: Any, rates: Any) -> Any:
    velocity = jax.tree.map(jnp.zeros_like, params)
    for t in range(STEPS):
        gradient, state = gradient_of(params, state, (X[t], Y[t]))
        velocity = jax.tree.map(lambda v, g: 0.5 * v - g, velocity, gradient)
        params = jax.tree.map(lambda w, v: w + rates[t] * v, params, velocity)  # noqa: B023
    return params, state


def compare(ours: Any, plain: Any) -> None:
    results = [jax.jit(jax.value_and_grad(f))(RATES) for f in (ours, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 3e-5, 1e-6), *results)


HYPERS = {"momentum": 0.5}
OPTIONS: Any = {"steps": STEPS, "optimizer": hg.heavy_ball()}


def test_an_equinox_module_with_batch_normalization() -> None:
    module, start = eqx.nn.make_with_state(Normalized)(jax.random.key(2))

    def ours(rates: Any) -> Any:
        hypers = HYPERS | {"learning_rate": rates}
        trained = hg.train(equinox_loss, module, hypers, None, (X, Y), model_state=start, **OPTIONS)
        assert trained.params.activation is jax.nn.tanh and trained.params.power == 1
        return equinox_final(trained.params, trained.model_state)

    def plain(rates: Any) -> Any:
        arrays, rest = eqx.partition(module, eqx.is_inexact_array)

        def gradient_of(arrays: Any, state: Any, batch: Any) -> Any:
            value = lambda arrays: equinox_loss(eqx.combine(arrays, rest), None, batch, state)  # noqa: E731
            return jax.grad(value, has_aux=True)(arrays)

        arrays, state = heavy_ball(gradient_of, arrays, start, rates)
        return equinox_final(eqx.combine(arrays, rest), state)

    compare(ours, plain)


class Network(nnx.Module):
    """With batch normalization, dropout, and a bias that two layers share."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.second = nnx.Linear(4, 4, rngs=rngs)
        self.second.bias = self.first.bias
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        hidden = self.dropout(jnp.tanh(self.norm(self.first(x))))
        return self.last(jnp.tanh(self.second(hidden)))


def nnx_loss(module: Any, meta: Any, batch: Any) -> Any:
    return jnp.mean((module(batch[0]) - batch[1]) ** 2)


def nnx_final(module: Any) -> Any:
    module.eval()
    return nnx_loss(module, None, (X[0], Y[0]))


@pytest.mark.slow
def test_an_nnx_module_with_all_that_changes_in_it() -> None:
    module = Network(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(module, nnx.BatchStat))

    def ours(rates: Any) -> Any:
        trained = hg.train(nnx_loss, module, HYPERS | {"learning_rate": rates}, None, (X, Y), **OPTIONS)
        assert trained.params.first.bias is trained.params.second.bias
        return nnx_final(trained.params)

    def plain(rates: Any) -> Any:
        graph, params, state = nnx.split(module, nnx.Param, ...)

        def gradient_of(params: Any, state: Any, batch: Any) -> Any:
            def value(params: Any) -> Any:
                merged = nnx.merge(graph, params, jax.tree.map(lambda x: x, state))
                return nnx_loss(merged, None, batch), nnx.split(merged, nnx.Param, ...)[2]

            return jax.grad(value, has_aux=True)(params)

        params, state = heavy_ball(gradient_of, params, state, rates)
        return nnx_final(nnx.merge(graph, params, state))

    compare(ours, plain)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(module, nnx.BatchStat))


def test_rates_may_be_shaped_like_a_module() -> None:
    module = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    loss = lambda module, meta, batch: jnp.mean((jax.vmap(module)(batch[0]) - batch[1]) ** 2)  # noqa: E731
    by_leaf = jax.tree.map(lambda x: 0.1 if eqx.is_inexact_array(x) else x, module)
    of_arrays = eqx.filter(by_leaf, eqx.is_array_like)
    of_nnx = Network(nnx.Rngs(0))
    cases = [
        (loss, module, by_leaf),
        (loss, module, of_arrays),
        (nnx_loss, of_nnx, jax.tree.map(lambda x: 0.1, of_nnx)),
        (nnx_loss, of_nnx, jax.tree.map(lambda x: 0.1, nnx.state(of_nnx, nnx.Param))),
    ]
    found = []
    for each, params, rates in cases:
        hypers = HYPERS | {"learning_rate": rates}
        settings = OPTIONS | {"adjoint": hg.Stored()}
        found.append(hg.train(each, params, hypers, None, (X, Y), **settings).losses)
    one = hg.train(
        loss, module, HYPERS | {"learning_rate": 0.1}, None, (X, Y), adjoint=hg.Stored(), **OPTIONS
    )
    np.testing.assert_array_equal(found[0], one.losses)
    np.testing.assert_array_equal(found[1], one.losses)
    np.testing.assert_array_equal(found[2], found[3])


@pytest.mark.slow
def test_modules_in_a_tree_and_in_a_problem() -> None:
    parts = {"body": eqx.nn.MLP(3, 4, 4, 1, key=jax.random.key(0)), "head": jnp.ones((4, 2))}

    def loss(w: Any, meta: Any, batch: Any) -> Any:
        return jnp.mean((jax.vmap(w["body"])(batch[0]) @ w["head"] - batch[1]) ** 2)

    trained = hg.train(loss, parts, HYPERS | {"learning_rate": 0.1}, None, (X, Y), **OPTIONS)
    assert callable(trained.params["body"].activation) and trained.losses[-1] < trained.losses[0]
    problem = hg.Problem(
        lambda key: eqx.nn.make_with_state(Normalized)(key)[0],
        equinox_loss,
        (X, Y),
        lambda module, state: equinox_final(module, state),
        model_state=lambda key: eqx.nn.make_with_state(Normalized)(key)[1],
    )
    score = problem.objective(adjoint=hg.Stored(), **OPTIONS)
    rates = ({"learning_rate": 0.1}, {"learning_rate": 0.101})
    slope = jax.grad(score)(rates[0], jax.random.key(0))["learning_rate"]
    change = score(rates[1], jax.random.key(0)) - score(rates[0], jax.random.key(0))
    np.testing.assert_allclose(slope, change / 0.001, rtol=0.05)


def test_what_cannot_be_opened_is_refused() -> None:
    module = Network(nnx.Rngs(0))
    hypers = HYPERS | {"learning_rate": 0.1}
    with pytest.raises(TypeError, match=r"a dict with an NNX module in it; make the whole one nnx\.Module"):
        hg.train(nnx_loss, {"a": module}, hypers, None, (X, Y), **OPTIONS)
    with pytest.raises(TypeError, match="has a state of its own, so model_state must be left out"):
        hg.train(
            lambda module, meta, batch, state: (0.0, state),
            module,
            hypers,
            None,
            (X, Y),
            model_state=1.0,
            **OPTIONS,
        )
