"""Trees of arrays in files, written atomically."""

import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

# In a saved file every array is named by its path in the tree, as JSON: '["rate", 0]'. JSON keeps
# the list index 0 and the dict key "0" apart. What lies directly in a dict has its key for a name, which
# anybody's `np.load` can use. One more entry, HEADER, is JSON too.
_HEADER = "hypergrad"
_TAKEN = {_HEADER, "file", "allow_pickle"}  # the latter by the arguments of np.savez


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
    first = parts[0] if len(parts) == 1 else None
    plain = isinstance(first, str) and first.isidentifier() and first not in _TAKEN
    return str(first) if plain else json.dumps(parts)


def _parts(address: str) -> list[Any]:
    """The path that an address stands for."""
    return json.loads(address) if address.startswith("[") else [address]


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
        tree = _nest([(_parts(name), array) for name, array in arrays.items()])
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
            f"load({os.fspath(path)!r}): not a whole file written by hypergrad.files.save "
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


def versions() -> dict[str, str]:
    """Of hypergrad, JAX and NumPy, to write beside what they made.

    >>> sorted(versions())
    ['hypergrad', 'jax', 'numpy']
    """
    from hypergrad import __version__  # not known yet when this module is first imported

    return {"hypergrad": __version__, "jax": jax.__version__, "numpy": np.__version__}
