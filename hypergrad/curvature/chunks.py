"""Means over examples, computed in chunks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from hypergrad._base.checks import check_chunk
from hypergrad._base.tracing import trace_once
from hypergrad._base.trees import PyTree, describe, floats
from hypergrad.curvature.spectra import Matvec


def example_losses(loss: Callable[..., Array], w: PyTree, data: Sequence[PyTree]) -> Array:
    """Losses of single examples, ``(n,)``."""
    return jax.vmap(lambda example: loss(w, *as_batch(example)))(data)


@partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["share", "stacked"])
@dataclass(frozen=True)
class Piece:
    """Part of the data.

    Attributes:
      data: of one chunk or, if stacked, of several of one size along a new leading axis.
      share: the part of all examples that a chunk holds, in (0, 1].
      stacked: whether there are several chunks.
    """

    data: Any
    share: float
    stacked: bool

    def example(self) -> Any:
        """Shapes of a chunk."""
        drop = 1 if self.stacked else 0
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[drop:], x.dtype), self.data)


def pieces_of(call: str, data: PyTree, chunk: int | None) -> list[Piece]:
    """Cut data into chunks: those of full size, and the last if it is smaller.

    Args:
      call: the user's call, for messages.
      data: pytree of arrays with the examples as leading axis.
      chunk: examples of a chunk; None for all at once.
    """
    check_chunk(call, chunk)
    if chunk is None:
        return [Piece(data, 1.0, False)]
    n = count_of(call, data)
    chunk = min(chunk, n)
    full, rest = divmod(n, chunk)
    end = n - rest
    stack = jax.tree.map(lambda x: x[:end].reshape(full, chunk, *x.shape[1:]), data)
    pieces = [Piece(stack, chunk / n, True)]
    if rest:
        pieces.append(Piece(jax.tree.map(lambda x: x[end:], data), rest / n, False))
    return pieces


def mean_over(pieces: Sequence[Piece], functions: Sequence[Callable[[PyTree], PyTree]]) -> PyTree:
    """The mean over all examples, from means over chunks.

    Args:
      pieces: of the data.
      functions: one for each piece, from a chunk to a tree of means over it.
    """
    total = None
    for piece, function in zip(pieces, functions):

        def shared(data: PyTree, piece: Piece = piece, function: Any = function) -> PyTree:
            return jax.tree.map(lambda x: piece.share * x, function(data))

        if not piece.stacked:
            new = shared(piece.data)
            total = new if total is None else jax.tree.map(jnp.add, total, new)
            continue
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(shared, piece.example()))

        # In reverse mode a chunk is computed again rather than kept.
        @partial(jax.checkpoint, prevent_cse=False)
        def add(total: PyTree, data: PyTree, shared: Any = shared) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, shared(data)), None

        total, _ = jax.lax.scan(add, zero, piece.data)
    return total


def mean_matvec(
    call: str, params: PyTree, pieces: Sequence[Piece], bodies: Sequence[Callable[..., PyTree]]
) -> Matvec:
    """The matvec whose product with a vector is the mean over chunks of ``body(params, chunk, vector)``.

    Args:
      call: the user's call, for messages.
      params: where the matvec is taken.
      pieces: of the data.
      bodies: one for each piece.
    """

    @jax.jit
    def product(params: PyTree, pieces: Any, bodies: Any, vector: PyTree) -> PyTree:
        vector = _like(f"matvec = {call}; matvec(vector)", "the vector", vector, params)
        return mean_over(pieces, [partial(_at, body, params, vector) for body in bodies])

    return Partial(product, params, pieces, bodies)


def _at(body: Callable[..., PyTree], params: PyTree, vector: PyTree, data: PyTree) -> PyTree:
    return body(params, data, vector)


def scalar_loss(call: str, loss: Callable[..., Array], *arguments: PyTree, name: str = "loss") -> Any:
    """The loss, traced once; refused if it does not return one real float.

    Args:
      call: the user's call, for messages.
      loss: from the arguments to a scalar.
      arguments: arrays, or their shapes, on which the loss is traced.
      name: of the loss, for messages.
    """
    traced, result = trace_once(loss, *arguments)
    if not (isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()):
        raise ValueError(
            f"{call}: {name} must return one scalar, the mean over examples, and returned "
            f"{describe(result)}"
        )
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(f"{call}: {name} must return a real float, and returned {describe(result)}")
    return traced


def example_loss(call: str, loss: Callable[..., Array], params: PyTree, data: PyTree) -> Any:
    """The loss traced on a batch of one."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), data)
    return scalar_loss(call, loss, params, *one)


def as_batch(example: PyTree) -> PyTree:
    """An example as a batch of one."""
    return jax.tree.map(lambda x: x[None], example)


def example_arguments(
    call: str, params: PyTree, data: PyTree, direction: PyTree, chunk: int | None
) -> tuple[PyTree, PyTree, PyTree]:
    """Parameters, data and direction, checked and in the dtypes that derivatives need."""
    check_chunk(call, chunk)
    params, data = floats(call, "params", params), as_arrays(data)
    count_of(call, data)
    if direction is not None:
        direction = _like(call, "direction", direction, params)
    return params, data, direction


def as_arrays(tree: PyTree) -> PyTree:
    """Every leaf as an array."""
    return jax.tree.map(jnp.asarray, tree)


def _like(call: str, name: str, tree: PyTree, like: PyTree) -> PyTree:
    """The tree in the dtypes of ``like``; refused if structure or shapes differ."""
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


def count_of(call: str, data: PyTree) -> int:
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


def by_example(call: str, outputs: PyTree, n: int) -> None:
    """Refuse outputs whose leading axis is not the examples."""
    if any(x.shape[:1] != (n,) for x in jax.tree.leaves(outputs)):
        raise ValueError(
            f"{call}: for {n} examples apply(params, inputs) must return outputs with a leading axis of "
            f"{n}, and returned {describe(outputs)}"
        )
