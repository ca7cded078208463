"""What `hypergrad.train` is given: checked, and made into what a run consists of."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad.program import PARAMS, Leaf, Optimizer, Whole, with_defaults
from hypergrad.run import PyTree, kept, widened

STEP, EXACT = "step", "exact"  # what a state tells besides the optimizer's variables


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of an array, as JAX would see it, also a NumPy array or a number."""
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def describe(tree: PyTree) -> str:
    """What something is, in words for a message."""
    if isinstance(tree, jax.ShapeDtypeStruct):
        return f"{tree.dtype}{list(tree.shape)}"
    return f"a {type(tree).__name__}"


def checked_steps(call: str, steps: Any) -> int:
    """The number of steps, a whole one."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"{call}: steps must be a whole number of at least 1")
    return int(steps)


def check_scalar(call: str, result: PyTree) -> None:
    """Refuse a loss that does not return one float."""
    if not (isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()):
        raise ValueError(f"{call}: the loss must return one scalar, and returned {describe(result)}")
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(f"{call}: the loss must return a float, and returned {describe(result)}")


def flat_params(call: str, params: PyTree) -> tuple[list[Array], Any, list[str]]:
    """Leaves of the parameters, their structure and the path of every leaf."""
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    if not paths:
        raise ValueError(f"{call}: params has no arrays in it")
    names = ["params" + jax.tree_util.keystr(path) for path, _ in paths]
    leaves = [jnp.asarray(x) for _, x in paths]
    for name, leaf in zip(names, leaves):
        if leaf.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"{call}: {name} is {leaf.dtype}; hypergradients of a whole run are noise below float32, "
                "and integers have none. Pass float32 or float64 parameters (the loss may compute in "
                "lower precision inside)"
            )
    return leaves, structure, names


def flat_hypers(
    call: str,
    optimizer: Optimizer | Whole,
    hypers: Mapping[str, PyTree],
    params: PyTree,
    leaves: list[Array],
    names: list[str],
    steps: int,
) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """For every leaf of the parameters its constant and its scheduled hyperparameters.

    What is known stays a NumPy array, so that adjoints can compute with it before the run, even under
    ``jit``.
    """
    if not isinstance(hypers, Mapping):
        raise ValueError(
            f"{call}: hypers must be a dictionary with the names {list(optimizer.hypers)}, "
            f"not a {type(hypers).__name__}"
        )
    complete = with_defaults(call, optimizer, hypers)
    if isinstance(optimizer, Whole):  # takes numbers: the same for all parameters
        params, leaves, names = 0, [jnp.zeros((), leaves[0].dtype)], ["all parameters"]
    fixed: list[dict[str, Array]] = [{} for _ in leaves]
    scheduled: list[dict[str, Array]] = [{} for _ in leaves]
    for key, given in complete.items():
        value = jax.tree.map(_plain_array, given)
        try:
            spread = jax.tree.leaves(jax.tree.broadcast(value, params))
        except ValueError as error:
            raise ValueError(
                f"{call}: hypers[{key!r}] must be one number or array, or a tree of them that is a "
                f"prefix of params: {error}"
            ) from None
        for i, (x, leaf, name) in enumerate(zip(spread, leaves, names)):
            where = f"{call}: hypers[{key!r}] for {name}"
            known = not isinstance(x, jax.core.Tracer)
            if not jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jnp.complexfloating):
                raise ValueError(f"{where} is {x.dtype}; it must be a real number")
            if known:
                dtype = x.dtype if x.dtype in (np.float32, np.float64) and np.ndim(x) else leaf.dtype
                x = np.asarray(x, jax.dtypes.canonicalize_dtype(dtype))
                _check_domain(where, x, optimizer.domains.get(key))
            if x.ndim == 0:
                fixed[i][key] = x
                continue
            if x.shape[0] not in (1, steps):
                raise ValueError(
                    f"{where} has shape {list(x.shape)}; a schedule's leading axis is the step and must "
                    f"have length steps={steps} (or 1, for the same at every step)"
                )
            try:
                fits = np.broadcast_shapes(x.shape[1:], leaf.shape) == leaf.shape
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(
                    f"{where} has shape {list(x.shape)}; behind the step axis it must broadcast to the "
                    f"leaf's {list(leaf.shape)}"
                )
            if x.shape[0] == steps:
                scheduled[i][key] = x
            else:
                fixed[i][key] = x[0]
    return fixed, scheduled


def _plain_array(x: Any) -> Any:
    """What is known as a NumPy array; what is traced without the weak type of a Python number."""
    return widened(jnp.asarray(x, x.dtype)) if isinstance(x, jax.core.Tracer) else np.asarray(x)


def _check_domain(where: str, x: np.ndarray, domain: tuple[float, float] | None) -> None:
    low, high = (-np.inf, np.inf) if domain is None else domain
    wrong = ~((x >= low) & (x < high))
    if wrong.any():
        place = [int(i) for i in np.argwhere(wrong)[0]]
        at = f" at index {place}" if place else ""
        raise ValueError(f"{where} is {x[tuple(place)]}{at}; it must lie in [{low:g}, {high:g})")


def start_of(
    call: str,
    optimizer: Optimizer,
    state: Mapping[str, PyTree] | None,
    leaves: list[Array],
    structure: Any,
    labels: tuple[str, ...] | None,
) -> list[Leaf]:
    """Float variables of every leaf at the start, by name."""
    state = {} if state is None else state
    unknown = sorted(set(state) - {*optimizer.variables, STEP, EXACT})
    if unknown:
        raise ValueError(f"{call}: state has {unknown}; {optimizer.name} keeps {list(optimizer.variables)}")

    def begin(name: str, i: int, leaf: Array) -> Array:
        own = labels is None or name in optimizer.labels.variables[labels[i]]  # type: ignore[union-attr]
        return optimizer.variables[name].init(leaf) if own else jnp.zeros(0, leaf.dtype)

    start: list[Leaf] = [{PARAMS: leaf} for leaf in leaves]
    for name in optimizer.variables:
        given = None
        if name in state:
            given, other = jax.tree.flatten(state[name])
            if other != structure:
                raise ValueError(
                    f"{call}: state[{name!r}] has the tree structure {other}, params has {structure}"
                )
        for i, leaf in enumerate(leaves):
            if given is None:
                start[i][name] = begin(name, i, leaf)
                continue
            default = jax.eval_shape(partial(begin, name, i), leaf)
            if np.shape(given[i]) != default.shape:
                raise ValueError(
                    f"{call}: state[{name!r}] has a leaf of shape {list(np.shape(given[i]))} where "
                    f"{list(default.shape)} is needed"
                )
            start[i][name] = jnp.asarray(given[i], default.dtype)
    return start


def continued(call: str, state: Mapping[str, PyTree] | None) -> tuple[Any, PyTree]:
    """The step at which a state was left, and the integers behind it."""
    state = {} if state is None else state
    first = state.get(STEP, 0)
    if np.shape(first) != () or not jnp.issubdtype(jnp.result_type(first), jnp.integer):
        raise ValueError(f"{call}: state[{STEP!r}] must be the number of steps made before, one integer")
    known = not isinstance(first, jax.core.Tracer)
    return np.int32(first) if known else first.astype(jnp.int32), state.get(EXACT)


def labels_of(
    call: str, optimizer: Optimizer | Whole, params: PyTree, leaves: Sequence[Array]
) -> tuple[str, ...] | None:
    """The labels of the leaves, where the optimizer has a program for each label."""
    if isinstance(optimizer, Whole) or optimizer.labels is None:
        return None
    labels = tuple(optimizer.labels.of(params))
    unknown = sorted({str(label) for label in labels} - set(optimizer.labels.variables))
    if unknown or len(labels) != len(leaves):
        raise ValueError(
            f"{call}: {optimizer.name} has optimizers for the labels {sorted(optimizer.labels.variables)}, "
            f"and the {len(leaves)} leaves of params are labelled {list(labels)}"
        )
    return labels


def start_of_whole(
    call: str,
    optimizer: Whole,
    state: Mapping[str, PyTree] | None,
    params: PyTree,
    leaves: list[Array],
) -> tuple[list[Leaf], Any]:
    """The same for an optimizer with one state for all parameters; also that state's tree structure."""
    if state is not None and set(state) != {"state"}:
        raise ValueError(f"{call}: state has {sorted(state)}; {optimizer.name} keeps ['state']")
    initial = optimizer.init(params)
    given = initial if state is None else state["state"]
    like: Any = jax.tree.structure(initial)
    found: Any = jax.tree.structure(given)
    if like != found:
        raise ValueError(
            f"{call}: state['state'] has the tree structure {found}, and {optimizer.name} keeps {like}"
        )
    return [*({PARAMS: leaf} for leaf in leaves), kept(given)], like


def checked_batches(call: str, batches: PyTree, steps: int) -> PyTree:
    """The batches, if every array has the steps as its leading axis."""
    for path, x in jax.tree_util.tree_flatten_with_path(batches)[0]:
        if np.ndim(x) == 0 or np.shape(x)[0] != steps:
            raise ValueError(
                f"{call}: batches{jax.tree_util.keystr(path)} has shape {list(np.shape(x))}; its leading "
                f"axis is the step and must have length steps={steps}"
            )
    return batches


def check_examples(call: str, optimizer: Whole, batch: PyTree) -> None:
    """A batch can be taken apart into two or more examples."""
    shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"{call}: {optimizer.name} looks at single examples, so batches must be arrays (T, n, ...), "
            "with the same n >= 2 examples at every step, such as rows of the data; behind the step axis "
            f"they have the shapes {[list(shape) for shape in shapes]}"
        )
