"""K-FAC as a program of moves, which can be reversed."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from hypergrad._base.trees import PyTree
from hypergrad.curvature.likelihoods import Likelihood
from hypergrad.optimizers.adam_family import unbiased
from hypergrad.optimizers.kfac import asynchrony as late
from hypergrad.optimizers.kfac import layers
from hypergrad.optimizers.kfac.asynchrony import Asynchrony
from hypergrad.optimizers.kfac.damping import AXES, damped, factor_start, inverse, one_number, precondition
from hypergrad.optimizers.kfac.layers import Fisher, Network
from hypergrad.program import Assign, Move, Optimizer, Scale, Shift, Total, Variable

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

    The parameters are a tree of layers, and the network returns the inputs of each, as described in
    `hypergrad.layers`; the networks of `hypergrad.nets` do.  For gains, such as those of a normalization,
    ``Δ = ∇ / (D̂ + λ)``.  For weights of doubly factored layers, ``∇`` is multiplied along its axes by the
    inverses of ``(c/a) Â + √p ∛λ I``, ``(c/b) B̂ + √p ∛λ I`` and ``(c/g) Ĝ + ∛λ/p I``, with
    ``a = tr Â / dim Â`` and so on, and ``c = ∛(a b g)``; their biases are a layer of one input, 1.

    Hyperparameters: ``learning_rate`` (α), ``momentum`` (μ, default 0.9), ``damping`` (λ, default 1e-2),
    ``decay`` (ρ, default 0.95) and ``pi`` (p, default 1); the last three are numbers for every layer.
    Variables, trees of the layers: ``A``, ``G`` and ``velocity``; with doubly factored layers ``B``.
    Reversible: costs ``log2(1 / μ)`` bits per parameter and step, and ``log2(1 / ρ)`` per element of the
    factors.  Late statistics and inverses belong to parameters that are not yet known when the run is
    played backwards; keeping them all would take as much memory as the factors, at every step, so such
    programs are not reversible.

    Args:
      network: ``network(params, meta, batch, probes) -> (outputs, inputs)``; see `hypergrad.layers`.  The
        examples it sees may be fewer than those of the loss.
      likelihood: the likelihood of the outputs, one of `hypergrad.curvature`, such that the loss is the
        mean of its negative logarithm.
      fisher: `layers.sampled`, the default, `layers.exact` or `layers.empirical`.
      norm_constraint: whether steps are shortened, to ``Δ min(1, √(c / (α² Σ ⟨∇, Δ⟩)))`` with the sum
        over all layers; adds the hyperparameter ``norm_constraint`` (c, no default).
      doubly: which layers are doubly factored: a tree like the layers in the parameters, of the number of
        rows of the input matrices, or 0.  A layer of 256 channels of 6 by 6 places, flattened in this
        order, has 256, and factors of widths 256, 36 and ``n_out``.
      asynchrony: how late statistics and inverses are, and on what devices they are computed; None if they
        are not late.

    Raises:
      ValueError: the network's inputs do not fit its parameters, it does not add a probe, a hyperparameter
        differs within a layer, or inputs are not matrices with the given number of rows.

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
        decay, damping, pi = (
            one_number(call, name, getattr(h, name)) for name in ("decay", "damping", "pi")
        )

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
            c = one_number(call, "norm_constraint", h.norm_constraint)
            return preconditioned(s) * _shortening(s.size, c)

        size = Total("size", lambda s: jnp.sum(h.learning_rate**2 * s.gradient * preconditioned(s)))
        return [
            *(move for name in names for move in _averaged(name, decay, t, τ_s)),
            *([kept(name) for name in names] if asynchrony.keeps_inverses else []),
            *([size] if norm_constraint else []),
            Scale("velocity", h.momentum),
            Shift("velocity", shortened),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ]

    variables = _variables(names, asynchrony)
    hypers = {"learning_rate": None, "momentum": 0.9, "damping": 1e-2, "decay": 0.95, "pi": 1.0}
    if norm_constraint:
        hypers |= {"norm_constraint": None}
    blocks = layers.blocks(call, doubly)
    return Optimizer(call, moves, variables, hypers, DOMAINS, blocks=blocks, observe=observe)


def _averaged(name: str, decay: Array, t: Array, delay: int) -> list[Move]:
    """The running average of a factor, from statistics that may be late."""
    if not delay:
        shift = Shift(name, lambda s: (1 - decay) * getattr(s, f"{name}_now"))
        return [Scale(name, decay), shift]
    ring = f"{name}_late"
    keep = Assign(ring, lambda s: late.written(getattr(s, ring), t, lambda: getattr(s, f"{name}_now")))
    shift = Shift(name, lambda s: (1 - decay) * late.read(getattr(s, ring), t, delay))
    return [keep, Scale(name, decay), shift]


def _shortening(size: Array, most: Array) -> Array:
    """The factor on a step that keeps its size at or below the maximum."""
    longer = size > most
    return jnp.where(longer, jnp.sqrt(most / jnp.where(longer, size, 1)), 1)


def _variables(names: Sequence[str], asynchrony: Asynchrony) -> dict[str, Variable]:
    """Factors, delayed factors, their inverses if those are kept, and the velocity."""
    P, τ_s, τ_i = asynchrony.refresh, asynchrony.statistics_delay, asynchrony.inverse_delay
    variables = {name: Variable(partial(factor_start, name)) for name in names}
    if τ_s:
        variables |= {f"{name}_late": Variable(partial(_ring, name, τ_s, 1)) for name in names}
    if asynchrony.keeps_inverses:
        variables |= {f"{name}_inverse": Variable(partial(_ring, name, τ_i, P)) for name in names}
    return variables | {"velocity": Variable()}


def _ring(name: str, delay: int, period: int, block: Array) -> Array:
    """Zeros for factors, or their inverses, that are used late."""
    return late.ring(factor_start(name, block), delay, period)
