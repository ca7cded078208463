"""The outer loop by an optax optimizer."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad._base.dtypes import lenient
from hypergrad._base.fingerprint import digest
from hypergrad._base.tracing import closure_convert
from hypergrad._base.trees import PyTree
from hypergrad.meta.checkpoints import describe_leaves, restore, save_run
from hypergrad.meta.runs import (
    History,
    MetaRun,
    Reached,
    checkpoint_name,
    kept_on_exit,
    measure,
    strong,
    with_entries,
)


def by_optax(
    run: MetaRun, optimizer: optax.GradientTransformation, raw: PyTree
) -> tuple[PyTree, list[History], str, bool, dict[int, float]]:
    """Run the outer loop with an optax transformation."""
    stepper = optax.with_extra_args_support(optimizer)

    @jax.jit
    def update(gradient: PyTree, state: PyTree, raw: PyTree, loss: Any) -> tuple[PyTree, PyTree]:
        with lenient():
            updates, state = stepper.update(gradient, state, raw, value=loss)
            raw = optax.apply_updates(raw, updates)
        # Strong types, because a checkpoint cannot hold weak ones, and a resumed run must compute with the
        # same types as an uninterrupted one.
        return jax.tree.map(strong, (raw, state))

    state = jax.tree.map(strong, stepper.init(raw))
    run = _fingerprinted(run, update, (raw, state))
    # `good` lags one update behind `raw`, because the loss and gradient there are known to be sound.
    at, rows = _restored(run, Reached(0, raw, raw, state, raw, np.zeros((0, 2))))
    saved = len(rows)

    def save() -> int:
        nonlocal saved
        if at.made > saved:
            saved = save_run(run, at[1:5], run.row, rows[: at.made], at.scores)
        return at.made

    row: list[History] = []
    stopped, end = "", at
    with kept_on_exit(run, save):
        if saved < run.steps:
            run.compile()
        run.teller.begin(run.steps, run.unit, saved)
        for iteration in range(saved, run.steps):
            if run.judge is not None and iteration % run.judge.every == 0:
                at = _scored(run, at)
            at, row, gradient, stopped = _measured(run, at, iteration, rows)
            if stopped:
                break
            at = _scored_by_loss(run, at, row[0].loss)
            new = update(gradient, at.state, at.raw, row[0].loss)
            rows += row
            # In one assignment, so that an interrupt finds either the whole old state or the whole new one.
            at = at._replace(made=iteration + 1, raw=new[0], good=at.raw, state=new[1])
            if at.made % run.checkpoint_every == 0:
                save()
            run.teller.tell(iteration, row[0], at.good)
        save()
        # A score computed only because the run ends is not saved, because a longer run would not have
        # computed it.
        end, row = (at, row) if stopped else (_judged_at_the_end(run, at, rows), [])
    chosen = {int(iteration): float(score) for iteration, score in end.scores}
    last = end.good if stopped else end.raw
    run.signs.look(last)
    return last if run.judge is None else end.best, rows + row, stopped, bool(stopped), chosen


def _measured(
    run: MetaRun, at: Reached, iteration: int, rows: list[History]
) -> tuple[Reached, list[History], PyTree, str]:
    """`measure` at the values reached, or closer to the last good ones if there it fails."""
    row, gradient, stopped = measure(run, at.raw, iteration, rows)
    for _ in range(run.retries if iteration > 0 else 0):
        if not stopped:
            break
        at = at._replace(raw=jax.tree.map(lambda x, y: strong((x + y) / 2), at.good, at.raw))
        row, gradient, stopped = measure(run, at.raw, iteration, rows)
    return at, row, gradient, stopped


def _fingerprinted(run: MetaRun, update: Callable[..., Any], start: tuple[PyTree, PyTree]) -> MetaRun:
    """The run with what else decides its result in its fingerprint, if there is a checkpoint."""
    if run.checkpoint is None:
        return run
    raw, state = start
    loss = jnp.zeros(run.row.loss.shape, run.row.loss.dtype)
    traced, consts, _ = closure_convert(update, raw, state, raw, loss)
    optimizer = digest(traced.jaxpr, consts, jax.tree.leaves(state))
    run = with_entries(run, **{"optimizer (digest)": optimizer})
    if run.judge is not None:
        by = {"select (digest)": run.judge.digest, "select_every": str(run.judge.every)}
        run = with_entries(run, **by)
    return with_entries(run, **{"optimizer state": describe_leaves(state)})


def _restored(run: MetaRun, at: Reached) -> tuple[Reached, list[History]]:
    """The state and history in the checkpoint, or else the start."""
    restored = restore(run, at[1:5], run.row)
    if restored is None:
        return at, []
    values, rows, scores = restored
    if len(rows) > run.steps:
        raise ValueError(
            f"optimize(steps={run.steps}, checkpoint={checkpoint_name(run)}): that checkpoint has made "
            f"{len(rows)} steps already, and does not know where it was after {run.steps}; pass "
            f"steps={len(rows)} or more (meta_steps of distill and tune), or another file"
        )
    return Reached(len(rows), values[0], values[1], values[2], values[3], scores), rows


def _scored(run: MetaRun, at: Reached) -> Reached:
    """The state of a run with its score, if results are chosen by a function of the values."""
    known = len(at.scores) > 0 and at.scores[-1, 0] == at.made
    if run.judge is None or run.judge.score is None or known:
        return at
    try:
        score = run.judge.score(at.raw)
    except ArithmeticError:
        if at.made == 0:
            raise
        score = math.nan  # training fails there; the next hypergradient will say why
    return _with_score(at, score)


def _scored_by_loss(run: MetaRun, at: Reached, loss: Any) -> Reached:
    """The state of a run with its loss as the score, if results are chosen by the loss."""
    by_loss = run.judge is not None and run.judge.score is None
    return _with_score(at, float(loss)) if by_loss else at


def _with_score(at: Reached, score: float) -> Reached:
    better = math.isfinite(score) and not np.any(at.scores[:, 1] < score)
    scores = np.concatenate([at.scores, [[at.made, score]]])
    return at._replace(best=at.raw if better else at.best, scores=scores)


def _judged_at_the_end(run: MetaRun, at: Reached, rows: list[History]) -> Reached:
    """The state of a run that made all its steps, with the score of its last values."""
    if run.judge is None or run.judge.score is not None or run.steps == 0:
        return _scored(run, at)
    row, _, stopped = measure(run, at.raw, run.steps, rows)
    return _scored_by_loss(run, at, math.nan if stopped else row[0].loss)
