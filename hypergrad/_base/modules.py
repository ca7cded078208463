"""Modules as parameters: objects that hold arrays to be trained beside everything else.

A module is a node of a pytree that is no container of Python's: an Equinox module, a Flax NNX module, a
dataclass registered with JAX.  Of a module, arrays of floats are trained, and all else is static.  Of an
NNX module, variables of type ``nnx.Param`` are trained, and all others (``BatchStat``, random streams,
counters) are state, which calls of the module change.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._base.checks import is_function
from hypergrad._base.trees import PyTree


class Opened(NamedTuple):
    """Parameters taken apart.

    Attributes:
      params: the arrays to be trained; in the places of what is static there is None.
      close: from such arrays, and the state of the module if it has one, to the user's object.
      like: from a tree that may be shaped like the user's object to one shaped like `params`.
      state: what calls of the module change; None if the module cannot change.
      state_of: from a module to its state.
    """

    params: PyTree
    close: Callable[..., PyTree]
    like: Callable[[PyTree], PyTree]
    state: PyTree = None
    state_of: Callable[[PyTree], PyTree] = lambda module: None


def opened(call: str, params: PyTree) -> Opened:
    """Take parameters apart; those that are plain trees of arrays stay as they are.

    Args:
      call: the user's call, for messages.
      params: a tree of arrays, a module, or a tree that has modules in it.

    Raises:
      TypeError: an NNX module is one of several things in a tree.
    """
    nnx = sys.modules.get("flax.nnx")  # no object is one of its modules before it has been imported
    if nnx is not None:
        if isinstance(params, nnx.Module):
            return _opened_nnx(nnx, params)
        if any(isinstance(x, nnx.Module) for x in jax.tree.leaves(params, is_leaf=_is_module)):
            raise TypeError(
                f"{call}: params is a {type(params).__name__} with an NNX module in it; make the whole one "
                "nnx.Module, with the others as its attributes (other arrays as nnx.Param), and pass that"
            )
    if any(map(_is_module, jax.tree.leaves(params, is_leaf=_is_module))):
        return _opened_tree(params)
    return Opened(params, lambda arrays: arrays, lambda tree: tree)


def _is_module(x: Any) -> bool:
    """Whether a node of a tree is a module."""
    if isinstance(x, dict | list | tuple | Mapping) or x is None or is_function(x):
        return False
    return not jax.tree_util.all_leaves([x])


def _opened_tree(params: PyTree) -> Opened:
    """A tree with modules in it, in which only what is in a module may be static."""
    nodes = jax.tree.leaves(params, is_leaf=_is_module)
    flags: list[bool] = []
    full: Any
    for node in nodes:
        flags += map(_is_trained, jax.tree.leaves(node)) if _is_module(node) else [True]
    leaves, full = jax.tree.flatten(params)
    static = [x for x, flag in zip(leaves, flags) if not flag]

    def only_trained(tree: PyTree) -> PyTree:
        return full.unflatten([x if flag else None for x, flag in zip(jax.tree.leaves(tree), flags)])

    def close(arrays: PyTree) -> PyTree:
        moving, rest = iter(jax.tree.leaves(arrays)), iter(static)
        return full.unflatten([next(moving) if flag else next(rest) for flag in flags])

    def like(tree: PyTree) -> PyTree:
        return only_trained(tree) if jax.tree.structure(tree) == full else tree

    return Opened(only_trained(params), close, like)


def _is_trained(x: Any) -> bool:
    """Whether a leaf of a module is an array of floats, which is trained."""
    return isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.inexact)


def _opened_nnx(nnx: Any, module: Any) -> Opened:
    """An NNX module; a variable that it has in several places is trained as one."""
    graph, params, state = nnx.split(module, nnx.Param, ...)

    own = [path for path, _ in nnx.to_flat_state(params)]

    def like(tree: PyTree) -> PyTree:
        if not isinstance(tree, nnx.Module):
            return tree
        found = dict(nnx.to_flat_state(nnx.state(tree, nnx.Param)))
        return nnx.from_flat_state({path: found[path] for path in own})

    def close(params: PyTree, state: PyTree = state) -> Any:
        return nnx.merge(graph, params, state)

    def state_of(module: Any) -> PyTree:
        return nnx.split(module, nnx.Param, ...)[2]

    return Opened(params, close, like, state if jax.tree.leaves(state) else None, state_of)
