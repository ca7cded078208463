"""K-FAC with the self-adapting damping and rates of Martens and Grosse (2015)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._base.trees import PyTree, power
from hypergrad.curvature.likelihoods import Likelihood
from hypergrad.optimizers.adam_family import unbiased
from hypergrad.optimizers.kfac import layers
from hypergrad.optimizers.kfac.damping import AXES, damped, factor_start, inverse, precondition
from hypergrad.optimizers.kfac.layers import Fisher, Network
from hypergrad.program import GenericOptimizer, StepContext

HYPERS = {
    "damping": 1.0,
    "min_damping": 1e-8,
    "omega": 0.95,
    "l2": 0.0,
    "gamma": 1.0,
    "decay": 0.95,
    "pi": 1.0,
}
DOMAINS = {name: (0.0, float("inf")) for name in HYPERS} | {"decay": (0.0, 1.0)}


class AdaptiveState(NamedTuple):
    """What `adaptive_kfac` keeps.

    Attributes:
      steps: so far.
      factors: ``(A, G)`` of every layer; of a gain ``(D,)``, of doubly factored weights ``(A, B, G)``.
      inverses: ``(Â + π γ I)⁻¹`` and ``(Ĝ + γ/π I)⁻¹``, and similarly, as of the last refresh.
      change: ``δ₀``, the change made by the step before, a block for every layer.
      scale: ``s``.
    """

    steps: Array
    factors: list[tuple[Array, ...]]
    inverses: list[tuple[Array, ...]]
    change: list[Array]
    scale: Array


def adaptive_kfac(
    network: Network,
    likelihood: Likelihood,
    *,
    fisher: Fisher | None = None,
    refresh: int = 5,
    adapt: int = 5,
    doubly: PyTree = None,
) -> GenericOptimizer:
    """K-FAC that sets its rate, momentum and damping itself, from the exact quadratic model of the loss.

    ``Δ = -(Â + π γ I)⁻¹ ∇ (Ĝ + γ/π I)⁻¹``, with ``γ² = r (λ + η)``;  ``δ = α Δ + μ δ₀``, where α and μ
    minimize ``M(δ) = ∇ᵀδ + ½ δᵀ(F + (λ + η) I) δ``;  ``w <- w + δ``.

    ``F`` is the exact Fisher matrix on the examples that the network sees, from products with its Jacobian.
    Levenberg and Marquardt's rule adapts ``λ = s · damping``: with ``q`` the fall of the loss over that of
    ``M``, every ``adapt`` steps ``s`` is multiplied by ``ω^adapt`` where ``q > 3/4``, and divided by it
    where ``q < 1/4``.  It is of little use for losses that differ from step to step.

    Not reversible; differentiate with ``Checkpointed()`` or ``Stored()``.  The choices of the rule count as
    constants in differentiation; ω and the first λ do not.

    Hyperparameters, numbers or ``(T,)`` schedules: ``damping`` (λ at the start, default 1),
    ``min_damping`` (below which λ does not fall, default 1e-8), ``omega`` (ω, default 0.95), ``l2`` (η,
    default 0; set it to that of a penalty ``½ η ‖w‖²`` in the loss), ``gamma`` (r, default 1), ``decay``
    (ρ, default 0.95) and ``pi`` (p, default 1), as for `kfac`.

    Args:
      network: as for `kfac`.
      likelihood: as for `kfac`.
      fisher: as for `kfac`; used for the factors only.
      refresh: steps between inversions of the factors; they are also inverted in the first three.
      adapt: steps between adaptations of λ.
      doubly: as for `kfac`.

    Raises:
      ValueError: as for `kfac`, or a period is not positive.

    Source: Martens and Grosse, ICML 2015, sections 6.4 to 6.6 and 7.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> from hypergrad import curvature, nets
    >>> init, apply = nets.mlp((2, 2))
    >>> x, y = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([0, 1])
    >>> loss = lambda w, meta, step: nets.cross_entropy(apply(w, x), y)
    >>> network = lambda w, meta, step, probes: apply(w, x, probes)
    >>> optimizer = hg.adaptive_kfac(network, curvature.categorical())
    >>> def final(damping):
    ...     arguments = {"steps": 10, "optimizer": optimizer, "adjoint": hg.Checkpointed()}
    ...     return hg.train(loss, init(jax.random.key(0)), {"damping": damping}, **arguments).losses[-1]
    >>> bool(final(1.0) < 0.3), bool(jax.grad(final)(1.0) > 0)
    (True, True)
    """
    call = f"adaptive_kfac(refresh={refresh}, adapt={adapt})"
    if refresh < 1 or adapt < 1:
        raise ValueError(f"{call}: periods are counted in steps, and must be at least 1")
    fisher = layers.sampled() if fisher is None else fisher
    merge, split = layers.blocks(call, doubly)

    def init(params: PyTree) -> AdaptiveState:
        blocks = jax.tree.leaves(merge(params))
        nothing = [tuple(factor_start(name, x) for name in AXES[x.ndim]) for x in blocks]
        change = [jnp.zeros_like(x) for x in blocks]
        return AdaptiveState(jnp.int32(0), nothing, nothing, change, jnp.ones((), blocks[0].dtype))

    def update(
        h: Mapping[str, Array], gradient: PyTree, state: AdaptiveState, params: PyTree, context: StepContext
    ) -> tuple[PyTree, AdaptiveState]:
        t, ρ, η, δ0 = state.steps, h["decay"], h["l2"], state.change
        λ = jnp.maximum(state.scale * h["damping"], h["min_damping"])
        merged = merge(params)
        blocks: list[Array] = jax.tree.leaves(merged)
        structure: Any = jax.tree.structure(merged)
        slope = jax.tree.leaves(merge(gradient))

        def unmerged(blocks: list[Array]) -> PyTree:
            return split(structure.unflatten(blocks), params)

        found = layers.factors(
            call, network, likelihood, fisher, params, context.meta, context.batch, t, doubly
        )
        by_name = {name: jax.tree.leaves(tree) for name, tree in found._asdict().items()}
        now = [tuple(by_name[name][k] for name in AXES[x.ndim]) for k, x in enumerate(blocks)]
        factors = jax.tree.map(lambda old, new: ρ * old + (1 - ρ) * new, state.factors, now)

        def inverted() -> list[tuple[Array, ...]]:
            debiased = [[unbiased(average, ρ, t) for average in each] for each in factors]
            with_damping = [damped(each, h["gamma"] * (λ + η), h["pi"]) for each in debiased]
            return [tuple(map(inverse, each)) for each in with_damping]

        due = (t % refresh == 0) | (t < 3)
        B = jax.lax.cond(due, inverted, lambda: state.inverses)
        # Scaled, because near a minimum the products of these with themselves are too small for a float.
        Δ = _near_one([-precondition(each, x) for each, x in zip(B, slope)])
        δ0 = _near_one(δ0)

        F = _fisher_products(network, likelihood, params, context, [unmerged(Δ), unmerged(δ0)])
        M = F + (λ + η) * _inner_products([Δ, δ0], [Δ, δ0])
        α, μ = _least(M, _inner_products([Δ, δ0], [slope])[:, 0])
        δ = [α * x + μ * y for x, y in zip(Δ, δ0)]
        new = unmerged([x + y for x, y in zip(blocks, δ)])

        def adapted() -> Array:
            fall = _inner_products([slope], [δ])[0, 0] / 2  # M(δ) - M(0), where δ minimizes M
            ratio, ω = (context.loss(new) - context.value) / fall, h["omega"] ** adapt
            return state.scale * jnp.where(ratio > 0.75, ω, jnp.where(ratio < 0.25, 1 / ω, 1))

        scale = jax.lax.cond((t + 1) % adapt == 0, adapted, lambda: state.scale)
        return new, AdaptiveState(t + 1, factors, B, δ, scale)

    return GenericOptimizer(call, init, update, HYPERS, DOMAINS)


def _inner_products(left: list[list[Array]], right: list[list[Array]]) -> Array:
    """The inner products of all pairs of trees, ``(len(left), len(right))``."""
    rows = [[sum(jnp.vdot(x, y) for x, y in zip(a, b)) for b in right] for a in left]
    return jnp.array(rows)


def _fisher_products(
    network: Network, likelihood: Likelihood, params: PyTree, context: StepContext, directions: list[PyTree]
) -> Array:
    """``v_iᵀ F v_j`` for all pairs of directions, with the exact Fisher matrix of the network's outputs."""

    def outputs(params: PyTree) -> Array:
        return network(params, context.meta, context.batch, layers.no_probes(params))[0]

    z, forwards = jax.linearize(outputs, params)
    tangents = [forwards(v) for v in directions]
    products = [jax.vmap(likelihood.fisher)(z, t) for t in tangents]
    return _inner_products([[t] for t in tangents], [[f] for f in products]) / z.shape[0]


def _near_one(direction: list[Array]) -> list[Array]:
    """A direction whose length does not matter, scaled so that its largest number is near 1."""
    scale = power(direction)
    return [(x / scale).astype(x.dtype) for x in direction]


def _least(M: Array, b: Array) -> tuple[Array, Array]:
    """The two numbers ``x`` that minimize ``½ xᵀ M x + bᵀ x``; the second is 0 where it changes nothing.

    This happens in the first step, which has no step before it, and if the two directions are parallel.
    """
    (m, k), n = M[0], M[1, 1]
    # The derivative of the branch not taken must be finite.
    apart = k * k < (1 - 100 * jnp.finfo(M.dtype).eps) * m * n
    k, n, c = (jnp.where(apart, x, other) for x, other in ((k, 0), (n, 1), (b[1], 0)))
    determinant = m * n - k * k
    return (k * c - n * b[0]) / determinant, (k * b[0] - m * c) / determinant
