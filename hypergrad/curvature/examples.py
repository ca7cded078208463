"""Gradients of single examples, and their moments."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hypergrad._base.checks import called
from hypergrad._base.tracing import mapped
from hypergrad._base.trees import PyTree, Scalar
from hypergrad.curvature.chunks import (
    as_batch,
    count_of,
    example_arguments,
    example_loss,
    example_losses,
    mean_over,
    pieces_of,
)


class PerExample(NamedTuple):
    """Losses, gradients and Hessian-vector products of every example.

    Attributes:
      loss: ``f_i``, ``(n,)``.
      gradient: ``g_i``, a tree like the parameters whose arrays have the examples as leading axis.
      hvp: ``h_i``, a tree like the gradient; None without a direction.
    """

    loss: Float[Array, " n"]
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
      loss: ``loss(params, *data) -> scalar``, which receives one example at a time, as a batch of one.
      params: ``w``, a pytree of floats.
      data: pytrees of arrays with the examples as leading axis.
      direction: ``δ``, a tree like the parameters; None for no products.
      chunk: examples at a time, at least 1; by default all at once.  In any case the result takes ``n``
        times the memory of the parameters; see `moments`.

    Returns:
      A `PerExample`.

    Raises:
      ValueError: if an argument is invalid.
      TypeError: if parameters or the loss are not real floats.

    >>> import jax.numpy as jnp
    >>> from hypergrad import curvature
    >>> loss = lambda w, x: jnp.mean(x * w**2)
    >>> curvature.per_example(loss, jnp.float32(2.0), jnp.array([1.0, 3.0]), direction=1.0)
    PerExample(loss=Array([ 4., 12.], dtype=float32), gradient=Array([ 4., 12.], dtype=float32),
    hvp=Array([2., 6.], dtype=float32))
    """
    call = called("per_example(loss, params, *data, direction", chunk)
    params, data, direction = example_arguments(call, params, data, direction, chunk)
    one = example_loss(call, loss, params, data)
    return mapped(chunk, lambda example: _derivatives(one, params, direction, as_batch(example)), data)


class Moment(NamedTuple):
    """Mean over examples, and how far it may be from the mean of their distribution.

    Attributes:
      mean: ``x̄ = 1/n Σ_i x_i``, a tree.
      variance: of the mean, coordinate by coordinate, ``Σ_i (x_i - x̄)² / (n (n - 1))``, a tree; times ``n``
        it is the variance of an example.
      average: scalar, the mean of ``variance`` over all coordinates of the tree.
    """

    mean: PyTree
    variance: PyTree
    average: Scalar


class Moments(NamedTuple):
    """The result of `moments`.

    Attributes:
      loss: moments of ``f_i``, scalars.
      gradient: moments of ``g_i``, trees like the parameters.
      hvp: moments of ``h_i``, trees like the parameters; None without a direction.
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

    ``moments(...).gradient.average`` is ``σ̂ = 1/d Σ_j Σ_i (g_ij - ḡ_j)² / (n (n - 1))``; ``q̂`` of the
    products and ``r̂`` of the losses are the same for these.  There are two passes, one for the mean and one
    for the deviations from it: in float32, ``E x² - (E x)²`` has no correct digit if means are thousands of
    standard deviations.

    Args:
      loss: ``loss(params, *data) -> scalar``, which receives one example at a time, as a batch of one.  The
        examples must not depend on each other, as they do through batch normalization.
      params: ``w``, a pytree of floats.
      data: pytrees of arrays with the examples, at least two, as leading axis.
      direction: ``δ``, a tree like the parameters; None for no products.
      chunk: examples at a time, at least 1, whose gradients are in memory together; by default all at once.
        On CPUs about 16 are also faster than many.

    Returns:
      A `Moments`.

    Raises:
      ValueError: if an argument is invalid.
      TypeError: if parameters or the loss are not real floats.

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
    params, data, direction = example_arguments(call, params, data, direction, chunk)
    n = count_of(call, data)
    if n < 2:
        raise ValueError(f"{call}: data has one example, which has no variance; pass two or more")
    one = example_loss(call, loss, params, data)
    pieces = pieces_of(call, data, chunk)
    at = (params, direction)

    # The mean needs no single gradients: it is the gradient of the mean.
    def mean_loss(w: PyTree, *data: PyTree) -> Array:
        return jnp.mean(example_losses(one, w, data))

    mean = mean_over(pieces, [lambda data: _derivatives(mean_loss, *at, data)] * len(pieces))

    def deviations(data: Sequence[PyTree]) -> PyTree:
        values = jax.vmap(lambda example: _derivatives(one, *at, as_batch(example)))(data)
        return jax.tree.map(lambda x, m: _mean_in_pairs((x - m[None]) ** 2), values, mean)

    variance = jax.tree.map(lambda x: x / (n - 1), mean_over(pieces, [deviations] * len(pieces)))
    f, g, h = (m if m is None else Moment(m, v, _average(v)) for m, v in zip(mean, variance))
    assert f is not None and g is not None
    return Moments(f, g, h)


def _derivatives(loss: Callable[..., Array], w: PyTree, direction: PyTree, data: Any) -> PerExample:
    """Value, gradient and, if there is a direction, Hessian-vector product of a loss."""
    both = jax.value_and_grad(lambda w: loss(w, *data))
    if direction is None:
        return PerExample(*both(w), None)
    (value, gradient), (_, hvp) = jax.jvp(both, (w,), (direction,))
    return PerExample(value, gradient, hvp)


def _mean_in_pairs(rows: Array) -> Array:
    """Mean over the leading axis: half of the rows plus the other half, and so on.

    On CPUs XLA reduces a leading axis number by number, with strides, which is 30 times slower.
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
