"""Different optimizers for different parts of the parameters, and parts that are not trained."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
from jax import Array

from hypergrad.program import (
    PARAMS,
    Assign,
    Keep,
    Labels,
    Move,
    Optimizer,
    Remember,
    Scale,
    Shift,
    Total,
    Variable,
    is_optimizer,
)

PyTree = Any


def partition(
    optimizers: Mapping[str, Optimizer], labels: PyTree | Callable[[PyTree], PyTree]
) -> Optimizer:
    """One optimizer for every label: ``w_i <- step of optimizers[label_i]``, for every leaf ``i``.

    Like `optax.partition` (or ``multi_transform``), and with `frozen` like ``optax.masked``.  Optimizers
    that sum over leaves, as `prodigy` does, sum over those of their label.

    Hyperparameters and variables are called ``"label.name"``, with the defaults and domains of each
    optimizer.  They may be schedules or differ by leaf like any others; their values at leaves of other
    labels are not used.  A variable has no elements for the leaves of other labels.  Reversible if all
    optimizers are, at the cost of each.  Transformations of all gradients go around it,
    ``clip(partition(...))``; `with_average` may go around it or inside.

    Args:
      optimizers: optimizers by label; each label is a Python identifier.
      labels: a tree of strings that is a prefix of the parameters, or a function to such a tree from the
        parameters, of which it may use structure, shapes and dtypes.

    Returns:
      An optimizer for `hypergrad.train`.

    Raises:
      TypeError: the optimizer is not a program of moves.
      ValueError: a label is not an identifier; an optimizer transforms gradients, observes the network,
        acts on blocks or is a partition; or, from `hypergrad.train`, labels do not fit the parameters or
        have no optimizer.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> w = {"weights": jnp.ones((1, 1)), "bias": jnp.ones(2)}
    >>> square = lambda w, meta, step: jnp.sum(w["weights"] ** 2) + jnp.sum(w["bias"] ** 2)
    >>> optimizer = hg.partition(
    ...     {"matrices": hg.muon(), "others": hg.adamw()},
    ...     lambda w: {k: "matrices" if x.ndim == 2 else "others" for k, x in w.items()})
    >>> hypers = {"matrices.learning_rate": 0.1, "others.learning_rate": 0.25, "others.weight_decay": 0.0}
    >>> trained = hg.train(square, w, hypers, steps=1, optimizer=optimizer)
    >>> trained.params["bias"], round(float(trained.params["weights"][0, 0]), 3)
    (Array([0.75, 0.75], dtype=float32), 0.93)
    >>> trained.state["matrices.mu"]["bias"].shape
    (0,)
    """
    _check(optimizers)
    optimizers = dict(optimizers)
    name = f"partition({{{', '.join(f'{label!r}: {each.name}' for label, each in optimizers.items())}}})"

    def of(params: PyTree) -> list[str]:
        tree = labels(params) if callable(labels) else labels
        try:
            return jax.tree.leaves(jax.tree.broadcast(tree, params))
        except ValueError as error:
            raise ValueError(
                f"{name}: labels must be a tree of strings that is a prefix of params, or a function from "
                f"params to such a tree, and are {tree!r}: {error}"
            ) from None

    def moves(h: Any, t: Array) -> Sequence[Move]:
        inner = optimizers[h.label]
        prefix = f"{h.label}."
        own = SimpleNamespace(**{key: getattr(h, prefix + key) for key in inner.hypers})
        return _renamed(prefix, frozenset(inner.variables), inner.moves(own, t))

    def named(of_each: Callable[[Optimizer], Mapping[str, Any]]) -> dict[str, Any]:
        return {f"{k}.{name}": x for k, each in optimizers.items() for name, x in of_each(each).items()}

    variables: dict[str, Variable] = named(lambda each: each.variables)
    return Optimizer(
        name=name,
        moves=moves,
        variables=variables,
        hypers=named(lambda each: each.hypers),
        domains=named(lambda each: {k: x for k, x in each.domains.items() if k in each.hypers}),
        labels=Labels(
            of,
            {
                label: frozenset(f"{label}.{name}" for name in each.variables)
                for label, each in optimizers.items()
            },
        ),
        parts=optimizers,
    )


def frozen() -> Optimizer:
    """No optimizer: ``w <- w``.  For the parts of a `partition` that are not trained.

    It has no hyperparameters and no variables.  Reversible: costs nothing.  These parts are constants of
    the run, and their hypergradient is that of their start.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> square = lambda w, meta, step: jnp.sum((w[0] * w[1]) ** 2)
    >>> optimizer = hg.partition({"head": hg.heavy_ball(), "body": hg.frozen()}, ("body", "head"))
    >>> hypers = {"head.learning_rate": 0.25, "head.momentum": 0.5}
    >>> hg.train(square, (jnp.ones(1), jnp.ones(1)), hypers, steps=1, optimizer=optimizer).params
    (Array([1.], dtype=float32), Array([0.5], dtype=float32))
    """
    return Optimizer("frozen()", lambda h, t: [])


class _Own:
    """A view of a leaf in which an optimizer finds its own entries by their plain names."""

    def __init__(self, view: Any, prefix: str, own: frozenset[str]):
        self._view, self._prefix, self._own = view, prefix, own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, self._prefix + name if name in self._own else name)


def _renamed(prefix: str, variables: frozenset[str], moves: Sequence[Move]) -> list[Move]:
    """The same moves, on variables whose names have a prefix.

    Remembered values have the prefix too: if moves had the same names, leaves of other labels would be
    moved together with these, and summed over.
    """
    own = variables | {move.name for move in moves if isinstance(move, Remember | Total | Keep)}

    def on(name: str) -> str:
        return name if name == PARAMS else prefix + name

    def reads(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda view: function(_Own(view, prefix, own))

    def renamed(move: Move) -> Move:
        match move:
            case Scale():
                factor = reads(move.factor) if callable(move.factor) else move.factor
                return move._replace(variable=on(move.variable), factor=factor)
            case Shift():
                return move._replace(variable=on(move.variable), amount=reads(move.amount))
            case Assign():
                return move._replace(variable=on(move.variable), value=reads(move.value))
            case Remember() | Total() | Keep():
                return move._replace(name=prefix + move.name, value=reads(move.value))

    return [renamed(move) for move in moves]


def _check(optimizers: Any) -> None:
    """Refuse optimizers that cannot be combined."""
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise TypeError(
            f"partition({optimizers!r}, labels): optimizers must be a dictionary by label, such as "
            '{"matrices": hypergrad.muon(), "others": hypergrad.adamw()}'
        )
    for label, each in optimizers.items():
        shown = getattr(each, "name", getattr(each, "__name__", type(each).__name__))
        call = f"partition({{{label!r}: {shown}, ...}}, labels)"
        if not isinstance(label, str) or not label.isidentifier():
            raise ValueError(
                f"{call}: a label must be a name of letters, digits and underscores, as hyperparameters "
                f"are called label.name; {label!r} is none"
            )
        if not is_optimizer(each):
            brackets = f", which makes one: add brackets, {shown}()" if callable(each) else ""
            raise TypeError(f"{call}: {shown} is no optimizer{brackets}")
        if not each.by_moves:
            raise TypeError(
                f"{call}: {shown} is no program of moves. For optimizers of optax, pass from_optax a "
                "function that builds optax.partition({...}, labels) from all hyperparameters"
            )
        for what, why in (
            (each.transform, "changes all gradients together; put it around, clip(partition(...))"),
            (each.observe, "observes the whole network; use it for all parameters, or train in turns"),
            (each.blocks, "acts on blocks of the whole network; use it for all parameters"),
            (each.labels, "is a partition itself; name its optimizers in the outer one"),
        ):
            if what is not None:
                raise ValueError(f"{call}: {shown} {why}")
