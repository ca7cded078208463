"""What a window of a long run leaves out of the hypergradient, by comparison with the exact one."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import nets
from hypergrad._base.checks import is_whole
from hypergrad._base.errors import readable_errors
from hypergrad._base.notebook import short_traceback
from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.strategies import Adjoint, Truncated
from hypergrad.distillation.distilled import Distilled
from hypergrad.distillation.recipe import Network, train_with


class WindowCosines(NamedTuple):
    """How far gradients of a window, in the images, point where the exact ones do; prints as a table.

    Attributes:
      window: ``W``, steps that are differentiated.
      ends: ``(k,)`` last steps of the window, up to ``T``; one before step ``W`` stands for the run so far.
      same_end: ``(r, k)`` cosines, in ``r`` runs, with the exact gradient of the loss after the same step.
      whole_run: ``(r, k)`` cosines with the exact gradient of the loss after all ``T`` steps.
      size: ``(r, k)`` norms, relative to the exact gradient of the loss after the same step.
      average: ``(r,)`` cosines of the means of both over the ends from ``W`` on: of what
        ``distill(window=)`` follows on average with the exact gradient of the same objective.
    """

    window: int
    ends: np.ndarray
    same_end: np.ndarray
    whole_run: np.ndarray
    size: np.ndarray
    average: np.ndarray

    def __str__(self) -> str:
        lines = [
            f"gradient of a window of {self.window} steps: cosine with the exact one, of the loss where it",
            "ends and of the loss at the end of the run, and norm relative to the former",
            "last step  where it ends  end of the run    norm",
        ]
        for k, end in enumerate(self.ends):
            same, whole, size = (x[:, k].mean() for x in (self.same_end, self.whole_run, self.size))
            lines.append(f"{end:>9}  {same:>13.3f}  {whole:>14.3f}  {size:>6.3f}")
        return "\n".join([*lines, f"means over the ends: cosine {self.average.mean():.3f}"])


@short_traceback
def window_cosines(
    network: Network,
    distilled: Distilled,
    real: tuple[np.ndarray, np.ndarray],
    windows: Sequence[int],
    *,
    ends: int = 10,
    runs: int = 1,
    adjoint: Adjoint | None = None,
    key: Array | None = None,
) -> list[WindowCosines]:
    """Compare gradients of windows, as ``distill(window=)`` follows them, with exact ones, by position.

    ``g_W(e) = d/dx L(w_e)`` with ``w_{e-W}`` held, ``g(e) = d/dx L(w_e)``, and the cosines are those of
    ``g_W(e)`` with ``g(e)`` and ``g(T)``; ``L`` is the loss on real examples, ``x`` the images.

    Args:
      network: ``(init, apply)``, as for `distill`.
      distilled: the set at which to compare; ``distill(meta_steps=0)`` gives the one that learning starts
        from.  Its recipe says how long the run is, and from which weights it starts.
      real: ``(images, labels)`` for the loss, or rows of a table and labels, in raw units.
      windows: lengths ``W``, each in ``[1, T]``.
      ends: number of positions, spread evenly from the shortest window to ``T``, at least 2.
      runs: training runs, whose gradients are compared one by one.
      adjoint: of the exact gradient, by default `hypergrad.Reversible`, whose memory does not grow with the
        run as that of stored states does; a window is differentiated with its states stored.
      key: PRNG key of the runs, by default ``jax.random.key(0)``.

    Returns:
      `WindowCosines` for each window, to be printed.

    Raises:
      ValueError: a number is out of its range, or the data does not fit the set.

    Source: for the windows, Y. Feng, R. Vedantam, J. Kempe, "Embarrassingly simple dataset distillation",
    ICLR 2024, which compares them with no exact gradient.

    >>> import hypergrad as hg
    >>> digits = hg.data.digits()
    >>> real = digits.train_images, digits.train_labels
    >>> logistic = hg.nets.mlp((64, 10))
    >>> start = hg.distill(logistic, *real, hg.Recipe(steps=12), meta_steps=0, progress=False)
    >>> (found,) = window_cosines(logistic, start, real, [4], ends=3)
    >>> found.ends.tolist(), bool(found.same_end[0, 0] > 0.999)
    ([4, 8, 12], True)
    """
    _refuse(distilled, real, windows, ends, runs)
    recipe, y = distilled.recipe, jnp.asarray(distilled.labels)
    key = jax.random.key(0) if key is None else key
    where = np.unique(np.linspace(min(windows), recipe.steps, ends).round().astype(np.int32))
    adjoints = [Reversible() if adjoint is None else adjoint, *map(Truncated, windows)]

    @jax.jit
    def gradients(x: Array, inputs: Array, targets: Array, key: Array) -> list[Array]:
        def loss(x: Array, length: Array, adjoint: Adjoint) -> Array:
            params = train_with(recipe, network, x, y, key, adjoint, length)
            return nets.cross_entropy(network[1](params, inputs), targets)

        def all_of(length: Array) -> list[Array]:
            return [jnp.ravel(jax.grad(loss)(x, length, each)) for each in adjoints]

        return jax.lax.map(all_of, jnp.asarray(where))

    inputs, targets = distilled.normalised(real[0]), jnp.asarray(real[1])
    found = []
    for each in jax.random.split(key, runs):
        with readable_errors():
            found.append(jax.device_get(gradients(distilled.inputs, inputs, targets, each)))
    exact, *short = (np.array(x, np.float64) for x in zip(*found))
    return [_compared(window, where, each, exact) for window, each in zip(windows, short)]


def _compared(window: int, ends: np.ndarray, short: np.ndarray, exact: np.ndarray) -> WindowCosines:
    """Of ``(r, k, m)`` gradients of a window and exact ones."""
    size = np.linalg.norm(short, axis=2) / np.linalg.norm(exact, axis=2)
    average = _cosine(*(x[:, ends >= window].mean(1) for x in (short, exact)))
    return WindowCosines(window, ends, _cosine(short, exact), _cosine(short, exact[:, -1:]), size, average)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def _refuse(
    distilled: Distilled, real: tuple[np.ndarray, np.ndarray], windows: Sequence[int], ends: int, runs: int
) -> None:
    steps = distilled.recipe.steps
    call = f"window_cosines(network, distilled, real, windows={windows!r}, ends={ends!r}, runs={runs!r})"
    if not windows or not all(is_whole(window) and window <= steps for window in windows):
        raise ValueError(
            f"{call}: pass one or more windows, whole numbers of steps from 1 to the {steps} of the recipe"
        )
    if not is_whole(ends, 2) or not is_whole(runs):
        raise ValueError(f"{call}: ends must be a whole number, at least 2, and runs at least 1")
    shape = np.shape(distilled.images)[1:]
    if np.shape(real[0])[1:] != shape or len(real[0]) != len(real[1]):
        raise ValueError(
            f"{call} with inputs {np.shape(real[0])} and {len(real[1])} labels: the set's are {shape}; "
            "pass the data it was made from, in the same raw units"
        )
