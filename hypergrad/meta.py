"""Meta-optimisation: follow hypergradients to better hyperparameters, and survive being killed."""

import contextlib
import functools
import math
import numbers
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from tqdm import tqdm

from hypergrad import files
from hypergrad.constraints import constrain, is_constraint, real, unconstrain
from hypergrad.dtypes import lenient, promoted
from hypergrad.errors import out_of_memory, readable_errors
from hypergrad.fingerprint import digest
from hypergrad.run import PyTree, hoist
from hypergrad.zeros import announce_zeros

Objective = Callable[[PyTree, jax.Array], Any]


class HypergradientExplosion(RuntimeWarning):
    """The hypergradient became useless and `optimize` stopped before following it."""


class SeedFailure(RuntimeWarning):
    """Some of several seeds gave no hypergradient and were left out of the average of an iteration."""


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


class History(NamedTuple):
    """What was measured, in order; row i is meta-iteration i (or L-BFGS-B's evaluation i).

    Args:
        loss: shape `(n,)`, the objective averaged over the seeds that did not fail.
        gradient_norm: shape `(n,)`, Euclidean norm of the gradient in the raw values.
        aux: the objective's aux with leading axes `(n, seeds)`; None without `has_aux`.
        failed: shape `(n, seeds)`, bool: which seeds were left out of the average, because their loss or
            gradient was not finite, or by itself beyond `explosion`. All False where none was left.

    Returns:
        All as numpy arrays. After an explosion the last row is what stopped the run.
    """

    loss: Any
    gradient_norm: Any
    aux: Any
    failed: Any


class Optimized(NamedTuple):
    """What `optimize` returns.

    Args:
        hypers: the constrained values after the last good update, or those that `select` chose.
        raw: the same, unconstrained.
        history: what was measured on the way.
        stopped: why the run ended early, in words; empty when it made all its steps.
        scores: `{iterations made: score}` of the values that `select` looked at; empty without it.

    Returns:
        All of it.
    """

    hypers: PyTree
    raw: PyTree
    history: History
    stopped: str
    scores: dict[int, float]


class _EachSeed(NamedTuple):
    """What a row averages over, `(seeds,)` each."""

    loss: Any
    gradient_norm: Any


class _Run(NamedTuple):
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
    progress: bool
    score: Callable[[PyTree], Any] | None
    select_every: int
    select_digest: str


def optimize(
    objective: Objective,
    hypers: PyTree,
    *,
    optimizer: optax.GradientTransformation | LBFGSB | None = None,
    steps: int = 50,
    constraints: PyTree = real,
    key: jax.Array | None = None,
    seeds: int = 1,
    resample: bool = True,
    has_aux: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    progress: bool = True,
    explosion: float = 1e4,
    select: Callable[[PyTree], Any] | None = None,
    select_every: int = 10,
    about: Mapping[str, str] | None = None,
) -> Optimized:
    """Minimise `mean_seed objective(constrain(raw), key_seed)` over `raw` by gradient steps.

    The loss and its gradient are traced and compiled once. With a checkpoint, a run that is killed or
    interrupted at any moment and started again by the same call reaches bitwise the numbers of an
    uninterrupted run, on the same kind of device and with the same versions of the libraries; by the same
    call with more `steps` it reaches those of a run that was given as many at once.

    Args:
        objective: `(hypers, key) -> loss`, a floating-point scalar, or `(loss, aux)` with
            `has_aux`; any function JAX differentiates, such as a validation loss after
            `hypergrad.train`.
        hypers: tree of floating-point arrays, inside the domains of `constraints`.
        optimizer: an optax optimiser, which moves the raw values (default `optax.adam(0.04)`) and
            is given the loss as `value`; or `LBFGSB(...)`.
        steps: meta-iterations in total, including those in the checkpoint, which must not have made more;
            for LBFGSB the most iterations, each of one evaluation or more.
        constraints: one `hypergrad.constraints.Constraint` or a tree of them, a prefix of `hypers`.
        key: PRNG key of shape `()`; default `jax.random.key(0)`.
        seeds: how many keys the loss is averaged over, through `jax.vmap`: at iteration i
            `jax.random.split(jax.random.fold_in(key, i), seeds)`. A seed whose loss or gradient is not
            finite, or is large enough to carry the average beyond `explosion`, is named by a
            `SeedFailure` warning and left out, unless none would be left; with LBFGSB, whose line
            searches compare losses, it stops the run.
        resample: False holds the keys at `jax.random.split(key, seeds)`. LBFGSB always holds them,
            because its line searches compare losses.
        has_aux: whether the objective returns `(loss, aux)`.
        checkpoint: file to resume from if it exists and to write atomically as the run goes. It knows the
            objective with all it closes over, the optimizer and every argument that decides the result,
            and is refused by a call in which one of them is another. One process at a time can use it.
        checkpoint_every: write it after each so many iterations (evaluations for LBFGSB), >= 1.
        progress: show a progress bar on stderr.
        explosion: stop when the gradient norm exceeds this many times the median of those before
            it (three at least), > 1; `math.inf` stops only at losses or gradients that are not
            finite.
        select: `select(hypers) -> score`, a JAX function, such as the error on examples that the
            objective never sees. With it the hypers that are returned are not the last but those
            with the smallest score, of equals the last. For optax optimisers.
        select_every: look after each so many iterations, and after the last one; >= 1.
        about: what the run is of, by name, in words: a checkpoint that says otherwise is refused by
            those names.

    Returns:
        `Optimized`. If the hypergradient explodes, or computing it raises an ArithmeticError (such as
        `hypergrad.ReversalError`) after the first iteration, the run warns with `HypergradientExplosion`
        and returns the last values with a sound loss and gradient.
        A `hypergrad.implicit.ZeroHypergradientWarning` names what the first hypergradient is exactly 0 in.

    Raises:
        TypeError: `hypers` are not floating-point, the objective does not return a floating-point
            scalar, or the optimizer or key is not one.
        ValueError: an argument is out of range, `hypers` are outside their domains, or the
            checkpoint is damaged or of another run.
        ArithmeticError: the first hypergradient could not be computed, and none has been followed.
        KeyboardInterrupt: with Ctrl-C; its message says how to go on.
        BlockingIOError: another process works on the checkpoint.
        OSError: the checkpoint cannot be written, which is tried before any work.
        jax.errors.JaxRuntimeError: as when memory runs out; what was done is in the checkpoint.

    Example:
        >>> import jax.numpy as jnp
        >>> from hypergrad.constraints import positive
        >>> best = optimize(
        ...     lambda hypers, key: jnp.sum((hypers["rate"] - 0.5) ** 2),
        ...     {"rate": jnp.ones(3)},
        ...     optimizer=LBFGSB(),
        ...     constraints=positive,
        ...     progress=False,
        ... )
        >>> best.hypers["rate"].round(3).tolist()
        [0.5, 0.5, 0.5]

    Source: Maclaurin, Duvenaud and Adams 2015, "Gradient-based hyperparameter optimization through
    reversible learning", section 3.
    """
    optimizer = optax.adam(0.04) if optimizer is None else optimizer
    key = jax.random.key(0) if key is None else key
    counts = {"seeds": seeds, "checkpoint_every": checkpoint_every, "select_every": select_every}
    _refuse_bad_settings(optimizer, steps, counts, key, checkpoint, explosion, select)
    key = _strong(key)
    guard: Any = contextlib.nullcontext()
    if checkpoint is not None:
        guard = files.locked(checkpoint, f"optimize(checkpoint={os.fspath(checkpoint)!r})")
    with guard:
        hypers, raw = _start(constraints, hypers)
        averaged = not isinstance(optimizer, LBFGSB)
        resample = bool(resample) and averaged
        # Traced here, so that a bad objective is refused before any work; compiled when first needed.
        # Data that the objective closes over is passed in, lest the compiler copy it into the program.
        arguments = (raw, key, np.uint32(0), np.float32(math.inf))
        with readable_errors():
            evaluate, data, _ = hoist(
                _evaluation(objective, constraints, seeds, resample, averaged, has_aux), *arguments
            )
        lowered = jax.jit(lambda data, *arguments: evaluate(data, jax.tree.leaves(arguments))).lower(
            data, *arguments
        )
        row, _, _ = lowered.out_info
        score, judge = (None, "") if select is None else _scorer(select, constraints, raw)
        names = jax.tree.broadcast(constraints, hypers, is_leaf=is_constraint)
        run = _Run(
            compile=functools.cache(lambda: functools.partial(lowered.compile(), data)),
            row=row,
            key=key,
            unit="iteration",
            steps=int(steps),
            checkpoint=checkpoint,
            checkpoint_every=int(checkpoint_every),
            fingerprint={
                "hypers": _describe(hypers),
                "starting values (digest)": digest(hypers),
                "constraints": ", ".join(
                    leaf.name for leaf in jax.tree.leaves(names, is_leaf=is_constraint)
                ),
                "key": f"{jax.random.key_impl(key)} {np.asarray(_plain(key)).tolist()}",
                "seeds": str(seeds),
                "resample": str(resample),
                "loss and aux": _describe(row),
            },
            explosion=explosion,
            progress=progress,
            score=score,
            select_every=int(select_every),
            select_digest=judge,
        )
        if taken := sorted(set(about or {}) & set(run.fingerprint)):
            raise ValueError(
                f"optimize(about=...): {taken} are names of what every checkpoint says; use others"
            )
        words = {name: str(said) for name, said in (about or {}).items()}
        run = run._replace(fingerprint=words | run.fingerprint)  # first, for people to read
        if checkpoint is not None:
            exclusion = {"explosion": str(explosion)} if seeds > 1 and averaged else {}
            run = _known(run, **exclusion, **{"objective (digest)": digest(evaluate.jaxpr)})
            run = _known(run, **{"data of the objective (digest)": digest(data)})
        scores: dict[int, float] = {}
        if isinstance(optimizer, LBFGSB):
            raw, rows, stopped, exploded = _lbfgsb(run, optimizer, raw)
        else:
            raw, rows, stopped, exploded, scores = _optax(run, optimizer, raw)
    if exploded:
        warnings.warn(stopped, HypergradientExplosion, stacklevel=2)
    return Optimized(constrain(constraints, raw), raw, _stack(row, rows), stopped, scores)


def _known(run: _Run, **entries: str) -> _Run:
    """The run with more in its fingerprint."""
    return run._replace(fingerprint=run.fingerprint | entries)


def _refuse_bad_settings(
    optimizer: Any,
    steps: int,
    counts: Mapping[str, int],
    key: Any,
    checkpoint: str | os.PathLike[str] | None,
    explosion: float,
    select: Any,
) -> None:
    if not isinstance(optimizer, optax.GradientTransformation | LBFGSB):
        raise TypeError(
            f"optimize(optimizer={optimizer!r}): not an optax optimiser or LBFGSB(...); give one "
            "with its settings, such as optax.adam(0.04)"
        )
    for name, value in {"steps": steps, **counts}.items():
        least = 0 if name == "steps" else 1
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"optimize({name}={value!r}): {name} must be a whole number, at least {least}")
    if not explosion > 1:
        raise ValueError(
            f"optimize(explosion={explosion!r}): a multiple of the median gradient norm must be "
            "above 1; use math.inf to allow any growth"
        )
    legacy = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1
    if not (legacy or (_is_key(key) and key.shape == ())):
        raise TypeError(
            f"optimize(key={key!r}): not one PRNG key; use jax.random.key(0), and seeds=n to "
            "average over n keys split from it"
        )
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"optimize(checkpoint={checkpoint!r}): not a path; give the name of a file")
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise ValueError(
            f"optimize(checkpoint={os.fspath(checkpoint)!r}): its folder does not exist; make it first"
        )
    if select is not None and isinstance(optimizer, LBFGSB):
        raise ValueError(
            "optimize(select=..., optimizer=LBFGSB(...)): iterates of L-BFGS-B are not looked at one by "
            "one; use an optax optimiser, or judge what comes out"
        )


def _scorer(
    select: Callable[[PyTree], Any], constraints: PyTree, raw: PyTree
) -> tuple[Callable[[PyTree], float], str]:
    """`select` as a function of raw values, compiled when first called, and its digest."""
    score, data, shape = hoist(lambda raw: select(constrain(constraints, raw)), raw)
    if not (isinstance(shape, jax.ShapeDtypeStruct) and shape.shape == ()):
        raise TypeError(
            "optimize(select): select(hypers) must return one number; reduce it, for example by .mean()"
        )
    compiled = jax.jit(lambda data, raw: score(data, jax.tree.leaves(raw)))

    def look(raw: PyTree) -> float:
        with readable_errors():
            return float(compiled(data, raw))

    return look, digest(score.jaxpr, data)


def _start(constraints: PyTree, hypers: PyTree) -> tuple[PyTree, PyTree]:
    if not jax.tree.leaves(hypers):
        raise ValueError(
            f"optimize(hypers={hypers!r}): there is nothing to optimise; give a tree with at "
            "least one floating-point array"
        )
    for path, leaf in jax.tree.leaves_with_path(hypers):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"optimize(hypers): {jax.tree_util.keystr(path) or 'the value'} has dtype "
                f"{jnp.result_type(leaf)}, which has no gradient; give floating-point values, or "
                "leave it out of hypers and close over it in the objective"
            )
    hypers = jax.tree.map(_strong, hypers)
    try:
        return hypers, jax.tree.map(_strong, unconstrain(constraints, hypers))
    except (TypeError, ValueError) as error:
        reason = str(error).partition("): ")[2]
        raise type(error)(f"optimize(hypers, constraints=...): {reason}") from error


def _evaluation(
    objective: Objective, constraints: PyTree, seeds: int, resample: bool, averaged: bool, has_aux: bool
) -> Callable[[PyTree, jax.Array, Any, Any], tuple[History, PyTree, _EachSeed]]:
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
        return _strong(loss), jax.tree.map(_plain, aux)

    def evaluate(
        raw: PyTree, key: jax.Array, iteration: Any, limit: Any
    ) -> tuple[History, PyTree, _EachSeed]:
        both = jax.value_and_grad(one, has_aux=True)
        keys = jax.random.split(jax.random.fold_in(key, iteration) if resample else key, seeds)
        if seeds == 1:  # vmap would turn the objective's lax.cond into computing both branches
            (loss, aux), gradient = both(raw, keys[0])
            norm = _norm(gradient)
            row = History(
                loss, norm, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], aux), jnp.zeros(1, bool)
            )
            return row, gradient, _EachSeed(loss[None], norm[None])
        (losses, aux), gradients = jax.vmap(both, in_axes=(None, 0))(raw, keys)
        norms = jax.vmap(_norm)(gradients)
        # A norm above seeds * limit takes that of the average above the limit by itself.
        most = jnp.asarray(seeds * limit, norms.dtype)
        sound = jnp.isfinite(losses) & jnp.isfinite(norms) & (norms <= most)
        taken = jnp.where(averaged & jnp.any(sound), sound, True)

        def mean(leaf: jax.Array) -> jax.Array:
            return jnp.mean(leaf, 0, where=taken.reshape(-1, *[1] * (leaf.ndim - 1)))

        gradient = jax.tree.map(mean, gradients)
        return History(mean(losses), _norm(gradient), aux, ~taken), gradient, _EachSeed(losses, norms)

    return evaluate


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


def _measure(
    run: _Run, raw: PyTree, iteration: int, rows: Sequence[History]
) -> tuple[list[History], PyTree, str]:
    """The row (none if there is no number), the gradient, and why not to follow it or ''."""
    norms = [row.gradient_norm for row in rows]
    limit = run.explosion * _median(norms)
    try:
        # NaN is looked for below; JAX's search would rerun the objective operation by operation.
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
    if iteration == 0:
        announce_zeros("optimize", gradient)
    row, each = jax.device_get((measured[0], measured[2]))
    reason = _reason(run.explosion, row, norms)
    if reason:
        if row.failed.size > 1:
            reason += f"; {_seeds(each, limit, range(row.failed.size))}"
        return [row], gradient, _explanation(run, iteration, reason)
    if row.failed.any():
        _warn_of_seeds(run, row, each, limit, iteration, sum(bool(row.failed.any()) for row in rows))
    return [row], gradient, ""


def _median(norms: Sequence[Any]) -> float:
    """Of the norms so far; infinite where there is nothing to compare with."""
    median = float(np.median(np.asarray(norms, float))) if len(norms) >= 3 else 0.0
    return median or math.inf


def _reason(explosion: float, row: History, norms: Sequence[Any]) -> str:
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


def _explanation(run: _Run, iteration: int, what: str) -> str:
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
    run: _Run, row: History, each: _EachSeed, limit: float, iteration: int, before: int
) -> None:
    if before >= 3:
        return
    which = np.flatnonzero(row.failed).tolist()
    more = "; later ones are not announced, but counted in history.failed" if before == 2 else ""
    warnings.warn(
        f"optimize at {run.unit} {iteration}: {_seeds(each, limit, which)}; the average is over "
        f"the other {row.failed.size - len(which)} of {row.failed.size} seeds{more}",
        SeedFailure,
        stacklevel=5,  # at the call of optimize
    )


@contextlib.contextmanager
def _kept(run: _Run, save: Callable[[], int]) -> Iterator[None]:
    """Before anything that ends the run gets out, save what is not saved, and say how to go on."""
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
            then = f"{_name(run)} holds {made} {run.unit}s; the same call goes on from there"
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


def _bar(run: _Run, **settings: Any) -> Any:
    return tqdm(desc="optimize", unit=run.unit, disable=not run.progress, **settings)


def _advance(bar: Any, row: History) -> None:
    bar.set_postfix_str(
        f"loss {float(row.loss):.4g}, gradient {float(row.gradient_norm):.2g}", refresh=False
    )
    bar.update()


def _optax(
    run: _Run, optimizer: optax.GradientTransformation, raw: PyTree
) -> tuple[PyTree, list[History], str, bool, dict[int, float]]:
    stepper = optax.with_extra_args_support(optimizer)

    @jax.jit
    def update(gradient: PyTree, state: PyTree, raw: PyTree, loss: Any) -> tuple[PyTree, PyTree]:
        with lenient():
            updates, state = stepper.update(gradient, state, raw, value=loss)
            raw = optax.apply_updates(raw, updates)
        # Strong types: a checkpoint cannot hold weak ones, and a resumed run must compute with
        # the types of the uninterrupted one.
        return jax.tree.map(_strong, (raw, state))

    state = jax.tree.map(_strong, stepper.init(raw))
    if run.checkpoint is not None:
        traced, consts, _ = hoist(
            update, raw, state, raw, jnp.zeros(run.row.loss.shape, run.row.loss.dtype)
        )
        run = _known(run, **{"optimizer (digest)": digest(traced.jaxpr, consts, jax.tree.leaves(state))})
        judge = {"select (digest)": run.select_digest, "select_every": str(run.select_every)}
        run = _known(run, **({} if run.score is None else judge))
        run = _known(run, **{"optimizer state": _describe(state)})
    rows: list[History] = []
    # `good` lags one update behind `raw`: the loss and gradient there are known to be sound.
    at = _Reached(0, raw, raw, state, raw, np.zeros((0, 2)))
    restored = _restore(run, at[1:5], run.row)
    if restored is not None:
        values, rows, scores = restored
        if len(rows) > run.steps:
            raise ValueError(
                f"optimize(steps={run.steps}, checkpoint={_name(run)}): that checkpoint has made "
                f"{len(rows)} steps already, and does not know where it was after {run.steps}; pass "
                f"steps={len(rows)} or more (meta_steps of distill and tune), or another file"
            )
        at = _Reached(len(rows), values[0], values[1], values[2], values[3], scores)
    saved = len(rows)

    def look(at: _Reached) -> _Reached:
        if run.score is None or (len(at.scores) and at.scores[-1, 0] == at.made):
            return at
        try:
            score = run.score(at.raw)
        except ArithmeticError:
            if at.made == 0:
                raise
            score = math.nan  # training fails there; the next hypergradient will say why
        better = math.isfinite(score) and not np.any(at.scores[:, 1] < score)
        scores = np.concatenate([at.scores, [[at.made, score]]])
        return at._replace(best=at.raw if better else at.best, scores=scores)

    def save() -> int:
        nonlocal saved
        if at.made > saved:
            saved = _save(run, at[1:5], run.row, rows[: at.made], at.scores)
        return at.made

    row: list[History] = []
    stopped, end = "", at
    with _bar(run, total=run.steps, initial=saved) as bar, _kept(run, save):
        for iteration in range(saved, run.steps):
            if iteration % run.select_every == 0:
                at = look(at)
            row, gradient, stopped = _measure(run, at.raw, iteration, rows)
            if stopped:
                break
            new = update(gradient, at.state, at.raw, row[0].loss)
            rows += row
            # In one assignment, so that an interrupt finds all of the old or all of the new.
            at = at._replace(made=iteration + 1, raw=new[0], good=at.raw, state=new[1])
            _advance(bar, row[0])
            if at.made % run.checkpoint_every == 0:
                save()
        save()
        # What only the end looks at is not saved: a run that goes on would not have looked there.
        end, row = (at, row) if stopped else (look(at), [])
    chosen = {int(iteration): float(score) for iteration, score in end.scores}
    last = end.good if stopped else end.raw
    return last if run.score is None else end.best, rows + row, stopped, bool(stopped), chosen


class _Reached(NamedTuple):
    """Where a run is."""

    made: int
    raw: PyTree
    good: PyTree
    state: PyTree
    best: PyTree
    scores: np.ndarray


class _Evaluation(NamedTuple):
    """One line of L-BFGS-B's journal: vectors in float64, and the row of the history."""

    point: Any
    gradient: Any
    row: Any


class _Explosion(Exception):  # noqa: N818  (it stops SciPy, and is no error of the caller)
    pass


def _lbfgsb(run: _Run, optimizer: LBFGSB, raw: PyTree) -> tuple[PyTree, list[History], str, bool]:
    start = _flat(raw)
    bounds = _bounds(optimizer, raw, start)
    settings = f"LBFGSB({optimizer.corrections}, {optimizer.line_search_steps}, {digest(bounds)})"
    run = _known(run._replace(unit="evaluation"), optimizer=settings)
    like = _Evaluation(start, start, run.row)
    # SciPy's inner state cannot be saved. But SciPy is deterministic: fed the evaluations of the
    # journal from the start, it comes to where it was.
    restored = _restore(run, (), like)
    journal: list[Any] = [] if restored is None else restored[1]
    saved = len(journal)
    if run.steps == 0:
        return raw, [], "", False
    done: list[_Evaluation] = []
    accepted = [start]
    unused: list[History] = []

    def save() -> int:
        nonlocal saved
        if len(journal) > saved:
            saved = _save(run, (), like, journal)
        return len(journal)

    def evaluate(point: Any) -> Any:
        if len(done) == len(journal):
            row, gradient, reason = _measure(
                run, _unflat(point, raw), len(done), [entry.row for entry in done]
            )
            if reason:
                unused.extend(row)
                raise _Explosion(reason)
            journal.append(_Evaluation(point.copy(), _flat(gradient), row[0]))
            if len(journal) % run.checkpoint_every == 0:
                save()
        entry = journal[len(done)]
        if entry.point.tobytes() != point.tobytes():
            raise ValueError(
                f"optimize(checkpoint={_name(run)}): replaying its evaluation {len(done)}, SciPy "
                "asks for other values than it did; resume with the versions of SciPy and NumPy "
                "and the kind of machine that wrote it, or start again with another file"
            )
        done.append(entry)
        _advance(bar, entry.row)
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
    with _bar(run) as bar, _kept(run, save):
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


def _stack(like: PyTree, rows: list[Any]) -> PyTree:
    return jax.tree.map(
        lambda leaf, *column: np.asarray(column, leaf.dtype).reshape(len(rows), *leaf.shape),
        like,
        *rows,
    )


def _unstack(stacked: PyTree, count: int) -> list[Any]:
    return [jax.tree.map(lambda column, i=i: column[i], stacked) for i in range(count)]


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _strong(leaf: Any) -> jax.Array:
    return leaf if _is_key(leaf) else jnp.asarray(leaf, jnp.result_type(leaf))


def _describe(tree: PyTree) -> str:
    return "; ".join(
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".strip()
        for path, leaf in jax.tree.leaves_with_path(tree)
    )


def _name(run: _Run) -> str:
    return repr(os.fspath(run.checkpoint or ""))


def _pack(name: str, tree: PyTree) -> dict[str, np.ndarray]:
    return {
        name + jax.tree_util.keystr(path): np.asarray(_plain(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _unpack(run: _Run, name: str, like: PyTree, arrays: Mapping[str, Any], *axes: int) -> PyTree:
    """The tree that was packed under a name; every leaf has more leading axes than in `like`."""

    def leaf(path: Any, old: Any) -> Any:
        where = name + jax.tree_util.keystr(path)
        kind = jax.eval_shape(_plain, old) if _is_key(old) else old
        array = arrays.get(where)
        if (
            not isinstance(array, np.ndarray)
            or (*axes, *kind.shape) != array.shape
            or (array.dtype != kind.dtype)
        ):
            raise ValueError(
                f"optimize(checkpoint={_name(run)}): the file is damaged: {where} is not there, or not of "
                "its shape and dtype; delete it to start again"
            )
        if _is_key(old):
            return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(old))
        return jax.device_put(array, old.sharding) if isinstance(old, jax.Array) else array

    return jax.tree.map_with_path(leaf, like)


def _save(run: _Run, values: PyTree, like: PyTree, rows: list[Any], scores: Any = ()) -> int:
    if run.checkpoint is not None:
        files.save(
            run.checkpoint,
            _pack("values", values)
            | _pack("rows", _stack(like, rows))
            | {"scores": np.reshape(scores, (-1, 2))},
            fingerprint=run.fingerprint,
            rows=len(rows),
            versions=files.versions(),
        )
    return len(rows)


def _restore(run: _Run, values: PyTree, row: PyTree) -> tuple[PyTree, list[Any], np.ndarray] | None:
    """Values, rows and scores of the checkpoint, like those given; None if there is none."""
    if run.checkpoint is None or not os.path.exists(run.checkpoint):
        return None
    try:
        arrays, metadata = files.load(run.checkpoint)
    except ValueError as error:
        raise ValueError(
            f"optimize(checkpoint={_name(run)}): cannot resume from it, {error}; or delete it to "
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
            f"optimize(checkpoint={_name(run)}): it holds another run ({' | '.join(differences)}){hint}; "
            "make the call that wrote it, or give another file to start again"
        )
    arrays, count = arrays if isinstance(arrays, dict) else {}, metadata.get("rows")
    count = count if isinstance(count, int) else -1
    saved = _unpack(run, "values", values, arrays)
    rows = _unstack(_unpack(run, "rows", row, arrays, count), count)
    looks = np.shape(arrays.get("scores", ()))[:1]
    scores = _unpack(run, "scores", np.zeros(2), arrays, *looks)
    measured = [each.row if isinstance(each, _Evaluation) else each for each in rows]
    norms = [each.gradient_norm for each in measured]
    for i, each in enumerate(measured):
        if reason := _reason(run.explosion, each, norms[:i]):
            raise ValueError(
                f"optimize(explosion={run.explosion:g}, checkpoint={_name(run)}): this run would have "
                f"stopped at {run.unit} {i}, where the objective {reason}, and the checkpoint has gone on "
                "from there; allow as much as the call that wrote it, or give another file"
            )
    return saved, rows, scores
