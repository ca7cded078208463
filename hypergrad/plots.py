"""Pictures of results, as matplotlib figures.

Each function draws a figure of its own, which a notebook shows and ``figure.savefig(path)`` writes, or into
``part=`` of a figure of yours.  Curves differ in dashes and in lightness, so they read in gray too.
matplotlib is imported when a picture is drawn, and not before; it comes with ``hypergrad-jax[plots]``.

>>> import jax.numpy as jnp, hypergrad as hg
>>> from matplotlib.figure import Figure
>>> figure = Figure(layout="constrained")
>>> left, right = figure.subfigures(1, 2)
>>> rates = jnp.linspace(0.1, 0.01, 50)
>>> hg.plots.schedules({"learning_rate": rates}, {"learning_rate": 0.1}, part=left) is figure
True
>>> hg.plots.losses({"constant": jnp.ones(50), "learned": jnp.ones(50) / 2}, part=right) is figure
True
"""

import functools
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike

from hypergrad import schedules as _schedules
from hypergrad._base.checks import is_whole
from hypergrad._base.trees import PyTree
from hypergrad.distillation import Distilled
from hypergrad.meta import MetaStep, Optimized, Tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

SIDE = 0.9  # inches of the side of an image
MOST_COLUMNS = 10  # of a set whose classes are many
CUT = 1.0  # percent of the numbers at each end of the scale, where the color no longer changes
PANEL = (5.0, 3.4)  # inches of a plot of curves
ACROSS = 3  # of those side by side, at most
MOST_CURVES = 8  # in one of them
WIDE = 10.0  # how many times the smallest number the largest is where the axis becomes logarithmic
# Paul Tol's high-contrast colors and black: their lightness in CIELAB is 0, 29, 50 and 73.
COLORS = ("#000000", "#004488", "#BB5566", "#DDAA33")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))


def schedules(
    learned: Tuned | Mapping[str, PyTree],
    start: Mapping[str, PyTree] | None = None,
    *,
    steps: int | None = None,
    names: Sequence[str] | None = None,
    part: "SubFigure | None" = None,
) -> "Figure":
    """Hyperparameters over the training steps, learned and as they began; a panel for each.

    Of a tree, such as rates by layer, every part is a curve.  Of an array that differs by weight too, the
    curve is its mean over the weights, in a band from the smallest to the largest.

    Args:
      learned: what `hypergrad.tune` returned, or hyperparameters by name: numbers, ``(T, ...)`` arrays,
        schedules, or trees of them.
      start: where they began, by name, drawn in gray; by default ``learned.start``, or none.
      steps: ``T``; by default that of the tuning, or the length of the arrays.
      names: of those that are drawn; by default all, and of a `hypergrad.meta.Tuned` those that have
        changed.
      part: of a figure to draw in, from ``figure.subfigures``; by default a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      TypeError: `learned` is neither.
      ValueError: a name is unknown, an array is of another length, or nothing tells the number of steps.
      ImportError: matplotlib is not installed.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> learned = {"learning_rate": {"first": jnp.linspace(0.2, 0.1, 20), "last": jnp.ones(20)}}
    >>> figure = hg.plots.schedules(learned, {"learning_rate": 0.1})
    >>> [line.get_label() for line in figure.axes[0].get_lines()]
    ['start', 'first', 'last']
    """
    call = f"plots.schedules(learned, steps={steps!r}, names={names!r})"
    if isinstance(learned, Tuned):
        steps = learned.steps if steps is None else steps
        start = learned.start if start is None else start
        learned = learned.hypers
        names = [n for n in learned if _differ(learned[n], start.get(n))] if names is None else names
    if not isinstance(learned, Mapping):
        raise TypeError(
            f"{call}: learned is a {type(learned).__name__}; give what hypergrad.tune returned, or a "
            "dictionary of hyperparameters by name"
        )
    names = list(names or learned)
    if unknown := sorted(set(names) - set(learned)):
        raise ValueError(f"{call}: {unknown} are none of {list(learned)}; name some of those")
    steps = _steps(call, learned, steps)
    begun = {} if start is None else start
    made, panels = _panels(call, part, len(names))
    for axes, name in zip(panels, names):
        old = _over_steps(call, name, begun[name], steps) if name in begun else {}
        _scheduled(axes, name, _over_steps(call, name, learned[name], steps), old)
    return made


def history(
    made: Tuned | Optimized | Distilled,
    path: Sequence[MetaStep] = (),
    *,
    part: "SubFigure | None" = None,
) -> "Figure":
    """The outer loss over the meta-steps, with what else tells how it was learned.

    That is for `hypergrad.tune` the scores of its trials, and for a distilled set the error on held-out
    examples.
    Scores by which the result was chosen are drawn as points where they are not the loss itself, and a
    circle is around the one that was chosen.

    Args:
      made: what `hypergrad.tune`, `hypergrad.meta.optimize` or `hypergrad.distill` returned.
      path: what a callback was given, in order; each hyperparameter in it gets a panel with its means.
      part: of a figure to draw in, from ``figure.subfigures``; by default a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      TypeError: `made` is none of these.
      ImportError: matplotlib is not installed.

    >>> import hypergrad as hg
    >>> seen, start = [], {"learning_rate": 0.1}
    >>> settings = {"steps": 3, "callback": seen.append, "progress": False}
    >>> best = hg.meta.optimize(lambda x, key: (x["learning_rate"] - 0.5) ** 2, start, **settings)
    >>> figure = hg.plots.history(best, seen)
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['loss', 'learning rate']
    """
    call = f"plots.history(made, path of {len(path)})"
    if not isinstance(made, Tuned | Optimized | Distilled):
        raise TypeError(
            f"{call}: made is a {type(made).__name__}; give what hypergrad.tune, hypergrad.meta.optimize "
            "or hypergrad.distill returned"
        )
    looks, scores = np.zeros((0, 2)), {}
    if isinstance(made, Distilled):
        losses = np.asarray(made.history.get("loss", ()))
        looks = np.asarray(made.history.get("validation_error", looks))
    else:
        losses, scores = np.asarray(made.history.loss), dict(made.scores)
    trials = made.trials if isinstance(made, Tuned) else np.zeros(0)
    names = list(path[0].hypers) if path and isinstance(path[0].hypers, Mapping) else []
    figure, panels = _panels(call, part, bool(len(trials)) + 1 + bool(len(looks)) + len(names))
    each = iter(panels)
    if len(trials):
        axes = next(each)
        _points(axes, np.arange(len(trials)), trials, "trial, of which 0 is the start", "score")
        best = np.nanmin(trials)
        if best < trials[0] < np.inf:  # trials far worse than the start are cut off
            axes.set_ylim(top=2 * trials[0] - best)
    axes = next(each)
    _curve(axes, np.arange(len(losses)), losses, 0, "loss")
    _score(axes, losses, scores)
    axes.set(xlabel="meta-step", ylabel="loss on real examples" if isinstance(made, Distilled) else "loss")
    if len(looks):
        _points(next(each), looks[:, 0], 100 * looks[:, 1], "meta-step", "error on held-out examples, %")
    for name, axes in zip(names, each):
        _moved(axes, name, path)
    return figure


def losses(runs: Mapping[str, ArrayLike], *, part: "SubFigure | None" = None) -> "Figure":
    """Training losses of some runs over their steps.

    Args:
      runs: ``(T,)`` losses by the name of the run, such as ``trained.losses``.
      part: of a figure to draw in, from ``figure.subfigures``; by default a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: there are no runs, or what is given of one is not ``(T,)``.
      ImportError: matplotlib is not installed.

    >>> import numpy as np, hypergrad as hg
    >>> figure = hg.plots.losses({"adam": np.linspace(1, 0.5, 10), "sgd": np.linspace(1, 0.7, 10)})
    >>> figure.axes[0].get_xlabel()
    'training step'
    """
    shapes = {name: list(np.shape(x)) for name, x in runs.items()}
    if not shapes or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(
            f"plots.losses(runs of {shapes}): give (T,) losses for each run, "
            '{"tuned": trained.losses, ...}'
        )
    figure, (axes,) = _panels("plots.losses(runs)", part, 1)
    for k, (name, values) in enumerate(runs.items()):
        _curve(axes, np.arange(shapes[name][0]), np.asarray(values), k, name)
    axes.set(xlabel="training step", ylabel="training loss")
    _finish(axes)
    return figure


def images(
    made: Distilled,
    *,
    columns: int | None = None,
    names: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
    part: "SubFigure | None" = None,
) -> "Figure":
    """The images of a distilled set, side by side, in the units of the data.

    Images with three channels are drawn in color, others in gray with a scale beside them.

    Args:
      made: the set, of images ``(n, height, width)`` or ``(n, height, width, channels)`` with 1 or 3
        channels.
      columns: images in a row; by default one for every class, and 10 at most.
      names: what the classes are called, in the order of their labels; by default their numbers.
      limits: the numbers that are drawn black and white (or as no and full color); by default the first and
        last percentile.
      part: of a figure to draw in, from ``figure.subfigures``; by default a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: the set holds no images, or an argument does not fit it.
      ImportError: matplotlib is not installed.

    >>> import numpy as np, hypergrad as hg
    >>> pixels = np.random.default_rng(0).uniform(size=(4, 8, 8, 3))
    >>> made = hg.Distilled(pixels, np.arange(4), np.zeros(3), np.ones(3), hg.Recipe())
    >>> figure = hg.plots.images(made, names=["ship", "car", "cat", "dog"])
    >>> len(figure.axes)
    4
    """
    pixels, labels = np.asarray(made.images, np.float64), np.asarray(made.labels)
    call = f"plots.images(made, columns={columns!r}, names={tuple(names)!r}, limits={limits!r})"
    hard = labels.argmax(1) if labels.ndim == 2 else labels
    classes = labels.shape[1] if labels.ndim == 2 else int(hard.max()) + 1
    _refuse(call, pixels.shape, classes, columns, names, limits)
    low, high = np.percentile(pixels, (CUT, 100 - CUT)) if limits is None else limits
    high = high if high > low else low + 1  # of a set of one number
    across = min(classes, MOST_COLUMNS) if columns is None else columns
    down = -(-len(pixels) // across)
    color = pixels.ndim == 4 and pixels.shape[3] == 3
    size = max(SIDE * across, 2.0) + (0.0 if color else 0.8), (SIDE + 0.25) * down
    figure, here = _figure(call, part, size)
    axes = here.subplots(down, across, squeeze=False)
    drawn: Any = None
    for place, image, label in zip(axes.flat, pixels, hard):
        shown = np.clip((image - low) / (high - low), 0, 1) if color else image.reshape(image.shape[:2])
        drawn = place.imshow(shown, cmap="gray", vmin=None if color else low, vmax=None if color else high)
        place.set_title(names[label] if names else str(label), fontsize="small")
    for place in axes.flat:
        place.set_axis_off()
    if not color:
        here.colorbar(drawn, ax=axes, label="value of a pixel", extend="both")
    return figure


def _figure(call: str, part: "SubFigure | None", size: tuple[float, float]) -> tuple["Figure", Any]:
    """The figure that is returned, and where in it is drawn: in the part, or in a new figure of a size."""
    if part is not None:
        return part.figure, part
    try:
        matplotlib = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            f"{call}: matplotlib, which draws it, is not installed; pip install 'hypergrad-jax[plots]'"
        ) from error
    made = matplotlib.Figure(figsize=size, layout="constrained")
    made._repr_png_ = functools.partial(_png, made)  # a notebook shows only figures of pyplot by itself
    return made, made


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panels(call: str, part: "SubFigure | None", count: int) -> tuple["Figure", list[Any]]:
    """The figure, and axes for so many plots of curves."""
    rows = max(1, -(-count // ACROSS))
    columns = max(1, -(-count // rows))
    figure, here = _figure(call, part, (PANEL[0] * columns, PANEL[1] * rows))
    axes = list(here.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def _steps(call: str, hypers: Mapping[str, PyTree], steps: int | None) -> int:
    """The number of steps: the one given, or the length of the arrays."""
    if steps is not None:
        if not is_whole(steps):
            raise ValueError(f"{call}: steps must be a whole number, at least 1")
        return int(steps)
    leaves = jax.tree.leaves(hypers, is_leaf=_schedules.is_schedule)
    numbers = [x for x in leaves if not _schedules.is_schedule(x) or isinstance(x, _schedules.PerStep)]
    arrays = [x.values if isinstance(x, _schedules.PerStep) else x for x in numbers]
    lengths = {np.shape(x)[0] for x in arrays if np.ndim(x) and np.shape(x)[0] > 1}
    if len(lengths) != 1:
        found = f"the arrays have the lengths {sorted(lengths)}" if lengths else "there is no array"
        raise ValueError(f"{call}: {found}, so the number of steps is unknown; give steps=")
    return int(lengths.pop())


def _over_steps(call: str, name: str, tree: PyTree, steps: int) -> dict[str, np.ndarray]:
    """Every part of a hyperparameter over the steps, ``(T, ...)``, by path."""
    found = {}
    for where, x in jax.tree.leaves_with_path(_schedules.values(tree, steps)):
        values = np.asarray(x, float)
        if values.ndim and len(values) not in (1, steps):
            raise ValueError(
                f"{call}: {name!r} has an array of shape {list(values.shape)}; its first axis is the step, "
                f"of length {steps} or 1"
            )
        values = values if values.ndim else values[None]
        found[_dotted(where)] = np.broadcast_to(values, (steps, *values.shape[1:]))
    return found


def _differ(new: PyTree, old: PyTree) -> bool:
    """Whether a hyperparameter has changed."""
    a, b = jax.tree.flatten(new), jax.tree.flatten(old)
    return str(a[1]) != str(b[1]) or not all(np.array_equal(x, y) for x, y in zip(a[0], b[0]))


def _scheduled(axes: Any, name: str, new: Mapping[str, np.ndarray], old: Mapping[str, np.ndarray]) -> None:
    """A hyperparameter over the steps, behind it where it began."""
    distinct = {x.tobytes(): x for x in old.values()}
    for k, begun in enumerate(list(distinct.values())[:MOST_CURVES]):
        mean = begun.reshape(len(begun), -1).mean(1)
        axes.plot(np.arange(len(mean)), mean, color="0.6", linewidth=1.0, label="" if k else "start")
    _parts(axes, {part or "learned": x for part, x in new.items()})
    axes.set(xlabel="training step", ylabel=_spoken(name))
    _finish(axes)


def _moved(axes: Any, name: str, path: Sequence[MetaStep]) -> None:
    """The means of a hyperparameter over the meta-steps."""
    parts: dict[str, list[Any]] = {}
    for step in path:
        for where, x in jax.tree.leaves_with_path(step.hypers[name]):
            parts.setdefault(_dotted(where), []).append(np.ravel(x))
    begun = np.array([step.iteration for step in path])
    _parts(axes, {part or "mean": np.asarray(x, float) for part, x in parts.items()}, begun)
    axes.set(xlabel="meta-step", ylabel=_spoken(name))
    _finish(axes)


def _parts(axes: Any, parts: Mapping[str, np.ndarray], places: np.ndarray | None = None) -> None:
    """The means of ``(n, ...)`` arrays, in bands from the smallest to the largest number."""
    for k, (part, values) in enumerate(list(parts.items())[:MOST_CURVES]):
        flat = values.reshape(len(values), -1)
        x = np.arange(len(flat)) if places is None else places
        _curve(axes, x, flat.mean(1), k, part)
        if flat.shape[1] > 1:
            axes.fill_between(x, flat.min(1), flat.max(1), color=COLORS[k % len(COLORS)], alpha=0.15)
    if len(parts) > MOST_CURVES:
        axes.set_title(f"{MOST_CURVES} of {len(parts)} parts", fontsize="small")


def _points(axes: Any, x: np.ndarray, y: np.ndarray, across: str, up: str) -> None:
    """Some values, as points on a line."""
    _curve(axes, x, np.where(np.isfinite(y), y, np.nan), 0, up, marker="o", markersize=3)
    axes.set(xlabel=across, ylabel=up)
    _finish(axes)


def _score(axes: Any, losses: np.ndarray, scores: Mapping[int, float]) -> None:
    """The scores that decided, as points where they are not the losses, and a circle around the best."""
    made = np.array([k for k, x in scores.items() if np.isfinite(x)], int)
    values = np.array([scores[k] for k in made])
    if made.size and not (made.max() < len(losses) and np.array_equal(losses[made], values)):
        axes.plot(made, values, "s", color=COLORS[2], markersize=4, label="score")
    if made.size:
        best = values.argmin()
        axes.plot(
            made[best], values[best], "o", color=COLORS[1], markersize=9, fillstyle="none", label="chosen"
        )
    _finish(axes)


def _curve(axes: Any, x: np.ndarray, y: np.ndarray, k: int, label: str, **style: Any) -> None:
    """The ``k``-th curve of a plot."""
    look = {"color": COLORS[k % len(COLORS)], "linestyle": DASHES[k % len(DASHES)], "linewidth": 1.4}
    axes.plot(x, y, label=label, **look, **style)
    axes.grid(alpha=0.25)


def _finish(axes: Any) -> None:
    """Whole steps, a logarithmic axis where positive numbers differ much, a legend of several curves."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    numbers = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    numbers = numbers[np.isfinite(numbers)]
    if numbers.size and 0 < WIDE * numbers.min() <= numbers.max():
        axes.set_yscale("log")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize="small")


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _refuse(
    call: str,
    shape: tuple[int, ...],
    classes: int,
    columns: int | None,
    names: Sequence[str],
    limits: tuple[float, float] | None,
) -> None:
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise ValueError(
            f"{call}: the set holds {list(shape)}, which are no gray or color images; those are (n, "
            "height, width) or (n, height, width, 1 or 3). For a table look at made.images"
        )
    if columns is not None and not is_whole(columns):
        raise ValueError(f"{call}: columns must be a whole number, at least 1")
    if names and len(names) != classes:
        raise ValueError(f"{call}: there are {len(names)} names and {classes} classes; pass one for each")
    if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
        raise ValueError(f"{call}: limits must be two numbers, the lower first")
