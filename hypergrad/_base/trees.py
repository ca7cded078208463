"""Trees of arrays: norms of numbers of any size, shapes in words, and parts taken out and put back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int
from jaxtyping import Key as KeyArray

from hypergrad._base.dtypes import promoted

PyTree = Any

# Arrays of one number.
Scalar = Float[Array, ""]
Step = Int[Array, ""]  # the number of a step
Flag = Bool[Array, ""]
Key = KeyArray[Array, ""]  # of `jax.random`

# For products of matrices: an accelerator's default keeps too few digits for roots, solutions and
# derivatives.
dot = partial(jnp.matmul, precision="highest")
einsum = partial(jnp.einsum, precision="highest")
tensordot = partial(jnp.tensordot, precision="highest")


def power(tree: PyTree) -> Array:
    """A power of two near the largest size of a number in a tree; 1 where that is 0 or not finite.

    Dividing by it is exact, so that results for numbers of ordinary size stay the same bit for bit.  It
    counts as a constant in differentiation.

    >>> import jax.numpy as jnp
    >>> float(power({"a": jnp.array([3.0, -5.0]), "b": jnp.zeros(0)}))
    8.0
    """
    leaves = [jax.lax.stop_gradient(x) for x in jax.tree.leaves(tree)]
    dtype = promoted(*leaves)
    sizes = [jnp.max(jnp.abs(x)).astype(dtype) for x in leaves if x.size]
    if not sizes:
        return jnp.ones((), dtype)
    largest = jnp.max(jnp.stack(sizes))
    usable = (largest > 0) & jnp.isfinite(largest)
    # Beyond this its inverse, and the squares of what is divided by it, would themselves be at the limit.
    most = int(0.78 * jnp.finfo(dtype).maxexp)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 0.5))
    return jnp.ldexp(jnp.ones((), dtype), jnp.clip(exponent, -most, most))


def norm(tree: PyTree) -> Array:
    """``√Σ x²`` over all numbers of a tree, whose derivative at 0 is 0.

    >>> import jax, jax.numpy as jnp
    >>> [float(f"{norm(jnp.array([3.0, 4.0]) * size):.6g}") for size in (1e-30, 1.0, 1e30)]
    [5e-30, 5.0, 5e+30]
    >>> jax.grad(norm)(jnp.array([3e25, 4e25]))
    Array([0.6, 0.8], dtype=float32)
    """
    scale = power(tree)
    parts = [jnp.ravel(x / scale.astype(x.dtype)) for x in jax.tree.leaves(tree)]
    squares = sum(jnp.sum(x * x).astype(scale.dtype) for x in parts)
    zero = squares == 0
    return scale * jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def real_parts(x: Array) -> list[Array]:
    """The real numbers of an array: itself, or real and imaginary parts."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def of_real_parts(parts: Sequence[Array]) -> Array:
    """Undo `real_parts`."""
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)


def floats(call: str, name: str, tree: PyTree) -> PyTree:
    """The tree as arrays without weak types; refused if it is not one of floats."""
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


def shapes_of(tree: PyTree) -> Any:
    """The structure, shapes and types of a tree, which two trees share if they can be added."""
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def describe(tree: PyTree) -> str:
    """Types and shapes of the arrays in a tree, for messages."""
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree))


def finite_squares(tree: PyTree) -> Flag:
    """Whether the sum of the squares of every array is finite, and therefore all its elements."""
    rows = [x.reshape(-1) if x.ndim < 2 else x for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack([jnp.isfinite(jnp.sum(jnp.einsum("...i,...i->...", x, x))) for x in rows]))


def sub(a: PyTree, b: PyTree) -> PyTree:
    """``a - b``."""
    return jax.tree.map(jnp.subtract, a, b)


def scatter(flags: PyTree, values: Sequence[Array]) -> PyTree:
    """A tree like the flags, with the values where they are set and None, meaning zero, elsewhere."""
    new = iter(values)
    return jax.tree.map(lambda flag: next(new) if flag else None, flags)


def split(flags: PyTree, tree: PyTree) -> tuple[list[Array], Callable[[Sequence[Array]], PyTree]]:
    """The flagged leaves of a tree, and a function that puts replacements for them back."""
    leaves: list[Array]
    leaves, structure = jax.tree.flatten(tree)
    chosen = jax.tree.leaves(flags)

    def merge(replaced: Sequence[Array]) -> PyTree:
        new = iter(replaced)
        return jax.tree.unflatten(structure, [next(new) if c else x for c, x in zip(chosen, leaves)])

    return [x for c, x in zip(chosen, leaves) if c], merge
