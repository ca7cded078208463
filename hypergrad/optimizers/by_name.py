"""Optimizers made again from their names, by which they are pickled and saved.

The name of an optimizer is the call that made it, such as ``clip(rmsprop(centered=True))``.
"""

import ast
import copyreg
import importlib
from typing import Any

from hypergrad.program import AnyOptimizer, GenericOptimizer, Optimizer, is_optimizer


def optimizer_of(name: str) -> AnyOptimizer:
    """The optimizer that a name makes.

    Args:
      name: of an optimizer of this library whose arguments are numbers, strings or such optimizers.

    Raises:
      ValueError: the name is not that of such an optimizer.

    >>> optimizer_of("clip(rmsprop(centered=True))").name
    'clip(rmsprop(centered=True))'
    """
    try:
        made = _value(ast.parse(name, mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{name!r} does not say how the optimizer is made ({error})") from None
    if not is_optimizer(made):
        raise ValueError(f"{name!r} is not the name of an optimizer")
    return made


def _value(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    makers = importlib.import_module("hypergrad.optimizers")
    name = ast.unparse(node.func)
    if name not in makers.__all__:
        raise ValueError(f"there is no {name}")
    keywords = {str(each.arg): _value(each.value) for each in node.keywords}
    return getattr(makers, name)(*map(_value, node.args), **keywords)


def says_how_it_is_made(optimizer: AnyOptimizer) -> bool:
    """Whether an optimizer is the one that its name makes.

    >>> import hypergrad as hg
    >>> says_how_it_is_made(hg.adam()), says_how_it_is_made(hg.program.Optimizer("adam()", lambda h, t: []))
    (True, False)
    """
    try:
        made = optimizer_of(optimizer.name)
    except ValueError:
        return False
    return type(made) is type(optimizer) and _traits(made) == _traits(optimizer)


def _traits(optimizer: AnyOptimizer) -> list[Any]:
    """What tells optimizers apart that are made by different functions."""
    functions = [getattr(optimizer, name, None) for name in ("moves", "transform", "init", "update")]
    codes = [getattr(function, "__code__", function) for function in functions]
    return [optimizer.name, dict(optimizer.hypers), dict(optimizer.domains), *codes]


def _reduced(optimizer: AnyOptimizer) -> Any:
    if says_how_it_is_made(optimizer):
        return optimizer_of, (optimizer.name,)
    return object.__reduce_ex__(optimizer, 2)  # works if all its functions are those of a module


copyreg.pickle(Optimizer, _reduced)
copyreg.pickle(GenericOptimizer, _reduced)
