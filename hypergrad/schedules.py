"""Schedules whose every parameter can be learned, each at once a pytree and an optax schedule.

A schedule is a small NamedTuple of its parameters, which `jax.grad`, optax and `hypergrad.meta.optimize`
handle like any pytree.  It is also a function of the step count, so it works wherever optax takes a
schedule; `values` turns it, or any optax schedule, into the array that `hypergrad.train` takes as a
hyperparameter.  Lengths and positions are real numbers of steps, not integers, and the values are
differentiable in them too wherever a kink does not fall exactly on a count.

======  ============  =====================================================
symbol  name          meaning
======  ============  =====================================================
``t``   count         steps made so far, 0, 1, ...; an integer, may be traced
``T``   steps         steps of the training run
``η``   value         what the schedule gives at ``t``
======  ============  =====================================================

>>> import hypergrad as hg
>>> import jax, jax.numpy as jnp
>>> def outer(schedule):
...     hypers = {"learning_rate": values(schedule, 100)}
...     loss = lambda w, meta, step: jnp.sum(w**2)
...     return jnp.sum(hg.train(loss, jnp.ones(3), hypers, steps=100).params ** 2)
>>> derivatives = jax.grad(outer)(WarmupCosine(0.01, 0.02, warmup_steps=9.5, decay_steps=100.0))
>>> derivatives._fields
('init_value', 'peak_value', 'warmup_steps', 'decay_steps', 'end_value')
>>> bool(derivatives.peak_value < 0)  # faster would be better
True
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from hypergrad._base.checks import is_function, is_whole
from hypergrad._base.dtypes import lenient, promoted

PyTree = Any


class Constant(NamedTuple):
    """The same value at every step, ``η(t) = value``.

    Attributes:
      value: the value, a number.

    >>> values(Constant(0.5), 3).tolist()
    [0.5, 0.5, 0.5]
    """

    value: ArrayLike

    def __call__(self, count: ArrayLike) -> Array:
        """The value at a count."""
        return jnp.asarray(self.value)


class PerStep(NamedTuple):
    """A value for each step, ``η(t) = values[min(t, T - 1)]``; the last one is held after the end.

    Calling it raises ValueError if ``values`` has another shape.

    Attributes:
      values: shape ``(T,)``, T >= 1.

    >>> import optax
    >>> schedule = PerStep(jnp.array([0.5, 0.25]))
    >>> [float(schedule(count)) for count in range(4)]
    [0.5, 0.25, 0.25, 0.25]
    >>> optimizer = optax.sgd(schedule)
    """

    values: ArrayLike

    def __call__(self, count: ArrayLike) -> Array:
        """The value at a count."""
        steps = jnp.asarray(self.values)
        if steps.ndim != 1 or steps.size == 0:
            raise ValueError(
                f"PerStep(values of shape {steps.shape}): one value for each step is an array of shape "
                "(T,) with T >= 1; for one number use Constant, for layers a tree of schedules"
            )
        return steps[jnp.clip(count, 0, steps.size - 1)]


class PiecewiseLinear(NamedTuple):
    """Straight lines between knots ``(p_k, y_k)``; outside them the first and the last value are held.

    ``η(t) = (1 - x) y_k + x y_{k+1},  x = (t - p_k) / (p_{k+1} - p_k),  p_k <= t < p_{k+1}``

    For a count exactly at a knot, the derivative in its position is that of the line to the right.  Calling
    it raises ValueError if the shapes do not fit, or if known positions descend.

    Attributes:
      positions: shape ``(K,)``, K >= 2: the positions ``p_k`` of the knots in steps, ascending.  Two equal
        ones make a jump.  `hypergrad.constraints.ascending` keeps them in order while they are learned; a
        traced knot that is before its predecessor counts as being at it.
      values: shape ``(K,)``: the values ``y_k`` at the knots.

    >>> values(PiecewiseLinear(jnp.array([0.0, 2.0, 4.0]), jnp.array([0.0, 1.0, 0.0])), 6).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    positions: ArrayLike
    values: ArrayLike

    def __call__(self, count: ArrayLike) -> Array:
        """The value at a count."""
        shapes = jnp.shape(self.positions), jnp.shape(self.values)
        if shapes[0] != shapes[1] or len(shapes[0]) != 1 or shapes[0][0] < 2:
            raise ValueError(
                f"PiecewiseLinear(positions of shape {shapes[0]}, values of shape {shapes[1]}): the knots "
                "are two arrays of shape (K,) with K >= 2; for one value use Constant"
            )
        _require(self, "the positions must ascend", lambda p: (np.diff(p) >= 0).all(), self.positions)
        t, p, y = _floats(count, self.positions, self.values)
        p = jax.lax.cummax(p)
        k = jnp.sum(p[1:-1] <= t)
        return _between(_fraction(t, p[k], p[k + 1]), y[k], y[k + 1])


class WarmupCosine(NamedTuple):
    """Linear warm-up, then half a cosine down.

    ``η(t) = (1 - x) init + x peak,             x = t / warmup,                         t < warmup``
    ``η(t) = end + (peak - end) (1 + cos πx)/2, x = (t - warmup) / (decay - warmup),    t >= warmup``

    For whole lengths and a peak other than 0, these are the values of `optax.warmup_cosine_decay_schedule`;
    from a peak of 0, optax's schedule stays at 0 and this one goes to ``end_value``.  Calling it raises
    ValueError if known lengths are out of order.

    Attributes:
      init_value: value at count 0.
      peak_value: value at ``warmup_steps``.
      warmup_steps: length of the warm-up in steps, >= 0.
      decay_steps: the count at which ``end_value`` is reached, >= ``warmup_steps``.
      end_value: value from ``decay_steps`` on.

    Source: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017, eq. 5;
    Goyal et al., "Accurate, large minibatch SGD", 2017, section 2.2, for the warm-up.

    >>> values(WarmupCosine(0.0, 1.0, warmup_steps=2.0, decay_steps=4.0), 6).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    init_value: ArrayLike
    peak_value: ArrayLike
    warmup_steps: ArrayLike
    decay_steps: ArrayLike
    end_value: ArrayLike = 0.0

    def __call__(self, count: ArrayLike) -> Array:
        """The value at a count."""
        order = "0 <= warmup_steps <= decay_steps"
        _require(self, order, lambda w, d: 0 <= w <= d, self.warmup_steps, self.decay_steps)
        t, init, peak, warmup, decay, end = _floats(count, *self)
        rising = _between(_fraction(t, 0.0, warmup), init, peak)
        falling = _between((1 - jnp.cos(jnp.pi * _fraction(t, warmup, decay))) / 2, peak, end)
        return jnp.where(t < warmup, rising, falling)


class Triangular(NamedTuple):
    """The cyclical schedule: linearly up for half a cycle and down for the other half, forever.

    ``η(t) = base + (max - base) (1 - |2x - 1|),  x = t / cycle - floor(t / cycle)``

    Calling it raises ValueError if a known ``cycle_steps`` is not positive.

    Attributes:
      base_value: value at the start of each cycle.
      max_value: value halfway through.
      cycle_steps: length of a cycle in steps, > 0; twice what the paper calls stepsize.

    Source: Smith, "Cyclical learning rates for training neural networks", 2017, section 3.1.

    >>> values(Triangular(0.0, 1.0, cycle_steps=4.0), 7).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.5, 1.0]
    """

    base_value: ArrayLike
    max_value: ArrayLike
    cycle_steps: ArrayLike

    def __call__(self, count: ArrayLike) -> Array:
        """The value at a count."""
        _require(self, "cycle_steps > 0", lambda c: c > 0, self.cycle_steps)
        t, base, top, cycle = _floats(count, *self)
        triangle = PiecewiseLinear(jnp.stack([0 * cycle, cycle / 2, cycle]), jnp.stack([base, top, base]))
        return triangle(t - cycle * jnp.floor(t / cycle))


class OneCycle(NamedTuple):
    """One cycle in three straight lines.

    From ``peak / div`` up to ``peak`` at ``pct_start T``, back down to ``peak / div`` at ``pct_final T``,
    and on to ``peak / div / final_div`` at ``T``, which is held.

    If ``pct_start T`` and ``pct_final T`` are whole numbers, these are the values of
    `optax.linear_onecycle_schedule`.  Otherwise optax truncates them to whole numbers and this schedule
    does not, which is why it has derivatives in them; ``floor(pct T) / T`` in their place gives optax's
    values. Calling it raises ValueError if known arguments are outside their ranges.

    Attributes:
      transition_steps: T, the total length in steps, > 0.
      peak_value: the largest value.
      pct_start: share of T at which the peak is reached, in [0, pct_final].
      pct_final: share of T at which the cycle closes, in [pct_start, 1].
      div_factor: how many times smaller than the peak the first value is, > 0.
      final_div_factor: how many times smaller than the first value the last is, > 0.

    Source: Smith and Topin, "Super-convergence: very fast training of neural networks using large learning
    rates", 2018, section 3.

    >>> values(OneCycle(8.0, 1.0, 0.25, 0.5, div_factor=4.0, final_div_factor=4.0), 9).tolist()
    [0.25, 0.625, 1.0, 0.625, 0.25, 0.203125, 0.15625, 0.109375, 0.0625]
    """

    transition_steps: ArrayLike
    peak_value: ArrayLike
    pct_start: ArrayLike = 0.3
    pct_final: ArrayLike = 0.85
    div_factor: ArrayLike = 25.0
    final_div_factor: ArrayLike = 1e4

    def __call__(self, count: ArrayLike) -> Array:
        """The value at a count."""
        steps, _, start, final, div, final_div = self
        _require(self, "0 <= pct_start <= pct_final <= 1", lambda s, f: 0 <= s <= f <= 1, start, final)
        _require(self, "steps and divisors > 0", lambda *x: min(x) > 0, steps, div, final_div)
        t, steps, peak, start, final, div, final_div = _floats(count, *self)
        positions = jnp.stack([0 * steps, start * steps, final * steps, steps])
        low = peak / div
        return PiecewiseLinear(positions, jnp.stack([low, peak, low, low / final_div]))(t)


Schedule = Constant | PerStep | PiecewiseLinear | WarmupCosine | Triangular | OneCycle


def values(schedules: PyTree, steps: int) -> PyTree:
    """The values ``η(0), ..., η(T - 1)`` of schedules over a run, as `hypergrad.train` takes them.

    Args:
      schedules: one schedule, ours or optax's, or a tree of them, such as one for each layer.  A schedule
        is one of the classes here, or a function from a traced count to a scalar.  Everything else,
        including callable pytrees such as modules, is a tree, and numbers and arrays in it are returned
        unchanged.
      steps: T, at least 1.

    Returns:
      The tree with a floating-point array of shape `(T,)` for each schedule, differentiable in its
      parameters, and in whatever an optax schedule closes over.

    Raises:
      ValueError: `steps` is below 1, or a schedule does not return scalars.

    >>> import optax
    >>> values(optax.linear_schedule(1.0, 0.0, 4), 3).tolist()
    [1.0, 0.75, 0.5]
    >>> values({"learning_rate": Constant(0.5), "momentum": 0.9}, 2)
    {'learning_rate': Array([0.5, 0.5], dtype=float32), 'momentum': 0.9}
    """
    if not is_whole(steps):
        raise ValueError(
            f"values(steps={steps!r}): a schedule has at least 1 step, and a whole number of them"
        )

    def value(schedule: Any) -> Any:
        if not is_schedule(schedule):
            return schedule
        with lenient():
            array = jax.vmap(lambda count: jnp.asarray(schedule(count)))(jnp.arange(steps))
        if array.ndim != 1:
            raise ValueError(
                f"values(schedules): {schedule!r} returned an array of shape {array.shape[1:]} for one "
                "count; a schedule returns a scalar"
            )
        return array.astype(promoted(array, float))

    return jax.tree.map(value, schedules, is_leaf=is_schedule)


def is_schedule(x: Any) -> bool:
    """Whether a node of a tree is a schedule: one of ours, or a function, but no other callable tree.

    A module is a tree of numbers, such as one rate for each of its arrays, even though it can be called.

    >>> is_schedule(Constant(0.5)), is_schedule(lambda count: 0.5 * count), is_schedule({"rate": 0.5})
    (True, True, False)
    """
    return isinstance(x, Schedule) or is_function(x)


def per_layer(schedule: Any, params: PyTree) -> PyTree:
    """A separate schedule for each layer, all starting as the one given.

    Args:
      schedule: any schedule, or a number or array that `hypergrad.train` takes.
      params: parameters; a layer is one entry of the outermost tuple, list or dictionary.

    Returns:
      The container of `params` with the schedule at each entry: a tree of schedules that is a prefix of
      `params`.  For one at each leaf instead: `jax.tree.map(lambda leaf: schedule, params)`.

    >>> params = {"first": (jnp.ones((2, 3)), jnp.ones(3)), "last": (jnp.ones((3, 1)), jnp.ones(1))}
    >>> per_layer(Constant(0.1), params)
    {'first': Constant(value=0.1), 'last': Constant(value=0.1)}
    """
    return jax.tree.map(lambda _: schedule, params, is_leaf=lambda node: node is not params)


def _floats(*numbers: ArrayLike) -> list[Array]:
    """All in one dtype, at least float32, because bfloat16 cannot represent every count above 256."""
    dtype = promoted(jnp.float32, promoted(float, *map(jnp.asarray, numbers)))
    return [jnp.asarray(x, dtype) for x in numbers]


def _fraction(t: Array, start: Array | float, end: Array) -> Array:
    """The fraction of the way from start to end, 0 before and 1 after; not NaN if the way has no length."""
    inside = (start <= t) & (t < end)
    length = jnp.where(inside, end - start, 1)
    return jnp.where(inside, (t - start) / length, (t >= end).astype(t.dtype))


def _between(x: Array, a: Array, b: Array) -> Array:
    """A fraction ``x`` of the way from ``a`` to ``b``; exact at both ends."""
    return (1 - x) * a + x * b


def _require(schedule: Any, rule: str, holds: Callable[..., bool], *fields: ArrayLike) -> None:
    """Refuse parameters that break a rule, where they are known."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(fields)):
        return
    if not holds(*map(np.asarray, fields)):
        raise ValueError(f"{schedule!r}: {rule}; give such values, or keep to them by constraints")
