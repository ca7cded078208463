"""The noisy quadratic model: training whose expected loss and its derivatives are known exactly.

The minibatch gradient of a diagonal quadratic is ``g = h θ + ε`` with ``ε ~ N(0, c)``, drawn anew at every
step.  A linear optimizer then moves ``θ``, and whatever else it keeps, by ``z <- M z + b ε``, and the
second moments follow exactly, coordinate by coordinate::

    S <- M S Mᵀ + c b bᵀ,    expected loss = ½ Σ w E θ²

======  =============  ============  ==================================================================
symbol  name           shape         meaning
======  =============  ============  ==================================================================
``h``   curvature      ``(d,)``      eigenvalues of the Hessian
``c``   noise          ``(d,)``      variance of the gradient of a step: of one example, by batch size
``A``   second_moment  ``(d,)``      ``E θ²``; at the start ``variance``
``w``   weight         ``(d,)``      of ``½ E θ²`` in the loss; equals ``h`` without preconditioning
``z``                  ``(n, d)``    ``θ`` first, and what the optimizer keeps beside it
``S``   moments        ``(n, n, d)``  ``E z zᵀ``
``M``   transition     ``(n, n, d)``  how ``z`` moves
``b``   response       ``(n, d)``    how the noise moves ``z``
``r``                  ``(d,)``      ``1 - α h``, by which a step of gradient descent contracts
``α``   learning_rate
``β``   momentum
``γ``   decay                        of an average of iterates
``K``   gain                         share of the new gradient in a running average of gradients
======  =============  ============  ==================================================================

Source: Zhang, Li, Nado, Martens, Sachdeva, Dahl, Shallue, Grosse, "Which algorithmic choices matter at
which batch sizes? Insights from a noisy quadratic model", NeurIPS 2019.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._base.checks import is_whole


class NoisyQuadratic(NamedTuple):
    """A quadratic with its minimum at zero, in the basis of its eigenvectors, and its gradient noise.

    Attributes:
      curvature: ``h``, ``(d,)``, above 0.
      noise: ``c``, ``(d,)``, at least 0.
      variance: ``E θ_0²``, ``(d,)``, at least 0.
      weight: ``w``, ``(d,)``, at least 0.
    """

    curvature: Array
    noise: Array
    variance: Array
    weight: Array


class Update(NamedTuple):
    """One step of a linear optimizer, ``z <- M z + b ε``, on every coordinate by itself.

    Attributes:
      transition: ``M``, ``(n, n, d)``.
      response: ``b``, ``(n, d)``.
    """

    transition: Array
    response: Array


@dataclass(frozen=True)
class Method:
    """A linear optimizer on the model.

    Attributes:
      name: the call that makes it.
      hypers: names of the hyperparameters.
      start: ``z_0 = start θ_0``, one number for every entry of ``z``.
      update: ``(problem, **hypers) -> Update``; each hyperparameter a number or ``(d,)``.
      steady: ``(problem, **hypers) -> (d,)``, the second moment of the output after infinitely many steps.
      output: the entry of ``z`` whose loss counts.
    """

    name: str
    hypers: tuple[str, ...]
    start: tuple[float, ...]
    update: Callable[..., Update]
    steady: Callable[..., Array]
    output: int = 0


class Expected(NamedTuple):
    """The expected course of a training run.

    Attributes:
      losses: ``(T + 1,)``, the expected loss before every step, and after the last.
      moments: ``S`` after the last step, ``(n, n, d)``; may start another run.
    """

    losses: Array
    moments: Array


class Sample(NamedTuple):
    """The random part of a run.

    Attributes:
      params: ``θ_0``, ``(d,)``.
      normals: ``(T, d)``, the gradient noise in standard deviations.
    """

    params: Array
    normals: Array


def noisy_quadratic(
    dimensions: int = 10_000, batch_size: float | Array = 1.0, preconditioning: float | Array = 0.0
) -> NoisyQuadratic:
    """The model of the paper's experiments, ``h_i = 1/i``, ``c = h / B``, ``E θ_0² = 1``.

    Args:
      dimensions: ``d``, at least 1.
      batch_size: ``B``, above 0, not necessarily whole.
      preconditioning: the power ``p`` of `preconditioned`.

    Returns:
      A `NoisyQuadratic` in JAX's default float type.

    Raises:
      ValueError: ``dimensions`` is not a whole number above 0, or a known ``batch_size`` is not above 0.

    Source: Zhang et al. (2019).

    >>> problem = noisy_quadratic(batch_size=16)
    >>> round(float(expected_loss(problem, problem.variance)), 3)
    4.894
    """
    call = f"noisy_quadratic(dimensions={dimensions!r}, batch_size={batch_size!r})"
    if not is_whole(dimensions):
        raise ValueError(f"{call}: dimensions must be a whole number of at least 1")
    if not isinstance(batch_size, jax.core.Tracer) and not np.all(np.asarray(batch_size) > 0):
        raise ValueError(
            f"{call}: batch_size must be above 0; for gradients without noise use problem._replace("
            "noise=0 * problem.noise)"
        )
    h = 1.0 / jnp.arange(1, dimensions + 1, dtype=jnp.result_type(float))
    return preconditioned(NoisyQuadratic(h, h / batch_size, jnp.ones_like(h), h), preconditioning)


def preconditioned(problem: NoisyQuadratic, power: float | Array) -> NoisyQuadratic:
    """The model with the gradient divided by ``h^p``: ``h <- h^(1-p)``, ``c <- c h^(-2p)``.

    The loss stays what it was: ``weight`` and ``variance`` do not change.

    Args:
      problem: without preconditioning.
      power: ``p``; 0 for none, 1 for Newton's method.

    Returns:
      A `NoisyQuadratic`.

    Source: Zhang et al. (2019).

    >>> preconditioned(noisy_quadratic(4), 1.0).curvature.tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    h, c = problem.curvature, problem.noise
    return problem._replace(curvature=h ** (1 - power), noise=c * h ** (-2 * power))


def expected_loss(problem: NoisyQuadratic, second_moment: Array) -> Array:
    """``½ Σ w A``, the loss in expectation; for a single sample, pass ``θ²``.

    Args:
      problem: the model.
      second_moment: ``A = E θ²``, ``(d,)``.

    Returns:
      A scalar.

    >>> float(expected_loss(noisy_quadratic(2), jnp.ones(2)))
    0.75
    """
    return 0.5 * jnp.sum(problem.weight * second_moment)


def _update(rows: Sequence[Sequence[Any]], response: Sequence[Any], like: Array) -> Update:
    """``M`` and ``b`` from their entries, each a number or ``(d,)``."""
    dtype = jnp.result_type(like, *[x for row in rows for x in row], *response)

    def stack(entries: Sequence[Any]) -> Array:
        return jnp.stack([jnp.broadcast_to(jnp.asarray(x, dtype), like.shape) for x in entries])

    return Update(jnp.stack([stack(row) for row in rows]), stack(response))


def sgd() -> Method:
    """Gradient descent, ``θ <- θ - α g``; as `hypergrad.sgd`.

    ``A <- r² A + α² c``, with the steady state ``A = α c / (h (2 - α h))`` for ``0 < α h < 2``.

    Hyperparameter: ``learning_rate`` (α).

    Source: Zhang et al. (2019).

    >>> problem = noisy_quadratic(1)
    >>> expect(sgd(), problem, {"learning_rate": 0.5}, steps=2).losses.tolist()
    [0.5, 0.25, 0.1875]
    """

    def update(problem: NoisyQuadratic, learning_rate: Any) -> Update:
        h = problem.curvature
        return _update([[1 - learning_rate * h]], [-learning_rate], h)

    def steady(problem: NoisyQuadratic, learning_rate: Any) -> Array:
        return learning_rate * problem.noise / (problem.curvature * (2 - learning_rate * problem.curvature))

    return Method("sgd()", ("learning_rate",), (1.0,), update, steady)


def heavy_ball() -> Method:
    """Polyak's heavy ball, ``v <- β v + g;  θ <- θ - α v`` with ``v_0 = 0``; as `hypergrad.heavy_ball`.

    In the steady state ``A = (1 + β) α c / (h (1 - β) (2 + 2β - α h))`` for ``0 < α h < 2 + 2β``.

    Hyperparameters: ``learning_rate`` (α) and ``momentum`` (β).  ``z = (θ, v)``.

    Source: Zhang et al. (2019).

    >>> problem = noisy_quadratic(1)
    >>> expect(heavy_ball(), problem, {"learning_rate": 0.5, "momentum": 0.5}, steps=2).losses.tolist()
    [0.5, 0.25, 0.25]
    """

    def update(problem: NoisyQuadratic, learning_rate: Any, momentum: Any) -> Update:
        h = problem.curvature
        rows = [[1 - learning_rate * h, -learning_rate * momentum], [h, momentum]]
        return _update(rows, [-learning_rate, 1.0], h)

    def steady(problem: NoisyQuadratic, learning_rate: Any, momentum: Any) -> Array:
        h, beyond = problem.curvature, 2 + 2 * momentum
        numerator = (1 + momentum) * learning_rate * problem.noise
        return numerator / (h * (1 - momentum) * (beyond - learning_rate * h))

    return Method("heavy_ball()", ("learning_rate", "momentum"), (1.0, 0.0), update, steady)


def iterate_average() -> Method:
    """Gradient descent and an average of its iterates, ``θ̄ <- γ θ̄ + (1 - γ) θ`` with ``θ̄_0 = θ_0``.

    The loss is that of ``θ̄``, which in the steady state has the second moment of `sgd` times
    ``(1 - γ)(1 + r γ) / ((1 + γ)(1 - r γ))``.

    Hyperparameters: ``learning_rate`` (α) and ``decay`` (γ).  ``z = (θ, θ̄)``.

    Source: Zhang et al. (2019).

    >>> problem = noisy_quadratic(1)
    >>> expect(iterate_average(), problem, {"learning_rate": 0.5, "decay": 0.5}, steps=1).losses.tolist()
    [0.5, 0.3125]
    """

    def update(problem: NoisyQuadratic, learning_rate: Any, decay: Any) -> Update:
        r = 1 - learning_rate * problem.curvature
        rows = [[r, 0.0], [(1 - decay) * r, decay]]
        return _update(rows, [-learning_rate, -(1 - decay) * learning_rate], r)

    def steady(problem: NoisyQuadratic, learning_rate: Any, decay: Any) -> Array:
        r = 1 - learning_rate * problem.curvature
        factor = (1 - decay) * (1 + r * decay) / ((1 + decay) * (1 - r * decay))
        return sgd().steady(problem, learning_rate) * factor

    return Method("iterate_average()", ("learning_rate", "decay"), (1.0, 1.0), update, steady, output=1)


def transported_average() -> Method:
    """Descent along an average ``m`` of gradients, each transported to the current ``θ``.

    ``m <- m + K (g - m);  δ = -α m;  θ <- θ + δ;  m <- m + h δ``, the last being exact on a quadratic.  The
    error ``e = m - h θ`` does not depend on the moves, ``e <- (1 - K) e + K ε``.  With
    ``K = 1, 1/2, 1/3, ...`` all gradients have equal weight and ``e`` falls as ``1/t``: this is the mean of
    the Kalman filter for the gradient.  ``K = 1`` is `sgd`.  For constant ``K``, in the steady state, with
    ``q = r (1 - K)``, ``A = α c K (1 + q) / (h (2 - K) (2 - α h) (1 - q))``.

    Hyperparameters: ``learning_rate`` (α) and ``gain`` (K), whose first value should be 1, since ``m`` is
    not known at the start: ``e_0 = 0`` means that the gradient is known exactly.  ``z = (θ, e)``.

    Source: Chen, Choi, Balles, Duvenaud, Hennig, "Self-tuning stochastic optimization with curvature-aware
    gradient filtering", 2020, Proposition 1.

    >>> problem, hypers = noisy_quadratic(1), {"learning_rate": 0.5, "gain": 1 / jnp.arange(1.0, 101.0)}
    >>> filtered = expect(transported_average(), problem, hypers, steps=100).losses[-1]
    >>> bool(filtered < 0.1 * expect(sgd(), problem, {"learning_rate": 0.5}, steps=100).losses[-1])
    True
    """

    def update(problem: NoisyQuadratic, learning_rate: Any, gain: Any) -> Update:
        r = 1 - learning_rate * problem.curvature
        rows = [[r, -learning_rate * (1 - gain)], [0.0, 1 - gain]]
        return _update(rows, [-learning_rate * gain, gain], r)

    def steady(problem: NoisyQuadratic, learning_rate: Any, gain: Any) -> Array:
        q = (1 - learning_rate * problem.curvature) * (1 - gain)
        return sgd().steady(problem, learning_rate) * gain * (1 + q) / ((2 - gain) * (1 - q))

    return Method("transported_average()", ("learning_rate", "gain"), (1.0, 0.0), update, steady)


def propagate(update: Update, moments: Array, noise: Array) -> Array:
    """One step of the second moments, ``S <- M S Mᵀ + c b bᵀ``.

    Args:
      update: ``M`` and ``b``.
      moments: ``S``, ``(n, n, d)``.
      noise: ``c``, ``(d,)``.

    Returns:
      ``S`` after the step.

    >>> update = sgd().update(noisy_quadratic(1), learning_rate=0.5)
    >>> propagate(update, jnp.ones((1, 1, 1)), jnp.ones(1))[0, 0].tolist()
    [0.5]
    """
    M, b = update
    # Written out: batched products of matrices this small are slow.
    half = jnp.sum(M[:, :, None] * moments[None], axis=1)
    return jnp.sum(half[:, None] * M[None], axis=2) + noise[None, None] * b[:, None] * b[None]


def expect(
    method: Method,
    problem: NoisyQuadratic,
    hypers: Mapping[str, Any],
    *,
    steps: int,
    moments: Array | None = None,
) -> Expected:
    """The expected losses of a whole run, by the exact recursion; `hypergrad.train` samples such runs.

    Differentiable, in both modes, in the problem, the hyperparameters and the start.

    Args:
      method: such as `sgd()`.
      problem: the model.
      hypers: by name a number, or an array whose leading axis is the step, of length ``T`` (or 1, for the
        same at every step); a second axis may have one entry per coordinate.
      steps: ``T``, at least 1.
      moments: ``S`` at the start, ``(n, n, d)``; by default that of `problem`.

    Returns:
      An `Expected`.

    Raises:
      ValueError: shapes, names or the number of steps do not fit.

    >>> problem = noisy_quadratic(100, batch_size=10)
    >>> first = lambda rate: expect(sgd(), problem, {"learning_rate": rate}, steps=50).losses[-1]
    >>> jax.grad(first)(jnp.full(50, 0.5)).shape
    (50,)
    """
    call = f"expect({method.name}, steps={steps!r})"
    steps = _steps(call, steps)
    shape = _shape(call, problem)
    if set(hypers) != set(method.hypers):
        raise ValueError(f"{call}: hypers must have the names {list(method.hypers)}, not {list(hypers)}")
    schedule = {name: _schedule(f"{call}: hypers[{name!r}]", x, steps, shape) for name, x in hypers.items()}
    if moments is None:
        start = jnp.asarray(method.start, problem.variance.dtype)
        moments = jnp.outer(start, start)[:, :, None] * problem.variance[None, None]
    needed = (len(method.start), len(method.start), *shape)
    if jnp.shape(moments) != needed:
        raise ValueError(
            f"{call}: moments has shape {list(jnp.shape(moments))} where {list(needed)} is needed"
        )
    dtype = jnp.result_type(*problem, *schedule.values(), moments)

    def loss(moments: Array) -> Array:
        return expected_loss(problem, moments[method.output, method.output])

    def step(moments: Array, now: dict[str, Array]) -> tuple[Array, Array]:
        return propagate(method.update(problem, **now), moments, problem.noise), loss(moments)

    end, losses = jax.lax.scan(step, jnp.asarray(moments, dtype), schedule)
    return Expected(jnp.append(losses, loss(end)), end)


def sgd_after(
    problem: NoisyQuadratic,
    learning_rate: float | Array,
    steps: float | Array,
    second_moment: Array | None = None,
) -> Array:
    """`sgd` at a constant rate in closed form, ``A_t = r^(2t) A_0 + (1 - r^(2t)) α c / (h (2 - α h))``.

    For a piecewise constant schedule, call it once for every piece.  It is also correct if ``α h > 2`` and
    the run diverges, up to overflow.

    Args:
      problem: the model, with curvature above 0.
      learning_rate: ``α``, above 0, a number or ``(d,)``.
      steps: ``t``, at least 0; a real number, so that it can be solved for: ``r^(2t)`` means ``|r|^(2t)``.
      second_moment: ``A_0``, ``(d,)``; by default that of `problem`.

    Returns:
      ``A_t``, ``(d,)``.

    >>> sgd_after(noisy_quadratic(1), 0.5, steps=2).tolist()
    [0.375]
    """
    start = problem.variance if second_moment is None else second_moment
    x = learning_rate * problem.curvature
    eps = jnp.finfo(x.dtype).eps
    x = jnp.where(x == 2, x - eps, x)  # there the formula is 0/0
    # |1 - x| = 1 - min(x, 2 - x), and log1p keeps its digits where that is nearly 1, at both ends.
    y = jnp.minimum(jnp.minimum(x, 2 - x), 1 - eps)
    log_kept = 2 * steps * jnp.log1p(-y)  # log r^(2t)
    steady = learning_rate * problem.noise / (problem.curvature * (2 - x))
    return jnp.exp(log_kept) * start - jnp.expm1(log_kept) * steady


def sgd_hypergradient(problem: NoisyQuadratic, learning_rate: Array) -> Array:
    """The derivative of the final expected loss of `sgd` in every rate of its schedule, in closed form.

    ``λ_T = ½ w;   ∂L/∂α_t = Σ_i λ_{t+1} (2 α_t c - 2 h (1 - α_t h) A_t);   λ_t = (1 - α_t h)² λ_{t+1}``

    Args:
      problem: the model.
      learning_rate: ``α``, ``(T,)``.

    Returns:
      ``(T,)``.

    Raises:
      ValueError: ``learning_rate`` is not one number for every step.

    >>> sgd_hypergradient(noisy_quadratic(1), jnp.array([0.5, 0.5])).tolist()
    [0.0, 0.25]
    """
    call = "sgd_hypergradient(problem, learning_rate)"
    _shape(call, problem)
    if jnp.ndim(learning_rate) != 1:
        raise ValueError(
            f"{call}: learning_rate has shape {list(jnp.shape(learning_rate))}; it must be (T,), one "
            "number for every step. For rates by coordinate use jax.grad of expect(sgd(), ...)"
        )
    h, c, A, w = problem

    def forwards(A: Array, rate: Array) -> tuple[Array, Array]:
        return (1 - rate * h) ** 2 * A + rate**2 * c, A

    def backwards(adjoint: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        rate, A = now
        r = 1 - rate * h
        return r**2 * adjoint, jnp.sum(adjoint * (2 * rate * c - 2 * h * r * A))

    dtype = jnp.result_type(*problem, learning_rate)
    rates = jnp.asarray(learning_rate, dtype)
    _, seconds = jax.lax.scan(forwards, A.astype(dtype), rates)
    return jax.lax.scan(backwards, 0.5 * w.astype(dtype), (rates, seconds), reverse=True)[1]


def optimal_learning_rates(problem: NoisyQuadratic, steps: int) -> Array:
    """The best schedule of `sgd` for each coordinate separately, ``α_t = h A_t / (h² A_t + c)``.

    It is best for one step as well as for the whole run: the hypergradient is zero there.  It gives
    ``A_t = 1 / (1/A_0 + t h²/c)``, the smallest that any method could reach (see `least_loss`).

    Args:
      problem: the model; in one dimension, the result is the best schedule of all.
      steps: ``T``, at least 1.

    Returns:
      ``(T, d)``.

    Raises:
      ValueError: ``steps`` is not a whole number above 0.

    >>> (1 / optimal_learning_rates(noisy_quadratic(1), 3)).tolist()
    [[2.0], [3.0], [4.0]]
    """
    steps = _steps(f"optimal_learning_rates(problem, steps={steps!r})", steps)
    h, c, A, _ = problem
    return jax.vmap(lambda t: h * A / (c + (t + 1) * h**2 * A))(jnp.arange(steps))


def least_loss(problem: NoisyQuadratic, steps: float | Array) -> Array:
    """The least expected loss any method can have after T gradients, ``½ Σ w / (1/A_0 + T h²/c)``.

    It is the posterior variance for a normal start: wherever a method evaluates them, ``T`` gradients
    determine ``θ_0`` with variance ``c / (T h²)`` and no better.

    Args:
      problem: the model.
      steps: ``T``, at least 0.

    Returns:
      A scalar.

    >>> float(least_loss(noisy_quadratic(1), 3))
    0.125
    """
    h, c, A, _ = problem
    return expected_loss(problem, A * c / (c + steps * h**2 * A))


def information_bound(problem: NoisyQuadratic, target: float | Array) -> Array:
    """The steps that information alone requires to reach a target, ``Σ w c / (2 target h²)``.

    For `noisy_quadratic` this is ``d / (2 target B)``.  It is the bound of `least_loss` with nothing known
    about the start, and so slightly larger; if the target is far below the initial loss the two agree.

    Args:
      problem: the model.
      target: the expected loss to reach, above 0.

    Returns:
      A scalar, not rounded to whole steps.

    Source: Zhang et al. (2019).

    >>> float(information_bound(noisy_quadratic(batch_size=16), 0.01).round())
    31250.0
    """
    return jnp.sum(problem.weight * problem.noise / problem.curvature**2) / (2 * target)


def sample(problem: NoisyQuadratic, key: Array, steps: int) -> Sample:
    """Draw a start, ``θ_0 ~ N(0, A_0)``, and the noise of every step.

    Args:
      problem: the model.
      key: PRNG key; `jax.vmap` over keys gives many runs.
      steps: ``T``, at least 1.

    Returns:
      A `Sample`.

    Raises:
      ValueError: ``steps`` is not a whole number above 0, or the fields of `problem` do not fit.

    >>> sample(noisy_quadratic(3), jax.random.key(0), steps=5).normals.shape
    (5, 3)
    """
    call = f"sample(problem, key, steps={steps!r})"
    steps = _steps(call, steps)
    shape, dtype = _shape(call, problem), problem.curvature.dtype
    start, noise = jax.random.split(key)
    params = jnp.sqrt(problem.variance) * jax.random.normal(start, shape, dtype)
    return Sample(params, jax.random.normal(noise, (steps, *shape), dtype))


def sampled_loss(params: Array, problem: NoisyQuadratic, normals: Array) -> Array:
    """A loss for `hypergrad.train` whose gradient is ``h θ + ε``: ``½ Σ h θ² + √c ξ θ``, ``ε = √c ξ``.

    The `problem` is passed as ``meta``, so that curvature and noise get hypergradients too (noise where it
    is not zero).  Judge the result of training by `expected_loss` of ``params**2``, since with
    preconditioning the function here is not the loss.

    Args:
      params: ``θ``, ``(d,)``.
      problem: the model.
      normals: ``ξ``, ``(d,)``, of this step.

    Returns:
      A scalar.

    >>> import hypergrad as hg
    >>> problem = noisy_quadratic(10, batch_size=100)
    >>> params, normals = sample(problem, jax.random.key(0), steps=50)
    >>> hypers = {"learning_rate": 0.1, "momentum": 0.9}
    >>> trained = hg.train(
    ...     sampled_loss, params, hypers, problem, normals, steps=50, optimizer=hg.heavy_ball()
    ... )
    >>> bool(expected_loss(problem, trained.params**2) < expected_loss(problem, params**2))
    True
    """
    h, c, _, _ = problem
    return jnp.sum(0.5 * h * params**2 + jnp.sqrt(c) * normals * params)


def _shape(call: str, problem: NoisyQuadratic) -> tuple[int, ...]:
    """``(d,)``."""
    shapes = {name: list(jnp.shape(x)) for name, x in problem._asdict().items()}
    first, *others = shapes.values()
    if len(first) != 1 or any(other != first for other in others):
        raise ValueError(f"{call}: all fields of problem must have the same shape (d,), not {shapes}")
    return tuple(first)


def _steps(call: str, steps: int) -> int:
    if not is_whole(steps):
        raise ValueError(f"{call}: steps must be a whole number of at least 1")
    return int(steps)


def _schedule(where: str, value: Any, steps: int, shape: tuple[int, ...]) -> Array:
    """A hyperparameter at every step, ``(T,)`` or ``(T, d)``."""
    x = jnp.asarray(value)
    x = x[None] if x.ndim == 0 else x
    if x.shape[0] not in (1, steps) or x.shape[1:] not in ((), (1,), shape):
        raise ValueError(
            f"{where} has shape {list(jnp.shape(value))}; it must be a number, ({steps},) or "
            f"({steps}, {shape[0]}): one for every step, or for every step and coordinate"
        )
    return jnp.broadcast_to(x, (steps, *x.shape[1:]))
