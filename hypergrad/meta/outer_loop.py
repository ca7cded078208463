"""`optimize`: the outer loop over hyperparameters."""

import functools
import math
import numbers
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad._base.checks import check_callable
from hypergrad._base.errors import outside, readable_errors
from hypergrad._base.fingerprint import digest
from hypergrad._base.notebook import short_traceback
from hypergrad._base.progress import Progress
from hypergrad._base.tracing import closure_convert
from hypergrad._base.trees import PyTree
from hypergrad.constraints import constrain, is_constraint, real, unconstrain
from hypergrad.meta.checkpoints import describe_leaves, locked
from hypergrad.meta.gradient_steps import by_optax
from hypergrad.meta.lbfgsb import LBFGSB, by_lbfgsb
from hypergrad.meta.runs import (
    Callback,
    HypergradientExplosion,
    Judge,
    MetaRun,
    Objective,
    Optimized,
    Settings,
    Teller,
    evaluation_of,
    is_key,
    plain,
    scorer,
    stack_rows,
    strong,
    with_entries,
)
from hypergrad.meta.signs import SignWatch


@short_traceback
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
    retries: int = 0,
    select: Callable[[PyTree], Any] | Literal["loss"] | None = None,
    select_every: int = 10,
    about: Mapping[str, str] | None = None,
    callback: Callback | None = None,
) -> Optimized:
    """Minimize ``mean_seed objective(constrain(raw), key_seed)`` over ``raw`` by gradient steps.

    The loss and its gradient are traced and compiled once.  With a checkpoint, a run that is killed or
    interrupted at any moment and restarted by the same call reaches bitwise the numbers of an uninterrupted
    run, on the same kind of device and with the same versions of the libraries.  The same call with more
    ``steps`` reaches those of a run that had that many from the beginning.

    Args:
      objective: ``(hypers, key) -> loss``, a floating-point scalar, or ``(loss, aux)`` with ``has_aux``;
        any function JAX differentiates, such as a validation loss after `hypergrad.train`.
      hypers: tree of floating-point arrays, inside the domains of ``constraints``.
      optimizer: an optax optimizer, which moves the raw values (default ``optax.adam(0.04)``) and is given
        the loss as ``value``; or ``LBFGSB(...)``.
      steps: total number of meta-iterations, including those in the checkpoint, which must not have made
        more; for LBFGSB the maximum number of iterations, each of one evaluation or more.
      constraints: one `hypergrad.constraints.Constraint` or a tree of them, a prefix of ``hypers``.
      key: PRNG key of shape ``()``; default ``jax.random.key(0)``.
      seeds: how many keys the loss is averaged over, through `jax.vmap`: at iteration ``i``,
        ``jax.random.split(jax.random.fold_in(key, i), seeds)``.  A seed whose loss or gradient is not
        finite, or is large enough to carry the average beyond ``explosion``, is named by a `SeedFailure`
        warning and left out, unless none would be left; with LBFGSB, whose line searches compare losses, it
        stops the run.
      resample: False holds the keys at ``jax.random.split(key, seeds)``.  LBFGSB always holds them, because
        its line searches compare losses.
      has_aux: whether the objective returns ``(loss, aux)``.
      checkpoint: file to resume from if it exists, and to write atomically during the run.  It identifies
        the objective with everything it closes over, the optimizer and every argument that decides the
        result, and is refused by a call in which any of them differs.  Only one process at a time can use
        it, or several joined by ``jax.distributed.initialize``, of which the first one writes it.
      checkpoint_every: write the checkpoint every this many iterations (evaluations for LBFGSB), >= 1.
      progress: show on stderr what is compiled, and then a progress bar with the time left; without a
        terminal or notebook, a line every ten seconds.
      explosion: stop when the gradient norm exceeds this many times the median of the earlier ones (at
        least three), > 1; ``math.inf`` stops only at losses or gradients that are not finite.
      retries: how many times a meta-step, after which the hypergradient explodes or cannot be computed, is
        halved before the run stops; each time costs one evaluation.  For optax optimizers.
      select: ``select(hypers) -> score``, a JAX function, such as the error on examples that the objective
        never uses.  The hypers returned are then not the last but those with the smallest score, the last
        of equals.  ``"loss"`` takes the loss itself, at every iteration and at no cost but one evaluation
        at the end; with keys that are resampled it compares losses of different keys.  For optax
        optimizers.
      select_every: compute the score every this many iterations, and after the last one; >= 1.
      about: a description of the run, by name, in words; a checkpoint that says otherwise is refused, and
        the error names the entry.
      callback: ``callback(step)``, called after every new iteration with a `MetaStep`, once the iteration
        is in the checkpoint if it is to be; a resumed run does not repeat those of before.  What it raises
        ends the run, with everything saved.

    Returns:
      An `Optimized`.  If the hypergradient explodes, or computing it raises an ArithmeticError (such as
      `hypergrad.ReversalError`) after the first iteration, the run warns with `HypergradientExplosion` and
      returns the last values with a sound loss and gradient.  A
      `hypergrad.implicit.ZeroHypergradientWarning` names the hyperparameters in which the first
      hypergradient is exactly 0, and a `NegativeWarning` a learning rate, or another number that by its
      name cannot be negative, that becomes negative because it has no constraint.

    Raises:
      TypeError: ``hypers`` are not floating-point, the objective does not return a floating-point scalar,
        or the optimizer or key is not one.
      ValueError: an argument is out of range, ``hypers`` are outside their domains, or the checkpoint is
        damaged or of another run.
      ArithmeticError: the first hypergradient could not be computed, and none has been followed.
      KeyboardInterrupt: the user pressed Ctrl-C; the message says how to resume.
      BlockingIOError: another process uses the checkpoint.
      OSError: the checkpoint cannot be written, which is checked before any work.
      jax.errors.JaxRuntimeError: for example if memory runs out; the work done is in the checkpoint.

    Source: Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through reversible
    learning", 2015, section 3.

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
    """
    optimizer = optax.adam(0.04) if optimizer is None else optimizer
    key = jax.random.key(0) if key is None else key
    settings = Settings(
        optimizer=optimizer,
        steps=steps,
        constraints=constraints,
        key=key,
        seeds=seeds,
        resample=bool(resample),
        has_aux=has_aux,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        explosion=explosion,
        retries=retries,
        about=about,
        callback=callback,
    )
    check_settings(settings)
    _check_select(select, select_every, optimizer)

    def judge(raw: PyTree) -> Judge | None:
        if select is None:
            return None
        if not callable(select):
            return Judge(None, select, 1)
        return Judge(*scorer(select, constraints, raw), int(select_every))

    with Progress("optimize", progress) as shown:
        return minimize(objective, hypers, settings, judge, shown, "the objective and its hypergradient")


def minimize(
    objective: Objective,
    hypers: PyTree,
    settings: Settings,
    judge: Callable[[PyTree], Judge | None],
    shown: Progress,
    what: str,
) -> Optimized:
    """`optimize` with settings that have been checked.

    Args:
      objective: as for `optimize`.
      hypers: as for `optimize`.
      settings: all others.
      judge: from the raw values at the start to what chooses the result; None for the last values.
      shown: where progress is shown.
      what: is compiled, in words.
    """
    key, constraints, seeds = strong(settings.key), settings.constraints, settings.seeds
    with locked("optimize", settings.checkpoint):
        hypers, raw = _start(constraints, hypers)
        shown.say(f"compiling {what} ...")
        averaged = not isinstance(settings.optimizer, LBFGSB)
        resample = settings.resample and averaged
        traced = _Traced.of(
            evaluation_of(objective, constraints, seeds, resample, averaged, settings.has_aux), raw, key
        )
        spread = jax.tree.broadcast(constraints, hypers, is_leaf=is_constraint)
        run = MetaRun(
            compile=traced.compile,
            row=traced.row,
            key=key,
            unit="iteration",
            steps=int(settings.steps),
            checkpoint=settings.checkpoint,
            checkpoint_every=int(settings.checkpoint_every),
            fingerprint=_fingerprint(hypers, spread, key, traced.row)
            | {"seeds": str(seeds), "resample": str(resample)},
            explosion=settings.explosion,
            retries=settings.retries,
            scale=settings.scale,
            judge=judge(raw),
            teller=Teller(shown, constraints, settings.callback),
            signs=SignWatch("optimize", spread, hypers),
        )
        excluding = {"explosion": str(settings.explosion)} if seeds > 1 and averaged else {}
        excluding |= {"retries": str(settings.retries)} if settings.retries else {}
        run = traced.told(_about(run, settings.about), excluding)
        solve: Any = by_optax if averaged else by_lbfgsb
        raw, rows, stopped, exploded, scores = solve(run, settings.optimizer, raw)
    if exploded:
        warnings.warn(stopped, HypergradientExplosion, stacklevel=outside())
    return Optimized(constrain(constraints, raw), raw, stack_rows(traced.row, rows), stopped, scores)


def _fingerprint(hypers: PyTree, constraints: PyTree, key: jax.Array, row: PyTree) -> dict[str, str]:
    """Everything besides the objective that decides the result of a run, in words that can be compared."""
    leaves = jax.tree.leaves(constraints, is_leaf=is_constraint)
    return {
        "hypers": describe_leaves(hypers),
        "starting values (digest)": digest(hypers),
        "constraints": ", ".join(leaf.name for leaf in leaves),
        "key": f"{jax.random.key_impl(key)} {np.asarray(plain(key)).tolist()}",
        "loss and aux": describe_leaves(row),
    }


class _Traced(NamedTuple):
    """An objective traced once, and compiled when it is first needed.

    Attributes:
      compile: returns the compiled function of raw values, key, iteration and threshold.
      row: shapes of the row of history that it returns.
      jaxpr: the jaxpr of the objective.
      data: what the objective closes over.
    """

    compile: Callable[[], Callable[..., Any]]
    row: Any
    jaxpr: Any
    data: list[Any]

    @staticmethod
    def of(function: Callable[..., Any], raw: PyTree, key: jax.Array) -> "_Traced":
        """Trace an objective now, so that a bad one is refused before any work.

        Data that the objective closes over is passed in, so that the compiler does not copy it into the
        program.
        """
        arguments = (raw, key, np.uint32(0), np.float32(math.inf))
        with readable_errors():
            evaluate, data, _ = closure_convert(function, *arguments)
        lowered = jax.jit(lambda data, *arguments: evaluate(data, jax.tree.leaves(arguments))).lower(
            data, *arguments
        )
        row, _, _ = lowered.out_info
        compiled = functools.cache(lambda: functools.partial(lowered.compile(), data))
        return _Traced(compiled, row, evaluate.jaxpr, data)

    def told(self, run: MetaRun, more: Mapping[str, str]) -> MetaRun:
        """The run with the objective in its fingerprint, if there is a checkpoint."""
        if run.checkpoint is None:
            return run
        run = with_entries(run, **more, **{"objective (digest)": digest(self.jaxpr)})
        return with_entries(run, **{"data of the objective (digest)": digest(self.data)})


def _about(run: MetaRun, about: Mapping[str, Any] | None) -> MetaRun:
    """The run with the user's description in its fingerprint, placed first because people can read it."""
    if taken := sorted(set(about or {}) & set(run.fingerprint)):
        raise ValueError(
            f"optimize(about=...): {taken} are names of what every checkpoint says; use others"
        )
    words = {name: str(said) for name, said in (about or {}).items()}
    return run._replace(fingerprint=words | run.fingerprint)


def check_settings(settings: Settings) -> None:
    """Refuse settings that are out of range, before any work starts."""
    optimizer, key, checkpoint = settings.optimizer, settings.key, settings.checkpoint
    if not isinstance(optimizer, optax.GradientTransformation | LBFGSB):
        raise TypeError(
            f"optimize(optimizer={optimizer!r}): not an optax optimizer or LBFGSB(...); give one "
            "with its settings, such as optax.adam(0.04)"
        )
    for name, least in {"steps": 0, "seeds": 1, "checkpoint_every": 1, "retries": 0}.items():
        _check_count(name, getattr(settings, name), least)
    if settings.retries and isinstance(optimizer, LBFGSB):
        raise ValueError(
            f"optimize(retries={settings.retries}, optimizer=LBFGSB(...)): the line searches of L-BFGS-B "
            "choose the steps; use an optax optimizer, or leave retries out"
        )
    if not settings.explosion > 1:
        raise ValueError(
            f"optimize(explosion={settings.explosion!r}): a multiple of the median gradient norm must be "
            "above 1; use math.inf to allow any growth"
        )
    if settings.callback is not None:
        check_callable("optimize", "callback", settings.callback, "step")
    legacy = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1
    if not (legacy or (is_key(key) and key.shape == ())):
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


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"optimize({name}={value!r}): {name} must be a whole number, at least {least}")


def _check_select(select: Any, select_every: Any, optimizer: Any) -> None:
    _check_count("select_every", select_every, 1)
    if not (select is None or callable(select) or select == "loss"):
        raise TypeError(
            f"optimize(select={select!r}): neither a function of the hypers nor the word 'loss'; give a "
            "function, select(hypers) -> score"
        )
    if select is not None and isinstance(optimizer, LBFGSB):
        raise ValueError(
            "optimize(select=..., optimizer=LBFGSB(...)): iterates of L-BFGS-B are not looked at one by "
            "one; use an optax optimizer, or judge what comes out"
        )


def _start(constraints: PyTree, hypers: PyTree) -> tuple[PyTree, PyTree]:
    if not jax.tree.leaves(hypers):
        raise ValueError(
            f"optimize(hypers={hypers!r}): there is nothing to optimize; give a tree with at "
            "least one floating-point array"
        )
    for path, leaf in jax.tree.leaves_with_path(hypers):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"optimize(hypers): {jax.tree_util.keystr(path) or 'the value'} has dtype "
                f"{jnp.result_type(leaf)}, which has no gradient; give floating-point values, or "
                "leave it out of hypers and close over it in the objective"
            )
    hypers = jax.tree.map(strong, hypers)
    try:
        return hypers, jax.tree.map(strong, unconstrain(constraints, hypers))
    except (TypeError, ValueError) as error:
        reason = str(error).partition("): ")[2]
        raise type(error)(f"optimize(hypers, constraints=...): {reason}") from error
