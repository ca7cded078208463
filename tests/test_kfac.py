"""K-FAC: its factors against dense Fisher matrices, its hypergradients, and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import curvature, layers, nets
from hypergrad.optimizers.kfac.damping import damped, inverse, precondition
from tests.problems import (
    assert_agrees_with_finite_differences,
    assert_reversed_hypergradients_agree,
    relative_error,
)


def normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def gradients(likelihood: Any, apply: Any, params: Any, x: Any, targets: Any) -> Any:
    """Of ``-log p`` in the blocks of every layer, ``(n, rows, columns)`` or ``(n, width)``."""

    def loss(w: Any, x: Any, y: Any) -> Any:
        return likelihood.loss(apply(w, x[None])[0], y)

    by_example = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, targets)
    return jax.vmap(layers.merge)(by_example)


def dense_fisher(apply: Any, params: Any, x: Any, classes: int) -> list[Any]:
    """Of every layer and example: ``E_y vec(∇) vec(∇)ᵀ``, by its definition, for a softmax."""

    def term(y: Any) -> list[Any]:
        found = gradients(curvature.categorical(), apply, params, x, jnp.full(len(x), y))
        flat = [g.reshape(len(x), -1) for g in jax.tree.leaves(found)]
        p = jax.nn.softmax(apply(params, x))[:, y, None, None]
        return [p * g[:, :, None] * g[:, None, :] for g in flat]

    return jax.jit(lambda: [x.sum(0) for x in jax.vmap(term)(jnp.arange(classes))])()


def seeing(apply: Any, x: Any) -> Any:
    """A network whose inputs are fixed."""
    return lambda params, meta, batch, probes: apply(params, x, probes)


def factors(network: Any, likelihood: Any, fisher: Any, params: Any, step: int = 0) -> Any:
    def evaluate(params: Any, step: Any) -> Any:
        return layers.factors("test", network, likelihood, fisher, params, None, None, step)

    found = jax.jit(evaluate)(params, jnp.int32(step))
    return list(zip(jax.tree.leaves(found.A), jax.tree.leaves(found.G)))


# ---- the factors


@pytest.mark.usefixtures("x64")
def test_factors_are_those_of_dense_blocks() -> None:
    """The block of one example is a Kronecker product; of several, its factors are averaged."""
    init, apply = nets.mlp((3, 4, 2))
    params, x = init(jax.random.key(0), 0.7), normal(5, 3)
    dense = dense_fisher(apply, params, x, 2)
    for (A, G), block, layer in zip(
        factors(seeing(apply, x), curvature.categorical(), layers.exact(), params), dense, params
    ):
        rows, columns = layer.weights.shape[0] + 1, layer.weights.shape[1]
        by_index = block.reshape(len(x), rows, columns, rows, columns)
        G_each = by_index[:, -1, :, -1, :]  # of the biases, whose input is 1
        A_each = jnp.trace(by_index, axis1=2, axis2=4) / jnp.trace(G_each, axis1=1, axis2=2)[:, None, None]
        each = jnp.einsum("nab,ncd->nacbd", A_each, G_each)
        np.testing.assert_allclose(each, by_index, atol=1e-12)
        np.testing.assert_allclose(A, A_each.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(G, G_each.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_is_exact_for_linear_networks() -> None:
    init, apply = nets.mlp((3, 4, 2), activation=lambda x: x)
    params, x = init(jax.random.key(0), 0.7), normal(6, 3)
    found = factors(seeing(apply, x), curvature.normal(), layers.exact(), params)
    J = jax.vmap(jax.vmap(layers.merge))(jax.jacobian(apply)(params, x))
    for (A, G), j in zip(found, J):
        flat = j.reshape(*j.shape[:2], -1)
        np.testing.assert_allclose(
            jnp.kron(A, G), jnp.einsum("nka,nkb->ab", flat, flat) / len(x), atol=1e-12
        )


@pytest.mark.usefixtures("x64")
def test_estimates_of_the_fisher_matrix() -> None:
    """Sampled targets are right on average, and differ by step; empirical ones are those given."""
    init, apply = nets.mlp((3, 4, 2))
    params, x, y = init(jax.random.key(0), 0.7), normal(5, 3), jnp.array([0, 1, 1, 0, 1])
    likelihood = curvature.categorical()
    exact = factors(seeing(apply, x), likelihood, layers.exact(), params)
    sampled = jax.vmap(lambda t: factors(seeing(apply, x), likelihood, layers.sampled(), params, t))(
        jnp.arange(4000)
    )
    for (_, expected), (_, found) in zip(exact, sampled):
        np.testing.assert_allclose(found.mean(0), expected, atol=0.05 * jnp.max(expected))
        assert jnp.std(found[:, 0, 0]) > 0.1 * expected[0, 0]
    empirical = factors(seeing(apply, x), likelihood, layers.empirical(lambda meta, batch: y), params)
    for (_, found), g in zip(empirical, gradients(likelihood, apply, params, x, y)):
        np.testing.assert_allclose(found, jnp.einsum("na,nb->ab", g[:, -1], g[:, -1]) / 5, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_convolutions() -> None:
    """Of patches and slopes by place: they give the gradient, and the factors of KFC; gains are exact."""
    init, apply = nets.convnet((2, 4, 2), 3, width=3, depth=1)
    x, y = normal(5, 2, 4, 2), jnp.array([0, 1, 2, 0, 1])
    likelihood, fisher = curvature.categorical(), layers.empirical(lambda meta, batch: y)

    def evaluate(params: Any) -> Any:
        at = layers.tapped("test", seeing(apply, x), params, None, None)
        slopes = at.slopes(fisher(likelihood, at.outputs, None, None, jnp.int32(0))[0])
        return at.inputs, slopes, jax.tree.leaves(gradients(likelihood, apply, params, x, y))

    params = init(jax.random.key(0))
    inputs, slopes, of_examples = jax.jit(evaluate)(params)
    found = factors(seeing(apply, x), likelihood, fisher, params)
    assert [a.shape[1] for a in inputs] == [8, 8, 8, 1]
    for (A, G), a, (g,), each in zip(found, *jax.tree.map(np.asarray, (inputs, slopes, of_examples))):
        n, places = a.shape[:2]
        if each.ndim == 2:
            np.testing.assert_allclose(A, np.mean(each**2, axis=0), rtol=1e-9)
            continue
        if a.shape[2] < each.shape[1]:
            a = np.concatenate([a, np.ones((n, places, 1))], axis=2)
        np.testing.assert_allclose(np.einsum("nta,ntb->nab", a, g), each, atol=1e-12)
        np.testing.assert_allclose(A, np.einsum("nta,ntb->ab", a, a) / n, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(G, np.einsum("nta,ntb->ab", g, g) / (n * places), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_preconditioning_is_a_dense_solve() -> None:
    a, g, gradient = normal(9, 4), normal(8, 3, seed=1), normal(4, 3, seed=2)
    A, G = a.T @ a, g.T @ g
    pi = 2 * np.sqrt((np.trace(A) / 4) / (np.trace(G) / 3))
    dense = np.kron(A + pi * 0.1 * np.eye(4), G + 0.1 / pi * np.eye(3))
    expected = np.linalg.solve(dense, np.ravel(gradient)).reshape(4, 3)
    found = precondition([inverse(x) for x in damped([A, G], jnp.array(0.01), jnp.array(2.0))], gradient)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    dead = damped([jnp.zeros((4, 4)), G], jnp.array(0.01), jnp.array(2.0))
    np.testing.assert_allclose(dead[0], 0.2 * np.eye(4))


def test_blocks_are_taken_apart_again() -> None:
    params = {"b": jnp.ones(2), "w": normal(3, 2)}, [normal(2, 3, 4)], normal(5)
    blocks = layers.merge(params)
    assert [x.shape for x in jax.tree.leaves(blocks)] == [(4, 2), (6, 4), (5,)]
    jax.tree.map(np.testing.assert_array_equal, layers.split(blocks, params), params)


# ---- the optimizer

STEPS = 4


def run(optimizer_of: Any, x: Any, adjoint: Any, hypers: Any, params: Any, apply: Any) -> Any:
    rows = jnp.asarray(np.random.default_rng(0).integers(0, len(x), (STEPS, 8)))
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 2, len(x)))

    def loss(w: Any, x: Any, rows: Any) -> Any:
        return nets.cross_entropy(apply(w, x[rows]), labels[rows])

    optimizer = optimizer_of(lambda w, x, rows, probes: apply(w, x[rows], probes))
    return hg.train(loss, params, hypers, x, rows, steps=STEPS, optimizer=optimizer, adjoint=adjoint)


def gained(params: Any, x: Any, probes: Any = None) -> Any:
    """Inputs times gains, into a linear layer."""
    added = {"gain": 0.0, "linear": 0.0} if probes is None else probes
    hidden = x * params["gain"][None] + added["gain"]
    z = hidden @ params["linear"]["w"] + params["linear"]["b"][None] + added["linear"]
    return z if probes is None else (z, {"gain": x, "linear": hidden})


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_hypergradients() -> None:
    """In everything, of a run that is reversed; against `Stored`, and that against finite differences."""
    schedule = jnp.linspace(0.5, 0.7, STEPS)
    linear = {"w": normal(3, 2, seed=1), "b": normal(2, seed=2)}
    everything = {
        "params": {"gain": jnp.linspace(0.5, 1.5, 3), "linear": linear},
        "x": normal(12, 3),
        "hypers": {
            "learning_rate": schedule,
            "momentum": {"gain": jnp.array(0.8), "linear": schedule},
            "damping": 0.1 * schedule,
            "decay": jnp.array(0.9),
            "pi": schedule,
            "norm_constraint": 0.01 * schedule,
        },
    }

    def objective(everything: Any, adjoint: Any, change: Any = lambda optimizer: optimizer) -> Any:
        def optimizer(network: Any) -> Any:
            return change(hg.kfac(network, curvature.categorical(), norm_constraint=True))

        trained = run(optimizer, adjoint=adjoint, apply=gained, **everything)
        kept = {k: v for k, v in trained.state.items() if k not in ("step", "exact")}
        state = sum(jnp.sum(v**2) for v in jax.tree.leaves(kept))
        return jnp.sum(trained.params["linear"]["w"] ** 2) + 0.1 * state + jnp.mean(trained.losses)

    assert_reversed_hypergradients_agree(objective, everything)


@pytest.mark.slow
def test_layers_may_be_as_wide_as_their_inputs() -> None:
    """Where all arrays of a block have one shape, its hyperparameters are still numbers."""
    start = [nets.Dense(normal(2, 3), jnp.zeros(3))]

    def final(damping: Any, adjoint: Any) -> Any:
        network = lambda w, meta, step, probes: probed(w, normal(4, 2), probes)  # noqa: E731
        loss = lambda w, meta, step: jnp.mean(probed(w, normal(4, 2))[0] ** 2)  # noqa: E731
        hypers = {"learning_rate": 0.1, "damping": damping}
        optimizer = hg.kfac(network, curvature.normal())
        options = {"steps": 3, "optimizer": optimizer, "adjoint": adjoint}
        return jnp.sum(hg.train(loss, start, hypers, **options).params[0].weights ** 2)

    def probed(w: Any, x: Any, probes: Any = (0.0,)) -> Any:
        return x @ w[0].weights + w[0].biases[None] + probes[0], [x]

    def both(damping: Any) -> Any:
        return [jax.grad(final)(damping, adjoint) for adjoint in (hg.Stored(), hg.Reversible())]

    expected, found = jax.jit(both)(jnp.float32(0.1))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.slow
def test_a_convolutional_net_is_reversed() -> None:
    init, apply = nets.convnet((4, 4, 1), 3, width=2, depth=1)
    x, y = normal(30, 4, 4, 1), jnp.arange(30) % 3
    network = lambda w, meta, step, probes: apply(w, x, probes)  # noqa: E731
    optimizer = hg.kfac(network, curvature.categorical())

    def final(rates: Any, adjoint: Any) -> Any:
        hypers = {"learning_rate": rates, "damping": 0.1}
        options = {"steps": 20, "optimizer": optimizer, "adjoint": adjoint}
        loss = lambda w, meta, step: nets.cross_entropy(apply(w, x), y)  # noqa: E731
        return hg.train(loss, init(jax.random.key(0)), hypers, **options).losses[-1]

    expected, found = (
        jax.grad(final)(jnp.full(20, 0.1), adjoint) for adjoint in (hg.Stored(), hg.Reversible())
    )
    assert relative_error(found, expected)[""] < 1e-3


# ---- the adaptive one


@pytest.mark.usefixtures("x64")
def test_adaptive_is_newtons_method_for_least_squares() -> None:
    """The block of a linear layer is the Hessian of the squared error: one step gets to the minimum."""
    x, y = normal(9, 3), normal(9, 2, seed=1)

    def loss(w: Any, meta: Any, step: Any) -> Any:
        return jnp.mean(jnp.sum((x @ w["w"] + w["b"][None] - y) ** 2, axis=1)) / 2

    def network(w: Any, meta: Any, step: Any, probe: Any) -> Any:
        return x @ w["w"] + w["b"][None] + probe, x

    optimizer = hg.adaptive_kfac(network, curvature.normal(), fisher=layers.exact())
    start = {"w": normal(3, 2, seed=2), "b": normal(2, seed=3)}
    options = {"optimizer": optimizer, "adjoint": hg.Stored(), "steps": 3}
    trained = hg.train(loss, start, {"damping": 1e-12, "min_damping": 0.0}, **options)
    ones = np.concatenate([x, np.ones((9, 1))], axis=1)
    best = np.linalg.lstsq(ones, y, rcond=None)[0]
    np.testing.assert_allclose(trained.params["w"], best[:3], rtol=1e-5)
    np.testing.assert_allclose(trained.losses[1:], loss({"w": best[:3], "b": best[3]}, None, 0), rtol=1e-9)
    with pytest.raises(hg.ReversalError, match=r"adaptive_kfac\(refresh=5, adapt=5\) is no program"):
        hg.train(loss, start, {}, **{**options, "adjoint": hg.Reversible()})


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_adaptive_hypergradients() -> None:
    """Against finite differences, through the quadratic model, the damping rule and the periods."""
    init, apply = nets.mlp((3, 2))
    everything = {
        "params": init(jax.random.key(0), 0.5),
        "x": normal(12, 3),
        "hypers": {
            "damping": jnp.linspace(0.1, 0.2, STEPS),
            "omega": jnp.array(0.9),
            "l2": jnp.array(0.01),
            "gamma": jnp.array(0.7),
            "decay": jnp.array(0.9),
            "pi": jnp.array(1.3),
        },
    }

    def objective(everything: Any) -> Any:
        def optimizer(network: Any) -> Any:
            return hg.adaptive_kfac(network, curvature.categorical(), refresh=4, adapt=2)

        trained = run(optimizer, adjoint=hg.Stored(), apply=apply, **everything)
        return jnp.sum(trained.params[0].weights ** 2) + trained.state["state"].scale

    gradient = jax.jit(jax.grad(objective))(everything)
    assert all(bool(jnp.all(x != 0)) for x in jax.tree.leaves(gradient["hypers"]))
    assert_agrees_with_finite_differences(jax.jit(objective), everything, gradient)


# ---- in optax


@pytest.mark.slow
def test_is_an_optax_transformation() -> None:
    """Under the user's own `jit`, the same as `train`."""
    init, apply = nets.mlp((3, 2))
    x, y = normal(6, 3).astype(jnp.float32), normal(6, 2, seed=1).astype(jnp.float32)

    def loss(w: Any, meta: Any, rows: Any) -> Any:
        return jnp.mean(jnp.sum((apply(w, x[rows]) - y[rows]) ** 2, axis=1)) / 2

    def network(w: Any, meta: Any, rows: Any, probes: Any) -> Any:
        return apply(w, x[rows], probes)

    rows = jnp.array([[0, 1, 2, 3], [2, 3, 4, 5], [0, 2, 4, 5]])
    start = init(jax.random.key(0))
    for optimizer, hypers in (
        (hg.kfac(network, curvature.normal()), {"learning_rate": jnp.array([0.1, 0.2, 0.3])}),
        (hg.adaptive_kfac(network, curvature.normal()), {"damping": 1.0}),
    ):
        options = {"steps": 3, "optimizer": optimizer, "adjoint": hg.Stored()}
        expected = jax.jit(lambda o=options, h=hypers: hg.train(loss, start, h, None, rows, **o).params)()
        transformation = hg.as_optax(optimizer, hypers)

        @jax.jit
        def step(w: Any, state: Any, rows: Any, transformation: Any = transformation) -> Any:
            value_fn = lambda w: loss(w, None, rows)  # noqa: E731
            given = {"batch": rows, "value_fn": value_fn}
            updates, state = transformation.update(jax.grad(value_fn)(w), state, w, **given)
            return optax.apply_updates(w, updates), state

        w, state = start, transformation.init(start)
        for each in rows:
            w, state = step(w, state, each)
        assert max(relative_error(w, expected).values()) < 1e-4
    with pytest.raises(ValueError, match=r"as_optax\(adaptive_kfac\(.*value_fn=loss"):
        transformation.update(w, state, w, batch=rows[0])


# ---- what is refused


def test_messages() -> None:
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}

    def train(network: Any, **hypers: Any) -> Any:
        optimizer = hg.kfac(network, curvature.normal())
        loss = lambda w, meta, step: jnp.sum(w["w"] ** 2)  # noqa: E731
        return hg.train(loss, params, {"learning_rate": 0.1, **hypers}, steps=2, optimizer=optimizer)

    z = jnp.ones((5, 2))
    with pytest.raises(ValueError, match=r"kfac\(\): .* must return outputs and the inputs"):
        train(lambda w, meta, step, probe: z + probe)
    with pytest.raises(ValueError, match=r"kfac\(\): .* as a tree like the layers .* returned .*'w'"):
        train(lambda w, meta, step, probe: (z + probe, {"w": jnp.ones((5, 3))}))
    with pytest.raises(ValueError, match=r"layer params, of shape \[3, 2\], .* \[5, ..., 3\], .* \[5, 4\]"):
        train(lambda w, meta, step, probe: (z + probe, jnp.ones((5, 4))))
    with pytest.raises(ValueError, match=r"damping has shape \[4, 2\] within a layer"):
        train(lambda w, meta, step, probe: (z + probe, jnp.ones((5, 3))), damping=jnp.ones((2, 4, 2)))
    with pytest.raises(ValueError, match=r"adaptive_kfac\(refresh=0, adapt=5\): periods"):
        hg.adaptive_kfac(lambda *_: None, curvature.normal(), refresh=0)
