"""Optimizers of the last years: against optax, or against recursions written from the papers."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import curvature, exact
from hypergrad.meta import tuning
from hypergrad.optimizers.muon_family import newton_schulz
from hypergrad.program import Keep, Optimizer, Scale
from tests.problems import unrounded

STEPS = 50
ONE = {"matrix": (4, 3)}  # for what acts element by element
MATRICES = {"tall": (4, 3), "wide": (2, 3)}
SHAPES = {"matrix": (4, 3), "vector": (3,)}


def start(shapes: dict[str, tuple[int, ...]], dtype: Any = jnp.float64) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def loss(w: Any, meta: Any, step: Any) -> Any:
    """Of a tree, with gradients of all signs, and a Hessian that is not diagonal."""
    leaves = jax.tree.leaves(w)
    waves = sum(jnp.sum(jnp.cos(2 * x + step) + meta * x**2) for x in leaves)
    return 0.2 * waves + 0.02 * sum(jnp.sum(x) for x in leaves) ** 2


# Oracles: of optax, or written from the papers, with derivatives by plain `jax.grad`.


class Oracle(NamedTuple):
    """A run of all leaves: ``init(params) -> state``; ``step(h, t, w, g, state, meta) -> (w, state)``."""

    init: Callable[[Any], Any]
    step: Callable[..., Any]


def of_optax(make: Callable[..., Any]) -> Oracle:
    """An oracle from hyperparameters to a transformation, built anew at every step."""

    def init(w: Any) -> Any:
        return make(SimpleNamespace(**dict.fromkeys(RANGES, 0.5))).init(w)

    def step(h: Any, t: Any, w: Any, g: Any, state: Any, meta: Any) -> Any:
        updates, state = make(h).update(g, state, w)
        return optax.apply_updates(w, updates), state

    return Oracle(init, step)


def by_leaf(step: Callable[..., Any], *names: str) -> Oracle:
    """An oracle from the step of one leaf, ``step(h, n, w, g, state) -> w``, which changes the state."""

    def init(w: Any) -> Any:
        return {k: {name: jnp.zeros_like(x) for name in names} for k, x in w.items()}

    def of_all(h: Any, t: Any, w: Any, g: Any, state: Any, meta: Any) -> Any:
        state = {k: dict(leaf) for k, leaf in state.items()}
        return {k: step(h, t + 1, w[k], g[k], state[k]) for k in w}, state

    return Oracle(init, of_all)


def singular_values_near_one(M: Any, eps: Any) -> Any:
    """Newton and Schulz's polynomials of the singular values themselves."""
    U, s, Vt = jnp.linalg.svd(M, full_matrices=False)
    s = s / (jnp.sqrt(jnp.sum(M**2)) + eps)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s[None]) @ Vt


def adaptive_muon(columns: bool, sign: bool = False) -> Callable[..., Any]:
    def step(h: Any, n: Any, w: Any, g: Any, s: Any) -> Any:
        s["m"] = h.beta * s["m"] + (1 - h.beta) * g
        M = jnp.sign(s["m"]) if sign else s["m"] / (1 - h.beta**n)
        O = singular_values_near_one(M, h.eps)  # noqa: E741
        new = jnp.broadcast_to(jnp.mean(O**2, axis=0)[None], O.shape) if columns else O**2
        s["v"] = h.b2 * s["v"] + (1 - h.b2) * new
        D = O / (jnp.sqrt(s["v"]) + h.eps)
        w = w - h.learning_rate * h.weight_decay * w
        return w - 0.2 * h.learning_rate * math.sqrt(w.size) * D / jnp.sqrt(jnp.sum(D**2))

    return step


def adam_like(combine: Callable[..., Any]) -> Callable[..., Any]:
    def step(h: Any, n: Any, w: Any, g: Any, s: Any) -> Any:
        s["m"] = h.b1 * s["m"] + (1 - h.b1) * g
        s["v"] = h.b2 * s["v"] + (1 - h.b2) * g**2
        u = s["m"] / (1 - h.b1**n) / (jnp.sqrt(s["v"] / (1 - h.b2**n)) + h.eps)
        return w - h.learning_rate * h.weight_decay * w - h.learning_rate * combine(s["m"], u, g)

    return step


def masked(m: Any, u: Any, g: Any) -> Any:
    mask = jnp.where(m * g > 0, 1.0, 0.0)
    return u * mask / jnp.maximum(mask.sum() / mask.size, 1e-3)


INTERVAL = 4


def sophia_oracle() -> Oracle:
    """The step of optax, with an average of the curvature that is refreshed before it."""
    given = optax.GradientTransformationExtraArgs(lambda w: None, lambda g, s, params=None, *, nu: (nu, s))

    def make(h: Any) -> Any:
        arguments = {k: getattr(h, k) for k in ("b1", "b2", "eps", "gamma", "clip_threshold")}
        scale = optax.contrib._sophia.scale_by_sophia(hessian_diagonal_fn=given, **arguments)
        decay = optax.add_decayed_weights(h.weight_decay)
        return optax.chain(scale, decay, optax.scale_by_learning_rate(h.learning_rate))

    def init(w: Any) -> Any:
        return make(SimpleNamespace(**dict.fromkeys(RANGES, 0.5))).init(w)

    def step(h: Any, t: Any, w: Any, g: Any, state: Any, meta: Any) -> Any:
        H = jax.hessian(lambda w: loss(w, meta, t))(w)
        keys = dict(zip(sorted(w), jax.random.split(jax.random.fold_in(jax.random.key(3), t), len(w))))
        signs = {k: jax.random.rademacher(keys[k], x.shape, x.dtype) for k, x in w.items()}

        def estimate(k: str) -> Any:
            return signs[k] * sum(jnp.tensordot(H[k][j], signs[j], signs[j].ndim) for j in w)

        nu = {
            k: jnp.where(t % INTERVAL == 0, h.b2 * v + (1 - h.b2) * estimate(k), v)
            for k, v in state[0].nu.items()
        }
        updates, state = make(h).update(g, (state[0]._replace(nu=nu), *state[1:]), w, nu=nu)
        return optax.apply_updates(w, updates), state

    return Oracle(init, step)


class Case(NamedTuple):
    """An optimizer, its oracle, and a rate at which its run neither diverges nor stands still."""

    optimizer: Optimizer
    oracle: Oracle
    rate: float = 0.05
    shapes: dict[str, tuple[int, ...]] = ONE
    ranges: dict[str, tuple[float, float]] = {}  # noqa: RUF012
    zero: tuple[str, ...] = ()  # hyperparameters whose hypergradient is exactly 0
    tolerance: float = 1e-9


RANGES = {
    "learning_rate": (0.0, 1.0),
    "momentum": (0.5, 0.95),
    "beta": (0.5, 0.95),
    "b1": (0.5, 0.95),
    "b2": (0.8, 0.99),
    "b3": (0.9, 0.99),
    "eps": (1e-3, 1e-2),
    "eps_root": (1e-4, 1e-3),
    "weight_decay": (0.1, 0.5),
    "alpha": (1.0, 3.0),
    "gamma": (0.5, 1.0),
    "clip_threshold": (0.5, 1.0),
    "clipping_threshold": (0.3, 0.9),
    "decay_rate": (0.6, 0.9),
    "weight_decay_rate": (0.001, 0.01),
    "estim_lr_coef": (0.8, 1.2),
    "ema_decay": (0.8, 0.95),
}
chain, decays = optax.chain, optax.add_decayed_weights
CASES = {
    "signum": Case(
        hg.signum(),
        of_optax(
            lambda h: chain(
                optax.ema(h.beta, debias=False),
                optax.scale_by_sign(),
                decays(h.weight_decay),
                optax.scale_by_learning_rate(h.learning_rate),
            )
        ),
        zero=("beta",),
    ),
    "lion": Case(
        hg.lion(),
        of_optax(lambda h: optax.lion(h.learning_rate, h.b1, h.b2, weight_decay=h.weight_decay)),
        zero=("b1", "b2"),
    ),
    "grams": Case(hg.grams(), by_leaf(adam_like(lambda m, u, g: jnp.sign(g) * abs(u)), "m", "v")),
    "cautious_adamw": Case(hg.cautious_adamw(), by_leaf(adam_like(masked), "m", "v"), shapes=SHAPES),
    "adabelief": Case(
        hg.adabelief(),
        of_optax(lambda h: optax.adabelief(h.learning_rate, h.b1, h.b2, h.eps, h.eps_root)),
    ),
    "yogi": Case(hg.yogi(), of_optax(lambda h: optax.yogi(h.learning_rate, h.b1, h.b2, h.eps))),
    "adopt": Case(
        hg.adopt(),
        of_optax(lambda h: optax.contrib.adopt(h.learning_rate, h.b1, h.b2, h.eps)),
        ranges={"eps": (0.1, 0.4)},
        tolerance=1e-6,  # optax counts steps in float32
    ),
    "adopt(use_clipping=False)": Case(
        hg.adopt(use_clipping=False),
        of_optax(lambda h: optax.contrib.adopt(h.learning_rate, h.b1, h.b2, h.eps, use_clipping=False)),
        ranges={"eps": (0.1, 0.4)},
    ),
    "ademamix": Case(
        hg.ademamix(),
        of_optax(
            lambda h: optax.contrib.ademamix(
                h.learning_rate, h.b1, h.b2, h.b3, h.alpha, h.eps, weight_decay=h.weight_decay
            )
        ),
    ),
    "sophia": Case(
        hg.sophia(hg.hutchinson(loss, seed=3), update_interval=INTERVAL), sophia_oracle(), shapes=SHAPES
    ),
    "muon": Case(
        hg.muon(),
        of_optax(
            lambda h: optax.contrib.muon(
                h.learning_rate, beta=h.beta, eps=h.eps, weight_decay=h.weight_decay, nesterov=False
            )
        ),
        shapes=MATRICES,
    ),
    "muon(consistent_rms=0.2)": Case(
        hg.muon(ns_steps=3, consistent_rms=0.2),
        of_optax(
            lambda h: optax.contrib.muon(
                h.learning_rate,
                ns_steps=3,
                beta=h.beta,
                eps=h.eps,
                weight_decay=h.weight_decay,
                nesterov=False,
                consistent_rms=0.2,
            )
        ),
        shapes=MATRICES,
    ),
    "normuon": Case(hg.normuon(), by_leaf(adaptive_muon(columns=True), "m", "v"), shapes=MATRICES),
    "adamuon": Case(
        hg.adamuon(),
        by_leaf(adaptive_muon(columns=False, sign=True), "m", "v"),
        shapes=MATRICES,
        zero=("beta",),
    ),
    "adamuon(sign=False)": Case(
        hg.adamuon(sign=False), by_leaf(adaptive_muon(columns=False), "m", "v"), shapes=MATRICES
    ),
    "madgrad": Case(
        hg.madgrad(),
        of_optax(lambda h: optax.contrib.madgrad(h.learning_rate, h.momentum, h.weight_decay, h.eps)),
        tolerance=1e-6,  # optax counts steps in float32
    ),
    "dadapt_adamw": Case(
        hg.dadapt_adamw(estim_lr0=1e-2),
        of_optax(
            lambda h: optax.contrib.dadapt_adamw(
                h.learning_rate, (h.b1, h.b2), h.eps, estim_lr0=1e-2, weight_decay=h.weight_decay
            )
        ),
        rate=1.0,
        shapes=SHAPES,
    ),
    "prodigy": Case(
        hg.prodigy(estim_lr0=1e-2),
        of_optax(
            lambda h: optax.contrib.prodigy(
                h.learning_rate,
                (h.b1, h.b2),
                eps=h.eps,
                estim_lr0=1e-2,
                estim_lr_coef=h.estim_lr_coef,
                weight_decay=h.weight_decay,
            )
        ),
        rate=1.0,
        shapes=SHAPES,
    ),
    "prodigy(safeguard_warmup=True)": Case(
        hg.prodigy(estim_lr0=1e-2, safeguard_warmup=True),
        of_optax(
            lambda h: optax.contrib.prodigy(
                h.learning_rate,
                (h.b1, h.b2),
                eps=h.eps,
                estim_lr0=1e-2,
                estim_lr_coef=h.estim_lr_coef,
                weight_decay=h.weight_decay,
                safeguard_warmup=True,
            )
        ),
        rate=1.0,
        shapes=SHAPES,
    ),
    "novograd": Case(
        hg.novograd(),
        of_optax(lambda h: optax.novograd(h.learning_rate, h.b1, h.b2, h.eps, weight_decay=h.weight_decay)),
        shapes=SHAPES,
        ranges={"b2": (0.25, 0.6)},
    ),
    "adafactor": Case(
        hg.adafactor(min_dim_size_to_factor=3),
        of_optax(
            lambda h: optax.adafactor(
                h.learning_rate,
                min_dim_size_to_factor=3,
                decay_rate=h.decay_rate,
                clipping_threshold=h.clipping_threshold,
                momentum=h.momentum,
                weight_decay_rate=h.weight_decay_rate,
                eps=h.eps,
                dtype_momentum=None,
            )
        ),
        rate=0.2,
        shapes=SHAPES,
    ),
}
KEPT = {
    name
    for name, case in CASES.items()
    if any(
        isinstance(move, Keep)
        for move in case.optimizer.moves(SimpleNamespace(**dict.fromkeys(RANGES, jnp.float32(0.5))), 0)
    )
}


def schedules(case: Case, dtype: Any = jnp.float64) -> dict[str, Any]:
    """Every hyperparameter by step."""
    rng = np.random.default_rng(1)
    ranges = RANGES | {"learning_rate": (0.5 * case.rate, case.rate)} | case.ranges
    return {name: jnp.asarray(rng.uniform(*ranges[name], STEPS), dtype) for name in case.optimizer.hypers}


def everything(case: Case, dtype: Any = jnp.float64) -> dict[str, Any]:
    w = start(case.shapes, dtype)
    return {"params": w, "hypers": schedules(case, dtype), "meta": jnp.asarray(0.3, dtype)}


def judged(w: Any, losses: Any) -> Any:
    return sum(jnp.sum(jnp.sin(x) + x**2) for x in jax.tree.leaves(w)) + jnp.mean(losses)


def expected_run(case: Case) -> Callable[[Any], Any]:
    def run(e: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            (w, state), (t, h) = carry, x
            value, g = jax.value_and_grad(loss)(w, e["meta"], t)
            return case.oracle.step(SimpleNamespace(**h), t, w, g, state, e["meta"]), value

        init = (e["params"], case.oracle.init(e["params"]))
        (w, _), losses = jax.lax.scan(step, init, (jnp.arange(STEPS), e["hypers"]))
        return judged(w, losses), w

    return run


def found_run(case: Case, adjoint: Any, optimizer: Optimizer | None = None) -> Callable[[Any], Any]:
    optimizer = case.optimizer if optimizer is None else optimizer

    def run(e: Any) -> Any:
        t = hg.train(
            loss, e["params"], e["hypers"], e["meta"], steps=STEPS, optimizer=optimizer, adjoint=adjoint
        )
        return judged(t.params, t.losses), t.params

    return run


def differentiated(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return jax.jit(jax.value_and_grad(run, has_aux=True))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for (path, b), a in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(found)):
        error = float(jnp.linalg.norm(jnp.ravel(a - b)))
        size = float(jnp.linalg.norm(jnp.ravel(b)))
        assert error <= tolerance * size, (jax.tree_util.keystr(path), error, size)


def assert_slopes(value: Callable[[Any], float], e: Any, gradient: Any, tolerance: float = 1e-6) -> None:
    """Of a function in each hyperparameter, the start and meta, by differences of fourth order."""
    rng = np.random.default_rng(2)
    paths, structure = jax.tree_util.tree_flatten_with_path(e)
    for k, (path, x) in enumerate(paths):
        direction = x * rng.normal(size=x.shape)

        def along(h: float, k: int = k, x: Any = x, direction: Any = direction) -> float:
            leaves = [y for _, y in paths]
            return value(structure.unflatten([*leaves[:k], x + h * direction, *leaves[k + 1 :]]))

        h = 1e-5
        coarse, fine = (along(2 * h) - along(-2 * h)) / (4 * h), (along(h) - along(-h)) / (2 * h)
        difference = (4 * fine - coarse) / 3
        slope = float(jnp.vdot(jax.tree.leaves(gradient)[k], direction))
        wrong = abs(slope - difference)
        assert wrong <= tolerance * abs(difference) + 1e-8, (jax.tree_util.keystr(path), slope, difference)


def some(names: set[str], quick: set[str]) -> list[Any]:
    """The others take seconds to compile."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in sorted(names)]


@pytest.mark.parametrize("name", some(set(CASES), {"sophia"}))
@pytest.mark.usefixtures("x64")
def test_is_its_oracle_with_its_derivatives(name: str) -> None:
    """The end of 50 steps and derivatives in everything, which agree with finite differences."""
    case = CASES[name]
    e = everything(case)
    oracle = differentiated(expected_run(case))
    (value, end), gradient = oracle(e)
    moved = [float(jnp.linalg.norm(end[k] - e["params"][k])) for k in end]
    assert min(moved) > 0.1 and math.isfinite(float(value)), moved

    (_, found_end), found = differentiated(found_run(case, hg.Stored(), unrounded(case.optimizer)))(e)
    assert_close(found_end, end, case.tolerance)
    assert_close(found, gradient, 10 * case.tolerance)
    for hyper in case.optimizer.hypers:
        zero = bool(jnp.all(found["hypers"][hyper] == 0))
        assert zero == (hyper in case.zero), hyper
    assert_slopes(lambda e: float(oracle(e)[0][0]), e, gradient)


@pytest.mark.quick("lion")
@pytest.mark.parametrize("name", some(set(CASES), {"lion", "muon"}))
@pytest.mark.usefixtures("x64")
def test_reversed_is_its_oracle_with_its_derivatives(name: str) -> None:
    case = CASES[name]
    e = everything(case)
    (_, end), gradient = differentiated(expected_run(case))(e)
    (_, found_end), found = differentiated(found_run(case, hg.Reversible(bits=3)))(e)
    assert_close(found_end, end, 1e-6)
    assert_close(found, gradient, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - {"sophia"}))  # whose signs are others in float64
def test_is_its_oracle_in_float32(name: str) -> None:
    """To the rounding of 50 steps, in units of the start."""
    case = CASES[name]
    e = everything(case, jnp.float32)
    _, found = jax.jit(found_run(case, hg.Stored()))(e)
    with jax.enable_x64(True):
        _, expected = jax.jit(expected_run(case))(everything(case))
    for leaf, x in found.items():
        error = np.linalg.norm(np.asarray(x, np.float64) - np.asarray(expected[leaf]))
        assert error < 3e-6 * np.linalg.norm(e["params"][leaf]), leaf


def test_every_program_with_a_kept_array_is_known() -> None:
    assert {"lion", "grams", "cautious_adamw", "yogi"} == KEPT
    assert all(case.optimizer.reversible for case in CASES.values())


# What reversal costs: by the defaults; the docstrings say the same.

log = math.log2
BITS = {
    "signum": 0.152,
    "lion": log(3) + 0.0145,
    "grams": log(3) + 0.153,
    "cautious_adamw": 1.153,
    "adabelief": 0.153,
    "yogi": log(3) + 0.152,
    "adopt": 0.152,
    "ademamix": 0.154,
    "sophia": 0.053,
    "muon": 0.074,
    "normuon": 0.074,
    "adamuon": 0.148,
    "madgrad": 0.152,
    "prodigy": 0.154,
    "dadapt_adamw": 0.154,
    "novograd": 0.152,
    "adafactor": 0.152,
}


def test_bits_of_every_optimizer() -> None:
    assert set(BITS) == {name.partition("(")[0] for name in CASES}
    for name, bits in BITS.items():
        optimizer = hg.sophia(hg.hutchinson(loss)) if name == "sophia" else getattr(hg, name)()
        h = SimpleNamespace(**optimizer.hypers | {"learning_rate": 1e-6, "weight_decay": 0.0})
        leaf = jnp.zeros((300, 200))
        small = {v for v, kept in optimizer.variables.items() if kept.init(leaf).size < leaf.size}
        costs = []
        for t in range(1, 11) if name == "sophia" else [1]:
            for move in optimizer.moves(h, jnp.int32(t)):
                if isinstance(move, Keep):
                    costs.append(log(len(move.levels)))
                elif isinstance(move, Scale) and move.variable not in small and not callable(move.factor):
                    costs.append(float(exact.cost(move.numerator(jnp.asarray(move.factor)))) / exact.BIT)
        steps = 10 if name == "sophia" else 1
        assert sum(costs) / steps == pytest.approx(bits, abs=1e-3), name


# Pieces.


@pytest.mark.usefixtures("x64")
def test_newton_schulz_of_every_shape() -> None:
    rng = np.random.default_rng(0)
    for shape in ((4, 2), (2, 3)):
        M = jnp.asarray(rng.normal(size=shape))
        made = jax.jit(newton_schulz)(M)
        np.testing.assert_allclose(made, singular_values_near_one(M, 1e-8), rtol=1e-9, atol=1e-9)
        values = jnp.linalg.svdvals(made)
        assert float(values.min()) > 0.68 and float(values.max()) < 1.21
    value, slope = jax.jit(jax.value_and_grad(lambda M: jnp.sum(newton_schulz(M))))(jnp.zeros((2, 3)))
    assert float(value) == 0 and bool(jnp.all(jnp.isfinite(slope)))


@pytest.mark.usefixtures("x64")
def test_estimates_of_the_diagonal_are_right_on_average() -> None:
    """And the same whenever they are asked for."""
    steps = jnp.arange(4000)
    w, x = jnp.array([[0.3, -0.5], [0.2, 0.1]]), jnp.array([[1.0, 0.5], [-0.3, 1.0], [0.8, -1.2]])

    def coupled(w: Any, meta: Any, batch: Any) -> Any:
        return jnp.sum(jnp.cos(w)) + jnp.sum(w) ** 2

    hutchinson = jax.jit(jax.vmap(lambda t: hg.hutchinson(coupled)(w, None, None, t)))(steps)
    np.testing.assert_allclose(hutchinson.mean(axis=0), 2 - jnp.cos(w), atol=0.2)
    np.testing.assert_array_equal(hg.hutchinson(coupled)(w, None, None, steps[7]), hutchinson[7])
    assert float(jnp.std(hutchinson[:, 0, 0])) > 0.5

    estimate = hg.gauss_newton_bartlett(lambda w, meta, batch: batch @ w, curvature.categorical())
    drawn = jax.jit(jax.vmap(lambda t: estimate(w, None, x, t)))(steps)
    p = jax.nn.softmax(x @ w, axis=1)
    fisher = jnp.mean(x[:, :, None] ** 2 * (p * (1 - p))[:, None, :], axis=0)
    np.testing.assert_allclose(drawn.mean(axis=0), fisher, rtol=0.1)
    assert float(drawn.min()) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("x64")
def test_coordinates_whose_gradient_is_zero(name: str) -> None:
    """As of pixels at the edge of images: they leave hypergradients finite, and right."""
    case = CASES[name]
    if case.shapes is MATRICES:  # without the first row of few, the rest is of rank one and turns too fast
        case = case._replace(shapes={"tall": (5, 3)})

    def without_first(w: Any, meta: Any, step: Any) -> Any:
        return loss(jax.tree.map(lambda x: x[1:], w), meta, step)

    optimizer = case.optimizer
    if name == "sophia":
        optimizer = hg.sophia(hg.hutchinson(without_first), update_interval=INTERVAL)
    optimizer = unrounded(optimizer)

    def run(e: Any) -> Any:
        arguments = {"steps": STEPS, "optimizer": optimizer, "adjoint": hg.Stored()}
        t = hg.train(without_first, e["params"], e["hypers"], e["meta"], **arguments)
        return judged(t.params, t.losses)

    e = everything(case)
    value = jax.jit(jax.value_and_grad(run))
    _, gradient = value(e)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(gradient))
    assert_slopes(lambda e: float(value(e)[0]), e, gradient, 1e-5)


# The average of the parameters.


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_average_of_the_parameters() -> None:
    optimizer = hg.with_average(hg.clip(hg.heavy_ball()))
    assert optimizer.reversible
    rng = np.random.default_rng(0)
    names = {"learning_rate": (0.01, 0.05), "momentum": (0.5, 0.9), "ema_decay": (0.8, 0.95)}
    hypers = {k: jnp.asarray(rng.uniform(*r, STEPS)) for k, r in names.items()}
    e = {"params": start(ONE)["matrix"], "hypers": hypers | {"max_delta": jnp.asarray(0.3)}}

    def found(e: Any) -> Any:
        arguments = {"steps": STEPS, "optimizer": optimizer, "adjoint": hg.Reversible(bits=1)}
        t = hg.train(loss, e["params"], e["hypers"], 0.3, **arguments)
        return judged(t.state["average"], t.losses), (t.params, t.state["average"])

    def expected(e: Any) -> Any:
        bound = e["hypers"]["max_delta"]

        def step(carry: Any, x: Any) -> Any:
            (w, v, average), (t, rate, momentum, decay) = carry, x
            value, g = jax.value_and_grad(loss)(w, 0.3, t)
            v = momentum * v + jnp.clip(g, -bound, bound)
            w = w - rate * v
            return (w, v, decay * average + (1 - decay) * w), value

        w = e["params"]
        inputs = (jnp.arange(STEPS), *(e["hypers"][name] for name in names))
        (w, _, average), losses = jax.lax.scan(step, (w, 0 * w, w), inputs)
        return judged(average, losses), (w, average)

    (_, ends), gradient = differentiated(found)(e)
    (_, right_ends), right = differentiated(expected)(e)
    assert_close(ends, right_ends, 1e-8)
    assert_close(gradient, right, 1e-7)


def test_average_is_refused_beside_what_is_no_program_or_has_one() -> None:
    whole = hg.from_optax(optax.sgd, {"learning_rate": None})
    with pytest.raises(TypeError, match=r"with_average\(from_optax\(sgd\)\).*no program of moves.*watch="):
        hg.with_average(whole)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"with_average.*keeps an average already"):
        hg.with_average(hg.with_average(hg.adam()))


# Weight decay for matrices only.


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_weight_decay_for_matrices_only() -> None:
    w = start(SHAPES)
    mask = jax.tree.map(lambda x: x.ndim == 2, w)

    def found(e: Any) -> Any:
        decay = jax.tree.map(lambda matrix: e["decay"] if matrix else 0.0, mask)
        hypers = {"learning_rate": e["rate"], "weight_decay": decay, "eps": 1e-3}
        arguments = {"steps": STEPS, "optimizer": hg.adamw(), "adjoint": hg.Reversible(bits=1)}
        t = hg.train(loss, e["params"], hypers, 0.3, **arguments)
        return judged(t.params, t.losses), t.params

    make = lambda h: optax.adamw(h.rate, eps=1e-3, weight_decay=h.decay, mask=mask)  # noqa: E731

    def expected(e: Any) -> Any:
        transformation = make(SimpleNamespace(**e))

        def step(carry: Any, t: Any) -> Any:
            w, state = carry
            value, g = jax.value_and_grad(loss)(w, 0.3, t)
            updates, state = transformation.update(g, state, w)
            return (optax.apply_updates(w, updates), state), value

        init = (e["params"], transformation.init(e["params"]))
        (w, _), losses = jax.lax.scan(step, init, jnp.arange(STEPS))
        return judged(w, losses), w

    e = {"params": w, "rate": jnp.asarray(0.05), "decay": jnp.asarray(0.4)}
    (_, end), gradient = differentiated(found)(e)
    (_, right_end), right = differentiated(expected)(e)
    assert_close(end, right_end, 1e-8)
    assert_close(gradient, right, 1e-7)


# Factors are multiples of 2**-32.


@pytest.mark.usefixtures("x64")
def test_rounded_decay_of_adam() -> None:
    """docs/own-optimizers.md says how wrong derivatives are at 0.9999 in float64."""
    w = jnp.array([1.0, -0.5, 0.7])

    def loss(w: Any, meta: Any, t: Any) -> Any:
        return jnp.sum(jnp.array([0.3, 1.0, 2.0]) * w**2 + jnp.cos(2 * w + t))

    def found(b1: Any, b2: Any) -> Any:
        hypers = {"learning_rate": 0.05, "b1": b1, "b2": b2}
        arguments = {"steps": 30, "optimizer": hg.adam(), "adjoint": hg.Stored()}
        return jnp.sum(hg.train(loss, w, hypers, **arguments).params ** 2)

    def right(b1: Any, b2: Any) -> Any:
        def step(carry: Any, t: Any) -> Any:
            w, m, v = carry
            g = jax.grad(loss)(w, None, t)
            m, v, n = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2, t + 1.0
            return (w - 0.05 * m / (1 - b1**n) / (jnp.sqrt(v / (1 - b2**n)) + 1e-8), m, v), None

        return jnp.sum(jax.lax.scan(step, (w, 0 * w, 0 * w), jnp.arange(30))[0][0] ** 2)

    slopes = [jax.jit(jax.grad(f, (0, 1))) for f in (found, right)]

    def wrong(b2: float) -> list[float]:
        return [abs(float(a / b) - 1) for a, b in zip(*(slope(0.9, b2) for slope in slopes))]

    b1, b2 = wrong(0.9999)
    assert b1 < 2e-8 and 3e-5 < b2 < 5e-5
    assert wrong(0.999)[1] < 5e-6
    assert wrong(round(0.9999 * 2**32) / 2**32)[1] < 2e-8


# What is refused.


@pytest.mark.parametrize("make", [hg.muon, hg.normuon, hg.adamuon])
def test_only_matrices_are_made_orthogonal(make: Callable[[], Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"muon\(\): a leaf of params has shape \[3\], and only matrices"):
        hg.train(loss, jnp.ones(3), {"learning_rate": 0.1}, 0.3, steps=2, optimizer=make())


REFUSED = [
    (hg.normuon(), "b2"),
    (hg.novograd(), "b2"),
    (hg.adafactor(), "decay_rate"),
    (hg.prodigy(), "b1"),
    (hg.dadapt_adamw(), "b2"),
]


@pytest.mark.parametrize(("optimizer", "hyper"), REFUSED)
def test_a_number_of_a_leaf_must_not_differ_within_it(optimizer: Optimizer, hyper: str) -> None:
    hypers = {"learning_rate": 0.1, hyper: jnp.full((1, 2, 2), 0.5)}
    name = optimizer.name.partition("(")[0]
    with pytest.raises(ValueError, match=rf"{name}\(\): {hyper} has shape \[2, 2\].*one number per leaf"):
        hg.train(loss, jnp.ones((2, 2)), hypers, 0.3, steps=2, optimizer=optimizer)


def test_refuses_an_interval_of_sophia_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"sophia\(update_interval=0\): update_interval must be"):
        hg.sophia(hg.hutchinson(loss), update_interval=0)


# Elsewhere.


@pytest.mark.parametrize("name", ["signum", "muon", "madgrad", "prodigy"])
def test_is_tuned_by_playing_back(name: str) -> None:
    """Although its module knows domains of more hyperparameters than it has."""
    optimizer = CASES[name].optimizer
    adjoint = tuning._adjoint(optimizer, {"learning_rate": 0.1} | optimizer.hypers, 10)
    assert isinstance(adjoint, hg.Reversible)


def test_a_kept_sign_as_an_optax_transformation() -> None:
    w = jnp.array([1.0, -2.0, 0.0])
    ours = hg.as_optax(hg.lion(), {"learning_rate": 0.1, "weight_decay": 0.1})
    theirs = optax.lion(0.1, weight_decay=0.1)
    states = ours.init(w), theirs.init(w)
    ends = [w, w]
    for k in range(3):
        for i, (transformation, state) in enumerate(zip((ours, theirs), states)):
            gradient = jnp.cos(3 * ends[i] + k)
            updates, new = transformation.update(gradient, state, ends[i])
            ends[i] = optax.apply_updates(ends[i], updates)
            states = (new, states[1]) if i == 0 else (states[0], new)
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-6)
    assert float(jnp.abs(ends[0] - w).max()) > 0.1


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("madgrad", 300),
        *(pytest.param(name, 10_000, marks=pytest.mark.slow) for name in sorted(CASES)),
    ],
)
def test_returns_to_the_start_bit_for_bit(name: str, steps: int) -> None:
    """In float32, with hyperparameters that vary by step.  `Reversible` itself compares every bit."""
    case = CASES[name]
    e = everything(case, jnp.float32)
    hypers = jax.tree.map(lambda x: jnp.resize(x, (steps,)), e["hypers"])
    hypers["learning_rate"] *= 0.01  # at larger ones hypergradients of orthogonal steps overflow
    bowl = jnp.float32(3.0)  # convex

    def outer(hypers: Any) -> Any:
        arguments = {"steps": steps, "optimizer": case.optimizer, "adjoint": hg.Reversible(bits=3)}
        t = hg.train(loss, e["params"], hypers, bowl, **arguments)
        return judged(t.params, t.losses)

    found = jax.jit(jax.grad(outer))(hypers)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))
    assert bool(jnp.any(found["learning_rate"] != 0))
