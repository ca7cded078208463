"""``train``: a whole training run as one differentiable JAX function."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import schedules
from hypergrad.adjoints import Adjoint
from hypergrad.optimizers.momentum import momentum
from hypergrad.program import PARAMS, Leaf, Optimizer, Whole, with_defaults
from hypergrad.reversible import Reversible
from hypergrad.run import Constants, Hoisted, Inputs, PyTree, Run, Snapshot, hoist, kept


class Trained(NamedTuple):
    """The end of a training run.

    Attributes:
      params: trained parameters, a tree like those given.
      state: the optimizer's variables by name, each a tree like the parameters; may start another run.  An
        optimizer of optax has one, ``state``.
      losses: ``(T,)``, the inner loss at every step, before its update; differentiable.
      watched: what ``watch`` returned, every array with the steps as its leading axis.
    """

    params: PyTree
    state: dict[str, PyTree]
    losses: Array
    watched: PyTree


def train(
    loss: Callable[[PyTree, PyTree, PyTree], Array],
    params: PyTree,
    hypers: Mapping[str, PyTree],
    meta: PyTree = None,
    batches: PyTree = None,
    *,
    steps: int,
    optimizer: Optimizer | Whole | None = None,
    adjoint: Adjoint | None = None,
    state: Mapping[str, PyTree] | None = None,
    watch: Callable[[Snapshot], PyTree] | None = None,
) -> Trained:
    """Train for a number of steps; differentiable in everything that goes in.

    ``w_{t+1} = step(w_t, ∇ loss(w_t, meta, batches[t]), hypers[t])``.  Composes with ``jax.grad``,
    ``jax.jit`` and ``jax.vmap``; reverse mode only.  Everything that is an array of floats can be
    differentiated, and what the loss closes over too; only what is costs anything.

    Args:
      loss: ``loss(params, meta, batch) -> scalar``, a JAX function; traced once.  An optimizer that looks
        at single examples gives it batches of one, and minimises the mean.
      params: start, a pytree of float32 or float64 arrays.
      hypers: hyperparameters of the optimizer by name.  Each is a tree that is a prefix of ``params`` (a
        number for all, or one per layer, or one per leaf) of numbers, of schedules (optax's or those of
        `hypergrad.schedules`), or of ``(T, ...)`` arrays, the leading axis being the step and the others
        broadcasting against the leaf.
      meta: any pytree, passed to the loss: regularisation, data, labels, scales.
      batches: a pytree of arrays with leading axis ``T``; slice ``t`` is given to the loss at step
        ``t``.  Row indices keep the data out of it: see `hypergrad.data.minibatches`.  None gives the
        loss the step number, int32.  For an optimizer that looks at single examples, the axis behind the
        step is the example.
      steps: ``T >= 1``.
      optimizer: a program of moves, by default `hypergrad.momentum`, or one made by `hypergrad.from_optax`.
      adjoint: how to differentiate, by default `hypergrad.Reversible`.
      state: start of the optimizer's variables by name, such as ``{"velocity": tree}``; zeros if absent.
      watch: ``watch(snapshot) -> pytree``, called before every step (see `Snapshot`), not differentiated.

    Returns:
      A `Trained`.

    Raises:
      ValueError: where an argument cannot be meant as it is; before any work starts.
      TypeError: for parameters of a dtype in which a hypergradient would be noise.
      ReversalError: where the run could not be, or was not, reversed exactly.

    Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, target, step: jnp.sum((w - target) ** 2)
    >>> def outer(rate):
    ...     hypers = {"learning_rate": rate, "momentum": 0.5}
    ...     return jnp.sum(hg.train(loss, jnp.zeros(3), hypers, 1.0, steps=20).params)
    >>> jax.grad(outer)(jnp.full(20, 0.1)).shape
    (20,)
    """
    optimizer = momentum() if optimizer is None else optimizer
    adjoint = Reversible() if adjoint is None else adjoint
    call = f"train(steps={steps}, optimizer={optimizer.name}, adjoint={adjoint!r})"
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"{call}: steps must be a whole number of at least 1")
    steps = int(steps)
    leaves, structure, names = _params(call, params)
    given, split = params, lambda merged: merged
    if isinstance(optimizer, Optimizer) and optimizer.blocks is not None:
        # The run is one of blocks; the user's functions are shown what they gave.
        like, blocks = jax.tree.map(_shape, given), optimizer.blocks
        params, split = blocks.merge(given), lambda merged: blocks.split(merged, like)
        leaves, structure, names = _params(call, params)
    if isinstance(hypers, Mapping):
        hypers = schedules.values(dict(hypers), steps)
    fixed, scheduled = _hypers(call, optimizer, hypers, params, leaves, names, steps)
    if isinstance(optimizer, Whole):
        first = {**fixed[0], **{name: x[0] for name, x in scheduled[0].items()}}
        start, kept_structure = _start_whole(call, optimizer, state, params, leaves, first)
    else:
        start, kept_structure = _start(call, optimizer, state, leaves, structure), None
    if batches is None:
        batches = np.arange(steps, dtype=np.int32)
    batches = _batches(call, batches, steps)
    observes = isinstance(optimizer, Optimizer) and optimizer.observe is not None
    if observes:
        batches = (batches, np.arange(steps, dtype=np.int32))
    batch = jax.tree.map(lambda x: x[0], batches)
    if isinstance(optimizer, Whole) and optimizer.per_example:
        _check_examples(call, optimizer, batch)
        batch = jax.tree.map(lambda x: x[:1], batch)

    def loss_of(merged: PyTree, meta: PyTree, batch: PyTree) -> Any:
        return loss(split(merged), meta, batch[0] if observes else batch)

    # The user's functions are traced here, once, on shapes alone; only their jaxprs are used below.
    shapes = jax.tree.map(_shape, (params, meta, batch))
    hoisted, captured, result = hoist(loss_of, *shapes)
    if not (isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()):
        raise ValueError(f"{call}: the loss must return one scalar, and returned {_describe(result)}")
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(f"{call}: the loss must return a float, and returned {_describe(result)}")
    observe = None
    if observes:
        observe, more = _hoist_observe(optimizer, split, *shapes)
        captured = [*captured, *more]
    run = Run(
        call=call,
        optimizer=optimizer,
        loss=hoisted,
        watch=None,
        structure=structure,
        state=kept_structure,
        steps=steps,
        captured=len(captured),
        x64=jnp.result_type(float) == jnp.float64,
        arguments=jax.tree.structure(shapes[1:]),
        observe=observe,
    )
    watch_consts: list[Array] = []
    if watch is not None:
        number: Any = jax.ShapeDtypeStruct((), np.dtype("int32"))
        scalar: Any = result
        variables = run.state_of(jax.tree.map(_shape, start))
        snapshot = Snapshot(number, shapes[0], variables, scalar, shapes[0])

        def show(snapshot: Snapshot) -> PyTree:
            shown = {"params": split(snapshot.params), "gradient": split(snapshot.gradient)}
            return watch(snapshot._replace(**shown))

        seen, watch_consts, _ = hoist(show, snapshot)
        run = replace(run, watch=seen)
    meta_leaves = [jnp.asarray(x) for x in jax.tree.leaves(meta)]
    constants = Constants([*captured, *meta_leaves], fixed, watch_consts)
    batch_leaves = [jnp.asarray(x) for x in jax.tree.leaves(batches)]
    inputs = Inputs(batch_leaves, scheduled, jnp.arange(steps, dtype=jnp.int32))
    end, outputs = adjoint(run, start, constants, inputs)
    trained = split(structure.unflatten(run.params_of(end)))
    return Trained(trained, run.state_of(end), outputs.loss, outputs.watched)


def _hoist_observe(
    optimizer: Any, split: Callable[[PyTree], PyTree], params: PyTree, meta: PyTree, batch: PyTree
) -> tuple[Hoisted, list[Array]]:
    """What the optimizer observes, hoisted as the loss is, and what it closes over."""

    def observe(merged: PyTree, meta: PyTree, batch: PyTree) -> PyTree:
        return dict(optimizer.observe(split(merged), meta, *batch))

    hoisted, captured, _ = hoist(observe, params, meta, batch)
    return hoisted, captured


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)  # as JAX would see it, also a NumPy array
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _describe(tree: PyTree) -> str:
    if isinstance(tree, jax.ShapeDtypeStruct):
        return f"{tree.dtype}{list(tree.shape)}"
    return f"a {type(tree).__name__}"


def _params(call: str, params: PyTree) -> tuple[list[Array], Any, list[str]]:
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


def _hypers(
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
    return jnp.asarray(x, x.dtype) if isinstance(x, jax.core.Tracer) else np.asarray(x)


def _check_domain(where: str, x: np.ndarray, domain: tuple[float, float] | None) -> None:
    low, high = (-np.inf, np.inf) if domain is None else domain
    wrong = ~((x >= low) & (x < high))
    if wrong.any():
        place = [int(i) for i in np.argwhere(wrong)[0]]
        at = f" at index {place}" if place else ""
        raise ValueError(f"{where} is {x[tuple(place)]}{at}; it must lie in [{low:g}, {high:g})")


def _start(
    call: str,
    optimizer: Optimizer,
    state: Mapping[str, PyTree] | None,
    leaves: list[Array],
    structure: Any,
) -> list[Leaf]:
    """Float variables of every leaf at the start, by name."""
    state = {} if state is None else state
    unknown = sorted(set(state) - set(optimizer.variables))
    if unknown:
        raise ValueError(f"{call}: state has {unknown}; {optimizer.name} keeps {list(optimizer.variables)}")
    start: list[Leaf] = [{PARAMS: leaf} for leaf in leaves]
    for name, variable in optimizer.variables.items():
        given = None
        if name in state:
            given, other = jax.tree.flatten(state[name])
            if other != structure:
                raise ValueError(
                    f"{call}: state[{name!r}] has the tree structure {other}, params has {structure}"
                )
        for i, leaf in enumerate(leaves):
            default = jax.eval_shape(variable.init, leaf)
            if given is None:
                start[i][name] = variable.init(leaf)
                continue
            if np.shape(given[i]) != default.shape:
                raise ValueError(
                    f"{call}: state[{name!r}] has a leaf of shape {list(np.shape(given[i]))} where "
                    f"{list(default.shape)} is needed"
                )
            start[i][name] = jnp.asarray(given[i], default.dtype)
    return start


def _start_whole(
    call: str,
    optimizer: Whole,
    state: Mapping[str, PyTree] | None,
    params: PyTree,
    leaves: list[Array],
    hypers: Mapping[str, Array],
) -> tuple[list[Leaf], Any]:
    """The same for an optimizer with one state for all parameters; also that state's tree structure.

    Its state may depend on the hyperparameters of the first step, and is differentiated in them.
    """
    if state is not None and set(state) != {"state"}:
        raise ValueError(f"{call}: state has {sorted(state)}; {optimizer.name} keeps ['state']")
    initial = optimizer.start(hypers, params)
    given = initial if state is None else state["state"]
    like: Any = jax.tree.structure(initial)
    found: Any = jax.tree.structure(given)
    if like != found:
        raise ValueError(
            f"{call}: state['state'] has the tree structure {found}, and {optimizer.name} keeps {like}"
        )
    return [*({PARAMS: leaf} for leaf in leaves), kept(given)], like


def _batches(call: str, batches: PyTree, steps: int) -> PyTree:
    for path, x in jax.tree_util.tree_flatten_with_path(batches)[0]:
        if np.ndim(x) == 0 or np.shape(x)[0] != steps:
            raise ValueError(
                f"{call}: batches{jax.tree_util.keystr(path)} has shape {list(np.shape(x))}; its leading "
                f"axis is the step and must have length steps={steps}"
            )
    return batches


def _check_examples(call: str, optimizer: Whole, batch: PyTree) -> None:
    """A batch can be taken apart into two or more examples."""
    shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"{call}: {optimizer.name} looks at single examples, so batches must be arrays (T, n, ...), "
            "with the same n >= 2 examples at every step, such as rows of the data; behind the step axis "
            f"they have the shapes {[list(shape) for shape in shapes]}"
        )
