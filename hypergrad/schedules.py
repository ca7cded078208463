"""Constrained hyperparameters, learned schedules as optax schedules, and files of both.

A meta-optimiser moves unconstrained ("raw") numbers; a training run wants learning rates above
zero and momenta between zero and one. A `Constraint` is the pair of maps between the two.
"""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any


class Constraint(NamedTuple):
    """A smooth bijection between the real line and an open domain, applied element by element.

    Args:
        to_constrained: raw array -> array of the same shape and dtype inside the domain.
        to_raw: its inverse; not finite exactly where its argument is outside the domain.
        name: what error messages and checkpoints call it.
        domain: the domain in words, for error messages.

    Returns:
        A Constraint; it is a leaf wherever this library takes a tree of constraints.

    Example:
        >>> import jax.numpy as jnp
        >>> cube = Constraint(lambda raw: raw**3, jnp.cbrt, "cube", "all real numbers")
        >>> float(cube.to_constrained(jnp.float32(2.0)))
        8.0
    """

    to_constrained: Callable[[jax.Array], jax.Array]
    to_raw: Callable[[jax.Array], jax.Array]
    name: str = "custom"
    domain: str = "where its to_raw is finite"


def _largest_raw(dtype: Any) -> float:
    # exp(+-this) is a normal number with decades to spare, so no map below overflows, flushes to
    # zero or makes 0 * inf in its derivative.
    return -0.9 * math.log(float(jnp.finfo(dtype).tiny))


def _exp(raw: jax.Array) -> jax.Array:
    limit = _largest_raw(raw.dtype)
    return jnp.exp(jnp.clip(raw, -limit, limit))


def _logistic(raw: jax.Array) -> jax.Array:
    # Above -log(eps) the logistic rounds to 1, which is outside (0, 1).
    top = -math.log(float(jnp.finfo(raw.dtype).eps))
    return jax.nn.sigmoid(jnp.clip(raw, -_largest_raw(raw.dtype), top))


real = Constraint(lambda raw: raw, lambda value: value, "real", "finite numbers")
"""No constraint: the raw value is the value."""

positive = Constraint(_exp, jnp.log, "positive", "x > 0")
"""Values above zero, such as learning rates: `value = exp(raw)`."""

unit = Constraint(_logistic, lambda x: jnp.log(x) - jnp.log1p(-x), "unit", "0 < x < 1")
"""Values strictly between 0 and 1, such as momenta: `value = 1 / (1 + exp(-raw))`."""


def interval(low: float, high: float) -> Constraint:
    """Values strictly between two numbers: `value = low + (high - low) / (1 + exp(-raw))`.

    Args:
        low: lower end, finite.
        high: upper end, finite, above `low`.

    Returns:
        The Constraint.

    Raises:
        ValueError: the ends are not finite or not in order.

    Example:
        >>> import jax.numpy as jnp
        >>> float(interval(-1.0, 3.0).to_constrained(jnp.float32(0.0)))
        1.0
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"interval(low={low!r}, high={high!r}): the ends must be finite with low < high; "
            "for a one-sided domain use schedules.positive"
        )

    def to_constrained(raw: jax.Array) -> jax.Array:
        ends = jnp.asarray([low, high], raw.dtype)
        # Rounding in the sum may land on an end, which is outside the open interval.
        inside = jnp.nextafter(ends, ends[::-1])
        return jnp.clip(low + (high - low) * _logistic(raw), inside[0], inside[1])

    def to_raw(value: jax.Array) -> jax.Array:
        return jnp.log(value - low) - jnp.log(high - value)

    return Constraint(to_constrained, to_raw, f"interval({low}, {high})", f"{low} < x < {high}")


def is_constraint(node: object) -> bool:
    """Whether a node of a tree is a Constraint, which a tree of them has for leaves."""
    return isinstance(node, Constraint)


def _spread(call: str, constraints: PyTree, values: PyTree) -> PyTree:
    for leaf in jax.tree.leaves(constraints, is_leaf=is_constraint):
        if not isinstance(leaf, Constraint):
            raise TypeError(
                f"{call}(constraints=...): the leaf {leaf!r} is not a Constraint; use "
                "schedules.real, positive, unit, interval(low, high) or a Constraint of your own"
            )
    try:
        return jax.tree.broadcast(constraints, values, is_leaf=is_constraint)
    except ValueError as error:
        names = jax.tree.map(lambda leaf: leaf.name, constraints, is_leaf=is_constraint)
        raise ValueError(
            f"{call}(constraints={names}): not a prefix of the tree of values, "
            f"{jax.tree.structure(values)}; give one Constraint for all values, or a tree with "
            "one Constraint at each leaf or at each subtree that shares it"
        ) from error


def constrain(constraints: PyTree, raw: PyTree) -> PyTree:
    """Map raw values into their domains, `value = to_constrained(raw)`; differentiable, jittable.

    Args:
        constraints: one Constraint, or a tree of them that is a prefix of `raw`.
        raw: tree of floating-point arrays of any shapes.

    Returns:
        The tree of `raw` with values inside the domains. The maps saturate just inside the ends
        (with zero derivative there), so the result never rounds onto an end of its domain.

    Raises:
        TypeError: a leaf of `constraints` is not a Constraint.
        ValueError: `constraints` is not a prefix of `raw`.

    Example:
        >>> import jax.numpy as jnp
        >>> constrain({"momentum": unit, "rate": positive}, {"momentum": 0.0, "rate": 0.0})
        {'momentum': Array(0.5, dtype=float32), 'rate': Array(1., dtype=float32)}
    """
    spread = _spread("constrain", constraints, raw)
    return jax.tree.map(lambda leaf, constraint: constraint.to_constrained(_strong(leaf)), raw, spread)


def unconstrain(constraints: PyTree, values: PyTree) -> PyTree:
    """Map values to raw ones, `raw = to_raw(value)`: the inverse of `constrain`.

    Args:
        constraints: one Constraint, or a tree of them that is a prefix of `values`.
        values: tree of floating-point arrays of any shapes, each inside its domain.

    Returns:
        The tree of `values` with raw values.

    Raises:
        TypeError: a leaf of `constraints` is not a Constraint, or a value is not floating-point.
        ValueError: `constraints` is not a prefix of `values`, or a value is outside its domain
            (values traced by `jax.jit` cannot be looked at and are not checked).

    Example:
        >>> float(unconstrain(unit, 0.5))
        0.0
    """
    spread = _spread("unconstrain", constraints, values)

    def to_raw(path: Any, leaf: Any, constraint: Constraint) -> jax.Array:
        where = jax.tree_util.keystr(path) or "the value"
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"unconstrain(values=...): {where} has dtype {jnp.result_type(leaf)}; "
                "hyperparameters are floating-point, for example 1.0 for 1"
            )
        value = _strong(leaf)
        raw = constraint.to_raw(value)
        outside = ~jnp.isfinite(raw)
        if not isinstance(outside, jax.core.Tracer) and outside.any():
            raise ValueError(
                f"unconstrain(values=...): {where} holds {np.asarray(value)[outside].flat[0]}, "
                f"outside the domain of {constraint.name} ({constraint.domain}); move it inside "
                "or choose another constraint"
            )
        return raw

    return jax.tree.map_with_path(to_raw, values, spread)


def _strong(leaf: Any) -> jax.Array:
    # A Python number makes a weakly typed array, whose dtype may change in later arithmetic.
    return jnp.asarray(leaf, jnp.result_type(leaf))


def as_optax(values: jax.typing.ArrayLike) -> optax.Schedule:
    """A learned schedule as an optax schedule, `count -> values[min(count, T - 1)]`.

    Args:
        values: shape `(T,)`, T >= 1, one value for each step; or a scalar, held for ever.

    Returns:
        The schedule: it takes an integer count, which may be traced, and returns the value; the
        last value is held after the end. Differentiable in `values`.

    Raises:
        ValueError: `values` is empty or has more than one axis.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> schedule = as_optax(jnp.array([0.5, 0.25]))
        >>> [float(schedule(count)) for count in range(4)]
        [0.5, 0.25, 0.25, 0.25]
        >>> optimizer = optax.sgd(schedule)
    """
    array = jnp.asarray(values)
    if array.ndim > 1 or array.size == 0:
        raise ValueError(
            f"as_optax(values of shape {array.shape}): a schedule has shape (T,) with T >= 1, "
            "or is a scalar; give one schedule for each hyperparameter"
        )
    steps = array.ravel()
    return lambda count: steps[jnp.clip(count, 0, steps.size - 1)]


def from_optax(schedule: optax.Schedule, steps: int) -> jax.Array:
    """The values of an optax schedule, to start learning from: `schedule(0..steps-1)`.

    Args:
        schedule: count -> scalar; it must accept a traced count, as all of optax's do.
        steps: how many values, at least 1.

    Returns:
        Floating-point array of shape `(steps,)`, differentiable in whatever the schedule closes
        over.

    Raises:
        ValueError: `steps` is below 1, or the schedule does not return scalars.

    Example:
        >>> import optax
        >>> from_optax(optax.linear_schedule(1.0, 0.0, 4), 3).tolist()
        [1.0, 0.75, 0.5]
    """
    if steps < 1:
        raise ValueError(f"from_optax(steps={steps!r}): a schedule has at least 1 step")
    values = jax.vmap(lambda count: jnp.asarray(schedule(count)))(jnp.arange(steps))
    if values.ndim != 1:
        raise ValueError(
            f"from_optax(schedule): it returned an array of shape {values.shape[1:]} for one "
            "count; a schedule returns a scalar"
        )
    return values.astype(jnp.result_type(values, float))


# In a saved file every array is named by its path in the tree, as JSON: '["rate", 0]'. JSON keeps
# the list index 0 and the dict key "0" apart. One more entry, HEADER, is JSON too.
_HEADER = "hypergrad"


def _address(path: Any) -> str:
    parts: list[str | int] = []
    for entry in path:
        if isinstance(entry, jax.tree_util.DictKey) and not isinstance(entry.key, str):
            raise TypeError(
                f"save(tree): the dict key {entry.key!r} in {jax.tree_util.keystr(path)} is not "
                "a string; use string keys"
            )
        # GetAttrKey has a name, SequenceKey an idx, DictKey and FlattenedIndexKey a key.
        parts.append(next(getattr(entry, x) for x in ("name", "idx", "key") if hasattr(entry, x)))
    return json.dumps(parts)


def _storable(path: Any, leaf: Any) -> np.ndarray:
    where = jax.tree_util.keystr(path) or "the tree"
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"save(tree): {where} is a PRNG key; save jax.random.key_data(key)")
    array = np.asarray(None if isinstance(leaf, list | tuple) else leaf)
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise TypeError(
            f"save(tree): {where} is {leaf!r}, which is not an array of numbers; leave it out of "
            "the tree or pass it as metadata"
        )
    return array


def save(path: str | os.PathLike[str], tree: PyTree, /, **metadata: Any) -> None:
    """Write a tree of arrays to one .npz file, atomically: the file is the old or the new one.

    Args:
        path: file to write; its folder must exist. No suffix is added. Being killed in the middle
            of a write may leave a hidden `.tmp` file beside it, which can be deleted.
        tree: dicts with string keys, lists, tuples and NamedTuples of arrays of numbers.
        metadata: anything `json.dumps` takes, under any names.

    Raises:
        TypeError: a leaf is not an array of numbers, a container is empty, a dict key is not a
            string, or the metadata is not JSON.

    Example:
        >>> import os, tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(os.path.join(folder, "run.npz"), {"rate": np.ones(2)}, steps=100)
        ...     load(os.path.join(folder, "run.npz"))
        ({'rate': array([1., 1.])}, {'steps': 100})
    """
    # None and empty containers are made leaves so that they are refused instead of dropped.
    leaves = jax.tree.leaves_with_path(
        tree,
        is_leaf=lambda node: node is None or (isinstance(node, list | tuple | dict) and not node),
    )
    arrays: dict[str, Any] = {_address(where): _storable(where, leaf) for where, leaf in leaves}
    # The npy format does not know bfloat16 and its kin: their bits go in unsigned integers.
    foreign = {name: x.dtype.name for name, x in arrays.items() if np.dtype(x.dtype.str) != x.dtype}
    for name in foreign:
        arrays[name] = arrays[name].view(f"u{arrays[name].itemsize}")
    try:
        header = json.dumps({"format": 1, "dtypes": foreign, "metadata": metadata})
    except (TypeError, ValueError) as error:
        raise TypeError(f"save(**metadata): metadata must be JSON; {error}") from error
    buffer = io.BytesIO()
    np.savez(buffer, **(arrays | {_HEADER: np.asarray(header)}))
    replace_file(path, buffer.getvalue())


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically: whoever reads it, and whenever we are killed, finds the old or the new one.

    Args:
        path: file to write; its folder must exist.
        content: of the file.
    """
    target = Path(path)
    # In the same folder, because os.replace is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> tuple[PyTree, dict[str, Any]]:
    """Read a file that `save` wrote.

    Args:
        path: the file.

    Returns:
        `(tree, metadata)`: nested dicts and lists of numpy arrays (tuples come back as lists and
        NamedTuples as dicts), and the metadata as JSON gives it back.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or something else wrote it.

    Example:
        >>> import os, tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(os.path.join(folder, "run.npz"), [np.ones(2)], note="first")
        ...     load(os.path.join(folder, "run.npz"))
        ([array([1., 1.])], {'note': 'first'})
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            header = json.loads(str(archive[_HEADER]))
            arrays = {name: archive[name] for name in archive.files if name != _HEADER}
        if header["format"] != 1:
            raise ValueError(f"format {header['format']} is not one this version reads")
        for name, dtype in header["dtypes"].items():
            arrays[name] = arrays[name].view(np.dtype(dtype))
        tree = _nest([(json.loads(name), array) for name, array in arrays.items()])
        return tree, header["metadata"]
    except (
        AttributeError,  # np.load of an .npy file gives an array, which has no files ...
        TypeError,  # ... and is no context manager
        EOFError,
        IndexError,
        KeyError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"load({os.fspath(path)!r}): not a whole file written by hypergrad.schedules.save "
            f"({type(error).__name__}: {error}); give the path of one that is"
        ) from error


def _nest(items: list[tuple[list[Any], np.ndarray]]) -> PyTree:
    if not items[0][0]:
        return items[0][1]
    groups: dict[Any, list[tuple[list[Any], np.ndarray]]] = {}
    for (first, *rest), array in items:
        groups.setdefault(first, []).append((rest, array))
    children = {first: _nest(group) for first, group in groups.items()}
    if all(isinstance(first, int) for first in children):
        return [children[index] for index in sorted(children)]
    return children
