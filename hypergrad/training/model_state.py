"""State of a model that is not learned by gradients: running statistics, counters, random streams.

``(value, s_{t+1}) = loss(w_t, meta, batch_t, s_t)``.  From the traced loss, every array of the state is
found to be one of four kinds, which decide how it is carried along and undone:

============  =================================================  ==========================================
kind          how it changes                                     carried along as
============  =================================================  ==========================================
``FIXED``     not at all                                         a constant of the loss
``GIVEN``     by itself: counters, random streams                an input, computed for all steps beforehand
``AVERAGE``   ``s <- a s + u(w, batch)`` with a known ``a`` in   a variable with the moves `Scale` and
              ``[2**-7, 1]``, and nothing else reads it          `Shift`, undone bit for bit
``CARRIED``   in any other way                                   an `Assign`, which cannot be undone
============  =================================================  ==========================================

Batch normalization is an ``AVERAGE``, since it normalizes by the batch while it is trained.  Averages and
what is carried are leaves added to the parameters, with moves of their own, so that adjoints know nothing
about them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array

from hypergrad._base.checks import describe, shape_of
from hypergrad._base.tracing import Converted, closed_part, closure_convert, live, narrowed
from hypergrad._base.trees import PyTree, Step
from hypergrad.program import (
    PARAMS,
    AnyOptimizer,
    Assign,
    Blocks,
    Labels,
    Layout,
    Leaf,
    Move,
    Optimizer,
    Scale,
    Shift,
    StepContext,
    Variable,
)
from hypergrad.training.arguments import check_scalar
from hypergrad.training.dependence import Form, forms_of

FIXED, GIVEN, AVERAGE, CARRIED = "fixed", "given", "average", "carried"
SMALLEST_FACTOR = 2.0**-7  # of a `Scale`
CHANGES = "is no running average of constant decay, and changes"  # why it is overwritten, for messages
RUNNING, NEXT = "model_average", "next_model_state"  # the variable of an average; what is observed for it


class Kind(NamedTuple):
    """How one array of the state changes.

    Attributes:
      name: of the kind.
      factor: ``a`` of an average.
      stopped: whether the loss stops the derivative of an average.
    """

    name: str
    factor: float = 1.0
    stopped: bool = False

    @property
    def label(self) -> str:
        """Of its leaf; no label of the user's has a space."""
        return f"{self.name} {self.factor!r}"


class ModelState(NamedTuple):
    """The state of a model, and the loss that changes it, traced once.

    Attributes:
      loss: a function of ``[*params, *meta, *batch, *state]``, with the leaves of the next state behind its
        value.
      captured: what it closes over.
      kinds: of every array of the state.
      start: the arrays of the state before the first step.
      structure: of the state.
      given: by step, and after the last one, the arrays of the kind ``GIVEN``.
      first: the number of the first step.
    """

    loss: Converted
    captured: list[Array]
    kinds: list[Kind]
    start: list[Array]
    structure: Any
    given: list[Array]
    first: Any

    @property
    def names(self) -> list[str]:
        """Of the arrays that are leaves beside the parameters, for messages."""
        paths = jax.tree_util.tree_leaves_with_path(self.structure.unflatten(range(len(self.kinds))))
        return [f"state{jax.tree_util.keystr(paths[k][0])}" for k in self.moving]

    def which(self, *names: str) -> list[int]:
        """Numbers of the arrays of some kinds."""
        return [k for k, kind in enumerate(self.kinds) if kind.name in names]

    @property
    def moving(self) -> list[int]:
        """Numbers of the arrays that are leaves beside the parameters."""
        return self.which(AVERAGE, CARRIED)

    def joined(self, moving: Sequence[Array], given: Sequence[Array]) -> list[Array]:
        """All arrays of the state, from those that differ from step to step."""
        arrays = list(self.start)
        for k, x in [*zip(self.moving, moving), *zip(self.which(GIVEN), given)]:
            arrays[k] = x
        return arrays

    def evaluated(
        self, both: tuple[PyTree, list[Array]], meta: PyTree, batch: PyTree
    ) -> tuple[Array, list[Array]]:
        """The loss, and what follows on the arrays that move: of an average, ``u``."""
        params, moving = both
        meta, captured, start = meta
        batch, given = batch
        averages = [self.kinds[k].name == AVERAGE for k in self.moving]
        moving = [jnp.zeros_like(x) if flag else x for x, flag in zip(moving, averages)]
        state = self._replace(start=start).joined(moving, given)
        value, *after = self.loss(captured, jax.tree.leaves((params, meta, batch, state)))
        return value, [after[k] for k in self.moving]

    def value(self, both: PyTree, meta: PyTree, batch: PyTree) -> Array:
        """The loss as a function of parameters and moving state together."""
        return self.evaluated(both, meta, batch)[0]

    def at(self, both: tuple[PyTree, list[Array]], averages: list[Array], step: Step) -> PyTree:
        """The state before a step, or after the last one."""
        t = step - self.first
        given = [jax.lax.dynamic_index_in_dim(x, t, keepdims=False) for x in self.given]
        moving = list(both[1])
        for i, k in enumerate(self.moving):
            if self.kinds[k].name == AVERAGE:
                x = averages[i]
                stopped = jnp.where(t == 0, x, jax.lax.stop_gradient(x))
                moving[i] = stopped if self.kinds[k].stopped else x
        return self.structure.unflatten(self.joined(moving, given))

    def optimizer(self, inner: AnyOptimizer) -> AnyOptimizer:
        """The optimizer of the parameters, and the moves of the state beside it."""
        return (_beside if inner.by_moves else _generic)(inner, self)


@dataclass(frozen=True)
class _Beside(Optimizer):
    """A program of moves with the moves of a model's state beside it.

    Attributes:
      inner: the optimizer of the parameters.
      kinds: of the arrays of the state that move.
    """

    inner: Any = None
    kinds: tuple[Kind, ...] = ()

    def shape_of_hypers(self, params: PyTree, names: Sequence[str]) -> tuple[PyTree, Sequence[str]]:
        """Hyperparameters belong to the parameters only; see `Optimizer.shape_of_hypers`."""
        names = names[: len(names) - len(self.kinds)]
        found: tuple[PyTree, Sequence[str]] = self.inner.shape_of_hypers(params[0], names)
        return found

    def start(
        self, call: str, state: Mapping[str, PyTree] | None, hypers: Mapping[str, Array], at: PyTree
    ) -> tuple[list[Leaf], Layout]:
        """See `Optimizer.start`."""
        params, moving = at
        leaves, layout = self.inner.start(call, state, hypers, params)
        labels = layout.labels or ("model",) * len(leaves)
        leaves = [leaf | {RUNNING: jnp.zeros(0, leaf[PARAMS].dtype)} for leaf in leaves]
        for kind, x in zip(self.kinds, moving):
            nothing = jnp.zeros(0, x.dtype)
            own = dict.fromkeys(self.inner.variables, nothing)
            leaves.append({PARAMS: x, **own, RUNNING: x if kind.name == AVERAGE else nothing})
        return leaves, Layout(jax.tree.structure(at), None, labels + tuple(k.label for k in self.kinds))

    def state_of(self, leaves: Sequence[Leaf], layout: Layout) -> dict[str, PyTree]:
        """The variables of the inner optimizer, and the averages in one list; see `Optimizer.state_of`."""
        trees = super().state_of(leaves, layout)
        return {name: tree[name == RUNNING] for name, tree in trees.items()}


def _beside(inner: Any, state: ModelState) -> AnyOptimizer:
    kinds = tuple(state.kinds[k] for k in state.moving)
    by_label = {kind.label: kind for kind in kinds}
    count = len(kinds)
    merge = (lambda params: params) if inner.blocks is None else inner.blocks.merge

    def moves(h: Any, t: Step) -> Sequence[Move]:
        kind = by_label.get(h.label)
        if kind is None:
            return inner.moves(h, t)
        if kind.name == CARRIED:
            return [Assign(PARAMS, lambda s: getattr(s, NEXT), why=CHANGES)]
        factor = jnp.asarray(kind.factor, jnp.result_type(float))
        return [Scale(RUNNING, factor), Shift(RUNNING, lambda s: getattr(s, NEXT))]

    def observe(both: PyTree, meta: PyTree, batch: PyTree, step: Array) -> Mapping[str, PyTree]:
        nothing = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), (merge(both[0]), both[1]))
        observed = {NEXT: (nothing[0], state.evaluated(both, meta, batch)[1])}
        if inner.observe is None:
            return observed
        others = inner.observe(both[0], meta[0], batch[0], step)
        return observed | {name: (tree, nothing[1]) for name, tree in others.items()}

    def transform(hypers: Sequence[Any], gradient: Sequence[Array]) -> Sequence[Array]:
        assert inner.transform is not None
        own = len(gradient) - count
        return [*inner.transform(hypers[:own], gradient[:own]), *gradient[own:]]

    of_inner = {"model": frozenset(inner.variables)} if inner.labels is None else inner.labels.variables
    of_state = {kind.label: frozenset({RUNNING} if kind.name == AVERAGE else ()) for kind in kinds}
    blocks = None if inner.blocks is None else _blocks_beside(inner.blocks)
    return _Beside(
        name=inner.name,
        moves=moves,
        variables={**inner.variables, RUNNING: Variable()},
        hypers=inner.hypers,
        domains=inner.domains,
        transform=None if inner.transform is None else transform,
        blocks=blocks,
        observe=observe,
        labels=Labels(lambda both: [], {**of_inner, **of_state}),  # `_Beside.start` has them
        inner=inner,
        kinds=kinds,
    )


def _blocks_beside(blocks: Blocks) -> Blocks:
    """Blocks of the parameters, with the state beside them as it is."""
    return Blocks(
        lambda both: (blocks.merge(both[0]), both[1]),
        lambda merged, like: (blocks.split(merged[0], like[0]), merged[1]),
    )


def _generic(inner: Any, state: ModelState) -> AnyOptimizer:
    """A function of all parameters at once that moves a model's state too."""

    def init(*given: Any) -> PyTree:
        *hypers, both = given
        return inner.init(*hypers, both[0])

    def update(h: Any, gradient: Any, own: PyTree, both: PyTree, context: StepContext) -> Any:
        moving = both[1]
        of_params = context._replace(
            loss=lambda params: context.loss((params, moving)), meta=context.meta[0], batch=context.batch[0]
        )
        params, own = inner.update(h, gradient[0], own, both[0], of_params)
        return (params, state.evaluated(both, context.meta, context.batch)[1]), own

    return replace(inner, init=init, update=update)


def with_state(
    call: str,
    loss: Callable[..., Any],
    parts: tuple[PyTree, PyTree, PyTree],
    start: PyTree,
    numbers: Any,
    optimizer: AnyOptimizer,
) -> tuple[tuple[PyTree, PyTree, PyTree, AnyOptimizer], ModelState]:
    """Trace a loss that changes a state, and add the state to what is trained.

    Args:
      call: the user's call, for messages.
      loss: ``loss(params, meta, batch, state) -> (value, state)``.
      parts: parameters, meta and batches by step.
      start: the state before the first step.
      numbers: of the steps.
      optimizer: of the parameters.

    Returns:
      Parameters, meta, batches and optimizer of a run in which the state moves beside the parameters; and
      the state, whose `ModelState.value` is the loss of that run.

    Raises:
      ValueError: the loss does not return a state like the one it is given.
      TypeError: an optimizer that looks at single examples has no state of all of them; an array that the
        loss changes by parameters or batch is not of floats.
    """
    if optimizer.per_example:
        raise TypeError(
            f"{call}: {optimizer.name} looks at single examples, and a model with a state (batch "
            "normalization, say) at all of a batch; use another optimizer, or a model without"
        )
    params, meta, batches = parts
    structure: Any
    arrays, structure = jax.tree.flatten(start)
    arrays = [jnp.asarray(x) for x in arrays]
    batch = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.tree.map(shape_of, (params, meta, batch, start))

    def traced(*arguments: PyTree) -> list[Array]:
        result = loss(*arguments)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(
                f"{call}: a loss with a state must return (value, state), and returned {describe(result)}"
            )
        check_scalar(call, shape_of(result[0]))
        _check_alike(call, shapes[3], result[1])
        return [result[0], *jax.tree.leaves(result[1])]

    converted, captured, _ = closure_convert(traced, *shapes)
    kinds = _kinds(call, converted.jaxpr, shapes, optimizer.by_moves)
    state = ModelState(converted, captured, kinds, arrays, structure, [], numbers[0])
    state = state._replace(given=_history(state, (params, meta), len(numbers)))
    both = (params, [arrays[k] for k in state.moving])
    by_step = [x[:-1] for x in state.given]
    return (both, (meta, captured, arrays), (batches, by_step), state.optimizer(optimizer)), state


def _check_alike(call: str, before: PyTree, after: PyTree) -> None:
    """Refuse a state that changes its structure, shapes or types."""
    shapes = jax.tree.map(shape_of, after)
    given: Any = jax.tree.structure(before)
    found: Any = jax.tree.structure(shapes)
    if given != found:
        raise ValueError(
            f"{call}: the loss was given a state with the tree structure {given}, and returned one with "
            f"{found}; return the whole state"
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(shapes)):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"{call}: state{jax.tree_util.keystr(path)} is {describe(old)}, and the loss returned "
                f"{describe(new)} for it; it must stay what it is"
            )


def _kinds(call: str, jaxpr: Any, shapes: Any, by_moves: bool) -> list[Kind]:
    """The kind of every array of the state."""
    *before, state = (jax.tree.leaves(each) for each in shapes)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes[3])]
    moves = [Form(moving=True), Form(), Form(moving=True)]  # parameters, meta, batch
    inputs = [form for leaves, form in zip(before, moves) for _ in leaves]
    inputs += [Form(frozenset({k}), affine=(k, 1.0)) for k in range(len(state))]
    forms = forms_of(jaxpr, inputs)
    own, after = jaxpr.invars[len(inputs) - len(state) :], jaxpr.outvars[1:]
    fixed = {k for k, (old, new) in enumerate(zip(own, after)) if old is new}
    given = {k for k, form in enumerate(forms[1:]) if not form.moving} - fixed
    while wrong := {k for k in given if not forms[1 + k].state <= given | fixed}:
        given -= wrong

    def kind(k: int) -> Kind:
        if k in fixed or k in given:
            return Kind(FIXED if k in fixed else GIVEN)
        form, dtype = forms[1 + k], state[k].dtype
        if dtype not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"{call}: state{paths[k]} is {dtype} and depends on parameters or batch; such a state must "
                "be float32 or float64"
            )
        read = any(k in other.state for i, other in enumerate(forms) if i != 1 + k)
        average = by_moves and form.affine is not None and form.affine[0] == k and not read
        if average and form.affine is not None and SMALLEST_FACTOR <= form.affine[1] <= 1:
            return Kind(AVERAGE, form.affine[1], form.stopped)
        return Kind(CARRIED)

    return [kind(k) for k in range(len(state))]


def _history(state: ModelState, parts: tuple[PyTree, PyTree], steps: int) -> list[Array]:
    """The arrays that change by themselves, before every step and after the last one."""
    which = state.which(GIVEN)
    if not which:
        return []
    jaxpr, count = state.loss.jaxpr, len(state.kinds)
    own = jaxpr.invars[len(jaxpr.invars) - count :]
    outputs = [jaxpr.outvars[1 + k] for k in which]
    eqns, needed = live(jaxpr, outputs)
    params, meta = map(jax.tree.leaves, parts)
    of_meta = jaxpr.invars[len(params) :]
    variables = [*jaxpr.constvars, *of_meta[: len(meta)], *own]
    arrays = [jnp.asarray(x) for x in (*state.captured, *meta, *state.start)]
    known = dict(zip(variables, narrowed(arrays, variables)))
    inputs = [v for v in known if v in needed]
    advance = jax.extend.core.jaxpr_as_fun(closed_part(jaxpr, inputs, eqns, outputs))

    def step(carry: list[Array], _: None) -> tuple[list[Array], list[Array]]:
        now = known | dict(zip((own[k] for k in which), carry))
        return advance(*(now[v] for v in inputs)), carry

    start = [state.start[k] for k in which]
    end, before = jax.lax.scan(step, start, length=steps)
    return [jnp.concatenate([x, y[None]]) for x, y in zip(before, end)]
