"""The outer loop by SciPy's L-BFGS-B."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import scipy.optimize

from hypergrad._base.fingerprint import digest
from hypergrad._base.placement import placed_like
from hypergrad._base.trees import PyTree
from hypergrad.meta.checkpoints import restore, save_run
from hypergrad.meta.runs import (
    Evaluation,
    History,
    MetaRun,
    checkpoint_name,
    kept_on_exit,
    measure,
    with_entries,
)


@dataclass(frozen=True)
class LBFGSB:
    """SciPy's L-BFGS-B in float64 on the raw values, as the ``optimizer`` of `optimize`.

    It suits deterministic objectives with few hyperparameters: its keys are held fixed.  The ``steps`` of
    `optimize` is then the maximum number of iterations.

    Attributes:
      corrections: how many past steps model the curvature.
      loss_tolerance: stop when the relative decrease of the loss is below this.
      gradient_tolerance: stop when every entry of the projected gradient is below this.
      line_search_steps: maximum number of evaluations in one line search.
      bounds: ``(low, high)`` on the raw values, each a number or a tree of numbers or arrays that is a
        prefix of the hyperparameters; infinite entries are free.

    Source: Byrd, Lu, Nocedal and Zhu, "A limited memory algorithm for bound constrained optimization",
    1995.

    >>> LBFGSB(bounds=(-5.0, 5.0)).corrections
    10
    """

    corrections: int = 10
    loss_tolerance: float = 2.2e-9
    gradient_tolerance: float = 1e-5
    line_search_steps: int = 20
    bounds: tuple[PyTree, PyTree] | None = None


class _Explosion(Exception):  # noqa: N818  (it stops SciPy, and is not an error of the caller)
    pass


def by_lbfgsb(
    run: MetaRun, optimizer: LBFGSB, raw: PyTree
) -> tuple[PyTree, list[History], str, bool, dict[int, float]]:
    """Run the outer loop with L-BFGS-B."""
    start = _flat(raw)
    bounds = _bounds(optimizer, raw, start)
    settings = f"LBFGSB({optimizer.corrections}, {optimizer.line_search_steps}, {digest(bounds)})"
    run = with_entries(run._replace(unit="evaluation"), optimizer=settings)
    journal = _Journal(run, raw, start)
    if run.steps == 0:
        return raw, [], "", False, {}
    accepted = [start]

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
    with kept_on_exit(run, journal.save):
        if not journal.entries:
            run.compile()
        run.teller.begin(None, run.unit)
        try:
            result = scipy.optimize.minimize(
                journal.evaluate,
                start,
                jac=True,
                method="L-BFGS-B",
                bounds=scipy.optimize.Bounds(*bounds),
                callback=accept,
                options=options,
            )
            made = f"L-BFGS-B stopped after {result.nit} iterations: {result.message}"
            stopped, exploded = "" if result.nit >= run.steps else made, False
        except _Explosion as explosion:
            stopped, exploded = str(explosion), True
        journal.save()
    rows = [entry.row for entry in journal.done] + journal.unused
    return _unflat(accepted[0], raw), rows, stopped, exploded, {}


class _Journal:
    """All evaluations of a run.

    SciPy's inner state cannot be saved.  But SciPy is deterministic: replaying the evaluations of the
    journal from the start brings it back to the same state.

    Args:
      run: the run.
      raw: a tree with the structure that its vectors encode.
      start: the vector at the start.
    """

    def __init__(self, run: MetaRun, raw: PyTree, start: np.ndarray):
        self.run, self.raw = run, raw
        self.like = Evaluation(start, start, run.row)
        restored = restore(run, (), self.like)
        self.entries: list[Any] = [] if restored is None else restored[1]
        self.saved = len(self.entries)
        self.done: list[Evaluation] = []
        self.unused: list[History] = []

    def save(self) -> int:
        """Write the evaluations that are not saved yet."""
        if len(self.entries) > self.saved:
            self.saved = save_run(self.run, (), self.like, self.entries)
        return len(self.entries)

    def evaluate(self, point: Any) -> Any:
        """Loss and gradient at a point, from the journal or by a new evaluation."""
        run, entries = self.run, self.entries
        if len(self.done) == len(entries):
            return self._measured(point)
        entry = entries[len(self.done)]
        if entry.point.tobytes() != point.tobytes():
            raise ValueError(
                f"optimize(checkpoint={checkpoint_name(run)}): replaying its evaluation {len(self.done)}, "
                "SciPy asks for other values than it did; resume with the versions of SciPy and NumPy "
                "and the kind of machine that wrote it, or start again with another file"
            )
        self.done.append(entry)
        run.teller.count(entry.row)
        return float(entry.row.loss), entry.gradient

    def _measured(self, point: Any) -> Any:
        """Loss and gradient at a point, by a new evaluation."""
        run, raw = self.run, _unflat(point, self.raw)
        row, gradient, reason = measure(run, raw, len(self.done), [entry.row for entry in self.done])
        if reason:
            self.unused.extend(row)
            raise _Explosion(reason)
        entry = Evaluation(point.copy(), _flat(gradient), row[0])
        self.entries.append(entry)
        self.done.append(entry)
        if len(self.entries) % run.checkpoint_every == 0:
            self.save()
        run.teller.tell(len(self.done) - 1, row[0], raw)
        return float(entry.row.loss), entry.gradient


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
        placed_like(part.reshape(leaf.shape).astype(leaf.dtype), leaf)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)
