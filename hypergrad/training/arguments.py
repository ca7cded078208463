"""The arguments of `hypergrad.train`, checked and converted into the parts of a run.

Every function takes the user's call as text, which its error messages quote.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from hypergrad._base.checks import (
    check_adjoint,
    check_finite,
    describe,
    is_function,
    is_no_adjoint,
    known_value,
    quoted,
    why_no_array,
)
from hypergrad._base.dtypes import widened
from hypergrad._base.errors import DomainError, error_if
from hypergrad._base.trees import PyTree
from hypergrad._base.varying import collectives
from hypergrad.adjoints.shards import Shards
from hypergrad.program import EXACT, STEP, AnyOptimizer, is_optimizer, with_defaults

Hypers = list[dict[str, Array]]  # for every leaf of the parameters, hyperparameters by name


def checked_call(function: str, steps: Any, optimizer: Any, adjoint: Any) -> str:
    """The user's call as text, after its optimizer and adjoint have been checked.

    Args:
      function: its name, such as ``train``.
      steps: as given.
      optimizer: as given; it must be an optimizer.
      adjoint: as given; None if there is none yet.

    Raises:
      TypeError: one of them is something else.
    """
    call = f"{function}(steps={steps!r}, optimizer="
    if not is_optimizer(optimizer):
        raise TypeError(f"{call}{quoted(optimizer)}): {_no_optimizer(optimizer)}")
    call += optimizer.name
    if adjoint is None:
        return f"{call})"
    check_adjoint(
        f"{call}, adjoint={quoted(adjoint) if is_no_adjoint(adjoint) else repr(adjoint)})", adjoint
    )
    return f"{call}, adjoint={adjoint!r})"


def _no_optimizer(optimizer: Any) -> str:
    """Why something is not an optimizer, and what to pass instead."""
    what = f"optimizer is {describe(optimizer)}"
    if isinstance(optimizer, optax.GradientTransformation):
        return (
            f"{what}, whose hyperparameters are built in. Pass hypergrad.from_optax(optax.adam, "
            '{"learning_rate": None}), and the learning rate in hypers; or one of this library\'s, such as '
            "hypergrad.adam()"
        )
    if inspect.isroutine(optimizer) and optimizer.__module__.startswith("hypergrad."):
        return f"{what}, which makes one: add brackets, optimizer={optimizer.__name__}()"
    if inspect.isroutine(optimizer) and optimizer.__module__.startswith("optax."):
        name = optimizer.__name__
        return f'{what}: pass hypergrad.from_optax(optax.{name}, {{"learning_rate": None}})'
    return (
        f"{what}. Pass one of this library's, such as hypergrad.adam(), one made by hypergrad.from_optax, "
        "or a hypergrad.program.Optimizer of your own"
    )


def check_scalar(call: str, result: PyTree) -> None:
    """Refuse a loss that does not return one float."""
    what = f"{call}: the loss must return one scalar, and returned {describe(result)}"
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{what}; return the loss alone. What else is wanted of a step, watch=... records, and what is "
            "wanted of the end can be computed from the result's params"
        )
    if result.shape != ():
        raise ValueError(f"{what}; reduce it, by jnp.mean or jnp.sum")
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(
            f"{call}: the loss must return a float, and returned {describe(result)}, which has no gradient"
        )


def flat_params(call: str, params: PyTree) -> tuple[list[Array], Any, list[str]]:
    """Leaves of the parameters, their structure and the path of every leaf."""
    if is_function(params):
        raise TypeError(
            f"{call}: params is {describe(params)}, not a tree of arrays; pass what it returns, such as "
            "init(jax.random.key(0)). A network that is an object holds its arrays: pass those"
        )
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    if sum(np.size(x) for _, x in paths) == 0:
        raise ValueError(
            f"{call}: params has no arrays in it, or only empty ones, so there is nothing to train"
        )
    names = ["params" + jax.tree_util.keystr(path) for path, _ in paths]
    for name, (_, x) in zip(names, paths):
        if why := why_no_array(x):
            raise TypeError(f"{call}: {name} is {why}. {_OTHERS.format('pass the arrays')}")
    leaves = [jnp.asarray(x) for _, x in paths]
    for name, (_, x), leaf in zip(names, paths, leaves):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{call}: {name} is {leaf.dtype}, which has no gradient; pass float32 or float64 "
                f"parameters. {_OTHERS.format('pass only those')}"
            )
        if leaf.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"{call}: {name} is {leaf.dtype}; hypergradients of a whole run are noise below float32. "
                "Pass float32 or float64 parameters (the loss may compute in lower precision inside)"
            )
        check_finite(call, name, x)
    return leaves, structure, names


_OTHERS = (
    "Of a tree {}; what else the loss needs belongs in meta, in model_state, or in what it closes over. Of "
    "a module (a class that is a pytree, such as Equinox's) everything else is left alone"
)


def flat_hypers(
    call: str,
    optimizer: AnyOptimizer,
    hypers: Mapping[str, PyTree],
    params: PyTree,
    names: list[str],
    steps: int,
) -> tuple[Hypers, Hypers]:
    """The constant and the scheduled hyperparameters of every leaf of the parameters.

    Known values stay NumPy arrays, so that adjoints can compute with them before the run, even under
    ``jit``.
    """
    if not isinstance(hypers, Mapping):
        raise ValueError(
            f"{call}: hypers must be a dictionary with the names {list(optimizer.hypers)}, "
            f"not {describe(hypers)}"
        )
    complete = with_defaults(call, optimizer, hypers)
    params, paths = optimizer.shape_of_hypers(params, names)
    leaves = jax.tree.leaves(params)
    fixed: Hypers = [{} for _ in leaves]
    scheduled: Hypers = [{} for _ in leaves]
    for key, given in complete.items():
        strong: dict[Any, Any] = {}  # one array for several leaves stays one array
        domain = optimizer.domains.get(key)
        for i, (x, leaf) in enumerate(zip(_spread(call, key, given, params), leaves)):
            where = f"{call}: hypers[{key!r}] for {paths[i]}"
            x = _typed_hyper(where, x, leaf, domain, strong)
            if x.ndim == 0:
                fixed[i][key] = x
                continue
            _check_schedule(where, x.shape, leaf.shape, steps)
            if x.shape[0] == steps:
                scheduled[i][key] = x
            else:
                fixed[i][key] = strong.setdefault((id(x), "first"), x[0])
    if optimizer.by_moves:  # what is trained beside the parameters has none
        more = len(names) - len(leaves)
        fixed, scheduled = fixed + [{} for _ in range(more)], scheduled + [{} for _ in range(more)]
    return checked_hypers(call, optimizer, fixed, scheduled)


def _spread(call: str, key: str, given: PyTree, params: PyTree) -> list[Any]:
    """A hyperparameter for every leaf of the parameters."""
    if given is None:
        raise ValueError(f"{call}: hypers[{key!r}] is None; give it a number, or leave it out")
    value = jax.tree.map(lambda x: x if isinstance(x, jax.core.Tracer) else np.asarray(x), given)
    try:
        return jax.tree.leaves(jax.tree.broadcast(value, params))
    except ValueError as error:
        raise ValueError(
            f"{call}: hypers[{key!r}] must be one number or array, or a tree of them that is a prefix "
            f"of params, and is {describe(given)}{_way_out(given)}: {error}"
        ) from None


def _typed_hyper(
    where: str, x: Any, leaf: Array, domain: tuple[float, float] | None, strong: dict[Any, Any]
) -> Any:
    """A hyperparameter in the type in which it is used; refused if it is known to be invalid."""
    if not jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"{where} is {x.dtype}; it must be a real number")
    if not isinstance(x, jax.core.Tracer):
        dtype = x.dtype if x.dtype in (np.float32, np.float64) and np.ndim(x) else leaf.dtype
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        x = strong.setdefault((id(x), dtype), np.asarray(x, dtype))
        _check_domain(where, x, domain)
    else:
        if (known := known_value(x)) is not None:
            _check_domain(where, np.asarray(known), domain)
        # The type matters because cotangents are summed over the steps in the type of the hyperparameter.
        dtype = leaf.dtype if x.weak_type and x.ndim == 0 else widened(x).dtype
        x = strong.setdefault((id(x), dtype), jnp.asarray(x, dtype))
    _check_promotion(where, x, leaf)
    return x


def _check_schedule(where: str, shape: tuple[int, ...], leaf: tuple[int, ...], steps: int) -> None:
    """Refuse a schedule that has another length, or does not fit its leaf."""
    if shape[0] not in (1, steps):
        raise ValueError(
            f"{where} has shape {list(shape)}; a schedule's leading axis is the step and must "
            f"have length steps={steps} (or 1, for the same at every step)"
        )
    try:
        fits = np.broadcast_shapes(shape[1:], leaf) == leaf
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{where} has shape {list(shape)}; behind the step axis it must broadcast to the "
            f"leaf's {list(leaf)}"
        )


def _way_out(given: PyTree) -> str:
    """Advice for a hyperparameter that is a tree of another structure than the parameters."""
    if isinstance(given, list) or type(given) is tuple:
        return " (a schedule is an array, jnp.array([...]))"
    if callable(given):
        return (
            " (a class of schedules of your own that is a pytree counts as one: pass the function "
            "lambda count: schedule(count))"
        )
    return ""


def _check_promotion(where: str, x: Any, leaf: Array) -> None:
    """Refuse two types of floats if the user has told JAX not to mix them."""
    strict = jax.config.jax_numpy_dtype_promotion == "strict"  # type: ignore[attr-defined]
    if strict and x.dtype != leaf.dtype:
        raise TypeError(
            f"{where} is {x.dtype}, and the leaf {leaf.dtype}, which jax.numpy_dtype_promotion('strict') "
            f"does not let mix; pass it as {leaf.dtype}"
        )


def _check_domain(where: str, x: np.ndarray, domain: tuple[float, float] | None) -> None:
    low, high = (-np.inf, np.inf) if domain is None else domain
    wrong = ~((x >= low) & (x < high))
    if wrong.any():
        place = [int(i) for i in np.argwhere(wrong)[0]]
        at = f" at index {place}" if place else ""
        raise ValueError(f"{where} is {x[tuple(place)]}{at}; it must lie in [{low:g}, {high:g})")


def checked_hypers(
    call: str, optimizer: AnyOptimizer, fixed: Hypers, scheduled: Hypers
) -> tuple[Hypers, Hypers]:
    """The hyperparameters, refused by the running program if one is outside its domain.

    Known values were checked before.  For values traced by ``jit`` or ``vmap``, one scalar for each
    hyperparameter goes to one callback, on which all of them then depend.  NaN is outside.  Not
    differentiated.

    Args:
      call: the user's call.
      optimizer: whose they are, with their domains.
      fixed: the constant ones.
      scheduled: the scheduled ones, by step.

    Returns:
      Both, structured like those given; one array used several times stays one array.

    Raises:
      DomainError: raised by the running program.
    """
    traced: dict[str, dict[int, Array]] = {}
    for leaf in (*fixed, *scheduled):
        for name, x in leaf.items():
            if name in optimizer.domains and known_value(x) is None:
                traced.setdefault(name, {})[id(x)] = x
    if not traced:
        return fixed, scheduled
    names = list(traced)
    domains = [optimizer.domains[name] for name in names]
    worst = [_first_outside(list(traced[name].values()), *optimizer.domains[name]) for name in names]

    def explain(*found: float) -> str | None:
        for name, x, (low, high) in zip(names, found, domains):
            if not low <= x < high:
                return (
                    f"{call}: hypers[{name!r}] has {x:.6g} in it; it must lie in [{low:g}, {high:g}). Keep "
                    "what is learned inside, by hypergrad.constraints or a function such as jnp.exp"
                )
        return None

    arrays = {key: x for each in traced.values() for key, x in each.items()}
    # As a list: the keys of a dictionary would be sorted, and these are addresses, so that a checkpoint's
    # fingerprint would change by chance.
    passed = error_if(explain, list(arrays.values()), *worst, error=DomainError)
    checked = dict(zip(arrays, passed))

    def put(leaf: dict[str, Array]) -> dict[str, Array]:
        return {name: checked.get(id(x), x) for name, x in leaf.items()}

    return [put(leaf) for leaf in fixed], [put(leaf) for leaf in scheduled]


def _first_outside(arrays: Sequence[Array], low: float, high: float) -> Array:
    """The first number outside ``[low, high)``, or any number if there is none; without derivative."""
    dtype = jnp.result_type(float)

    def first(x: Array) -> Array:
        flat = jnp.ravel(jax.lax.stop_gradient(x)).astype(dtype)
        return flat[jnp.argmax(~((flat >= low) & (flat < high)))]

    return first(jnp.stack([first(x) for x in arrays]))


def continued(call: str, state: Mapping[str, PyTree] | None) -> tuple[Any, PyTree]:
    """The step at which a state ended, and the integers behind its floats."""
    state = state if isinstance(state, Mapping) else {}  # the optimizer refuses what is neither
    first = state.get(STEP, 0)
    if np.shape(first) != () or not jnp.issubdtype(jnp.result_type(first), jnp.integer):
        raise ValueError(f"{call}: state[{STEP!r}] must be the number of steps made before, one integer")
    known = not isinstance(first, jax.core.Tracer)
    return np.int32(first) if known else first.astype(jnp.int32), state.get(EXACT)


def checked_batches(call: str, batches: PyTree, steps: int) -> PyTree:
    """The batches, after checking that the leading axis of every array is the step."""
    stack = (
        "Batches are arrays with the steps as their leading axis: stack those of a loader, "
        "jnp.stack([next(loader) for _ in range(steps)])"
    )
    if isinstance(batches, Iterator):
        raise TypeError(f"{call}: batches is {describe(batches)}, not an array. {stack}")
    paths = jax.tree_util.tree_flatten_with_path(batches)[0]
    if not paths:
        raise ValueError(
            f"{call}: batches is {describe(batches)} with no arrays in it; pass None, and the loss is "
            "given the number of the step"
        )
    for path, x in paths:
        name = f"batches{jax.tree_util.keystr(path)}"
        if why := why_no_array(x):
            raise TypeError(f"{call}: {name} is {why}. {stack}")
        if np.ndim(x) == 0 or np.shape(x)[0] != steps:
            raise ValueError(
                f"{call}: {name} has shape {list(np.shape(x))}; its leading axis is the step and must have "
                f"length steps={steps}"
            )
        if np.size(x) == 0:
            raise ValueError(
                f"{call}: {name} has shape {list(np.shape(x))}, so the batch of a step is empty, "
                "and its mean would be NaN; give every step one example at least"
            )
    return batches


def check_collectives(call: str, jaxpr: Any) -> None:
    """Refuse a loss that sums over devices where JAX differentiates such sums wrongly."""
    sums = [axis for name, axis in collectives(jaxpr) if name == "psum"]
    if sums:
        raise ValueError(
            f"{call}: the loss sums over the mesh axis {sums[0]!r} (psum or pmean) inside "
            "jax.shard_map(..., check_vma=False), where JAX differentiates a sum over devices as if each "
            "device had one of its own, so that copies of the parameters would drift apart and value and "
            "hypergradient would be wrong; leave check_vma at True, its default"
        )


def check_examples(call: str, optimizer: AnyOptimizer, batch: PyTree) -> None:
    """Check that a batch can be split into two or more examples."""
    shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"{call}: {optimizer.name} looks at single examples, so batches must be arrays (T, n, ...), "
            "with the same n >= 2 examples at every step, such as rows of the data; behind the step axis "
            f"they have the shapes {[list(shape) for shape in shapes]}"
        )


def checked_shards(
    call: str, shards: Shards | int | None, optimizer: AnyOptimizer, batches: PyTree, has_state: bool
) -> Shards | None:
    """How the batches are cut, after checking that they and the optimizer can be.

    Args:
      call: the user's call, for messages.
      shards: as given.
      optimizer: of the run.
      batches: by step, checked; None if there are none.
      has_state: whether the model has a state that is not learned by gradients.
    """
    if shards is None:
        return None
    if not isinstance(shards, Shards):
        shards = Shards(shards)
    said = f"{call}: shards={shards.count}"
    if batches is None:
        raise ValueError(f"{said} cuts the batch of every step, and there are no batches; pass batches=")
    for path, x in jax.tree_util.tree_flatten_with_path(batches)[0]:
        name = f"batches{jax.tree_util.keystr(path)}"
        if np.ndim(x) > 1 and np.shape(x)[1] % shards.count:
            raise ValueError(
                f"{said} cuts the second axis of {name}, of shape {list(np.shape(x))}, which is no "
                "multiple of it; choose batches that are. Random keys are given one for every part, "
                "(T, shards), or one for a step, (T,), which every part folds with its number"
            )
    if optimizer.per_example or optimizer.observe is not None or has_state:
        what = f"{optimizer.name} looks at more of a batch than its gradient"
        if has_state:
            what = "the model has a state, which every part would change"
        raise ValueError(
            f"{said}: {what}, which is not summed over parts; leave out shards, or use "
            "hypergrad.accumulated(loss), which sums in floats"
        )
    _check_axes(said, shards)
    return shards


def _check_axes(said: str, shards: Shards) -> None:
    """Check that the mesh has the axes over which parts are spread."""
    if not shards.axes:
        return
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape)
    missing = [axis for axis in shards.axes if axis not in sizes]
    if missing:
        raise ValueError(
            f"{said}, over={shards.over!r}: the mesh has the axes {list(sizes)} and not {missing}; call "
            "train with jax.set_mesh(mesh), a mesh with these axes"
        )
    devices = math.prod(sizes[axis] for axis in shards.axes)
    if shards.count % devices:
        raise ValueError(
            f"{said}, over={shards.over!r}: {shards.count} parts do not spread evenly over {devices} "
            f"devices; take a multiple of {devices}"
        )
