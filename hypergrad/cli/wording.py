"""What was learned and how it went, in words and in few numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hypergrad._base.trees import PyTree
from hypergrad.cli.trials import Judged
from hypergrad.schedules import is_schedule


def parts_of(hypers: Mapping[str, PyTree]) -> dict[str, Any]:
    """The numbers, arrays and schedules in a tree of hyperparameters, by name.

    Args:
      hypers: by name.

    >>> parts_of({"learning_rate": {"first": 0.1, "last": 0.2}, "momentum": 0.9})
    {'learning_rate.first': 0.1, 'learning_rate.last': 0.2, 'momentum': 0.9}
    """
    named = jax.tree.leaves_with_path(dict(hypers), is_leaf=is_schedule)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in named}


def summary_of(value: PyTree) -> Any:
    """A hyperparameter in a line of the history: a number, or mean, smallest and largest of several.

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
    """The scores before and after, judged alike.

    Args:
      before: with the initial hyperparameters.
      after: with those learned.
    """
    count = len(after.scores)
    what = f"on {count} new seeds" if count > 1 else "of one run"
    lines = [f"score {what}, smaller is better: {_mean(before)} before, {_mean(after)} after"]
    if not np.mean(after.scores) < np.mean(before.scores):
        lines.append("nothing was gained: try more --meta-steps, or begin elsewhere with --start")
    return lines


def _mean(judged: Judged) -> str:
    spread = f" ± {judged.scores.std():.2g}" if len(judged.scores) > 1 else ""
    return f"{judged.scores.mean():.4g}{spread}"
