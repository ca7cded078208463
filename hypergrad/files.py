"""Trees of arrays in files, written atomically."""

import contextlib
import errno
import io
import json
import os
import re
import socket
import threading
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

PyTree = Any

# In a saved file every array is named by its path in the tree, as JSON: '["rate", 0]'. JSON keeps the list
# index 0 and the dict key "0" apart. An array directly in a top-level dict is named by its key, so that
# plain `np.load` finds it. One more entry, HEADER, is JSON too.
_HEADER = "hypergrad"
_TAKEN = {_HEADER, "file", "allow_pickle"}  # the last two are arguments of np.savez


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
    """Write a tree of arrays to one .npz file atomically: the file is always the old or the new one.

    Args:
      path: file to write; its folder must exist.  No suffix is added.  A process killed in the middle of a
        write may leave a hidden ``.tmp`` file next to it, which the next write removes.
      tree: dicts with string keys, lists, tuples and NamedTuples of arrays of numbers.
      metadata: anything `json.dumps` takes, under any names.

    Raises:
      TypeError: a leaf is not an array of numbers, a container is empty, a dict key is not a string, or the
        metadata is not JSON.
      OSError: the file cannot be written; an old file is unchanged.

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
    # The npy format does not know bfloat16 and similar types: their bits are stored as unsigned integers.
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
    """Write a file atomically: even if the process is killed, a reader finds the old or the new content.

    Args:
      path: file to write; its folder must exist.
      content: the bytes to write.

    Raises:
      OSError: the file cannot be written, for example because the disk is full; an old file is unchanged.
    """
    target = _real(path)
    _clear_orphans(target)
    # In the same folder, because os.replace is atomic only within one file system.
    maker = f"{_host()}-{os.getpid()}-{threading.get_ident()}"
    temporary = target.with_name(f".{target.name}.{maker}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        kept = "; the file from before is as it was" if target.exists() else ""
        raise _because(error, f"cannot write {os.fspath(path)!r}, {len(content):,} bytes", kept) from error


def _because(error: OSError, what: str, then: str) -> OSError:
    """An error of the same kind that says what could not be done."""
    reason = f"{what}: {error.strerror or error}{then}"
    return OSError(error.errno, reason) if error.errno is not None else OSError(reason)


def _real(path: str | os.PathLike[str]) -> Path:
    """The path with symbolic links resolved, so that links are kept and two names of one file agree."""
    return Path(os.path.realpath(path))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32]


def _clear_orphans(target: Path) -> None:
    """Remove what processes of this machine left behind when they were killed in the middle of a write."""
    orphan = re.compile(re.escape(f".{target.name}.") + rf"(?:{_host()}-)?(\d+)(?:-\d+)?\.tmp")
    with contextlib.suppress(OSError):  # the folder may not be listed, or is missing
        for entry in os.scandir(target.parent):
            match = orphan.fullmatch(entry.name)
            if match and int(match.group(1)) != os.getpid() and not _alive(int(match.group(1))):
                os.unlink(entry.path)


def _alive(process: int) -> bool:
    if os.name == "nt":  # there os.kill would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to another user
        return True
    return True


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], call: str) -> Iterator[None]:
    """Keep other processes from working on the same file, and check that it can be written at all.

    The lock is the operating system's, on a hidden file next to the given one, and ends with the process in
    any case.  On a file system without locks a warning is issued, and other processes are not kept out.

    Args:
      path: the file; it need not exist.
      call: the user's call, with the path in it, for messages.

    Returns:
      A context manager.

    Raises:
      ValueError: the path is a folder.
      BlockingIOError: another process holds the lock.
      OSError: the folder is missing, or may not be written to.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(folder + "/run", "work()"):
    ...     os.listdir(folder)
    ['.run.lock']
    """
    target = _real(path)
    if target.is_dir():
        raise ValueError(
            f"{call}: it is a folder; give the name of a file in it, such as "
            f"{os.path.join(os.fspath(path), 'run.npz')!r}"
        )
    side = target.with_name(f".{target.name}.lock")
    try:
        descriptor = _lock(side)
    except BlockingIOError as error:
        holder = ""
        with contextlib.suppress(OSError, ValueError):
            holder = f" ({side.read_text().strip()})"
        raise BlockingIOError(
            error.errno,
            f"{call}: another process{holder} works on it; wait until that has ended, or give another file",
        ) from None
    except OSError as error:
        why = "; give a file in a folder that exists and may be written to"
        raise _because(error, f"{call}: its folder cannot be written to", why) from error
    try:
        _clear_orphans(target)
        yield
    finally:
        # Removed before it is closed, so that the next process cannot lock a file that is about to be
        # removed.
        with contextlib.suppress(OSError):
            side.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(side: Path) -> int:
    """The descriptor of the lock file, once this process holds the lock."""
    while True:
        descriptor = os.open(side, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, side)
            # The previous holder of the lock removed the file, so there may be a new one.
            if os.path.exists(side) and os.path.samestat(os.stat(side), os.fstat(descriptor)):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, side: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        warnings.warn(
            f"The folder {os.fspath(side.parent)!r} has no file locks ({error.strerror or error}): nothing "
            "keeps another process from the same file; do not give it to two",
            RuntimeWarning,
            stacklevel=2,
        )


def load(path: str | os.PathLike[str]) -> tuple[PyTree, dict[str, Any]]:
    """Read a file that `save` wrote.

    Args:
      path: the file.

    Returns:
      `(tree, metadata)`: nested dicts and lists of numpy arrays (tuples come back as lists and NamedTuples
      as dicts), and the metadata as JSON gives it back.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or was not written by `save`.

    >>> import os, tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(os.path.join(folder, "run.npz"), [np.ones(2)], note="first")
    ...     load(os.path.join(folder, "run.npz"))
    ([array([1., 1.])], {'note': 'first'})
    """
    name = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"load({name!r}): it is a folder; give the path of a file in it")
    content = io.BytesIO(Path(path).read_bytes())  # errors of the file system pass through
    try:
        with np.load(content, allow_pickle=False) as archive:
            header = json.loads(str(archive[_HEADER]))
            arrays = {key: archive[key] for key in archive.files if key != _HEADER}
        if header["format"] != 1:
            raise ValueError(f"format {header['format']} is not one this version reads")
        for key, dtype in header["dtypes"].items():
            arrays[key] = arrays[key].view(np.dtype(dtype))
        tree = _nest([(_parts(key), array) for key, array in arrays.items()])
        return tree, dict(header["metadata"])
    except Exception as error:  # random bytes can make NumPy and zipfile raise anything
        raise ValueError(
            f"load({name!r}): not a whole file written by hypergrad.files.save "
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
    """The versions of hypergrad, JAX and NumPy, to store with results.

    >>> sorted(versions())
    ['hypergrad', 'jax', 'numpy']
    """
    return {"hypergrad": version("hypergrad-jax"), "jax": jax.__version__, "numpy": np.__version__}
