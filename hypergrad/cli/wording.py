"""What was learned and how it went, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hypergrad._base.trees import PyTree
from hypergrad.cli.trials import Judged
from hypergrad.schedules import Schedule

MOVES = 0.05  # a change of this part of the size, over the last tenth of the meta-steps, is still moving
LEARNS = 0.1  # a training loss that falls by less than this part of the first one hardly falls
MOST = 8  # lines about one hyperparameter


def parts_of(hypers: Mapping[str, PyTree]) -> dict[str, Any]:
    """The numbers, arrays and schedules in a tree of hyperparameters, by name.

    Args:
      hypers: by name.

    >>> parts_of({"learning_rate": {"first": 0.1, "last": 0.2}, "momentum": 0.9})
    {'learning_rate of first': 0.1, 'learning_rate of last': 0.2, 'momentum': 0.9}
    """
    found = {}
    for name, tree in hypers.items():
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Schedule)):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            found[f"{name} of {where}" if where else name] = leaf
    return found


def changes(before: Mapping[str, PyTree], after: Mapping[str, PyTree]) -> list[str]:
    """What became of each hyperparameter that was learned.

    Args:
      before: those that were learned, by name.
      after: the same, as they are now.
    """
    old, new = parts_of(before), parts_of(after)
    lines = [f"learned: {name} {_change(old[name], new[name])}" for name in new]
    more = [f"... and {len(lines) - MOST} more of them"] if len(lines) > MOST else []
    return lines[:MOST] + more


def _change(old: Any, new: Any) -> str:
    if isinstance(new, Schedule):
        fields = zip(new._fields, old, new)
        return ", ".join(f"{name} {_change(x, y)}" for name, x, y in fields if np.any(np.asarray(x != y)))
    old, new = np.asarray(old, float), np.asarray(new, float)
    if new.ndim == 0:
        return f"{old:.3g} -> {new:.3g}"
    if new.ndim > 1 or new.size < 2:
        return f"{old.min():.3g} to {old.max():.3g} -> {new.min():.3g} to {new.max():.3g}"
    begin = f"{old[0]:.3g}" if old.min() == old.max() else f"{old.min():.3g} to {old.max():.3g}"
    return (
        f"{begin} -> first {new[0]:.3g}, highest {new.max():.3g} (at {new.argmax()}), "
        f"lowest {new.min():.3g} (at {new.argmin()}), last {new[-1]:.3g}"
    )


def summary_of(value: Any) -> Any:
    """A hyperparameter in a line of the history: a number, or the mean, smallest and largest of several.

    Args:
      value: a number, or a tree of arrays.

    >>> summary_of(np.array([1.0, 3.0]))
    {'mean': 2.0, 'min': 1.0, 'max': 3.0}
    """
    numbers = np.concatenate([np.ravel(np.asarray(x, float)) for x in jax.tree.leaves(value)])
    if numbers.size == 1:
        return float(numbers[0])
    return {"mean": float(numbers.mean()), "min": float(numbers.min()), "max": float(numbers.max())}


def scores(before: Judged, after: Judged) -> list[str]:
    """The scores before and after, and whether the training itself learns.

    Args:
      before: with the initial hyperparameters.
      after: with those learned.
    """
    count = len(after.scores)
    what = f"mean of {count} new seeds" if count > 1 else "one run"
    lines = [f"score, smaller is better, {what}: {_mean(before)} before, {_mean(after)} after"]
    if not np.mean(after.scores) < np.mean(before.scores):
        lines.append(
            "nothing was gained: try more --meta-steps, another --meta-rate, or other --start values"
        )
    tenth = max(1, len(after.losses) // 10)
    first, last = np.mean(after.losses[:tenth]), np.mean(after.losses[-tenth:])
    lines.append(f"training loss with what was learned: {first:.4g} at first, {last:.4g} at the end")
    if not last < first - LEARNS * abs(first):
        lines.append(
            "the inner training hardly learns: raise the learning rate (--start learning_rate=...) or --steps"
        )
    return lines


def _mean(judged: Judged) -> str:
    spread = f" ± {judged.scores.std():.2g}" if len(judged.scores) > 1 else ""
    return f"{judged.scores.mean():.4g}{spread}"


def moving(rows: Sequence[Mapping[str, Any]], meta_steps: int) -> list[str]:
    """What was still changing when the learning ended.

    Args:
      rows: of the history.
      meta_steps: their number, as it was set.
    """
    back = max(3, len(rows) // 10)
    if len(rows) <= 2 * back:
        return []
    names = [
        name
        for name, last in rows[-1]["hypers"].items()
        if _moved(_middle(rows[-1 - back]["hypers"][name]), _middle(last)) > MOVES
    ]
    losses = [row["loss"] for row in rows]
    gain = np.mean(losses[-2 * back : -back]) - np.mean(losses[-back:])
    falls = gain > MOVES * abs(np.mean(losses[-back:]))
    told = [*([f"the score ({gain:.2g} in {back} meta-steps)"] if falls else []), *names]
    if not told:
        return ["nothing moved much at the end: it has settled"]
    return [f"still moving: {', '.join(told)}; the same command with --meta-steps {2 * meta_steps} goes on"]


def _middle(told: Any) -> float:
    return told["mean"] if isinstance(told, Mapping) else told


def _moved(old: float, new: float) -> float:
    return abs(new - old) / max(abs(old), 1e-30)
