"""Learned hyperparameters as an optimizer of optax, in the names and conventions of optax."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from hypergrad._base.trees import PyTree
from hypergrad.exports.groups import Export, Group, entry, export, scalars, without_clips
from hypergrad.exports.series import Series, summed_velocity
from hypergrad.exports.source import Dialect, Source, quoted
from hypergrad.program import AnyOptimizer

Hypers = Mapping[str, Series]
DIALECT = Dialect("jnp", "jnp.asarray({values})[jnp.minimum(count, {last})]", "{}")
WAY_OUT = (
    "hypergrad.as_optax gives it to optax exactly as it is; or train with the optimizer of optax, by "
    "hypergrad.from_optax, and what you learn is in the convention of optax"
)


class Call(NamedTuple):
    """A call of a constructor of optax.

    Attributes:
      function: its name.
      arguments: by name.
      parts: the transformations that are chained, if it is ``optax.chain``.
    """

    function: str
    arguments: Mapping[str, Series | bool | float]
    parts: tuple["Call", ...] = ()


def _alike(function: str, **fixed: bool | float) -> Callable[[Hypers], Call]:
    """An optimizer whose hyperparameters have the same names and meanings."""
    return lambda h: Call(function, {**h, **fixed})


def _chain(*parts: Call) -> Call:
    return Call("optax.chain", {}, parts)


def _rate(h: Hypers) -> Call:
    return Call("optax.scale_by_learning_rate", {"learning_rate": h["learning_rate"]})


def _momentum(h: Hypers) -> Call:
    rate, momentum = summed_velocity(h["learning_rate"], h["momentum"])
    return Call("optax.sgd", {"learning_rate": rate, "momentum": momentum})


def _adagrad_momentum(h: Hypers) -> Call:
    scale = Call("optax.scale_by_rss", {"initial_accumulator_value": 0.0, "eps": h["eps"]})
    return _chain(scale, _rate(h), Call("optax.trace", {"decay": h["momentum"]}))


def _sm3(h: Hypers) -> Call:
    return _chain(Call("optax.scale_by_sm3", {"b1": h["momentum"], "b2": 1.0, "eps": h["eps"]}), _rate(h))


def _signum(h: Hypers) -> Call:
    return _chain(
        Call("optax.ema", {"decay": h["beta"], "debias": False}),
        Call("optax.scale_by_sign", {}),
        Call("optax.add_decayed_weights", {"weight_decay": h["weight_decay"]}),
        _rate(h),
    )


# Those that are missing move otherwise in optax, or do not exist there.
OPTAX: Mapping[str, Callable[[Hypers], Call]] = {
    "sgd()": _alike("optax.sgd"),
    "momentum()": _momentum,
    "heavy_ball()": _alike("optax.sgd"),
    "nesterov()": _alike("optax.sgd", nesterov=True),
    "adam()": _alike("optax.adam"),
    "adamw()": _alike("optax.adamw"),
    "radam()": _alike("optax.radam", threshold=4.0),
    "adabelief()": _alike("optax.adabelief"),
    "yogi()": _alike("optax.yogi"),
    "ademamix()": _alike("optax.contrib.ademamix"),
    "lion()": _alike("optax.lion"),
    "lamb()": _alike("optax.lamb"),
    "novograd()": _alike("optax.novograd"),
    "muon()": _alike("optax.contrib.muon", nesterov=False),
    "adagrad()": _alike("optax.adagrad", initial_accumulator_value=0.0),
    "adagrad_momentum()": _adagrad_momentum,
    "adadelta()": _alike("optax.adadelta"),
    "rmsprop()": _alike("optax.rmsprop"),
    "rmsprop(centered=True)": _alike("optax.rmsprop", centered=True),
    "rmsprop(eps_in_sqrt=False)": _alike("optax.rmsprop", eps_in_sqrt=False),
    "rmsprop_momentum()": _alike("optax.rmsprop"),
    "rmsprop_momentum(centered=True)": _alike("optax.rmsprop", centered=True),
    "rmsprop_momentum(eps_in_sqrt=False)": _alike("optax.rmsprop", eps_in_sqrt=False),
    "sm3()": _sm3,
    "signum()": _signum,
    "frozen()": lambda h: Call("optax.set_to_zero", {}),
}


def optax_code(
    optimizer: AnyOptimizer, hypers: Mapping[str, PyTree], steps: int, params: PyTree = None
) -> str:
    """Python source that builds an optimizer of optax which trains as an optimizer of this library.

    The names are those of optax and the numbers are in its convention, which is not always ours: a rate
    ``α`` of `hypergrad.momentum` becomes ``α (1 - γ)`` in ``optax.sgd``.  A schedule of
    `hypergrad.schedules` stays a formula if it has one.  Others become lists, whose last value is held
    after the end.

    Args:
      optimizer: an optimizer of this library; also with clipping around it, or a partition.
      hypers: its hyperparameters, as `hypergrad.train` takes them.
      steps: ``T``, the number of steps of the training run.
      params: the parameters, or their shapes; needed if optimizer or hyperparameters depend on the leaf.

    Returns:
      Source that imports what it needs and defines ``optimizer``.

    Raises:
      TypeError: `optimizer` is not an optimizer of this library.
      ValueError: optax has none that moves alike; a hyperparameter is invalid, traced or differs within a
        leaf.

    >>> import hypergrad as hg
    >>> print(hg.exports.optax_code(hg.momentum(), {"learning_rate": 0.5, "momentum": 0.75}, steps=10))
    # momentum() of hypergrad, 10 steps
    import optax
    <BLANKLINE>
    optimizer = optax.sgd(learning_rate=0.125, momentum=0.75)
    """
    found = export("optax_code", optimizer, hypers, steps, params)
    return _source(found)


def plain_optax(
    optimizer: AnyOptimizer, hypers: Mapping[str, PyTree], steps: int, params: PyTree = None
) -> optax.GradientTransformation:
    """The optimizer that the source of `optax_code` builds; arguments and errors are the same.

    `hypergrad.as_optax` is more general and bit for bit the step of `hypergrad.train`; this one consists of
    optax's own transformations only, and agrees up to rounding.

    >>> import hypergrad as hg
    >>> import jax.numpy as jnp
    >>> optimizer = hg.exports.plain_optax(hg.momentum(), {"learning_rate": 0.5, "momentum": 0.75}, 10)
    >>> updates, state = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
    >>> updates
    Array([-0.125, -0.125], dtype=float32)
    """
    found = export("plain_optax", optimizer, hypers, steps, params)
    names: dict[str, Any] = {}
    exec(compile(_source(found), "<hypergrad.exports.plain_optax>", "exec"), names)
    return names["optimizer"]


def _source(found: Export) -> str:
    """The source of an export."""
    source = Source(DIALECT)
    clips, groups = without_clips(scalars(found))
    calls = [entry(OPTAX, found, group, "optax", WAY_OUT)(group.hypers) for group in groups]
    texts = [_text(call, source) for call in calls]
    body = texts[0] if groups[0].paths is None else _partitioned(groups, texts)
    if clips:
        around = [_text(Call(f"optax.{name}", {_BOUNDS[name]: bound}), source) for name, bound in clips]
        body = _call("optax.chain", [*around, body])
    paths = [_listed_paths(groups)] if groups[0].paths is not None else []
    imports = ["import jax"] * bool(paths) + ["import jax.numpy as jnp"] * bool(source.definitions)
    head = "\n".join([found.title, *imports, "import optax"])
    definitions = [*source.definitions, *paths]
    if not definitions:
        return f"{head}\n\noptimizer = {body}\n"
    return "\n\n\n".join([head, *definitions, f"optimizer = {body}"]) + "\n"


_BOUNDS = {"clip": "max_delta", "clip_by_global_norm": "max_norm"}


def _text(call: Call, source: Source) -> str:
    """A call as source."""
    arguments = [
        f"{name}={source.value(name, x) if isinstance(x, Series) else repr(x)}"
        for name, x in call.arguments.items()
    ]
    changing = [name for name, x in call.arguments.items() if isinstance(x, Series) and not x.constant]
    function = call.function
    if set(changing) - {"learning_rate"}:
        static = [name for name, x in call.arguments.items() if isinstance(x, float)]
        more = f", static_args={static}" if static else ""
        function = f"optax.inject_hyperparams({function}{more})"
    return _call(function, [*(_text(part, source) for part in call.parts), *arguments])


def _call(function: str, arguments: list[str]) -> str:
    """A call on one line, or with a line for each argument."""
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= 100 and "\n" not in line:
        return line
    return f"{function}(\n    {_indented(arguments)},\n)"


def _indented(parts: list[str]) -> str:
    return ",\n".join(parts).replace("\n", "\n    ")


def _names(groups: list[Group]) -> list[str]:
    """A name for each group: the label of its leaves, or its number if labels do not tell groups apart."""
    labels = [group.label for group in groups]
    if None in labels or len(set(labels)) < len(labels):
        return [f"group_{k}" for k in range(len(groups))]
    return [str(label) for label in labels]


def _listed_paths(groups: list[Group]) -> str:
    """The function from parameters to the name of every leaf's group."""
    named = zip(_names(groups), groups)
    lines = [f"    {quoted(path)}: {quoted(name)}," for name, group in named for path in group.paths or ()]
    return _GROUPS.format(lines="\n".join(lines))


_GROUPS = """GROUPS = {{
{lines}
}}


def groups(params):
    def name(path, _):
        return GROUPS[jax.tree_util.keystr(path, simple=True, separator=".")]

    return jax.tree_util.tree_map_with_path(name, params)"""


def _partitioned(groups: list[Group], texts: list[str]) -> str:
    entries = [f"{quoted(name)}: {text}" for name, text in zip(_names(groups), texts)]
    return _call("optax.partition", [f"{{\n    {_indented(entries)},\n}}", "groups"])
