"""Optimizers and their hyperparameters by the names that the command line gives."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from hypergrad import optimizers
from hypergrad.cli.refusals import RefusedError, meant
from hypergrad.program import AnyOptimizer, is_optimizer

EVERYWHERE = (-math.inf, math.inf)


def named_optimizers() -> dict[str, Callable[[], AnyOptimizer]]:
    """The optimizers that need no arguments and have something to learn, by name.

    >>> "adamw" in named_optimizers(), "kfac" in named_optimizers(), "frozen" in named_optimizers()
    (True, False, False)
    """
    makers: dict[str, Callable[[], AnyOptimizer]] = {}
    for name in optimizers.__all__:
        make: Any = getattr(optimizers, name)
        parameters = inspect.signature(make).parameters.values()
        if all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters):
            made = make()
            if is_optimizer(made) and made.hypers:
                makers[name] = make
    return makers


def optimizer_by_name(name: str) -> AnyOptimizer:
    """An optimizer with its default arguments.

    Args:
      name: as in `hypergrad`.

    Raises:
      RefusedError: there is none of that name, or it needs arguments.
    """
    makers = named_optimizers()
    if name in makers:
        return makers[name]()
    if name in optimizers.__all__:
        raise RefusedError(
            f"--optimizer {name}: it needs arguments of its own, which only Python can give it "
            f"(hypergrad.tune(problem, optimizer=hypergrad.{name}(...))); here take one that needs none, "
            "such as adamw"
        )
    raise RefusedError(f"--optimizer {name}: unknown; {meant(name, makers)}")


def checked_names(flag: str, names: Mapping[str, Any] | list[str], optimizer: AnyOptimizer) -> None:
    """Refuse names that are not hyperparameters of an optimizer.

    Args:
      flag: for the message.
      names: the names.
      optimizer: to which they should belong.
    """
    for name in names:
        if name not in optimizer.hypers:
            raise RefusedError(
                f"{flag} {name}: {optimizer.name} has no hyperparameter of that name; "
                f"{meant(name, optimizer.hypers)}"
            )


def is_inside(value: float, name: str, optimizer: AnyOptimizer) -> bool:
    """Whether a hyperparameter begins inside its domain, from where it can be learned.

    Args:
      value: its value.
      name: its name.
      optimizer: to which it belongs.
    """
    low, high = optimizer.domains.get(name, EVERYWHERE)
    return low < value < high


def checked_inside(flag: str, values: Mapping[str, float], optimizer: AnyOptimizer) -> None:
    """Refuse numbers from which nothing can be learned.

    Args:
      flag: for the message.
      values: numbers by name.
      optimizer: to which they belong.
    """
    for name, value in values.items():
        if not is_inside(value, name, optimizer):
            low, high = optimizer.domains.get(name, EVERYWHERE)
            raise RefusedError(
                f"{flag} {name}: it begins at {value:g}, and must begin above {low:g} and below {high:g} "
                f"to be learned; give --start {name}=... or leave it out of --learn"
            )
