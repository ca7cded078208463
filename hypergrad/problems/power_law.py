"""Regression on features with a power-law spectrum: one pass of gradient descent, known in expectation.

The inputs of a linear model are normal, in the basis of their covariance ``x ~ N(0, diag λ)``, and the
targets are ``w*·x`` and noise.  A step of gradient descent on ``B`` new examples moves the expected square
``c`` of every coordinate of the error ``w - w*`` by an exact recursion, with the excess loss
``L = ½ Σ m λ c``::

    c <- (1 - η λ)² c + η² λ (λ c + 2 L + σ²) / B

With ``λ_k = k^-b`` and ``λ_k c_k = k^-a`` at the start, the best schedules of long runs have shapes that
are known.  The bias falls with the sum ``τ`` of the rates as ``τ^-β``, ``β = (a - 1)/b``; noise that
entered when ``u`` of the sum was left is forgotten as ``K(u) ∝ u^(1/b - 2)``.  The least noise for given
``τ`` and ``T`` has ``η ∝ K(u)^-½``, so that ``u ∝ (T - t)^2b``.  Of these, the best ``τ`` gives

- in the easy phase, ``a > b``: ``η ∝ T^-ξ (1 - t/T)^δ`` with ``δ = 2b - 1`` and ``ξ = 1 - b/a``;
- in the hard phase, ``a < b``, ``τ`` would need rates at which training is not stable: rates as high as
  possible for most of the run, and a decay at its end, of a share of the run that vanishes with ``T``.

======  ==================  ========  =================================================================
symbol  name                shape     meaning
======  ==================  ========  =================================================================
``λ``   eigenvalue          ``(d,)``  of the covariance of the features
``c``   second_moment       ``(d,)``  ``E (w - w*)²``
``m``   multiplicity        ``(d,)``  how many features share this eigenvalue
``σ``   noise                         standard deviation of the targets' noise
``B``   batch_size                    examples in a step
``b``   capacity                      exponent of the spectrum
``a``   source                        exponent of the share of every feature in the loss at the start
``η``   learning_rate
======  ==================  ========  =================================================================

Source: for the shapes of schedules, Bordelon and Mori, "Theory of optimal learning rate schedules and
scaling laws for a random feature model", 2026.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.checks import is_whole


class PowerLaw(NamedTuple):
    """A regression in the basis of its features' covariance.

    Attributes:
      eigenvalue: ``λ``, ``(d,)``, above 0.
      second_moment: ``c`` at the start, ``(d,)``, at least 0.
      multiplicity: ``m``, ``(d,)``.
      noise: ``σ``, at least 0.
      batch_size: ``B``, above 0.
    """

    eigenvalue: Array
    second_moment: Array
    multiplicity: Array
    noise: Array
    batch_size: Array


class Regression(NamedTuple):
    """The random part of a run: every step's examples, in units of their standard deviation.

    Attributes:
      inputs: ``(T, B, d)``.
      noise: ``(T, B)``.
    """

    inputs: Array
    noise: Array


class Shape(NamedTuple):
    """The exponents of the best schedule in the easy phase, ``T^-ξ (1 - t/T)^δ``.

    Attributes:
      xi: ``ξ``.
      delta: ``δ``.
    """

    xi: float
    delta: float


def power_law(
    features: int = 1_000_000,
    *,
    capacity: float,
    source: float,
    noise: float = 0.0,
    batch_size: float = 1.0,
    groups: int | None = 120,
) -> PowerLaw:
    """Features with ``λ_k = k^-b``, of which the ``k``-th has the share ``k^-a`` in the loss at the start.

    Args:
      features: how many, at least 1.
      capacity: ``b``, above 1.
      source: ``a``, above 1.
      noise: ``σ``, at least 0.
      batch_size: ``B``, above 0.
      groups: in about how many groups of neighbors features are counted, that share their mean eigenvalue;
        None for every feature by itself.

    Returns:
      A `PowerLaw` in JAX's default float type.

    Raises:
      ValueError: an argument is out of range.

    >>> problem = power_law(1000, capacity=2.0, source=1.5)
    >>> float(problem.multiplicity.sum()), len(problem.eigenvalue) < 120
    (1000.0, True)
    """
    call = f"power_law(features={features!r}, capacity={capacity!r}, source={source!r})"
    if not is_whole(features) or not (groups is None or is_whole(groups)):
        raise ValueError(f"{call}: features and groups must be whole numbers of at least 1")
    if not (capacity > 1 and source > 1):
        raise ValueError(f"{call}: capacity and source must be above 1, or sums over features diverge")
    if not (noise >= 0 and batch_size > 0):
        raise ValueError(f"{call}: noise must be at least 0, and batch_size above 0")
    k = np.arange(1.0, features + 1)
    # A group begins at every edge.
    grouped = (
        np.geomspace(1, features, groups).astype(int) - 1 if groups is not None else np.arange(features)
    )
    edges = np.unique(grouped)
    count = np.diff(np.append(edges, features)).astype(float)
    eigenvalue = np.add.reduceat(k**-capacity, edges) / count
    share = np.add.reduceat(k**-source, edges) / count
    arrays = eigenvalue, share / eigenvalue, count, noise, batch_size
    return PowerLaw(*(jnp.asarray(x, jnp.result_type(float)) for x in arrays))


def excess_loss(problem: PowerLaw, second_moment: Array) -> Array:
    """``½ Σ m λ c``, the loss in expectation, without the noise of the targets.

    Args:
      problem: the model.
      second_moment: ``c``, ``(d,)``; for a single sample, the square of the error.

    Returns:
      A scalar.

    >>> float(excess_loss(power_law(1, capacity=2.0, source=2.0), jnp.ones(1)))
    0.5
    """
    return 0.5 * jnp.sum(problem.multiplicity * problem.eigenvalue * second_moment)


def expect_power_law(problem: PowerLaw, learning_rate: Array) -> Array:
    """The expected excess losses of a whole run of gradient descent, by the exact recursion.

    Differentiable in both modes.

    Args:
      problem: the model.
      learning_rate: ``η``, ``(T,)``.

    Returns:
      ``(T + 1,)``, before every step and after the last.

    Raises:
      ValueError: ``learning_rate`` is not one number for every step.

    >>> problem = power_law(100, capacity=1.5, source=2.0, batch_size=10)
    >>> losses = expect_power_law(problem, jnp.full(50, 0.3))
    >>> losses.shape, bool(losses[-1] < 0.3 * losses[0])
    ((51,), True)
    """
    if jnp.ndim(learning_rate) != 1:
        raise ValueError(
            f"expect_power_law(problem, learning_rate): learning_rate has shape "
            f"{list(jnp.shape(learning_rate))}; it must be (T,), one number for every step"
        )
    decay, noise, size = problem.eigenvalue, problem.noise, problem.batch_size

    def step(c: Array, rate: Array) -> tuple[Array, Array]:
        loss = excess_loss(problem, c)
        entering = decay * (decay * c + 2 * loss + noise**2) / size
        return (1 - rate * decay) ** 2 * c + rate**2 * entering, loss

    dtype = jnp.result_type(problem.second_moment, learning_rate)
    end, losses = jax.lax.scan(step, problem.second_moment.astype(dtype), learning_rate.astype(dtype))
    return jnp.append(losses, excess_loss(problem, end))


def best_shape(capacity: float, source: float) -> Shape:
    """The exponents of the best schedule of long runs in the easy phase, ``T^-ξ (1 - t/T)^δ``.

    ``δ = 2b - 1``, ``ξ = 1 - b/a``

    Args:
      capacity: ``b``.
      source: ``a``, above ``b``.

    Returns:
      A `Shape`.

    Raises:
      ValueError: in the hard phase, where the best schedule is no power.

    Source: Bordelon and Mori (2026).

    >>> best_shape(1.25, 2.0)
    Shape(xi=0.375, delta=1.5)
    """
    if not source > capacity:
        raise ValueError(
            f"best_shape(capacity={capacity}, source={source}): in the hard phase, where source is not "
            "above capacity, the best schedule is no power: it stays as high as is stable, then decays"
        )
    return Shape(1 - capacity / source, 2 * capacity - 1)


def sample_power_law(problem: PowerLaw, key: Array, steps: int) -> Regression:
    """Draw the examples of a run, for `sampled_power_law_loss`; features must not be in groups.

    Args:
      problem: with a whole ``batch_size``, made with ``groups=None``.
      key: PRNG key.
      steps: ``T``, at least 1.

    Returns:
      A `Regression`.

    Raises:
      ValueError: ``steps`` is not a whole number above 0.

    >>> problem = power_law(10, capacity=1.5, source=2.0, batch_size=4, groups=None)
    >>> sample_power_law(problem, jax.random.key(0), steps=5).inputs.shape
    (5, 4, 10)
    """
    if not is_whole(steps):
        raise ValueError(f"sample_power_law(steps={steps!r}): steps must be a whole number of at least 1")
    size, dtype = int(problem.batch_size), problem.eigenvalue.dtype
    inputs, noise = jax.random.split(key)
    shape = (steps, size, *problem.eigenvalue.shape)
    return Regression(jax.random.normal(inputs, shape, dtype), jax.random.normal(noise, shape[:2], dtype))


def sampled_power_law_loss(error: Array, problem: PowerLaw, batch: Regression) -> Array:
    """A loss for `hypergrad.train` in the error ``v = w - w*``: mean of ``½ (v·x - σ ξ)²`` over a batch.

    Args:
      error: ``v``, ``(d,)``; at the start ``√c``.
      problem: the model, passed as ``meta``.
      batch: of this step.

    Returns:
      A scalar.

    >>> import hypergrad as hg
    >>> problem = power_law(10, capacity=1.5, source=2.0, batch_size=4, groups=None)
    >>> trained = hg.train(
    ...     sampled_power_law_loss, jnp.sqrt(problem.second_moment), {"learning_rate": 0.2}, problem,
    ...     sample_power_law(problem, jax.random.key(0), 30), steps=30, optimizer=hg.sgd(),
    ...     adjoint=hg.Stored(),
    ... )
    >>> bool(excess_loss(problem, trained.params**2) < excess_loss(problem, problem.second_moment))
    True
    """
    inputs = batch.inputs * jnp.sqrt(problem.eigenvalue)[None]
    return 0.5 * jnp.mean((inputs @ error - problem.noise * batch.noise) ** 2)
