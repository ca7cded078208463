"""The outer loop by SciPy's L-BFGS-B."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import scipy.optimize

from hypergrad._base.fingerprint import digest
from hypergrad._base.trees import PyTree
from hypergrad.meta.checkpoints import restore, save_run
from hypergrad.meta.runs import (
    Evaluation,
    History,
    MetaRun,
    advance,
    checkpoint_name,
    kept_on_exit,
    measure,
    progress_bar,
    with_entries,
)


@dataclass(frozen=True)
class LBFGSB:
    """SciPy's L-BFGS-B in float64 on the raw values, as the `optimizer` of `optimize`.

    It suits deterministic objectives with few hyperparameters: its keys are held fixed.

    Args:
        corrections: how many past steps model the curvature.
        loss_tolerance: stop when the relative decrease of the loss is below this.
        gradient_tolerance: stop when every entry of the projected gradient is below this.
        line_search_steps: most evaluations in one line search.
        bounds: `(low, high)` on the raw values, each a number or a tree of numbers or arrays that
            is a prefix of the hyperparameters; infinite entries are free.

    Returns:
        The settings; `optimize(steps=...)` is the most iterations.

    Example:
        >>> LBFGSB(bounds=(-5.0, 5.0)).corrections
        10

    Source: Byrd, Lu, Nocedal and Zhu 1995, "A limited memory algorithm for bound constrained
    optimization".
    """

    corrections: int = 10
    loss_tolerance: float = 2.2e-9
    gradient_tolerance: float = 1e-5
    line_search_steps: int = 20
    bounds: tuple[PyTree, PyTree] | None = None


class _Explosion(Exception):  # noqa: N818  (it stops SciPy, and is no error of the caller)
    pass


def by_lbfgsb(run: MetaRun, optimizer: LBFGSB, raw: PyTree) -> tuple[PyTree, list[History], str, bool]:
    """The outer loop with L-BFGS-B."""
    start = _flat(raw)
    bounds = _bounds(optimizer, raw, start)
    settings = f"LBFGSB({optimizer.corrections}, {optimizer.line_search_steps}, {digest(bounds)})"
    run = with_entries(run._replace(unit="evaluation"), optimizer=settings)
    like = Evaluation(start, start, run.row)
    # SciPy's inner state cannot be saved. But SciPy is deterministic: fed the evaluations of the
    # journal from the start, it comes to where it was.
    restored = restore(run, (), like)
    journal: list[Any] = [] if restored is None else restored[1]
    saved = len(journal)
    if run.steps == 0:
        return raw, [], "", False
    done: list[Evaluation] = []
    accepted = [start]
    unused: list[History] = []

    def save() -> int:
        nonlocal saved
        if len(journal) > saved:
            saved = save_run(run, (), like, journal)
        return len(journal)

    def evaluate(point: Any) -> Any:
        if len(done) == len(journal):
            row, gradient, reason = measure(
                run, _unflat(point, raw), len(done), [entry.row for entry in done]
            )
            if reason:
                unused.extend(row)
                raise _Explosion(reason)
            journal.append(Evaluation(point.copy(), _flat(gradient), row[0]))
            if len(journal) % run.checkpoint_every == 0:
                save()
        entry = journal[len(done)]
        if entry.point.tobytes() != point.tobytes():
            raise ValueError(
                f"optimize(checkpoint={checkpoint_name(run)}): replaying its evaluation {len(done)}, SciPy "
                "asks for other values than it did; resume with the versions of SciPy and NumPy "
                "and the kind of machine that wrote it, or start again with another file"
            )
        done.append(entry)
        advance(bar, entry.row)
        return float(entry.row.loss), entry.gradient

    def accept(point: np.ndarray) -> None:
        accepted[0] = point.copy()

    options: Any = {
        "maxiter": run.steps,
        "maxfun": math.inf,
        "maxcor": optimizer.corrections,
        "maxls": optimizer.line_search_steps,
        "ftol": optimizer.loss_tolerance,
        "gtol": optimizer.gradient_tolerance,
    }
    with progress_bar(run) as bar, kept_on_exit(run, save):
        try:
            result = scipy.optimize.minimize(
                evaluate,
                start,
                jac=True,
                method="L-BFGS-B",
                bounds=scipy.optimize.Bounds(*bounds),
                callback=accept,
                options=options,
            )
            made = f"L-BFGS-B stopped after {result.nit} iterations: {result.message}"
            stopped = "" if result.nit >= run.steps else made
        except _Explosion as explosion:
            stopped = str(explosion)
            exploded = True
        else:
            exploded = False
        save()
    rows = [entry.row for entry in done] + unused
    return _unflat(accepted[0], raw), rows, stopped, exploded


def _bounds(optimizer: LBFGSB, raw: PyTree, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def vector(ends: PyTree) -> np.ndarray:
        spread = jax.tree.broadcast(ends, raw)
        return _flat(jax.tree.map(lambda leaf, end: np.broadcast_to(end, leaf.shape), raw, spread))

    ends = (-math.inf, math.inf) if optimizer.bounds is None else optimizer.bounds
    try:
        low, high = (vector(end) for end in ends)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optimize(optimizer=LBFGSB(bounds={ends!r})): not (low, high), each a number or a "
            f"tree that is a prefix of hypers, {jax.tree.structure(raw)}; for no bound on one "
            "side use math.inf"
        ) from error
    outside = ~((low <= start) & (start <= high))
    if outside.any():
        at = int(np.argmax(outside))
        raise ValueError(
            f"optimize(optimizer=LBFGSB(bounds=...)): entry {at} starts at the raw value "
            f"{start[at]:g}, outside its bounds [{low[at]:g}, {high[at]:g}]; bounds are on raw "
            "values (for positive, the log); move hypers or the bounds"
        )
    return low, high


def _flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


def _unflat(vector: np.ndarray, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    parts = np.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    shaped = [
        jax.device_put(part.reshape(leaf.shape).astype(leaf.dtype), leaf.sharding)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)
