"""What `tune` returns, and how it is printed, saved and loaded."""

import functools
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad import files, schedules
from hypergrad._base.trees import PyTree
from hypergrad.constraints import ascending, is_constraint
from hypergrad.meta.runs import History, in_words
from hypergrad.optimizers.by_name import optimizer_of, says_how_it_is_made
from hypergrad.optimizers.optax_interop import Built, as_optax, from_optax
from hypergrad.program import AnyOptimizer

FORMAT = 1  # of saved files
WINDOW = 5  # what moves is looked for in the last fifth of the meta-steps
MOVES = 0.1  # in raw values: a tenth of what is positive
CHAOS = 100  # times as large as all changes of the loss is a hypergradient that tells nothing of it
LEARNS = 0.05  # by which part of itself a loss must fall
_SCHEDULES = {
    kind.__name__: kind
    for kind in (
        schedules.Constant,
        schedules.PerStep,
        schedules.PiecewiseLinear,
        schedules.WarmupCosine,
        schedules.Triangular,
        schedules.OneCycle,
    )
}


class Tuned(NamedTuple):
    """What `tune` returns; ``str(tuned)`` is a summary.

    Attributes:
      hypers: all hyperparameters by name, learned or not, as `hypergrad.train` takes them: those with the
        smallest score.
      optimizer: the optimizer that they belong to.
      history: loss and norm of the hypergradient at every meta-step.
      stopped: why tuning ended early, in words; empty if it did not.
      steps: the length of the training runs.
      start: all hyperparameters by name, as tuning began.
      scores: ``{meta-steps made: score}``; the smallest is that of ``hypers``.
      trials: ``(n,)``, the scores of the trial runs, of which the first is that of ``start``; of no length
        without trials.
      moving: what was still moving when the meta-steps ended: by name, the values in the last fifth of
        them, first and last.  More meta-steps may move it further.
      advice: that the inner training hardly learns, or is chaotic, in words; empty otherwise.
    """

    hypers: dict[str, PyTree]
    optimizer: AnyOptimizer
    history: History
    stopped: str
    steps: int
    start: dict[str, PyTree]
    scores: dict[int, float]
    trials: np.ndarray
    moving: dict[str, tuple[float, float]]
    advice: str

    @property
    def score(self) -> float:
        """The score of ``hypers``: the validation, or the training loss at the end; NaN without any."""
        return min(filter(math.isfinite, self.scores.values()), default=math.nan)

    def optax(self) -> optax.GradientTransformation:
        """The tuned optimizer as an optax transformation; a schedule holds its last value after its end."""
        return as_optax(self.optimizer, schedules.values(self.hypers, self.steps))

    def __repr__(self) -> str:
        made = len(self.history.loss)
        best = next((made for made, score in self.scores.items() if score == self.score), 0)
        begun = self.trials[0] if len(self.trials) else next(iter(self.scores.values()), math.nan)
        trials = f" and {len(self.trials) - 1} trials" if len(self.trials) else ""
        lines = [
            f"Tuned {self.optimizer.name}: score {begun:.4g} at the start, {self.score:.4g} after {best} "
            f"of {made} meta-steps{trials}"
        ]
        before, after = in_words(self.start), in_words(self.hypers)
        width = max(map(len, after), default=0)
        for name, words in after.items():
            old = before.get(name, words)
            lines.append(f"  {name:<{width}}  {words}" + (f", from {old}" if old != words else ""))
        if self.moving:
            moving = ", ".join(f"{name} ({a:.3g} to {b:.3g})" for name, (a, b) in self.moving.items())
            lines.append(f"  still moving: {moving}; more meta_steps may do better")
        lines += [f"  {words}" for words in (self.advice, self.stopped) if words]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one self-describing ``.npz`` file, atomically; `load_tuned` reads it.

        Args:
          path: path of the file; its folder must exist.

        Raises:
          TypeError: a hyperparameter is a tree of something else than dictionaries, lists, tuples and
            schedules; an old file is unchanged.
          OSError: the file cannot be written; an old file is unchanged.
        """
        call = f"Tuned.save({os.fspath(path)!r})"
        arrays: list[np.ndarray] = []
        trees = {
            name: {key: _written(call, tree, arrays) for key, tree in getattr(self, name).items()}
            for name in ("hypers", "start")
        }
        history = {name: getattr(self.history, name) for name in ("loss", "gradient_norm", "failed")}
        files.save(
            path,
            {"values": arrays, "history": history, "trials": np.asarray(self.trials)},
            tuned=FORMAT,
            optimizer=self.optimizer.name,
            made=_made(self.optimizer),
            trees=trees,
            scores={str(made): score for made, score in self.scores.items()},
            moving=self.moving,
            steps=self.steps,
            stopped=self.stopped,
            advice=self.advice,
            versions=files.versions(),
        )


def load_tuned(path: str | os.PathLike[str], optimizer: AnyOptimizer | None = None) -> Tuned:
    """Read what `Tuned.save` wrote.

    Args:
      path: path of the file.
      optimizer: the optimizer that was tuned.  It is needed only where its name does not say how it is
        made, as that of an optimizer of your own, or one made from functions.

    Returns:
      The `Tuned`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, is not of `Tuned.save`, or has another format; or its optimizer must
        be given, or is another one.

    >>> import os, tempfile, jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, meta, step: jnp.sum(w**2)
    >>> settings = {"steps": 5, "meta_steps": 2, "trials": 0, "progress": False}
    >>> tuned = hg.tune(loss, jnp.ones(2), {"learning_rate": 0.1}, **settings)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tuned.save(os.path.join(folder, "tuned.npz"))
    ...     loaded = hg.load_tuned(os.path.join(folder, "tuned.npz"))
    >>> loaded.optimizer.name, loaded.score == tuned.score
    ('adam()', True)
    """
    call = f"load_tuned({os.fspath(path)!r})"
    arrays, about = files.load(path)
    version = about.get("tuned")
    if version != FORMAT:
        reason = "was not written by Tuned.save" if version is None else f"has format {version}"
        raise ValueError(
            f"{call}: the file {reason}, and this version of hypergrad reads format {FORMAT}; give one "
            "that Tuned.save wrote, or use the version that wrote this"
        )
    try:
        trees = {
            name: {key: _read(tree, arrays["values"]) for key, tree in about["trees"][name].items()}
            for name in ("hypers", "start")
        }
        return Tuned(
            optimizer=_optimizer(call, about, optimizer),
            history=History(**arrays["history"], aux=None),
            stopped=about["stopped"],
            steps=about["steps"],
            scores={int(made): score for made, score in about["scores"].items()},
            trials=arrays["trials"],
            moving={name: (a, b) for name, (a, b) in about["moving"].items()},
            advice=about["advice"],
            **trees,
        )
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{call}: the file is damaged ({type(error).__name__}: {error})") from error


def _made(optimizer: AnyOptimizer) -> dict[str, Any] | None:
    """How an optimizer is made, as JSON; None if that cannot be said."""
    if says_how_it_is_made(optimizer):
        return {"name": optimizer.name}
    built = getattr(getattr(optimizer, "init", None), "__self__", None)
    if not isinstance(built, Built):
        return None
    for module in ("optax", "optax.contrib"):
        if getattr(importlib.import_module(module), built.name, None) is built.build:
            given = {"hypers": dict(optimizer.hypers), "domains": dict(optimizer.domains)}
            return {"optax": [module, built.name], **given}
    return None


def _optimizer(call: str, about: Mapping[str, Any], given: AnyOptimizer | None) -> AnyOptimizer:
    """The optimizer of a file, or the one given, which must have its name."""
    name, made = about["optimizer"], about["made"]
    if given is not None and given.name != name:
        raise ValueError(f"{call[:-1]}, optimizer={given.name}): the file is of {name}; give that one")
    if given is not None:
        return given
    if made is None:
        raise ValueError(
            f"{call}: the file does not say how its optimizer, {name}, is made; give the same one that was "
            "tuned, load_tuned(path, optimizer=...)"
        )
    if "name" in made:
        return optimizer_of(made["name"])
    module, function = made["optax"]
    if module not in ("optax", "optax.contrib"):
        raise KeyError(module)
    build = getattr(importlib.import_module(module), function)
    domains = {key: (low, high) for key, (low, high) in made["domains"].items()}
    return from_optax(build, made["hypers"], domains)


def _written(call: str, tree: PyTree, arrays: list[np.ndarray]) -> Any:
    """A tree as JSON, with the places of its arrays in a list, to which they are added."""
    below = functools.partial(_written, call, arrays=arrays)
    if type(tree).__name__ in _SCHEDULES and isinstance(tree, schedules.Schedule):
        fields = {name: below(x) for name, x in tree._asdict().items()}
        return {"schedule": type(tree).__name__, "of": fields}
    if isinstance(tree, dict):
        return {"dict": {name: below(x) for name, x in tree.items()}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [below(x) for x in tree]}
    if not jax.tree_util.all_leaves([tree]):
        raise TypeError(
            f"{call}: a hyperparameter holds a {type(tree).__name__}, which a file cannot name; use pickle "
            "for this result, or dictionaries, lists and tuples in its hyperparameters"
        )
    arrays.append(np.asarray(tree))
    return len(arrays) - 1


def _read(written: Any, arrays: Sequence[np.ndarray]) -> PyTree:
    """The tree that was `_written`."""
    if isinstance(written, int):
        return arrays[written]
    ((kind, inner),) = [(key, x) for key, x in written.items() if key != "of"]
    if kind == "schedule":
        return _SCHEDULES[inner](**{name: _read(x, arrays) for name, x in written["of"].items()})
    if kind == "dict":
        return {name: _read(x, arrays) for name, x in inner.items()}
    return {"list": list, "tuple": tuple}[kind](_read(x, arrays) for x in inner)


def mean_values(hypers: PyTree) -> dict[str, Any]:
    """The mean of every array of a tree, by path."""
    return {_dotted(path): jnp.mean(x) for path, x in jax.tree.leaves_with_path(hypers)}


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def still_moving(values: Mapping[str, np.ndarray], limits: PyTree) -> dict[str, tuple[float, float]]:
    """What moved in one direction in the last fifth of the meta-steps: by name, first and last value.

    Args:
      values: ``(n,)`` by name, as `mean_values` gives them at every meta-step.
      limits: the constraint of each, a tree like the hyperparameters.

    >>> from hypergrad.constraints import positive
    >>> limits = {"eps": positive, "rate": positive}
    >>> still_moving({"rate": 2.0 ** np.arange(15), "eps": np.ones(15)}, limits)
    {'rate': (4096.0, 16384.0)}
    """
    found = {}
    for where, limit in jax.tree.leaves_with_path(limits, is_leaf=is_constraint):
        name = _dotted(where)
        last = np.asarray(values[name], float)[-max(3, len(values[name]) // WINDOW) :]
        raw = last if limit is ascending else np.asarray(limit.to_raw(last))
        way = np.diff(raw)
        if len(last) >= 3 and abs(way.sum()) > max(MOVES, 0.7 * np.abs(way).sum()):
            found[name] = (float(last[0]), float(last[-1]))
    return found


def chaos_in(norms: np.ndarray, seen: np.ndarray) -> str:
    """That hypergradients tell nothing of the loss, in words; empty if they may.

    Trials move raw values by about one.  A loss that hardly changes has no hypergradient a hundred times as
    large, unless training is chaotic.

    Args:
      norms: of the hypergradients, in raw values.
      seen: the losses of all meta-steps, and of the trials that were no worse than the start.

    >>> chaos_in(np.array([500.0, 20.0, 1e6]), np.array([2.4, 2.9])).partition(":")[0]
    'training is chaotic'
    >>> chaos_in(np.array([0.5, 2.0, 1e6]), np.array([2.4, 2.9]))
    ''
    """
    norms, seen = norms[np.isfinite(norms)], seen[np.isfinite(seen)]
    typical, width = (float(f(x)) if len(x) else 0.0 for f, x in ((np.median, norms), (np.ptp, seen)))
    if not typical > CHAOS * width > 0:
        return ""
    return (
        f"training is chaotic: hypergradients have norms about {typical:.3g}, and all losses lie within "
        f"{width:.3g}; lower learning_rate or steps, use more trials, or follow "
        "hg.smoothed(problem.objective(...)) with hg.meta.optimize"
    )


def advice_on(losses: tuple[float, float], steps: int) -> str:
    """That the inner training hardly learns, in words; empty if it does.

    Args:
      losses: mean of the first tenth and of the last tenth of a run.
      steps: ``T``.

    >>> advice_on((2.0, 1.99), 40).partition(":")[0], advice_on((2.0, 1.0), 40)
    ('the inner training hardly learns', '')
    """
    first, last = losses
    if first - last > LEARNS * abs(first):
        return ""
    return (
        f"the inner training hardly learns: its loss goes from {first:.4g} to {last:.4g} in {steps} steps; "
        "raise learning_rate or steps"
    )
