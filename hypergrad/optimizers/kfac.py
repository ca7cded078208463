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
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import layers
from hypergrad.curvature import Likelihood
from hypergrad.layers import BLOCKS, Fisher, Network
from hypergrad.optimizers import roots
from hypergrad.optimizers.adam import unbiased
from hypergrad.program import Move, Optimizer, Scale, Shift, Total, Variable

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
            return precondition(*damped(A, G, damping, pi), s.gradient)

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
        "A": Variable(init=lambda block: jnp.zeros(block.shape[:1] * min(2, block.ndim), block.dtype)),
        "G": Variable(init=lambda block: jnp.zeros((block.shape[1:] or (0,)) * 2, block.dtype)),
        "velocity": Variable(),
    }
    hypers = {"learning_rate": None, "momentum": 0.9, "damping": 1e-2, "decay": 0.95, "pi": 1.0}
    if norm_constraint:
        hypers |= {"norm_constraint": None}
    return Optimizer(call, moves, variables, hypers, DOMAINS, blocks=BLOCKS, observe=observe)


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


def precondition(A: Array, G: Array, gradient: Array) -> Array:
    """``A⁻¹ ∇ G⁻¹``, by Cholesky factors; for a gain ``∇ / D``.

    >>> import jax.numpy as jnp
    >>> precondition(4.0 * jnp.eye(1), 2.0 * jnp.eye(1), jnp.ones((1, 1)))
    Array([[0.125]], dtype=float32)
    """
    if A.ndim == 1:
        return gradient / A
    left = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(A, lower=True), gradient)
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(G, lower=True), left.T).T
