"""The hyperparameters of a run, by groups of parameters that have the same ones."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from hypergrad._base.checks import checked_steps, quoted
from hypergrad._base.trees import PyTree
from hypergrad.exports.series import Series, series
from hypergrad.program import AnyOptimizer, is_optimizer, with_defaults
from hypergrad.schedules import is_schedule

WRAPPERS = {"max_delta": "clip", "max_norm": "clip_by_global_norm", "ema_decay": "with_average"}


class Group(NamedTuple):
    """Parameters that are moved in the same way.

    Attributes:
      optimizer: theirs.
      label: that of a partition; None if there is none.
      paths: of their leaves, such as ``"first.weights"``; None stands for all parameters.
      hypers: by name.
    """

    optimizer: AnyOptimizer
    label: str | None
    paths: tuple[str, ...] | None
    hypers: dict[str, Series]


class Export(NamedTuple):
    """What is exported.

    Attributes:
      call: the user's call, for messages.
      steps: ``T``.
      optimizer: as the user gave it.
      wrappers: what stands around the optimizer of the groups, outermost first: the name of each wrapper,
        and that of its hyperparameter.
      groups: together, all parameters.
    """

    call: str
    steps: int
    optimizer: AnyOptimizer
    wrappers: list[tuple[str, str]]
    groups: list[Group]

    @property
    def title(self) -> str:
        """The first line of source, a comment."""
        return f"# {self.optimizer.name} of hypergrad, {self.steps} steps"


def export(
    function: str, optimizer: AnyOptimizer, hypers: Mapping[str, PyTree], steps: int, params: PyTree
) -> Export:
    """Optimizer and hyperparameters by groups, checked.

    Args:
      function: which the user has called.
      optimizer: the user's, like the following arguments.
      hypers: hyperparameters by name, as `hypergrad.train` takes them.
      steps: ``T``.
      params: parameters, or their shapes; None if nothing depends on the leaf.

    Raises:
      TypeError: the optimizer is none.
      ValueError: a hyperparameter is unknown, missing or invalid; or parameters are missing.
    """
    if not is_optimizer(optimizer):
        raise TypeError(
            f"{function}({quoted(optimizer)}, hypers, steps): the first argument is the optimizer that was "
            "trained with, such as hypergrad.adam()"
        )
    call = f"{function}({optimizer.name}, hypers, steps={steps!r})"
    steps = checked_steps(call, steps)
    given = with_defaults(call, optimizer, hypers)
    by_name = {
        name: jax.tree.map(lambda x, name=name: series(call, name, x, steps), tree, is_leaf=is_schedule)
        for name, tree in given.items()
    }
    wrappers, inner = _unwrapped(optimizer)
    if params is None:
        groups = [Group(inner, None, None, _same_for_all(call, inner, by_name))]
    else:
        groups = _grouped(call, inner, by_name, params)
    return Export(call, steps, optimizer, wrappers, groups)


def _unwrapped(optimizer: AnyOptimizer) -> tuple[list[tuple[str, str]], AnyOptimizer]:
    """The wrappers around an optimizer with the hyperparameter of each, and what is inside them."""
    wrappers: list[tuple[str, str]] = []
    while (inner := optimizer.parts.get("")) is not None:
        wrappers += [(WRAPPERS[name], name) for name in optimizer.hypers if name not in inner.hypers]
        optimizer = inner
    return wrappers, optimizer


def _same_for_all(call: str, optimizer: AnyOptimizer, by_name: Mapping[str, PyTree]) -> dict[str, Series]:
    """Hyperparameters that are the same for all parameters."""
    if optimizer.labels is not None:
        raise ValueError(
            f"{call}: the optimizer depends on the leaf; pass params= too, the parameters or their shapes"
        )
    for name, tree in by_name.items():
        if not isinstance(tree, Series):
            raise ValueError(
                f"{call}: hypers[{name!r}] depends on the leaf; pass params= too, the parameters or their "
                "shapes"
            )
    return dict(by_name)


def _grouped(
    call: str, optimizer: AnyOptimizer, by_name: Mapping[str, PyTree], params: PyTree
) -> list[Group]:
    """The leaves, those with equal optimizers and hyperparameters together."""
    if optimizer.blocks is not None:
        params = jax.eval_shape(optimizer.blocks.merge, params)
    params, _ = optimizer.shape_of_hypers(params, [])
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{call}: two leaves of params have one path in {paths}; rename a key of params")
    labels = [None] * len(flat) if optimizer.labels is None else optimizer.labels.of(params)
    by_leaf = {name: _spread(call, name, tree, params) for name, tree in by_name.items()}
    found: dict[Any, Group] = {}
    for i, (path, label) in enumerate(zip(paths, labels)):
        own = optimizer if label is None else optimizer.parts.get(label, optimizer)
        hypers = _of_label(label, {name: x[i] for name, x in by_leaf.items()}, optimizer)
        key = label, tuple((name, each.key) for name, each in hypers.items())
        group = found.setdefault(key, Group(own, label, (), hypers))
        found[key] = group._replace(paths=(*(group.paths or ()), path))
    groups = list(found.values())
    alone = len(groups) == 1 and optimizer.labels is None
    return [groups[0]._replace(paths=None)] if alone else groups


def _spread(call: str, name: str, tree: PyTree, params: PyTree) -> list[Series]:
    """A hyperparameter for every leaf."""
    try:
        return jax.tree.leaves(jax.tree.broadcast(tree, params))
    except ValueError as error:
        raise ValueError(
            f"{call}: hypers[{name!r}] must be one number or array, or a tree of them that is a prefix of "
            f"params: {error}"
        ) from None


def _of_label(label: str | None, hypers: dict[str, Series], optimizer: AnyOptimizer) -> dict[str, Series]:
    """The hyperparameters that concern leaves with this label, by their plain names."""
    if label is None:
        return hypers
    others = tuple(f"{each}." for each in optimizer.parts if each != label)
    return {name.removeprefix(f"{label}."): x for name, x in hypers.items() if not name.startswith(others)}


def scalars(export: Export) -> Export:
    """The same, after checking that every hyperparameter is a number at every step.

    Raises:
      ValueError: one of them differs within a leaf.
    """
    for group in export.groups:
        for name, each in group.hypers.items():
            if each.values.ndim > 1:
                raise ValueError(
                    f"{export.call}: hypers[{name!r}] differs within a leaf, and elsewhere it is one "
                    "number for each leaf; use hypergrad.as_optax, or take the numbers from as_json"
                )
    return export


def without_clips(export: Export) -> tuple[list[tuple[str, Series]], list[Group]]:
    """The clipping around an optimizer, and the groups without its hyperparameters.

    Returns:
      Names and bounds of the clippings, outermost first; and the groups.

    Raises:
      ValueError: another wrapper is around the optimizer, or a bound depends on the leaf.
    """
    clips: list[tuple[str, Series]] = []
    groups = export.groups
    for wrapper, name in export.wrappers:
        if wrapper == "with_average":
            raise ValueError(
                f"{export.call}: elsewhere an average of the parameters is no part of an optimizer. Export "
                "the optimizer inside, without ema_decay, and average in the loop: by "
                "optax.incremental_update(params, average, 1 - ema_decay), or by "
                "torch.optim.swa_utils.AveragedModel"
            )
        first, *others = (group.hypers[name] for group in groups)
        if any(each.key != first.key for each in others):
            raise ValueError(
                f"{export.call}: {name} depends on the leaf, and elsewhere one bound clips all gradients; "
                "learn one number (or schedule) for all, or use hypergrad.as_optax"
            )
        clips.append((wrapper, first))
        groups = [
            group._replace(hypers={key: x for key, x in group.hypers.items() if key != name})
            for group in groups
        ]
    return clips, groups


Entry = TypeVar("Entry")


def entry(table: Mapping[str, Entry], export: Export, group: Group, library: str, way_out: str) -> Entry:
    """What a table has for the optimizer of a group.

    Args:
      table: by the names of this library's optimizers.
      export: what is exported.
      group: one of its groups.
      library: whose convention is wanted, for the message.
      way_out: what to do if it has no such optimizer.

    Raises:
      ValueError: the table has nothing for it.
    """
    optimizer = group.optimizer
    origin = str(getattr(getattr(optimizer, "moves", None), "__module__", ""))
    ours = origin.startswith("hypergrad.optimizers.") and optimizer.transform is None
    if ours and optimizer.name in table:
        return table[optimizer.name]
    raise ValueError(
        f"{export.call}: {library} has no optimizer that moves as {optimizer.name} does. {way_out}"
    )
