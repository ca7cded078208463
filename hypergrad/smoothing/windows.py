"""``nres`` and ``pes``: gradients of smoothed objectives, one window of the inner runs at a time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._base.checks import check_callable, check_whole
from hypergrad._base.trees import PyTree, floats
from hypergrad.smoothing.full import described
from hypergrad.smoothing.pairs import (
    both_signs,
    check_noise,
    draw,
    finite,
    scales,
    several,
    slope,
    without_derivative,
)

Start = Callable[[PyTree, Array], PyTree]
Unroll = Callable[[PyTree, PyTree, Array], tuple[PyTree, Any]]


class Particles(NamedTuple):
    """Pairs of inner runs, some windows into their episodes.

    Attributes:
      states: inner states, with leading axes ``(P, 2)``: of ``θ + σ ε`` and of ``θ - σ ε``.
      noise: ``σ ε`` of the next window, ``(P, ...)``.
      total: by what the difference of the next window's losses is multiplied, ``(P, ...)``: the sum of the
        noise of all windows of the episode for `pes`, and the noise itself for `nres`.
      step: ``(P,)`` int32, the steps that each pair has made in its episode.
      left: ``(P,)`` int32, the windows until each pair begins its next episode.
      key: of what is drawn next.
    """

    states: PyTree
    noise: PyTree
    total: PyTree
    step: Array
    left: Array
    key: Array


class Estimate(NamedTuple):
    """What one window says.

    Attributes:
      loss: the mean of the window's losses over pairs.
      gradient: a tree like the hyperparameters.
    """

    loss: Array
    gradient: PyTree


class Estimator(NamedTuple):
    """An online estimator: two pure functions, as in an optax optimizer.

    Attributes:
      name: the call that makes it.
      init: ``init(hypers, key) -> Particles``.
      step: ``step(hypers, particles) -> (Estimate, Particles)``, one window of every particle.
    """

    name: str
    init: Callable[[PyTree, Array], Particles]
    step: Callable[[PyTree, Particles], tuple[Estimate, Particles]]


class _Settings(NamedTuple):
    """What a user gave, by the names of the public functions.

    Attributes:
      name: of the function.
      redraw: fresh noise in every window.
    """

    name: str
    start: Start
    unroll: Unroll
    window: int
    steps: int
    sigma: PyTree
    pairs: int
    staggered: bool
    ceiling: float
    chunk: int | None
    redraw: bool

    @property
    def call(self) -> str:
        """The call in words."""
        return (
            f"{self.name}(window={self.window!r}, steps={self.steps!r}, sigma={described(self.sigma)}, "
            f"pairs={self.pairs!r})"
        )


def nres(
    start: Start,
    unroll: Unroll,
    *,
    window: int,
    steps: int,
    sigma: PyTree,
    pairs: int = 16,
    staggered: bool = False,
    ceiling: float = math.inf,
    chunk: int | None = None,
) -> Estimator:
    """Noise-reuse evolution strategies, or ES-Single: one noise vector for a whole episode.

    ``g_w = mean ε (L_w(θ + σ ε) - L_w(θ - σ ε)) / (2 σ)`` over pairs, for the loss ``L_w`` of window ``w``

    While ``θ`` stays, the estimates of all windows of an episode add up to an unbiased estimate of
    ``∇ E Σ_w L_w(θ + σ ε)``.  An update varies no more than one of `pes`, however many windows an episode
    has; with few hyperparameters, the sum over an episode may vary more.

    Args:
      start: ``start(hypers, key) -> state``, the inner state at the start of an episode; both runs of a
        pair are given the same key.  See `training`.
      unroll: ``unroll(hypers, state, step) -> (state, loss)``: the next window of an inner run that has
        made ``step`` steps, and the part of the objective that falls into it, a JAX function.
      window: ``K >= 1``.
      steps: ``T``, a multiple of ``K``, after which a run begins again.
      sigma: ``σ > 0``, a number for all, or a tree that is a prefix of ``hypers``.
      pairs: ``P >= 1``.
      staggered: let the first episodes of the pairs end one after the other, so that later every update
        sees all parts of an episode and not one part of it.
      ceiling: the value at which a window's losses count that are above it, NaN or infinite.
      chunk: the number of runs computed at once; None for all.

    Returns:
      An `Estimator`.

    Raises:
      ValueError: an argument is out of range, or ``sigma`` does not fit the hyperparameters.
      TypeError: an argument is no function of what it is given; or an estimate is differentiated.
      FloatingPointError: a window's loss is NaN or infinite, and there is no ceiling.

    Source: Li, Harrison, Sohl-Dickstein, Smith and Metz, "Noise-reuse in online evolution strategies",
    2023; Vicol, Kolter and Swersky, "Low-variance gradient estimation in unrolled computation graphs with
    ES-Single", ICML 2023.

    >>> import jax, jax.numpy as jnp
    >>> unroll = lambda theta, w, step: (w - theta * w, (w - theta * w) ** 2)  # one step on w²/2
    >>> online = nres(lambda theta, key: jnp.ones(()), unroll, window=1, steps=3, sigma=0.01)
    >>> particles = online.init(0.5, jax.random.key(0))
    >>> estimate, particles = online.step(0.5, particles)
    >>> bool(estimate.gradient < 0), particles.step.tolist()[:2]
    (True, [1, 1])
    """
    given = start, unroll, window, steps, sigma, pairs, bool(staggered), ceiling, chunk
    return _estimator(_Settings("nres", *given, redraw=False))


def pes(
    start: Start,
    unroll: Unroll,
    *,
    window: int,
    steps: int,
    sigma: PyTree,
    pairs: int = 16,
    staggered: bool = False,
    ceiling: float = math.inf,
    chunk: int | None = None,
) -> Estimator:
    """Persistent evolution strategies: fresh noise in every window, and the sum of it as weight.

    ``g_w = mean (Σ_{v<=w} ε_v) (L_w(θ + σ ε_1, ..., θ + σ ε_w) - L_w(θ - σ ε_1, ...)) / (2 σ)`` over pairs

    Unbiased for the objective smoothed over noise that changes from window to window.  The variance grows
    with the number of windows; `nres` has less.

    Args:
      start: as for `nres`.
      unroll: as for `nres`.
      window: as for `nres`.
      steps: as for `nres`.
      sigma: as for `nres`.
      pairs: as for `nres`.
      staggered: as for `nres`.
      ceiling: as for `nres`.
      chunk: as for `nres`.

    Returns:
      An `Estimator`.

    Raises:
      ValueError, TypeError, FloatingPointError: as for `nres`.

    Source: Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs
    with persistent evolution strategies", ICML 2021.

    >>> import jax, jax.numpy as jnp
    >>> unroll = lambda theta, w, step: (w - theta * w, (w - theta * w) ** 2)
    >>> online = pes(lambda theta, key: jnp.ones(()), unroll, window=1, steps=3, sigma=0.01)
    >>> estimate, particles = online.step(0.5, online.init(0.5, jax.random.key(0)))
    >>> bool(jnp.all(particles.total != particles.noise))
    True
    """
    given = start, unroll, window, steps, sigma, pairs, bool(staggered), ceiling, chunk
    return _estimator(_Settings("pes", *given, redraw=True))


def _check(settings: _Settings) -> None:
    """Refuse settings that are out of range, before any work."""
    call, window, steps = settings.call, settings.window, settings.steps
    check_callable(call, "start", settings.start, "hypers", "key")
    check_callable(call, "unroll", settings.unroll, "hypers", "state", "step")
    check_whole(call, "window", window, 1, None)
    check_whole(call, "steps", steps, 1, None)
    if steps % window:
        raise ValueError(
            f"{call}: steps must be a multiple of window, so that an episode is a whole number of windows"
        )
    check_noise(call, settings.sigma, settings.pairs, settings.ceiling, settings.chunk)


def _estimator(settings: _Settings) -> Estimator:
    _check(settings)
    call, pairs, windows = settings.call, settings.pairs, settings.steps // settings.window

    def begin(hypers: PyTree, spread: PyTree, key: Array) -> tuple[PyTree, PyTree]:
        """The noise of one pair's first window, and its states."""
        of_noise, of_start = jax.random.split(key)
        noise = draw(of_noise, spread)
        ends = both_signs(hypers, noise)
        return noise, jax.vmap(settings.start, (0, None))(ends, of_start)

    def init(hypers: PyTree, key: Array) -> Particles:
        hypers = floats(call, "hypers", hypers)
        spread = scales(call, settings.sigma, hypers)
        key, more = jax.random.split(key)
        noise, states = jax.vmap(begin, (None, None, 0))(hypers, spread, jax.random.split(more, pairs))
        left = windows - settings.staggered * (jnp.arange(pairs) * windows // pairs)
        return Particles(states, noise, noise, jnp.zeros(pairs, jnp.int32), left.astype(jnp.int32), key)

    def advance(hypers: PyTree, particles: Particles) -> tuple[PyTree, Array]:
        """All runs by one window."""
        ends = jax.vmap(both_signs, (None, 0))(hypers, particles.noise)
        rows = ends, particles.states, jnp.stack([particles.step, particles.step], axis=1)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        states, losses = several(settings.chunk, lambda row: settings.unroll(*row), flat)
        if not (isinstance(losses, Array) and losses.ndim == 1):
            raise TypeError(
                f"{call}: unroll(hypers, state, step) must return (state, loss), the loss being one float"
            )
        return jax.tree.map(lambda x: x.reshape(pairs, 2, *x.shape[1:]), states), losses

    def step(hypers: PyTree, particles: Particles) -> tuple[Estimate, Particles]:
        hypers = floats(call, "hypers", hypers)
        spread = scales(call, settings.sigma, hypers)
        states, losses = advance(hypers, particles)
        losses = finite(call, losses, settings.ceiling)
        plus, minus = losses.reshape(pairs, 2).T
        estimate = Estimate(jnp.mean(losses), slope(particles.total, plus - minus, spread))

        key, of_noise, of_start = jax.random.split(particles.key, 3)
        noise, total = particles.noise, particles.total
        if settings.redraw:
            noise = jax.vmap(lambda k: draw(k, spread))(jax.random.split(of_noise, pairs))
            total = jax.tree.map(jnp.add, total, noise)
        first, starts = jax.vmap(begin, (None, None, 0))(hypers, spread, jax.random.split(of_start, pairs))
        ended = particles.left == 1

        def where(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(_column(ended, y.ndim), x, y), new, old)

        return estimate, Particles(
            where(starts, states),
            where(first, noise),
            where(first, total),
            jnp.where(ended, 0, particles.step + settings.window),
            jnp.where(ended, windows, particles.left - 1),
            key,
        )

    return Estimator(call, init, without_derivative(call, step))


def _column(flags: Array, ndim: int) -> Array:
    return flags.reshape(-1, *[1] * (ndim - 1))
