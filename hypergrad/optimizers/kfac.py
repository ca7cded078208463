"""K-FAC: the gradient is multiplied by the inverse of a Kronecker-factored Fisher matrix, layer by layer.

======  ===================  ======================================================================
symbol  name                 meaning
======  ===================  ======================================================================
``W``   params               block of a layer, ``(n_in + 1, n_out)``: weights, and biases below them
``∇``   gradient             gradient at ``W`` before the step
``A``   A                    running average of ``E ā āᵀ``, from 0 (see `hypergrad.layers`)
``G``   G                    running average of ``E g gᵀ``, from 0
``Â``                        ``A / (1 - ρ^n)``, in step ``n`` from 1
``Δ``                        preconditioned gradient
``V``   velocity             momentum's sum of ``Δ``
``α``   learning_rate        ``>= 0``
``μ``   momentum             ``0 <= μ < 1``; ``μ >= 2**-7`` to be reversed
``λ``   damping              ``> 0``, in units of the Fisher matrix; ``γ = √λ``
``ρ``   decay                ``0 <= ρ < 1``; ``ρ >= 2**-7`` to be reversed
``π``                        how damping is shared: ``p √((tr Â / dim Â) / (tr Ĝ / dim Ĝ))``
``p``   pi                   ``> 0``, what the π of the paper is multiplied by
``c``   norm_constraint      ``> 0``, bound of ``α² Σ ⟨∇, Δ⟩``
======  ===================  ======================================================================

Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML
2015.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import layers
from hypergrad.curvature import Likelihood
from hypergrad.layers import BLOCKS, Fisher, Network
from hypergrad.optimizers import roots
from hypergrad.optimizers.adam import unbiased
from hypergrad.program import Here, Move, Optimizer, Scale, Shift, Total, Variable, Whole

PyTree = Any
DOMAINS = {
    "learning_rate": (0.0, float("inf")),
    "momentum": (0.0, 1.0),
    "damping": (0.0, float("inf")),
    "decay": (0.0, 1.0),
    "pi": (0.0, float("inf")),
    "norm_constraint": (0.0, float("inf")),
}


def kfac(
    network: Network,
    likelihood: Likelihood,
    *,
    fisher: Fisher | None = None,
    norm_constraint: bool = False,
) -> Optimizer:
    """K-FAC with fixed damping, rate and momentum, block-diagonal, exactly reversible.

    ``A <- ρ A + (1-ρ) E ā āᵀ;  G <- ρ G + (1-ρ) E g gᵀ;``
    ``Δ = (Â + π γ I)⁻¹ ∇ (Ĝ + γ/π I)⁻¹;  V <- μ V + Δ;  W <- W - α V``, for every layer.

    The parameters are a tree of layers, and the network says what goes into them; how, is written in
    `hypergrad.layers`, and the networks of `hypergrad.nets` do.  For gains, such as those of a
    normalisation, ``Δ = ∇ / (D̂ + λ)``.

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (μ, default 0.9), ``damping`` (λ, default 1e-2),
    ``decay`` (ρ, default 0.95) and ``pi`` (p, default 1); the last three are numbers for every layer.
    Variables, trees of the layers: ``A``, ``G`` and ``velocity``.  Reversible: costs ``log2(1 / μ)`` bits
    per parameter and step, and ``log2(1 / ρ)`` per element of the factors.

    Args:
      network: ``network(params, meta, batch, probes) -> (outputs, inputs)``; see `hypergrad.layers`.  The
        examples it sees may be fewer than those of the loss.
      likelihood: of the outputs, one of `hypergrad.curvature`: the one whose negative logarithm the loss
        is the mean of.
      fisher: `layers.sampled`, the default, `layers.exact` or `layers.empirical`.
      norm_constraint: whether steps are shortened, to ``Δ min(1, √(c / (α² Σ ⟨∇, Δ⟩)))`` with the sum
        over all layers; adds the hyperparameter ``norm_constraint`` (c, no default).

    Raises:
      ValueError: where the network's inputs do not fit its parameters, or a hyperparameter differs within
        a layer.

    Source: Martens and Grosse, ICML 2015, sections 3 to 6; Ba, Grosse, Martens, "Distributed second-order
    optimization using Kronecker-factored approximations", ICLR 2017, section 5, for the norm constraint.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> from hypergrad import curvature, nets
    >>> init, apply = nets.mlp((2, 3, 2))
    >>> x, y = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([0, 1])
    >>> loss = lambda w, meta, step: nets.cross_entropy(apply(w, x), y)
    >>> network = lambda w, meta, step, probes: apply(w, x, probes)
    >>> optimizer = hg.kfac(network, curvature.categorical())
    >>> def final(rate):
    ...     start = init(jax.random.key(0))
    ...     return hg.train(loss, start, {"learning_rate": rate}, steps=10, optimizer=optimizer).losses[-1]
    >>> bool(final(0.1) < 0.3), jax.grad(final)(jnp.full(10, 0.1)).shape
    (True, (10,))
    """
    call = "kfac()"
    fisher = layers.sampled() if fisher is None else fisher

    def observe(params: PyTree, meta: PyTree, batch: PyTree, step: Array) -> Mapping[str, PyTree]:
        A, G = layers.factors(call, network, likelihood, fisher, params, meta, batch, step)
        return {"A_now": A, "G_now": G}

    def moves(h: Any, t: Array) -> Sequence[Move]:
        decay, damping, pi = (_number(call, name, getattr(h, name)) for name in ("decay", "damping", "pi"))

        def preconditioned(s: Any) -> Array:
            A, G = (unbiased(average, decay, t) for average in (s.A, s.G))
            return precondition(*inverses(*damped(A, G, damping, pi)), s.gradient)

        def shortened(s: Any) -> Array:
            if not norm_constraint:
                return preconditioned(s)
            c = _number(call, "norm_constraint", h.norm_constraint)
            longer = s.size > c
            return preconditioned(s) * jnp.where(longer, jnp.sqrt(c / jnp.where(longer, s.size, 1)), 1)

        size = Total("size", lambda s: jnp.sum(h.learning_rate**2 * s.gradient * preconditioned(s)))
        return [
            Scale("A", decay),
            Shift("A", lambda s: (1 - decay) * s.A_now),
            Scale("G", decay),
            Shift("G", lambda s: (1 - decay) * s.G_now),
            *([size] if norm_constraint else []),
            Scale("velocity", h.momentum),
            Shift("velocity", shortened),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    variables = {
        "A": Variable(init=_start_of_inputs),
        "G": Variable(init=_start_of_slopes),
        "velocity": Variable(),
    }
    hypers = {"learning_rate": None, "momentum": 0.9, "damping": 1e-2, "decay": 0.95, "pi": 1.0}
    if norm_constraint:
        hypers |= {"norm_constraint": None}
    return Optimizer(call, moves, variables, hypers, DOMAINS, blocks=BLOCKS, observe=observe)


def _start_of_inputs(block: Array) -> Array:
    """``A = 0``."""
    return jnp.zeros(block.shape[:1] * min(2, block.ndim), block.dtype)


def _start_of_slopes(block: Array) -> Array:
    """``G = 0``."""
    return jnp.zeros((block.shape[1:] or (0,)) * 2, block.dtype)


def _number(call: str, name: str, value: Array) -> Array:
    if jnp.size(value) != 1:
        raise ValueError(
            f"{call}: {name} has shape {list(jnp.shape(value))} within a layer, but it belongs to all of "
            "it; pass one number per layer (and step)"
        )
    return jnp.reshape(value, ())


def damped(A: Array, G: Array, damping: Array, pi: Array) -> tuple[Array, Array]:
    """``A + π γ I`` and ``G + γ/π I``, with ``π = p √((tr A / dim A) / (tr G / dim G))`` and ``γ = √λ``.

    Where a trace is 0, ``π = p``.  A gain has one factor: ``D + λ``.

    Source: Martens and Grosse, ICML 2015, section 6.3.

    >>> import jax.numpy as jnp
    >>> A, G = damped(4.0 * jnp.eye(1), jnp.eye(1), jnp.float32(0.01), jnp.float32(1.0))
    >>> A, G
    (Array([[4.2]], dtype=float32), Array([[1.05]], dtype=float32))
    """
    if A.ndim == 1:
        return A + damping, G
    of_A, of_G = (jnp.trace(factor) / len(factor) for factor in (A, G))
    alive = (of_A > 0) & (of_G > 0)
    pi = pi * jnp.sqrt(jnp.where(alive, of_A, 1) / jnp.where(alive, of_G, 1))
    gamma = roots.sqrt(damping)
    return A + pi * gamma * jnp.eye(len(A), dtype=A.dtype), G + gamma / pi * jnp.eye(len(G), dtype=G.dtype)


def inverses(A: Array, G: Array) -> tuple[Array, Array]:
    """``A⁻¹`` and ``G⁻¹``; for a gain ``1 / D``, and nothing.

    >>> import jax.numpy as jnp
    >>> inverses(4.0 * jnp.eye(1), 16.0 * jnp.eye(1))
    (Array([[0.25]], dtype=float32), Array([[0.0625]], dtype=float32))
    """
    return (1 / A, G) if A.ndim == 1 else (roots.inverse(A), roots.inverse(G))


def precondition(inverse_A: Array, inverse_G: Array, gradient: Array) -> Array:
    """``A⁻¹ ∇ G⁻¹``; for a gain ``∇ / D``.

    >>> import jax.numpy as jnp
    >>> precondition(jnp.full((1, 1), 0.5), jnp.full((1, 1), 0.25), jnp.ones((1, 1)))
    Array([[0.125]], dtype=float32)
    """
    if inverse_A.ndim == 1:
        return inverse_A * gradient
    return roots.dot(roots.dot(inverse_A, gradient), inverse_G)


class AdaptiveState(NamedTuple):
    """What `adaptive_kfac` keeps.

    Attributes:
      steps: so far.
      factors: ``(A, G)`` of every layer.
      inverses: ``(Â + π γ I)⁻¹`` and ``(Ĝ + γ/π I)⁻¹`` of every layer, as of the last refresh.
      change: ``δ₀``, the change made by the step before, a block for every layer.
      scale: ``s``.
    """

    steps: Array
    factors: list[tuple[Array, Array]]
    inverses: list[tuple[Array, Array]]
    change: list[Array]
    scale: Array


def adaptive_kfac(
    network: Network,
    likelihood: Likelihood,
    *,
    fisher: Fisher | None = None,
    refresh: int = 5,
    adapt: int = 5,
) -> Whole:
    """K-FAC that sets its rate, momentum and damping itself, from the exact quadratic model of the loss.

    ``Δ = -(Â + π γ I)⁻¹ ∇ (Ĝ + γ/π I)⁻¹``, with ``γ² = r (λ + η)``;  ``δ = α Δ + μ δ₀``, where α and μ
    minimise ``M(δ) = ∇ᵀδ + ½ δᵀ(F + (λ + η) I) δ``;  ``w <- w + δ``.

    ``F`` is the exact Fisher matrix on the examples that the network sees, from products with its
    Jacobian.  Levenberg and Marquardt's rule adapts ``λ = s · damping``: with ``q`` the fall of the loss
    over that of ``M``, every ``adapt`` steps ``s`` is multiplied by ``ω^adapt`` where ``q > 3/4``, and
    divided by it where ``q < 1/4``.  For losses that are not the same at every step it is of little use.

    Not reversible; differentiate with ``Checkpointed()`` or ``Stored()``.  The choices of the rule are
    constants where the run is differentiated; ω and the first λ are not.

    Hyperparameters, numbers or ``(T,)`` schedules: ``damping`` (λ at the start, default 1),
    ``min_damping`` (below which λ does not fall, default 1e-8), ``omega`` (ω, default 0.95), ``l2`` (η,
    default 0; set it to that of a penalty ``½ η ‖w‖²`` in the loss), ``gamma`` (r, default 1), ``decay``
    (ρ, default 0.95) and ``pi`` (p, default 1), as for `kfac`.

    Args:
      network: as for `kfac`.
      likelihood: as for `kfac`.
      fisher: as for `kfac`; of the factors only.
      refresh: steps between inversions of the factors; they are also inverted in the first three.
      adapt: steps between adaptations of λ.

    Raises:
      ValueError: as `kfac`, and for periods that are not positive.

    Source: Martens and Grosse, ICML 2015, sections 6.4 to 6.6 and 7.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> from hypergrad import curvature, nets
    >>> init, apply = nets.mlp((2, 3, 2))
    >>> x, y = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([0, 1])
    >>> loss = lambda w, meta, step: nets.cross_entropy(apply(w, x), y)
    >>> network = lambda w, meta, step, probes: apply(w, x, probes)
    >>> optimizer = hg.adaptive_kfac(network, curvature.categorical())
    >>> def final(damping):
    ...     arguments = {"steps": 10, "optimizer": optimizer, "adjoint": hg.Checkpointed()}
    ...     return hg.train(loss, init(jax.random.key(0)), {"damping": damping}, **arguments).losses[-1]
    >>> bool(final(1.0) < 0.1), bool(jax.grad(final)(1.0) > 0)
    (True, True)
    """
    call = f"adaptive_kfac(refresh={refresh}, adapt={adapt})"
    if refresh < 1 or adapt < 1:
        raise ValueError(f"{call}: periods are counted in steps, and must be at least 1")
    fisher = layers.sampled() if fisher is None else fisher

    def init(params: PyTree) -> AdaptiveState:
        blocks = jax.tree.leaves(layers.merge(params))
        nothing = [(_start_of_inputs(x), _start_of_slopes(x)) for x in blocks]
        change = [jnp.zeros_like(x) for x in blocks]
        return AdaptiveState(jnp.int32(0), nothing, nothing, change, jnp.ones((), blocks[0].dtype))

    def update(
        h: Mapping[str, Array], gradient: PyTree, state: AdaptiveState, params: PyTree, here: Here
    ) -> tuple[PyTree, AdaptiveState]:
        t, ρ, η, δ0 = state.steps, h["decay"], h["l2"], state.change
        λ = jnp.maximum(state.scale * h["damping"], h["min_damping"])
        merged = layers.merge(params)
        blocks: list[Array] = jax.tree.leaves(merged)
        structure: Any = jax.tree.structure(merged)
        slope = jax.tree.leaves(layers.merge(gradient))

        def unmerged(blocks: list[Array]) -> PyTree:
            return layers.split(structure.unflatten(blocks), params)

        found = layers.factors(call, network, likelihood, fisher, params, here.meta, here.batch, t)
        now = list(zip(*map(jax.tree.leaves, found)))
        factors = jax.tree.map(lambda old, new: ρ * old + (1 - ρ) * new, state.factors, now)

        def inverted() -> list[tuple[Array, Array]]:
            debiased = [[unbiased(average, ρ, t) for average in pair] for pair in factors]
            return [inverses(*damped(A, G, h["gamma"] * (λ + η), h["pi"])) for A, G in debiased]

        due = (t % refresh == 0) | (t < 3)
        B = jax.lax.cond(due, inverted, lambda: state.inverses)
        Δ = [-precondition(of_A, of_G, x) for (of_A, of_G), x in zip(B, slope)]

        F = _fisher_products(network, likelihood, params, here, [unmerged(Δ), unmerged(δ0)])
        M = F + (λ + η) * _inner_products([Δ, δ0], [Δ, δ0])
        α, μ = _least(M, _inner_products([Δ, δ0], [slope])[:, 0])
        δ = [α * x + μ * y for x, y in zip(Δ, δ0)]
        new = unmerged([x + y for x, y in zip(blocks, δ)])

        def adapted() -> Array:
            fall = _inner_products([slope], [δ])[0, 0] / 2  # M(δ) - M(0), where δ minimises M
            ratio, ω = (here.loss(new) - here.value) / fall, h["omega"] ** adapt
            return state.scale * jnp.where(ratio > 0.75, ω, jnp.where(ratio < 0.25, 1 / ω, 1))

        scale = jax.lax.cond((t + 1) % adapt == 0, adapted, lambda: state.scale)
        return new, AdaptiveState(t + 1, factors, B, δ, scale)

    hypers = {
        "damping": 1.0,
        "min_damping": 1e-8,
        "omega": 0.95,
        "l2": 0.0,
        "gamma": 1.0,
        "decay": 0.95,
        "pi": 1.0,
    }
    domains = {name: (0.0, float("inf")) for name in hypers} | {"decay": (0.0, 1.0)}
    return Whole(call, init, update, hypers, domains)


def _inner_products(left: list[list[Array]], right: list[list[Array]]) -> Array:
    """Of all pairs of trees, ``(len(left), len(right))``."""
    rows = [[sum(jnp.vdot(x, y) for x, y in zip(a, b)) for b in right] for a in left]
    return jnp.array(rows)


def _fisher_products(
    network: Network, likelihood: Likelihood, params: PyTree, here: Here, directions: list[PyTree]
) -> Array:
    """``v_iᵀ F v_j`` for all pairs of directions, with the exact Fisher matrix of the network's outputs."""

    def outputs(params: PyTree) -> Array:
        return network(params, here.meta, here.batch, layers.no_probes(params))[0]

    z, forwards = jax.linearize(outputs, params)
    tangents = [forwards(v) for v in directions]
    products = [jax.vmap(likelihood.fisher)(z, t) for t in tangents]
    return _inner_products([[t] for t in tangents], [[f] for f in products]) / z.shape[0]


def _least(M: Array, b: Array) -> tuple[Array, Array]:
    """The two numbers ``x`` that minimise ``½ xᵀ M x + bᵀ x``; the second is 0 where it changes nothing.

    That is so in the first step, which has no step before it, and where the two directions are parallel.
    """
    (m, k), n = M[0], M[1, 1]
    # The derivative of the branch not taken must be finite.
    apart = k * k < (1 - 100 * jnp.finfo(M.dtype).eps) * m * n
    k, n, c = (jnp.where(apart, x, other) for x, other in ((k, 0), (n, 1), (b[1], 0)))
    determinant = m * n - k * k
    return (k * c - n * b[0]) / determinant, (k * b[0] - m * c) / determinant
