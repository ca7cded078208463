"""Learned hyperparameters as plain numbers."""

import json
from collections.abc import Mapping
from typing import Any

from hypergrad import optimizers
from hypergrad._base.trees import PyTree
from hypergrad.exports.groups import Export, export
from hypergrad.exports.series import Series
from hypergrad.exports.to_torch import Pair, in_torch
from hypergrad.program import AnyOptimizer

CONVENTIONS = ("hypergrad", "torch")


def as_json(
    optimizer: AnyOptimizer,
    hypers: Mapping[str, PyTree],
    steps: int,
    params: PyTree = None,
    *,
    convention: str = "hypergrad",
) -> str:
    """The hyperparameters as JSON: names, values at every step, and whose convention they follow.

    A number holds for all steps, and a list has one entry for each step, of which the last is held after
    the end.  In the convention of this library, ``update`` says what the optimizer does with them.  In that
    of PyTorch, ``constructor`` names a class in ``torch.optim``, a list ``lr`` is for ``LambdaLR`` over a
    base rate of 1, and a list ``momentum`` may have one entry more, which is held after the end.

    Args:
      optimizer: of any kind; for PyTorch's convention, one that `torch_code` can export.
      hypers: its hyperparameters, as `hypergrad.train` takes them.
      steps: ``T``, the number of steps of the training run.
      params: the parameters, or their shapes; needed if optimizer or hyperparameters depend on the leaf.
      convention: ``"hypergrad"`` or ``"torch"``.

    Returns:
      JSON text, indented.

    Raises:
      TypeError: `optimizer` is not an optimizer of this library.
      ValueError: a hyperparameter is invalid or traced; or PyTorch has no optimizer that moves alike.

    >>> import json
    >>> import jax.numpy as jnp, hypergrad as hg
    >>> hypers = {"learning_rate": jnp.array([0.5, 0.25]), "momentum": 0.75}
    >>> ours = json.loads(hg.exports.as_json(hg.momentum(), hypers, steps=2))
    >>> ours["groups"][0]["hypers"]
    {'learning_rate': [0.5, 0.25], 'momentum': 0.75}
    >>> torch = json.loads(hg.exports.as_json(hg.momentum(), hypers, steps=2, convention="torch"))
    >>> torch["groups"][0]["arguments"]
    {'lr': [0.125, 0.0625], 'momentum': 0.75}
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"as_json(convention={convention!r}): it must be one of {list(CONVENTIONS)}")
    found = export("as_json", optimizer, hypers, steps, params)
    told = _ours(found) if convention == "hypergrad" else _of_torch(found)
    common = {"convention": convention, "steps": found.steps, "after_the_end": "the last value is held"}
    return json.dumps(common | told, indent=1, ensure_ascii=False)


def _ours(found: Export) -> dict[str, Any]:
    groups = [
        {
            "paths": group.paths,
            "optimizer": group.optimizer.name,
            "update": _update(group.optimizer),
            "hypers": {name: each.plain() for name, each in group.hypers.items()},
        }
        for group in found.groups
    ]
    return {"optimizer": found.optimizer.name, "groups": groups}


def _update(optimizer: AnyOptimizer) -> str:
    """What the optimizer does, as the first line of its documentation says it."""
    described = getattr(optimizers, optimizer.name.partition("(")[0], None)
    return (described.__doc__ or "").partition("\n")[0].replace("``", "") if described else ""


def _of_torch(found: Export) -> dict[str, Any]:
    to = in_torch(found)

    def plain(x: Series | Pair | bool) -> Any:
        if isinstance(x, bool):
            return x
        return x.plain() if isinstance(x, Series) else [each.plain() for each in x]

    groups = [
        {"paths": paths, "arguments": {name: plain(x) for name, x in arguments.items()}}
        for paths, arguments in zip(to.paths, to.arguments)
    ]
    clips = [{"clipping": name, "bound": bound.plain()} for name, bound in to.clips]
    return {
        "constructor": f"torch.optim.{to.constructor}",
        "clipping": clips,
        "groups": groups,
        "frozen": to.frozen,
    }
