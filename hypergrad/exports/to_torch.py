"""Learned hyperparameters as an optimizer of PyTorch, in the names and conventions of PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hypergrad._base.trees import PyTree
from hypergrad.exports.groups import Export, entry, export, scalars, without_clips
from hypergrad.exports.series import Series, summed_velocity, velocity_of_sums
from hypergrad.exports.source import Dialect, Source, quoted
from hypergrad.program import AnyOptimizer

Hypers = Mapping[str, Series]
Pair = tuple[Series, Series]
DIALECT = Dialect("np", "{values}[min(count, {last})]", "float({})")
WAY_OUT = (
    "hypergrad.exports.as_json has the numbers, for an implementation of your own; or train with one that "
    "both have: sgd, momentum, heavy_ball, nesterov, adam, adamw, amsgrad, adadelta, "
    "rmsprop(eps_in_sqrt=False) or rmsprop_momentum(eps_in_sqrt=False)"
)


class Torch(NamedTuple):
    """An optimizer of PyTorch.

    Attributes:
      constructor: the name of its class in ``torch.optim``.
      arguments: by name.
    """

    constructor: str
    arguments: dict[str, Series | Pair | bool]


class TorchGroups(NamedTuple):
    """All that PyTorch is told.

    Attributes:
      constructor: the name of a class in ``torch.optim``, the same for all groups.
      arguments: of each group.
      paths: of each group; None for all parameters.
      frozen: paths of parameters that are not trained.
      clips: names and bounds of clippings, outermost first.
    """

    constructor: str
    arguments: list[dict[str, Series | Pair | bool]]
    paths: list[tuple[str, ...] | None]
    frozen: tuple[str, ...]
    clips: list[tuple[str, Series]]


def _sgd(h: Hypers, nesterov: bool = False) -> Torch:
    flag = {"nesterov": True} if nesterov else {}
    return Torch("SGD", {"lr": h["learning_rate"], "momentum": h["momentum"], **flag})


def _momentum(h: Hypers) -> Torch:
    rate, momentum = summed_velocity(h["learning_rate"], h["momentum"])
    return Torch("SGD", {"lr": rate, "momentum": momentum})


def _adam(constructor: str, **fixed: bool) -> Callable[[Hypers], Torch]:
    def make(h: Hypers) -> Torch:
        alike = {name: h[name] for name in ("eps", "weight_decay") if name in h}
        return Torch(constructor, {"lr": h["learning_rate"], "betas": (h["b1"], h["b2"]), **alike, **fixed})

    return make


def _rmsprop(centered: bool, with_momentum: bool) -> Callable[[Hypers], Torch]:
    def make(h: Hypers) -> Torch:
        arguments: dict[str, Series | Pair | bool] = {
            "lr": h["learning_rate"],
            "alpha": h["decay"],
            "eps": h["eps"],
        }
        if with_momentum:  # ours sums steps, and that of PyTorch directions, which are multiplied by lr
            arguments["momentum"] = velocity_of_sums(h["momentum"], h["learning_rate"])
        return Torch("RMSprop", {**arguments, **({"centered": True} if centered else {})})

    return make


# Those that are missing move otherwise in PyTorch, or do not exist there.
TORCH: Mapping[str, Callable[[Hypers], Torch]] = {
    "sgd()": lambda h: Torch("SGD", {"lr": h["learning_rate"]}),
    "momentum()": _momentum,
    "heavy_ball()": _sgd,
    "nesterov()": lambda h: _sgd(h, nesterov=True),
    "adam()": _adam("Adam"),
    "amsgrad()": _adam("Adam", amsgrad=True),
    "adamw()": _adam("AdamW"),
    "adadelta()": lambda h: Torch("Adadelta", {"lr": h["learning_rate"], "rho": h["rho"], "eps": h["eps"]}),
    "rmsprop(eps_in_sqrt=False)": _rmsprop(False, False),
    "rmsprop(centered=True, eps_in_sqrt=False)": _rmsprop(True, False),
    "rmsprop_momentum(eps_in_sqrt=False)": _rmsprop(False, True),
    "rmsprop_momentum(centered=True, eps_in_sqrt=False)": _rmsprop(True, True),
}


def torch_code(
    optimizer: AnyOptimizer, hypers: Mapping[str, PyTree], steps: int, params: PyTree = None
) -> str:
    """Python source that builds an optimizer of PyTorch which trains as an optimizer of this library.

    The names are those of PyTorch and the numbers are in its convention.  If only the rate changes, it is a
    list for ``LambdaLR`` over a base rate of 1.  Other schedules are set by a class like PyTorch's
    schedulers, which the source defines.  Hyperparameters that depend on the leaf become groups.

    Args:
      optimizer: an optimizer of this library; also with clipping around it, or a partition of one kind of
        optimizer and `hypergrad.frozen`.
      hypers: its hyperparameters, as `hypergrad.train` takes them.
      steps: ``T``, the number of steps of the training run.
      params: the parameters, or their shapes; needed if optimizer or hyperparameters depend on the leaf.

    Returns:
      Source that imports what it needs and defines ``make_optimizer(named_parameters)``, from
      ``model.named_parameters()`` to an optimizer and a scheduler, whose ``step()`` is called after every
      step of the optimizer.  Groups go by the names of parameters: that of ``params["first"]["weights"]``
      is ``first.weights``.

    Raises:
      TypeError: `optimizer` is not an optimizer of this library.
      ValueError: PyTorch has none that moves alike; a hyperparameter is invalid, traced or differs within a
        leaf.

    >>> import hypergrad as hg
    >>> source = hg.exports.torch_code(hg.momentum(), {"learning_rate": 0.5, "momentum": 0.75}, steps=10)
    >>> "torch.optim.SGD(list(named.values()), lr=0.125, momentum=0.75)" in source
    True
    """
    found = export("torch_code", optimizer, hypers, steps, params)
    return _source(found, in_torch(found))


def in_torch(found: Export) -> TorchGroups:
    """An export in the convention of PyTorch.

    Raises:
      ValueError: PyTorch has no optimizer that moves alike.
    """
    clips, groups = without_clips(scalars(found))
    frozen = [group for group in groups if group.optimizer.name == "frozen()"]
    trained = [group for group in groups if group not in frozen]
    made = [entry(TORCH, found, group, "PyTorch", WAY_OUT)(group.hypers) for group in trained]
    constructors = sorted({each.constructor for each in made})
    if len(constructors) != 1:
        raise ValueError(
            f"{found.call}: an optimizer of PyTorch is of one kind, and the parts of this one are of "
            f"{constructors or 'none'}; export each part by itself"
        )
    for each in made:
        _check_momentum(found.call, each)
    return TorchGroups(
        constructors[0],
        [each.arguments for each in made],
        [group.paths for group in trained],
        tuple(path for group in frozen for path in group.paths or ()),
        clips,
    )


def _check_momentum(call: str, made: Torch) -> None:
    """Refuse numbers at which PyTorch keeps no velocity, or one that ours cannot be expressed by."""
    momentum = made.arguments.get("momentum")
    if not isinstance(momentum, Series):
        return
    if not np.isfinite(momentum.values).all():
        raise ValueError(
            f"{call}: learning_rate is 0 at some steps, and PyTorch multiplies the whole velocity by the "
            "rate; keep the rate above 0"
        )
    if (momentum.values == 0).any() and not (momentum.constant and "nesterov" not in made.arguments):
        raise ValueError(
            f"{call}: momentum is 0 at some steps, at which PyTorch leaves the velocity out; keep it above "
            "0, or train with hypergrad.sgd() if there is to be none"
        )


class Written(NamedTuple):
    """An argument as source.

    Attributes:
      first: its value at the first step.
      function: of the count; None if it is constant.
    """

    first: str
    function: str | None


def _written(name: str, argument: Series | Pair | bool, source: Source) -> Written:
    if isinstance(argument, bool):
        return Written(repr(argument), None)
    if isinstance(argument, Series):
        first = repr(float(argument.values.flat[0]))
        return Written(first, None if argument.constant else source.value(name, argument))
    pair = [_written(f"beta{k}", each, source) for k, each in enumerate(argument, start=1)]
    values = [each.first if each.function is None else f"{each.function}(count)" for each in pair]
    constant = all(each.function is None for each in pair)
    return Written(
        f"({pair[0].first}, {pair[1].first})", None if constant else f"lambda count: ({', '.join(values)})"
    )


def _source(found: Export, to: TorchGroups) -> str:
    """The source of an export."""
    source = Source(DIALECT)
    groups = [{name: _written(name, x, source) for name, x in each.items()} for each in to.arguments]
    clips = "".join(_clip(name, bound, source) for name, bound in to.clips)
    by_path = to.paths[0] is not None
    lambdas = {name for each in groups for name, x in each.items() if x.function is not None} <= {"lr"}
    groups, scheduler = _for_lambda_lr(groups) if lambdas else (groups, _for_schedule(groups))
    made = _MAKE.format(
        check=_CHECK if by_path else "",
        optimizer=f"torch.optim.{to.constructor}({_of_groups(groups, by_path)})",
        clips=clips,
        scheduler=scheduler,
    )
    imports = ["import itertools\n"] * any(not bound.constant for _, bound in to.clips)
    imports += ["import numpy as np"] * source.uses_module
    parts = [
        "\n".join([found.title, *imports, "import torch"]),
        *[_listed(to)] * by_path,
        *source.definitions,
        *[_SCHEDULE] * (not lambdas),
        *[_CLIP_BY_GLOBAL_NORM] * any(name == "clip_by_global_norm" for name, _ in to.clips),
        made,
    ]
    return "\n\n\n".join(parts)


def _listed(to: TorchGroups) -> str:
    """The names of the parameters of every group."""

    def names(paths: Sequence[str]) -> str:
        return f"[{', '.join(map(quoted, paths))}]"

    lists = [f"    {names(paths or ())}," for paths in to.paths]
    return "\n".join(["GROUPS = [", *lists, "]", f"FROZEN = {names(to.frozen)}"])


def _for_lambda_lr(groups: list[dict[str, Written]]) -> tuple[list[dict[str, Written]], str]:
    """The groups with a base rate of 1 if rates change, and the scheduler."""
    if all(each["lr"].function is None for each in groups):
        return groups, "torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1.0)"
    functions = [each["lr"].function or f"lambda count: {each['lr'].first}" for each in groups]
    based = [{**each, "lr": Written("1.0", None)} for each in groups]
    return based, f"torch.optim.lr_scheduler.LambdaLR(optimizer, [{', '.join(functions)}])"


def _for_schedule(groups: list[dict[str, Written]]) -> str:
    each = [
        ", ".join(f'"{name}": {x.function}' for name, x in group.items() if x.function is not None)
        for group in groups
    ]
    return f"Schedule(optimizer, [{', '.join(f'{{{entries}}}' for entries in each)}])"


def _of_groups(groups: list[dict[str, Written]], by_path: bool) -> str:
    """The arguments of the constructor."""
    if not by_path:
        return ", ".join(["list(named.values())", *(f"{name}={x.first}" for name, x in groups[0].items())])
    dicts = [
        ", ".join(
            [
                f'"params": [named[name] for name in GROUPS[{k}]]',
                *(f'"{name}": {x.first}' for name, x in group.items()),
            ]
        )
        for k, group in enumerate(groups)
    ]
    inside = "".join(f"\n            {{{each}}}," for each in dicts)
    return f"\n        [{inside}\n        ]\n    "


def _clip(name: str, bound: Series, source: Source) -> str:
    """The lines that have gradients clipped before every step."""
    function = "torch.nn.utils.clip_grad_value_" if name == "clip" else name
    first, changing = _written(f"{name}_bound", bound, source)
    hook = "    optimizer.register_step_pre_hook(lambda *_: {}(named.values(), {}))\n"
    if changing is None:
        return hook.format(function, first)
    counts = f"{changing}_counts"
    return f"    {counts} = itertools.count()\n" + hook.format(function, f"{changing}(next({counts}))")


_MAKE = """def make_optimizer(named_parameters):
    \"\"\"From model.named_parameters(): an optimizer, and a scheduler to step after every step of it.\"\"\"
    named = dict(named_parameters)
{check}    optimizer = {optimizer}
{clips}    scheduler = {scheduler}
    return optimizer, scheduler
"""

_CHECK = """    listed = {*FROZEN, *(name for group in GROUPS for name in group)}
    if set(named) != listed:
        raise ValueError(f"names in one of model and GROUPS only: {sorted(set(named) ^ listed)}")
"""

_SCHEDULE = """class Schedule:
    \"\"\"Sets what changes from step to step; used like the schedulers of PyTorch.\"\"\"

    def __init__(self, optimizer, functions):
        self.optimizer, self.functions, self.count = optimizer, functions, 0
        self._set()

    def step(self):
        self.count += 1
        self._set()

    def _set(self):
        for group, functions in zip(self.optimizer.param_groups, self.functions):
            for name, function in functions.items():
                group[name] = function(self.count)"""

_CLIP_BY_GLOBAL_NORM = """def clip_by_global_norm(parameters, max_norm):
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.sqrt(sum((g * g).sum() for g in gradients))
    if norm > max_norm:
        for g in gradients:
            g.mul_(max_norm / norm)"""
