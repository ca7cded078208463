"""K-FAC: the gradient is multiplied by the inverse of a Kronecker-factored Fisher matrix, layer by layer.

======  ===================  ======================================================================
symbol  name                 meaning
======  ===================  ======================================================================
``W``   params               block of a layer, ``(n_in + 1, n_out)``: weights, and biases below them
``∇``   gradient             gradient at ``W`` before the step
``A``   A                    running average of ``E ā āᵀ``, from 0 (see `hypergrad.layers`)
``G``   G                    running average of ``E g gᵀ``, from 0
``B``   B                    of doubly factored weights, whose ``W`` is ``(rows, columns, n_out)``, and
                             ``A`` of the rows: running average of ``E Ψ Ψᵀ``, from 0
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
2015; Ba, Grosse, Martens, "Distributed second-order optimization using Kronecker-factored approximations",
ICLR 2017.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import layers
from hypergrad.curvature import Likelihood
from hypergrad.layers import Fisher, Network
from hypergrad.norms import power
from hypergrad.optimizers import asynchrony as late
from hypergrad.optimizers import roots
from hypergrad.optimizers.adam import unbiased
from hypergrad.optimizers.asynchrony import Asynchrony
from hypergrad.program import Assign, Here, Move, Optimizer, Scale, Shift, Total, Variable, Whole

PyTree = Any
AXES = {1: ("A",), 2: ("A", "G"), 3: ("A", "B", "G")}  # a block's factors, one for each of its axes
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
    doubly: PyTree = None,
    asynchrony: Asynchrony | None = None,
) -> Optimizer:
    """K-FAC with fixed damping, rate and momentum, block-diagonal, exactly reversible if nothing is late.

    ``A <- ρ A + (1-ρ) E ā āᵀ;  G <- ρ G + (1-ρ) E g gᵀ;``
    ``Δ = (Â + π γ I)⁻¹ ∇ (Ĝ + γ/π I)⁻¹;  V <- μ V + Δ;  W <- W - α V``, for every layer.

    The parameters are a tree of layers, and the network says what goes into them; how, is written in
    `hypergrad.layers`, and the networks of `hypergrad.nets` do.  For gains, such as those of a
    normalisation, ``Δ = ∇ / (D̂ + λ)``.  For weights of doubly factored layers, ``∇`` is multiplied along
    its axes by the inverses of ``(c/a) Â + √p ∛λ I``, ``(c/b) B̂ + √p ∛λ I`` and ``(c/g) Ĝ + ∛λ/p I``, with
    ``a = tr Â / dim Â`` and so on, and ``c = ∛(a b g)``; their biases are a layer of one input, 1.

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (μ, default 0.9), ``damping`` (λ, default 1e-2),
    ``decay`` (ρ, default 0.95) and ``pi`` (p, default 1); the last three are numbers for every layer.
    Variables, trees of the layers: ``A``, ``G`` and ``velocity``; with doubly factored layers ``B``.
    Reversible: costs ``log2(1 / μ)`` bits per parameter and step, and ``log2(1 / ρ)`` per element of the
    factors.  Late statistics and inverses are of parameters that on the way back are not known yet; to keep
    them all would take as much memory as the factors, at every step, so such programs are not reversible.

    Args:
      network: ``network(params, meta, batch, probes) -> (outputs, inputs)``; see `hypergrad.layers`.  The
        examples it sees may be fewer than those of the loss.
      likelihood: of the outputs, one of `hypergrad.curvature`: the one whose negative logarithm the loss
        is the mean of.
      fisher: `layers.sampled`, the default, `layers.exact` or `layers.empirical`.
      norm_constraint: whether steps are shortened, to ``Δ min(1, √(c / (α² Σ ⟨∇, Δ⟩)))`` with the sum
        over all layers; adds the hyperparameter ``norm_constraint`` (c, no default).
      doubly: which layers are doubly factored: a tree like the layers in the parameters, of the rows of
        the matrices that are the inputs, or 0.  A layer of 256 channels of 6 by 6 places, flattened in this
        order, has 256, and factors of widths 256, 36 and ``n_out``.
      asynchrony: how late statistics and inverses are, and on what devices; None for not at all.

    Raises:
      ValueError: where the network's inputs do not fit its parameters, or it forgets to add a probe, or a
        hyperparameter differs within a layer, or inputs are no matrices of so many rows.

    Source: Martens and Grosse, ICML 2015, sections 3 to 6; Ba, Grosse, Martens, ICLR 2017, for the norm
    constraint, doubly factored layers and asynchrony.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> from hypergrad import curvature, nets
    >>> init, apply = nets.mlp((2, 2))
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
    call = "kfac()" if asynchrony is None else f"kfac(asynchrony={asynchrony})"
    asynchrony = Asynchrony() if asynchrony is None else asynchrony
    fisher = layers.sampled() if fisher is None else fisher
    names = ("A", "G") if doubly is None else ("A", "B", "G")
    P, τ_s, τ_i = asynchrony.refresh, asynchrony.statistics_delay, asynchrony.inverse_delay

    def observe(params: PyTree, meta: PyTree, batch: PyTree, step: Array) -> Mapping[str, PyTree]:
        at = (params, meta, batch, step, doubly, asynchrony.statistics)
        found = layers.factors(call, network, likelihood, fisher, *at)
        return {f"{name}_now": getattr(found, name) for name in names}

    def moves(h: Any, t: Array) -> Sequence[Move]:
        decay, damping, pi = (_number(call, name, getattr(h, name)) for name in ("decay", "damping", "pi"))

        def averaged(name: str) -> list[Move]:
            if not τ_s:
                shift = Shift(name, lambda s: (1 - decay) * getattr(s, f"{name}_now"))
                return [Scale(name, decay), shift]
            ring = f"{name}_late"
            keep = Assign(
                ring, lambda s: late.written(getattr(s, ring), t, lambda: getattr(s, f"{name}_now"))
            )
            shift = Shift(name, lambda s: (1 - decay) * late.read(getattr(s, ring), t, τ_s))
            return [keep, Scale(name, decay), shift]

        def damped_factors(s: Any) -> tuple[Array, ...]:
            averages = [getattr(s, name) for name in AXES[s.params.ndim]]
            return damped([unbiased(average, decay, t) for average in averages], damping, pi)

        def kept(name: str) -> Move:
            def value(s: Any) -> Array:
                ring, axes = getattr(s, f"{name}_inverse"), AXES[s.params.ndim]
                if name not in axes:
                    return ring
                return late.written(ring, t, lambda: inverse(damped_factors(s)[axes.index(name)]), P)

            return Assign(f"{name}_inverse", value, asynchrony.inverses)

        def preconditioned(s: Any) -> Array:
            if not asynchrony.keeps_inverses:
                return precondition([inverse(factor) for factor in damped_factors(s)], s.gradient)
            rings = [getattr(s, f"{name}_inverse") for name in AXES[s.params.ndim]]
            return precondition([late.read(ring, t, τ_i, P) for ring in rings], s.gradient)

        def shortened(s: Any) -> Array:
            if not norm_constraint:
                return preconditioned(s)
            c = _number(call, "norm_constraint", h.norm_constraint)
            longer = s.size > c
            return preconditioned(s) * jnp.where(longer, jnp.sqrt(c / jnp.where(longer, s.size, 1)), 1)

        size = Total("size", lambda s: jnp.sum(h.learning_rate**2 * s.gradient * preconditioned(s)))
        return [
            *(move for name in names for move in averaged(name)),
            *([kept(name) for name in names] if asynchrony.keeps_inverses else []),
            *([size] if norm_constraint else []),
            Scale("velocity", h.momentum),
            Shift("velocity", shortened),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    variables = {name: Variable(partial(_start, name)) for name in names}
    if τ_s:
        variables |= {f"{name}_late": Variable(partial(_ring, name, τ_s, 1)) for name in names}
    if asynchrony.keeps_inverses:
        variables |= {f"{name}_inverse": Variable(partial(_ring, name, τ_i, P)) for name in names}
    variables["velocity"] = Variable()
    hypers = {"learning_rate": None, "momentum": 0.9, "damping": 1e-2, "decay": 0.95, "pi": 1.0}
    if norm_constraint:
        hypers |= {"norm_constraint": None}
    blocks = layers.blocks(call, doubly)
    return Optimizer(call, moves, variables, hypers, DOMAINS, blocks=blocks, observe=observe)


def _start(name: str, block: Array) -> Array:
    """A factor of zeros; without elements where a block does not have it."""
    axes = AXES[block.ndim]
    width = block.shape[axes.index(name)] if name in axes else 0
    square = name not in axes or block.ndim > 1
    return jnp.zeros((width, width) if square else (width,), block.dtype)


def _ring(name: str, delay: int, period: int, block: Array) -> Array:
    """Zeros for factors, or their inverses, that are used late."""
    return late.ring(_start(name, block), delay, period)


def _number(call: str, name: str, value: Array) -> Array:
    if jnp.size(value) != 1:
        raise ValueError(
            f"{call}: {name} has shape {list(jnp.shape(value))} within a layer, but it belongs to all of "
            "it; pass one number per layer (and step)"
        )
    return jnp.reshape(value, ())


def damped(factors: Sequence[Array], damping: Array, pi: Array) -> tuple[Array, ...]:
    """``A + π γ I`` and ``G + γ/π I``, with ``π = p √((tr A / dim A) / (tr G / dim G))`` and ``γ = √λ``.

    Where a trace is 0, ``π = p``.  A gain has one factor: ``D + λ``.  Three are scaled as `kfac` says, by 1
    where a trace is 0.

    Source: Martens and Grosse, ICML 2015, section 6.3; Ba, Grosse, Martens, ICLR 2017, for three.

    >>> import jax.numpy as jnp
    >>> A, G = damped([4.0 * jnp.eye(1), jnp.eye(1)], jnp.float32(0.01), jnp.float32(1.0))
    >>> A, G
    (Array([[4.2]], dtype=float32), Array([[1.05]], dtype=float32))
    """
    if len(factors) == 1:
        return (factors[0] + damping,)
    means = [jnp.trace(factor) / max(len(factor), 1) for factor in factors]
    alive = jnp.all(jnp.stack(means) > 0)
    means = [jnp.where(alive, mean, 1) for mean in means]
    if len(factors) == 2:
        pi = pi * jnp.sqrt(means[0] / means[1])
        gamma = roots.sqrt(damping)
        added = [pi * gamma, gamma / pi]
    else:
        common = jnp.exp(sum(map(jnp.log, means)) / len(factors))
        factors = [common / mean * factor for mean, factor in zip(means, factors)]
        positive = damping > 0
        gamma = jnp.where(positive, jnp.cbrt(jnp.where(positive, damping, 1)), 0)
        added = [roots.sqrt(pi) * gamma, roots.sqrt(pi) * gamma, gamma / pi]
    return tuple(x + c * jnp.eye(len(x), dtype=x.dtype) for x, c in zip(factors, added))


def inverse(factor: Array) -> Array:
    """``A⁻¹``; of the factor of a gain ``1 / D``.

    >>> import jax.numpy as jnp
    >>> inverse(4.0 * jnp.eye(1))
    Array([[0.25]], dtype=float32)
    """
    return 1 / factor if factor.ndim == 1 else roots.inverse(factor)


def precondition(inverses: Sequence[Array], gradient: Array) -> Array:
    """``A⁻¹ ∇ G⁻¹``; for a gain ``∇ / D``; of three axes, along every one of them.

    >>> import jax.numpy as jnp
    >>> precondition([jnp.full((1, 1), 0.5), jnp.full((1, 1), 0.25)], jnp.ones((1, 1)))
    Array([[0.125]], dtype=float32)
    """
    if len(inverses) == 1:
        return inverses[0] * gradient
    rest = math.prod(gradient.shape[1:])
    along_rows = roots.dot(inverses[0], gradient.reshape(len(inverses[0]), rest)).reshape(gradient.shape)
    if len(inverses) == 3:
        along_rows = roots.dot(inverses[1][None], along_rows)
    last = along_rows.reshape(math.prod(gradient.shape[:-1]), gradient.shape[-1])
    return roots.dot(last, inverses[-1]).reshape(gradient.shape)


class AdaptiveState(NamedTuple):
    """What `adaptive_kfac` keeps.

    Attributes:
      steps: so far.
      factors: ``(A, G)`` of every layer; of a gain ``(D,)``, of doubly factored weights ``(A, B, G)``.
      inverses: ``(Â + π γ I)⁻¹`` and ``(Ĝ + γ/π I)⁻¹``, and alike, as of the last refresh.
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
      doubly: as for `kfac`.

    Raises:
      ValueError: as `kfac`, and for periods that are not positive.

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
        nothing = [tuple(_start(name, x) for name in AXES[x.ndim]) for x in blocks]
        change = [jnp.zeros_like(x) for x in blocks]
        return AdaptiveState(jnp.int32(0), nothing, nothing, change, jnp.ones((), blocks[0].dtype))

    def update(
        h: Mapping[str, Array], gradient: PyTree, state: AdaptiveState, params: PyTree, here: Here
    ) -> tuple[PyTree, AdaptiveState]:
        t, ρ, η, δ0 = state.steps, h["decay"], h["l2"], state.change
        λ = jnp.maximum(state.scale * h["damping"], h["min_damping"])
        merged = merge(params)
        blocks: list[Array] = jax.tree.leaves(merged)
        structure: Any = jax.tree.structure(merged)
        slope = jax.tree.leaves(merge(gradient))

        def unmerged(blocks: list[Array]) -> PyTree:
            return split(structure.unflatten(blocks), params)

        found = layers.factors(call, network, likelihood, fisher, params, here.meta, here.batch, t, doubly)
        by_name = {name: jax.tree.leaves(tree) for name, tree in found._asdict().items()}
        now = [tuple(by_name[name][k] for name in AXES[x.ndim]) for k, x in enumerate(blocks)]
        factors = jax.tree.map(lambda old, new: ρ * old + (1 - ρ) * new, state.factors, now)

        def inverted() -> list[tuple[Array, ...]]:
            debiased = [[unbiased(average, ρ, t) for average in each] for each in factors]
            with_damping = [damped(each, h["gamma"] * (λ + η), h["pi"]) for each in debiased]
            return [tuple(map(inverse, each)) for each in with_damping]

        due = (t % refresh == 0) | (t < 3)
        B = jax.lax.cond(due, inverted, lambda: state.inverses)
        # Near a minimum the products of these with themselves are too small for a float.
        Δ = _near_one([-precondition(each, x) for each, x in zip(B, slope)])
        δ0 = _near_one(δ0)

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


def _near_one(direction: list[Array]) -> list[Array]:
    """A direction whose length does not matter, with a largest number near 1."""
    scale = power(direction)
    return [(x / scale).astype(x.dtype) for x in direction]


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
