"""Layers of a network: blocks of their parameters, what goes into them, and Kronecker factors of both."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import curvature, layers, nets

INIT, APPLY = nets.mlp((3, 4, 2))
PARAMS = jax.tree.map(
    lambda x: x + 0.1 * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), INIT(jax.random.key(0))
)
X = jax.random.normal(jax.random.key(1), (6, 3))


def network(params: Any, meta: Any, batch: Any, probes: Any) -> Any:
    """As K-FAC wants it."""
    return APPLY(params, batch, probes)


def test_blocks_are_weights_above_biases_and_come_apart_again() -> None:
    merged = layers.merge(PARAMS)
    for layer, block in zip(PARAMS, merged):
        np.testing.assert_array_equal(block, np.vstack([layer.weights, layer.biases[None]]))
    jax.tree.map(np.testing.assert_array_equal, layers.split(merged, PARAMS), PARAMS)


def test_gains_and_kernels_are_blocks_too() -> None:
    params = {"gain": jnp.ones(3), "conv": {"kernel": jnp.ones((2, 2, 3, 5)), "offset": jnp.zeros(5)}}
    merged = layers.merge(params)
    assert merged["gain"].shape == (3,) and merged["conv"].shape == (13, 5)
    jax.tree.map(np.testing.assert_array_equal, layers.split(merged, params), params)


def test_inputs_of_all_layers() -> None:
    found = layers.tapped("call", network, PARAMS, None, X)
    hidden = jnp.tanh(X @ PARAMS[0].weights + PARAMS[0].biases[None])
    np.testing.assert_allclose(
        found.outputs, hidden @ PARAMS[1].weights + PARAMS[1].biases[None], rtol=1e-5
    )


@pytest.mark.parametrize("which", ["exact", "empirical"])
def test_factors_of_a_network_by_hand(which: str) -> None:
    """``A = E[a aᵀ]`` with a one below the inputs, ``G`` from the cotangents of the layer's outputs."""
    targets = jnp.linspace(-1.0, 1.0, 12).reshape(6, 2)
    fisher = layers.exact() if which == "exact" else layers.empirical(lambda meta, batch: targets)
    likelihood = curvature.normal()
    found = layers.factors("call", network, likelihood, fisher, PARAMS, None, X, jnp.int32(0))
    inputs = [X, jnp.tanh(X @ PARAMS[0].weights + PARAMS[0].biases[None])]
    logits = inputs[1] @ PARAMS[1].weights + PARAMS[1].biases[None]
    if which == "exact":  # of unit variance: the Fisher matrix of the outputs is the identity
        last = jnp.broadcast_to(jnp.eye(2)[:, None], (2, 6, 2))
    else:
        last = jax.vmap(jax.grad(likelihood.loss))(logits, targets)[None]
    first = (last @ PARAMS[1].weights.T) * (1 - inputs[1] ** 2)[None]
    for k, slopes in enumerate((first, last)):
        ones = np.hstack([inputs[k], np.ones((6, 1))])
        np.testing.assert_allclose(jax.tree.leaves(found.A)[k], ones.T @ ones / 6, rtol=1e-5, atol=1e-6)
        G = jnp.einsum("cni,cnj->ij", slopes, slopes) / 6
        np.testing.assert_allclose(jax.tree.leaves(found.G)[k], G, rtol=1e-4, atol=1e-5)


def test_a_network_that_forgets_a_probe_is_refused() -> None:
    def forgetful(params: Any, meta: Any, batch: Any, probes: Any) -> Any:
        outputs, inputs = APPLY(params, batch, jax.tree.map(jnp.zeros_like, probes) if probes else probes)
        return outputs, inputs

    with pytest.raises(ValueError, match="probe"):
        layers.factors("call", forgetful, curvature.normal(), layers.exact(), PARAMS, None, X, jnp.int32(0))


def test_doubly_factored_layers_must_have_inputs_of_so_many_rows() -> None:
    with pytest.raises(ValueError, match=r"doubly=2 for the layer params.*\[3, 4\]"):
        layers.blocks("call", (2, 0)).merge(PARAMS)
