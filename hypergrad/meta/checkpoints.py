"""Checkpoints of an outer loop: written atomically, and refused if they belong to another run."""

import contextlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import files
from hypergrad._base.placement import placed_like
from hypergrad._base.processes import is_first, on_host, wait_for_all
from hypergrad._base.trees import PyTree
from hypergrad.meta.runs import (
    Evaluation,
    MetaRun,
    checkpoint_name,
    is_key,
    plain,
    stack_rows,
    unsound_because,
    unstack_rows,
)


def locked(function: str, checkpoint: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
    """Keep other processes off the checkpoint of a call of a function, if it has one.

    Of several processes that work together, the first one writes it, and holds the lock.
    """
    if checkpoint is None or not is_first():
        return contextlib.nullcontext()
    return files.locked(checkpoint, f"{function}(checkpoint={os.fspath(checkpoint)!r})")


def describe_leaves(tree: PyTree) -> str:
    """Paths, types and shapes of the leaves of a tree, in words."""
    return "; ".join(
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".strip()
        for path, leaf in jax.tree.leaves_with_path(tree)
    )


def _pack(name: str, tree: PyTree) -> dict[str, np.ndarray]:
    return {
        name + jax.tree_util.keystr(path): on_host(plain(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _unpack(run: MetaRun, name: str, like: PyTree, arrays: Mapping[str, Any], *axes: int) -> PyTree:
    """The tree packed under a name; every leaf has additional leading axes compared with ``like``."""

    def leaf(path: Any, old: Any) -> Any:
        where = name + jax.tree_util.keystr(path)
        kind = jax.eval_shape(plain, old) if is_key(old) else old
        array = arrays.get(where)
        if (
            not isinstance(array, np.ndarray)
            or (*axes, *kind.shape) != array.shape
            or (array.dtype != kind.dtype)
        ):
            raise ValueError(
                f"optimize(checkpoint={checkpoint_name(run)}): the file is damaged: {where} is not there, "
                "or not of its shape and dtype; delete it to start again"
            )
        if is_key(old):
            return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(old))
        return placed_like(array, old) if isinstance(old, jax.Array) else array

    return jax.tree.map_with_path(leaf, like)


def save_run(run: MetaRun, values: PyTree, like: PyTree, rows: list[Any], scores: Any = ()) -> int:
    """Write values, rows and scores to the checkpoint, if there is one."""
    if run.checkpoint is not None:
        arrays = _pack("values", values) | _pack("rows", stack_rows(like, rows))
        arrays |= {"scores": np.reshape(scores, (-1, 2))}
        if is_first():
            metadata = {"fingerprint": run.fingerprint, "rows": len(rows), "versions": files.versions()}
            files.save(run.checkpoint, arrays, **metadata)
    return len(rows)


def restore(run: MetaRun, values: PyTree, row: PyTree) -> tuple[PyTree, list[Any], np.ndarray] | None:
    """The checkpoint's values, rows and scores, structured like those given; None without a checkpoint.

    Of several processes all read it, before the first one writes it again.
    """
    found = _restored(run, values, row)
    if run.checkpoint is not None:
        wait_for_all("checkpoint read")
    return found


def _restored(run: MetaRun, values: PyTree, row: PyTree) -> tuple[PyTree, list[Any], np.ndarray] | None:
    """`restore` for one process."""
    if run.checkpoint is None or not os.path.exists(run.checkpoint):
        return None
    try:
        arrays, metadata = files.load(run.checkpoint)
    except ValueError as error:
        raise ValueError(
            f"optimize(checkpoint={checkpoint_name(run)}): cannot resume from it, {error}; or delete it to "
            "start again"
        ) from error
    theirs, ours = metadata.get("fingerprint"), run.fingerprint
    theirs = theirs if isinstance(theirs, dict) else {}
    differences = [
        f"{what} there: {theirs.get(what)}; here: {ours.get(what)}"
        for what in ours | theirs
        if theirs.get(what) != ours.get(what)
    ]
    if differences:
        written = metadata.get("versions")
        hint = ""
        if isinstance(written, dict) and written != files.versions():
            hint = f", perhaps because {written} wrote it and {files.versions()} reads it"
        raise ValueError(
            f"optimize(checkpoint={checkpoint_name(run)}): it holds another run "
            f"({' | '.join(differences)}){hint}; make the call that wrote it, or "
            "give another file to start again"
        )
    arrays, count = arrays if isinstance(arrays, dict) else {}, metadata.get("rows")
    count = count if isinstance(count, int) else -1
    saved = _unpack(run, "values", values, arrays)
    rows = unstack_rows(_unpack(run, "rows", row, arrays, count), count)
    looks = np.shape(arrays.get("scores", ()))[:1]
    scores = _unpack(run, "scores", np.zeros(2), arrays, *looks)
    measured = [each.row if isinstance(each, Evaluation) else each for each in rows]
    norms = [each.gradient_norm for each in measured]
    for i, each in enumerate(measured):
        if reason := unsound_because(run.explosion, each, norms[:i]):
            raise ValueError(
                f"optimize(explosion={run.explosion:g}, checkpoint={checkpoint_name(run)}): this run "
                f"would have stopped at {run.unit} {i}, where the objective {reason}, "
                "and the checkpoint has gone on "
                "from there; allow as much as the call that wrote it, or give another file"
            )
    return saved, rows, scores
