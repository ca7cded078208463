"""An optimizer is a short program of moves; everything else is derived from it.

One step of training evaluates the gradient at the parameters, and what else the optimizer observes there,
and then makes the moves in order.

=====================================  ==========================================  ====================
move                                   meaning                                     undone by
=====================================  ==========================================  ====================
``Scale(x, factor)``                   ``x <- factor x``, factor in (0, 1]         `exact.unscale`
``Shift(x, amount)``                   ``x <- x + amount(all except x)``           `exact.unshift`
``Remember(name, value)``              ``name = value(everything)``, a scalar      reading it again
``Total(name, value)``                 the same, summed over all leaves            reading it again
``Keep(name, value, levels)``          an array whose elements are levels          reading it again
``Assign(x, value)``                   ``x <- value(everything)``                  nothing
=====================================  ==========================================  ====================

Moves are written for *one* leaf of the parameters, as the paper writes them; the library maps them over
the tree.  A leaf is an array of the user's, or a block put together from several (see `Blocks`).  From the
one list come `step` (floats; what JAX differentiates) and the step on integers and its inverse, the list
backwards (`Exact`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Var

from hypergrad import exact
from hypergrad.devices import Evaluate, in_turn

PyTree = Any
PARAMS = "params"
RADIX = 48  # values up to 2**14 in steps of 2**-48: finer than float64 needs near one


class ReversalError(ArithmeticError):
    """The run cannot be, or was not, reversed exactly; no hypergradient is returned."""


class View:
    """What a move may read, by attribute: the leaf of every variable, the gradient, what is observed.

    Reading what the move may not depend on is refused: that is what makes a `Shift` invertible.
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

    The factor may depend on hyperparameters and the step only, or, as a function of a view, on scalars
    remembered in the same step too; how many bits it will cost is then not known before the run.  It is
    differentiated as written; the rounding of the ratio is not.
    """

    variable: str
    factor: Any
    numerator: Callable[[Array], Array] = exact.numerator


class Shift(NamedTuple):
    """``variable <- variable + amount(view)``, where the view lacks the variable itself.

    The gradient and what else is observed are taken at the parameters before the step, so a shift of the
    parameters, or anything after one, cannot read them.
    """

    variable: str
    amount: Callable[[Any], Array]


class Remember(NamedTuple):
    """``name = value(view)``: a scalar for every leaf, of anything at all, for later moves of the step.

    It is recorded at every step and read again on the way back, which makes moves reversible that depend
    on their own variable through one number only, such as its norm.
    """

    name: str
    value: Callable[[Any], Array]


class Total(NamedTuple):
    """``name = Σ value(view)``, the sum over all leaves: a `Remember` that is the same for all."""

    name: str
    value: Callable[[Any], Array]


class Keep(NamedTuple):
    """``name = value(view)``: an array like the leaf, of anything at all, whose elements are ``levels``.

    A sign, ``(-1.0, 0.0, 1.0)``, or a mask, ``(0.0, 1.0)``.  It is recorded at every step, in
    ``log2(len(levels))`` bits per element, and read again on the way back, which makes moves reversible
    that depend on their own variable through few levels only.  Its derivative is that of the value: of a
    sign 0.
    """

    name: str
    value: Callable[[Any], Array]
    levels: tuple[float, ...]


class Assign(NamedTuple):
    """``variable <- value(view)``, of anything at all; such a program cannot be reversed.

    Evaluate is what evaluates the values of all leaves, on what devices (see `hypergrad.devices`).
    """

    variable: str
    value: Callable[[Any], Array]
    evaluate: Evaluate = in_turn


Move = Scale | Shift | Remember | Total | Keep | Assign


class Variable(NamedTuple):
    """A variable that the optimizer keeps for every leaf of the parameters.

    Attributes:
      init: from a leaf of the parameters to the variable's start.
      radix: binary digits after the point in exact arithmetic; the range is ``2**(62 - radix)``.
    """

    init: Callable[[Array], Array] = jnp.zeros_like
    radix: int = RADIX


class Blocks(NamedTuple):
    """How the user's parameters are put together to the arrays that moves act on.

    Attributes:
      merge: from parameters to a tree of arrays; bit for bit undone by `split`, and linear like it.
      split: from such a tree, and a tree of the shapes of the parameters, to parameters.
    """

    merge: Callable[[PyTree], PyTree]
    split: Callable[[PyTree, PyTree], PyTree]


@dataclass(frozen=True)
class Optimizer:
    """One description of an optimizer, from which every way to run it is derived.

    Attributes:
      name: as the user would call it.
      moves: ``(h, t) -> [moves]`` for one leaf, with ``h.<hyperparameter>`` at step ``t = 0, 1, ...``.
      variables: what is kept beside the parameters.
      hypers: names and default values of the hyperparameters; None marks one that must be given.
      domains: for each hyperparameter, lower and upper end of the half-open range ``[low, high)``.
      radix: of the parameters.
      transform: of the gradient before the moves see it, on all leaves at once: from a list of ``h`` and a
        list of gradients to a list like it; None leaves it as it is.
      blocks: on what the moves act, if not on the leaves of the parameters; "leaf" then means "block", and
        hyperparameters and variables are trees of blocks.
      observe: ``(params, meta, batch, step) -> {name: tree of arrays}``, what moves may read of the
        parameters before the step besides the gradient, as ``s.<name>``; like the gradient it is found
        again on the way back, and differentiated.  The trees are like the blocks, the arguments as the loss
        has them.

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
    moves: Callable[[Any, Array], Sequence[Move]]
    variables: Mapping[str, Variable] = field(default_factory=dict)
    hypers: Mapping[str, float | None] = field(default_factory=dict)
    domains: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    radix: int = RADIX
    transform: Callable[[Sequence[Any], Sequence[Array]], Sequence[Array]] | None = None
    blocks: Blocks | None = None
    observe: Callable[[PyTree, PyTree, PyTree, Array], Mapping[str, PyTree]] | None = None

    @property
    def reversible(self) -> bool:
        """Whether every move can be undone."""
        h = SimpleNamespace(**dict.fromkeys(self.hypers, jnp.float32(0.5)))
        return not any(isinstance(move, Assign) for move in self.moves(h, jnp.int32(0)))

    def radix_of(self, variable: str) -> int:
        """Binary digits after the point of a variable, or of the parameters."""
        return self.radix if variable == PARAMS else self.variables[variable].radix


class Examples(NamedTuple):
    """The minibatch of a step, for an optimizer that looks at single examples.

    Attributes:
      loss: ``loss(params, batch) -> scalar`` for a batch of one: every array with a leading axis of 1.
      batch: ``n >= 2`` examples, the leading axis of every array.  Minimised is the mean of their losses.
    """

    loss: Callable[[PyTree, PyTree], Array]
    batch: PyTree


class Here(NamedTuple):
    """What an optimizer of all parameters at once may evaluate anew in a step.

    Attributes:
      loss: from parameters to the inner loss, on the batch of the step.
      value: the loss at the parameters before the step.
      meta: as the loss has it.
      batch: as the loss has it.
    """

    loss: Callable[[PyTree], Array]
    value: Array
    meta: PyTree
    batch: PyTree


@dataclass(frozen=True)
class Whole:
    """An optimizer that is no program of moves but a function of all parameters at once; not reversible.

    Attributes:
      name: as the user would call it.
      init: from the parameters to the optimizer's state, any pytree.
      update: ``(h, gradient, state, params, here) -> (params, state)``, with ``h`` a dictionary of scalars
        and a `Here`.
      hypers: names and default values of the hyperparameters; None marks one that must be given.
      domains: for each hyperparameter, lower and upper end of the half-open range ``[low, high)``.
      per_example: whether `update` is given `Examples` in the gradient's place.
    """

    name: str
    init: Callable[[PyTree], PyTree]
    update: Callable[[Mapping[str, Array], Any, PyTree, PyTree, Here], tuple[PyTree, PyTree]]
    hypers: Mapping[str, float | None] = field(default_factory=dict)
    domains: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    per_example: bool = False
    reversible: bool = field(default=False, init=False)


def with_defaults(
    call: str, optimizer: Optimizer | Whole, hypers: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """The hyperparameters of an optimizer, those that are not given at their defaults.

    Args:
      call: the user's call, for messages.
      optimizer: whose they are.
      hypers: by name.

    Raises:
      ValueError: for names that the optimizer does not have, or that are missing.
    """
    unknown = sorted(set(hypers) - set(optimizer.hypers))
    missing = sorted(k for k, value in optimizer.hypers.items() if value is None and k not in hypers)
    if unknown or missing:
        raise ValueError(
            f"{call}: hypers must have the names {list(optimizer.hypers)}; "
            f"unknown: {unknown}, missing: {missing}"
        )
    return {**optimizer.hypers, **hypers}


class ExactLeaf(NamedTuple):
    """Exact state of one leaf: integers by variable, and one buffer for every `Scale` of the program."""

    high: dict[str, Array]
    buffers: list[exact.Buffer]


Leaf = dict[str, Array]  # float state of one leaf: params and the optimizer's variables
Seen = dict[str, Array]  # of one leaf: the gradient and what is observed, at the parameters before the step
Record = dict[str, Array]  # the scalars of one leaf that were remembered in one step


def _first_params_move(moves: Sequence[Move]) -> int:
    return next((k for k, move in enumerate(moves) if _moved(move) == PARAMS), len(moves))


def _view(move: Move, k: int, moves: Sequence[Move], leaf: Leaf, seen: Seen, record: Record) -> View:
    """What move ``k`` may read of a leaf."""
    if isinstance(move, Assign | Remember | Total | Keep):
        return View({**leaf, **record, **seen}, {})
    evaluated = ["gradient", *seen]
    if isinstance(move, Scale):
        reason = f"the factor of Scale({move.variable!r}, ...) can read only what Remember(...) has kept"
        return View(record, dict.fromkeys([*leaf, *evaluated], reason))
    readable: dict[str, Any] = {name: x for name, x in leaf.items() if name != move.variable} | record
    refused = {
        move.variable: f"Shift({move.variable!r}, ...) reads {move.variable!r} itself and so could not "
        "be undone; use Scale for a multiple of it, or Assign (not reversible)"
    }
    if k < _first_params_move(moves):
        readable |= seen
    else:
        refused |= {
            name: f"Shift({move.variable!r}, ...) reads the {name} after or while the parameters move; "
            "it is taken at the parameters before the step and could not be found again on the way "
            "back; put the move before those of the parameters, or use Assign (not reversible)"
            for name in evaluated
        }
    return View(readable, refused)


def straight_through(value: Array, derivative: Array) -> Array:
    """Evaluates to ``value`` and differentiates as ``derivative``."""
    return derivative + jax.lax.stop_gradient(value - derivative)


def step(program: Sequence[Sequence[Move]], leaves: Sequence[Leaf], seen: Sequence[Seen]) -> list[Leaf]:
    """One step in floats, with the same quantised factors as the exact one: what JAX differentiates.

    Args:
      program: the moves of every leaf.
      leaves: float state.
      seen: gradient and what is observed, of every leaf.
    """
    new = [dict(leaf) for leaf in leaves]
    records: list[Record] = [{} for _ in leaves]
    dtypes = [leaf[PARAMS].dtype for leaf in leaves]
    for k, move in enumerate(program[0]):
        if isinstance(move, Remember | Total | Keep):
            records = _remembered(k, program, new, seen, records, dtypes)
            continue
        jobs = [partial(_moved_to, k, *each) for each in zip(program, new, seen, records)]
        evaluate = move.evaluate if isinstance(move, Assign) else in_turn
        for leaf, start, value in zip(new, leaves, evaluate(jobs)):
            leaf[_moved(move)] = value.astype(start[_moved(move)].dtype)
    return new


def _moved_to(k: int, moves: Sequence[Move], leaf: Leaf, seen: Seen, record: Record) -> Array:
    """What move ``k`` makes of its variable, in floats."""
    move, view = moves[k], _view(moves[k], k, moves, leaf, seen, record)
    if isinstance(move, Scale):
        x, exactly = leaf[move.variable], factor_of(move, view)
        factor = jax.lax.stop_gradient(jnp.asarray(exactly, x.dtype))
        quantised = exact.quantised(factor, move.numerator(factor))
        return straight_through(quantised * x, exactly * x)
    if isinstance(move, Shift):
        return leaf[move.variable] + move.amount(view)
    assert isinstance(move, Assign)
    return jnp.asarray(move.value(view))


def _remembered(
    k: int,
    program: Sequence[Sequence[Move]],
    leaves: Sequence[Leaf],
    seen: Sequence[Seen],
    records: Sequence[Record],
    dtypes: Sequence[Any],
) -> list[Record]:
    """The records with what move ``k`` remembers added."""
    values, names = [], []
    for moves, *parts in zip(program, leaves, seen, records):
        move = moves[k]
        assert isinstance(move, Remember | Total | Keep)
        value = jnp.asarray(move.value(_view(move, k, moves, *parts)))
        values.append(jnp.broadcast_to(value, parts[0][PARAMS].shape) if isinstance(move, Keep) else value)
        names.append(move.name)
    if isinstance(program[0][k], Total):
        values = [sum(values, start=jnp.zeros((), values[0].dtype))] * len(values)
    return [
        {**record, name: value.astype(dtype)}
        for record, name, value, dtype in zip(records, names, values, dtypes)
    ]


def factor_of(move: Scale, view: View) -> Any:
    """The factor of a scale, from remembered scalars if it needs them."""
    return move.factor(view) if callable(move.factor) else move.factor


def isolated(live: Array, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Evaluate a function in a compiled computation of its own.

    The same instructions then give the same bits wherever it is called.  A compiler fuses arithmetic
    with what stands around it, and contracts ``a * b + c`` to one rounding where it can: forwards and
    backwards it would not always do so alike.  A branch of a conditional is compiled apart.

    Args:
      live: a scalar that is true, which the compiler must not know.
      function: a pure function of its arguments.
      arguments: pytrees of arrays.
    """
    shapes = jax.eval_shape(function, *arguments)

    def never(*_: PyTree) -> PyTree:
        return jax.tree.map(_zeros, shapes)

    return jax.lax.cond(live, function, never, *arguments)


# Each is one correctly rounded operation for every element, and nothing to fuse changes its bits.
ROUNDED_ALONE = {
    "abs", "broadcast_in_dim", "convert_element_type", "copy", "div", "max", "min", "mul", "neg", "reshape",
    "select_n", "sign", "sqrt", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip


def _rounds_alike(function: Callable[..., PyTree], *arguments: PyTree) -> bool:
    """Whether a function gives the same bits however it is compiled, so that it need not stand apart.

    So it is if it consists of single roundings, and adds or subtracts scalars only, or nothing that a
    multiplication gave; ``a * b + c`` in one rounding would differ.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    products = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name not in ROUNDED_ALONE | {"add", "sub"}:
            return False
        from_product = any(v in products for v in eqn.invars if isinstance(v, Var))
        if name in {"add", "sub"} and from_product:
            return False
        if name == "mul" or from_product:
            products.update(eqn.outvars)
    return True


def _zeros(like: Any) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        key = jax.random.key(0, impl=str(jax.random.key_impl(like)))
        return jnp.broadcast_to(key, like.shape)
    return jnp.zeros(like.shape, like.dtype)


Trouble = tuple[str, str]  # a kind and a variable


class Exact(NamedTuple):
    """The exact arithmetic of an optimizer, on all leaves at once.

    Attributes:
      program: the moves of every leaf at one step, from the hyperparameters and the step.
      radix: binary digits after the point, by variable.
      dtypes: of the floats that the moves see, by leaf.
      x64: whether the user's code runs in JAX's 64-bit mode, which this code must not change for it.
    """

    program: Callable[..., Sequence[Sequence[Move]]]
    radix: Mapping[str, int]
    dtypes: Sequence[Any]
    x64: bool

    def troubles(self) -> list[Trouble]:
        """What can go wrong in a step; the first two are nothing, and a loss that is no number."""
        kinds = [(kind, name) for kind in ("range", "factor") for name in self.radix]
        return [("", ""), ("loss", ""), *kinds]

    def floats(self, leaves: Sequence[ExactLeaf], *names: str) -> list[Leaf]:
        """The float state that the integers stand for: all variables, or those named."""
        return [
            {v: exact.to_float(leaf.high[v], self.radix[v], dtype) for v in names or leaf.high}
            for leaf, dtype in zip(leaves, self.dtypes)
        ]

    def factors(
        self, k: int, at: PyTree, leaves: Sequence[ExactLeaf], records: Sequence[Record], live: Array
    ) -> list[Array]:
        """The numerators by which scale ``k`` of the program multiplies every leaf.

        Args:
          k: index of the move.
          at: arguments of `program`.
          leaves: exact state.
          records: what has been remembered in this step, by leaf.
          live: see `isolated`.
        """
        programs = self.program(*at)

        def evaluate(at: PyTree, records: Sequence[Record]) -> list[Array]:
            result = []
            for moves, leaf, record in zip(self.program(*at), leaves, records):
                move = moves[k]
                assert isinstance(move, Scale)
                with jax.enable_x64(self.x64):
                    result.append(
                        jnp.asarray(factor_of(move, _view(move, k, moves, leaf.high, {}, record)))
                    )
            return result

        numerators = []
        for moves, leaf, factor in zip(programs, leaves, _same_bits(live, evaluate, at, list(records))):
            move = moves[k]
            assert isinstance(move, Scale)
            numerators.append(exact.spread(move.numerator(factor), leaf.high[move.variable].shape))
        return numerators

    def amounts(
        self,
        k: int,
        at: PyTree,
        leaves: Sequence[ExactLeaf],
        seen: Sequence[Seen],
        records: Sequence[Record],
        live: Array,
    ) -> list[Array]:
        """By how much shift ``k`` of the program moves every leaf; arguments as for `factors`."""
        variable = _moved(self.program(*at)[0][k])
        others = [ExactLeaf({v: x for v, x in leaf.high.items() if v != variable}, []) for leaf in leaves]

        def evaluate(at: PyTree, others: list[ExactLeaf], seen: Any, records: Any) -> list[Array]:
            floats, result = self.floats(others), []
            parts = zip(self.program(*at), floats, seen, records, leaves)
            for moves, leaf, see, record, full in parts:
                move = moves[k]
                assert isinstance(move, Shift)
                with jax.enable_x64(self.x64):
                    amount = jnp.asarray(move.amount(_view(move, k, moves, leaf, see, record)))
                result.append(jnp.broadcast_to(amount, full.high[variable].shape))
            return result

        return _same_bits(live, evaluate, at, others, list(seen), list(records))

    def step(
        self,
        at: PyTree,
        leaves: Sequence[ExactLeaf],
        tapes: Sequence[Sequence[Array]],
        seen: Sequence[Seen],
        live: Array,
    ) -> tuple[list[ExactLeaf], list[list[Array]], list[Record], Array]:
        """One step on integers; also what went wrong in it, as an index into `troubles`, or 0."""
        highs = [dict(leaf.high) for leaf in leaves]
        buffers = [list(leaf.buffers) for leaf in leaves]
        new_tapes = [list(leaf) for leaf in tapes]
        records: list[Record] = [{} for _ in leaves]
        wrong = jnp.int32(0)
        scales = 0

        def look(valid: Array, trouble: Trouble) -> Array:
            code = self.troubles().index(trouble)
            return jnp.where((wrong == 0) & ~valid, jnp.int32(code), wrong)

        moves = self.program(*at)
        for k, move in enumerate(moves[0]):
            now = [ExactLeaf(*part) for part in zip(highs, buffers)]
            if isinstance(move, Remember | Total):
                with jax.enable_x64(self.x64):
                    records = _remembered(k, moves, self.floats(now), seen, records, self.dtypes)
                finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(r[move.name])) for r in records]))
                wrong = look(finite, ("loss", ""))
            elif isinstance(move, Scale):
                v = move.variable
                for i, n in enumerate(self.factors(k, at, now, records, live)):
                    wrong = look(exact.admissible(n), ("factor", v))
                    n = jnp.maximum(n, jnp.ones_like(n))  # a division by zero would trap, not tell
                    highs[i][v], buffers[i][scales], new_tapes[i][scales] = exact.scale(
                        highs[i][v], buffers[i][scales], new_tapes[i][scales], n
                    )
                scales += 1
            else:
                assert isinstance(move, Shift)
                v = move.variable
                for high, amount in zip(highs, self.amounts(k, at, now, seen, records, live)):
                    high[v] = exact.shift(high[v], amount, self.radix[v])
                    wrong = look(exact.fits(high[v]), ("range", v))
        return [ExactLeaf(*part) for part in zip(highs, buffers)], new_tapes, records, wrong

    def unstep(
        self,
        at: PyTree,
        leaves: Sequence[ExactLeaf],
        tapes: Sequence[Sequence[Array]],
        seen: Sequence[Seen] | None,
        records: Sequence[Record],
        live: Array,
    ) -> list[ExactLeaf]:
        """Undo a step, in two parts: the parameters are needed to find again what the moves have seen.

        Without that, undoes the moves from the first one of the parameters on; with it, the moves
        before that.
        """
        moves = self.program(*at)[0]
        cut = _first_params_move(moves)
        start, end = (cut, len(moves)) if seen is None else (0, cut)
        given: Sequence[Seen] = [{} for _ in leaves] if seen is None else seen
        highs = [dict(leaf.high) for leaf in leaves]
        buffers = [list(leaf.buffers) for leaf in leaves]
        scales = sum(isinstance(move, Scale) for move in moves[:end])
        for k in reversed(range(start, end)):
            move = moves[k]
            now = [ExactLeaf(*part) for part in zip(highs, buffers)]
            if isinstance(move, Scale):
                v = move.variable
                scales -= 1
                for i, n in enumerate(self.factors(k, at, now, records, live)):
                    n = jnp.maximum(n, jnp.ones_like(n))
                    highs[i][v], buffers[i][scales] = exact.unscale(
                        highs[i][v], buffers[i][scales], tapes[i][scales], n
                    )
            elif isinstance(move, Shift):
                v = move.variable
                for high, amount in zip(highs, self.amounts(k, at, now, given, records, live)):
                    high[v] = exact.unshift(high[v], amount, self.radix[v])
        return [ExactLeaf(*part) for part in zip(highs, buffers)]


def _moved(move: Move) -> str:
    """The variable that a move changes; a `Remember`, `Total` or `Keep` changes none."""
    return "" if isinstance(move, Remember | Total | Keep) else move.variable


def _same_bits(live: Array, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Evaluate a function so that the same bits come out wherever it is called."""
    if _rounds_alike(function, *arguments):
        return function(*arguments)
    return isolated(live, function, *arguments)
