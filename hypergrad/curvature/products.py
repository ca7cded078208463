"""Curvature matrices as products with vectors; for symbols see `hypergrad.curvature`."""

from collections.abc import Callable, Sequence

import jax
from jax import Array
from jax.tree_util import Partial

from hypergrad._base.checks import called
from hypergrad._base.rules import linearized
from hypergrad._base.tracing import trace_once
from hypergrad._base.trees import Key, PyTree, describe, floats, shapes_of
from hypergrad.curvature.chunks import (
    as_arrays,
    by_example,
    count_of,
    example_loss,
    example_losses,
    mean_matvec,
    pieces_of,
    scalar_loss,
)
from hypergrad.curvature.likelihoods import Likelihood
from hypergrad.curvature.spectra import Matvec


def hessian(loss: Callable[..., Array], params: PyTree, *data: PyTree, chunk: int | None = None) -> Matvec:
    """The Hessian of a loss, ``v -> ∇²L(w) v``, forward over reverse.

    If the loss contains derivatives written by hand (``jax.custom_vjp``, ``jax.custom_jvp``), the matrix is
    that of ``jax.hessian(loss)``: how the gradient changes along ``v``.  It need not be symmetric; measure
    that with `asymmetry`.

    Args:
      loss: ``loss(params, *data) -> scalar``.
      params: ``w``, where the Hessian is taken; a pytree of floats.
      data: the other arguments of the loss, pytrees of arrays.
      chunk: examples at a time, at least 1, one chunk after the other, to save memory; the last may be
        smaller.  By default all at once, and then the loss need not be a mean over examples.

    Returns:
      A matvec.

    Raises:
      ValueError: if an argument is invalid; from the matvec, if a vector is not like the parameters.
      TypeError: if parameters or the loss are not real floats.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> matvec = curvature.hessian(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]))
    >>> matvec(jnp.array([1.0, 0.0]))
    Array([4., 2.], dtype=float32)
    """
    call = called("hessian(loss, params, *data", chunk)
    params = floats(call, "params", params)
    pieces = pieces_of(call, as_arrays(data), chunk)
    losses = [scalar_loss(call, loss, params, *piece.example()) for piece in pieces]
    return mean_matvec(call, params, pieces, [Partial(_hessian_product, f) for f in losses])


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
    """The generalized Gauss-Newton matrix, ``v -> Jᵀ H J v``, with ``H`` the Hessian of the loss in ``z``.

    Args:
      apply: ``apply(params, inputs) -> outputs``, the network.
      output_loss: ``output_loss(outputs, *targets) -> scalar``; if it is convex, the matrix is positive
        semidefinite.
      params: ``w``, a pytree of floats.
      inputs: of the network, a pytree of arrays.
      targets: the other arguments of the loss, pytrees of arrays.
      chunk: as for `hessian`; the leading axis of inputs, outputs and targets is then the examples.

    Returns:
      A matvec.

    Raises:
      ValueError, TypeError: as for `hessian`.

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
    pieces = pieces_of(call, as_arrays((inputs, *targets)), chunk)
    bodies = []
    for piece in pieces:
        inputs_of, *targets_of = piece.example()
        network, outputs = trace_once(apply, params, inputs_of)
        loss = scalar_loss(call, output_loss, outputs, *targets_of, name="output_loss")
        bodies.append(Partial(_sandwich, Partial(_outputs, network), Partial(_output_hessian, loss)))
    return mean_matvec(call, params, pieces, bodies)


def _sandwich(
    function: Callable[..., PyTree],
    middle: Callable[..., PyTree],
    w: PyTree,
    data: Sequence[PyTree],
    v: PyTree,
) -> PyTree:
    """``Jᵀ M J v``, with the Jacobian of ``function(w, data)`` and with ``middle(data, z, Jv) = M J v``."""
    z, forwards = linearized(lambda w: function(w, data), w)
    return jax.linear_transpose(forwards, w)(middle(data, z, forwards(v)))[0]


def _outputs(network: Callable[..., PyTree], w: PyTree, data: Sequence[PyTree]) -> PyTree:
    return network(w, data[0])


def _output_hessian(loss: Callable[..., Array], data: Sequence[PyTree], z: PyTree, t: PyTree) -> PyTree:
    return jax.jvp(jax.grad(lambda z: loss(z, *data[1:])), (z,), (t,))[1]


def fisher(
    apply: Callable[[PyTree, PyTree], Array],
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree,
    *,
    chunk: int | None = None,
) -> Matvec:
    """The Fisher matrix, ``v -> 1/n Σ_i J_iᵀ F(z_i) J_i v``, with an exact expectation over targets.

    It equals `gauss_newton` for the losses of `categorical`, `bernoulli` and `normal`, whose Hessians in
    the outputs do not depend on the targets.

    Args:
      apply: ``apply(params, inputs) -> outputs``, example by example along the leading axis.
      likelihood: of the targets; ``F(z)`` is ``likelihood.fisher``.
      params: ``w``, a pytree of floats.
      inputs: a pytree of arrays with the examples as leading axis.
      chunk: examples at a time, at least 1; by default all at once.

    Returns:
      A matvec.

    Raises:
      ValueError, TypeError: as for `hessian`.

    Source: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> apply, x = lambda w, x: x[:, None] * w[None], jnp.array([1.0, 3.0])
    >>> curvature.fisher(apply, curvature.normal(), jnp.zeros(1), x)(jnp.ones(1))
    Array([5.], dtype=float32)
    """
    call = called("fisher(apply, likelihood, params, inputs", chunk)
    params = floats(call, "params", params)
    data = as_arrays((inputs,))
    count_of(call, data)
    pieces, bodies = pieces_of(call, data, chunk), []
    for piece in pieces:
        network, outputs = trace_once(apply, params, *piece.example())
        by_example(call, outputs, count_of(call, piece.example()))
        middle, products = trace_once(jax.vmap(likelihood.fisher), outputs, outputs)
        if shapes_of(products) != shapes_of(outputs):
            raise ValueError(
                f"{call}: for outputs {describe(outputs)}, example by example, likelihood.fisher(outputs, "
                f"tangent) must return the same, and returned {describe(products)}"
            )
        bodies.append(Partial(_sandwich, Partial(_outputs, network), Partial(_output_fisher, middle)))
    return mean_matvec(call, params, pieces, bodies)


def _output_fisher(product: Callable[..., PyTree], data: PyTree, z: PyTree, t: PyTree) -> PyTree:
    n = count_of("", data)
    return jax.tree.map(lambda x: x / n, product(z, t))


def sampled_fisher(
    apply: Callable[[PyTree, PyTree], Array],
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree,
    key: Key,
    *,
    chunk: int | None = None,
) -> Matvec:
    """The Fisher matrix from one target drawn for each example, ``v -> 1/n Σ_i g_i g_iᵀ v``.

    Here ``g_i`` is the gradient of the loss at ``y_i ~ p(y | z_i)``.  The expectation over the key is
    `fisher`.  The targets are the same in every product and for every chunk; derivatives take them as
    constants.

    Args:
      apply: as for `fisher`.
      likelihood: of the targets, which ``likelihood.sample`` draws.
      params: ``w``, a pytree of floats.
      inputs: a pytree of arrays with the examples as leading axis.
      key: a JAX random key.
      chunk: examples at a time, at least 1; by default all at once.

    Returns:
      A matvec.

    Raises:
      ValueError, TypeError: as for `hessian`.

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
    data = as_arrays((inputs,))
    data = (*data, jax.random.split(key, count_of(call, data)))  # by example: the same for every chunk

    def losses(w: PyTree, inputs: PyTree, keys: Array) -> Array:
        z = apply(w, inputs)
        by_example(call, z, keys.shape[0])
        y = jax.vmap(likelihood.sample)(keys, jax.lax.stop_gradient(z))
        return jax.vmap(likelihood.loss)(z, y)

    pieces, bodies = pieces_of(call, data, chunk), []
    for piece in pieces:
        traced, found = trace_once(losses, params, *piece.example())
        n = count_of(call, piece.example())
        if [x.shape for x in jax.tree.leaves(found)] != [(n,)]:
            raise ValueError(
                f"{call}: likelihood.loss(outputs, target) must return one scalar for an example, and for "
                f"{n} examples returned {describe(found)}"
            )
        bodies.append(Partial(_sandwich, Partial(_spread, traced), _mean_square))
    return mean_matvec(call, params, pieces, bodies)


def _spread(function: Callable[..., PyTree], w: PyTree, data: Sequence[PyTree]) -> PyTree:
    return function(w, *data)


@Partial
def _mean_square(data: PyTree, losses: Array, t: Array) -> Array:
    return t / losses.shape[0]


def empirical_fisher(
    loss: Callable[..., Array], params: PyTree, *data: PyTree, chunk: int | None = None
) -> Matvec:
    """The second moment of the examples' gradients at their own targets, ``v -> 1/n Σ_i g_i g_iᵀ v``.

    It is not an estimate of `fisher`, despite its name.

    Args:
      loss: ``loss(params, *data) -> scalar``, which receives one example at a time, as a batch of one.
      params: ``w``, a pytree of floats.
      data: pytrees of arrays with the examples as leading axis.
      chunk: examples at a time, at least 1; by default all at once.

    Returns:
      A matvec.

    Raises:
      ValueError, TypeError: as for `hessian`.

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
    data = as_arrays(data)
    count_of(call, data)
    body = Partial(_sandwich, Partial(example_losses, example_loss(call, loss, params, data)), _mean_square)
    pieces = pieces_of(call, data, chunk)
    return mean_matvec(call, params, pieces, [body] * len(pieces))
