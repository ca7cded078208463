"""What every outer loop needs: the evaluation of an objective, its history, and what stops it."""

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._base.dtypes import promoted
from hypergrad._base.errors import out_of_memory, outside, readable_errors
from hypergrad._base.fingerprint import digest
from hypergrad._base.progress import Progress
from hypergrad._base.tracing import closure_convert
from hypergrad._base.trees import PyTree
from hypergrad.constraints import constrain, real
from hypergrad.meta.signs import SignWatch
from hypergrad.meta.zeros import announce_zeros

Objective = Callable[[PyTree, jax.Array], Any]


class HypergradientExplosion(RuntimeWarning):
    """The hypergradient became useless and `optimize` stopped before following it."""


class SeedFailure(RuntimeWarning):
    """Some of several seeds gave no hypergradient and were left out of the average of an iteration."""


class History(NamedTuple):
    """What was measured, in order, as NumPy arrays.

    Row ``i`` is meta-iteration ``i`` (or L-BFGS-B's evaluation ``i``).  After an explosion the last row is
    what stopped the run.

    Attributes:
      loss: shape ``(n,)``, the objective averaged over the seeds that did not fail.
      gradient_norm: shape ``(n,)``, Euclidean norm of the gradient in the raw values.
      aux: the objective's aux with leading axes ``(n, seeds)``; None without ``has_aux``.
      failed: shape ``(n, seeds)``, bool: which seeds were left out of the average, because their loss or
        gradient was not finite or by itself beyond ``explosion``.  All False in a row in which every seed
        failed.
    """

    loss: np.ndarray
    gradient_norm: np.ndarray
    aux: PyTree
    failed: np.ndarray


class Optimized(NamedTuple):
    """What `optimize` returns.

    Attributes:
      hypers: the constrained values after the last good update, or those that ``select`` chose.
      raw: the same, unconstrained.
      history: what was measured during the run.
      stopped: why the run ended early, in words; empty if it made all its steps.
      scores: ``{iterations made: score}`` of the values that ``select`` scored; empty without it.
    """

    hypers: PyTree
    raw: PyTree
    history: History
    stopped: str
    scores: dict[int, float]

    def __repr__(self) -> str:
        losses = self.history.loss
        ends = f", loss {losses[0]:.4g} to {losses[-1]:.4g}" if len(losses) else ""
        lines = [f"Optimized: {len(losses)} hypergradients{ends}"]
        if self.scores:
            lines[0] += f", best score {min(self.scores.values()):.4g}"
        lines += [f"  {name}: {words}" for name, words in in_words(self.hypers).items()]
        return "\n".join(lines + ([f"  stopped: {self.stopped}"] if self.stopped else []))


class MetaStep(NamedTuple):
    """What a callback is given after every meta-iteration.

    Attributes:
      iteration: its number, from 0 (with `LBFGSB`, that of the evaluation).
      loss: the objective, averaged over the seeds.
      gradient_norm: Euclidean norm of the gradient in the raw values.
      hypers: the constrained values that the loss is of: floats where they are numbers, and NumPy arrays.
      seconds: the time that the iteration took, without compiling.
    """

    iteration: int
    loss: float
    gradient_norm: float
    hypers: PyTree
    seconds: float


Callback = Callable[[MetaStep], object]


class Judge(NamedTuple):
    """By what the values that a run returns are chosen.

    Attributes:
      score: of raw values; None takes the loss that is measured anyway.
      digest: identifies the score in a checkpoint.
      every: how many iterations lie between two scores.
    """

    score: Callable[[PyTree], float] | None
    digest: str
    every: int


class Settings(NamedTuple):
    """What a user decides about a run; see `optimize`.

    Attributes:
      scale: a size of the loss whose rounding errors say nothing, so that of a first hypergradient as small
        as they are no zeros are announced.
    """

    optimizer: Any
    steps: int
    key: jax.Array
    constraints: PyTree = real
    seeds: int = 1
    resample: bool = True
    has_aux: bool = False
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 1
    explosion: float = 1e4
    retries: int = 0
    about: Mapping[str, str] | None = None
    callback: Callback | None = None
    scale: float = 0.0


class _EachSeed(NamedTuple):
    """What a row averages over, ``(seeds,)`` each."""

    loss: Any
    gradient_norm: Any


class MetaRun(NamedTuple):
    """What both loops need."""

    compile: Callable[[], Callable[..., tuple[History, PyTree, _EachSeed]]]  # works once, then remembers
    row: History  # shapes and dtypes of one row
    key: jax.Array
    unit: str  # what a row measures, in words
    steps: int
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    fingerprint: dict[str, str]
    explosion: float
    retries: int
    scale: float
    judge: Judge | None
    teller: "Teller"
    signs: SignWatch


class Teller:
    """Tells progress bar and callback of every iteration.

    Args:
      progress: where progress is shown.
      constraints: of the hyperparameters.
      callback: the user's, or None.
    """

    def __init__(self, progress: Progress, constraints: PyTree, callback: Callback | None):
        self.progress, self._callback = progress, callback
        self._constrained = jax.jit(lambda raw: constrain(constraints, raw))
        self._last = 0.0

    def begin(self, total: int | None, unit: str, initial: int = 0) -> None:
        """Start to count iterations."""
        self.progress.begin(total, unit, initial)
        self._last = time.monotonic()

    def count(self, row: History) -> None:
        """Count an iteration that the callback is not told of: it is from a checkpoint."""
        self.progress.advance(f"loss {float(row.loss):.4g}, gradient {float(row.gradient_norm):.2g}")

    def tell(self, iteration: int, row: History, raw: PyTree) -> None:
        """Tell of an iteration, after it is saved, because the callback may raise anything."""
        self.count(row)
        seconds = time.monotonic() - self._last
        if self._callback is not None:
            arrays = jax.device_get(self._constrained(raw))
            hypers = jax.tree.map(lambda x: float(x) if np.ndim(x) == 0 else np.asarray(x), arrays)
            self._callback(MetaStep(iteration, float(row.loss), float(row.gradient_norm), hypers, seconds))
        self._last = time.monotonic()


def in_words(tree: PyTree) -> dict[str, str]:
    """Every number or array of a tree in a few words, by path.

    >>> in_words({"rate": 0.5, "b1": np.array([0.5, 0.75])})
    {'b1': '0.5 to 0.75', 'rate': '0.5'}
    """

    def number(x: float) -> str:
        return f"1 - {1 - x:.4g}" if 0.999 < x < 1 else f"{x:.4g}"

    def words(x: Any) -> str:
        low, high = (float(f(x)) for f in (np.min, np.max))
        return number(low) if low == high else f"{number(low)} to {number(high)}"

    pairs = jax.tree.leaves_with_path(tree)
    names = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in pairs}
    return {name or "value": words(x) for name, x in names.items() if np.size(x)}


def with_entries(run: MetaRun, **entries: str) -> MetaRun:
    """The run with more in its fingerprint."""
    return run._replace(fingerprint=run.fingerprint | entries)


def scorer(
    select: Callable[[PyTree], Any], constraints: PyTree, raw: PyTree
) -> tuple[Callable[[PyTree], float], str]:
    """``select`` as a function of raw values, compiled when first called, and its digest."""
    score, data, shape = closure_convert(lambda raw: select(constrain(constraints, raw)), raw)
    if not (isinstance(shape, jax.ShapeDtypeStruct) and shape.shape == ()):
        raise TypeError(
            "optimize(select): select(hypers) must return one number; reduce it, for example by .mean()"
        )
    compiled = jax.jit(lambda data, raw: score(data, jax.tree.leaves(raw)))

    def look(raw: PyTree) -> float:
        with readable_errors():
            return float(compiled(data, raw))

    return look, digest(score.jaxpr, data)


def evaluation_of(
    objective: Objective, constraints: PyTree, seeds: int, resample: bool, averaged: bool, has_aux: bool
) -> Callable[[PyTree, jax.Array, Any, Any], tuple[History, PyTree, _EachSeed]]:
    """The objective and its hypergradient in raw values, averaged over seeds, compiled once."""

    def one(raw: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        outcome = objective(constrain(constraints, raw), key)
        if has_aux and not (isinstance(outcome, tuple) and len(outcome) == 2):
            raise TypeError(
                "optimize(objective, has_aux=True): objective(hypers, key) must return "
                f"(loss, aux); it returned {_brief(outcome)}; drop has_aux if there is no aux"
            )
        loss, aux = outcome if has_aux else (outcome, None)
        if not isinstance(loss, float | jax.Array | np.ndarray | np.generic) or not (
            jnp.shape(loss) == () and jnp.issubdtype(jnp.result_type(loss), jnp.floating)
        ):
            raise TypeError(
                "optimize(objective): the loss from objective(hypers, key) must be one "
                f"floating-point number; it is {_brief(loss)}; reduce it, for example by .mean(), "
                "and pass has_aux=True if the objective returns (loss, aux)"
            )
        return strong(loss), jax.tree.map(plain, aux)

    def evaluate(
        raw: PyTree, key: jax.Array, iteration: Any, limit: Any
    ) -> tuple[History, PyTree, _EachSeed]:
        both = jax.value_and_grad(one, has_aux=True)
        keys = jax.random.split(jax.random.fold_in(key, iteration) if resample else key, seeds)
        if seeds == 1:  # vmap would make the objective's lax.cond compute both branches
            (loss, aux), gradient = both(raw, keys[0])
            norm = _norm(gradient)
            row = _row(
                loss, norm, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], aux), jnp.zeros(1, bool)
            )
            return row, gradient, _EachSeed(loss[None], norm[None])
        (losses, aux), gradients = jax.vmap(both, in_axes=(None, 0))(raw, keys)
        norms = jax.vmap(_norm)(gradients)
        # A norm above seeds * limit puts the norm of the average above the limit by itself.
        most = jnp.asarray(seeds * limit, norms.dtype)
        sound = jnp.isfinite(losses) & jnp.isfinite(norms) & (norms <= most)
        taken = jnp.where(averaged & jnp.any(sound), sound, True)

        def mean(leaf: jax.Array) -> jax.Array:
            return jnp.mean(leaf, 0, where=taken.reshape(-1, *[1] * (leaf.ndim - 1)))

        gradient = jax.tree.map(mean, gradients)
        return _row(mean(losses), _norm(gradient), aux, ~taken), gradient, _EachSeed(losses, norms)

    return evaluate


def _row(*traced: Any) -> History:
    return History(*traced)


def _brief(value: Any) -> str:
    if isinstance(value, float | int | jax.Array | np.ndarray | np.generic):
        return f"of dtype {jnp.result_type(value)} and shape {jnp.shape(value)}"
    return f"a {type(value).__name__}"


def _norm(tree: PyTree) -> jax.Array:
    # At least float32, in which the square of a float16 cannot overflow.
    leaves = jax.tree.leaves(tree)
    dtype = promoted(jnp.float32, *leaves)
    squares = [jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in leaves]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def measure(
    run: MetaRun, raw: PyTree, iteration: int, rows: Sequence[History]
) -> tuple[list[History], PyTree, str]:
    """The row (none if there are no numbers), the gradient, and why not to follow it, or ''."""
    run.signs.look(raw)
    norms = [row.gradient_norm for row in rows]
    limit = run.explosion * _median(norms)
    try:
        # NaN is checked for below; JAX's own check would rerun the objective operation by operation.
        # Waiting here makes errors of the computation surface inside this `try`.
        with jax.debug_nans(False), jax.debug_infs(False), readable_errors():
            arguments = np.uint32(iteration), np.float32(limit if limit < 1e38 else math.inf)
            measured = jax.block_until_ready(run.compile()(raw, run.key, *arguments))
    except ArithmeticError as error:
        if iteration == 0:  # nothing has been followed yet: the call itself is at fault
            raise
        stopped = (
            f"optimize stopped at {run.unit} {iteration}: the objective raised {type(error).__name__}: "
            f"{error}. The last good values are returned; if the call itself is not at fault, go on from "
            "there with a smaller meta step."
        )
        return [], None, stopped
    gradient = measured[1]
    row, each = jax.device_get((measured[0], measured[2]))
    if iteration == 0 and not row.gradient_norm < np.finfo(np.float32).eps * run.scale:
        announce_zeros("optimize", gradient)
    reason = unsound_because(run.explosion, row, norms)
    if reason:
        if row.failed.size > 1:
            reason += f"; {_seeds(each, limit, range(row.failed.size))}"
        return [row], gradient, _explanation(run, iteration, reason)
    if row.failed.any():
        _warn_of_seeds(run, row, each, limit, iteration, sum(bool(row.failed.any()) for row in rows))
    return [row], gradient, ""


def _median(norms: Sequence[Any]) -> float:
    """The median of the norms so far; infinite if there are too few to compare with."""
    median = float(np.median(np.asarray(norms, float))) if len(norms) >= 3 else 0.0
    return median or math.inf


def unsound_because(explosion: float, row: History, norms: Sequence[Any]) -> str:
    """Why a row is not sound, given the norms before it; '' if it is."""
    loss, norm, median = float(row.loss), float(row.gradient_norm), _median(norms)
    if not math.isfinite(loss):
        return f"gave the loss {loss}"
    if not math.isfinite(norm):
        return f"gave a hypergradient of norm {norm} (the loss is {loss:.6g})"
    if norm > explosion * median:
        return (
            f"gave a hypergradient of norm {norm:.3g}, {norm / median:.3g} times the median "
            f"{median:.3g} of those before it (the limit is explosion={explosion:g})"
        )
    return ""


def _explanation(run: MetaRun, iteration: int, what: str) -> str:
    stopped = f"optimize stopped at {run.unit} {iteration}: the objective {what}. "
    if iteration == 0:
        return stopped + (
            "No meta-step has been made, so it is the objective itself, its data or where it starts: look "
            "for NaN in the data and for operations without a finite derivative (such as sqrt at 0), or "
            "start from lower learning rates or fewer training steps. The starting values are returned."
        )
    return stopped + (
        "The values before it were sound: the meta-step to these was too large, or training has become "
        "chaotic (its learning rate is too large or its steps are too many), or what is drawn at random "
        "here is not finite. The last good values are returned; from there use a smaller meta step, fewer "
        "training steps or lower learning rates."
    )


def _seeds(each: _EachSeed, limit: float, which: Sequence[int]) -> str:
    """What is wrong with some seeds, in words."""

    def what(seed: int) -> str:
        loss, norm = float(each.loss[seed]), float(each.gradient_norm[seed])
        if not math.isfinite(loss):
            return f"the loss {loss}"
        if not math.isfinite(norm) or norm > len(each.loss) * limit:
            return f"a hypergradient of norm {norm:.3g}"
        return ""

    named = [f"seed {seed} gave {what(seed)}" for seed in which if what(seed)]
    return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")


def _warn_of_seeds(
    run: MetaRun, row: History, each: _EachSeed, limit: float, iteration: int, before: int
) -> None:
    if before >= 3:
        return
    which = np.flatnonzero(row.failed).tolist()
    more = "; later ones are not announced, but counted in history.failed" if before == 2 else ""
    warnings.warn(
        f"optimize at {run.unit} {iteration}: {_seeds(each, limit, which)}; the average is over "
        f"the other {row.failed.size - len(which)} of {row.failed.size} seeds{more}",
        SeedFailure,
        stacklevel=outside(),
    )


@contextlib.contextmanager
def kept_on_exit(run: MetaRun, save: Callable[[], int]) -> Iterator[None]:
    """Save unsaved work before any exception that ends the run propagates, and say how to resume."""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        try:
            made = save()
        except Exception:
            if interrupted:
                raise
            made = 0
        if run.checkpoint is None:
            then = "nothing of it is kept; with checkpoint=... the same call would go on from here"
        elif made:
            then = f"{checkpoint_name(run)} holds {made} {run.unit}s; the same call goes on from there"
        else:
            then = "nothing was done yet"
        if interrupted:
            raise KeyboardInterrupt(f"optimize was interrupted at {run.unit} {made}; {then}") from error
        if out_of_memory(error):
            kind = MemoryError if isinstance(error, MemoryError) else jax.errors.JaxRuntimeError
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise kind(
                f"optimize ran out of memory at {run.unit} {made}: {reason or 'MemoryError'}; take fewer "
                f"seeds, smaller batches or an adjoint that stores less; {then}"
            ) from error
        raise


class Reached(NamedTuple):
    """The state of a run."""

    made: int
    raw: PyTree
    good: PyTree
    state: PyTree
    best: PyTree
    scores: np.ndarray


class Evaluation(NamedTuple):
    """One line of L-BFGS-B's journal: vectors in float64, and the row of the history."""

    point: Any
    gradient: Any
    row: Any


def stack_rows(like: PyTree, rows: list[Any]) -> PyTree:
    """Rows of a history as one tree of arrays."""
    return jax.tree.map(
        lambda leaf, *column: np.asarray(column, leaf.dtype).reshape(len(rows), *leaf.shape),
        like,
        *rows,
    )


def unstack_rows(stacked: PyTree, count: int) -> list[Any]:
    """Undo `stack_rows`."""
    return [jax.tree.map(lambda column, i=i: column[i], stacked) for i in range(count)]


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """A leaf as an array that can be saved."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def strong(leaf: Any) -> jax.Array:
    """A leaf as an array without a weak type."""
    return leaf if is_key(leaf) else jnp.asarray(leaf, jnp.result_type(leaf))


def checkpoint_name(run: MetaRun) -> str:
    """The file of a run, for messages."""
    return repr(os.fspath(run.checkpoint or ""))
