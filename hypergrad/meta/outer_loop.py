"""`optimize`: the outer loop over hyperparameters."""

import functools
import math
import numbers
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad._base.errors import readable_errors
from hypergrad._base.fingerprint import digest
from hypergrad._base.tracing import closure_convert
from hypergrad._base.trees import PyTree
from hypergrad.constraints import constrain, is_constraint, real, unconstrain
from hypergrad.meta.checkpoints import describe_leaves, locked
from hypergrad.meta.gradient_steps import by_optax
from hypergrad.meta.lbfgsb import LBFGSB, by_lbfgsb
from hypergrad.meta.runs import (
    HypergradientExplosion,
    MetaRun,
    Objective,
    Optimized,
    evaluation_of,
    is_key,
    plain,
    scorer,
    stack_rows,
    strong,
    with_entries,
)


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
        it.
      checkpoint_every: write the checkpoint every this many iterations (evaluations for LBFGSB), >= 1.
      progress: show a progress bar on stderr.
      explosion: stop when the gradient norm exceeds this many times the median of the earlier ones (at
        least three), > 1; ``math.inf`` stops only at losses or gradients that are not finite.
      select: ``select(hypers) -> score``, a JAX function, such as the error on examples that the objective
        never uses.  The hypers returned are then not the last but those with the smallest score, the last
        of equals.  For optax optimizers.
      select_every: compute the score every this many iterations, and after the last one; >= 1.
      about: a description of the run, by name, in words; a checkpoint that says otherwise is refused, and
        the error names the entry.

    Returns:
      An `Optimized`.  If the hypergradient explodes, or computing it raises an ArithmeticError (such as
      `hypergrad.ReversalError`) after the first iteration, the run warns with `HypergradientExplosion` and
      returns the last values with a sound loss and gradient.  A
      `hypergrad.implicit.ZeroHypergradientWarning` names the hyperparameters in which the first
      hypergradient is exactly 0.

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
    counts = {"seeds": seeds, "checkpoint_every": checkpoint_every, "select_every": select_every}
    _refuse_bad_settings(optimizer, steps, counts, key, checkpoint, explosion, select)
    key = strong(key)
    with locked("optimize", checkpoint):
        hypers, raw = _start(constraints, hypers)
        averaged = not isinstance(optimizer, LBFGSB)
        resample = bool(resample) and averaged
        traced = _Traced.of(
            evaluation_of(objective, constraints, seeds, resample, averaged, has_aux), raw, key
        )
        score, judge = (None, "") if select is None else scorer(select, constraints, raw)
        run = MetaRun(
            compile=traced.compile,
            row=traced.row,
            key=key,
            unit="iteration",
            steps=int(steps),
            checkpoint=checkpoint,
            checkpoint_every=int(checkpoint_every),
            fingerprint=_fingerprint(hypers, constraints, key, traced.row)
            | {"seeds": str(seeds), "resample": str(resample)},
            explosion=explosion,
            progress=progress,
            score=score,
            select_every=int(select_every),
            select_digest=judge,
        )
        excluding = {"explosion": str(explosion)} if seeds > 1 and averaged else {}
        run = traced.told(_about(run, about), excluding)
        solve: Any = by_optax if averaged else by_lbfgsb
        raw, rows, stopped, exploded, scores = solve(run, optimizer, raw)
    if exploded:
        warnings.warn(stopped, HypergradientExplosion, stacklevel=2)
    return Optimized(constrain(constraints, raw), raw, stack_rows(traced.row, rows), stopped, scores)


def _fingerprint(hypers: PyTree, constraints: PyTree, key: jax.Array, row: PyTree) -> dict[str, str]:
    """Everything besides the objective that decides the result of a run, in words that can be compared."""
    broadcast = jax.tree.broadcast(constraints, hypers, is_leaf=is_constraint)
    leaves = jax.tree.leaves(broadcast, is_leaf=is_constraint)
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
            f"optimize(optimizer={optimizer!r}): not an optax optimizer or LBFGSB(...); give one "
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
