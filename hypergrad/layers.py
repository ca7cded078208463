"""Layers that a network declares, and the Kronecker factors of their Fisher matrices.

A network as this file wants it is a pure function ``network(params, meta, batch, probes) -> (outputs,
inputs)``.  Its arguments but for the last are those of the loss.  ``probes`` and ``inputs`` are trees like
the *layers* of the parameters, with one array for a layer: the network adds the probe to what the layer
computes, which changes nothing, as probes are zeros, but lets one differentiate in it; and it returns what
went into the layer.  Nothing is searched for in the graph of the network.

Layers are found in the tree of parameters.  There are three kinds, all of whose arrays end with the axis of
outputs:

====================================  ===========================  =====================================
parameters of the layer               inputs of the layer          what it computes; shape of the probe
====================================  ===========================  =====================================
weights and biases: a subtree of two  ``(n, ..., n_in)``, without  ``inputs @ weights + biases``
arrays, of at least two and of one    the 1 that the biases see
axis
weights: an array of at least two     ``(n, ..., n_in)``           ``inputs @ weights``
axes
a gain: an array of one axis          ``(n, ..., n_out)``          ``inputs * gain``; an offset is the
                                                                   gain of ones
====================================  ===========================  =====================================

The axes of weights before the last are one, ``n_in`` long: inputs of a convolution are the patches of the
image, flattened in the order of the weights' axes.  Axes of the inputs between first and last are places
that share the weights.

========  ====================  ====================================================================
symbol    shape                 meaning
========  ====================  ====================================================================
``n``                           examples
``T``                           places where a layer is applied, 1 but for convolutions and the like
``ā``     (n, T, n_in + 1)      inputs of a layer, and 1 for the biases, if there are any
``g``     (n, T, n_out)         gradient of ``-log p(y | z)`` of the example with respect to the probe
``W``     (n_in + 1, n_out)     block: weights, and the biases below them
``A``     (n_in + 1, n_in + 1)  ``E Σ_t ā āᵀ``, the mean over examples
``G``     (n_out, n_out)        ``E 1/T Σ_t g gᵀ``
``D``     (n_out,)              of a gain: ``E (Σ_t ā g)²``
========  ====================  ====================================================================

The Fisher matrix of ``W``, its rows one after the other, is about ``A ⊗ G``.

Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
ICML 2015; Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML
2016.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.curvature import Likelihood
from hypergrad.program import Blocks

PyTree = Any
dot = partial(jnp.matmul, precision="highest")  # an accelerator's default keeps too few digits for inverses
Network = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[Array, PyTree]]


# ---- blocks


def _is_layer(tree: PyTree) -> bool:
    """Whether a subtree is weights with their biases: has two children, which are arrays that fit."""
    children = jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    if len(children) != 2 or not jax.tree_util.all_leaves(children):
        return False
    vector, matrix = sorted((x.shape for x in children), key=len)
    return len(vector) == 1 < len(matrix) and vector[0] == matrix[-1]


def _layers(params: PyTree) -> tuple[list[PyTree], Any]:
    """The subtrees that are layers, and the tree that they are the leaves of."""
    return jax.tree.flatten(params, is_leaf=_is_layer)


def merge(params: PyTree) -> PyTree:
    """The block of every layer: weights as a matrix, and below them the biases; a gain as it is.

    >>> import jax.numpy as jnp
    >>> merge({"layer": {"w": jnp.zeros((3, 2)), "b": jnp.ones(2)}})["layer"]
    Array([[0., 0.],
           [0., 0.],
           [0., 0.],
           [1., 1.]], dtype=float32)
    """

    def block(layer: PyTree) -> Array:
        *biases, weights = sorted(jax.tree.leaves(layer), key=jnp.ndim)
        if weights.ndim < 2:
            return weights
        rows = weights.reshape(-1, weights.shape[-1])
        return jnp.concatenate([rows, biases[0][None]]) if biases else rows

    return jax.tree.map(block, params, is_leaf=_is_layer)


def split(blocks: PyTree, like: PyTree) -> PyTree:
    """Undo `merge`.

    Args:
      blocks: a tree of the blocks.
      like: a tree of arrays or shapes, the parameters.

    >>> import jax.numpy as jnp
    >>> split([jnp.zeros((3, 2))], [(jnp.ones((2, 2)), jnp.ones(2))])[0][1].shape
    (2,)
    """
    layers, structure = _layers(like)

    def parts(block: Array, layer: PyTree) -> PyTree:
        rows = block.shape[0] - (len(jax.tree.leaves(layer)) - 1)

        def part(x: Any) -> Array:
            biases = len(x.shape) == 1 < block.ndim
            return (block[rows] if biases else block[:rows]).reshape(x.shape).astype(x.dtype)

        return jax.tree.map(part, layer)

    return structure.unflatten(map(parts, structure.flatten_up_to(blocks), layers))


BLOCKS = Blocks(merge, split)


# ---- what a layer sees


class Tapped(NamedTuple):
    """A network at a point.

    Attributes:
      outputs: ``z``, ``(n, ...)``.
      inputs: of every layer, flat, ``(n, T, n_in)``.
      slopes: from cotangents ``(k, n, ...)`` of the outputs to those of the probes: flat,
        ``(k, n, T, n_out)``.
    """

    outputs: Array
    inputs: list[Array]
    slopes: Callable[[Array], list[Array]]


def tapped(call: str, network: Network, params: PyTree, meta: PyTree, batch: PyTree) -> Tapped:
    """Evaluate a network with probes.

    Args:
      call: the user's call, for messages.
      network: see the head of this file.
      params: its parameters, and the next two its other arguments.
      meta: passed on.
      batch: passed on.

    Raises:
      ValueError: where what the network returns does not fit its parameters.
    """
    layers, structure = _layers(params)
    returned = jax.eval_shape(network, params, meta, batch, no_probes(params))
    outputs, inputs = _checked(call, returned, structure)
    probes = []
    for path, x, layer in zip(_paths(params), inputs, layers):
        weights = max(jax.tree.leaves(layer), key=jnp.ndim)
        width = weights.shape[-1] if weights.ndim == 1 else math.prod(weights.shape[:-1])
        if weights.ndim == 0 or len(x.shape) < 2 or x.shape[0] != outputs.shape[0] or x.shape[-1] != width:
            raise ValueError(
                f"{call}: for the layer params{path}, of shape {list(weights.shape)}, the network must "
                f"return inputs of shape [{outputs.shape[0]}, ..., {width}], and returned {list(x.shape)}"
            )
        probes.append(jnp.zeros((*x.shape[:-1], weights.shape[-1]), weights.dtype))

    def outputs_of(probes: list[Array]) -> tuple[Array, list[Array]]:
        outputs, inputs = network(params, meta, batch, structure.unflatten(probes))
        return outputs, [x.reshape(x.shape[0], -1, x.shape[-1]) for x in jax.tree.leaves(inputs)]

    z, pull_back, inputs = jax.vjp(outputs_of, probes, has_aux=True)

    def slopes(cotangents: Array) -> list[Array]:
        if len(cotangents) == 1:  # a product of matrices, not of stacks of them
            found = [x[None] for x in pull_back(cotangents[0])[0]]
        else:
            (found,) = jax.vmap(pull_back)(cotangents)
        return [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in found]

    return Tapped(z, inputs, slopes)


def no_probes(params: PyTree) -> PyTree:
    """Zeros in the place of probes; numbers, which fit where the shapes of the probes are not known."""
    layers, structure = _layers(params)
    return structure.unflatten([jnp.zeros((), jax.tree.leaves(x)[0].dtype) for x in layers])


def _checked(call: str, returned: Any, structure: Any) -> tuple[Any, list[Any]]:
    """Outputs and inputs among what a network has returned."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(
            f"{call}: network(params, meta, batch, probes) must return outputs and the inputs of its layers"
        )
    outputs, inputs = returned
    if jax.tree.structure(inputs) != structure:
        raise ValueError(
            f"{call}: the network must return the inputs of its layers as a tree like the layers in its "
            f"parameters, {structure}, and returned {jax.tree.structure(inputs)}"
        )
    return outputs, jax.tree.leaves(inputs)


def _paths(params: PyTree) -> list[str]:
    paths = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_layer)[0]
    return [jax.tree_util.keystr(path) for path, _ in paths]


# ---- Fisher matrices


class Fisher(Protocol):
    """Which Fisher matrix: cotangents of the outputs ``u``, ``v`` with ``E Σ_k u_k v_kᵀ`` that of ``z``."""

    def __call__(
        self, likelihood: Likelihood, outputs: Array, meta: PyTree, batch: PyTree, step: Array
    ) -> tuple[Array, Array]:
        """Two arrays ``(k, n, ...)``, or one twice."""


def sampled(seed: int = 0) -> Fisher:
    """The Fisher matrix, estimated by one target for every example, drawn from the predictive distribution.

    ``E_{y ~ p(y | z)} g gᵀ``.  Costs one pass backwards.  Targets are the same in every run: their key is
    the seed's, folded with the step.  They count as constants where the run is differentiated: that is the
    derivative of the run that took place, not of an expectation over runs.

    Args:
      seed: of the targets.

    Source: Martens and Grosse, ICML 2015, section 5.

    >>> from hypergrad import curvature
    >>> import jax.numpy as jnp
    >>> u, v = sampled()(curvature.bernoulli(), jnp.zeros((5, 3)), None, None, jnp.int32(0))
    >>> (u is v), u.shape
    (True, (1, 5, 3))
    """

    def cotangents(
        likelihood: Likelihood, outputs: Array, meta: PyTree, batch: PyTree, step: Array
    ) -> tuple[Array, Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), outputs.shape[0])
        targets = jax.lax.stop_gradient(jax.vmap(likelihood.sample)(keys, outputs))
        g = jax.vmap(jax.grad(likelihood.loss))(outputs, targets)[None]
        return g, g

    return cotangents


def exact() -> Fisher:
    """The Fisher matrix itself, which for the likelihoods of `hypergrad.curvature` is also Gauss-Newton's.

    Costs two passes backwards for every output of the network.

    >>> from hypergrad import curvature
    >>> import jax.numpy as jnp
    >>> u, v = exact()(curvature.normal(), jnp.zeros((5, 3)), None, None, jnp.int32(0))
    >>> u.shape
    (3, 5, 3)
    """

    def cotangents(
        likelihood: Likelihood, outputs: Array, meta: PyTree, batch: PyTree, step: Array
    ) -> tuple[Array, Array]:
        n, shape = outputs.shape[0], outputs.shape[1:]
        size = math.prod(shape)
        units = jnp.eye(size, dtype=outputs.dtype).reshape(size, 1, *shape)
        units = jnp.broadcast_to(units, (size, n, *shape))
        return units, jax.vmap(jax.vmap(likelihood.fisher), (None, 0))(outputs, units)

    return cotangents


def empirical(targets: Callable[[PyTree, PyTree], PyTree]) -> Fisher:
    """The second moment of the gradients at the data's own targets; not an estimate of the Fisher matrix.

    Args:
      targets: ``targets(meta, batch)``, with the examples as leading axis, as the likelihood's loss takes
        them.

    Source: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for natural
    gradient descent", NeurIPS 2019.

    >>> from hypergrad import curvature
    >>> import jax.numpy as jnp
    >>> fisher = empirical(lambda meta, rows: jnp.ones((5, 3))[rows])
    >>> fisher(curvature.normal(), jnp.zeros((2, 3)), None, jnp.array([0, 1]), jnp.int32(0))[0][0, 0]
    Array([-1., -1., -1.], dtype=float32)
    """

    def cotangents(
        likelihood: Likelihood, outputs: Array, meta: PyTree, batch: PyTree, step: Array
    ) -> tuple[Array, Array]:
        g = jax.vmap(jax.grad(likelihood.loss))(outputs, targets(meta, batch))[None]
        return g, g

    return cotangents


class Factors(NamedTuple):
    """Factors of the Fisher matrices of all layers: trees like the blocks.

    Attributes:
      A: of inputs, ``(n_in + 1, n_in + 1)``; for a gain ``D``, ``(n_out,)``.
      G: of slopes, ``(n_out, n_out)``; for a gain nothing, ``(0, 0)``.
    """

    A: PyTree
    G: PyTree


def factors(
    call: str,
    network: Network,
    likelihood: Likelihood,
    fisher: Fisher,
    params: PyTree,
    meta: PyTree,
    batch: PyTree,
    step: Array,
) -> Factors:
    """``A = E Σ_t ā āᵀ``, ``G = E 1/T Σ_t g gᵀ`` of every layer, on one batch.

    Args:
      call: the user's call, for messages.
      network: see the head of this file.
      likelihood: of its outputs.
      fisher: `sampled`, `exact` or `empirical`.
      params: of the network.
      meta: passed to the network.
      batch: passed to the network.
      step: by which targets are drawn.
    """
    at = tapped(call, network, params, meta, batch)
    u, v = fisher(likelihood, at.outputs, meta, batch, step)
    left = at.slopes(u)
    right = left if u is v else at.slopes(v)
    layers, structure = _layers(params)
    A, G = zip(*map(_factors_of, layers, at.inputs, left, right))
    return Factors(structure.unflatten(A), structure.unflatten(G))


def _factors_of(layer: PyTree, a: Array, left: Array, right: Array) -> tuple[Array, Array]:
    """``A`` and ``G`` of one layer."""
    n, places = a.shape[:2]
    *biases, weights = sorted(jax.tree.leaves(layer), key=jnp.ndim)
    if weights.ndim < 2:
        total = [jnp.sum(a[None] * g, axis=2) for g in (left, right)]
        return jnp.sum(total[0] * total[1], axis=(0, 1)) / n, jnp.zeros((0, 0), a.dtype)
    a = a.reshape(n * places, -1)
    A = dot(a.T, a)
    if biases:
        column = jnp.sum(a, axis=0)[:, None]
        A = jnp.block([[A, column], [column.T, jnp.full((1, 1), n * places, A.dtype)]])
    left, right = (g.reshape(-1, g.shape[-1]) for g in (left, right))
    G = dot(left.T, right)
    return A / n, (G + G.T) / (2 * n * places)
