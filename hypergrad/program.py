"""An optimizer is a short program of moves; everything else is derived from it.

One step of training evaluates the gradient at the parameters, and whatever else the optimizer observes
there, and then makes the moves in order.

=====================================  ==========================================  ====================
move                                   meaning                                     undone by
=====================================  ==========================================  ====================
``Scale(x, factor)``                   ``x <- factor x``, factor in (0, 1]         `exact.unscale`
``Shift(x, amount)``                   ``x <- x + amount(all except x)``           `exact.unshift`
``Remember(name, value)``              ``name = value(everything)``, a scalar      reading it again
``Total(name, value)``                 the same, summed over all leaves            reading it again
``Keep(name, value, levels)``          ``name = value(everything)``, one of a few  reading it again
                                       levels for every element
``Assign(x, value)``                   ``x <- value(everything)``                  nothing
=====================================  ==========================================  ====================

Moves are written for *one* leaf of the parameters, as papers write them; the library maps them over the
tree.  A leaf is one of the user's arrays, or a block assembled from several (see `Blocks`).  Leaves may
have programs of their own (see `Labels`); leaves with like programs are moved together.  From this one list
come `step`, in floats, which JAX differentiates, and the step on integers with its inverse, the list
backwards (`Exact`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from hypergrad import exact
from hypergrad._base.checks import check_arrays, check_finite, check_state
from hypergrad._base.devices import Evaluate, in_turn
from hypergrad._base.errors import ReversalError
from hypergrad._base.trees import PyTree, Scalar, Step

PARAMS = "params"
STEP, EXACT = "step", "exact"  # what a state holds besides the optimizer's variables


class View:
    """What a move may read, by attribute: variables, the gradient, what else is observed.

    Reading anything that the move may not depend on is refused: that is what makes a `Shift` invertible.

    Args:
      readable: arrays of one leaf, by name.
      refused: why a name may not be read, by name.
    """

    def __init__(self, readable: Mapping[str, Any], refused: Mapping[str, str]):
        self.__dict__.update(readable)
        self.__dict__["_refused"] = dict(refused)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_refused", {}):
            raise AttributeError(self.__dict__["_refused"][name])
        names = [key for key in vars(self) if key != "_refused"]
        raise AttributeError(f"a move reads {name!r}, but there is only {names}")


class Scale(NamedTuple):
    """``variable <- factor * variable``, exactly, by the ratio ``numerator(factor) / 2**32``.

    The factor is differentiated as written; its rounding to a ratio is not.

    Args:
      variable: name of the variable that is scaled.
      factor: in ``[2**-7, 1]``, a scalar or the shape of the variable.  It may depend only on
        hyperparameters and the step; as a function of a view, also on scalars remembered in the same step,
        but then its cost in bits is not known before the run.
      numerator: from the factor to a uint64 numerator, by default `exact.numerator`.
    """

    variable: str
    factor: Any
    numerator: Callable[[Array], Array] = exact.numerator


class Shift(NamedTuple):
    """``variable <- variable + amount(view)``, where the view lacks the variable itself.

    The gradient and whatever else is observed are taken at the parameters before the step, so neither a
    shift of the parameters nor any later shift can read them.

    Args:
      variable: name of the variable that is shifted.
      amount: from a view to floats that broadcast to the shape of the variable.
    """

    variable: str
    amount: Callable[[Any], Array]


class Remember(NamedTuple):
    """``name = value(view)``: a scalar for every leaf, for later moves of the step.

    It is recorded at every step and read again on the way back.  Moves that depend on their own variable
    through one number only, such as its norm, are thereby reversible.

    Args:
      name: under which later moves read the scalar.
      value: from a view of everything to a scalar.
    """

    name: str
    value: Callable[[Any], Array]


class Total(NamedTuple):
    """``name = Σ value(view)``: a `Remember` summed over all leaves that are moved together.

    Args:
      name: under which later moves read the sum.
      value: from a view of everything to a scalar.
    """

    name: str
    value: Callable[[Any], Array]


class Keep(NamedTuple):
    """``name = value(view)``: one of a few levels for every element, such as a sign or a mask.

    It is written to a tape, at ``log2(len(levels))`` bits per element and step, and read again on the way
    back.  Moves that depend on their own variable through a few levels only are thereby reversible.  Its
    derivative is that of the value, which is zero for a sign.

    Args:
      name: under which later moves of the step read it.
      value: from a view of everything to floats that broadcast to the shape of the parameters.
      levels: all values that an element may take.
    """

    name: str
    value: Callable[[Any], Array]
    levels: tuple[float, ...]


class Assign(NamedTuple):
    """``variable <- value(view)``; a program with this move cannot be reversed.

    Args:
      variable: name of the variable that is overwritten.
      value: from a view of everything to the new variable.
      evaluate: evaluates the values of all leaves, on one or more devices (see `hypergrad._base.devices`).
      why: of what is no variable of an optimizer, why it is overwritten, for messages that begin with its
        path.
    """

    variable: str
    value: Callable[[Any], Array]
    evaluate: Evaluate = in_turn
    why: str = ""


Move = Scale | Shift | Remember | Total | Keep | Assign


class Variable(NamedTuple):
    """A variable that the optimizer keeps for every leaf of the parameters.

    Attributes:
      init: from a leaf of the parameters to the variable's start.
      words: 32-bit words below the first 62 bits of the variable in exact arithmetic, 0 or 1.  With none,
        an array resolves ``2**-54`` of its first numbers and may outgrow them by ``2**32``; with one,
        these are ``2**-68`` and ``2**50``, which suits variables that accumulate squares.
    """

    init: Callable[[Array], Array] = jnp.zeros_like
    words: int = 0


SQUARES = Variable(words=1)  # for averages and sums of squared gradients


class Blocks(NamedTuple):
    """How the user's parameters are assembled into the arrays that moves act on.

    Attributes:
      merge: from parameters to a tree of arrays; linear, and undone by `split` bit for bit.
      split: from such a tree and the shapes of the parameters, a tree too, to parameters; linear.
    """

    merge: Callable[[PyTree], PyTree]
    split: Callable[[PyTree, PyTree], PyTree]


class Labels(NamedTuple):
    """Which leaf has which program, if not all have the same.

    Attributes:
      of: from parameters to the label of every leaf; moves read the label as ``h.label``.
      variables: by label, the names of the variables that leaves with this label have.  For other leaves
        the variable is an array without elements.
    """

    of: Callable[[PyTree], list[str]]
    variables: Mapping[str, frozenset[str]]


# Of one leaf, by name:
Leaf = dict[str, Float[Array, "..."]]  # its float state: params and the optimizer's variables
Observed = dict[str, Float[Array, "..."]]  # at the parameters before a step: gradient and what is observed
Record = dict[str, Float[Array, "..."]]  # what was remembered or kept in a step


class Examples(NamedTuple):
    """The minibatch of a step, for an optimizer that looks at single examples.

    Attributes:
      loss: ``loss(params, batch) -> scalar`` for a batch of one: every array with a leading axis of 1.
      batch: ``n >= 2`` examples along the leading axis of every array; the mean of their losses is
        minimized.
    """

    loss: Callable[[PyTree, PyTree], Array]
    batch: PyTree


class StepContext(NamedTuple):
    """What an optimizer of all parameters at once may evaluate again in a step.

    Attributes:
      loss: from parameters to the inner loss on the batch of the step.
      value: scalar, the loss at the parameters before the step.
      meta: as the loss receives it.
      batch: as the loss receives it.
    """

    loss: Callable[[PyTree], Array]
    value: Scalar
    meta: PyTree
    batch: PyTree


class FloatStep(NamedTuple):
    """One step in floats, for an optimizer of either kind; whatever is costly is a function to be called.

    Attributes:
      leaves: the state before the step, by leaf.
      loss: scalar, the inner loss before the step.
      observations: the gradient and whatever else is observed, by leaf.
      moves: returns the moves of every leaf, for a program of moves.
      hypers: hyperparameters of the first leaf, by name.
      examples: returns the minibatch, for an optimizer that looks at single examples.
      context: returns what may be evaluated again.
    """

    leaves: Sequence[Leaf]
    loss: Scalar
    observations: Sequence[Observed]
    moves: Callable[[], Sequence[Sequence[Move]]]
    hypers: Mapping[str, Array]
    examples: Callable[[], Examples]
    context: Callable[[], StepContext]


class Layout(NamedTuple):
    """How trees are laid out in the flat state of a run.

    Attributes:
      params: tree structure of the parameters.
      state: tree structure of the optimizer's state, if there is one state for all parameters.
      labels: of the leaves, if the optimizer has a program for each label.
    """

    params: Any
    state: Any = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Optimizer:
    """One description of an optimizer, from which every way to run it is derived.

    Attributes:
      name: as the user would write it.
      moves: ``(h, t) -> [moves]`` for one leaf, with ``h.<hyperparameter>`` at step ``t = 0, 1, ...``.
      variables: kept in addition to the parameters, by name.
      hypers: names and default values of the hyperparameters; None marks one that must be given.
      domains: lower and upper end of the half-open range ``[low, high)`` of each hyperparameter.
      transform: changes the gradient before the moves see it, on all leaves at once: from a list of ``h``
        and a list of gradients to a list like the second; None leaves the gradient as it is.
      blocks: what the moves act on, if not the leaves of the parameters; "leaf" then means "block", and
        hyperparameters and variables are trees of blocks.
      observe: ``(params, meta, batch, step) -> {name: tree of arrays}``, evaluated at the parameters before
        the step, for moves to read as ``s.<name>`` besides the gradient.  Like the gradient it is
        evaluated again on the way back, and differentiated.  The trees are like the blocks; the arguments
        are those of the loss.
      labels: which leaf has which program, if not all have the same.
      parts: the optimizers of which this one is made: by label, or ``""`` for one inside a wrapper.
      per_example: False; see `GenericOptimizer`.
      by_moves: True: it is a program of moves.

    Raises:
      ValueError: if a variable has other than 0 or 1 words.

    >>> from hypergrad.program import Optimizer, Scale, Shift, Variable
    >>> Optimizer(
    ...     name="momentum",
    ...     moves=lambda h, t: [
    ...         Scale("velocity", h.momentum),
    ...         Shift("velocity", lambda s: -(1 - h.momentum) * s.gradient),
    ...         Shift("params", lambda s: h.learning_rate * s.velocity),
    ...     ],
    ...     variables={"velocity": Variable()},
    ...     hypers={"learning_rate": None, "momentum": 0.9},
    ... ).name
    'momentum'
    """

    name: str
    moves: Callable[[Any, Step], Sequence[Move]]
    variables: Mapping[str, Variable] = field(default_factory=dict)
    hypers: Mapping[str, float | None] = field(default_factory=dict)
    domains: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    transform: Callable[[Sequence[Any], Sequence[Array]], Sequence[Array]] | None = None
    blocks: Blocks | None = None
    observe: Callable[[PyTree, PyTree, PyTree, Array], Mapping[str, PyTree]] | None = None
    labels: Labels | None = None
    parts: Mapping[str, "Optimizer"] = field(default_factory=dict)
    per_example: bool = field(default=False, init=False)
    by_moves: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        for name, variable in self.variables.items():
            if variable.words not in exact.GROWTH:
                raise ValueError(
                    f"Optimizer(name={self.name!r}): {name!r} is Variable(words={variable.words!r}); there "
                    f"are {' or '.join(map(str, exact.GROWTH))} words, 1 for what sums squares"
                )

    @property
    def reversible(self) -> bool:
        """Whether every move can be undone."""
        h = dict.fromkeys(self.hypers, jnp.float32(0.5))
        labels = [None] if self.labels is None else list(self.labels.variables)
        moves = [self.moves(SimpleNamespace(**h, label=label), jnp.int32(0)) for label in labels]
        return not any(isinstance(move, Assign) for each in moves for move in each)

    def start_of(self, variable: str, leaf: Array, label: str | None) -> Array:
        """The start of a variable for a leaf with this label; no elements if the leaf does not have it."""
        own = self.labels is None or label is None or variable in self.labels.variables[label]
        return self.variables[variable].init(leaf) if own else jnp.zeros(0, leaf.dtype)

    def program(self, call: str) -> "Optimizer":
        """The optimizer itself, since it is a program of moves."""
        return self

    def shape_of_hypers(self, params: PyTree, names: Sequence[str]) -> tuple[PyTree, Sequence[str]]:
        """The tree of which hyperparameters are prefixes, and the names of its leaves, for messages."""
        return params, names

    def start(
        self, call: str, state: Mapping[str, PyTree] | None, hypers: Mapping[str, Array], at: PyTree
    ) -> tuple[list[Leaf], Layout]:
        """The state before the first step, by leaf.

        Args:
          call: the user's call, for messages.
          state: as the user gave it; None for a run from the beginning.
          hypers: hyperparameters of the first step, by name.
          at: the parameters, a tree.

        Returns:
          The float state by leaf, and its layout.

        Raises:
          ValueError: if the state or the labels do not fit the optimizer.
        """
        leaves, structure = jax.tree.flatten(at)
        labels = self.labels_of(call, at, leaves)
        state = {} if state is None else state
        check_state(call, state, self.variables)
        unknown = sorted(set(state) - {*self.variables, STEP, EXACT})
        if unknown:
            raise ValueError(f"{call}: state has {unknown}; {self.name} keeps {list(self.variables)}")
        start: list[Leaf] = [{PARAMS: leaf} for leaf in leaves]
        for name in self.variables:
            given = _given_variable(call, name, state[name], structure) if name in state else None
            for i, leaf in enumerate(leaves):
                begin = partial(self.start_of, name, label=None if labels is None else labels[i])
                if given is None:
                    start[i][name] = begin(leaf)
                else:
                    start[i][name] = _cast_variable(call, name, given[i], jax.eval_shape(begin, leaf))
        return start, Layout(structure, None, labels)

    def flat(self, call: str, variables: Mapping[str, PyTree], at: PyTree) -> tuple[list[Leaf], Layout]:
        """The float state from parameters and all variables, unchecked; undoes `state_of`."""
        leaves, structure = jax.tree.flatten(at)
        flat = {PARAMS: leaves} | {name: jax.tree.leaves(variables[name]) for name in self.variables}
        start = [{name: x[i] for name, x in flat.items()} for i in range(len(leaves))]
        return start, Layout(structure, None, self.labels_of(call, at, leaves))

    def labels_of(self, call: str, params: PyTree, leaves: Sequence[Array]) -> tuple[str, ...] | None:
        """The labels of the leaves, checked; None if all have the same program."""
        if self.labels is None:
            return None
        labels = tuple(self.labels.of(params))
        unknown = sorted({str(label) for label in labels} - set(self.labels.variables))
        if unknown or len(labels) != len(leaves):
            raise ValueError(
                f"{call}: {self.name} has optimizers for the labels {sorted(self.labels.variables)}, "
                f"and the {len(leaves)} leaves of params are labelled {list(labels)}"
            )
        return labels

    def state_of(self, leaves: Sequence[Leaf], layout: Layout) -> dict[str, PyTree]:
        """The optimizer's variables in the float state of a run: by name, trees like the parameters."""
        unflatten = layout.params.unflatten
        return {name: unflatten([leaf[name] for leaf in leaves]) for name in self.variables}

    def advance(self, at: FloatStep, layout: Layout) -> list[Leaf]:
        """The float state after a step."""
        return step(at.moves(), at.leaves, at.observations)

    def words_of(self, variable: str) -> int:
        """Number of low words of a variable, or of the parameters."""
        return 0 if variable == PARAMS else self.variables[variable].words


@dataclass(frozen=True)
class GenericOptimizer:
    """An optimizer that is not a program of moves but a function of all parameters at once; not reversible.

    Attributes:
      name: as the user would write it.
      init: from the parameters to the optimizer's state, any pytree.
      update: ``(h, gradient, state, params, context) -> (params, state)``, where ``h`` is a dictionary of
        scalars and ``context`` a `StepContext`.
      hypers: names and default values of the hyperparameters; None marks one that must be given.
      domains: lower and upper end of the half-open range ``[low, high)`` of each hyperparameter.
      per_example: whether `update` receives `Examples` in place of the gradient.
      init_from_hypers: whether init is ``init(h, params)``, with the hyperparameters of the first step.
      reversible: False.
      variables: empty, as the state is one for all parameters.
      blocks: None.
      observe: None.
      transform: None.
      labels: None.
      parts: empty.
      by_moves: False.
    """

    name: str
    init: Callable[..., PyTree]
    update: Callable[[Mapping[str, Array], Any, PyTree, PyTree, StepContext], tuple[PyTree, PyTree]]
    hypers: Mapping[str, float | None] = field(default_factory=dict)
    domains: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    per_example: bool = False
    init_from_hypers: bool = False
    reversible: bool = field(default=False, init=False)
    variables: Mapping[str, Variable] = field(default_factory=dict, init=False)
    blocks: None = field(default=None, init=False)
    observe: None = field(default=None, init=False)
    transform: None = field(default=None, init=False)
    labels: None = field(default=None, init=False)
    parts: Mapping[str, Optimizer] = field(default_factory=dict, init=False)
    by_moves: bool = field(default=False, init=False)

    def program(self, call: str) -> Optimizer:
        """Raise a `ReversalError`: the optimizer is not a program of moves."""
        raise ReversalError(
            f"{call}: {self.name} is no program of invertible moves, so it has no exact "
            "reversal; pass adjoint=Checkpointed() or Stored()"
        )

    def shape_of_hypers(self, params: PyTree, names: Sequence[str]) -> tuple[PyTree, Sequence[str]]:
        """One number, the same for all parameters; see `Optimizer.shape_of_hypers`."""
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)] or [float]  # no leaves if all are masked
        return jnp.zeros((), dtypes[0]), ["all parameters"]

    def start(
        self, call: str, state: Mapping[str, PyTree] | None, hypers: Mapping[str, Array], at: PyTree
    ) -> tuple[list[Leaf], Layout]:
        """The state before the first step, the optimizer's own as one more leaf; see `Optimizer.start`."""
        if state is not None:
            check_state(call, state, ["state"])
        if state is not None and set(state) != {"state"}:
            raise ValueError(f"{call}: state has {sorted(state)}; {self.name} keeps ['state']")
        initial = self.init(hypers, at) if self.init_from_hypers else self.init(at)
        given = initial if state is None else state["state"]
        like: Any = jax.tree.structure(initial)
        found: Any = jax.tree.structure(given)
        if like != found:
            raise ValueError(
                f"{call}: state['state'] has the tree structure {found}, and {self.name} keeps {like}"
            )
        return self.flat(call, {"state": given}, at)

    def flat(self, call: str, variables: Mapping[str, PyTree], at: PyTree) -> tuple[list[Leaf], Layout]:
        """The float state from parameters and the optimizer's state, unchecked; undoes `state_of`."""
        leaves, structure = jax.tree.flatten(at)
        state = variables["state"]
        layout = Layout(structure, jax.tree.structure(state))
        return [*({PARAMS: leaf} for leaf in leaves), _one_more_leaf(state)], layout

    def state_of(self, leaves: Sequence[Leaf], layout: Layout) -> dict[str, PyTree]:
        """The optimizer's state in the float state of a run: one tree with the name ``state``."""
        last = leaves[-1]
        return {"state": layout.state.unflatten([last[f"{k}"] for k in range(len(last))])}

    def advance(self, at: FloatStep, layout: Layout) -> list[Leaf]:
        """The float state after a step."""
        unflatten = layout.params.unflatten
        gradient = unflatten([each["gradient"] for each in at.observations])
        given = at.examples() if self.per_example else gradient
        params = unflatten([leaf[PARAMS] for leaf in at.leaves[:-1]])
        state = self.state_of(at.leaves, layout)["state"]
        new, state = self.update(at.hypers, given, state, params, at.context())
        moved: list[Leaf] = [{PARAMS: x} for x in jax.tree.leaves(new)]
        like = [*moved, _one_more_leaf(state)]
        return jax.tree.map(lambda x, old: x.astype(old.dtype), like, list(at.leaves))


AnyOptimizer = Optimizer | GenericOptimizer


def is_optimizer(x: Any) -> bool:
    """Whether something is an optimizer of either kind."""
    return isinstance(x, AnyOptimizer)


def _given_variable(call: str, name: str, tree: PyTree, structure: Any) -> list[Array]:
    """The leaves of a variable that the user has given."""
    given, other = jax.tree.flatten(tree)
    if other != structure:
        raise ValueError(f"{call}: state[{name!r}] has the tree structure {other}, params has {structure}")
    check_arrays(call, f"state[{name!r}]", tree)
    return given


def _cast_variable(call: str, name: str, given: Any, default: Any) -> Array:
    """One leaf of a given variable, in the dtype that is needed; refused if its shape differs."""
    if np.shape(given) != default.shape:
        raise ValueError(
            f"{call}: state[{name!r}] has a leaf of shape {list(np.shape(given))} where "
            f"{list(default.shape)} is needed"
        )
    check_finite(call, f"state[{name!r}]", given)
    return jnp.asarray(given, default.dtype)


def _one_more_leaf(state: PyTree) -> Leaf:
    """The state of an optimizer of all parameters at once, as one more leaf beside theirs."""
    return {f"{k}": jnp.asarray(x, jnp.result_type(x)) for k, x in enumerate(jax.tree.leaves(state))}


def with_defaults(call: str, optimizer: AnyOptimizer, hypers: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The hyperparameters of an optimizer; those that are not given have their defaults.

    Args:
      call: the user's call, for messages.
      optimizer: to which the hyperparameters belong.
      hypers: given hyperparameters, by name.

    Returns:
      All hyperparameters, by name.

    Raises:
      ValueError: if the optimizer does not have a name, or a required one is missing.
    """
    unknown = sorted(set(hypers) - set(optimizer.hypers))
    missing = sorted(k for k, value in optimizer.hypers.items() if value is None and k not in hypers)
    if unknown or missing:
        raise ValueError(
            f"{call}: hypers must have the names {list(optimizer.hypers)}; "
            f"unknown: {unknown}, missing: {missing}"
        )
    return {**optimizer.hypers, **hypers}


def first_params_move(moves: Sequence[Move]) -> int:
    """Index of the first move of the parameters; the number of moves if there is none."""
    return next((k for k, move in enumerate(moves) if moved_variable(move) == PARAMS), len(moves))


def view_of(
    move: Move, k: int, moves: Sequence[Move], leaf: Leaf, observations: Observed, record: Record
) -> View:
    """What move ``k`` may read of a leaf.

    Args:
      move: number ``k`` of the moves.
      k: index of the move.
      moves: all moves of the leaf.
      leaf: its float state when the move is made.
      observations: the gradient and whatever else is observed of the leaf.
      record: what was remembered or kept earlier in the step.
    """
    if isinstance(move, Assign | Remember | Total | Keep):
        return View({**leaf, **record, **observations}, {})
    evaluated = ["gradient", *observations]
    if isinstance(move, Scale):
        reason = f"the factor of Scale({move.variable!r}, ...) can read only what Remember(...) has kept"
        return View(record, dict.fromkeys([*leaf, *evaluated], reason))
    readable: dict[str, Any] = {name: x for name, x in leaf.items() if name != move.variable} | record
    refused = {
        move.variable: f"Shift({move.variable!r}, ...) reads {move.variable!r} itself and so could not "
        "be undone; use Scale for a multiple of it, or Assign (not reversible)"
    }
    if k < first_params_move(moves):
        readable |= observations
    else:
        refused |= {
            name: f"Shift({move.variable!r}, ...) reads the {name} after or while the parameters move; "
            "it is taken at the parameters before the step and could not be found again on the way "
            "back; put the move before those of the parameters, or use Assign (not reversible)"
            for name in evaluated
        }
    return View(readable, refused)


def straight_through(value: Array, derivative: Array) -> Array:
    """An array that has this value and is differentiated as ``derivative``."""
    return derivative + jax.lax.stop_gradient(value - derivative)


def alike(program: Sequence[Sequence[Move]]) -> list[list[int]]:
    """Groups of leaves that are moved together: those whose programs consist of the same moves."""
    groups: dict[Any, list[int]] = {}
    for i, moves in enumerate(program):
        groups.setdefault(tuple((type(move), move[0]) for move in moves), []).append(i)
    return list(groups.values())


T = TypeVar("T")


def members(group: Sequence[int], each: Sequence[T] | Mapping[int, T]) -> list[T]:
    """The entries of a list, or of a dictionary by index, that belong to a group."""
    return [each[i] for i in group]


def step(
    program: Sequence[Sequence[Move]],
    leaves: Sequence[Leaf],
    observations: Sequence[Observed],
    kept: Sequence[Record] | None = None,
) -> list[Leaf]:
    """One step in floats, with the same quantized factors as the exact step: what JAX differentiates.

    Args:
      program: the moves of every leaf.
      leaves: the float state before the step.
      observations: the gradient and whatever else is observed, by leaf.
      kept: what `Keep` kept in this step, by leaf, if it is known.

    Returns:
      The float state after the step.
    """
    new = [dict(leaf) for leaf in leaves]
    for group in alike(program):
        known = [{} for _ in group] if kept is None else members(group, kept)
        moved = _step_alike(
            members(group, program), members(group, leaves), members(group, observations), known
        )
        for i, leaf in zip(group, moved):
            new[i] = leaf
    return new


def _step_alike(
    program: Sequence[Sequence[Move]],
    leaves: Sequence[Leaf],
    observations: Sequence[Observed],
    kept: Sequence[Record],
) -> list[Leaf]:
    """`step` for leaves whose programs are alike."""
    new = [dict(leaf) for leaf in leaves]
    records: list[Record] = [{} for _ in leaves]
    dtypes = [leaf[PARAMS].dtype for leaf in leaves]
    for k, move in enumerate(program[0]):
        if isinstance(move, Remember | Total | Keep):
            records = remember(k, program, new, observations, records, dtypes)
            if isinstance(move, Keep):
                records = [_as_kept(move.name, *each) for each in zip(records, kept)]
            continue
        jobs = [partial(_moved_to, k, *each) for each in zip(program, new, observations, records)]
        evaluate = move.evaluate if isinstance(move, Assign) else in_turn
        for leaf, start, value in zip(new, leaves, evaluate(jobs)):
            leaf[moved_variable(move)] = value.astype(start[moved_variable(move)].dtype)
    return new


def _as_kept(name: str, record: Record, kept: Record) -> Record:
    """A record whose entry has the value that was kept, if it is known, and the derivative as it stands."""
    return record | ({name: straight_through(kept[name], record[name])} if name in kept else {})


def _moved_to(k: int, moves: Sequence[Move], leaf: Leaf, observations: Observed, record: Record) -> Array:
    """The variable of move ``k`` after the move, in floats."""
    move, view = moves[k], view_of(moves[k], k, moves, leaf, observations, record)
    if isinstance(move, Scale):
        x, exactly = leaf[move.variable], factor_of(move, view)
        factor = jax.lax.stop_gradient(jnp.asarray(exactly, x.dtype))
        quantized = exact.quantized(factor, move.numerator(factor))
        return straight_through(quantized * x, exactly * x)
    if isinstance(move, Shift):
        return leaf[move.variable] + move.amount(view)
    assert isinstance(move, Assign)
    return jnp.asarray(move.value(view))


def remember(
    k: int,
    program: Sequence[Sequence[Move]],
    leaves: Sequence[Leaf],
    observations: Sequence[Observed],
    records: Sequence[Record],
    dtypes: Sequence[Any],
) -> list[Record]:
    """Add to the records what move ``k`` remembers or keeps.

    Args:
      k: index of the move.
      program: the moves of every leaf, alike.
      leaves: the float state when the move is made, by leaf.
      observations: the gradient and whatever else is observed, by leaf.
      records: what was remembered or kept earlier in the step, by leaf.
      dtypes: of the new entries, by leaf.
    """
    values, names = [], []
    for moves, *parts in zip(program, leaves, observations, records):
        move = moves[k]
        assert isinstance(move, Remember | Total | Keep)
        value = jnp.asarray(move.value(view_of(move, k, moves, *parts)))
        values.append(jnp.broadcast_to(value, parts[0][PARAMS].shape) if isinstance(move, Keep) else value)
        names.append(move.name)
    if isinstance(program[0][k], Total):
        values = [sum(values, start=jnp.zeros((), values[0].dtype))] * len(values)
    return [
        {**record, name: value.astype(dtype)}
        for record, name, value, dtype in zip(records, names, values, dtypes)
    ]


def factor_of(move: Scale, view: View) -> Any:
    """The factor of a scale, evaluated on remembered scalars if it is a function."""
    return move.factor(view) if callable(move.factor) else move.factor


def moved_variable(move: Move) -> str:
    """The variable that a move changes; the empty string if it only remembers or keeps."""
    return "" if isinstance(move, Remember | Total | Keep) else move.variable
