"""``smoothed``: an outer objective, averaged over noise in the hyperparameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._base.checks import check_callable, describe
from hypergrad._base.opaque import with_rule
from hypergrad._base.tracing import closure_convert
from hypergrad._base.trees import PyTree, floats
from hypergrad.constraints import constrain, real, unconstrain
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

NOISE = 0x5E5  # sets the stream of the noise apart from what an objective does with the same key


def smoothed(
    objective: Callable[..., Any],
    *,
    sigma: PyTree,
    pairs: int = 16,
    key: Array | None = None,
    fresh: bool = False,
    constraints: PyTree = real,
    ceiling: float = math.inf,
    chunk: int | None = None,
) -> Callable[..., Array]:
    """An objective averaged over noise in its first argument, with a gradient that needs no derivative.

    ``F(θ) = E f(θ + σ ε)``;   ``∇F(θ) = mean ε (f(θ + σ ε) - f(θ - σ ε)) / (2 σ)`` over pairs

    The value is the mean over the ``2 P`` runs.  Value and gradient are unbiased estimates of ``F`` and
    ``∇F``; the gradient is not the derivative of the value, so that `check_hypergradient` and line searches
    such as those of L-BFGS are not for it.  It works in reverse and in forward mode.

    The objective is never differentiated.  In it, `hypergrad.Stored` is the cheapest adjoint.

    Args:
      objective: ``objective(hypers, *arguments) -> scalar``, a JAX function.
      sigma: ``σ > 0``, a number for all, or a tree that is a prefix of ``hypers``, whose leaves broadcast
        against those of ``hypers``.  In units of the hyperparameters, or of the raw values if there are
        ``constraints``.
      pairs: ``P >= 1``.  The error of the gradient falls as ``1 / √P``.
      key: PRNG key of the noise, which is the same in every call; by default ``jax.random.key(0)``.
      fresh: draw the noise anew in every call, from the last of ``arguments``, which must be a PRNG key;
        the objective is given that key too.  Without it, the outer loop is led by one sample of the noise.
      constraints: one `hypergrad.constraints.Constraint` or a tree of them, a prefix of ``hypers``.  The
        noise is added to the raw values: with ``constraints.positive`` a ``σ`` of 0.1 changes a learning
        rate by about 10 %, and it stays positive.
      ceiling: the value at which runs count whose value is above it, NaN or infinite.  What is smoothed is
        then ``min(f, ceiling)``.
      chunk: the number of runs computed at once; None for all.  1 takes the memory of one run.

    Returns:
      ``F(hypers, *arguments) -> scalar``.  Further arguments are passed to the objective as they are.

    Raises:
      ValueError: an argument is out of range, or ``sigma`` does not fit the hyperparameters.
      TypeError: the objective does not return one float; or ``F`` is differentiated twice, or in something
        else than its first argument.
      FloatingPointError: a run gave NaN or infinity, and there is no ceiling.  Inside compiled code, see
        `hypergrad.readable_errors`.

    Source: for antithetic pairs, Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled
    computation graphs with persistent evolution strategies", ICML 2021, section 3.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> rippled = lambda x: x**2 + 0.01 * jnp.sin(1e4 * x)
    >>> smooth = hg.smoothed(rippled, sigma=0.1, pairs=200)
    >>> bool(abs(jax.grad(rippled)(1.0) - 2) > 50), bool(abs(jax.grad(smooth)(1.0) - 2) < 0.5)
    (True, True)
    """
    call = f"smoothed(sigma={described(sigma)}, pairs={pairs!r})"
    if not callable(objective):
        check_callable(call, "objective", objective, "hypers")
    check_noise(call, sigma, pairs, ceiling, chunk)
    fixed = jax.random.key(0) if key is None else key

    def smooth(hypers: PyTree, *arguments: Any) -> Array:
        raw = unconstrain(constraints, floats(call, "hypers", hypers))
        spread = scales(call, sigma, raw)
        noise_key = jax.random.fold_in(_last_key(call, arguments), NOISE) if fresh else fixed
        converted, others, result = closure_convert(
            lambda raw: objective(constrain(constraints, raw), *arguments), raw
        )
        _check_scalar(call, result)

        def estimate(raw: PyTree, spread: PyTree, key: Array, others: list[Array]) -> tuple[Array, PyTree]:
            noise = jax.vmap(lambda k: draw(k, spread))(jax.random.split(key, pairs))
            points = jax.vmap(both_signs, (None, 0))(raw, noise)
            points = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), points)
            values = several(chunk, lambda point: converted(others, jax.tree.leaves(point)), points)
            values = finite(call, values, ceiling)
            plus, minus = values.reshape(-1, 2).T
            return jnp.mean(values), slope(noise, plus - minus, spread)

        return _with_estimate(call, estimate)(raw, spread, noise_key, others)

    return smooth


def _with_estimate(call: str, estimate: Callable[..., tuple[Array, PyTree]]) -> Callable[..., Array]:
    """The value of an estimate, whose derivative in the first argument is that of the estimate."""

    def rule(primals: Any, tangents: Any) -> tuple[Array, Array]:
        raw, *others = tangents
        if any(t is not None and t.dtype != jax.dtypes.float0 for t in jax.tree.leaves(others)):
            raise TypeError(
                f"{call}: it is differentiated in something else than the hyperparameters: in sigma, in a "
                "further argument, or in what the objective closes over. Noise is added to the hypers, "
                "which must all be in the first argument; jax.lax.stop_gradient holds others fixed"
            )
        value, gradient = without_derivative(call, estimate)(*primals)
        changes = [
            jnp.vdot(g, t).astype(value.dtype)
            for g, t in zip(jax.tree.leaves(gradient), _leaves(raw))
            if t is not None
        ]
        return value, jnp.sum(jnp.stack(changes))

    return with_rule(lambda *arguments: estimate(*arguments)[0], rule, symbolic_zeros=True)


def _leaves(tangents: PyTree) -> list[Array | None]:
    return jax.tree.leaves(tangents, is_leaf=lambda x: x is None)


def described(sigma: PyTree) -> str:
    """``σ`` in a message."""
    return repr(sigma) if isinstance(sigma, float | int) else "..."


def _last_key(call: str, arguments: tuple[Any, ...]) -> Array:
    """The key that is the last of some arguments."""
    last = arguments[-1] if arguments else None
    if not (
        isinstance(last, jax.Array) and jnp.issubdtype(last.dtype, jax.dtypes.prng_key) and last.ndim == 0
    ):
        raise TypeError(
            f"{call}: with fresh=True the last argument must be one PRNG key, from which noise is drawn, "
            f"and it is {describe(last)}; pass a key that is different in every call, such as "
            "jax.random.key(step)"
        )
    return last


def _check_scalar(call: str, result: Any) -> None:
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{call}: the objective must return one float, and it returns {describe(result)}; leave out "
            "what else it returns"
        )
    if result.shape != () or not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(
            f"{call}: the objective must return one float, and it returns "
            f"{result.dtype}{list(result.shape)}; reduce it, for example by .mean()"
        )
