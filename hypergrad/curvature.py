"""Curvature without matrices: Hessian, Gauss-Newton and Fisher products, and what they tell.

A *matvec* is a linear function of trees like the parameters, ``v -> A v``.  It is compiled when it is first
called; it is a pytree of the arrays inside it, so that compiled functions take it as an argument and
derivatives go through it.  Functions of the user are traced when the matvec is made, not when it is called:
where parameters change from step to step, make it inside the function that is compiled, as in
``jax.jit(lambda w, v: hessian(loss, w, x)(v))``.

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
========  ====================  ====================================================================

A loss is a function ``loss(params, *data) -> scalar``, the *mean* over examples, which are the leading axis
of every array in ``data``: of all examples, of a chunk of them or, given a single row, of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from hypergrad import nets
from hypergrad.rules import linearized
from hypergrad.spectra import (
    Matvec,
    PyTree,
    Ritz,
    Spectrum,
    Trace,
    asymmetry,
    batched,
    called,
    check_chunk,
    dense,
    density,
    describe,
    floats,
    lanczos,
    mapped,
    shapes_of,
    spectrum,
    trace,
    trace_once,
)

__all__ = [
    "Likelihood",
    "Matvec",
    "Moment",
    "Moments",
    "PerExample",
    "Ritz",
    "Spectrum",
    "Trace",
    "asymmetry",
    "batched",
    "bernoulli",
    "categorical",
    "dense",
    "density",
    "empirical_fisher",
    "fisher",
    "gauss_newton",
    "hessian",
    "lanczos",
    "moments",
    "normal",
    "per_example",
    "sampled_fisher",
    "spectrum",
    "trace",
]

# ---- matvecs


def hessian(loss: Callable[..., Array], params: PyTree, *data: PyTree, chunk: int | None = None) -> Matvec:
    """The Hessian of a loss, ``v -> ∇²L(w) v``, forward over reverse.

    With derivatives written by hand in the loss (``jax.custom_vjp``, ``jax.custom_jvp``), it is the matrix
    ``jax.hessian(loss)`` as it is, how a gradient changes along ``v``, which need not be symmetric:
    `asymmetry` tells.

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
    call = called("hessian(loss, params, *data", chunk)
    params = floats(call, "params", params)
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
    call = called("gauss_newton(apply, output_loss, params, inputs, *targets", chunk)
    params = floats(call, "params", params)
    pieces = _pieces(call, _arrays((inputs, *targets)), chunk)
    bodies = []
    for piece in pieces:
        inputs_of, *targets_of = piece.example()
        network, outputs = trace_once(apply, params, inputs_of)
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
    z, forwards = linearized(lambda w: function(w, data), w)
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

    Source: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> apply, x = lambda w, x: x[:, None] * w[None], jnp.array([1.0, 3.0])
    >>> curvature.fisher(apply, curvature.normal(), jnp.zeros(1), x)(jnp.ones(1))
    Array([5.], dtype=float32)
    """
    call = called("fisher(apply, likelihood, params, inputs", chunk)
    params = floats(call, "params", params)
    data = _arrays((inputs,))
    _count(call, data)
    pieces, bodies = _pieces(call, data, chunk), []
    for piece in pieces:
        network, outputs = trace_once(apply, params, *piece.example())
        _by_example(call, outputs, _count(call, piece.example()))
        middle, products = trace_once(jax.vmap(likelihood.fisher), outputs, outputs)
        if shapes_of(products) != shapes_of(outputs):
            raise ValueError(
                f"{call}: for outputs {describe(outputs)}, example by example, likelihood.fisher(outputs, "
                f"tangent) must return the same, and returned {describe(products)}"
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
    call = called("sampled_fisher(apply, likelihood, params, inputs, key", chunk)
    params = floats(call, "params", params)
    data = _arrays((inputs,))
    data = (*data, jax.random.split(key, _count(call, data)))  # by example: the same whatever the chunk

    def losses(w: PyTree, inputs: PyTree, keys: Array) -> Array:
        z = apply(w, inputs)
        _by_example(call, z, keys.shape[0])
        y = jax.vmap(likelihood.sample)(keys, jax.lax.stop_gradient(z))
        return jax.vmap(likelihood.loss)(z, y)

    pieces, bodies = _pieces(call, data, chunk), []
    for piece in pieces:
        traced, found = trace_once(losses, params, *piece.example())
        n = _count(call, piece.example())
        if [x.shape for x in jax.tree.leaves(found)] != [(n,)]:
            raise ValueError(
                f"{call}: likelihood.loss(outputs, target) must return one scalar for an example, and for "
                f"{n} examples returned {describe(found)}"
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
    call = called("empirical_fisher(loss, params, *data", chunk)
    params = floats(call, "params", params)
    data = _arrays(data)
    _count(call, data)
    body = Partial(_sandwich, Partial(_losses, _example_loss(call, loss, params, data)), _mean_square)
    pieces = _pieces(call, data, chunk)
    return _matvec(call, params, pieces, [body] * len(pieces))


def _losses(loss: Callable[..., Array], w: PyTree, data: Sequence[PyTree]) -> Array:
    """``(n,)`` losses of examples."""
    return jax.vmap(lambda example: loss(w, *_as_batch(example)))(data)


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
    call = called("per_example(loss, params, *data, direction", chunk)
    params, data, direction = _example_arguments(call, params, data, direction, chunk)
    one = _example_loss(call, loss, params, data)
    return mapped(chunk, lambda example: _derivatives(one, params, direction, _as_batch(example)), data)


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
        On CPUs some 16 are also faster than many.

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
    call = called("moments(loss, params, *data, direction", chunk)
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

    def deviations(data: Sequence[PyTree]) -> PyTree:
        values = jax.vmap(lambda example: _derivatives(one, *at, _as_batch(example)))(data)
        return jax.tree.map(lambda x, m: _mean_in_pairs((x - m[None]) ** 2), values, mean)

    variance = jax.tree.map(lambda x: x / (n - 1), _mean(pieces, [deviations] * len(pieces)))
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


def _mean_in_pairs(rows: Array) -> Array:
    """Mean over the leading axis: half of the rows plus the other half, and so on.

    On CPUs XLA reduces a leading axis number by number, with strides, 30 times slower.
    """
    n, left = len(rows), []
    while len(rows) > 1:
        half, odd = divmod(len(rows), 2)
        left += [rows[-1]] * odd
        rows = rows[:half] + rows[half : 2 * half]
    return sum(left, rows[0]) / n


def _average(tree: PyTree) -> Array:
    """Mean of all numbers in a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(jnp.sum(x) for x in leaves) / sum(x.size for x in leaves)


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
    check_chunk(call, chunk)
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


# ---- tracing and checks


def _scalar_loss(call: str, loss: Callable[..., Array], *arguments: PyTree, name: str = "loss") -> Any:
    traced, result = trace_once(loss, *arguments)
    if not (isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()):
        raise ValueError(
            f"{call}: {name} must return one scalar, the mean over examples, and returned "
            f"{describe(result)}"
        )
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(f"{call}: {name} must return a real float, and returned {describe(result)}")
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
    check_chunk(call, chunk)
    params, data = floats(call, "params", params), _arrays(data)
    _count(call, data)
    if direction is not None:
        direction = _like(call, "direction", direction, params)
    return params, data, direction


def _arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)


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
            f"{call}: the arrays in data have the shapes {shapes}; their leading axis must be the examples "
            "(at least one, and as many in each). Close over what is the same for all examples"
        )
    return n


def _by_example(call: str, outputs: PyTree, n: int) -> None:
    if any(x.shape[:1] != (n,) for x in jax.tree.leaves(outputs)):
        raise ValueError(
            f"{call}: for {n} examples apply(params, inputs) must return outputs with a leading axis of "
            f"{n}, and returned {describe(outputs)}"
        )
