"""The curvature-aware gradient filter: descent along a Kalman filter's estimate of the gradient.

=========  =================  ==========================================================================
symbol     name               meaning
=========  =================  ==========================================================================
``w``      params             parameters, ``D`` numbers in all
``δ``      displacement       the last step, ``w_t - w_{t-1}``
``g, Σ``   at.gradient        mean over the minibatch at ``w``, and the variance of this mean
``Bδ, Q``  at.hvp             the same of the Hessian at ``w``, for the same minibatch, times ``δ``
``y, r``   at.loss            the same of the loss
``m, P``   gradient           belief about the gradient: mean (a tree) and variance
``u, s``   loss               belief about the loss: mean and variance
``K``      gain               weight of what is observed against what was predicted
``d``      d                  direction of the step: ``-m``, or preconditioned
``α``      step               found by a rule (`hypergrad.optimizers.step_rules`), averaged over time
``η``      learning_rate      scales the step
=========  =================  ==========================================================================

``Σ``, ``Q`` and ``P`` are scalars: variances averaged over all ``D`` coordinates, times the identity.

Source: Chen, Choi, Balles, Duvenaud, Hennig, "Self-tuning stochastic optimization with curvature-aware
gradient filtering", 2020.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.curvature.examples import Moments
from hypergrad.curvature.examples import moments as moments_of
from hypergrad.optimizers import roots
from hypergrad.optimizers.step_rules import Improvement, Rule
from hypergrad.program import Examples, GenericOptimizer, StepContext

PyTree = Any
POSITIVE = (0.0, float("inf"))
SHARE = (0.0, 1.0)


class Belief(NamedTuple):
    """A normal belief: a mean, and the variance of every coordinate of it."""

    mean: PyTree
    variance: Array


class Average(NamedTuple):
    """A running average that starts without bias: the weighted sum, and the sum of the weights."""

    total: Array
    weight: Array


class Diagnosis(NamedTuple):
    """How well the filter works: scalars from the last step.

    Attributes:
      curvature: ``δᵀBδ / δᵀδ``, along the step that led here.
      gradient_variance: the variance of the gradient of one example, ``n Σ``, not averaged over time.
      gain: ``K`` of the gradient filter.
      step: ``α``, averaged over time; 1 without a rule.
    """

    curvature: Array
    gradient_variance: Array
    gain: Array
    step: Array


class Search(NamedTuple):
    """What a rule for the step needs besides the gradient.

    Attributes:
      loss: ``u, s``.
      noise: the average ``r``.
      step: the average ``α``.
    """

    loss: Belief
    noise: Average
    step: Average


class Filter(NamedTuple):
    """State of `filtered`.

    Attributes:
      made: number of steps made, int32.
      gradient: ``m, P``.
      noise: the average ``Σ``.
      displacement: ``δ``.
      search: state of the search for the step; None without a rule.
      diagnosis: the `Diagnosis` of the last step.
    """

    made: Array
    gradient: Belief
    noise: Average
    displacement: PyTree
    search: Search | None
    diagnosis: Diagnosis


def filtered(
    rule: Rule | None = None, *, preconditioned: bool = False, chunk: int | None = None
) -> GenericOptimizer:
    """Descent along a Kalman filter's estimate of the gradient, carried along by Hessian-vector products.

    ``m⁻ = m + B δ;  P⁻ = P + Q;  K = P⁻ / (P⁻ + Σ);  m <- m⁻ + K (g - m⁻);  P <- (1 - K)² P⁻ + K² Σ``, then
    ``δ = -η α m;  w <- w + δ``.

    Without a rule ``α = 1``.  With one, ``α`` is the average over time of what the rule finds best along
    ``d``, given a filtered loss ``u, s`` and a second Hessian-vector product, along ``d``.  Preconditioned,
    ``d = -m / (√(m² + P) + ε)``.

    The loss gets batches of one example and must not depend on the others, as it would through batch
    normalization; the mean is minimized.  ``batches`` are arrays ``(T, n, ...)`` with ``n >= 2``. In
    ``watch``, ``snapshot.state["state"].diagnosis`` is the `Diagnosis` of the step before.

    Hyperparameters, each a number or a ``(T,)`` schedule:
      ``learning_rate`` (η): must be given without a rule; 1 by default with one.
      ``gradient_decay``: β of Σ's average over time (default 0.999), ``Σ̄ = β Σ̄ + (1 - β) Σ``, debiased.
      ``gradient_inflation``, ``curvature_inflation``: factors on Σ and Q (default 1).
      ``initial_variance``: P and s at the start (default 1e4), where m and u are 0.
      ``eps`` (ε): preconditioned only (default 1e-8).
    With a rule:
      ``max_step``: the largest α.  Must be given: without a cap, runs on networks diverge.
      ``step_decay``: β of α's average over time (default 0.9; the paper's 0.999 reacts too late).
      ``loss_decay``: β of r's average over time (default 0.999).
      ``loss_inflation`` (κ): factor on the variance 2 s of the losses in the rule (default 1).  From 0 to
        infinity it takes `probability_of_improvement` from no step to that of `quadratic`.
    Not reversible: differentiate with ``Checkpointed()`` or ``Stored()``.  From a start where all examples
    have the same loss, as at zero weights, `probability_of_improvement` never moves, since ``s = 0``.

    Args:
      rule: rule for the step: `hypergrad.optimizers.probability_of_improvement`, which the paper uses,
        `expected_improvement` or `quadratic`.
      preconditioned: whether coordinates are divided by the size of their gradients (the paper's AdaMEKA).
      chunk: number of examples whose gradients are in memory at once; by default all.

    Source: Chen et al. (2020), equations 5 to 9 and 11, with ``max_step`` in place of the appendix's
    third-order term.

    >>> import hypergrad as hg
    >>> import jax, jax.numpy as jnp
    >>> points = jax.random.normal(jax.random.key(0), (100, 8, 2))  # by step and example
    >>> loss = lambda w, meta, batch: 0.5 * jnp.mean(jnp.sum((w[None] - batch) ** 2, 1))
    >>> optimizer = hg.filtered(hg.optimizers.probability_of_improvement)
    >>> options = {"steps": 100, "optimizer": optimizer, "adjoint": hg.Checkpointed()}
    >>> trained = hg.train(loss, jnp.full(2, 10.0), {"max_step": 2.0}, None, points, **options)
    >>> bool(jnp.max(jnp.abs(trained.params)) < 0.1)
    True
    """
    hypers = _hypers(rule, preconditioned)
    domains = {name: SHARE if name.endswith("_decay") else POSITIVE for name in hypers}

    def init(params: PyTree) -> Filter:
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(params)))
        none = jax.tree.map(jnp.zeros_like, params)
        empty = Average(zero, zero)
        search = None if rule is None else Search(Belief(zero, zero), empty, empty)
        return Filter(jnp.int32(0), Belief(none, zero), empty, none, search, Diagnosis(*[zero] * 4))

    def update(
        h: Mapping[str, Array], examples: Examples, state: Filter, params: PyTree, context: StepContext
    ) -> tuple[PyTree, Filter]:
        def moments(direction: PyTree) -> tuple[Moments, PyTree, Array]:
            """Over the minibatch; then ``B v`` and the inflated ``Q``, for the direction ``v``."""
            found = moments_of(examples.loss, params, examples.batch, direction=direction, chunk=chunk)
            assert found.hvp is not None
            return found, found.hvp.mean, h["curvature_inflation"] * found.hvp.average

        def start(belief: Belief) -> Belief:
            return belief._replace(
                variance=jnp.where(state.made == 0, h["initial_variance"], belief.variance)
            )

        δ, before = state.displacement, start(state.gradient)
        at, Bδ, Q = moments(δ)
        noise = averaged(state.noise, at.gradient.average, h["gradient_decay"])
        Σ = h["gradient_inflation"] * value(noise)
        gradient, K = correct(predict(before, Bδ, Q), at.gradient.mean, Σ)
        d = direction(gradient, h["eps"]) if preconditioned else jax.tree.map(jnp.negative, gradient.mean)

        search, α = None, jnp.ones_like(K)
        if rule is not None:
            assert state.search is not None
            change = inner(before.mean, δ) + 0.5 * inner(δ, Bδ)
            process = (before.variance + 0.25 * Q) * inner(δ, δ)
            earlier = state.search._replace(loss=start(state.search.loss))
            loss, loss_noise = _loss_belief(earlier, at.loss, h["loss_decay"], change, process)
            _, Bd, Q = moments(d)
            improvement = Improvement(
                slope=-inner(d, gradient.mean),
                curvature=inner(d, Bd),
                slope_variance=gradient.variance * inner(d, d),
                curvature_variance=Q * inner(d, d),
                loss_variance=h["loss_inflation"] * 2 * loss.variance,
            )
            steps = averaged(state.search.step, rule(improvement, h["max_step"]), h["step_decay"])
            search, α = Search(loss, loss_noise, steps), value(steps)

        along = _curvature_along(δ, Bδ)
        n = jax.tree.leaves(examples.batch)[0].shape[0]
        δ = jax.tree.map(lambda x: h["learning_rate"] * α * x, d)
        diagnosis = Diagnosis(along, n * at.gradient.average, K, α)
        new = Filter(state.made + 1, gradient, noise, δ, search, diagnosis)
        return jax.tree.map(jnp.add, params, δ), new

    name = "filtered()" if rule is None else f"filtered({getattr(rule, '__name__', 'rule')})"
    return GenericOptimizer(name, init, update, hypers, domains, per_example=True)


def _hypers(rule: Rule | None, preconditioned: bool) -> dict[str, float | None]:
    """Hyperparameters and their defaults."""
    hypers: dict[str, float | None] = {
        "learning_rate": None if rule is None else 1.0,
        "gradient_decay": 0.999,
        "gradient_inflation": 1.0,
        "curvature_inflation": 1.0,
        "initial_variance": 1e4,
    }
    if preconditioned:
        hypers["eps"] = 1e-8
    if rule is not None:
        hypers |= {"max_step": None, "step_decay": 0.9, "loss_decay": 0.999, "loss_inflation": 1.0}
    return hypers


def _loss_belief(
    search: Search, loss: Any, decay: Array, change: Array, process: Array
) -> tuple[Belief, Average]:
    """The loss and its noise after a minibatch."""
    noise = averaged(search.noise, loss.average, decay)
    return filter_loss(search.loss, change, process, loss.mean, value(noise)), noise


def _curvature_along(δ: PyTree, Bδ: PyTree) -> Array:
    """``δᵀBδ / δᵀδ``, and 0 for a step of length 0."""
    moved = inner(δ, δ) > 0
    return jnp.where(moved, inner(δ, Bδ) / jnp.where(moved, inner(δ, δ), 1), 0)


def predict(belief: Belief, change: PyTree, process: Array) -> Belief:
    """The belief after a change that is known with a variance: ``m + B δ``, ``P + Q``.

    >>> predict(Belief(1.0, 2.0), 0.5, 0.25)
    Belief(mean=1.5, variance=2.25)
    """
    return Belief(jax.tree.map(lambda x, y: x + y, belief.mean, change), belief.variance + process)


def correct(belief: Belief, observed: PyTree, noise: Array) -> tuple[Belief, Array]:
    """The belief after an observation with some noise, and the gain ``K = P / (P + Σ)``.

    ``m <- m + K (g - m);  P <- (1 - K)² P + K² Σ``.  The gain is 1 where nothing is uncertain.

    >>> belief, gain = correct(Belief(jnp.array(1.0), jnp.array(2.0)), jnp.array(3.0), jnp.array(2.0))
    >>> float(belief.mean), float(belief.variance), float(gain)
    (2.0, 1.0, 0.5)
    """
    m, P = belief
    uncertain = P + noise > 0
    K = jnp.where(uncertain, P / jnp.where(uncertain, P + noise, 1), 1)
    mean = jax.tree.map(lambda m, g: m + K.astype(m.dtype) * (g - m), m, observed)
    return Belief(mean, (1 - K) ** 2 * P + K**2 * noise), K


def filter_loss(belief: Belief, change: Array, process: Array, observed: Array, noise: Array) -> Belief:
    """The belief about the loss after a step, with process noise λ as large as the surprise requires.

    ``u⁻ = u + mᵀδ + ½ δᵀBδ;  c = s + δᵀPδ + ¼ δᵀQδ + r;  λ = max((y - u⁻)² - c, 0);  s⁻ = λ + c - r``, then
    `correct` with ``y`` and ``r``.

    Args:
      belief: ``u, s``.
      change: ``mᵀδ + ½ δᵀBδ``, expected from the gradient filter.
      process: ``δᵀPδ + ¼ δᵀQδ``, its variance.
      observed: ``y``.
      noise: ``r``.

    Returns:
      ``u, s`` after the step.
    """
    predicted = predict(belief, change, process)
    surprise = (observed - predicted.mean) ** 2
    λ = jnp.maximum(surprise - (predicted.variance + noise), 0)
    return correct(predict(predicted, 0.0, λ), observed, noise)[0]


def direction(gradient: Belief, eps: Array) -> PyTree:
    """``d = -m / (√(m² + P) + ε)``; where the root is 0, its derivative counts as 0."""

    def divided(m: Array) -> Array:
        square = m**2 + gradient.variance.astype(m.dtype)
        return -m / (roots.sqrt(square) + eps)

    return jax.tree.map(divided, gradient.mean)


def averaged(average: Average, new: Array, decay: Array) -> Average:
    """``β x̄ + (1 - β) x``, of the sum and of the weights."""
    return Average(decay * average.total + (1 - decay) * new, decay * average.weight + (1 - decay))


def value(average: Average) -> Array:
    """The value of the average: ``Σ_k β^(t-k) x_k / Σ_k β^(t-k)`` for a constant β."""
    return average.total / average.weight


def inner(a: PyTree, b: PyTree) -> Array:
    """``aᵀb`` over all leaves."""
    products = [jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
    return jnp.sum(jnp.stack(products))
