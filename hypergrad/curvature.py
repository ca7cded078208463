"""Curvature without matrices: Hessian, Gauss-Newton and Fisher products, and what they tell.

A *matvec* is a linear function of trees like the parameters, ``v -> A v``.  It is compiled when it is first
called; it is a pytree of the arrays inside it, so that compiled functions take it as an argument and
derivatives go through it.  Functions of the user are traced when the matvec is made, not when it is called.

========  ====================  ====================================================================
symbol    name                  meaning
========  ====================  ====================================================================
``w``     params                parameters, ``d`` numbers in all
``v``     vector                a tree like the parameters
``z``     outputs               of the network, ``z = apply(w, inputs)``
``J``                           Jacobian ``∂z/∂w``
``L``     loss                  the mean of the losses of ``n`` examples, ``L = 1/n Σ_i f_i``
``g_i``   gradient              ``∇f_i(w)``
``h_i``   hvp                   ``∇²f_i(w) δ``
``δ``     direction             a tree like the parameters
``T``                           ``(k, k)``, the tridiagonal matrix of ``k`` steps of Lanczos
``Q``     basis                 ``(k, d)``, orthonormal rows
========  ====================  ====================================================================

A loss is a function ``loss(params, *data) -> scalar``, the *mean* over examples, which are the leading axis
of every array in ``data``: of all examples, of a chunk of them or, given a single row, of one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from hypergrad import nets
from hypergrad.run import hoist

PyTree = Any
Matvec = Callable[[PyTree], PyTree]

# An accelerator's default keeps too few digits to keep vectors orthogonal.
_dot = partial(jnp.matmul, precision="highest")


# ---- matvecs


def hessian(loss: Callable[..., Array], params: PyTree, *data: PyTree, chunk: int | None = None) -> Matvec:
    """The Hessian of a loss, ``v -> ∇²L(w) v``, forward over reverse.

    Args:
      loss: ``loss(params, *data) -> scalar``.
      params: ``w``, where the Hessian is taken; a pytree of floats.
      data: what else the loss takes.
      chunk: examples at a time, one chunk after the other, to save memory; the last may be smaller.  By
        default all at once, and then the loss need not be a mean over examples.

    Returns:
      A matvec.

    Raises:
      ValueError: where an argument cannot be meant as it is; from the matvec where a vector is not like
        the parameters.
      TypeError: for parameters or a loss that are not real floats.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> matvec = curvature.hessian(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]))
    >>> matvec(jnp.array([1.0, 0.0]))
    Array([4., 2.], dtype=float32)
    """
    call = _call("hessian(loss, params, *data", chunk)
    params = _floats(call, "params", params)
    pieces = _pieces(call, _arrays(data), chunk)
    losses = [_scalar_loss(call, loss, params, *piece.example()) for piece in pieces]
    return _matvec(call, params, pieces, [Partial(_hessian_product, f) for f in losses])


def _hessian_product(loss: Callable[..., Array], w: PyTree, data: Sequence[PyTree], v: PyTree) -> PyTree:
    """``∇²L(w) v``."""
    return jax.jvp(jax.grad(lambda w: loss(w, *data)), (w,), (v,))[1]


def gauss_newton(
    apply: Callable[[PyTree, PyTree], PyTree],
    output_loss: Callable[..., Array],
    params: PyTree,
    inputs: PyTree,
    *targets: PyTree,
    chunk: int | None = None,
) -> Matvec:
    """The generalised Gauss-Newton matrix, ``v -> Jᵀ H J v``, with ``H`` the Hessian of the loss in ``z``.

    Args:
      apply: ``apply(params, inputs) -> outputs``, the network.
      output_loss: ``output_loss(outputs, *targets) -> scalar``; where it is convex, so is the quadratic.
      params: ``w``.
      inputs: of the network.
      targets: what else the loss takes.
      chunk: as for `hessian`; the leading axis of inputs, outputs and targets is then the example.

    Returns:
      A matvec.

    Raises:
      ValueError, TypeError: as `hessian`.

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation 2002.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> squared_error = lambda z, y: 0.5 * jnp.mean((z - y) ** 2)
    >>> x, y = jnp.array([1.0, 3.0]), jnp.zeros(2)
    >>> curvature.gauss_newton(lambda w, x: w * x, squared_error, jnp.float32(0.5), x, y)(1.0)
    Array(5., dtype=float32)
    """
    call = _call("gauss_newton(apply, output_loss, params, inputs, *targets", chunk)
    params = _floats(call, "params", params)
    pieces = _pieces(call, _arrays((inputs, *targets)), chunk)
    bodies = []
    for piece in pieces:
        inputs_of, *targets_of = piece.example()
        network, outputs = _traced(apply, params, inputs_of)
        loss = _scalar_loss(call, output_loss, outputs, *targets_of, name="output_loss")
        bodies.append(Partial(_sandwich, Partial(_outputs, network), Partial(_output_hessian, loss)))
    return _matvec(call, params, pieces, bodies)


def _sandwich(
    function: Callable[..., PyTree],
    middle: Callable[..., PyTree],
    w: PyTree,
    data: Sequence[PyTree],
    v: PyTree,
) -> PyTree:
    """``Jᵀ M J v`` with the Jacobian of ``function(w, data)`` and ``middle(data, z, Jv) = M J v``."""
    z, forwards = jax.linearize(lambda w: function(w, data), w)
    return jax.linear_transpose(forwards, w)(middle(data, z, forwards(v)))[0]


def _outputs(network: Callable[..., PyTree], w: PyTree, data: Sequence[PyTree]) -> PyTree:
    return network(w, data[0])


def _output_hessian(loss: Callable[..., Array], data: Sequence[PyTree], z: PyTree, t: PyTree) -> PyTree:
    return jax.jvp(jax.grad(lambda z: loss(z, *data[1:])), (z,), (t,))[1]


class Likelihood(NamedTuple):
    """The predictive distribution ``p(y | z)`` of a network, whose negative logarithm is a loss.

    All three functions are of *one* example.

    Attributes:
      loss: ``loss(outputs, target) -> scalar``, ``-log p(y | z)`` in nats, up to a constant.
      sample: ``sample(key, outputs) -> target``.
      fisher: ``fisher(outputs, tangent)``, the product of ``E_y[∇_z log p ∇_z log pᵀ]`` with a tangent.
    """

    loss: Callable[[Array, Array], Array]
    sample: Callable[[Array, Array], Array]
    fisher: Callable[[Array, Array], Array]


def categorical() -> Likelihood:
    """Softmax cross-entropy: logits ``(classes,)``, the target a class or ``(classes,)`` probabilities.

    ``-log p = -Σ_c y_c log p_c``, ``p = softmax(z)``, Fisher matrix ``diag(p) - p pᵀ``.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> curvature.categorical().fisher(jnp.zeros(2), jnp.array([1.0, 0.0]))
    Array([ 0.25, -0.25], dtype=float32)
    """

    def loss(z: Array, y: Array) -> Array:
        return nets.cross_entropy(z[None], jnp.asarray(y)[None])

    def fisher(z: Array, t: Array) -> Array:
        p = jax.nn.softmax(z)
        return p * (t - jnp.sum(p * t))

    return Likelihood(loss, jax.random.categorical, fisher)


def bernoulli() -> Likelihood:
    """Sigmoid cross-entropy, summed over the outputs: logits and targets in [0, 1] of any one shape.

    ``-log p = Σ_k log(1 + exp z_k) - y_k z_k``, Fisher matrix ``diag(p (1 - p))``, ``p = sigmoid(z)``.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> curvature.bernoulli().fisher(jnp.zeros(2), jnp.array([1.0, 2.0]))
    Array([0.25, 0.5 ], dtype=float32)
    """

    def loss(z: Array, y: Array) -> Array:
        return jnp.sum(jax.nn.softplus(z) - y * z)

    def sample(key: Array, z: Array) -> Array:
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)

    def fisher(z: Array, t: Array) -> Array:
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z) * t

    return Likelihood(loss, sample, fisher)


def normal() -> Likelihood:
    """Half the squared error, summed over the outputs: ``y ~ N(z, I)``, of any one shape.

    ``-log p = ½ Σ_k (z_k - y_k)²``, Fisher matrix the identity.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> float(curvature.normal().loss(jnp.array([1.0, 2.0]), jnp.zeros(2)))
    2.5
    """

    def loss(z: Array, y: Array) -> Array:
        return jnp.sum((z - y) ** 2) / 2

    def sample(key: Array, z: Array) -> Array:
        return z + jax.random.normal(key, z.shape, z.dtype)

    return Likelihood(loss, sample, lambda z, t: t)


def fisher(
    apply: Callable[[PyTree, PyTree], Array],
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree,
    *,
    chunk: int | None = None,
) -> Matvec:
    """The Fisher matrix, ``v -> 1/n Σ_i J_iᵀ F(z_i) J_i v``, with the targets' expectation taken exactly.

    Equals `gauss_newton` for the losses of `categorical`, `bernoulli` and `normal`, whose Hessians in the
    outputs do not depend on the targets.

    Args:
      apply: ``apply(params, inputs) -> outputs``, example by example along the leading axis.
      likelihood: of the targets, whose ``F(z)`` is ``likelihood.fisher``.
      params: ``w``.
      inputs: a pytree of arrays with the examples as leading axis.
      chunk: examples at a time, by default all at once.

    Returns:
      A matvec.

    Raises:
      ValueError, TypeError: as `hessian`.

    Source: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020, section 9.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> apply, x = lambda w, x: x[:, None] * w[None], jnp.array([1.0, 3.0])
    >>> curvature.fisher(apply, curvature.normal(), jnp.zeros(1), x)(jnp.ones(1))
    Array([5.], dtype=float32)
    """
    call = _call("fisher(apply, likelihood, params, inputs", chunk)
    params = _floats(call, "params", params)
    data = _arrays((inputs,))
    _count(call, data)
    pieces, bodies = _pieces(call, data, chunk), []
    for piece in pieces:
        network, outputs = _traced(apply, params, *piece.example())
        _by_example(call, outputs, _count(call, piece.example()))
        middle, products = _traced(jax.vmap(likelihood.fisher), outputs, outputs)
        if _shapes(products) != _shapes(outputs):
            raise ValueError(
                f"{call}: for outputs {_describe(outputs)}, example by example, likelihood.fisher(outputs, "
                f"tangent) must return the same, and returned {_describe(products)}"
            )
        bodies.append(Partial(_sandwich, Partial(_outputs, network), Partial(_output_fisher, middle)))
    return _matvec(call, params, pieces, bodies)


def _output_fisher(product: Callable[..., PyTree], data: PyTree, z: PyTree, t: PyTree) -> PyTree:
    n = _count("", data)
    return jax.tree.map(lambda x: x / n, product(z, t))


def sampled_fisher(
    apply: Callable[[PyTree, PyTree], Array],
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree,
    key: Array,
    *,
    chunk: int | None = None,
) -> Matvec:
    """The Fisher matrix from one target drawn for each example, ``v -> 1/n Σ_i g_i g_iᵀ v``.

    Here ``g_i`` is the gradient of the loss at ``y_i ~ p(y | z_i)``.  The expectation over the key is
    `fisher`.  The targets are the same in every product, and whatever the chunk; derivatives do not go
    through how they depend on the parameters.

    Args:
      apply: as for `fisher`.
      likelihood: whose ``sample`` draws the targets.
      params: ``w``.
      inputs: a pytree of arrays with the examples as leading axis.
      key: a JAX random key.
      chunk: examples at a time, by default all at once.

    Returns:
      A matvec.

    Raises:
      ValueError, TypeError: as `hessian`.

    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
    ICML 2015, section 5.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> apply, x = lambda w, x: x[:, None] * w[None], jnp.array([1.0, 3.0])
    >>> make = lambda key: curvature.sampled_fisher(apply, curvature.bernoulli(), jnp.zeros(1), x, key)
    >>> make(jax.random.key(0))(jnp.ones(1))  # both targets of a logit of 0 have the same (∇ log p)²
    Array([1.25], dtype=float32)
    """
    call = _call("sampled_fisher(apply, likelihood, params, inputs, key", chunk)
    params = _floats(call, "params", params)
    data = _arrays((inputs,))
    data = (*data, jax.random.split(key, _count(call, data)))  # by example: the same whatever the chunk

    def losses(w: PyTree, inputs: PyTree, keys: Array) -> Array:
        z = apply(w, inputs)
        _by_example(call, z, keys.shape[0])
        y = jax.vmap(likelihood.sample)(keys, jax.lax.stop_gradient(z))
        return jax.vmap(likelihood.loss)(z, y)

    pieces, bodies = _pieces(call, data, chunk), []
    for piece in pieces:
        traced, found = _traced(losses, params, *piece.example())
        n = _count(call, piece.example())
        if [x.shape for x in jax.tree.leaves(found)] != [(n,)]:
            raise ValueError(
                f"{call}: likelihood.loss(outputs, target) must return one scalar for an example, and for "
                f"{n} examples returned {_describe(found)}"
            )
        bodies.append(Partial(_sandwich, Partial(_spread, traced), _mean_square))
    return _matvec(call, params, pieces, bodies)


def _spread(function: Callable[..., PyTree], w: PyTree, data: Sequence[PyTree]) -> PyTree:
    return function(w, *data)


@Partial
def _mean_square(data: PyTree, losses: Array, t: Array) -> Array:
    return t / losses.shape[0]


def empirical_fisher(
    loss: Callable[..., Array], params: PyTree, *data: PyTree, chunk: int | None = None
) -> Matvec:
    """The second moment of the examples' gradients at their own targets, ``v -> 1/n Σ_i g_i g_iᵀ v``.

    Not an estimate of `fisher`, though it goes by the name.

    Args:
      loss: ``loss(params, *data) -> scalar``, which is given one example at a time, as a batch of one.
      params: ``w``.
      data: pytrees of arrays with the examples as leading axis.
      chunk: examples at a time, by default all at once.

    Returns:
      A matvec.

    Raises:
      ValueError, TypeError: as `hessian`.

    Source: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for natural
    gradient descent", NeurIPS 2019.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> loss = lambda w, x: jnp.mean(w * x)
    >>> curvature.empirical_fisher(loss, jnp.float32(0.5), jnp.array([1.0, 3.0]))(1.0)
    Array(5., dtype=float32)
    """
    call = _call("empirical_fisher(loss, params, *data", chunk)
    params = _floats(call, "params", params)
    data = _arrays(data)
    _count(call, data)
    body = Partial(_sandwich, Partial(_losses, _example_loss(call, loss, params, data)), _mean_square)
    pieces = _pieces(call, data, chunk)
    return _matvec(call, params, pieces, [body] * len(pieces))


def _losses(loss: Callable[..., Array], w: PyTree, data: Sequence[PyTree]) -> Array:
    """``(n,)`` losses of examples."""
    return jax.vmap(lambda example: loss(w, *_as_batch(example)))(data)


def batched(matvec: Matvec, *, chunk: int | None = None) -> Matvec:
    """A matvec for stacks of vectors: trees whose arrays have one more axis, in front.

    What does not depend on the vectors, such as the forward pass, is done once for all that are computed
    together.  Without a chunk it is ``jax.vmap``.

    Args:
      matvec: of single vectors.
      chunk: vectors at a time, by default all at once.

    Raises:
      ValueError: for a chunk below 1.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> matvec = curvature.hessian(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]))
    >>> curvature.batched(matvec)(jnp.eye(2))
    Array([[4., 2.],
           [2., 0.]], dtype=float32)
    """
    _check_chunk(_call("batched(matvec", chunk), chunk)
    return Partial(partial(_map, chunk), matvec)


# ---- single examples


class PerExample(NamedTuple):
    """Losses, gradients and Hessian-vector products of every example.

    Attributes:
      loss: ``f_i``, ``(n,)``.
      gradient: ``g_i``, a tree like the parameters, every array with the examples as leading axis.
      hvp: ``h_i``, likewise; None without a direction.
    """

    loss: Array
    gradient: PyTree
    hvp: PyTree


def per_example(
    loss: Callable[..., Array],
    params: PyTree,
    *data: PyTree,
    direction: PyTree = None,
    chunk: int | None = None,
) -> PerExample:
    """Loss, gradient and Hessian-vector product of every example: ``f_i(w)``, ``∇f_i(w)``, ``∇²f_i(w) δ``.

    Args:
      loss: ``loss(params, *data) -> scalar``, which is given one example at a time, as a batch of one.
      params: ``w``.
      data: pytrees of arrays with the examples as leading axis.
      direction: ``δ``, a tree like the parameters; None for no products.
      chunk: examples at a time, by default all at once.  The result takes ``n`` times the memory of the
        parameters in any case: see `moments`.

    Raises:
      ValueError: where an argument cannot be meant as it is.
      TypeError: for parameters or a loss that are not real floats.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> loss = lambda w, x: jnp.mean(x * w**2)
    >>> curvature.per_example(loss, jnp.float32(2.0), jnp.array([1.0, 3.0]), direction=1.0)
    PerExample(loss=Array([ 4., 12.], dtype=float32), gradient=Array([ 4., 12.], dtype=float32),
    hvp=Array([2., 6.], dtype=float32))
    """
    call = _call("per_example(loss, params, *data, direction", chunk)
    params, data, direction = _example_arguments(call, params, data, direction, chunk)
    one = _example_loss(call, loss, params, data)
    return _map(chunk, lambda example: _derivatives(one, params, direction, _as_batch(example)), data)


class Moment(NamedTuple):
    """Mean over examples, and how far it may be from the mean of the distribution they come from.

    Attributes:
      mean: ``x̄ = 1/n Σ_i x_i``.
      variance: of the mean, coordinate by coordinate, ``Σ_i (x_i - x̄)² / (n (n - 1))``; times ``n`` it is
        that of an example.
      average: of ``variance`` over all coordinates of the tree, a scalar.
    """

    mean: PyTree
    variance: PyTree
    average: Array


class Moments(NamedTuple):
    """What `moments` returns.

    Attributes:
      loss: of ``f_i``, scalars.
      gradient: of ``g_i``, trees like the parameters.
      hvp: of ``h_i``, likewise; None without a direction.
    """

    loss: Moment
    gradient: Moment
    hvp: Moment | None


def moments(
    loss: Callable[..., Array],
    params: PyTree,
    *data: PyTree,
    direction: PyTree = None,
    chunk: int | None = None,
) -> Moments:
    """Mean losses, gradients and Hessian-vector products of examples, and the variances of these means.

    ``moments(...).gradient.average`` is ``σ̂ = 1/d Σ_j Σ_i (g_ij - ḡ_j)² / (n (n - 1))``; so are ``q̂`` of
    the products and ``r̂`` of the losses.  There are two passes, one for the mean and one for the deviations
    from it: in float32 ``E x² - (E x)²`` has no right digit where means are thousands of deviations.

    Args:
      loss: ``loss(params, *data) -> scalar``, which is given one example at a time, as a batch of one.  The
        examples must not depend on each other, as they do through batch normalisation.
      params: ``w``.
      data: pytrees of arrays with the examples, at least two, as leading axis.
      direction: ``δ``, a tree like the parameters; None for no products.
      chunk: examples at a time, by default all at once; the gradients of so many are in memory together.

    Raises:
      ValueError: where an argument cannot be meant as it is.
      TypeError: for parameters or a loss that are not real floats.

    Source: Chen, Choi, Balles, Duvenaud, Hennig, "Self-tuning stochastic optimization with curvature-aware
    gradient filtering", 2020, section 4.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> loss = lambda w, x: jnp.mean(x * w**2)
    >>> found = curvature.moments(loss, jnp.float32(1.0), jnp.array([1.0, 3.0]), direction=2.0)
    >>> float(found.loss.mean), float(found.loss.variance)
    (2.0, 1.0)
    >>> float(found.hvp.mean), float(found.hvp.variance)
    (8.0, 16.0)
    """
    call = _call("moments(loss, params, *data, direction", chunk)
    params, data, direction = _example_arguments(call, params, data, direction, chunk)
    n = _count(call, data)
    if n < 2:
        raise ValueError(f"{call}: data has one example, which has no variance; pass two or more")
    one = _example_loss(call, loss, params, data)
    pieces = _pieces(call, data, chunk)
    at = (params, direction)

    # The mean needs no single gradients: it is the gradient of the mean.
    def mean_loss(w: PyTree, *data: PyTree) -> Array:
        return jnp.mean(_losses(one, w, data))

    mean = _mean(pieces, [lambda data: _derivatives(mean_loss, *at, data)] * len(pieces))

    def deviations(data: Sequence[PyTree]) -> tuple[PyTree, PyTree]:
        values = jax.vmap(lambda example: _derivatives(one, *at, _as_batch(example)))(data)
        away = jax.tree.map(lambda x, m: x - m[None], values, mean)
        first, second = (jax.tree.map(lambda a, p=p: jnp.mean(a**p, axis=0), away) for p in (1, 2))
        return first, second

    # The first moment is 0 but for the rounding of the mean, which it takes out.
    first, second = _mean(pieces, [deviations] * len(pieces))
    variance = jax.tree.map(lambda a, b: jnp.maximum(b - a**2, 0) / (n - 1), first, second)
    f, g, h = (m if m is None else Moment(m, v, _average(v)) for m, v in zip(mean, variance))
    assert f is not None and g is not None
    return Moments(f, g, h)


def _derivatives(loss: Callable[..., Array], w: PyTree, direction: PyTree, data: Any) -> PerExample:
    """Value, gradient and, along a direction, Hessian-vector product of a loss."""
    both = jax.value_and_grad(lambda w: loss(w, *data))
    if direction is None:
        return PerExample(*both(w), None)
    (value, gradient), (_, hvp) = jax.jvp(both, (w,), (direction,))
    return PerExample(value, gradient, hvp)


def _average(tree: PyTree) -> Array:
    """Mean of all numbers in a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(jnp.sum(x) for x in leaves) / sum(x.size for x in leaves)


# ---- what matvecs tell: dense matrices, traces, spectra


def dense(matvec: Matvec, like: PyTree, *, chunk: int | None = None) -> Array:
    """The matrix of a matvec, ``(d, d)``, in the order of ``jax.flatten_util.ravel_pytree``.

    Args:
      matvec: any linear function from trees like `like` to such trees.
      like: a tree like the parameters.
      chunk: columns at a time, by default all at once.

    Raises:
      ValueError: for a matvec that returns something else.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> w = jnp.array([1.0, 2.0])
    >>> curvature.dense(curvature.hessian(lambda w: w[0] ** 2 * w[1], w), w)
    Array([[4., 2.],
           [2., 0.]], dtype=float32)
    """
    call = _call("dense(matvec, like", chunk)
    _check_chunk(call, chunk)
    flat, product, _ = _flat(call, matvec, like)
    return _map(chunk, product, jnp.eye(flat.size, dtype=flat.dtype)).T


class Trace(NamedTuple):
    """An estimate of a trace.

    Attributes:
      value: unbiased.
      standard_error: of the value, from the samples.
    """

    value: Array
    standard_error: Array


def trace(
    matvec: Matvec, like: PyTree, key: Array, *, samples: int, rank: int = 0, chunk: int | None = None
) -> Trace:
    """The trace of a matrix from products with random signs, ``tr A ≈ 1/m Σ_s g_sᵀ A g_s``.

    With a rank, the trace on the range of ``A S``, ``S`` being so many random vectors, is computed exactly
    and only the rest is estimated: ``tr QᵀAQ + tr (I - QQᵀ) A (I - QQᵀ)`` (Hutch++).  That pays where few
    eigenvalues are large, as in networks.  All in all it takes ``samples + 2 rank`` products.

    Args:
      matvec: a linear function from trees like `like` to such trees.
      like: a tree like the parameters.
      key: a JAX random key.
      samples: ``m``, at least 2.
      rank: at least 0, at most ``d``; static.
      chunk: vectors at a time, by default all at once.

    Returns:
      A `Trace`; exact for diagonal matrices, since signs have the square 1.

    Raises:
      ValueError: for numbers out of range, and a matvec that returns what is not like `like`.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989; Meyer, Musco,
    Musco, Woodruff, "Hutch++: Optimal stochastic trace estimation", SOSA 2021, algorithm 1.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> w = jnp.array([1.0, 2.0])
    >>> matvec = curvature.hessian(lambda w: jnp.sum(w**3), w)
    >>> curvature.trace(matvec, w, jax.random.key(0), samples=2)
    Trace(value=Array(18., dtype=float32), standard_error=Array(0., dtype=float32))
    """
    call = _call(f"trace(matvec, like, key, samples={samples}, rank={rank}", chunk)
    _check_chunk(call, chunk)
    flat, product, _ = _flat(call, matvec, like)
    _check_whole(call, "samples", samples, 2, None)
    _check_whole(call, "rank", rank, 0, flat.size)
    sketch_key, sample_key = jax.random.split(key)
    basis = jnp.zeros((0, flat.size), flat.dtype)
    known = jnp.zeros((), flat.dtype)
    if rank:
        sketch = jax.random.rademacher(sketch_key, (rank, flat.size), flat.dtype)
        # The estimate is unbiased for any fixed basis, and so is its derivative, without the basis's.
        basis = jnp.linalg.qr(jax.lax.stop_gradient(_map(chunk, product, sketch)).T)[0].T
        known = jnp.sum(basis * _map(chunk, product, basis))

    def sample(key: Array) -> Array:
        g = _without(basis, jax.random.rademacher(key, flat.shape, flat.dtype))
        return _dot(g, product(g))

    rest = _map(chunk, sample, jax.random.split(sample_key, samples))
    return Trace(known + jnp.mean(rest), jnp.std(rest, ddof=1) / math.sqrt(samples))


class Ritz(NamedTuple):
    """What ``k`` steps of Lanczos found of a symmetric matrix, by ascending eigenvalue.

    Attributes:
      values: Ritz values ``θ_i``, ``(k,)``.
      weights: ``(k,)``, squared components of the start along the Ritz vectors, in all 1: the nodes and
        weights of Gauss quadrature for ``startᵀ f(A) start / startᵀ start``.
      residuals: ``(k,)``, ``|A x_i - θ_i x_i|``; there is an eigenvalue no farther than this.
      vectors: Ritz vectors ``x_i`` of length 1, a tree like the start with ``k`` as leading axis.
    """

    values: Array
    weights: Array
    residuals: Array
    vectors: PyTree


def lanczos(matvec: Matvec, start: PyTree, *, steps: int) -> Ritz:
    """Extreme eigenvalues and eigenvectors of a symmetric matrix: ``Q A Qᵀ = T``, ``T = S diag(θ) Sᵀ``.

    ``Q`` spans ``start, A start, ..., A^(k-1) start``; every row is made orthogonal to all before, twice.
    Where that space is exhausted before the last step, it goes on from a random vector, and what is found
    then has no weight.

    Args:
      matvec: a symmetric linear function from trees like `start` to such trees.
      start: a tree that is not zero, usually random.
      steps: ``k``, from 1 to ``d``; all of ``Q`` is kept.

    Returns:
      A `Ritz`.  With ``k = d`` it holds all eigenvalues.

    Raises:
      ValueError: for steps out of range, a start of zero, and a matvec that returns what is not like it.

    Source: Golub and Van Loan, "Matrix computations", 4th edition, section 10.1.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> found = curvature.lanczos(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.ones(3), steps=3)
    >>> jnp.round(found.values, 4)
    Array([1., 2., 5.], dtype=float32)
    >>> jnp.round(found.weights, 4)
    Array([0.3333, 0.3333, 0.3333], dtype=float32)
    """
    call = f"lanczos(matvec, start, steps={steps})"
    flat, product, unravel = _flat(call, matvec, start, "start")
    _check_whole(call, "steps", steps, 1, flat.size)
    if not isinstance(flat, jax.core.Tracer) and not flat.any():
        raise ValueError(f"{call}: start is zero, which spans nothing; pass a random tree")
    return _lanczos(product, flat, unravel, steps)


def _lanczos(
    product: Callable[[Array], Array], start: Array, unravel: Callable[[Array], PyTree], steps: int
) -> Ritz:
    d, eps = start.size, jnp.finfo(start.dtype).eps

    def step(carry: tuple[Array, Array, Array], k: Array) -> tuple[Any, Any]:
        basis, q, scale = carry  # rows of the basis that are not there yet are 0
        basis = basis.at[k].set(q)
        w = product(q)
        a = _dot(q, w)
        w = _without(basis, w)
        squared = _dot(w, w)
        scale = jnp.maximum(scale, jnp.abs(a))
        spent = squared <= (10 * eps * scale) ** 2
        b = jnp.sqrt(jnp.where(spent, 1, squared))  # has a derivative at 0

        def again() -> Array:
            fresh = _without(
                basis, jax.random.normal(jax.random.fold_in(jax.random.key(0), k), (d,), q.dtype)
            )
            return fresh / jnp.linalg.norm(fresh)

        q = jax.lax.cond(spent, again, lambda: w / b)
        b = jnp.where(spent, 0, b)
        return (basis, q, jnp.maximum(scale, b)), (a, b)

    empty = jnp.zeros((steps, d), start.dtype)
    start = start / jnp.sqrt(_dot(start, start))
    (basis, _, _), (a, b) = jax.lax.scan(
        step, (empty, start, jnp.zeros((), start.dtype)), jnp.arange(steps)
    )
    values, S = jnp.linalg.eigh(jnp.diag(a) + jnp.diag(b[:-1], 1) + jnp.diag(b[:-1], -1))
    return Ritz(values, S[0] ** 2, jnp.abs(b[-1] * S[-1]), jax.vmap(unravel)(_dot(S.T, basis)))


class Spectrum(NamedTuple):
    """Gauss quadratures of the eigenvalue distribution of a symmetric matrix, from several starts.

    The trace of a function is ``tr f(A) ≈ d · mean over starts of Σ_i weights_i f(values_i)``.

    Attributes:
      values: ``(samples, steps)``.
      weights: ``(samples, steps)``, each row in all 1.
    """

    values: Array
    weights: Array


def spectrum(
    matvec: Matvec, like: PyTree, key: Array, *, steps: int, samples: int, chunk: int | None = None
) -> Spectrum:
    """The distribution of the eigenvalues of a symmetric matrix, by `lanczos` from random starts.

    Args:
      matvec: a symmetric linear function from trees like `like` to such trees.
      like: a tree like the parameters.
      key: a JAX random key.
      steps: of Lanczos, from 1 to ``d``.
      samples: starts, at least 1.
      chunk: starts at a time, by default all at once; each takes ``steps`` trees of memory.

    Returns:
      A `Spectrum`; see `density`.

    Raises:
      ValueError: for numbers out of range, and a matvec that returns what is not like `like`.

    Source: Ghorbani, Krishnan, Xiao, "An investigation into neural net optimization via Hessian eigenvalue
    density", ICML 2019, section 2.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> A = lambda v: 2 * v
    >>> found = curvature.spectrum(A, jnp.zeros(3), jax.random.key(0), steps=1, samples=2)
    >>> jnp.round(found.values, 4).tolist(), found.weights.tolist()
    ([[2.0], [2.0]], [[1.0], [1.0]])
    """
    call = _call(f"spectrum(matvec, like, key, steps={steps}, samples={samples}", chunk)
    _check_chunk(call, chunk)
    flat, product, unravel = _flat(call, matvec, like)
    _check_whole(call, "steps", steps, 1, flat.size)
    _check_whole(call, "samples", samples, 1, None)

    def one(key: Array) -> Spectrum:
        found = _lanczos(product, jax.random.normal(key, flat.shape, flat.dtype), unravel, steps)
        return Spectrum(found.values, found.weights)

    return _map(chunk, one, jax.random.split(key, samples))


def density(found: Spectrum, points: Array, width: float | Array) -> Array:
    """The smoothed density of eigenvalues, ``ρ(t) = Σ_i weights_i N(t; values_i, width²)``, of all starts.

    Args:
      found: by `spectrum`.
      points: ``t``, ``(p,)``.
      width: standard deviation of the smoothing, above 0.

    Returns:
      ``ρ``, ``(p,)``, the mean over the starts; its integral over all ``t`` is 1.

    Raises:
      ValueError: for points that are not ``(p,)``.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> found = curvature.Spectrum(jnp.zeros((1, 1)), jnp.ones((1, 1)))
    >>> jnp.round(curvature.density(found, jnp.array([0.0, 1.0]), 1.0), 4)
    Array([0.3989, 0.242 ], dtype=float32)
    """
    points = jnp.asarray(points)
    if points.ndim != 1:
        raise ValueError(f"density(found, points, width): points must be (p,), not {list(points.shape)}")
    from_value = points[:, None, None] - found.values[None]
    bells = jnp.exp(-0.5 * (from_value / width) ** 2) / (math.sqrt(2 * math.pi) * width)
    return jnp.mean(jnp.sum(found.weights[None] * bells, axis=2), axis=1)


def _without(basis: Array, vector: Array) -> Array:
    """``(I - QᵀQ) v``, twice: what rounding leaves of the components the first time is gone the second."""
    for _ in range(2):
        vector = vector - _dot(_dot(basis, vector), basis)
    return vector


# ---- chunks of data


@partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["share", "stacked"])
@dataclass(frozen=True)
class _Piece:
    """Part of the data.

    Attributes:
      data: of one chunk or, where stacked, of several of one size, along a new leading axis.
      share: of all examples that a chunk has.
      stacked: whether it is several.
    """

    data: Any
    share: float
    stacked: bool

    def example(self) -> Any:
        """Shapes of a chunk."""
        drop = 1 if self.stacked else 0
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[drop:], x.dtype), self.data)


def _pieces(call: str, data: PyTree, chunk: int | None) -> list[_Piece]:
    """The data in chunks: those of full size, and the last where it is smaller."""
    _check_chunk(call, chunk)
    if chunk is None:
        return [_Piece(data, 1.0, False)]
    n = _count(call, data)
    chunk = min(chunk, n)
    full, rest = divmod(n, chunk)
    end = n - rest
    stack = jax.tree.map(lambda x: x[:end].reshape(full, chunk, *x.shape[1:]), data)
    pieces = [_Piece(stack, chunk / n, True)]
    if rest:
        pieces.append(_Piece(jax.tree.map(lambda x: x[end:], data), rest / n, False))
    return pieces


def _mean(pieces: Sequence[_Piece], functions: Sequence[Callable[[PyTree], PyTree]]) -> PyTree:
    """Mean over the examples of what the functions, one for each piece, give as means over a chunk."""
    total = None
    for piece, function in zip(pieces, functions):

        def shared(data: PyTree, piece: _Piece = piece, function: Any = function) -> PyTree:
            return jax.tree.map(lambda x: piece.share * x, function(data))

        if not piece.stacked:
            new = shared(piece.data)
            total = new if total is None else jax.tree.map(jnp.add, total, new)
            continue
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(shared, piece.example()))

        # Differentiated in reverse, a chunk is computed again rather than kept.
        @partial(jax.checkpoint, prevent_cse=False)
        def add(total: PyTree, data: PyTree, shared: Any = shared) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, shared(data)), None

        total, _ = jax.lax.scan(add, zero, piece.data)
    return total


def _matvec(
    call: str, params: PyTree, pieces: Sequence[_Piece], bodies: Sequence[Callable[..., PyTree]]
) -> Matvec:
    """The matvec whose product with a vector is the mean over chunks of ``body(params, chunk, vector)``."""

    @jax.jit
    def product(params: PyTree, pieces: Any, bodies: Any, vector: PyTree) -> PyTree:
        vector = _like(f"matvec = {call}; matvec(vector)", "the vector", vector, params)
        return _mean(pieces, [partial(_at, body, params, vector) for body in bodies])

    return Partial(product, params, pieces, bodies)


def _at(body: Callable[..., PyTree], params: PyTree, vector: PyTree, data: PyTree) -> PyTree:
    return body(params, data, vector)


def _map(chunk: int | None, function: Callable[..., PyTree], xs: PyTree) -> PyTree:
    """The function of every row, so many at a time, or all at once."""
    return jax.vmap(function)(xs) if chunk is None else jax.lax.map(function, xs, batch_size=chunk)


# ---- tracing and checks


def _traced(function: Callable[..., PyTree], *arguments: PyTree) -> tuple[Any, PyTree]:
    """The function, traced on shapes, as a pytree of what it closes over; and the shapes of its result."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    hoisted, constants, result = hoist(function, *shapes)
    return Partial(partial(_evaluate, hoisted), constants), result


def _evaluate(hoisted: Any, constants: Sequence[Array], *arguments: PyTree) -> PyTree:
    return hoisted(constants, jax.tree.leaves(arguments))


def _scalar_loss(call: str, loss: Callable[..., Array], *arguments: PyTree, name: str = "loss") -> Any:
    traced, result = _traced(loss, *arguments)
    if not (isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()):
        raise ValueError(
            f"{call}: {name} must return one scalar, the mean over examples, and returned "
            f"{_describe(result)}"
        )
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(f"{call}: {name} must return a real float, and returned {_describe(result)}")
    return traced


def _example_loss(call: str, loss: Callable[..., Array], params: PyTree, data: PyTree) -> Any:
    """The loss traced on a batch of one."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), data)
    return _scalar_loss(call, loss, params, *one)


def _as_batch(example: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], example)


def _example_arguments(
    call: str, params: PyTree, data: PyTree, direction: PyTree, chunk: int | None
) -> tuple[PyTree, PyTree, PyTree]:
    _check_chunk(call, chunk)
    params, data = _floats(call, "params", params), _arrays(data)
    _count(call, data)
    if direction is not None:
        direction = _like(call, "direction", direction, params)
    return params, data, direction


def _flat(
    call: str, matvec: Matvec, like: PyTree, name: str = "like"
) -> tuple[Array, Callable[[Array], Array], Callable[[Array], PyTree]]:
    """A tree as one vector, the matvec on such vectors, traced once, and the way back to trees."""
    like = _floats(call, name, like)
    flat, unravel = ravel_pytree(like)
    traced, result = _traced(matvec, like)
    if _shapes(result) != _shapes(like):
        raise ValueError(
            f"{call}: matvec must return a tree like {name}, {_describe(like)}, and returned "
            f"{_describe(result)}"
        )
    return flat, lambda v: ravel_pytree(traced(unravel(v)))[0], unravel


def _arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)


def _floats(call: str, name: str, tree: PyTree) -> PyTree:
    """The tree as arrays without weak types, if it is one of floats."""
    structure: Any
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    if not paths:
        raise ValueError(f"{call}: {name} has no arrays in it")
    leaves = [jnp.asarray(x) for _, x in paths]
    for (path, _), leaf in zip(paths, leaves):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise TypeError(f"{call}: {where} is {leaf.dtype}; there are derivatives in real floats only")
    return structure.unflatten([jnp.asarray(x, x.dtype) for x in leaves])


def _like(call: str, name: str, tree: PyTree, like: PyTree) -> PyTree:
    """The tree in the dtypes of the other, if it has its structure and shapes."""
    found: Any = jax.tree.structure(tree)
    wanted: Any = jax.tree.structure(like)
    if found != wanted:
        raise ValueError(f"{call}: {name} has the tree structure {found}, params has {wanted}")
    paths, _ = jax.tree_util.tree_flatten_with_path(like)
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    for (path, w), x in zip(paths, leaves):
        where = f"{call}: {name} at params{jax.tree_util.keystr(path)}"
        if x.shape != w.shape:
            raise ValueError(f"{where} has shape {list(x.shape)}; the parameters have {list(w.shape)}")
        if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
            raise TypeError(f"{where} is {x.dtype}; it must hold real numbers")
    return wanted.unflatten([x.astype(w.dtype) for x, (_, w) in zip(leaves, paths)])


def _count(call: str, data: PyTree) -> int:
    """``n``, the common leading axis of the data."""
    shapes = [list(np.shape(x)) for x in jax.tree.leaves(data)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    n = min(counts, default=0)
    if n == 0 or len(counts) > 1:
        raise ValueError(
            f"{call}: the arrays in data have the shapes {shapes}; their leading axis must be the examples, at "
            "least one and as many in each. Close over what is the same for all examples"
        )
    return n


def _by_example(call: str, outputs: PyTree, n: int) -> None:
    if any(x.shape[:1] != (n,) for x in jax.tree.leaves(outputs)):
        raise ValueError(
            f"{call}: for {n} examples apply(params, inputs) must return outputs with a leading axis of "
            f"{n}, and returned {_describe(outputs)}"
        )


def _check_chunk(call: str, chunk: int | None) -> None:
    if chunk is not None:
        _check_whole(call, "chunk", chunk, 1, None)


def _check_whole(call: str, name: str, value: Any, least: int, most: int | None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limit = "" if most is None else f" and at most {most}, the number of parameters"
        raise ValueError(f"{call}: {name} must be a whole number of at least {least}{limit}")


def _call(start: str, chunk: int | None) -> str:
    return f"{start})" if chunk is None else f"{start}, chunk={chunk!r})"


def _shapes(tree: PyTree) -> Any:
    """What two trees have in common that may be added."""
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _describe(tree: PyTree) -> str:
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree))
