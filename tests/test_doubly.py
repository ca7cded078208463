"""Doubly factored and late K-FAC: against dense blocks, a loop that remembers all, finite differences."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import doubly_factored as benchmark
from hypergrad import curvature, layers, nets
from hypergrad._base import devices
from hypergrad.optimizers.kfac.damping import damped, inverse, precondition
from tests.problems import (
    assert_agrees_with_finite_differences,
    assert_reversed_hypergradients_agree,
    relative_error,
    unrounded,
)

STEPS = 5
INIT, APPLY = nets.mlp((6, 4, 2))


def normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# ---- doubly factored layers


@pytest.mark.usefixtures("x64")
def test_is_exact_for_inputs_of_rank_one() -> None:
    """The dense block of one example; and of many for a linear network, where vectors are independent."""
    rng = np.random.default_rng(0)
    rows, columns = (rng.normal(size=(k, width)) for k, width in ((4, 2), (5, 3)))
    rows, columns = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, columns))
    grid = jnp.asarray(1.7 * np.einsum("ir,jc->ijrc", rows, columns).reshape(20, 6))
    for likelihood, activation, x in (
        (curvature.categorical(), jnp.tanh, grid[:1]),
        (curvature.normal(), lambda x: x, grid),
    ):
        init, apply = nets.mlp((6, 4, 3), activation=activation)
        params = init(jax.random.key(0), 0.7)

        def both(params: Any, x: Any = x, likelihood: Any = likelihood, apply: Any = apply) -> Any:
            network = lambda w, meta, step, probes: apply(w, x, probes)  # noqa: E731
            about = ("test", network, likelihood, layers.exact(), params, None, None, jnp.int32(0))
            J = jax.jacobian(apply)(params, x)[0]
            z = apply(params, x)
            F = jax.vmap(lambda z: jax.vmap(lambda u: likelihood.fisher(z, u))(jnp.eye(3)))(z)
            flat = J.weights.reshape(len(x), 3, -1)
            weights = jnp.einsum("nka,nkl,nlb->ab", flat, F, flat) / len(x)
            biases = jnp.einsum("nka,nkl,nlb->ab", J.biases, F, J.biases) / len(x)
            return layers.factors(*about, (2, 0)), weights, biases

        found, weights, biases = jax.jit(both)(params)
        (A, one), B, (G, of_biases) = found.A[0], found.B[0].weights, found.G[0]
        assert [x.shape for x in (A, B, G)] == [(2, 2), (3, 3), (4, 4)]
        scale = float(jnp.max(jnp.abs(weights)))
        np.testing.assert_allclose(jnp.kron(jnp.kron(A, B), G), weights, atol=1e-6 * scale)
        np.testing.assert_allclose(one * of_biases, biases, atol=1e-9 * scale)


@pytest.mark.usefixtures("x64")
def test_rank_one_vectors_are_singular_and_keep_the_norm() -> None:
    matrices = normal(7, 4, 1) * normal(7, 1, 5, seed=1) + 0.03 * normal(7, 4, 5, seed=2)
    K, Psi = jax.jit(layers.rank_one)(matrices.at[0].set(0))
    assert not np.any(K[0]) and not np.any(Psi[0])
    for matrix, k, psi in zip(matrices[1:], K[1:], Psi[1:]):
        u, _, v = np.linalg.svd(matrix)
        best = np.linalg.norm(matrix) * np.outer(u[:, 0], v[0])
        np.testing.assert_allclose(np.outer(k, psi), best, atol=1e-6 * np.linalg.norm(matrix))
    equal = jnp.stack([jnp.eye(3), jnp.zeros((3, 3))])
    derivative = jax.jit(jax.jacobian(lambda x: layers.rank_one(x)[0]))(equal)
    assert jnp.all(jnp.isfinite(derivative))  # though all singular values are the same


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_three_inverses_are_a_dense_solve() -> None:
    factors = [x.T @ x for x in (normal(9, 2), normal(8, 3, seed=1), normal(7, 4, seed=2))]
    gradient, damping, pi = normal(2, 3, 4, seed=3), 0.008, 1.5
    means = [np.trace(x) / len(x) for x in factors]
    common = np.prod(means) ** (1 / 3)
    shares = 0.2 * np.array([np.sqrt(pi), np.sqrt(pi), 1 / pi])
    a, b, g = (common / m * x + c * np.eye(len(x)) for m, x, c in zip(means, factors, shares))
    expected = np.linalg.solve(np.kron(np.kron(a, b), g), np.ravel(gradient)).reshape(2, 3, 4)
    with_damping = damped(factors, jnp.array(damping), jnp.array(pi))
    found = precondition([inverse(x) for x in with_damping], gradient)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    dead = damped([jnp.zeros((2, 2)), *factors[1:]], jnp.array(damping), jnp.array(1.0))
    np.testing.assert_allclose(dead[0], 0.2 * np.eye(2))


def test_blocks_are_taken_apart_again() -> None:
    params = {"b": jnp.ones(2), "w": normal(3, 2, 2)}, [normal(4, 3), normal(5)], normal(2, 3)
    blocks = layers.blocks("test", (3, [2, 0], 0))
    merged = blocks.merge(params)
    assert [x.shape for x in jax.tree.leaves(merged)] == [(1, 2), (3, 2, 2), (2, 2, 3), (5,), (2, 3)]
    jax.tree.map(np.testing.assert_array_equal, blocks.split(merged, params), params)


@pytest.mark.slow
def test_benchmark() -> None:
    """What is timed is right: the factors undo it; and the small one runs."""
    factors, gradient = benchmark.problem((16, 9, 64))
    found = jax.jit(benchmark.refresh)(factors, gradient)
    with_damping = damped(factors, jnp.float32(1e-2), jnp.float32(1))
    again = jnp.einsum("rs,cd,op,sdp->rco", *with_damping, found)
    np.testing.assert_allclose(again, gradient, atol=1e-2)
    assert all(value > 0 for value in benchmark.command(["--fast"]).values())


# ---- hypergradients


def problem(asynchrony: Any, schedules: Any) -> Any:
    """An objective of a run of one doubly factored layer, and everything it depends on."""
    init, apply = nets.mlp((6, 2))
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 12, (STEPS, 8)))
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 2, 12))

    def loss(w: Any, x: Any, rows: Any) -> Any:
        return nets.cross_entropy(apply(w, x[rows]), labels[rows])

    def network(w: Any, x: Any, rows: Any, probes: Any) -> Any:
        return apply(w, x[rows], probes)

    def objective(everything: Any, adjoint: Any, change: Any = lambda optimizer: optimizer) -> Any:
        optimizer = change(hg.kfac(network, curvature.categorical(), doubly=(2,), asynchrony=asynchrony))
        given = [everything[name] for name in ("params", "hypers", "x")]
        trained = hg.train(loss, *given, rows, steps=STEPS, optimizer=optimizer, adjoint=adjoint)
        kept = [trained.state[name] for name in optimizer.variables]
        state = sum(jnp.sum(v**2) for v in jax.tree.leaves(kept))
        return jnp.sum(trained.params[0].weights ** 2) + 1e-3 * state + jnp.mean(trained.losses)

    everything = {
        "params": init(jax.random.key(0), 0.5),
        "x": normal(12, 6),
        "hypers": {
            "learning_rate": jnp.linspace(0.2, 0.3, STEPS),
            "momentum": jnp.array(0.8),
            "damping": 0.2 * schedules,
            "decay": jnp.array(0.9),
            "pi": schedules,
        },
    }
    return objective, everything


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_doubly_factored_hypergradients() -> None:
    """In everything, reversed; against `Stored`, and that against finite differences."""
    objective, everything = problem(None, jnp.linspace(0.5, 0.7, STEPS))
    assert_reversed_hypergradients_agree(objective, everything)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_late_hypergradients() -> None:
    """Through the rings; and `Reversible` refuses them by name."""
    asynchrony = hg.Asynchrony(refresh=2, statistics_delay=1, inverse_delay=1)
    objective, everything = problem(asynchrony, jnp.linspace(0.5, 0.7, STEPS))
    expected = jax.jit(jax.grad(lambda e: objective(e, hg.Stored())))(everything)
    value = jax.jit(lambda e: objective(e, hg.Stored(), unrounded))
    assert_agrees_with_finite_differences(value, everything, expected)
    name = re.escape("kfac(asynchrony=Asynchrony(refresh=2, statistics_delay=1, inverse_delay=1))")
    with pytest.raises(hg.ReversalError, match=name):
        objective(everything, hg.Reversible())


# ---- asynchrony


def run(asynchrony: Any, steps: int = 8) -> Any:
    """Parameters after a run on the likelihood's own targets, and its losses."""
    x, labels = normal(12, 6), jnp.arange(12) % 2

    def train(params: Any, x: Any) -> Any:
        loss = lambda w, x, step: nets.cross_entropy(APPLY(w, x), labels)  # noqa: E731
        network = lambda w, x, step, probes: APPLY(w, x, probes)  # noqa: E731
        optimizer = hg.kfac(
            network, curvature.categorical(), fisher=layers.exact(), doubly=(2, 0), asynchrony=asynchrony
        )
        hypers = {"learning_rate": 0.3, "damping": 0.1}
        options = {"steps": steps, "optimizer": optimizer, "adjoint": hg.Stored()}
        trained = hg.train(loss, params, hypers, x, **options)
        return trained.params, trained.losses

    return jax.jit(train)(INIT(jax.random.key(0), 0.5), x)


def remembering(asynchrony: hg.Asynchrony, steps: int = 8) -> Any:
    """The same parameters, from a loop that keeps all statistics and inverses there have ever been."""
    x, labels = normal(12, 6), jnp.arange(12) % 2
    network = lambda w, meta, step, probes: APPLY(w, x, probes)  # noqa: E731
    about = (curvature.categorical(), layers.exact())
    merge, split = layers.blocks("test", (2, 0))
    params = INIT(jax.random.key(0), 0.5)
    blocks, structure = jax.tree.flatten(merge(params))

    @jax.jit
    def evaluate(w: Any) -> Any:
        gradient = jax.grad(lambda w: nets.cross_entropy(APPLY(w, x), labels))(w)
        found = layers.factors("test", network, *about, w, None, None, jnp.int32(0), (2, 0))
        return merge(gradient), found

    inverted = jax.jit(lambda each: [inverse(x) for x in damped(each, jnp.array(0.1), jnp.array(1.0))])
    averages, statistics, inverses = [], [], []
    velocity = [jnp.zeros_like(block) for block in blocks]
    for t in range(steps):
        gradient, found = evaluate(split(structure.unflatten(blocks), params))
        each = zip(*(jax.tree.leaves(tree) for tree in found))
        statistics.append([[x for x in factors if x.size] for factors in each])
        late = statistics[max(t - asynchrony.statistics_delay, 0)]
        averages.append(late)
        weights = 0.05 * 0.95 ** np.arange(t, -1, -1) / (1 - 0.95 ** (t + 1))
        average = jax.tree.map(lambda *x, w=weights: sum(c * y for c, y in zip(w, x)), *averages)
        inverses.append([inverted(factors) for factors in average])
        ready = max(t - asynchrony.inverse_delay, 0)
        B = inverses[ready - ready % asynchrony.refresh]
        for k, (each, g) in enumerate(zip(B, jax.tree.leaves(gradient))):
            velocity[k] = 0.9 * velocity[k] + precondition(each, g)
            blocks[k] = blocks[k] - 0.3 * velocity[k]
    return split(structure.unflatten(blocks), params)


@pytest.mark.slow
def test_without_delays_the_bits_are_those_without_asynchrony() -> None:
    jax.tree.map(np.testing.assert_array_equal, run(hg.Asynchrony()), run(None))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "refresh, statistics, inverses",
    [
        pytest.param(1, 2, 0, marks=pytest.mark.slow),
        pytest.param(1, 0, 1, marks=pytest.mark.slow),
        (3, 1, 4),
    ],
)
def test_delays_are_those_of_a_loop_that_remembers(refresh: int, statistics: int, inverses: int) -> None:
    asynchrony = hg.Asynchrony(refresh, statistics, inverses)
    errors = relative_error(run(asynchrony)[0], remembering(asynchrony))
    assert max(errors.values()) < 1e-8, errors  # decay and momentum are rounded to multiples of 2**-32


def four_devices() -> None:
    """Numbers of a run whose statistics and inverses are on separate devices, and of its hypergradient."""
    mesh = jax.make_mesh((4,), ("workers",))
    with jax.enable_x64(True):
        for lateness in ((1, 0, 0), (2, 1, 1)):
            here, there = run(hg.Asynchrony(*lateness)), run(hg.Asynchrony(*lateness, mesh=mesh))
            assert max(relative_error(there, here).values()) < 1e-12
        gradients = []
        for where in (None, mesh):
            asynchrony = hg.Asynchrony(2, 1, 1, mesh=where)
            objective, everything = problem(asynchrony, jnp.linspace(0.5, 0.7, STEPS))
            gradients.append(jax.jit(jax.grad(lambda e, f=objective: f(e, hg.Stored())))(everything))
        assert max(relative_error(*gradients).values()) < 1e-10
        text = jax.jit(lambda x: devices.spread(mesh, [2])([lambda: 2 * x])[0]).lower(1.0).as_text()
        assert "all_reduce" in text


@pytest.mark.slow
def test_separate_devices_give_the_same_numbers() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent)])
    code = "import jax, test_doubly; assert len(jax.devices()) == 4; test_doubly.four_devices()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **flags, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ---- what is refused


def test_messages() -> None:
    params = INIT(jax.random.key(0))

    def train(doubly: Any) -> Any:
        network = lambda w, meta, step, probes: APPLY(w, jnp.ones((2, 6)), probes)  # noqa: E731
        optimizer = hg.kfac(network, curvature.normal(), doubly=doubly)
        loss = lambda w, meta, step: jnp.sum(w[0].weights ** 2)  # noqa: E731
        return hg.train(loss, params, {"learning_rate": 0.1}, steps=2, optimizer=optimizer)

    with pytest.raises(ValueError, match=r"kfac\(\): doubly=2 must be a tree like the layers"):
        train(2)
    for rows in (4, 1, 6, -2, 2.0):
        with pytest.raises(
            ValueError, match=rf"doubly={rows} for the layer params\[0\], of shape \[6, 4\]"
        ):
            train((rows, 0))
    with pytest.raises(ValueError, match=r"Asynchrony\(refresh=0\): counted in steps"):
        hg.Asynchrony(refresh=0)
    with pytest.raises(ValueError, match=r"Asynchrony\(statistics_delay=-1\): .* at least 0"):
        hg.Asynchrony(statistics_delay=-1)
    with pytest.raises(ValueError, match=r"Asynchrony\(inverse_delay=1.5\): .* not differentiable"):
        hg.Asynchrony(inverse_delay=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Asynchrony\(mesh=...\): .* the mesh has one"):
        hg.Asynchrony(mesh=jax.make_mesh((1,), ("workers",)))
